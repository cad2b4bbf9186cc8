"""The background threshold of a data set without any mask; `models.agreement` says by which rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset

from ..data.batches import batches_by_size
from ..models.agreement import THRESHOLDS, choose_threshold, refined_threshold, two_scales, view_statistics
from ..models.methods import all_reduce_sum
from ..models.modeling_cam import CamClassifier
from .localization import localize
from .refine import Chain, Note, build_refiner

AUTO = "auto"
_LONGEST_SIDE = 96  # pixels of the maps that are compared: they are smooth, and this keeps it quick


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
    scales = two_scales(settings["scales"])
    refine = Chain(itertools.takewhile(lambda step: step.by_channel, build_refiner(settings["refine"]).refiners))
    total = torch.zeros(3, len(THRESHOLDS), device=model.device)
    for batch in batches_by_size(rows.select(chosen[rank::world]), processor, settings["batch_size"]):
        # Maps are smooth; refined ones are not, and how far refinement reaches is counted in pixels.
        reduction = 1.0 if refine.refiners else min(1.0, _LONGEST_SIDE / max(batch.size))
        size = tuple(max(1, round(side * reduction)) for side in batch.size)
        pixel_values, tags = batch.pixel_values.to(model.device), batch.tags.to(model.device)
        counts = [int(count) for count in batch.tags.sum(dim=1)]
        views = [
            localize(model, pixel_values, tags, size, (scale,), settings["flip"], "mean", settings["bf16"])[0].split(
                counts
            )
            for scale in scales
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
