"""Label maps as colours: the palette of PASCAL VOC, and overlays on the image."""

from __future__ import annotations

import numpy as np
from PIL import Image


def voc_palette() -> list[int]:
    """The 256 colours of PASCAL VOC as 768 numbers r0, g0, b0, r1, … in 0..255.

    The bits of a label are dealt to red, green and blue in turn, the lowest three bits to their highest bits.
    """
    labels = np.arange(256)[:, None]
    channels = np.arange(3)[None, :]
    colors = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        colors |= ((labels >> (3 * bit + channels)) & 1) << (7 - bit)
    return colors.ravel().tolist()


_PALETTE = voc_palette()


def mask_image(labels: np.ndarray) -> Image.Image:
    """Label map (H, W) uint8 → PIL image of mode "P" with the VOC palette; the pixel values stay the labels."""
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise ValueError(f"a label map is a uint8 array (H, W), not {labels.dtype} {labels.shape}")
    image = Image.fromarray(labels)
    image.putpalette(_PALETTE)
    return image


def colorize(labels: np.ndarray) -> np.ndarray:
    """Label map (H, W) of integers 0..255 → RGB uint8 (H, W, 3) in the VOC colours."""
    return np.array(_PALETTE, dtype=np.uint8).reshape(256, 3)[labels]


def overlay(image: Image.Image, labels: np.ndarray, alpha: float = 0.55) -> Image.Image:
    """Labels in the VOC colours with weight `alpha` over the image, outlines in full colour, background untouched.

    Args:
        image: picture of W x H pixels.
        labels: (H, W) integers, 0 = background, 255 = ignore (drawn in the palette's cream).
        alpha: weight of the colours in [0, 1].

    Raises:
        ValueError: the labels have another size than the image.
    """
    labels = np.asarray(labels)
    if labels.shape != (image.height, image.width):
        size = "x".join(map(str, labels.shape[::-1]))
        raise ValueError(f"a label map of {size} pixels does not fit an image of {image.width}x{image.height}")
    weight = np.where(_outlines(labels), 1.0, alpha) * (labels > 0)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    mixed = pixels + weight[..., None] * (colorize(labels) - pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def _outlines(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels with a right or lower, left or upper neighbour of another label."""
    edges = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        differs = np.diff(labels.astype(np.int16), axis=axis) != 0
        edges |= np.insert(differs, 0, False, axis=axis) | np.insert(differs, differs.shape[axis], False, axis=axis)
    return edges
