"""Multi-scale localisation maps of a CAM classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.maps import normalize_maps
from ..models.modeling_cam import CamClassifier
from .segmenter_scores import resize_images

FUSIONS = ("mean", "max")


@torch.inference_mode()
def localize(
    model: CamClassifier,
    pixel_values: Tensor,
    tags: Tensor,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    fusion: str = "mean",
    bf16: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised maps of images of one size, fused over scales and mirror images.

    Args:
        pixel_values: (B, 3, h, w) normalised images at scale 1.
        tags: (B, C) 0/1; only maps of tagged classes are upsampled.
        size: (H, W) of the maps to return.
        scales: input sizes relative to `pixel_values`.
        flip: also look at the mirror image.
        fusion: "mean" or "max" over the views.
        bf16: compute the network in bfloat16; None does so on GPUs only. Maps are normalised and fused in float32.

    Returns:
        maps (N, H, W) in [0, 1), one per tagged class of an image, N = number of ones in `tags`, in row-major order of
        `tags`; and the tag logits (B, C), averaged over the views.

    Raises:
        ValueError: `fusion` is unknown.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion={fusion!r}: {' or '.join(map(repr, FUSIONS))} would be right")
    images, classes = tags.nonzero(as_tuple=True)
    fused, logits = None, []
    for outputs in _views(model, pixel_values, scales, flip, bf16):
        logits.append(outputs.logits.float())
        maps = normalize_maps(_upsampled(outputs.maps[images, classes].float().relu(), size)[None])[0]
        if fused is None:
            fused = maps
        else:
            fused = torch.maximum(fused, maps) if fusion == "max" else fused + maps
    # A map that is zero everywhere stays zero; every other one reaches 1 somewhere again.
    return normalize_maps(fused[:, None])[:, 0], torch.stack(logits).mean(dim=0)


@torch.inference_mode()
def average_maps(
    model: CamClassifier,
    pixel_values: Tensor,
    tags: Tensor,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    bf16: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Maps and CAM logits as the model gives them, not normalised, averaged over scales and mirror images.

    Args:
        pixel_values, tags, size, scales, flip, bf16: as of `localize`.

    Returns:
        maps and CAM logits, both (N, H, W) float32, one per tagged class of an image.
    """
    images, classes = tags.nonzero(as_tuple=True)
    total, count = 0, 0
    for outputs in _views(model, pixel_values, scales, flip, bf16):
        both = torch.stack([outputs.maps[images, classes], outputs.cams[images, classes]]).float()
        total = total + F.interpolate(both, size=size, mode="bilinear", align_corners=False)
        count += 1
    return tuple(total / count)


@dataclass
class _View:
    """What a model makes of images at one scale; mirror images are turned back."""

    maps: Tensor
    cams: Tensor
    logits: Tensor


def _upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h, w) maps, bilinearly at `size`: as products with two matrices, which for few maps is much faster."""
    rows, columns = (
        F.interpolate(torch.eye(there, device=maps.device)[None], size=wanted, mode="linear", align_corners=False)[0]
        for there, wanted in zip(maps.shape[-2:], size, strict=True)
    )
    return rows.T @ maps @ columns


def _views(
    model: CamClassifier, pixel_values: Tensor, scales: Sequence[float], flip: bool, bf16: bool | None
) -> Iterator[_View]:
    bf16 = pixel_values.is_cuda if bf16 is None else bf16
    for scale in scales:
        scaled = pixel_values if scale == 1 else resize_images(pixel_values, scale)
        with torch.autocast(scaled.device.type, dtype=torch.bfloat16, enabled=bf16):
            # Both mirror images in one pass.
            outputs = model(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled)
        whole = (outputs.maps, outputs.cams, outputs.logits)
        if not flip:
            yield _View(*whole)
            continue
        (maps, mirrored_maps), (cams, mirrored_cams), (logits, mirrored_logits) = (part.chunk(2) for part in whole)
        yield _View(maps, cams, logits)
        yield _View(mirrored_maps.flip(-1), mirrored_cams.flip(-1), mirrored_logits)


def label_map(scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """One image's label map and its confidence.

    Args:
        scores: (K+1, H, W) in [0, 1], background first, then the image's K tagged classes.
        classes: (K,) class indices c of these.

    Returns:
        labels (H, W) uint8, 0 = background, c + 1 = class c; and confidence (H, W) in [0, 1]: the share of the winning
        score that the best other one lacks, so 0 is a tie. Of the margins, this relative one tells right labels from
        wrong ones best, on plain and on refined maps (`scripts/benchmark_thresholds.py --confidence`).
    """
    top = scores.topk(min(2, len(scores)), dim=0).values
    second = top[1] if len(scores) > 1 else torch.zeros_like(top[0])
    confidence = torch.where(top[0] > 0, 1 - second / top[0].clamp(min=1e-12), 0)
    values = torch.cat([classes.new_zeros(1), classes + 1])
    return values[scores.argmax(dim=0)].to(torch.uint8), confidence  # of equals, argmax takes the first
