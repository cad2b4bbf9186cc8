"""The background threshold without any mask: where the maps of two image sizes agree best beyond chance."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.batches import batches_by_size
from ..models.methods import all_reduce_sum
from ..models.modeling_cam import CamClassifier
from .localization import localize
from .refine import Chain, Note, build_refiner

AUTO = "auto"
THRESHOLDS = tuple(step / 20 for step in range(1, 20))  # 0.05 to 0.95
_USUAL_AREA = 0.2  # share of a photograph that its tagged objects cover, roughly
_PRIOR_WEIGHT = 0.03  # of the squared log ratio to it; a mask e times too large or small costs this much kappa
_KEPT_AREA = 0.75  # share of a mask that is left when refinement has taken its halo away
_LONGEST_SIDE = 96  # pixels of the maps that are compared: they are smooth, and this keeps it quick
_SECOND_SCALE = 1.25  # of the second view, where the recipe has one scale only


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


def auto_threshold(
    model: CamClassifier, processor: Callable, rows: Dataset, settings: dict, num_images: int = 96
) -> float:
    """The background threshold for the maps of `rows`, found without any mask.

    Looks at `num_images` tagged images, evenly spaced, at the smallest and the largest of the recipe's scales (where
    it has one only, at that and at 1.25 times it). Where the recipe begins with steps of refinement that work channel
    by channel (PAMR), the threshold is that of the maps after them. The processes of torch.distributed share the
    images and get one number.

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
    refine = Chain(itertools.takewhile(lambda step: step.by_channel, build_refiner(settings["refine"]).refiners))
    total = torch.zeros(3, len(THRESHOLDS), device=model.device)
    for batch in batches_by_size(rows.select(chosen[rank::world]), processor, settings["batch_size"]):
        # Maps are smooth; refined ones are not, and how far refinement reaches is counted in pixels.
        reduction = 1.0 if refine.refiners else min(1.0, _LONGEST_SIDE / max(batch.size))
        size = tuple(max(1, round(side * reduction)) for side in batch.size)
        pixel_values, tags = batch.pixel_values.to(model.device), batch.tags.to(model.device)
        counts = [int(count) for count in batch.tags.sum(dim=1)]
        views = [
            localize(model, pixel_values, tags, size, (scale,), settings["flip"])[0].split(counts) for scale in scales
        ]
        both = [torch.cat(pair) for pair in zip(*views, strict=True)]
        total[:2] += sum(view_statistics(*maps.chunk(2)) for maps in both)
        if refine.refiners:
            refined = refine.batch(both, [np.asarray(image) for image in batch.images], [Note() for _ in both])
            total[2] += sum(view_statistics(*maps.chunk(2))[1] for maps in refined)
    statistics, areas = (all_reduce_sum(total).cpu() / len(chosen)).split([2, 1])
    return refined_threshold(statistics, areas[0]) if refine.refiners else choose_threshold(statistics)


def with_threshold(model: CamClassifier, processor: Callable, rows: Dataset, settings: dict) -> dict:
    """`settings`, a recipe's `masks` section, with a number for `background_threshold: auto`."""
    if settings["background_threshold"] != AUTO:
        return settings
    return settings | {"background_threshold": auto_threshold(model, processor, rows, settings)}
