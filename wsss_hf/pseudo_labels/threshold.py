"""The background threshold of a data set without any mask; `models.separation` says by which rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.batches import batches_by_size
from ..inference.cam_maps import localize
from ..models.background_threshold import (
    BINS,
    THRESHOLDS,
    choose_threshold,
    explained_features,
    object_areas,
    value_histogram,
)
from ..models.maps import add_background
from ..models.methods import all_reduce_sum
from ..models.modeling_cam import CamClassifier
from .refinement import Chain, Matting, Note, build_refiner

AUTO = "auto"


def auto_threshold(
    model: CamClassifier, processor: Callable, rows: Dataset, settings: dict, num_images: int = 96
) -> float:
    """The background threshold for the maps of `rows`, found without any mask.

    Looks at `num_images` tagged images, evenly spaced. Where the recipe refines, the threshold is the one at which the
    refined masks cover as much as the plain ones do at theirs: refinement moves borders, but makes the objects on the
    whole neither larger nor smaller. (Matting cuts its trimaps itself; what follows it does not count.) The processes
    of torch.distributed share the images and get one number.

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
    steps = build_refiner(settings["refine"], settings["workers"]).refiners
    refine = Chain(list(itertools.takewhile(lambda step: not isinstance(step, Matting), steps)))
    views = {key: settings[key] for key in ("scales", "flip", "fusion", "bf16")}
    histogram = torch.zeros(BINS, device=model.device)
    explained = torch.zeros(len(model.backbone.stage_indices), len(THRESHOLDS), device=model.device)
    maps, images = [], []
    for batch in batches_by_size(rows.select(chosen[rank::world]), processor, settings["batch_size"]):
        pixel_values, tags = batch.pixel_values.to(model.device), batch.tags.to(model.device)
        found, _ = localize(model, pixel_values, tags, batch.size, **views)
        found = found.split([int(count) for count in batch.tags.sum(dim=1)])
        histogram += sum(map(value_histogram, found))
        with torch.inference_mode():
            features = zip(*model.backbone(pixel_values), strict=True)
        explained += sum(map(explained_features, found, features))
        if refine.refiners:
            maps += found
            images += [np.asarray(image) for image in batch.images]
    histogram = all_reduce_sum(histogram).cpu() / len(chosen)
    threshold = choose_threshold(histogram, all_reduce_sum(explained).cpu() / len(chosen))
    if not refine.refiners:
        return threshold

    def area(limit: float) -> float:
        own = _refined_area(refine, maps, images, limit, len(chosen))
        return float(all_reduce_sum(torch.as_tensor(own, device=model.device)))

    return _threshold_of_area(area, float(object_areas(histogram)[THRESHOLDS.index(threshold)]))


def with_threshold(model: CamClassifier, processor: Callable, rows: Dataset, settings: dict) -> dict:
    """`settings`, a recipe's `masks` section, with a number for `background_threshold: auto`."""
    if settings["background_threshold"] != AUTO:
        return settings
    return settings | {"background_threshold": auto_threshold(model, processor, rows, settings)}


def _refined_area(
    refine: Chain, maps: list[Tensor], images: list[np.ndarray], threshold: float, num_images: int
) -> Tensor:
    """Mean share of pixels, over the images of all processes, that refinement gives to objects."""
    scores = [add_background(one[None], threshold)[0] for one in maps]
    refined = refine.batch(scores, images, [Note() for _ in images])
    return sum((one.argmax(dim=0) > 0).float().mean() for one in refined) / num_images


def _threshold_of_area(area: Callable[[float], float], wanted: float) -> float:
    """The one of `THRESHOLDS` whose area, which falls with the threshold, is nearest to `wanted`; by bisection."""
    area = cache(area)
    low, high = 0, len(THRESHOLDS) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if area(THRESHOLDS[middle]) >= wanted else (low, middle)
    return min(THRESHOLDS[low], THRESHOLDS[high], key=lambda threshold: abs(area(threshold) - wanted))
