"""All figures of label maps compared with true ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .boundary_f import BoundaryF
from .mean_iou import MeanIoU
from .streaming import StreamingMetric


class Figures:
    """Streams label maps and true ones; its figures are those of [`MeanIoU`], with its interval, and [`BoundaryF`].

    Args:
        names: class names of the labels 0..K-1, background first.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.metrics: tuple[StreamingMetric, ...] = (MeanIoU(self.names, intervals=True), BoundaryF(self.names))

    def add(self, prediction: np.ndarray, reference: np.ndarray, name: str) -> None:
        """Counts one image.

        Args:
            prediction, reference: label maps (H, W) of integers 0..K-1 or 255 (ignore).
            name: of the image, in error messages.
        """
        for metric in self.metrics:
            metric.add(prediction, reference, name)

    def compute(self) -> dict:
        """The figures over the images of all processes: name -> value."""
        figures: dict = {}
        for metric in self.metrics:
            figures |= metric.all_reduce().compute()
        return figures
