"""Label maps of a segmenter, over scales and mirror images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from ..models.backbone import pinned
from ..models.mask_classifiers import load_segmentation_model, square_side
from .optimize import for_inference


@torch.inference_mode()
def predict_scores(
    model,
    pixel_values: Tensor,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    window: int = 0,
    window_stride: int = 0,
) -> Tensor:
    """Class probabilities (B, C+1, H, W), averaged over the views; their argmax is the label map.

    Args:
        model: any model with `logits` (B, C+1, h, w). One that takes squares alone sees them side by side, whatever
            `window` says, and what a smaller image lacks as mean colour.
        pixel_values: (B, 3, h, w) normalised images at scale 1.
        size: (H, W) of the result.
        scales: input sizes relative to `pixel_values`.
        flip: also look at the mirror image.
        window: side of a sliding window in pixels of the scaled images; 0 shows the model whole images.
        window_stride: pixels between neighbouring windows; 0 takes two thirds of `window`.
    """
    total, square = 0, square_side(model)
    for scale in scales:
        scaled = pixel_values if scale == 1 else resize_images(pixel_values, scale)
        images = torch.cat([scaled, scaled.flip(-1)]) if flip else scaled
        if square:
            height, width = images.shape[-2:]
            padded = F.pad(images, (0, max(0, square - width), 0, max(0, square - height)))
            logits = _sliding_logits(model, padded, square, window_stride or square)[..., :height, :width]
        elif window:
            logits = _sliding_logits(model, images, window, window_stride or max(1, 2 * window // 3))
        else:
            logits = model(images).logits.float()
        views = logits.chunk(2) if flip else (logits,)
        for view, view_logits in enumerate(views):
            view_logits = view_logits.flip(-1) if view else view_logits
            total = total + F.interpolate(view_logits, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
    return total / (len(scales) * (2 if flip else 1))


def _sliding_logits(model, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits (B, C+1, h, w) of images (B, 3, h, w), averaged over the windows that see a pixel.

    The last window of a row ends at the border, and no window is larger than the images.
    """
    height, width = images.shape[-2:]
    total = 0
    seen = images.new_zeros(1, 1, height, width, dtype=torch.float32)
    for top in _window_starts(height, window, stride):
        for left in _window_starts(width, window, stride):
            rows, columns = slice(top, top + window), slice(left, left + window)
            crop = images[:, :, rows, columns]
            logits = model(crop).logits.float()
            logits = F.interpolate(logits, size=crop.shape[-2:], mode="bilinear", align_corners=False)
            if not torch.is_tensor(total):
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
            total[:, :, rows, columns] += logits
            seen[:, :, rows, columns] += 1
    return total / seen


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def load_segmenter(
    directory: str, device: torch.device | str, **hub_kwargs
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A trained segmenter, ours or transformers' own, ready for inference only, and its image processor, which keeps
    images whole.

    Raises:
        OSError, ValueError: there is none, or its weights are pickled.
    """
    directory, hub_kwargs = pinned(directory, hub_kwargs)
    model = for_inference(load_segmentation_model(directory, **hub_kwargs), device)
    processor = AutoImageProcessor.from_pretrained(directory, **hub_kwargs)
    if getattr(processor, "do_split_image", False):  # EoMT's; here it is `predict_scores` that cuts images
        processor.do_split_image = False
    return model, processor


def resize_images(pixel_values: Tensor, scale: float) -> Tensor:
    """(B, 3, h, w) images, `scale` times as large."""
    size = [max(1, round(side * scale)) for side in pixel_values.shape[-2:]]
    return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False, antialias=True)
