"""The background threshold without any mask: where the maps of two image sizes agree best beyond chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.batches import batches_by_size
from ..models.methods import all_reduce_sum
from ..models.modeling_cam import CamClassifier
from .localization import localize

AUTO = "auto"
THRESHOLDS = tuple(step / 20 for step in range(1, 20))  # 0.05 to 0.95
_LONGEST_SIDE = 96  # pixels of the maps that are compared: they are smooth, and this keeps it quick
_SECOND_SCALE = 1.25  # of the second view, where the recipe has one scale only


def view_histogram(first: Tensor, second: Tensor) -> Tensor:
    """How the pixels of one image spread over pairs of map values: all that `choose_threshold` needs of it.

    Args:
        first, second: (K, H, W) maps in [0, 1] of the image's tagged classes, seen at two sizes; K >= 1.

    Returns:
        (20, 20) float32 shares of the pixels that sum to 1: entry (i, j) has its highest value in interval i in the
        first view and in interval j in the second; interval i is (i / 20, (i + 1) / 20].
    """
    limits = first.new_tensor(THRESHOLDS)
    cells = [torch.bucketize(maps.amax(dim=0).flatten(), limits) for maps in (first, second)]
    count = len(THRESHOLDS) + 1
    pairs = torch.bincount(cells[0] * count + cells[1], minlength=count**2)
    return pairs.view(count, count) / pairs.sum()


def view_agreement(histogram: Tensor) -> Tensor:
    """Cohen's kappa between the two views' object masks at every one of `THRESHOLDS`.

    Kappa is the agreement beyond what two masks of these areas have by chance: 1 is the same mask, 0 is chance. Plain
    agreement, or the IoU of the two masks, would favour masks of nothing or of everything.

    Args:
        histogram: (20, 20), a sum or mean of `view_histogram`.

    Returns:
        (19,) float64; 0 where both masks are empty or full.
    """
    shares = histogram.double() / histogram.sum()
    # above[i, j]: share of the pixels above threshold i in the first view and above threshold j in the second
    above = shares.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1)
    both, first, second = above.diagonal()[1:], above[1:, 0], above[0, 1:]
    chance = first * second + (1 - first) * (1 - second)
    agreed = 1 - first - second + 2 * both
    return torch.where(chance < 1, (agreed - chance) / (1 - chance).clamp(min=1e-12), 0)


def otsu_threshold(histogram: Tensor) -> float:
    """The one of `THRESHOLDS` that splits the map values of both views into the two most distant groups (Otsu, 1979).

    Args:
        histogram: (20, 20), a sum or mean of `view_histogram`.
    """
    values = (histogram.sum(0) + histogram.sum(1)).double() / (2 * histogram.sum())
    centres = (torch.arange(len(values), dtype=values.dtype, device=values.device) + 0.5) / len(values)
    below = values.cumsum(0)[:-1]
    mean_below, mean = (values * centres).cumsum(0)[:-1], (values * centres).sum()
    between = (mean * below - mean_below).square() / (below * (1 - below)).clamp(min=1e-12)
    return THRESHOLDS[int(between.argmax())]


def choose_threshold(histogram: Tensor) -> float:
    """The background threshold in [0.05, 0.95] at which two views agree best.

    Above a good threshold the masks shrink to peaks that wander with the size of the image; below it they take in a
    halo that no view locates in the same way. Far below, where a map has its zeros, views may agree again about next
    to nothing: so Otsu's threshold of the same values is the lowest one considered.

    Args:
        histogram: (20, 20), a sum or mean of `view_histogram` over images.
    """
    agreement = view_agreement(histogram)
    lowest = THRESHOLDS.index(otsu_threshold(histogram))
    return THRESHOLDS[lowest + int(agreement[lowest:].argmax())]


def auto_threshold(
    model: CamClassifier, processor: Callable, rows: Dataset, settings: dict, num_images: int = 96
) -> float:
    """The background threshold for the maps of `rows`, found without any mask.

    Looks at `num_images` tagged images, evenly spaced, at the smallest and the largest of the recipe's scales (where
    it has one only, at that and at 1.25 times it). The processes of torch.distributed share the images and get one
    number.

    Args:
        model: in eval mode, on the device to work on.
        processor: the model's image processor.
        settings: a recipe's `masks` section.

    Raises:
        ValueError: no row has a tag.
    """
    tagged = np.flatnonzero([len(tags) > 0 for tags in rows["tags"]])
    if not len(tagged):
        raise ValueError("masks.background_threshold: auto needs images with tags; no row has one")
    chosen = tagged[np.unique(np.linspace(0, len(tagged) - 1, num_images).astype(int))]
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    low, high = min(settings["scales"]), max(settings["scales"])
    scales = (low, high if high > low else _SECOND_SCALE * low)
    histogram = torch.zeros(len(THRESHOLDS) + 1, len(THRESHOLDS) + 1, device=model.device)
    for batch in batches_by_size(rows.select(chosen[rank::world]), processor, settings["batch_size"]):
        reduction = min(1.0, _LONGEST_SIDE / max(batch.size))
        size = tuple(max(1, round(side * reduction)) for side in batch.size)
        pixel_values, tags = batch.pixel_values.to(model.device), batch.tags.to(model.device)
        counts = [int(count) for count in batch.tags.sum(dim=1)]
        views = [
            localize(model, pixel_values, tags, size, (scale,), settings["flip"])[0].split(counts) for scale in scales
        ]
        histogram += sum(view_histogram(first, second) for first, second in zip(*views, strict=True))
    return choose_threshold(all_reduce_sum(histogram).cpu())


def with_threshold(model: CamClassifier, processor: Callable, rows: Dataset, settings: dict) -> dict:
    """`settings`, a recipe's `masks` section, with a number for `background_threshold: auto`."""
    if settings["background_threshold"] != AUTO:
        return settings
    return settings | {"background_threshold": auto_threshold(model, processor, rows, settings)}
