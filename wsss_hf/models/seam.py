"""SEAM, the self-supervised equivariant attention mechanism (Wang et al., CVPR 2020): CAMs that scale with the image.

A second, smaller view of the image must give the same CAM, and a pixel correlation module (PCM) refines the CAM of
each view by the affinities of its pixels. "Scores" are (B, 1 + C, h, w) maps with the background in channel 0.
Where paper and released program differ, the program is followed: no gradient flows into what PCM reads, so the cross
regularisation and the lowest-quarter loss train PCM alone, while classification and equivariance train the network.
All losses are of maps enlarged to the size of the images that they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method_helpers import check_stages, min_max_normalize, patch_size, smaller_view
from .methods import Method, TrainingStep, register_method
from .options import Options, option

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass
class SeamConfig(Options):
    """Options of SEAM."""

    scale: float = option(
        0.3,
        "Size of the second view relative to the image; where the contrast is on, its scale counts and this one does "
        "not: the network sees one second view, that of the contrast.",
        above=0,
        below=1,
    )
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
        1.0, "Weight of the second view in the classification loss, a weighted mean; the first one's is 1.", at_least=0
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

    A value below `eps` is 0.

    Args:
        cams: (B, C, h, w) CAM logits.

    Returns:
        (B, 1 + C, h, w) in [0, 1], background first.
    """
    objects = (cams - eps).relu() / (cams.relu().amax(dim=(2, 3), keepdim=True) + eps)
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


def equivariant_cross_regularization(
    scores: Tensor, refined: Tensor, fraction: float = 0.2, channels: int | None = None
) -> Tensor:
    """Equivariant cross regularisation: one view's refined scores must match the other view's CAM.

    Args:
        scores: (B, 1 + C, h, w) scores of one view, the target: detached and one-hot suppressed here.
        refined: (B, 1 + C, h, w) refined scores of the other view.
        fraction: part of each image's differences that counts, the largest ones (hard example mining).
        channels: the differences are those of so many channels; the ones that are not given are 0. None: 1 + C.

    Returns:
        scalar, the mean of these |differences|.
    """
    differences = (max_one_hot(scores.detach()) - refined).abs().flatten(1)
    total = differences.shape[1] // refined.shape[1] * (channels or refined.shape[1])
    count = max(1, int(fraction * total))
    return differences.topk(min(count, differences.shape[1]), dim=1).values.sum(dim=1).mean() / count


def smallest_quarter_mean(maps: Tensor) -> Tensor:
    """Mean over the quarter of each image's pixels where no object is strong: in most images these are background.

    Args:
        maps: (B, C, h, w) non-negative object maps.

    Returns:
        scalar; its gradient pushes the strongest object of the weakest pixels to 0.
    """
    strongest = maps.amax(dim=1).flatten(1)
    return strongest.topk(max(1, strongest.shape[1] // 4), dim=1, largest=False).values.mean()


def enlarged_mean(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C) spatial means of maps (B, C, h, w) as [`resize`] enlarges them, which it need not do for that."""
    rows, columns = (
        F.interpolate(torch.eye(old, device=maps.device)[None], new, mode="linear", align_corners=True)[0].mean(dim=1)
        for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    return (maps.float() * rows[:, None] * columns).sum(dim=(2, 3))


def losses_of_maps(
    cams: Sequence[Tensor],
    refined: Sequence[Tensor],
    tags: Tensor,
    cross_fraction: float = 0.2,
    num_classes: int | None = None,
) -> dict[str, Tensor]:
    """What SEAM asks of the maps of both views, each at the size of its image.

    Maps are min-max normalised at their own size; those of the first view are then brought to the size of the second.
    An image without tags contributes exact zeros.

    Args:
        cams: (B, C, H, W) CAM logits of the image, and (B, C, h, w) those of its smaller view.
        refined: (B, 1 + C, H, W) and (B, 1 + C, h, w) refined scores, background first.
        tags: (B, C) 0/1.
        cross_fraction: see [`equivariant_cross_regularization`].
        num_classes: number of classes, where some that an image does not have are left out of its maps and tags; they
            add nothing to the losses, but are counted in their means. None: C.

    Returns:
        `equivariance`; `cross`, the sum over both directions; `min`, the mean of both views.
    """
    size = cams[1].shape[-2:]
    present = tags.to(cams[0].dtype)[:, :, None, None]
    any_tag = present.amax(dim=1, keepdim=True)
    num_classes = tags.shape[1] if num_classes is None else num_classes

    objects = [resize(min_max_normalize(maps), size) * present for maps in cams]
    scores = [torch.cat([any_tag - maps.amax(dim=1, keepdim=True), maps], dim=1) for maps in objects]
    with_tags = torch.cat([any_tag, present], dim=1)
    normalized = [resize(min_max_normalize(maps), size) * with_tags for maps in refined]
    cross = [
        equivariant_cross_regularization(target, maps, cross_fraction, 1 + num_classes)
        for target, maps in zip(reversed(scores), normalized, strict=True)
    ]
    return {
        "equivariance": equivariance_loss(*objects) * tags.shape[1] / num_classes,
        "cross": cross[0] + cross[1],
        "min": torch.stack([smallest_quarter_mean(maps[:, 1:] * present) for maps in refined]).mean(),
    }


def _channels(maps: Tensor, indices: Tensor) -> Tensor:
    """(B, K, h, w): the channels `indices` (B, K) of each image's maps."""
    return maps.gather(1, indices[:, :, None, None].expand(-1, -1, *maps.shape[2:]))


@register_method("seam", SeamConfig)
class Seam(Method):
    """SEAM on any backbone with at least as many stages as PCM reads.

    The classification loss becomes the mean of both views.
    """

    stages_suffice = True
    paper = (
        "Wang, Zhang, Kan, Shan and Chen, “Self-supervised Equivariant Attention Mechanism for Weakly Supervised "
        "Semantic Segmentation”, CVPR 2020."
    )

    def __init__(self, config: SeamConfig, backbone: Backbone, num_classes: int):
        super().__init__(config, backbone, num_classes)
        check_stages("seam.stages", config.stages, backbone)
        self.patch_size = patch_size(backbone)
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

    def second_view(self, pixel_values: Tensor) -> Tensor:
        return smaller_view(pixel_values, self.config.scale, self.patch_size)

    def at_image_size(self, step: TrainingStep, classes: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) CAM logits and (B, 1 + K, H, W) refined scores of one view, of the `classes` (B, K)."""
        size = step.pixel_values.shape[-2:]
        refined = self.refine(step.pixel_values, step.features, step.cams)
        channels = F.pad(classes + 1, (1, 0))
        return resize(_channels(step.cams.float(), classes), size), resize(_channels(refined, channels), size)

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        config, tags = self.config, step.tags.float()
        if step.second_view is None:
            raise ValueError("second_view: expected the view of the step that SEAM's `second_view` gives, got none")
        views = step, step.second_view
        classification, second_classification = (
            F.multilabel_soft_margin_loss(enlarged_mean(view.cams, view.pixel_values.shape[-2:]), tags)
            for view in views
        )
        # Only maps of tagged classes are enlarged: the first places of an order that begins with them.
        most = max(1, int(tags.sum(dim=1).amax()))
        classes = tags.argsort(dim=1, descending=True, stable=True)[:, :most]
        cams, refined = zip(*(self.at_image_size(view, classes) for view in views), strict=True)
        losses = losses_of_maps(cams, refined, tags.gather(1, classes), config.cross_fraction, self.num_classes)
        weight = config.classification_weight
        return {
            "classification": (classification + weight * second_classification) / (1 + weight),
            "seam_equivariance": config.equivariance_weight * losses["equivariance"],
            "seam_cross": config.cross_weight * losses["cross"],
            "seam_min": config.min_weight * losses["min"],
        }

    def maps(self, step: TrainingStep) -> Tensor:
        """(B, C, h, w) float32 refined CAMs in [0, 1]."""
        return self.refine(step.pixel_values, step.features, step.cams)[:, 1:]
