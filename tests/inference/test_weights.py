import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from wsss_hf.inference.cam_maps import localize
from wsss_hf.inference.load import load_labeler, load_segmenter
from wsss_hf.inference.weights import check_weights, diverged
from wsss_hf.models.modeling_cam import CamClassifier

VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "1e+30": 1e30, "-1e+07": -1e7}


@pytest.mark.parametrize("value", VALUES)
def test_one_bad_weight_is_found_and_named(value):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5))
    assert diverged(model) is None
    model[1].weight.data[3, 2] = VALUES[value]
    assert diverged(model) == f"1.weight holds {value.removeprefix('-')}"
    with pytest.raises(ValueError, match=r"^runs/cam: expected .* but 1.weight holds .*: its training has diverged$"):
        check_weights(model, "runs/cam")


def test_weights_and_statistics_of_sound_models_pass():
    norm = nn.BatchNorm1d(2)
    norm.running_var.fill_(1e20)  # of large activations
    model = nn.Sequential(nn.Linear(2, 2).to(torch.bfloat16), norm)
    model[0].weight.data.fill_(-1e5)
    assert diverged(model) is None
    norm.running_mean[1] = float("nan")
    assert diverged(model) == "1.running_mean holds nan"


@pytest.fixture
def damaged(cam_folder, tmp_path):
    """A function that writes a copy of the classifier whose weights it changes."""

    def damaged(change):
        CamClassifier.from_pretrained(cam_folder).save_pretrained(tmp_path)
        for file in cam_folder.glob("preprocessor_config.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = load_file(tmp_path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return damaged


@pytest.mark.parametrize("value", ["nan", "inf", "1e+30"])
@pytest.mark.parametrize("load", [load_labeler, load_segmenter])
def test_a_diverged_model_from_elsewhere_is_refused(damaged, value, load):
    folder = damaged(lambda weights: weights["classifier.weight"].view(-1)[5:6].fill_(VALUES[value]))
    with pytest.raises(ValueError, match=f"{folder}: expected .* but classifier.weight holds "):
        load(folder, "cpu")


def test_maps_that_overflow_are_refused(damaged, cam_folder):
    def explode(weights):
        for name, value in weights.items():
            if name.endswith("convolution.weight"):
                value *= 5e5 / value.abs().max()
            if name.endswith("running_var"):
                value.fill_(1e-5)

    model, _ = load_labeler(damaged(explode), "cpu", optimize=False)
    with pytest.raises(ValueError, match="maps: expected finite ones, the classifier gives NaN or inf"):
        localize(model, torch.randn(1, 3, 48, 48), torch.ones(1, 8), (48, 48))


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_damaged_weights_are_one_line(damaged, keep):
    folder = damaged(lambda weights: None)
    file = folder / "model.safetensors"
    os.truncate(file, int(keep * file.stat().st_size))
    with pytest.raises(ValueError, match=f"{folder}: expected weights in safetensors, got a damaged file"):
        load_labeler(folder, "cpu")
