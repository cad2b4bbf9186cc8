"""Localisation maps: how CAM logits become maps in [0, 1], scores and labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = 255


def normalize_maps(
    maps: Tensor, tags: Tensor | None = None, size: tuple[int, int] | None = None, align_corners: bool = False
) -> Tensor:
    """Normalised CAMs: relu, bilinear upsampling, division by the spatial maximum class by class, × tags.

    Args:
        maps: (B, C, h, w) CAM logits or any other localisation maps.
        tags: (B, C) 0/1 image-level labels; untagged classes become 0.
        size: (H, W) to upsample to; None keeps (h, w).

    Returns:
        (B, C, H, W) in [0, 1).
    """
    maps = maps.float().relu()
    if size is not None and tuple(size) != tuple(maps.shape[-2:]):
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)
    maps = maps / (maps.amax(dim=(-2, -1), keepdim=True) + 1e-5)
    return maps if tags is None else maps * tags.to(maps)[:, :, None, None]


def add_background(maps: Tensor, threshold: float) -> Tensor:
    """(B, C, H, W) maps in [0, 1] → (B, C+1, H, W) scores; channel 0, the background, is `threshold` everywhere."""
    background = maps.new_full((maps.shape[0], 1, *maps.shape[2:]), threshold)
    return torch.cat([background, maps], dim=1)
