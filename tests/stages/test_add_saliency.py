import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk
from transformers import ResNetConfig, ResNetModel

from wsss_hf.data.tagged import DataError, TaggedData, check_dataset
from wsss_hf.saliency import load as load_module
from wsss_hf.saliency.networks import InputFormat, NetworkSettings, NetworkSource
from wsss_hf.saliency.source import SaliencyError
from wsss_hf.stages import add_saliency as module
from wsss_hf.stages.add_saliency import add_saliency

SETTINGS = {"size": 48}


class Brightness(NetworkSource):
    """A network whose map is the first channel; counts the images that it sees, and stops after `stop_after`."""

    name, seen, stop_after, factor = "brightness", 0, None, 1.0

    def __init__(self, *_arguments):
        self.settings = NetworkSettings(batch_size=1)
        self.format = InputFormat((48, 48), [0, 0, 0], [1, 1, 1])
        self.files = [Path(load_module.__file__)]

    def predict(self, inputs):
        if Brightness.stop_after is not None and Brightness.seen >= Brightness.stop_after:
            raise KeyboardInterrupt
        Brightness.seen += len(inputs)
        return inputs[:, 0] * Brightness.factor


@pytest.fixture
def network(monkeypatch):
    """`--model` names [`Brightness`], and a shard has 4 images."""
    for name, value in (("seen", 0), ("stop_after", None), ("factor", 1.0)):
        monkeypatch.setattr(Brightness, name, value)
    monkeypatch.setattr(module, "load_source", lambda *arguments: Brightness())
    monkeypatch.setattr(module, "_SHARD_SIZE", 4)
    return Brightness


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    config = ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic")
    folder = tmp_path_factory.mktemp("models") / "resnet"
    ResNetModel(config).save_pretrained(folder)
    return folder


def maps(folder, split="train"):
    return [np.array(found) for found in load_from_disk(str(folder))[split]["saliency"]]


def test_every_row_of_every_split_gets_a_grey_map_of_its_size(toy_data, backbone, tmp_path):
    out = add_saliency(toy_data, tmp_path / "out", spectral=backbone, settings=SETTINGS)
    data = load_from_disk(str(out))
    check_dataset(data)
    source = load_module.load_source(spectral=backbone, settings=SETTINGS)
    source.prepare(toy_data["train"], torch.device("cpu"))
    for split, rows in toy_data.items():
        assert data[split].column_names == [*rows.column_names, "saliency"]
        wanted = dict(source.maps(rows))
        for index, (row, before) in enumerate(zip(data[split], rows, strict=True)):
            assert row["saliency"].mode == "L" and row["saliency"].size == before["image"].size
            np.testing.assert_allclose(np.asarray(row["saliency"]), 255 * wanted[index], atol=1)
            assert row["image_id"] == before["image_id"] and row["tags"] == before["tags"]
            assert np.array_equal(row["image"], before["image"]) and np.array_equal(row["mask"], before["mask"])


def test_record_summary_and_data_say_what_it_has_learnt_from(toy_data, backbone, network, tmp_path, monkeypatch):
    named = TaggedData(toy_data, {"source": "toy"})
    out = add_saliency(named, tmp_path / "model", model="net.onnx", learnt_from="masks of DUTS")
    told = {"source": "brightness", "learnt_from": "masks of DUTS"}
    assert out.summary["saliency"] == told
    assert out.data.source == {"source": "toy", "saliency": told} == out.record["data"]
    out = add_saliency(toy_data, tmp_path / "untold", model="net.onnx")
    assert out.summary["saliency"]["learnt_from"].startswith("not recorded; such networks are usually trained on")
    monkeypatch.setattr(module, "load_source", load_module.load_source)
    out = add_saliency(toy_data, tmp_path / "spectral", spectral=backbone, settings=SETTINGS)
    assert out.summary["saliency"]["learnt_from"] == f"no masks: normalised cut on the features of {backbone}"


def test_a_killed_run_goes_on_after_its_last_finished_shard(toy_data, network, tmp_path):
    unbroken = add_saliency(toy_data, tmp_path / "unbroken", model="net.onnx")
    looked_at = 8  # before it starts, to see how the values lie
    assert network.seen == looked_at + 16
    network.seen, network.stop_after = 0, looked_at + 6  # in the middle of the second of three shards
    with pytest.raises(KeyboardInterrupt):
        add_saliency(toy_data, tmp_path / "broken", model="net.onnx")
    assert not (tmp_path / "broken").exists()
    network.seen, network.stop_after = 0, None
    out = add_saliency(toy_data, tmp_path / "broken", model="net.onnx")
    assert network.seen == looked_at + 12
    for split in toy_data:
        assert all(np.array_equal(a, b) for a, b in zip(maps(out, split), maps(unbroken, split), strict=True))
    assert not (tmp_path / "broken.partial").exists()


def test_a_finished_result_is_used_again_while_nothing_changes(toy_data, network, tmp_path, monkeypatch):
    out = add_saliency(toy_data, tmp_path / "out", model="net.onnx")
    network.seen = 0
    add_saliency(toy_data, out, model="elsewhere/net.onnx")
    assert network.seen == 0
    add_saliency(toy_data, out, model="net.onnx", force=True)
    assert network.seen == 24
    add_saliency(toy_data, out, model="net.onnx", learnt_from="masks of DUTS")
    assert network.seen == 48
    fewer = DatasetDict({**toy_data, "train": toy_data["train"].select(range(10))})
    add_saliency(fewer, out, model="net.onnx", learnt_from="masks of DUTS")
    assert network.seen == 70 and len(maps(out)) == 10
    (tmp_path / "weights").write_text("other weights")
    monkeypatch.setattr(module, "load_source", lambda *_: changed)
    changed = Brightness()
    changed.files = [tmp_path / "weights"]
    add_saliency(fewer, out, model="net.onnx", learnt_from="masks of DUTS")
    assert network.seen == 92


def test_an_old_column_is_replaced(toy_data, network, tmp_path):
    first = add_saliency(toy_data, tmp_path / "first", model="net.onnx")
    network.factor = 0.5
    second = add_saliency(first.data, tmp_path / "second", model="net.onnx")
    assert second.data["train"].column_names == first.data["train"].column_names
    assert all(a.max() < b.max() for a, b in zip(maps(second), maps(first), strict=True))


@pytest.mark.parametrize("fixture", ["poisoned_data", "unmasked_data"])
def test_true_masks_are_never_looked_at(toy_data, network, tmp_path, request, fixture):
    wanted = add_saliency(toy_data, tmp_path / "wanted", model="net.onnx")
    out = add_saliency(request.getfixturevalue(fixture), tmp_path / "out", model="net.onnx")
    assert all(np.array_equal(a, b) for a, b in zip(maps(out), maps(wanted), strict=True))


def test_maps_that_say_nothing_are_counted(toy_data, network, tmp_path, monkeypatch, capsys):
    kinds = iter([[0.2], [0.9], [0.1, 0.3], [0.6, 0.8], [0.1, 0.8]] * 20)

    def predict(self, inputs):
        pattern = np.resize(np.float32(next(kinds)), 48)
        return np.broadcast_to(pattern[:, None], (1, 48, 48))

    monkeypatch.setattr(Brightness, "predict", predict)
    out = add_saliency(DatasetDict(train=toy_data["train"].select(range(5))), tmp_path / "out", model="net.onnx")
    counts = {kind: out.summary[kind] for kind in ("constant", "empty", "all_salient")}
    assert counts == {"constant": 2, "empty": 1, "all_salient": 1}
    assert "2 constant, 1 empty, 1 all-salient" in (told := capsys.readouterr().err) and "warning" not in told
    network.factor = 0.0
    monkeypatch.setattr(Brightness, "predict", lambda self, inputs: inputs[:, 0] * 0)
    out = add_saliency(toy_data, tmp_path / "flat", model="net.onnx")
    assert out.summary["constant"] == 16 and "warning: all maps are constant" in capsys.readouterr().err


def test_what_can_not_work_is_said_before_anything_is_written(toy_data, tmp_path):
    for options in ({}, {"model": "a.onnx", "spectral": "b"}):
        with pytest.raises(SaliencyError, match="expected --model or --spectral"):
            add_saliency(toy_data, tmp_path / "out", **options)
    with pytest.raises(FileNotFoundError, match="nothing.onnx"):
        add_saliency(toy_data, tmp_path / "out", model=tmp_path / "nothing.onnx")
    assert not list(tmp_path.iterdir())


def test_an_image_that_does_not_decode_names_its_row(toy_data, poisoned_data, network, tmp_path):
    rows = poisoned_data["train"].remove_columns("image").rename_column("mask", "image")
    with pytest.raises(DataError, match=f"row '{rows['image_id'][0]}': expected an image"):
        add_saliency(DatasetDict(train=rows), tmp_path / "out", model="net.onnx")


def test_the_command_passes_its_options_on(monkeypatch, tmp_path, tiny_settings):
    from wsss_hf.cli.main import main

    calls = []
    monkeypatch.setattr(module, "add_saliency", lambda data, out, **options: calls.append((out, options)))
    tiny = [part for setting in tiny_settings for part in ("--set", setting)]
    common = ["add-saliency", "--data", "toy", *tiny, "--out", str(tmp_path / "out"), "--quiet"]
    for arguments in (
        ["--spectral", "net", "--tau", "0.3", "--stage", "1", "--refine", "--no-center"],
        ["--model", "a.onnx", "--letterbox", "--size", "320", "--mean", "0.5,0,0.1", "--learnt-from", "masks"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*common, *arguments])
        assert not stopped.value.code
    (out, spectral), (_, model) = calls
    assert out == tmp_path / "out"
    assert spectral["spectral"] == "net" and spectral["settings"] == {
        "tau": 0.3,
        "stage": 1,
        "center": False,
        "refine": True,
    }
    wanted = {"letterbox": True, "size": 320, "mean": ["0.5", "0", "0.1"]}
    assert json.dumps(model["settings"], sort_keys=True) == json.dumps(wanted, sort_keys=True)
    assert (model["model"], model["learnt_from"], model["trust_remote_code"]) == ("a.onnx", "masks", False)
    assert NetworkSettings(**model["settings"]).mean == [0.5, 0, 0.1]
