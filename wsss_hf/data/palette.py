"""Label maps as palette PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..files import whole_file
from ..models.label_colors import mask_image, voc_palette
from ..models.maps import IGNORE_INDEX
from .text import DataError


def check_palette(image: Image.Image, num_labels: int, where: str) -> None:
    """Refuses a palette image whose values were renumbered, as editors and PNG optimisers do.

    A palette tells so if every value has the VOC colour of a label, 0..num_labels-1 or 255, or its grey level, and one
    value has that of another label. Other palettes are accepted: they tell nothing. Neither do black and white.

    Raises:
        DataError: it was renumbered; begins with `where`.
    """
    if image.mode != "P":
        return
    values = np.unique(np.asarray(image))
    palette = np.zeros((256, 3), dtype=np.int64)
    given = np.array(image.getpalette("RGB")).reshape(-1, 3)
    palette[: len(given)] = given
    meant = np.array([*range(num_labels), IGNORE_INDEX])
    greys = np.repeat(np.arange(256)[:, None], 3, axis=1)
    for known in (np.array(voc_palette()).reshape(256, 3), greys):
        same = (palette[values][:, None] == known[meant]).all(axis=2)
        labels = meant[same.argmax(axis=1)]
        if not same.any(axis=1).all() or (known is greys and not np.setdiff1d(labels, (0, IGNORE_INDEX)).size):
            continue
        if (labels != values).any():
            value, label = next((v, n) for v, n in zip(values, labels, strict=True) if v != n)
            raise DataError(
                f"{where}: expected pixel values that are the labels, got value {value} in the colour of label "
                f"{label} (a program has renumbered them)"
            )


def save_mask_png(path: str | Path, labels: np.ndarray) -> None:
    """Write a label map (H, W) uint8 as a palette PNG; the file appears complete or not at all."""
    with whole_file(path) as unfinished:
        mask_image(labels).save(unfinished, format="PNG")
