"""Pushing images with pseudo masks, and loading them from the Hub."""

import json
import shutil
import tempfile

import datasets.config
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, concatenate_datasets, load_dataset, load_from_disk
from huggingface_hub import DatasetCard
from loopback_hub import TOKEN

from wsss_hf.cli.main import main
from wsss_hf.data.saving import num_bytes, save_data
from wsss_hf.data.sources import load_data
from wsss_hf.data.streams import load_stream
from wsss_hf.data.tagged import DataError, class_names, undecoded
from wsss_hf.hub import push as module
from wsss_hf.hub.push import push_dataset
from wsss_hf.hub.upload import HubError
from wsss_hf.models.label_colors import mask_image


@pytest.fixture
def hub(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return hub


@pytest.fixture
def run_folder(tmp_path, toy_data):
    """A run's masks: every pseudo mask is the true one, turned upside down."""
    masks = [mask_image(np.ascontiguousarray(np.asarray(mask)[::-1])) for mask in toy_data["train"]["mask"]]
    column = Dataset.from_dict({"pseudo_mask": masks}).cast_column("pseudo_mask", Image())
    train = toy_data["train"].add_column("pseudo_mask", undecoded(column)["pseudo_mask"][:])
    rows = DatasetDict({**toy_data, "train": train.cast_column("pseudo_mask", Image())})
    rows.save_to_disk(tmp_path / "run" / "masks")
    row = {"result": "pseudo masks", "split": "train", "of": "masks", "mean_iou": 0.5, "num_images": 12}
    results = {"command": "demo", "data": {"source": "toy"}, "recipe": {"masks": {"scales": [1.0], "refine": ["crf"]}}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"results": [row], "minutes": 3.0}))
    return tmp_path / "run"


@pytest.mark.slow
def test_masks_come_back_from_the_hub_as_they_were(hub, run_folder, toy_data, tmp_path, monkeypatch):
    push_dataset(run_folder, "tester/masks", licence="apache-2.0")
    files = hub.files("tester/masks", kind="dataset")
    parquet = {"data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet"}
    assert set(files) == parquet | {"README.md", "results.json", "recipe.yaml", ".gitattributes"}
    assert len(hub.repositories["dataset", "tester/masks"].commits) == 2

    rows = load_dataset("tester/masks", cache_dir=str(tmp_path / "cache"), token=TOKEN)
    assert {split: len(part) for split, part in rows.items()} == {"train": 12, "val": 4}
    assert class_names(rows) == class_names(toy_data)
    for ours, theirs in zip(toy_data["train"], rows["train"], strict=True):
        assert ours["image_id"] == theirs["image_id"] and ours["tags"] == theirs["tags"]
        assert np.array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"]))
        assert np.array_equal(np.asarray(ours["mask"])[::-1], np.asarray(theirs["pseudo_mask"]))
        assert theirs["pseudo_mask"].mode == "P"
    # It is data for the next stage as it is.
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    again = load_data("tester/masks")
    assert "pseudo_mask" in again["train"].features and len(again["val"]) == 4
    # Also while it is read from there.
    for ours, theirs in zip(toy_data["train"], load_stream("tester/masks")["train"], strict=True):
        assert ours["image_id"] == theirs["image_id"] and ours["tags"] == theirs["tags"]
        assert theirs["image"]["bytes"] and theirs["pseudo_mask"]["bytes"]


def test_the_card_feeds_the_viewer_and_names_its_limits(hub, run_folder, toy_data):
    push_dataset(run_folder, "tester/masks", licence="apache-2.0")
    card = DatasetCard(hub.files("tester/masks", kind="dataset")["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.task_categories == ["image-segmentation"]
    (config,) = card.data.configs
    assert config["config_name"] == "default"
    assert config["data_files"] == [{"split": s, "path": f"data/{s}-*"} for s in ("train", "val")]
    features = {feature["name"]: feature for feature in card.data.dataset_info["features"]}
    names = features["tags"]["list"]["class_label"]["names"]
    assert list(names.values()) == class_names(toy_data) and features["pseudo_mask"]["dtype"] == "image"
    for words in (
        "12 training images",
        "wrong in places",
        "`pseudo_mask`: machine-made",
        "| pseudo masks | train | 50.0",
    ):
        assert words in card.text
    assert "Fully Connected CRFs" in card.text and "`saliency`" not in card.text
    assert "wsss train-segmenter --data tester/masks" in card.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "in_run", "claims"),
    [
        ("stage: make-masks", True, True),
        ("stage: make-masks", False, False),
        (None, True, False),
        (None, False, False),
    ],
)
def test_a_card_claims_tags_only_where_the_record_shows_it(hub, run_folder, record, in_run, claims):
    if record:
        (run_folder / "masks" / "recipe.yaml").write_text(record)
    if not in_run:
        (run_folder / "results.json").unlink()
    push_dataset(run_folder / "masks", "tester/masks")
    text = hub.files("tester/masks", kind="dataset")["README.md"].decode()
    assert ("made from image tags only by wsss_hf" in text) == ("all the supervision there was" in text) == claims
    assert ("made by wsss_hf" in text) != claims


@pytest.mark.slow
def test_a_second_push_sends_nothing(hub, run_folder, capsys):
    push_dataset(run_folder / "masks", "tester/masks", licence="mit")
    sent = len(hub.uploads)
    with pytest.raises(SystemExit) as stopped:
        main(["push", "--dataset", str(run_folder), "tester/masks", "--private"])
    assert stopped.value.code == 1 and "public already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["push", "--dataset", str(run_folder), "tester/masks"])
    assert not stopped.value.code and "already" in capsys.readouterr().out
    assert len(hub.uploads) == sent


@pytest.fixture
def named_images(run_folder, tmp_path):
    """The run's masks again, beside images that are files in a folder; returns that folder."""
    rows, folder = load_from_disk(str(run_folder / "masks")), tmp_path / "photos"
    folder.mkdir()
    for split, part in rows.items():
        paths = [str(folder / f"{split}-{index}.png") for index in range(len(part))]
        for path, image in zip(paths, part["image"], strict=True):
            image.save(path)
        column = Dataset.from_dict({"image": paths}).cast_column("image", Image())
        rows[split] = concatenate_datasets([part.remove_columns("image"), column], axis=1)
    save_data(rows, tmp_path / "named")
    shutil.rmtree(run_folder / "masks")
    (tmp_path / "named").rename(run_folder / "masks")
    return folder


def test_images_that_the_data_set_only_names_are_pushed_with_it(hub, run_folder, named_images, toy_data, tmp_path):
    push_dataset(run_folder, "tester/masks", licence="mit")
    shutil.rmtree(named_images)
    rows = load_dataset("tester/masks", cache_dir=str(tmp_path / "cache"), token=TOKEN)
    for split, part in rows.items():
        for ours, theirs in zip(toy_data[split]["image"], part["image"], strict=True):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert str(tmp_path).encode() not in hub.files("tester/masks", kind="dataset")["data/val-00000-of-00001.parquet"]
    with pytest.raises(DataError, match="expected its image files, got no such file as .*train-0.png"):
        push_dataset(run_folder, "tester/masks", licence="mit")


@pytest.fixture
def shards(run_folder, monkeypatch):
    """Shards are so small that there are three; returns their names."""
    size = num_bytes(load_from_disk(str(run_folder / "masks"))["train"])
    monkeypatch.setattr(module, "SHARD_BYTES", 1 + size // 2)
    return ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "val-00000-of-00001.parquet"]


def test_one_shard_at_a_time_is_on_the_disk_and_one_commit_brings_all(hub, run_folder, shards, tmp_path, monkeypatch):
    on_disk = []

    class Storage(dict):
        def __setitem__(self, oid, content):
            on_disk.append([path.name for path in (tmp_path / "temporary").rglob("*.parquet")])
            super().__setitem__(oid, content)

    hub.objects = Storage()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    push_dataset(run_folder, "tester/masks", licence="mit")
    assert on_disk == [[name] for name in shards]
    assert hub.repositories["dataset", "tester/masks"].messages[1:] == ["Push pseudo masks"]
    assert {f"data/{name}" for name in shards} < set(hub.files("tester/masks", kind="dataset"))


@pytest.mark.slow
def test_what_has_arrived_before_a_push_broke_is_not_sent_again(hub, run_folder, shards, capsys):
    command = ["push", "--dataset", str(run_folder), "tester/masks"]
    hub.room = 1
    with pytest.raises(SystemExit) as stopped:
        main(command)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and len(hub.objects) == 1
    assert error.startswith("error: tester/masks: the Hub says: ") and error.count("\n") == 1
    assert set(hub.files("tester/masks", kind="dataset")) == {".gitattributes"}
    hub.room = None
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert not stopped.value.code and "pushing: 16/16" in capsys.readouterr().err
    assert len(hub.object_uploads) == len(set(hub.object_uploads)) == 3
    assert hub.repositories["dataset", "tester/masks"].messages[1:] == ["Push pseudo masks"]


def test_shards_that_are_too_small_for_the_storage_go_with_the_commit(hub, run_folder, shards):
    hub.large = ()
    push_dataset(run_folder, "tester/masks", licence="mit")
    files = hub.files("tester/masks", kind="dataset")
    assert not hub.objects and all(files[f"data/{name}"].startswith(b"PAR1") for name in shards)


def test_a_licence_that_the_hub_does_not_know_comes_before_any_shard(hub, run_folder):
    with pytest.raises(HubError, match="the Hub refuses its metadata"):
        push_dataset(run_folder, "tester/masks", licence="my-own")
    assert not hub.objects and not hub.repositories


@pytest.mark.slow
def test_larger_shards_take_the_place_of_smaller_ones(hub, run_folder, shards, toy_data, tmp_path, monkeypatch):
    push_dataset(run_folder, "tester/masks", licence="mit")
    monkeypatch.setattr(module, "SHARD_BYTES", 2**30)
    push_dataset(run_folder, "tester/masks", licence="mit")
    names = [name for name in hub.files("tester/masks", kind="dataset") if name.startswith("data/")]
    assert sorted(names) == ["data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet"]
    rows = load_dataset("tester/masks", cache_dir=str(tmp_path / "cache"), token=TOKEN)
    assert rows["train"]["image_id"][:] == toy_data["train"]["image_id"][:]


def test_what_holds_no_masks_is_refused(hub, cam_folder):
    with pytest.raises(ValueError, match="expected a folder with dataset_dict.json, or a run with masks/"):
        push_dataset(cam_folder, "tester/masks")
    assert hub.requests == []
