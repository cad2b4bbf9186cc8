"""`pipeline("image-segmentation")` and `pipeline("image-classification")` for the CAM classifier and the segmenter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline
from transformers.utils import ModelOutput

from .pictures import load_picture
from .tta import views


class OurPipeline:
    """What our pipelines do otherwise than the library's: their batches may hold images of any sizes."""

    # Left open, transformers takes the image processor's code for a video processor's and asks whether to run it.
    _load_video_processor = False
    model: Any

    def check_model_type(self, supported_models):
        """Our models are; the library does not know them."""

    def __call__(self, inputs=None, **kwargs):  # of the column of a data set, results one by one
        return super().__call__(iter(inputs) if hasattr(inputs, "column_name") else inputs, **kwargs)  # type: ignore[misc]

    def preprocess(self, *args, **kwargs):
        inputs = dict(super().preprocess(*args, **kwargs))  # type: ignore[misc]
        return inputs | {"pixel_values": [inputs["pixel_values"]]}  # batching leaves what is in lists as it is

    def _forward(self, model_inputs):
        seen = by_size(lambda images: [*views(self.model, images)], model_inputs.pop("pixel_values"))
        return {"views": seen} | model_inputs


class MaskPipeline(OurPipeline, ImageSegmentationPipeline):
    """The library's image-segmentation pipeline for our models, which also takes image tags.

    Every class found gives `{"label", "score", "mask"}`: the mask is a black-and-white PIL image of the input's size,
    the score the mean score of its pixels in [0, 1].

    Call arguments beside the library's own:
        tags: names of the classes that are in the image (or images), if known; without them the CAM classifier takes
            the tags it predicts, and the segmenter allows every class.
        threshold: background threshold of the CAM classifier, in [0, 1].
    """

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
        (seen,), (size,) = model_outputs["views"], model_outputs["target_size"]
        return named_segments(self.model.segmentation_scores(seen, size, **options)[0], self.model.mask_id2label)


class TagPipeline(OurPipeline, ImageClassificationPipeline):
    """The library's image-classification pipeline for the CAM classifier."""

    def postprocess(self, model_outputs, **kwargs):  # type: ignore[override]
        return super().postprocess(model_outputs["views"][0][0], **kwargs)

    def preprocess(self, image, timeout=None):
        return super().preprocess(image if hasattr(image, "shape") else load_picture(image, timeout))


def by_size(run: Callable[[torch.Tensor], list], pixel_values: list) -> list[list[ModelOutput]]:
    """The outputs of a network for images of any sizes, those of one size in one pass.

    Args:
        run: images (B, 3, h, w) → several `ModelOutput` of tensors (B, …).
        pixel_values: images (1, 3, h, w); in a batch of a pipeline each in a list, as then the results are.
    """
    batched = isinstance(pixel_values[0], list)
    images = [image for (image,) in pixel_values] if batched else pixel_values
    found: dict[int, list[ModelOutput]] = {}
    for shape in {image.shape: None for image in images}:
        places = [place for place, image in enumerate(images) if image.shape == shape]
        outputs = run(torch.cat([images[place] for place in places]))
        for row, place in enumerate(places):
            found[place] = [ModelOutput({name: v[row : row + 1] for name, v in o.items()}) for o in outputs]
    return [[found[place]] if batched else found[place] for place in range(len(images))]  # type: ignore[list-item]


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
