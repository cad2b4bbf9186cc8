"""The commands between files, models and the Hub."""

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoConfig

from ..hub.convert import KINDS, convert_checkpoint
from ..hub.onnx import export_onnx as run_export_onnx
from ..hub.push import METRICS, Pushed, push_dataset, push_model
from ..hub.push import push_metric as run_push_metric
from .options import CacheDir, Token, integers


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
    widths = None if extra_channels is None else integers("--extra-channels", extra_channels)
    converted = convert_checkpoint(file, out, names, drs_delta, widths, kind)
    print(f"{converted}: {AutoConfig.from_pretrained(converted).converted_from}")


def push(
    source: Annotated[Path, typer.Argument(help="A run's folder (its segmenter is meant), or that of a model.")],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="Where to: owner/name, or a name of your own.")],
    dataset: Annotated[bool, typer.Option("--dataset", help="Push the pseudo masks with their images.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see the new repository.")] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="Branch to push to; main without it.")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="Its licence as the Hub knows it: apache-2.0, cc-by-4.0 …; without it, that of the card there.",
        ),
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
