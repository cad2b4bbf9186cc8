"""Recipes: every setting of every stage as data. `default.yaml` holds all keys; a recipe says what differs from it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml

_PACKAGED = resources.files(__package__)
# Values under these keys are not checked against the default recipe, but by the class that they configure.
_OPEN = {"cam.methods", "cam.backbone_config", "segmenter.backbone_config", "segmenter.loss_options"}
# Numbers that the stage finds itself where this word stands in their place.
_FOUND = {"masks.background_threshold": "auto"}


class RecipeError(ValueError):
    """A recipe or a `--set` that can't be used; the message names it and what would be right."""


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _PACKAGED.iterdir() if path.name.endswith(".yaml"))


def load_recipe(name_or_file: str = "default", overrides: Sequence[str] = ()) -> dict:
    """The resolved recipe: the default one, changed by `name_or_file`, changed by `overrides`.

    Args:
        name_or_file: a packaged recipe's name, or a YAML file; several with + between them, later ones win. A recipe's
            key `base` names the one that it changes, if that is not the default one.
        overrides: "dotted.key=value" strings, the value in YAML.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, or a value of another type than the default's.
    """
    recipe = _read("default")
    parts = [name_or_file] if Path(name_or_file).is_file() else name_or_file.split("+")
    for part in parts:
        for source, changes in _with_bases(part):
            _merge(recipe, changes, source)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {override}: key=value would be right, for example cam.train.epochs=3")
        change = _parse(value, f"--set {override}")
        for part in reversed(key.split(".")):
            change = {part: change}
        _merge(recipe, change, source=f"--set {override}")
    _check(recipe)
    return recipe


def _with_bases(name_or_file: str, asked_by: tuple[str, ...] = ()) -> list[tuple[str, dict]]:
    """(its title, its changes) of a recipe, after those of its base, of that one's base … but the default recipe."""
    if name_or_file == "default":
        return []
    if name_or_file in asked_by:
        raise RecipeError(f"recipe {name_or_file}: it is its own base, by way of {', '.join(asked_by)}")
    changes = _read(name_or_file)
    base = changes.pop("base", "default")
    if not isinstance(base, str):
        raise RecipeError(f"recipe {name_or_file}: base is {base!r}; the name or file of a recipe would be right")
    return [*_with_bases(base, (*asked_by, name_or_file)), (f"recipe {name_or_file}", changes)]


def _check(recipe: dict) -> None:
    for section in ("cam", "refiner", "segmenter"):
        for key in ("epochs", "batch_size"):
            value = recipe[section]["train"][key]
            if value < 1:
                raise RecipeError(f"{section}.train.{key} is {value}; 1 or more would be right")
    threshold = recipe["masks"]["background_threshold"]
    if threshold is None or (threshold != _FOUND["masks.background_threshold"] and not 0 <= threshold <= 1):
        raise RecipeError(f"masks.background_threshold is {threshold}; a number in [0, 1] or auto would be right")
    if recipe["masks"]["bf16"] not in (None, True, False):
        raise RecipeError(f"masks.bf16 is {recipe['masks']['bf16']!r}; true, false or null would be right")
    for section in ("masks", "self_training", "evaluation"):
        if recipe[section]["workers"] < 0:
            raise RecipeError(f"{section}.workers is {recipe[section]['workers']}; 0 or more would be right")
    if recipe["self_training"]["rounds"] < 1:
        raise RecipeError(f"self_training.rounds is {recipe['self_training']['rounds']}; 1 or more would be right")
    scales = [(section, "scales") for section in ("masks", "refiner", "self_training", "evaluation")]
    for section, key in (*scales, ("segmenter", "rates"), ("segmenter", "input_scales")):
        values = recipe[section][key]
        if not values or not all(isinstance(value, int | float) and value > 0 for value in values):
            raise RecipeError(f"{section}.{key} is {values}; a list of positive numbers would be right")
    for key in ("window", "window_stride"):
        if recipe["evaluation"][key] < 0:
            raise RecipeError(f"evaluation.{key} is {recipe['evaluation'][key]}; pixels, or 0, would be right")
    for key in ("mean", "std"):
        values = recipe["image"][key]
        if values is not None and not (isinstance(values, list) and len(values) == 3):
            raise RecipeError(f"image.{key} is {values}; three numbers, one per channel, would be right")


def _read(name_or_file: str) -> dict:
    packaged = _PACKAGED / f"{name_or_file}.yaml"
    path = packaged if packaged.is_file() else Path(name_or_file)
    if not path.is_file():
        raise RecipeError(f"recipe {name_or_file}: no such file, and the package has {', '.join(recipe_names())}")
    values = _parse(path.read_text(), f"recipe {name_or_file}")
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {name_or_file}: a mapping of settings would be right, not {values!r}")
    # YAML aliases name one object twice; here every section is its own.
    return json.loads(json.dumps(values))


def _parse(text: str, source: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not YAML ({' '.join(str(error).split())})") from error


def _merge(recipe: dict, changes: dict, source: str, prefix: str = "") -> None:
    is_open = any(prefix == f"{key}." or prefix.startswith(f"{key}.") for key in _OPEN)
    for key, value in changes.items():
        dotted = f"{prefix}{key}"
        if key not in recipe and not is_open:
            near = difflib.get_close_matches(str(key), recipe, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(recipe)}"
            raise RecipeError(f"{source}: no setting {dotted}; {hint}")
        old = recipe.get(key)
        if isinstance(old, float) and isinstance(value, str):
            value = _number(value)  # YAML takes 1e-3, without a point, for text
        if isinstance(old, str) and value is False:
            value = "no"  # which YAML takes, without quotes, for false
        if isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value, source, f"{dotted}.")
        elif dotted in _FOUND:
            if value != _FOUND[dotted] and not _same_kind(0.0, value):
                raise RecipeError(f"{source}: {dotted} is {value!r}; a number or {_FOUND[dotted]} would be right")
            recipe[key] = value
        elif value is old or isinstance(value, dict) if dotted in _OPEN else is_open or _same_kind(old, value):
            recipe[key] = value
        else:
            raise RecipeError(f"{source}: {dotted} is {value!r}; something like {old!r} would be right")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _same_kind(old, new) -> bool:
    if isinstance(old, dict) or isinstance(new, dict):
        return False  # mappings are merged, not replaced
    if old is None or new is None:
        return True
    if isinstance(old, float):
        return isinstance(new, int | float) and not isinstance(new, bool)
    return type(new) is type(old)
