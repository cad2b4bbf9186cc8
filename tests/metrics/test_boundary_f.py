import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from skimage.morphology import dilation, disk

from wsss_hf.metrics.boundary_f import BoundaryF

NAMES = ["background", "cat", "dog", "owl"]  # no label map of these tests holds the owl


def patches(seed, count=4):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        grid = rng.choice([0, 0, 1, 2], size=(4, 5))
        truth = np.kron(grid, np.ones(rng.integers(7, 12, size=2), int)).astype(np.uint8)
        prediction = np.roll(truth, rng.integers(-3, 4, size=2), axis=(0, 1))
        prediction[rng.random(truth.shape) < 0.005] = 2
        yield prediction, truth


def boundary(labels, label):
    """Pixels of the label that have a neighbour in the image which is not of the label, one by one."""
    height, width = labels.shape
    inside = np.zeros(labels.shape, bool)
    for y, x in zip(*np.nonzero(labels == label), strict=True):
        around = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        inside[y, x] = any(labels[p] != label for p in around if 0 <= p[0] < height and 0 <= p[1] < width)
    return inside


def near_by_distances(points, others, pixels):
    if not others.any():
        return np.zeros(points.sum(), bool)
    return cdist(np.argwhere(points), np.argwhere(others)).min(axis=1) <= pixels


def near_by_dilation(points, others, pixels):
    return dilation(others, disk(pixels))[points]


def plain_figures(images, tolerance, near):
    scores, precisions, recalls = {}, [], []
    for label, name in enumerate(NAMES):
        predicted = right = true = found = 0
        for prediction, truth in images:
            pixels = math.ceil(tolerance * math.hypot(*truth.shape))
            ours, theirs = boundary(prediction, label), boundary(truth, label)
            predicted, right = predicted + ours.sum(), right + near(ours, theirs, pixels).sum()
            true, found = true + theirs.sum(), found + near(theirs, ours, pixels).sum()
        precisions += [right / predicted] if predicted else []
        recalls += [found / true] if true else []
        p, r = right / max(predicted, 1), found / max(true, 1)
        scores[name] = 2 * p * r / (p + r) if p + r else 0.0 if predicted or true else None
    return {
        "boundary_f": np.mean([score for score in scores.values() if score is not None]),
        "boundary_precision": np.mean(precisions),
        "boundary_recall": np.mean(recalls),
        **scores,
    }


def stream(images, **settings):
    metric = BoundaryF(NAMES, **settings)
    for prediction, truth in images:
        metric.add(prediction, truth)
    return metric


def flat(figures):
    figures = dict(figures)
    return figures | figures.pop("boundary_f_per_class")


@pytest.mark.parametrize("near", [near_by_distances, near_by_dilation])
@pytest.mark.parametrize("tolerance", [0.008, 0.04])
def test_agrees_with_every_distance_and_with_dilation(near, tolerance):
    images = list(patches(0))
    figures = flat(stream(images, tolerance=tolerance).compute())
    assert figures.pop("num_images") == len(images)
    assert figures == pytest.approx(plain_figures(images, tolerance, near), abs=1e-9)
    assert 0 < figures["boundary_f"] < 1 and figures["owl"] is None


def square(shift, size=40):
    labels = np.zeros((size, size), np.uint8)
    labels[10:30, 10 + shift : 30 + shift] = 1
    return labels


def test_a_shift_within_the_tolerance_is_right_and_beyond_is_not():
    within = stream([(square(2), square(0))], tolerance=0.03).compute()  # 1.7 pixels, so 2
    beyond = stream([(square(3), square(0))], tolerance=0.03).compute()
    assert within["boundary_f"] == 1 and beyond["boundary_f"] < 0.8


def test_a_class_on_one_side_only_scores_zero_and_the_frame_is_no_boundary():
    everywhere, nothing = np.ones((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    assert stream([(everywhere, nothing)]).compute()["boundary_f"] is None
    figures = stream([(square(0), np.zeros((40, 40), np.uint8))]).compute()
    assert figures["boundary_f_per_class"] == {"background": 0, "cat": 0, "dog": None, "owl": None}
    assert figures["boundary_precision"] == 0 and figures["boundary_recall"] is None


def test_the_true_boundary_is_in_the_middle_of_a_narrow_void():
    truth = square(0)
    truth[8:12, 8:32] = truth[28:32, 8:32] = truth[8:32, 8:12] = truth[8:32, 28:32] = 255
    assert stream([(square(0), truth)], tolerance=0.03).compute()["boundary_f"] == 1
    everywhere = np.ones_like(truth)  # a boundary wherever the truth has a void would be right here
    assert stream([(everywhere, truth)], tolerance=0.03).compute()["boundary_f"] == 0


def test_deep_inside_a_void_nothing_counts():
    truth = np.zeros((40, 40), np.uint8)
    truth[:, 20:] = 255
    prediction = np.zeros_like(truth)
    prediction[:, 30:] = 1
    assert stream([(prediction, truth)], tolerance=0.03).compute()["boundary_precision"] is None
    prediction[:, 21:] = 1
    assert stream([(prediction, truth)], tolerance=0.03).compute()["boundary_precision"] == 0
    assert stream([(prediction, np.full_like(truth, 255))]).compute()["boundary_f"] is None


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (
            np.zeros((4, 6), int),
            np.zeros((4, 5), int),
            "img_7: prediction: expected the size of the reference, 5x4, got 6x4",
        ),
        (
            np.full((2, 2), 5),
            np.zeros((2, 2), int),
            r"img_7: prediction: expected labels 0..3 and 255, got \[5\]",
        ),
        (np.zeros((2, 2), int), np.full((2, 2), 8), r"img_7: reference: expected labels 0..3 and 255, got \[8\]"),
    ],
)
def test_bad_images_are_named_and_not_counted(prediction, reference, message):
    metric = BoundaryF(NAMES)
    with pytest.raises(ValueError, match=message):
        metric.add(prediction, reference, "img_7")
    assert len(metric) == 0


def test_a_tolerance_in_pixels_is_refused():
    with pytest.raises(ValueError, match="tolerance: expected a fraction of the image diagonal, like 0.008, got 5"):
        BoundaryF(NAMES, tolerance=5)


def test_two_processes_give_exactly_what_one_gives(in_two_processes):
    def count_half(rank):
        return stream(list(patches(3))[rank::2]).all_reduce().compute()

    assert in_two_processes(count_half) == [stream(patches(3)).compute()] * 2
