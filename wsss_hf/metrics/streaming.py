"""Base class of the metrics of label maps: images are counted as they come, and nothing is written to disk.

A metric's file with this one beside it is a script for `evaluate.load`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import datasets
import evaluate
import numpy as np
import torch

FEATURES = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})


class StreamingMetric(evaluate.Metric, ABC):
    """An `evaluate.Metric` whose state is one integer array, added up over images and processes.

    Its memory does not grow with the number of images, and several processes give exactly what one gives.

    Args:
        class_names: names of the labels 0..K-1, background first. May also be given to `compute`.
        num_classes: K, instead of `class_names`; the classes are then named "0", "1", ...
        ignore_index: label of pixels that have no class, K..255.
        kwargs: what `evaluate.load` passes to every metric.
    """

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore_index: int = 255,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.class_names: list[str] | None = None
        self._name_classes(class_names, num_classes)

    @abstractmethod
    def _no_counts(self) -> np.ndarray:
        """The int64 array for no image: zeros."""

    @abstractmethod
    def _count(self, prediction, reference, who: str) -> np.ndarray:
        """The array for one image; `who` begins the messages about it."""

    @abstractmethod
    def _figures(self) -> dict:
        """The figures computed from the array."""

    @property
    def names(self) -> list[str]:
        """The class names.

        Raises:
            ValueError: they are not known yet.
        """
        if self.class_names is None:
            raise ValueError("class_names: expected names, got none; e.g. evaluate.load(path, class_names=[...])")
        return self.class_names

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # the base class would create a cache folder; nothing is cached here

    def __len__(self) -> int:
        return 0 if self.class_names is None else self.num_images

    def _name_classes(self, class_names: Sequence[str] | None, num_classes: int | None) -> None:
        if class_names is None and num_classes is None:
            return
        names = [str(index) for index in range(num_classes or 0)] if class_names is None else list(class_names)
        if num_classes is not None and num_classes != len(names):
            raise ValueError(f"class_names: expected {num_classes} names (num_classes), got {len(names)}")
        if len(set(names)) < len(names):
            raise ValueError(f"class_names: expected names that differ, got {names}")
        if not 0 < len(names) <= self.ignore_index <= 255:
            raise ValueError(
                f"ignore_index: expected {len(names)}..255 for {len(names)} classes, got {self.ignore_index}"
            )
        if self.class_names is not None and self.class_names != names:
            raise ValueError(f"class_names: expected {self.class_names}, which are counted already, got {names}")
        if self.class_names is None:
            self.class_names = names
            self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self.counts = self._no_counts()
        self.num_images = 0

    def add(self, prediction=None, reference=None, name: str | None = None) -> None:
        """Counts one image; `name` is used in error messages.

        Raises:
            ValueError: the two do not fit each other or the classes.
        """
        _ = self.names  # raises where there are none yet
        self.counts += self._count(prediction, reference, f"{name}: " if name else "")
        self.num_images += 1

    def add_batch(self, *, predictions=None, references=None, names: Iterable[str] | None = None) -> None:
        """Counts several images, whose sizes may differ; `names` are used in error messages."""
        if predictions is None or references is None:
            raise ValueError("add_batch: expected both predictions and references, got one of them")
        if len(predictions) != len(references):
            raise ValueError(
                f"add_batch: expected as many predictions as references, {len(references)}, got {len(predictions)}"
            )
        labels: Iterable[str | None] = names or [None] * len(references)
        for prediction, reference, name in zip(predictions, references, labels, strict=True):
            self.add(prediction=prediction, reference=reference, name=name)

    def merge(self, other: StreamingMetric) -> StreamingMetric:
        """Adds the images that `other` counted; returns itself."""
        self._name_classes(other.class_names, None)
        self.counts += other.counts
        self.num_images += other.num_images
        return self

    def all_reduce(self) -> StreamingMetric:
        """Adds up the images of all processes in each of them; call once, after the last image. Returns itself."""
        total = sum_over_processes(np.append(self.counts, self.num_images))
        self.counts, self.num_images = total[:-1].reshape(self.counts.shape), int(total[-1])
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
            raise ValueError("compute: expected at least one image, got none; add a prediction with its reference")
        figures = self._figures() | {"num_images": self.num_images}
        self.reset()
        return figures

    def _by_name(self, values: np.ndarray) -> dict[str, float | None]:
        return {name: number(value) for name, value in zip(self.names, values, strict=True)}

    def _check_labels(self, seen: np.ndarray, what: str) -> None:
        """Refuses labels, `seen` (256,) bool, that are neither a class nor the ignore index."""
        last = len(self.names) - 1
        if bad := sorted(set(np.flatnonzero(seen).tolist()) - {*range(last + 1), self.ignore_index}):
            raise ValueError(f"{what}: expected labels 0..{last} and {self.ignore_index}, got {bad}")


def label_maps(prediction, reference, who: str) -> tuple[np.ndarray, np.ndarray]:
    """Two label maps (arrays, tensors or single-channel pictures) as (H, W) uint8 of one size.

    Raises:
        ValueError: one is no label map, or their sizes differ; begins with `who`.
    """
    prediction, reference = label_map(prediction, f"{who}prediction"), label_map(reference, f"{who}reference")
    if prediction.shape != reference.shape:
        sizes = [f"{width}x{height}" for height, width in (prediction.shape, reference.shape)]
        raise ValueError(f"{who}prediction: expected the size of the reference, {sizes[1]}, got {sizes[0]}")
    return prediction, reference


def label_map(labels, what: str) -> np.ndarray:
    """`labels` as (H, W) uint8."""
    labels = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what}: expected integer labels (H, W), got {labels.dtype} of shape {labels.shape}")
    if labels.dtype != np.uint8:
        if labels.size and not (labels.min() >= 0 and labels.max() <= 255):
            raise ValueError(f"{what}: expected labels in 0..255, got {labels.min()} to {labels.max()}")
        labels = labels.astype(np.uint8)
    return labels


def sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """The sum of int64 `counts` over all processes of torch.distributed (`counts` itself where there is only one)."""
    if not distributed():
        return counts
    total = torch.tensor(counts, device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(total)
    return total.cpu().numpy()


def distributed() -> bool:
    """Whether there are other processes to add up with."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def ratio(part, whole) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    whole = np.asarray(whole)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def mean_over_present(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the values that are not NaN; NaN where there is none."""
    return ratio(np.nansum(values, axis=-1), np.sum(~np.isnan(values), axis=-1))


def number(value: np.ndarray) -> float | None:
    """A float, None for NaN."""
    return None if np.isnan(value) else float(value)
