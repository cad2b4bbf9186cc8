"""Mean IoU of class maps as a function of the background threshold.

Also a script: `evaluate.load("wsss_hf/metrics/threshold_curve.py", class_names=[...])`.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from .streaming import StreamingMetric, label_map, mean_over_present, ratio

DESCRIPTION = """
Mean IoU of class maps at every background threshold, from one pass over them. At threshold t a pixel gets the class
with the highest score if that is above t, otherwise background. The curve reads true masks: its best point is the
oracle threshold, for analysis only, never for weakly supervised training.
"""

INPUTS = """
Args:
    predictions: maps (K - 1, H, W) in [0, 1] of the classes 1..K-1; classes that the image does not have are 0.
    references: true label maps (H, W); pixels with the ignore index are not counted.
Returns:
    curve: [(threshold, mean IoU), ...], thresholds ascending.
    best: the oracle threshold and its mean IoU: the highest of the curve; of equal ones, the lowest threshold.
    num_images: number of images counted.
"""


class ThresholdCurve(StreamingMetric):
    """Streams counts [truth, highest class, number of thresholds below its score].

    Args:
        class_names: names of the labels 0..K-1, background first.
        thresholds: T ascending numbers.
        num_classes, ignore_index: see [`StreamingMetric`].
        kwargs: what `evaluate.load` passes to every metric.
    """

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        thresholds: Sequence[float] = tuple(np.linspace(0, 1, 21).round(2)),
        num_classes: int | None = None,
        ignore_index: int = 255,
        **kwargs,
    ):
        self.thresholds = np.asarray(thresholds, dtype=np.float64)
        if self.thresholds.size == 0 or (np.diff(self.thresholds) <= 0).any():
            raise ValueError(f"thresholds: expected ascending numbers, got {self.thresholds.tolist()}")
        super().__init__(class_names, num_classes, ignore_index, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
        features = datasets.Features({"predictions": maps, "references": datasets.Image()})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _no_counts(self) -> np.ndarray:
        # class 0, the background, is never the highest class: it has no map
        classes = len(self.names)
        if classes < 2:
            raise ValueError(f"class_names: expected background and at least one class, got {self.names}")
        return np.zeros((classes, classes, self.thresholds.size + 1), dtype=np.int64)

    def _count(self, prediction, reference, who: str) -> np.ndarray:
        scores, truth = np.asarray(prediction), label_map(reference, f"{who}truth")
        objects = len(self.names) - 1
        if scores.shape != (objects, *truth.shape):
            raise ValueError(
                f"{who}maps: expected the shape {(objects, *truth.shape)} (object classes, H, W), got {scores.shape}"
            )
        best = scores.max(axis=0)
        if not (best.min() >= -1e-4 and best.max() <= 1 + 1e-4):
            raise ValueError(f"{who}maps: expected values in [0, 1], got {best.min()} to {best.max()}")
        self._check_labels(np.bincount(truth.ravel(), minlength=256) > 0, f"{who}truth")
        counted = truth != self.ignore_index
        cells = (
            truth[counted].astype(np.int64),
            scores.argmax(axis=0)[counted] + 1,
            np.searchsorted(self.thresholds, best[counted]),
        )
        return np.bincount(np.ravel_multi_index(cells, self.counts.shape), minlength=self.counts.size).reshape(
            self.counts.shape
        )

    def _figures(self) -> dict:
        if not self.counts.any():
            raise ValueError("compute: expected pixels with a true label, got none; all are ignored")
        # above[:, :, i]: pixels whose score exceeds threshold i, so that they get their class and not background
        above = self.counts[:, :, ::-1].cumsum(axis=2)[:, :, ::-1][:, :, 1:]
        truth = self.counts.sum(axis=(1, 2))
        hits = np.diagonal(above).copy()
        predicted = above.sum(axis=0).T
        hits[:, 0] = truth[0] - above[0].sum(axis=0)
        predicted[:, 0] = truth.sum() - above.sum(axis=(0, 1))
        means = mean_over_present(ratio(hits, truth + predicted - hits)).tolist()
        curve = list(zip(self.thresholds.tolist(), means, strict=True))
        return {"curve": curve, "best": max(curve, key=lambda point: point[1])}
