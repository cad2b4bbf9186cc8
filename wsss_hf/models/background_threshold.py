"""The background threshold without any mask: where pixels fall best into two groups, by their maps and features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 100
THRESHOLDS = tuple(step / 20 for step in range(1, 20))  # 0.05 to 0.95
_USUAL_AREA = 0.1  # share of an image that its tagged objects cover at least, roughly
_PRIOR_WEIGHT = 0.12  # of the squared log ratio to it
_FEATURE_WEIGHT = 0.5  # that of the maps is 1


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


def explained_features(maps: Tensor, features: Sequence[Tensor]) -> Tensor:
    """How much of the variance of an image's features it explains which side of each of `THRESHOLDS` a pixel is on.

    Args:
        maps: (K, H, W) in [0, 1], of the image's tagged classes; K >= 1.
        features: S stage maps (D, h, w) of the backbone, each for the whole image.

    Returns:
        (S, 19) float32 in [0, 1]; 0 where all pixels are on one side.
    """
    highest = maps.amax(dim=0)
    above = (highest > highest.new_tensor(THRESHOLDS)[:, None, None]).float()[:, None]
    shares = []
    for stage in features:
        inside = F.adaptive_avg_pool2d(above, stage.shape[-2:]).flatten(1)
        area = inside.mean(dim=1)
        values = stage.float().flatten(1)
        values = values - values.mean(dim=1, keepdim=True)
        values = values / values.square().sum(dim=0).mean().sqrt().clamp(min=1e-12)
        moments = inside @ values.T / values.shape[1]
        shares.append(moments.square().sum(dim=1) / (area * (1 - area)).clamp(min=1e-6))
    return torch.stack(shares)


def choose_threshold(histogram: Tensor, explained: Tensor | None = None) -> float:
    """The background threshold in [0.05, 0.95] that explains most of the variance of the maps' values and of features.

    For the maps alone that is Otsu's threshold (IEEE Trans. SMC, 1979): objects and background are the two groups with
    the most different means. Where maps have wide slopes its top is flat, and between the halo and the object a prior
    decides: tagged objects cover about a tenth of an image, rather than most of it. Maps of different methods can have
    the same values and objects of different size; what the pixels look like, to every stage of the backbone, tells
    them apart. All shares are scaled to a maximum of 1. (`scripts/benchmark_thresholds.py` measures the choice.)

    Args:
        histogram: (100,), the mean of `value_histogram` over images.
        explained: (S, 19), the mean of `explained_features`; None looks at the maps alone.
    """
    values = (torch.arange(BINS, device=histogram.device) + 0.5) / BINS
    mean = (histogram * values).sum()
    variance = (histogram * (values - mean).square()).sum()
    areas = object_areas(histogram)
    moments = object_areas(histogram * values)
    quality = _scaled((moments - mean * areas).square() / (areas * (1 - areas) * variance).clamp(min=1e-6))
    if explained is not None:
        quality = quality + _FEATURE_WEIGHT * _scaled(explained).mean(dim=0)
    excess = (areas.clamp(min=1e-4) / _USUAL_AREA).log()
    return THRESHOLDS[int((quality - _PRIOR_WEIGHT * excess.square()).argmax())]


def _scaled(explained: Tensor) -> Tensor:
    return explained / explained.amax(dim=-1, keepdim=True).clamp(min=1e-6)
