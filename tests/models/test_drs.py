import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    MobileNetV2Config,
    RegNetConfig,
    ResNetConfig,
    ViTConfig,
)

from wsss_hf import CamClassifier, CamConfig, DrsConfig
from wsss_hf.models import drs as drs_module
from wsss_hf.models.backbone import Backbone
from wsss_hf.models.drs import Drs, Suppression, activation_outputs, suppress
from wsss_hf.models.maps import normalize_maps
from wsss_hf.models.vgg import Vgg16Config

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official_outputs.safetensors"


@pytest.fixture(scope="module")
def official():
    return {name.removeprefix("drs/"): t for name, t in load_file(FIXTURE).items() if name.startswith("drs/")}


def tiny_resnet():
    return ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=4, layer_type="basic")


def tiny_backbone():
    torch.manual_seed(0)
    return Backbone(tiny_resnet()).eval()


# the equations


@pytest.mark.parametrize("delta", [0.45, 0.55, 0.7])
def test_fixed_suppression_is_the_released_one(official, delta):
    actual = Suppression(16, delta=delta)(official["x"].relu())
    torch.testing.assert_close(actual, official[f"fixed_{delta}"], rtol=0, atol=1e-4)


def test_learnable_suppression_is_the_released_one(official):
    suppression = Suppression(16)
    suppression.fc.weight.data = official["weight"]
    torch.testing.assert_close(suppression(official["x"].relu()), official["learnable"], rtol=0, atol=1e-4)


def test_normalized_cams_are_the_released_ones(official):
    actual = normalize_maps(official["cam"], official["tags"], (21, 18), align_corners=True)
    torch.testing.assert_close(actual, official["cam_normalized"], rtol=0, atol=1e-4)


def test_delta_one_is_the_identity_on_activations():
    features = torch.randn(2, 5, 4, 3).relu()
    assert torch.equal(suppress(features, 1.0), features)


def test_only_what_exceeds_its_share_of_the_maximum_is_cut():
    features = torch.tensor([[[[8.0, 3.0, 5.0, -1.0]], [[1.0, 0.5, 0.25, 0.75]]]])
    expected = torch.tensor([[[[4.0, 3.0, 4.0, -1.0]], [[0.5, 0.5, 0.25, 0.5]]]])
    assert torch.equal(suppress(features, 0.5), expected)


def test_a_channel_that_is_negative_everywhere_stays():
    features = torch.cat([-torch.rand(1, 1, 3, 3) - 0.1, torch.rand(1, 1, 3, 3)], dim=1)
    suppressed = suppress(features, 0.5)
    assert torch.equal(suppressed[:, 0], features[:, 0])
    assert not torch.equal(suppressed[:, 1], features[:, 1])


@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("layout", ["channels first", "channels last in memory", "channels last", "tokens"])
def test_the_gradient_is_that_of_the_equation(layout, learnable):
    torch.manual_seed(0)
    features = torch.randn(2, 5, 4, 3) + torch.tensor([0.0, 1, 2, 0, -9]).view(5, 1, 1)
    axis = 1
    if layout == "channels last in memory":
        features = features.contiguous(memory_format=torch.channels_last)
    elif layout != "channels first":
        features, axis = features.permute(0, 2, 3, 1), 3
        if layout == "tokens":
            features, axis = features.flatten(1, 2), 2
    spatial = [a for a in range(1, features.ndim) if a != axis]
    controller = torch.rand_like(features.amax(spatial, keepdim=True)) if learnable else torch.tensor(0.6)
    weights = torch.randn_like(features)

    def gradients(function, share):
        x = features.clone().requires_grad_()
        s = share.clone().requires_grad_() if learnable else share.item()
        y = function(x, s)
        return y, torch.autograd.grad((y * weights).sum(), [x, s] if learnable else [x])

    def equation(x, s):
        return torch.minimum(x, x.amax(spatial, keepdim=True).clamp_min(0) * s)

    found, wanted = gradients(lambda x, s: suppress(x, s, axis), controller), gradients(equation, controller)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(suppress(features, controller, axis), found[0])


@pytest.mark.parametrize("axis", [1, 2])
def test_of_several_maxima_the_first_gets_the_gradient(axis):
    tokens = torch.randn(3, 40, 5).clamp(max=0.1).movedim(2, axis)  # as relu6 saturates
    first = tokens.max(dim=3 - axis).indices
    tokens.requires_grad_()
    suppress(tokens, 0.5, axis).sum().backward()  # each channel's cut places, half of 40, give 0.5 to one
    assert torch.equal(tokens.grad.argmax(dim=3 - axis), first)


@pytest.mark.parametrize("delta", [None, 0.5])
def test_channels_last_and_tokens_are_the_same_numbers_in_another_order(delta):
    features = torch.randn(2, 6, 4, 3)
    first, last = Suppression(6, delta=delta), Suppression(6, channel_axis=3, delta=delta)
    tokens = Suppression(6, channel_axis=2, delta=delta)
    if delta is None:
        torch.nn.init.normal_(first.fc.weight)
        last.fc = tokens.fc = first.fc
    expected = first(features)
    torch.testing.assert_close(last(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), expected)
    torch.testing.assert_close(tokens(features.flatten(2).mT).mT.unflatten(2, (4, 3)), expected)


def test_the_controller_is_one_per_image_and_learns():
    suppression = Suppression(3)
    features = torch.rand(2, 3, 4, 4)
    assert torch.allclose(suppression(features)[1], suppression(features[1:])[0])
    suppression(features).sum().backward()
    assert suppression.fc.weight.grad.abs().sum() > 0


# in a network


def test_the_network_computes_what_one_writes_by_hand():
    backbone = tiny_backbone()
    pixels = torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        plain = backbone(pixels)[-1]
        Drs(DrsConfig(mode="fixed", delta=0.6), backbone, num_classes=2)
        suppressed = backbone(pixels)[-1]

        def cut(x):
            return torch.minimum(x, 0.6 * x.flatten(2).max(dim=2).values[:, :, None, None])

        stem, layer = backbone.body.embedder.embedder, backbone.body.encoder.stages[0].layers[0]
        x = cut(stem.normalization(stem.convolution(pixels)).relu())
        x = F.max_pool2d(x, 3, 2, 1)
        inner = cut(layer.layer[0].normalization(layer.layer[0].convolution(x)).relu())
        inner = layer.layer[1].normalization(layer.layer[1].convolution(inner))
        expected = cut((inner + layer.shortcut(x)).relu())
    torch.testing.assert_close(suppressed, expected)
    assert not torch.allclose(suppressed, plain, atol=1e-2)


def test_patterns_choose_the_activations():
    names = ["embedder.embedder.activation", "encoder.stages.0.layers.0.layer.0.activation"]
    last = "encoder.stages.0.layers.0.activation"
    for patterns, expected in [
        (["*"], [*names, last]),
        ([last], [last]),
        (["embedder.*", "*layers.0.activation"], [names[0], last]),
    ]:
        drs = Drs(DrsConfig(layers=patterns), tiny_backbone(), num_classes=2)
        assert sorted(name.replace("/", ".") for name in drs.layers) == sorted(expected)


def test_only_the_chosen_activation_changes():
    backbone = tiny_backbone()
    seen = {}
    for name in activation_outputs(backbone):
        backbone.body.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    pixels = torch.randn(1, 3, 32, 32)
    backbone(pixels)
    before = dict(seen)
    Drs(DrsConfig("fixed", 0.5, layers=["encoder.*.layers.0.activation"]), backbone, num_classes=2)
    after = backbone(pixels)[-1]
    *others, chosen = seen
    assert all(torch.equal(seen[name], before[name]) for name in others)
    torch.testing.assert_close(after, suppress(before[chosen], 0.5))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("encoder.stages.0.layers.1.activation", "encoder.stages.0.layers.0.activation.*"),
        ("§§", "embedder.embedder.activation or encoder.stages.0.layers.0.activation"),
    ],
)
def test_a_pattern_that_meets_nothing_is_refused_with_names_near_it(pattern, near):
    with pytest.raises(
        ValueError, match=f"drs.layers: expected one of .* 3 activations, such as {near}, got '{pattern}'"
    ) as error:
        Drs(DrsConfig(layers=["*", pattern]), tiny_backbone(), num_classes=2)
    assert "\n" not in str(error.value)


def vit_sizes(layers):
    return {"hidden_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2, "image_size": 32}


FAMILIES = {
    "vgg": (Vgg16Config(widths=[4] * 5, extra_channels=[4]), 14, ["features.1", "extra.1"]),
    "resnet": (
        ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[4, 4, 8, 8], embedding_size=4, layer_type="basic"),
        4,
        ["encoder.stages.2.layers.0.layer.0.activation", "encoder.stages.3.layers.0.activation"],
    ),
    "a resnet of one stage": (
        tiny_resnet(),
        3,
        ["embedder.embedder.activation", "encoder.stages.0.layers.0.activation"],
    ),
    "mobilenet_v2": (
        MobileNetV2Config(depth_multiplier=0.1, finegrained_output=False),
        3,
        ["layer.14.conv_3x3.activation", "conv_1x1.activation"],
    ),
    "convnext": (
        ConvNextConfig(depths=[1, 1, 2, 2], hidden_sizes=[4, 4, 4, 4], layer_scale_init_value=1.0),
        4,
        ["encoder.stages.2.layers.0.act", "encoder.stages.3.layers.1.act"],
    ),
    "vit": (ViTConfig(**vit_sizes(6)), 4, ["layers.2.mlp.activation_fn", "layers.5.mlp.activation_fn"]),
    "dinov2": (
        Dinov2Config(**vit_sizes(5), patch_size=16),
        4,
        ["encoder.layer.1.mlp.activation_fn", "encoder.layer.4.mlp.activation_fn"],
    ),
    "another transformer": (DeiTConfig(**vit_sizes(6)), 4, None),
    "another convolutional network": (
        RegNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, groups_width=8),
        None,
        None,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_placement_that_changes_the_maps_and_is_saved(family, tmp_path):
    backbone_config, count, ends = FAMILIES[family]
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        drs = DrsConfig(mode="fixed", delta=0.5)
        model = CamClassifier(CamConfig(backbone_config=backbone_config, output_stride=None, drs=drs)).eval()
        maps = model(pixels).cams
        for suppression in model.methods["drs"].layers.values():
            suppression.delta = 1e9  # nothing exceeds it
        assert (model(pixels).cams - maps).abs().max() > 1e-3 * maps.abs().max()
        model.save_pretrained(tmp_path)
        loaded = CamClassifier.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(pixels).cams, maps)
    chosen = loaded.config.drs.layers
    known = list(activation_outputs(model.backbone))
    assert len(chosen) == (count or len(known)) and set(chosen) <= set(known)
    assert ends is None or [chosen[0], chosen[-1]] == ends
    assert drs.layers is None  # the options of one network may serve another one


def test_a_network_without_activations_is_refused(monkeypatch):
    monkeypatch.setattr(drs_module, "activation_outputs", lambda backbone: {})
    with pytest.raises(ValueError, match="drs.layers: expected activations of the backbone, which has none"):
        Drs(DrsConfig(), tiny_backbone(), num_classes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fixd"}, "drs.mode: expected learnable or fixed, got 'fixd'"),
        ({"delta": 0.0}, r"drs.delta: expected a number in \(0, 1\], got 0.0"),
        ({"delta": 1.5}, r"drs.delta: expected a number in \(0, 1\], got 1.5"),
        ({"layers": []}, "drs.layers: expected a list of names or null, got \\[\\]"),
        ({"modes": 1}, "drs.modes: unknown; did you mean drs.mode?"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CamConfig(backbone_config=tiny_resnet(), drs=options)


@pytest.mark.parametrize(
    "backbone_config",
    [
        ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], layer_scale_init_value=1.0),
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_networks_with_channels_last_train_their_controllers(backbone_config):
    torch.manual_seed(0)
    model = CamClassifier(CamConfig(backbone_config=backbone_config, drs=DrsConfig()))
    model(torch.randn(2, 3, 32, 32), tags=torch.tensor([[1.0, 0.0], [0.0, 1.0]])).loss.backward()
    controllers = dict(model.methods["drs"].named_parameters())
    width = backbone_config.intermediate_size if backbone_config.model_type == "vit" else 32
    assert controllers and all(p.shape == (width, width) for p in controllers.values())
    assert all(p.grad.abs().sum() > 0 for p in controllers.values())


def test_controllers_start_small(resnet_config):
    model = CamClassifier(CamConfig(backbone_config=resnet_config, drs=DrsConfig()))
    weights = torch.cat([p.flatten() for p in model.methods["drs"].parameters()])
    assert len(weights) > 40_000
    assert weights.std().item() == pytest.approx(0.01, rel=0.05)
    assert weights.mean().abs() < 5e-4


def test_a_copy_of_a_model_has_controllers_of_its_own(resnet_config):
    model = CamClassifier(CamConfig(backbone_config=resnet_config, drs=DrsConfig())).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(pixels).cams
        twin = copy.deepcopy(model)
        assert torch.equal(twin(pixels).cams, before)
        for weight in twin.methods["drs"].parameters():
            weight.normal_(-5.0)
        assert torch.equal(model(pixels).cams, before)
        assert not torch.allclose(twin(pixels).cams, before)
