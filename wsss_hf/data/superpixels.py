"""Felzenszwalb superpixels of the images of a data set, computed once and kept as a column of 16-bit PNGs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from scipy.sparse import coo_array
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
    found = felzenszwalb(np.asarray(_reduced(image, size)), scale=scale, sigma=sigma, min_size=min_size)
    if found.max() >= _MOST:
        count = found.max() + 1
        raise DataError(f"superpixels: expected at most {_MOST} in an image, got {count}; use a larger min_size")
    return found.astype(np.uint16)


def _reduced(image: Image.Image, size: int) -> Image.Image:
    factor = min(1.0, size / min(image.size))
    if factor == 1:
        return image
    return image.resize([round(side * factor) for side in image.size], Image.Resampling.BILINEAR)


def mean_features(labels: np.ndarray, features: np.ndarray, extent: tuple[int, int]) -> np.ndarray:
    """The mean of a feature map, enlarged bilinearly corner on corner, over each superpixel.

    Args:
        labels: (H, W), superpixels numbered from 0, each number with a pixel.
        features: (D, h, w), of an image that `labels` covers the top left of.
        extent: (H', W') of that image, at least (H, W).

    Returns:
        (N, D) float64.
    """
    depth, *grid = features.shape
    axes = []
    for length, whole, cells in zip(labels.shape, extent, grid, strict=True):
        place = np.arange(length) * ((cells - 1) / max(whole - 1, 1))
        low = place.astype(int)
        axes.append([(low, 1 - place + low), (np.minimum(low + 1, cells - 1), place - low)])
    # Each pixel looks at four cells: the weights of all cells in all superpixels, without the enlarged map.
    shares = [
        coo_array(((across * down[:, None]).ravel(), (labels.ravel(), (row[:, None] * grid[1] + column).ravel())),
                  shape=(labels.max() + 1, grid[0] * grid[1])).tocsr()
        for row, down in axes[0]
        for column, across in axes[1]
    ]  # fmt: skip
    return sum(shares) @ features.reshape(depth, -1).T.astype(float) / np.bincount(labels.ravel())[:, None]


def merge_superpixels(labels: np.ndarray, features: np.ndarray, count: int) -> np.ndarray:
    """Merge the two most alike superpixels, wherever they lie, until `count` are left, as ICD's program does.

    Alike is the cosine of their features, and 1 less the share of the image that both cover.

    Args:
        labels: (H, W), superpixels numbered from 0, each number with a pixel.
        features: (N, D), their mean features.

    Returns:
        (H, W) uint16, numbered from 0.
    """
    sizes, features = np.bincount(labels.ravel()).astype(float), features.astype(float)
    numbers = np.arange(len(sizes))
    kept, owner = numbers >= 0, numbers.copy()

    def likeness(one: int) -> np.ndarray:
        norms = np.linalg.norm(features, axis=1) * np.linalg.norm(features[one])
        found = features @ features[one] / norms.clip(1e-12) + 1 - (sizes + sizes[one]) / labels.size
        return np.where(kept & (numbers != one), found, -np.inf)

    alike = np.stack([likeness(one) for one in range(len(sizes))])
    for _ in range(len(sizes) - count):
        one, other = sorted(divmod(int(alike.argmax()), len(sizes)))
        pair = [one, other]
        features[one] = sizes[pair] @ features[pair] / sizes[pair].sum()
        sizes[one] += sizes[other]
        kept[other], owner[owner == other] = False, one
        alike[other] = alike[:, other] = -np.inf
        alike[one] = alike[:, one] = likeness(one)
    return np.unique(owner, return_inverse=True)[1][labels].astype(np.uint16)


def superpixel_column(
    rows: Dataset,
    size: int,
    options: dict,
    cache_file: str | Path,
    advance: Callable[[int], None] = lambda _: None,
    merge_to: int = 0,
    features: Callable[[Image.Image], tuple[np.ndarray, tuple[int, int]]] | None = None,
) -> Dataset:
    """A data set with one column, `superpixels`, a 16-bit PNG for each of `rows`.

    Args:
        size, options: arguments of [`superpixels`].
        cache_file: where the column is kept; it appears whole, and is read instead of computed if it exists.
        advance: called with the number of images that are done.
        merge_to: how many are left of each image's; 0 merges none, else
        features: gives `features` and `extent` of [`mean_features`] for an image.

    Raises:
        DataError: an image does not decode; names the row.
    """

    def compute(row: dict) -> dict:
        image = decode_image(row["image"], f"row {row['image_id']!r}")
        found = superpixels(image, size, **options)
        if merge_to and features is not None:
            found = merge_superpixels(found, mean_features(found, *features(_reduced(image, size))), merge_to)
        advance(1)
        return {"superpixels": encode_png(Image.fromarray(found))}

    return undecoded(rows.select_columns(["image_id", "image"])).map(
        compute,
        remove_columns=["image_id", "image"],
        features=Features({"superpixels": ImageFeature()}),
        cache_file_name=str(cache_file),
        new_fingerprint="superpixels",  # the caller knows what the file holds
    )
