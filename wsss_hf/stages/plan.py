"""What a comparison trains: rows of recipe changes × data sets × seeds, read from a plan and checked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..recipes import RecipeError, load_recipe

PLAN_KEYS = ("recipe", "set", "rows", "seeds", "data", "segmenter")
_DATA_KEYS = ("source", "root", "classes", "columns", "limit", "revision", "masks")


@dataclass(frozen=True)
class Cell:
    """One training: a row of the plan, a data set, a seed.

    Attributes:
        data, row, seed: what the cell is called.
        recipe: resolved; its seed is the cell's.
        source: arguments of `load_data`.
        segmenter: whether a segmenter is trained too.
        folder: where models, figures and example masks go.
    """

    data: str
    row: str
    seed: int
    recipe: dict
    source: dict
    segmenter: bool
    folder: str

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.seed}, {self.data}"


def read_plan(path: str | os.PathLike) -> dict:
    """A plan from a YAML file; see [`plan_cells`].

    Raises:
        RecipeError: it can't be read, or has other keys.
    """
    try:
        plan = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(plan, dict):
        raise RecipeError(f"{path}: a mapping with {', '.join(PLAN_KEYS)} would be right")
    return plan


def plan_cells(plan: dict, out: str | os.PathLike) -> list[Cell]:
    """The cells of a plan, every recipe resolved and checked.

    Args:
        plan: `rows`: name -> changes of the recipe (nested or with dotted keys, `recipe` for another one to start
            from, and `seeds` of the row's own), or a list of recipes' names; `recipe`: the recipe that all start from;
            `set`: changes for all, as "key=value" strings or a mapping; `seeds`: whole numbers, default those of the
            recipe; `data`: name -> arguments of `load_data`, or one such mapping; `segmenter`: train it too, not the
            CAM classifier only.
        out: folder of the comparison.

    Raises:
        RecipeError: an unknown key, a row that is no recipe, or no rows, seeds or data.
    """
    unknown = [key for key in plan if key not in PLAN_KEYS]
    if unknown:
        raise RecipeError(f"the plan has {unknown[0]!r}; right are {', '.join(PLAN_KEYS)}")
    rows = plan.get("rows") or {}
    if isinstance(rows, list):
        rows = {str(name): {"recipe": name} for name in rows}
    if not isinstance(rows, dict) or not rows:
        raise RecipeError("the plan has no rows; name: {changes}, or a list of recipes, would be right")
    data = _data_sets(plan)
    common = _changes(plan.get("set") or {}, "set")
    cells = []
    for data_name, source in data.items():
        start = plan.get("recipe") or ("toy" if source["source"] == "toy" else "default")
        for row, changes in rows.items():
            if changes is not None and not isinstance(changes, dict):
                raise RecipeError(f"row {row}: {changes!r}; changes of the recipe as a mapping would be right")
            _check_name(row, "row")
            _check_name(data_name, "data")
            changes = dict(changes or {})
            own_seeds = changes.pop("seeds", None)
            recipe = load_recipe(changes.pop("recipe", start), [*common, *_changes(changes, f"row {row}")])
            seeds = own_seeds or plan.get("seeds", [recipe["seed"]])
            if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
                raise RecipeError(f"seeds: {seeds!r}; a list of whole numbers would be right")
            drawn = {"toy": recipe["toy"]} if source["source"] == "toy" else {}
            for seed in seeds:
                folder = Path(out) / "cells" / data_name / row / f"seed{seed}"
                cells.append(
                    Cell(
                        data=data_name,
                        row=row,
                        seed=seed,
                        recipe=json.loads(json.dumps(recipe | {"seed": seed})),
                        source=source | drawn,
                        segmenter=bool(plan.get("segmenter", False)),
                        folder=str(folder),
                    )
                )
    return cells


def with_data_options(plan: dict, options: dict) -> dict:
    """The plan with `options`, arguments of `load_data`, over those of each of its data sets.

    Raises:
        RecipeError: it has no data.
    """
    return plan | {"data": {name: source | options for name, source in _data_sets(plan).items()}}


def _data_sets(plan: dict) -> dict[str, dict]:
    """name -> arguments of `load_data`."""
    data = plan.get("data") or {}
    if isinstance(data, dict) and "source" in data:
        data = {Path(str(data["source"])).name: data}
    if not isinstance(data, dict) or not data:
        raise RecipeError("the plan has no data; data: {source: toy} would be right")
    for name, source in data.items():
        if not isinstance(source, dict) or "source" not in source or not set(source) <= set(_DATA_KEYS):
            raise RecipeError(f"data {name}: {source}; source and some of {', '.join(_DATA_KEYS[1:])} are right")
    return data


def _changes(changes: dict | list, where: str) -> list[str]:
    """Changes of a recipe as "dotted.key=value" strings."""
    if isinstance(changes, dict):
        return [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    if not isinstance(changes, list) or not all(isinstance(change, str) for change in changes):
        raise RecipeError(f"{where}: {changes!r}; a mapping, or a list of key=value, would be right")
    return changes


def _check_name(name, what: str) -> None:
    """Names become folders."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set('/\\:"<>|?*\0\n'):
        raise RecipeError(f"{what} {name!r}: a name that can be a folder would be right")
