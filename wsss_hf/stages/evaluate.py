"""Figures of pseudo masks, CAM classifiers, segmenters and files of label maps against true masks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, IterableDataset

from ..data.export import file_stem
from ..data.palette import check_palette
from ..data.saliency import check_saliency
from ..data.streams import WINDOW, sample_of, windows
from ..data.tagged import (
    DataError,
    check_classes,
    check_names,
    class_names,
    decode_mask,
    has_value,
    open_image,
    source_of,
    tags_to_multi_hot,
    undecoded,
)
from ..inference.load import load_labeler, load_segmenter
from ..inference.segmenter import segment_images
from ..metrics.average_precision import mean_average_precision
from ..metrics.errors import Errors, compare_errors
from ..metrics.figures import Figures
from ..metrics.streaming import sum_over_processes
from ..metrics.threshold_curve import ThresholdCurve
from ..progress import Progress
from ..pseudo_labels.affinity_labels import with_affinity
from ..pseudo_labels.label_images import label_images
from ..pseudo_labels.rules import columns_to_read
from ..pseudo_labels.threshold import thresholds_of, with_threshold
from ..recipes import Recipe, check_splits
from ..settings import EvaluationSettings, MasksSettings, RecipeError
from .predict_masks import predict_masks


@dataclass
class Evaluation:
    """What [`evaluate`] measured.

    Attributes:
        results: one row per thing that was measured: `result`, `split` and figures, see [`Figures`].
        gap: of `segmenter` to `against`, see [`compare_errors`]; None without.
        data: what the data are.
    """

    results: list[dict[str, Any]]
    gap: dict[str, Any] | None
    data: dict[str, Any]


def evaluate(
    data: DatasetDict,
    recipe: Recipe | None = None,
    *,
    cam: str | os.PathLike | None = None,
    affinity: str | os.PathLike | None = None,
    segmenter: str | os.PathLike | None = None,
    against: str | os.PathLike | None = None,
    masks: str | os.PathLike | None = None,
    split: str = "val",
    save_masks: str | os.PathLike | None = None,
    voc_archive: str | os.PathLike | None = None,
    export_coco: str | os.PathLike | None = None,
) -> Evaluation:
    """Figures of models and masks against the true masks of `data`; without any, of the pseudo masks in `data`.

    Args:
        data: also as a stream, see [`load_stream`]; thresholds that the recipe leaves open are then found on
            [`sample_of`] it.
        recipe: its `masks` section says how a CAM classifier makes masks, its `evaluation` section is the test
            protocol of segmenters; None takes the default recipe.
        cam: a CAM classifier, a directory or Hub id; its masks are measured on split "train".
        affinity: an affinity network for the walks of `masks.refine` and `evaluation.refine`, as of [`make_masks`].
        segmenter: a segmenter, measured on `split`.
        against: a second segmenter: instead of figures, the gap between both by kind of error.
        masks: a folder of label maps IMAGE_ID.png, measured on `split`.
        split: "train" or "val".
        save_masks: folder: also write the segmenter's label maps, see [`predict_masks`].
        voc_archive, export_coco: files of these label maps, see [`predict_masks`].

    Raises:
        DataError: there are no true masks to measure on, or the classes of a model differ.
        RecipeError: options that do not go together.
    """
    recipe = recipe or Recipe()
    check_splits(data)
    protocol = with_affinity(recipe.evaluation, affinity)
    exports = {"voc_archive": voc_archive, "coco": export_coco}
    writes = save_masks is not None or any(exports.values())
    if writes and (segmenter is None or save_masks is None):
        raise RecipeError("--voc-archive, --export-coco: expected --model and --save-masks beside them")
    if against is not None and (segmenter is None or writes):
        raise RecipeError("--against: expected --model beside it, and no files to write but --json")
    if segmenter is not None and (cam is not None or against is not None):
        needs_masks(data, split)
        for name in (segmenter, against):  # before the first is measured
            if name is not None:
                check_classes(load_segmenter(os.fspath(name), "cpu")[0], data[split])
    rows: list[dict[str, Any]] = []
    gap = None
    if cam is not None:
        needs_masks(data, "train")
        rows.append(maps_row(f"masks of {cam}", cam, data, with_affinity(recipe.masks, affinity)))
    if segmenter is not None and save_masks is not None:
        if split not in data:
            raise RecipeError(f"--split: expected {' or '.join(data)}, got {split}")
        predict_masks(segmenter, data[split], protocol, save_masks, **exports)
        if has_masks(data, split):
            row = {"result": f"segmenter {segmenter}", "split": split, "of": Path(segmenter).name}
            rows.append(row | evaluate_files(save_masks, data[split]))
    elif segmenter is not None:
        needs_masks(data, split)
        if against is not None:
            gap = segmenter_gap(segmenter, against, data[split], protocol)
        else:
            rows.append(segmenter_row(f"segmenter {segmenter}", segmenter, data, protocol, split))
    if masks is not None:
        needs_masks(data, split)
        row = {"result": f"files in {masks}", "split": split, "of": Path(masks).name}
        rows.append(row | evaluate_files(masks, data[split]))
    if cam is None and segmenter is None and masks is None:
        needs_masks(data, "train")
        rows.append(masks_row(f"pseudo masks of {source_of(data).get('source', 'the data')}", data))
    return Evaluation(rows, gap, source_of(data))


# Rows of a table of results


def masks_row(name: str, labelled: DatasetDict, folder: str = "masks") -> dict[str, Any]:
    """Row of the pseudo masks in split "train"; without figures where no row has a true mask."""
    row = {"result": name, "split": "train", "of": folder}
    return row | evaluate_masks(labelled["train"]) if has_masks(labelled, "train") else row


def maps_row(name: str, cam: str | os.PathLike, data: DatasetDict, settings: MasksSettings) -> dict[str, Any]:
    """Row of the pseudo masks that a CAM classifier, a directory or Hub id, makes of split "train"."""
    row = {"result": name, "split": "train", "of": Path(cam).name}
    if not has_masks(data, "train"):
        return row
    model, processor = load_labeler(os.fspath(cam), PartialState().device, optimize=settings.optimize)
    rows = data["train"]
    check_names(model, class_names(rows), "classifier")
    known = sample_of(rows) if isinstance(rows, IterableDataset) else rows
    settings = with_threshold(model, processor, known, settings)
    figures = evaluate_cam(model, processor, rows, settings)
    return row | figures | thresholds_of(settings)


def segmenter_row(
    name: str, segmenter: str | os.PathLike, data: DatasetDict, settings: EvaluationSettings, split: str = "val"
) -> dict[str, Any]:
    """Row of a segmenter, a directory or Hub id, on a split; without figures where it has no true mask."""
    row = {"result": name, "split": split, "of": Path(segmenter).name}
    if not has_masks(data, split):
        return row
    model, processor = load_segmenter(os.fspath(segmenter), PartialState().device)
    return row | evaluate_segmenter(model, processor, data[split], settings)


def segmenter_gap(
    segmenter: str | os.PathLike,
    other: str | os.PathLike,
    rows: Dataset | IterableDataset,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """The gap between two segmenters, directories or Hub ids, on rows with true masks; see [`compare_errors`]."""
    device = PartialState().device
    figures = [
        evaluate_segmenter(*load_segmenter(os.fspath(name), device), rows, settings, Errors)
        for name in (segmenter, other)
    ]
    return compare_errors(*figures)


def has_masks(data: DatasetDict, split: str) -> bool:
    """Whether a split has true masks to evaluate on; of a stream, whether it has a column for them."""
    rows: Dataset | IterableDataset | None = data.get(split)
    if rows is None or "mask" not in rows.features:
        return False
    return isinstance(rows, IterableDataset) or bool(has_value(rows, "mask").any())


def needs_masks(data: DatasetDict, split: str) -> None:
    """What `has_masks` asks, as a condition.

    Raises:
        DataError: the split is not there, or none of its rows has a mask.
    """
    if split not in data:
        raise DataError(f"split {split!r}: expected one of {', '.join(data)}")
    if not has_masks(data, split):
        raise DataError(f"split {split!r}: expected true masks to evaluate on, and no row has one")


VERSION = 4
_NO_MASKS = "column {!r}: expected masks to evaluate on, and no row has one"

# Figures


def rows_with(rows: Dataset, column: str) -> Dataset:
    """The rows whose image column `column` is filled.

    Raises:
        DataError: there is none.
    """
    found: Sequence[int] | np.ndarray = np.flatnonzero(has_value(rows, column)) if column in rows.column_names else []
    if not len(found):
        raise DataError(_NO_MASKS.format(column))
    return rows.select(found)


def _share(rows: Dataset | IterableDataset, *columns: str) -> tuple[Iterable[Dataset], int | None]:
    """This process's share of the rows whose image columns `columns` are filled, in parts, and how many these are: a
    data set is one part; a stream comes in windows, and nobody knows how many.

    Raises:
        DataError: no process has any row; of a stream that is known at its end.
    """
    if isinstance(rows, IterableDataset):
        return _filled_windows(rows, columns), None
    for column in columns:
        rows = rows_with(rows, column)
    state = PartialState()
    mine = range(state.process_index, len(rows), state.num_processes)
    return [rows.select(mine)] if mine else [], len(mine)


def _filled_windows(rows: IterableDataset, columns: Sequence[str]) -> Iterator[Dataset]:
    count = np.zeros(1, dtype=np.int64)
    for _, window in windows(rows, WINDOW):
        for column in columns:
            window = window.select(np.flatnonzero(has_value(window, column)) if column in window.features else [])
        if len(window):
            count += len(window)
            yield window
    if not sum_over_processes(count).any():
        raise DataError(_NO_MASKS.format(columns[-1]))


def evaluate_masks(rows: Dataset | IterableDataset, column: str = "pseudo_mask") -> dict[str, Any]:
    """Figures of the masks in `column` against the true ones, over the rows that have both; see [`Figures`]."""
    parts, count = _share(rows, "mask", column)
    metric = Figures(["background", *class_names(rows)])
    with Progress("evaluating masks", count, unit="image") as progress:
        for part in parts:
            for row in undecoded(part.select_columns(["image_id", "mask", column])):
                prediction = decode_mask(row[column], f"row {row['image_id']!r}, column {column}")
                metric.add(prediction=prediction, reference=_truth(row), name=f"row {row['image_id']!r}")
                progress.advance(1)
    return metric.compute()


def evaluate_cam(
    model, processor: Callable, rows: Dataset | IterableDataset, settings: MasksSettings
) -> dict[str, Any]:
    """Figures of the pseudo masks that a CAM classifier makes of `rows`, and of its maps and tags.

    Returns:
        the figures of [`Figures`] at the background threshold of `settings`; `threshold_curve` and `best_threshold`,
        the oracle threshold, which read true masks and are for analysis only; `mean_average_precision` of the tags.

    Raises:
        DataError: no row has a mask, or the classifier has other classes than the data.
    """
    parts, count = _share(rows, "mask")
    names = class_names(rows)
    check_names(model, names, "classifier")
    known = sample_of(rows) if isinstance(rows, IterableDataset) else rows_with(rows, "mask")
    columns = columns_to_read(settings, known)
    metric = Figures(["background", *names])
    curve = ThresholdCurve(["background", *names])
    all_scores: list[np.ndarray] = []  # an array for each part: one for each row takes a kilobyte
    all_tags: list[np.ndarray] = []
    with Progress("evaluating maps", count, unit="image") as progress:
        for part in parts:
            truths, part = undecoded(part.select_columns(["image_id", "mask", "tags"])), part.select_columns(columns)
            if "saliency" in columns:
                check_saliency(part, f"masks.seeds: {settings.seeds}")  # that of a stream is not known before
            scores, tags = np.empty((2, len(part), len(names)), dtype=np.float32)
            for labelled in label_images(model, processor, part, settings):
                row = truths[labelled.index]
                name, truth = f"row {row['image_id']!r}", _truth(row)
                metric.add(prediction=labelled.pseudo_mask, reference=truth, name=name)
                maps = np.zeros((len(names), *truth.shape), dtype=np.float32)
                maps[labelled.classes] = labelled.maps
                curve.add(maps, truth, name=name)
                scores[labelled.index] = labelled.logits
                tags[labelled.index] = tags_to_multi_hot(row["tags"], len(names)).numpy()
                progress.advance(1)
            all_scores.append(scores)
            all_tags.append(tags)
    points = curve.all_reduce().compute()
    scores, tags = np.concatenate(gather_object(all_scores)), np.concatenate(gather_object(all_tags))
    return metric.compute() | {
        "threshold_curve": points["curve"],
        "best_threshold": points["best"],
        "mean_average_precision": mean_average_precision(scores, tags)["mean_average_precision"],
    }


def evaluate_segmenter(
    model,
    processor: Callable,
    rows: Dataset | IterableDataset,
    settings: EvaluationSettings,
    metric: type = Figures,
) -> dict[str, Any]:
    """Figures of a segmenter on the rows that have a mask, at the images' own size.

    Args:
        model: any model with `logits` (B, C+1, h, w), in eval mode, on the device to work on.
        processor: its image processor.
        settings: the test protocol.
        metric: what counts, [`Figures`] or [`Errors`].

    Raises:
        DataError: no row has a mask, or the model has other classes than the data.
    """
    parts, count = _share(rows, "mask")
    counts = metric(check_classes(model, rows))
    with Progress("evaluating segmenter", count, unit="image") as progress:
        for part in parts:
            truths = undecoded(part.select_columns(["image_id", "mask"]))
            for segmented in segment_images(model, processor, part, settings):
                counts.add(segmented.labels, _truth(truths[segmented.index]), f"row {segmented.image_id!r}")
                progress.advance(1)
    return counts.compute()


def evaluate_files(folder: str | os.PathLike, rows: Dataset | IterableDataset) -> dict[str, Any]:
    """Figures of the PNGs in `folder` on the rows that have a mask; see [`Figures`].

    Args:
        folder: label maps `<image_id>.png` of the images' sizes, an image_id without the suffix of an image file:
            8-bit palette or grey PNGs whose pixel values are the labels. Other files are not looked at.

    Raises:
        DataError: no row has a mask, a file is missing, holds no labels, or its palette says that they were
            renumbered; names it.
        ValueError: a file has another size or other labels than the truth; names it.
    """
    parts, count = _share(rows, "mask")
    folder = Path(folder)
    metric = Figures(["background", *class_names(rows)])
    with Progress("evaluating files", count, unit="image") as progress:
        for part in parts:
            files = {image_id: folder / f"{file_stem(image_id)}.png" for image_id in part["image_id"]}
            missing = [file for file in files.values() if not file.is_file()]
            if missing:
                expected = f"{missing[0]}: expected a label map of every image"
                raise DataError(f"{expected}, {len(missing)} of {len(files)} missing")
            for row in undecoded(part.select_columns(["image_id", "mask"])):
                file = files[row["image_id"]]
                prediction = decode_mask({"path": str(file)}, str(file))
                with open_image(file) as picture:
                    check_palette(picture, len(metric.names), str(file))
                metric.add(prediction, _truth(row), str(file))
                progress.advance(1)
    return metric.compute()


def _truth(row: dict) -> np.ndarray:
    return decode_mask(row["mask"], f"row {row['image_id']!r}, column mask")
