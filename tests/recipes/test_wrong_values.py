"""Random wrong values of every setting and option: refused in one line before work begins, or of the declared type."""

import dataclasses
import random
import typing

import pytest
import yaml

from wsss_hf.models.options import OptionError, Options
from wsss_hf.recipes import Recipe
from wsss_hf.settings import EvaluationSettings, RecipeError, RecipeSettings

pytestmark = pytest.mark.slow

VALUES = [None, True, -1, 0, 1, 0.5, -0.5, 2.5, 1e30, 10**30, 10**400, float("nan"), float("inf"), -float("inf")]
VALUES += ["", "x", "auto", "a\nb", "\x00", "é", "1", "null", "!!python/object:os.system x", "${HOME}", "*"]
VALUES += [
    [],
    {},
    [None],
    [[]],
    [1, "x"],
    [float("nan")],
    [-1.0],
    [2.0, 1.0],
    {"x": 1},
    {1: 2},
    {"": None},
    [{}],
    [[1, 2]],
]
NAMES = [
    "",
    ".",
    "..",
    "cam.",
    ".seed",
    "cam.train.",
    "sed",
    "cam.train.epoch",
    "cam.methods.x",
    "masks.refine.0",
    "a=b",
]


def settings(options=None, prefix=""):
    """(dotted name, field) of every setting, sections too."""
    for field in dataclasses.fields(options or RecipeSettings()):
        name, value = f"{prefix}{field.name}", getattr(options or RecipeSettings(), field.name)
        yield name, field
        if isinstance(value, Options):
            yield from settings(value, f"{name}.")


def refused_or_fit(make, name):
    """The recipe; or None after one line that names the setting."""
    try:
        return make()
    except (RecipeError, OptionError) as error:
        text = str(error)
        assert "\n" not in text and "\0" not in text and len(text) < 1000, text
        assert name.rpartition(".")[2] in text
        return None


def test_settings():
    draw = random.Random(0)
    names = dict(settings())
    accepted = 0
    for _ in range(700):
        name, value = draw.choice(list(names)), draw.choice(VALUES)
        recipe = refused_or_fit(lambda name=name, value=value: Recipe.load("default", {name: value}), name)
        if recipe is None:
            continue
        accepted += 1
        again = yaml.safe_load(recipe.to_yaml())
        assert Recipe.from_dict(again, "") == recipe  # and it can be written and read
        held = recipe
        for part in name.split("."):
            held = getattr(held, part)
        kind = names[name].type
        assert "int" not in str(kind) or "float" in str(kind) or not isinstance(held, float), (name, held)
        assert not isinstance(held, float) or abs(held) < float("inf"), (name, held)
    assert 0 < accepted < 350


def test_methods_steps_rules_and_losses():
    draw = random.Random(1)
    places = [
        "cam.methods.{0}", "cam.methods.drs.{0}", "cam.methods.drs.mode", "cam.methods.seam.{0}", "masks.refine",
        "masks.seeds", "masks.seed_options", "segmenter.loss", "segmenter.loss_options", "evaluation.refine",
    ]  # fmt: skip
    for _ in range(150):
        name, value = draw.choice(places).format(draw.choice(["x", "", "delta", "drs"])), draw.choice(VALUES)
        if draw.random() < 0.5 and name.endswith("refine"):
            value = [{draw.choice(["crf", "pamr", "matting", "x"]): {draw.choice(["iterations", "y"]): value}}]
        refused_or_fit(lambda name=name, value=value: Recipe.load("default", {name: value}), "")


TINY = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


@pytest.mark.parametrize("section", ["cam", "segmenter"])
def test_configurations_of_backbones(section):
    name = f"{section}.backbone_config"
    assert Recipe.load("default", {name: TINY})
    for change in (
        {"layer_type": "abc"},
        {"hidden_sizes": 5},
        {"hidden_sizes": []},
        {"embedding_size": -1},
        {"model_type": "nope"},
        {"model_type": None},
        {"hidden_act": "x"},
        {"num_channels": 0},
        {"depths": ["x", 1]},
    ):
        wrong = TINY | change
        assert refused_or_fit(lambda wrong=wrong: Recipe.load("default", {name: wrong}), name) is None, change
    draw = random.Random(4)
    for _ in range(60):
        wrong = TINY | {draw.choice(list(TINY)): draw.choice([v for v in VALUES if not isinstance(v, int) or v < 10])}
        refused_or_fit(lambda wrong=wrong: Recipe.load("default", {name: wrong}), name)


def test_texts_of_set_and_names():
    draw = random.Random(2)
    names = [name for name, _ in settings()]
    texts = ["[", "{", "{a: ", "!!python/name:os.system", "&a [*a]", "@", "`", "%", "- 1", "a: b: c", "\t", "'", '"']
    for _ in range(150):
        text = f"{draw.choice([*names, *NAMES])}{draw.choice(['=', '', '==', ' = '])}{draw.choice(texts)}"
        refused_or_fit(lambda text=text: Recipe.load("default", [text]), "")
    assert typing.get_type_hints(RecipeSettings)  # the names above are those of typed settings


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"\x00", b"[1]", b"x", b"a: [", b"base: 3", b"base: nowhere", b"? x"]
)
def test_files_that_are_no_recipe(tmp_path, content):
    (tmp_path / "r.yaml").write_bytes(content)
    assert refused_or_fit(lambda: Recipe.load(str(tmp_path / "r.yaml")), "recipe") is None


def test_a_long_file_that_is_no_recipe_is_not_printed(tmp_path):
    (tmp_path / "passwords").write_text("root secret\n" * 100)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(str(tmp_path / "passwords"))
    assert len(str(caught.value)) < 400


def test_protocols_of_options():
    draw = random.Random(3)
    for _ in range(100):
        name, value = (
            draw.choice(["scales", "flip", "window", "workers", "batch_size", "refine", "x"]),
            draw.choice(VALUES),
        )
        refused_or_fit(lambda name=name, value=value: EvaluationSettings.from_dict({name: value}, ""), name)
