"""What a comparison trains: rows of recipe changes × data sets × seeds, read from a plan and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..models.options import unknown_name
from ..recipes import Recipe
from ..settings import RecipeError

PLAN_KEYS = ("recipe", "set", "rows", "seeds", "data", "segmenter", "supervised")
_DATA_KEYS = ("source", "root", "classes", "columns", "limit", "revision", "masks", "separator", "saliency")


@dataclass(frozen=True)
class Cell:
    """One training: a row of the plan, a data set, a seed.

    Attributes:
        data, row, seed: what the cell is called.
        recipe: its seed is the cell's.
        source: arguments of `load_data`.
        segmenter: whether a segmenter is trained too.
        supervised: whether its twin is, on true masks, for scale.
        folder: where models, figures and example masks go.
    """

    data: str
    row: str
    seed: int
    recipe: Recipe
    source: dict[str, Any]
    segmenter: bool
    supervised: bool
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.seed}, {self.data}"


def read_plan(path: str | os.PathLike) -> dict[str, Any]:
    """A plan from a YAML file; see [`plan_cells`]. Recipes in it may be files beside it.

    Raises:
        RecipeError: it can't be read, or is no mapping.
    """
    path = Path(path)
    try:
        plan = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"plan {path}: expected a YAML file, got none ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(plan, dict):
        raise RecipeError(f"{path}: expected a mapping with {', '.join(PLAN_KEYS)}, got {plan!r}")
    return plan | {"folder": path.parent}


def plan_cells(plan: Mapping[str, Any], out: str | os.PathLike) -> list[Cell]:
    """The cells of a plan, every recipe resolved and checked.

    Args:
        plan: `rows`: name → changes of the recipe (nested or with dotted keys, `recipe` for another one to start
            from, and `seeds` of the row's own), or a list of recipes' names; `recipe`: the recipe that all start from;
            `set`: changes for all, as "key=value" strings or a mapping; `seeds`: whole numbers, default those of the
            recipe; `data`: name → arguments of `load_data`, or one such mapping; `segmenter`: train it too, not the
            CAM classifier only; `supervised`: and its twin on true masks, for scale; `folder`: where files of recipes
            are looked for.
        out: folder of the comparison.

    Raises:
        RecipeError: an unknown key, a row that is no recipe, or no rows, seeds or data.
    """
    for key in plan:
        if key not in (*PLAN_KEYS, "folder"):
            raise RecipeError(unknown_name(f"plan: {key}", key, PLAN_KEYS))
    rows = plan.get("rows") or {}
    if isinstance(rows, list):
        rows = {str(name): {"recipe": name} for name in rows}
    if not isinstance(rows, dict) or not rows:
        raise RecipeError(f"plan: rows: expected name: {{changes}}, or a list of recipes, got {plan.get('rows')!r}")
    for key in ("segmenter", "supervised"):
        if type(plan.get(key, False)) is not bool:
            raise RecipeError(f"plan: {key}: expected true or false, got {plan[key]!r}")
    if plan.get("supervised") and not plan.get("segmenter"):
        raise RecipeError("plan: supervised: expected segmenter: true (--segmenter) beside it")
    folder = Path(plan.get("folder") or "")
    common = _changes(plan.get("set") or {}, "set")
    cells = []
    for data_name, source in _data_sets(plan).items():
        _check_name(data_name, "data")
        start = plan.get("recipe") or ("toy" if source["source"] == "toy" else "default")
        for row, changes in rows.items():
            _check_name(row, "row")
            if changes is not None and not isinstance(changes, dict):
                raise RecipeError(f"plan: row {row}: expected a mapping of changes of the recipe, got {changes!r}")
            changes = dict(changes or {})
            own_seeds, name = changes.pop("seeds", None), changes.pop("recipe", start)
            recipe = Recipe.load(name, [*common, *_changes(changes, f"row {row}")], folder=folder)
            seeds = own_seeds or plan.get("seeds", [recipe.seed])
            if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
                raise RecipeError(f"plan: seeds: expected a list of whole numbers, got {seeds!r}")
            drawn = {"toy": vars(recipe.toy)} if source["source"] == "toy" else {}
            for seed in seeds:
                cells.append(
                    Cell(
                        data=data_name,
                        row=row,
                        seed=seed,
                        recipe=recipe.changed(f"seed={seed}"),
                        source=source | drawn,
                        segmenter=plan.get("segmenter", False),
                        supervised=plan.get("supervised", False),
                        folder=Path(out) / "cells" / data_name / row / f"seed{seed}",
                    )
                )
    return cells


def with_data_options(plan: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The plan with `options`, arguments of `load_data`, over those of each of its data sets.

    Raises:
        RecipeError: it has no data.
    """
    return dict(plan) | {"data": {name: source | dict(options) for name, source in _data_sets(plan).items()}}


def _data_sets(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name → arguments of `load_data`."""
    data = plan.get("data") or {}
    if isinstance(data, dict) and "source" in data:
        data = {Path(str(data["source"])).name: data}
    if not isinstance(data, dict) or not data:
        raise RecipeError(f"plan: data: expected for example {{source: toy}}, got {plan.get('data')!r}")
    for name, source in data.items():
        if not isinstance(source, dict) or "source" not in source or not set(source) <= set(_DATA_KEYS):
            raise RecipeError(
                f"plan: data {name}: expected source and some of {', '.join(_DATA_KEYS[1:])}, got {source}"
            )
    return data


def _changes(changes: Mapping | Sequence, where: str) -> list[str]:
    """Changes of a recipe as "dotted.key=value" strings."""
    if isinstance(changes, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    if not isinstance(changes, list) or not all(isinstance(change, str) for change in changes):
        raise RecipeError(f"plan: {where}: expected a mapping, or a list of key=value, got {changes!r}")
    return changes


def _check_name(name: object, what: str) -> None:
    """Names become folders."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set('/\\:"<>|?*\0\n'):
        raise RecipeError(f"plan: {what}: expected a name that can be a folder, got {name!r}")
