"""Trimaps: which pixels of a localisation map are certain, and which ones matting has to decide."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

BACKGROUND, UNKNOWN, FOREGROUND = 0, 128, 255
_SQUARE = np.ones((3, 3), dtype=bool)


def trimap(
    scores: np.ndarray,
    other_foreground: np.ndarray,
    foreground_threshold: float = 0.7,
    background_threshold: float = 0.2,
    erosion: int = 3,
) -> np.ndarray:
    """Certain foreground, certain background and unknown pixels of one class (Mat-Label).

    Foreground is where the map exceeds `foreground_threshold`, background where it is below `background_threshold` or
    where another class is certain. Both then lose their borders to unknown; the image's own border does not erode.

    Where that leaves a side empty:
    - a region that erosion would remove completely keeps its size;
    - no pixel above `foreground_threshold`: the class's largest score, if above `background_threshold`, is foreground;
      otherwise (a map that is zero everywhere, say) the class was not found, and everything is background;
    - no background is left as it is: there are two values only, and the caller decides.

    Args:
        scores: (H, W) localisation map in [0, 1].
        other_foreground: (H, W) bool, certain foreground of any other class.
        erosion: width in pixels of the border that becomes unknown.

    Returns:
        (H, W) uint8: 0 background, 128 unknown, 255 foreground.

    Raises:
        ValueError: shapes differ, or thresholds or erosion are out of range.
    """
    _check_settings(foreground_threshold, background_threshold, erosion)
    if scores.ndim != 2 or scores.shape != other_foreground.shape:
        raise ValueError(
            f"trimap: expected a map and other_foreground of one shape (H, W), got {scores.shape} "
            f"and {other_foreground.shape}"
        )
    foreground = (scores > foreground_threshold) & ~other_foreground
    if not foreground.any():
        available = np.where(other_foreground, 0, scores)
        foreground = (available == available.max()) & (available > background_threshold)
        if not foreground.any():
            return np.full(scores.shape, BACKGROUND, dtype=np.uint8)
    background = (scores < background_threshold) | other_foreground
    result = np.full(scores.shape, UNKNOWN, dtype=np.uint8)
    result[_eroded(background, erosion)] = BACKGROUND
    result[_eroded(foreground, erosion)] = FOREGROUND
    return result


def trimaps(
    maps: np.ndarray, foreground_threshold: float = 0.7, background_threshold: float = 0.2, erosion: int = 3
) -> np.ndarray:
    """The `trimap` of every class of an image.

    A pixel that several classes are certain of is unknown to all of them, except to a class that is certain of no
    other pixel.

    Args:
        maps: (K, H, W) localisation maps in [0, 1] of the tagged classes.

    Returns:
        (K, H, W) uint8: 0 background, 128 unknown, 255 foreground.
    """
    _check_settings(foreground_threshold, background_threshold, erosion)
    certain = maps > foreground_threshold
    claims = certain.sum(axis=0)
    contested = np.where(claims > 1, np.minimum(maps, foreground_threshold), maps)
    return np.array(
        [
            trimap(contested[k], (claims == 1) & ~certain[k], foreground_threshold, background_threshold, erosion)
            for k in range(len(maps))
        ],
        dtype=np.uint8,
    ).reshape(maps.shape)


def _check_settings(foreground_threshold: float, background_threshold: float, erosion: int) -> None:
    if not 0 <= background_threshold < foreground_threshold <= 1:
        raise ValueError(
            "background_threshold, foreground_threshold: expected 0 <= background < foreground <= 1, "
            f"got {background_threshold}, {foreground_threshold}"
        )
    if erosion < 0:
        raise ValueError(f"erosion: expected a number of pixels >= 0, got {erosion}")


def _eroded(region: np.ndarray, width: int) -> np.ndarray:
    if width == 0:
        return region
    smaller = ndimage.binary_erosion(region, _SQUARE, iterations=width, border_value=1)
    return smaller if smaller.any() else region
