"""What the inputs of a stage are: fingerprints of rows and of models, by their contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset
from datasets import Image as ImageFeature
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from ..data.prepared import tree_state
from ..data.tagged import DataError, class_names, source_of, undecoded
from ..files import file_digest
from ..models.pretrained import pinned

_CONFIGURATIONS = ("config.json", "preprocessor_config.json")
_ROWS_AT_A_TIME = 500


def row_fingerprints(rows: Dataset, columns: Sequence[str]) -> list[str]:
    """One fingerprint per row, of its id, tags and the images in `columns`.

    Of an image in the data set it is that of its bytes; of a file elsewhere its name, size and time of change, since
    reading it all would take as long as a stage.

    Args:
        columns: columns that are there; image columns may be empty in some rows.
    """
    names = [name for name in columns if name in rows.features]
    images = {name for name in names if isinstance(rows.features[name], ImageFeature)}
    found = []
    for batch in undecoded(rows.select_columns(names)).iter(_ROWS_AT_A_TIME):
        parts = (map(_image if name in images else repr, batch[name]) for name in names)
        found += [digest([*names, *row]) for row in zip(*parts, strict=True)]
    return found


def rows_fingerprint(rows: Dataset, columns: Sequence[str], fingerprints: Sequence[str] | None = None) -> str:
    """One fingerprint of rows in their order, and of the classes; `fingerprints` are those of the rows, if known."""
    return digest([*class_names(rows), *(fingerprints or row_fingerprints(rows, columns))])


def data_fingerprint(data: DatasetDict, columns: Sequence[str]) -> str:
    """[`rows_fingerprint`] of split "train". A stream is not read for it: it is known by its name and, where its
    shards are files here, by their sizes and times of change.

    Raises:
        DataError: it is a stream that has no name.
    """
    if not isinstance(data["train"], IterableDataset):
        return rows_fingerprint(data["train"], columns)
    source = source_of(data)
    if "source" not in source:
        raise DataError(f"data: expected a stream that load_stream opened, got a {type(data).__name__} of another")
    return digest([*class_names(data), source, tree_state(source["source"])])


def _image(value: dict | None) -> str:
    if value is None:
        return ""
    if value.get("bytes") is not None:
        return hashlib.blake2b(value["bytes"], digest_size=16).hexdigest()
    name = os.path.basename(value["path"])
    try:
        state = os.stat(value["path"])
    except OSError:  # whoever opens it will say so
        return name
    return f"{name} {state.st_size} {state.st_mtime_ns}"


def model_fingerprint(name: str | os.PathLike) -> str:
    """Of a model's weights and configuration: their contents in a folder, the commit on the Hub."""
    repository, options = pinned(os.fspath(name), {})
    if os.path.isdir(repository):
        return folder_fingerprint(Path(repository))
    try:
        config = cached_file(repository, "config.json", **options)
    except (OSError, ValueError):  # whoever loads it will say so
        return str(name)
    return f"{repository}@{extract_commit_hash(config, None)}"


def folder_fingerprint(folder: Path) -> str:
    """Of the weights and configuration in a folder."""
    parts = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name in _CONFIGURATIONS:
            parts += [path.name, file_digest(path)]
    return digest(parts)


def digest(parts: Iterable) -> str:
    """32 hexadecimal digits of a JSON-like list."""
    return hashlib.blake2b(json.dumps(list(parts)).encode(), digest_size=16).hexdigest()
