"""Options that commands share, and what they name: data and a recipe."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState
from datasets import DatasetDict

from ..data.sources import load_data
from ..recipes import RecipeError, load_recipe, recipe_names

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
    str | None,
    typer.Option("--backbone", help="Directory or Hub id (ID@REVISION) of the backbone.", rich_help_panel="Recipe"),
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


def load_inputs(
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
    """Read the recipe and load the data; `masks` and `quiet` are arguments of `load_data`."""
    resolved = load_recipe(recipe or ("toy" if source == "toy" else "default"), changes or [])
    if backbone is not None:
        resolved["cam"]["backbone"] = resolved["segmenter"]["backbone"] = backbone
    if seed is not None:
        resolved["seed"] = seed
    settings = data_settings(source, root, classes, columns, limit, revision)
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


def data_settings(source, root, classes, columns, limit, revision) -> dict:
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


def integers(option: str, text: str) -> list[int]:
    """The numbers of `option`, written as 0,1,2."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise RecipeError(f"{option} {text}: whole numbers a,b,c would be right")
    return [int(part) for part in text.split(",")]


def with_inputs(command: Callable) -> Callable:
    """A command whose first parameter, `inputs`, becomes the options of `load_inputs`."""
    shared = [p for p in inspect.signature(load_inputs).parameters.values() if p.name not in ("masks", "quiet")]
    own = list(inspect.signature(command).parameters.values())[1:]
    names = [parameter.name for parameter in shared]

    @functools.wraps(command)
    def wrapper(**options):
        shared_options = {name: options.pop(name) for name in names}
        # Only the supervised upper bound and, if asked to, the evaluation may see the masks of all training images.
        masks = "all" if options.get("supervised") or options.get("all_masks") else "evaluation"
        quiet = options["quiet"] or not PartialState().is_main_process
        command(load_inputs(**shared_options, masks=masks, quiet=quiet), **options)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
    wrapper.__signature__ = inspect.Signature(parameters)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
