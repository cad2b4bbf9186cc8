import numpy as np
import pytest
from PIL import Image

from wsss_hf.data.tagged import DataError, check_dataset, class_names
from wsss_hf.data.voc import VOC_CLASSES, load_voc

CAT, DOG, PERSON = (VOC_CLASSES.index(name) + 1 for name in ("cat", "dog", "person"))
IMAGES = {"a": ["cat"], "b": ["dog", "person", "dog"], "c": ["person"], "d": ["cat", "dog"], "v": ["dog", "person"]}


@pytest.fixture
def devkit(tmp_path):
    """Train a b; train_aug a b c d (no mask of c); val v. A mask has one column per object, then a column of void."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClassAug", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for image_id, names in IMAGES.items():
        Image.new("RGB", (6, 4)).save(tmp_path / f"JPEGImages/{image_id}.jpg")
        objects = "".join(f"<object><name>{name}</name><part><name>head</name></part></object>" for name in names)
        (tmp_path / f"Annotations/{image_id}.xml").write_text(f"<annotation>{objects}</annotation>")
        mask = np.zeros((4, 6), dtype=np.uint8)
        for column, label in enumerate([*(VOC_CLASSES.index(name) + 1 for name in names), 255]):
            mask[:, column] = label
        if image_id != "c":
            Image.fromarray(mask).save(tmp_path / f"SegmentationClassAug/{image_id}.png")
    for split, image_ids in {"train": "ab", "train_aug": "abcd", "val": "v"}.items():
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(image_ids) + "\n")
    return tmp_path


def test_all_classes_with_masks_for_evaluation(devkit):
    dataset = load_voc(devkit)
    check_dataset(dataset)
    assert class_names(dataset) == list(VOC_CLASSES)
    assert dataset["train"]["image_id"][:] == ["a", "b", "c", "d"] and dataset["val"]["image_id"][:] == ["v"]
    assert dataset["train"]["tags"][1] == [DOG - 1, PERSON - 1]
    assert [mask is not None for mask in dataset["train"]["mask"]] == [True, True, False, False]
    assert np.asarray(dataset["val"][0]["mask"])[0].tolist() == [DOG, PERSON, 255, 0, 0, 0]
    assert dataset["val"][0]["image"].filename == str(devkit / "JPEGImages/v.jpg")


def test_all_masks_for_the_upper_bound(devkit):
    dataset = load_voc(devkit, masks="all")
    assert [mask is not None for mask in dataset["train"]["mask"]] == [True, True, False, True]


def test_restricted_classes_are_renumbered_in_the_order_given(devkit):
    files = {path: path.stat().st_mtime_ns for path in devkit.rglob("*")}
    dataset = load_voc(devkit, classes=["person", "dog"])
    check_dataset(dataset)
    assert class_names(dataset) == ["person", "dog"]
    assert dataset["train"]["image_id"][:] == ["b", "c", "d"]  # a shows a cat only
    assert dataset["train"]["tags"][:] == [[0, 1], [0], [1]]
    assert np.asarray(dataset["train"][0]["mask"])[0].tolist() == [2, 1, 2, 255, 0, 0]
    assert files == {path: path.stat().st_mtime_ns for path in devkit.rglob("*")}


def test_pixels_of_other_classes_become_background(devkit):
    dataset = load_voc(devkit, classes=["dog"], masks="all")
    by_id = {row["image_id"]: row["mask"] for row in dataset["train"]}
    assert np.asarray(by_id["d"])[0].tolist() == [0, 1, 255, 0, 0, 0]


def test_without_train_aug_the_plain_devkit_is_read(devkit):
    (devkit / "ImageSets/Segmentation/train_aug.txt").unlink()
    (devkit / "SegmentationClassAug").rename(devkit / "SegmentationClass")
    dataset = load_voc(devkit)
    assert dataset["train"]["image_id"][:] == ["a", "b"]
    assert all(dataset["train"]["mask"])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("JPEGImages/c.jpg", "JPEGImages/c.jpg: no such file"),
        ("Annotations/c.xml", "Annotations/c.xml: no such file"),
        ("SegmentationClassAug/b.png", "b.png: no such file"),
        ("ImageSets/Segmentation/train.txt", "train.txt: no such file"),
        ("ImageSets/Segmentation/val.txt", "val.txt: no such file"),
    ],
)
def test_missing_files_are_named(devkit, missing, message):
    (devkit / missing).unlink()
    with pytest.raises(DataError, match=message):
        load_voc(devkit)


PSA = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"


@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
@pytest.mark.parametrize("line", ["{0}\n", "{0}\r\n", "JPEGImages/{0}.jpg\n", PSA, "\t{0} \n\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_published_programs(devkit, name, line, encoding):
    folder = devkit / "ImageSets/Segmentation"
    (folder / "train_aug.txt").unlink()
    (folder / f"{name}.txt").write_bytes("".join(map(line.format, "abcd")).encode(encoding))
    (folder / "val.txt").write_bytes(line.format("v").encode(encoding))
    dataset = load_voc(devkit)
    assert dataset["train"]["image_id"][:] == ["a", "b", "c", "d"] and dataset["val"]["image_id"][:] == ["v"]


def test_two_lists_must_agree(devkit):
    folder = devkit / "ImageSets/Segmentation"
    (folder / "trainaug.txt").write_text("d\nc\nb\na\n")
    assert load_voc(devkit)["train"]["image_id"][:] == ["a", "b", "c", "d"]
    (folder / "trainaug.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="expected one list, got train_aug.txt and another trainaug.txt"):
        load_voc(devkit)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb -1\n", "line 2: expected an id, or paths of an image and its mask, got 'b -1'"),
        (b"a  1\n", "line 1: expected an id, or paths of an image and its mask, got 'a  1'"),
        (b"/JPEGImages/a.jpg /SegmentationClassAug/b.png\n", "line 1: expected an id, or paths of an image and its"),
        (b"a\nb\na\n", "line 3: expected each image once, got 'a' again"),
        (b"a\n\xff\x80\n", "line 2: expected text in UTF-8, .* got byte 0xff"),
        (bytes(range(256)), "train_aug.txt, line [12]: expected text in UTF-8"),
        (b"a\n../../etc/passwd\n", "Annotations/passwd.xml: no such file"),
    ],
)
def test_bad_lists_are_named(devkit, content, message):
    (devkit / "ImageSets/Segmentation/train_aug.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_voc(devkit)


@pytest.mark.parametrize("classes", [None, ["cat", "dog"]])
@pytest.mark.parametrize("value", [21, 100, 254])
def test_values_outside_the_classes_never_become_background(devkit, classes, value):
    mask = np.full((4, 6), CAT, dtype=np.uint8)
    mask[1, 1] = value
    Image.fromarray(mask).save(devkit / "SegmentationClassAug/a.png")
    with pytest.raises(DataError, match=f"expected labels 0..20 and 255 .ignore., got {value}"):
        check_dataset(load_voc(devkit, classes=classes))


def test_a_renumbered_palette_is_named(devkit):
    mask = Image.fromarray(np.array([[0, 1, 1, 1, 1, 1]] * 4, dtype=np.uint8))
    mask.putpalette([0, 0, 0, 64, 0, 0])  # label 8's colour
    mask.save(devkit / "SegmentationClassAug/a.png")
    for classes in (None, ["cat", "dog"]):
        with pytest.raises(DataError, match="got value 1 in the colour of label 8"):
            check_dataset(load_voc(devkit, classes=classes))


def test_missing_folders_are_named(devkit):
    with pytest.raises(DataError, match="JPEGImages: no such folder .root: expected the VOC2012 folder of a devkit"):
        load_voc(devkit.parent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"classes": ["cat", "unicorn"]},
            "classes: expected VOC classes, got 'unicorn' .known are aeroplane, .*, tvmonitor",
        ),
        ({"classes": ["cat", "cat"]}, "classes: expected VOC classes, got one twice in cat, cat"),
        ({"classes": ["boat"]}, "split 'train': expected images of boat, got none among 4"),
        ({"masks": "some"}, "masks: expected 'evaluation' or 'all', got 'some'"),
    ],
)
def test_bad_options_are_named(devkit, options, message):
    with pytest.raises(DataError, match=message):
        load_voc(devkit, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "a.xml: expected XML"),
        ('<?xml version="1.0" encoding="foo-9"?><annotation/>', "a.xml: expected XML, .*foo-9"),
        ('<?xml version="1.0" encoding="utf-16"?><annotation/>', "a.xml: expected XML"),
        ("<html><body/></html>", "a.xml: expected an element <annotation>, got <html>"),
        ("<annotation><object><name/></object></annotation>", "a.xml: expected VOC classes, got ''"),
        ("<annotation><object><name>yak</name></object></annotation>", "a.xml: expected VOC classes, got 'yak'"),
    ],
)
def test_bad_annotations_are_named(devkit, text, message):
    (devkit / "Annotations/a.xml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_voc(devkit)
