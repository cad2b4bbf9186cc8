import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from wsss_hf.models.drs import DrsConfig
from wsss_hf.models.icd import IcdConfig
from wsss_hf.models.methods import METHODS
from wsss_hf.recipes import Recipe, load_recipe, recipe_names
from wsss_hf.settings import RecipeError

ROWS = sorted((Path(__file__).parents[2] / "scripts" / "plans" / "rows").glob("*.yaml"))


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", [*recipe_names(), *map(str, ROWS)], ids=lambda name: Path(name).stem)
def test_a_recipe_of_the_package_or_of_a_plan_is_sound(name):
    recipe = load_recipe(name)
    assert type(recipe) is Recipe and set(recipe.cam.methods) <= set(METHODS)
    assert recipe.cam.backbone_config is None or recipe.cam.backbone_config["model_type"]


def test_the_package_has_no_rows_of_benchmarks():
    assert recipe_names()[0] == "default" and {"toy", "voc_drs", "segformer"} < set(recipe_names())
    assert not any(name.startswith(("small_", "toy_")) for name in recipe_names())


def test_later_sources_win_and_leave_the_rest_alone(recipe_file):
    default = load_recipe()
    mine = recipe_file("seed: 7\ncam: {train: {epochs: 3, batch_size: 2}}")
    recipe = load_recipe(mine, ["cam.train.epochs=4", "masks.flip=false", "cam.train.epochs=5"])
    assert recipe.seed == 7
    assert recipe.cam.train == dataclasses.replace(default.cam.train, epochs=5, batch_size=2)
    assert recipe.masks == dataclasses.replace(default.masks, flip=False)
    assert recipe.evaluation == default.evaluation


@pytest.mark.parametrize("name", recipe_names())
def test_a_setting_of_one_stage_is_no_setting_of_another(name):
    before = load_recipe(name)
    after = load_recipe(name, ["cam.train.epochs=99", "cam.backbone_config={depths: [9]}"])
    assert after.cam.train.epochs == 99 and after.cam.backbone_config["depths"] == [9]
    assert after.segmenter == before.segmenter


def test_a_segmenters_recipe_goes_with_any_methods(recipe_file):
    both, method, segmenter = (load_recipe(name) for name in ("voc_icd+segformer", "voc_icd", "segformer"))
    assert both.cam == method.cam and both.masks == method.masks and both.image == method.image
    assert both.segmenter.model == segmenter.segmenter.model
    trainings = [dataclasses.replace(recipe.segmenter.train, nesterov=True) for recipe in (both, segmenter)]
    assert trainings[0] == trainings[1]  # nothing of the method's own segmenter that AdamW would heed
    # Each is tested by its own protocol.
    for name in ("segformer", "dpt", "upernet", "eomt", "voc_deeplab_v1", "voc_deeplab_v3_plus"):
        assert load_recipe(f"voc_icd+{name}").evaluation == load_recipe(name).evaluation
    mine = recipe_file("segmenter: {train: {steps: 7}}")
    assert load_recipe(f"segformer+{mine}").segmenter.train.steps == 7
    with pytest.raises(RecipeError, match=r"recipe segfromer \(no such file\): unknown; did you mean segformer\?"):
        load_recipe("voc_icd+segfromer")


@pytest.mark.parametrize("name", ["voc_drs", "voc_icd", "voc_mat_label", "voc_seam", "voc_plda"])
def test_published_methods_end_in_the_published_segmenter(name):
    version = "v1" if name in ("voc_seam", "voc_plda") else "v2"
    recipe, published = load_recipe(name), load_recipe(f"voc_deeplab_{version}")
    assert recipe.segmenter == published.segmenter and recipe.evaluation == published.evaluation


@pytest.mark.parametrize(("method", "refines"), [("drs", True), ("icd", False)])
def test_published_methods_label_by_their_own_rule(method, refines):
    row = next(str(path) for path in ROWS if path.stem == f"small_{method}_saliency")
    for recipe in (load_recipe(f"voc_{method}"), load_recipe(row)):
        assert recipe.masks.seeds == method and method in recipe.cam.methods and recipe.refiner.use == refines
        assert not recipe.masks.flip  # neither program mirrors images
    assert load_recipe(row).segmenter.from_cam


def test_two_recipes_share_nothing():
    load_recipe().cam.train.epochs = 99
    assert load_recipe().cam.train.epochs != 99


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_being_written_down(tmp_path, name):
    recipe = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)) == recipe
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("image.mean=[0.5, 0.5, 0.5]", [0.5, 0.5, 0.5]),
        ("cam.backbone=some/model=v2", "some/model=v2"),
        ("cam.output_stride=null", None),
        ("masks.flip=no", False),
        ("cam.train.lr=1", 1.0),
        ("cam.train.lr=1e-3", 0.001),
        ("cam.train.mixed_precision=no", "no"),
        ("cam.train.lr=3E-4", 0.0003),
        ("masks.fusion=max", "max"),
    ],
)
def test_set_reads_the_value_as_data(text, value):
    found = load_recipe("default", [text])
    for part in text.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cam: {train: {epoch: 3}}", r"mine.yaml: cam.train.epoch: unknown; did you mean cam.train.epochs\?"),
        ("cams: {}", r"mine.yaml: cams: unknown; did you mean cam\?"),
        ("masks: {zzz: 1}", "mine.yaml: masks.zzz: unknown; expected scales, flip, fusion"),
        ("masks: {flip: 1}", "mine.yaml: masks.flip: expected true or false, got 1"),
        ("masks:", "mine.yaml: masks: expected a mapping of settings, got None"),
        ("masks: [1", "mine.yaml: not YAML"),
        ("- seed", r"mine.yaml: expected a mapping of settings, got \['seed'\]"),
        ("", "mine.yaml: expected a mapping of settings, got None"),
    ],
)
def test_a_bad_recipe_is_named(recipe_file, text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe_file(text))
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_names_those_that_there_are():
    with pytest.raises(RecipeError, match=r"recipe tooy \(no such file\): unknown; did you mean toy\?"):
        load_recipe("tooy")
    with pytest.raises(RecipeError, match=r"recipe a/b.yaml \(no such file\): unknown; expected default, .*toy"):
        load_recipe("a/b.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("masks.flipp=true", r"--set masks.flipp=true: masks.flipp: unknown; did you mean masks.flip\?"),
        ("masks.flip", "--set masks.flip: expected key=value, for example cam.train.epochs=3"),
        ("=3", "--set =3: expected key=value"),
        ("masks.scales=[1", r"--set masks.scales=\[1: not YAML"),
        ("seed=true", "seed: expected a whole number in .0, 4294967295., got True"),
        ("seed=zero", "seed: expected a whole number in .0, 4294967295., got 'zero'"),
        ("masks.flip=0", "masks.flip: expected true or false, got 0"),
        ("masks.scales=1", r"masks.scales: expected a list of numbers in .0, 8., got 1"),
        ("masks.scales=[]", r"masks.scales: expected a list of numbers in .0, 8., got \[\]"),
        ("masks=null", "masks: expected a mapping of settings, got None"),
        ("masks=3", "masks: expected a mapping of options, got 3"),
        ("cam.train.epochs.more=3", "cam.train.epochs: expected a whole number >= 1, got {'more': 3}"),
        ("cam.train.epochs=1.5", "cam.train.epochs: expected a whole number >= 1, got 1.5"),
        ("cam.train.optimizer=lion", "cam.train.optimizer: expected adamw or sgd, got 'lion'"),
        ("cam.train.schedule=cosine", "cam.train.schedule: expected poly or step, got 'cosine'"),
        ("cam.train.mixed_precision=bf61", "cam.train.mixed_precision: expected no, bf16 or fp16, got 'bf61'"),
        (
            "cam.train.scale=[2, 1]",
            r"cam.train.scale: expected a list of 2 numbers in .0, 8., ascending, got \[2, 1\]",
        ),
        (
            "masks.background_threshold=otto",
            r"background_threshold: expected a number in .* or auto, got 'otto'",
        ),
        ("masks.background_threshold=2", r"background_threshold: expected a number in \[0, 1\] or auto, got 2"),
        ("masks.background_threshold=null", "background_threshold: expected a number in"),
        ("cam.methods=null", "cam.methods: expected a mapping, got None"),
        ("cam.methods=[drs]", r"cam.methods: expected a mapping, got \['drs'\]"),
        ("cam.methods.dsr={}", r"cam.methods.dsr: unknown; did you mean cam.methods.drs\?"),
        ("cam.methods.drs.detla=1", r"cam.methods.drs.detla: unknown; did you mean cam.methods.drs.delta\?"),
        ("cam.maps=drs", "cam.maps: expected cam, got 'drs'"),
        ("cam.backbone_config=resnet", "cam.backbone_config: expected a mapping or null, got 'resnet'"),
        ("masks.refine=[crff]", r"masks.refine\[0\]: 'crff': unknown; did you mean crf\?"),
        ("evaluation.refine=[{crf: {x: 1}}]", r"evaluation.refine\[0\].crf.x: unknown; expected iterations"),
        (
            "affinity.label_confidence=0.5",
            r"affinity.label_confidence: expected a number in \(0.5, 1\) or null, got 0.5",
        ),
        ("masks.seeds=icdd", r"masks.seeds: 'icdd': unknown; did you mean icd\?"),
        ("masks.seed_options.q=1", "masks.seed_options.q: unknown; expected none"),
    ],
)
def test_a_bad_set_is_named(change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("default", [change])
    with pytest.raises(RecipeError, match=message):
        load_recipe().changed(change)


def test_a_threshold_is_a_number_or_left_to_the_stage(recipe_file):
    mine = recipe_file("masks: {background_threshold: auto}")
    assert load_recipe(mine).masks.background_threshold == "auto"
    assert load_recipe(mine, ["masks.background_threshold=0.3"]).masks.background_threshold == 0.3
    with pytest.raises(RecipeError, match="or auto, got 'otto'"):
        load_recipe(mine, ["masks.background_threshold=otto"])


def test_methods_and_backbones_bring_their_own_options(recipe_file):
    config = {"model_type": "resnet", "depths": [1, 1]}
    mine = recipe_file(yaml.safe_dump({"cam": {"backbone_config": config, "methods": {"drs": {"mode": "fixed"}}}}))
    recipe = load_recipe(mine, ["cam.methods.drs.delta=0.3", "cam.methods.icd.margin=0.3", "cam.backbone_config.x=1"])
    assert recipe.cam.methods == {
        "drs": dataclasses.asdict(DrsConfig(mode="fixed", delta=0.3)),  # all options are written out
        "icd": dataclasses.asdict(IcdConfig(margin=0.3)),
    }
    assert recipe.cam.backbone_config == {**config, "x": 1}
    assert load_recipe(mine, ["cam.methods.drs=null"]).cam.methods == {}


@pytest.mark.parametrize("changes", ["cam.methods={icd: {margin: 0.3}}", {"cam.methods": {"icd": {"margin": 0.3}}}])
def test_a_mapping_of_methods_takes_the_place_of_the_recipes(changes):
    assert list(load_recipe("photos").cam.methods) == ["seam"]
    recipe = load_recipe("photos", changes)
    assert recipe.cam.methods == {"icd": dataclasses.asdict(IcdConfig(margin=0.3))}
    assert load_recipe("photos", ["cam.methods={}"]).cam.methods == {}
    assert recipe.changed("cam.methods={drs: {}}", "cam.methods.seam={}").cam.methods.keys() == {"drs", "seam"}


def test_a_printed_recipe_is_a_recipe(recipe_file):
    recipe = load_recipe("photos", ["cam.train.epochs=3"])
    assert load_recipe(recipe_file(str(recipe))) == recipe


def test_an_attribute_is_checked_as_a_setting_is():
    recipe = load_recipe()
    with pytest.raises(ValueError, match=r"TrainSettings.epoch: unknown; did you mean TrainSettings.epochs\?"):
        recipe.cam.train.epoch = 3
    with pytest.raises(ValueError, match="TrainSettings.epochs: expected a whole number >= 1, got -1"):
        recipe.cam.train.epochs = -1
    recipe.cam.train.lr = "1e-3"
    assert recipe.cam.train.lr == 0.001


def test_a_changed_recipe_is_a_checked_copy():
    recipe = load_recipe()
    changed = recipe.changed("cam.train.epochs=3", "cam.methods.drs={}", "cam.maps=cam")
    assert changed.cam.train.epochs == 3 and "drs" in changed.cam.methods
    assert recipe == load_recipe() and changed.changed("cam.train.epochs=4", "cam.methods.drs=null") == load_recipe()


def test_changes_may_be_a_mapping():
    changes = {"cam.train.lr": 1e-5, "masks.refine": ["pamr"], "cam.backbone": "a/b: c"}
    recipe = load_recipe("toy", changes)
    assert recipe.cam.train.lr == 1e-5 and recipe.masks.refine == ["pamr"] and recipe.cam.backbone == "a/b: c"


def test_backbone_and_seed_go_over_all_that_a_file_says(recipe_file):
    mine = recipe_file("seed: 7\ncam: {backbone: a}\nsegmenter: {backbone: b}")
    recipe = Recipe.load(mine, backbone="c/d@main", seed=3)
    assert (recipe.seed, recipe.cam.backbone, recipe.segmenter.backbone) == (3, "c/d@main", "c/d@main")


def test_yaml_explains_every_setting():
    text = load_recipe().to_yaml()
    assert "# Passes over the images." in text and "# The test protocol of segmenters." in text
    lines = text.splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r" *\w+: ?", line)]
    explained = [i for i in settings if " # " in lines[i] or lines[i - 1].lstrip().startswith("# ")]
    assert len(settings) > 100 and explained == settings


def test_a_recipe_can_change_another_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: toy\ncam: {train: {epochs: 3}}\n")
    (tmp_path / "next.yaml").write_text("base: mine\nseed: 4\n")  # beside it
    assert load_recipe("toy").cam.train.epochs != 3
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("toy", ["cam.train.epochs=3"])
    assert load_recipe(str(tmp_path / "next.yaml")) == load_recipe("toy", ["cam.train.epochs=3", "seed=4"])
    assert Recipe.load("next", folder=tmp_path).seed == 4

    for base, message in (
        ("nowhere", "recipe nowhere (no such file): unknown"),
        ("[toy]", "base: expected the name or file of a recipe, got ['toy']"),
    ):
        (tmp_path / "wrong.yaml").write_text(f"base: {base}\n")
        with pytest.raises(RecipeError, match=re.escape(message)):
            load_recipe(str(tmp_path / "wrong.yaml"))
    (tmp_path / "first.yaml").write_text(f"base: {tmp_path / 'second.yaml'}\n")
    (tmp_path / "second.yaml").write_text(f"base: {tmp_path / 'first.yaml'}\n")
    with pytest.raises(RecipeError, match="it is its own base"):
        load_recipe(str(tmp_path / "first.yaml"))


def test_another_label_rule_or_loss_does_not_keep_the_options_of_the_old_one():
    published = load_recipe("voc_drs").masks
    assert published.seeds == "drs" and 50 / 255 < published.seed_options["saliency_threshold"] < 51 / 255
    changes = ["masks.seeds=mat_label", "masks.seed_options.tie=0.2", "masks.refine=[matting]"]
    assert load_recipe("voc_drs", changes).masks.seed_options == {"tie": 0.2}
    assert load_recipe("voc_drs", ["masks.seeds=argmax"]).masks.seed_options == {}
    kept = load_recipe("voc_drs", ["masks.seeds=drs", "masks.seed_options.object_threshold=0.3"]).masks.seed_options
    assert kept == published.seed_options | {"object_threshold": 0.3}
    symmetric = load_recipe("default", ["segmenter.loss=symmetric", "segmenter.loss_options.beta=0.5"])
    assert symmetric.changed("segmenter.loss=cross_entropy").segmenter.loss_options == {}
