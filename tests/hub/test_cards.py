"""The committed cards are what their results files say."""

import ast
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from wsss_hf.hub.cards import recipe_cards
from wsss_hf.recipes import Recipe
from wsss_hf.reporting.tables import markdown_text

CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.fixture(scope="module")
def made():
    return json.loads((CARDS / "demo.json").read_text())


@pytest.mark.parametrize("name", [path.stem for path in CARDS.glob("*.json")])
@pytest.mark.parametrize("folder", ["cam", "segmenter"])
def test_a_committed_card_is_written_from_its_results(name, folder, tmp_path):
    made = json.loads((CARDS / f"{name}.json").read_text())
    licence = "apache-2.0" if made["data"]["source"] == "toy" else None
    recipe_cards(name, made, licence)[folder].save(tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text() == (CARDS / f"{name}-{folder}.md").read_text()


def test_other_results_make_another_card(made):
    before = recipe_cards("demo", made, "apache-2.0")["segmenter"]
    changed = json.loads(json.dumps(made))
    (row,) = [row for row in changed["results"] if row["of"] == "segmenter"]
    row["mean_iou"], row["iou"]["background"] = 0.123, 0.0123
    after = recipe_cards("demo", changed, "apache-2.0")["segmenter"]
    assert "| 12.3 |" in after.text and "| 12.3 |" not in before.text
    assert "| background | 1.2 |" in after.text and "weakest class is background" in after.text
    figures = {result.metric_type: result.metric_value for result in ModelCard(str(after)).data.eval_results}
    assert figures["mean_iou"] == 0.123


@pytest.mark.parametrize(
    ("masks", "saliency", "words"),
    [
        ("argmax", None, None),
        ("argmax", {"source": "owner/net", "learnt_from": "DUTS"}, None),  # the data have maps, and nobody read them
        ("drs", "maps", "saliency maps of maps; what their network learnt from is not recorded"),
        ("saliency", None, "saliency maps that the data hold; what their network learnt from is not recorded"),
        ("icd", None, None),
        (
            "icd",
            {"source": "owner/net", "learnt_from": "DUTS"},
            "saliency maps of owner/net; what they learnt from: DUTS",
        ),
    ],
)
def test_a_card_says_what_saliency_maps_a_result_rests_on(made, masks, saliency, words):
    changed = json.loads(json.dumps(made))
    changed["recipe"]["masks"]["seeds"], changed["data"]["saliency"], changed["command"] = masks, saliency, "run"
    for card in recipe_cards("demo", changed, "apache-2.0").values():
        assert ("image tags and saliency maps**" in card.text) == (words is not None)
        assert ("image tags only**" in card.text) == (words is None)
        assert words is None or card.text.count(f"but it rests on {words}.") == 1
        assert ("--saliency maps" in card.text) == (saliency == "maps")


def test_a_backbone_at_a_revision_is_known_by_its_id(made):
    changed = json.loads(json.dumps(made))
    changed["recipe"]["cam"] |= {"backbone": "owner/body@v2", "backbone_config": None}
    card = recipe_cards("demo", changed, "apache-2.0")["cam"]
    assert card.data.base_model == "owner/body" and "owner/body@v2" in card.text


def test_a_card_names_files_that_are_there_and_a_recipe_that_loads(made):
    for folder in ("cam", "segmenter"):
        text = (CARDS / f"demo-{folder}.md").read_text()
        assert "(demo.png)" in text and "--recipe demo.yaml" in text
    assert (CARDS / "demo.png").is_file()
    recipe = Recipe.load(str(CARDS / "demo.yaml"))
    assert recipe.segmenter.train.epochs == made["recipe"]["segmenter"]["train"]["epochs"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("traffic light_2", "traffic light_2"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("![](http://elsewhere/x.png)", r"!\[\](http://elsewhere/x.png)"),
        ("a|b `c` *d*\n# e", r"a\|b \`c\` \*d\* # e"),
    ],
)
def test_names_bring_no_markup_into_a_card(made, name, shown):
    changed = json.loads(json.dumps(made))
    for row in changed["results"]:
        if row.get("iou"):
            values = list(row["iou"].values())
            row["iou"] = dict(zip(["background", name, *list(row["iou"])[2:]], values, strict=True))
    for card in recipe_cards("demo", changed, "apache-2.0").values():
        assert f"classes: {shown}, " in card.text and f"| {shown} |" in card.text
        assert name in (shown, name.replace("\n", "")) or name not in card.text.partition("```")[0]


@pytest.mark.parametrize("name", ["<img src=x>`<img src=x>`", "![](http://elsewhere/x.png)\n# `a`", "a|b ~~c~~"])
def test_names_of_folders_and_networks_bring_no_markup_into_a_card(made, name):
    changed = json.loads(json.dumps(made)) | {"command": "run"}
    changed["data"] |= {"source": name, "saliency": {"source": name, "learnt_from": name}}
    changed["recipe"]["masks"]["seeds"] = "drs"
    changed["recipe"]["cam"] |= {"backbone": name, "backbone_config": None, "methods": {}}
    line, words = " ".join(name.split()), markdown_text(name)
    for folder, card in recipe_cards("demo", changed, "apache-2.0").items():
        text, _, rest = card.text.partition("```")
        shown = (text + rest).replace("`" + line.replace("`", "'") + "`", "")  # a span of code shows all as it is
        assert shown != text + rest
        assert f"it rests on saliency maps of {words}; what they learnt from: {words}." in shown
        assert f"**Backbone**: {words}" in shown or folder == "segmenter"


@pytest.mark.parametrize("name", ['"]);import os#', "it's", "a\\b", "käfer 🐞"])
def test_the_program_on_a_card_names_the_class_and_does_nothing_else(made, name):
    changed = json.loads(json.dumps(made))
    row = next(row for row in changed["results"] if row.get("iou"))
    row["iou"] = {"background": 0.5, name: 0.5}
    program = recipe_cards("demo", changed, None)["cam"].text.partition("```python\n")[2].partition("```")[0]
    call = ast.parse(program).body[-1].value
    (tags,) = [ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "tags"]
    assert tags == [name] and ast.unparse(call.func) == "segmenter"
