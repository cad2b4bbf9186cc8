"""What a segmenter says of a whole data set: class probabilities, and the label maps of the test protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..data.batches import batches_by_size
from .prediction import predict_scores
from .refine import build_refiner


@dataclass
class Scored:
    """What a segmenter says of one image.

    Attributes:
        index: its row in the data set.
        image: the RGB image.
        tags: (C,) 0/1.
        scores: (C+1, H, W) class probabilities, background first, of the image's own size, on the model's device.
    """

    index: int
    image: Image.Image
    tags: Tensor
    scores: Tensor


def score_images(model, processor: Callable, rows: Dataset, batch_size: int, **views) -> Iterator[Scored]:
    """Score every row of `rows` at its own size; images of one size are looked at together.

    Args:
        model: any model with `logits` (B, C+1, h, w), in eval mode, on the device to work on.
        processor: its image processor.
        views: `scales`, `flip`, `window`, `window_stride`, as of [`predict_scores`].

    Raises:
        ValueError: the model's logits of an image are not finite; names the row.
    """
    ids = rows["image_id"][:]
    for batch in batches_by_size(rows, processor, batch_size):
        scores = predict_scores(model, batch.pixel_values.to(model.device), batch.size, **views)
        finite = scores.isfinite().flatten(1).all(dim=1).tolist()
        for i, index in enumerate(batch.indices):
            if not finite[i]:
                raise ValueError(
                    f"row {ids[index]!r}: the segmenter's logits are not finite; its training has gone wrong, or "
                    "its precision is too low"
                )
            yield Scored(index, batch.images[i], batch.tags[i], scores[i])


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
        settings: a recipe's `evaluation` section: `scales`, `flip`, `window`, `window_stride`, `refine`, `batch_size`.

    Raises:
        ValueError: as [`score_images`].
    """
    views = {key: settings[key] for key in ("scales", "flip", "window", "window_stride")}
    refine = build_refiner(settings["refine"], settings["workers"])
    ids = rows["image_id"][:]
    for scored in score_images(model, processor, rows, settings["batch_size"], **views):
        scores = refine(scored.scores, np.asarray(scored.image)) if settings["refine"] else scored.scores
        labels = scores.argmax(dim=0).cpu().numpy().astype(np.uint8)
        yield Segmented(scored.index, ids[scored.index], scored.image, labels)
