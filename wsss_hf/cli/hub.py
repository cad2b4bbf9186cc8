"""The commands between files, models and the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import is_quiet
from .launch import prepare_libraries
from .options import CacheDir, NewFolder, Token, integers, set_hub_environment

if TYPE_CHECKING:
    from ..hub.upload import Pushed


def convert(
    file: Annotated[Path, typer.Argument(help="A released checkpoint: .safetensors, .pth, .pt, .bin or .params.")],
    out: NewFolder,
    classes: Annotated[str | None, typer.Option(help="Names a,b,c of its classes; default: those of VOC.")] = None,
    drs_delta: Annotated[float | None, typer.Option(help="Fixed DRS that a classifier was trained with.")] = None,
    extra_channels: Annotated[
        str | None, typer.Option(help="New 3x3 convolutions on an ImageNet VGG-16: 512,512,512.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="classifier | refiner: how to load a DRS checkpoint without controllers (default: classifier).",
        ),
    ] = None,
) -> None:
    """ImageNet VGG-16 and Wide ResNet-38, and what DRS, SEAM and PLDA released → models of this package."""
    prepare_libraries(is_quiet())
    from transformers import AutoConfig

    from ..hub.convert import convert_checkpoint

    names = None if classes is None else [name.strip() for name in classes.split(",")]
    widths = None if extra_channels is None else integers("--extra-channels", extra_channels)
    converted = convert_checkpoint(file, out, names, drs_delta, widths, kind)
    print(f"{converted}: {AutoConfig.from_pretrained(converted, trust_remote_code=False).converted_from}")


def push(
    source: Annotated[Path, typer.Argument(help="A run's folder (its last segmenter is pushed), or a model's.")],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="owner/name, or a name under your account.")],
    dataset: Annotated[bool, typer.Option("--dataset", help="Push the pseudo masks with their images.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="Branch to push to; default: main.")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="Licence as the Hub names it: apache-2.0, cc-by-4.0 …; default: that of the card there.",
        ),
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Show the run's example images on a model's card.")
    ] = True,
    token: Token = None,
) -> None:
    """A trained model, or pseudo masks → the Hub, with a card, in one commit."""
    set_hub_environment(token, None)
    prepare_libraries(is_quiet())
    from ..hub.push import push_dataset, push_model

    if dataset:
        _print_pushed(push_dataset(source, repo_id, private, branch, token, licence))
    else:
        _print_pushed(push_model(source, repo_id, private, branch, token, licence, pictures))


def push_metric(
    name: Annotated[str, typer.Argument(help="mean_iou | boundary_f")],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="owner/name, or a name under your account.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    token: Token = None,
) -> None:
    """A metric → the Hub, as a Space that evaluate.load finds."""
    set_hub_environment(token, None)
    prepare_libraries(is_quiet())
    from ..hub.metric_space import push_metric

    _print_pushed(push_metric(name, repo_id, private, token=token))


def _print_pushed(pushed: Pushed) -> None:
    print(f"{pushed.url} {'is now at' if pushed.changed else 'holds all of it already,'} commit {pushed.commit[:12]}")


def export_onnx(
    model: Annotated[str, typer.Argument(help="A model's folder or Hub id (ID@REVISION).")],
    out: NewFolder,
    size: Annotated[int | None, typer.Option(help="Only for squares of this side, in pixels.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also with its weights as 8-bit integers.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """A trained model → ONNX, for any number of images of any size."""
    set_hub_environment(token, cache_dir)
    prepare_libraries(is_quiet())
    from ..hub.onnx import export_onnx

    name = model if revision is None else f"{model}@{revision}"
    folder = export_onnx(name, out, size, int8)
    print(f"{folder}: {', '.join(path.name for path in sorted(folder.iterdir()))}")
