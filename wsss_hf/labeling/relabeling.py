"""Self-training: what a segmenter says of tagged images becomes their label maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from ..models.maps import IGNORE_INDEX
from .segmentation import score_images


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


def relabel_images(model, processor: Callable, rows: Dataset, settings: dict) -> Iterator[Relabelled]:
    """Label every row of `rows` by a segmenter and its tags; true masks are never read.

    Args:
        model: as of [`score_images`]; it knows background and the classes of `rows`.
        processor: its image processor.
        settings: a recipe's `self_training` section; perhaps with `window` and `window_stride`, as of `evaluation`.

    Raises:
        ValueError: as [`score_images`].
    """
    views = {key: settings[key] for key in ("scales", "flip", "window", "window_stride") if key in settings}
    for scored in score_images(model, processor, rows, settings["batch_size"], **views):
        tags = scored.tags.to(scored.scores.device)
        (labels,), (confidence,) = tagged_labels(scored.scores[None], tags[None], settings["threshold"])
        yield Relabelled(scored.index, pseudo_mask=labels.cpu().numpy(), confidence=confidence.cpu().numpy())


def tagged_labels(scores: Tensor, tags: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Label maps that hold nothing but background and tagged classes, and their confidence.

    Args:
        scores: (B, C+1, H, W) class probabilities, background first.
        tags: (B, C) 0/1.
        threshold: pixels whose label is less probable become 255.

    Returns:
        labels (B, H, W) uint8; confidence (B, H, W) in [0, 1]: the label's share of the probability of all possible
        labels.
    """
    possible = scores * F.pad(tags, (1, 0), value=1.0)[:, :, None, None]
    best, labels = possible.max(dim=1)
    confidence = best / possible.sum(dim=1).clamp_min(torch.finfo(scores.dtype).tiny)
    return labels.masked_fill(confidence < threshold, IGNORE_INDEX).to(torch.uint8), confidence
