"""Felzenszwalb superpixels of the images of a data set, computed once and kept as a column of 16-bit PNGs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from skimage.segmentation import felzenszwalb

from .tagged import DataError, decode_image, encode_png, undecoded

_MOST = 1 << 16  # values of a 16-bit PNG


def superpixels(image: Image.Image, size: int, scale: float, sigma: float, min_size: int) -> np.ndarray:
    """Felzenszwalb superpixels of an RGB image whose short side is first reduced to `size`, if it is longer.

    Args:
        size: pixels; large photographs would take minutes.
        scale: larger values give larger superpixels.
        sigma: standard deviation, in pixels, of the smoothing before.
        min_size: pixels of the smallest superpixel.

    Returns:
        (h, w) uint16, numbered from 0.

    Raises:
        DataError: more than 65,536 superpixels.
    """
    factor = min(1.0, size / min(image.size))
    if factor < 1:
        image = image.resize([round(side * factor) for side in image.size], Image.Resampling.BILINEAR)
    found = felzenszwalb(np.asarray(image), scale=scale, sigma=sigma, min_size=min_size)
    if found.max() >= _MOST:
        count = found.max() + 1
        raise DataError(f"superpixels: expected at most {_MOST} in an image, got {count}; use a larger min_size")
    return found.astype(np.uint16)


def superpixel_column(
    rows: Dataset, size: int, options: dict, cache_file: str | Path, advance: Callable[[int], None] = lambda _: None
) -> Dataset:
    """A data set with one column, `superpixels`, a 16-bit PNG for each of `rows`.

    Args:
        size, options: arguments of [`superpixels`].
        cache_file: where the column is kept; it appears whole, and is read instead of computed if it exists.
        advance: called with the number of images that are done.

    Raises:
        DataError: an image does not decode; names the row.
    """

    def compute(row: dict) -> dict:
        image = decode_image(row["image"], f"row {row['image_id']!r}")
        picture = Image.fromarray(superpixels(image, size, **options))
        advance(1)
        return {"superpixels": encode_png(picture)}

    return undecoded(rows.select_columns(["image_id", "image"])).map(
        compute,
        remove_columns=["image_id", "image"],
        features=Features({"superpixels": ImageFeature()}),
        cache_file_name=str(cache_file),
        new_fingerprint="superpixels",  # the caller knows what the file holds
    )
