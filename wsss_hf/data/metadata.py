"""metadata.csv, .jsonl and .parquet: rows of a folder of tagged images, as people and their programs write them."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..models.pictures import FORMATS
from .text import DataError, brief, is_line, read_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff") + (
    (".avif",) if "AVIF" in FORMATS else ()
)
SEPARATOR = ";"
_SEPARATORS = ";,|"
_DELIMITERS = ",;\t"  # of the columns of a csv
_ROWS_AT_A_TIME = 1000  # of Parquet
_NEEDED = ("file_name", "tags")
_OPTIONAL = ("mask", "saliency")
_NO_VALUES = {"nan", "none", "null", "n/a", "na", "<na>", "#n/a"}  # what programs write where there is nothing
_QUOTES = "\"'[]{}"


def read_metadata(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a metadata file.

    A csv has a header; its columns are separated by commas, semicolons (as Excel does in many countries) or tabs.
    A jsonl has an object in each line. Masks and saliency may be called mask_file_name and saliency_file_name, as the
    `imagefolder` of datasets has them.

    Yields:
        (where, row): `where` names file and line, or row; a row has file_name (a name), tags (not read yet: a text or
        a list), and mask and saliency (a name or None). Blank lines are left out.

    Raises:
        DataError: names file and line.
    """
    read = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[path.suffix]
    for where, row in read(path):
        for name in _OPTIONAL:
            row.setdefault(name, row.get(f"{name}_file_name"))
        if row.get("tags") is None or row.get("file_name") is None:
            got = ", ".join(name for name, value in row.items() if value is not None)
            raise DataError(f"{where}: expected file_name and tags, got {got or 'neither'}")
        for name in ("file_name", *_OPTIONAL):
            value = row.get(name)
            if value is not None and not (isinstance(value, str) and is_line(value)):
                raise DataError(f"{where}: {name}: expected the name of a file, got {brief(value)}")
        if not str(row["file_name"]).strip():
            raise DataError(f"{where}: file_name: expected the name of an image, got none")
        yield where, {name: row[name] for name in _NEEDED} | {name: row.get(name) or None for name in _OPTIONAL}


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    text = read_text(path)
    first = next((line for line in _lines(text) if line.strip()), "")
    names, delimiter = _header(first, f"{path}, line 1")
    reader = csv.reader(_lines(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    line, is_header = 1, True
    try:
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if is_header:
                is_header = False
                continue
            if any(cell.strip() for cell in cells[len(names) :]):
                raise DataError(
                    f"{where}: expected {len(names)} cells, as the header has, got {len(cells)}, the last "
                    f"{brief(cells[-1])} (quote a cell that holds {delimiter!r})"
                )
            row = dict.fromkeys(names) | dict(zip(names, map(str.strip, cells), strict=False))
            _check_line_breaks(row, delimiter, path.parent, where)
            yield where, row
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: expected a row whose quotes are closed, got one that can't be read ({error})"
        ) from error


def _lines(text: str, line: str = r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+") -> Iterator[str]:
    """With their ends, by default whatever these are; a StringIO would hold them in four times the memory."""
    return (found.group() for found in re.finditer(line, text))


def _header(line: str, where: str) -> tuple[list[str], str]:
    """The names of the columns, and what separates them."""
    found = {mark: [name.strip() for name in next(csv.reader([line], delimiter=mark), [])] for mark in _DELIMITERS}
    for mark, names in found.items():
        if set(_NEEDED) <= set(names):
            twice = [name for name in (*_NEEDED, *_OPTIONAL) if names.count(name) > 1]
            if twice:
                raise DataError(f"{where}: expected each column once, got {twice[0]} {names.count(twice[0])} times")
            return names, mark
    names = max(found.values(), key=len)[:10]
    advice = " (name your column of tags in `columns`)" if "file_name" in names else ""
    got = ", ".join(map(brief, names)) or "an empty file"
    raise DataError(f"{where}: expected a header with file_name and tags, got {got}{advice}")


def _check_line_breaks(row: dict[str, str | None], delimiter: str, folder: Path, where: str) -> None:
    """A quote that is not closed makes cells of whole rows; a caption may well have line breaks.

    Raises:
        DataError: a column that is read has a line break, or any other one holds a line that is a row.
    """
    place = list(row).index("file_name")
    for name, cell in row.items():
        first, *others = (cell or "").splitlines() or [""]
        starts = (line.split(delimiter) for line in others)
        swallowed = any(len(parts) > place and _is_file(folder, parts[place].strip(' "')) for parts in starts)
        if swallowed or (others and name in (*_NEEDED, *_OPTIONAL)):
            got = brief(cell)
            raise DataError(f"{where}: {name}: expected a cell of one row, got {got} (is a quote not closed?)")


def _is_file(folder: Path, name: str) -> bool:
    return bool(name) and find_file(folder, name) is not None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(read_text(path), r"[^\n]*\n|[^\n]+"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected JSON, got {brief(line.strip())}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with file_name and tags, got {brief(row)}")
        yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(_ROWS_AT_A_TIME))
            for number, row in enumerate(itertools.chain.from_iterable(batches), start=1):
                yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: expected a Parquet file, got one that can't be read ({reason})") from error


def find_file(folder: Path, name: str) -> str | None:
    """The name, as the file system spells it, of a file in `folder`; None if there is none.

    Tables and file systems may differ in the Unicode normal form of an accent, and in `\\` for `/`.
    """
    for spelling in (name, name.replace("\\", "/")):
        for form in (spelling, *(unicodedata.normalize(form, spelling) for form in ("NFC", "NFD"))):
            if os.path.isfile(folder / form):
                return form
    return None


def read_tags(tags: object, separator: str, classes: Sequence[str], where: str) -> list[str]:
    """A list of names, or names in one string → the names in Unicode normal form C, each once.

    Spaces around names and empty names are dropped. A name in a string that looks like something else (several names,
    a list, a missing value, the file of an image) is an error unless it is one of `classes`.

    Raises:
        DataError: begins with `where`.
    """
    if not isinstance(tags, str) and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        raise DataError(f"{where}: tags: expected a list of class names, or one string of them, got {brief(tags)}")
    parts = tags.split(separator) if isinstance(tags, str) else tags
    names = list(dict.fromkeys(normal_form(part) for part in parts if part.strip()))
    if any(name.casefold() == "background" for name in names):
        raise DataError(f"{where}: tags: expected names of objects, or none for background alone, got {brief(tags)}")
    for name in names if isinstance(tags, str) else ():
        if name in classes:
            continue
        other = next((mark for mark in _SEPARATORS if mark != separator and mark in name), None)
        if name[0] in _QUOTES or name[-1] in _QUOTES:
            wanted = "without quotes or brackets"
        elif other:
            wanted = f"separated by {separator!r}"
        elif name.casefold() in _NO_VALUES:
            wanted = "or an empty cell"
        elif name.lower().endswith(IMAGE_SUFFIXES):
            wanted = "of classes"
        else:
            continue
        cure = f"--separator {other!r}, or lists" if other else "--classes if it is a class, or lists"
        raise DataError(
            f"{where}: tags: expected names {wanted}, got {brief(tags)} (use {cure} of names in metadata.jsonl)"
        )
    return names


def normal_form(name: str) -> str:
    """A name without spaces around it, its accents composed: the one form of all that look the same."""
    return unicodedata.normalize("NFC", name).strip()
