"""Mean IoU of the maps against the background threshold that cuts them.

Also a script: `evaluate.load("wsss_hf/metrics/threshold_curve.py", class_names=[...])`.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from .streaming import StreamingMetric, label_map, mean_over_present, ratio

DESCRIPTION = """
Mean IoU of class maps, cut at every background threshold, from one pass over them. At threshold t a pixel gets its
highest class if that class scores above t, otherwise background. The curve reads true masks: it is for analysis, never
for choosing what weak training uses.
"""

INPUTS = """
Args:
    predictions: maps (K - 1, H, W) in [0, 1] of the classes 1..K-1; classes that the image does not have are 0.
    references: true label maps (H, W); pixels with the ignore index are not counted.
Returns:
    curve: [(threshold, mean IoU), ...], thresholds ascending.
    best: the point of the curve with the highest mean IoU, the lowest threshold of equals.
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
            raise ValueError(f"thresholds must ascend, got {self.thresholds.tolist()}")
        super().__init__(class_names, num_classes, ignore_index, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
        features = datasets.Features({"predictions": maps, "references": datasets.Image()})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _no_counts(self) -> np.ndarray:
        # class 0 is nowhere the highest: it is what falls below
        classes = len(self.class_names)
        return np.zeros((classes, classes, self.thresholds.size + 1), dtype=np.int64)

    def _count(self, prediction, reference, who: str) -> np.ndarray:
        scores, truth = np.asarray(prediction), label_map(reference, f"{who}truth")
        objects = len(self.class_names) - 1
        if scores.shape != (objects, *truth.shape):
            raise ValueError(
                f"{who}maps of shape {scores.shape} do not fit {objects} classes and a truth of {truth.shape}"
            )
        best = scores.max(axis=0)
        if not (best.min() >= -1e-4 and best.max() <= 1 + 1e-4):
            raise ValueError(f"{who}maps must lie in [0, 1], got {best.min()} to {best.max()}")
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
            raise ValueError("no pixel to evaluate: every truth is ignored throughout")
        # above[:, :, i]: pixels whose score exceeds threshold i, so that their class survives the cut
        above = self.counts[:, :, ::-1].cumsum(axis=2)[:, :, ::-1][:, :, 1:]
        truth = self.counts.sum(axis=(1, 2))
        hits = np.diagonal(above).copy()
        predicted = above.sum(axis=0).T
        hits[:, 0] = truth[0] - above[0].sum(axis=0)
        predicted[:, 0] = truth.sum() - above.sum(axis=(0, 1))
        means = mean_over_present(ratio(hits, truth + predicted - hits)).tolist()
        curve = list(zip(self.thresholds.tolist(), means, strict=True))
        return {"curve": curve, "best": max(curve, key=lambda point: point[1])}
