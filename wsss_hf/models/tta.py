"""Test-time augmentation: a network's outputs over scales and mirror images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput


def resize_images(images: Tensor, scale: float) -> Tensor:
    """(B, 3, h, w) images → `scale` times as large, antialiased."""
    if scale == 1:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def views(
    network: Callable, images: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False, bf16: bool = False
) -> Iterator[Any]:
    """The outputs of a network for every scale and, with `flip`, for the mirror image at every scale.

    Args:
        network: a CAM classifier, a segmenter, or another function of images whose result has `logits`.
        images: (B, 3, h, w) normalised images at scale 1.
        scales: input sizes relative to `images`.
        flip: also look at the mirror images, in the same pass as the images.
        bf16: compute in bfloat16.

    Yields:
        a `ModelOutput` with `logits` and, of a CAM classifier, `maps` and `cams`; spatial ones (B, C, h', w') are
        mirrored back.
    """
    for scale in scales:
        scaled = resize_images(images, scale)
        with torch.autocast(scaled.device.type, dtype=torch.bfloat16, enabled=bf16):
            outputs = network(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled)
        names = [name for name in ("logits", "maps", "cams") if getattr(outputs, name, None) is not None]
        found = {name: getattr(outputs, name) for name in names}
        if not flip:
            yield ModelOutput(found)
            continue
        halves = {name: value.chunk(2) for name, value in found.items()}
        yield ModelOutput({name: half for name, (half, _) in halves.items()})
        yield ModelOutput({name: half.flip(-1) if half.ndim == 4 else half for name, (_, half) in halves.items()})
