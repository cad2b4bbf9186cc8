import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import config
from PIL import Image

from wsss_hf.data import coco as coco_module
from wsss_hf.data import prepared, sources
from wsss_hf.data.folder import load_folder
from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import DataError, undecoded


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of four images that is worth to be remembered, in a cache of its own."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(prepared, "_WORTHWHILE", 4)
    for name in ("cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(file)
    return tmp_path / "photos"


@pytest.fixture
def readings(monkeypatch):
    """How often a folder was read, and rows were checked."""
    count = {"read": 0, "checked": 0}

    def counting(name, function):
        def wrapper(*arguments, **options):
            count[name] += 1
            return function(*arguments, **options)

        return wrapper

    monkeypatch.setattr(sources, "load_folder", counting("read", load_folder))
    monkeypatch.setattr(prepared, "check_dataset", counting("checked", prepared.check_dataset))
    return count


def test_a_folder_is_read_once_and_then_memory_mapped(photos, readings):
    first, second = load_data(photos), load_data(photos)
    assert readings == {"read": 1, "checked": 1}
    assert undecoded(first["train"])[:] == undecoded(second["train"])[:]
    assert first.source == second.source == {"source": str(photos)}
    assert second["train"].cache_files and undecoded(second["train"])[3]["image"]["path"] == str(photos / "dog/d.png")
    assert len(load_data(photos, limit=2)["train"]) == 2 and readings["read"] == 2


def test_it_is_read_again_when_a_file_has_changed_or_is_new(photos, readings):
    load_data(photos)
    os.utime(photos / "cat" / "a.png", ns=(0, 0))
    load_data(photos)
    assert readings["read"] == 2
    Image.new("RGB", (8, 6)).save(photos / "dog" / "e.png")
    assert len(load_data(photos)["train"]) == 5
    (photos / "dog" / "c.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="dog/c.png"):
        load_data(photos)


def test_saved_data_are_checked_once(photos, toy_data, readings, tmp_path):
    toy_data.save_to_disk(tmp_path / "saved")
    first, second = load_data(tmp_path / "saved"), load_data(tmp_path / "saved")
    assert readings["checked"] == 1 and first["val"]["image_id"][:] == second["val"]["image_id"][:]


def test_few_rows_leave_nothing_behind(photos, readings, monkeypatch):
    monkeypatch.setattr(prepared, "_WORTHWHILE", 5)
    load_data(photos), load_data(photos)
    assert readings == {"read": 2, "checked": 2} and not config.HF_DATASETS_CACHE.exists()


def test_a_cache_that_cannot_be_written_is_no_obstacle(photos, readings, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert len(load_data(photos)["train"]) == 4 == len(load_data(photos)["train"])


@pytest.fixture
def coco(photos, tmp_path):
    """The folder of photographs as train2017 and val2017, with a square on each image."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        images, shapes = [], []
        for number in range(1, 5):
            Image.new("RGB", (8, 6)).save(root / f"{split}2017" / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg", "height": 6, "width": 8})
            shapes.append({"id": number, "image_id": number, "category_id": 3, "iscrowd": 0})
            shapes[-1]["segmentation"] = [[1, 1, 4, 1, 4, 4, 1, 4]]
        content = {"images": images, "annotations": shapes, "categories": [{"id": 3, "name": "cat"}]}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def opened(monkeypatch):
    """The annotation files of COCO that were read, by name."""
    found, read = [], coco_module._read_annotations
    monkeypatch.setattr(
        coco_module, "_read_annotations", lambda path, with_shapes: found.append(path.name) or read(path, with_shapes)
    )
    return found


def test_one_of_two_processes_reads_annotations_and_folders(coco, photos, opened, readings, in_two_processes):
    def work(rank):
        data = load_data("coco", root=coco)
        masks = [np.asarray(mask).sum() for mask in data["val"]["mask"]]
        return rank, list(opened), masks, dict(readings), load_data(photos)["train"]["image_id"][:], dict(readings)

    (_, *main), (_, *other) = sorted(in_two_processes(work))
    assert main[0] == ["instances_train2017.json", "instances_val2017.json"] and other[0] == []
    assert main[1] == other[1] == [9] * 4
    assert main[2] == {"read": 0, "checked": 1} and other[2] == {"read": 0, "checked": 0}
    assert main[3] == other[3] == ["cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"]
    assert main[4] == {"read": 1, "checked": 2} and other[4] == other[2]


def test_a_few_rows_of_many_are_read_once_too(coco, opened, monkeypatch):
    monkeypatch.setattr(prepared, "_WORTHWHILE", 1000)
    first, second = (load_data("coco", root=coco, limit=2) for _ in range(2))
    assert len(opened) == 2 and undecoded(first["val"])[:] == undecoded(second["val"])[:]
    assert len(load_data("coco", root=coco)["val"]) == 4


def test_painted_masks_that_are_gone_are_painted_again(coco, opened):
    shutil.rmtree(Path(undecoded(load_data("coco", root=coco)["val"])[0]["mask"]["path"]).parent)
    for _ in range(2):
        assert [np.asarray(mask).sum() for mask in load_data("coco", root=coco)["val"]["mask"]] == [9] * 4
    assert len(opened) == 4  # twice each


def test_the_state_of_a_folder_is_that_of_its_files_in_the_order_of_their_paths(tmp_path):
    """Records of streams and the names of what is in the cache hold it: another one would make all of it again."""
    names = ["a/b.png", "a.png", "a-b/c/d.png", "b\udcff.png"]  # "-" and "." are before "/", and one is not UTF-8
    content = os.path.abspath(tmp_path / "photos")
    for number, name in enumerate(sorted(names)):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * number)
        os.utime(file, ns=(0, 10**9 * number))
        content += f"{file}\0{number}\0{10**9 * number}\n"
    wanted = hashlib.blake2b(content.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    assert prepared.tree_state(tmp_path / "photos") == wanted
