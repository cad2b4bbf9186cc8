import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from wsss_hf.data.export import export_coco, export_voc, write_mask_pngs
from wsss_hf.data.tagged import DataError
from wsss_hf.models.label_colors import voc_palette

NAMES = ["cat", "dog"]


def some_labels(height=7, width=9, seed=0):
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], dtype=np.uint8), (height, width))


def pairs():
    """Ids as VOC, and as a folder of one subfolder per class, has them; sizes that differ."""
    return [("2007_000032", some_labels()), ("cat/a.JPG", some_labels(4, 5, 1)), ("x.y", np.zeros((2, 3), np.uint8))]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_voc_layout_holds_the_labels_as_palette_pictures(tmp_path):
    folder = tmp_path / "new" / "devkit"
    assert export_voc(folder, iter(pairs()), NAMES, split="val") == 3
    stems = ["2007_000032", "cat/a", "x.y"]
    pictures = [f"SegmentationClass/{stem}.png" for stem in stems]
    assert files(folder) == sorted(["ImageSets/Segmentation/val.txt", "labels.txt", *pictures])
    assert (folder / "ImageSets/Segmentation/val.txt").read_text().split() == stems
    assert (folder / "labels.txt").read_text().split() == ["background", "cat", "dog"]
    for (_, labels), picture in zip(pairs(), pictures, strict=True):
        image = Image.open(folder / picture)
        assert image.mode == "P" and np.array_equal(image, labels)
        colours = np.array(voc_palette()).reshape(256, 3)[labels]
        assert np.array_equal(image.convert("RGB"), colours)
    assert not list(folder.parent.glob("*.partial"))


def test_coco_tools_read_the_regions_back(tmp_path):
    path = tmp_path / "new" / "masks.json"
    assert export_coco(path, iter(pairs()), NAMES) == 3
    coco = COCO(str(path))
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {1: "cat", 2: "dog"}
    names = ["2007_000032.jpg", "cat/a.JPG", "x.y.jpg"]
    for image, (_, labels), name in zip(coco.loadImgs(coco.getImgIds()), pairs(), names, strict=True):
        assert image["file_name"] == name and (image["height"], image["width"]) == labels.shape
        found = np.zeros_like(labels)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            region = coco.annToMask(annotation).astype(bool)
            assert annotation["area"] == region.sum()
            left, top, width, height = annotation["bbox"]
            assert region[top : top + height, left : left + width].sum() == region.sum()
            assert region[top].any() and region[top + height - 1].any()
            assert region[:, left].any() and region[:, left + width - 1].any()
            found[region] = annotation["category_id"]
        assert np.array_equal(found, np.where(labels == 255, 0, labels))


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "a//b", "..", "", "C:a", "a\\b", "a\nb"])
@pytest.mark.parametrize("export", [export_voc, export_coco])
def test_ids_that_lead_out_of_the_folder_are_refused(tmp_path, export, name):
    with pytest.raises(DataError, match="image_id"):
        export(tmp_path / "out", [("good", some_labels()), (name, some_labels())], NAMES)
    assert not list(tmp_path.iterdir())


def test_two_images_of_one_file_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="row 'a.png': expected a file of its own, got a.png of row 'a.jpg'"):
        write_mask_pngs(tmp_path, [("a.jpg", some_labels()), ("a.png", some_labels())])


@pytest.mark.parametrize("export", [export_voc, export_coco])
def test_labels_of_no_class_are_named(tmp_path, export):
    with pytest.raises(DataError, match="row 'b': expected labels 0..2 and 255, got 7"):
        export(tmp_path / "out", [("a", some_labels()), ("b", np.full((2, 2), 7, np.uint8))], NAMES)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path):
    def broken():
        yield "a", some_labels()
        raise KeyboardInterrupt

    (tmp_path / "empty").mkdir()
    for export, name in ((export_voc, "empty"), (export_coco, "coco.json")):
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path / name, broken(), NAMES)
        assert files(tmp_path) == []
    export_voc(tmp_path / "empty", [("a", some_labels())], NAMES)
    export_coco(tmp_path / "coco.json", [("a", some_labels())], NAMES)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for export, name in ((export_voc, "empty"), (export_coco, "coco.json")):
        with pytest.raises(DataError, match=f"{name}: expected a path that does not exist yet"):
            export(tmp_path / name, [("b", some_labels())], NAMES)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_no_image_is_still_a_file(tmp_path):
    export_coco(tmp_path / "coco.json", [], NAMES)
    assert json.loads((tmp_path / "coco.json").read_text())["images"] == []
