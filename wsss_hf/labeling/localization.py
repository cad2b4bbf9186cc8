"""Multi-scale localisation maps of a CAM classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.maps import normalize_maps
from ..models.modeling_cam import CamClassifier
from .prediction import resize_images

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
) -> tuple[Tensor, Tensor]:
    """Normalised maps of images of one size, fused over scales and mirror images.

    Args:
        pixel_values: (B, 3, h, w) normalised images at scale 1.
        tags: (B, C) 0/1; only maps of tagged classes are upsampled.
        size: (H, W) of the maps to return.
        scales: input sizes relative to `pixel_values`.
        flip: also look at the mirror image.
        fusion: "mean" or "max" over the views.

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
    for scale in scales:
        scaled = pixel_values if scale == 1 else resize_images(pixel_values, scale)
        # Both mirror images in one pass.
        outputs = model(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled)
        views = outputs.maps.chunk(2) if flip else (outputs.maps,)
        logits.extend(outputs.logits.float().chunk(len(views)))
        for view, view_maps in enumerate(views):
            tagged = (view_maps.flip(-1) if view else view_maps)[images, classes]
            maps = normalize_maps(tagged[:, None], size=size)[:, 0]
            if fused is None:
                fused = maps
            else:
                fused = torch.maximum(fused, maps) if fusion == "max" else fused + maps
    # A map that is zero everywhere stays zero; every other one reaches 1 somewhere again.
    return normalize_maps(fused[:, None])[:, 0], torch.stack(logits).mean(dim=0)


def label_map(scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """One image's label map and its confidence.

    Args:
        scores: (K+1, H, W) in [0, 1], background first, then the image's K tagged classes.
        classes: (K,) class indices c of these.

    Returns:
        labels (H, W) uint8, 0 = background, c + 1 = class c; and confidence (H, W) in [0, 1]: how far the winning
        score is from the best other one.
    """
    top = scores.topk(min(2, len(scores)), dim=0).values
    confidence = top[0] - (top[1] if len(scores) > 1 else 0)
    values = torch.cat([classes.new_zeros(1), classes + 1])
    return values[scores.argmax(dim=0)].to(torch.uint8), confidence  # of equals, argmax takes the first
