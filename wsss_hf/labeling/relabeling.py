"""Self-training: what a segmenter says of tagged images becomes their label maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.tagged import decode_mask, undecoded
from ..models.maps import IGNORE_INDEX
from .segmentation import score_images

_QUANTILES = 1000  # of an image's pixels
_LARGEST_FACTOR = 1e6


@dataclass
class Relabelled:
    """What relabelling made of one image.

    Attributes:
        index: its row in the data set.
        pseudo_mask: (H, W) uint8, 0 = background, c + 1 = class c, 255 where the segmenter is in doubt.
        confidence: (H, W) float32 in [0, 1], probability of the most likely label among the possible ones.
    """

    index: int
    pseudo_mask: np.ndarray
    confidence: np.ndarray


def background_factor(model, processor: Callable, rows: Dataset, settings: dict, num_images: int = 96) -> float:
    """By how much a segmenter's background probability is to be multiplied for objects to stay as large as they were.

    What learns from wrong labels is careful: it calls objects background where it is in doubt, and a segmenter that
    learnt from its labels would do so the more. No true mask is read, but the labels that it learnt from.

    Args:
        model, processor: as of [`score_images`].
        rows: with a column `pseudo_mask`; tagged images alone count, `num_images` of them, evenly spaced.
        settings: as of [`relabel_images`].

    Returns:
        a positive number; 1 where no image has a tag.
    """
    tagged = np.flatnonzero([len(tags) > 0 for tags in rows["tags"]])
    if not len(tagged):
        return 1.0
    rows = rows.select(tagged[np.unique(np.linspace(0, len(tagged) - 1, num_images).astype(int))])
    labels = undecoded(rows.select_columns(["image_id", "pseudo_mask"]))
    odds, wanted = [], 0.0
    for scored in score_images(model, processor, rows, settings | {"refine": []}, only_tagged=True):
        label = decode_mask(labels[scored.index]["pseudo_mask"], labels[scored.index]["image_id"])
        wanted += (label[label != IGNORE_INDEX] > 0).mean() if (label != IGNORE_INDEX).any() else 0.0
        tiny = torch.finfo(scored.scores.dtype).tiny
        ratio = (scored.scores[1:].amax(dim=0).clamp_min(tiny) / scored.scores[0].clamp_min(tiny)).flatten()
        odds.append(ratio.cpu().sort().values[torch.linspace(0, len(ratio) - 1, _QUANTILES).long()])
    factor = float(torch.cat(odds).quantile(1 - wanted / len(odds)))
    return min(max(factor, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)


def relabel_images(model, processor: Callable, rows: Dataset, settings: dict) -> Iterator[Relabelled]:
    """Label every row of `rows` by a segmenter and its tags; true masks are never read.

    Args:
        model: as of [`score_images`]; it knows background and the classes of `rows`.
        processor: its image processor.
        settings: a recipe's `self_training` section; perhaps with `window` and `window_stride`, as of `evaluation`,
            and a `background_factor`.

    Raises:
        ValueError: as [`score_images`].
    """
    factor = settings.get("background_factor", 1.0)
    for scored in score_images(model, processor, rows, settings, only_tagged=True, background_factor=factor):
        labels, confidence = confident_labels(scored.scores, scored.classes, settings["threshold"])
        yield Relabelled(scored.index, pseudo_mask=labels.cpu().numpy(), confidence=confidence.cpu().numpy())


def confident_labels(scores: Tensor, classes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """One image's label map without the doubtful pixels, and its confidence.

    Args:
        scores: (K+1, H, W) probabilities, background first, then the image's K tagged classes.
        classes: (K,) class indices c of these.
        threshold: pixels whose label is less probable become 255.

    Returns:
        labels (H, W) uint8, 0 = background, c + 1 = class c; confidence (H, W) in [0, 1]: the label's share of the
        probability of all labels.
    """
    best, channels = scores.max(dim=0)
    confidence = best / scores.sum(dim=0).clamp_min(torch.finfo(scores.dtype).tiny)
    labels = torch.cat([classes.new_zeros(1), classes + 1])[channels]
    return labels.masked_fill(confidence < threshold, IGNORE_INDEX).to(torch.uint8), confidence
