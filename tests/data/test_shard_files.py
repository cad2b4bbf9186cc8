"""Parquet and WebDataset shards, and tags as others write them."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, config
from datasets import Image as ImageFeature
from PIL import Image

from wsss_hf.data import sources
from wsss_hf.data.sources import load_data
from wsss_hf.data.streams import load_stream
from wsss_hf.data.tagged import DataError, class_names

PICTURES = [Image.new("RGB", (6, 4), (40 * number, 0, 0)) for number in range(4)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(tags, feature, column="tags"):
    return Dataset.from_dict(
        {"image": PICTURES[: len(tags)], column: tags}, features=Features({"image": ImageFeature(), column: feature})
    )


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_a_folder_of_parquet_shards_has_the_splits_of_their_names(tmp_path):
    data = rows([["cat"], ["dog"], [], ["cat", "dog"]], List(Value("string")))
    (tmp_path / "shards" / "data").mkdir(parents=True)
    for index in range(2):
        part = data.shard(2, index, contiguous=True)
        part.to_parquet(tmp_path / "shards" / "data" / f"train-{index:05d}-of-00002.parquet")
    data.select([1]).to_parquet(tmp_path / "shards" / "data" / "validation-00000-of-00001.parquet")
    found = load_data(tmp_path / "shards")
    assert found["train"]["tags"][:] == [[0], [1], [], [0, 1]] and found["val"]["tags"][:] == [[1]]
    assert all(np.array_equal(a, b) for a, b in zip(found["train"]["image"], PICTURES, strict=True))
    assert found["train"].cache_files  # and not in memory
    one = load_data(tmp_path / "shards" / "data" / "train-00001-of-00002.parquet", classes=["cat", "dog"])
    assert one["train"]["tags"][:] == [[], [0, 1]]


def test_tar_shards_of_webdataset(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"train-{shard}.tar", "w") as archive:
            for number in (2 * shard, 2 * shard + 1):
                stream = io.BytesIO()
                PICTURES[number].save(stream, format="PNG")
                add(archive, f"{number:04d}.png", stream.getvalue())
                add(archive, f"{number:04d}.json", json.dumps({"tags": ["cat", "dog"][: number % 2 + 1]}).encode())
    found = load_data(tmp_path / "shards", columns={"image_id": "__key__", "image": "png", "tags": "json.tags"})
    assert found["train"]["image_id"][:] == ["0000", "0001", "0002", "0003"]
    assert class_names(found) == ["cat", "dog"] and found["train"]["tags"][:] == [[0], [0, 1], [0], [0, 1]]
    assert np.array_equal(found["train"]["image"][3], PICTURES[3])
    columns = {"image_id": "__key__", "image": "png", "tags": "json.tags"}
    stream = load_stream(tmp_path / "shards", classes=["cat", "dog"], columns=columns)["train"]
    assert [(row["image_id"], row["tags"]) for row in stream] == list(
        zip(found["train"]["image_id"], found["train"]["tags"], strict=True)
    )
    assert all(row["image"]["bytes"] for row in stream)


@pytest.mark.parametrize("load", [load_data, load_stream])
def test_a_damaged_shard_is_named(load, tmp_path):
    rows([0, 1], ClassLabel(names=["cat", "dog"])).to_parquet(tmp_path / "train-0.parquet")
    damaged = tmp_path / "train-1.parquet"
    damaged.write_bytes((tmp_path / "train-0.parquet").read_bytes()[:-20])
    for source in (tmp_path, damaged):
        with pytest.raises(DataError, match=f"^{damaged}: expected a Parquet file, got one that can't be read"):
            load(source)


TAR = {"columns": {"image_id": "__key__", "image": "png", "tags": "txt"}, "classes": ["cat", "dog"]}


@pytest.fixture
def tar_shards(tmp_path):
    """Two tar files of six images each; of an image there are 512 bytes of header and 512 of content, twice."""
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"train-{shard}.tar", "w") as archive:
            for number in range(6):
                stream = io.BytesIO()
                PICTURES[number % 4].save(stream, format="PNG")
                add(archive, f"{shard}{number}.png", stream.getvalue())
                add(archive, f"{shard}{number}.txt", b"cat")
    return tmp_path / "shards"


def overwritten(content, start, end, value):
    return content[:start] + bytes([value]) * (end - start) + content[end:]


DAMAGES = {
    "a header of other bytes": (lambda content: overwritten(content, 6144, 6656, 120), 6144),
    "a header of zeros": (lambda content: overwritten(content, 6144, 6656, 0), 6144),
    "cut between two images": (lambda content: content[:6144], 6144),
    "cut in a header": (lambda content: content[:6244], 6144),
    "cut in an image": (lambda content: content[:4700], 5120),  # where the next header should be
    "without its end": (lambda content: content[: 12 * 1024], 12 * 1024),
    "two in one": (lambda content: content + content, 12 * 1024),
    "empty": (lambda content: b"", 0),
    "something else": (lambda content: b"nothing of the kind" * 100, 0),
}


@pytest.mark.parametrize("load", [load_data, load_stream])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_tar_file_is_named(load, kind, tar_shards):
    """The library takes most of these for the end of the file, and gives the rows before it."""
    damage, place = DAMAGES[kind]
    damaged = tar_shards / "train-1.tar"
    damaged.write_bytes(damage(damaged.read_bytes()))
    for source in (tar_shards, damaged):
        with pytest.raises(DataError, match=f"^{damaged}, byte {place}: expected a whole tar file, got"):
            load(source, **TAR)


def test_every_process_names_a_damaged_tar_file(tar_shards, in_processes):
    """The first process looks at the files for the others, which would wait for it, or know only that it is gone."""
    damaged = tar_shards / "train-1.tar"
    damaged.write_bytes(damaged.read_bytes()[:6144])

    def work():
        Accelerator()
        load_stream(tar_shards, **TAR)

    for error in in_processes(work):
        assert isinstance(error, DataError) and str(error).startswith(
            f"{damaged}, byte 6144: expected a whole tar file"
        )


def test_tar_files_are_walked_once_and_again_when_one_has_changed(tar_shards, monkeypatch):
    walked = []
    monkeypatch.setattr(sources, "_check_tar", walked.append)
    for _ in range(2):
        assert len(list(load_stream(tar_shards, **TAR)["train"])) == 12
    assert len(walked) == 1 and len(walked[0]) == 2
    os.utime(tar_shards / "train-0.tar", ns=(0, 0))
    load_stream(tar_shards, **TAR)
    assert len(walked) == 2


def test_a_packed_tar_file_is_read_as_others(tar_shards):
    file = tar_shards / "train-1.tar"
    file.write_bytes(gzip.compress(file.read_bytes()))
    assert len(list(load_stream(tar_shards, **TAR)["train"])) == 12
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=f"^{file}, byte .*: expected a whole tar file"):
        load_stream(tar_shards, **TAR)


@pytest.mark.parametrize("load", [load_data, load_stream])
@pytest.mark.parametrize("column", ["tags", "objects.name"])
def test_shards_of_other_classes_are_named(load, column, tmp_path):
    for name, classes in (("train", ["cat", "dog"]), ("validation", ["dog"])):
        label, tags = ClassLabel(names=classes), [0] * len(classes)
        if column != "tags":
            label, tags = List({"name": label}), [[{"name": 0}] for _ in classes]
        rows(tags, label, column.partition(".")[0]).to_parquet(tmp_path / f"{name}-0.parquet")
    expected = f"^{tmp_path}/validation-0.parquet, column '{column}': expected the classes of .*, cat, dog, got dog$"
    with pytest.raises(DataError, match=expected):
        load(tmp_path, columns={"tags": column})


CAT_DOG, DOG_CAT, NAME = ClassLabel(names=["cat", "dog"]), ClassLabel(names=["dog", "cat"]), Value("string")


@pytest.mark.parametrize(
    ("train", "val"), [(CAT_DOG, DOG_CAT), (List(CAT_DOG), List(DOG_CAT)), (NAME, CAT_DOG), (List(CAT_DOG), NAME)]
)
def test_splits_whose_tags_mean_other_things_are_refused(train, val, tmp_path):
    """An index would mean another class in each split."""
    splits = {}
    for split, feature in (("train", train), ("validation", val)):
        tags = ["cat", "dog"] if feature == NAME else [0, 1]
        splits[split] = rows([[tag] for tag in tags] if isinstance(feature, List) else tags, feature)
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="split 'val': tags: expected .* as in 'train', got"):
        load_data(tmp_path / "saved")


@pytest.mark.parametrize(("train", "val"), [(List(CAT_DOG), CAT_DOG), (CAT_DOG, List(CAT_DOG)), (NAME, List(NAME))])
def test_a_split_may_have_one_tag_a_row_and_another_lists(train, val, tmp_path):
    def of(feature):
        tags = [0, 1] if "ClassLabel" in str(feature) else ["cat", "dog"]
        return rows([[tag] for tag in tags] if isinstance(feature, List) else tags, feature)

    DatasetDict({"train": of(train), "validation": of(val)}).save_to_disk(tmp_path / "saved")
    found = load_data(tmp_path / "saved")
    assert class_names(found) == ["cat", "dog"]
    assert all(found[split]["tags"][:] == [[0], [1]] for split in ("train", "val"))


@pytest.mark.parametrize("train", [List(CAT_DOG), NAME])
def test_a_split_may_have_no_tags(train, tmp_path):
    tags = ["cat", "dog"] if train == NAME else [[0], [1]]
    untagged = rows([[], []], List(Value("null")))
    DatasetDict({"train": rows(tags, train), "validation": untagged}).save_to_disk(tmp_path / "saved")
    found = load_data(tmp_path / "saved")
    assert found["train"]["tags"][:] == [[0], [1]] and found["val"]["tags"][:] == [[], []]


@pytest.mark.parametrize(
    ("objects", "feature"),
    [
        ([{"name": [0, 1]}, {"name": [1]}], {"name": List(ClassLabel(names=["cat", "dog"]))}),
        (
            [[{"name": 0, "box": [1.0]}, {"name": 1, "box": [2.0]}], [{"name": 1, "box": []}]],
            List({"name": ClassLabel(names=["cat", "dog"]), "box": List(Value("float32"))}),
        ),
        ([[{"name": "cat"}, {"name": "dog"}], [{"name": "dog"}]], List({"name": Value("string")})),
    ],
)
def test_a_dot_leads_into_a_column(objects, feature, tmp_path):
    rows(objects, feature, "objects").save_to_disk(tmp_path / "saved")
    found = load_data(tmp_path / "saved", columns={"tags": "objects.name"})
    assert found["train"]["tags"][:] == [[0, 1], [1]] and class_names(found) == ["cat", "dog"]
    with pytest.raises(DataError, match="expected a column of .*image, objects, got 'objects.size'"):
        load_data(tmp_path / "saved", columns={"tags": "objects.size"})


@pytest.mark.parametrize("kind", ["int8", "float32", "bool"])
def test_multi_hot_tags_take_their_names_from_the_classes(kind, tmp_path):
    rows([[1, 0, 1], [0, 0, 0], [0, 1, 0]], List(Value(kind))).save_to_disk(tmp_path / "saved")
    found = load_data(tmp_path / "saved", classes=["cat", "dog", "cow"])
    assert found["train"]["tags"][:] == [[0, 2], [], [1]] and class_names(found) == ["cat", "dog", "cow"]
    with pytest.raises(DataError, match="expected 0 or 1 for each of 2 classes in every row"):
        load_data(tmp_path / "saved", classes=["cat", "dog"])
    with pytest.raises(DataError, match="with --classes, 0 or 1 for each class or one class index, got List"):
        load_data(tmp_path / "saved")


@pytest.mark.parametrize("load", [load_data, load_stream])
def test_the_class_index_of_webdataset_takes_its_name_from_the_classes(load, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, index in enumerate((2, 0, 1)):
            stream = io.BytesIO()
            PICTURES[number].save(stream, format="PNG")
            add(archive, f"{number}.png", stream.getvalue())
            add(archive, f"{number}.cls", str(index).encode())
    columns = {"image_id": "__key__", "image": "png", "tags": "cls"}
    found = load(tmp_path / "train.tar", columns=columns, classes=["cat", "dog", "cow"])
    assert class_names(found) == ["cat", "dog", "cow"]
    assert [row["tags"] for row in found["train"]] == [[2], [0], [1]]
    with pytest.raises(DataError, match="expected class indices 0..1, got 2"):
        list(load(tmp_path / "train.tar", columns=columns, classes=["cat", "dog"])["train"])
    with pytest.raises(DataError, match="--classes"):
        load(tmp_path / "train.tar", columns=columns)
