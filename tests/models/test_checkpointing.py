"""Gradient checkpointing changes what is kept in memory, and nothing else."""

import copy

import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, Dinov2Config, MobileNetV2Config, ResNetConfig, ViTConfig

from wsss_hf import CamClassifier, CamConfig, Segmenter, SegmenterConfig
from wsss_hf.models.vgg import Vgg16Config
from wsss_hf.models.wide_resnet import WideResNet38Config

ATTENTION = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}
BACKBONES = {
    "vgg": lambda: Vgg16Config(widths=[4, 4, 8, 8, 8], extra_channels=[8]),
    "wide resnet": lambda: WideResNet38Config(widths=[4, 4, 8, 8, 8, 8, 16]),
    "resnet": lambda: ResNetConfig(depths=[2, 1], hidden_sizes=[8, 16], embedding_size=4, layer_type="basic"),
    "mobilenet": lambda: MobileNetV2Config(depth_multiplier=0.1, finegrained_output=False),
    "convnext": lambda: ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[4, 8, 8, 8], drop_path_rate=0.3),
    "vit": lambda: ViTConfig(**ATTENTION, hidden_dropout_prob=0.2),
    "dinov2": lambda: Dinov2Config(**ATTENTION, patch_size=16),
}
METHODS = {
    "drs": {},
    "icd": {"hidden_channels": 8},
    "plda": {"hidden": [8], "pamr_iterations": 1, "pamr_dilations": [1]},
    "d2cam": {"embedding_channels": 8},
    "seam": {"stages": [-1], "projections": [8], "embedding": 8, "scale": 0.5},
}


def step(model, **inputs) -> dict:
    """One step: the loss, gradients and buffers after it, and how many numbers were kept for the backward pass."""
    kept = []
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = model(pixels, **inputs).loss
    numbers = sum(kept)  # not what the backward pass computes anew
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients, "buffers": dict(model.named_buffers()), "numbers": numbers}


def assert_same(found: dict, wanted: dict) -> None:
    torch.testing.assert_close(found["loss"], wanted["loss"])
    for part in ("gradients", "buffers"):
        assert found[part].keys() == wanted[part].keys()
        for name, value in wanted[part].items():
            torch.testing.assert_close(found[part][name], value, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_classifier_with_methods_learns_the_same_from_less_memory(backbone):
    torch.manual_seed(0)
    plain = CamClassifier(CamConfig(backbone_config=BACKBONES[backbone](), **METHODS)).train()
    plain.progress = 0.5
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    assert checkpointed.is_activation_checkpointing and not plain.is_activation_checkpointing
    again = copy.deepcopy(checkpointed)
    off = copy.deepcopy(checkpointed)
    off.activation_checkpointing_disable()

    tags = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    wanted = step(plain, tags=tags)
    for model in (checkpointed, again):
        found = step(model, tags=tags)
        assert_same(found, wanted)
        assert found["numbers"] < 0.8 * wanted["numbers"]
    assert step(off, tags=tags)["numbers"] == wanted["numbers"]


@pytest.mark.parametrize("backbone", ["vgg", "resnet", "vit"])
def test_a_segmenter_learns_the_same(backbone):
    torch.manual_seed(0)
    plain = Segmenter(SegmenterConfig(backbone_config=BACKBONES[backbone](), rates=[1])).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    labels = torch.arange(2 * 64 * 64).view(2, 64, 64) % 2
    wanted, found = step(plain, labels=labels), step(checkpointed, labels=labels)
    assert_same(found, wanted)
    assert found["numbers"] < wanted["numbers"]


def test_frozen_batch_norms_stay_frozen_and_evaluation_is_plain():
    torch.manual_seed(0)
    plain = CamClassifier(CamConfig(backbone_config=BACKBONES["resnet"]())).train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    tags = torch.ones(2, 2)
    assert_same(step(checkpointed, tags=tags), step(plain, tags=tags))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(checkpointed.eval()(pixels).cams, plain.eval()(pixels).cams)
