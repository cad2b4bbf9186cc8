import numpy as np
import pytest

from wsss_hf.metrics.errors import Errors, compare_errors
from wsss_hf.metrics.mean_iou import MeanIoU

NAMES = ["background", "cat", "dog"]


def striped(*columns):
    """A label map (20, 20) from (label, number of columns) pairs."""
    return np.concatenate([np.full((20, width), label, dtype=np.uint8) for label, width in columns], axis=1)


def errors_of(*images, names=NAMES):
    errors = Errors(names)
    for number, (prediction, truth) in enumerate(images):
        errors.add(prediction, truth, f"image {number}")
    return errors.compute()


def test_kinds_of_errors_by_hand():
    truth = striped((1, 10), (0, 10))
    found = errors_of((striped((2, 1), (1, 7), (0, 11), (2, 1)), truth))
    assert found["mean_iou"] == pytest.approx((7 / 10 + 9 / 12 + 0) / 3)
    assert found["iou"] == pytest.approx({"background": 9 / 12, "cat": 7 / 10, "dog": 0})
    # The border is between the columns 9 and 10; five pixels from these are the columns 4 to 15.
    assert found["mean_iou_at_borders"] == pytest.approx((4 / 6 + 6 / 8) / 2)
    assert found["mean_iou_elsewhere"] == pytest.approx((3 / 4 + 3 / 4 + 0) / 3)
    assert (found["missed_objects"], found["num_objects"]) == (0, 1)
    shares = {kind: figures["share"] for kind, figures in found["errors"].items()}
    assert shares == pytest.approx(
        {
            "objects taken for background": 2 / 20,
            "background taken for objects": 1 / 20,
            "objects taken for others": 1 / 20,
            "within 5 pixels of a border": 2 / 20,
            "in missed objects": 0,
        }
    )
    without = {kind: figures["mean_iou_without"] for kind, figures in found["errors"].items()}
    assert without == pytest.approx(
        {
            "objects taken for background": (9 / 10 + 9 / 10 + 0) / 3,
            "background taken for objects": (7 / 10 + 10 / 12 + 0) / 3,
            "objects taken for others": (8 / 10 + 9 / 12 + 0) / 3,
            "within 5 pixels of a border": (9 / 10 + 9 / 10 + 0) / 3,
            "in missed objects": found["mean_iou"],
        }
    )


def test_an_object_is_missed_where_its_image_has_less_than_a_tenth_of_it():
    truth = striped((1, 10), (2, 5), (0, 5))
    found = errors_of(
        (striped((1, 10), (0, 10)), truth),  # the dog is missed
        (striped((1, 1), (0, 9), (2, 5), (0, 5)), truth),  # a tenth of the cat is enough
        (striped((255, 10), (0, 10)), striped((255, 10), (0, 10))),  # nothing to find
    )
    assert (found["missed_objects"], found["num_objects"]) == (1 / 4, 4)
    missed = found["errors"]["in missed objects"]
    assert missed["share"] == pytest.approx(5 / 50)
    assert missed["mean_iou_without"] == pytest.approx((20 / 29 + 11 / 20 + 1) / 3)


def test_without_all_kinds_nothing_is_wrong():
    rng = np.random.default_rng(0)
    images = [tuple(rng.choice([0, 1, 2, 255], size=(9, 13)).astype(np.uint8) for _ in range(2)) for _ in range(5)]
    found, plain = errors_of(*images), MeanIoU(NAMES)
    for prediction, truth in images:
        plain.add(prediction, truth)
    figures = plain.compute()
    assert found["mean_iou"] == pytest.approx(figures["mean_iou"])
    disjoint = list(found["errors"].values())[:3]
    said_nothing = sum(((p == 255) & (t == 0)).sum() for p, t in images)  # counts as taken for an object
    assert said_nothing and sum(kind["share"] for kind in disjoint) == pytest.approx(1 - figures["pixel_accuracy"])


def noisy(seed, share, count=30):
    """(name, prediction, truth) of images whose predictions are wrong in about that share of the pixels."""
    truths = np.random.default_rng(0).integers(0, 3, size=(count, 6, 6), dtype=np.uint8)
    rng = np.random.default_rng(seed)
    wrong = rng.random(truths.shape) < share * rng.random((count, 1, 1)) * 2
    return [(f"image {n:02}", p, t) for n, (p, t) in enumerate(zip(np.where(wrong, 0, truths), truths, strict=True))]


def counted(images):
    errors = Errors(NAMES)
    for name, prediction, truth in images:
        errors.add(prediction, truth, name)
    return errors.compute()


def test_the_ratio_has_an_interval_over_pairs_of_images():
    weak, full = noisy(1, 0.4), noisy(2, 0.1)
    gap = compare_errors(counted(weak), counted(full[::-1]))  # the images are paired by name
    assert gap["ratio"] == pytest.approx(gap["model"]["mean_iou"] / gap["other"]["mean_iou"])
    rng, ratios = np.random.default_rng(5), []
    for _ in range(400):
        drawn = rng.integers(len(weak), size=len(weak))
        means = []
        for images in (weak, full):
            metric = MeanIoU(NAMES)
            for index in drawn:
                metric.add(*images[index][1:])
            means.append(metric.compute()["mean_iou"])
        ratios.append(means[0] / means[1])
    assert gap["ratio_interval"] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.02)
    same = compare_errors(counted(weak), counted(weak[::-1]))
    assert same["ratio"] == 1 and same["ratio_interval"] == [1, 1] and same["num_images"] == 30
