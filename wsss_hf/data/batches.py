"""Batches of whole images for inference, each of images of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from .tagged import DataError, class_names, decode_image, decode_saliency, tags_to_multi_hot, undecoded


@dataclass
class ImageBatch:
    """Images of one size.

    Attributes:
        indices: their rows in the data set.
        images: RGB images.
        pixel_values: (B, 3, h, w) float, the output of the image processor.
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
    rows: Dataset, processor: Callable, batch_size: int, saliency: bool = False, native: bool = False
) -> Iterator[ImageBatch]:
    """All rows, in batches of at most `batch_size` images of one size, read in windows of eight batches.

    Args:
        saliency: also read the column of that name, see [`decode_saliency`].
        native: the processor leaves the size of the images as it is.

    Raises:
        DataError: an image does not decode, or its saliency is missing or of another aspect; names the row.
    """
    num_classes = len(class_names(rows))
    options = {"do_resize": False} if native else {}
    if saliency and "saliency" not in rows.column_names:
        raise DataError(f"data set: expected a column 'saliency', got {', '.join(rows.column_names)}")
    columns = ["image_id", "image", "tags", *(["saliency"] if saliency else [])]
    rows = undecoded(rows.select_columns(columns))
    for start in range(0, len(rows), 8 * batch_size):
        groups: dict[tuple[int, int], list[tuple[int, Image.Image, Tensor, Tensor | None]]] = {}
        for index in range(start, min(start + 8 * batch_size, len(rows))):
            row = rows[index]
            image = decode_image(row["image"], f"row {row['image_id']!r}")
            tags = tags_to_multi_hot(row["tags"], num_classes)
            item = (index, image, tags, _saliency(row, image.size) if saliency else None)
            groups.setdefault((image.height, image.width), []).append(item)
        for size, items in groups.items():
            for first in range(0, len(items), batch_size):
                part = items[first : first + batch_size]
                images = [image for _, image, _, _ in part]
                salient = [found for _, _, _, found in part if found is not None]
                yield ImageBatch(
                    indices=[index for index, _, _, _ in part],
                    images=images,
                    pixel_values=processor(images=images, return_tensors="pt", **options)["pixel_values"],
                    tags=torch.stack([tags for _, _, tags, _ in part]),
                    size=size,
                    saliency=torch.stack(salient) if saliency else None,
                )


def _saliency(row: dict, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(decode_saliency(row["saliency"], size, f"row {row['image_id']!r}, column saliency"))
