"""Label maps and localisation maps as pictures a person can read."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..data.palette import colorize

# From blue over red to yellow with steadily rising lightness, so that a brighter pixel always is a higher value.
RAMP = ("#0d0887", "#6a00a8", "#b12a90", "#e16462", "#fca636", "#f0f921")
_RAMP_RGB = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in RAMP], dtype=np.float64)


def heatmap(values: np.ndarray) -> Image.Image:
    """A map (H, W) in [0, 1] as an RGB image, colours interpolated along `RAMP`; values outside are clipped."""
    position = np.clip(np.asarray(values, dtype=np.float64), 0, 1) * (len(RAMP) - 1)
    channels = [np.interp(position, np.arange(len(RAMP)), channel) for channel in _RAMP_RGB.T]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def blend(image: Image.Image, heat: Image.Image, alpha: float = 0.6) -> Image.Image:
    """`heat`, resized, with weight `alpha` over the grey image: no colour of the image can be taken for a value."""
    return Image.blend(image.convert("L").convert("RGB"), heat.resize(image.size, Image.Resampling.BILINEAR), alpha)


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
