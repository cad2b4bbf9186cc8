"""Segmenters at inference: class probabilities of a batch, and scores and label maps of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..data.batches import batches_by_size
from ..models.maps import upsample
from ..models.mask_classifiers import square_side
from ..models.probabilities import class_probabilities, mean_probabilities
from ..models.tta import views
from ..refinement.steps import Note, RefinementChain, build_refinement
from ..settings import EvaluationSettings, SelfTrainingSettings
from .image_by_image import image_by_image


@image_by_image
@torch.inference_mode()
def predict_scores(
    model: Callable,
    pixel_values: Tensor,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    window: int | None = 0,
    window_stride: int = 0,
) -> Tensor:
    """Class probabilities (B, C+1, H, W), averaged over the views; their argmax is the label map.

    Args:
        model: any model with `logits` (B, C+1, h, w). One that takes only squares sees them side by side, whatever
            `window` says, and smaller images padded with the mean colour.
        pixel_values: (B, 3, h, w) normalised images at scale 1.
        size: (H, W) of the result.
        scales: input sizes relative to `pixel_values`.
        flip: also average with the mirror image.
        window: side of a sliding window in pixels of the scaled images; 0 or None shows the model whole images.
        window_stride: pixels between neighbouring windows; 0 takes two thirds of `window`.
    """
    square = square_side(model)

    def network(images: Tensor) -> ModelOutput:
        if square:
            height, width = images.shape[-2:]
            padded = F.pad(images, (0, max(0, square - width), 0, max(0, square - height)))
            logits = _sliding_logits(model, padded, square, window_stride or square)[..., :height, :width]
        elif window:
            logits = _sliding_logits(model, images, window, window_stride or max(1, 2 * window // 3))
        else:
            logits = model(images).logits
        return ModelOutput(logits=logits)

    return mean_probabilities((view.logits for view in views(network, pixel_values, scales, flip)), size)


def _sliding_logits(model: Callable, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits (B, C+1, h, w) of images (B, 3, h, w), averaged over the windows that see a pixel.

    The last window of a row ends at the border, and no window is larger than the images.
    """
    height, width = images.shape[-2:]
    total: Tensor | None = None
    seen = images.new_zeros(1, 1, height, width, dtype=torch.float32)
    for top in _window_starts(height, window, stride):
        for left in _window_starts(width, window, stride):
            rows, columns = slice(top, top + window), slice(left, left + window)
            crop = images[:, :, rows, columns]
            logits = upsample(model(crop).logits, (crop.shape[-2], crop.shape[-1]))
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
            total[:, :, rows, columns] += logits
            seen[:, :, rows, columns] += 1
    assert total is not None  # there is always a window
    return total / seen


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


@dataclass
class Scored:
    """The scores of one image.

    Attributes:
        index: its row in the data set.
        image: the RGB image.
        classes: (K,) indices of the classes that are scored.
        scores: (K+1, H, W) their probabilities, refined or not, background first, of the image's own size; on the
            model's device.
    """

    index: int
    image: Image.Image
    classes: Tensor
    scores: Tensor


def score_images(
    model,
    processor: Callable,
    rows: Dataset,
    settings: EvaluationSettings | SelfTrainingSettings,
    only_tagged: bool = False,
    background_factor: float = 1.0,
    refine: RefinementChain | None = None,
) -> Iterator[Scored]:
    """Score every row of `rows` at its own size; images of one size go through the network together.

    Args:
        model: any model with `logits` (B, C+1, h, w), in eval mode, on the device to work on.
        processor: its image processor.
        settings: test-time augmentation as of [`predict_scores`], refinement and batch size.
        only_tagged: score background and the tagged classes of an image only: the others are left out before
            refinement, and the rest is scaled to sum to 1.
        background_factor: then the background's probability is multiplied by this before.
        refine: what `settings.refine` is built into; None builds it for this call.

    Raises:
        ValueError: the model's logits of an image are not finite; names the row.
        OptionError, RefinementError: a step of refinement is unknown, or its library is missing.
    """
    if refine is None:
        section = "self_training" if isinstance(settings, SelfTrainingSettings) else "evaluation"
        with build_refinement(settings.refine, f"{section}.refine", settings.workers) as refine:
            yield from score_images(model, processor, rows, settings, only_tagged, background_factor, refine)
        return
    ids = rows["image_id"][:]
    for batch in batches_by_size(rows, processor, settings.batch_size):
        scores = predict_scores(
            model,
            batch.pixel_values.to(model.device),
            batch.size,
            settings.scales,
            settings.flip,
            settings.window,
            settings.window_stride,
        )
        for index, finite in zip(batch.indices, scores.isfinite().flatten(1).all(dim=1).tolist(), strict=True):
            if not finite:
                raise ValueError(
                    f"row {ids[index]!r}: expected finite logits of the segmenter, got others; its training has "
                    "diverged, or its precision is too low"
                )
        if only_tagged:
            classes = [tags.nonzero()[:, 0].to(scores.device) for tags in batch.tags]
            per_image = [
                class_probabilities(one, present, background_factor)
                for one, present in zip(scores, classes, strict=True)
            ]
        else:
            classes = [torch.arange(scores.shape[1] - 1, device=scores.device)] * len(scores)
            per_image = list(scores)
        refined = refine.batch(per_image, [np.asarray(image) for image in batch.images], [Note() for _ in per_image])
        for scored in zip(batch.indices, batch.images, classes, refined, strict=True):
            yield Scored(*scored)


@dataclass
class Segmented:
    """The label map of one image.

    Attributes:
        index: its row in the data set.
        image_id: its name.
        image: the RGB image.
        labels: (H, W) uint8, of the image's own size.
    """

    index: int
    image_id: str
    image: Image.Image
    labels: np.ndarray


def segment_images(
    model,
    processor: Callable,
    rows: Dataset,
    settings: EvaluationSettings,
    refine: RefinementChain | None = None,
) -> Iterator[Segmented]:
    """Label every row of `rows` at its own size by the highest score.

    Args:
        model, processor, settings, refine: as of [`score_images`].

    Raises:
        ValueError: as [`score_images`].
    """
    ids = rows["image_id"][:]
    for scored in score_images(model, processor, rows, settings, refine=refine):
        labels = scored.scores.argmax(dim=0).cpu().numpy().astype(np.uint8)
        yield Segmented(scored.index, ids[scored.index], scored.image, labels)
