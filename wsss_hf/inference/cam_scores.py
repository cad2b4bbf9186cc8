"""CAM classifiers at inference on images whose tags need not be known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from datasets import Dataset
from transformers.utils import ModelOutput

from ..data.batches import batches_by_size
from ..models.maps import add_background
from ..models.modeling_cam import CamClassifier
from ..refinement.steps import Note, RefinementChain
from ..settings import EvaluationSettings
from .cam_maps import localize
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
        ValueError: the model's maps or logits of an image are not finite.
    """
    for batch in batches_by_size(rows, processor, settings.batch_size):
        known = batch.tags.to(model.device).bool() if only_tagged else None
        pixel_values = batch.pixel_values.to(model.device)
        scales, flip = settings.scales, settings.flip
        maps, logits = localize(model, pixel_values, known, batch.size, scales, flip, bf16=False)
        tags = model.predicted_tags(ModelOutput(logits=logits)) if known is None else known
        maps_of = maps.split(tags.sum(dim=1).tolist())
        scores = [add_background(one[None], model.config.background_threshold)[0] for one in maps_of]
        scores = refine.batch(scores, [np.asarray(image) for image in batch.images], [Note() for _ in scores])
        for index, image, present, refined in zip(batch.indices, batch.images, tags, scores, strict=True):
            yield Scored(index, image, present.nonzero()[:, 0], refined)
