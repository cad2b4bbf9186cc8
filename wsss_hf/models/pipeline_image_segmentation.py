"""`pipeline("image-segmentation")` and `pipeline("image-classification")` for the CAM classifier and the segmenter."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline


class MaskPipeline(ImageSegmentationPipeline):
    """The library's image-segmentation pipeline for our models, which also takes image tags.

    Every class found gives `{"label", "score", "mask"}`: the mask is a black-and-white PIL image of the input's size,
    the score the mean score of its pixels in [0, 1].

    Call arguments beside the library's own:
        tags: names of the classes that are in the image (or images), if known; without them the CAM classifier takes
            the tags it predicts, and the segmenter allows every class.
        threshold: background threshold of the CAM classifier, in [0, 1].
    """

    # Left open, transformers takes the image processor's code for a video processor's and asks whether to run it.
    _load_video_processor = False  # type: ignore[assignment]
    model: Any

    def check_model_type(self, supported_models):
        """Our models are; the library does not know them."""

    def _sanitize_parameters(self, tags=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if tags is not None:
            postprocess["tags"] = [tags] if isinstance(tags, str) else list(tags)
        return preprocess, forward, postprocess

    def preprocess(self, image, subtask=None, timeout=None):
        return super().preprocess(load_picture(image, timeout), subtask)

    def postprocess(  # type: ignore[override]
        self, model_outputs, tags: list[str] | None = None, threshold: float | None = None, **kwargs
    ):
        options: dict[str, Any] = {}
        if threshold is not None:
            if not hasattr(self.model.config, "background_threshold"):
                raise ValueError(
                    f"threshold: expected none, as {type(self.model).__name__} has none, got {threshold!r}"
                )
            options["background_threshold"] = threshold
        if tags is not None:
            options["tags"] = tags_to_multi_hot(tags, list(self.model.mask_id2label.values())[1:])
        scores = self.model.segmentation_scores(model_outputs, tuple(model_outputs["target_size"][0]), **options)[0]
        return named_segments(scores, self.model.mask_id2label)


class TagPipeline(ImageClassificationPipeline):
    """The library's image-classification pipeline for the CAM classifier."""

    _load_video_processor = False  # type: ignore[assignment]

    check_model_type = MaskPipeline.check_model_type

    def preprocess(self, image, timeout=None):
        return super().preprocess(image if hasattr(image, "shape") else load_picture(image, timeout))


def load_picture(image, timeout: float | None = None) -> Image.Image:
    """Path, URL, base64 text, PIL image, or array (H, W) or (H, W, 3) uint8 → upright RGB image, read as in training.
    Without wsss_hf, 16-bit, floating-point and transparent images are refused."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"image: expected an array (H, W, 3) or (H, W) of uint8, got {image.shape} of {image.dtype}"
            )
        image = Image.fromarray(image)
    try:
        return importlib.import_module("wsss_hf.models.pictures").load_picture(image, timeout)
    except ImportError:
        image = Image.open(image) if isinstance(image, str) and os.path.isfile(image) else image
        if isinstance(image, Image.Image) and (image.mode[0] in "IF" or image.has_transparency_data):
            raise ValueError(f"image: expected 8 opaque bits, got mode {image.mode} (wsss_hf reads it)") from None
        return load_image(image, timeout=timeout)


def named_segments(scores: torch.Tensor, names: dict[int, str]) -> list[dict]:
    """Scores (C+1, H, W) → for every label that wins somewhere its name, the mean of its pixels' scores, its mask."""
    best, labels = scores.max(dim=0)
    return [
        {
            "score": best[labels == label].mean().item(),
            "label": names[label],
            "mask": Image.fromarray((labels == label).to(torch.uint8).mul(255).numpy()),
        }
        for label in labels.unique().tolist()
    ]


def tags_to_multi_hot(tags: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """Names of classes → (1, C) float 0/1. Raises ValueError for a name that is not in `names`."""
    for tag in tags:
        if tag not in names:
            raise ValueError(f"tags: expected classes of this model ({', '.join(names)}), got {tag!r}")
    return torch.tensor([[float(name in tags) for name in names]])
