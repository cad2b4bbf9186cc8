"""Batches of whole images for inference: images of one size stand together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from .tagged import DataError, class_names, decode_image, tags_to_multi_hot, undecoded


@dataclass
class ImageBatch:
    """Images of one size.

    Attributes:
        indices: their rows in the data set.
        images: RGB images.
        pixel_values: (B, 3, h, w) what the image processor made of them.
        tags: (B, C) float 0/1.
        size: (H, W) of the images.
        saliency: (B, H, W) float in [0, 1], where it was asked for.
    """

    indices: list[int]
    images: list[Image.Image]
    pixel_values: Tensor
    tags: Tensor
    size: tuple[int, int]
    saliency: Tensor | None = None


def batches_by_size(
    rows: Dataset, processor: Callable, batch_size: int, saliency: bool = False
) -> Iterator[ImageBatch]:
    """All rows, in batches of at most `batch_size` images of one size, read in windows of eight batches.

    Args:
        saliency: also read the column of that name.

    Raises:
        DataError: an image does not decode, or its saliency is missing or of another size; names the row.
    """
    num_classes = len(class_names(rows))
    if saliency and "saliency" not in rows.column_names:
        raise DataError(f"there is no column saliency, only {', '.join(rows.column_names)}")
    columns = ["image_id", "image", "tags", *(["saliency"] if saliency else [])]
    rows = undecoded(rows.select_columns(columns))
    for start in range(0, len(rows), 8 * batch_size):
        groups: dict[tuple[int, int], list[tuple[int, Image.Image, Tensor, Tensor | None]]] = {}
        for index in range(start, min(start + 8 * batch_size, len(rows))):
            row = rows[index]
            image = decode_image(row["image"], f"row {row['image_id']!r}")
            salient = _saliency(row, image.size) if saliency else None
            item = (index, image, tags_to_multi_hot(row["tags"], num_classes), salient)
            groups.setdefault((image.height, image.width), []).append(item)
        for size, items in groups.items():
            for first in range(0, len(items), batch_size):
                indices, images, tags, salient = zip(*items[first : first + batch_size], strict=True)
                pixel_values = processor(images=list(images), return_tensors="pt")["pixel_values"]
                yield ImageBatch(
                    indices=list(indices),
                    images=list(images),
                    pixel_values=pixel_values,
                    tags=torch.stack(tags),
                    size=size,
                    saliency=torch.stack(salient) if saliency else None,
                )


def _saliency(row: dict, size: tuple[int, int]) -> Tensor:
    where = f"row {row['image_id']!r}, column saliency"
    image = decode_image(row["saliency"], where).convert("L")
    if image.size != size:
        raise DataError(
            f"{where}: it is {image.width}x{image.height} but its image is {size[0]}x{size[1]}; they must be the same"
        )
    return torch.from_numpy(np.array(image)).float() / 255
