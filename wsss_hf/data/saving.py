"""Saving tagged data: images that are files somewhere are named there, and copied only where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from datasets.arrow_writer import ParquetWriter
from datasets.table import embed_table_storage

from .text import DataError

_STORED = {"bytes": Value("binary"), "path": Value("string")}  # what an image column holds
_ROWS_AT_A_TIME, _PATHS_AT_A_TIME = 100, 1000


def save_data(data: DatasetDict, folder: Path, embed_images: bool = False) -> None:
    """Write a data set that `datasets.load_from_disk(folder)` reads.

    Args:
        embed_images: copy the files of image columns into it, as `save_to_disk` does; it can then be moved to another
            machine. Otherwise it holds their absolute paths, and is read wherever these lead to the files. Images
            that are no files, those of Parquet shards and generated ones, are in it either way.
    """
    if embed_images:
        data.save_to_disk(folder)
        return
    # The library embeds what it knows to be images: it writes plain columns, and is told afterwards what they are.
    DatasetDict({split: _with_paths(rows) for split, rows in data.items()}).save_to_disk(folder)
    for split, rows in data.items():
        rows.info.write_to_directory(str(folder / split))


def names_other_files(held: DatasetDict, data: DatasetDict) -> bool:
    """Whether a saved data set names image files of `data` by other paths than these have now."""
    return any(
        _names_others(held[split], data[split], name)
        for split in held.keys() & data.keys()
        for name in _image_columns(held[split])
        if name in data[split].features
    )


def _names_others(held: Dataset, rows: Dataset, column: str) -> bool:
    if _has_bytes(held, column):
        return False
    if len(held) != len(rows) or _has_bytes(rows, column):
        return True
    for batches in zip(_batches(held, column), _batches(rows, column), strict=True):
        before, now = (pc.struct_field(values, "path") for values in batches)
        if not before.equals(now) and _absolute(before) != _absolute(now):
            return True
    return False


def num_bytes(rows: Dataset) -> int:
    """Size of the rows together with the image files that they name.

    Raises:
        DataError: one of these is missing.
    """
    files = (name for name in _image_columns(rows) if not _has_bytes(rows, name))
    paths = (path for name in files for some in _absolute_paths(rows, name) for path in some)
    try:
        return rows.data.nbytes + sum(os.path.getsize(path) for path in paths if path is not None)
    except FileNotFoundError as error:
        raise DataError(f"data set: expected its image files, got no such file as {error.filename}") from error


def write_parquet(rows: Dataset, file: Path) -> None:
    """Write rows with the contents of the image files that they name; the same rows give the same bytes.

    Only the rows of one row group are in memory.
    """
    with ParquetWriter(features=rows.features, path=str(file), writer_batch_size=_ROWS_AT_A_TIME) as writer:
        for table in rows.with_format("arrow").iter(_ROWS_AT_A_TIME):
            writer.write_table(embed_table_storage(table))
        writer.finalize()


def _image_columns(rows: Dataset) -> list[str]:
    return [name for name, feature in rows.features.items() if isinstance(feature, ImageFeature)]


def _with_paths(rows: Dataset) -> Dataset:
    """`rows` with the paths of image columns of files as plain columns."""
    plain = [_plain_paths(rows, name) for name in _image_columns(rows) if not _has_bytes(rows, name)]
    if not plain or not len(rows):
        return rows
    named = [name for column in plain for name in column.features]
    return concatenate_datasets([rows.remove_columns(named), *plain], axis=1).select_columns(rows.column_names)


def _plain_paths(rows: Dataset, column: str) -> Dataset:
    parts = [
        Dataset.from_dict(
            {column: [path and {"bytes": None, "path": path} for path in paths]}, features=Features({column: _STORED})
        )
        for paths in _absolute_paths(rows, column)
    ]
    return concatenate_datasets(parts)


def _absolute_paths(rows: Dataset, column: str) -> Iterator[list[str | None]]:
    """The absolute paths in an image column of files, None for no image; some at a time."""
    for values in _batches(rows, column):
        yield _absolute(pc.struct_field(values, "path"))


def _has_bytes(rows: Dataset, column: str) -> bool:
    return any(pc.any(pc.struct_field(values, "bytes").is_valid()).as_py() for values in _batches(rows, column))


def _batches(rows: Dataset, column: str) -> Iterator[pa.ChunkedArray]:
    for table in rows.select_columns([column]).with_format("arrow").iter(_PATHS_AT_A_TIME):
        yield table[column]


def _absolute(paths: pa.ChunkedArray) -> list[str | None]:
    return [path if path is None or "://" in path else os.path.abspath(path) for path in paths.to_pylist()]
