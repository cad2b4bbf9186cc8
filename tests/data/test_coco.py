import json
import os
import sys

import numpy as np
import pytest
from datasets import Image as ImageFeature
from PIL import Image
from pycocotools.mask import encode

from wsss_hf.data.coco import _uncompressed, load_coco
from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import DataError, check_dataset, class_names
from wsss_hf.progress import set_quiet

HEIGHT, WIDTH = 6, 8
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}]
PERSON, CAT, DOG = 1, 17, 18


def box(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def columns(left, right):
    """Run lengths, column by column, of all rows of these columns."""
    counts = [left * HEIGHT, (right - left) * HEIGHT, (WIDTH - right) * HEIGHT]
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def shape(number, image, category, segmentation, crowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": crowd,
    }


SHAPES = {
    "train": [
        shape(1, 1, DOG, box(0, 0, 4, 3)),
        shape(2, 1, PERSON, box(5, 0, 8, 6)),
        shape(3, 2, CAT, columns(0, 2)),
        shape(4, 4, PERSON, columns(0, 8), crowd=1),
    ],
    "val": [
        # The dog in front of the larger cat, both in front of the crowd, in whatever order they are listed.
        shape(11, 9, DOG, box(1, 1, 3, 3)),
        shape(12, 9, CAT, box(0, 0, 4, 6) + box(6, 0, 7, 2)),
        shape(13, 9, PERSON, columns(3, 6), crowd=1),
    ],
}
IMAGES = {"train": [1, 2, 3, 4], "val": [9]}
VAL_MASK = [
    [2, 2, 2, 2, 255, 255, 2, 0],
    [2, 3, 3, 2, 255, 255, 2, 0],
    [2, 3, 3, 2, 255, 255, 0, 0],
    [2, 2, 2, 2, 255, 255, 0, 0],
    [2, 2, 2, 2, 255, 255, 0, 0],
    [2, 2, 2, 2, 255, 255, 0, 0],
]


def write_annotations(root, split, images=None, shapes=None, **content):
    images = [
        {"id": number, "file_name": f"{number:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        for number in (IMAGES[split] if images is None else images)
    ]
    shapes = SHAPES[split] if shapes is None else shapes
    content = {"images": images, "annotations": shapes, "categories": CATEGORIES} | content
    path = root / f"annotations/instances_{split}2017.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """Image 1: dog and person; 2: cat; 3: nothing; 4: a crowd; 9, held out: see VAL_MASK. The cache is beside it."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, numbers in IMAGES.items():
        (root / f"{split}2017").mkdir()
        for number in numbers:
            Image.new("RGB", (WIDTH, HEIGHT), (9 * number, 90, 50)).save(root / f"{split}2017/{number:012d}.jpg")
        write_annotations(root, split)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("WSSS_QUIET", raising=False)
    return root


def pngs(folder):
    return sorted(folder.rglob("*.png"))


def test_tags_and_masks_of_all_classes(coco):
    dataset = load_coco(coco)
    check_dataset(dataset)
    assert class_names(dataset) == ["person", "cat", "dog"]  # by id
    assert dataset["train"]["image_id"][:] == ["000000000001", "000000000002", "000000000004"]  # 3 shows nothing
    assert dataset["train"]["tags"][:] == [[0, 2], [1], [0]]
    assert dataset["train"]["mask"][:] == [None] * 3
    assert dataset["val"]["tags"][:] == [[0, 1, 2]]
    assert np.asarray(dataset["val"][0]["mask"]).tolist() == VAL_MASK
    assert dataset["val"][0]["image"].filename == str(coco / "val2017/000000000009.jpg")
    assert len(pngs(coco.parent)) == 1 and not pngs(coco)


def test_the_smaller_instance_is_in_front_in_any_order(coco):
    write_annotations(coco, "val", shapes=SHAPES["val"][::-1])
    assert np.asarray(load_coco(coco)["val"][0]["mask"]).tolist() == VAL_MASK


def test_all_masks_for_the_upper_bound(coco):
    masks = [np.asarray(mask) for mask in load_coco(coco, masks="all")["train"]["mask"]]
    assert masks[0].tolist() == [[3] * 4 + [0] + [1] * 3] * 3 + [[0] * 5 + [1] * 3] * 3
    assert masks[1].tolist() == [[2] * 2 + [0] * 6] * 6
    assert (masks[2] == 255).all()


def test_compressed_run_lengths_and_polygons_of_two_points(coco):
    region = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    region[2:4, 1:7] = 1
    runs = {"size": [HEIGHT, WIDTH], "counts": encode(region)["counts"].decode()}
    write_annotations(coco, "val", shapes=[shape(1, 9, CAT, runs), shape(2, 9, DOG, [[0, 0, 5, 5]])])
    row = load_coco(coco)["val"][0]
    assert np.array_equal(row["mask"], region * 2) and row["tags"] == [1, 2]


def test_restricted_classes_are_renumbered_in_the_order_given(coco):
    dataset = load_coco(coco, classes=["dog", "cat"], masks="all")
    check_dataset(dataset)
    assert class_names(dataset) == ["dog", "cat"]
    assert dataset["train"]["image_id"][:] == ["000000000001", "000000000002"]
    assert dataset["train"]["tags"][:] == [[0], [1]]
    wanted = np.array([0, 0, 2, 1], dtype=np.uint8)[np.where(np.array(VAL_MASK) == 255, 0, VAL_MASK)]
    assert np.array_equal(dataset["val"][0]["mask"], wanted)  # the crowd of persons is background too


def test_masks_are_painted_once_until_annotations_or_classes_change(coco, tmp_path):
    load_coco(coco)
    (file,) = pngs(tmp_path / "cache")
    file.write_bytes(b"kept")
    again = load_coco(coco)["val"].cast_column("mask", ImageFeature(decode=False))
    assert again[0]["mask"]["path"] == str(file)
    assert file.read_bytes() == b"kept"
    file.unlink()
    load_coco(coco)
    assert pngs(tmp_path / "cache") == [file]
    load_coco(coco, classes=["cat"])
    assert len(pngs(tmp_path / "cache")) == 2
    path = write_annotations(coco, "val", shapes=[shape(1, 9, CAT, columns(0, 8))])
    os.utime(path, (1, 1))
    assert (np.asarray(load_coco(coco)["val"][0]["mask"]) == 2).all()


def test_painting_shows_progress_unless_quiet(coco, capsys):
    load_coco(coco)
    assert "masks of val2017: 1/1" in capsys.readouterr().err
    load_coco(coco)  # nothing is left to paint
    set_quiet(True)
    load_coco(coco, classes=["cat"])
    assert capsys.readouterr().err == ""


def test_limit_paints_no_mask_that_is_not_wanted(coco, tmp_path):
    dataset = load_data("coco", root=coco, masks="all", limit=1, seed=1)
    assert [len(rows) for rows in dataset.values()] == [1, 1]
    assert len(pngs(tmp_path / "cache")) == 2


def test_the_command_line_reads_it(coco, tmp_path, capsys):
    from wsss_hf.cli.main import main

    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(np.array(VAL_MASK, dtype=np.uint8) % 255).save(masks / "000000000009.png")
    data = ["--data", "coco", "--root", str(coco), "--limit", "2"]
    figures = tmp_path / "figures.json"
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *data, "--masks", str(masks), "--json", str(figures), "--quiet"])
    assert not exit_.value.code
    written = json.loads(figures.read_text())
    assert written["results"][0]["mean_iou"] == 1 and written["data"]["source"] == "coco"
    train = ["evaluate", *data, "--masks", str(masks), "--split", "train"]
    for options, culprit in (([], "mask"), (["--all-masks"], "000000000001.png")):
        with pytest.raises(SystemExit) as exit_:
            main([*train, *options, "--quiet"])
        assert exit_.value.code == 1 and culprit in capsys.readouterr().err  # there is no label map of it
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *data, "--classes", "cat,yak", "--masks", str(masks)])
    err = capsys.readouterr().err
    assert (
        exit_.value.code == 1
        and err.startswith("error: classes: expected COCO classes, got 'yak'")
        and err.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "annotations/instances_train2017.json",
            "annotations/instances_train2017.json: no such file .root: expected a folder of annotations",
        ),
        ("annotations/instances_val2017.json", "annotations/instances_val2017.json: no such file"),
        ("train2017/000000000002.jpg", "instances_train2017.json, image 2: no such file .*000000000002.jpg"),
    ],
)
def test_missing_files_are_named(coco, missing, message):
    (coco / missing).unlink()
    with pytest.raises(DataError, match=message):
        load_coco(coco)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"classes": ["cat", "unicorn"]},
            "expected COCO classes, got 'unicorn' .*train2017.json has person, cat, dog",
        ),
        ({"classes": ["cat", "cat"]}, "classes: expected each name once, got cat, cat"),
        ({"masks": "some"}, "masks: expected 'evaluation' or 'all', got 'some'"),
    ],
)
def test_bad_options_are_named(coco, options, message):
    with pytest.raises(DataError, match=message):
        load_coco(coco, **options)


def test_data_options_are_those_of_voc(coco):
    with pytest.raises(DataError, match="root: expected the folder of annotations, .* for 'coco', got none"):
        load_data("coco")
    with pytest.raises(DataError, match="columns: expected a directory or a data set on the Hub, got 'coco'"):
        load_data("coco", root=coco, columns={"image": "img"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"shapes": []}, "split 'val': expected images of person, cat, dog, got none among the 1 of .*val2017.json"),
        ({"images": []}, "val2017.json, annotation 11: image_id: expected that of an image, got 9"),
        ({"images": [9, 9]}, "val2017.json, images: expected ids that differ, got 9 twice"),
        (
            {"shapes": [shape(5, 9, 3, [])]},
            "val2017.json, annotation 5: category_id: expected that of a category, got 3",
        ),
        (
            {"shapes": [shape(5, 9, CAT, box(0, 0, 4, 6), crowd="no")]},
            "annotation 5: iscrowd: expected 0 or 1, got 'no'",
        ),
        ({"shapes": [shape(True, 9, CAT, [])]}, r"annotations\[0\].id: expected int, got True"),
        ({"shapes": [shape(5, None, CAT, [])]}, r"annotations\[0\].image_id: expected int, got None"),
        ({"categories": None}, "val2017.json: expected COCO's instance annotations, got no list 'categories'"),
        ({"categories": CATEGORIES[:2]}, "val2017.json: expected the categories of train2017, got others"),
    ],
)
def test_bad_annotations_are_named(coco, content, message):
    write_annotations(coco, "val", **content)
    with pytest.raises(DataError, match=message):
        load_coco(coco)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "expected polygons .* or run lengths, got None"),
        ([[0, 0, 1, 0, 1, 1, 0]], "expected polygons .* or run lengths, got .*1, 0"),
        ([["a"] * 6], "expected polygons .* or run lengths, got .'a',"),
        ([0, 0, 4, 0, 4, 4], "expected polygons .* or run lengths, got 0"),
        ([[0, 0], [4, 0], [4, 4]] * 2 + [[[0, 0], [4, 0], [4, 4]]], "expected polygons .* or run lengths, got .*"),
        ([[[0, 0], [4, 0], [4, 4], [0, 4]]], "expected polygons .* or run lengths, got .*"),
        ([], "expected polygons .* or run lengths, got .."),
        ([[]], "expected polygons .* or run lengths, got ...."),
        ("cat", "expected polygons .* or run lengths, got 'cat'"),
        ([[True, 0, 4, 0, 4, 4]], "expected polygons .* or run lengths, got .True"),
        ([[float("nan"), 0, 4, 0, 4, 4]], "expected points in an image of 8x6, got .nan, 0.0"),
        ([[float("inf"), 0, 4, 0, 4, 4]], "expected points in an image of 8x6, got .inf, 0.0"),
        ([[1e12, 0, 4, 0, 4, 4]], "expected points in an image of 8x6, got .1000000000000.0, 0.0"),
        ([[0, 0, 4, -7, 4, 4]], "expected points in an image of 8x6, got .4.0, -7.0"),
        ([[0, 0, 0.5, 0, 0.5, 1]], "expected coordinates in pixels, got numbers up to 1: .0, 0, 0.5"),
        ([[0, 0, 8, 6] * 500], "expected an outline of an image of 8x6, got one of 8000 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, 49]}, "expected run lengths as counts, got .-1, 49"),
        ({"size": [HEIGHT, WIDTH], "counts": [48.0]}, "expected run lengths as counts, got .48.0"),
        ({"size": [HEIGHT, WIDTH], "counts": [10**30]}, "expected run lengths of 48 pixels, got 1000000"),
        ({"size": [HEIGHT, WIDTH], "counts": "é"}, "expected COCO's compressed run lengths, got 'é'"),
        ({"size": [HEIGHT, WIDTH], "counts": "P"}, "expected COCO's compressed run lengths, got a cut one, 'P'"),
        ({"size": [HEIGHT, WIDTH], "counts": "oooooooooo"}, "expected COCO's compressed run lengths, got 'ooo"),
        ({"size": [HEIGHT, WIDTH], "counts": "1"}, "expected run lengths of 48 pixels, got 1"),
        ({"size": 3, "counts": [48]}, r"expected the image's size .6, 8., got 3"),
        ({"size": [WIDTH, HEIGHT], "counts": [48]}, r"expected the image's size \[6, 8\], got \[8, 6\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [40]}, "expected run lengths of 48 pixels, got 40"),
        ({"size": [HEIGHT, WIDTH]}, "counts"),
    ],
)
def test_bad_shapes_are_named_and_leave_no_mask(coco, segmentation, message):
    write_annotations(coco, "val", shapes=[shape(5, 9, CAT, segmentation)])
    with pytest.raises(DataError, match=f"val2017.json, annotation 5: segmentation: .*{message}"):
        load_coco(coco)
    assert not pngs(coco.parent)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 0}, "image 9: expected a size of 1 to [0-9]+ pixels, got 8x0"),
        ({"width": -8}, "image 9: expected a size of 1 to [0-9]+ pixels, got -8x6"),
        ({"height": 10**12}, "image 9: expected a size of 1 to [0-9]+ pixels, got 8x1000000000000"),
        ({"height": 10**6, "width": 10**6}, "image 9: expected a size of 1 to [0-9]+ pixels, got 1000000x1000000"),
        ({"height": 10**4, "width": 10**4}, "image 9: expected the size of .*000000000009.jpg, 8x6, got 10000x10000"),
        ({"height": True}, r"images\[0\].height: expected int, got True"),
        ({"height": 6.0}, r"images\[0\].height: expected int, got 6.0"),
    ],
)
def test_absurd_sizes_take_no_memory(coco, size, message):
    image = {"id": 9, "file_name": "000000000009.jpg", "height": HEIGHT, "width": WIDTH} | size
    path = write_annotations(coco, "val", shapes=[shape(1, 9, CAT, columns(0, 8))])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": [image]}))
    with pytest.raises(DataError, match=f"instances_val2017.json, {message}"):
        load_coco(coco)
    assert not pngs(coco.parent)


def test_2014_is_read_where_2017_is_not_there(coco):
    for path in sorted(coco.rglob("*2017*"), reverse=True):
        path.rename(path.with_name(path.name.replace("2017", "2014")))
    dataset = load_coco(coco)
    check_dataset(dataset)
    assert dataset["train"]["image_id"][:] == ["000000000001", "000000000002", "000000000004"]
    assert np.asarray(dataset["val"][0]["mask"]).tolist() == VAL_MASK


def test_a_category_called_background_is_refused(coco):
    categories = [{"id": 0, "name": "background"}, *CATEGORIES]
    for split in IMAGES:
        write_annotations(coco, split, categories=categories)
    with pytest.raises(DataError, match="train2017.json: classes: expected names of objects, got 'background'"):
        load_coco(coco)


def test_compressed_run_lengths_are_those_of_pycocotools():
    draw = np.random.default_rng(0)
    for _ in range(50):
        height, width = draw.integers(1, 60, size=2)
        region = np.asfortranarray(draw.random((height, width)) < draw.random(), dtype=np.uint8)
        runs = _uncompressed(encode(region)["counts"].decode())
        wanted = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
        assert np.array_equal(wanted, region)


def test_what_is_not_json_is_named(coco):
    (coco / "annotations/instances_val2017.json").write_text("{")
    with pytest.raises(DataError, match="val2017.json: expected JSON"):
        load_coco(coco)
    (coco / "annotations/instances_val2017.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="val2017.json: expected JSON"):
        load_coco(coco)


def test_without_pycocotools_it_takes_one_line(coco, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DataError, match=r'COCO needs pycocotools: pip install "wsss_hf\[coco\]"$'):
        load_coco(coco)
