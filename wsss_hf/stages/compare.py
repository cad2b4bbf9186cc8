"""Methods side by side under one condition: every row of a plan, with every seed, on every data set."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from rich.console import Console

from ..data.palette import save_mask_png
from ..data.sources import load_data
from ..data.tagged import class_names, decode_image, decode_mask, has_value, undecoded
from ..inference.segment_images import segment_images
from ..inference.segmenter_scores import load_segmenter
from ..pseudo_labels.label_images import label_images, load_labeler
from ..pseudo_labels.threshold import with_threshold
from ..recipes import RecipeError
from ..reporting.comparison import comparison_markdown, summarize, write_comparison
from ..reporting.html import ReportExample
from ..training.build import LOG_FILE
from .cache import SETTINGS_FILE, OutputError, first_difference, write_atomically
from .plan import Cell, plan_cells
from .run import maps_row, run
from .train_cam import train_cam
from .train_refiner import train_refiner

_CELL_FILE = "cell.json"


class CompareError(RuntimeError):
    """Some cells failed; the message says which and why."""


def compare(
    plan: dict,
    out: str | os.PathLike,
    hub_kwargs: dict | None = None,
    jobs: int | None = None,
    quiet: bool = False,
    cams: Sequence[str | os.PathLike] = (),
) -> dict:
    """Train and evaluate every cell of a plan; write the table, the plots and the pictures.

    Cells that `out` holds already are not done again, and an interrupted one goes on where it was. A plan may grow:
    more rows, seeds or data only add cells. A cell that fails does not stop the others. Rows that differ after the CAM
    classifier only share its training.

    Args:
        plan: see [`plan_cells`].
        out: gets `cells/<data>/<row>/seed<k>/`, `results.json`, `comparison.md` and `comparison.html`.
        hub_kwargs: `token`, `cache_dir`.
        jobs: cells at the same time, each in a process with a device of its own; default: one per GPU.
        cams: folders of other comparisons, or of runs; their CAM classifiers of the same recipe up to there, seed and
            data are taken over.

    Returns:
        what `results.json` holds: `cells`, one record each, and `rows`, see [`summarize`].

    Raises:
        RecipeError: see [`plan_cells`]; several processes were launched; or one of `cams` holds no CAM classifier.
        OutputError: `out` holds something else, or a cell of other settings.
        CompareError: cells failed; all others are in the results.
    """
    out, hub_kwargs = Path(out), hub_kwargs or {}
    cells = plan_cells(plan, out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "cells").is_dir()):
        raise OutputError(f"--out {out}: it exists and is no comparison; take another folder")
    if jobs is not None and jobs < 1:
        raise RecipeError(f"--jobs {jobs}: 1 or more would be right")
    if PartialState().num_processes > 1:
        raise RecipeError("compare starts its own processes: --jobs without accelerate launch would be right")
    cams = [Path(folder) for folder in cams]
    for folder in cams:
        if next(_held_cams(folder), None) is None:
            raise RecipeError(f"--cams {folder}: no CAM classifier is there; another comparison would be right")
    jobs = min(jobs or max(1, torch.cuda.device_count()), len(cells))
    console = Console(stderr=True, quiet=quiet)
    started, failures = time.monotonic(), []
    todo = [cell for cell in cells if not _finished(cell)]  # raises before hours of work where a folder is another's
    if cams:
        found = sum(_finished_cam(cell, cams) is not None for cell in todo)
        console.print(f"{found} of {len(todo)} CAM classifiers are there already", highlight=False)
    for done, (cell, outcome) in enumerate(_outcomes(todo, hub_kwargs, jobs, quiet, cams), start=1):
        failed = isinstance(outcome, Exception)
        if failed:
            message = " ".join(str(outcome).split()) or type(outcome).__name__
            failures.append(f"{cell.title}: {message}")
        minutes = (time.monotonic() - started) / 60
        left = minutes / done * (len(todo) - done)
        state = "failed" if failed else _words(outcome)
        console.print(f"cell {done} of {len(todo)}: {cell.title}: {state}; {left:.0f} min left", highlight=False)
    results = _write_results(out, [record for record in map(_finished, cells) if record], hub_kwargs, quiet)
    if failures:
        raise CompareError(f"{len(failures)} of {len(cells)} cells failed; {failures[0]}")
    return results


def _words(record: dict) -> str:
    figure = record["maps"].get("mean_iou")
    return "no mask to measure on" if figure is None else f"mean IoU of the masks {100 * figure:.1f}"


def _outcomes(
    cells: Sequence[Cell], hub_kwargs: dict, jobs: int, quiet: bool, cams: Sequence[Path]
) -> Iterator[tuple[Cell, dict | Exception]]:
    """Every cell with its record, or with the error that it ended in, as they come."""
    if jobs == 1:
        for cell in cells:
            yield cell, _attempt(lambda cell=cell: run_cell(cell, hub_kwargs, quiet, cams))
        return
    spawn = multiprocessing.get_context("spawn")
    devices = spawn.Queue()
    for job in range(jobs):
        devices.put(job % max(1, torch.cuda.device_count()))
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_take_device, initargs=(devices,)) as pool:
        futures = {pool.submit(run_cell, cell, hub_kwargs, True, cams): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], _attempt(future.result)


def _attempt(work: Callable[[], dict]) -> dict | Exception:
    try:
        return work()
    except Exception as error:
        if os.environ.get("WSSS_TRACEBACK"):
            raise
        return error


def _take_device(devices) -> None:
    """In a new process, before it touches a GPU: one of them is its own."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get())


def run_cell(cell: Cell, hub_kwargs: dict, quiet: bool, cams: Sequence[Path] = ()) -> dict:
    """Train and evaluate one cell; returns its record, which `cell.json` keeps."""
    folder = Path(cell.folder)
    data = _load(json.dumps(cell.source), json.dumps(hub_kwargs), quiet)
    common = {"data_settings": cell.source, "hub_kwargs": hub_kwargs, "quiet": quiet}
    results = []
    _borrow_cam(cell, cams)
    labeler = folder / ("refiner" if cell.recipe["refiner"]["use"] else "cam")
    if cell.segmenter:
        results = run(data, cell.recipe, folder, **common)
    else:
        cam = train_cam(data, cell.recipe, folder / "cam", **common)
        if labeler != cam:
            train_refiner(data, cam, cell.recipe, labeler, **common)
    started = time.perf_counter()
    maps = maps_row("maps", labeler, data, cell.recipe, quiet)
    seconds = time.perf_counter() - started
    cost = {
        name: training_cost(folder / name, cell.recipe[name.partition("-")[0]]["train"], len(data["train"]))
        for name in ("cam", "refiner", *_segmenters(cell))
        if (folder / name).is_dir()
    }
    if "num_images" in maps:
        cost["label_seconds_per_image"] = seconds / maps["num_images"]
    # A threshold that was found without masks is not looked for again.
    threshold = maps.get("background_threshold", cell.recipe["masks"]["background_threshold"])
    _save_examples(cell, data, labeler, cell.recipe["masks"] | {"background_threshold": threshold})
    record = {"settings": _settings(cell), "maps": maps, "results": results, "cost": cost}
    record["class_names"] = ["background", *class_names(data)]
    record["device"] = _device_name()
    write_atomically(folder / _CELL_FILE, json.dumps(record, indent=1))
    return record


def _segmenters(cell: Cell) -> list[str]:
    """The folders of a cell's segmenters, one per round."""
    rounds = cell.recipe["self_training"]["rounds"] if cell.segmenter else 0
    return ["segmenter", *(f"segmenter-{number}" for number in range(2, rounds + 1))][:rounds]


def _borrow_cam(cell: Cell, cams: Sequence[Path]) -> None:
    """Copy the classifier of a cell that differs in later stages only, from here or from other comparisons."""
    folder = Path(cell.folder)
    finished = None if (folder / "cam.partial").exists() else _finished_cam(cell, cams)
    if finished is None or finished == folder / "cam":
        return
    fresh = folder / "cam.copied"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(finished, fresh)
    settings = yaml.safe_load((fresh / SETTINGS_FILE).read_text()) | {"data": cell.source}  # its root as named here
    (fresh / SETTINGS_FILE).write_text(yaml.safe_dump(settings, sort_keys=False))
    os.replace(fresh, folder / "cam")


def _finished_cam(cell: Cell, cams: Sequence[Path]) -> Path | None:
    """The cell's own classifier, or one whose recipe, seed and data are the same."""
    own = Path(cell.folder) / "cam"
    if own.exists():
        return own
    wanted = _with_full_root(json.loads(json.dumps(cell.recipe | {"stage": "train-cam", "data": cell.source})))
    for folder in (own.parents[3], *cams):
        for other in _held_cams(folder):
            held = _with_full_root(yaml.safe_load((other / SETTINGS_FILE).read_text()))
            if all(key in wanted and wanted[key] == value for key, value in held.items()):
                return other
    return None


def _held_cams(folder: Path) -> Iterator[Path]:
    """The CAM classifiers below `folder` whose training was finished."""
    return (file.parent for file in sorted(folder.glob(f"**/cam/{SETTINGS_FILE}")))


def _with_full_root(settings: dict) -> dict:
    """A stage's settings, the folder of the data as an absolute path: the same folder may be named in two ways."""
    data = settings["data"]
    root = {"root": str(Path(data["root"]).resolve())} if data and "root" in data else {}
    return settings | {"data": data and data | root}


def training_cost(model: Path, settings: dict, num_images: int) -> dict:
    """`seconds_per_step` and `minutes` of the training that a model folder's log speaks of; {} without a log.

    Args:
        settings: the recipe's `train` section.
        num_images: size of split "train".
    """
    log = model / LOG_FILE
    if not log.is_file():
        return {}
    rates = [record["images_per_second"] for record in json.loads(log.read_text())]
    batch = min(settings["batch_size"], num_images)
    per_epoch = num_images // batch
    total = settings["steps"] or per_epoch * len(rates)
    steps = [min(per_epoch, total - per_epoch * epoch) for epoch in range(len(rates))]  # the last may be a part
    seconds = sum(count * batch / rate for count, rate in zip(steps, rates, strict=True))
    return {"seconds_per_step": seconds / sum(steps), "minutes": seconds / 60}


def _settings(cell: Cell) -> dict:
    return {key: value for key, value in asdict(cell).items() if key != "folder"}


def _finished(cell: Cell) -> dict | None:
    """The record of a cell that is done.

    Raises:
        OutputError: its folder holds one of other settings.
    """
    file = Path(cell.folder) / _CELL_FILE
    if not file.is_file():
        return None
    record = json.loads(file.read_text())
    difference = first_difference(record["settings"], json.loads(json.dumps(_settings(cell))))
    if difference:
        raise OutputError(f"{cell.folder} holds another cell ({difference}); take another --out or name of the row")
    return record


@lru_cache(maxsize=1)
def _load(source: str, hub_kwargs: str, quiet: bool) -> DatasetDict:
    """The data set, the same for all seeds: what `limit` draws depends on no cell."""
    return load_data(**json.loads(source), **json.loads(hub_kwargs), quiet=quiet)


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


def _save_examples(cell: Cell, data: DatasetDict, labeler: Path, masks: dict) -> None:
    """The masks of the example images: the segmenter's, or those made of the maps; `examples/<number>.png`."""
    folder = Path(cell.folder)
    rows = _example_rows(data, cell.recipe["evaluation"]["examples"])
    (folder / "examples").mkdir(exist_ok=True)
    device = PartialState().device
    if not cell.segmenter:
        model, processor = load_labeler(str(labeler), device)
        masks = with_threshold(model, processor, data["train"], masks)
        for labelled in label_images(model, processor, rows, masks):
            save_mask_png(folder / "examples" / f"{labelled.index}.png", labelled.pseudo_mask)
        return
    model, processor = load_segmenter(str(folder / _segmenters(cell)[-1]), device)
    for segmented in segment_images(model, processor, rows, cell.recipe["evaluation"]):
        save_mask_png(folder / "examples" / f"{segmented.index}.png", segmented.labels)


def _examples(out: Path, records: Sequence[dict], hub_kwargs: dict, quiet: bool) -> list[ReportExample]:
    """The example images of one data set with the masks of every row's first seed."""
    settings = records[0]["settings"]
    data = _load(json.dumps(settings["source"]), json.dumps(hub_kwargs), quiet)
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


def _write_results(out: Path, records: Sequence[dict], hub_kwargs: dict, quiet: bool) -> dict:
    rows = summarize(records)
    results = {"rows": rows, "cells": list(records)}
    if not records:
        return results
    write_atomically(out / "results.json", json.dumps(results, indent=1))
    write_atomically(out / "comparison.md", comparison_markdown(rows))
    by_data: dict[str, list[dict]] = {}
    for record in records:
        by_data.setdefault(record["settings"]["data"], []).append(record)
    for name, part in by_data.items():
        page = "comparison.html" if len(by_data) == 1 else f"comparison-{name}.html"
        shown = [row for row in rows if row["data"] == name]
        write_comparison(out / page, name, shown, _examples(out, part, hub_kwargs, quiet), part[0]["class_names"])
    return results
