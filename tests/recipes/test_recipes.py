import re

import pytest
import yaml

from wsss_hf.models.methods import METHODS
from wsss_hf.recipes import RecipeError, load_recipe, recipe_names


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def settings_of(recipe, prefix=""):
    """Dotted names of all settings, open mappings as one."""
    for key, value in recipe.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and not dotted.endswith((".methods", ".backbone_config")):
            yield from settings_of(value, f"{dotted}.")
        else:
            yield dotted


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_has_every_setting_and_known_methods(name):
    recipe = load_recipe(name)
    assert set(settings_of(recipe)) == set(settings_of(load_recipe()))
    assert set(recipe["cam"]["methods"]) <= set(METHODS)


def test_later_sources_win_and_leave_the_rest_alone(recipe_file):
    default = load_recipe()
    mine = recipe_file("seed: 7\ncam: {train: {epochs: 3, batch_size: 2}}")
    recipe = load_recipe(mine, ["cam.train.epochs=4", "masks.flip=false", "cam.train.epochs=5"])
    assert recipe["seed"] == 7
    assert recipe["cam"]["train"] == default["cam"]["train"] | {"epochs": 5, "batch_size": 2}
    assert recipe["masks"] == default["masks"] | {"flip": False}
    assert recipe["evaluation"] == default["evaluation"]


@pytest.mark.parametrize("name", recipe_names())
def test_a_setting_of_one_stage_is_no_setting_of_another(name):
    before = load_recipe(name)
    after = load_recipe(name, ["cam.train.epochs=99", "cam.backbone_config={depths: [9]}"])
    assert after["cam"]["train"]["epochs"] == 99 and after["cam"]["backbone_config"]["depths"] == [9]
    assert after["segmenter"] == before["segmenter"]


def test_a_segmenters_recipe_goes_with_any_methods(recipe_file):
    both, method, segmenter = (load_recipe(name) for name in ("voc_icd+segformer", "voc_icd", "segformer"))
    assert both["cam"] == method["cam"] and both["masks"] == method["masks"] and both["image"] == method["image"]
    assert both["segmenter"]["model"] == segmenter["segmenter"]["model"]
    trainings = [recipe["segmenter"]["train"] | {"nesterov": None} for recipe in (both, segmenter)]
    assert trainings[0] == trainings[1]  # nothing of the method's own segmenter that AdamW would heed
    for name in ("segformer", "dpt", "upernet", "eomt", "voc_deeplab_v3_plus"):  # each is tested by its own protocol
        assert load_recipe(f"voc_icd+{name}")["evaluation"] == load_recipe(name)["evaluation"]
    mine = recipe_file("segmenter: {train: {steps: 7}}")
    assert load_recipe(f"segformer+{mine}")["segmenter"]["train"]["steps"] == 7
    with pytest.raises(RecipeError, match="recipe segfromer: no such file, and the package has .*segformer"):
        load_recipe("voc_icd+segfromer")


@pytest.mark.parametrize("name", ["voc_drs", "voc_icd", "voc_plda"])
def test_published_methods_end_in_the_published_segmenter(name):
    recipe, published = load_recipe(name), load_recipe("voc_deeplab_v2")
    assert recipe["segmenter"] == published["segmenter"] and recipe["evaluation"] == published["evaluation"]


def test_two_recipes_share_nothing():
    load_recipe()["cam"]["train"]["epochs"] = 99
    assert load_recipe()["cam"]["train"]["epochs"] != 99


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_being_written_down(tmp_path, name):
    recipe = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("image.mean=[0.5, 0.5, 0.5]", [0.5, 0.5, 0.5]),
        ("cam.backbone=some/model=v2", "some/model=v2"),
        ("cam.output_stride=null", None),
        ("masks.flip=no", False),
        ("cam.train.lr=1", 1),
        ("cam.train.lr=1e-3", 0.001),
        ("cam.train.mixed_precision=no", "no"),
        ("cam.train.lr=3E-4", 0.0003),
        ("masks.fusion=max", "max"),
    ],
)
def test_set_reads_the_value_as_data(text, value):
    found = load_recipe("default", [text])
    for part in text.partition("=")[0].split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cam: {train: {epoch: 3}}", r"mine.yaml: no setting cam.train.epoch; did you mean cam.train.epochs\?"),
        ("cams: {}", r"mine.yaml: no setting cams; did you mean cam\?"),
        ("masks: {zzz: 1}", "mine.yaml: no setting masks.zzz; there are scales, flip, fusion"),
        ("masks: {flip: 1}", "mine.yaml: masks.flip is 1; something like True would be right"),
        ("masks: [1", "mine.yaml: not YAML"),
        ("- seed", r"mine.yaml: a mapping of settings would be right, not \['seed'\]"),
        ("", "mine.yaml: a mapping of settings would be right, not None"),
    ],
)
def test_a_bad_recipe_is_named(recipe_file, text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe_file(text))
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_names_those_that_there_are():
    with pytest.raises(RecipeError, match="recipe tooy: no such file, and the package has default, .*toy"):
        load_recipe("tooy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("masks.flipp=true", r"--set masks.flipp=true: no setting masks.flipp; did you mean masks.flip\?"),
        ("masks.flip", "--set masks.flip: key=value would be right"),
        ("=3", "--set =3: key=value would be right"),
        ("masks.scales=[1", r"--set masks.scales=\[1: not YAML"),
        ("seed=true", "seed is True; something like 0 would be right"),
        ("seed=zero", "seed is 'zero'; something like 0 would be right"),
        ("masks.flip=0", "masks.flip is 0; something like True would be right"),
        ("masks.scales=1", "masks.scales is 1; something like"),
        ("masks=null", "masks is None; something like"),
        ("cam.train.epochs.more=3", "cam.train.epochs is {'more': 3}; something like"),
        ("cam.train.epochs=1.5", "cam.train.epochs is 1.5; something like"),
        ("masks.background_threshold=otto", "background_threshold is 'otto'; a number or auto would be right"),
        ("masks.background_threshold=2", r"background_threshold is 2; a number in \[0, 1\] or auto would be right"),
        ("masks.background_threshold=null", "background_threshold is None; a number in"),
        ("cam.methods=null", "cam.methods is None"),
        ("cam.methods=[drs]", r"cam.methods is \['drs'\]"),
        ("cam.backbone_config=resnet", "cam.backbone_config is 'resnet'"),
    ],
)
def test_a_bad_set_is_named(change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("default", [change])


def test_a_threshold_is_a_number_or_left_to_the_stage(recipe_file):
    mine = recipe_file("masks: {background_threshold: auto}")
    assert load_recipe(mine)["masks"]["background_threshold"] == "auto"
    assert load_recipe(mine, ["masks.background_threshold=0.3"])["masks"]["background_threshold"] == 0.3
    with pytest.raises(RecipeError, match="'otto'; a number or auto"):
        load_recipe(mine, ["masks.background_threshold=otto"])


def test_methods_and_backbones_bring_their_own_options(recipe_file):
    config = {"model_type": "resnet", "depths": [1, 1]}
    mine = recipe_file(yaml.safe_dump({"cam": {"backbone_config": config, "methods": {"drs": {"mode": "fixed"}}}}))
    recipe = load_recipe(mine, ["cam.methods.drs.delta=0.3", "cam.methods.other.weight=2", "cam.backbone_config.x=1"])
    assert recipe["cam"]["methods"] == {"drs": {"mode": "fixed", "delta": 0.3}, "other": {"weight": 2}}
    assert recipe["cam"]["backbone_config"] == {**config, "x": 1}
    assert load_recipe(mine, ["cam.methods.drs=null"])["cam"]["methods"] == {"drs": None}


def test_a_recipe_can_change_another_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: toy\ncam: {train: {epochs: 3}}\n")
    mine, toy = load_recipe(str(tmp_path / "mine.yaml")), load_recipe("toy")
    assert mine["cam"]["train"].pop("epochs") == 3 and toy["cam"]["train"].pop("epochs") != 3
    assert mine == toy and "base" not in mine

    for base, message in (("nowhere", "recipe nowhere: no such file"), ("[toy]", "base is ['toy']")):
        (tmp_path / "wrong.yaml").write_text(f"base: {base}\n")
        with pytest.raises(RecipeError, match=re.escape(message)):
            load_recipe(str(tmp_path / "wrong.yaml"))
    (tmp_path / "first.yaml").write_text(f"base: {tmp_path / 'second.yaml'}\n")
    (tmp_path / "second.yaml").write_text(f"base: {tmp_path / 'first.yaml'}\n")
    with pytest.raises(RecipeError, match="it is its own base"):
        load_recipe(str(tmp_path / "first.yaml"))
