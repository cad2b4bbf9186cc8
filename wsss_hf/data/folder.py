"""A folder of tagged images as a data set."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, concatenate_datasets

from ..progress import say
from .metadata import IMAGE_SUFFIXES, SEPARATOR, find_file, normal_form, read_metadata, read_tags
from .tagged import DataError, open_image, tagged_features

_MAPS = ("mask", "saliency")  # optional columns
_ROW = pa.schema(
    {"image_id": pa.string(), "image": pa.string(), "tags": pa.list_(pa.string()), "where": pa.string()}
    | dict.fromkeys(_MAPS, pa.string())
)
_ROWS_AT_A_TIME = 1000
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_LAYOUTS = (
    "either metadata.csv (or .jsonl, .parquet) with the columns file_name and tags (and, if known, mask and "
    "saliency), or one subfolder of images per class"
)
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev", "test"),
}
"""Split → what its folder (in any case), or split of a saved data set, may be called; the first that exists counts."""
_NEGATIVES = "background"  # a folder of images without any class
_MASKS = ("mask", "masks", "annotations", "labels", "saliency", "segmentation")  # folders that may hold no class
_TEXTS = (".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".log")
_NO_PHOTOS = (*_TEXTS, ".py", ".ipynb", ".db", ".ini", ".url")  # what nobody misses among images
_READ_ME = ("readme", "license", "licence", "copying")
_NAMED = 5  # folders in a message
_NO_CLASSES = ("__macosx", "@eadir", "$recycle.bin", "system volume information")  # of operating systems


def load_folder(
    path: str | Path,
    classes: Sequence[str] | None = None,
    separator: str = SEPARATOR,
    skip: str | Path | None = None,
) -> DatasetDict:
    """Read a folder that holds metadata.csv, .jsonl or .parquet, or one subfolder of images per class.

    Metadata has the columns file_name and tags, optionally mask and saliency (file names relative to the folder). In a
    csv, tags are names separated by `separator`; elsewhere a list of names or such a string. Names may contain spaces
    ("traffic light"); spaces around them, empty names and repetitions are dropped. Images in a subfolder "background"
    have no tags. Subfolders train/ and val/ (or validation/, valid/, dev/, test/) that each hold one of
    these layouts are the splits, otherwise all rows are "train". An image's file name is its image_id. Hidden files
    and folders are no part of the data; of class folders it is said what else is not read, or that one has no images.

    Args:
        classes: names in the order of their indices; default: the sorted names that occur.
        separator: of tags. A name that contains another of `;`, `,`, `|` and is none of `classes` is an error: it
            most likely is a list.
        skip: a subfolder that is no class.

    Raises:
        DataError: names the file, line or row.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    if not separator.strip():
        raise DataError(f"separator: expected a character like {SEPARATOR!r}, got {separator!r}")
    given = [normal_form(name) for name in classes or ()]
    splits = {
        split: _packed(_read_rows(folder, separator, given, skip)) for split, folder in _split_folders(path).items()
    }
    known = given or _derived_classes(splits)
    if not known:
        raise DataError(f"{path}: expected images with tags, got none with any")
    for rows in map(_unpacked, splits.values()):
        for row in rows:
            unknown = [tag for tag in row["tags"] if tag not in known]
            if unknown:
                raise DataError(f"{row['where']}: tags: expected names from {', '.join(known)}, got {unknown[0]!r}")
    filled = [name for name in _MAPS if any(rows[name].null_count < len(rows) for rows in splits.values())]
    try:
        features = tagged_features(known, *filled)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return DatasetDict({split: _as_dataset(rows, features) for split, rows in splits.items()})


def _packed(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Rows of `_read_rows` as Arrow has them: in a tenth of the memory of dicts.

    Raises:
        DataError: a name is no text.
    """
    rows = iter(rows)
    batches = []
    for part in iter(lambda: list(itertools.islice(rows, _ROWS_AT_A_TIME)), []):
        try:
            batches.append(pa.RecordBatch.from_pylist(part, _ROW))
        except UnicodeEncodeError as error:
            row = next(row for row in part if error.object in (*row.values(), *row["tags"]))
            raise DataError(f"{row['where']}: expected names of text in UTF-8, got {error.object!r}") from error
    return pa.Table.from_batches(batches, _ROW)


def _unpacked(rows: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in rows.to_batches(_ROWS_AT_A_TIME):
        yield from batch.to_pylist()


def _as_dataset(rows: pa.Table, features: Features) -> Dataset:
    index = {name: number for number, name in enumerate(features["tags"].feature.names)}
    parts = []
    for batch in rows.to_batches(_ROWS_AT_A_TIME) or [pa.RecordBatch.from_pylist([], _ROW)]:
        columns = batch.to_pydict()
        columns["tags"] = [sorted({index[tag] for tag in tags}) for tags in columns["tags"]]
        parts.append(Dataset.from_dict({name: columns[name] for name in features}, features=features))
    return concatenate_datasets(parts)


def _derived_classes(splits: dict[str, pa.Table]) -> list[str]:
    """The sorted names of all tags.

    Raises:
        DataError: two of them are spellings of one, or no training image has one; names where it stands.
    """
    first: dict[str, tuple[str, str]] = {}  # spelling-free name → the name, and where it stands first
    for split, rows in splits.items():
        for row in _unpacked(rows):
            for tag in row["tags"]:
                key = unicodedata.normalize("NFKC", tag).casefold()
                if split != "train" and key not in first:
                    raise DataError(
                        f"{row['where']}: tags: expected classes that training images have, got {tag!r} "
                        "(name all in --classes if that is right)"
                    )
                name, where = first.setdefault(key, (tag, row["where"]))
                if name != tag:
                    raise DataError(
                        f"{row['where']}: tags: expected one spelling of each class, got {tag!r} and, in {where}, "
                        f"{name!r} (name both in --classes if they differ)"
                    )
    return sorted(name for name, _ in first.values())


def is_hidden(path: Path) -> bool:
    """A file or folder that an operating system or an editor has put there: .DS_Store, ._a.jpg, .ipynb_checkpoints."""
    return path.name.startswith(".") or path.name.casefold() in _NO_CLASSES


def unread_files(files: Iterable[Path], folder: Path) -> list[str]:
    """What stands in a folder of images and is not read, though somebody may miss it: ["3 files .heic (cat/, dog/)"].

    Args:
        files: those in `folder` and below it, hidden ones too.
    """
    places: dict[str, list[str]] = {}
    for file in files:
        suffix = file.suffix.lower()
        if suffix not in (*IMAGE_SUFFIXES, *_NO_PHOTOS) and file.name.lower() not in _READ_ME and not is_hidden(file):
            places.setdefault(suffix or "without suffix", []).append(file.parent.relative_to(folder).as_posix())
    return [
        f"{len(found)} {'file' if len(found) == 1 else 'files'} {suffix}{_in_folders(found)}"
        for suffix, found in sorted(places.items())
    ]


def _in_folders(names: Sequence[str]) -> str:
    """Where files are, in brackets after a space; nothing for the folder itself."""
    shown = _listed(sorted({name for name in names if name != "."}))
    return f" ({shown})" if shown else ""


def _listed(names: Sequence[str]) -> str:
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*(f"{name}/" for name in names[:_NAMED]), *more])


def _split_folders(path: Path) -> dict[str, Path]:
    """Split → its folder; says which folders beside them are not read."""
    if _metadata(path):
        return {"train": path}
    children = {child.name.casefold(): child for child in sorted(path.iterdir()) if child.is_dir()}
    folders = {
        split: found
        for split, names in SPLIT_NAMES.items()
        if (found := next((children[name] for name in names if name in children), None)) is not None
    }
    if "train" not in folders or not _is_layout(folders["train"]):
        return {"train": path}
    folders = {split: folder for split, folder in folders.items() if _metadata(folder) or _holds_images(folder)}
    others = [child.name for child in children.values() if child not in folders.values() and _is_layout(child)]
    if others:
        used = ", ".join(f"{split} is {folder.name}/" for split, folder in folders.items())
        say(f"{path}: {used}; not read: {', '.join(f'{name}/' for name in others)}")
    return folders


def _metadata(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: expected one metadata file, got {found[0].name} and {found[1].name}")
    return found[0] if found else None


def _images(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(file))
    return sorted(file for file in files if file.is_file())


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not is_hidden(child))


def _class_folders(folder: Path) -> list[Path]:
    return [child for child in _folders(folder) if _images(child)]


def _is_layout(folder: Path) -> bool:
    return folder.is_dir() and not is_hidden(folder) and bool(_metadata(folder) or _class_folders(folder))


def _read_rows(
    folder: Path, separator: str, classes: Sequence[str], skip: str | Path | None
) -> Iterator[dict[str, Any]]:
    """Rows of image_id, image (path), tags (names), where (for messages), mask and saliency (path or None): `_ROW`."""
    metadata = _metadata(folder)
    if metadata is None:
        yield from _rows_of_class_folders(folder, skip)
        return
    seen = set()
    for where, row in read_metadata(metadata):
        name = _found(folder, row["file_name"], f"{where}: file_name")
        path = str(folder / name)
        if path in seen:
            rows = read_metadata(metadata)
            first = next(at for at, other in rows if str(folder / _found(folder, other["file_name"], at)) == path)
            raise DataError(
                f"{where}: file_name: expected each image once, got {name!r} of {first} again (several tags "
                f"stand in one cell, cat{separator}dog)"
            )
        seen.add(path)
        maps = {
            column: str(folder / _found(folder, row[column], f"{where}: {column}")) if row[column] else None
            for column in _MAPS
        }
        tags = read_tags(row["tags"], separator, classes, where)
        yield {"image_id": name, "image": path, "tags": tags, "where": where} | maps


def _found(folder: Path, name: str, where: str) -> str:
    found = find_file(folder, name)
    if found is None:
        raise DataError(f"{where}: no such file {folder / name}")
    return found


def _rows_of_class_folders(folder: Path, skip: str | Path | None) -> Iterator[dict[str, Any]]:
    skipped = skip and Path(skip).resolve()
    class_folders = [found for found in _folders(folder) if found.resolve() != skipped]
    names = [found.name.casefold() for found in class_folders if _images(found)]
    unread = unread_files((file for found in class_folders for file in found.iterdir() if file.is_file()), folder)
    if all(any(name in known for known in SPLIT_NAMES.values()) for name in names):  # also where there is none
        beside = f" (not read: {', '.join(unread)})" if unread else ""
        raise DataError(f"{folder}: expected {_LAYOUTS}, got {', '.join(names) or 'none of these'}{beside}")
    if loose := len(_images(folder)):
        unread.insert(0, f"{loose} {'image' if loose == 1 else 'images'} beside the class folders")
    if empty := [found.name for found in class_folders if not _holds_images(found)]:
        unread.append(f"no images in {_listed(empty)}")
    if unread:
        say(f"{folder}: not read: {', '.join(unread)}")
    for class_folder in class_folders:
        if metadata := _metadata(class_folder):
            raise DataError(f"{metadata}: expected images of a class in {class_folder}, got a data set of its own")
        for child in _folders(class_folder):
            if child.resolve() != skipped and _holds_images(child):
                raise DataError(f"{child}: expected images of a class in its own folder, got images in one below it")
        images = _images(class_folder)
        if class_folder.name.casefold() in _MASKS and images and open_image(images[0]).mode in ("1", "L", "P"):
            raise DataError(f"{class_folder}: expected a class, got a folder of masks (they are named in metadata)")
        name = normal_form(class_folder.name)
        for file in images:
            yield {
                "image_id": file.relative_to(folder).as_posix(),
                "image": str(file),
                "tags": [] if name.casefold() == _NEGATIVES else [name],
                "where": str(class_folder),
            } | dict.fromkeys(_MAPS)


def _holds_images(folder: Path) -> bool:
    return bool(_images(folder)) or any(_holds_images(child) for child in _folders(folder))
