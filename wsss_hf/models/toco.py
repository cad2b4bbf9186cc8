"""ToCo's patch-token contrast (Ru et al., "Token Contrast for Weakly-Supervised Semantic Segmentation", CVPR 2023).

The last layers of a vision transformer make all patches alike, and its CAM flat. An intermediate layer still tells
them apart: its own CAM says which pairs of patches belong together, and the last layer has to agree: section "Patch
Token Contrast"; where paper and released program differ, the program is followed.
ToCo's other half, class-token contrast, and its segmentation branch are not part of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .maps import IGNORE_INDEX
from .method_helpers import check_stages, min_max_normalize
from .methods import Method, TrainingStep, register_method
from .options import Options, option

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass
class TocoConfig(Options):
    """Options of the patch-token contrast; thresholds and weights are those of the released program."""

    stage: int = option(
        -2, "Backbone stage with a classifier of its own, whose CAM says which patches belong together.", at_most=-2
    )
    foreground: float = option(
        0.7, "A patch whose highest normalised CAM is above belongs to that class.", above=0, below=1
    )
    background: float = option(
        0.25,
        "A patch whose normalised CAMs are all at most this is background; the others are left out.",
        above=0,
        below=1,
    )
    classification_weight: float = option(1.0, "Weight of the intermediate layer's classification loss.", at_least=0)
    contrast_weight: float = option(0.2, "Weight of the patch-token contrast.", at_least=0)

    def check(self) -> None:
        if self.background > self.foreground:
            raise ValueError(f"background: expected at most foreground ({self.foreground:g}), got {self.background:g}")


def token_labels(cams: Tensor, tags: Tensor, foreground: float = 0.7, background: float = 0.25) -> Tensor:
    """Reliable labels of patches from a CAM.

    Args:
        cams: (B, C, h, w) CAM logits, min-max normalised here.
        tags: (B, C) float 0/1; other classes are not looked at.
        foreground: where the highest CAM is above, the patch is of its class.
        background: where it is at most this, the patch is background.

    Returns:
        (B, h, w) int64: 0 background, c + 1 class c, 255 neither, as everywhere in an image without tags.
    """
    highest, winners = (min_max_normalize(cams) * tags[:, :, None, None]).max(dim=1)
    labels = torch.where(highest > foreground, winners + 1, IGNORE_INDEX)
    labels = torch.where(highest <= background, 0, labels)
    return labels.masked_fill((tags.sum(dim=1) == 0)[:, None, None], IGNORE_INDEX)


def token_pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of patches must agree, and which must not.

    Args:
        labels: (B, h, w) from [`token_labels`].

    Returns:
        (B, N, N) bool, N = h·w: pairs of two different patches with one label, and pairs with different labels;
        patches without a label are in neither.
    """
    labels = labels.flatten(1)
    known = labels != IGNORE_INDEX
    both = known[:, :, None] & known[:, None]
    equal = labels[:, :, None] == labels[:, None]
    itself = torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    return both & equal & ~itself, both & ~equal


def patch_token_contrast(features: Tensor, alike: Tensor, unlike: Tensor) -> Tensor:
    """½ mean (1 − |cos|) over the pairs that must agree + ½ mean |cos| over those that must not.

    Each mean is over the pairs of the whole batch and one more that is right already, so that there may be none. The
    program's one more pair that must agree has a cosine of 0; that changes the value, not the gradient.

    Args:
        features: (B, D, h, w) last layer.
        alike, unlike: (B, N, N) bool from [`token_pairs`].

    Returns:
        float32 scalar in [0, 1].
    """
    unit = F.normalize(features.float().flatten(2), dim=1)
    cosines = (unit.transpose(1, 2) @ unit).abs()
    apart = (alike * (1 - cosines)).sum() / (alike.sum() + 1)
    near = (unlike * cosines).sum() / (unlike.sum() + 1)
    return (apart + near) / 2


@register_method("toco", TocoConfig)
class Toco(Method):
    """Patch-token contrast between an intermediate and the last stage.

    The intermediate CAM is that of one view, averaged to its logits like the model's own; the program takes the
    maximum, and labels patches by the mean of six views. It teaches the contrast, which never teaches it.
    """

    stages_suffice = True
    paper = "Ru, Zheng, Zhan and Du, “Token Contrast for Weakly-Supervised Semantic Segmentation”, CVPR 2023."

    def __init__(self, config: TocoConfig, backbone: Backbone, num_classes: int):
        super().__init__(config, backbone, num_classes)
        check_stages("toco.stage", [config.stage], backbone)
        self.classifier = nn.Conv2d(backbone.channels[config.stage], num_classes, kernel_size=1, bias=False)

    def reset_parameters(self):
        self.classifier.reset_parameters()

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        config, last = self.config, step.features[-1]
        cams = self.classifier(step.features[config.stage]).float()
        with torch.autocast(last.device.type, enabled=False):
            resized = F.interpolate(cams.detach(), size=last.shape[-2:], mode="bilinear", align_corners=False)
            labels = token_labels(resized, step.tags, config.foreground, config.background)
            contrast = patch_token_contrast(last, *token_pairs(labels))
            classification = F.multilabel_soft_margin_loss(cams.mean(dim=(2, 3)), step.tags.float())
        return {
            "toco_classification": config.classification_weight * classification,
            "toco_contrast": config.contrast_weight * contrast,
        }
