import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, precision_score, recall_score

from wsss_hf.metrics import mean_iou as script
from wsss_hf.metrics.mean_iou import MeanIoU, bootstrap_interval

NAMES = ["background", "cat", "dog", "fox", "owl"]  # no label map of these tests holds the owl


def random_images(seed, count=7):
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, 2, 3, 255])
    for _ in range(count):
        size = rng.integers(5, 40, size=2)
        truth = rng.choice(labels, size=size, p=[0.4, 0.3, 0.1, 0.1, 0.1])
        prediction = np.where(rng.random(size) < 0.6, truth, rng.choice(labels, size=size))
        yield prediction.astype(np.uint8), truth.astype(np.uint8)


def plain_figures(images, names):
    """The same figures from sets of pixels, class by class."""
    pixels = [
        (image, y, x, int(p), int(t))
        for image, (prediction, truth) in enumerate(images)
        for (y, x), p, t in zip(np.ndindex(truth.shape), prediction.ravel(), truth.ravel(), strict=True)
        if t != 255
    ]
    iou, precision, recall, over, under = {}, {}, {}, [], []
    for label, name in enumerate(names):
        true = {pixel[:3] for pixel in pixels if pixel[4] == label}
        found = {pixel[:3] for pixel in pixels if pixel[3] == label}
        union = len(true | found)
        iou[name] = len(true & found) / union if union else None
        precision[name] = len(true & found) / len(found) if found else None
        recall[name] = len(true & found) / len(true) if true else None
        if label > 0 and union:
            over.append(len(found - true) / union)
            under.append(len(true - found) / union)

    def mean(values):
        return np.mean([value for value in values if value is not None])

    return {
        "mean_iou": mean(iou.values()),
        "iou": iou,
        "absent_classes": [name for name, value in iou.items() if value is None],
        "pixel_accuracy": np.mean([p == t for *_, p, t in pixels]),
        "precision": precision,
        "recall": recall,
        "mean_precision": mean(precision.values()),
        "mean_recall": mean(recall.values()),
        "false_positive_share": mean(over),
        "false_negative_share": mean(under),
        "num_images": len(images),
    }


def flat(figures):
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from ((f"{key} {name}", number) for name, number in value.items())
        else:
            yield key, ", ".join(value) if key == "absent_classes" else value


def assert_same(figures, expected):
    assert dict(flat(figures)) == pytest.approx(dict(flat(expected)), abs=1e-9)


def stream(images, **settings):
    metric = MeanIoU(NAMES, **settings)
    for prediction, truth in images:
        metric.add(prediction=prediction, reference=truth)
    return metric


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_sets_of_pixels(seed):
    images = list(random_images(seed))
    figures = stream(images).compute()
    assert_same(figures, plain_figures(images, NAMES))
    assert figures["iou"]["owl"] is None


def patches(seed, count=5):
    """Masks as segmenters make them: few large patches with voids between; the predictions shifted by a few pixels."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        grid = rng.choice([0, 0, 0, 1, 2, 3], size=(4, 5)).astype(np.uint8)
        truth = np.array(Image.fromarray(grid).resize((61, 47), Image.Resampling.NEAREST))
        prediction = np.roll(truth, rng.integers(-4, 5, size=2), axis=(0, 1))
        truth[np.roll(truth, 1, axis=1) != truth] = 255
        yield prediction, truth


@pytest.mark.parametrize("images", [random_images, patches])
def test_agrees_with_scikit_learn(images):
    images = list(images(11))
    figures = stream(images).compute()
    truth = np.concatenate([truth[truth != 255] for _, truth in images])
    prediction = np.concatenate([prediction[truth != 255] for prediction, truth in images])
    options = {"labels": [0, 1, 2, 3], "average": None}
    for key, score in (("iou", jaccard_score), ("precision", precision_score), ("recall", recall_score)):
        expected = score(truth, prediction, **options)
        assert list(figures[key].values())[:4] == pytest.approx(expected.tolist(), abs=1e-9)
        assert figures[key]["owl"] is None
    assert figures["mean_iou"] == pytest.approx(jaccard_score(truth, prediction, **options).mean(), abs=1e-9)
    assert figures["pixel_accuracy"] == pytest.approx(accuracy_score(truth, prediction), abs=1e-9)
    assert figures["absent_classes"] == ["owl"]


def test_patches_noise_and_single_pixels_of_any_size_are_counted_pixel_by_pixel():
    rng = np.random.default_rng(0)
    metric, pairs = MeanIoU(num_classes=21), np.zeros((21, 22), dtype=np.int64)
    for height, width, patch in ((60, 80, 20), (90, 70, 1), (1, 1, 1), (64, 64, 64), (33, 1, 3)):
        shape = (-(-height // patch), -(-width // patch))
        pair = [rng.choice([*range(21), 255], size=shape).repeat(patch, 0).repeat(patch, 1) for _ in range(2)]
        prediction, truth = (labels[:height, :width].astype(np.uint8) for labels in pair)
        metric.add(prediction, truth)
        known = truth != 255
        np.add.at(pairs, (truth[known], np.minimum(prediction[known], 21)), 1)
    assert np.array_equal(metric.counts, pairs)


def test_one_shot_streaming_and_merged_halves_agree():
    images = list(random_images(4))
    predictions, references = zip(*images, strict=True)
    expected = stream(images).compute()
    assert_same(MeanIoU(NAMES).compute(predictions=predictions, references=references), expected)
    assert_same(stream(images[:3]).merge(stream(images[3:])).compute(), expected)


def test_arrays_tensors_and_palette_pictures_count_alike():
    [(prediction, truth)] = random_images(5, count=1)
    expected = stream([(prediction, truth)]).compute()
    picture = Image.fromarray(truth).convert("P")
    picture.putdata(truth.ravel().tolist())
    assert_same(stream([(torch.from_numpy(prediction).long(), picture)]).compute(), expected)


def test_ignore_in_a_prediction_is_a_miss_and_in_the_truth_is_not_counted():
    figures = stream([(np.array([[1, 255, 2]]), np.array([[1, 1, 255]]))]).compute()
    assert figures["iou"]["cat"] == 0.5
    assert figures["precision"]["cat"] == 1.0
    assert figures["false_negative_share"] == 0.5
    assert figures["iou"]["dog"] is None


def test_compute_forgets_the_images():
    metric = stream(random_images(6))
    metric.compute()
    assert len(metric) == 0
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        metric.compute()


def test_nothing_is_written(tmp_path):
    metric = MeanIoU(NAMES, cache_dir=str(tmp_path / "cache"))
    metric.add(prediction=np.zeros((3, 3), int), reference=np.zeros((3, 3), int))
    metric.compute()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_load_as_scripts_without_network_and_without_the_package(tmp_path):
    program = f"""
import socket, sys
def refuse(*_): raise OSError("no network here")
socket.socket.connect = refuse
import evaluate
def figure(file, key, predictions, references, **settings):
    metric = evaluate.load({str(Path(script.__file__).parent)!r} + file, **settings)
    print(metric.compute(predictions=predictions, references=references)[key])
for file in ("/mean_iou.py",):
    figure(file, "iou", [[[0, 1], [1, 1]]], [[[0, 0], [1, 255]]], class_names=["background", "cat"])
figure("/boundary_f.py", "boundary_f", [[[0, 1], [0, 1]]], [[[0, 1], [0, 1]]], num_classes=2)
figure("/threshold_curve.py", "best", [[[[0.1, 0.7]]]], [[[0, 1]]], num_classes=2)
figure("/average_precision.py", "mean_average_precision", [[0.2], [0.9]], [[0], [1]])
assert not any(name.startswith("wsss_hf") for name in sys.modules)
"""
    environment = {"HF_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    halves = "{'background': 0.5, 'cat': 0.5}"
    assert done.stdout.splitlines() == [halves, "1.0", "(0.1, 1.0)", "1.0"], done.stderr


def test_works_beside_other_metrics_in_combine():
    together = evaluate.combine({"pseudo": MeanIoU(NAMES)}, force_prefix=True)
    figures = together.compute(predictions=[np.ones((2, 2), int)], references=[np.ones((2, 2), int)])
    assert figures["pseudo_mean_iou"] == 1.0


def test_classes_may_come_with_compute():
    figures = MeanIoU().compute(predictions=[[[0, 2]]], references=[[[0, 1]]], num_classes=3)
    assert figures["iou"] == {"0": 1.0, "1": 0.0, "2": 0.0}
    with pytest.raises(ValueError, match="class_names: expected names, got none"):
        MeanIoU().add(prediction=[[0]], reference=[[0]])


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
            r"img_7: prediction: expected labels 0..4 and 255, got \[5\]",
        ),
        (np.full((2, 2), 9), np.full((2, 2), 255), r"img_7: prediction: expected labels 0..4 and 255, got \[9\]"),
        (np.zeros((2, 2), int), np.full((2, 2), 8), r"img_7: reference: expected labels 0..4 and 255, got \[8\]"),
        (np.full((2, 2), -1), np.zeros((2, 2), int), "img_7: prediction: expected labels in 0..255, got -1 to -1"),
        (np.full((2, 2), 256), np.zeros((2, 2), int), "img_7: prediction: expected labels in 0..255, got 256 to 256"),
        (
            np.zeros((2, 2, 3), int),
            np.zeros((2, 2, 3), int),
            r"img_7: prediction: expected integer labels \(H, W\), got int64",
        ),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "img_7: prediction: expected integer labels .* got float64"),
    ],
)
def test_bad_images_are_named_and_not_counted(prediction, reference, message):
    metric = MeanIoU(NAMES)
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference, name="img_7")
    assert len(metric) == 0 and not metric.counts.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_names": ["a", "a"]}, "class_names: expected names that differ"),
        ({"class_names": ["a", "b"], "num_classes": 3}, "class_names: expected 3 names .num_classes., got 2"),
        ({"class_names": ["a", "b"], "ignore_index": 1}, r"ignore_index: expected 2..255"),
        ({"num_classes": 256}, "ignore_index: expected 256..255"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(**settings)


def test_merging_other_classes_and_unequal_batches_fail():
    with pytest.raises(ValueError, match="which are counted already, got"):
        MeanIoU(NAMES).merge(MeanIoU(NAMES[:2]))
    with pytest.raises(ValueError, match="expected as many predictions as references, 1, got 2"):
        MeanIoU(NAMES).add_batch(predictions=[[[0]], [[0]]], references=[[[0]]])


def test_what_one_side_lacks_fails():
    with pytest.raises(ValueError, match="expected both predictions and references"):
        MeanIoU(NAMES).compute(references=[[[0]]])
    with pytest.raises(ValueError, match="merge: expected a MeanIoU with intervals=True"):
        MeanIoU(NAMES, intervals=True).merge(MeanIoU(NAMES))


def test_interval_agrees_with_resampling_image_by_image():
    images = list(random_images(8, count=12))
    low, high = stream(images, intervals=True).compute()["mean_iou_interval"]
    rng = np.random.default_rng(1)
    resampled = [stream([images[i] for i in rng.integers(12, size=12)]).compute()["mean_iou"] for _ in range(300)]
    spread = np.std(resampled)
    assert [low, high] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.5 * spread)
    assert low < stream(images).compute()["mean_iou"] < high


def test_interval_does_not_depend_on_the_order_of_images():
    counts = np.random.default_rng(0).integers(0, 50, size=(20, 3, 4)) * [[[1]], [[2]], [[2]]][0]
    counts[:, 1:] += counts[:, :1]
    assert bootstrap_interval(counts) == bootstrap_interval(counts[::-1])
    assert bootstrap_interval(counts, seed=1) != bootstrap_interval(counts)


def test_two_processes_give_exactly_what_one_gives(in_two_processes):
    def count_half(rank):
        return stream(list(random_images(9))[rank::2], intervals=True).all_reduce().compute()

    assert in_two_processes(count_half) == [stream(random_images(9), intervals=True).compute()] * 2
