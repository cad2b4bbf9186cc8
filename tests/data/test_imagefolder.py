"""Folders in the layouts of the `imagefolder` of datasets: read here, or by its own loader where columns are named."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config
from PIL import Image

from wsss_hf.data.folder import load_folder
from wsss_hf.data.sources import load_data
from wsss_hf.data.streams import load_stream
from wsss_hf.data.tagged import DataError, class_names, decode_image

TAGS = {"a.png": ["cat"], "b.png": ["dog", "cat"], "c.png": []}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "masks").mkdir(parents=True)
    for number, name in enumerate(TAGS):
        Image.new("RGB", (6, 4), (40 * number, 0, 0)).save(folder / name)
        Image.new("L", (6, 4), number).save(folder / "masks" / name)
    return folder


def write_parquet(folder, tags):
    table = {"file_name": list(TAGS), "tags": tags, "mask_file_name": [f"masks/{name}" for name in TAGS]}
    pq.write_table(pa.table(table), folder / "metadata.parquet")


def write_csv(folder, separator=";"):
    lines = [f"{name},{separator.join(tags)},masks/{name}" for name, tags in TAGS.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,objects,mask_file_name", *lines]))


def test_metadata_in_parquet_names_images_tags_and_masks(photos):
    write_parquet(photos, list(TAGS.values()))
    for rows in (load_folder(photos)["train"], load_data(photos)["train"]):
        assert rows["image_id"][:] == list(TAGS) and rows["tags"][:] == [[0], [0, 1], []]
        assert class_names(rows) == ["cat", "dog"]
        assert [np.unique(mask).tolist() for mask in rows["mask"]] == [[0], [1], [2]]


def test_a_row_of_parquet_is_named(photos):
    write_parquet(photos, [["cat"], ["background"], []])
    with pytest.raises(DataError, match="metadata.parquet, row 2: tags: expected names of objects"):
        load_folder(photos)
    write_parquet(photos, [["cat"], None, []])
    with pytest.raises(DataError, match="metadata.parquet, row 2: expected file_name and tags, got file_name"):
        load_folder(photos)
    (photos / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="metadata.parquet: expected a Parquet file, got one that can't be read"):
        load_folder(photos)


@pytest.mark.parametrize("separator", [";", "/"])
def test_named_columns_are_those_of_the_library(photos, separator):
    write_csv(photos, separator)
    wanted = {"columns": {"tags": "objects"}, "separator": separator}
    rows = load_data(photos, **wanted)["train"]
    stream = list(load_stream(photos, classes=["cat", "dog"], **wanted)["train"])
    assert class_names(rows) == ["cat", "dog"]
    assert rows["image_id"][:] == [row["image_id"] for row in stream] == list(TAGS)
    assert [sorted(tags) for tags in rows["tags"]] == [row["tags"] for row in stream] == [[0], [0, 1], []]
    assert rows.cache_files  # and not in memory
    for number, row in enumerate(rows):
        assert np.array_equal(row["image"], Image.new("RGB", (6, 4), (40 * number, 0, 0)))
        assert np.array_equal(row["image"], decode_image(stream[number]["image"], ""))
        assert np.unique(row["mask"]).tolist() == [number]


def test_several_names_in_one_text_are_no_class(photos):
    write_csv(photos, "|")
    with pytest.raises(DataError, match=r"photos, train row 2: tags: expected names separated by ';', got 'dog\|cat'"):
        load_data(photos, columns={"tags": "objects"})


def class_folders(folder):
    for split, count in (("train", 2), ("test", 1)):
        for red, name in ((100, "cat"), (200, "dog")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (6, 4), (red, number, 0)).save(folder / split / name / f"{number}.png")
    return folder


def test_class_folders_are_labels_of_the_library(tmp_path):
    folder = class_folders(tmp_path / "classes")
    found, own = load_data(folder, columns={"tags": "label"}), load_data(folder)
    for split in ("train", "val"):
        assert found[split]["tags"][:] == own[split]["tags"][:]
        assert all(map(np.array_equal, found[split]["image"], own[split]["image"]))
    assert found["train"]["image_id"][:] == [f"train/{name}" for name in own["train"]["image_id"]]
    assert class_names(found) == class_names(own) == ["cat", "dog"]
