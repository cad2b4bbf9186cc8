"""Label maps as colours and as palette PNG files."""

import os
from pathlib import Path

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


def save_mask_png(path: str | Path, labels: np.ndarray) -> None:
    """Write a label map (H, W) uint8 as a palette PNG; the file appears complete or not at all."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        mask_image(labels).save(unfinished, format="PNG")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def colorize(labels: np.ndarray) -> np.ndarray:
    """Label map (H, W) of integers 0..255 → RGB uint8 (H, W, 3) in the VOC colours."""
    return np.array(_PALETTE, dtype=np.uint8).reshape(256, 3)[labels]
