"""Loading data: whatever names a data set becomes `TaggedData` in one format, and is checked."""

from __future__ import annotations

import itertools
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import yaml
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError
from pyarrow.parquet import read_schema

from .coco import load_coco
from .folder import METADATA_NAMES, SPLIT_NAMES, load_folder
from .metadata import SEPARATOR, read_tags
from .prepared import check_once, once, read_once
from .saliency import with_saliency
from .tagged import DataError, TaggedData, class_names, has_value, undecoded
from .toy import make_toy
from .voc import load_voc

_SOURCES = (
    "'toy', 'voc' or 'coco' (with root), a directory saved by save_to_disk, a directory of tagged images, "
    "a directory of .parquet or WebDataset .tar shards, or a Hub data set id"
)
_SAVED_MARKS = ("dataset_dict.json", "dataset_info.json")
_SHARDS = {".parquet": "parquet", ".tar": "webdataset"}  # suffix → loader of datasets
IMAGE_FOLDER = "imagefolder"  # also a loader of datasets
RECORD = "recipe.yaml"  # of a stage that has saved the data
_COLUMNS = ("image_id", "image", "tags", "mask", "saliency", "superpixels", "pseudo_mask")


def load_data(
    source: str | Path,
    *,
    root: str | Path | None = None,
    classes: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    masks: Literal["evaluation", "all"] = "evaluation",
    toy: Mapping[str, int] | None = None,
    revision: str | None = None,
    separator: str = SEPARATOR,
    saliency: str | Path | Mapping[str, Any] | None = None,
) -> TaggedData:
    """Load and check a data set: splits "train" and, if there is one, "val".

    A token for the Hub and the places of caches come from the environment: HF_TOKEN, HF_HOME, HF_DATASETS_CACHE.

    Args:
        source: "toy", "voc" (`root` = a devkit's VOC2012 folder), "coco" (`root` = the folder of annotations,
            train2017 and val2017), a directory saved by save_to_disk, a directory of tagged images (see
            [`load_folder`]) or, with `columns`, as the `imagefolder` of datasets has it, a file or directory of
            Parquet or WebDataset shards (splits by their names, train-*, validation-*; of tar files the columns are
            the suffixes of the members), or the id of a data set on the Hub, also with its revision: owner/name@main.
        root: where VOC or COCO is.
        classes: names in the order of their indices. VOC and COCO are restricted to them; elsewhere they must cover
            every tag and, where the data bring class names, be the same. Multi-hot tags, and those that are one class
            index (WebDataset's .cls), get their names from them.
        columns: column here → its name in the source, for all but "toy", "voc" and "coco": {"image": "img", "tags":
            "objects.category"}; a dot leads into a column of structures or of lists of them. Class folders are the
            column `label` of an `imagefolder`, and files of masks that mask_file_name names the column `mask`.
        limit: at most so many rows per split, drawn by `seed`: some for every class if possible, then rows with masks.
        seed: of `limit`.
        masks: "evaluation" or "all", see [`load_voc`] and [`load_coco`].
        toy: arguments of [`make_toy`].
        revision: branch, tag or commit of a Hub data set.
        separator: of the tags in metadata.csv, see [`load_folder`].
        saliency: a folder of saliency maps IMAGE_ID.png or .jpg for the column `saliency`, see [`with_saliency`]; or
            only what is known about the maps that the data hold: {"source": …, "learnt_from": …}.

    Returns:
        the data; its `source` is a dict of the arguments above that name it, without those that are not given.

    Raises:
        DataError: one line that names the source, file or row at fault, and what was expected.
    """
    path = Path(source)
    if not str(source).strip():
        raise DataError(f"source: expected {_SOURCES}, got {str(source)!r}")
    if limit is not None and limit < 1:
        raise DataError(f"limit: expected at least 1 row, got {limit}")
    was_saved = is_saved(path)
    is_built_in = source in ("toy", "voc", "coco")
    loader = None if is_built_in or was_saved else loader_of(path, columns)
    is_sharded = loader is not None
    is_folder = not is_built_in and not was_saved and not is_sharded and path.is_dir()
    if columns and is_built_in:
        raise DataError(f"columns: expected a directory or a data set on the Hub, got {str(source)!r}")
    if separator != SEPARATOR and not (is_folder or loader == IMAGE_FOLDER):
        raise DataError(f"separator: expected a directory of tagged images, got {str(source)!r}")
    name = str(source)
    if not (is_built_in or was_saved or is_folder or is_sharded):
        name, revision = split_revision(name, revision)
    elif revision is not None:
        raise DataError(f"revision: expected a Hub data set, got {name!r}")
    maps = saliency if isinstance(saliency, str | Path) else None
    limited = partial(_limit_rows, limit=limit, seed=seed)
    arguments: dict[str, Any] = {
        "source": name,
        "root": None if root is None else str(root),
        "classes": None if classes is None else list(classes),
        "columns": None if columns is None else dict(columns),
        "limit": limit,
        "seed": seed if limit is not None and seed else None,  # it chooses the rows
        "masks": None if masks == "evaluation" else masks,
        "toy": None if toy is None else dict(toy),
        "revision": revision,
        "separator": None if separator == SEPARATOR else separator,
        "saliency": None if maps is None else str(maps),
    }

    def read() -> DatasetDict:
        if source == "toy":
            dataset = _with_classes(make_toy(**(toy or {})), classes)
        elif source == "voc":
            if root is None:
                raise DataError("root: expected the VOC2012 folder of a devkit for 'voc', got none")
            dataset = load_voc(root, classes, masks)
        elif source == "coco":
            if root is None:
                raise DataError("root: expected the folder of annotations, train2017 and val2017 for 'coco', got none")
            dataset = load_coco(root, classes, masks, limited)
        elif is_folder:
            dataset = load_folder(path, classes, separator, skip=maps)
        else:
            if was_saved:
                found = _load_saved(name)
            elif is_sharded:
                found = _load_files(name, columns or {})
            else:
                found = _load_from_hub(name, revision)
            dataset = _unify(found, name, classes, columns or {}, separator if loader == IMAGE_FOLDER else None)
        if maps is not None:
            dataset = with_saliency(dataset, maps, count_others=limit is None)
        return DatasetDict({split: limited(rows) for split, rows in dataset.items()})

    folders = [folder for folder in (root, None if is_built_in else path, maps) if folder is not None]
    if is_folder or source in ("voc", "coco"):
        dataset = read_once(read, arguments, *folders, paints=source == "coco")
    else:
        dataset = read()
        check_once(dataset, arguments, *folders)
    if maps is None and any(
        "saliency" in rows.features and has_value(rows, "saliency").any() for rows in dataset.values()
    ):
        arguments["saliency"] = dict(saliency or _recorded_saliency(path, name))  # type: ignore[arg-type]
    return TaggedData(dataset, {argument: value for argument, value in arguments.items() if value is not None})


def _recorded_saliency(folder: Path, name: str) -> dict[str, Any]:
    """Where the saliency maps of the data `name` are from: as the stage that saved `folder` has recorded it."""
    try:
        record = yaml.safe_load((folder / RECORD).read_text())
        told = record["data"]["saliency"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        told = name
    return dict(told) if isinstance(told, Mapping) else {"source": str(told), "learnt_from": None}


def split_revision(source: str, revision: str | None) -> tuple[str, str | None]:
    """`owner/name@revision` → the id and the revision."""
    name, _, found = source.partition("@")
    if found and revision not in (None, found):
        raise DataError(f"revision: expected one, got {found!r} in {source!r} and {revision!r}")
    return name, found or revision


def _load_saved(name: str) -> Dataset | DatasetDict:
    try:
        return load_from_disk(name)
    except (OSError, ValueError, LookupError, TypeError) as error:  # what a damaged file leads to
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: expected a data set saved by save_to_disk, got a damaged one ({reason})") from error


def is_saved(path: Path) -> bool:
    """Whether a directory was written by save_to_disk."""
    return any((path / mark).is_file() for mark in _SAVED_MARKS)


def loader_of(path: Path, columns: Mapping[str, str] | None = None) -> str | None:
    """The loader of datasets for a file, or for the files of a directory and those below it; None for a directory of
    tagged images whose `columns` need no other names: it is read here, with messages that name the row."""
    if path.is_file():
        return _SHARDS.get(path.suffix)
    if not any((path / name).is_file() for name in METADATA_NAMES):
        found = (suffix for suffix in _SHARDS for _ in (*path.glob(f"*{suffix}"), *path.glob(f"*/*{suffix}")))
        if suffix := next(found, ""):
            return _SHARDS[suffix]
    return IMAGE_FOLDER if columns and path.is_dir() else None


def check_shards(path: Path, tags: str) -> None:
    """That Parquet files can be read and agree on the classes, and that tar files are whole.

    The libraries would take one Parquet file's names for all, and a damaged header in a tar file for its end.

    Args:
        path: a file, or a directory of them.
        tags: the column of tags, "a.b" for the field b of a column a.

    Raises:
        DataError: names the file that can't be read or differs.
    """
    loader = loader_of(path)
    suffix = next((suffix for suffix, name in _SHARDS.items() if name == loader), None)
    if suffix is None:
        return
    files = [path] if path.is_file() else sorted(path.rglob(f"*{suffix}"))
    if loader == "parquet":
        _check_parquet(files, tags)
    else:
        once(lambda: _check_tar(files), "tar", path)


def _check_tar(files: Sequence[Path]) -> None:
    """Walks the headers, behind which there are zeros alone."""
    for file in files:
        start = 0
        try:
            archive: Any = tarfile.open(file)
            with archive:
                while archive.next() is not None:
                    archive.members.clear()  # of which there may be a million
                    start = archive.offset
                archive.fileobj.seek(start)
                rest = archive.fileobj.read(tarfile.BLOCKSIZE)
                is_whole = len(rest) == tarfile.BLOCKSIZE
                while is_whole and rest:
                    is_whole, rest = not any(rest), archive.fileobj.read(tarfile.RECORDSIZE)
        except (tarfile.TarError, OSError, EOFError, zlib.error):
            is_whole = False
        if not is_whole:
            raise DataError(f"{file}, byte {start}: expected a whole tar file, got one that is cut or damaged there")


def _check_parquet(files: Sequence[Path], tags: str) -> None:
    first: tuple[list[str], Path] | None = None
    for file in files:
        try:
            features = Features.from_arrow_schema(read_schema(file))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{file}: expected a Parquet file, got one that can't be read ({reason})") from error
        label = label_of(feature_at(features, tags))
        if isinstance(label, ClassLabel):
            names, where = first = first or (label.names, file)
            if label.names != names:
                got = f"{', '.join(names)}, got {', '.join(label.names)}"
                raise DataError(f"{file}, column {tags!r}: expected the classes of {where}, {got}")


def feature_at(features: Mapping[str, Any], place: str) -> Any:
    """The feature of a column, or of a field "a.b" in it; None where there is none."""
    outer, _, field = place.partition(".")
    if place in features or not field:
        return features.get(place)
    feature = features.get(outer)
    if isinstance(feature, List) and isinstance(feature.feature, dict) and field in feature.feature:
        return List(feature.feature[field])
    return feature.get(field) if isinstance(feature, dict) else None


def _load_files(name: str, columns: Mapping[str, str]) -> DatasetDict:
    path = Path(name)
    check_shards(path, columns.get("tags", "tags"))
    files = {"data_files": name} if path.is_file() else {"data_dir": name}
    loader = str(loader_of(path, columns))
    try:
        found = load_dataset(loader, **files)
    except (OSError, ValueError, DatasetsError) as error:  # a damaged file
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"{name}: expected Parquet or WebDataset shards or a folder of images, got what can't be read ({reason})"
        ) from error
    image = columns.get("image", "image")
    if loader == IMAGE_FOLDER and "image_id" not in columns:
        return DatasetDict({split: _with_file_ids(rows, image, name) for split, rows in found.items()})
    return found


def _with_file_ids(rows: Dataset, column: str, folder: str) -> Dataset:
    if "image_id" in rows.features or not isinstance(rows.features.get(column), ImageFeature):
        return rows
    images = undecoded(rows.select_columns([column]))[column]
    return rows.add_column("image_id", [file_id(image, folder) for image in images])


def _load_from_hub(source: str, revision: str | None) -> DatasetDict:
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists():
        raise DataError(f"source: expected {_SOURCES}, got {source!r}")
    try:
        return load_dataset(source, revision=revision)
    except (OSError, ValueError) as error:  # not found, no network, no access, unknown revision
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"source: expected {_SOURCES}, got {source!r} ({reason})") from error


def _unify(
    dataset: Dataset | DatasetDict,
    source: str,
    classes: Sequence[str] | None,
    columns: Mapping[str, str],
    separator: str | None = None,
) -> DatasetDict:
    """Splits and columns with the names used here, tags as class indices; names in one text are cut at `separator`."""
    found = dataset if isinstance(dataset, DatasetDict) else {"train": dataset}
    names = {split: next((name for name in known if name in found), None) for split, known in SPLIT_NAMES.items()}
    if names["train"] is None:
        raise DataError(f"{source!r}: expected a split 'train', got {', '.join(found)}")
    splits = {split: _map_columns(found[name], source, columns) for split, name in names.items() if name}
    splits = _index_tags(splits, source, classes, separator)
    return _with_classes(DatasetDict({split: _with_ids(rows, split) for split, rows in splits.items()}), classes)


def _map_columns(rows: Dataset, source: str, columns: Mapping[str, str]) -> Dataset:
    for column, given in columns.items():
        if column not in _COLUMNS:
            raise DataError(f"columns: expected one of {', '.join(_COLUMNS)}, got {column!r}")
        rows = _with_nested(rows, given)
        if given not in rows.features:
            raise DataError(f"columns: expected a column of {source!r}, {', '.join(rows.features)}, got {given!r}")
    renamed = {given: column for column, given in columns.items() if column != given}
    rows = rows.remove_columns([column for column in renamed.values() if column in rows.features])
    rows = rows.rename_columns(renamed)
    missing = [name for name in ("image", "tags") if name not in rows.features]
    if missing:
        advice = "the masks of a stream are read with --streaming" if "pseudo_mask" in rows.features else None
        raise DataError(
            f"{source!r}: expected a column {missing[0]!r}, got {', '.join(rows.features)} "
            f"({advice or 'name yours in `columns`'})"
        )
    return rows.select_columns([name for name in _COLUMNS if name in rows.features])


def _with_nested(rows: Dataset, name: str) -> Dataset:
    """`rows` with a column "a.b" from the field b of a column a of structures or of lists of them, if there is one."""
    outer, _, field = name.partition(".")
    feature = rows.features.get(outer)
    if isinstance(feature, List) and isinstance(feature.feature, dict) and field in feature.feature:
        values = [[part[field] for part in parts or ()] for parts in rows[outer]]
        found = Dataset.from_dict({name: values}, features=Features({name: List(feature.feature[field])}))
    elif isinstance(feature, dict):
        found = rows.select_columns([outer]).flatten()
    else:
        return rows
    if name in rows.features or name not in found.features:
        return rows
    return concatenate_datasets([rows, found.select_columns([name])], axis=1)


def _index_tags(
    splits: dict[str, Dataset], source: str, classes: Sequence[str] | None, separator: str | None
) -> dict[str, Dataset]:
    """Tags as names, a name, ClassLabels, a ClassLabel or, with `classes`, multi-hot or one index → lists of
    ClassLabels, the same in every split."""
    feature = splits["train"].features["tags"]
    label = label_of(feature)
    for split, rows in splits.items():
        theirs = label_of(rows.features["tags"])
        if theirs != Value("null") and _kind(theirs) != _kind(label):  # null: no row of the split has a tag
            raise DataError(f"{source!r}, split {split!r}: tags: expected {label} as in 'train', got {theirs}")
    if isinstance(label, ClassLabel) and all(rows.features["tags"] == List(label) for rows in splits.values()):
        return splits
    cut = separator if _kind(label) == "names" and not isinstance(feature, List) else None
    tags = {
        split: [
            as_list(value)
            if cut is None
            else read_tags(value or "", cut, classes or (), f"{source}, {split} row {row}")
            for row, value in enumerate(rows["tags"], start=1)
        ]
        for split, rows in splits.items()
    }
    if isinstance(label, ClassLabel):
        names = label.names
    elif _kind(label) == "names":
        if any(name is None for values in tags.values() for value in values for name in value):
            raise DataError(f"{source!r}, column 'tags': expected lists of class names, got one with an empty name")
        names = list(classes or sorted({name for values in tags.values() for value in values for name in value}))
        index = {name: number for number, name in enumerate(names)}
        unknown = sorted({name for values in tags.values() for value in values for name in value if name not in index})
        if unknown:
            raise DataError(f"{source!r}: tags: expected names from {', '.join(names)}, got {unknown[0]!r}")
        tags = {split: [[index[name] for name in value] for value in values] for split, values in tags.items()}
    elif isinstance(feature, List) and isinstance(label, Value) and classes:
        names = list(classes)
        if any(len(value) != len(names) or not set(value) <= {0, 1} for values in tags.values() for value in values):
            raise DataError(
                f"{source!r}, column 'tags': expected 0 or 1 for each of {len(names)} classes in every row, got others"
            )
        tags = {split: [np.flatnonzero(value).tolist() for value in values] for split, values in tags.items()}
    elif classes and all(is_index(rows.features["tags"]) for rows in splits.values()):
        names = list(classes)
        found = {value for values in tags.values() for value in itertools.chain.from_iterable(values)}
        outside = sorted(found - set(range(len(names))))
        if outside:
            raise DataError(f"{source!r}, column 'tags': expected class indices 0..{len(names) - 1}, got {outside[0]}")
    else:
        raise DataError(
            f"{source!r}, column 'tags': expected class names or ClassLabels, one or a list, or, with --classes, "
            f"0 or 1 for each class or one class index, got {feature}"
        )
    wanted = List(ClassLabel(names=names))
    return {
        split: rows.remove_columns("tags").add_column("tags", tags[split], feature=wanted)
        for split, rows in splits.items()
    }


def is_index(feature: Any) -> bool:
    """Whether a tag is one whole number, as WebDataset's .cls has it."""
    return isinstance(feature, Value) and pa.types.is_integer(feature.pa_type)


def label_of(feature: Any) -> Any:
    """The feature of a single tag, where tags are one or a list."""
    return feature.feature if isinstance(feature, List) else feature


def _kind(label: Any) -> Any:
    """What tags of different splits must have in common: the classes, or that they are names, or something else."""
    if isinstance(label, ClassLabel):
        return label
    return "names" if isinstance(label, Value) and label.dtype in ("string", "large_string") else "others"


def as_list(value: object) -> list:
    """One tag, a list of tags or none → a list."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def file_id(image: Mapping[str, Any] | None, folder: str) -> str | None:
    """The image_id of a file in a folder of tagged images: its name there."""
    return Path(os.path.relpath(image["path"], folder)).as_posix() if image else None


def _with_ids(rows: Dataset, split: str) -> Dataset:
    if "image_id" in rows.features:
        is_text = rows.features["image_id"] == Value("string")
        return rows if is_text else rows.cast_column("image_id", Value("string"))
    return rows.add_column("image_id", [f"{split}_{index:06d}" for index in range(len(rows))])


def _with_classes(dataset: DatasetDict, classes: Sequence[str] | None) -> DatasetDict:
    """Only VOC and COCO can be restricted; a data set that brings its classes must bring the wanted ones."""
    if classes and list(classes) != class_names(dataset):
        known = ", ".join(class_names(dataset))
        raise DataError(f"classes: expected those of the data set, {known}, got {', '.join(classes)}")
    return dataset


def _limit_rows(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows in their order: first one for every class, then those with masks, then the others."""
    if limit is None or len(rows) <= limit:
        return rows
    order = np.random.default_rng(seed).permutation(len(rows))
    if "mask" in rows.features:
        order = order[np.argsort(~has_value(rows, "mask")[order], kind="stable")]
    tags = rows["tags"][:]
    chosen: list[int] = []
    seen: set[int] = set()
    for index in order:
        if not seen.issuperset(tags[index]):
            chosen.append(index)
            seen.update(tags[index])
    chosen = list(dict.fromkeys([*chosen, *order]))[:limit]
    return rows.select(sorted(chosen))
