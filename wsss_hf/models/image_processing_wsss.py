"""Image processor of the CAM classifier and the segmenter (PIL backend: torchvision is not needed)."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


class WsssImageProcessor(PilBackend):
    """Images of any mode and size → `pixel_values`: RGB, short side at `size`, normalised.

    `size` is that of training: `shortest_edge`, with a `longest_edge` for very long images, or `height` and `width`.
    """

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 224, "longest_edge": 1792}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """Label maps (H, W) int64, one per image, from `outputs.logits` (B, C+1, h, w).

        Args:
            target_sizes: (H, W) per image; None keeps (h, w).

        Raises:
            ValueError: not one target size per image, or the outputs are those of a classifier.
        """
        logits = outputs.logits
        if logits.ndim != 4:
            raise ValueError(
                f"outputs: expected logits (B, C+1, h, w), got {tuple(logits.shape)}; label maps of a CAM classifier "
                "are model.segmentation_scores(outputs, size, tags).argmax(1)"
            )
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        if len(target_sizes) != len(logits):
            raise ValueError(f"target_sizes: expected {len(logits)}, one per image, got {len(target_sizes)}")
        return [
            F.interpolate(image[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)
            for image, size in zip(logits, target_sizes, strict=True)
        ]


# Saving a processor then writes this file beside it, so that `trust_remote_code=True` finds the class.
WsssImageProcessor.register_for_auto_class()
