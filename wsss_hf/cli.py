"""The command line: `wsss STAGE …`."""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import DatasetDict
from datasets import logging as datasets_logging
from datasets.utils import disable_progress_bars as disable_datasets_progress
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig
from transformers import logging as transformers_logging

from .data.sources import load_data
from .evaluation.comparison import print_comparison
from .evaluation.evaluate import evaluate_files
from .evaluation.gap import gap_markdown
from .evaluation.tables import print_table
from .hub.convert import KINDS, convert_checkpoint
from .hub.export import export_onnx as run_export_onnx
from .hub.push import METRICS, Pushed, push_dataset, push_model
from .hub.push import push_metric as run_push_metric
from .launch import keep_freed_memory, start_missing_processes
from .stages.compare import CompareError, read_plan, with_data_options
from .stages.compare import compare as run_compare
from .stages.demo import demo as run_demo
from .stages.make_masks import check_exports, export_masks
from .stages.make_masks import make_masks as run_make_masks
from .stages.outputs import write_atomically
from .stages.predict_masks import predict_masks
from .stages.run import COLUMNS, has_masks, maps_row, masks_row, needs_masks, segmenter_gap, segmenter_row
from .stages.run import run as run_all
from .stages.train_cam import train_cam as run_train_cam
from .stages.train_refiner import train_refiner as run_train_refiner
from .stages.train_segmenter import train_segmenter as run_train_segmenter
from .training.loop import TrainingError
from .training.recipes import RecipeError, load_recipe, recipe_names

DETAILS = ["result", "boundary_f", "mean_precision", "mean_recall", "false_positive_share", "false_negative_share"]

app = typer.Typer(
    help="Image tags in, segmentation model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str,
    typer.Option(
        "--data",
        help="toy | voc | coco | a folder of tagged images | a saved data set | a Hub id.",
        rich_help_panel="Data",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(
        help="For --data voc, the VOC2012 folder of a devkit; for --data coco, the one above train2017.",
        rich_help_panel="Data",
    ),
]
Classes = Annotated[
    str | None, typer.Option(help="Class names a,b,c: restrict to these, in this order.", rich_help_panel="Data")
]
Columns = Annotated[
    str | None,
    typer.Option(help="Names of our columns in your data: image=img,tags=labels.", rich_help_panel="Data"),
]
Limit = Annotated[int | None, typer.Option(help="At most so many images per split.", rich_help_panel="Data")]
Revision = Annotated[str | None, typer.Option(help="Revision of data from the Hub.", rich_help_panel="Data")]
Token = Annotated[
    str | None, typer.Option(help="Hub token.", envvar="HF_TOKEN", show_envvar=True, rich_help_panel="Data")
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where Hub downloads and COCO's masks are kept.", rich_help_panel="Data")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", help=f"{' | '.join(recipe_names())} | a YAML file; several as a+b.", rich_help_panel="Recipe"
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: cam.train.epochs=3.", rich_help_panel="Recipe")
]
BackboneName = Annotated[
    str | None, typer.Option("--backbone", help="Directory or Hub id of the backbone.", rich_help_panel="Recipe")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the recipe.", rich_help_panel="Recipe")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; must not hold something else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, for logs.")]


@dataclass
class Inputs:
    """Data and recipe as the options of a command name them.

    Attributes:
        data: the checked data set.
        recipe: the resolved recipe.
        settings: what `data` is, for the record; no token is in it.
        hub_kwargs: `token` and `cache_dir` for models from the Hub (a revision speaks of the data).
    """

    data: DatasetDict
    recipe: dict
    settings: dict
    hub_kwargs: dict


def _load_inputs(
    source: Source,
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
    seed: Seed = None,
    masks: str = "evaluation",
    quiet: bool = False,
) -> Inputs:
    resolved = load_recipe(recipe or ("toy" if source == "toy" else "default"), changes or [])
    if backbone is not None:
        resolved["cam"]["backbone"] = resolved["segmenter"]["backbone"] = backbone
    if seed is not None:
        resolved["seed"] = seed
    settings = _data_settings(source, root, classes, columns, limit, revision)
    hub_kwargs = {"token": token, "cache_dir": None if cache_dir is None else str(cache_dir)}
    toy = resolved["toy"] if source == "toy" else None
    data = load_data(**settings, **hub_kwargs, seed=resolved["seed"], masks=masks, toy=toy, quiet=quiet)
    if toy is not None:
        settings["toy"] = toy
    return Inputs(
        data=data,
        recipe=resolved,
        settings={key: value for key, value in settings.items() if value is not None},
        hub_kwargs={key: value for key, value in hub_kwargs.items() if value is not None},
    )


def _data_settings(source, root, classes, columns, limit, revision) -> dict:
    """The options that name data as arguments of `load_data`."""
    return {
        "source": source,
        "root": None if root is None else str(root),
        "classes": None if classes is None else [name.strip() for name in classes.split(",")],
        "columns": None if columns is None else _pairs(columns),
        "limit": limit,
        "revision": revision,
    }


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and equals and theirs for ours, equals, theirs in pairs):
        raise RecipeError(f"--columns {text}: ours=theirs pairs would be right, for example image=img,tags=labels")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _integers(option: str, text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise RecipeError(f"{option} {text}: whole numbers a,b,c would be right")
    return [int(part) for part in text.split(",")]


def _with_inputs(command: Callable) -> Callable:
    """A command whose first parameter, `inputs`, becomes the options of `_load_inputs`."""
    shared = [p for p in inspect.signature(_load_inputs).parameters.values() if p.name not in ("masks", "quiet")]
    own = list(inspect.signature(command).parameters.values())[1:]
    names = [parameter.name for parameter in shared]

    @functools.wraps(command)
    def wrapper(**options):
        shared_options = {name: options.pop(name) for name in names}
        # Only the supervised upper bound and, if asked to, the evaluation may see the masks of all training images.
        masks = "all" if options.get("supervised") or options.get("all_masks") else "evaluation"
        quiet = options["quiet"] or not PartialState().is_main_process
        command(_load_inputs(**shared_options, masks=masks, quiet=quiet), **options)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
    wrapper.__signature__ = inspect.Signature(parameters)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


@app.command()
def demo(out: Out = Path("runs/demo"), recipe: RecipeName = "toy", changes: Set = None, quiet: Quiet = False):
    """The whole way on generated images, in minutes, with plain CAM and full supervision for scale."""
    inputs = _load_inputs("toy", recipe=recipe, changes=changes)
    run_demo(inputs.data, inputs.recipe, out, inputs.settings, quiet)


@app.command()
@_with_inputs
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
@_with_inputs
def train_cam(inputs: Inputs, out: Out, quiet: Quiet = False):
    """Tagged images → CAM classifier."""
    run_train_cam(inputs.data, inputs.recipe, out, inputs.settings, inputs.hub_kwargs, quiet)


@app.command()
@_with_inputs
def train_refiner(
    inputs: Inputs,
    cam: Annotated[str, typer.Argument(help="A trained CAM classifier, directory or Hub id.")],
    out: Out,
    quiet: Quiet = False,
):
    """Tagged images and a CAM classifier → map refiner, which can take its place in make-masks."""
    run_train_refiner(inputs.data, cam, inputs.recipe, out, inputs.settings, inputs.hub_kwargs, quiet)


@app.command()
@_with_inputs
def make_masks(
    inputs: Inputs,
    cam: Annotated[str, typer.Option(help="A trained CAM classifier, directory or Hub id.")],
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
@_with_inputs
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
@_with_inputs
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
        wanted["seeds"] = _integers("--seeds", seeds)
    if segmenter:
        wanted["segmenter"] = True
    named = _data_settings(source, root, classes, columns, limit, revision)
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


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A released checkpoint: .safetensors, .pth, .pt or .bin.")],
    out: Annotated[Path, typer.Option("--to", help="Folder to write; must not hold anything.")],
    classes: Annotated[str | None, typer.Option(help="Names a,b,c of its classes; those of VOC without it.")] = None,
    drs_delta: Annotated[float | None, typer.Option(help="Fixed DRS that a classifier was trained with.")] = None,
    extra_channels: Annotated[
        str | None, typer.Option(help="New 3x3 convolutions on an ImageNet VGG-16: 512,512,512.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--as", help=f"{' | '.join(KINDS)}: what a DRS file without controllers is; the first without it."
        ),
    ] = None,
):
    """ImageNet VGG-16 and Wide ResNet-38, and what DRS, SEAM and PLDA released → our models."""
    names = None if classes is None else [name.strip() for name in classes.split(",")]
    widths = None if extra_channels is None else _integers("--extra-channels", extra_channels)
    converted = convert_checkpoint(file, out, names, drs_delta, widths, kind)
    print(f"{converted}: {AutoConfig.from_pretrained(converted).converted_from}")


@app.command()
def push(
    source: Annotated[Path, typer.Argument(help="A run's folder (its segmenter is meant), or that of a model.")],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="Where to: owner/name, or a name of your own.")],
    dataset: Annotated[bool, typer.Option("--dataset", help="Push the pseudo masks with their images.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see the new repository.")] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="Branch to push to; main without it.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Its licence as the Hub knows it: apache-2.0, cc-by-4.0 …")
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Show the run's example images on a model's card.")
    ] = True,
    token: Token = None,
):
    """A trained model, or pseudo masks → the Hub, with a card, in one commit."""
    if dataset:
        pushed = push_dataset(source, repo_id, private, branch, token, licence)
    else:
        pushed = push_model(source, repo_id, private, branch, token, licence, pictures)
    _print_pushed(pushed)


@app.command()
def push_metric(
    name: Annotated[str, typer.Argument(help=" | ".join(METRICS))],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="Where to: owner/name, or a name of your own.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see the new repository.")] = False,
    token: Token = None,
):
    """A metric → the Hub, as a Space that evaluate.load finds."""
    _print_pushed(run_push_metric(name, repo_id, private, token=token))


def _print_pushed(pushed: Pushed) -> None:
    print(f"{pushed.url} {'is now at' if pushed.changed else 'holds all of it already,'} commit {pushed.commit[:12]}")


@app.command()
def export_onnx(
    model: Annotated[str, typer.Argument(help="A model's folder or Hub id.")],
    out: Annotated[Path, typer.Option("--to", help="Folder to write; must not hold anything.")],
    size: Annotated[int | None, typer.Option(help="Only for squares of so many pixels.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also with its weights as 8-bit integers.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the model, if it comes from the Hub.")] = None,
    token: Token = None,
    cache_dir: CacheDir = None,
):
    """A trained model → ONNX, for any number of images of any size."""
    hub_kwargs = {"revision": revision, "token": token, "cache_dir": cache_dir}
    given = {key: value for key, value in hub_kwargs.items() if value is not None}
    print(
        f"{run_export_onnx(model, out, size, int8, **given)}: {', '.join(path.name for path in sorted(out.iterdir()))}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user can mend is one line on standard error and exit status 1."""
    start_missing_processes()
    keep_freed_memory()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    disable_datasets_progress()
    hub_logging.set_verbosity_error()
    # Whoever asks first decides whether there are other processes, and a bare PartialState() ignores this flag.
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    try:
        app(args=arguments)
    except (ValueError, OSError, TrainingError, CompareError) as error:
        if os.environ.get("WSSS_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
