"""The thresholds of a data set without any mask; `models.background_threshold` has the rule of the background's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.saliency import check_saliency
from ..data.tagged import decode_saliency, undecoded
from ..inference.image_by_image import image_by_image
from ..models.background_threshold import ThresholdSearch, object_share
from ..models.maps import add_background
from ..models.method_helpers import all_reduce_sum
from ..models.modeling_cam import CamClassifier
from ..progress import Progress
from ..refinement.steps import Matting, Note, RefinementChain, build_refinement
from ..settings import AUTO, MasksSettings
from .localized_batches import localized_batches
from .rules import build_rule, reads_background, reads_saliency

LEVELS = 256  # that values of saliency maps are counted in


def auto_threshold(
    model: CamClassifier, processor: Callable, rows: Dataset, settings: MasksSettings, num_images: int = 96
) -> float:
    """The background threshold for the maps of `rows`, found without any mask, see [`ThresholdSearch`].

    Looks at `num_images` tagged images, evenly spaced. Where the refinement begins with steps that make maps, such as
    a walk, the maps that they make are looked at: these do not depend on the threshold. Where the recipe refines
    further, the threshold is the one at which the refined objects cover the same area as these maps at theirs.
    (Matting takes its trimaps from the levels of the scores, so neither it nor the steps after it count.) The
    processes of torch.distributed share the images and get one number.

    Args:
        model: in eval mode, on the device to work on.
        processor: the model's image processor.
        settings: how the maps are made and refined.

    Raises:
        ValueError: no row has a tag.
    """
    tagged = np.flatnonzero([len(tags) > 0 for tags in rows["tags"]])
    if not len(tagged):
        raise ValueError("masks.background_threshold: auto: expected images with tags, got none")
    chosen = tagged[np.unique(np.linspace(0, len(tagged) - 1, num_images).astype(int))]
    rank, world = _place()
    steps = build_refinement(settings.refine).steps
    steps = list(itertools.takewhile(lambda step: not isinstance(step, Matting), steps))
    first = RefinementChain(list(itertools.takewhile(lambda step: step.makes_maps, steps)))
    first.prepare()
    steps = steps[len(first.steps) :]
    search = ThresholdSearch(len(model.backbone.channels), model.device)
    maps: list[Tensor] = []
    images: list[np.ndarray] = []
    rows = rows.select(chosen[rank::world])
    for batch, maps_of, _ in localized_batches(model, processor, rows, settings):
        pictures = [np.asarray(image) for image in batch.images]
        if first.steps:
            scores = [add_background(one[None], 0.5)[0] for one in maps_of]
            maps_of = [one[1:] for one in first.batch(scores, pictures, [Note() for _ in pictures])]
        with torch.inference_mode():
            features = list(zip(*_stage_maps(model.backbone, batch.pixel_values), strict=True))
        for own, stages in zip(maps_of, features, strict=True):
            search.add(own, stages)
        if steps:
            maps += maps_of
            images += pictures
    search.merge(all_reduce_sum)
    if not steps:
        return search.threshold()
    with RefinementChain(steps, settings.workers) as refine:

        def refined_area(threshold: float) -> float:
            scores = [add_background(one[None], threshold)[0] for one in maps]
            shares = map(object_share, refine.batch(scores, images, [Note() for _ in images]))
            total = torch.tensor(sum(shares), device=model.device, dtype=torch.float32)
            return float(all_reduce_sum(total)) / len(chosen)

        return search.threshold_after(refined_area)


@image_by_image
def _stage_maps(backbone: Callable, pixel_values: Tensor) -> tuple[Tensor, ...]:
    return backbone(pixel_values)


def saliency_threshold(rows: Dataset, device: torch.device | str = "cpu") -> float:
    """The threshold for the saliency maps of `rows`: Otsu's, on the values of all maps, each of the same weight.

    The processes of torch.distributed share the maps and get one number.

    Args:
        device: that the processes exchange tensors on.

    Raises:
        DataError: a row has no map, or one that does not decode.
    """
    check_saliency(rows, "masks.seed_options.saliency_threshold: auto")
    rank, world = _place()
    mine = undecoded(rows.select_columns(["image_id", "saliency"]).select(range(rank, len(rows), world)))
    histogram = torch.zeros(LEVELS)
    with Progress("saliency threshold", len(mine), unit="map") as progress:
        for row in mine:
            values = decode_saliency(row["saliency"], None, f"row {row['image_id']!r}, column saliency")
            levels = torch.from_numpy(values.reshape(-1) * (LEVELS - 1)).round().int()
            histogram += torch.bincount(levels, minlength=LEVELS) / values.size
            progress.advance(1)
    return otsu_threshold(all_reduce_sum(histogram.to(device)).cpu())


def otsu_threshold(histogram: Tensor) -> float:
    """The threshold in (0, 1) with the largest variance between what is below and above it (Otsu, 1979).

    Where thresholds are equally good, as between two far values, it is their mean.

    Args:
        histogram: (N,) counts of the values 0, 1 / (N - 1) … 1.
    """
    share = histogram.double() / histogram.sum()
    values = torch.linspace(0, 1, len(share), dtype=torch.float64)
    below, moment = share.cumsum(0)[:-1], (share * values).cumsum(0)[:-1]
    mean = (share * values).sum()
    variance = (mean * below - moment).square() / (below * (1 - below)).clamp(min=1e-12)
    thresholds = (values[1:] + values[:-1]) / 2
    return round(float(thresholds[variance >= variance.max() * (1 - 1e-4)].mean()), 4)


def with_threshold(model: CamClassifier, processor: Callable, rows: Dataset, settings: MasksSettings) -> MasksSettings:
    """`settings` with numbers for `background_threshold: auto` and for the label rule's `saliency_threshold: auto`.

    A threshold that plays no part in the labels of these rows is not searched; that of the background is auto in any
    case then.
    """
    rule = build_rule(settings.seeds, settings.seed_options)
    if rule.saliency_threshold == AUTO and reads_saliency(settings, rows):
        settings = at_thresholds(settings, {"saliency_threshold": saliency_threshold(rows, model.device)})
    if not reads_background(settings, rows):
        return dataclasses.replace(settings, background_threshold=AUTO)
    if settings.background_threshold != AUTO:
        return settings
    return dataclasses.replace(settings, background_threshold=auto_threshold(model, processor, rows, settings))


def thresholds_of(settings: MasksSettings) -> dict[str, Any]:
    """`background_threshold` and `saliency_threshold` of what [`with_threshold`] gave; one that plays no part is not
    among them."""
    salient = build_rule(settings.seeds, settings.seed_options).saliency_threshold
    found = {"background_threshold": settings.background_threshold, "saliency_threshold": salient}
    return {name: value for name, value in found.items() if value not in (None, AUTO)}


def at_thresholds(settings: MasksSettings, found: Mapping[str, Any]) -> MasksSettings:
    """`settings` with the thresholds that [`thresholds_of`] gave for them, or for those of other rows of the data."""
    if "background_threshold" in found:
        settings = dataclasses.replace(settings, background_threshold=found["background_threshold"])
    if "saliency_threshold" in found and build_rule(settings.seeds, settings.seed_options).saliency_threshold == AUTO:
        options = settings.seed_options | {"saliency_threshold": found["saliency_threshold"]}
        settings = dataclasses.replace(settings, seed_options=options)
    return settings


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
