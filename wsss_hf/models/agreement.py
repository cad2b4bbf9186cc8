"""The background threshold without any mask: where the maps of two image sizes agree best beyond chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

THRESHOLDS = tuple(step / 20 for step in range(1, 20))  # 0.05 to 0.95
_USUAL_AREA = 0.2  # share of a photograph that its tagged objects cover, roughly
_PRIOR_WEIGHT = 0.03  # of the squared log ratio to it; a mask e times too large or small costs this much kappa
_KEPT_AREA = 0.75  # share of a mask that is left when refinement has taken its halo away
SECOND_SCALE = 1.25  # of the second view, where one scale only is asked for


def view_statistics(first: Tensor, second: Tensor) -> Tensor:
    """How well two views of one image agree about its objects, at every one of `THRESHOLDS`.

    Args:
        first, second: (K, H, W) maps in [0, 1] of the image's tagged classes, seen at two sizes; K >= 1.

    Returns:
        (2, 19) float32: Cohen's kappa between the views' object masks, the agreement beyond what two masks of these
        areas have by chance (1 is the same mask, 0 is chance; 0 also where both are empty or full), and the mean area
        of the two masks in [0, 1].
    """
    limits = first.new_tensor(THRESHOLDS)
    above = [maps.amax(dim=0).flatten() > limits[:, None] for maps in (first, second)]
    areas = [mask.float().mean(dim=1) for mask in above]
    agreed = (above[0] == above[1]).float().mean(dim=1)
    chance = areas[0] * areas[1] + (1 - areas[0]) * (1 - areas[1])
    kappa = torch.where(chance < 1, (agreed - chance) / (1 - chance).clamp(min=1e-6), 0)
    return torch.stack([kappa, (areas[0] + areas[1]) / 2])


def choose_threshold(statistics: Tensor) -> float:
    """The background threshold in [0.05, 0.95] at which the two views of an image agree best.

    Above a good threshold the masks shrink to peaks that wander with the size of the image; below it they take in a
    halo that no view locates in the same way. Agreement image by image is flat around its top, and for narrow maps up
    to their peaks; there a weak prior decides, that the objects cover about a fifth of the image.

    Args:
        statistics: (2, 19), the mean of `view_statistics` over images.
    """
    kappa, area = statistics
    excess = (area.clamp(min=1e-6) / _USUAL_AREA).log()
    return THRESHOLDS[int((kappa - _PRIOR_WEIGHT * excess.square()).argmax())]


def refined_threshold(statistics: Tensor, areas: Tensor) -> float:
    """The background threshold for refined maps: where they keep three quarters of the plain masks' area.

    Refinement changes what values maps have, and draws both views to the same borders, so that their agreement says
    little; but it makes objects of coarse masks, and these are larger than the objects by their halo.

    Args:
        statistics: (2, 19), the mean of `view_statistics` over images, before refinement.
        areas: (19,), the mean area of the refined masks at every one of `THRESHOLDS`.
    """
    wanted = _KEPT_AREA * statistics[1, THRESHOLDS.index(choose_threshold(statistics))]
    return THRESHOLDS[int((areas - wanted).abs().argmin())]


def two_scales(scales: Sequence[float]) -> tuple[float, float]:
    """The sizes of the two views: the smallest and the largest of `scales`, or the one there is and 1.25 times it."""
    low, high = min(scales), max(scales)
    return low, high if high > low else SECOND_SCALE * low
