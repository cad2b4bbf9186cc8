"""Streamed data: rows that are read one after the other while a training runs, and are never all on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Features, IterableDataset, IterableDatasetDict, List, Value, load_dataset
from datasets import Image as ImageFeature

from .folder import SPLIT_NAMES
from .sources import as_list, shard_loader
from .tagged import DataError, TaggedData, check_class_names, undecoded

_MAPS = ("mask", "saliency", "superpixels", "pseudo_mask", "confidence")


def load_stream(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
) -> TaggedData:
    """Open the split "train" of a data set as a stream, for [`train_cam`] and [`train_segmenter`].

    Nothing is known about rows before they are read: what is wrong with one ends the training there. The loaders of
    `datasets` read a file or a folder of Parquet shards or of WebDataset's tar files, or a data set on the Hub.

    Args:
        source: the shards, or the id of a data set.
        classes: names in the order of their indices; needed where tags are names or multi-hot.
        columns, revision: as of [`load_data`].

    Returns:
        {"train": an `IterableDataset` of image_id, image (not decoded), tags (class indices) and further maps}.

    Raises:
        DataError: no such data, no split "train", or columns that can't be tags and images.
    """
    loader, name = shard_loader(Path(source)), str(source)
    options = {} if loader is None else {"data_files" if Path(source).is_file() else "data_dir": name}
    try:
        found = load_dataset(loader or name, revision=revision, streaming=True, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: expected shards or the id of a data set to stream, got {reason}") from error
    split = next((split for split in SPLIT_NAMES["train"] if split in found), None)
    if not isinstance(found, IterableDatasetDict) or split is None:
        raise DataError(f"{name}: expected a split 'train', got {', '.join(map(str, found))}")
    rows = _with_our_columns(found[split], name, classes, columns or {})
    arguments = {"source": name, "streaming": True, "classes": classes and list(classes), "columns": columns}
    given = (arguments | {"revision": revision}).items()
    return TaggedData({"train": rows}, {key: value for key, value in given if value is not None})


def _with_our_columns(
    rows: IterableDataset, source: str, classes: Sequence[str] | None, columns: Mapping[str, str]
) -> IterableDataset:
    rows = undecoded(rows)
    places = {name: columns.get(name, name) for name in ("image_id", "image", "tags", *_MAPS)}
    features = {name: _feature(rows.features, place) for name, place in places.items()}
    for name in ("image", "tags"):
        if features[name] is None:
            raise DataError(f"{source}: expected a column {places[name]!r}, got {', '.join(rows.features)}")
    label: Any = features["tags"].feature if isinstance(features["tags"], List) else features["tags"]
    names = list(label.names if isinstance(label, ClassLabel) else classes or ())
    if not names:
        raise DataError(f"{source}: expected --classes for a stream whose tags are {features['tags']}")
    if classes and list(classes) != names:
        raise DataError(f"classes: expected those of the data set, {', '.join(names)}, got {', '.join(classes)}")
    check_class_names(names)
    kept = [name for name in ("image", *_MAPS) if features[name] is not None]
    numbers = {name: number for number, name in enumerate(names)}

    def convert(row: dict, index: int) -> dict:
        identity = None if features["image_id"] is None else _value(row, places["image_id"])
        found = {"image_id": f"train_{index:06d}" if identity is None else str(identity)}
        tags = as_list(_value(row, places["tags"]))
        if not isinstance(label, ClassLabel):
            tags = _indices(tags, numbers, f"{source}: row {found['image_id']!r}")
        return found | {"tags": tags} | {name: _value(row, places[name]) for name in kept}

    wanted = {"image_id": Value("string"), "tags": List(ClassLabel(names=names))}
    wanted |= {name: ImageFeature(decode=False) for name in kept}
    return rows.map(convert, with_indices=True, remove_columns=list(rows.features), features=Features(wanted))


def _indices(tags: list, numbers: Mapping[str, int], where: str) -> list[int]:
    """Names or a multi-hot row → class indices."""
    unknown = [tag for tag in tags if isinstance(tag, str) and tag not in numbers]
    if unknown:
        raise DataError(f"{where}: tags: expected names from {', '.join(numbers)}, got {unknown[0]!r}")
    if all(isinstance(tag, str) for tag in tags):
        return sorted(numbers[tag] for tag in set(tags))
    if len(tags) != len(numbers) or not set(tags) <= {0, 1}:
        raise DataError(f"{where}: tags: expected 0 or 1 for each of {len(numbers)} classes, got {tags}")
    return np.flatnonzero(tags).tolist()


def _feature(features: Mapping[str, Any], place: str) -> Any:
    """The feature of a column, or of a field "a.b" in it; None where there is none."""
    outer, _, field = place.partition(".")
    if place in features or not field:
        return features.get(place)
    feature = features.get(outer)
    if isinstance(feature, List) and isinstance(feature.feature, dict) and field in feature.feature:
        return List(feature.feature[field])
    return feature.get(field) if isinstance(feature, dict) else None


def _value(row: dict, place: str) -> Any:
    outer, _, field = place.partition(".")
    if place in row or not field:
        return row[place]
    parts = row[outer]
    return [part[field] for part in parts or ()] if isinstance(parts, list) else (parts or {}).get(field)
