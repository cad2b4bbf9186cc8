"""Mean IoU of the maps against the background threshold that cuts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .mean_iou import iou_from_counts, mean_over_present, sum_over_processes


class ThresholdCurve:
    """Mean IoU at every background threshold, from one pass over the maps.

    At threshold t a pixel gets its highest class if that class scores above t, otherwise background. The curve reads
    true masks: it is for analysis, never for choosing what weak training uses.

    Args:
        class_names: names of the labels 0..C, background first.
        thresholds: T ascending numbers.
        ignore_index: truth label of pixels that are not counted.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        thresholds: Sequence[float] = tuple(np.linspace(0, 1, 21).round(2)),
        ignore_index: int = 255,
    ):
        self.class_names = list(class_names)
        self.thresholds = np.asarray(thresholds, dtype=np.float64)
        self.ignore_index = ignore_index
        if self.thresholds.size == 0 or (np.diff(self.thresholds) <= 0).any():
            raise ValueError(f"thresholds must ascend, got {self.thresholds.tolist()}")
        classes = len(self.class_names)
        # [truth, highest class, number of thresholds below its score]; class 0 wins nowhere: it is what falls below
        self.counts = np.zeros((classes, classes, self.thresholds.size + 1), dtype=np.int64)

    def add(self, scores: np.ndarray, truth: np.ndarray, name: str | None = None) -> None:
        """Counts one image.

        Args:
            scores: (C, H, W) maps in [0, 1], classes that the image does not have at 0.
            truth: (H, W) labels 0..C or the ignore index.
            name: the image, for error messages.
        """
        scores, truth = np.asarray(scores), np.asarray(truth)
        who = f"{name}: " if name else ""
        objects = len(self.class_names) - 1
        if scores.shape != (objects, *truth.shape):
            raise ValueError(
                f"{who}maps of shape {scores.shape} do not fit {objects} classes and a truth of {truth.shape}"
            )
        best = scores.max(axis=0)
        if not (best.min() >= -1e-4 and best.max() <= 1 + 1e-4):
            raise ValueError(f"{who}maps must lie in [0, 1], got {best.min()} to {best.max()}")
        counted = truth != self.ignore_index
        truth = truth[counted].astype(np.int64)
        if truth.size and not (truth.min() >= 0 and truth.max() <= objects):
            raise ValueError(
                f"{who}truth holds labels up to {truth.max()}; right are 0..{objects}, {self.ignore_index}"
            )
        cells = (truth, scores.argmax(axis=0)[counted] + 1, np.searchsorted(self.thresholds, best[counted]))
        flat = np.ravel_multi_index(cells, self.counts.shape)
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)

    def all_reduce(self) -> ThresholdCurve:
        """Adds up the images of all processes in each of them; call once, after the last image. Returns itself."""
        self.counts = sum_over_processes(self.counts)
        return self

    def compute(self) -> dict:
        """`{"curve": [(threshold, mIoU), ...], "best": (threshold, mIoU)}`; the lowest threshold of equals is best.

        Raises:
            ValueError: no pixel was counted.
        """
        if not self.counts.any():
            raise ValueError("no image to evaluate: add at least one image with its truth")
        # above[:, :, i]: pixels whose score exceeds threshold i, so that their class survives the cut
        above = self.counts[:, :, ::-1].cumsum(axis=2)[:, :, ::-1][:, :, 1:]
        truth = self.counts.sum(axis=(1, 2))
        hits = np.diagonal(above).copy()
        predicted = above.sum(axis=0).T
        hits[:, 0] = truth[0] - above[0].sum(axis=0)
        predicted[:, 0] = truth.sum() - above.sum(axis=(0, 1))
        means = mean_over_present(iou_from_counts(hits, np.broadcast_to(truth, hits.shape), predicted)).tolist()
        curve = list(zip(self.thresholds.tolist(), means, strict=True))
        return {"curve": curve, "best": max(curve, key=lambda point: point[1])}
