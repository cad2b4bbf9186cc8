import numpy as np
import pytest

from wsss_hf.metrics.mean_iou import MeanIoU
from wsss_hf.metrics.threshold_curve import ThresholdCurve

NAMES = ["background", "cat", "dog", "owl"]


def random_maps(seed, count=4):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size = rng.integers(6, 25, size=2)
        # coarse scores, so that many equal a threshold exactly
        scores = rng.integers(0, 21, size=(3, *size)).astype(np.float32) / 20 * np.array([1, 1, 0])[:, None, None]
        yield scores, rng.choice([0, 1, 2, 255], size=size)


def test_agrees_with_labelling_at_each_threshold():
    thresholds = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
    curve = ThresholdCurve(NAMES, thresholds)
    metrics = [MeanIoU(NAMES) for _ in thresholds]
    for scores, truth in random_maps(0):
        curve.add(scores, truth)
        for metric, threshold in zip(metrics, thresholds, strict=True):
            background = np.full((1, *truth.shape), threshold)
            metric.add(prediction=np.concatenate([background, scores]).argmax(axis=0), reference=truth)
    result = curve.compute()
    expected = [metric.compute()["mean_iou"] for metric in metrics]
    assert [threshold for threshold, _ in result["curve"]] == thresholds
    assert [value for _, value in result["curve"]] == pytest.approx(expected, abs=1e-9)
    assert result["best"] == result["curve"][int(np.argmax(expected))]


def test_best_threshold_separates_object_from_background():
    curve = ThresholdCurve(["background", "cat"])
    curve.add(np.array([[[0.1, 0.38, 0.43, 0.9]]]), np.array([[0, 0, 1, 1]]))
    assert curve.compute()["best"] == (0.4, 1.0)


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        (
            np.zeros((3, 4, 4)),
            np.zeros((4, 5), int),
            r"img_7: maps: expected the shape \(3, 4, 5\) .*, got \(3, 4, 4\)",
        ),
        (np.zeros((2, 4, 4)), np.zeros((4, 4), int), r"expected the shape \(3, 4, 4\)"),
        (np.full((3, 2, 2), np.nan), np.zeros((2, 2), int), r"img_7: maps: expected values in \[0, 1\], got nan"),
        (np.full((3, 2, 2), 7.0), np.zeros((2, 2), int), "got 7.0 to 7.0"),
        (np.zeros((3, 2, 2)), np.full((2, 2), 4), r"img_7: truth: expected labels 0..3 and 255, got \[4\]"),
    ],
)
def test_bad_images_are_named(scores, truth, message):
    with pytest.raises(ValueError, match=message):
        ThresholdCurve(NAMES).add(scores, truth, name="img_7")


def test_bad_settings_and_nothing_counted():
    with pytest.raises(ValueError, match="thresholds: expected ascending numbers"):
        ThresholdCurve(NAMES, [0.5, 0.2])
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        ThresholdCurve(NAMES).compute()
    for classes in ({"class_names": ["background"]}, {"num_classes": 1}):
        with pytest.raises(ValueError, match="class_names: expected background and at least one class, got"):
            ThresholdCurve(**classes)
