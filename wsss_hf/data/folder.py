"""A folder of tagged images as a data set."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict

from .tagged import DataError, tagged_features

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
_LAYOUTS = (
    "either metadata.csv or metadata.jsonl with the columns file_name and tags (and, if known, mask), "
    "or one subfolder of images per class"
)


def load_folder(path: str | Path, classes: Sequence[str] | None = None) -> DatasetDict:
    """Read a folder that holds metadata.csv / metadata.jsonl, or one subfolder of images per class.

    Metadata has the columns file_name and tags, optionally mask (file names relative to the folder). In a csv, tags
    are separated by any of | ; , or white space; in jsonl they are a list or such a string. Subfolders train/ and val/
    that each hold one of these layouts are the splits, otherwise all rows are "train". An image's file name is its
    image_id. Without `classes`, the sorted names that occur are the classes. Raises DataError that names file or row.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"no folder {path}")
    folders = {split: path / split for split in ("train", "val") if _is_layout(path / split)}
    if "train" not in folders or _metadata(path):
        folders = {"train": path}
    splits = {split: list(_read_rows(folder)) for split, folder in folders.items()}

    known = list(classes or sorted({tag for rows in splits.values() for row in rows for tag in row["tags"]}))
    if not known:
        raise DataError(
            f"no row of {folders['train']} has tags; weak supervision needs images that are tagged with classes"
        )
    for split, rows in splits.items():
        for row in rows:
            unknown = [tag for tag in row["tags"] if tag not in known]
            if unknown:
                where = f"split {split!r}, row {row['image_id']!r}"
                raise DataError(f"{where}: unknown class {unknown[0]!r}; known are {', '.join(known)}")
            row["tags"] = sorted({known.index(tag) for tag in row["tags"]})
    has_masks = any(row["mask"] for rows in splits.values() for row in rows)
    features = tagged_features(known, *(["mask"] if has_masks else []))
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


def _read_rows(folder: Path) -> Iterator[dict]:
    """Rows of image_id, image (path), tags (names) and mask (path or None)."""
    metadata = _metadata(folder)
    if metadata is None:
        class_folders = _class_folders(folder)
        if not class_folders:
            raise DataError(f"{folder} is a folder without tags; it needs {_LAYOUTS}")
        for class_folder in class_folders:
            for file in _images(class_folder):
                image_id = file.relative_to(folder).as_posix()
                yield {"image_id": image_id, "image": str(file), "tags": [class_folder.name], "mask": None}
        return
    for number, row in _metadata_rows(metadata):
        where = f"{metadata}, line {number}"
        missing = [name for name in ("file_name", "tags") if row.get(name) is None]
        if missing:
            raise DataError(
                f"{where}: has no {missing[0]}, only {', '.join(map(str, row))}; it needs file_name and tags"
            )
        yield {
            "image_id": row["file_name"],
            "image": _file(folder, row["file_name"], where, "image"),
            "tags": _tag_names(row["tags"], where),
            "mask": _file(folder, row["mask"], where, "mask") if row.get("mask") else None,
        }


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
                    raise DataError(f"{metadata}, line {number}: is not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise DataError(
                        f"{metadata}, line {number}: must be an object with file_name and tags, not {row!r}"
                    )
                yield number, row


def _tag_names(tags: str | list[str], where: str) -> list[str]:
    if isinstance(tags, str):
        return [tag for tag in re.split(r"[|;,\s]+", tags) if tag]
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DataError(f"{where}: tags must be a list of class names or one string of them, not {tags!r}")
    return tags


def _file(folder: Path, name: str, where: str, what: str) -> str:
    if not (folder / name).is_file():
        raise DataError(f"{where}: the {what} file {folder / name} is missing")
    return str(folder / name)
