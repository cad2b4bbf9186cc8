import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig

from wsss_hf import CamClassifier, CamConfig, DrsConfig
from wsss_hf.models.backbone import Backbone
from wsss_hf.models.vgg import Vgg16Backbone, Vgg16Config

WIDTHS = [3, 4, 5, 6, 7]


def config(**kwargs):
    return Vgg16Config(widths=WIDTHS, **kwargs)


def test_the_published_network_has_the_weights_of_torchvision():
    with torch.device("meta"):
        weights = Vgg16Backbone(Vgg16Config()).state_dict()
    layers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert list(weights) == [f"features.{n}.{kind}" for n in layers for kind in ("weight", "bias")]
    assert sum(value.numel() for value in weights.values()) == 14_714_688  # VGG-16 without its linear layers


def test_poolings_and_dilations_are_those_of_drs():
    model = Vgg16Backbone(config(extra_channels=[8, 9]))
    pools = [(m.kernel_size, m.stride, m.padding) for m in model.modules() if isinstance(m, nn.MaxPool2d)]
    assert pools == [(2, 2, 0)] * 3 + [(3, 1, 1)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.dilation[0] for m in convolutions] == [1] * 10 + [2] * 3 + [1] * 2
    assert all(m.kernel_size == (3, 3) and m.padding == m.dilation for m in convolutions)
    assert [m.out_channels for m in convolutions[-2:]] == [8, 9]


@pytest.mark.parametrize("output_stride", [None, 8, 16])
def test_it_stands_as_published_whatever_stride_is_allowed(output_stride):
    plain = Backbone(config(), output_stride)
    assert (plain.channels, plain.strides) == (WIDTHS, [1, 2, 4, 8, 8])
    topped = Backbone(config(extra_channels=[8, 9]), output_stride)
    assert (topped.channels, topped.strides) == ([3, 4, 5, 6, 9], [1, 2, 4, 8, 8])
    maps = topped(torch.randn(2, 3, 40, 64))
    assert [tuple(m.shape) for m in maps] == [
        (2, 3, 40, 64), (2, 4, 20, 32), (2, 5, 10, 16), (2, 6, 5, 8), (2, 9, 5, 8),
    ]  # fmt: skip


def test_icds_pooled_hidden_layers_are_a_stage_of_their_own():
    torch.manual_seed(0)
    backbone = Backbone(config(hidden_channels=[8, 9], pooling=3)).eval()
    assert (backbone.channels, backbone.strides) == ([*WIDTHS, 9], [1, 2, 4, 8, 8, 8])
    pixels = torch.randn(2, 3, 33, 41)
    maps = backbone(pixels)
    assert [tuple(m.shape[2:]) for m in maps] == [(33, 41), (17, 21), (9, 11), (5, 6), (5, 6), (5, 6)]
    assert torch.equal(maps[-1], backbone(pixels)[-1])
    backbone.train()
    first, second = backbone(pixels), backbone(pixels)
    assert torch.equal(first[-2], second[-2]) and not torch.equal(first[-1], second[-1])  # dropout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_channels": [8]}, r"hidden_channels: expected two numbers, of fc6 and fc7, or none, got \[8\]"),
        ({"pooling": 4}, "pooling: expected 2 or 3, got 4"),
    ],
)
def test_unfit_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_maps_are_taken_before_the_pooling():
    model = Vgg16Backbone(config(extra_channels=[8], out_indices=[0, 1, 2, 3, 4, 5])).eval()
    hidden, pixels = {}, torch.randn(1, 3, 32, 32)
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _m, _i, output, name=name: hidden.update({name: output}))
    maps = model(pixels).feature_maps
    ends = ["features.3", "features.8", "features.15", "features.22", "features.29", "extra.1"]
    assert all(torch.equal(m, hidden[name]) for m, name in zip(maps, ends, strict=True))


def test_only_the_stages_that_are_asked_for_are_returned():
    torch.manual_seed(0)
    model = Vgg16Backbone(config(out_features=["conv2", "conv5"]))
    assert model.channels == [4, 7]
    assert [m.shape[1] for m in model(torch.randn(1, 3, 16, 16)).feature_maps] == [4, 7]


def test_drs_stands_after_each_of_the_16_activations():
    with torch.device("meta"):
        backbone = Vgg16Backbone(Vgg16Config(extra_channels=[512, 512, 512]))
    relus = [name for name, module in backbone.named_modules() if isinstance(module, nn.ReLU)]
    assert len(relus) == 16
    narrow = config(extra_channels=[8, 8, 8])
    model = CamClassifier(CamConfig(backbone_config=narrow, drs=DrsConfig(), id2label={0: "cat"}))
    assert [name.replace("/", ".") for name in model.methods["drs"].layers] == relus


def test_activations_keep_their_size_through_the_depth():
    """Random weights of a constant deviation would let them vanish in 16 layers."""
    torch.manual_seed(0)
    model = Vgg16Backbone(Vgg16Config(widths=[32] * 5, extra_channels=[32] * 3, out_indices=[0, 5]))
    first, last = (m.std().item() for m in model(torch.randn(2, 3, 64, 64)).feature_maps)
    assert first / 10 < last < first * 10


def test_it_is_saved_and_found_by_the_auto_classes(tmp_path):
    model = Vgg16Backbone(config(extra_channels=[8], out_features=["conv4", "extra"])).eval()
    model.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is Vgg16Config
    assert (again.widths, again.extra_channels, again.out_features) == (WIDTHS, [8], ["conv4", "extra"])
    pixels = torch.randn(1, 3, 24, 24)
    loaded = Vgg16Backbone.from_pretrained(tmp_path)
    built = AutoBackbone.from_config(again)
    built.load_state_dict(loaded.state_dict())
    for backbone in (loaded, built.eval()):
        for ours, theirs in zip(backbone(pixels).feature_maps, model(pixels).feature_maps, strict=True):
            assert torch.equal(ours, theirs)


def test_another_number_of_widths_is_refused():
    with pytest.raises(ValueError, match=r"widths: expected 5 numbers, one per block, got \[1, 2\]"):
        Vgg16Config(widths=[1, 2])
