"""Self-training: what a segmenter says of tagged images becomes their label maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from ..data.batches import batches_by_size
from ..models.maps import IGNORE_INDEX
from .prediction import predict_scores


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
        model: in eval mode, on the device to work on; it knows background and the classes of `rows`.
        processor: the model's image processor.
        settings: a recipe's `self_training` section.
    """
    for batch in batches_by_size(rows, processor, settings["batch_size"]):
        pixel_values = batch.pixel_values.to(model.device)
        scores = predict_scores(model, pixel_values, batch.size, settings["scales"], settings["flip"])
        labels, confidence = tagged_labels(scores, batch.tags.to(model.device), settings["threshold"])
        for index, mask, certainty in zip(batch.indices, labels.cpu().numpy(), confidence.cpu().numpy(), strict=True):
            yield Relabelled(index=index, pseudo_mask=mask, confidence=certainty)


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
