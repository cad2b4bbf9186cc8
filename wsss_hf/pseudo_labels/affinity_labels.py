"""Labels that an affinity network learns from: what the maps are certain of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.batches import batches_by_size
from ..inference.cam_maps import label_map, localize
from ..models.maps import IGNORE_INDEX, add_background
from ..models.modeling_cam import CamClassifier
from ..refinement.crf import refine_labels
from ..refinement.steps import Note, RefinementChain
from ..settings import AffinitySettings, MasksSettings


def certain_labels(
    model: CamClassifier,
    processor: Callable,
    rows: Dataset,
    masks: MasksSettings,
    settings: AffinitySettings,
    refine: RefinementChain,
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, labels (H, W) uint8) of every row: 0 certain background, c + 1 certain class c, 255 neither.

    IRN (CVPR 2019, section 4.1): objects are certain where they win over a high background score, background where it
    wins as a low one, both refined. AffinityNet (CVPR 2018, section 3.2) has two background scores that fall with the
    largest map, (1 - largest map)^alpha; where both claim a pixel, IRN takes the object, AffinityNet the background.

    Args:
        model: in eval mode, on the device to work on.
        processor: the model's image processor.
        masks: how maps are made.
        refine: the steps of `settings.refine`, prepared.

    Raises:
        DataError: an image does not decode; names the row.
    """
    for batch in batches_by_size(rows, processor, masks.batch_size, native=masks.native):
        pixel_values, tags = batch.pixel_values.to(model.device), batch.tags.to(model.device)
        augmentation = masks.scales, masks.flip, masks.fusion, masks.bf16, masks.pad
        maps, _ = localize(model, pixel_values, tags, batch.size, *augmentation)
        maps_of = maps.split([int(count) for count in batch.tags.sum(dim=1)])
        images = [np.asarray(image) for image in batch.images]
        both = [_scores(one, settings) for one in maps_of]
        for_objects, for_background = [one[0] for one in both], [one[1] for one in both]
        if settings.label_confidence is None:
            notes = [Note() for _ in range(2 * len(images))]
            refined = refine.batch([*for_objects, *for_background], images * 2, notes)
            for_objects, for_background = refined[: len(images)], refined[len(images) :]
        for i, index in enumerate(batch.indices):
            classes = tags[i].nonzero()[:, 0]
            high, low = (label_map(scores[i], classes)[0] for scores in (for_objects, for_background))
            if settings.label_confidence is not None and len(classes):
                high, low = (
                    _follow_colours(labels, images[i], len(classes) + 1, settings.label_confidence)
                    for labels in (high, low)
                )
            if settings.alphas is None:
                labels = torch.where(high > 0, high, torch.where(low == 0, 0, IGNORE_INDEX))
            else:
                labels = torch.where(low == 0, 0, torch.where(high > 0, high, IGNORE_INDEX))
                labels[for_objects[i].amax(dim=0) <= 0] = IGNORE_INDEX
            yield index, labels.to(torch.uint8).cpu().numpy()


def _scores(maps: Tensor, settings: AffinitySettings) -> tuple[Tensor, Tensor]:
    """(K+1, H, W) scores of an image's maps with the background score for certain objects, and for background."""
    if settings.alphas is None:
        thresholds = settings.foreground_threshold, settings.background_threshold
        high, low = (add_background(maps[None], threshold)[0] for threshold in thresholds)
        return high, low
    largest = maps.amax(dim=0, keepdim=True) if len(maps) else maps.new_zeros(1, *maps.shape[1:])
    high, low = (torch.cat([(1 - largest).clamp(min=0) ** alpha, maps]) for alpha in settings.alphas)
    return high, low


def _follow_colours(labels: Tensor, image: np.ndarray, count: int, confidence: float) -> Tensor:
    return torch.from_numpy(refine_labels(labels.cpu().numpy(), image, count, confidence)).to(labels.device)


def needs_affinity(settings: MasksSettings) -> bool:
    """Whether `masks.refine` has a walk that names no model of its own."""
    return any(not model for model in walk_models(settings))


def walk_models(settings: MasksSettings) -> list[str]:
    """The models that the walks of `masks.refine` name; "" where one names none."""
    return [(step[1] or {}).get("model", "") for step in map(_named, settings.refine) if step[0] == "walk"]


def with_affinity(settings: MasksSettings, model: str | os.PathLike | None) -> MasksSettings:
    """`settings` in which every walk of `masks.refine` that names no model walks by `model`."""
    if model is None:
        return settings
    steps = []
    for step in settings.refine:
        name, options = _named(step)
        if name == "walk":
            step = {
                name: {"model": os.fspath(model)}
                | {key: value for key, value in (options or {}).items() if value != ""}
            }
        steps.append(step)
    return replace(settings, refine=steps)


def _named(step: str | Mapping) -> tuple[str, Mapping | None]:
    return (step, None) if isinstance(step, str) else next(iter(step.items()))
