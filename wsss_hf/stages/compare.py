"""Methods side by side under one condition: every row of a plan, with every seed, on every data set."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from rich.console import Console

from ..data.palette import save_mask_png
from ..data.sources import load_data
from ..data.tagged import class_names, decode_image, decode_mask, has_value, undecoded
from ..files import remove_unfinished, sync, sync_tree
from ..inference.load import load_labeler, load_segmenter
from ..inference.segmenter import segment_images
from ..progress import is_quiet, set_quiet
from ..pseudo_labels.affinity_labels import needs_affinity, with_affinity
from ..pseudo_labels.label_images import label_images
from ..pseudo_labels.rules import rows_to_label
from ..pseudo_labels.threshold import at_thresholds, with_threshold
from ..reporting.comparison import comparison_markdown, summarize, write_comparison
from ..reporting.html import ReportExample
from ..settings import MasksSettings, RecipeError, TrainSettings
from . import evaluate, make_masks, relabel, train_affinity, train_cam, train_refiner, train_segmenter
from .cache import SETTINGS_FILE, Record, read_record, write_atomically
from .fingerprint import model_fingerprint, rows_fingerprint
from .lock import LOCK_FILE, OutputError, only_run
from .plan import Cell, plan_cells
from .results import LOG_FILE
from .run import check_recipe, run

VERSION = 1
_CELL_FILE = "cell.json"
_STAGES = (train_cam, train_refiner, train_affinity, make_masks, train_segmenter, relabel, evaluate)


class CompareError(RuntimeError):
    """Some cells failed; the message says which and why."""


@dataclass(frozen=True)
class Comparison:
    """What [`compare`] measured.

    Attributes:
        folder: holds `results.json`, `comparison.md`, `comparison.html`, and the cells.
        rows: one per row of the plan, see [`summarize`].
        cells: one record each.
    """

    folder: Path
    rows: list[dict[str, Any]]
    cells: list[dict[str, Any]]


def compare(
    plan: Mapping[str, Any],
    out: str | os.PathLike,
    *,
    jobs: int | None = None,
    cams: Sequence[str | os.PathLike] = (),
    force: bool = False,
) -> Comparison:
    """Train and evaluate every cell of a plan; write the table, the plots and the pictures.

    Cells that `out` holds are used again while their recipe, their data and the code of all stages are the same; an
    interrupted one goes on where it was. A plan may grow: more rows, seeds or data only add cells. A cell that fails
    does not stop the others. Rows that differ after the CAM classifier only share its training.

    Args:
        plan: see [`plan_cells`].
        out: gets `cells/<data>/<row>/seed<k>/`, `results.json`, `comparison.md` and `comparison.html`.
        jobs: cells at the same time, each in a process with a device of its own; default: one per GPU.
        cams: folders of other comparisons, or of runs; their CAM classifiers of the same recipe up to there, seed and
            data are taken over.
        force: do all cells again.

    Raises:
        RecipeError: see [`plan_cells`]; several processes were launched; or one of `cams` holds no CAM classifier.
        RefinementError, OSError, ValueError: what a cell would be made of is missing, see [`check_recipe`].
        DataError: see [`load_data`].
        OutputError: `out` holds something else, or another comparison works there.
        CompareError: cells failed; all others are in the results.
    """
    out = Path(out)
    _load.cache_clear()  # the data may have changed since the last comparison of this process
    cells = plan_cells(plan, out)
    held = {path.name for path in out.iterdir()} - {LOCK_FILE} if out.is_dir() else set()
    if out.is_file() or (held and "cells" not in held):
        raise OutputError(f"--out {out}: expected a new folder or a comparison, got something else")
    if jobs is not None and jobs < 1:
        raise RecipeError(f"--jobs: expected a whole number >= 1, got {jobs}")
    if PartialState().num_processes > 1:
        raise RecipeError("compare: expected one process, which starts its own (--jobs), got accelerate launch")
    folders = [Path(folder) for folder in cams]
    for folder in folders:
        if next(_held(folder, "cam"), None) is None:
            raise RecipeError(f"--cams: expected a comparison or a run with a CAM classifier, got {folder}")
    jobs = min(jobs or max(1, torch.cuda.device_count()), len(cells))
    for source in reversed(dict.fromkeys(json.dumps(cell.source) for cell in cells)):
        data = _load(source)  # says what is wrong before any cell is trained; the first cell's stays loaded
        alike = {json.dumps(c.recipe.changed("seed=0").to_dict()): c for c in cells if json.dumps(c.source) == source}
        starts = {}  # rows may differ in their masks alone
        for cell in alike.values():
            train_cam.check_data(data, cell.recipe)
            check_recipe(data, cell.recipe, cell.segmenter)
            starts[repr((cell.recipe.cam, cell.recipe.image))] = cell.recipe
            if cell.supervised:
                evaluate.needs_masks(_with_all_masks(cell), "train")
        for recipe in starts.values():
            train_cam.build_cam(recipe, class_names(data["train"]))
    with only_run(out):
        return _compare(cells, out, jobs, folders, force)


def _compare(cells: Sequence[Cell], out: Path, jobs: int, folders: Sequence[Path], force: bool) -> Comparison:
    (out / "cells").mkdir(exist_ok=True)  # by which the next start knows the folder
    remove_unfinished(out)
    console = Console(stderr=True, quiet=is_quiet())
    started, failures = time.monotonic(), []
    todo = [cell for cell in cells if force or not _finished(cell)]
    if folders:
        found = sum(_made_before(cell.folder / "cam", _cam_record(cell), folders) is not None for cell in todo)
        console.print(f"{found} of {len(todo)} CAM classifiers are there already", highlight=False)
    for done, (cell, outcome) in enumerate(_outcomes(todo, jobs, folders, force), start=1):
        if isinstance(outcome, Exception):
            message = " ".join(str(outcome).split()) or type(outcome).__name__
            failures.append(f"{cell.title}: {message}")
            state = "failed"
        else:
            state = _words(outcome)
        minutes = (time.monotonic() - started) / 60
        left = minutes / done * (len(todo) - done)
        console.print(f"cell {done} of {len(todo)}: {cell.title}: {state}; {left:.0f} min left", highlight=False)
    records = [record for record in map(_finished, cells) if record]
    comparison = Comparison(out, summarize(records), records)
    _write_results(comparison)
    if failures:
        raise CompareError(f"{len(failures)} of {len(cells)} cells failed; {failures[0]}")
    return comparison


def _words(record: dict) -> str:
    figure = record["maps"].get("mean_iou")
    return "no mask to measure on" if figure is None else f"mean IoU of the masks {100 * figure:.1f}"


def _outcomes(
    cells: Sequence[Cell], jobs: int, cams: Sequence[Path], force: bool
) -> Iterator[tuple[Cell, dict | Exception]]:
    """Every cell with its record, or with the error that it ended in, as they come."""
    if jobs == 1:
        for cell in cells:
            yield cell, _attempt(partial(run_cell, cell, cams, force))
        return
    spawn = multiprocessing.get_context("spawn")
    devices = spawn.Queue()
    for job in range(jobs):
        devices.put(job % max(1, torch.cuda.device_count()))
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare_process, initargs=(devices,)) as pool:
        futures = {pool.submit(run_cell, cell, cams, force): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], _attempt(future.result)


def _attempt(work: Callable[[], dict]) -> dict | Exception:
    try:
        return work()
    except Exception as error:
        if os.environ.get("WSSS_TRACEBACK"):
            raise
        return error


def _prepare_process(devices) -> None:
    """In a new process, before it touches a GPU: one of them is its own, and one progress bar is enough."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get())
    set_quiet(True)


def run_cell(cell: Cell, cams: Sequence[Path] = (), force: bool = False) -> dict[str, Any]:
    """Train and evaluate one cell; returns its record, which `cell.json` keeps."""
    folder, recipe, data = cell.folder, cell.recipe, _load(json.dumps(cell.source))
    results: list[dict] = []
    if not force:
        _borrow(folder / "cam", _cam_record(cell), cams)
    labeler = folder / ("refiner" if recipe.refiner.use else "cam")
    walks = needs_affinity(recipe.masks)
    if not (cell.segmenter and force):
        cam = train_cam.train_cam(data, recipe, folder / "cam", force=force)
        if recipe.refiner.use:
            train_refiner.train_refiner(data, cam, recipe, labeler, force=force)
        if walks and not force:
            _borrow(folder / "affinity", train_affinity.affinity_record(data, labeler, recipe), cams)
        train_affinity.affinity_of_run(data, labeler, recipe, folder / "affinity", force=force)
    if cell.segmenter:
        results = run(data, recipe, folder, force=force).results
    supervised = _supervised(cell, cams, force) if cell.supervised else {}
    settings = with_affinity(recipe.masks, folder / "affinity" if walks else None)
    started = time.perf_counter()
    maps = evaluate.maps_row("maps", labeler, data, settings)
    seconds = time.perf_counter() - started
    cost: dict[str, Any] = {
        name: training_cost(folder / name, getattr(recipe, name.partition("-")[0]).train, len(data["train"]))
        for name in ("cam", "refiner", "affinity", *_segmenters(cell))
        if (folder / name).is_dir()
    }
    if "num_images" in maps:
        cost["label_seconds_per_image"] = seconds / maps["num_images"]
    # Thresholds that were found without masks are not searched again.
    _save_examples(cell, data, labeler, at_thresholds(settings, maps))
    record: dict[str, Any] = {"settings": _settings(cell), "made_from": _made_from(cell).to_dict()}
    record |= {"maps": maps, "results": results, "supervised": supervised, "cost": cost, "device": _device_name()}
    record["class_names"] = ["background", *class_names(data)]
    remove_unfinished(folder)
    write_atomically(folder / _CELL_FILE, json.dumps(record, indent=1))
    return record


def _supervised(cell: Cell, cams: Sequence[Path], force: bool) -> dict[str, Any]:
    """Figures of the segmenter of the same settings that learnt from the true masks; rows with one start share it."""
    folder, cam, data = cell.folder / "supervised", cell.folder / "cam", _with_all_masks(cell)
    if not force:
        _borrow(folder, train_segmenter.segmenter_record(data, cell.recipe, mask_column="mask", cam=cam), cams)
    twin = train_segmenter.train_segmenter(data, cell.recipe, folder, mask_column="mask", cam=cam, force=force)
    return evaluate.segmenter_row("segmenter trained on true masks", twin, data, cell.recipe.evaluation)


def _segmenters(cell: Cell) -> list[str]:
    """The folders of a cell's segmenters, one per round."""
    rounds = cell.recipe.self_training.rounds if cell.segmenter else 0
    return ["segmenter", *(f"segmenter-{number}" for number in range(2, rounds + 1))][:rounds]


def _borrow(own: Path, record: Record, comparisons: Sequence[Path]) -> None:
    """Copy a model of a cell that differs in later stages only, from here or from other comparisons.

    Args:
        own: the model's folder in its cell; one that is there or begun stays.
        record: what the model is to be made from.
    """
    finished = None if own.with_name(f"{own.name}.partial").exists() else _made_before(own, record, comparisons)
    if finished is None or finished == own:
        return
    fresh = own.with_name(f"{own.name}.copied")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(finished, fresh)
    sync_tree(fresh)
    os.replace(fresh, own)
    sync(own.parent)


def _made_before(own: Path, record: Record, comparisons: Sequence[Path]) -> Path | None:
    """The model's own folder, if it is there, or one of another cell that was made from the same."""
    if own.exists():
        return own
    for folder in (own.parents[3], *comparisons):
        for other in _held(folder, own.name):
            if record.difference(read_record(other)) is None:
                return other
    return None


def _cam_record(cell: Cell) -> Record:
    return train_cam.cam_record(_load(json.dumps(cell.source)), cell.recipe)


def _held(folder: Path, name: str) -> Iterator[Path]:
    """The models of that name below `folder` whose training was finished."""
    return (file.parent for file in sorted(folder.glob(f"**/{name}/{SETTINGS_FILE}")))


def training_cost(model: Path, settings: TrainSettings, num_images: int) -> dict[str, float]:
    """`seconds_per_step` and `minutes` of the training that a model folder's log speaks of; {} without a log.

    Args:
        num_images: size of split "train".
    """
    log = model / LOG_FILE
    if not log.is_file():
        return {}
    rates = [record["images_per_second"] for record in json.loads(log.read_text())]
    batch = min(settings.batch_size, num_images)
    per_epoch = num_images // batch
    total = settings.steps or per_epoch * len(rates)
    steps = [min(per_epoch, total - per_epoch * epoch) for epoch in range(len(rates))]  # the last may be a part
    seconds = sum(count * batch / rate for count, rate in zip(steps, rates, strict=True))
    return {"seconds_per_step": seconds / sum(steps), "minutes": seconds / 60}


def _settings(cell: Cell) -> dict[str, Any]:
    """What a cell is called and how it is computed, as JSON has it."""
    values = {name: getattr(cell, name) for name in ("data", "row", "seed", "source", "segmenter", "supervised")}
    return json.loads(json.dumps(values | {"recipe": cell.recipe.to_dict()}))


def _made_from(cell: Cell) -> Record:
    """A cell's recipe, its data, and the versions of all stages."""
    data = _load(json.dumps(cell.source))
    inputs = dict(train_cam.cam_record(data, cell.recipe).inputs) | {
        split: rows_fingerprint(rows, ["image_id", "tags", "image", "mask", "saliency", "superpixels"])
        for split, rows in data.items()
    }
    for name in ("backbone", "model") if cell.segmenter else ():
        if (model := getattr(cell.recipe.segmenter, name)) is not None:
            inputs[f"segmenter.{name}"] = model_fingerprint(model)
    versions = {stage.__name__.rpartition(".")[2]: stage.VERSION for stage in _STAGES}
    settings = {"recipe": cell.recipe, "segmenter": cell.segmenter, "versions": versions}
    if cell.supervised:
        settings["supervised"] = True
        inputs["true masks"] = rows_fingerprint(_with_all_masks(cell)["train"], ["image_id", "mask"])
    return Record("compare", VERSION, settings, inputs)


def _finished(cell: Cell) -> dict[str, Any] | None:
    """The record of a cell that is done, and whose recipe, data and code have not changed since."""
    try:
        record = json.loads((cell.folder / _CELL_FILE).read_text())
    except (OSError, ValueError):
        return None
    return record if _made_from(cell).difference(record.get("made_from", {})) is None else None


def _with_all_masks(cell: Cell) -> DatasetDict:
    """The data of a cell with the true masks of all training images, also those that are not evaluated on."""
    return _load(json.dumps(cell.source | {"masks": "all"}))


@lru_cache(maxsize=2)  # the masks of an upper bound are a data set of their own
def _load(source: str) -> DatasetDict:
    """The data set, the same for all seeds: what `limit` draws depends on no cell."""
    return load_data(**json.loads(source))


def _device_name() -> str:
    device = PartialState().device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# Pictures


def _example_rows(data: DatasetDict, count: int) -> Dataset:
    """Held-out images (of "train" where there is no "val"), those with masks first, evenly spaced."""
    rows = data["val"] if "val" in data else data["train"]
    if "mask" in rows.column_names and has_value(rows, "mask").any():
        rows = rows.select(np.flatnonzero(has_value(rows, "mask")))
    return rows.select(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))


def _save_examples(cell: Cell, data: DatasetDict, labeler: Path, settings: MasksSettings) -> None:
    """The masks of the example images: the segmenter's, or those made of the maps; `examples/<number>.png`.

    An image that lacks what the label rule looks at has none.
    """
    rows = _example_rows(data, cell.recipe.evaluation.examples)
    folder, device = cell.folder / "examples", PartialState().device
    folder.mkdir(exist_ok=True)
    remove_unfinished(folder)
    if not cell.segmenter:
        classifier, processor = load_labeler(os.fspath(labeler), device, optimize=settings.optimize)
        settings = with_threshold(classifier, processor, data["train"], settings)
        chosen = rows_to_label(settings, rows)
        for labelled in label_images(classifier, processor, rows.select(chosen), settings) if len(chosen) else ():
            save_mask_png(folder / f"{chosen[labelled.index]}.png", labelled.pseudo_mask)
        return
    model, processor = load_segmenter(os.fspath(cell.folder / _segmenters(cell)[-1]), device)
    for segmented in segment_images(model, processor, rows, cell.recipe.evaluation):
        save_mask_png(folder / f"{segmented.index}.png", segmented.labels)


def _examples(out: Path, records: Sequence[dict]) -> list[ReportExample]:
    """The example images of one data set with the masks of every row's first seed."""
    data = _load(json.dumps(records[0]["settings"]["source"]))
    names = class_names(data)
    rows = undecoded(_example_rows(data, min(r["settings"]["recipe"]["evaluation"]["examples"] for r in records)))
    first: dict[str, Path] = {}
    for record in records:
        cell = record["settings"]
        first.setdefault(cell["row"], out / "cells" / cell["data"] / cell["row"] / f"seed{cell['seed']}" / "examples")
    examples = []
    for number, row in enumerate(rows):
        where = f"row {row['image_id']!r}"
        masks = {name: folder / f"{number}.png" for name, folder in first.items()}
        masks = {name: file for name, file in masks.items() if file.is_file()}
        truth = row.get("mask")
        examples.append(
            ReportExample(
                image=decode_image(row["image"], where),
                image_id=row["image_id"],
                tags=[names[c] for c in row["tags"]],
                masks={name: decode_mask({"path": str(file)}, str(file)) for name, file in masks.items()},
                truth=None if truth is None else decode_mask(truth, f"{where}, column mask"),
            )
        )
    return examples


def _write_results(comparison: Comparison) -> None:
    out, rows, records = comparison.folder, comparison.rows, comparison.cells
    if not records:
        return
    write_atomically(out / "results.json", json.dumps({"rows": rows, "cells": records}, indent=1))
    write_atomically(out / "comparison.md", comparison_markdown(rows))
    by_data: dict[str, list[dict]] = {}
    for record in records:
        by_data.setdefault(record["settings"]["data"], []).append(record)
    for name, part in by_data.items():
        page = "comparison.html" if len(by_data) == 1 else f"comparison-{name}.html"
        shown = [row for row in rows if row["data"] == name]
        write_comparison(out / page, name, shown, _examples(out, part), part[0]["class_names"])
