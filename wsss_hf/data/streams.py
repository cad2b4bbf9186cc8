"""Streamed data: rows that are read one after the other while a stage runs, and are never all on this machine."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from accelerate import PartialState
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset_builder,
    load_from_disk,
)
from datasets import Image as ImageFeature

from .folder import SPLIT_NAMES, load_folder
from .metadata import SEPARATOR, read_tags
from .sources import (
    IMAGE_FOLDER,
    RECORD,
    as_list,
    check_shards,
    feature_at,
    file_id,
    is_index,
    is_saved,
    label_of,
    loader_of,
    split_revision,
)
from .tagged import DataError, TaggedData, check_class_names, undecoded

WINDOW = 256  # rows of a stream that are in memory, where no setting says how many
_FOLDER_SHARDS = 64  # that a directory's rows are cut into: processes share them, and each pass mixes them
_MAPS = ("mask", "saliency", "superpixels", "pseudo_mask", "confidence")


def load_stream(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    separator: str = SEPARATOR,
) -> TaggedData:
    """Open a data set as a stream, for [`train_cam`], [`make_masks`], [`train_segmenter`] and [`evaluate`].

    Nothing is known about rows before they are read: what is wrong with one ends the stage there. The loaders of
    `datasets` read a file or a folder of Parquet shards or of WebDataset's tar files, or a data set on the Hub. Of a
    directory of tagged images the names and tags are read at once, as [`load_folder`] does, and no image. The pseudo
    masks that `make_masks` wrote for a stream are read beside it: their row is found by its image_id, for which
    all image_ids are in memory.

    Args:
        source: the shards, the directory, the id of a data set, also owner/name@revision, or what `make_masks` wrote
            for one of these.
        classes: names in the order of their indices; needed where tags are names, multi-hot or one index.
        columns, revision, separator: as of [`load_data`]. What `make_masks` wrote knows them.

    Returns:
        splits "train" and, if there is one, "val": each an `IterableDataset` of image_id, image (not decoded), tags
        (class indices) and further maps. Without a column of image_ids they count rows (of a shard that is read alone,
        its own) or, of an `imagefolder`, are names of files. The `revision` in `source` is the commit that is read.

    Raises:
        DataError: no such data, no split "train", or columns that are not there or can't be tags and images.
    """
    labelled = _labelled_stream(Path(source))
    if labelled is not None:
        if classes or columns or separator != SEPARATOR:
            raise DataError(f"{source}: expected no classes, columns or separator beside the masks of a stream")
        return _with_pseudo_masks(load_stream(**labelled), Path(source))
    was_saved, name = is_saved(Path(source)), str(source)
    loader = None if was_saved else loader_of(Path(source), columns)
    if Path(source).is_dir() and not was_saved and loader is None:
        return _folder_stream(source, classes, revision, separator)
    if separator != SEPARATOR and loader != IMAGE_FOLDER:
        raise DataError(f"separator: expected a directory of tagged images, got {str(source)!r}")
    check_shards(Path(source), (columns or {}).get("tags", "tags"))
    is_on_hub = not Path(source).exists()
    if is_on_hub:
        name, revision = split_revision(name, revision)
    options = {} if loader is None else {"data_files" if Path(source).is_file() else "data_dir": name}
    try:
        builder = load_dataset_builder(loader or name, revision=revision, **options)
        found = builder.as_streaming_dataset()
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: expected shards or the id of a data set to stream, got {reason}") from error
    splits = {split: next((name for name in names if name in found), None) for split, names in SPLIT_NAMES.items()}
    if not isinstance(found, IterableDatasetDict) or splits["train"] is None:
        raise DataError(f"{name}: expected a split 'train', got {', '.join(map(str, found))}")
    _check_columns([found[theirs] for theirs in splits.values() if theirs is not None], name, columns or {})
    rows = {
        split: _with_our_columns(
            found[theirs], name, classes, columns or {}, split, separator if loader == IMAGE_FOLDER else None
        )
        for split, theirs in splits.items()
        if theirs is not None
    }
    arguments = {"source": name, "streaming": True, "classes": classes and list(classes), "columns": columns}
    arguments["separator"] = None if separator == SEPARATOR else separator
    if is_on_hub:  # its commit: later stages read the same rows, and know others by it
        revision = builder.hash
    given = (arguments | {"revision": revision}).items()
    return TaggedData(rows, {key: value for key, value in given if value is not None})


def windows(
    rows: IterableDataset, size: int, known: Callable[[str], int | None] = lambda name: None
) -> Iterator[tuple[str, Dataset]]:
    """This process's share of a stream, as data sets in memory of `size` consecutive rows.

    The last one of a shard is shorter, perhaps empty. The windows do not depend on the number of processes. These
    share the shards where there is one for each of them, else the windows; rows of the others' are read past.

    Args:
        known: name of a window → how many rows it has, where that is known; it is then left out and its rows are read
            past, and a shard whose windows are all known is not opened.

    Returns:
        pairs of a name, by which windows are in the order of the stream, and the rows.
    """
    state = PartialState()
    by_shard = rows.num_shards >= state.num_processes
    for shard in range(rows.num_shards):
        if by_shard and shard % state.num_processes != state.process_index:
            continue
        reader, start = None, 0
        for number in itertools.count():
            name = f"{shard:06d}-{number:06d}"
            count = known(name)
            if count is not None:
                reader = None
            else:
                reader = reader or iter(rows.shard(rows.num_shards, shard).skip(start))
                read = itertools.islice(reader, size)
                if by_shard or number % state.num_processes == state.process_index:
                    with whole_shards():
                        window = _in_memory(read, rows.features)
                    count = len(window)
                    yield name, window
                else:
                    with whole_shards():
                        count = sum(1 for _ in read)
            start += count
            if count < size:
                break


def sample_of(rows: IterableDataset, count: int = 256) -> Dataset:
    """About `count` rows of a stream, the same in every process: the first of up to 16 evenly spaced shards.

    Raises:
        DataError: there is none.
    """
    shards = np.unique(np.linspace(0, rows.num_shards - 1, 16).astype(int)).tolist()
    parts = (rows.shard(rows.num_shards, shard).take(-(-count // len(shards))) for shard in shards)
    with whole_shards():
        sample = _in_memory(itertools.chain.from_iterable(parts), rows.features)
    if not len(sample):
        raise DataError("stream: expected rows, got none")
    return sample


@contextmanager
def whole_shards() -> Iterator[None]:
    """For reading: what libraries say of a damaged file, or of one that is out of reach, in one line.

    Raises:
        DataError: there is one.
    """
    try:
        yield
    except (tarfile.TarError, pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"stream: expected shards that can be read, got one that can't be ({reason})") from error


def _in_memory(rows: Iterable[dict], features: Features) -> Dataset:
    """As `Dataset.from_list`, which fails where there is no row."""
    columns: dict[str, list] = {name: [] for name in features}
    for row in rows:
        for name, values in columns.items():
            values.append(row[name])
    return Dataset.from_dict(columns, features=features)


def _folder_stream(
    source: str | Path, classes: Sequence[str] | None, revision: str | None, separator: str
) -> TaggedData:
    if revision is not None:
        raise DataError(f"revision: expected a Hub data set, got {str(source)!r}")
    rows = {
        split: undecoded(found).to_iterable_dataset(num_shards=min(_FOLDER_SHARDS, len(found)))
        for split, found in load_folder(source, classes, separator).items()
    }
    known = {"classes": classes and list(classes), "separator": None if separator == SEPARATOR else separator}
    given = {name: value for name, value in known.items() if value is not None}
    return TaggedData(rows, {"source": str(source), "streaming": True} | given)


def _labelled_stream(folder: Path) -> dict[str, Any] | None:
    """The arguments of the stream that `folder` has pseudo masks for; None where it is something else."""
    try:
        source = yaml.safe_load((folder / RECORD).read_text())["data"]
        is_streamed = source.pop("streaming", False) and (folder / "dataset_dict.json").is_file()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None
    return source if is_streamed else None


def _with_pseudo_masks(data: TaggedData, folder: Path) -> TaggedData:
    masks = undecoded(load_from_disk(str(folder))["train"])
    names = [name for name in ("pseudo_mask", "confidence") if name in masks.features]
    places = {image_id: place for place, image_id in enumerate(masks["image_id"])}
    masks = masks.select_columns(names)

    def add(row: dict) -> dict:
        if row["image_id"] not in places:
            raise DataError(f"row {row['image_id']!r}: expected a pseudo mask in {folder}, got none; its data changed")
        return row | masks[places[row["image_id"]]]

    features = data["train"].features | {name: ImageFeature(decode=False) for name in names}
    rows = data["train"].map(add, features=Features(features))
    return TaggedData({**data, "train": rows}, {"source": str(folder), "streaming": True})


def _check_columns(splits: Sequence[IterableDataset], source: str, columns: Mapping[str, str]) -> None:
    """That columns have types, and that those exist in some split which are mapped to ours."""
    if any(rows.features is None for rows in splits):
        raise DataError(f"{source}: expected shards with images, Parquet or WebDataset, got others")
    for ours, theirs in columns.items():
        known = ("image_id", "image", "tags", *_MAPS)
        if ours not in known:
            raise DataError(f"columns: expected one of {', '.join(known)}, got {ours!r}")
        if all(feature_at(rows.features, theirs) is None for rows in splits):
            raise DataError(f"columns: expected a column of {source}, {', '.join(splits[0].features)}, got {theirs!r}")


def _with_our_columns(
    rows: IterableDataset,
    source: str,
    classes: Sequence[str] | None,
    columns: Mapping[str, str],
    split: str,
    separator: str | None,
) -> IterableDataset:
    rows = undecoded(rows)
    places = {name: columns.get(name, name) for name in ("image_id", "image", "tags", *_MAPS)}
    features = {name: feature_at(rows.features, place) for name, place in places.items()}
    for name in ("image", "tags"):
        if features[name] is None:
            raise DataError(f"{source}: expected a column {places[name]!r}, got {', '.join(rows.features)}")
    for name in ("image", *_MAPS):
        if features[name] is not None and not _holds_images(features[name]):
            expected = f"{source}, column {places[name]!r}: expected images (datasets.Image)"
            raise DataError(f"{expected}, got {features[name]}")
    label = label_of(features["tags"])
    names = list(label.names if isinstance(label, ClassLabel) else classes or ())
    if not names:
        raise DataError(f"{source}: expected --classes for a stream whose tags are {features['tags']}")
    if classes and list(classes) != names:
        raise DataError(f"classes: expected those of the data set, {', '.join(names)}, got {', '.join(classes)}")
    check_class_names(names)
    kept = [name for name in ("image", *_MAPS) if features[name] is not None]
    numbers = {name: number for number, name in enumerate(names)}
    indices = set(numbers.values())
    are_indices = isinstance(label, ClassLabel) or is_index(features["tags"])

    def convert(row: dict, index: int) -> dict:
        identity = None if features["image_id"] is None else _value(row, places["image_id"])
        if identity is None and separator is not None:
            identity = file_id(_value(row, places["image"]), source)
        found = {"image_id": f"{split}_{index:06d}" if identity is None else str(identity)}
        value, where = _value(row, places["tags"]), f"{source}: row {found['image_id']!r}"
        tags = as_list(value)
        if separator is not None and isinstance(value, str):
            tags = read_tags(value, separator, names, where)
        if not are_indices:
            tags = _indices(tags, numbers, where)
        elif (value is None and isinstance(features["tags"], List)) or not set(tags) <= indices:
            raise DataError(f"{where}: tags: expected class indices 0..{len(names) - 1}, got {value}")
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


def _holds_images(feature: Any) -> bool:
    """Also of shards without the library's own description of their columns."""
    return isinstance(feature, ImageFeature) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())


def _value(row: dict, place: str) -> Any:
    outer, _, field = place.partition(".")
    if place in row or not field:
        return row[place]
    parts = row[outer]
    return [part[field] for part in parts or ()] if isinstance(parts, list) else (parts or {}).get(field)
