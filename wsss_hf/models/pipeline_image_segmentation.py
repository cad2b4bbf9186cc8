"""`pipeline("image-segmentation")` and `pipeline("image-classification")` for the CAM classifier and the segmenter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
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

    def check_model_type(self, supported_models):
        """As above."""


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
    """Names of classes → (1, C) float 0/1.

    Raises:
        ValueError: a name that is not in `names`.
    """
    for tag in tags:
        if tag not in names:
            raise ValueError(f"tags: expected classes of this model ({', '.join(names)}), got {tag!r}")
    return torch.tensor([[float(name in tags) for name in names]])
