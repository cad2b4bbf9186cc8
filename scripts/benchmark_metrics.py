"""The streaming mean IoU of wsss_hf and the released metric, on label maps of PASCAL VOC's size with 21 classes.

The released `mean_iou` of the evaluate library stores every prediction and reference, and takes NumPy histograms of
each image once all are there. That way is written here twice: with the arrays kept in a list, which leaves out the
library's storage and so favours it, and through `evaluate.Metric` itself, which stores them as Arrow lists of lists.
Seconds are those of the processor, so that what else runs on the machine does not count, and the least of three
measurements, because it still disturbs. Images come in batches, as from a model. Peak memory is measured for n
and 4 n images, each in a process of its own, and includes what the imports take.

    python scripts/benchmark_metrics.py
    python scripts/benchmark_metrics.py --masks VOCdevkit/VOC2012/SegmentationClassAug
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import evaluate
import numpy as np
from PIL import Image

from wsss_hf.metrics.mean_iou import MeanIoU

HEIGHT, WIDTH, CLASSES, IGNORE = 375, 500, 21, 255
BATCH = 16


def images(count: int, masks: Path | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs (prediction, truth): those in the folder `masks`, again and again, or drawn ones of VOC's size.

    A drawn truth has three objects at most, with irregular outlines and a band of ignored pixels around them. The
    prediction is the truth without ignored pixels, shifted by some pixels, with one class mistaken for another.
    """
    rng = np.random.default_rng(0)
    files = sorted(masks.glob("*.png")) if masks else []
    if masks and not files:
        sys.exit(f"{masks}: expected the folder SegmentationClassAug of a devkit, found no *.png")
    for number in range(count):
        if files:
            truth = np.array(Image.open(files[number % len(files)]))
            filled = np.where(truth == IGNORE, 0, truth)
        else:
            present = np.append(rng.integers(1, CLASSES, size=3), 0)
            scores = rng.random((4, 4, 5), dtype=np.float32)
            scores[3] += 0.4
            smooth = [np.asarray(Image.fromarray(s).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) for s in scores]
            filled = present[np.argmax(smooth, axis=0)].astype(np.uint8)
            outline = np.zeros(filled.shape, dtype=bool)
            for axis, step in itertools.product((0, 1), (-2, -1, 1, 2)):
                outline |= np.roll(filled, step, axis) != filled
            truth = np.where(outline, IGNORE, filled).astype(np.uint8)
        prediction = np.roll(filled, rng.integers(-6, 7, size=2), axis=(0, 1))
        prediction[prediction == rng.choice(np.unique(filled))] = rng.integers(CLASSES)
        yield prediction, truth


def histograms(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(3, K): intersection, predicted and true pixels of one image, as the released metric counts them."""
    counted = truth != IGNORE
    prediction, truth = prediction[counted], truth[counted]
    areas = (prediction[prediction == truth], prediction, truth)
    return np.stack([np.histogram(area, bins=CLASSES, range=(0, CLASSES - 1))[0] for area in areas])


def mean_iou_of(totals: np.ndarray) -> float:
    hits, predicted, true = totals.astype(np.float64)
    union = predicted + true - hits
    return float(np.mean(hits[union > 0] / union[union > 0]))


class ReleasedWay(evaluate.Metric):
    """Storage, features and histograms of the released metric."""

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.List(datasets.List(datasets.Value("uint16")))
        features = datasets.Features({"predictions": label_map, "references": label_map})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references) -> dict:
        stored = zip(predictions, references, strict=True)
        return {"mean_iou": mean_iou_of(np.sum([histograms(np.array(p), np.array(t)) for p, t in stored], axis=0))}


class StoredHistograms:
    """The released way without the library: arrays in a list."""

    def __init__(self):
        self.stored = []

    def add_batch(self, predictions, references) -> None:
        self.stored += [(p.copy(), r.copy()) for p, r in zip(predictions, references, strict=True)]

    def compute(self) -> dict:
        return {"mean_iou": mean_iou_of(np.sum([histograms(*pair) for pair in self.stored], axis=0))}


def timed(metric, pairs: Iterator) -> tuple[float, float]:
    """Mean IoU and seconds, without those that drawing the images takes; they come in batches, as from a model."""
    seconds = 0.0
    while batch := list(itertools.islice(pairs, BATCH)):
        predictions, truths = zip(*batch, strict=True)
        start = time.process_time()
        metric.add_batch(predictions=predictions, references=truths)
        seconds += time.process_time() - start
    start = time.process_time()
    result = metric.compute()["mean_iou"]
    return result, seconds + time.process_time() - start


WAYS = {
    "wsss_hf": lambda: MeanIoU(num_classes=CLASSES),
    "histograms, stored": StoredHistograms,
    "histograms, evaluate": ReleasedWay,
}


def measure(way: str, count: int, masks: Path | None, times: int = 1) -> tuple[float, ...]:
    """Mean IoU, seconds and peak memory in MB of a process that does this alone; the fastest of `times`."""
    command = [sys.executable, __file__, "--way", way, "--images", str(count)]
    command += ["--masks", str(masks)] if masks else []
    found = []
    for _ in range(times):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found.append(tuple(map(float, done.stdout.split())))
    return min(found, key=lambda figures: figures[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="n; memory is measured for 4 n too")
    parser.add_argument("--masks", type=Path, help="a folder of true masks to take instead of drawn ones")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        result, seconds = timed(WAYS[arguments.way](), images(arguments.images, arguments.masks))
        print(result, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    few, many = arguments.images, 4 * arguments.images
    print(
        f"{WIDTH}x{HEIGHT}, {CLASSES} classes      mean IoU   ms/image  relative     peak MB, {few} and {many} images"
    )
    fastest = None
    for way in WAYS:
        # The library's storage is so slow that four times as many images would add minutes and tell nothing new.
        count = max(1, few // 10) if way == "histograms, evaluate" else few
        result, seconds, memory = measure(way, count, arguments.masks, times=3)
        per_image = 1000 * seconds / count
        fastest = fastest or per_image
        peaks = (
            f"{memory:8.0f} ({count} images)"
            if count < few
            else f"{memory:8.0f} {measure(way, many, arguments.masks)[2]:8.0f}"
        )
        print(f"{way:24} {result:10.6f} {per_image:10.3f} {per_image / fastest:11.1f} {peaks}", flush=True)


if __name__ == "__main__":
    main()
