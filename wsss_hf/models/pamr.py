"""PAMR, pixel-adaptive mask refinement (Araslanov & Roth, CVPR 2020): scores follow the colours of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def neighbours(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The 8 neighbours of every pixel at every dilation: one shifted view of `maps` after another.

    Args:
        maps: (B, K, H, W); beyond its border its edge pixels are repeated.
        dilations: distances to the neighbours in pixels.
    """
    height, width = maps.shape[-2:]
    reach = max(dilations)
    padded = F.pad(maps, [reach] * 4, mode="replicate")
    for dilation in dilations:
        for down in (-dilation, 0, dilation):
            for right in (-dilation, 0, dilation):
                if down or right:
                    top, left = reach + down, reach + right
                    yield padded[..., top : top + height, left : left + width]


def colour_affinity(images: Tensor, dilations: Sequence[int]) -> Tensor:
    """How much every neighbour looks like the pixel.

    Softmax, over all neighbours, of -mean over RGB of |difference| / (0.1 std). The standard deviation is the unbiased
    one over the 3x3 windows of all dilations taken together, per colour. So the affinity does not change when a colour
    is scaled or shifted: normalised images give the same one as images in [0, 1].

    Args:
        images: (B, 3, H, W).
        dilations: distances to the neighbours in pixels.

    Returns:
        (B, 8 * len(dilations), H, W) in the order of `neighbours`, summing to 1 over dimension 1.
    """
    # Moments of the differences to the centre are exactly zero in flat regions and need no copy of all neighbours.
    total, squares = torch.zeros_like(images), torch.zeros_like(images)
    for neighbour in neighbours(images, dilations):
        difference = neighbour - images
        total += difference
        squares += difference.square_()
    count = 9 * len(dilations)
    deviation = ((squares - total.square() / count) / (count - 1)).clamp(min=0).sqrt()
    scale = 0.1 * deviation + 1e-8
    distance = [(neighbour - images).abs_().div_(scale).mean(dim=1) for neighbour in neighbours(images, dilations)]
    return torch.stack(distance, dim=1).neg_().softmax(dim=1)


@torch.no_grad()
def pamr(
    images: Tensor, scores: Tensor, iterations: int = 10, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24)
) -> Tensor:
    """Refines `scores` by replacing every pixel, `iterations` times, with the affinity-weighted sum of its neighbours.

    Works at the resolution of the scores: images of another size are resized to it. Beyond a few copies of images and
    scores it needs memory for (B, 8 * len(dilations), h, w) affinities. Channels do not influence each other. No
    gradient flows.

    Args:
        images: (B, 3, H, W), in [0, 1] or normalised (see `colour_affinity`).
        scores: (B, K, h, w), any range.
        iterations: number of times.
        dilations: distances to the neighbours in pixels.

    Returns:
        (B, K, h, w) float32 refined scores, in the range of `scores`.

    Raises:
        ValueError: images and scores are not batches of the same length, or there is no dilation.
    """
    if images.ndim != 4 or scores.ndim != 4 or len(images) != len(scores):
        raise ValueError(
            "pamr: expected images (B, 3, H, W) and scores (B, K, h, w) of one batch size, "
            f"got {tuple(images.shape)} and {tuple(scores.shape)}"
        )
    if not dilations or min(dilations) < 1:
        raise ValueError(f"pamr: expected at least one dilation, each >= 1, got {list(dilations)}")
    images, scores = images.float(), scores.float()
    if images.shape[-2:] != scores.shape[-2:]:
        images = F.interpolate(images, size=scores.shape[-2:], mode="bilinear", align_corners=True)
    affinity = colour_affinity(images, dilations).unsqueeze(2).unbind(dim=1)
    for _ in range(iterations):
        refined = torch.zeros_like(scores)
        for weight, neighbour in zip(affinity, neighbours(scores, dilations), strict=True):
            refined.addcmul_(weight, neighbour)
        scores = refined
    return scores


def refine_pictures(
    pictures: Tensor, scores: Tensor, iterations: int = 10, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24)
) -> Tensor:
    """[`pamr`] of scores (B, K, H, W) in [0, 1], which stay there, by RGB images (B, H, W, 3) uint8 of their size."""
    refined = pamr(pictures.to(scores.device).permute(0, 3, 1, 2) / 255, scores, iterations, dilations)
    return refined.clamp(0, 1)  # the affinities sum to 1 up to rounding
