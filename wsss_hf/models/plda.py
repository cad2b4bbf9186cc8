"""PLDA, pixel-level domain adaptation (Du et al., TIP 2024): what a CAM misses of an object must look like the rest.

Inside one image and one class the discriminative pixels are the source domain, the other object pixels the target
domain. A domain classifier behind a gradient reversal makes their features alike, and confident pseudo labels of both
keep them discriminative. "Scores" and "logits" are (B, 1 + C, h, w) with the background in channel 0.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method_helpers import min_max_normalize
from .methods import Method, TrainingStep, register_method
from .options import Options, option
from .pamr import pamr

if TYPE_CHECKING:
    from .backbone import Backbone

# The values of a domain map.
SOURCE, TARGET, IGNORED = 0, 1, 255


@dataclass
class PldaConfig(Options):
    """Options of PLDA."""

    maps: str = option(
        "cam",
        "Whose localisation maps tell source from target: 'cam', or a method that is on and has maps, such as 'seam', "
        "which the authors put PLDA on.",
    )
    source_threshold: float = option(
        0.6, "Normalised map value above which a pixel belongs to its domain.", above=0, below=1
    )
    foreground: float = option(
        0.6, "Share of an object's highest score that its pseudo labels must exceed.", above=0, below=1
    )
    background: float = option(0.7, "The same for the background.", above=0, below=1)
    floor: float = option(0.2, "Score that every pseudo label must exceed.", at_least=0, below=1)
    hidden: list[int] | None = option(
        None,
        "Channels of the domain classifier's hidden layers; null takes, as on the paper's backbone with 4096, a "
        "quarter and an eighth of the backbone's channels, at least 64 and 32.",
        at_least=1,
    )
    dropout: float = option(0.5, "Probability of dropping a hidden channel's value.", at_least=0, below=1)
    pamr_iterations: int = option(
        10, "Refinement steps of the scores before they become pseudo labels; 0 refines nothing.", at_least=0
    )
    pamr_dilations: list[int] = option(
        [1, 2, 4, 8, 12, 24], "Distances to the neighbours in that refinement, in pixels of the maps.", at_least=1
    )
    adversarial_weight: float = option(1.0, "Weight of the adversarial loss.", at_least=0)
    source_weight: float = option(1.0, "Weight of the cross-entropy on source pixels.", at_least=0)
    target_weight: float = option(1.0, "Weight of the cross-entropy on target pixels.", at_least=0)


def source_pixels(maps: Tensor, tags: Tensor, threshold: float = 0.6) -> Tensor:
    """Pixels of each tagged class where its min-max normalised map exceeds the threshold.

    Args:
        maps: (B, C, h, w) CAMs, before or after the relu.
        tags: (B, C) 0/1.

    Returns:
        (B, C, h, w) bool.
    """
    return min_max_normalize(maps) * tags[:, :, None, None] > threshold


def assign_domains(source: Tensor, target: Tensor) -> Tensor:
    """Domain map of every class from its source and target pixels; the source wins where both claim a pixel.

    Args:
        source: (B, C, h, w) bool.
        target: (B, C, h, w) bool, source pixels of the image whose source pixels are hidden.

    Returns:
        (B, C, h, w) int64: 0 source, 1 target, 255 neither.
    """
    domains = torch.where(target, TARGET, IGNORED)
    return torch.where(source, SOURCE, domains)


def balance_weights(counts: Tensor) -> Tensor:
    """Weights that make rare kinds of pixels count more: (N - N_k) / (1 + N), 0 for a kind that is alone.

    Args:
        counts: (..., K) pixels of each kind in an image.

    Returns:
        (..., K) in [0, 1).
    """
    total = counts.sum(dim=-1, keepdim=True)
    return (total - counts) / (1 + total)


def pseudo_labels(scores: Tensor, foreground: float = 0.6, background: float = 0.7, floor: float = 0.2) -> Tensor:
    """Confident one-hot labels: a pixel belongs to the one channel whose score is near its highest in the image.

    Args:
        scores: (B, 1 + C, h, w) in [0, 1], background first, absent classes at 0.
        foreground: part of an object's highest score that must be exceeded.
        background: the same for the background.
        floor: score that must be exceeded in any case.

    Returns:
        (B, 1 + C, h, w) float 0/1; all channels are 0 where no channel or more than one claims the pixel.
    """
    highest = scores.amax(dim=(2, 3), keepdim=True)
    cuts = torch.cat([background * highest[:, :1], foreground * highest[:, 1:]], dim=1).clamp(min=floor)
    claimed = scores > cuts
    return (claimed & (claimed.sum(dim=1, keepdim=True) == 1)).to(scores.dtype)


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy on labelled pixels, weighted by the balance of the classes in each image; mean over all pixels.

    As in the released program, an image with labels of a single channel contributes nothing: its weight is 0.

    Args:
        logits: (B, 1 + C, h, w).
        labels: (B, 1 + C, h, w) one-hot 0/1, all 0 where a pixel has no label.

    Returns:
        float32 scalar.
    """
    weights = labels * balance_weights(labels.sum(dim=(2, 3)))[:, :, None, None]
    return -(weights * logits.float().log_softmax(dim=1)).sum(dim=1).mean()


class GradientReversal(torch.autograd.Function):
    """Identity whose gradient is multiplied by -strength."""

    @staticmethod
    def forward(ctx, features, strength):
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.strength * gradient, None


def gradient_reversal(features: Tensor, strength: float) -> Tensor:
    """`features` unchanged; the gradient that comes back is multiplied by `-strength`."""
    return GradientReversal.apply(features, strength)


def reversal_strength(progress: float) -> float:
    """Strength of the gradient reversal, 2 / (1 + exp(-10 progress)) - 1: from 0 to nearly 1 over the training."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def adversarial_loss(domain_logits: Tensor, domains: Tensor) -> Tensor:
    """Cross-entropy of each class's domain head on its source and target pixels.

    A pixel counts by 1 + exp(-entropy of its detached prediction) times the balance of the domains of its class in its
    image; mean over all pixels, sum over classes. A class with one domain only contributes nothing.

    Args:
        domain_logits: (B, C, 2, h, w).
        domains: (B, C, h, w) int64: 0 source, 1 target, 255 ignored.

    Returns:
        float32 scalar.
    """
    log_probabilities = domain_logits.float().log_softmax(dim=2)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=2).detach()
    members = torch.stack([domains == SOURCE, domains == TARGET], dim=2)
    balance = balance_weights(members.sum(dim=(3, 4)))[..., None, None]
    weights = members * balance * (1 + torch.exp(-entropy)).unsqueeze(2)
    return -(weights * log_probabilities).sum(dim=2).mean(dim=(0, 2, 3)).sum()


class DomainClassifier(nn.Module):
    """Tells source from target pixels of each class by their features: 1x1 convolutions and one 2-way head per class.

    Args:
        channels: channels D of the features.
        num_classes: number of object classes C.
        hidden: channels of the hidden layers.
        dropout: probability of dropping a value after each of them.
    """

    def __init__(self, channels: int, num_classes: int, hidden: list[int], dropout: float):
        super().__init__()
        self.num_classes = num_classes
        layers = []
        for inputs, outputs in zip([channels, *hidden], hidden, strict=False):
            layers += [nn.Conv2d(inputs, outputs, kernel_size=1), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        # The heads of all classes side by side: class c has the output channels 2c (source) and 2c + 1 (target).
        self.heads = nn.Conv2d(hidden[-1], 2 * num_classes, kernel_size=1)
        self.reset_parameters()

    def reset_parameters(self):
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
        # As if each class's head were a layer of its own.
        bound = math.sqrt(6 / (self.heads.in_channels + 2))
        nn.init.uniform_(self.heads.weight, -bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) features to (B, C, 2, h, w) logits of source and target."""
        return self.heads(self.layers(features)).unflatten(1, (self.num_classes, 2))


def with_background(cams: Tensor) -> Tensor:
    """(B, C, h, w) CAM logits to (B, 1 + C, h, w) logits whose background is 1 everywhere."""
    return torch.cat([torch.ones_like(cams[:, :1]), cams], dim=1)


@register_method("plda", PldaConfig)
class Plda(Method):
    """PLDA on any CAM.

    Every step runs the network once more, without gradient, on the images without their source pixels. The adversarial
    loss trains the domain classifier and, reversed, the network up to its last features; the two cross-entropies train
    the network through its CAM. An image without tags contributes exact zeros.
    """

    leads = True
    scheduled = True  # the gradient reversal grows
    paper = (
        "Du et al., “Pixel-Level Domain Adaptation: A New Perspective for Enhancing Weakly Supervised Semantic "
        "Segmentation”, TIP 2024."
    )

    def __init__(self, config: PldaConfig, backbone: Backbone, num_classes: int):
        super().__init__(config, backbone, num_classes)
        channels = backbone.channels[-1]
        if config.hidden is None:
            self.config = dataclasses.replace(config, hidden=[max(64, channels // 4), max(32, channels // 8)])
        self.domain_classifier = DomainClassifier(channels, num_classes, self.config.hidden, config.dropout)

    def reset_parameters(self):
        self.domain_classifier.reset_parameters()

    @torch.no_grad()
    def confident_labels(self, pixel_values: Tensor, cams: Tensor, tags: Tensor, pixels: Tensor) -> Tensor:
        """(B, 1 + C, h, w) pseudo labels of the objects, each only at its `pixels` (B, C, h, w) bool."""
        config = self.config
        scores = with_background(cams).softmax(dim=1)
        # Only the background and tagged classes are refined: the first places of an order that begins with them.
        present = F.pad(tags, (1, 0), value=1.0)
        count = int(present.sum(dim=1).amax())
        chosen = present.argsort(dim=1, descending=True, stable=True)[:, :count, None, None]
        chosen = chosen.expand(-1, -1, *scores.shape[2:])
        # The affinities do not depend on the normalisation, and a hidden pixel is a zero here.
        refined = pamr(pixel_values, scores.gather(1, chosen), config.pamr_iterations, config.pamr_dilations)
        scores = torch.zeros_like(refined[:, :1]).expand_as(scores).scatter(1, chosen, refined)
        scores = scores * present[:, :, None, None]
        labels = pseudo_labels(scores, config.foreground, config.background, config.floor)
        return labels * F.pad(pixels, (0, 0, 0, 0, 1, 0))

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        losses = self.losses_of_view(step)
        if step.second_view is None:
            return losses
        second = self.losses_of_view(step.second_view)
        return {name: (loss + second[name]) / 2 for name, loss in losses.items()}

    def losses_of_view(self, step: TrainingStep) -> dict[str, Tensor]:
        """The losses on the images of `step` alone."""
        config, tags, cams = self.config, step.tags.float(), step.cams.float()
        with torch.no_grad():
            maps = step.localize(config.maps, step.pixel_values, step.features, cams)
            source = source_pixels(maps, tags, config.source_threshold)
            hidden = F.interpolate(source.any(dim=1, keepdim=True).float(), size=step.pixel_values.shape[-2:])
            masked_values = step.pixel_values * (1 - hidden).to(step.pixel_values.dtype)
            masked_features, masked_cams = step.classify(masked_values)
            masked_cams = masked_cams.float()
            masked_maps = step.localize(config.maps, masked_values, masked_features, masked_cams)
            target = source_pixels(masked_maps, tags, config.source_threshold)
        # Both at once: on small maps the number of operations costs more than their size.
        views = (step.pixel_values, masked_values), (cams, masked_cams), (tags, tags), (source, target)
        source_labels, target_labels = self.confident_labels(*(torch.cat(view) for view in views)).chunk(2)

        reversed_features = gradient_reversal(step.features[-1], reversal_strength(step.progress))
        adversarial = adversarial_loss(self.domain_classifier(reversed_features), assign_domains(source, target))
        logits = with_background(cams)
        return {
            "plda_adversarial": config.adversarial_weight * adversarial,
            "plda_source_ce": config.source_weight * balanced_cross_entropy(logits, source_labels),
            "plda_target_ce": config.target_weight * balanced_cross_entropy(logits, target_labels),
        }
