"""Saliency maps as a column of a data set: added from a folder, looked for before they are needed, and counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature

from ..progress import say
from .export import file_stem
from .tagged import DataError, has_value

COLUMN = "saliency"
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_SHOWN = 5  # ids in a message


def with_saliency(data: DatasetDict, folder: str | Path, count_others: bool = True) -> DatasetDict:
    """`data` with a column `saliency`: the maps of a folder, and nothing where it has none.

    The map of an image is IMAGE_ID.png, .jpg, .jpeg, .tif or .tiff. An id may have folders and the suffix of an image
    file, cat/001.jpg: its map is cat/001.png or cat/001.jpg.png. Where two splits have images of the same name, theirs
    are SPLIT/IMAGE_ID.png. An old column of this name is replaced.

    Args:
        folder: of the maps, read where they are.
        count_others: say on standard error how many of the maps are for no image.

    Raises:
        DataError: no such folder, maps for none of the images, or two maps or images of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"saliency: expected a folder of maps IMAGE_ID.png or .jpg, got {folder}: no such folder")
    files = _files(folder)
    owners: dict[str, str] = {}  # name of a map → the image that it is for
    columns: dict[str, list[dict | None]] = {}
    for split, rows in data.items():
        columns[split] = []
        for image_id in rows["image_id"][:]:
            names = (image_id, file_stem(image_id))
            name = next((name for name in (*(f"{split}/{name}" for name in names), *names) if name in files), None)
            columns[split].append(None if name is None else {"bytes": None, "path": str(files[name])})
            if name is None:
                continue
            owner = f"split {split!r}, row {image_id!r}"
            if name in owners:
                raise DataError(
                    f"{files[name]}: expected a map of one image, got one for {owners[name]} and {owner} (maps of "
                    "splits with the same names go to train/ and val/)"
                )
            owners[name] = owner
    if not owners:
        image_id = data["train"]["image_id"][0]
        raise DataError(
            f"{folder}: expected saliency maps by image_id, such as {file_stem(image_id)}.png, got "
            f"{len(files)} other maps"
        )
    others = len(files) - len(owners)
    if count_others and others:
        say(f"saliency: {others} of the {len(files)} maps in {folder} are for no image of the data")
    return DatasetDict(
        {
            split: rows.remove_columns([COLUMN] if COLUMN in rows.column_names else []).add_column(
                COLUMN, columns[split], feature=ImageFeature()
            )
            for split, rows in data.items()
        }
    )


def _files(folder: Path) -> dict[str, Path]:
    """The maps of a folder and those below it, by their paths inside it without suffix."""
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise DataError(f"{folder}: expected one map of each image, got {files[name].name} and {file.name}")
        files[name] = file
    return files


def rows_with_saliency(rows: Dataset) -> np.ndarray:
    """The rows that have a map → their indices; none where there is no such column."""
    return np.flatnonzero(has_value(rows, COLUMN)) if COLUMN in rows.column_names else np.zeros(0, dtype=int)


def check_saliency(rows: Dataset, wanted_by: str) -> None:
    """Check that every row has a map.

    Args:
        wanted_by: the setting that reads them.

    Raises:
        DataError: some have none: lists the first of them.
    """
    found = rows_with_saliency(rows)
    if not len(found):
        got = "an empty one" if COLUMN in rows.column_names else ", ".join(rows.column_names)
        raise DataError(f"data set: expected a column 'saliency' for {wanted_by}, got {got}")
    if len(found) < len(rows):
        missing = np.setdiff1d(np.arange(len(rows)), found)
        ids = ", ".join(rows.select(missing[:_SHOWN])["image_id"])
        more = ", …" if len(missing) > _SHOWN else ""
        raise DataError(
            f"column 'saliency': expected a map of every image for {wanted_by}, got none for {len(missing)} of "
            f"{len(rows)} images: {ids}{more}"
        )


def describe_saliency(told: str | Mapping[str, Any] | None) -> str:
    """Where maps are from and what has been learnt to make them, in words.

    Args:
        told: `source["saliency"]` of the data: a folder, or {"source", "learnt_from"}; None where that is unknown.
    """
    known = told if isinstance(told, Mapping) else {"source": told}
    source = f"saliency maps of {known['source']}" if known.get("source") else "saliency maps that the data hold"
    if known.get("learnt_from"):
        return f"{source}; what they learnt from: {known['learnt_from']}"
    return f"{source}; what their network learnt from is not recorded"
