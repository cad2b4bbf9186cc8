"""Label maps as pictures: files with the palette of PASCAL VOC, and overlays on the image in colours to look at."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

_IGNORE = 255
# Okabe and Ito's palette without black, then always the colour farthest (CIELAB, also for deuteranopes and protanopes,
# Machado et al. 2009) from all before it and from grey: at least 17 apart.
_DISTINCT = (
    "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 4400ff 99ffaa 0077ff "
    "992222 77ffff 55bb66 ccee77 44ddaa 990077 6633bb 6699ff 883344 bb1100"
).split()
_SHADES = (0, -0.45, 0.5, -0.25, 0.3, -0.6, 0.7, -0.35, 0.4, -0.15, 0.2, -0.5, 0.6)  # towards black, towards white


def voc_palette() -> list[int]:
    """The 256 colours of PASCAL VOC as 768 numbers r0, g0, b0, r1, … in 0..255.

    The bits of a label are dealt to red, green and blue in turn, the lowest three bits to their highest bits.
    """
    labels, channels = np.arange(256)[:, None], np.arange(3)
    colors = sum(((labels >> (3 * bit + channels)) & 1) << (7 - bit) for bit in range(8))
    return np.asarray(colors).ravel().tolist()


_PALETTE = voc_palette()


def mask_image(labels: np.ndarray) -> Image.Image:
    """Label map (H, W) uint8 → PIL image of mode "P" with the VOC palette; the pixel values stay the labels."""
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise ValueError(f"a label map is a uint8 array (H, W), not {labels.dtype} {labels.shape}")
    image = Image.fromarray(labels)
    image.putpalette(_PALETTE)
    return image


def display_colors() -> np.ndarray:
    """Colour of every label in overlays and legends, uint8 (256, 3): the first 20 classes are distinct to everybody.

    Further ones repeat them darker or lighter. Background (0) is black, ignore (255) grey; neither is drawn as such.
    """
    base = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in _DISTINCT], dtype=np.float64)
    colors = [base + abs(shade) * ((255 if shade > 0 else 0) - base) for shade in _SHADES]
    classes = np.concatenate(colors)[: _IGNORE - 1]
    return np.concatenate([np.zeros((1, 3)), classes, np.full((1, 3), 128)]).round().astype(np.uint8)


def overlay(image: Image.Image, labels: np.ndarray, alpha: float = 0.45) -> Image.Image:
    """Objects as a translucent fill with a solid contour, which a thin line around it, white or black, sets off.

    All of it lies inside the object, so the background is untouched. Ignored pixels are hatched in grey.

    Args:
        image: picture of W x H pixels.
        labels: (H, W) integers, 0 = background, 255 = ignore. Of another size than the image, a ValueError.
        alpha: weight of the fill in [0, 1].
    """
    labels = np.asarray(labels)
    if labels.shape != (image.height, image.width):
        size = "x".join(map(str, labels.shape[::-1]))
        raise ValueError(f"a label map of {size} pixels does not fit an image of {image.width}x{image.height}")
    pixels = np.array(image.convert("RGB"))
    palette = display_colors()
    drawn = (labels > 0) & (labels != _IGNORE)
    pixels[drawn] = _mixed(pixels[drawn], palette[labels[drawn]], alpha)
    width = max(1, round(max(labels.shape) / 250))  # 2 pixels of a photograph of 500
    rows, columns = np.nonzero(labels == _IGNORE)
    stripe = ((rows + columns) // (2 * width) % 3 == 0)[:, None]
    pixels[rows, columns] = np.where(stripe, 200, _mixed(pixels[rows, columns], palette[_IGNORE], 0.35))

    line = max(1, width // 2)
    outline = _near_another(labels, line + width) & drawn
    pixels[outline] = palette[labels[outline]]
    outline &= _near_another(labels, line)
    is_light = palette[labels[outline]] @ np.array([0.299, 0.587, 0.114]) > 130
    pixels[outline] = np.where(is_light, 0, 255)[:, None]
    return Image.fromarray(pixels)


def _mixed(pixels: np.ndarray, color: np.ndarray, weight: float) -> np.ndarray:
    return (pixels + weight * (color - pixels.astype(np.float32))).round().astype(np.uint8)


def _near_another(labels: np.ndarray, distance: int) -> np.ndarray:
    """(H, W) bool: pixels with another label at most `distance` rows and columns away."""
    largest, size = torch.from_numpy(np.stack([labels, -1.0 * labels]).astype(np.float32)), 2 * distance + 1
    for kernel, padding in (((1, size), (0, distance)), ((size, 1), (distance, 0))):
        largest = F.max_pool2d(largest, kernel, stride=1, padding=padding)
    return (largest[0] != -largest[1]).numpy()
