"""Recipes: all settings of all stages, from YAML files that say only what differs from the defaults."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..models.options import OptionError, Options, either, unknown_name
from ..settings import RecipeError, RecipeSettings

_WIDTH = 119  # of a printed recipe
_SHOWN = 200  # characters of a text in a message
_PACKAGED = resources.files(__package__)
# Mappings whose keys are not settings; what stands in them is checked by the class that it configures.
_OPEN = {
    "cam.methods",
    "cam.backbone_config",
    "affinity.backbone_config",
    "segmenter.backbone_config",
    "segmenter.loss_options",
    "masks.seed_options",
}


@dataclass
class Recipe(RecipeSettings):
    """All settings of all stages, checked; see `wsss_hf.settings`."""

    @classmethod
    def load(
        cls,
        name: str = "default",
        changes: str | Sequence[str] | Mapping[str, Any] = (),
        *,
        backbone: str | None = None,
        seed: int | None = None,
        folder: str | os.PathLike = "",
    ) -> Recipe:
        """The defaults, changed by the recipe `name`, changed by `changes`.

        Args:
            name: a packaged recipe, or a YAML file; several with + between them, later ones win. The key `base` of a
                recipe names the one that it changes, if that is not the default one.
            changes: a "cam.train.epochs=3" or several, the value in YAML; or dotted names with their values.
                "cam.methods={drs: {}}" takes the place of all methods, "cam.methods.drs={}" adds one, and
                "cam.methods.drs=null" takes it away. Other mappings are merged.
            backbone: directory or Hub id, of the CAM classifier and of the segmenter.
            seed: of weights, data order and augmentation.
            folder: where files of recipes are looked for, beside the working folder.

        Raises:
            RecipeError: no such recipe, not YAML, an unknown name, or a value of another type or range; of methods,
                refinement steps, label rules and losses as well.
        """
        values = dataclasses.asdict(RecipeSettings())
        parts = [name] if Path(name).is_file() else name.split("+")
        layers = [layer for part in parts for layer in _with_bases(part, Path(folder))]
        layers += [_change(change) for change in _as_strings(changes)]
        if backbone is not None:
            both = {section: {"backbone": backbone} for section in ("cam", "affinity", "segmenter")}
            layers.append(("--backbone", both))
        if seed is not None:
            layers.append((f"--seed {seed}", {"seed": seed}))
        return cls._resolved(values, layers)

    def changed(self, *changes: str) -> Recipe:
        """A copy with "cam.train.epochs=3" changes, checked as by `load`."""
        return self._resolved(self.to_dict(), [_change(change) for change in changes])

    @classmethod
    def _resolved(cls, values: dict, layers: Iterable[tuple[str, dict]]) -> Recipe:
        """Nested `values`, changed by (source, changes) one after the other; messages name the source."""
        for source, layer in layers:
            try:
                _drop_options(values, layer)
                _merge(values, layer)
                cls.from_dict(values, "")
            except OptionError as error:
                raise RecipeError(f"{source}: {error}") from error
        recipe = cls.from_dict(values, "")
        try:
            _check(recipe)
        except OptionError as error:
            raise RecipeError(str(error)) from error
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values by section, as YAML and JSON take them."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """A YAML file of every setting, each under the sentence that explains it; `load` reads it again."""
        return "".join(_commented(self, 0))

    def __str__(self) -> str:
        return self.to_yaml()


def load_recipe(name: str = "default", changes: str | Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """[`Recipe.load`]."""
    return Recipe.load(name, changes)


def check_inputs(data: Any, recipe: Any) -> None:
    """That a stage was given data with a split "train" and a recipe, not their names.

    Raises:
        RecipeError: names the argument.
    """
    check_splits(data, "train")
    if not isinstance(recipe, RecipeSettings):
        raise RecipeError(f"recipe: expected a Recipe, see Recipe.load, got {_given(recipe)}")


def check_splits(data: Any, *splits: str) -> None:
    """The same of data with these splits."""
    if not isinstance(data, dict) or not data.keys() >= set(splits):  # a DatasetDict is a dict
        named = "".join(f" {split!r}" for split in splits)
        given = f"{', '.join(map(repr, data))} alone" if isinstance(data, dict) else _given(data)
        raise RecipeError(f"data: expected splits{named} of a data set, see load_data, got {given}")


def _given(value: Any) -> str:
    return _brief(repr(value)) if isinstance(value, str | os.PathLike) else f"a {type(value).__name__}"


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    files = (path.name for path in _PACKAGED.iterdir())
    return ["default", *sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))]


def _as_strings(changes: str | Sequence[str] | Mapping[str, Any]) -> Iterable[str]:
    if isinstance(changes, Mapping):
        return (f"{name}={_in_one_line(value)}" for name, value in changes.items())
    return [changes] if isinstance(changes, str) else changes


def _change(text: str) -> tuple[str, dict]:
    """ "cam.train.epochs=3" as a source for messages and a nested mapping."""
    source = f"--set {_brief(text)}"
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RecipeError(f"{source}: expected key=value, for example cam.train.epochs=3")
    change = _parse(value, source)
    if name == "cam.methods" and isinstance(change, dict):
        change = _Whole(change)
    for part in reversed(name.split(".")):
        change = {part: change}
    return source, change


class _Whole(dict):
    """A mapping that takes the place of the old one."""


def _with_bases(name: str, folder: Path, asked_by: tuple[str, ...] = ()) -> list[tuple[str, dict]]:
    """(source, changes) of a recipe, after those of its base, of that one's base … but the defaults."""
    if name == "default":
        return []
    path = _find(name, folder)
    source = f"recipe {name}"
    if str(path) in asked_by:
        raise RecipeError(f"{source}: it is its own base, by way of {', '.join(asked_by)}")
    changes = _parse(path.read_bytes(), source)
    if not isinstance(changes, dict):
        raise RecipeError(f"{source}: expected a mapping of settings, got {_brief(repr(changes))}")
    base = changes.pop("base", "default")
    if not isinstance(base, str):
        raise RecipeError(f"{source}: base: expected the name or file of a recipe, got {base!r}")
    return [*_with_bases(base, path.parent, (*asked_by, str(path))), (source, changes)]


def _find(name: str, folder: Path) -> Any:
    """The file of a recipe: of the package, or beside the one that names it."""
    packaged = _PACKAGED / f"{name}.yaml"
    if packaged.is_file():
        return packaged
    for path in (Path(name), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path.resolve()
    raise RecipeError(unknown_name(f"recipe {name} (no such file)", name, recipe_names()))


def _parse(text: str | bytes, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of dates and very long numbers
        raise RecipeError(f"{source}: not YAML ({_brief(str(error))})") from error


def _brief(text: str) -> str:
    """The beginning of a text that may be long, in one line."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


def _merge(values: dict, changes: dict, prefix: str = "") -> None:
    """Put nested `changes` into nested `values`; mappings are merged, all else is replaced."""
    is_open = any(prefix == f"{key}." or prefix.startswith(f"{key}.") for key in _OPEN)
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if key not in values and not is_open:
            raise OptionError(unknown_name(name, key, values, prefix))
        old = values.get(key)
        if isinstance(old, dict) and value is None and name not in _OPEN and not is_open:
            raise OptionError(f"{name}: expected a mapping of settings, got None")
        if isinstance(value, dict) and (isinstance(old, dict) or name in _OPEN or is_open):
            values[key] = dict(old) if isinstance(old, dict) and not isinstance(value, _Whole) else {}
            _merge(values[key], value, f"{name}.")
        else:
            values[key] = value


def _check(recipe: Recipe) -> None:
    """What the names in a recipe stand for: methods, refinement steps, label rules, losses. Writes options out.

    Raises:
        OptionError: an unknown name, or an unknown or unfit option.
    """
    # Imported here: listing or printing recipes needs none of it.
    from ..models.methods import METHODS, Method
    from ..pseudo_labels.rules import build_rule
    from ..refinement.steps import build_refinement
    from ..training.losses import build_loss

    methods = {name: options for name, options in recipe.cam.methods.items() if options is not None}
    for name, options in methods.items():
        if name not in METHODS:
            raise OptionError(unknown_name(f"cam.methods.{name}", name, METHODS, "cam.methods."))
        config_class: Any = METHODS[name][0]
        methods[name] = dataclasses.asdict(config_class.from_dict(options, f"cam.methods.{name}"))
    recipe.cam.methods = methods
    able = ["cam", *(name for name in methods if METHODS[name][1].maps is not Method.maps)]
    if recipe.cam.maps not in able:
        raise OptionError(f"cam.maps: expected {either(able)}, got {recipe.cam.maps!r}")
    for section in ("affinity", "masks", "self_training", "evaluation"):
        build_refinement(getattr(recipe, section).refine, f"{section}.refine")
    for section in ("cam", "segmenter"):
        options = getattr(recipe, section)
        if "model_type" in (options.backbone_config or {}):
            _check_backbone(f"{section}.backbone_config", json.dumps(options.backbone_config, default=str))
    build_rule(recipe.masks.seeds, recipe.masks.seed_options)
    build_loss(recipe.segmenter.loss, recipe.segmenter.loss_options)


@functools.cache
def _check_backbone(name: str, config: str) -> None:
    """Build the network of a configuration in JSON: without memory for its weights, if it can be built so.

    Raises:
        OptionError: it has an unfit value; transformers and torch have an exception for each of them.
    """
    import torch

    from ..models.backbone import Backbone, usable_config

    failure = None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers without weights, which are refused
                Backbone(usable_config(json.loads(config)))
            return
        except Exception as error:
            failure = error
    reason = _brief(f"{type(failure).__name__}: {failure}")
    raise OptionError(f"{name}: expected a backbone's configuration, got {_brief(config)} ({reason})") from failure


def _drop_options(values: dict, layer: dict) -> None:
    """Where `layer` names another label rule or loss, the options of the old one go."""
    for section, name, options in (("masks", "seeds", "seed_options"), ("segmenter", "loss", "loss_options")):
        changes = layer.get(section) if isinstance(layer, dict) else None
        if isinstance(changes, dict) and changes.get(name, values[section][name]) != values[section][name]:
            values[section][options] = {}


def _commented(options: Options, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value, text = getattr(options, field.name), field.metadata.get("text", "")
        if isinstance(value, Options):
            text = (type(value).__doc__ or "").strip().splitlines()[0]
            yield ("" if depth else "\n") + f"{indent}{field.name}:  # {text}\n"
            yield from _commented(value, depth + 1)
            continue
        if isinstance(value, dict) and value:
            block = textwrap.indent(yaml.safe_dump(value, sort_keys=False, default_flow_style=None), f"{indent}  ")
            yield f"{indent}{field.name}:  # {text}\n{block}"
            continue
        line = f"{indent}{field.name}: {_in_one_line(value)}"
        if len(line) + len(text) + 4 <= _WIDTH:
            yield f"{line}  # {text}\n"
        else:
            yield (
                "".join(f"{indent}# {part}\n" for part in textwrap.wrap(text, _WIDTH - len(indent) - 2)) + f"{line}\n"
            )


def _in_one_line(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf")).strip()[1:-1]
