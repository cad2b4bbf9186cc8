"""Options that commands share, and what they name: what is written, data, a recipe.

Paths to write are tried while options are read, before the work whose result they take. Imports nothing heavy, for
`wsss --help`.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..progress import is_quiet, set_quiet
from ..settings import RecipeError
from .launch import prepare_libraries

if TYPE_CHECKING:
    from datasets import DatasetDict

    from ..recipes import Recipe

_FILES = [path.name for path in (resources.files("wsss_hf") / "recipes").iterdir()]
_OF_STREAMS = ("run", "train-cam", "make-masks", "train-segmenter", "evaluate")  # the commands
_RECIPES = sorted(name.removesuffix(".yaml") for name in _FILES if name.endswith(".yaml"))


class OutputPathError(ValueError):
    """Nothing can be written at a path; the message names the option and says what was expected."""


def folder_to_write(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """`path`, if it is a folder that can be written to, or if such a folder can be made there.

    Raises:
        OutputPathError: it is something else.
    """
    if path is not None and path.exists() and not path.is_dir():
        raise OutputPathError(f"{parameter.opts[-1]} {path}: expected a folder or a new name, got a file")
    return _tried(parameter, path, path)


def file_to_write(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """As [`folder_to_write`], for a file; an existing one is left to the command.

    Raises:
        OutputPathError: it is a folder, or its folder can't be written to.
    """
    if path is not None and path.is_dir():
        raise OutputPathError(f"{parameter.opts[-1]} {path}: expected a file or a new name, got a folder")
    return _tried(parameter, path, None if path is None else path.parent)


def _tried(parameter: typer.CallbackParam, path: Path | None, folder: Path | None) -> Path | None:
    """`path`, if something can be written to `folder`, or to the nearest folder above it that exists."""
    if folder is not None:
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        try:
            with tempfile.TemporaryFile(dir=place):  # leaves nothing, even if this process is killed
                pass
        except OSError as error:
            expected = f"{parameter.opts[-1]} {path}: expected a place that can be written to"
            raise OutputPathError(f"{expected}, got {place} ({error.strerror})") from error
    return path


Out = Annotated[
    Path,
    typer.Option(
        "--out",
        callback=folder_to_write,
        help="Output folder: new, or one of the same command, of which only what changed is redone.",
    ),
]
NewFolder = Annotated[
    Path, typer.Option("--to", "--out", callback=folder_to_write, help="Folder to write: new or empty.")
]
ExportCoco = Annotated[
    Path | None, typer.Option(callback=file_to_write, help="File: also write COCO-JSON, run-length encoded.")
]
Source = Annotated[
    str,
    typer.Option(
        "--data",
        help="toy | voc | coco | a folder of tagged images | a saved data set | Parquet or .tar shards | a Hub id.",
        rich_help_panel="Data",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(
        help="Of --data voc: the VOC2012 folder of a devkit; of --data coco: the folder above train2017.",
        rich_help_panel="Data",
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(help="Class names a,b,c in this order; VOC and COCO are restricted to them.", rich_help_panel="Data"),
]
Columns = Annotated[
    str | None,
    typer.Option(help="Map columns: expected=yours,… for example image=img,tags=labels.", rich_help_panel="Data"),
]
Separator = Annotated[
    str, typer.Option(help="Between the tags in a cell of metadata.csv: ';' | ',' | '|'.", rich_help_panel="Data")
]
SaliencyMaps = Annotated[
    Path | None,
    typer.Option(
        "--saliency",
        help="Folder of saliency maps IMAGE_ID.png or .jpg, for rules and methods that use them.",
        rich_help_panel="Data",
    ),
]
Streaming = Annotated[
    bool,
    typer.Option(
        "--streaming",
        help="Of run, train-cam, make-masks, train-segmenter, evaluate: read shards, images of a folder or Hub data "
        "as they are needed; training wants train.steps.",
        rich_help_panel="Data",
    ),
]
Limit = Annotated[int | None, typer.Option(help="At most this many images per split.", rich_help_panel="Data")]
Revision = Annotated[str | None, typer.Option(help="Revision of data from the Hub.", rich_help_panel="Data")]
Token = Annotated[
    str | None, typer.Option(help="Hub token.", envvar="HF_TOKEN", show_envvar=True, rich_help_panel="Data")
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Folder of Hub downloads and of COCO's masks.", rich_help_panel="Data")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        autocompletion=lambda incomplete: [name for name in ("default", *_RECIPES) if name.startswith(incomplete)],
        help=f"default | {' | '.join(_RECIPES)} | a YAML file; several as a+b. Default: photos; of --data toy: toy.",
        rich_help_panel="Recipe",
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: cam.train.epochs=3.", rich_help_panel="Recipe")
]
BackboneName = Annotated[
    str | None,
    typer.Option("--backbone", help="Directory or Hub id (ID@REVISION) of the backbone.", rich_help_panel="Recipe"),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the recipe.", rich_help_panel="Recipe")]
Track = Annotated[
    str | None,
    typer.Option(help="Show trainings in tensorboard | trackio | wandb.", rich_help_panel="Recipe"),
]
Force = Annotated[bool, typer.Option("--force", help="Run again even if nothing has changed.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Disable progress bars.")]


@dataclass
class Inputs:
    """Data and recipe as the options of a command name them."""

    data: DatasetDict
    recipe: Recipe


def load_inputs(
    source: Source,
    root: Root = None,
    classes: Classes = None,
    columns: Columns = None,
    separator: Separator = ";",
    saliency: SaliencyMaps = None,
    limit: Limit = None,
    streaming: Streaming = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    recipe: RecipeName = None,
    changes: Set = None,
    backbone: BackboneName = None,
    seed: Seed = None,
    track: Track = None,
    masks: Literal["evaluation", "all"] = "evaluation",
) -> Inputs:
    """Read the recipe and load the data; `masks` is an argument of `load_data`."""
    set_hub_environment(token, cache_dir)
    from ..data.sources import load_data
    from ..recipes import Recipe
    from ..training.tracking import check_tracker

    name = recipe if recipe is not None else "toy" if source == "toy" else "photos"
    trained = ("cam", "refiner", "affinity", "segmenter")
    tracked = [] if track is None else [f"{part}.train.track={track}" for part in trained]
    resolved = Recipe.load(name, [*(changes or []), *tracked], backbone=backbone, seed=seed)
    check_tracker(resolved.cam.train)
    options = data_options(source, root, classes, columns, separator, saliency, limit, revision)
    if streaming:
        odd = [name for name in options if name not in ("source", "classes", "columns", "revision", "separator")]
        if odd:
            raise RecipeError(f"--streaming: expected no --{odd[0]} beside it")
        from ..data.streams import load_stream

        return Inputs(load_stream(**options), resolved)
    toy = vars(resolved.toy) if source == "toy" else None
    return Inputs(load_data(**options, seed=resolved.seed, masks=masks, toy=toy), resolved)


def set_hub_environment(token: str | None, cache_dir: Path | None) -> None:
    """Let the libraries of the Hub, of this process and of those it starts, use a token and a cache folder."""
    if token is not None:
        os.environ["HF_TOKEN"] = token
    if cache_dir is not None:
        os.environ["HF_HUB_CACHE"] = os.environ["HF_DATASETS_CACHE"] = str(cache_dir)
        # Which they have read already where they are imported.
        if constants := sys.modules.get("huggingface_hub.constants"):
            constants.HF_HUB_CACHE = str(cache_dir)  # type: ignore[attr-defined]
        if config := sys.modules.get("datasets.config"):
            config.HF_DATASETS_CACHE = cache_dir  # type: ignore[attr-defined]


def data_options(
    source: str | None,
    root: Path | None,
    classes: str | None,
    columns: str | None,
    separator: str | None,
    saliency: Path | None,
    limit: int | None,
    revision: str | None,
) -> dict[str, Any]:
    """The options that name data as arguments of `load_data`, those that are given."""
    options = {
        "source": source,
        "root": None if root is None else str(root),
        "classes": None if classes is None else [name.strip() for name in classes.split(",")],
        "columns": None if columns is None else _pairs(columns),
        "separator": None if separator == ";" else separator,
        "saliency": None if saliency is None else str(saliency),
        "limit": limit,
        "revision": revision,
    }
    return {name: value for name, value in options.items() if value is not None}


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and equals and theirs for ours, equals, theirs in pairs):
        raise RecipeError(f"--columns: expected pairs such as image=img,tags=labels, got {text}")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def integers(option: str, text: str) -> list[int]:
    """The numbers of `option`, written as 0,1,2."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise RecipeError(f"{option}: expected whole numbers a,b,c, got {text}")
    return [int(part) for part in text.split(",")]


def numbers(option: str, text: str) -> list[float]:
    """The positive numbers of `option`, written as 0.5,1,1.5."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < float("inf") for number in found):
        raise RecipeError(f"{option}: expected positive numbers a,b,c, got {text}")
    return found


def with_inputs(command: Callable) -> Callable:
    """A command whose first parameter, `inputs`, becomes the options of `load_inputs`."""
    shared = [p for p in inspect.signature(load_inputs, eval_str=True).parameters.values() if p.name != "masks"]
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    names = [parameter.name for parameter in shared]

    @functools.wraps(command)
    def wrapper(**options: Any) -> None:
        prepare(options.pop("quiet"))
        name = command.__name__.replace("_", "-")
        if options["streaming"] and name not in _OF_STREAMS:
            raise RecipeError(f"--streaming: expected one of {', '.join(_OF_STREAMS)}, got {name}")
        shared_options = {name: options.pop(name) for name in names}
        # Only the supervised upper bound and, on request, the evaluation may see the masks of all training images.
        masks: Literal["evaluation", "all"] = "evaluation"
        if options.pop("all_masks", False) or options.get("supervised"):
            masks = "all"
        command(load_inputs(**shared_options, masks=masks), **options)

    quiet = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)), quiet]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def prepare(quiet: bool) -> None:
    """What every command that works does first."""
    set_quiet(quiet or is_quiet())
    prepare_libraries(is_quiet())
