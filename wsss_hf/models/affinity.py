"""Affinities between neighbouring positions, how they are learnt from label maps, and random walks along them.

IRN (Ahn, Cho, Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019) and
AffinityNet (Ahn, Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision", CVPR 2018).

Affinities are symmetric and reach a few positions far, so they are held as a stencil: (B, P, h, w), the affinity of
each position with the P positions that lie at [`offsets`] from it, 0 where these lie outside. P grows with the square
of the radius; memory and time are linear in h·w, where a matrix of all pairs grows with its square.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

_EPSILON = 1e-5


@lru_cache
def offsets(radius: int) -> tuple[tuple[int, int], ...]:
    """(down, right) of the neighbours nearer than `radius`, one of each opposite two, so that a pair counts once."""
    right = [(0, x) for x in range(1, radius)]
    below = [(y, x) for y in range(1, radius) for x in range(1 - radius, radius)]
    return tuple(right + [(y, x) for y, x in below if y * y + x * x < radius * radius])


@lru_cache
def path(down: int, right: int) -> tuple[tuple[int, int], ...]:
    """The positions on the straight way to a neighbour, both ends included: those nearer than 1 to the line."""
    length = down * down + right * right
    columns = range(min(0, right), max(0, right) + 1)
    return tuple((y, x) for y in range(down + 1) for x in columns if (down * x - right * y) ** 2 < length)


def _shifted(maps: Tensor, down: int, right: int, reach: int, size: tuple[int, int]) -> Tensor:
    """A view of maps that are padded by `reach` at all sides: at each position the value that lies at the offset."""
    height, width = size
    return maps[..., reach + down : reach + down + height, reach + right : reach + right + width]


def boundary_affinity(boundary: Tensor, radius: int) -> Tensor:
    """IRN, equation 3: 1 - the largest boundary on the straight way between two positions.

    Args:
        boundary: (B, h, w) in [0, 1]; outside it is 1.

    Returns:
        (B, P, h, w) in [0, 1].
    """
    reach, size = radius - 1, (boundary.shape[-2], boundary.shape[-1])
    padded = F.pad(boundary, [reach] * 4, value=1.0)
    largest = [
        torch.stack([_shifted(padded, y, x, reach, size) for y, x in path(*offset)]).amax(dim=0)
        for offset in offsets(radius)
    ]
    return 1 - torch.stack(largest, dim=1)


def feature_affinity(features: Tensor, radius: int) -> Tensor:
    """AffinityNet, equation 1: exp(-mean over channels of |difference|).

    Args:
        features: (B, D, h, w).

    Returns:
        (B, P, h, w) in [0, 1].
    """
    reach, size = radius - 1, (features.shape[-2], features.shape[-1])
    padded = F.pad(features, [reach] * 4)
    inside = F.pad(features.new_ones(size), [reach] * 4)
    affinities = [
        torch.exp(-(_shifted(padded, y, x, reach, size) - features).abs().mean(dim=1))
        * _shifted(inside, y, x, reach, size)
        for y, x in offsets(radius)
    ]
    return torch.stack(affinities, dim=1)


def affinity_losses(affinity: Tensor, labels: Tensor, radius: int) -> dict[str, Tensor]:
    """The loss of IRN (equations 5 to 7) and of AffinityNet (equations 6 to 8), which is the same.

    Pairs of equal labels learn an affinity of 1, background and foreground averaged separately, those of different
    ones 0; a pair with an ignored position says nothing. As in both programs, pairs count where all neighbours of
    their first position lie inside; all do where no position is that far from the border.

    Args:
        affinity: (B, P, h, w).
        labels: (B, h, w), 0 background, c + 1 class c, 255 ignore.

    Returns:
        background / 4, foreground / 4 and different / 2, whose sum is the loss. A kind of pair that is not there
        contributes 0.
    """
    reach = radius - 1
    height, width = labels.shape[-2:]
    padded = F.pad(labels, [reach] * 4, value=255)
    inner = (..., slice(0, height - reach), slice(reach, width - reach))
    if height <= reach or width <= 2 * reach:
        inner = (..., slice(None), slice(None))
    other = torch.stack([_shifted(padded, y, x, reach, (height, width)) for y, x in offsets(radius)], dim=1)[inner]
    affinity, label = affinity[inner].float(), labels[:, None][inner]
    known = (label != 255) & (other != 255)
    near, far = -(affinity + _EPSILON).log(), -(1 + _EPSILON - affinity).log()

    def mean(losses: Tensor, pairs: Tensor) -> Tensor:
        return (losses * pairs).sum() / (pairs.sum() + _EPSILON)

    equal = known & (label == other)
    return {
        "background_pairs": mean(near, equal & (label == 0)) / 4,
        "foreground_pairs": mean(near, equal & (label != 0)) / 4,
        "different_pairs": mean(far, known & (label != other)) / 2,
    }


def random_walk(maps: Tensor, affinity: Tensor, radius: int, power: float, steps: int) -> Tensor:
    """Maps after a random walk along affinities (IRN, section 5; AffinityNet, section 3.3).

    At each step the value of a position becomes the mean of its own and its neighbours' values, each weighted by its
    affinity to the power `power`; a position's own affinity is 1. The released programs square the matrix of all
    pairs n times, which is 2ⁿ of these steps.

    Args:
        maps: (B, K, h, w), any range.
        affinity: (B, P, h, w) in [0, 1].
        radius: that of the affinities.
        power: larger values stop the walk at weaker boundaries.
        steps: how many.

    Returns:
        (B, K, h, w) float32 in the range of `maps`.
    """
    reach, size = radius - 1, (maps.shape[-2], maps.shape[-1])
    weights = [torch.ones_like(affinity[:, 0])]
    for (down, right), towards in zip(offsets(radius), affinity.float().pow(power).unbind(dim=1), strict=True):
        back = _shifted(F.pad(towards, [reach] * 4), -down, -right, reach, size)
        weights += [towards, back]
    total = torch.stack(weights).sum(dim=0)
    own, *others = [(weight / total)[:, None] for weight in weights]
    maps = maps.float()
    for _ in range(steps):
        padded = F.pad(maps, [reach] * 4)
        walked = maps * own
        for (down, right), towards, back in zip(offsets(radius), others[::2], others[1::2], strict=True):
            walked.addcmul_(towards, _shifted(padded, down, right, reach, size))
            walked.addcmul_(back, _shifted(padded, -down, -right, reach, size))
        maps = walked
    return maps
