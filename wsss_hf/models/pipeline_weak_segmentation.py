"""`pipeline("weak-segmentation")`: label map, segments, class maps and overlay of an image, tags known or not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.pipelines.base import Pipeline
from transformers.utils import ModelOutput

from .label_colors import mask_image, overlay
from .pamr import refine_pictures
from .pictures import load_picture
from .pipeline_image_segmentation import by_size, named_segments, tags_to_multi_hot
from .tta import views

REFINEMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pamr": refine_pictures}
"""Name → (images (B, H, W, 3) uint8, scores (B, K+1, H, W)) → scores. Only what needs no other library."""


class WeakSegmentationPipeline(Pipeline):
    """Image, and its tags if they are known → label map, segments, per-class maps, overlay.

    Inputs: a path, a URL, a PIL image, an array (H, W) or (H, W, 3) uint8, a row `{"image": …, "tags": …}` with names
    of classes, a list of these, a generator of these, or a data set with columns `image` and maybe `tags` (names, or
    ClassLabels). A list gives a list; generators, data sets and columns of these give results one by one.

    Call arguments:
        tags: names of the classes that are in every image, if known; a row's own tags go first. Without tags a CAM
            classifier takes those it predicts, and a segmenter allows every class.
        threshold: background threshold of a CAM classifier, in [0, 1]; "auto" finds it on the image's maps and
            features, as `masks.background_threshold: auto` does for a data set, and needs wsss_hf to be installed;
            None takes the configured one.
        scales: input sizes relative to that of the image processor; several are averaged.
        flip: also average with the mirror image.
        refine: "pamr" lets the masks follow the colours of the image; None leaves the scores as they are.
        timeout: seconds to wait for a URL.

    Returns, for every image, a dict:
        mask: PIL image of mode "P" and the image's size: 0 = background, c + 1 = class c.
        segments: for every class in the mask `{"label", "score", "mask"}`, as `pipeline("image-segmentation")`.
        maps: class name → (H, W) float32 in [0, 1]: the scores of the classes that are tagged or predicted, or, with
            a segmenter and no tags, found.
        overlay: RGB image, the mask in colours on the image.
    """

    model: Any
    image_processor: Any
    _load_image_processor = True
    _load_processor = _load_video_processor = _load_feature_extractor = _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "segmentation_scores"):
            raise ValueError(
                f"weak-segmentation: expected a model of wsss_hf, got {type(self.model).__name__}; "
                'pipeline("image-segmentation") takes it'
            )

    def _sanitize_parameters(
        self, tags=None, threshold=None, scales=None, flip=None, refine=None, timeout: float | None = None
    ):
        if threshold is not None and not hasattr(self.model.config, "background_threshold"):
            raise ValueError(f"threshold: expected none, as {type(self.model).__name__} has none, got {threshold!r}")
        if isinstance(threshold, str) and threshold != "auto":
            raise ValueError(f"threshold: expected a number in [0, 1] or 'auto', got {threshold!r}")
        if scales is not None and not (len(scales) and min(scales) > 0):
            raise ValueError(f"scales: expected positive numbers, for example [0.75, 1.0, 1.25], got {list(scales)}")
        if refine is not None and refine not in REFINEMENTS:
            raise ValueError(f"refine: expected {', '.join(map(repr, REFINEMENTS))} or None, got {refine!r}")
        preprocess = {"tags": [tags] if isinstance(tags, str) else tags, "timeout": timeout}
        forward = {"scales": scales, "flip": flip, "features": True if threshold == "auto" else None}
        postprocess = {"threshold": threshold, "refine": refine}
        parts = (preprocess, forward, postprocess)
        return tuple({key: value for key, value in part.items() if value is not None} for part in parts)

    def __call__(self, inputs, **kwargs):
        inputs = _rows(inputs) if hasattr(inputs, "column_names") else inputs  # a data set of the datasets library
        return super().__call__(iter(inputs) if hasattr(inputs, "column_name") else inputs, **kwargs)

    def preprocess(self, row, tags: Sequence[str] | None = None, timeout: float | None = None) -> Any:
        given = row if isinstance(row, Mapping) else {"image": row}
        if given.get("image") is None:
            raise ValueError(f"row: expected an image, got {', '.join(given)}")
        image = load_picture(given["image"], timeout)
        names = list(self.model.mask_id2label.values())[1:]
        wanted = tags if given.get("tags") is None else given["tags"]
        multi_hot = None if wanted is None else tags_to_multi_hot(wanted, names)
        inputs = self.image_processor(images=[image], return_tensors="pt").to(self.dtype)
        # In lists, so that batching hands them through as they are.
        return {"pixel_values": [inputs["pixel_values"]], "picture": [{"image": image, "tags": multi_hot}]}

    def _forward(self, model_inputs, scales: Sequence[float] = (1.0,), flip: bool = False, features: bool = False):
        def run(images: Tensor) -> list[ModelOutput]:
            stages = self.model.backbone(images) if features else ()
            named = ModelOutput({str(number): stage for number, stage in enumerate(stages)})
            return [*views(self.model, images, scales, flip), named]

        return {"views": by_size(run, model_inputs["pixel_values"]), "picture": model_inputs["picture"]}

    def postprocess(self, model_outputs, threshold: float | str | None = None, refine: str | None = None) -> dict:
        ((*outputs, features),), (picture,) = model_outputs["views"], model_outputs["picture"]
        image, tags, names = picture["image"], picture["tags"], self.model.mask_id2label
        size = (image.height, image.width)
        if tags is None and hasattr(self.model, "predicted_tags"):
            tags = self.model.predicted_tags(outputs)
        options = {} if threshold in (None, "auto") else {"background_threshold": threshold}
        scores = self.model.segmentation_scores(outputs, size, tags, **options)[0]
        channels = [0, *((tags[0].nonzero()[:, 0] + 1).tolist() if tags is not None else range(1, len(scores)))]
        scores = scores[channels]  # background and the classes that may be there
        pixels = torch.from_numpy(np.array(image))[None]
        step = REFINEMENTS[refine] if refine else lambda _pixels, plain: plain
        if threshold == "auto" and len(channels) > 1:
            rule = importlib.import_module("wsss_hf.models.background_threshold")  # not uploaded with models
            scores = rule.separated(scores[1:], features, None if refine is None else partial(step, pixels))
        if len(channels) > 1:
            scores = step(pixels, scores[None])[0]
        labels = torch.tensor(channels)[scores.argmax(dim=0)]
        shown = channels if tags is not None else labels.unique().tolist()
        mask = labels.to(torch.uint8).numpy()
        return {
            "mask": mask_image(mask),
            "segments": named_segments(scores, {k: names[channel] for k, channel in enumerate(channels)}),
            "maps": {names[channel]: scores[channels.index(channel)].numpy() for channel in shown if channel},
            "overlay": overlay(image, mask),
        }


def _rows(dataset) -> Iterator[dict]:
    """Images of a data set with their tags, if it has any, as names."""
    feature: Any = getattr(dataset.features.get("tags"), "feature", None)
    for row in dataset:
        tags = row.get("tags")
        if tags is not None and hasattr(feature, "int2str"):
            tags = feature.int2str(tags)
        yield {"image": row["image"], "tags": tags}
