"""Mean IoU, pixel accuracy, precision and recall from a streamed confusion matrix.

Also a script: `evaluate.load("wsss_hf/metrics/mean_iou.py", class_names=[...])`.
"""

from __future__ import annotations

from collections.abc import Sequence

import evaluate
import numpy as np
import torch

from .streaming import FEATURES, StreamingMetric, distributed, label_maps, mean_over_present, number, ratio

DESCRIPTION = """
Mean intersection over union of label maps, and more from the same confusion matrix: IoU, precision and recall per
class, pixel accuracy, and the ratios of over- and under-activation that papers on weak supervision report. Images
are counted as they come: memory does not grow with their number, and nothing is written to disk.
"""

INPUTS = """
Args:
    predictions: label maps (H, W) of integers 0..K-1, or the ignore index, which is no class: a miss of the true one.
    references: true label maps of the same sizes; pixels with the ignore index are not counted.
Returns:
    mean_iou: mean of `iou` over the classes that occur.
    iou: class name -> IoU, None where the class occurs neither in the truth nor in the predictions.
    absent_classes: the names of these.
    pixel_accuracy: fraction of counted pixels whose label is correct.
    precision, recall: class name -> fraction; None where nothing was predicted, or nothing was there to find.
    mean_precision, mean_recall: means of these over the classes that have one.
    false_positive_share, false_negative_share: FP / union (over-activation) and FN / union (under-activation), mean
        over the object classes that occur (label 0, the background, is left out); IoU + both = 1 for every class.
    num_images: number of images counted.
    mean_iou_interval: (low, high), the bootstrap 95 % interval over images; only with `intervals=True`.
"""


def iou_from_counts(hits: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """IoU per class from correct, true and predicted pixel counts of shape (..., K); NaN where a class is absent."""
    return ratio(hits, truth + predicted - hits)


def bootstrap_interval(
    counts: np.ndarray, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of the mean IoU, images drawn with replacement.

    Args:
        counts: (N, 3, K) integers, per image the correct, true and predicted pixels of each class.
        level: fraction of the resampled mean IoUs inside the interval.
        resamples: number of resampled data sets.
        seed: seed of the draws; the order of the images does not matter.
    """
    means = mean_over_present(iou_from_counts(*resampled_sums(counts, resamples, seed).swapaxes(0, 1)))
    if np.isnan(means).all():
        return None, None
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_sums(counts: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(resamples, ...) sums of counts (N, ...) over N images drawn with replacement, whatever their order."""
    images, *shape = counts.shape
    rows = counts.reshape(images, -1).astype(np.float64)
    rows = rows[np.lexsort(rows.T)]
    rng = np.random.default_rng(seed)
    sums = [np.bincount(rng.integers(images, size=images), minlength=images) @ rows for _ in range(resamples)]
    return np.stack(sums).reshape(resamples, *shape)


class MeanIoU(StreamingMetric):
    """Streams a (K, K + 1) confusion matrix: rows are true classes, columns predicted ones, the last column "no class"
    (a pseudo mask may say ignore; for the true class of that pixel it is a miss).

    Args:
        class_names, num_classes, ignore_index: see [`StreamingMetric`].
        intervals: keep 3 K integers per image for `mean_iou_interval`.
        kwargs: what `evaluate.load` passes to every metric.
    """

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore_index: int = 255,
        intervals: bool = False,
        **kwargs,
    ):
        self.intervals = intervals
        super().__init__(class_names, num_classes, ignore_index, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=FEATURES)

    def _no_counts(self) -> np.ndarray:
        classes = len(self.names)
        return np.zeros((classes, classes + 1), dtype=np.int64)

    def reset(self) -> None:
        """Forgets all images."""
        super().reset()
        self.image_counts: list[np.ndarray] = []
        classes = len(self.names)
        # Row and column of a label; the ignore index comes after the classes, and last what is neither.
        self._index = np.full(256, classes + 1, dtype=np.int32)
        self._index[:classes] = np.arange(classes)
        self._index[self.ignore_index] = classes
        self._scratch = np.empty((2, 0), dtype=bool)

    def _count(self, prediction, reference, who: str) -> np.ndarray:
        prediction, reference = label_maps(prediction, reference, who)
        if self._scratch.shape[1] < reference.size:  # fresh memory would cost more than what is computed in it
            self._scratch = np.empty((2, reference.size), dtype=bool)
        pairs = _count_pairs(self._index, reference.ravel(), prediction.ravel(), self._scratch[:, : reference.size])
        if pairs[-1].any() or pairs[:, -1].any():
            self._check_labels(np.bincount(prediction.ravel(), minlength=256) > 0, f"{who}prediction")
            self._check_labels(np.bincount(reference.ravel(), minlength=256) > 0, f"{who}reference")
        matrix = pairs[:-2, :-1]
        if self.intervals:
            self.image_counts.append(np.stack(hits_truth_predicted(matrix)).astype(np.int32))
        return matrix

    def merge(self, other: StreamingMetric) -> MeanIoU:
        """Adds the images that `other` counted; returns itself."""
        if not isinstance(other, MeanIoU) or self.intervals != other.intervals:
            raise ValueError(f"merge: expected a MeanIoU with intervals={self.intervals}, got another metric")
        super().merge(other)
        self.image_counts += other.image_counts
        return self

    def all_reduce(self) -> MeanIoU:
        """Adds up the images of all processes in each of them; call once, after the last image. Returns itself."""
        super().all_reduce()
        if self.intervals and distributed():
            per_process: list = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(per_process, self.image_counts)
            self.image_counts = [counts for part in per_process for counts in part]
        return self

    def _figures(self) -> dict:
        hits, truth, predicted = hits_truth_predicted(self.counts)
        union = truth + predicted - hits
        iou, precision, recall = iou_from_counts(hits, truth, predicted), ratio(hits, predicted), ratio(hits, truth)
        figures: dict = {"mean_iou": number(mean_over_present(iou))}
        if self.intervals:
            figures["mean_iou_interval"] = bootstrap_interval(np.stack(self.image_counts))
        return figures | {
            "iou": self._by_name(iou),
            "absent_classes": [name for name, pixels in zip(self.names, union, strict=True) if not pixels],
            "pixel_accuracy": number(ratio(hits.sum(), truth.sum())),
            "precision": self._by_name(precision),
            "recall": self._by_name(recall),
            "mean_precision": number(mean_over_present(precision)),
            "mean_recall": number(mean_over_present(recall)),
            "false_positive_share": number(mean_over_present(ratio(predicted - hits, union)[1:])),
            "false_negative_share": number(mean_over_present(ratio(truth - hits, union)[1:])),
        }


def _count_pairs(index: np.ndarray, reference: np.ndarray, prediction: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """(M, M) int64: how often each pair of `index` values, 0..M-1, occurs in two flat uint8 maps of N pixels.

    Label maps consist of regions: where runs of equal pairs along the rows are few, they are counted, not the pixels.

    Args:
        index: (256,) int32.
        scratch: (2, N) bool, overwritten.
    """
    last, other = scratch  # whether a pixel is the last of its run, in either map
    last[-1:] = True
    np.not_equal(reference[1:], reference[:-1], out=last[:-1])
    np.not_equal(prediction[1:], prediction[:-1], out=other[:-1])
    last[:-1] |= other[:-1]
    lengths = None
    if np.count_nonzero(last) < last.size // 8:
        (ends,) = last.nonzero()
        lengths = ends + 1
        lengths[1:] -= ends[:-1] + 1
        reference, prediction = reference[ends], prediction[ends]
    size = index.max() + 1
    codes = index.take(reference, mode="clip")  # clip skips the check of the indices, which are uint8
    codes *= size
    codes += index.take(prediction, mode="clip")
    pairs = np.bincount(codes, weights=lengths, minlength=size * size)
    # Weighted counts are sums of whole numbers below 2**53 in float64, and so exact.
    return pairs.astype(np.int64).reshape(size, size)


def hits_truth_predicted(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correct, true and predicted pixels of each class, (K,) each, from a (K, K + 1) confusion matrix."""
    return np.diagonal(matrix), matrix.sum(axis=1), matrix[:, :-1].sum(axis=0)
