"""The command line: `wsss STAGE …`."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import logging as datasets_logging
from datasets.utils import disable_progress_bars as disable_datasets_progress
from huggingface_hub.utils import logging as hub_logging
from transformers import logging as transformers_logging

from ..metrics.errors import gap_markdown
from ..recipes import RecipeError
from ..reporting.comparison import print_comparison
from ..reporting.tables import print_table
from ..stages.cache import write_atomically
from ..stages.compare import CompareError
from ..stages.compare import compare as run_compare
from ..stages.demo import demo as run_demo
from ..stages.evaluate import evaluate_files
from ..stages.make_masks import check_exports, export_masks
from ..stages.make_masks import make_masks as run_make_masks
from ..stages.plan import read_plan, with_data_options
from ..stages.predict_masks import predict_masks
from ..stages.run import COLUMNS, has_masks, maps_row, masks_row, needs_masks, segmenter_gap, segmenter_row
from ..stages.run import run as run_all
from ..stages.train_cam import train_cam as run_train_cam
from ..stages.train_refiner import train_refiner as run_train_refiner
from ..stages.train_segmenter import train_segmenter as run_train_segmenter
from ..training.loop import TrainingError
from .hub import convert, export_onnx, push, push_metric
from .launch import keep_freed_memory, keep_kernels, start_missing_processes
from .options import (
    BackboneName,
    CacheDir,
    Classes,
    Columns,
    Inputs,
    Limit,
    Out,
    Quiet,
    RecipeName,
    Revision,
    Root,
    Set,
    Token,
    data_settings,
    integers,
    load_inputs,
    with_inputs,
)

DETAILS = ["result", "boundary_f", "mean_precision", "mean_recall", "false_positive_share", "false_negative_share"]

app = typer.Typer(
    help="Image tags in, segmentation model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def demo(out: Out = Path("runs/demo"), recipe: RecipeName = "toy", changes: Set = None, quiet: Quiet = False):
    """The whole way on generated images, in minutes, with plain CAM and full supervision for scale."""
    inputs = load_inputs("toy", recipe=recipe, changes=changes)
    run_demo(inputs.data, inputs.recipe, out, inputs.settings, quiet)


@app.command()
@with_inputs
def run(
    inputs: Inputs,
    out: Out,
    rounds: Annotated[
        int | None,
        typer.Option(help="Segmenters trained one after the other, each on what the last one says (self-training)."),
    ] = None,
    quiet: Quiet = False,
):
    """All stages in order: train-cam, train-refiner if refiner.use, make-masks, train-segmenter, evaluate, report."""
    recipe = inputs.recipe
    if rounds is not None:
        if rounds < 1:
            raise RecipeError(f"--rounds {rounds}: 1 or more would be right")
        recipe["self_training"]["rounds"] = rounds
    run_all(inputs.data, recipe, out, inputs.settings, inputs.hub_kwargs, quiet)


@app.command()
@with_inputs
def train_cam(inputs: Inputs, out: Out, quiet: Quiet = False):
    """Tagged images → CAM classifier."""
    run_train_cam(inputs.data, inputs.recipe, out, inputs.settings, inputs.hub_kwargs, quiet)


@app.command()
@with_inputs
def train_refiner(
    inputs: Inputs,
    cam: Annotated[str, typer.Argument(help="A trained CAM classifier, directory or Hub id (ID@REVISION).")],
    out: Out,
    quiet: Quiet = False,
):
    """Tagged images and a CAM classifier → map refiner, which can take its place in make-masks."""
    run_train_refiner(inputs.data, cam, inputs.recipe, out, inputs.settings, inputs.hub_kwargs, quiet)


@app.command()
@with_inputs
def make_masks(
    inputs: Inputs,
    cam: Annotated[str, typer.Option(help="A trained CAM classifier, directory or Hub id (ID@REVISION).")],
    out: Out,
    export_voc: Annotated[
        Path | None, typer.Option(help="Folder: also write palette PNGs in the layout of a VOC devkit.")
    ] = None,
    export_coco: Annotated[Path | None, typer.Option(help="File: also write COCO-JSON, run-length encoded.")] = None,
    quiet: Quiet = False,
):
    """Tagged images and a CAM classifier → the data set with a column pseudo_mask."""
    check_exports(export_voc, export_coco)
    masks = run_make_masks(inputs.data, cam, inputs.recipe, out, inputs.settings, inputs.hub_kwargs, quiet)
    export_masks(masks, export_voc, export_coco)


@app.command()
@with_inputs
def train_segmenter(
    inputs: Inputs,
    out: Out,
    cam: Annotated[str | None, typer.Option(help="CAM classifier to start from (segmenter.from_cam).")] = None,
    supervised: Annotated[bool, typer.Option("--supervised", help="Train on TRUE masks: the upper bound.")] = False,
    quiet: Quiet = False,
):
    """Images with pseudo masks → segmenter."""
    column = "mask" if supervised else "pseudo_mask"
    run_train_segmenter(inputs.data, inputs.recipe, out, column, cam, inputs.settings, inputs.hub_kwargs, quiet)


@app.command()
@with_inputs
def evaluate(
    inputs: Inputs,
    model: Annotated[str | None, typer.Option(help="A segmenter, held against split val.")] = None,
    cam: Annotated[str | None, typer.Option(help="A CAM classifier, its masks held against split train.")] = None,
    against: Annotated[
        str | None, typer.Option(help="A second segmenter: what lies between it and --model, by kinds of errors.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="A folder of label maps IMAGE_ID.png, held against split val (or --split).")
    ] = None,
    model_revision: Annotated[
        str | None, typer.Option(help="Revision of --model or --cam, if it comes from the Hub.")
    ] = None,
    split: Annotated[str, typer.Option(help="train | val: what --model and --masks are held against.")] = "val",
    all_masks: Annotated[  # acts where the data are loaded
        bool,
        typer.Option("--all-masks", help="Read the true masks of all training images, as COCO and VOC have them."),
    ] = False,
    scales: Annotated[str | None, typer.Option(help="Test scales 0.5,1.0,1.5; as evaluation.scales.")] = None,
    window: Annotated[int | None, typer.Option(help="Sliding window, pixels; as evaluation.window.")] = None,
    crf: Annotated[bool, typer.Option("--crf", help="Dense CRF at the end; as evaluation.refine=[crf].")] = False,
    save_masks: Annotated[
        Path | None, typer.Option(help="Folder: also write the segmenter's label maps as palette PNGs.")
    ] = None,
    voc_archive: Annotated[
        Path | None, typer.Option(help="File .tgz or .tar: also write what VOC's test server takes.")
    ] = None,
    export_coco: Annotated[Path | None, typer.Option(help="File: also write COCO-JSON, run-length encoded.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File: also write all figures.")] = None,
    quiet: Quiet = False,
):
    """Hold pseudo masks, a segmenter (--model), a CAM classifier (--cam) or a folder of PNGs against true masks."""
    settings = _test_protocol(inputs.recipe["evaluation"], scales, window, crf)
    files = {"voc_archive": voc_archive, "coco": export_coco}
    exports = save_masks is not None or any(files.values())
    common = {"quiet": quiet, "hub_kwargs": inputs.hub_kwargs}
    if model_revision is not None:
        common["hub_kwargs"] = inputs.hub_kwargs | {"revision": model_revision}
    if exports and (model is None or save_masks is None):
        raise RecipeError("--voc-archive and --export-coco go with --model and --save-masks, the folder of the PNGs")
    if against is not None and (model is None or exports):
        raise RecipeError("--against goes with --model, without files to write but --json")
    rows, gap = [], None
    if cam is not None:
        needs_masks(inputs.data, "train")
        rows.append(maps_row(f"masks of {cam}", cam, inputs.data, inputs.recipe, **common))
    if model is not None and exports:
        if split not in inputs.data:
            raise RecipeError(f"--split {split}: the data have {', '.join(inputs.data)}")
        predict_masks(model, inputs.data[split], settings, save_masks, **files, **common)
        if has_masks(inputs.data, split):
            figures = evaluate_files(save_masks, inputs.data[split], quiet)
            rows.append({"result": f"segmenter {model}", "split": split, "of": Path(model).name} | figures)
    elif against is not None:
        needs_masks(inputs.data, split)
        gap = segmenter_gap(model, against, inputs.data[split], settings, **common)
    elif model is not None:
        needs_masks(inputs.data, split)
        recipe = inputs.recipe | {"evaluation": settings}
        rows.append(segmenter_row(f"segmenter {model}", model, inputs.data, recipe, split=split, **common))
    if masks is not None:
        needs_masks(inputs.data, split)
        figures = evaluate_files(masks, inputs.data[split], quiet)
        rows.append({"result": f"files in {masks}", "split": split, "of": masks.name} | figures)
    if cam is None and model is None and masks is None:
        needs_masks(inputs.data, "train")
        rows.append(masks_row(f"pseudo masks of {inputs.settings['source']}", inputs.data, quiet))
    if PartialState().is_main_process:
        if rows:
            print_table(rows, "Results (percent)", columns=COLUMNS)
            print_table(rows, "Boundaries, over- and under-activation (percent)", columns=DETAILS)
            per_class = [{"class": n} | {r["result"]: r["iou"].get(n) for r in rows} for n in rows[0]["iou"]]
            print_table(per_class, "IoU per class (percent)")
        if gap is not None:
            print(gap_markdown(gap, model, against))
        if json_file is not None:
            written = {"data": inputs.settings, "results": rows} | ({} if gap is None else {"gap": gap})
            write_atomically(json_file, json.dumps(written, indent=1))


def _test_protocol(settings: dict, scales: str | None, window: int | None, crf: bool) -> dict:
    """The `evaluation` section of a recipe, changed by the options of `wsss evaluate`."""
    changed = dict(settings)
    if scales is not None:
        try:
            changed["scales"] = [float(scale) for scale in scales.split(",")]
        except ValueError:
            changed["scales"] = []
        if not changed["scales"] or min(changed["scales"]) <= 0:
            raise RecipeError(f"--scales {scales}: positive numbers a,b,c would be right")
    if window is not None:
        if window < 0:
            raise RecipeError(f"--window {window}: pixels, or 0, would be right")
        changed["window"] = window
    if crf and not any("crf" in step for step in settings["refine"]):
        changed["refine"] = [*settings["refine"], "crf"]
    return changed


@app.command()
def compare(
    out: Out,
    plan: Annotated[
        Path | None, typer.Argument(help="YAML: rows, seeds, data, recipe, set, segmenter; options below win.")
    ] = None,
    recipes: Annotated[str | None, typer.Option(help="Recipes a,b,c as rows, instead of a plan.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds 0,1,2 of every row.")] = None,
    segmenter: Annotated[
        bool, typer.Option("--segmenter", help="Whole runs, not only CAM classifiers and their maps.")
    ] = False,
    cams: Annotated[
        list[Path] | None,
        typer.Option(help="Another comparison (or several): its CAM classifiers of the same recipe, seed and data."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="So many at the same time; without it, one per GPU.", show_default=False)
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--data", help="Instead of the plan's data; without it, what follows changes them.", rich_help_panel="Data"
        ),
    ] = None,
    root: Root = None,
    classes: Classes = None,
    columns: Columns = None,
    limit: Limit = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    recipe: RecipeName = None,
    changes: Set = None,
    backbone: BackboneName = None,
    quiet: Quiet = False,
):
    """Methods x seeds x data under one condition → table, plots and pictures side by side."""
    wanted = read_plan(plan) if plan is not None else {}
    if recipes is not None:
        wanted["rows"] = [name.strip() for name in recipes.split(",")]
    if seeds is not None:
        wanted["seeds"] = integers("--seeds", seeds)
    if segmenter:
        wanted["segmenter"] = True
    named = data_settings(source, root, classes, columns, limit, revision)
    named = {key: value for key, value in named.items() if value is not None}
    if source is not None:
        wanted["data"] = named
    elif named:
        wanted = with_data_options(wanted, named)
    if recipe is not None:
        wanted["recipe"] = recipe
    bodies = [f"{part}.backbone={json.dumps(backbone)}" for part in ("cam", "segmenter")] if backbone else []
    if bodies or changes:
        held = wanted.get("set") or []
        held = [f"{key}={json.dumps(value)}" for key, value in held.items()] if isinstance(held, dict) else held
        wanted["set"] = [*held, *bodies, *(changes or [])]
    hub_kwargs = {"token": token, "cache_dir": None if cache_dir is None else str(cache_dir)}
    given = {key: value for key, value in hub_kwargs.items() if value is not None}
    results = run_compare(wanted, out, given, jobs, quiet, cams or [])
    print_comparison(results["rows"])
    if not quiet:
        print(f"tables, plots and pictures: {out}/comparison.md, {out}/comparison*.html, {out}/results.json")


for _command in (convert, push, push_metric, export_onnx):
    app.command()(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user can mend is one line on standard error and exit status 1."""
    start_missing_processes()
    keep_freed_memory()
    keep_kernels()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    disable_datasets_progress()
    hub_logging.set_verbosity_error()
    # Whoever asks first decides whether there are other processes, and a bare PartialState() ignores this flag.
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    try:
        app(args=arguments)
    except (ValueError, OSError, ImportError, TrainingError, CompareError) as error:  # a library that is missing, too
        if os.environ.get("WSSS_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
    finally:
        # The threads of the process group must not outlive the interpreter, nor may a model in training be the last
        # to hold the group: it would wait for the threads under the lock that they wait for.
        if PartialState().use_distributed:
            gc.collect()
            PartialState().destroy_process_group()
    sys.exit(1)  # an error, and no longer with its frames; without one `app` has raised SystemExit


if __name__ == "__main__":
    main()
