"""How much of the images objects cover: a segmenter of wrong labels calls them background where it is in doubt."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..data.tagged import decode_mask, has_value, undecoded
from ..inference.segment_images import score_images
from ..models.maps import IGNORE_INDEX
from ..models.mask_classifiers import MASK_CLASSIFIERS

_QUANTILES = 1000  # of an image's pixels
_LARGEST_FACTOR = 1e6


def labelled_objects(rows: Dataset, mask_column: str, num_images: int) -> Dataset:
    """`num_images` of the rows that have tags and a label map, evenly spaced; all where there are no more."""
    has_tags = np.array([len(tags) > 0 for tags in rows["tags"]], dtype=bool)
    chosen = np.flatnonzero(has_tags & has_value(rows, mask_column))
    count = min(num_images, len(chosen))
    return rows.select(chosen[np.linspace(0, len(chosen) - 1, count).astype(int)])


def background_factor(
    model,
    processor: Callable,
    rows: Dataset,
    settings: dict,
    mask_column: str = "pseudo_mask",
    only_tagged: bool = True,
    advance: Callable[[int], None] = lambda images: None,
) -> float:
    """By how much a segmenter's background probability is to be multiplied for objects to be as large as in labels.

    What learns from wrong labels is careful: it calls objects background where it is in doubt, and a segmenter that
    learnt from its labels would do so the more. Nothing is read but the labels that it has learnt from.

    Args:
        model, processor, settings: as of [`score_images`]; nothing is refined.
        rows: what [`labelled_objects`] gives.
        mask_column: their label maps.
        only_tagged: the classes of an image's tags alone can be its objects, as in relabelling; otherwise all can.
        advance: called with the number of images that have been looked at since.

    Returns:
        a positive number; 1 where the labels hold no object.
    """
    labels = undecoded(rows.select_columns(["image_id", mask_column]))
    odds, wanted = [], 0.0
    for scored in score_images(model, processor, rows, settings | {"refine": []}, only_tagged):
        advance(1)
        label = decode_mask(labels[scored.index][mask_column], labels[scored.index]["image_id"])
        known = label[label != IGNORE_INDEX]
        if not known.size:
            continue
        wanted += (known > 0).mean()
        tiny = torch.finfo(scored.scores.dtype).tiny
        ratio = (scored.scores[1:].amax(dim=0).clamp_min(tiny) / scored.scores[0].clamp_min(tiny)).flatten()
        odds.append(ratio.cpu().sort().values[torch.linspace(0, len(ratio) - 1, _QUANTILES).long()])
    if not wanted:
        return 1.0
    factor = float(torch.cat(odds).quantile(1 - wanted / len(odds)))
    return min(max(factor, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)


def output_bias(model) -> nn.Parameter | None:
    """The bias (C+1,) of a segmenter's logits; None where these are no sums with one, as of a classifier of masks."""
    if model.config.model_type in MASK_CLASSIFIERS:
        return None
    shape = (model.config.num_labels,)
    biases = [value for name, value in model.named_parameters() if name.endswith("bias") and value.shape == shape]
    return biases[-1] if biases else None


@torch.no_grad()
def multiply_background(bias: nn.Parameter, factor: float) -> None:
    """Multiply the odds of background against every class by `factor`, in the bias of the logits."""
    bias[0] += math.log(factor)
