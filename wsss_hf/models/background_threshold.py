"""The background threshold without any mask: Otsu's criterion on the maps, the same on features, and an area prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .maps import add_background

BINS = 100
THRESHOLDS = tuple(step / 20 for step in range(1, 20))  # 0.05 to 0.95
_USUAL_AREA = 0.1  # share of an image that its tagged objects cover at least, roughly
_PRIOR_WEIGHT = 0.12  # of the squared log ratio to it
_FEATURE_WEIGHT = 0.5  # that of the maps is 1


class ThresholdSearch:
    """Finds one threshold for the maps of many images, or of a single one.

    Args:
        num_stages: number of feature maps of each image.
        device: where sums are kept.
    """

    def __init__(self, num_stages: int, device: torch.device | str = "cpu"):
        self.images = torch.zeros((), device=device)
        self.histogram = torch.zeros(BINS, device=device)
        self.explained = torch.zeros(num_stages, len(THRESHOLDS), device=device)

    def add(self, maps: Tensor, features: Sequence[Tensor]) -> None:
        """Look at one image.

        Args:
            maps: (K, H, W) in [0, 1], of its tagged classes; K >= 1.
            features: stage maps (D, h, w) of the backbone.
        """
        self.images += 1
        self.histogram += value_histogram(maps)
        self.explained += explained_features(maps, features)

    def merge(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Count the images of other processes, too; `add_up` gives the sum of a tensor over the processes."""
        self.images, self.histogram, self.explained = map(add_up, (self.images, self.histogram, self.explained))

    def threshold(self) -> float:
        """The threshold in [0.05, 0.95] for the maps as they are, see [`choose_threshold`]."""
        return choose_threshold(self.histogram.cpu() / self.images.cpu(), self.explained.cpu() / self.images.cpu())

    def threshold_after(self, refined_area: Callable[[float], float]) -> float:
        """The threshold at which refined objects cover the same area as plain ones at [`threshold`].

        Refinement moves borders; it should make objects neither larger nor smaller on the whole.

        Args:
            refined_area: threshold → mean share of pixels that are object after refinement. It should fall with the
                threshold, and is called for few of `THRESHOLDS`: the search is by bisection.
        """
        areas = object_areas(self.histogram.cpu() / self.images.cpu())
        wanted = float(areas[THRESHOLDS.index(self.threshold())])
        area = cache(refined_area)
        low, high = 0, len(THRESHOLDS) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if area(THRESHOLDS[middle]) >= wanted else (low, middle)
        return min(THRESHOLDS[low], THRESHOLDS[high], key=lambda threshold: abs(area(threshold) - wanted))


def separated(maps: Tensor, stages: Mapping[str, Tensor], refine: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The maps of one image below a background whose height they and the features decide.

    Args:
        maps: (K, H, W) in [0, 1], of the image's tagged classes; K >= 1.
        stages: stage maps (1, D, h, w) of the backbone.
        refine: changes scores (1, K+1, H, W) afterwards, and with them the object's area.

    Returns:
        (K+1, H, W) scores, not refined.
    """
    search = ThresholdSearch(len(stages))
    search.add(maps, [stage[0] for stage in stages.values()])
    if refine is None:
        return add_background(maps[None], search.threshold())[0]

    def refined_area(limit: float) -> float:
        return object_share(refine(add_background(maps[None], limit))[0])

    return add_background(maps[None], search.threshold_after(refined_area))[0]


def choose_threshold(histogram: Tensor, explained: Tensor) -> float:
    """The one of `THRESHOLDS` with the largest sum of three terms.

    - Otsu's criterion on the values of the maps (IEEE Trans. SMC, 1979): the variance between object and background
      pixels. Where maps have wide slopes its maximum is flat.
    - The same for the features of every backbone stage: maps of different methods can have the same values and
      objects of different size.
    - A prior against large objects: tagged objects cover about a tenth of an image, rather than most of it.

    The criteria are scaled to a maximum of 1. (`scripts/benchmark_thresholds.py` measures the choice.)

    Args:
        histogram: (100,), the mean of [`value_histogram`] over images.
        explained: (S, 19), the mean of [`explained_features`].
    """
    quality = _scaled(otsu_criterion(histogram)) + _FEATURE_WEIGHT * _scaled(explained).mean(dim=0)
    excess = (object_areas(histogram).clamp(min=1e-4) / _USUAL_AREA).log()
    return THRESHOLDS[int((quality - _PRIOR_WEIGHT * excess.square()).argmax())]


def otsu_criterion(histogram: Tensor) -> Tensor:
    """(100,) value histogram → (19,) between-class variance at each of `THRESHOLDS`, as a share of the variance."""
    values = (torch.arange(BINS, device=histogram.device) + 0.5) / BINS
    mean = (histogram * values).sum()
    variance = (histogram * (values - mean).square()).sum()
    areas, moments = object_areas(histogram), object_areas(histogram * values)
    return (moments - mean * areas).square() / (areas * (1 - areas) * variance).clamp(min=1e-6)


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
    """(100,) value histogram → (19,) share of pixels above each of `THRESHOLDS`."""
    above = histogram.flip(0).cumsum(0).flip(0)
    return above[[round(BINS * threshold) for threshold in THRESHOLDS]]


def object_share(scores: Tensor) -> float:
    """Share of the pixels of (K+1, H, W) scores, background first, whose largest score is a class."""
    return float((scores.argmax(dim=0) > 0).float().mean())


def explained_features(maps: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Otsu's criterion on features: the share of their variance that is between object and background pixels.

    Args:
        maps: (K, H, W) in [0, 1], of the image's tagged classes; K >= 1.
        features: S stage maps (D, h, w) of the backbone, each for the whole image.

    Returns:
        (S, 19) float32 in [0, 1], for each of `THRESHOLDS`; 0 where all pixels are on one side.
    """
    highest = maps.amax(dim=0)
    above = (highest > highest.new_tensor(THRESHOLDS)[:, None, None]).float()[:, None]
    shares = []
    for stage in features:
        inside = F.adaptive_avg_pool2d(above, (stage.shape[-2], stage.shape[-1])).flatten(1)
        area = inside.mean(dim=1)
        values = stage.float().flatten(1)
        values = values - values.mean(dim=1, keepdim=True)
        values = values / values.square().sum(dim=0).mean().sqrt().clamp(min=1e-12)
        moments = inside @ values.T / values.shape[1]
        shares.append(moments.square().sum(dim=1) / (area * (1 - area)).clamp(min=1e-6))
    return torch.stack(shares)


def _scaled(explained: Tensor) -> Tensor:
    return explained / explained.amax(dim=-1, keepdim=True).clamp(min=1e-6)
