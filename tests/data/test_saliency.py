"""Saliency maps of any kind of file, from folders and columns, and what is said where they are missing."""

import io
import json

import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image

from wsss_hf.data.batches import batches_by_size
from wsss_hf.data.saliency import check_saliency, describe_saliency, rows_with_saliency, with_saliency
from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import DataError, check_dataset, class_names, decode_saliency, tagged_features
from wsss_hf.progress import set_quiet

LEVELS = np.linspace(0, 1, 24).reshape(4, 6)  # an image of 6 x 4 pixels


def picture(mode):
    """LEVELS as an image of that mode."""
    if mode == "F":
        return Image.fromarray(LEVELS.astype(np.float32))
    if mode.startswith("I"):
        return Image.fromarray((LEVELS * 65535).round().astype(np.int32 if mode == "I" else np.uint16))
    grey = Image.fromarray((LEVELS * 255).round().astype(np.uint8))
    if mode in ("LA", "RGBA"):
        grey = grey.convert("RGB" if mode == "RGBA" else "L")
        grey.putalpha(Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)))
        return grey
    return grey.convert(mode)


def stored(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return {"bytes": stream.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("mode", "kind", "error"),
    [
        ("L", "PNG", 1 / 510), ("RGB", "PNG", 1 / 510), ("RGBA", "PNG", 1 / 510), ("LA", "PNG", 1 / 510),
        ("P", "PNG", 0.05), ("I;16", "PNG", 1e-5), ("I", "TIFF", 1e-5), ("I;16", "TIFF", 1e-5), ("F", "TIFF", 1e-6),
        ("L", "JPEG", 0.05), ("CMYK", "TIFF", 0.01),
    ],
)  # fmt: skip
def test_files_of_any_bit_depth_are_read_in_their_full_range(mode, kind, error):
    values = decode_saliency(stored(picture(mode), kind), (6, 4), "row 'a'")
    assert values.dtype == np.float32 and values.shape == (4, 6)
    np.testing.assert_allclose(values, LEVELS, atol=error)


def test_one_bit_is_all_or_nothing():
    half = Image.fromarray(LEVELS > 0.5)
    assert half.mode == "1"
    assert np.array_equal(decode_saliency(stored(half), (6, 4), "x"), LEVELS > 0.5)


@pytest.mark.parametrize(
    "values",
    [
        np.full((4, 6), 255, np.float32),
        np.full((4, 6), -1, np.float32),
        np.full((4, 6), np.nan, np.float32),
        np.full((4, 6), 70000, np.int32),
    ],
)
def test_numbers_of_an_unknown_range_are_refused(values):
    with pytest.raises(DataError, match=r"row 'a': expected a saliency map of 1, 8 or 16 bits, or of numbers in \[0"):
        decode_saliency(stored(Image.fromarray(values), "TIFF"), (6, 4), "row 'a'")


def test_a_file_that_is_no_image_is_named():
    with pytest.raises(DataError, match="row 'a': expected an image, got a file that can't be decoded"):
        decode_saliency({"bytes": b"map", "path": None}, (6, 4), "row 'a'")


@pytest.mark.parametrize(
    ("image", "saliency"),
    [
        ((500, 375), (250, 188)),  # 187.5, rounded
        ((500, 375), (1000, 750)),
        ((500, 333), (224, 149)),
        ((640, 427), (320, 214)),
        ((333, 500), (21, 32)),
        ((500, 375), (500, 374)),
        ((1000, 1000), (508, 503)),  # 1 %
        ((6, 4), (6, 4)),
    ],
)
def test_a_map_of_another_size_is_resized(image, saliency):
    across = np.linspace(0, 1, saliency[0]) * np.ones((saliency[1], 1))
    found = decode_saliency(stored(Image.fromarray(across.astype(np.float32)), "TIFF"), image, "x")
    assert found.shape == image[::-1] and found.min() >= 0 and found.max() <= 1
    np.testing.assert_allclose(found, np.linspace(0, 1, image[0]) * np.ones((image[1], 1)), atol=2 / min(saliency))


@pytest.mark.parametrize(
    ("image", "saliency"),
    [((500, 375), (224, 224)), ((500, 375), (375, 500)), ((500, 375), (500, 366)), ((9, 3), (6, 4))],
)
def test_a_map_of_another_aspect_is_refused(image, saliency):
    message = f"row 'a': expected .* aspect of its image, {image[0]}x{image[1]}, got {saliency[0]}x{saliency[1]}"
    with pytest.raises(DataError, match=message):
        decode_saliency(stored(Image.new("L", saliency)), image, "row 'a'")


def turned(image, path):
    """Save an image as a camera does that was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


# From folders


@pytest.fixture
def photos(tmp_path):
    """train/ and val/ with a subfolder per class; one image is turned."""
    folder = tmp_path / "photos"
    for name in ("train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "val/cat/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(folder / name)
    turned(Image.new("RGB", (6, 4)), folder / "train/dog/2.png")
    return folder


def draw(folder, *names, size=(6, 4), level=128):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, level).save(folder / name)


def level(rows, index):
    found = np.asarray(rows[index]["saliency"])
    return None if rows[index]["saliency"] is None else int(found[0, 0])


def test_maps_are_found_by_the_ids_of_the_images(photos, tmp_path, capsys):
    maps = tmp_path / "maps"
    draw(maps, "cat/1.png", level=10)
    draw(maps, "cat/2.png.png", level=20)
    draw(maps, "dog/1.JPEG", level=30)
    draw(maps, "dog/2.jpg", level=40, size=(4, 6))  # as the image is held
    draw(maps, "val/cat/1.png", level=50)
    draw(maps, "cow/7.png", "elsewhere.jpg")
    (maps / "notes.txt").write_text("x")
    data = load_data(photos, saliency=maps)
    assert data["train"]["image_id"][:] == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    assert [level(data["train"], index) for index in range(4)] == [10, 20, 30, 40] and level(data["val"], 0) == 50
    assert capsys.readouterr().err == f"saliency: 2 of the 7 maps in {maps} are for no image of the data\n"
    assert data.source == {"source": str(photos), "saliency": str(maps)}
    again = load_data(**json.loads(json.dumps(data.source)))
    assert again["train"][3]["saliency"] == data["train"][3]["saliency"]
    set_quiet(True)
    load_data(photos, saliency=maps)
    set_quiet(False)
    assert "no image" in capsys.readouterr().err  # of the second call only
    load_data(photos, saliency=maps, limit=2)
    assert "no image" not in capsys.readouterr().err  # the others are left out by the limit


def test_missing_maps_stay_empty_until_something_needs_them(photos, tmp_path):
    draw(tmp_path / "maps", "cat/1.png")
    data = with_saliency(load_data(photos)["train"].train_test_split(2, shuffle=False), tmp_path / "maps")
    assert rows_with_saliency(data["train"]).tolist() == [0] and not len(rows_with_saliency(data["test"]))


def test_an_old_column_is_replaced(photos, tmp_path):
    draw(tmp_path / "old", "cat/1.png", "cat/2.png", level=1)
    draw(tmp_path / "new", "cat/1.png", level=2)
    train = DatasetDict(train=load_data(photos)["train"])
    data = with_saliency(with_saliency(train, tmp_path / "old"), tmp_path / "new")
    assert [level(data["train"], index) for index in range(2)] == [2, None]


def test_maps_inside_the_folder_of_images_are_no_class(tmp_path):
    draw(tmp_path, "cat/1.png")
    draw(tmp_path, "saliency/1.png", "saliency/2.png")
    with pytest.raises(DataError, match="saliency: expected a class, got a folder of masks"):
        load_data(tmp_path)
    draw(tmp_path / "saliency", "cat/1.png")
    data = load_data(tmp_path, saliency=tmp_path / "saliency")
    assert class_names(data) == ["cat"] and len(rows_with_saliency(data["train"])) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "maps: expected saliency maps by image_id, such as cat/1.png, got 0 other maps"),
        (["1.png", "x/cat/1.png"], "maps: expected saliency maps by image_id, such as cat/1.png, got 2 other maps"),
        (["cat/1.png", "cat/1.jpg"], "maps: expected one map of each image, got 1.jpg and 1.png"),
        (
            ["cat/1.png", "cat/2.png"],
            "cat/1.png: expected a map of one image, got one for split 'train', row 'cat/1.png' and",
        ),
    ],
)
def test_folders_that_do_not_fit_are_named(photos, tmp_path, files, message):
    (tmp_path / "maps").mkdir()
    draw(tmp_path / "maps", *files)
    with pytest.raises(DataError, match=message):
        load_data(photos, saliency=tmp_path / "maps")


def test_a_folder_that_is_not_there_is_named(photos, tmp_path):
    with pytest.raises(DataError, match="saliency: expected a folder of maps .*, got .*nowhere: no such folder"):
        load_data(photos, saliency=tmp_path / "nowhere")


def test_a_map_that_does_not_fit_is_named_when_the_data_are_loaded(photos, tmp_path):
    draw(tmp_path / "maps", "train/cat/1.png")
    draw(tmp_path / "maps", "train/dog/2.png")  # as the camera saw it, not as it was held
    message = "split 'train', row 'dog/2.png', .*maps/train/dog/2.png: expected .* aspect of its image, 4x6, got 6x4"
    with pytest.raises(DataError, match=message):
        load_data(photos, saliency=tmp_path / "maps")
    (tmp_path / "maps/train/dog/2.png").write_bytes(b"no map")
    with pytest.raises(DataError, match="row 'dog/2.png', .*maps/train/dog/2.png: expected an image, got a file"):
        load_data(photos, saliency=tmp_path / "maps")


def test_voc_takes_a_folder(tmp_path):
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, image_id in (("train", "2007_1"), ("val", "2007_2")):
        Image.new("RGB", (6, 4)).save(root / f"JPEGImages/{image_id}.jpg")
        Image.new("L", (6, 4), 8).save(root / f"SegmentationClass/{image_id}.png")
        (root / f"Annotations/{image_id}.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(image_id)
    draw(tmp_path / "maps", "2007_1.jpg")
    data = load_data("voc", root=root, saliency=tmp_path / "maps")
    assert list(rows_with_saliency(data["train"])) == [0] and not len(rows_with_saliency(data["val"]))
    assert data["train"].features == data["val"].features  # which push_to_hub asks for
    data.save_to_disk(tmp_path / "saved")
    assert load_data(tmp_path / "saved")["train"][0]["saliency"].size == (6, 4)


def test_coco_takes_a_folder(tmp_path):
    pytest.importorskip("pycocotools")
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        draw(tmp_path / f"{split}2017", f"00{split}.jpg")
        image = {"id": 1, "file_name": f"00{split}.jpg", "height": 4, "width": 6}
        shape = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [[0, 0, 3, 0, 3, 3]]}
        content = {"categories": [{"id": 3, "name": "cat"}], "images": [image], "annotations": [shape]}
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    draw(tmp_path / "maps", "00train.png", "00val.png", size=(12, 8), level=77)
    data = load_data("coco", root=tmp_path, saliency=tmp_path / "maps")
    assert [level(data[split], 0) for split in ("train", "val")] == [77, 77]


# From columns


def test_metadata_may_name_maps(tmp_path):
    draw(tmp_path, "a.png", "b.png", "maps/a.png")
    (tmp_path / "metadata.csv").write_text("file_name,tags,saliency\na.png,cat,maps/a.png\nb.png,cat,\n")
    data = load_data(tmp_path)
    assert "mask" not in data["train"].features and list(rows_with_saliency(data["train"])) == [0]
    assert data.source == {"source": str(tmp_path), "saliency": {"source": str(tmp_path), "learnt_from": None}}
    rows = [{"file_name": "a.png", "tags": ["cat"], "saliency": "maps/a.png"}, {"file_name": "b.png", "tags": "cat"}]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(rows_with_saliency(load_data(tmp_path)["train"])) == [0]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0] | {"saliency": "maps/c.png"}))
    with pytest.raises(DataError, match="metadata.jsonl, line 1: saliency: no such file .*maps/c.png"):
        load_data(tmp_path)


def rows(*maps, size=(6, 4)):
    columns = {"image_id": [f"x{i}" for i in range(len(maps))], "image": [Image.new("RGB", size)] * len(maps)}
    columns |= {"tags": [[0]] * len(maps), "saliency": list(maps)}
    return Dataset.from_dict(columns, features=tagged_features(["cat"], "saliency"))


def test_saved_data_may_have_a_column_of_any_name(tmp_path):
    saved = rows(picture("I;16"), picture("F").resize((3, 2))).rename_column("saliency", "fg")
    saved.save_to_disk(tmp_path / "saved")
    assert "saliency" not in load_data(tmp_path / "saved")["train"].features
    data = load_data(tmp_path / "saved", columns={"saliency": "fg"})
    (batch,) = batches_by_size(
        data["train"], lambda images, return_tensors: {"pixel_values": images}, 2, saliency=True
    )
    assert batch.saliency.shape == (2, 4, 6)
    np.testing.assert_allclose(batch.saliency[0], LEVELS, atol=1e-4)
    np.testing.assert_allclose(batch.saliency[1], LEVELS, atol=0.2)


def test_an_empty_column_counts_as_none(tmp_path):
    rows(None, None).save_to_disk(tmp_path / "saved")
    data = load_data(tmp_path / "saved")
    assert "saliency" not in data.source and not len(rows_with_saliency(data["train"]))
    with pytest.raises(DataError, match="expected a column 'saliency' for cam.saliency, got an empty one"):
        check_saliency(data["train"], "cam.saliency")


def test_all_missing_maps_are_counted_and_the_first_listed():
    grey = Image.new("L", (6, 4))
    check_saliency(rows(grey, grey), "x")
    with pytest.raises(
        DataError, match="expected a column 'saliency' for masks.seeds: drs, got image_id, image, tags$"
    ):
        check_saliency(rows(grey).remove_columns("saliency"), "masks.seeds: drs")
    with pytest.raises(DataError, match="for masks.seeds: drs, got none for 2 of 3 images: x0, x2$"):
        check_saliency(rows(None, grey, None), "masks.seeds: drs")
    with pytest.raises(DataError, match="got none for 7 of 8 images: x1, x2, x3, x4, x5, …$"):
        check_saliency(rows(grey, *[None] * 7), "masks.seeds: drs")


def test_a_column_that_does_not_fit_is_named_when_it_is_checked():
    check_dataset(DatasetDict(train=rows(Image.new("L", (3, 2)), None)))
    with pytest.raises(DataError, match="split 'train', row 'x1', column saliency: expected .* 6x4, got 4x4"):
        check_dataset(DatasetDict(train=rows(Image.new("L", (6, 4)), Image.new("L", (4, 4)))))


# Where they are from


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"source": "owner/net", "learnt_from": "DUTS"}, {"source": "owner/net", "learnt_from": "DUTS"}),
        ("some/maps", {"source": "some/maps", "learnt_from": None}),
        (None, None),
    ],
)
def test_a_stage_that_saved_the_data_has_recorded_where_the_maps_are_from(tmp_path, told, wanted):
    rows(Image.new("L", (6, 4))).save_to_disk(tmp_path)
    record = {"stage": "x", "data": {"source": "voc"} | ({} if told is None else {"saliency": told})}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(record))
    known = wanted or {"source": str(tmp_path), "learnt_from": None}
    source = load_data(tmp_path).source
    assert source == {"source": str(tmp_path), "saliency": known} and load_data(**source).source == source
    said = {"source": "a friend", "learnt_from": "no masks"}
    assert load_data(tmp_path, saliency=said).source["saliency"] == said


def test_where_maps_are_from_in_words():
    assert describe_saliency("maps") == "saliency maps of maps; what their network learnt from is not recorded"
    assert describe_saliency(None).startswith("saliency maps that the data hold; what their network")
    told = {"source": "owner/net", "learnt_from": "class-agnostic masks"}
    assert describe_saliency(told) == "saliency maps of owner/net; what they learnt from: class-agnostic masks"
