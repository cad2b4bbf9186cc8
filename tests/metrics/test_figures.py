import numpy as np
import pytest

from wsss_hf.metrics.boundary_f import BoundaryF
from wsss_hf.metrics.figures import Figures
from wsss_hf.metrics.mean_iou import MeanIoU

NAMES = ["background", "cat"]


def test_figures_are_those_of_mean_iou_with_its_interval_and_of_boundary_f():
    rng = np.random.default_rng(0)
    figures, *metrics = Figures(NAMES), MeanIoU(NAMES, intervals=True), BoundaryF(NAMES)
    for number in range(3):
        prediction, truth = (rng.integers(0, 2, size=(9, 7), dtype=np.uint8) for _ in range(2))
        for metric in (figures, *metrics):
            metric.add(prediction, truth, f"image {number}")
    mean_iou, boundary_f = (metric.compute() for metric in metrics)
    assert figures.names == NAMES and figures.compute() == mean_iou | boundary_f
    assert mean_iou["mean_iou_interval"] and boundary_f["boundary_f"] and mean_iou["num_images"] == 3


def test_a_bad_image_is_named():
    with pytest.raises(ValueError, match="^img_7: prediction: expected the size of the reference, 3x2, got 2x2"):
        Figures(NAMES).add(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), "img_7")
