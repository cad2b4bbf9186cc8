"""Trainings on streams: shards that are read while the training runs."""

import itertools

import numpy as np
import pytest
import torch
from datasets import IterableDataset, List, Value, config
from safetensors.torch import load_file

from wsss_hf.cli.main import main
from wsss_hf.data import examples as module
from wsss_hf.data.examples import StreamedExamples
from wsss_hf.data.streams import load_stream
from wsss_hf.data.tagged import DataError, class_names
from wsss_hf.recipes import RecipeError
from wsss_hf.stages.train_cam import train_cam
from wsss_hf.stages.train_segmenter import train_segmenter
from wsss_hf.training.loop import Training


@pytest.fixture
def shards(toy_data, tmp_path, monkeypatch):
    """The 12 training images in four Parquet shards."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s for each iterator that is left
    (tmp_path / "shards").mkdir()
    for index in range(4):
        part = toy_data["train"].shard(4, index, contiguous=True)
        part.to_parquet(tmp_path / "shards" / f"train-{index:05d}-of-00004.parquet")
    return tmp_path / "shards"


def streamed(shards, process=0, processes=1):
    """Items that hold their rows' image ids and random numbers."""
    found = StreamedExamples(load_stream(shards)["train"], lambda *_: None)
    found.process, found.processes = process, processes
    found.example = lambda row, rng: (row["image_id"], rng.random())
    return found


def test_a_stream_has_our_columns_and_no_length(shards, toy_data):
    data = load_stream(shards, columns={"pseudo_mask": "mask"})
    rows = data["train"]
    assert isinstance(rows, IterableDataset) and class_names(rows) == class_names(toy_data)
    assert data.source == {"source": str(shards), "streaming": True, "columns": {"pseudo_mask": "mask"}}
    for ours, theirs in zip(rows, toy_data["train"], strict=True):
        assert ours["image_id"] == theirs["image_id"] and ours["tags"] == theirs["tags"]
        assert ours["image"]["bytes"] and ours["pseudo_mask"]["bytes"]


def test_names_and_multi_hot_tags_take_the_order_of_the_classes(tmp_path, toy_data):
    for name, tags, feature in (
        ("names", [["dog"], [], ["cat", "dog"]], List(Value("string"))),
        ("hot", [[0, 1], [0, 0], [1, 1]], List(Value("int8"))),
    ):
        rows = toy_data["train"].select(range(3)).remove_columns(["tags", "image_id"])
        rows.add_column("tags", tags, feature=feature).to_parquet(tmp_path / f"{name}.parquet")
        found = load_stream(tmp_path / f"{name}.parquet", classes=["cat", "dog"])["train"]
        assert [row["tags"] for row in found] == [[1], [], [0, 1]]
        with pytest.raises(DataError, match="expected --classes for a stream whose tags are List"):
            load_stream(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="row 'train_000000': tags: expected names from cat, got 'dog'"):
        list(load_stream(tmp_path / "names.parquet", classes=["cat"])["train"])


@pytest.mark.parametrize("processes", [1, 2, 3])  # whole shards, and every third row
def test_each_pass_gives_each_row_to_one_process(shards, toy_data, processes):
    ids, orders = toy_data["train"]["image_id"][:], []
    parts = [list(itertools.islice(streamed(shards, p, processes), 24 // processes)) for p in range(processes)]
    for number in range(2):
        half = 12 // processes
        found = [name for part in parts for name, _ in part[number * half : (number + 1) * half]]
        assert sorted(found) == sorted(ids)
        orders.append(found)
    assert orders[0] != orders[1] and orders[0] != ids
    assert len({value for part in parts for _, value in part}) == 24


def test_a_stream_goes_on_where_it_was(shards, monkeypatch):
    monkeypatch.setattr(module, "BUFFER", 4)
    whole = list(itertools.islice(streamed(shards), 30))
    rest = streamed(shards)
    rest.start = 17  # in the middle of the second pass
    assert list(itertools.islice(rest, 13)) == whole[17:]


def test_an_empty_stream_ends_in_a_line(shards, tmp_path, toy_data):
    toy_data["train"].select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="expected rows for each of 1 processes, got none"):
        next(iter(StreamedExamples(load_stream(tmp_path / "empty.parquet")["train"], lambda *_: None)))


def test_a_classifier_learns_from_a_stream_and_goes_on_after_a_kill(shards, tiny_recipe, tmp_path, monkeypatch):
    data = load_stream(shards)
    with pytest.raises(RecipeError, match="train.steps: expected a number of steps for data that are streamed"):
        train_cam(data, tiny_recipe, tmp_path / "without")
    recipe = tiny_recipe.changed("cam.train.steps=5", "cam.train.save_steps=2", "cam.train.accumulate=2")
    whole = train_cam(data, recipe, tmp_path / "whole")
    assert len(whole.log) == 1 and np.isfinite(whole.log[0]["classification"])
    original = Training._update_weights

    def mortal(training):
        original(training)
        if training.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_update_weights", mortal)
    with pytest.raises(KeyboardInterrupt):
        train_cam(data, recipe, tmp_path / "broken")
    monkeypatch.setattr(Training, "_update_weights", original)
    again = train_cam(data, recipe, tmp_path / "broken")
    weights = [load_file(result / "model.safetensors") for result in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # It is known by the files it comes from.
    assert train_cam(load_stream(shards), recipe, tmp_path / "whole").record == whole.record
    with pytest.raises(RecipeError, match="batch_size: expected a multiple of 3 for data that are streamed"):
        train_cam(data, recipe.changed("cam.train.accumulate=3"), tmp_path / "uneven")


def test_a_segmenter_learns_from_a_stream(shards, tiny_recipe, tmp_path):
    recipe = tiny_recipe.changed("segmenter.train.steps=3")
    found = train_segmenter(load_stream(shards, columns={"pseudo_mask": "mask"}), recipe, tmp_path / "segmenter")
    assert found.log[-1]["background_factor"] > 0


def test_other_stages_and_options_refuse_streams_in_one_line(shards, tmp_path, capsys):
    for arguments, message in (
        (["make-masks", "--cam", "cam"], "--streaming: expected train-cam or train-segmenter, got make-masks"),
        (["train-cam", "--limit", "3"], "--streaming: expected no --limit beside it"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--data", str(shards), "--streaming", "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
