"""Tagged images in, pseudo masks out: CAMs, background, refinement, label rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..inference.cam_maps import average_maps, label_confidence
from ..models.maps import add_background
from ..models.modeling_cam import CamClassifier
from ..refinement.steps import Matting, Note, RefinementChain, Walk, build_refinement
from ..settings import MasksSettings
from .localized_batches import localized_batches
from .rules import (
    Evidence,
    Rule,
    RuleError,
    build_rule,
    check_columns,
    reads_background,
    reads_saliency,
)


@dataclass
class Labelled:
    """The pseudo mask of one image, and what it was made from.

    Attributes:
        index: its row in the data set.
        image: the RGB image.
        classes: (K,) indices of its tags.
        maps: (K, H, W) float32 localisation maps in [0, 1], before refinement.
        pseudo_mask: (H, W) uint8, 0 = background, c + 1 = class c, 255 = ignore.
        confidence: (H, W) float32 in [0, 1], see `cam_maps.label_confidence`; 0 at ignored pixels.
        logits: (C,) float32 tag logits.
        note: fallbacks that were taken, and pictures of the steps.
    """

    index: int
    image: Image.Image
    classes: np.ndarray
    maps: np.ndarray
    pseudo_mask: np.ndarray
    confidence: np.ndarray
    logits: np.ndarray
    note: Note


def label_images(
    model: CamClassifier,
    processor: Callable,
    rows: Dataset,
    settings: MasksSettings,
    rules: tuple[RefinementChain, Rule] | None = None,
) -> Iterator[Labelled]:
    """Label every row of `rows` from its tags; true masks are never read.

    Args:
        model: in eval mode, on the device to work on.
        processor: the model's image processor.
        settings: its thresholds numbers, those that play a part (see [`with_threshold`]).
        rules: what [`build_rules`] gives; a caller that has called it can keep worker processes over several calls.

    Raises:
        DataError: an image does not decode, or the label rule needs saliency that is missing; names the rows.
        ValueError: refinement or rule lack something in this model or installation.
    """
    if rules is None:
        rules = build_rules(settings)
        with rules[0]:
            yield from label_images(model, processor, rows, settings, rules)
        return
    refine, rule = rules
    threshold = settings.background_threshold
    if isinstance(threshold, str):
        if reads_background(settings, rows):
            raise ValueError(f"masks.background_threshold: expected a number, got {threshold!r}")
        threshold = 0.0  # nothing reads it
    check_columns(settings, rows)
    has_saliency = reads_saliency(settings, rows)
    salient_above = rule.salient_above if has_saliency else 0.0
    for batch, maps_of, logits in localized_batches(model, processor, rows, settings, has_saliency):
        images = [np.asarray(image) for image in batch.images]
        notes = [Note() for _ in images]
        scores = [add_background(one[None], threshold)[0] for one in maps_of]
        scores = refine.batch(scores, images, notes)

        averages: list[tuple[Tensor, Tensor] | None] = [None] * len(images)
        if rule.averages:
            augmentation = settings.scales, settings.flip, settings.bf16, settings.pad
            both = average_maps(model, batch.pixel_values, batch.tags, batch.size, *augmentation)
            averages = list(zip(*(part.split([len(maps) for maps in maps_of]) for part in both), strict=True))
        for i, index in enumerate(batch.indices):
            classes = batch.tags[i].nonzero()[:, 0]
            if zeros := int((maps_of[i].flatten(1).amax(dim=1) == 0).sum()):
                notes[i].fallbacks["tag without any map"] = zeros
            saliency = None if batch.saliency is None else batch.saliency[i]
            if saliency is not None and (kind := _unusual(saliency, salient_above)):
                notes[i].fallbacks[f"{kind} saliency map"] = 1
            evidence = Evidence(scores[i], classes, len(batch.tags[i]), images[i], saliency, averages[i])
            labels = rule.label(evidence)
            confidence = label_confidence(rule.decisive_scores(evidence), labels, classes)
            yield Labelled(
                index=index,
                image=batch.images[i],
                classes=classes.cpu().numpy(),
                maps=maps_of[i].cpu().numpy(),
                pseudo_mask=labels.cpu().numpy(),
                confidence=confidence.cpu().numpy(),
                logits=logits[i].cpu().numpy(),
                note=notes[i],
            )


def _unusual(saliency: Tensor, threshold: float) -> str | None:
    """What is odd about a map: empty, constant, all-salient; it says nothing about where the object is."""
    salient = saliency > threshold
    if not salient.any():
        return "empty"
    if saliency.min() == saliency.max():
        return "constant"
    return "all-salient" if salient.all() else None


def build_rules(settings: MasksSettings, affinity_follows: bool = False) -> tuple[RefinementChain, Rule]:
    """The refinement and the label rule that the settings name, with all that they need.

    The chain is a context manager; it owns the processes of `settings.workers`.

    Args:
        affinity_follows: walks may lack their affinity network, which is not trained yet.

    Raises:
        OptionError: an unknown name or option, an unfit value, a library that is not installed, or two that don't fit.
    """
    refine = build_refinement(settings.refine, "masks.refine", settings.workers)
    rule = build_rule(settings.seeds, settings.seed_options)
    if rule.alphas and not (refine.steps and isinstance(refine.steps[-1], Matting)):
        raise RuleError(
            f"masks.seeds: {settings.seeds}: expected matting as the last step of masks.refine, got {settings.refine}"
        )
    for step in refine.steps:
        if not (affinity_follows and isinstance(step, Walk) and not step.model):
            step.prepare()
    rule.prepare()
    return refine, rule
