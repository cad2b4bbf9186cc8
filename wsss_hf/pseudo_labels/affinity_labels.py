"""Labels that an affinity network learns from: what the maps are certain of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..inference.cam_maps import label_map
from ..models.maps import IGNORE_INDEX
from ..models.modeling_cam import CamClassifier
from ..refinement.crf import refine_labels
from ..refinement.steps import Note, RefinementChain
from ..settings import AffinitySettings, EvaluationSettings, MasksSettings
from .localized_batches import localized_batches

_Refined = TypeVar("_Refined", MasksSettings, EvaluationSettings)


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
    for batch, maps_of, _ in localized_batches(model, processor, rows, masks):
        images = [np.asarray(image) for image in batch.images]
        steps = refine if settings.label_confidence is None else RefinementChain([])
        for_objects, for_background = _refined(
            maps_of, [_backgrounds(one, settings) for one in maps_of], images, steps
        )
        for i, index in enumerate(batch.indices):
            classes = batch.tags[i].nonzero()[:, 0]
            high, low = (label_map(scores[i], classes) for scores in (for_objects, for_background))
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


def _backgrounds(maps: Tensor, settings: AffinitySettings) -> Tensor:
    """(2, H, W) background scores of an image's maps (K, H, W): that which certain objects win over, and the lower."""
    if settings.alphas is None:
        thresholds = (settings.foreground_threshold, settings.background_threshold)
        return torch.stack([maps.new_full(maps.shape[1:], threshold) for threshold in thresholds])
    largest = maps.amax(dim=0) if len(maps) else maps.new_zeros(maps.shape[1:])
    return torch.stack([(1 - largest).clamp(min=0) ** alpha for alpha in settings.alphas])


def _refined(
    maps: Sequence[Tensor], backgrounds: Sequence[Tensor], images: list[np.ndarray], refine: RefinementChain
) -> tuple[list[Tensor], list[Tensor]]:
    """Refined scores (K+1, H, W) of every image with its first and with its second background."""
    if refine.keeps_channels_apart:  # both beside the maps at once: half the work
        stacks = [torch.cat([both, own]) for both, own in zip(backgrounds, maps, strict=True)]
        stacks = refine.batch(stacks, images, [Note() for _ in images])
        return [torch.cat([stack[:1], stack[2:]]) for stack in stacks], [stack[1:] for stack in stacks]
    scores = [torch.cat([both[i : i + 1], own]) for i in (0, 1) for both, own in zip(backgrounds, maps, strict=True)]
    refined = refine.batch(scores, images * 2, [Note() for _ in scores])
    return refined[: len(images)], refined[len(images) :]


def _follow_colours(labels: Tensor, image: np.ndarray, count: int, confidence: float) -> Tensor:
    return torch.from_numpy(refine_labels(labels.cpu().numpy(), image, count, confidence)).to(labels.device)


def needs_affinity(settings: MasksSettings) -> bool:
    """Whether `masks.refine` has a walk that names no model of its own."""
    return any(not model for model in walk_models(settings))


def walk_models(settings: MasksSettings) -> list[str]:
    """The models that the walks of `masks.refine` name; "" where one names none."""
    return [(step[1] or {}).get("model", "") for step in map(_named, settings.refine) if step[0] == "walk"]


def with_affinity(settings: _Refined, model: str | os.PathLike | None) -> _Refined:
    """`settings` in which every walk of their `refine` that names no model walks by `model`."""
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
