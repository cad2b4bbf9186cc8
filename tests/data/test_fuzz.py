"""Damaged data of every kind: they load, or one line names file or row; seeds are fixed."""

import io
import json
import random
import warnings

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from wsss_hf.data.coco import load_coco
from wsss_hf.data.folder import load_folder
from wsss_hf.data.tagged import DataError, check_dataset, class_names, decode_image, decode_mask, tagged_features
from wsss_hf.data.voc import load_voc

pytestmark = pytest.mark.slow

SPECIAL = [b'"', b"'", b";", b",", b"|", b"\n", b"\r", b"\t", b"\0", b"\xff", b"\xef\xbb\xbf", b"[", b"{", b"<", b"&"]
WRONG = [None, True, -1, 0, 2.5, 10**12, 10**400, 1e300, float("nan"), float("inf"), "", "x", "../x", "a\n", "\ud800"]
WRONG += [[], {}, [[]], [None], [[[[1]]]], {"counts": "0", "size": [6, 8]}, {"counts": [10**9], "size": [6, 8]}]
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One to three of: a bit turned, a piece cut out, doubled or put elsewhere, the end missing, special bytes."""
    for _ in range(draw.randint(1, 3)):
        start, length = draw.randrange(len(content) + 1), draw.choice([1, 1, 2, 5, 30])
        piece = content[start : start + length]
        place = draw.randrange(len(content) + 1)
        before, after = content[:start], content[start:]
        turned = bytes(byte ^ (1 << draw.randrange(8)) for byte in piece[:1])
        kinds = (
            before + turned + after[1:],
            before + after[length:],
            before + piece + after,
            content[:place] + piece + content[place:],
            before,
            before + draw.choice(SPECIAL) + after,
        )
        content = draw.choice(kinds)
    return content


def loads_or_says(load, place) -> DatasetDict | None:
    """The data, checked; or None after an error of one line that names a file or row below `place`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about the files
            dataset = load()
            check_dataset(dataset)
    except DataError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 600, text
        assert str(place) in text or text.startswith(("split '", "classes: ")), text
        return None
    return dataset


def saved(image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path):
    for number in range(5):
        (tmp_path / f"i{number}.png").write_bytes(saved(Image.new("RGB", (6, 4))))
    (tmp_path / "m.png").write_bytes(saved(Image.new("L", (6, 4), 1)))
    return tmp_path


CSV = 'file_name,tags,mask,note\ni0.png,cat,m.png,"x, y"\ni1.png,traffic light;cat,,\ni2.png,"dog",,\ni3.png,dog,,z\n'
JSONL = (
    '{"file_name": "i0.png", "tags": ["cat"], "mask": "m.png"}\n{"file_name": "i1.png", "tags": "cat;dog"}\n'
    '{"file_name": "i2.png", "tags": []}\n{"file_name": "i3.png", "tags": ["dog"], "mask": null}\n'
)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_metadata(photos, name, encoding):
    draw = random.Random(1)
    content = {"metadata.csv": CSV, "metadata.jsonl": JSONL}[name].encode(encoding)
    loaded = 0
    for _ in range(150):
        (photos / name).write_bytes(damaged(content, draw))
        dataset = loads_or_says(lambda: load_folder(photos), photos)
        if dataset is not None:
            loaded += 1
            assert not any(n.endswith(".png") or n[0] in "'\"[{" or "\n" in n for n in class_names(dataset))
            assert set(dataset["train"]["image_id"]) <= {"m.png", *(f"i{number}.png" for number in range(5))}
    assert 0 < loaded < 150


@pytest.mark.parametrize("key", ["file_name", "tags", "mask"])
def test_metadata_of_wrong_types(photos, key):
    for value in WRONG:
        row = {"file_name": "i0.png", "tags": ["cat"]} | {key: value}
        (photos / "metadata.jsonl").write_text(f"{json.dumps(row)}\n" + JSONL.partition("\n")[2])
        loads_or_says(lambda: load_folder(photos), photos)


def test_voc(tmp_path):
    draw = random.Random(2)
    folders = ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation")
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    files = {"ImageSets/Segmentation/train.txt": b"a\nb\n", "ImageSets/Segmentation/val.txt": b"c\n"}
    mask = saved(Image.fromarray(np.full((4, 6), 8, dtype=np.uint8)))
    for name in "abc":
        xml = b'<?xml version="1.0"?><annotation><object><name>cat</name></object></annotation>'
        files |= {f"Annotations/{name}.xml": xml, f"SegmentationClass/{name}.png": mask}
        (tmp_path / f"JPEGImages/{name}.jpg").write_bytes(saved(Image.new("RGB", (6, 4)), "JPEG"))
    loaded = 0
    for turn in range(100):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        name = draw.choice(list(files))
        (tmp_path / name).write_bytes(damaged(files[name], draw))
        dataset = loads_or_says(lambda classes=["cat"] if turn % 2 else None: load_voc(tmp_path, classes), tmp_path)
        loaded += dataset is not None
    assert 0 < loaded < 100


def coco_content() -> dict:
    shape = {"image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": [[0, 0, 5, 0, 5, 4, 0, 4]]}
    runs = {"size": [6, 8], "counts": [6, 12, 30]}
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 8, "height": 6} for n in (1, 2)],
        "annotations": [shape | {"id": 1}, shape | {"id": 2, "image_id": 2, "segmentation": runs}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }


def with_wrong_value(content, draw: random.Random, depth: int = 0):
    """The same tree with one of its nodes, from the third level on, replaced."""
    if not isinstance(content, dict | list) or not content or (depth > 2 and draw.random() < 0.1):
        return draw.choice(WRONG)
    if isinstance(content, list):
        place = draw.randrange(len(content))
        return [*content[:place], with_wrong_value(content[place], draw, depth + 1), *content[place + 1 :]]
    key = draw.choice(list(content))
    return content | {key: with_wrong_value(content[key], draw, depth + 1)}


@pytest.mark.parametrize("change", ["values", "bytes", "run lengths"])
def test_coco(tmp_path, monkeypatch, change):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("WSSS_QUIET", "1")
    draw = random.Random(3)
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        for number in (1, 2):
            Image.new("RGB", (8, 6)).save(tmp_path / f"{split}2017/{number}.jpg")
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(coco_content()))
    path = tmp_path / "annotations/instances_val2017.json"
    loaded = 0
    for turn in range(100):
        content = coco_content()
        if change == "values":
            path.write_text(json.dumps(with_wrong_value(content, draw)))
        elif change == "bytes":
            path.write_bytes(damaged(json.dumps(content).encode(), draw))
        else:
            counts = "".join(chr(draw.randint(40, 115)) for _ in range(draw.randint(0, 12)))
            content["annotations"][1]["segmentation"]["counts"] = counts
            path.write_text(json.dumps(content))
        classes = ["cat"] if turn % 3 else ["cat", "dog"]
        loaded += loads_or_says(lambda classes=classes: load_coco(tmp_path, classes), tmp_path) is not None
    assert loaded < 100 and (loaded or change == "run lengths")


@pytest.mark.parametrize("kind", FORMATS)
def test_images(kind):
    draw, noise = random.Random(4), np.random.default_rng(4)
    image = Image.fromarray(noise.integers(256, size=(24, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    content = saved(image, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    header = content[:200]
    for turn in range(150):
        # Headers say most of what can be wrong.
        wrong = damaged(header, draw) + content[200:] if turn % 2 else damaged(content, draw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decoded = decode_image({"bytes": wrong, "path": None}, "row 'x'")
        except DataError as error:
            assert str(error).startswith("row 'x': expected ") and "\n" not in str(error)
        else:
            assert decoded.mode == "RGB" and max(decoded.size) <= 8 * min(decoded.size)


def test_masks():
    draw, noise = random.Random(5), np.random.default_rng(5)
    photo = {"bytes": saved(Image.new("RGB", (6, 4))), "path": None}
    modes = ["L", "P", "1", "RGB", "RGBA", "LA", "I;16", "I", "F"]
    for turn in range(250):
        labels = noise.integers(draw.choice([2, 3, 4, 256]), size=(4, 6), dtype=np.uint8)
        image = Image.fromarray(labels)
        mode = draw.choice(["L", "L", *modes])
        if mode == "P":
            image.putpalette(noise.integers(256, size=768).tolist())
        elif mode == "I;16":
            image = Image.fromarray(labels.astype(np.uint16))
        elif mode != "L":
            image = image.convert(mode)
        content = saved(image, "TIFF" if mode in ("F", "I") else "PNG")
        is_whole = turn % 3 == 0
        mask = {"bytes": content if is_whole else damaged(content, draw), "path": None}
        columns = {"image_id": ["x"], "image": [photo], "tags": [[0, 1]], "mask": [mask]}
        rows = Dataset.from_dict(columns, features=tagged_features(["cat", "dog"], "mask"))
        dataset = loads_or_says(lambda rows=rows: DatasetDict(train=rows), "row 'x'")
        is_good = mode in ("L", "P") and set(np.unique(labels)) <= {0, 1, 2, 255} and {1, 2} & set(np.unique(labels))
        if is_whole:
            assert (dataset is not None) == bool(is_good)
            assert dataset is None or np.array_equal(decode_mask(mask, "row"), labels)
