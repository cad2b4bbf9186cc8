import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image

from wsss_hf.data.folder import load_folder
from wsss_hf.data.saving import save_data, write_parquet
from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import DataError, undecoded


@pytest.fixture
def photos(tmp_path):
    """Noise that no format makes small: a folder of two classes of 60 pixels."""
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (60, 60, 3), np.uint8)).save(file)
    return tmp_path / "photos"


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def same_images(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first["image"], second["image"], strict=True))


def test_files_are_named_where_they_are(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_folder("photos")
    save_data(data, tmp_path / "saved")
    assert size_of(tmp_path / "saved") < size_of(photos) / 3
    monkeypatch.chdir("/")
    rows = load_from_disk(str(tmp_path / "saved"))["train"]
    assert rows.features == data["train"].features and rows["tags"][:] == [[0], [0], [1]]
    assert [row["image"]["path"] for row in undecoded(rows)][2] == str(photos / "dog" / "c.png")
    monkeypatch.chdir(tmp_path)
    assert same_images(rows, data["train"])


def test_images_that_have_moved_are_missed_in_one_line(photos, tmp_path):
    save_data(load_folder(photos), tmp_path / "saved")
    (photos / "dog" / "c.png").rename(tmp_path / "c.png")
    with pytest.raises(DataError, match=r"row 'dog/c\.png'.*expected an image, got no such file as .*/dog/c\.png$"):
        load_data(tmp_path / "saved")


def test_embedded_images_need_no_files(photos, tmp_path):
    data = load_folder(photos)
    images = [np.asarray(image) for image in data["train"]["image"]]
    save_data(data, tmp_path / "saved", embed_images=True)
    shutil.rmtree(photos)
    rows = load_from_disk(str(tmp_path / "saved"))["train"]
    assert all(np.array_equal(a, b) for a, b in zip(rows["image"], images, strict=True))


def test_rows_without_a_map_stay_without_one_and_bytes_stay_bytes(photos, toy_data, tmp_path):
    Image.new("L", (60, 60), 1).save(photos / "mask.png")
    lines = ["file_name,tags,mask", "cat/a.png,cat,mask.png", "cat/b.png,cat,", "dog/c.png,dog,"]
    (photos / "metadata.csv").write_text("\n".join(lines))
    data = load_folder(photos)
    save_data(DatasetDict({"train": data["train"], "val": toy_data["val"]}), tmp_path / "saved")
    saved = load_from_disk(str(tmp_path / "saved"))
    assert [mask is None for mask in saved["train"]["mask"]] == [False, True, True]
    assert saved["train"]["mask"][0].size == (60, 60)
    assert same_images(saved["val"], toy_data["val"])


def test_parquet_files_hold_the_images_in_small_groups_and_are_equal_to_the_byte(photos, tmp_path):
    data = load_folder(photos)["train"].select([0, 1, 2] * 80)
    for name in ("first.parquet", "second.parquet"):
        write_parquet(data, tmp_path / name)
    assert (tmp_path / "first.parquet").read_bytes() == (tmp_path / "second.parquet").read_bytes()
    assert pq.ParquetFile(tmp_path / "first.parquet").num_row_groups == 3
    rows = Dataset.from_parquet(str(tmp_path / "first.parquet"), cache_dir=str(tmp_path / "cache"))
    shutil.rmtree(photos / "dog")
    assert rows.features == data.features and len(rows) == 240 and rows[239]["image"].size == (60, 60)
