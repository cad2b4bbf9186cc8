"""All stages in order: tagged images in, evaluated segmenter and report out."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from datasets import DatasetDict, IterableDataset

from ..data.streams import sample_of
from ..data.tagged import class_names, decode_image, decode_mask, source_of, undecoded
from ..files import remove_unfinished
from ..inference.load import load_labeler, load_segmenter
from ..inference.segmenter import segment_images
from ..progress import is_quiet, say
from ..pseudo_labels.affinity_labels import with_affinity
from ..pseudo_labels.label_images import label_images
from ..pseudo_labels.rules import rows_to_label
from ..pseudo_labels.threshold import at_thresholds
from ..recipes import Recipe, check_inputs
from ..refinement.steps import build_refinement
from ..reporting.html import ReportExample, write_gallery, write_report
from ..reporting.tables import RESULT_COLUMNS, print_table
from ..settings import RecipeError
from ..version import __version__
from .cache import write_atomically
from .evaluate import masks_row, segmenter_row
from .lock import LOCK_FILE, OutputError, only_run
from .make_masks import make_masks
from .relabel import relabel
from .results import LabelledData, RunResult, StageResult, TrainedModel
from .train_affinity import affinity_of_run, check_masks, needs_affinity
from .train_cam import train_cam
from .train_refiner import train_refiner
from .train_segmenter import check_start, train_segmenter

RESULTS_FILE = "results.json"
_ROUND = ("masks", "segmenter")
_NO_FIGURES = "The data have no true masks, so nothing was measured; the pictures show what came out."


def run(
    data: DatasetDict,
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    embed_images: bool = False,
    force: bool = False,
) -> RunResult:
    """Train the CAM classifier and, if the recipe says so, map refiner and affinity network; make pseudo masks, train
    the segmenter, evaluate, report.

    Args:
        data: tagged images, also as a stream; rows that have a `mask` serve the evaluation, and nothing else.
        out: gets `cam/`, perhaps `refiner/` and `affinity/`, `masks/`, `segmenter/`, `results.json`, `report.html` and
            `gallery.png`; with rounds of self-training also `masks-2/`, `segmenter-2/` … Stages whose inputs and
            settings have not changed are not run again.
        embed_images: copy the image files into the data sets with pseudo masks, see [`save_data`].
        force: run all stages again.

    Raises:
        OutputError: `out` holds something else, or another run works there.
        RecipeError: the recipe has a stage that takes no stream, or no number of steps for one.
        RefinementError, RecipeError, OSError, ValueError: see [`check_recipe`].
    """
    check_inputs(data, recipe)
    out = check_run_folder(out)
    if isinstance(data["train"], IterableDataset):
        _check_streamed(recipe)
    check_recipe(data, recipe)
    with only_run(out):
        cam = train_cam(data, recipe, out / "cam", force=force)
        refiner = train_refiner(data, cam, recipe, out / "refiner", force=force) if recipe.refiner.use else None
        labeler = refiner or cam
        affinity = affinity_of_run(data, labeler, recipe, out / "affinity", force=force)
        masks = make_masks(
            data, labeler, recipe, out / "masks", affinity=affinity, embed_images=embed_images, force=force
        )
        segmenter = train_segmenter(masks.data, recipe, out / "segmenter", cam=cam, force=force)
        rows = [
            masks_row("pseudo masks", masks.data),
            segmenter_row("segmenter trained on pseudo masks", segmenter, data, recipe.evaluation),
        ]
        result = RunResult(out, cam, refiner, affinity, masks, segmenter, rows)
        result = self_train(data, result, recipe, embed_images=embed_images, force=force)
        write_results(result, data, recipe)
    return result


def self_train(
    data: DatasetDict, result: RunResult, recipe: Recipe, *, embed_images: bool = False, force: bool = False
) -> RunResult:
    """The rounds after the first: each segmenter relabels the tagged images, and a new one learns from that.

    Args:
        data: with the true masks to evaluate on.
        result: of the first round; its folder gets `masks-N/` and `segmenter-N/` of every round N.

    Returns:
        `result` with the last masks and segmenter, and rows for all rounds.
    """
    masks, segmenter, rows = result.masks, result.segmenter, list(result.results)
    for number in range(2, recipe.self_training.rounds + 1):
        to = result.folder / f"masks-{number}"
        labelled = relabel(result.masks.data, segmenter, recipe, to, embed_images=embed_images, force=force)
        masks = LabelledData(labelled.folder)
        folder = result.folder / f"segmenter-{number}"
        segmenter = train_segmenter(masks.data, recipe, folder, cam=result.cam, force=force)
        rows.append(masks_row(f"pseudo masks, round {number}", masks.data, masks.folder.name))
        rows.append(segmenter_row(f"segmenter, round {number}", segmenter, data, recipe.evaluation))
    return dataclasses.replace(result, masks=masks, segmenter=segmenter, results=rows)


def check_recipe(data: DatasetDict, recipe: Recipe, segmenter: bool = True) -> None:
    """What would stop the stages after the training of the CAM classifier, known before hours of training.

    Args:
        segmenter: whether a segmenter is trained and evaluated.

    Raises:
        RefinementError: the library or model of a refinement step is missing.
        RuleError, RecipeError, OSError, ValueError: what a label rule looks at, or a network starts from, is missing.
    """
    check_masks(recipe)
    if segmenter:
        for section in ("self_training", "evaluation"):
            build_refinement(getattr(recipe, section).refine, f"{section}.refine").prepare()
        check_start(data, recipe)


def _check_streamed(recipe: Recipe) -> None:
    """What of a recipe would stop a run on a stream, known before hours of training.

    Raises:
        RecipeError: names the setting.
    """
    for name, is_set in (
        ("refiner.use", recipe.refiner.use),
        ("a walk without a model in masks.refine", needs_affinity(recipe.masks)),
        ("self_training.rounds above 1", recipe.self_training.rounds > 1),
    ):
        if is_set:
            raise RecipeError(f"recipe: expected data that are not streamed for {name}")
    for section in ("cam", "segmenter"):
        if not getattr(recipe, section).train.steps:
            raise RecipeError(f"{section}.train.steps: expected a number of steps for data that are streamed, got 0")


def check_run_folder(out: str | os.PathLike) -> Path:
    """`out` as a path, if a run may write there.

    Raises:
        OutputError: it holds files, and they are not those of a run.
    """
    out = Path(out)
    files = (path.name for path in out.iterdir()) if out.is_dir() else ()
    held = {name.removesuffix(".partial") for name in files if name != LOCK_FILE}
    if out.is_file() or (held and "cam" not in held):
        raise OutputError(f"--out {out}: expected a new folder or a run, got something else")
    return out


def write_results(
    result: RunResult, data: DatasetDict, recipe: Recipe, command: str = "run", beside: Sequence[str] = ()
) -> None:
    """Print the table; write it with the settings as JSON, with a dozen examples as HTML page and as picture.

    Args:
        beside: folders of stages that a run does not have.
    """
    if not PartialState().is_main_process:
        return
    out, rows, source = result.folder, result.results, source_of(data)
    remove_unfinished(out)
    minutes = sum(StageResult(out / name).minutes for name in (*_stages(recipe), *beside))
    summary = LabelledData(out / "masks").summary
    thresholds = {name: value for name, value in summary.items() if name.endswith("_threshold")}
    record: dict[str, Any] = {"command": command, "data": source, "recipe": recipe.to_dict(), "results": rows}
    record |= thresholds | {"minutes": minutes, "environment": _environment()}
    record |= {name: summary[name] for name in ("saliency",) if name in summary}
    write_atomically(out / RESULTS_FILE, json.dumps(record, indent=1))
    names = ["background", *class_names(data["train"])]
    examples = report_examples(result, data, recipe, thresholds)
    curves = {row["result"]: row["threshold_curve"] for row in rows if "threshold_curve" in row}
    shown = [row for row in rows if row["split"] in data] if any("mean_iou" in row for row in rows) else []
    table = [{key: value for key, value in row.items() if key in (*RESULT_COLUMNS, "iou")} for row in shown]
    notes: dict[str, Any] = {
        "data": source.get("source", "given"),
        "classes": len(names) - 1,
        "minutes": f"{minutes:.1f}",
        # of maps in [0, 1], where figures are in percent
        **{name.replace("_", " "): f"{value:.2f}" for name, value in thresholds.items()},
    }
    notes |= {name: summary[name] for name in ("saliency",) if name in summary}
    title = "Image tags in, segmentation model out"
    write_report(
        out / "report.html", title, table, examples, names, notes, curves, caption="" if shown else _NO_FIGURES
    )
    write_gallery(out / "gallery.png", examples)
    if shown:
        print_table(shown, "Results (percent)", columns=RESULT_COLUMNS)
    else:
        say(_NO_FIGURES)
    if not is_quiet():
        print(f"report: {out / 'report.html'}")


def _stages(recipe: Recipe) -> list[str]:
    """The folders of a run's stages."""
    optional = {"refiner": recipe.refiner.use, "affinity": needs_affinity(recipe.masks)}
    rounds = [f"{name}-{number}" for number in range(2, recipe.self_training.rounds + 1) for name in _ROUND]
    return ["cam", *(name for name, is_used in optional.items() if is_used), *_ROUND, *rounds]


def report_examples(
    result: RunResult, data: DatasetDict, recipe: Recipe, thresholds: Mapping[str, float]
) -> list[ReportExample]:
    """Held-out images (of "train" where there is no "val"), evenly spaced, with all that was made of them; of a stream
    some of [`sample_of`] it.

    Those that lack what the label rule looks at have no pseudo mask.
    """
    rows = data["val"] if "val" in data else data["train"]
    rows = sample_of(rows) if isinstance(rows, IterableDataset) else rows
    count = min(recipe.evaluation.examples, len(rows))
    rows = rows.select(np.linspace(0, len(rows) - 1, count).round().astype(int))
    names, raw, device = class_names(rows), undecoded(rows), PartialState().device
    settings = with_affinity(at_thresholds(recipe.masks, thresholds), result.affinity)
    labeler: TrainedModel = result.refiner or result.cam
    classifier, cam_processor = load_labeler(os.fspath(labeler), device, optimize=settings.optimize)
    model, processor = load_segmenter(os.fspath(result.segmenter), device)
    examples = []
    for segmented in sorted(segment_images(model, processor, rows, recipe.evaluation), key=lambda found: found.index):
        row = raw[segmented.index]
        truth, where = row.get("mask"), f"row {row['image_id']!r}"
        examples.append(
            ReportExample(
                image=decode_image(row["image"], where),
                image_id=row["image_id"],
                tags=[names[c] for c in row["tags"]],
                prediction=segmented.labels,
                truth=None if truth is None else decode_mask(truth, f"{where}, column mask"),
            )
        )
    chosen = rows_to_label(settings, rows)
    for labelled in label_images(classifier, cam_processor, rows.select(chosen), settings) if len(chosen) else ():
        example = examples[chosen[labelled.index]]
        example.pseudo_mask = labelled.pseudo_mask
        example.map = {names[c]: m for c, m in zip(labelled.classes, labelled.maps, strict=True)}
        example.steps = {
            step.capitalize(): {names[c]: picture for c, picture in zip(labelled.classes, pictures, strict=True)}
            for step, pictures in labelled.note.pictures.items()
        }
    return examples


def _environment() -> dict[str, Any]:
    """What the minutes were spent on, and what the last digits of the figures depend on."""
    gpus = torch.cuda.device_count()
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"{os.cpu_count()} CPU cores"
    versions = {"wsss_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "processes": PartialState().num_processes, "threads": torch.get_num_threads()} | versions
