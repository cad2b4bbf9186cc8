"""Class probabilities of a segmenter, at the size of the image."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .maps import upsample


def mean_probabilities(views: Iterable[Tensor], size: tuple[int, int]) -> Tensor:
    """(B, C+1, h, w) logits of the same images in at least one view → (B, C+1, H, W) mean softmax at image size."""
    total: Tensor | None = None
    count = 0
    for logits in views:  # a named softmax would stay in memory beside the next one
        total = upsample(logits, size).softmax(dim=1) + (0 if total is None else total)
        count += 1
    if total is None:
        raise ValueError("views: expected at least one, got none")
    return total / count


def class_probabilities(probabilities: Tensor, classes: Tensor, background_factor: float = 1.0) -> Tensor:
    """One image's probabilities of background and some classes, given that no other class is there.

    Args:
        probabilities: (C+1, H, W), background first.
        classes: (K,) class indices c.
        background_factor: the background's probability is multiplied by this before.

    Returns:
        (K+1, H, W), summing to 1.
    """
    possible = probabilities[torch.cat([classes.new_zeros(1), classes + 1])]
    possible[0] *= background_factor
    return possible / possible.sum(dim=0).clamp_min(torch.finfo(probabilities.dtype).tiny)
