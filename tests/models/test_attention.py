import copy
import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import ResNetConfig, SwinConfig, ViTConfig
from transformers.utils import logging

from wsss_hf import AttentionConfig, CamClassifier, CamConfig
from wsss_hf.models.attention import HeadWeights, doubly_normalize, fuse_heads, spread
from wsss_hf.models.backbone import Backbone
from wsss_hf.models.patch_attentions import AttendedMaps, PatchAttentions
from wsss_hf.training.build import enable_checkpointing

NAMES = {0: "a", 1: "b", 2: "c"}
TAGS = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
HEADS, DEPTH = 2, 4


def vit(**options) -> ViTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 16}
    return ViTConfig(image_size=32, initializer_range=0.5, **sizes, **options)


def build(maps="attention", config=None, **options) -> CamClassifier:
    torch.manual_seed(0)
    backbone = vit() if config is None else config
    return CamClassifier(CamConfig(backbone_config=backbone, id2label=NAMES, maps=maps, attention=options)).eval()


def images(height=48, width=80) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def reference_attentions(backbone: Backbone, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Of all layers, of patches to patches, by the implementation of transformers that gives them."""
    body = copy.deepcopy(backbone.body)
    body.set_attn_implementation("eager")
    outputs = body(pixels, output_attentions=True, interpolate_pos_encoding=True)
    return [heads[:, :, 1:, 1:] for heads in outputs.attentions]


@torch.no_grad()
def test_attentions_are_those_of_the_last_layers_from_patch_to_patch():
    torch.manual_seed(0)
    backbone = Backbone(vit()).eval()
    pixels = images()
    before = backbone(pixels)
    assert type(before) is tuple
    expected = reference_attentions(backbone, pixels)
    PatchAttentions(backbone, layers=3, every_head=True)
    maps = backbone(pixels)
    torch.testing.assert_close(maps[0], before[0])
    assert [heads.shape for heads in maps.attentions] == [(2, HEADS, 15, 15)] * 3
    for actual, wanted in zip(maps.attentions, expected[-3:], strict=True):
        torch.testing.assert_close(actual, wanted)
    means = Backbone(vit()).eval()
    means.load_state_dict(backbone.state_dict())
    PatchAttentions(means, layers=2)
    for actual, wanted in zip(means(pixels).attentions, expected[-2:], strict=True):
        torch.testing.assert_close(actual, wanted.mean(dim=1, keepdim=True))


@torch.no_grad()
def test_a_copy_of_a_model_has_its_own_attentions():
    model = build(layers=2)
    again = copy.deepcopy(model)
    for parameter in again.backbone.parameters():
        parameter.mul_(0.5)
    first, second = model.backbone(images()), again.backbone(images())
    assert not torch.allclose(first.attentions[0], second.attentions[0])
    torch.testing.assert_close(model.backbone(images()).attentions[0], first.attentions[0])


def test_only_the_layers_asked_for_change_to_eager_attention_and_that_is_said_once(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(logging.get_logger("wsss_hf.models.patch_attentions"), "warning_once", said.append)
    model = build(layers=2)
    assert said == [
        "The last 2 layers of the backbone 'vit' use the attention implementation eager from now on: sdpa gives no "
        "attentions."
    ]
    used = [m.config._attn_implementation for m in model.backbone.body.modules() if hasattr(m, "is_causal")]
    assert used == ["sdpa", "sdpa", "eager", "eager"]
    assert model.backbone.body.config._attn_implementation == "sdpa"
    for _ in range(2):
        model(images())
    model.save_pretrained(tmp_path)
    CamClassifier.from_pretrained(tmp_path, attn_implementation="eager")
    assert len(said) == 1


def test_double_normalisation_is_that_of_plain_loops():
    affinity = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = affinity.clone()
    for image in expected:
        for _ in range(3):
            for column in range(5):
                image[:, column] /= image[:, column].sum()
            for row in range(5):
                image[row] /= image[row].sum()
    expected = (expected + expected.transpose(1, 2)) / 2
    actual = doubly_normalize(affinity, rounds=3)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual, actual.transpose(1, 2))
    torch.testing.assert_close(doubly_normalize(affinity, rounds=50).sum(dim=2), torch.ones(2, 5))
    assert doubly_normalize(torch.zeros(1, 3, 3)).isfinite().all()


def test_spreading_is_the_product_with_the_power_of_the_affinity():
    generator = torch.Generator().manual_seed(0)
    maps, affinity = torch.rand(2, 3, 2, 4, generator=generator), torch.rand(2, 8, 8, generator=generator)
    expected = torch.zeros(2, 3, 8)
    for image, label in itertools.product(range(2), range(3)):
        power = affinity[image] @ affinity[image]
        flat = maps[image, label].flatten()
        for position in range(8):
            expected[image, label, position] = sum(power[position, other] * flat[other] for other in range(8))
    torch.testing.assert_close(spread(maps, affinity, times=2), expected.unflatten(2, (2, 4)))
    torch.testing.assert_close(spread(maps, torch.eye(8).expand(2, 8, 8), times=3), maps)


def test_heads_are_averaged_each_by_its_weight():
    generator = torch.Generator().manual_seed(0)
    attentions = [torch.rand(2, HEADS, 4, 4, generator=generator) for _ in range(3)]
    weights = torch.rand(2, 3 * HEADS, generator=generator)
    expected, plain = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    for image in range(2):
        for layer, head in itertools.product(range(3), range(HEADS)):
            expected[image] += weights[image, layer * HEADS + head] * attentions[layer][image, head] / (3 * HEADS)
            plain[image] += attentions[layer][image, head] / (3 * HEADS)
    torch.testing.assert_close(fuse_heads(attentions, weights), expected)
    torch.testing.assert_close(fuse_heads(attentions), plain)


def test_weights_of_heads_are_those_of_two_layers_on_their_shares():
    torch.manual_seed(0)
    network = HeadWeights(heads=8, reduction=4)
    attentions = [torch.rand(2, HEADS, 5, 5).softmax(dim=3) * torch.rand(2, HEADS, 1, 1) for _ in range(4)]
    shares = torch.stack(
        [torch.stack([heads[i, h].sum() / 5 for heads in attentions for h in range(HEADS)]) for i in range(2)]
    )
    first, second = (layer.weight for layer in (network.layers[0], network.layers[2]))
    assert first.shape == (2, 8) and second.shape == (8, 2)
    torch.testing.assert_close(network(attentions), torch.sigmoid((shares @ first.T).relu() @ second.T))


@torch.no_grad()
@pytest.mark.parametrize("learn_heads", [False, True])
def test_maps_are_the_cam_spread_by_the_attention_of_the_last_layers(learn_heads):
    model = build(layers=2, rounds=4, power=3, learn_heads=learn_heads)
    pixels = images()
    output = model(pixels)
    attentions = reference_attentions(model.backbone, pixels)[-2:]
    mean = torch.stack(attentions).mean(dim=(0, 2))
    if learn_heads:
        weights = model.methods["attention"].head_weights(attentions)
        mean = torch.einsum("bk,bkij->bij", weights, torch.cat(attentions, dim=1)) / weights.shape[1]
    affinity = doubly_normalize(mean, rounds=4)
    power = affinity @ affinity @ affinity
    expected = torch.einsum("bij,bcj->bci", power, output.cams.relu().flatten(2)).unflatten(2, output.cams.shape[2:])
    torch.testing.assert_close(output.maps, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output.maps, output.cams.relu(), rtol=0.05)
    assert (output.maps >= 0).all()


def test_without_learnt_weights_there_is_no_loss_and_nothing_to_train():
    model = build().train()
    assert list(model.methods.parameters()) == []
    assert list(model(images(), tags=TAGS).losses) == ["classification"]


def test_the_weights_of_heads_learn_from_the_tags_and_teach_nothing_else():
    model = build(learn_heads=True, weight=0.5).train()
    pixels = images()
    output = model(pixels, tags=TAGS)
    method = model.methods["attention"]
    attentions = [heads.detach() for heads in model.backbone(pixels).attentions]
    fused = fuse_heads(attentions, method.head_weights(attentions))
    refined = torch.einsum("bij,bcj->bci", fused, output.cams.detach().relu().flatten(2))
    expected = 0.5 * F.multilabel_soft_margin_loss(refined.mean(dim=2), TAGS)
    torch.testing.assert_close(output.losses["attention_classification"], expected)
    output.losses["attention_classification"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters())
    others = [*model.backbone.parameters(), *model.classifier.parameters()]
    assert all(parameter.grad is None for parameter in others)


def test_training_lowers_the_loss_of_the_heads():
    model = build(learn_heads=True).train()
    model.classifier.weight.data.mul_(100)  # a CAM that is sure of itself
    method = model.methods["attention"]
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    losses = []
    for _ in range(20):
        loss = model(images(), tags=TAGS).losses["attention_classification"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(("depth", "layers"), [(12, 8), (4, 3), (1, 1)])
def test_by_default_two_thirds_of_the_layers_give_their_attentions(depth, layers):
    config = ViTConfig(hidden_size=8, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=8)
    model = build(config=config)
    assert model.config.attention.layers == layers
    assert len(model.backbone(images(32, 32)).attentions) == layers


def test_plda_may_take_its_maps_in_training():
    torch.manual_seed(0)
    methods = {"attention": {}, "plda": {"maps": "attention", "hidden": [8, 8], "pamr_iterations": 1}}
    model = CamClassifier(CamConfig(backbone_config=vit(), id2label=NAMES, **methods)).train()
    model.progress = 0.5
    output = model(images(), tags=TAGS)
    output.loss.backward()
    assert output.loss.isfinite()


def test_checkpointed_layers_keep_their_attentions_once():
    model = build(learn_heads=True).train()
    enable_checkpointing(model)
    output = model(images(), tags=TAGS)
    output.loss.backward()
    maps = model.backbone(images())
    assert isinstance(maps, AttendedMaps) and len(maps.attentions) == 3


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8),
        SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 1]),
    ],
)
def test_a_backbone_without_such_attentions_is_refused_in_one_line(config):
    expected = f"attention: expected a plain vision transformer as backbone, got '{config.model_type}'"
    with pytest.raises(ValueError) as caught:
        build(config=config)
    assert str(caught.value) == expected


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(ValueError, match="attention.layers: expected at most 4, as the backbone has, got 5"):
        build(layers=5)
    with pytest.raises(ValueError, match="layers"):
        AttentionConfig(layers=0)
