"""Label maps of a segmenter, over scales and mirror images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, BaseImageProcessor, PreTrainedModel


@torch.inference_mode()
def predict_scores(
    model,
    pixel_values: Tensor,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
) -> Tensor:
    """Class probabilities (B, C+1, H, W), averaged over the views; their argmax is the label map.

    Args:
        model: any model with `logits` (B, C+1, h, w).
        pixel_values: (B, 3, h, w) normalised images at scale 1.
        size: (H, W) of the result.
        scales: input sizes relative to `pixel_values`.
        flip: also look at the mirror image.
    """
    total = 0
    for scale in scales:
        scaled = pixel_values if scale == 1 else resize_images(pixel_values, scale)
        logits = model(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled).logits.float()
        views = logits.chunk(2) if flip else (logits,)
        for view, view_logits in enumerate(views):
            view_logits = view_logits.flip(-1) if view else view_logits
            total = total + F.interpolate(view_logits, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
    return total / (len(scales) * (2 if flip else 1))


def load_segmenter(
    directory: str, device: torch.device | str, **hub_kwargs
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A trained segmenter, ours or transformers' own, in eval mode, and its image processor."""
    model = AutoModelForSemanticSegmentation.from_pretrained(directory, **hub_kwargs)
    model = model.to(device, memory_format=torch.channels_last).eval()
    return model, AutoImageProcessor.from_pretrained(directory, **hub_kwargs)


def resize_images(pixel_values: Tensor, scale: float) -> Tensor:
    """(B, 3, h, w) images, `scale` times as large."""
    size = [max(1, round(side * scale)) for side in pixel_values.shape[-2:]]
    return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False, antialias=True)
