"""Image processor of the CAM classifier and the segmenter (PIL backend: torchvision is not needed)."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING


def backbone_normalization(backbone: str | None, config, **hub_kwargs) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation that a backbone was trained with, for images in [0, 1].

    From its preprocessor_config.json where `backbone`, a directory or Hub id, has one; else its model type's default
    in transformers; else ImageNet's.
    """
    try:
        known = AutoImageProcessor.from_pretrained(backbone, **hub_kwargs) if backbone else None
    except (OSError, ValueError):  # published without a processor
        known = None
    if known is None and type(config) in IMAGE_PROCESSOR_MAPPING:
        known = IMAGE_PROCESSOR_MAPPING[type(config)].get("pil")
    mean, std = getattr(known, "image_mean", None), getattr(known, "image_std", None)
    return list(mean or IMAGENET_DEFAULT_MEAN), list(std or IMAGENET_DEFAULT_STD)


class WsssImageProcessor(PilBackend):
    """Images of any mode and size → `pixel_values`: RGB, short side at `size`, normalised.

    `size["shortest_edge"]` is the scale that the model was trained at; `longest_edge` bounds very long images.
    """

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 224, "longest_edge": 896}
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
                "these are the outputs of a CAM classifier; its label maps come from "
                "model.segmentation_scores(outputs, size, tags).argmax(1)"
            )
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        if len(target_sizes) != len(logits):
            raise ValueError(
                f"{len(target_sizes)} target sizes for {len(logits)} images; one per image would be right"
            )
        return [
            F.interpolate(image[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)
            for image, size in zip(logits, target_sizes, strict=True)
        ]


# Saving a processor then writes this file beside it, so that `trust_remote_code=True` finds the class.
WsssImageProcessor.register_for_auto_class()
