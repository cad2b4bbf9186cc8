"""A folder of tagged images as a data set."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from .tagged import DataError, tagged_features

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MAPS = ("mask", "saliency")  # optional columns
_METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
_LAYOUTS = (
    "either metadata.csv or metadata.jsonl with the columns file_name and tags (and, if known, mask and saliency), "
    "or one subfolder of images per class"
)


SEPARATOR = ";"


def load_folder(
    path: str | Path,
    classes: Sequence[str] | None = None,
    separator: str = SEPARATOR,
    skip: str | Path | None = None,
) -> DatasetDict:
    """Read a folder that holds metadata.csv / metadata.jsonl, or one subfolder of images per class.

    Metadata has the columns file_name and tags, optionally mask and saliency (file names relative to the folder). In a
    csv, tags are names separated by `separator`; in jsonl they are a list of names or such a string. Names may contain
    spaces ("traffic light"); spaces around them, empty names and repetitions are dropped. Subfolders train/ and val/
    that each hold one of these layouts are the splits, otherwise all rows are "train". An image's file name is its
    image_id.

    Args:
        classes: names in the order of their indices; default: the sorted names that occur.
        separator: of tags. With the default, a name that contains `,` or `|` and is none of `classes` is an error:
            it most likely is a list.
        skip: a subfolder that is no class.

    Raises:
        DataError: names the file, line or row.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    if not separator.strip():
        raise DataError(f"separator: expected a character like {SEPARATOR!r}, got {separator!r}")
    folders = {split: path / split for split in ("train", "val") if _is_layout(path / split)}
    if "train" not in folders or _metadata(path):
        folders = {"train": path}
    splits = {split: list(_read_rows(folder, separator, classes or (), skip)) for split, folder in folders.items()}

    known = list(classes or sorted({tag for rows in splits.values() for row in rows for tag in row["tags"]}))
    if not known:
        raise DataError(f"{folders['train']}: expected images with tags, got none with any")
    for split, rows in splits.items():
        for row in rows:
            unknown = [tag for tag in row["tags"] if tag not in known]
            if unknown:
                where = f"split {split!r}, row {row['image_id']!r}"
                raise DataError(f"{where}: tags: expected names from {', '.join(known)}, got {unknown[0]!r}")
            row["tags"] = sorted({known.index(tag) for tag in row["tags"]})
    filled = [name for name in _MAPS if any(row[name] for rows in splits.values() for row in rows)]
    features = tagged_features(known, *filled)
    return DatasetDict(
        {
            split: Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
            for split, rows in splits.items()
        }
    )


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in _METADATA_NAMES if (folder / name).is_file()), None)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def _class_folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and _images(child))


def _is_layout(folder: Path) -> bool:
    return folder.is_dir() and bool(_metadata(folder) or _class_folders(folder))


def _read_rows(
    folder: Path, separator: str, classes: Sequence[str], skip: str | Path | None
) -> Iterator[dict[str, Any]]:
    """Rows of image_id, image (path), tags (names), and of mask and saliency (path or None)."""
    metadata = _metadata(folder)
    if metadata is None:
        skipped = skip and Path(skip).resolve()
        class_folders = [found for found in _class_folders(folder) if found.resolve() != skipped]
        if not class_folders:
            raise DataError(f"{folder}: expected {_LAYOUTS}, got none of these")
        for class_folder in class_folders:
            for file in _images(class_folder):
                image_id = file.relative_to(folder).as_posix()
                yield {"image_id": image_id, "image": str(file), "tags": [class_folder.name]} | dict.fromkeys(_MAPS)
        return
    for number, row in _metadata_rows(metadata):
        where = f"{metadata}, line {number}"
        missing = [name for name in ("file_name", "tags") if row.get(name) is None]
        if missing:
            raise DataError(f"{where}: expected file_name and tags, got {', '.join(map(str, row))}")
        yield {
            "image_id": row["file_name"],
            "image": _file(folder, row["file_name"], where, "file_name"),
            "tags": _tag_names(row["tags"], where, separator, classes),
        } | {name: _file(folder, row[name], where, name) if row.get(name) else None for name in _MAPS}


def _metadata_rows(metadata: Path) -> Iterator[tuple[int, dict]]:
    with metadata.open(encoding="utf-8-sig", newline="") as lines:
        if metadata.suffix == ".csv":
            reader = csv.DictReader(lines, skipinitialspace=True)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{metadata}, line {number}: expected JSON, got {line.strip()!r}") from error
                if not isinstance(row, dict):
                    raise DataError(
                        f"{metadata}, line {number}: expected an object with file_name and tags, got {row!r}"
                    )
                yield number, row


def _tag_names(tags: object, where: str, separator: str, classes: Sequence[str]) -> list[str]:
    """A list of names, or names in one string → the names without spaces around them, each once."""
    if isinstance(tags, str):
        names = tags.split(separator)
    elif isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        names = tags
    else:
        raise DataError(f"{where}: tags: expected a list of class names, or one string of them, got {tags!r}")
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if isinstance(tags, str) and separator == SEPARATOR:
        for name in names:
            other = next((mark for mark in ",|" if mark in name), None)
            if other and name not in classes:
                raise DataError(
                    f"{where}: tags: expected names separated by {separator!r}, got {tags!r} "
                    f"(use --separator {other!r}, or lists of names in metadata.jsonl)"
                )
    return names


def _file(folder: Path, name: str, where: str, column: str) -> str:
    if not (folder / name).is_file():
        raise DataError(f"{where}: {column}: no such file {folder / name}")
    return str(folder / name)
