"""Self-training: a segmenter labels the tagged images for the next segmenter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..inference.segmenter import score_images
from ..models.maps import IGNORE_INDEX
from ..refinement.steps import RefinementChain
from ..settings import SelfTrainingSettings


@dataclass
class Relabelled:
    """The new label map of one image.

    Attributes:
        index: its row in the data set.
        pseudo_mask: (H, W) uint8, 0 = background, c + 1 = class c, 255 = ignore.
        confidence: (H, W) float32 in [0, 1], probability of the most likely label among the possible ones.
    """

    index: int
    pseudo_mask: np.ndarray
    confidence: np.ndarray


def relabel_images(
    model,
    processor: Callable,
    rows: Dataset,
    settings: SelfTrainingSettings,
    background_factor: float = 1.0,
    refine: RefinementChain | None = None,
) -> Iterator[Relabelled]:
    """Label every row of `rows` by a segmenter and its tags; true masks are never read.

    Args:
        model: as of [`score_images`]; it knows background and the classes of `rows`.
        processor: its image processor.
        settings: test-time augmentation, refinement and threshold.
        background_factor, refine: as of [`score_images`].

    Raises:
        ValueError: as [`score_images`].
    """
    for scored in score_images(model, processor, rows, settings, True, background_factor, refine):
        labels, confidence = confident_labels(scored.scores, scored.classes, settings.threshold)
        yield Relabelled(scored.index, pseudo_mask=labels.cpu().numpy(), confidence=confidence.cpu().numpy())


def confident_labels(scores: Tensor, classes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """One image's label map, uncertain pixels ignored, and its confidence.

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
