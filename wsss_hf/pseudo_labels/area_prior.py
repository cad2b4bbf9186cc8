"""Object area: a logit bias on the background against under-predicted objects.

Segmenters trained on noisy masks under-predict objects. One factor on the background probability, the same as a
constant added to the background logit, brings the predicted object area back to that of the pseudo masks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import nn

from ..data.tagged import decode_mask, has_value, undecoded
from ..inference.segmenter import score_images
from ..models.maps import IGNORE_INDEX
from ..models.mask_classifiers import MASK_CLASSIFIERS
from ..settings import EvaluationSettings, SelfTrainingSettings

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
    settings: EvaluationSettings | SelfTrainingSettings,
    mask_column: str = "pseudo_mask",
    only_tagged: bool = True,
    advance: Callable[[int], None] = lambda images: None,
) -> float:
    """The factor on a segmenter's background probability with which it predicts the object area of the label maps.

    No other label maps are read than those that it was trained on.

    Args:
        model, processor, settings: as of [`score_images`]; nothing is refined.
        rows: what [`labelled_objects`] gives.
        mask_column: their label maps.
        only_tagged: only the tagged classes of an image compete with background, as in relabelling; otherwise all do.
        advance: called with 1 after each image.

    Returns:
        a positive number; 1 where the label maps have no object.
    """
    labels = undecoded(rows.select_columns(["image_id", mask_column]))
    odds, wanted = [], 0.0
    for scored in score_images(model, processor, rows, dataclasses.replace(settings, refine=[]), only_tagged):
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


@torch.no_grad()
def output_bias(model, processor: Callable) -> nn.Parameter | None:
    """The bias (C+1,) of the layer that gives a segmenter's logits.

    Found by its effect: a constant added to its first entry, and to no other bias, is added to the background logit of
    all pixels, while the other logits stay.

    Args:
        model: in eval mode.
        processor: its image processor.

    Returns:
        None where no parameter does that, as in mask classifiers.
    """
    if model.config.model_type in MASK_CLASSIFIERS:
        return None
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    pixel_values = processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"].to(model.device)
    before = model(pixel_values).logits.float()
    step = torch.zeros_like(before)
    step[:, 0] = 1
    for name, bias in model.named_parameters():
        if name.endswith("bias") and bias.shape == before.shape[1:2]:
            old = bias.detach().clone()
            bias[0] += 1
            change = model(pixel_values).logits.float() - before
            bias.copy_(old)
            if torch.allclose(change, step, atol=1e-2):
                return bias
    return None


@torch.no_grad()
def multiply_background(bias: nn.Parameter, factor: float) -> None:
    """Multiply the odds of background against every class by `factor`, in the bias of the logits."""
    bias[0] += math.log(factor)
