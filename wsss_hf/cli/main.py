"""The command line: `wsss STAGE …`. A command is parsing and one call of the Python API of the same name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..version import __version__
from .hub import convert, export_onnx, push, push_metric
from .launch import run_app
from .options import (
    BackboneName,
    CacheDir,
    Classes,
    Columns,
    ExportCoco,
    Force,
    Inputs,
    Limit,
    Out,
    Quiet,
    RecipeName,
    Revision,
    Root,
    SaliencyMaps,
    Seed,
    Separator,
    Set,
    Token,
    data_options,
    file_to_write,
    folder_to_write,
    integers,
    load_inputs,
    numbers,
    prepare,
    set_hub_environment,
    with_inputs,
)

DETAILS = ["result", "boundary_f", "mean_precision", "mean_recall", "false_positive_share", "false_negative_share"]

Affinity = Annotated[
    str | None, typer.Option(help="Affinity network (directory or Hub id) of train-affinity, for the walks of refine.")
]

EmbedImages = Annotated[
    bool,
    typer.Option("--embed-images", help="Copy image files into the data set, which otherwise names where they are."),
]

app = typer.Typer(
    help="Image tags in, segmentation model out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"wsss_hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    recipe: RecipeName = "toy",
    changes: Set = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """All stages on generated images, in minutes, with plain CAM and full supervision for scale."""
    from ..stages.demo import demo

    prepare(quiet)
    inputs = load_inputs("toy", recipe=recipe, changes=changes)
    demo(inputs.data, inputs.recipe, out, force=force)


@app.command()
@with_inputs
def run(
    inputs: Inputs,
    out: Out,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds of self-training: segmenters trained one after the other.")
    ] = None,
    embed_images: EmbedImages = False,
    force: Force = False,
) -> None:
    """All stages in order: train-cam, train-refiner and train-affinity where the recipe has them, make-masks,
    train-segmenter, evaluate, report."""
    from ..stages.run import run

    recipe = inputs.recipe if rounds is None else inputs.recipe.changed(f"self_training.rounds={rounds}")
    run(inputs.data, recipe, out, embed_images=embed_images, force=force)


@app.command()
@with_inputs
def add_saliency(
    inputs: Inputs,
    out: Out,
    model: Annotated[
        str | None,
        typer.Option(help="A network: an ONNX file, or a folder or Hub id (ID@REVISION) of ONNX or transformers."),
    ] = None,
    spectral: Annotated[
        str | None,
        typer.Option(help="Instead, a backbone (directory or Hub id): normalised cut on its features, no masks."),
    ] = None,
    learnt_from: Annotated[
        str | None, typer.Option(help="The labels that --model has learnt from, in words, for records and cards.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that --model brings; read it first.")
    ] = False,
    size: Annotated[int | None, typer.Option(help="Input in pixels: side (--model), short side (--spectral).")] = None,
    mean: Annotated[str | None, typer.Option(help="Of --model, per channel: 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, typer.Option(help="Of --model, as --mean.")] = None,
    letterbox: Annotated[
        bool | None, typer.Option("--letterbox", help="Of --model: pad images to a square instead of stretching them.")
    ] = None,
    resample: Annotated[str | None, typer.Option(help="Of --model: area | bilinear | bicubic | lanczos.")] = None,
    activation: Annotated[
        str | None, typer.Option(help="Of --model's output: auto | sigmoid | none | min_max.")
    ] = None,
    output: Annotated[int | None, typer.Option(help="Which output of --model is the map, from 0.")] = None,
    file: Annotated[str | None, typer.Option(help="Which ONNX file of --model.")] = None,
    stage: Annotated[int | None, typer.Option(help="Of --spectral: whose features; -1 is the last.")] = None,
    tau: Annotated[float | None, typer.Option(help="Of --spectral: threshold of the cosines.")] = None,
    center: Annotated[
        bool | None,
        typer.Option(
            "--center/--no-center",
            help="Of --spectral: subtract the image's mean feature; default: on convolutional backbones.",
        ),
    ] = None,
    refine: Annotated[
        bool | None, typer.Option("--refine", help="Of --spectral: let maps follow the colours (PAMR).")
    ] = None,
    output_stride: Annotated[int | None, typer.Option(help="Of --spectral, in pixels.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images that are computed together.")] = None,
    force: Force = False,
) -> None:
    """Images → the data set with a column saliency in every split: from a network, or without one (--spectral)."""
    from ..stages.add_saliency import add_saliency

    given = {
        "size": size,
        "mean": None if mean is None else mean.split(","),
        "std": None if std is None else std.split(","),
        "letterbox": letterbox,
        "resample": resample,
        "activation": activation,
        "output": output,
        "file": file,
        "stage": stage,
        "tau": tau,
        "center": center,
        "refine": refine,
        "output_stride": output_stride,
        "batch_size": batch_size,
    }
    add_saliency(
        inputs.data,
        out,
        model=model,
        spectral=spectral,
        settings={name: value for name, value in given.items() if value is not None},
        learnt_from=learnt_from,
        trust_remote_code=trust_remote_code,
        force=force,
    )


@app.command()
@with_inputs
def train_cam(inputs: Inputs, out: Out, force: Force = False) -> None:
    """Tagged images → CAM classifier."""
    from ..stages.train_cam import train_cam

    train_cam(inputs.data, inputs.recipe, out, force=force)


@app.command()
@with_inputs
def train_refiner(
    inputs: Inputs,
    cam: Annotated[str, typer.Argument(help="A trained CAM classifier, directory or Hub id (ID@REVISION).")],
    out: Out,
    force: Force = False,
) -> None:
    """Tagged images and a CAM classifier → map refiner, which can take its place in make-masks."""
    from ..stages.train_refiner import train_refiner

    train_refiner(inputs.data, cam, inputs.recipe, out, force=force)


@app.command()
@with_inputs
def train_affinity(
    inputs: Inputs,
    cam: Annotated[str, typer.Option(help="A trained CAM classifier, directory or Hub id (ID@REVISION).")],
    out: Out,
    force: Force = False,
) -> None:
    """Tagged images and a CAM classifier → affinity network, for masks.refine=[walk] in make-masks."""
    from ..stages.train_affinity import train_affinity

    train_affinity(inputs.data, cam, inputs.recipe, out, force=force)


@app.command()
@with_inputs
def make_masks(
    inputs: Inputs,
    cam: Annotated[str, typer.Option(help="A trained CAM classifier, directory or Hub id (ID@REVISION).")],
    out: Out,
    affinity: Affinity = None,
    export_voc: Annotated[
        Path | None,
        typer.Option(callback=folder_to_write, help="Folder: also write palette PNGs in the layout of a VOC devkit."),
    ] = None,
    export_coco: ExportCoco = None,
    embed_images: EmbedImages = False,
    force: Force = False,
) -> None:
    """Tagged images and a CAM classifier → the data set with a column pseudo_mask."""
    from ..stages.make_masks import check_exports, export_masks, make_masks

    check_exports(export_voc, export_coco)
    masks = make_masks(inputs.data, cam, inputs.recipe, out, affinity=affinity, embed_images=embed_images, force=force)
    export_masks(masks, export_voc, export_coco)


@app.command()
@with_inputs
def train_segmenter(
    inputs: Inputs,
    out: Out,
    cam: Annotated[str | None, typer.Option(help="CAM classifier to start from (segmenter.from_cam).")] = None,
    supervised: Annotated[bool, typer.Option("--supervised", help="Train on TRUE masks: the upper bound.")] = False,
    force: Force = False,
) -> None:
    """Images with pseudo masks → segmenter."""
    from ..stages.train_segmenter import train_segmenter

    column = "mask" if supervised else "pseudo_mask"
    train_segmenter(inputs.data, inputs.recipe, out, mask_column=column, cam=cam, force=force)


@app.command()
@with_inputs
def evaluate(
    inputs: Inputs,
    model: Annotated[str | None, typer.Option(help="A segmenter, measured on --split.")] = None,
    cam: Annotated[str | None, typer.Option(help="A CAM classifier, its masks measured on split train.")] = None,
    affinity: Affinity = None,
    against: Annotated[
        str | None, typer.Option(help="Compares two segmenters: the gap of --model to this one, by kind of error.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="A folder of label maps IMAGE_ID.png, measured on --split.")
    ] = None,
    model_revision: Annotated[str | None, typer.Option(help="Revision of --model or --cam on the Hub.")] = None,
    split: Annotated[str, typer.Option(help="train | val: what --model and --masks are measured on.")] = "val",
    all_masks: Annotated[  # acts where the data are loaded
        bool, typer.Option("--all-masks", help="Read the true masks of all training images of COCO and VOC.")
    ] = False,
    scales: Annotated[str | None, typer.Option(help="Test-time scales 0.5,1.0,1.5; as evaluation.scales.")] = None,
    window: Annotated[int | None, typer.Option(help="Sliding window, pixels; as evaluation.window.")] = None,
    crf: Annotated[bool, typer.Option("--crf", help="Dense CRF at the end; as evaluation.refine=[crf].")] = False,
    save_masks: Annotated[
        Path | None,
        typer.Option(callback=folder_to_write, help="Folder: also write the segmenter's label maps as palette PNGs."),
    ] = None,
    voc_archive: Annotated[
        Path | None,
        typer.Option(callback=file_to_write, help="File .tgz or .tar: also write what VOC's test server takes."),
    ] = None,
    export_coco: ExportCoco = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=file_to_write, help="File: also write all figures.")
    ] = None,
) -> None:
    """Figures of pseudo masks, a segmenter (--model), a CAM classifier (--cam) or a folder of PNGs (--masks)."""
    from accelerate import PartialState

    from ..reporting.error_analysis import errors_markdown
    from ..reporting.tables import RESULT_COLUMNS, print_table
    from ..stages.cache import write_atomically
    from ..stages.evaluate import evaluate

    recipe = inputs.recipe
    if scales is not None:
        recipe = recipe.changed(f"evaluation.scales={numbers('--scales', scales)}")
    if window is not None:
        recipe = recipe.changed(f"evaluation.window={window}")
    if crf and not any("crf" in step for step in recipe.evaluation.refine):
        recipe = recipe.changed(f"evaluation.refine={json.dumps([*recipe.evaluation.refine, 'crf'])}")
    found = evaluate(
        inputs.data,
        recipe,
        cam=_pinned(cam, model_revision),
        affinity=affinity,
        segmenter=_pinned(model, model_revision),
        against=against,
        masks=masks,
        split=split,
        save_masks=save_masks,
        voc_archive=voc_archive,
        export_coco=export_coco,
    )
    if not PartialState().is_main_process:
        return
    rows = found.results
    if rows:
        print_table(rows, "Results (percent)", columns=RESULT_COLUMNS)
        print_table(rows, "Boundaries, over- and under-activation (percent)", columns=DETAILS)
        per_class = [{"class": n} | {r["result"]: r["iou"].get(n) for r in rows} for n in rows[0]["iou"]]
        print_table(per_class, "IoU per class (percent)")
    if found.gap is not None:
        print(errors_markdown(found.gap, str(model), str(against)))
    if json_file is not None:
        written = {"data": found.data, "results": rows} | ({} if found.gap is None else {"gap": found.gap})
        write_atomically(json_file, json.dumps(written, indent=1))


def _pinned(name: str | None, revision: str | None) -> str | None:
    return name if name is None or revision is None else f"{name}@{revision}"


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(help="Files, folders, or patterns in quotes, as `photos/*/*.jpg`.")],
    model: Annotated[
        str,
        typer.Option(
            help="A segmenter, also of transformers, or a CAM classifier: directory or Hub id (ID@REVISION)."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", callback=folder_to_write, help="Output folder: new, or one of predict; what is there is kept."
        ),
    ],
    tags: Annotated[
        str | None, typer.Option(help="Classes a,b that are in every image; default: those the model finds.")
    ] = None,
    scales: Annotated[str, typer.Option(help="Test-time scales 0.5,1.0,1.5.")] = "1.0",
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Also average with the mirror image.")] = True,
    window: Annotated[int, typer.Option(help="Side of a sliding window, pixels; 0 takes whole images.")] = 0,
    crf: Annotated[bool, typer.Option("--crf", help="Dense CRF at the end.")] = False,
    workers: Annotated[int, typer.Option(help="Processes for the CRF.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images of one size that are labelled together.")] = 16,
    overlays: Annotated[bool, typer.Option("--overlays/--no-overlays", help="Draw the objects on the images.")] = True,
    coco: Annotated[bool, typer.Option("--coco", help="Also write predictions.coco.json.")] = False,
    token: Token = None,
    cache_dir: CacheDir = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Photographs and a trained model → masks as palette PNGs, overlays, COCO-JSON. Exit status 1: some failed."""
    prepare(quiet)
    set_hub_environment(token, cache_dir)
    from ..settings import EvaluationSettings
    from ..stages.predict import predict, print_summary

    protocol = {"scales": numbers("--scales", scales), "flip": flip, "window": window, "workers": workers}
    protocol |= {"batch_size": batch_size, "refine": ["crf"] if crf else []}
    settings = EvaluationSettings.from_dict(protocol, "")
    named = None if tags is None else [tag.strip() for tag in tags.split(",")]
    found = predict(images, model, out, settings=settings, tags=named, overlays=overlays, coco=coco, force=force)
    print_summary(found)
    if found.failures:
        raise typer.Exit(1)


@app.command()
def compare(
    out: Out,
    plan: Annotated[
        Path | None,
        typer.Argument(help="YAML: rows, seeds, data, recipe, set, segmenter, supervised; options below win."),
    ] = None,
    recipes: Annotated[str | None, typer.Option(help="Recipes a,b,c as rows, instead of a plan.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds 0,1,2 of every row.")] = None,
    segmenter: Annotated[
        bool, typer.Option("--segmenter", help="Whole runs, not only CAM classifiers and their maps.")
    ] = False,
    supervised: Annotated[
        bool,
        typer.Option("--supervised", help="Beside every segmenter the same one trained on TRUE masks, for scale."),
    ] = False,
    cams: Annotated[
        list[Path] | None,
        typer.Option(help="Another comparison (or several): its CAM classifiers of the same recipe, seed and data."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Cells to train in parallel; default: one per GPU.", show_default=False)
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Replace the plan's data; otherwise the options below override its fields.",
            rich_help_panel="Data",
        ),
    ] = None,
    root: Root = None,
    classes: Classes = None,
    columns: Columns = None,
    separator: Separator = ";",
    saliency: SaliencyMaps = None,
    limit: Limit = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    recipe: RecipeName = None,
    changes: Set = None,
    backbone: BackboneName = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Methods x seeds x data under one condition → table, plots and pictures side by side."""
    prepare(quiet)
    set_hub_environment(token, cache_dir)
    from ..progress import is_quiet
    from ..reporting.comparison import print_comparison
    from ..stages.compare import compare
    from ..stages.plan import read_plan, with_data_options

    wanted = read_plan(plan) if plan is not None else {}
    if recipes is not None:
        wanted["rows"] = [name.strip() for name in recipes.split(",")]
    if seeds is not None:
        wanted["seeds"] = integers("--seeds", seeds)
    for key, given in (("segmenter", segmenter), ("supervised", supervised)):
        if given:
            wanted[key] = True
    named = data_options(source, root, classes, columns, separator, saliency, limit, revision)
    if source is not None:
        wanted["data"] = named
    elif named:
        wanted = with_data_options(wanted, named)
    if recipe is not None:
        wanted["recipe"] = recipe
    backbones = (
        [f"{part}.backbone={json.dumps(backbone)}" for part in ("cam", "segmenter")] if backbone is not None else []
    )
    if backbones or changes:
        held = wanted.get("set") or []
        held = [f"{key}={json.dumps(value)}" for key, value in held.items()] if isinstance(held, dict) else held
        wanted["set"] = [*held, *backbones, *(changes or [])]
    comparison = compare(wanted, out, jobs=jobs, cams=cams or [], force=force)
    print_comparison(comparison.rows)
    if not is_quiet():
        print(f"tables, plots and pictures: {out}/comparison.md, {out}/comparison*.html, {out}/results.json")


@app.command()
def recipe(
    name: Annotated[str, typer.Argument(help="A recipe of the package, or a YAML file; several as a+b.")] = "default",
    changes: Set = None,
    backbone: BackboneName = None,
    seed: Seed = None,
) -> None:
    """Print a resolved recipe, every setting with its meaning."""
    from ..recipes import Recipe

    print(Recipe.load(name, changes or [], backbone=backbone, seed=seed).to_yaml(), end="")


for _command in (convert, push, push_metric, export_onnx):
    app.command()(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user can mend is one line on standard error and exit status 1."""
    run_app(app, arguments)


if __name__ == "__main__":
    main()
