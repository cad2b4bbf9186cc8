"""The background threshold without any mask: where the values of the maps fall best into two groups."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 100
THRESHOLDS = tuple(step / 20 for step in range(1, 20))  # 0.05 to 0.95
_USUAL_AREA = 0.1  # share of an image that its tagged objects cover at least, roughly
_PRIOR_WEIGHT = 0.12  # of the squared log ratio to it, in shares of the variance


def value_histogram(maps: Tensor) -> Tensor:
    """How the values of an image's maps are spread.

    Args:
        maps: (K, H, W) in [0, 1], of the image's tagged classes; K >= 1.

    Returns:
        (100,) float32, summing to 1: the share of pixels whose highest value lies in each hundredth of [0, 1].
    """
    highest = maps.amax(dim=0).float().flatten()
    return torch.histc(highest.cpu(), BINS, 0, 1).to(maps.device) / highest.numel()


def object_areas(histogram: Tensor) -> Tensor:
    """(19,) share of pixels above every one of `THRESHOLDS`."""
    above = histogram.flip(0).cumsum(0).flip(0)
    return above[[round(BINS * threshold) for threshold in THRESHOLDS]]


def choose_threshold(histogram: Tensor) -> float:
    """The background threshold in [0.05, 0.95] that explains most of the variance of the maps' values.

    That is Otsu's threshold (IEEE Trans. SMC, 1979): objects and background are the two groups with the most different
    means. Where maps have wide slopes its top is flat, and between the halo and the object a prior decides: tagged
    objects cover about a tenth of an image, rather than most of it.

    Args:
        histogram: (100,), the mean of `value_histogram` over images.
    """
    values = (torch.arange(BINS, device=histogram.device) + 0.5) / BINS
    mean = (histogram * values).sum()
    variance = (histogram * (values - mean).square()).sum()
    areas = object_areas(histogram)
    moments = object_areas(histogram * values)
    explained = (moments - mean * areas).square() / (areas * (1 - areas) * variance).clamp(min=1e-6)
    excess = (areas.clamp(min=1e-4) / _USUAL_AREA).log()
    return THRESHOLDS[int((explained - _PRIOR_WEIGHT * excess.square()).argmax())]
