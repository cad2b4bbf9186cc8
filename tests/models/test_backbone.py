import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    MobileNetV1Config,
    MobileNetV2Config,
    MobileNetV2Model,
    RegNetConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from wsss_hf.models.backbone import Backbone
from wsss_hf.models.drs import activation_outputs
from wsss_hf.models.pretrained import pretrained_body, resolve_backbone_config

TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def resnet():
    return ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128], embedding_size=16, layer_type="basic")


def bottleneck():
    return ResNetConfig(depths=[1, 1, 2, 2], hidden_sizes=[16, 32, 48, 64], embedding_size=8)


def convnext():
    # The default layer scale, 1e-6, would hide every depthwise convolution.
    return ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64], layer_scale_init_value=1.0)


def mobilenet(**kwargs):
    return MobileNetV2Config(depth_multiplier=0.25, min_depth=8, **kwargs)


def mobilenet_v1():
    return MobileNetV1Config(depth_multiplier=0.25, min_depth=8)


def regnet():
    return RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 2], groups_width=8, layer_type="x"
    )


def vit():
    return ViTConfig(image_size=32, patch_size=16, **TOKENS)


def deit():
    return DeiTConfig(image_size=32, patch_size=16, **TOKENS)


def dinov2():
    return Dinov2Config(image_size=56, patch_size=14, **TOKENS)


def dinov2_with_registers():
    return Dinov2WithRegistersConfig(image_size=56, patch_size=14, num_register_tokens=3, **TOKENS)


def swin():
    return SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])


def build(config, output_stride=None):
    torch.manual_seed(0)
    return Backbone(config, output_stride).eval()


@pytest.mark.parametrize(
    ("config", "output_stride", "channels", "strides"),
    [
        (resnet, None, [16, 32, 64, 128], [4, 8, 16, 32]),
        (resnet, 32, [16, 32, 64, 128], [4, 8, 16, 32]),
        (resnet, 16, [16, 32, 64, 128], [4, 8, 16, 16]),
        (resnet, 8, [16, 32, 64, 128], [4, 8, 8, 8]),
        (resnet, 4, [16, 32, 64, 128], [4, 4, 4, 4]),
        (convnext, None, [8, 16, 32, 64], [4, 8, 16, 32]),
        (convnext, 16, [8, 16, 32, 64], [4, 8, 16, 16]),
        (convnext, 8, [8, 16, 32, 64], [4, 8, 8, 8]),
        (mobilenet, None, [8, 8, 24, 1280], [4, 8, 16, 32]),
        (mobilenet, 16, [8, 8, 24, 1280], [4, 8, 16, 16]),
        (mobilenet, 8, [8, 8, 24, 1280], [4, 8, 8, 8]),
        (mobilenet_v1, 8, [16, 32, 64, 128, 256], [2, 4, 8, 8, 8]),
        (regnet, None, [8, 8, 16, 24, 32], [2, 4, 8, 16, 32]),
        (regnet, 8, [8, 8, 16, 24, 32], [2, 4, 8, 8, 8]),
        (vit, None, [32], [16]),
        (vit, 16, [32], [16]),
        (deit, None, [32], [16]),
        (dinov2, None, [32], [14]),
        (dinov2_with_registers, None, [32], [14]),
        (swin, None, [8, 16, 32, 64], [4, 8, 16, 32]),
        (swin, 32, [8, 16, 32, 64], [4, 8, 16, 32]),
    ],
)
def test_stages_have_the_announced_channels_and_strides(config, output_stride, channels, strides):
    backbone = build(config(), output_stride)
    assert (backbone.channels, backbone.strides) == (channels, strides)
    height, width = (112, 56) if strides[-1] == 14 else (64, 96)
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, height, width))
    shapes = [(2, c, height // s, width // s) for c, s in zip(channels, strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == shapes


def test_sizes_that_the_stride_does_not_divide_are_fine(resnet_config):
    assert tuple(build(resnet_config, 16)(torch.randn(1, 3, 50, 75))[-1].shape) == (1, 128, 4, 5)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilated_mobilenet_is_the_one_that_transformers_dilates_itself(output_stride):
    backbone = build(mobilenet(), output_stride)
    own = MobileNetV2Model(mobilenet(output_stride=output_stride), add_pooling_layer=False).eval()
    own.load_state_dict(backbone.body.state_dict())
    pixels = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = own(pixels, output_hidden_states=True)
        maps = backbone(pixels)
    torch.testing.assert_close(maps[-1], expected.last_hidden_state)
    for actual, index in zip(maps[:-1], backbone.stage_indices, strict=False):
        torch.testing.assert_close(actual, expected.hidden_states[index])


@pytest.mark.parametrize("config", [mobilenet_v1(), mobilenet()])
def test_mobilenets_pad_by_hand_only_where_the_size_decides(config):
    backbone = build(config)
    own = AutoModel.from_config(config, add_pooling_layer=False).eval()
    own.load_state_dict(backbone.body.state_dict())
    strided = [m for m in own.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    for size in ((64, 96), (61, 75)):
        pixels = torch.randn(1, 3, *size)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
            maps = backbone(pixels)
        assert sum(event.name == "aten::constant_pad_nd" for event in recorded.events()) == len(strided)
        with torch.no_grad():
            assert torch.equal(maps[-1], own(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("config", "output_stride", "offset"),
    [
        (resnet, 16, 0),
        (resnet, 8, 0),
        (resnet, 4, 0),
        (bottleneck, 8, 0),
        (regnet, 8, 0),
        (convnext, 16, 0),
        (convnext, 8, 1),  # the dilated 2×2 patch merging is centred, so the grid starts a pixel later
    ],
)
def test_dilation_keeps_the_meaning_of_the_weights(config, output_stride, offset):
    """On the grid of the original network every weight meets the pixels it was trained on: the maps are the same."""
    sparse, dense = build(config()), build(config(), output_stride)
    dense.load_state_dict(sparse.state_dict())
    pixels = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected, actual = sparse(pixels)[-1], dense(pixels)[-1]
    factor = 32 // output_stride
    torch.testing.assert_close(actual[..., offset::factor, offset::factor], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("config", "special_tokens"), [(vit, 1), (deit, 2)])
def test_patch_tokens_become_a_map_row_by_row_without_the_special_tokens(config, special_tokens):
    backbone = build(config())
    pixels = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        tokens = backbone.body(pixels, interpolate_pos_encoding=True).last_hidden_state
        (actual,) = backbone(pixels)
    assert tokens.shape[1] == special_tokens + 2 * 4
    for row in range(2):
        for column in range(4):
            assert torch.equal(actual[0, :, row, column], tokens[0, special_tokens + 4 * row + column])


@pytest.mark.parametrize(
    ("config", "output_stride", "message"),
    [
        (
            lambda: BertConfig(vocab_size=8, **TOKENS),
            None,
            "backbone 'bert': .* got one that takes input_ids",
        ),
        (swin, 16, r"output_stride: expected 32 or none \(backbone 'swin' can't be dilated\), got 16"),
        (vit, 8, r"output_stride: expected 16 or none \(backbone 'vit' can't be dilated\), got 8"),
    ],
)
def test_an_unusable_network_is_refused_with_what_is_expected(config, output_stride, message):
    with pytest.raises(ValueError, match=message):
        Backbone(config(), output_stride)


def test_hidden_states_that_are_no_map_are_refused(resnet_config):
    backbone = build(resnet_config)
    with pytest.raises(ValueError, match=r"backbone 'resnet': expected hidden states .*, got \(1, 5, 7\)"):
        backbone._as_map(torch.zeros(1, 5, 7), (64, 64))


def test_building_leaves_weights_statistics_and_hooks_alone(resnet_config):
    torch.manual_seed(0)
    backbone = Backbone(resnet_config, output_stride=8)
    torch.manual_seed(0)
    plain = type(backbone.body)(resnet_config)
    assert backbone.training and backbone.body.training
    for name, value in plain.state_dict().items():
        assert torch.equal(backbone.body.state_dict()[name], value), name
    assert not any(module._forward_hooks for module in backbone.modules())


@pytest.mark.parametrize("config", [resnet, convnext, mobilenet, regnet, vit, dinov2, swin])
def test_what_is_trained_gets_a_gradient_from_the_deepest_map(config):
    """Training on several processes refuses a network with parameters that take no part in its loss."""
    backbone = Backbone(config())
    backbone(torch.randn(2, 3, 56, 56))[-1].square().sum().backward()
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained
    assert [name for name, p in trained.items() if p.grad is None] == []


def test_activations_are_found_in_order_with_their_channels(resnet_config):
    found = activation_outputs(build(resnet_config))
    stage = "encoder.stages.{}.layers.0"
    expected = [("embedder.embedder.activation", (16, 1))]
    for index, channels in enumerate([16, 32, 64, 128]):
        expected.append((stage.format(index) + ".layer.0.activation", (channels, 1)))
        expected.append((stage.format(index) + ".activation", (channels, 1)))
    assert [(name, found[name]) for name, _ in expected] == expected
    assert list(found) == [name for name, _ in expected]


def test_activations_know_channels_last_networks():
    assert set(activation_outputs(build(convnext())).values()) == {(32, 3), (64, 3), (128, 3), (256, 3)}
    assert set(activation_outputs(build(vit())).values()) == {(64, 2)}


def test_a_configuration_comes_from_an_object_a_dict_or_a_directory(resnet_config, tmp_path):
    resnet_config.id2label = {0: "tench", 1: "goldfish", 2: "shark"}
    resnet_config.save_pretrained(tmp_path)
    values = resnet_config.to_dict()
    for resolved in (
        resolve_backbone_config(None, values),
        resolve_backbone_config(str(tmp_path), None),
        resolve_backbone_config(None, resnet_config),
    ):
        assert type(resolved) is ResNetConfig
        assert resolved.hidden_sizes == [16, 32, 64, 128]
        assert "goldfish" not in resolved.id2label.values()
    assert values["model_type"] == "resnet"  # the caller's dict is not used up


def test_no_backbone_at_all_is_refused():
    with pytest.raises(ValueError, match="backbone: expected a directory or Hub id, .* got neither"):
        resolve_backbone_config(None, None)


@pytest.mark.parametrize(
    "values", [{"architecture": "resnet18"}, {"architecture": "resnet18", "label_names": ["a"], "num_classes": 1}]
)
def test_a_network_of_timm_without_timm_is_refused_in_one_line(values, tmp_path, monkeypatch):
    monkeypatch.setattr("wsss_hf.models.pretrained.is_timm_available", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timm_wrapper", **values}))
    with pytest.raises(ImportError) as caught:
        resolve_backbone_config(str(tmp_path), None)
    assert str(caught.value).endswith("is a network of timm, which needs torchvision: pip install timm")
    assert str(caught.value).count("\n") == 0


def test_timms_other_wrapper_is_refused_with_the_one_that_is_taken():
    with pytest.raises(ValueError, match="backbone_config: expected model_type timm_wrapper .*, got timm_backbone"):
        resolve_backbone_config(None, {"model_type": "timm_backbone", "backbone": "resnet18"})


@pytest.mark.parametrize("config", [resnet, convnext, dinov2, swin, vit, mobilenet])
def test_published_weights_fit_the_backbone(config, tmp_path):
    published = build(config()).body
    published.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    backbone = Backbone(config)
    backbone.body.load_state_dict(pretrained_body(str(tmp_path), config).state_dict())
    for name, value in published.state_dict().items():
        assert torch.equal(backbone.body.state_dict()[name], value), name
