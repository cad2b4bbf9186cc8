"""Holding pseudo masks, maps and segmenters against true masks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image

from ..data.export import file_stem
from ..data.palette import check_palette
from ..data.tagged import DataError, class_names, decode_mask, has_value, tags_to_multi_hot, undecoded
from ..inference.segment_images import segment_images
from ..metrics.average_precision import mean_average_precision
from ..metrics.boundary_f import BoundaryF
from ..metrics.mean_iou import MeanIoU
from ..metrics.threshold_curve import ThresholdCurve
from ..progress import Progress
from ..pseudo_labels.label_images import label_images


class Figures:
    """All figures of label maps against true ones: those of [`MeanIoU`] with its interval, and of [`BoundaryF`]."""

    def __init__(self, names: list[str]):
        self.names = names
        self.metrics = (MeanIoU(names, intervals=True), BoundaryF(names))

    def add(self, prediction: np.ndarray, reference: np.ndarray, name: str) -> None:
        """Counts one image, `name` in error messages."""
        for metric in self.metrics:
            metric.add(prediction, reference, name)

    def compute(self) -> dict:
        """The figures over the images of all processes."""
        figures: dict = {}
        for metric in self.metrics:
            figures |= metric.all_reduce().compute()
        return figures


def rows_with(rows: Dataset, column: str) -> Dataset:
    """The rows whose image column `column` is filled.

    Raises:
        DataError: there is none.
    """
    found = np.flatnonzero(has_value(rows, column)) if column in rows.column_names else []
    if not len(found):
        raise DataError(f"no row has a {column}: there is nothing to evaluate on")
    return rows.select(found)


def evaluate_masks(rows: Dataset, column: str = "pseudo_mask", quiet: bool = False) -> dict:
    """Figures of the masks in `column` against the true ones, over the rows that have both; see [`Figures`]."""
    rows = rows_with(rows_with(rows, "mask"), column)
    metric = Figures(["background", *class_names(rows)])
    mine = _share(rows)
    with _progress("evaluating masks", mine, quiet) as progress:
        for row in undecoded(mine.select_columns(["image_id", "mask", column])):
            prediction = decode_mask(row[column], f"row {row['image_id']!r}, column {column}")
            metric.add(prediction=prediction, reference=_truth(row), name=f"row {row['image_id']!r}")
            progress.advance(1)
    return metric.compute()


def evaluate_cam(model, processor: Callable, rows: Dataset, settings: dict, quiet: bool = False) -> dict:
    """Figures of the pseudo masks that a CAM classifier makes of `rows`, and of its maps and tags.

    Args:
        settings: a recipe's `masks` section.

    Returns:
        the figures of [`Figures`] at the fixed background threshold; `threshold_curve` and `best_threshold`, which
        read true masks and are for analysis only; `mean_average_precision` of the tags.

    Raises:
        DataError: no row has a mask, or the classifier has other classes than the data.
    """
    rows = rows_with(rows, "mask")
    names = class_names(rows)
    check_names(model, names, "classifier")
    metric = Figures(["background", *names])
    curve = ThresholdCurve(["background", *names])
    mine = _share(rows)
    truths = undecoded(mine.select_columns(["image_id", "mask", "tags"]))
    scores, tags = [], []
    with _progress("evaluating maps", mine, quiet) as progress:
        for labelled in label_images(model, processor, mine, settings):
            row = truths[labelled.index]
            name, truth = f"row {row['image_id']!r}", _truth(row)
            metric.add(prediction=labelled.pseudo_mask, reference=truth, name=name)
            maps = np.zeros((len(names), *truth.shape), dtype=np.float32)
            maps[labelled.classes] = labelled.maps
            curve.add(maps, truth, name=name)
            scores.append(labelled.logits)
            tags.append(tags_to_multi_hot(row["tags"], len(names)).numpy())
            progress.advance(1)
    points = curve.all_reduce().compute()
    scores, tags = gather_object(scores), gather_object(tags)
    return metric.compute() | {
        "threshold_curve": points["curve"],
        "best_threshold": points["best"],
        "mean_average_precision": mean_average_precision(np.stack(scores), np.stack(tags))["mean_average_precision"],
    }


def evaluate_segmenter(
    model, processor: Callable, rows: Dataset, settings: dict, quiet: bool = False, metric: type = Figures
) -> dict:
    """Figures of a segmenter on the rows of `rows` that have a mask, at the images' own size.

    Args:
        model: any model with `logits` (B, C+1, h, w), in eval mode, on the device to work on.
        processor: its image processor.
        settings: a recipe's `evaluation` section.
        metric: what counts, [`Figures`] or [`Errors`].

    Raises:
        DataError: no row has a mask, or the model has other classes than the data.
    """
    rows = rows_with(rows, "mask")
    metric = metric(check_classes(model, rows))
    mine = _share(rows)
    truths = undecoded(mine.select_columns(["image_id", "mask"]))
    with _progress("evaluating segmenter", mine, quiet) as progress:
        for segmented in segment_images(model, processor, mine, settings):
            metric.add(segmented.labels, _truth(truths[segmented.index]), f"row {segmented.image_id!r}")
            progress.advance(1)
    return metric.compute()


def evaluate_files(folder: str | os.PathLike, rows: Dataset, quiet: bool = False) -> dict:
    """Figures of the PNGs in `folder` on the rows that have a mask; see [`Figures`].

    Args:
        folder: label maps `<image_id>.png` of the images' sizes, an image_id without the suffix of an image file:
            8-bit palette or grey PNGs whose pixel values are the labels. Other files are not looked at.

    Raises:
        DataError: no row has a mask, a file is missing, holds no labels, or its palette says that they were
            renumbered; names it.
        ValueError: a file has another size or other labels than the truth; names it.
    """
    rows = rows_with(rows, "mask")
    folder = Path(folder)
    files = {image_id: folder / f"{file_stem(image_id)}.png" for image_id in rows["image_id"]}
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(files)} predictions are missing, the first is {missing[0]}")
    metric = Figures(["background", *class_names(rows)])
    mine = _share(rows)
    with _progress("evaluating files", mine, quiet) as progress:
        for row in undecoded(mine.select_columns(["image_id", "mask"])):
            file = files[row["image_id"]]
            prediction = decode_mask({"path": str(file)}, str(file))
            with Image.open(file) as picture:
                check_palette(picture, len(metric.names), str(file))
            metric.add(prediction, _truth(row), str(file))
            progress.advance(1)
    return metric.compute()


def check_classes(model, rows: Dataset) -> list[str]:
    """The names of the labels, background first, which a segmenter and the data must have in common.

    Raises:
        DataError: they have not.
    """
    names = ["background", *class_names(rows)]
    check_names(model, names, "segmenter")
    return names


def check_names(model, names: list[str], what: str) -> None:
    """That the classes of a model, `what` it is, are `names`.

    Raises:
        DataError: they are others.
    """
    known = [model.config.id2label[i] for i in sorted(model.config.id2label)]
    if known != names:
        raise DataError(f"the {what} knows {', '.join(known)}; the data have {', '.join(names)}")


def _truth(row: dict) -> np.ndarray:
    return decode_mask(row["mask"], f"row {row['image_id']!r}, column mask")


def _share(rows: Dataset) -> Dataset:
    """This process's part of the rows."""
    state = PartialState()
    return rows.select(range(state.process_index, len(rows), state.num_processes))


def _progress(title: str, rows: Dataset, quiet: bool) -> Progress:
    return Progress(title, len(rows), quiet or not PartialState().is_main_process, unit="image")
