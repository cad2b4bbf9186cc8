"""Image files that are moved, or copied, are followed by the data sets that name them; nothing is computed for it."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from transformers import ResNetModel

from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import undecoded
from wsss_hf.recipes import Recipe
from wsss_hf.stages.add_saliency import add_saliency
from wsss_hf.stages.cache import StageOutput, read_record
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.relabel import relabel
from wsss_hf.stages.run import run
from wsss_hf.stages.train_cam import train_cam
from wsss_hf.stages.train_segmenter import train_segmenter

QUICK = ["image.size=32", "cam.train.epochs=1", "segmenter.train.epochs=1", "masks.scales=[1.0]", "masks.keep=1"]
QUICK += ["self_training.scales=[1.0]", "segmenter.from_cam=true", "masks.confidence=true"]


@pytest.fixture(scope="module")
def recipe(tiny_settings):
    return Recipe.load("default", [*tiny_settings, *QUICK])


@pytest.fixture
def photos(tmp_path):
    """train/ and val/ with two images of each class, and masks of the held-out ones in a metadata file."""
    rng = np.random.default_rng(0)
    for name in ("train/cat/a.png", "train/cat/b.png", "train/dog/a.png", "train/dog/b.png", "val/a.png"):
        file = tmp_path / "here" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file)
    Image.fromarray(np.eye(40, 48, dtype=np.uint8)).save(tmp_path / "here" / "val" / "mask.png")
    (tmp_path / "here" / "val" / "metadata.csv").write_text("file_name,tags,mask\na.png,cat,mask.png")
    return tmp_path / "here"


@pytest.fixture
def backbone_folder(resnet_config, tmp_path):
    ResNetModel(resnet_config).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def move(photos):
    return photos.rename(photos.with_name("there"))


def copy(photos):
    """With the times of the files; the old ones stay, as what they must not be taken for."""
    there = shutil.copytree(photos, photos.with_name("there"))
    for file in photos.rglob("*.png"):
        Image.new("RGB", (48, 40)).save(file)
    return there


def copy_and_remove(photos):
    there = copy(photos)
    shutil.rmtree(photos)
    return there


def content(folder):
    """All that a data set holds, by split, and the other files beside it."""
    held = load_from_disk(str(folder))
    rows = {split: undecoded(part).to_list() for split, part in held.items()}
    files = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*.png")}
    return rows, {split: part.features for split, part in held.items()}, files


def stages(photos, recipe, out):
    data = load_data(photos)
    cam = train_cam(data, recipe, out / "cam")
    masks = make_masks(data, cam, recipe, out / "masks")
    segmenter = train_segmenter(masks.data, recipe, out / "segmenter", cam=cam)
    relabel(masks.data, segmenter, recipe, out / "masks-2")


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("change", [move, copy, copy_and_remove])
def test_masks_follow_their_images_and_nothing_is_computed_again(
    photos, recipe, tmp_path, monkeypatch, capsys, change
):
    out, fresh = tmp_path / "run", tmp_path / "fresh"
    stages(photos, recipe, out)
    models = {name: times(out / name) for name in ("cam", "segmenter")}
    before = {name: read_record(out / name) for name in ("masks", "masks-2")}
    there = change(photos)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", None)  # whoever asks a network for anything fails
        stages(there, recipe, out)
    moved = "image files have moved; their new paths are written"
    said = (line for line in capsys.readouterr().err.splitlines() if ": " in line and "Saving" not in line)
    assert list(said) == [
        "cam: done before",
        "masks: done before",
        f"masks: {moved}",
        "segmenter: done before",
        "masks-2: done before",
        f"masks-2: {moved}",
    ]
    assert models == {name: times(out / name) for name in models}
    for name, held in before.items():
        record = read_record(out / name)
        assert abs(record.pop("minutes") - held.pop("minutes")) < 0.1
        assert record == held | {"data": {"source": str(there)}}
    masks = make_masks(load_data(there), out / "cam", recipe, fresh / "masks")
    relabel(masks.data, out / "segmenter", recipe, fresh / "masks-2")
    for name in before:
        assert content(out / name) == content(fresh / name)
    capsys.readouterr()
    stages(there, recipe, out)
    assert moved not in capsys.readouterr().err


def test_a_whole_run_goes_on_with_moved_images(photos, recipe, tmp_path):
    out = run(load_data(photos), recipe, tmp_path / "run")
    there = move(photos)
    again = run(load_data(there), recipe.changed("evaluation.examples=2"), tmp_path / "run")
    assert again.results == out.results and not list(tmp_path.glob("run/*.partial"))


def test_a_data_set_with_the_images_themselves_stays_as_it_is(photos, recipe, tmp_path, capsys):
    cam = train_cam(load_data(photos), recipe, tmp_path / "cam")
    out = make_masks(load_data(photos), cam, recipe, tmp_path / "masks", embed_images=True)
    before = times(out.folder)
    make_masks(load_data(move(photos)), cam, recipe, tmp_path / "masks")
    assert times(out.folder) == before and "moved" not in capsys.readouterr().err


def test_saliency_maps_of_all_splits_follow_their_images(photos, tmp_path, backbone_folder):
    add_saliency(load_data(photos), tmp_path / "out", spectral=backbone_folder, settings={"size": 48})
    there = move(photos)
    add_saliency(load_data(there), tmp_path / "out", spectral=backbone_folder, settings={"size": 48})
    add_saliency(load_data(there), tmp_path / "fresh", spectral=backbone_folder, settings={"size": 48})
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    assert (tmp_path / "out" / "summary.json").read_text() == (tmp_path / "fresh" / "summary.json").read_text()


@pytest.mark.slow
def test_a_kill_while_the_paths_are_written_is_no_obstacle(photos, recipe, tmp_path, monkeypatch):
    stages(photos, recipe, tmp_path / "run")
    there = move(photos)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageOutput, "finish", Mock(side_effect=KeyboardInterrupt))
        stages(there, recipe, tmp_path / "run")
    stages(there, recipe, tmp_path / "run")
    make_masks(load_data(there), tmp_path / "run" / "cam", recipe, tmp_path / "fresh")
    assert content(tmp_path / "run" / "masks") == content(tmp_path / "fresh")
    assert not list(tmp_path.glob("run/*.partial"))
