import pytest
import torch
from torch import nn

from wsss_hf.models.methods import TrainingStep
from wsss_hf.models.toco import Toco, TocoConfig, patch_token_contrast, token_labels, token_pairs

CLASSES = 3
TAGS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


class Backbone:
    channels = [4, 6, 8]
    strides = [8, 8, 16]


def make_step(size=(4, 5), tags=TAGS):
    generator = torch.Generator().manual_seed(0)
    features = tuple(
        torch.randn(len(tags), channels, scale * size[0], scale * size[1], generator=generator, requires_grad=True)
        for channels, scale in zip(Backbone.channels, (2, 2, 1), strict=True)
    )
    cams = torch.randn(len(tags), CLASSES, *size, generator=generator)
    pixels = torch.zeros(len(tags), 3, 16 * size[0], 16 * size[1])
    return TrainingStep(pixels, pixels, tags, features, cams, progress=0.5, classify=lambda pixel_values: None)


@pytest.fixture
def toco():
    torch.manual_seed(1)
    return Toco(TocoConfig(), Backbone(), CLASSES)


def test_labels_are_those_of_the_strongest_tagged_class_where_it_is_strong_or_weak():
    cams = torch.zeros(1, 3, 1, 6)
    cams[0, 0, 0] = torch.tensor([0.0, 10.0, 8.0, 5.0, 2.0, -3.0])
    cams[0, 1, 0] = torch.tensor([0.0, 0.0, 4.0, 4.0, 0.0, 0.0])
    cams[0, 2, 0] = torch.tensor([9.0, 9.0, 9.0, 9.0, 0.0, 9.0])  # not tagged
    tags = torch.tensor([[1.0, 1.0, 0.0]])
    # Class 1 is at its maximum at the third and fourth place, where class 0 has 0.8 and 0.5 of its own.
    assert token_labels(cams, tags).flatten().tolist() == [0, 1, 2, 2, 0, 0]
    only = torch.tensor([[1.0, 0.0, 0.0]])
    assert token_labels(cams, only).flatten().tolist() == [0, 1, 1, 255, 0, 0]
    assert token_labels(cams, only, foreground=0.9, background=0.1).flatten().tolist() == [0, 1, 255, 255, 255, 0]


def test_pairs_and_loss_are_those_of_plain_loops():
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([[[0, 1, 255], [1, 2, 0]], [[255, 255, 3], [3, 0, 3]]])
    features = torch.randn(2, 5, 2, 3, generator=generator)
    alike, unlike = token_pairs(labels)
    agree, differ = [], []
    for image in range(2):
        flat, tokens = labels[image].flatten().tolist(), features[image].flatten(1).T
        for i in range(6):
            for j in range(6):
                cosine = torch.cosine_similarity(tokens[i], tokens[j], dim=0).abs().item()
                known = 255 not in (flat[i], flat[j]) and i != j
                assert alike[image, i, j].item() == (known and flat[i] == flat[j])
                assert unlike[image, i, j].item() == (known and flat[i] != flat[j])
                if alike[image, i, j]:
                    agree.append(cosine)
                if unlike[image, i, j]:
                    differ.append(cosine)
    assert len(agree) == 4 + 6 and len(differ) == 16 + 6
    # The program: ½ (1 − Σ/(n + 1)) + ½ Σ/(m + 1); our value lacks the constant ½/(n + 1).
    program = 0.5 * (1 - sum(agree) / (len(agree) + 1)) + 0.5 * sum(differ) / (len(differ) + 1)
    loss = patch_token_contrast(features, alike, unlike)
    assert loss.item() == pytest.approx(program - 0.5 / (len(agree) + 1), rel=1e-5)


def test_the_loss_falls_where_labels_are_told_apart_and_vanishes_without_pairs():
    labels = torch.tensor([[[1, 1, 0, 0]]])
    pairs = token_pairs(labels)
    apart = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])[None, :, None]
    alike = torch.ones(1, 2, 1, 4)
    mixed = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])[None, :, None]
    losses = [patch_token_contrast(features, *pairs).item() for features in (apart, alike, mixed)]
    assert losses[0] == pytest.approx(0.0, abs=1e-6) and losses[0] < losses[1] < losses[2]
    none = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert patch_token_contrast(mixed, none, none).item() == 0


def test_the_intermediate_cam_learns_from_tags_alone_and_teaches_the_last_layer(toco):
    step = make_step()
    losses = toco.losses(step)
    losses["toco_contrast"].backward()
    assert toco.classifier.weight.grad is None
    assert [features.grad is not None for features in step.features] == [False, False, True]
    step = make_step()
    toco.losses(step)["toco_classification"].backward()
    assert toco.classifier.weight.grad.abs().sum() > 0
    assert [features.grad is not None for features in step.features] == [False, True, False]
    cams = toco.classifier(step.features[-2])
    expected = nn.functional.multilabel_soft_margin_loss(cams.mean(dim=(2, 3)), TAGS)
    torch.testing.assert_close(losses["toco_classification"], expected)
    small = nn.functional.interpolate(cams, size=(4, 5), mode="bilinear", align_corners=False)
    contrast = patch_token_contrast(step.features[-1], *token_pairs(token_labels(small, TAGS)))
    torch.testing.assert_close(losses["toco_contrast"], 0.2 * contrast)


def test_weights_scale_their_losses_and_an_image_without_tags_adds_no_contrast(toco):
    plain = toco.losses(make_step())
    toco.config = TocoConfig(classification_weight=2.0, contrast_weight=0.6)
    weighted = toco.losses(make_step())
    torch.testing.assert_close(weighted["toco_classification"], 2 * plain["toco_classification"])
    torch.testing.assert_close(weighted["toco_contrast"], 3 * plain["toco_contrast"])
    assert toco.losses(make_step(tags=torch.zeros_like(TAGS)))["toco_contrast"].item() == 0


def test_the_intermediate_stage_is_a_choice():
    assert Toco(TocoConfig(stage=-3), Backbone(), CLASSES).classifier.in_channels == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": -1}, "stage: expected a whole number <= -2, got -1"),
        ({"background": 0.8}, r"background: expected at most foreground \(0.7\), got 0.8"),
        ({"foreground": 1.0}, "foreground"),
        ({"contrast_weight": -1.0}, "contrast_weight"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TocoConfig(**options)


def test_a_stage_that_the_backbone_lacks_is_named():
    with pytest.raises(ValueError, match=r"toco.stage: expected stages of this backbone \(-3 to 2\), got -4"):
        Toco(TocoConfig(stage=-4), Backbone(), CLASSES)
