import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from wsss_hf.models import plda as plda_module
from wsss_hf.models.methods import TrainingStep
from wsss_hf.models.pamr import pamr
from wsss_hf.models.plda import (
    DomainClassifier,
    Plda,
    PldaConfig,
    adversarial_loss,
    assign_domains,
    balance_weights,
    balanced_cross_entropy,
    gradient_reversal,
    pseudo_labels,
    reversal_strength,
    source_pixels,
    with_background,
)
from wsss_hf.models.seam import min_max_normalize

REFERENCE = {
    key.removeprefix("plda/"): value
    for key, value in load_file(Path(__file__).parents[1] / "fixtures" / "official_outputs.safetensors").items()
}
CLASSES = 3
TAGS = [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]


class Network(nn.Module):
    channels = [6, 8]
    strides = [2, 4]

    def __init__(self):
        super().__init__()
        self.shallow = nn.Conv2d(3, 6, kernel_size=3, stride=2, padding=1)
        self.deep = nn.Conv2d(6, 8, kernel_size=3, stride=2, padding=1)
        self.classifier = nn.Conv2d(8, CLASSES, kernel_size=1)
        self.calls = []

    def forward(self, pixel_values):
        self.calls.append((pixel_values, torch.is_grad_enabled()))
        shallow = self.shallow(pixel_values).relu()
        deep = self.deep(shallow).relu()
        # Strong enough that there are confident pixels of every class.
        return (shallow, deep), 40 * self.classifier(deep)


def make_step(network, tags=TAGS, progress=0.5):
    images = torch.rand(len(tags), 3, 32, 24, generator=torch.Generator().manual_seed(3))
    pixel_values = (images - 0.5) / 0.25
    features, cams = network(pixel_values)
    for tensor in (*features, cams):
        tensor.retain_grad()
    return TrainingStep(pixel_values, images, torch.tensor(tags), features, cams, progress, classify=network)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def plda(network):
    torch.manual_seed(1)
    return Plda(PldaConfig(hidden=[12, 10], pamr_iterations=1, pamr_dilations=[1]), network, CLASSES)


def test_source_pixels_match_the_released_program():
    maps, tags = REFERENCE["maps"][:, 1:], REFERENCE["label"][:, 1:, 0, 0]
    weights = min_max_normalize(maps) * tags[:, :, None, None]
    torch.testing.assert_close(weights, REFERENCE["source_weights"], atol=1e-4, rtol=0)
    assert torch.equal(source_pixels(maps, tags, threshold=0.6), REFERENCE["source_mask"])


def test_pseudo_labels_match_the_released_program():
    labels = pseudo_labels(REFERENCE["scores"], foreground=0.6, background=0.7, floor=0.2)
    assert torch.equal(labels, REFERENCE["pseudo_gt"])


def test_refining_only_tagged_classes_and_two_views_at_once_changes_no_label(plda):
    generator = torch.Generator().manual_seed(3)
    pixels, cams = torch.randn(3, 3, 16, 16, generator=generator), torch.randn(3, CLASSES, 8, 8, generator=generator)
    tags = torch.zeros(3, CLASSES)
    tags[1, 1], tags[2, :2] = 1, 1
    everywhere = torch.ones_like(cams).bool()
    labels = plda.confident_labels(pixels, 3 * cams, tags, everywhere)
    scores = pamr(pixels, with_background(3 * cams).softmax(dim=1), 1, [1])
    expected = pseudo_labels(scores * F.pad(tags, (1, 0), value=1.0)[:, :, None, None])
    assert torch.equal(labels, expected * F.pad(everywhere, (0, 0, 0, 0, 1, 0))) and labels.any()
    one_by_one = [
        plda.confident_labels(*(t[i : i + 1] for t in (pixels, 3 * cams, tags, everywhere))) for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(one_by_one), labels)


def test_balanced_cross_entropy_matches_the_released_program():
    loss = balanced_cross_entropy(REFERENCE["logits"], REFERENCE["pseudo_gt"])
    torch.testing.assert_close(loss, REFERENCE["mask_ce"][0], atol=1e-4, rtol=0)


def test_adversarial_loss_matches_the_released_program():
    loss = adversarial_loss(REFERENCE["domain_logits"], REFERENCE["domain_labels"])
    torch.testing.assert_close(loss, REFERENCE["adversarial"][0], atol=1e-4, rtol=0)


def test_adversarial_loss_equals_a_loop_over_images_classes_and_pixels():
    logits, domains = REFERENCE["domain_logits"][:, :8], REFERENCE["domain_labels"][:, :8]
    expected = 0.0
    for image in range(2):
        for category in range(8):
            labels = domains[image, category].flatten().tolist()
            total = labels.count(0) + labels.count(1)
            for label, pair in zip(labels, logits[image, category].flatten(1).T, strict=True):
                if label != 255:
                    chances = pair.softmax(0)
                    entropy = -(chances * chances.log()).sum().item()
                    balance = (total - labels.count(label)) / (1 + total)
                    expected -= balance * (1 + math.exp(-entropy)) * chances[label].log().item()
    assert adversarial_loss(logits, domains).item() == pytest.approx(expected / domains[:, 0].numel(), abs=1e-5)


def test_adversarial_weights_carry_no_gradient():
    # Without a gradient of the entropy, the gradient at the logits is (p - y) x weight.
    logits = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1, 1).repeat(1, 1, 1, 1, 2).requires_grad_()
    adversarial_loss(logits, torch.tensor([0, 1]).reshape(1, 1, 1, 2)).backward()
    chance = torch.tensor([1.0, 0.0]).softmax(0)
    weight = (1 / 3) * (1 + torch.exp((chance * chance.log()).sum())) / 2
    expected = torch.stack([chance - torch.tensor([1.0, 0.0]), chance - torch.tensor([0.0, 1.0])], dim=1) * weight
    torch.testing.assert_close(logits.grad[0, 0, :, 0], expected)


def test_heads_equal_one_convolution_per_class():
    torch.manual_seed(0)
    classifier = DomainClassifier(channels=6, num_classes=CLASSES, hidden=[12, 10], dropout=0.5).eval()
    features = torch.randn(2, 6, 4, 5)
    hidden = features
    for convolution in (classifier.layers[0], classifier.layers[3]):
        hidden = convolution(hidden).relu()
    logits = classifier(features)
    assert logits.shape == (2, CLASSES, 2, 4, 5)
    for category in range(CLASSES):
        weight, bias = classifier.heads.weight[2 * category :][:2], classifier.heads.bias[2 * category :][:2]
        torch.testing.assert_close(logits[:, category], F.conv2d(hidden, weight, bias))


def test_the_source_wins_where_both_domains_claim_a_pixel():
    source = torch.tensor([True, True, False, False]).reshape(1, 1, 2, 2)
    target = torch.tensor([True, False, True, False]).reshape(1, 1, 2, 2)
    assert assign_domains(source, target).flatten().tolist() == [0, 0, 1, 255]


def test_balance_weights():
    weights = balance_weights(torch.tensor([[3.0, 1.0], [5.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(weights, torch.tensor([[1 / 5, 3 / 5], [0.0, 5 / 6], [0.0, 0.0]]))


def test_pseudo_labels_drop_weak_and_disputed_pixels():
    scores = torch.zeros(1, 3, 1, 4)
    scores[0, 0, 0] = torch.tensor([0.1, 1.0, 0.65, 0.3])
    scores[0, 1, 0] = torch.tensor([0.8, 0.5, 0.0, 0.4])
    scores[0, 2, 0] = torch.tensor([0.1, 0.0, 0.19, 0.0])
    # Cuts 0.7, 0.48 and (floor) 0.2: both claim the second pixel, none the last two.
    assert pseudo_labels(scores)[0, :, 0].T.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert pseudo_labels(scores, background=0.6)[0, :, 0].T.tolist()[2] == [1, 0, 0]
    assert pseudo_labels(scores, floor=0.1)[0, :, 0].T.tolist()[2] == [0, 0, 1]


def test_gradient_reversal_is_the_identity_with_a_negated_scaled_gradient():
    features = torch.randn(2, 3, requires_grad=True)
    output = gradient_reversal(features, 0.25)
    assert torch.equal(output, features)
    (output * torch.arange(6.0).reshape(2, 3)).sum().backward()
    torch.testing.assert_close(features.grad, -0.25 * torch.arange(6.0).reshape(2, 3))


def test_reversal_grows_with_progress():
    strengths = [reversal_strength(progress) for progress in (0.0, 0.1, 0.5, 1.0)]
    assert strengths == pytest.approx([0.0, math.tanh(0.5), math.tanh(2.5), math.tanh(5.0)])


def test_second_pass_hides_the_source_pixels_and_has_no_gradient(network, plda):
    step = make_step(network)
    network.calls.clear()
    plda.losses(step)
    ((masked, with_gradient),) = network.calls
    assert not with_gradient
    source = source_pixels(step.cams, step.tags).any(dim=1, keepdim=True)
    hidden = source.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert 0 < hidden.float().mean() < 1
    torch.testing.assert_close(masked, torch.where(hidden, 0, step.pixel_values))


def test_losses_are_the_mean_of_both_views_where_there_are_two(network, plda):
    plda.eval()
    step = make_step(network)
    first = plda.losses(step)
    smaller = F.interpolate(step.pixel_values, scale_factor=0.5, mode="bilinear")
    step.second_view = step.of_view(smaller)
    features, cams = network(smaller)
    second = plda.losses(TrainingStep(smaller, smaller, step.tags, features, cams, step.progress, classify=network))
    losses = plda.losses(step)
    for name, loss in losses.items():
        assert abs(first[name] - second[name]) > 1e-4
        torch.testing.assert_close(loss, (first[name] + second[name]) / 2)


def test_confident_labels_are_tagged_objects_on_the_pixels_of_their_domain(network, plda):
    step = make_step(network)
    source = source_pixels(step.cams, step.tags)
    labels = plda.confident_labels(step.pixel_values, step.cams, step.tags, source)
    assert labels[:, 1:].sum() > 0
    assert labels[:, 0].sum() == 0
    assert (labels[:, 1:].bool() & ~source).sum() == 0
    everywhere = plda.confident_labels(step.pixel_values, step.cams, step.tags, torch.ones_like(source))
    assert torch.equal(labels[:, 1:], everywhere[:, 1:] * source)


def test_gradients_reach_what_each_loss_trains(network, plda):
    def gradients(name, progress=0.5):
        step = make_step(network, progress=progress)
        losses = plda.losses(step)
        plda.zero_grad()
        losses[name].backward()
        touched = [step.features[0], step.features[1], step.cams, plda.domain_classifier.heads.weight]
        return [tensor.grad is not None and tensor.grad.abs().sum().item() > 0 for tensor in touched]

    assert gradients("plda_adversarial") == [True, True, False, True]
    assert gradients("plda_adversarial", progress=0.0) == [False, False, False, True]
    assert gradients("plda_source_ce") == [True, True, True, False]
    assert gradients("plda_target_ce") == [True, True, True, False]


def test_features_climb_the_loss_that_the_domain_classifier_descends(network, plda):
    step = make_step(network)
    plda.eval()
    loss = plda.losses(step)["plda_adversarial"]
    (reversed_gradient,) = torch.autograd.grad(loss, step.features[-1])
    source = source_pixels(step.cams, step.tags)
    target = source_pixels(network(network.calls[-1][0])[1], step.tags)
    plain = adversarial_loss(plda.domain_classifier(step.features[-1]), assign_domains(source, target))
    (gradient,) = torch.autograd.grad(plain, step.features[-1])
    torch.testing.assert_close(reversed_gradient, -reversal_strength(0.5) * gradient)


def test_a_batch_without_tags_is_exactly_zero_with_a_gradient_path(network, plda):
    step = make_step(network, tags=[[0.0] * CLASSES] * 2)
    losses = plda.losses(step)
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    for parameter in [*network.parameters(), *plda.parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() == 0


def test_weights_scale_their_losses(network, plda):
    plda.eval()
    plain = plda.losses(make_step(network))
    assert all(loss.item() > 0 for loss in plain.values())
    weights = {"adversarial_weight": 2.0, "source_weight": 3.0, "target_weight": 4.0}
    plda.config = PldaConfig(hidden=[12, 10], pamr_iterations=1, pamr_dilations=[1], **weights)
    weighted = plda.losses(make_step(network))
    for name, weight in zip(plain, weights.values(), strict=True):
        torch.testing.assert_close(weighted[name], weight * plain[name])


def test_losses_are_float32_and_finite_in_autocast(network, plda):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = plda.losses(make_step(network))
    assert all(loss.dtype == torch.float32 and loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in [*network.parameters(), *plda.parameters()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_threshold": 1.0}, "source_threshold"),
        ({"background": 0.0}, "background"),
        ({"floor": -0.1}, "floor"),
        ({"dropout": 1.0}, "dropout"),
        ({"hidden": []}, "hidden"),
        ({"pamr_iterations": -1}, "pamr_iterations"),
        ({"pamr_dilations": [0]}, "pamr_dilations"),
        ({"target_weight": -1.0}, "target_weight"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PldaConfig(**options)


def test_source_and_target_come_from_the_maps_that_are_named(network, plda, monkeypatch):
    step = make_step(network)
    asked = []

    def localize(name, pixel_values, features, cams):
        asked.append((name, pixel_values))
        return -cams

    step.localize = localize
    plda.config = PldaConfig(maps="seam", hidden=[12, 10], pamr_iterations=1, pamr_dilations=[1])
    seen = []
    monkeypatch.setattr(
        plda_module, "source_pixels", lambda maps, *rest: seen.append(maps) or source_pixels(maps, *rest)
    )
    plda.losses(step)
    assert [name for name, _ in asked] == ["seam", "seam"]
    assert asked[0][1] is step.pixel_values and torch.equal(asked[1][1], network.calls[-1][0])
    torch.testing.assert_close(seen[0], -step.cams)
