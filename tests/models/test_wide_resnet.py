import pytest
import torch
from torch import nn
from transformers import AutoConfig

from wsss_hf import CamClassifier, CamConfig, DrsConfig
from wsss_hf.models.backbone import Backbone
from wsss_hf.models.pretrained import pretrained_body
from wsss_hf.models.wide_resnet import WideResNet38Backbone, WideResNet38Config

WIDTHS = [4, 5, 6, 7, 8, 12, 16]


def config(**kwargs):
    return WideResNet38Config(widths=WIDTHS, **kwargs)


def build(**kwargs):
    torch.manual_seed(0)
    return WideResNet38Backbone(config(out_indices=[0, 1, 2, 3, 4], **kwargs))


def test_the_published_network_has_38_layers_of_the_published_widths():
    with torch.device("meta"):
        model = WideResNet38Backbone(WideResNet38Config())
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith("weight") and p.ndim == 4}
    # The projections are beside the way, and the 38th layer is the classifier.
    assert len([name for name in shapes if not name.endswith("conv_branch1.weight")]) == 37
    assert shapes["conv1a.weight"] == (64, 3, 3, 3)
    assert shapes["b4_5.conv_branch2a.weight"] == (512, 512, 3, 3)
    assert shapes["b5.conv_branch2b1.weight"] == (1024, 512, 3, 3)
    assert shapes["b6.conv_branch2b1.weight"] == (1024, 512, 3, 3)
    assert shapes["b7.conv_branch2b2.weight"] == (4096, 2048, 1, 1)
    assert shapes["b7.conv_branch1.weight"] == (4096, 2048, 1, 1)
    projected = {name.split(".")[0] for name in shapes if "conv_branch1" in name}
    assert projected == {"b2", "b3", "b4", "b5", "b6", "b7"}
    assert model.bn7.num_features == 4096


def test_dilations_are_the_published_ones():
    dilations = {
        n: m.dilation[0] for n, m in build().named_modules() if isinstance(m, nn.Conv2d) and m.dilation[0] > 1
    }
    assert dilations == {
        "b5.conv_branch2b1": 2, "b5_1.conv_branch2a": 2, "b5_1.conv_branch2b1": 2,
        "b5_2.conv_branch2a": 2, "b5_2.conv_branch2b1": 2, "b6.conv_branch2b1": 4, "b7.conv_branch2b1": 4,
    }  # fmt: skip


@pytest.mark.parametrize("output_stride", [None, 8, 16])
def test_it_stands_as_published_whatever_stride_is_allowed(output_stride):
    backbone = Backbone(config(), output_stride)
    assert (backbone.channels, backbone.strides) == ([5, 6, 7, 8, 16], [2, 4, 8, 8, 8])
    maps = backbone(torch.randn(2, 3, 32, 48))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (4, 6), (4, 6)]


def test_a_map_is_the_activated_input_of_the_next_group():
    model, inputs = build(freeze=False).eval(), {}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    for name in ("b3", "b4", "b5", "b6"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, given, _o, name=name: inputs.update({name: given[0]})
        )
    maps = model(torch.randn(1, 3, 32, 32)).feature_maps
    for name, value in zip(("b3", "b4", "b5", "b6"), maps, strict=False):
        torch.testing.assert_close(value, model.get_submodule(name).bn_branch2a(inputs[name]).relu())


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def published_frozen(model):
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    beginnings = ("conv1a.", "b2.", "b2_1.", "b2_2.")
    return {n for n, _ in model.named_parameters() if n.startswith(beginnings) or n.rpartition(".")[0] in norms}


def test_the_published_parts_are_frozen_however_it_came_to_be(tmp_path):
    model = build()
    expected = published_frozen(model)
    assert expected and frozen(model) == expected
    model.save_pretrained(tmp_path)
    assert frozen(pretrained_body(str(tmp_path), AutoConfig.from_pretrained(tmp_path))) == expected
    classifier = CamClassifier.from_backbone(str(tmp_path), id2label={0: "cat"})
    assert frozen(classifier.backbone.body) == expected
    classifier.save_pretrained(tmp_path / "classifier")
    assert frozen(CamClassifier.from_pretrained(tmp_path / "classifier").train().backbone.body) == expected


@pytest.mark.parametrize("freeze", [True, False])
def test_freezing_spares_the_statistics_and_can_be_turned_off(freeze):
    model = build(freeze=freeze).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(m.square().mean() for m in model(torch.randn(2, 3, 32, 32)).feature_maps).backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "b3.conv_branch2a.weight" in changed and "b7.conv_branch1.weight" in changed
    touched = changed & (published_frozen(model) | {n for n in before if "running" in n or "num_batches" in n})
    assert not touched if freeze else {"conv1a.weight", "bn7.running_mean", "bn7.weight"} <= touched


def test_dropout_drops_whole_channels_before_the_last_two_convolutions_of_b6_and_b7():
    model, dropped = build(dropout=[0.4, 0.6]).train(), {}
    for name in ("b6.conv_branch2b1", "b6.conv_branch2b2", "b7.conv_branch2b1", "b7.conv_branch2b2"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, given, _o, name=name: dropped.update({name: given[0]})
        )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.bias)
            nn.init.zeros_(module.weight)
    model(torch.randn(64, 3, 16, 16))
    for name, given in dropped.items():
        share = 0.4 if name.startswith("b6") else 0.6
        channels = given.flatten(2)
        assert torch.equal(channels.amin(2), channels.amax(2))
        assert channels.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
        assert (channels[:, :, 0] == 0).float().mean().item() == pytest.approx(share, abs=0.12)


def test_drs_stands_after_every_activation():
    model = CamClassifier(CamConfig(backbone_config=config(), drs=DrsConfig(), id2label={0: "cat"}))
    # Two in each of the 15 basic blocks, three in both bottlenecks, one at the end.
    assert len(model.methods["drs"].layers) == 2 * 15 + 3 * 2 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [1, 2]}, r"widths: expected 7 numbers, of conv1a and b2 to b7, got \[1, 2\]"),
        ({"dropout": [0.5]}, r"dropout: expected 2 probabilities, of b6 and b7, got \[0.5\]"),
    ],
)
def test_settings_of_another_length_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WideResNet38Config(**arguments)
