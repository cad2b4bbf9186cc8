"""CAM classifiers at inference on images whose tags need not be known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.batches import batches_by_size
from ..models.maps import add_background, fuse_maps
from ..models.modeling_cam import CamClassifier
from ..models.tta import views
from ..refinement.steps import Note, RefinementChain
from ..settings import EvaluationSettings
from .image_by_image import image_by_image
from .segmenter import Scored


def score_by_maps(
    model: CamClassifier,
    processor: Callable,
    rows: Dataset,
    settings: EvaluationSettings,
    only_tagged: bool = False,
    *,
    refine: RefinementChain,
) -> Iterator[Scored]:
    """Score every row of `rows` at its own size by the model's maps and its own background threshold.

    What `pipeline("weak-segmentation")` computes, for many images: images of one size go through the network together.

    Args:
        model: in eval mode, on the device to work on.
        processor: its image processor.
        settings: scales, flip and batch size.
        only_tagged: score the tags of the rows instead of those that the model predicts.
        refine: what `settings.refine` is built into.

    Yields:
        [`Scored`] with the image's tags as `classes`, and scores (K+1, H, W) in [0, 1].

    Raises:
        DataError: an image does not decode; names the row.
        ValueError: the model's logits of an image are not finite; names the row.
    """
    ids = rows["image_id"][:]
    for batch in batches_by_size(rows, processor, settings.batch_size):
        known = batch.tags.to(model.device).bool() if only_tagged else None
        pixel_values = batch.pixel_values.to(model.device)
        maps, tags, finite = _localize_found(model, pixel_values, known, batch.size, settings.scales, settings.flip)
        for index, is_finite in zip(batch.indices, finite.tolist(), strict=True):
            if not is_finite:
                raise ValueError(f"row {ids[index]!r}: expected finite logits of the classifier, got others")
        maps_of = maps.split(tags.sum(dim=1).tolist())
        scores = [add_background(one[None], model.config.background_threshold)[0] for one in maps_of]
        scores = refine.batch(scores, [np.asarray(image) for image in batch.images], [Note() for _ in scores])
        for index, image, present, refined in zip(batch.indices, batch.images, tags, scores, strict=True):
            yield Scored(index, image, present.nonzero()[:, 0], refined)


@image_by_image
@torch.inference_mode()
def _localize_found(
    model: CamClassifier,
    pixel_values: Tensor,
    tags: Tensor | None,
    size: tuple[int, int],
    scales: Sequence[float],
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused maps (N, H, W) of the tags (B, C) bool, by default those that the model predicts; these tags; and whether
    the logits of an image are finite (B,)."""
    found = list(views(model, pixel_values, scales, flip))
    finite = torch.stack([view.logits.isfinite().all(dim=1) for view in found]).all(dim=0)
    tags = model.predicted_tags(found) if tags is None else tags
    return fuse_maps((view.maps for view in found), tags, size), tags, finite
