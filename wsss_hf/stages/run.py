"""All stages in order: tagged images in, evaluated segmenter and report out."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_from_disk

from .. import __version__
from ..data.tagged import DataError, class_names, decode_mask, has_value, undecoded
from ..inference.segment_images import segment_images
from ..inference.segmenter_scores import load_segmenter
from ..metrics.errors import Errors, compare_errors
from ..pseudo_labels.label_images import build_rules, label_images, load_labeler
from ..pseudo_labels.refinement import build_refiner
from ..pseudo_labels.threshold import with_threshold
from ..reporting.html import ReportExample, write_gallery, write_report
from ..reporting.tables import print_table
from .cache import OutputError, write_atomically
from .evaluate import evaluate_cam, evaluate_masks, evaluate_segmenter
from .make_masks import make_masks, read_summary
from .relabel import relabel
from .train_cam import train_cam
from .train_refiner import train_refiner
from .train_segmenter import train_segmenter

COLUMNS = ["result", "split", "mean_iou", "mean_iou_interval", "pixel_accuracy", "num_images"]


def run(
    data: DatasetDict,
    recipe: dict,
    out: str | os.PathLike,
    data_settings: dict | None = None,
    hub_kwargs: dict | None = None,
    quiet: bool = False,
) -> list[dict]:
    """Train the CAM classifier and, if the recipe says so, the map refiner; make pseudo masks, train the segmenter,
    evaluate, report.

    Args:
        data: tagged images; rows that have a `mask` serve the evaluation, and nothing else.
        recipe: a resolved recipe.
        out: gets `cam/`, perhaps `refiner/`, `masks/`, `segmenter/`, `results.json`, `report.html` and `gallery.png`;
            with rounds of self-training also `masks-2/`, `segmenter-2/` … Finished stages of the same settings are not
            done again.

    Returns:
        the rows of the results table.

    Raises:
        OutputError: `out` holds something else.
        RefinementError: a step of refinement can't be built, or its library is missing.
    """
    out = check_run_folder(out)
    build_rules(recipe["masks"])  # what is wrong with refinement is said before hours of training
    for section in ("self_training", "evaluation"):
        build_refiner(recipe[section]["refine"])
    common = {"data_settings": data_settings, "hub_kwargs": hub_kwargs, "quiet": quiet}
    started = time.perf_counter()
    cam = train_cam(data, recipe, out / "cam", **common)
    labeler = train_refiner(data, cam, recipe, out / "refiner", **common) if recipe["refiner"]["use"] else cam
    masks = make_masks(data, labeler, recipe, out / "masks", **common)
    labelled = load_from_disk(str(masks))
    segmenter = train_segmenter(labelled, recipe, out / "segmenter", cam=cam, **common)
    rows = [
        masks_row("pseudo masks", labelled, quiet),
        segmenter_row("segmenter trained on pseudo masks", segmenter, data, recipe, quiet),
    ]
    segmenter, more_rows = self_train(labelled, segmenter, recipe, out, cam, **common)
    rows += more_rows
    minutes = (time.perf_counter() - started) / 60
    return finish_run(out, rows, data, labeler, segmenter, recipe, data_settings, minutes, quiet)


def self_train(
    data: DatasetDict,
    segmenter: Path,
    recipe: dict,
    out: Path,
    cam: Path | None,
    data_settings: dict | None = None,
    hub_kwargs: dict | None = None,
    quiet: bool = False,
) -> tuple[Path, list[dict]]:
    """The rounds after the first: each segmenter relabels the tagged images, and a new one learns from that.

    Args:
        data: tagged images.
        segmenter: that of the first round.
        recipe: its `self_training` section says how many rounds there are in all, and how labels are made.
        out: gets `masks-N/` and `segmenter-N/` of every round N.
        cam: as for `train_segmenter`; every round starts alike.

    Returns:
        the last segmenter, and the rows of the results table.
    """
    settings = {key: value for key, value in recipe["self_training"].items() if key != "rounds"}
    rows = []
    for number in range(2, recipe["self_training"]["rounds"] + 1):
        note = (data_settings or {}) | {"round": number, "self_training": settings}
        common = {"data_settings": note, "hub_kwargs": hub_kwargs, "quiet": quiet}
        labelled = load_from_disk(str(relabel(data, segmenter, recipe, out / f"masks-{number}", **common)))
        segmenter = train_segmenter(labelled, recipe, out / f"segmenter-{number}", cam=cam, **common)
        rows.append(masks_row(f"pseudo masks, round {number}", labelled, quiet, f"masks-{number}"))
        rows.append(segmenter_row(f"segmenter, round {number}", segmenter, data, recipe, quiet))
    return segmenter, rows


def check_run_folder(out: str | os.PathLike) -> Path:
    """`out` as a path, if a run may write there.

    Raises:
        OutputError: it holds files, and they are not those of a run.
    """
    out = Path(out)
    held = {path.name.removesuffix(".partial") for path in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or (held and "cam" not in held):
        raise OutputError(f"--out {out}: it exists and is no run; take another folder")
    return out


def masks_row(name: str, labelled: DatasetDict, quiet: bool = False, folder: str = "masks") -> dict:
    """Results row of the pseudo masks on split "train"; without figures where no row has a true mask."""
    row = {"result": name, "split": "train", "of": folder}
    return row | evaluate_masks(labelled["train"], quiet=quiet) if has_masks(labelled, "train") else row


def maps_row(
    name: str,
    cam: str | os.PathLike,
    data: DatasetDict,
    recipe: dict,
    quiet: bool = False,
    hub_kwargs: dict | None = None,
) -> dict:
    """Results row of the pseudo masks that a CAM classifier, a directory or Hub id, would make of split "train"."""
    row = {"result": name, "split": "train", "of": Path(cam).name}
    if not has_masks(data, "train"):
        return row
    model, processor = load_labeler(str(cam), PartialState().device, **(hub_kwargs or {}))
    settings = with_threshold(model, processor, data["train"], recipe["masks"])
    figures = evaluate_cam(model, processor, data["train"], settings, quiet)
    return row | figures | {"background_threshold": settings["background_threshold"]}


def segmenter_row(
    name: str,
    segmenter: str | os.PathLike,
    data: DatasetDict,
    recipe: dict,
    quiet: bool = False,
    split: str = "val",
    hub_kwargs: dict | None = None,
) -> dict:
    """Results row of a segmenter, a directory or Hub id, on a split; without figures where it has no true mask."""
    row = {"result": name, "split": split, "of": Path(segmenter).name}
    if not has_masks(data, split):
        return row
    model, processor = load_segmenter(str(segmenter), PartialState().device, **(hub_kwargs or {}))
    return row | evaluate_segmenter(model, processor, data[split], recipe["evaluation"], quiet)


def segmenter_gap(
    segmenter: str | os.PathLike,
    other: str | os.PathLike,
    rows: Dataset,
    settings: dict,
    quiet: bool = False,
    hub_kwargs: dict | None = None,
) -> dict:
    """What lies between two segmenters, directories or Hub ids, on rows with true masks; see [`compare_errors`].

    Args:
        settings: a recipe's `evaluation` section.
        hub_kwargs: `token` and `cache_dir` for both; `revision` for the first.
    """
    common = {key: value for key, value in (hub_kwargs or {}).items() if key != "revision"}
    device = PartialState().device
    return compare_errors(
        *(
            evaluate_segmenter(*load_segmenter(str(name), device, **kwargs), rows, settings, quiet, Errors)
            for name, kwargs in ((segmenter, hub_kwargs or {}), (other, common))
        )
    )


def finish_run(
    out: Path,
    rows: list[dict],
    data: DatasetDict,
    cam: Path,
    segmenter: Path,
    recipe: dict,
    data_settings: dict | None,
    minutes: float,
    quiet: bool,
    command: str = "run",
) -> list[dict]:
    """Print the table; write it with the settings as JSON, with a dozen examples as HTML page and as picture."""
    if not PartialState().is_main_process:
        return rows
    if (out / "results.json").exists():  # a run that was broken off has taken its time already
        minutes += json.loads((out / "results.json").read_text())["minutes"]
    results = {"command": command, "data": data_settings, "recipe": recipe, "results": rows, "minutes": minutes}
    results["environment"] = _environment()
    write_atomically(out / "results.json", json.dumps(results, indent=1))
    names = ["background", *class_names(data["train"])]
    threshold = read_summary(out / "masks")["background_threshold"]
    settings = recipe["masks"] | {"background_threshold": threshold}
    examples = report_examples(data, cam, segmenter, recipe | {"masks": settings})
    curves = {row["result"]: row["threshold_curve"] for row in rows if "threshold_curve" in row}
    table = [{key: value for key, value in row.items() if key in (*COLUMNS, "iou")} for row in rows]
    source = (data_settings or {}).get("source", "given")
    notes = {"data": source, "classes": len(names) - 1, "minutes": f"{minutes:.1f}"}
    notes |= {"background threshold": f"{threshold:.2f}"}  # of maps in [0, 1], where figures are in percent
    title = "Image tags in, segmentation model out"
    write_report(out / "report.html", title, table, examples, names, notes, curves)
    write_gallery(out / "gallery.png", examples)
    print_table(rows, "Results (percent)", columns=COLUMNS)
    if not quiet:
        print(f"report: {out / 'report.html'}")
    return rows


def report_examples(data: DatasetDict, cam: Path, segmenter: Path, recipe: dict) -> list[ReportExample]:
    """Held-out images (of "train" where there is no "val"), evenly spaced, with all that was made of them."""
    rows = data["val"] if "val" in data else data["train"]
    count = min(recipe["evaluation"]["examples"], len(rows))
    rows = rows.select(np.linspace(0, len(rows) - 1, count).round().astype(int))
    names = class_names(rows)
    raw = undecoded(rows)
    classifier, cam_processor = load_labeler(str(cam), PartialState().device)
    model, processor = load_segmenter(str(segmenter), PartialState().device)
    examples: list[ReportExample | None] = [None] * count
    predictions = {s.index: s.labels for s in segment_images(model, processor, rows, recipe["evaluation"])}
    for labelled in label_images(classifier, cam_processor, rows, recipe["masks"]):
        row = raw[labelled.index]
        truth = row.get("mask")
        examples[labelled.index] = ReportExample(
            image=labelled.image,
            image_id=row["image_id"],
            tags=[names[c] for c in row["tags"]],
            map={names[c]: m for c, m in zip(labelled.classes, labelled.maps, strict=True)},
            steps={
                step.capitalize(): {names[c]: picture for c, picture in zip(labelled.classes, pictures, strict=True)}
                for step, pictures in labelled.note.pictures.items()
            },
            pseudo_mask=labelled.pseudo_mask,
            prediction=predictions[labelled.index],
            truth=None if truth is None else decode_mask(truth, f"row {row['image_id']!r}, column mask"),
        )
    return examples


def _environment() -> dict:
    """What the minutes were spent on, and the versions that the figures belong to."""
    gpus = torch.cuda.device_count()
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"{os.cpu_count()} CPU cores"
    versions = {"wsss_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device} | versions


def has_masks(data: DatasetDict, split: str) -> bool:
    """Whether there is something to evaluate on."""
    rows: Dataset | None = data.get(split)
    return rows is not None and "mask" in rows.column_names and bool(has_value(rows, "mask").any())


def needs_masks(data: DatasetDict, split: str) -> None:
    """What `has_masks` asks, as a condition.

    Raises:
        DataError: the split is not there, or none of its rows has a mask.
    """
    if split not in data:
        raise DataError(f"the data have no split {split!r} to evaluate on, only {', '.join(data)}")
    if not has_masks(data, split):
        raise DataError(f"no row of split {split!r} has a mask: there is nothing to evaluate on")
