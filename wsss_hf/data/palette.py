"""Label maps as palette PNG files."""

import os
from pathlib import Path

import numpy as np

from ..models.colors import colorize, mask_image, voc_palette

__all__ = ["colorize", "mask_image", "save_mask_png", "voc_palette"]


def save_mask_png(path: str | Path, labels: np.ndarray) -> None:
    """Write a label map (H, W) uint8 as a palette PNG; the file appears complete or not at all."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        mask_image(labels).save(unfinished, format="PNG")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
