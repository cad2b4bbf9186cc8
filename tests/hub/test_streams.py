"""Stages on a data set that they read from the Hub as they go."""

import datasets.config
import pytest
import torch
from loopback_hub import Repository
from safetensors.torch import load_file

from wsss_hf.data.streams import load_stream
from wsss_hf.stages.fingerprint import data_fingerprint
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.train_cam import train_cam


@pytest.fixture
def photos(hub, toy_data, tmp_path, monkeypatch):
    """A private repository on the Hub with 12 images in three shards, and a folder with the same shards."""
    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_CACHE": tmp_path / "cache",
        "SLEEP_TIME_ON_THREADS_SHUTDOWN": 0.1,  # 5 s for each iterator that is left
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    (tmp_path / "shards").mkdir()
    for index in range(3):
        part = toy_data["train"].shard(3, index, contiguous=True)
        part.to_parquet(tmp_path / "shards" / f"train-{index:05d}-of-00003.parquet")
    repository = hub.repositories["dataset", "tester/photos"] = Repository(private=True)
    files = {f"data/{file.name}": file.read_bytes() for file in (tmp_path / "shards").iterdir()}
    repository.commit("main", files, "photographs")
    return repository, tmp_path / "shards"


@pytest.mark.slow
def test_a_stream_of_the_hub_gives_what_the_same_shards_here_give(photos, tiny_recipe, tmp_path):
    recipe, found = tiny_recipe.changed("cam.train.steps=3", "masks.scales=[1.0]"), []
    for source in ("tester/photos", photos[1]):
        data, out = load_stream(source), tmp_path / f"from {len(found)}"
        cam = train_cam(data, recipe, out / "cam")
        masks = make_masks(data, cam, recipe, out / "masks")
        rows = [(row["image_id"], row["pseudo_mask"]["bytes"], row["image"]["bytes"]) for row in masks.data["train"]]
        found.append((load_file(out / "cam" / "model.safetensors"), rows))
    (weights, rows), (wanted, wanted_rows) = found
    assert rows == wanted_rows and len(rows) == 12
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())


def test_a_stream_of_the_hub_is_that_of_one_commit(photos, toy_data, tmp_path):
    repository = photos[0]
    before, data = repository.branches["main"], load_stream("tester/photos")
    assert data.source == {"source": "tester/photos", "streaming": True, "revision": before}
    known = data_fingerprint(data, [])
    toy_data["val"].to_parquet(tmp_path / "other.parquet")
    repository.commit("main", {"data/train.parquet": (tmp_path / "other.parquet").read_bytes()}, "others")
    others = load_stream("tester/photos")
    assert [row["image_id"] for row in others["train"]] == toy_data["val"]["image_id"][:]
    assert data_fingerprint(others, []) != known
    for again in (load_stream("tester/photos", revision=before), load_stream(f"tester/photos@{before}")):
        assert [row["image_id"] for row in again["train"]] == toy_data["train"]["image_id"][:]
        assert data_fingerprint(again, []) == known
