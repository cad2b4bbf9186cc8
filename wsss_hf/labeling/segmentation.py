"""Label maps of a segmenter for a whole data set: the test protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from PIL import Image

from ..data.batches import batches_by_size
from .prediction import predict_scores
from .refine import build_refiner


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
    """Label every row of `rows` at its own size; images of one size are looked at together.

    Args:
        model: any model with `logits` (B, C+1, h, w), in eval mode, on the device to work on.
        processor: its image processor.
        settings: a recipe's `evaluation` section: `scales`, `flip`, `window`, `window_stride`, `refine`, `batch_size`.

    Raises:
        ValueError: the model's logits of an image are not finite; names the row.
    """
    views = {key: settings[key] for key in ("scales", "flip", "window", "window_stride")}
    refine = build_refiner(settings["refine"])
    ids = rows["image_id"][:]
    for batch in batches_by_size(rows, processor, settings["batch_size"]):
        scores = predict_scores(model, batch.pixel_values.to(model.device), batch.size, **views)
        finite = scores.isfinite().flatten(1).all(dim=1).tolist()
        for i, (index, image) in enumerate(zip(batch.indices, batch.images, strict=True)):
            if not finite[i]:
                raise ValueError(
                    f"row {ids[index]!r}: the segmenter's logits are not finite; its training has gone wrong, or "
                    "its precision is too low"
                )
            labels = refine(scores[i], np.asarray(image)).argmax(dim=0) if settings["refine"] else scores[i].argmax(0)
            yield Segmented(index, ids[index], image, labels.cpu().numpy().astype(np.uint8))
