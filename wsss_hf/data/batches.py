"""Batches of whole images for inference: images of one size stand together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from .tagged import class_names, decode_image, tags_to_multi_hot, undecoded


@dataclass
class ImageBatch:
    """Images of one size.

    Attributes:
        indices: their rows in the data set.
        images: RGB images.
        pixel_values: (B, 3, h, w) what the image processor made of them.
        tags: (B, C) float 0/1.
        size: (H, W) of the images.
    """

    indices: list[int]
    images: list[Image.Image]
    pixel_values: Tensor
    tags: Tensor
    size: tuple[int, int]


def batches_by_size(rows: Dataset, processor: Callable, batch_size: int) -> Iterator[ImageBatch]:
    """All rows, in batches of at most `batch_size` images of one size, read in windows of eight batches.

    Raises:
        DataError: an image does not decode; names the row.
    """
    num_classes = len(class_names(rows))
    rows = undecoded(rows.select_columns(["image_id", "image", "tags"]))
    for start in range(0, len(rows), 8 * batch_size):
        groups: dict[tuple[int, int], list[tuple[int, Image.Image, Tensor]]] = {}
        for index in range(start, min(start + 8 * batch_size, len(rows))):
            row = rows[index]
            image = decode_image(row["image"], f"row {row['image_id']!r}")
            item = (index, image, tags_to_multi_hot(row["tags"], num_classes))
            groups.setdefault((image.height, image.width), []).append(item)
        for size, items in groups.items():
            for first in range(0, len(items), batch_size):
                indices, images, tags = zip(*items[first : first + batch_size], strict=True)
                pixel_values = processor(images=list(images), return_tensors="pt")["pixel_values"]
                yield ImageBatch(list(indices), list(images), pixel_values, torch.stack(tags), size)
