"""`pipeline("image-segmentation")` for EoMT, whose image processor cuts photographs into squares."""

from __future__ import annotations

from typing import Any

import torch
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline
from transformers.utils import ModelOutput


class SquaresPipeline(ImageSegmentationPipeline):
    """The library's image-segmentation pipeline; the squares of a batch of images go through the network together.

    The library's own takes such images one by one: in a batch it expects as many inputs as there are images.
    """

    def preprocess(self, *args: Any, **kwargs: Any) -> dict[str, list]:  # type: ignore[override]
        # Batching leaves what is in lists as it is.
        return {name: [value] for name, value in super().preprocess(*args, **kwargs).items()}

    def _forward(self, model_inputs: dict[str, list]) -> dict[str, Any]:  # type: ignore[override]
        shown = model_inputs.pop("pixel_values")
        batched = isinstance(shown[0], list)
        squares = [image for (image,) in shown] if batched else shown
        outputs = self.model(torch.cat(squares))
        counts = [len(image) for image in squares]
        parts = zip(
            outputs.class_queries_logits.split(counts), outputs.masks_queries_logits.split(counts), strict=True
        )
        found = []
        for place, (classes, masks) in enumerate(parts):
            given = {name: values[place][0] if batched else values[0] for name, values in model_inputs.items()}
            queries = {"class_queries_logits": classes, "masks_queries_logits": masks, "patch_offsets": None}
            found.append(ModelOutput(queries | given))
        return {"outputs": found if batched else found[0]}

    def postprocess(self, model_outputs: dict[str, ModelOutput], **kwargs: Any):  # type: ignore[override]
        return super().postprocess(model_outputs["outputs"], **kwargs)
