"""`pipeline("weak-segmentation")`: all that our models know of an image at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.image_utils import load_image
from transformers.pipelines.base import Pipeline

from .background_threshold import THRESHOLDS, choose_threshold, object_areas, value_histogram
from .label_colors import mask_image, overlay
from .maps import normalize_maps
from .pamr import pamr
from .pipeline_image_segmentation import named_segments, tags_to_multi_hot

REFINERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pamr": pamr}
"""Name → (image (1, 3, H, W) in [0, 1], scores (1, C+1, H, W)) → scores. Only what needs no other library."""


class WeakSegmentationPipeline(Pipeline):
    """Image, and its tags if they are known → label map, segments, per-class maps, overlay.

    Inputs: a path, a URL, a PIL image, an array (H, W) or (H, W, 3) uint8, a row `{"image": …, "tags": …}` with names
    of classes, a list of these, a generator of these, or a data set with columns `image` and maybe `tags` (names, or
    ClassLabels). A list gives a list; generators and data sets give results one by one.

    Call arguments:
        tags: names of the classes that are in every image, if known; a row's own tags go first. Without tags a CAM
            classifier takes those it predicts, and a segmenter allows every class.
        threshold: background threshold of a CAM classifier, in [0, 1]; "auto" is where the image's own maps separate
            best into objects and background; None takes the configured one.
        scales: input sizes relative to that of the image processor; several are averaged.
        flip: also look at the mirror image.
        refiner: "pamr" lets the masks follow the colours of the image; None leaves the scores as they are.
        timeout: seconds to wait for a URL.

    Returns, for every image, a dict:
        mask: PIL image of mode "P" and the image's size: 0 = background, c + 1 = class c.
        segments: for every class in the mask `{"label", "score", "mask"}`, as `pipeline("image-segmentation")`.
        maps: class name → (H, W) float32 in [0, 1]: the scores of the classes that are tagged or predicted, or, with
            a segmenter and no tags, found.
        overlay: RGB image, the mask in colours on the image.
    """

    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "segmentation_scores"):
            raise ValueError(
                f"weak-segmentation: {type(self.model).__name__} is no model of wsss_hf; "
                'pipeline("image-segmentation") would be right'
            )

    def _sanitize_parameters(
        self,
        tags: str | Sequence[str] | None = None,
        threshold: float | str | None = None,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
        refiner: str | None = None,
        timeout: float | None = None,
    ):
        if threshold is not None and not hasattr(self.model.config, "background_threshold"):
            raise ValueError(f"threshold: {type(self.model).__name__} can't use it; leave it out")
        if isinstance(threshold, str) and threshold != "auto":
            raise ValueError(f"threshold: {threshold!r}; a number in [0, 1] or 'auto' would be right")
        if scales is not None and not (len(scales) and min(scales) > 0):
            raise ValueError(
                f"scales: {list(scales)}; positive numbers, for example [0.75, 1.0, 1.25], would be right"
            )
        if refiner is not None and refiner not in REFINERS:
            raise ValueError(f"refiner: {refiner!r} is none; {', '.join(REFINERS)} or None would be right")
        preprocess = {"tags": [tags] if isinstance(tags, str) else tags, "timeout": timeout}
        forward = {"scales": scales, "flip": flip}
        postprocess = {"threshold": threshold, "refiner": refiner}
        return tuple(
            {key: value for key, value in part.items() if value is not None}
            for part in (preprocess, forward, postprocess)
        )

    def __call__(self, inputs, **kwargs):
        if hasattr(inputs, "column_names"):  # a data set of the datasets library
            inputs = _rows(inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(self, row, tags: Sequence[str] | None = None, timeout: float | None = None) -> dict:
        given = row if isinstance(row, Mapping) else {"image": row}
        if given.get("image") is None:
            raise ValueError(f"a row needs an image; this one has {', '.join(given)}")
        image = load_image(_as_picture(given["image"]), timeout=timeout)
        own = given.get("tags")
        names = list(self.model.mask_id2label.values())[1:]
        wanted = tags if own is None else own
        multi_hot = None if wanted is None else tags_to_multi_hot(wanted, names)
        inputs = self.image_processor(images=[image], return_tensors="pt").to(self.dtype)
        # In a list, so that batching hands it through as it is.
        inputs["picture"] = [{"image": image, "tags": multi_hot}]
        return inputs

    def _forward(self, model_inputs, scales: Sequence[float] = (1.0,), flip: bool = False):
        pictures, pixel_values = model_inputs.pop("picture"), model_inputs["pixel_values"]
        views = [view for scale in scales for view in self._views(pixel_values, scale, flip)]
        outputs = views[0][0]
        if len(views) > 1:
            _fuse(outputs, views, tuple(pixel_values.shape[-2:]))
        outputs["picture"] = pictures
        return outputs

    def _views(self, pixel_values: Tensor, scale: float, flip: bool) -> list[tuple]:
        """What the model makes of the image at one scale, and of its mirror image, which the second value says."""
        if scale != 1:
            size = [max(1, round(side * scale)) for side in pixel_values.shape[-2:]]
            pixel_values = F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False, antialias=True)
        views = [(self.model(pixel_values), False)]
        return [*views, (self.model(pixel_values.flip(-1)), True)] if flip else views

    def postprocess(self, model_outputs, threshold: float | str | None = None, refiner: str | None = None) -> dict:
        (picture,) = model_outputs["picture"]
        image, tags = picture["image"], picture["tags"]
        options = {} if threshold in (None, "auto") else {"background_threshold": threshold}
        if tags is not None:
            options["tags"] = tags
        scores = self.model.segmentation_scores(model_outputs, (image.height, image.width), **options)
        plain = scores[0, 1:]
        if refiner is not None:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
            scores = REFINERS[refiner](pixels, scores)
        scores = scores[0]
        if threshold == "auto" and plain.any():
            histogram = value_histogram(plain)
            found = choose_threshold(histogram)
            if refiner is not None:  # the refined objects cover as much as the plain ones
                wanted = object_areas(histogram)[THRESHOLDS.index(found)]
                found = THRESHOLDS[int((object_areas(value_histogram(scores[1:])) - wanted).abs().argmin())]
            scores[0] = found  # which refinement left as it was, the same everywhere
        names = self.model.mask_id2label
        labels = scores.argmax(dim=0)
        shown = labels.unique() if tags is None else tags[0].nonzero()[:, 0] + 1
        if tags is None and hasattr(model_outputs, "maps"):
            shown = scores[1:].flatten(1).any(dim=1).nonzero()[:, 0] + 1
        mask = labels.to(torch.uint8).numpy()
        return {
            "mask": mask_image(mask),
            "segments": named_segments(scores, names),
            "maps": {names[label]: scores[label].numpy() for label in shown.tolist() if label},
            "overlay": overlay(image, mask),
        }


def _rows(dataset) -> Iterator[dict]:
    """Images of a data set with their tags, if it has any, as names."""
    feature = getattr(dataset.features.get("tags"), "feature", None)
    for row in dataset:
        tags = row.get("tags")
        if tags is not None and hasattr(feature, "int2str"):
            tags = feature.int2str(tags)
        yield {"image": row["image"], "tags": tags}


def _as_picture(image):
    """An array as PIL image; everything else is `load_image`'s business."""
    if not isinstance(image, np.ndarray):
        return image
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(
            f"an array of shape {image.shape} and type {image.dtype} is no image; (H, W, 3) or (H, W) of uint8 is"
        )
    return Image.fromarray(image)


def _mean_maps(views: Sequence[tuple], size: tuple[int, int]) -> Tensor:
    """(B, C, H, W), the mean of the views' normalised maps at `size`."""
    maps = [view.maps.flip(-1) if mirrored else view.maps for view, mirrored in views]
    return torch.stack([normalize_maps(view_maps, size=size) for view_maps in maps]).mean(dim=0)


def _fuse(outputs, views: Sequence[tuple], size: tuple[int, int]) -> None:
    """Put the mean over the views, each an output and whether it is mirrored, into `outputs`, at `size`."""
    logits = [view.logits.float() for view, _ in views]
    if logits[0].ndim == 2:  # tag logits, and maps
        outputs["maps"] = _mean_maps(views, size)
        outputs["logits"] = torch.stack(logits).mean(dim=0)
        return
    probabilities = [
        F.interpolate(
            view_logits.flip(-1) if mirrored else view_logits, size=size, mode="bilinear", align_corners=False
        ).softmax(dim=1)
        for view_logits, (_, mirrored) in zip(logits, views, strict=True)
    ]
    outputs["logits"] = torch.stack(probabilities).mean(dim=0).clamp_min(1e-12).log()
