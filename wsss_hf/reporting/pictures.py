"""Class activation maps as pictures: heatmaps, and heatmaps over the image."""

from __future__ import annotations

import numpy as np
from PIL import Image

# From blue over red to yellow; lightness rises steadily: a brighter pixel has a higher value.
RAMP = ("#0d0887", "#6a00a8", "#b12a90", "#e16462", "#fca636", "#f0f921")
_RAMP_RGB = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in RAMP], dtype=np.float64)


def heatmap(values: np.ndarray) -> Image.Image:
    """A map (H, W) in [0, 1] as an RGB image, colours interpolated along `RAMP`; values outside are clipped."""
    position = np.clip(np.asarray(values, dtype=np.float64), 0, 1) * (len(RAMP) - 1)
    channels = [np.interp(position, np.arange(len(RAMP)), channel) for channel in _RAMP_RGB.T]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def blend(image: Image.Image, heat: Image.Image, alpha: float = 0.6) -> Image.Image:
    """`heat`, resized, with weight `alpha` over the image in grey (its colours could be mistaken for values)."""
    return Image.blend(image.convert("L").convert("RGB"), heat.resize(image.size, Image.Resampling.BILINEAR), alpha)
