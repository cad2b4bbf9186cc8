from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.models.options import OptionError
from wsss_hf.training.losses import LOSSES, SegmentationObjective, build_loss


@pytest.fixture
def batch():
    """Log-probabilities (2, 3, 4, 5) and labels (2, 4, 5), some of them 255."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 4, 5), generator=generator)
    labels[:, 0] = 255
    return torch.randn(2, 3, 4, 5, generator=generator).log_softmax(dim=1), labels


def one_hot(labels, zero):
    """log q of one-hot labels (B, C, H, W), log 0 = `zero`."""
    return torch.where(F.one_hot(labels, 3).movedim(-1, 1).bool(), 0.0, zero)


def test_the_symmetric_loss_adds_the_reverse_direction(batch):
    log_p, labels = batch
    loss = build_loss("symmetric", {"alpha": 0.1, "beta": 2.0, "log_zero": -6.0})(log_p, labels)[:, 1:]
    log_p, labels = log_p[:, :, 1:], labels[:, 1:]
    reverse = -(log_p.exp() * one_hot(labels, -6.0)).sum(dim=1)
    torch.testing.assert_close(loss, 0.1 * F.nll_loss(log_p, labels, reduction="none") + 2.0 * reverse)


def test_the_bootstrapped_loss_half_believes_the_model(batch):
    log_p, labels = batch
    target = 0.7 * F.one_hot(labels[:, 1:], 3) + 0.3 * F.one_hot(log_p[:, :, 1:].argmax(dim=1), 3)
    expected = -(target.movedim(-1, 1) * log_p[:, :, 1:]).sum(dim=1)
    torch.testing.assert_close(build_loss("bootstrapped", {"beta": 0.7})(log_p, labels)[:, 1:], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_cost_nothing_and_wrong_labels_pull_no_harder_than_in_cross_entropy(batch, name):
    log_p, labels = batch
    assert (build_loss(name)(log_p, labels)[:, 0] == 0).all()
    logits = torch.tensor([8.0, 0.0, 0.0]).view(1, 3, 1, 1).requires_grad_()

    def pull(loss):
        value = loss(logits.log_softmax(dim=1), torch.ones(1, 1, 1, dtype=torch.long)).sum()
        return torch.autograd.grad(value, logits)[0].norm()

    assert pull(build_loss(name)) <= 1.01 * pull(build_loss("cross_entropy"))


class OneLayer(nn.Module):
    """Logits at half the size; with scales, those of two of them."""

    def __init__(self, scales=False):
        super().__init__()
        self.backbone = nn.Conv2d(3, 3, 2, stride=2)
        self.scales = scales

    def forward(self, pixel_values):
        logits = self.backbone(pixel_values)
        return SimpleNamespace(logits=logits, scale_logits=(logits, 2 * logits) if self.scales else None)


def test_pixels_weigh_as_much_as_they_are_trusted():
    torch.manual_seed(0)
    pixels, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    labels[0, :, 0], labels[1] = 255, torch.where(torch.rand(8, 8) < 0.5, 255, labels[1])
    confidence = torch.rand(2, 8, 8)
    model = OneLayer()
    objective = SegmentationObjective(model, build_loss("cross_entropy"))
    logits = F.interpolate(model(pixels).logits, (8, 8), mode="bilinear")
    per_pixel = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    torch.testing.assert_close(objective(pixels, labels).loss, per_pixel.sum() / (labels != 255).sum())
    trusted = confidence * (labels != 255)
    expected = (per_pixel * trusted).sum() / trusted.sum()
    torch.testing.assert_close(objective(pixels, labels, confidence=confidence).loss, expected)
    for weigh in (True, False):
        objective = SegmentationObjective(model, build_loss("cross_entropy"), weigh=weigh, min_confidence=0.4)
        counted = trusted.where(trusted >= 0.4, 0) if weigh else (trusted >= 0.4).float()
        expected = (per_pixel * counted).sum() / counted.sum()
        torch.testing.assert_close(objective(pixels, labels, confidence=confidence).loss, expected)
        torch.testing.assert_close(objective(pixels, labels, confidence=confidence).weight, counted.mean())
    assert objective(pixels, torch.full_like(labels, 255)).loss == 0
    assert objective(pixels, torch.full_like(labels, 255)).weight == 0
    assert objective(pixels, labels, confidence=torch.zeros(2, 8, 8)).loss == 0


def test_the_loss_is_summed_over_the_scales():
    torch.manual_seed(0)
    pixels, labels = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8))
    model = OneLayer(scales=True)
    logits = F.interpolate(model(pixels).logits, (8, 8), mode="bilinear")
    expected = 2 * F.cross_entropy(logits, labels) + F.cross_entropy(2 * logits, labels)
    objective = SegmentationObjective(model, build_loss("cross_entropy"))
    torch.testing.assert_close(objective(pixels, labels).loss, expected)


def test_plain_training_is_the_models_own_loss(resnet_config):
    config = SegmenterConfig(backbone_config=resnet_config, id2label={0: "background", 1: "cat"}, rates=[1, 2])
    model = Segmenter(config).eval()
    labels = torch.tensor([0, 1, 255]).repeat(1024)[: 32 * 64].view(1, 32, 64)
    pixels = torch.randn(1, 3, 32, 64)
    own = model(pixels, labels=labels).loss
    torch.testing.assert_close(SegmentationObjective(model, build_loss("cross_entropy"))(pixels, labels).loss, own)


def test_what_is_new_is_known_by_name():
    model = OneLayer()
    model.head = nn.Linear(1, 1, bias=False)
    assert SegmentationObjective(model, build_loss("cross_entropy")).new_parameters == {"model.head.weight"}
    objective = SegmentationObjective(model, build_loss("cross_entropy"), {"backbone.bias"})
    assert objective.new_parameters == {"model.backbone.bias"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("focal", {}, "segmenter.loss: 'focal': unknown; expected cross_entropy, symmetric or bootstrapped"),
        ("symmetric", {"gamma": 1}, "segmenter.loss_options.gamma: unknown; expected alpha, beta or log_zero"),
        ("cross_entropy", {"q": 1}, "segmenter.loss_options.q: unknown; expected none"),
        ("bootstrapped", {"beta": 2}, r"segmenter.loss_options.beta: expected a number in \[0, 1\], got 2"),
    ],
)
def test_unknown_losses_and_options_are_refused(name, options, message):
    with pytest.raises(OptionError, match=message):
        build_loss(name, options)
