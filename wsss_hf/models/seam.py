"""SEAM, the self-supervised equivariant attention mechanism (Wang et al., CVPR 2020): CAMs that scale with the image.

A second, smaller view of the image must give the same CAM, and a pixel correlation module (PCM) refines the CAM of
each view by the affinities of its pixels. "Scores" are (B, 1 + C, h, w) maps with the background in channel 0.
Where paper and released program differ, the program is followed: no gradient flows into what PCM reads, so the cross
regularisation and the lowest-quarter loss train PCM alone, while classification and equivariance train the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method_helpers import check_stages, min_max_normalize
from .methods import Method, TrainingStep, register_method
from .options import Options, option

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass
class SeamConfig(Options):
    """Options of SEAM."""

    scale: float = option(0.3, "Size of the second view relative to the image.", above=0, below=1)
    stages: list[int] = option(
        [-2, -1],
        "Backbone stages that PCM reads (negative ones count from the last, which feeds the classifier).",
    )
    projections: list[int] = option(
        [64, 128], "Channels that the 1×1 convolution after each of these stages gives.", at_least=1
    )
    embedding: int = option(192, "Channels of the pixel embedding whose correlations are the affinities.", at_least=1)
    cross_fraction: float = option(
        0.2, "Share of the largest differences that the cross regularisation counts.", above=0, at_most=1
    )
    classification_weight: float = option(
        1.0, "Weight of the second view's classification loss (the first view's is the model's own).", at_least=0
    )
    equivariance_weight: float = option(1.0, "Weight of the equivariance loss.", at_least=0)
    cross_weight: float = option(1.0, "Weight of the equivariant cross regularisation.", at_least=0)
    min_weight: float = option(1.0, "Weight of the lowest-quarter loss.", at_least=0)

    def check(self) -> None:
        if len(self.stages) != len(self.projections):
            raise ValueError(
                f"projections: expected one number for each of stages {self.stages}, got {self.projections}"
            )


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resizing of (B, K, h, w) to `size`, corner on corner, so that images and maps of both views align."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def max_one_hot(scores: Tensor) -> Tensor:
    """One-hot suppression: at each pixel only the strongest object keeps its score, the other objects get 0.

    Objects are exclusive, so a weaker second activation is an error that must neither spread through the affinities
    nor become a target. The background channel is left as it is; exact ties keep all their scores.

    Args:
        scores: (B, 1 + C, h, w), background first.

    Returns:
        (B, 1 + C, h, w).
    """
    background, objects = scores[:, :1], scores[:, 1:]
    strongest = objects.amax(dim=1, keepdim=True)
    return torch.cat([background, torch.where(objects < strongest, 0, objects)], dim=1)


def suppressed_scores(cams: Tensor, eps: float = 1e-5) -> Tensor:
    """What PCM refines: relu'd CAMs over their maxima, one minus the strongest as background, one-hot suppressed.

    Args:
        cams: (B, C, h, w) CAM logits.

    Returns:
        (B, 1 + C, h, w) in [0, 1], background first.
    """
    objects = cams.relu()
    objects = objects / (objects.amax(dim=(2, 3), keepdim=True) + eps)
    return max_one_hot(torch.cat([1 - objects.amax(dim=1, keepdim=True), objects], dim=1))


def pixel_correlation(cams: Tensor, features: Tensor, eps: float = 1e-5) -> Tensor:
    """The pixel correlation module: every pixel becomes the mean of all pixels, weighted by their affinity to it.

    The affinity of two pixels is relu(cosine of their features); each column of the affinity matrix sums to 1.

    Args:
        cams: (B, K, h, w) maps to refine.
        features: (B, D, h, w) pixel embedding, of any length.

    Returns:
        (B, K, h, w) float32 refined maps, non-negative where `cams` is.
    """
    unit = F.normalize(features.float().flatten(2), dim=1)
    affinity = (unit.transpose(1, 2) @ unit).relu()
    # Dividing the result is dividing the columns of the (hw, hw) matrix, without a second matrix of that size.
    columns = affinity.sum(dim=1, keepdim=True, dtype=torch.float32) + eps
    refined = (cams.float().flatten(2) @ affinity).float() / columns
    return refined.unflatten(2, cams.shape[-2:])


def equivariance_loss(first: Tensor, second: Tensor) -> Tensor:
    """Equivariant regularisation: mean |first - second| of the object maps (B, C, h, w) of both views."""
    return (first - second).abs().mean()


def equivariant_cross_regularization(scores: Tensor, refined: Tensor, fraction: float = 0.2) -> Tensor:
    """Equivariant cross regularisation: one view's refined scores must match the other view's CAM.

    Args:
        scores: (B, 1 + C, h, w) scores of one view, the target: detached and one-hot suppressed here.
        refined: (B, 1 + C, h, w) refined scores of the other view.
        fraction: part of each image's differences that counts, the largest ones (hard example mining).

    Returns:
        scalar, the mean of these |differences|.
    """
    differences = (max_one_hot(scores.detach()) - refined).abs().flatten(1)
    return differences.topk(max(1, int(fraction * differences.shape[1])), dim=1).values.mean()


def smallest_quarter_mean(maps: Tensor) -> Tensor:
    """Mean over the quarter of each image's pixels where no object is strong: in most images these are background.

    Args:
        maps: (B, C, h, w) non-negative object maps.

    Returns:
        scalar; its gradient pushes the strongest object of the weakest pixels to 0.
    """
    strongest = maps.amax(dim=1).flatten(1)
    return strongest.topk(max(1, strongest.shape[1] // 4), dim=1, largest=False).values.mean()


@register_method("seam", SeamConfig)
class Seam(Method):
    """SEAM on any backbone with at least as many stages as PCM reads.

    An image without tags contributes exact zeros to all losses but the classification.
    """

    paper = (
        "Wang, Zhang, Kan, Shan and Chen, “Self-supervised Equivariant Attention Mechanism for Weakly Supervised "
        "Semantic Segmentation”, CVPR 2020."
    )

    def __init__(self, config: SeamConfig, backbone: Backbone, num_classes: int):
        super().__init__(config, backbone, num_classes)
        check_stages("seam", config.stages, backbone)
        self.stride = backbone.strides[-1]
        self.projections = nn.ModuleList(
            nn.Conv2d(backbone.channels[stage], channels, kernel_size=1, bias=False)
            for stage, channels in zip(config.stages, config.projections, strict=True)
        )
        # Input channels in the order of the released weights: RGB, then the stages.
        self.embedding = nn.Conv2d(3 + sum(config.projections), config.embedding, kernel_size=1, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        projection: Any
        for projection in self.projections:
            nn.init.kaiming_normal_(projection.weight)
        nn.init.xavier_uniform_(self.embedding.weight, gain=4)

    def refine(self, pixel_values: Tensor, features: tuple[Tensor, ...], cams: Tensor) -> Tensor:
        """PCM on one view: (B, 1 + C, h, w) refined scores, background first; gradient only into the projections."""
        size = cams.shape[-2:]
        embedded = [resize(pixel_values, size)]
        for stage, projection in zip(self.config.stages, self.projections, strict=True):
            embedded.append(resize(projection(features[stage].detach()).relu(), size))
        return pixel_correlation(suppressed_scores(cams.detach().float()), self.embedding(torch.cat(embedded, dim=1)))

    def smaller_view(self, pixel_values: Tensor) -> Tensor:
        """The second view, in whole strides of the backbone: a part of a stride would have no place on the map."""
        height, width = pixel_values.shape[-2:]
        rows = max(1, round(height * self.config.scale / self.stride))
        columns = max(1, round(width * self.config.scale / self.stride))
        return resize(pixel_values, (rows * self.stride, columns * self.stride))

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        config = self.config
        view = self.smaller_view(step.pixel_values)
        view_features, view_cams = step.classify(view)
        cams, view_cams = step.cams.float(), view_cams.float()
        size = view_cams.shape[-2:]

        tags = step.tags.float()[:, :, None, None]
        any_tag = tags.amax(dim=1, keepdim=True)
        present = torch.cat([any_tag, tags], dim=1)

        refined = self.refine(step.pixel_values, step.features, cams)
        view_refined = self.refine(view, view_features, view_cams)
        lowest = smallest_quarter_mean(refined[:, 1:] * tags) + smallest_quarter_mean(view_refined[:, 1:] * tags)

        objects = resize(min_max_normalize(cams), size) * tags
        view_objects = min_max_normalize(view_cams) * tags
        refined = resize(min_max_normalize(refined), size) * present
        view_refined = min_max_normalize(view_refined) * present
        scores = torch.cat([any_tag - objects.amax(dim=1, keepdim=True), objects], dim=1)
        view_scores = torch.cat([any_tag - view_objects.amax(dim=1, keepdim=True), view_objects], dim=1)
        cross = equivariant_cross_regularization(view_scores, refined, config.cross_fraction)
        cross = cross + equivariant_cross_regularization(scores, view_refined, config.cross_fraction)

        classification = F.multilabel_soft_margin_loss(view_cams.mean(dim=(2, 3)), step.tags.float())
        return {
            "seam_classification": config.classification_weight * classification,
            "seam_equivariance": config.equivariance_weight * equivariance_loss(objects, view_objects),
            "seam_cross": config.cross_weight * cross,
            "seam_min": config.min_weight * lowest / 2,
        }

    def maps(self, step: TrainingStep) -> Tensor:
        """(B, C, h, w) float32 refined CAMs in [0, 1]."""
        return self.refine(step.pixel_values, step.features, step.cams)[:, 1:]
