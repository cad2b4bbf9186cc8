"""A result is used again while nothing that it was made from has changed, and only then: with real stages and data."""

import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file

from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import undecoded
from wsss_hf.models.configuration_cam import CamConfig
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.recipes import Recipe
from wsss_hf.stages import make_masks as make_masks_module
from wsss_hf.stages import relabel as relabel_module
from wsss_hf.stages import train_cam as train_cam_module
from wsss_hf.stages import train_refiner as train_refiner_module
from wsss_hf.stages import train_segmenter as train_segmenter_module
from wsss_hf.stages.cache import StageOutput
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.relabel import relabel
from wsss_hf.stages.train_cam import train_cam
from wsss_hf.stages.train_refiner import train_refiner
from wsss_hf.stages.train_segmenter import train_segmenter

MODULES = {
    "cam": train_cam_module,
    "refiner": train_refiner_module,
    "masks": make_masks_module,
    "segmenter": train_segmenter_module,
    "masks-2": relabel_module,
}
FAST = ["cam.train.epochs=1", "segmenter.train.epochs=1", "refiner.train.epochs=1", "refiner.train.batch_size=4"]
FAST += ["self_training.scales=[1.0]", "masks.scales=[1.0]", "masks.keep=2", "segmenter.from_cam=true"]


def stages(data, recipe, out, force=False):
    """All that is trained and labelled, one after the other."""
    cam = train_cam(data, recipe, out / "cam", force=force)
    train_refiner(data, cam, recipe, out / "refiner", force=force)
    masks = make_masks(data, cam, recipe, out / "masks", force=force)
    segmenter = train_segmenter(masks.data, recipe, out / "segmenter", cam=cam, force=force)
    relabel(masks.data, segmenter, recipe, out / "masks-2", force=force)


def contents(out):
    """What the results in a folder are, bit for bit."""
    found = {}
    for name in ("cam", "refiner", "segmenter"):
        weights = load_file(out / name / "model.safetensors")
        found[name] = {key: value.numpy().tobytes() for key, value in weights.items()}
    for name in ("masks", "masks-2"):
        found[name] = masks_of(out / name)
    return found


def masks_of(folder):
    """image_id → bytes of its pseudo mask."""
    rows = undecoded(load_from_disk(str(folder))["train"])
    found = {row["image_id"]: row["pseudo_mask"]["bytes"] for row in rows}
    assert len(found) == len(rows)
    return found


def times(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def recipe(tiny_settings):
    return Recipe.load("default", [*tiny_settings, *FAST])


@pytest.fixture(scope="module")
def finished(toy_data, recipe, tmp_path_factory):
    """Results of all stages, for tests that leave them as they are."""
    out = tmp_path_factory.mktemp("finished")
    stages(toy_data, recipe, out)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """The same for tests that change them."""
    return shutil.copytree(finished, tmp_path / "copied")


def test_the_same_settings_compute_nothing(toy_data, recipe, finished, no_training, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # whoever asks a network for anything fails
    before = times(finished)
    stages(toy_data, recipe, finished)
    assert times(finished) == before
    assert capsys.readouterr().err == "".join(f"{name}: done before\n" for name in MODULES)


def test_settings_that_change_the_speed_alone_compute_nothing(toy_data, recipe, finished, no_training):
    before = times(finished)
    changes = ["masks.workers=1", "masks.batch_size=2", "masks.shard_size=3"]
    changes += ["cam.train.workers=1", "cam.train.gradient_checkpointing=true", "segmenter.train.workers=1"]
    changes += ["refiner.batch_size=2", "refiner.train.workers=1", "refiner.use=true", "self_training.rounds=2"]
    changes += ["self_training.batch_size=2", "self_training.workers=1", "evaluation.batch_size=1"]
    stages(toy_data, recipe.changed(*changes), finished)
    assert times(finished) == before


@pytest.mark.slow
def test_a_retrained_classifier_makes_all_that_follows_again(toy_data, recipe, copied, tmp_path, capsys):
    other = recipe.changed("seed=1", "cam.train.lr=0.01")
    train_cam(toy_data, other, copied / "cam")
    capsys.readouterr()
    cam = copied / "cam"
    train_refiner(toy_data, cam, recipe, copied / "refiner")
    masks = make_masks(toy_data, cam, recipe, copied / "masks")
    segmenter = train_segmenter(masks.data, recipe, copied / "segmenter", cam=cam)
    relabel(masks.data, segmenter, recipe, copied / "masks-2")
    said = capsys.readouterr().err
    assert "masks: made again, because cam changed\n" in said and "refiner: made again, because cam changed\n" in said
    assert re.search("segmenter: made again, because .*cam changed\n", said)
    assert re.search("masks-2: made again, because .*segmenter changed\n", said)
    fresh = tmp_path / "fresh"
    train_cam(toy_data, other, fresh / "cam")
    train_refiner(toy_data, fresh / "cam", recipe, fresh / "refiner")
    masks = make_masks(toy_data, fresh / "cam", recipe, fresh / "masks")
    segmenter = train_segmenter(masks.data, recipe, fresh / "segmenter", cam=fresh / "cam")
    relabel(masks.data, segmenter, recipe, fresh / "masks-2")
    assert contents(copied) == contents(fresh)


@pytest.mark.slow
def test_force_makes_all_again(toy_data, recipe, copied, finished):
    before = times(copied)
    stages(toy_data, recipe, copied, force=True)
    assert not before.items() & times(copied).items()
    assert contents(copied) == contents(finished)  # which are the same, where nothing has changed


@pytest.mark.parametrize("name", MODULES)
def test_a_stage_whose_code_computes_something_else_is_run_again(
    toy_data, recipe, copied, finished, monkeypatch, capsys, name
):
    monkeypatch.setattr(MODULES[name], "VERSION", MODULES[name].VERSION + 1)
    before = times(copied)
    stages(toy_data, recipe, copied)
    # Its weights and masks are what they were, so what follows is used again.
    changed = {path.relative_to(copied).parts[0] for path, time in times(copied).items() if before.get(path) != time}
    assert changed == {name}
    assert f"{name}: made again, because " in capsys.readouterr().err
    assert contents(copied) == contents(finished)


def test_a_setting_that_was_not_there_had_its_default(toy_data, recipe, copied, no_training, capsys):
    for name, keys in (("cam", ["cam", "train", "nesterov"]), ("masks", ["masks", "fusion"])):
        file = copied / name / "recipe.yaml"
        record = yaml.safe_load(file.read_text())
        section = record
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]
        file.write_text(yaml.safe_dump(record))
    before = times(copied)
    stages(toy_data, recipe, copied)
    assert times(copied) == before
    capsys.readouterr()
    make_masks(toy_data, copied / "cam", recipe.changed("masks.fusion=max"), copied / "masks")
    assert "masks: made again, because masks.fusion was 'mean' and is 'max'\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [name if name in ("cam", "masks") else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]
)
def test_a_kill_before_the_result_gets_its_name_leaves_a_state_that_goes_on(
    toy_data, recipe, copied, finished, monkeypatch, name
):
    finish = StageOutput.finish

    def killed(self, result):
        if self.path.name == name:
            raise KeyboardInterrupt
        finish(self, result)

    shutil.rmtree(copied / name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageOutput, "finish", killed)
        stages(toy_data, recipe, copied)
    assert not (copied / name).exists() and (copied / f"{name}.partial").exists()
    stages(toy_data, recipe, copied)
    assert contents(copied) == contents(finished) and not (copied / f"{name}.partial").exists()
    assert len(list((copied / "masks" / "steps").iterdir())) == len(list((finished / "masks" / "steps").iterdir()))


# Images that come, go and change


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((42, 35), Image.Resampling.BICUBIC)


def write(folder, rows):
    """A folder of images: file name → (number of a picture, tags)."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for name, (number, _) in rows.items():
        picture(number).save(folder / name)
    lines = [f"{name},{tags}" for name, (_, tags) in rows.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,tags", *lines]))


ROWS = {f"{number}.png": (number, ["cat;dog", "cat", "dog"][number % 3]) for number in range(8)}
CHANGED = {
    "one added first": {"new.png": (20, "dog")} | ROWS,
    "one added last": ROWS | {"new.png": (20, "cat;dog")},
    "one removed": {name: row for name, row in ROWS.items() if name != "1.png"},
    "one replaced": ROWS | {"0.png": (20, "cat;dog")},
    "two exchanged": ROWS | {"0.png": (3, "cat;dog"), "3.png": (0, "cat;dog")},
    "one tagged otherwise": ROWS | {"0.png": (0, "dog")},
    "in another order": dict(reversed(ROWS.items())),
}
QUICK = ("one added first", "one replaced")  # all images after it move; none does
CHANGES = [change if change in QUICK else pytest.param(change, marks=pytest.mark.slow) for change in CHANGED]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, recipe):
    """A saved CAM classifier of cat and dog that has learnt nothing."""
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog"}
    model = CamClassifier(CamConfig(backbone_config=recipe.cam.backbone_config, output_stride=8, id2label=names))
    torch.nn.init.normal_(model.classifier.weight)
    folder = tmp_path_factory.mktemp("models") / "cam"
    model.save_pretrained(folder)
    WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}).save_pretrained(folder)
    return folder


@pytest.fixture(params=["files", "bytes"])
def load(request, tmp_path):
    """Writes rows as a folder of images → the data set, of files in that folder or of what was read from them."""

    def load(rows):
        write(tmp_path / "photos", rows)
        data = load_data(str(tmp_path / "photos"))
        if request.param == "bytes":
            shutil.rmtree(tmp_path / "saved", ignore_errors=True)
            data.save_to_disk(str(tmp_path / "saved"))
            data = load_data(str(tmp_path / "saved"))
        held = undecoded(data["train"])[0]["image"]
        assert (held["bytes"] is not None) == (request.param == "bytes")
        return data

    return load


@pytest.fixture
def quick(recipe):
    return recipe.changed("masks.shard_size=3", "masks.keep=0")


def killed_after_two_shards(data, classifier, recipe, out, monkeypatch):
    calls = []

    def mortal(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        yield from label_images(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_masks_module, "label_images", mortal)
        make_masks(data, classifier, recipe, out)
    assert len(list((out.with_name(f"{out.name}.partial") / "shards").glob("*.parquet"))) == 2


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("killed", [False, True], ids=["finished", "killed"])
def test_masks_of_changed_data_are_those_of_a_fresh_run(
    load, classifier, quick, tmp_path, monkeypatch, capsys, killed, change
):
    out, fresh = tmp_path / "masks", tmp_path / "fresh"
    if killed:
        killed_after_two_shards(load(ROWS), classifier, quick, out, monkeypatch)
    else:
        make_masks(load(ROWS), classifier, quick, out)
        before = masks_of(out)
    capsys.readouterr()
    data = load(CHANGED[change])
    made = make_masks(data, classifier, quick, out)
    word = "begun anew" if killed else "made again"
    assert f"masks: {word}, because data changed\n" in capsys.readouterr().err
    found, wanted = masks_of(out), masks_of(make_masks(data, classifier, quick, fresh))
    assert found == wanted and list(found) == list(CHANGED[change]) == made.data["train"]["image_id"][:]
    assert len(set(found.values())) == len(found)  # so that none could stand at another image unnoticed
    if not killed:
        again = {name for name, row in CHANGED[change].items() if ROWS.get(name) == row}
        changed = {name for name in found if found[name] != before.get(name)}
        assert changed == found.keys() - again


def test_masks_of_a_damaged_unfinished_run_are_made_from_the_start(load, classifier, quick, tmp_path, monkeypatch):
    data = load(ROWS)
    killed_after_two_shards(data, classifier, quick, tmp_path / "masks", monkeypatch)
    (tmp_path / "masks.partial" / "recipe.yaml").write_text("stage: [")
    seen = []

    def watched(*arguments):
        for labelled in label_images(*arguments):
            seen.append(labelled.index)
            yield labelled

    monkeypatch.setattr(make_masks_module, "label_images", watched)
    make_masks(data, classifier, quick, tmp_path / "masks")
    assert len(seen) == len(ROWS)
    assert masks_of(tmp_path / "masks") == masks_of(make_masks(data, classifier, quick, tmp_path / "fresh"))


@pytest.mark.parametrize("change", ["one replaced", "one tagged otherwise", "one removed"])
def test_a_training_of_changed_data_is_that_of_a_fresh_run(load, recipe, tmp_path, monkeypatch, change):
    recipe = recipe.changed("cam.train.epochs=2", "image.size=32")
    forward, calls = CamClassifier.forward, []

    def mortal(self, *arguments, **options):
        calls.append(self)
        if len(calls) == 3:  # in the second epoch
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CamClassifier, "forward", mortal)
        train_cam(load(ROWS), recipe, tmp_path / "cam")
    assert (tmp_path / "cam.partial" / "checkpoints").is_dir()
    data = load(CHANGED[change])
    found = load_file(train_cam(data, recipe, tmp_path / "cam") / "model.safetensors")
    wanted = load_file(train_cam(data, recipe, tmp_path / "fresh") / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
