"""From the outputs of a network to maps, scores and labels, at the size of the image."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = 255


def upsample(maps: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """(..., h, w) → (..., H, W) float32, bilinear: two products with matrices are faster for few maps."""
    maps = maps.float()
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    rows, columns = (
        F.interpolate(torch.eye(old, device=maps.device)[None], new, mode="linear", align_corners=align_corners)[0]
        for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    with torch.autocast(maps.device.type, enabled=False):
        return rows.T @ (maps @ columns)


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
    if size is not None:
        maps = upsample(maps, size, align_corners)
    maps = maps / (maps.amax(dim=(-2, -1), keepdim=True) + 1e-5)
    return maps if tags is None else maps * tags.to(maps)[:, :, None, None]


def fuse_maps(
    views: Iterable[Tensor], tags: Tensor, size: tuple[int, int], fusion: str = "mean", normalize: bool = True
) -> Tensor:
    """The maps of the tagged classes, normalised at image size in each view, fused, and normalised again.

    Args:
        views: (B, C, h, w) localisation maps of the same images, of any sizes; at least one.
        tags: (B, C) 0/1; the maps of other classes are not looked at.
        size: (H, W) of the images.
        fusion: "mean" or "max" over the views.
        normalize: False takes the maps for values in [0, 1] as they are, cut off where they are not.

    Returns:
        (N, H, W) in [0, 1), one per tagged class of an image, N = number of ones in `tags`, in row-major order of
        `tags`. A map that is zero everywhere stays zero; every other one reaches 1 somewhere, but for rounding.

    Raises:
        ValueError: `fusion` is unknown.
    """
    if fusion not in ("mean", "max"):
        raise ValueError(f"fusion: expected mean or max, got {fusion!r}")
    images, classes = tags.nonzero(as_tuple=True)
    join = torch.maximum if fusion == "max" else torch.add
    fused, count = None, 0
    for view in views:
        maps = view[images, classes]
        maps = normalize_maps(maps[None], size=size)[0] if normalize else upsample(maps.clamp(0, 1), size)
        fused, count = maps if fused is None else join(fused, maps), count + 1
    if fused is None:
        raise ValueError("views: expected at least one, got none")
    return normalize_maps(fused[None])[0] if normalize else fused / (1 if fusion == "max" else count)


def at_all_classes(maps: Tensor, tags: Tensor) -> Tensor:
    """(N, H, W) maps of the tagged classes, as of [`fuse_maps`], → (B, C, H, W), 0 for all other classes."""
    spread = maps.new_zeros(*tags.shape, *maps.shape[1:])
    spread[tags.bool()] = maps
    return spread


def add_background(maps: Tensor, threshold: float) -> Tensor:
    """(B, C, H, W) maps in [0, 1] → (B, C+1, H, W) scores; channel 0, the background, is `threshold` everywhere."""
    background = maps.new_full((maps.shape[0], 1, *maps.shape[2:]), threshold)
    return torch.cat([background, maps], dim=1)
