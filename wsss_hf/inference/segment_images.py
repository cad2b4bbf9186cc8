"""What a segmenter says of a whole data set: class probabilities, and the label maps of the test protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..data.batches import batches_by_size
from ..pseudo_labels.refinement import Note, build_refiner
from .segmenter_scores import predict_scores


@dataclass
class Scored:
    """What a segmenter says of one image.

    Attributes:
        index: its row in the data set.
        image: the RGB image.
        classes: (K,) indices of the classes that are scored.
        scores: (K+1, H, W) their probabilities, refined or not, background first, of the image's own size; on the
            model's device.
    """

    index: int
    image: Image.Image
    classes: Tensor
    scores: Tensor


def score_images(
    model,
    processor: Callable,
    rows: Dataset,
    settings: dict,
    only_tagged: bool = False,
    background_factor: float = 1.0,
) -> Iterator[Scored]:
    """Score every row of `rows` at its own size; images of one size are looked at together.

    Args:
        model: any model with `logits` (B, C+1, h, w), in eval mode, on the device to work on.
        processor: its image processor.
        settings: a recipe's section `evaluation` or `self_training`: the views as of [`predict_scores`], `refine`,
            `workers`, `batch_size`.
        only_tagged: score background and the tagged classes of an image alone: the other ones are left out before
            refinement, and what remains sums to 1.
        background_factor: of these, the background's is multiplied by this before.

    Raises:
        ValueError: the model's logits of an image are not finite; names the row.
        RefinementError: a step of refinement can't be built, or its library is missing.
    """
    ids = rows["image_id"][:]
    views = {key: settings[key] for key in ("scales", "flip", "window", "window_stride") if key in settings}
    refine = build_refiner(settings["refine"], settings["workers"])
    for batch in batches_by_size(rows, processor, settings["batch_size"]):
        scores = predict_scores(model, batch.pixel_values.to(model.device), batch.size, **views)
        for index, finite in zip(batch.indices, scores.isfinite().flatten(1).all(dim=1).tolist(), strict=True):
            if not finite:
                raise ValueError(
                    f"row {ids[index]!r}: the segmenter's logits are not finite; its training has gone wrong, or "
                    "its precision is too low"
                )
        if only_tagged:
            classes = [tags.nonzero()[:, 0].to(scores.device) for tags in batch.tags]
            per_image = [
                _of_classes(one, present, background_factor) for one, present in zip(scores, classes, strict=True)
            ]
        else:
            classes = [torch.arange(scores.shape[1] - 1, device=scores.device)] * len(scores)
            per_image = list(scores)
        refined = refine.batch(per_image, [np.asarray(image) for image in batch.images], [Note() for _ in per_image])
        for scored in zip(batch.indices, batch.images, classes, refined, strict=True):
            yield Scored(*scored)


def _of_classes(scores: Tensor, classes: Tensor, background_factor: float) -> Tensor:
    """(C+1, H, W) probabilities → (K+1, H, W), background's and those of `classes` (K,), among each other."""
    possible = scores[torch.cat([classes.new_zeros(1), classes + 1])]
    possible[0] *= background_factor
    return possible / possible.sum(dim=0).clamp_min(torch.finfo(scores.dtype).tiny)


@dataclass
class Segmented:
    """What a segmenter made of one image.

    Attributes:
        index: its row in the data set.
        image_id: its name.
        image: the RGB image.
        labels: (H, W) uint8, of the image's own size.
    """

    index: int
    image_id: str
    image: Image.Image
    labels: np.ndarray


def segment_images(model, processor: Callable, rows: Dataset, settings: dict) -> Iterator[Segmented]:
    """Label every row of `rows` at its own size, refined or by the highest score.

    Args:
        model, processor: as of [`score_images`].
        settings: a recipe's `evaluation` section.

    Raises:
        ValueError: as [`score_images`].
    """
    ids = rows["image_id"][:]
    for scored in score_images(model, processor, rows, settings):
        labels = scored.scores.argmax(dim=0).cpu().numpy().astype(np.uint8)
        yield Segmented(scored.index, ids[scored.index], scored.image, labels)
