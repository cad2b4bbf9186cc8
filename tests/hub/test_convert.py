import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor

from wsss_hf import CamClassifier, MapRefiner, WsssImageProcessor
from wsss_hf.cli.main import main
from wsss_hf.data.voc import VOC_CLASSES
from wsss_hf.hub.convert import ConvertError, convert_checkpoint
from wsss_hf.hub.mxnet_params import read_params
from wsss_hf.inference.load import load_labeler
from wsss_hf.models.backbone import Backbone
from wsss_hf.models.pretrained import backbone_normalization, pretrained_body

NAMES = ["cat", "cow", "dog"]
LAYERS = {"1": (0, 2), "2": (5, 7), "3": (10, 12, 14), "4": (17, 19, 21), "5": (24, 26, 28)}


# what others published, narrow and random


def tensor(*shape):
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(shape) * (2 / fan_in) ** 0.5


def convolution(name, width, channels, kernel=3, bias=True):
    weights = {f"{name}.weight": tensor(width, channels, kernel, kernel)}
    return weights | ({f"{name}.bias": torch.randn(width) / 4} if bias else {})


def vgg_weights():
    weights, channels = {}, 3
    for width, layers in zip((4, 5, 6, 7, 8), LAYERS.values(), strict=True):
        for layer in layers:
            weights |= convolution(f"features.{layer}", width, channels)
            channels = width
    return weights


def drs_weights(controllers=True, classes=3, bias=True):
    weights = vgg_weights()
    for block, layers in LAYERS.items():
        for place, layer in enumerate(layers, start=1):
            for kind in ("weight", "bias"):
                weights[f"layer{block}_conv{place}.{kind}"] = weights[f"features.{layer}.{kind}"]
            if controllers:
                width = len(weights[f"features.{layer}.bias"])
                weights[f"layer{block}_relu{place}.fc.0.weight"] = torch.randn(width, width)
    for k, (channels, width) in enumerate([(8, 9), (9, 10), (10, 11)], start=1):
        weights |= convolution(f"extra_conv{k}", width, channels)
        if controllers:
            weights[f"extra_relu{k}.fc.0.weight"] = torch.randn(width, width)
    return weights | convolution("extra_conv4", classes, 11, kernel=1, bias=bias)


def norm(name, width):
    return {
        f"{name}.weight": torch.rand(width) + 0.5,
        f"{name}.bias": torch.randn(width) / 2,
        f"{name}.running_mean": torch.randn(width) / 2,
        f"{name}.running_var": torch.rand(width) + 0.5,
    }


def wide_resnet_weights(counted=False):
    stem, w2, w3, w4, w5, w6, w7 = 4, 5, 6, 7, 8, 12, 16
    weights = convolution("conv1a", stem, 3, bias=False)
    basic = [("b2", 3, stem, w2, w2), ("b3", 3, w2, w3, w3), ("b4", 6, w3, w4, w4), ("b5", 3, w4, w5 // 2, w5)]
    for group, depth, channels, inner, width in basic:
        for index in range(depth):
            name = f"{group}_{index}" if index else group
            weights |= norm(f"{name}.bn_branch2a", channels) | norm(f"{name}.bn_branch2b1", inner)
            weights |= convolution(f"{name}.conv_branch2a", inner, channels, bias=False)
            weights |= convolution(f"{name}.conv_branch2b1", width, inner, bias=False)
            if index == 0:
                weights |= convolution(f"{name}.conv_branch1", width, channels, kernel=1, bias=False)
            channels = width
    for name, channels, width in (("b6", w5, w6), ("b7", w6, w7)):
        weights |= norm(f"{name}.bn_branch2a", channels)
        weights |= norm(f"{name}.bn_branch2b1", width // 4) | norm(f"{name}.bn_branch2b2", width // 2)
        weights |= convolution(f"{name}.conv_branch2a", width // 4, channels, kernel=1, bias=False)
        weights |= convolution(f"{name}.conv_branch2b1", width // 2, width // 4, bias=False)
        weights |= convolution(f"{name}.conv_branch2b2", width, width // 2, kernel=1, bias=False)
        weights |= convolution(f"{name}.conv_branch1", width, channels, kernel=1, bias=False)
    weights |= norm("bn7", w7)
    if counted:
        means = [name for name in weights if name.endswith("running_mean")]
        weights |= {name.replace("running_mean", "num_batches_tracked"): torch.tensor(7) for name in means}
    return weights


def seam_weights(rows=4, **kwargs):
    weights = wide_resnet_weights(**kwargs)
    for name, width, channels in (("fc8", rows, 16), ("f8_3", 5, 7), ("f8_4", 6, 8), ("f9", 9, 3 + 5 + 6)):
        weights |= convolution(name, width, channels, kernel=1, bias=False)
    return weights


def plda_weights(pamr=True, **kwargs):
    weights = seam_weights(**kwargs)
    if pamr:  # what the released program saves of its refinement: which neighbours are compared
        shapes = {"aff_x": (8, 1, 3, 3), "aff_m": (8, 1, 3, 3), "aff_std": (9, 1, 3, 3)}
        weights |= {f"PAMR.{name}.kernel": torch.zeros(shape) for name, shape in shapes.items()}
    weights |= convolution("discriminator.d_conv1", 10, 16, kernel=1)
    weights |= convolution("discriminator.d_conv2", 6, 10, kernel=1)
    for c in range(3):
        weights |= convolution(f"head_list.{c}", 2, 6, kernel=1)
    return weights


# what their networks compute


def vgg_forward(weights, hidden, suppress=lambda name, hidden: hidden, pooling=(2, 2, 0)):
    maps = []
    for block, layers in LAYERS.items():
        dilation = 2 if block == "5" else 1
        for place, layer in enumerate(layers, start=1):
            kernel, bias = weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"]
            hidden = F.relu(F.conv2d(hidden, kernel, bias, padding=dilation, dilation=dilation))
            hidden = suppress(f"layer{block}_relu{place}", hidden)
        maps.append(hidden)
        if block in "123":
            hidden = F.max_pool2d(hidden, *pooling)
        elif block == "4":
            hidden = F.max_pool2d(hidden, 3, 1, 1)
    return maps


def drs_forward(weights, pixels, delta=None):
    def suppress(name, hidden):
        highest = hidden.flatten(2).max(dim=2).values[:, :, None, None]
        if delta is not None:
            return torch.min(hidden, highest * delta)
        if f"{name}.fc.0.weight" not in weights:
            return hidden
        control = torch.sigmoid(F.linear(hidden.mean(dim=(2, 3)), weights[f"{name}.fc.0.weight"]))
        return torch.min(hidden, highest * control[:, :, None, None])

    hidden = vgg_forward(weights, pixels, suppress)[-1]
    for k in (1, 2, 3):
        hidden = F.conv2d(hidden, weights[f"extra_conv{k}.weight"], weights[f"extra_conv{k}.bias"], padding=1)
        hidden = suppress(f"extra_relu{k}", F.relu(hidden))
    return F.conv2d(hidden, weights["extra_conv4.weight"], weights.get("extra_conv4.bias"))


def wide_resnet_forward(weights, hidden):
    def activated(name, hidden):
        mean, var, scale, shift = (weights[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(hidden, mean, var, scale, shift))

    def convolved(name, hidden, stride=1, dilation=1):
        kernel = weights[f"{name}.weight"]
        return F.conv2d(hidden, kernel, None, stride, padding=dilation * (kernel.shape[-1] // 2), dilation=dilation)

    def block(name, hidden, stride=1, first=1, dilation=1):
        before = activated(f"{name}.bn_branch2a", hidden)
        bottleneck = f"{name}.conv_branch2b2.weight" in weights
        projected = f"{name}.conv_branch1.weight" in weights
        shortcut = convolved(f"{name}.conv_branch1", before, stride) if projected else hidden
        branch = convolved(f"{name}.conv_branch2a", before, stride, 1 if bottleneck else first)
        branch = convolved(f"{name}.conv_branch2b1", activated(f"{name}.bn_branch2b1", branch), 1, dilation)
        if bottleneck:
            branch = convolved(f"{name}.conv_branch2b2", activated(f"{name}.bn_branch2b2", branch))
        return shortcut + branch, before

    hidden = convolved("conv1a", hidden)
    inputs = {}
    for group, depth in (("b2", 3), ("b3", 3), ("b4", 6)):
        for index in range(depth):
            name = f"{group}_{index}" if index else group
            hidden, inputs[name] = block(name, hidden, stride=1 if index else 2)
    hidden, inputs["b5"] = block("b5", hidden, first=1, dilation=2)
    for name in ("b5_1", "b5_2"):
        hidden, _ = block(name, hidden, first=2, dilation=2)
    for name in ("b6", "b7"):
        hidden, inputs[name] = block(name, hidden, dilation=4)
    return [inputs["b3"], inputs["b4"], inputs["b5"], inputs["b6"], activated("bn7", hidden)]


def seam_forward(weights, pixels):
    """CAMs with background, and what the pixel correlation module makes of them."""
    *_, conv4, conv5, conv6 = wide_resnet_forward(weights, pixels)
    cams = F.conv2d(conv6, weights["fc8.weight"])
    scores = F.relu(cams)
    scores = F.relu(scores - 1e-5) / (scores.amax(dim=(2, 3), keepdim=True) + 1e-5)
    scores[:, 0] = 1 - scores[:, 1:].amax(dim=1)
    strongest = scores[:, 1:].amax(dim=1, keepdim=True)
    scores[:, 1:][scores[:, 1:] < strongest] = 0

    small = F.interpolate(pixels, cams.shape[-2:], mode="bilinear", align_corners=True)
    parts = [small, F.relu(F.conv2d(conv4, weights["f8_3.weight"])), F.relu(F.conv2d(conv5, weights["f8_4.weight"]))]
    embedding = F.conv2d(torch.cat(parts, dim=1), weights["f9.weight"]).flatten(2)
    embedding = embedding / (embedding.norm(dim=1, keepdim=True) + 1e-5)
    affinity = F.relu(embedding.transpose(1, 2) @ embedding)
    affinity = affinity / (affinity.sum(dim=1, keepdim=True) + 1e-5)
    return cams, (scores.flatten(2) @ affinity).reshape(scores.shape)


# helpers


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 48, 64)


@pytest.fixture
def convert(tmp_path):
    def convert(weights, suffix=".pth", **options):
        file = tmp_path / f"published{suffix}"
        if suffix == ".safetensors":
            save_file({name: value.clone() for name, value in weights.items()}, file)
        else:
            torch.save(weights, file)
        return convert_checkpoint(file, tmp_path / "ours", **options)

    return convert


def outputs(folder, pixels):
    with torch.no_grad():
        return CamClassifier.from_pretrained(folder).eval()(pixels)


def near(actual, expected):
    assert expected.std() > 1e-3  # otherwise anything is near
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# ImageNet


@pytest.mark.parametrize(
    ("suffix", "head"),
    [(".pth", "classifier.0"), (".pt", "classifier.6"), (".bin", "pre_logits.fc1"), (".safetensors", "head.fc")],
)
def test_an_imagenet_vgg_16_becomes_a_backbone(convert, pixels, suffix, head):
    weights = vgg_weights()
    folder = convert(weights | {f"{head}.weight": tensor(4, 8), f"{head}.bias": torch.zeros(4)}, suffix)
    config = AutoConfig.from_pretrained(folder)
    assert config.converted_from == "an ImageNet VGG-16"
    with torch.no_grad():
        maps = pretrained_body(str(folder), config).eval()(pixels).feature_maps
    for actual, expected in zip(maps, vgg_forward(weights, pixels), strict=True):
        near(actual, expected)


def test_an_imagenet_wide_resnet_38_becomes_a_backbone(convert, pixels):
    weights = wide_resnet_weights()
    folder = convert(weights | {"linear1000.weight": tensor(4, 16)})
    config = AutoConfig.from_pretrained(folder)
    with torch.no_grad():
        maps = pretrained_body(str(folder), config).eval()(pixels).feature_maps
    for actual, expected in zip(maps, wide_resnet_forward(weights, pixels), strict=True):
        near(actual, expected)


def test_a_converted_backbone_starts_a_classifier(convert, pixels, monkeypatch):
    weights = wide_resnet_weights()
    folder = str(convert(weights))
    questions = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "n")
    model = CamClassifier.from_backbone(folder, id2label=dict(enumerate(NAMES)), output_stride=16).eval()
    near(model.backbone(pixels)[-1].detach(), wide_resnet_forward(weights, pixels)[-1])
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is WsssImageProcessor
    mean, std = backbone_normalization(folder, model.config.backbone_config)
    assert (mean, std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert questions == []


def test_convolutions_on_top_are_new_at_every_start(convert):
    folder = convert(vgg_weights(), extra_channels=[9, 9])
    assert not [name for name in load_file(folder / "model.safetensors") if name.startswith("extra")]
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = CamClassifier.from_backbone(str(folder), id2label={0: "cat"})
        assert model.backbone.channels[-1] == 9
        starts.append(model.backbone.body.extra[2].weight)
        assert starts[-1].std().item() == pytest.approx((2 / 81) ** 0.5, rel=0.15)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


# MXNet's files


def params_array(values, version=2):
    """One array as MXNet writes it: version 2, version 1, or (0) as before there were versions."""
    values = np.asarray(values)
    kind = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}[values.dtype.name]
    if version:
        beginning = struct.pack("<I", 0xF993FAC7 + version) + (struct.pack("<i", 0) if version == 2 else b"")
        beginning += struct.pack(f"<I{values.ndim}q", values.ndim, *values.shape)
    else:
        beginning = struct.pack(f"<I{values.ndim}I", values.ndim, *values.shape)
    return beginning + struct.pack("<iii", 1, 0, kind) + values.tobytes()


def params_file(arrays, version=2):
    content = struct.pack("<QQQ", 0x112, 0, len(arrays))
    content += b"".join(params_array(values, version) for values in arrays.values())
    content += struct.pack("<Q", len(arrays))
    return content + b"".join(struct.pack("<Q", len(name)) + name.encode() for name in arrays)


def as_mxnet(weights):
    """Weights of Wide ResNet-38 or VGG-16 under MXNet's names, `aux:` for what is not trained."""
    kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    vgg = {layer: (block, k) for block, layers in LAYERS.items() for k, layer in enumerate(layers, start=1)}
    named = {}
    for name, value in weights.items():
        layer, kind = name.rsplit(".", 1)
        if match := re.fullmatch(r"b(\d)(?:_(\d))?\.(bn|conv)_(branch\w+)", layer):
            group, index, unit, branch = match.groups()
            place = f"{group}b{index}" if index else f"{group}a"
            layer = f"{'res' if unit == 'conv' else 'bn'}{place}_{branch}"
        elif match := re.fullmatch(r"features\.(\d+)", layer):
            layer = "conv{}_{}".format(*vgg[int(match[1])])
        kind = kinds[kind] if layer.startswith("bn") else kind
        named[f"{'aux' if kind.startswith('moving') else 'arg'}:{layer}_{kind}"] = value.numpy()
    return named


@pytest.mark.parametrize("version", [0, 1, 2])
def test_the_wide_resnet_38_that_seam_and_plda_start_from(tmp_path, pixels, version):
    weights = wide_resnet_weights()
    named = as_mxnet(weights | convolution("linear1000", 4, 16, kernel=1))
    assert {"arg:res4b5_branch2b1_weight", "aux:bn6a_branch2b2_moving_var", "arg:bn7_gamma"} < set(named)
    (tmp_path / "ilsvrc.params").write_bytes(params_file(named, version))
    folder = convert_checkpoint(tmp_path / "ilsvrc.params", tmp_path / "ours")
    config = AutoConfig.from_pretrained(folder)
    assert config.converted_from == "an ImageNet Wide ResNet-38"
    with torch.no_grad():
        maps = pretrained_body(str(folder), config).eval()(pixels).feature_maps
    for actual, expected in zip(maps, wide_resnet_forward(weights, pixels), strict=True):
        near(actual, expected)


def icd_weights():
    return vgg_weights() | convolution("fc6", 11, 8) | convolution("fc7", 12, 11, kernel=1)


def test_the_vgg_16_that_icd_starts_from_sees_levels_minus_127(tmp_path, pixels):
    weights = icd_weights()
    (tmp_path / "vgg16_20M.params").write_bytes(params_file(as_mxnet(weights)))
    folder = convert_checkpoint(tmp_path / "vgg16_20M.params", tmp_path / "ours")
    config = AutoConfig.from_pretrained(folder)
    assert config.converted_from == "an ImageNet VGG-16 of ICD"
    with torch.no_grad():
        maps = pretrained_body(str(folder), config).eval()(pixels).feature_maps
    expected = vgg_forward(weights, pixels, pooling=(3, 2, 1))
    hidden = F.avg_pool2d(F.max_pool2d(expected[-1], 3, 1, 1), 3, 1, 1)
    for layer, padding in (("fc6", 1), ("fc7", 0)):
        hidden = F.relu(F.conv2d(hidden, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=padding))
    for actual, known in zip(maps, [*expected, hidden], strict=True):
        near(actual, known)
    assert config.stage_names[-1] == "hidden" and maps[-1].shape[1] == 12
    processor = AutoImageProcessor.from_pretrained(folder)
    levels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    shown = processor(images=levels, do_resize=False, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(shown, torch.from_numpy(levels).permute(2, 0, 1) - 127.0, atol=1e-3, rtol=0)


def test_what_icds_program_writes_gives_its_scores(tmp_path, pixels):
    weights = vgg_weights() | convolution("fc6", 11, 8) | convolution("fc7", 11, 11, kernel=1)
    weights |= convolution("fc6_ft", 11, 8) | convolution("fc7_ft", 11, 11, kernel=1)
    weights |= convolution("fc8", 3, 11, kernel=1) | convolution("conv_ft", 3, 8 + 11 + 11, kernel=1, bias=False)
    weights |= {"icd_bu.weight": tensor(3, 8)}
    norm = {"gamma": torch.ones(8), "beta": torch.randn(8), "moving_mean": torch.randn(8), "moving_var": torch.rand(8)}
    means = torch.rand(3, 2)
    named = as_mxnet(weights) | {"aux:icd_accum_resign_moving_mean": means.numpy()}
    named |= {f"{'aux' if 'moving' in kind else 'arg'}:feat_bn_{kind}": value.numpy() for kind, value in norm.items()}
    (tmp_path / "vgg16_icd-0019.params").write_bytes(params_file(named))
    names = ["cat", "cow", "dog"]
    folder = convert_checkpoint(tmp_path / "vgg16_icd-0019.params", tmp_path / "ours", class_names=names)
    model = CamClassifier.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(pixels)

    conv5 = vgg_forward(weights, pixels, pooling=(3, 2, 1))[-1]
    hidden = F.avg_pool2d(F.max_pool2d(conv5, 3, 1, 1), 3, 1, 1)
    for layer, padding in (("fc6", 1), ("fc7", 0)):
        hidden = F.relu(F.conv2d(hidden, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=padding))
    near(output.cams, F.conv2d(hidden, weights["fc8.weight"], weights["fc8.bias"]))
    features = F.batch_norm(conv5, norm["moving_mean"], norm["moving_var"], norm["gamma"], norm["beta"], eps=1e-5)
    context = F.relu(F.conv2d(features, weights["fc6_ft.weight"], weights["fc6_ft.bias"], padding=1))
    mix = F.relu(F.conv2d(context, weights["fc7_ft.weight"], weights["fc7_ft.bias"]))
    scores = F.conv2d(torch.cat([features, context, mix], dim=1), weights["conv_ft.weight"])
    near(output.maps, scores.sigmoid())
    assert torch.equal(model.methods["icd"].running_means, means)
    assert torch.equal(model.methods["icd"].directions, weights["icd_bu.weight"])
    assert model.config.image_mean == [127 / 255] * 3 and model.config.converted_from == "ICD"


def test_arrays_of_every_type_and_none_are_read(tmp_path):
    arrays = {f"a_{t}": np.arange(6).reshape(2, 3).astype(t) for t in ("f4", "f8", "f2", "u1", "i4", "i1", "i8")}
    content = params_file(arrays)
    empty = struct.pack("<IiI", 0xF993FAC9, 0, 0)  # an array without dimensions ends after their number
    content = content[:16] + struct.pack("<Q", 8) + empty + content[24:]
    place = content.index(struct.pack("<Q", 7))
    content = content[:place] + struct.pack("<QQ", 8, 6) + b"nought" + content[place + 8 :]
    (tmp_path / "a.params").write_bytes(content)
    found = read_params(tmp_path / "a.params")
    assert found["nought"].shape == (0,)
    for name, values in arrays.items():
        assert found[name].numpy().dtype == values.dtype and np.array_equal(found[name], values)


def test_a_params_file_that_ends_anywhere_is_refused(tmp_path):
    file = tmp_path / "cut.params"
    whole = params_file({"arg:conv1_1_weight": np.zeros((2, 3), dtype=np.float32), "aux:b": np.zeros(1, dtype="f4")})
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ConvertError, match=r"cut.params: expected (a whole MXNet file|an MXNet file)") as caught:
            convert_checkpoint(file, tmp_path / "ours")
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.params"]


def large_fc6():
    return icd_weights() | {"fc6.weight": torch.zeros(16, 72)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"PK\x03\x04 a pickle, never opened", "expected an MXNet file of named arrays, got something else"),
        (
            lambda: params_file({"arg:stage1_unit1_conv1_weight": np.zeros((2, 3), dtype=np.float32)}),
            r"expected a known layout, got one nearest to .* 1 key \(stage1_unit1_conv1.weight\) unexpected",
        ),
        (
            lambda: params_file(
                as_mxnet({n: v for n, v in wide_resnet_weights().items() if not n.startswith("b4_5")})
            ),
            r"an ImageNet Wide ResNet-38, with 10 keys \(b4_5.* missing and no keys unexpected",
        ),
        (lambda: params_file(as_mxnet(large_fc6())), r"fc6.weight: expected the 3×3 convolution .* \(16, 72\)"),
        (
            lambda: struct.pack("<QQQIi", 0x112, 0, 1, 0xF993FAC9, 1),
            "expected dense arrays, got one of storage type 1",
        ),
        (lambda: struct.pack("<QQQI", 0x112, 0, 1, 0xF993FACA), "expected an array of at most 32 dimensions"),
        (
            lambda: struct.pack("<QQQIiIqiii", 0x112, 0, 1, 0xF993FAC9, 0, 1, 2**60, 1, 0, 0),
            "expected a whole MXNet file",
        ),
        (
            lambda: struct.pack("<QQQIiIqiii", 0x112, 0, 1, 0xF993FAC9, 0, 1, 1, 1, 0, 99),
            r"expected arrays of numbers, got one of type 99 and shape \(1,\)",
        ),
        (lambda: struct.pack("<QQQQ", 0x112, 0, 0, 1) + struct.pack("<Q", 0), "a name for each of 0 arrays, got 1"),
    ],
)
def test_another_params_file_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "published.params").write_bytes(content())
    refused(tmp_path, message)


# DRS


@pytest.mark.parametrize(("names", "prefix"), [("both", "module."), ("features", ""), ("layers", "")])
def test_a_released_drs_classifier_gives_its_maps(convert, pixels, names, prefix):
    weights = drs_weights()
    other = {"both": "nothing", "features": "layer", "layers": "features"}[names]
    kept = {n: v for n, v in weights.items() if not n.startswith(other) or "_relu" in n}
    state = {f"{prefix}{name}": value for name, value in kept.items()}
    folder = convert({"model": state, "epoch": 3, "miou": np.float64(0.5)}, class_names=NAMES)
    output = outputs(folder, pixels)
    near(output.cams, drs_forward(weights, pixels))
    config = CamClassifier.config_class.from_pretrained(folder)
    assert list(config.id2label.values()) == NAMES
    assert config.methods["drs"].mode == "learnable"
    assert AutoImageProcessor.from_pretrained(folder).size["shortest_edge"] == 320


def test_every_suppression_matters_in_that_comparison(pixels):
    weights = drs_weights()
    expected = drs_forward(weights, pixels)
    for name in [name for name in weights if "_relu" in name]:
        without = {n: value for n, value in weights.items() if n != name}
        assert not torch.allclose(drs_forward(without, pixels), expected, rtol=1e-3), name


@pytest.mark.parametrize("kind", [None, "classifier"])
@pytest.mark.parametrize("delta", [None, 0.4])
def test_a_network_without_controllers_is_a_classifier_unless_more_is_said(convert, pixels, delta, kind):
    weights = drs_weights(controllers=False)
    folder = convert({"model": weights}, class_names=NAMES, drs_delta=delta, kind=kind)
    near(outputs(folder, pixels).cams, drs_forward(weights, pixels, delta))
    assert "without controllers" in AutoConfig.from_pretrained(folder).converted_from


def test_a_released_refiner_takes_the_classifiers_place_in_making_masks(convert, pixels):
    weights = drs_weights(controllers=False)
    folder = convert({"model": weights}, class_names=NAMES, kind="refiner")
    model, processor = load_labeler(str(folder), "cpu")
    assert isinstance(model, MapRefiner) and processor.size["shortest_edge"] == 320
    with torch.no_grad():
        output = model(pixels)
    wanted = drs_forward(weights, pixels)
    near(output.maps, wanted)
    near(output.logits.sigmoid(), wanted.amax(dim=(2, 3)).clamp(0, 1))  # of maps that lie in [0, 1]
    assert list(model.config.id2label.values()) == NAMES


def test_a_head_without_bias_stays_without(convert, pixels):
    weights = drs_weights(bias=False)
    folder = convert({"model": weights}, class_names=NAMES)
    near(outputs(folder, pixels).cams, drs_forward(weights, pixels))
    assert "classifier.bias" not in load_file(folder / "model.safetensors")


def test_twenty_classes_are_those_of_voc(convert):
    folder = convert(drs_weights(classes=20))
    assert tuple(AutoConfig.from_pretrained(folder).id2label.values()) == VOC_CLASSES


# SEAM and PLDA


@pytest.mark.parametrize("counted", [False, True])
def test_a_released_seam_network_gives_its_refined_maps(convert, pixels, counted):
    weights = seam_weights(counted=counted)
    output = outputs(convert(weights, class_names=NAMES), pixels)
    cams, refined = seam_forward(weights, pixels)
    near(output.cams, cams[:, 1:])
    near(output.maps, refined[:, 1:])


def test_a_head_without_background_keeps_all_rows(convert, pixels):
    weights = seam_weights(rows=3)
    near(outputs(convert(weights, class_names=NAMES), pixels).cams, F.conv2d(
        wide_resnet_forward(weights, pixels)[-1], weights["fc8.weight"]
    ))  # fmt: skip


@pytest.mark.parametrize("pamr", [True, False])
def test_a_released_plda_network_brings_its_domain_classifier(convert, pixels, pamr):
    weights = plda_weights(pamr)
    folder = convert(weights, class_names=NAMES)
    near(outputs(folder, pixels).maps, seam_forward(weights, pixels)[1][:, 1:])
    assert AutoConfig.from_pretrained(folder).plda.maps == "seam"  # what tells source from target there
    features = wide_resnet_forward(weights, pixels)[-1]
    hidden = features
    for k in (1, 2):
        name = f"discriminator.d_conv{k}"
        hidden = F.relu(F.conv2d(hidden, weights[f"{name}.weight"], weights[f"{name}.bias"]))
    with torch.no_grad():
        logits = CamClassifier.from_pretrained(folder).eval().methods["plda"].domain_classifier(features)
    for c in range(3):
        near(logits[:, c], F.conv2d(hidden, weights[f"head_list.{c}.weight"], weights[f"head_list.{c}.bias"]))


def test_twenty_one_rows_are_background_and_voc(convert):
    config = AutoConfig.from_pretrained(convert(seam_weights(rows=21)))
    assert tuple(config.id2label.values()) == VOC_CLASSES


def test_a_converted_network_goes_on_training(convert, pixels):
    model = CamClassifier.from_pretrained(convert(plda_weights(), class_names=NAMES)).train()
    model.progress = 0.5
    assert model.config.dropout == 0.5  # as the programs train
    output = model(pixels, tags=torch.tensor([[1.0, 0, 1], [0, 1, 0]]))
    output.loss.backward()
    assert output.loss.isfinite() and {"seam_cross", "plda_adversarial"} <= set(output.losses)
    assert model.backbone.body.conv1a.weight.grad is None
    assert model.backbone.body.b7.conv_branch1.weight.grad.abs().sum() > 0


# what can't be converted


def refused(tmp_path, message, **options):
    (file,) = tmp_path.glob("published*")
    with pytest.raises(ConvertError, match=message) as caught:
        convert_checkpoint(file, tmp_path / "ours", **options)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def without(weights, beginning):
    return {name: value for name, value in weights.items() if not name.startswith(beginning)}


def missing_some():
    weights = drs_weights()
    for block in "345":
        weights = without(weights, f"layer{block}_relu")
    return weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (missing_some, r"nearest to a DRS network without .*no keys missing and 7 keys \(layer1_relu1"),
        (lambda: vgg_weights() | {"features.1.weight": torch.zeros(4)}, r"VGG-16, .* 1 key \(features.1.weight"),
        (lambda: {"fc.weight": torch.zeros(2)}, r"26 keys \(features\.0\.bias, (features[^,]*, ){4}…\) missing"),
        (lambda: without(seam_weights(), "f9"), r"SEAM, with 1 key \(f9.weight\) missing and no"),
        (lambda: without(plda_weights(), "head_list.1"), r"PLDA, with 2 keys .* missing and 2 keys \(head_list.2"),
        (lambda: drs_weights() | {"layer2_conv1.weight": torch.zeros(5, 4, 3, 3)}, "values of features.5.weight"),
        (lambda: vgg_weights() | {"features.5.weight": torch.zeros(5, 9, 3, 3)}, r"5.weight: expected the shape"),
        (lambda: {"model": [1, 2]}, "expected a dictionary of tensors .*, got list under 'model'"),
        (lambda: {"weights": 3}, "expected a dictionary of tensors .*, got int under 'weights'"),
        (dict, "expected a dictionary of tensors .*, got an empty one"),
    ],
)  # fmt: skip
def test_another_layout_is_refused_with_what_differs(tmp_path, weights, message):
    torch.save(weights(), tmp_path / "published.pth")
    refused(tmp_path, message)


def uncontrolled():
    return drs_weights(controllers=False)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (drs_weights, {}, "class_names: expected 3, the classes of the file, got none .VOC has 20"),
        (drs_weights, {"class_names": ["cat"]}, "class_names: expected 3, .*, got 1"),
        (seam_weights, {}, "class_names: expected 3 .fc8 has 4 rows, one of background., got none"),
        (plda_weights, {"class_names": ["cat", "cow"]}, "class_names: expected 3, .*, got 2"),
        (vgg_weights, {"class_names": NAMES}, "expected extra_channels for an ImageNet VGG-16, got class_names"),
        (drs_weights, {"drs_delta": 0.5}, "expected class_names for a DRS classifier, got drs_delta"),
        (seam_weights, {"extra_channels": [8]}, "expected class_names for SEAM, got extra_channels"),
        (drs_weights, {"kind": "refiner"}, "expected class_names for a DRS classifier, got kind"),
        (uncontrolled, {"kind": "refiner", "drs_delta": 0.5}, "drs_delta: expected none for a refiner, got 0.5"),
        (uncontrolled, {"kind": "segmenter"}, "kind: expected classifier or refiner, got 'segmenter'"),
    ],
)
def test_options_that_do_not_fit_the_file_are_refused(tmp_path, weights, options, message):
    torch.save(weights(), tmp_path / "published.pth")
    refused(tmp_path, message, **options)


class Surprise:
    def __reduce__(self):
        return os.mkdir, ("surprise",)


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(vgg_weights() | {"args": Surprise()}, tmp_path / "published.pth")
    refused(tmp_path, "expected a pickle of tensors.* got one with other objects, which could run any code")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("published.pth", b"", "expected a PyTorch file"),
        ("published.pth", b"PK\x03\x04 broken", "expected a PyTorch file"),
        ("published.safetensors", b"nonsense", "expected a safetensors file"),
        ("published.ckpt", b"", "expected a file .safetensors, .pth, .pt, .bin or .params"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, message)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConvertError, match=r"nowhere.pth: no such file"):
        convert_checkpoint(tmp_path / "nowhere.pth", tmp_path / "ours")


def test_nothing_is_overwritten_and_an_empty_folder_is_used(tmp_path, convert):
    (tmp_path / "ours").mkdir()
    folder = convert(vgg_weights())
    assert (folder / "config.json").is_file()
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ConvertError, match=r"ours: expected a folder that does not exist yet"):
        convert(vgg_weights())
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_interrupted_conversion_leaves_nothing(tmp_path, convert, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(WsssImageProcessor, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(vgg_weights())
    assert [path.name for path in tmp_path.iterdir()] == ["published.pth"]


# the command


def test_the_command_converts_and_says_what_it_found(tmp_path, capsys, pixels):
    weights = drs_weights(controllers=False)
    torch.save({"model": weights}, tmp_path / "refiner.pth")
    arguments = ["convert", str(tmp_path / "refiner.pth"), "--to", str(tmp_path / "ours"), "--classes", "cat, cow,dog"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--drs-delta", "0.4"])
    assert done.value.code == 0
    assert "a DRS network without controllers, a refiner or a classifier with fixed DRS" in capsys.readouterr().out
    output = outputs(tmp_path / "ours", pixels)
    near(output.cams, drs_forward(weights, pixels, delta=0.4))


def test_the_command_makes_a_refiner_on_request(tmp_path):
    torch.save(uncontrolled(), tmp_path / "refiner.pth")
    arguments = ["convert", str(tmp_path / "refiner.pth"), "--to", str(tmp_path / "ours"), "--classes", "cat,cow,dog"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--as", "refiner"])
    assert done.value.code == 0
    assert AutoConfig.from_pretrained(tmp_path / "ours").model_type == "wsss_map_refiner"


def test_the_command_reads_numbers_of_channels(tmp_path, capsys):
    torch.save(vgg_weights(), tmp_path / "vgg16.pth")
    arguments = ["convert", str(tmp_path / "vgg16.pth"), "--to", str(tmp_path / "ours"), "--extra-channels"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "9,x"])
    assert done.value.code == 1
    assert capsys.readouterr().err == "error: --extra-channels: expected whole numbers a,b,c, got 9,x\n"
    with pytest.raises(SystemExit):
        main([*arguments, "9,10"])
    assert Backbone(AutoConfig.from_pretrained(tmp_path / "ours")).channels == [4, 5, 6, 7, 10]


# for somebody who has not installed this package

STRANGER = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "wsss_hf":
            raise ImportError("wsss_hf is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModel

pixels = torch.load("pixels.pt")
for name in ("vgg", "wide"):  # each registers both backbones
    model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(pixels).maps, f"{name}.pt")
assert "wsss_hf" not in sys.modules
"""


@pytest.mark.slow
def test_a_stranger_gets_the_same_maps(tmp_path, pixels):
    for name, weights in (("vgg", drs_weights()), ("wide", seam_weights())):
        torch.save(weights, tmp_path / "published.pth")
        convert_checkpoint(tmp_path / "published.pth", tmp_path / name, NAMES)
    torch.save(pixels, tmp_path / "pixels.pt")
    (tmp_path / "script.py").write_text(STRANGER)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("vgg", "wide"):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), outputs(tmp_path / name, pixels).maps)
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["backbone_config"]["model_type"].startswith("wsss_")
