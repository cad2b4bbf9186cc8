"""Mean IoU and its relatives from a streamed confusion matrix.

The file stands alone, so that it is also a script: `evaluate.load("path/to/mean_iou.py", class_names=[...])`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import datasets
import evaluate
import numpy as np
import torch

DESCRIPTION = """
Mean intersection over union of label maps, and what is read from the same confusion matrix: IoU, precision and recall
per class, pixel accuracy, and the shares of over- and under-activation that papers on weak supervision report. Images
are counted as they come: memory does not grow with their number, and nothing is written to disk.
"""

INPUTS = """
Args:
    predictions: label maps (H, W) of integers 0..K-1, or the ignore index, which is no class: a miss of the true one.
    references: true label maps of the same sizes; pixels with the ignore index are not counted.
Returns:
    mean_iou: mean of `iou` over the classes that occur.
    iou: class name -> IoU, None where the class occurs neither in the truth nor in the predictions.
    pixel_accuracy: share of counted pixels whose label is right.
    precision, recall: class name -> share; None where nothing was predicted, or nothing was there to find.
    mean_precision, mean_recall: means of these over the classes that have one.
    false_positive_share, false_negative_share: FP / union (over-activation) and FN / union (under-activation), mean
        over the object classes that occur (label 0, the background, is left out); IoU + both = 1 for every class.
    num_images: number of images counted.
    mean_iou_interval: (low, high), the bootstrap 95 % interval over images; only with `intervals=True`.
"""


def iou_from_counts(hits: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """IoU per class from right, true and predicted pixel counts of shape (..., K); NaN where a class is absent."""
    return _ratio(hits, truth + predicted - hits)


def mean_over_present(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the values that are not NaN; NaN where there is none."""
    return _ratio(np.nansum(values, axis=-1), np.sum(~np.isnan(values), axis=-1))


def bootstrap_interval(
    counts: np.ndarray, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of the mean IoU, images drawn with replacement.

    Args:
        counts: (N, 3, K) integers, per image the right, true and predicted pixels of each class.
        level: share of the resampled mean IoUs inside the interval.
        resamples: number of resampled data sets.
        seed: seed of the draws; the order of the images does not matter.
    """
    images, _, classes = counts.shape
    rows = counts.reshape(images, -1).astype(np.float64)
    rows = rows[np.lexsort(rows.T)]
    rng = np.random.default_rng(seed)
    sums = np.stack(
        [np.bincount(rng.integers(images, size=images), minlength=images) @ rows for _ in range(resamples)]
    )
    means = mean_over_present(iou_from_counts(*sums.reshape(resamples, 3, classes).swapaxes(0, 1)))
    if np.isnan(means).all():
        return None, None
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """The sum of int64 `counts` over all processes of torch.distributed (`counts` itself where there is only one)."""
    if not _distributed():
        return counts
    total = torch.tensor(counts, device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(total)
    return total.cpu().numpy()


class MeanIoU(evaluate.Metric):
    """Streams a (K, K + 1) confusion matrix: rows are true classes, columns predicted ones, the last column "no class"
    (a pseudo mask may say ignore; for the true class of that pixel it is a miss).

    Args:
        class_names: names of the labels 0..K-1, background first. May also be given to `compute`.
        num_classes: K, instead of `class_names`; the classes are then named "0", "1", ...
        ignore_index: label of pixels that have no class, K..255.
        intervals: keep 3 K integers per image for `mean_iou_interval`.
        kwargs: what `evaluate.load` passes to every metric.
    """

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore_index: int = 255,
        intervals: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.intervals = intervals
        self.class_names: list[str] | None = None
        self._name_classes(class_names, num_classes)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # the base class would create a cache folder; nothing is cached here

    def __len__(self) -> int:
        return 0 if self.class_names is None else self.num_images

    def _name_classes(self, class_names: Sequence[str] | None, num_classes: int | None) -> None:
        if class_names is None and num_classes is None:
            return
        names = [str(index) for index in range(num_classes)] if class_names is None else list(class_names)
        if num_classes not in (None, len(names)):
            raise ValueError(f"num_classes is {num_classes}, but class_names has {len(names)} names")
        if len(set(names)) < len(names):
            raise ValueError(f"class_names must differ from each other, got {names}")
        if not 0 < len(names) <= self.ignore_index <= 255:
            raise ValueError(
                f"ignore_index must lie in {len(names)}..255 for {len(names)} classes, got {self.ignore_index}"
            )
        if self.class_names not in (None, names):
            raise ValueError(f"the metric already counts the classes {self.class_names}, not {names}")
        if self.class_names is None:
            self.class_names = names
            self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        classes = len(self.class_names)
        self.matrix = np.zeros((classes, classes + 1), dtype=np.int64)
        self.num_images = 0
        self.image_counts: list[np.ndarray] = []

    def add(self, *, prediction=None, reference=None, name: str | None = None) -> None:
        """Counts one image: two (H, W) integer label maps (arrays, tensors or single-channel pictures).

        Raises:
            ValueError: sizes differ, or a label is neither a class nor the ignore index; `name` is named.
        """
        if self.class_names is None:
            raise ValueError("name the classes first, e.g. evaluate.load(path, class_names=[...])")
        who = f"{name}: " if name else ""
        prediction, reference = _label_map(prediction, f"{who}prediction"), _label_map(reference, f"{who}reference")
        if prediction.shape != reference.shape:
            sizes = [f"{width}x{height}" for height, width in (prediction.shape, reference.shape)]
            raise ValueError(f"{who}the prediction is {sizes[0]} pixels and the reference {sizes[1]}")
        # One pass over the pixels: count all 256 x 256 pairs of bytes, look at the few that may occur afterwards.
        codes = reference.astype(np.uint16) << 8 | prediction
        pairs = np.bincount(codes.ravel(), minlength=1 << 16).reshape(256, 256)
        labels = [*range(len(self.class_names)), self.ignore_index]
        counted = pairs[np.ix_(labels, labels)]
        if counted.sum() != reference.size:
            for what, seen in (("prediction", pairs.any(0)), ("reference", pairs.any(1))):
                if bad := sorted(set(np.flatnonzero(seen).tolist()) - set(labels)):
                    raise ValueError(f"{who}{what} holds the labels {bad}; right are 0..{labels[-2]} and {labels[-1]}")
        matrix = counted[:-1]
        self.matrix += matrix
        self.num_images += 1
        if self.intervals:
            self.image_counts.append(np.stack(_hits_truth_predicted(matrix)).astype(np.int32))

    def add_batch(self, *, predictions=None, references=None, names: Iterable[str] | None = None) -> None:
        """Counts several images, whose sizes may differ; `names` are used in error messages."""
        if predictions is None or references is None:
            raise ValueError("both predictions and references are needed")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions, but {len(references)} references")
        names = names or [None] * len(references)
        for prediction, reference, name in zip(predictions, references, names, strict=True):
            self.add(prediction=prediction, reference=reference, name=name)

    def merge(self, other: MeanIoU) -> MeanIoU:
        """Adds the images that `other` counted; returns itself."""
        if self.intervals != other.intervals:
            raise ValueError("only metrics that agree on intervals=True can be merged")
        self._name_classes(other.class_names, None)
        self.matrix += other.matrix
        self.num_images += other.num_images
        self.image_counts += other.image_counts
        return self

    def all_reduce(self) -> MeanIoU:
        """Adds up the images of all processes in each of them; call once, after the last image. Returns itself."""
        total = sum_over_processes(np.append(self.matrix, self.num_images))
        if self.intervals and _distributed():
            per_process = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(per_process, self.image_counts)
            self.image_counts = [counts for part in per_process for counts in part]
        self.matrix, self.num_images = total[:-1].reshape(self.matrix.shape), int(total[-1])
        return self

    def compute(
        self,
        *,
        predictions=None,
        references=None,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
    ) -> dict:
        """The figures over all images added (and `predictions` and `references`, if given); then forgets them."""
        self._name_classes(class_names, num_classes)
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if len(self) == 0:
            raise ValueError("no image to evaluate: add at least one prediction with its reference")
        figures = figures_from_confusion(self.matrix, self.class_names) | {"num_images": self.num_images}
        if self.intervals:
            interval = bootstrap_interval(np.stack(self.image_counts))
            figures = {"mean_iou": figures["mean_iou"], "mean_iou_interval": interval} | figures
        self.reset()
        return figures


def figures_from_confusion(matrix: np.ndarray, class_names: Sequence[str]) -> dict:
    """All figures of [`MeanIoU`] but the counts of images, from its (K, K + 1) confusion matrix."""
    hits, truth, predicted = _hits_truth_predicted(matrix)
    union = truth + predicted - hits
    iou, precision, recall = iou_from_counts(hits, truth, predicted), _ratio(hits, predicted), _ratio(hits, truth)

    def by_name(values: np.ndarray) -> dict[str, float | None]:
        return {name: _number(value) for name, value in zip(class_names, values, strict=True)}

    return {
        "mean_iou": _number(mean_over_present(iou)),
        "iou": by_name(iou),
        "pixel_accuracy": _number(_ratio(hits.sum(), truth.sum())),
        "precision": by_name(precision),
        "recall": by_name(recall),
        "mean_precision": _number(mean_over_present(precision)),
        "mean_recall": _number(mean_over_present(recall)),
        "false_positive_share": _number(mean_over_present(_ratio(predicted - hits, union)[1:])),
        "false_negative_share": _number(mean_over_present(_ratio(truth - hits, union)[1:])),
    }


def _hits_truth_predicted(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.diagonal(matrix), matrix.sum(axis=1), matrix[:, :-1].sum(axis=0)


def _ratio(part, whole) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    whole = np.asarray(whole)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _number(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


def _label_map(labels, what: str) -> np.ndarray:
    """`labels` as (H, W) uint8."""
    labels = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what} must be (H, W) integer labels, got {labels.dtype} of shape {labels.shape}")
    if labels.dtype != np.uint8:
        if labels.size and not (labels.min() >= 0 and labels.max() <= 255):
            raise ValueError(f"{what} holds labels from {labels.min()} to {labels.max()}; labels lie in 0..255")
        labels = labels.astype(np.uint8)
    return labels
