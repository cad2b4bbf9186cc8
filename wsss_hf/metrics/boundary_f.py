"""Boundary precision, recall and F of label maps.

Also a script: `evaluate.load("wsss_hf/metrics/boundary_f.py", class_names=[...])`.

The definition. A pixel of class c is a boundary pixel of c if one of its four neighbours has another label; the frame
of the image is no boundary. It is correct if the other label map has a boundary pixel *of the same class* within a
Euclidean distance of `tolerance` times the image diagonal, rounded up to whole pixels: 0.008 as in DAVIS (Perazzi et
al., CVPR 2016), that is 5 pixels at 500 x 375; Csurka et al. (BMVC 2013) take 0.0075.

Three choices need a reason:
- Counts are added up over all images before precision, recall and F are taken per class, as it is done for the IoU. A
  mean over images would need a value for classes that an image lacks on one side, and would let an image with one
  small object weigh as much as a crowd.
- PASCAL VOC has a band of ignored pixels (255) around every object, so that no two classes ever touch. The true
  outline is taken to be in the middle of that band: ignored pixels get the label of the nearest pixel that has one.
  (Ignoring the band in both maps instead would give a prediction a boundary wherever the truth has one.)
- Inside larger ignored regions nothing is known: boundary pixels of either map that are farther than the tolerance
  from the nearest labelled pixel are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import evaluate
import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from .streaming import FEATURES, StreamingMetric, label_maps, mean_over_present, number, ratio

DESCRIPTION = """
Precision, recall and F of the boundaries of label maps, within a tolerance that is a fraction of the image diagonal.
Images are counted as they come: memory does not grow with their number, and nothing is written to disk.
"""

INPUTS = """
Args:
    predictions: label maps (H, W) of integers 0..K-1, or the ignore index, which is no class.
    references: true label maps of the same sizes; ignored pixels get the nearest label, those farther from any label
        than the tolerance are not counted.
Returns:
    boundary_f: mean of `boundary_f_per_class` over the classes that have one.
    boundary_f_per_class: class name -> harmonic mean of precision and recall; 0 where only one side has boundaries of
        the class or none of them is correct, None where neither side has any.
    boundary_precision, boundary_recall: fraction of the predicted (true) boundary pixels that are correct, mean over
        the classes that have predicted (true) boundaries.
    num_images: number of images counted.
"""


class BoundaryF(StreamingMetric):
    """Streams (4, K) counts of boundary pixels: predicted, correct among these, true, found among these.

    Args:
        class_names, num_classes, ignore_index: see [`StreamingMetric`].
        tolerance: fraction of the image diagonal.
        kwargs: what `evaluate.load` passes to every metric.
    """

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore_index: int = 255,
        tolerance: float = 0.008,
        **kwargs,
    ):
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance: expected a fraction of the image diagonal, like 0.008, got {tolerance}")
        self.tolerance = tolerance
        super().__init__(class_names, num_classes, ignore_index, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=FEATURES)

    def _no_counts(self) -> np.ndarray:
        return np.zeros((4, len(self.names)), dtype=np.int64)

    def _count(self, prediction, reference, who: str) -> np.ndarray:
        prediction, reference = label_maps(prediction, reference, who)
        self._check_labels(np.bincount(prediction.ravel(), minlength=256) > 0, f"{who}prediction")
        self._check_labels(np.bincount(reference.ravel(), minlength=256) > 0, f"{who}reference")
        pixels = math.ceil(self.tolerance * math.hypot(*reference.shape))
        unknown = reference == self.ignore_index
        if unknown.all():
            return self._no_counts()
        counted: np.ndarray = np.ones(reference.shape, dtype=bool)
        if unknown.any():
            distance, nearest = distance_transform_edt(unknown, return_indices=True)
            reference, counted = reference[tuple(nearest)], distance <= pixels
        classes = len(self.names)
        found, true = (_boundary_points(labels, classes) for labels in (prediction, reference))
        rows = []
        for points, others in ((found, true), (true, found)):
            points = points[counted[points[:, 0], points[:, 1]]]
            near = points[_near(points, others, pixels)]
            rows += [np.bincount(part[:, 2], minlength=classes) for part in (points, near)]
        return np.stack(rows)

    def _figures(self) -> dict:
        predicted, correct, true, found = self.counts
        precision, recall = ratio(correct, predicted), ratio(found, true)
        # F = 0 where nothing is correct; where one side is empty, all pixels of the other are wrong.
        both = np.nan_to_num(precision) + np.nan_to_num(recall)
        f = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
        f[(predicted == 0) & (true == 0)] = np.nan
        return {
            "boundary_f": number(mean_over_present(f)),
            "boundary_f_per_class": self._by_name(f),
            "boundary_precision": number(mean_over_present(precision)),
            "boundary_recall": number(mean_over_present(recall)),
        }


def edges(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels of a label map (H, W) one of whose four neighbours has another label."""
    edge = np.zeros(labels.shape, dtype=bool)
    down, across = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    return edge


def _boundary_points(labels: np.ndarray, classes: int) -> np.ndarray:
    """(N, 3) integers: row, column and label of the boundary pixels of the labels 0..classes-1."""
    rows, columns = np.nonzero(edges(labels) & (labels < classes))
    return np.stack([rows, columns, labels[rows, columns].astype(np.int64)], axis=1)


def _near(points: np.ndarray, others: np.ndarray, pixels: int) -> np.ndarray:
    """(N,) bool: which points have one of `others` with the same label at most `pixels` away."""
    if not len(points) or not len(others):
        return np.zeros(len(points), dtype=bool)
    # The labels are a third dimension in which they are too far apart for the tolerance: one search serves all.
    apart = np.array([1, 1, 2 * pixels + 1])
    distance, _ = cKDTree(others * apart).query(points * apart, distance_upper_bound=pixels + 0.5)
    return distance <= pixels + 1e-9  # distances are roots of whole numbers
