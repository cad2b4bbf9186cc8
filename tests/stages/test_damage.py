"""A working folder whose files are short, empty, foreign or gone has a way on, and a diverged training too."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import load_from_disk
from safetensors.torch import load_file

from wsss_hf.data.tagged import undecoded
from wsss_hf.data.toy import make_toy
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.recipes import Recipe
from wsss_hf.stages import make_masks as make_masks_module
from wsss_hf.stages.cache import OutputError
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.train_cam import train_cam
from wsss_hf.training.loop import TrainingError


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def recipe(tiny_settings):
    more = ["image.size=32", "cam.train.epochs=4", "cam.superpixels=true", "masks.shard_size=4", "masks.refine=[]"]
    return Recipe.load("default", [*tiny_settings, *more, "masks.scales=[1.0]"])


@pytest.fixture(scope="module")
def data():
    return make_toy(num_train=12, num_val=2, image_size=32)


def killed(monkeypatch, owner, name, at, work):
    """Do `work`, but die where `owner.name` is called for the time `at`."""
    original, calls = getattr(owner, name), []

    def mortal(*arguments, **options):
        calls.append(arguments)
        if len(calls) == at:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, mortal)
        work()


@pytest.fixture(scope="module")
def begun(data, recipe, tmp_path_factory):
    """`cam.partial` with two checkpoints and superpixels, `masks.partial` with two shards; what they lead to."""
    out = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        killed(patch, CamClassifier, "forward", 10, lambda: train_cam(data, recipe, out / "cam"))
        cam = train_cam(data, recipe, out / "whole" / "cam")
        killed(patch, make_masks_module, "label_images", 3, lambda: make_masks(data, cam, recipe, out / "masks"))
    make_masks(data, cam, recipe, out / "whole" / "masks")
    return out


@pytest.fixture
def folder(begun, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(begun, tmp_path / "begun")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def foreign(path):
    path.write_bytes(bytes(range(256)))


DAMAGES = [truncate, empty, foreign, Path.unlink]


def goes_on(folder, data, recipe, begun):
    """Both stages give what the unbroken ones gave."""
    train_cam(data, recipe, folder / "cam")
    wanted = load_file(begun / "whole" / "cam" / "model.safetensors")
    found = load_file(folder / "cam" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    make_masks(data, begun / "whole" / "cam", recipe, folder / "masks")
    masks = [undecoded(load_from_disk(str(place / "masks"))["train"])[:] for place in (folder, begun / "whole")]
    assert masks[0] == masks[1]
    assert sorted(path.name for path in folder.iterdir()) == ["cam", "masks", "whole"]


def files_of(folder):
    """The names of the files that a kill left, relative to `folder`."""
    return sorted(
        str(path.relative_to(folder))
        for partial in ("cam.partial", "masks.partial")
        for path in (folder / partial).rglob("*")
        if path.is_file() and path.name != "recipe.yaml"
    )


def test_the_folders_hold_what_these_tests_damage(begun):
    names = files_of(begun)
    assert sum("step-000000" in name and name.endswith("model.safetensors") for name in names) == 2
    assert sum(name.endswith(".parquet") for name in names) == 2
    assert sum("superpixels" in name for name in names) == 1


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_single_damaged_file_has_a_way_on(folder, data, recipe, begun, damage):
    for name in files_of(begun):
        damage(folder / name)
        goes_on(folder, data, recipe, begun)
        for stage in ("cam", "masks"):
            shutil.rmtree(folder / stage)
            shutil.copytree(begun / f"{stage}.partial", folder / f"{stage}.partial")


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_files_damaged_together_have_a_way_on(folder, data, recipe, begun, damage, capsys):
    for name in files_of(begun):
        damage(folder / name)
    goes_on(folder, data, recipe, begun)
    said = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert len(said) == (0 if damage is Path.unlink else 5) + (2 if damage is Path.unlink else 0)
    assert "Traceback" not in " ".join(said)


def test_a_folder_without_its_record_is_one_line(folder, data, recipe, capsys, monkeypatch):
    (folder / "cam.partial" / "recipe.yaml").unlink()
    with pytest.raises(OutputError, match="cam.partial, which holds something else; move it away to begin anew"):
        train_cam(data, recipe, folder / "cam")


def test_a_checkpoint_of_another_network_is_not_taken(folder, data, recipe, begun, monkeypatch, capsys):
    """Put there by hand: the record says that it is this training's."""
    other = recipe.changed("cam.methods={drs: {}}")
    killed(monkeypatch, CamClassifier, "forward", 10, lambda: train_cam(data, other, folder / "other"))
    shutil.rmtree(folder / "cam.partial" / "checkpoints")
    os.replace(folder / "other.partial" / "checkpoints", folder / "cam.partial" / "checkpoints")
    shutil.rmtree(folder / "other.partial")
    goes_on(folder, data, recipe, begun)
    assert "it is of another training" in capsys.readouterr().err


# Trainings that diverge


def nan_after(monkeypatch, calls_before):
    """The loss is NaN after so many steps."""
    forward, calls = CamClassifier.forward, []

    def diverging(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        calls.append(1)
        if len(calls) > calls_before and output.losses:
            output.losses["classification"] = output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(CamClassifier, "forward", diverging)


@pytest.mark.parametrize("steps", [1, 7])  # before and after the first checkpoint
def test_the_advice_after_a_diverged_training_can_be_followed(data, recipe, begun, tmp_path, monkeypatch, steps):
    hot = recipe.changed("cam.train.lr=0.1")
    for _ in range(2):  # the same command fails with the same words
        with monkeypatch.context() as patch:
            nan_after(patch, steps if not (tmp_path / "cam.partial").exists() else 0)
            with pytest.raises(TrainingError, match="'classification' became nan.*a smaller learning rate, clip_gra"):
                train_cam(data, hot, tmp_path / "cam")
    train_cam(data, recipe, tmp_path / "cam")
    wanted = load_file(begun / "whole" / "cam" / "model.safetensors")
    found = load_file(tmp_path / "cam" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert [path.name for path in tmp_path.iterdir()] == ["cam"]


def test_weights_that_explode_in_the_last_step_are_found_before_they_are_saved(data, recipe, tmp_path):
    hot = recipe.changed("cam.train.steps=1", "cam.train.lr=1e30", "cam.superpixels=false")
    with pytest.raises(
        TrainingError, match=r"the training of cam has diverged: \S+ holds \S+ after the last step; a s"
    ):
        train_cam(data, hot, tmp_path / "cam")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_no_masks_are_made_of_a_diverged_classifier(data, recipe, begun, tmp_path, value):
    model = CamClassifier.from_pretrained(begun / "whole" / "cam")
    model.classifier.weight.data[0] = value
    shutil.copytree(begun / "whole" / "cam", tmp_path / "cam")
    model.save_pretrained(tmp_path / "cam")
    with pytest.raises(ValueError, match=f"{tmp_path}/cam: expected .* but classifier.weight holds .*has diverged"):
        make_masks(data, tmp_path / "cam", recipe, tmp_path / "masks")
    assert [path.name for path in tmp_path.iterdir()] == ["cam"]


def test_finished_results_that_were_damaged_are_one_line(begun, data, recipe, tmp_path):
    shutil.copytree(begun / "whole", tmp_path / "run")
    masks = make_masks(data, begun / "whole" / "cam", recipe, tmp_path / "run" / "masks")
    for file in (tmp_path / "run" / "masks" / "train").glob("*.arrow"):
        empty(file)
    with pytest.raises(ValueError, match=f"{masks}: damaged .*; remove it to have it made again"):
        _ = masks.data
    assert isinstance(yaml.safe_load((masks / "recipe.yaml").read_text())["minutes"], float)
