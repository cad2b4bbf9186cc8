"""The one door to data: whatever names a data set becomes a DatasetDict that fits the contract."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, List, Value, load_dataset, load_from_disk

from .coco import load_coco
from .folder import load_folder
from .tagged import DataError, check_dataset, class_names, has_value
from .toy import make_toy
from .voc import load_voc

_SOURCES = (
    "'toy', 'voc' or 'coco' (with root), a directory saved by save_to_disk, a directory of tagged images, "
    "or a Hub data set id"
)
_SAVED_MARKS = ("dataset_dict.json", "dataset_info.json")
_SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev", "test")}  # the first that exists
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
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    quiet: bool = False,
) -> DatasetDict:
    """Load and check a data set: splits "train" and, if there is one, "val".

    source: "toy" (`toy` = arguments of make_toy), "voc" (`root` = a devkit's VOC2012 folder), "coco" (`root` = the
        folder of annotations, train2017 and val2017), a directory saved by save_to_disk, a directory of tagged images
        (see load_folder), or the id of a data set on the Hub.
    classes: names in the order of their indices. VOC and COCO are restricted to them; elsewhere they must cover every
        tag and, where the data bring class names, be the same.
    columns: our name → the name in the source, for saved and Hub data sets: {"image": "img", "tags": "labels"}.
    limit: at most so many rows per split, drawn by `seed`: some for every class if possible, then rows with masks.
    masks: "evaluation" or "all", see load_voc and load_coco.
    revision, token, cache_dir: passed on to the Hub; below cache_dir are COCO's masks as well.
    quiet: no progress bar while COCO's masks are painted.
    Raises DataError with one line that names the source, file or row at fault and what would be right.
    """
    path = Path(source)
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 row, not {limit}")
    is_saved = any((path / mark).is_file() for mark in _SAVED_MARKS)
    if columns and (source in ("toy", "voc", "coco") or (path.is_dir() and not is_saved)):
        raise DataError(f"columns maps the columns of saved and Hub data sets; {str(source)!r} is neither")
    if source == "toy":
        dataset = _with_classes(make_toy(**(toy or {})), classes)
    elif source == "voc":
        if root is None:
            raise DataError("source 'voc' needs root, the VOC2012 folder of a devkit")
        dataset = load_voc(root, classes, masks)
    elif source == "coco":
        if root is None:
            raise DataError("source 'coco' needs root, the folder of annotations, train2017 and val2017")
        dataset = load_coco(root, classes, masks, partial(_limit_rows, limit=limit, seed=seed), cache_dir, quiet)
    elif is_saved:
        dataset = _to_contract(load_from_disk(str(path)), str(source), classes, columns or {})
    elif path.is_dir():
        dataset = load_folder(path, classes)
    else:
        dataset = _load_from_hub(str(source), revision, token, cache_dir)
        dataset = _to_contract(dataset, str(source), classes, columns or {})
    dataset = DatasetDict({split: _limit_rows(rows, limit, seed) for split, rows in dataset.items()})
    check_dataset(dataset)
    return dataset


def _load_from_hub(
    source: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> DatasetDict:
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists():
        raise DataError(f"no data at {source!r}; a source is {_SOURCES}")
    try:
        return load_dataset(source, revision=revision, token=token, cache_dir=cache_dir and str(cache_dir))
    except (OSError, ValueError) as error:  # not found, no network, no access, unknown revision
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"no data at {source!r} ({reason}); a source is {_SOURCES}") from error


def _to_contract(
    dataset: Dataset | DatasetDict, source: str, classes: Sequence[str] | None, columns: Mapping[str, str]
) -> DatasetDict:
    """Name splits and columns as the contract does and turn tags into class indices."""
    found = dataset if isinstance(dataset, DatasetDict) else {"train": dataset}
    names = {ours: next((name for name in theirs if name in found), None) for ours, theirs in _SPLIT_NAMES.items()}
    if names["train"] is None:
        raise DataError(f"{source!r} has no split 'train', only {', '.join(found)}")
    splits = {ours: _map_columns(found[name], source, columns) for ours, name in names.items() if name}
    splits = _index_tags(splits, source, classes)
    return _with_classes(DatasetDict({split: _with_ids(rows, split) for split, rows in splits.items()}), classes)


def _map_columns(rows: Dataset, source: str, columns: Mapping[str, str]) -> Dataset:
    for ours, theirs in columns.items():
        if ours not in _COLUMNS:
            raise DataError(f"columns maps {ours!r}, which is none of {', '.join(_COLUMNS)}")
        if theirs not in rows.features:
            raise DataError(f"{source!r} has no column {theirs!r}; it has {', '.join(rows.features)}")
    taken = [ours for ours, theirs in columns.items() if ours != theirs and ours in rows.features]
    rows = rows.remove_columns(taken).rename_columns(
        {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    )
    missing = [name for name in ("image", "tags") if name not in rows.features]
    if missing:
        raise DataError(
            f"{source!r} has no column {missing[0]!r}, only {', '.join(rows.features)}; name yours in `columns`"
        )
    return rows.select_columns([name for name in _COLUMNS if name in rows.features])


def _index_tags(splits: dict[str, Dataset], source: str, classes: Sequence[str] | None) -> dict[str, Dataset]:
    """Tags as names, a name, ClassLabels or a ClassLabel → lists of ClassLabels, the same in every split."""
    feature = splits["train"].features["tags"]
    if isinstance(feature, List) and isinstance(feature.feature, ClassLabel):
        return splits
    label = feature.feature if isinstance(feature, List) else feature
    tags = {split: [_as_list(value) for value in rows["tags"]] for split, rows in splits.items()}
    if isinstance(label, ClassLabel):
        names = label.names
    elif isinstance(label, Value) and label.dtype in ("string", "large_string"):
        names = list(classes or sorted({name for values in tags.values() for value in values for name in value}))
        index = {name: number for number, name in enumerate(names)}
        unknown = sorted({name for values in tags.values() for value in values for name in value if name not in index})
        if unknown:
            raise DataError(f"{source!r} has the unknown class {unknown[0]!r}; known are {', '.join(names)}")
        tags = {split: [[index[name] for name in value] for value in values] for split, values in tags.items()}
    else:
        raise DataError(
            f"column 'tags' of {source!r} must hold class names or ClassLabels, one or a list, not {feature}"
        )
    wanted = List(ClassLabel(names=names))
    return {
        split: rows.remove_columns("tags").add_column("tags", tags[split], feature=wanted)
        for split, rows in splits.items()
    }


def _as_list(value: object) -> list:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _with_ids(rows: Dataset, split: str) -> Dataset:
    if "image_id" in rows.features:
        is_text = rows.features["image_id"] == Value("string")
        return rows if is_text else rows.cast_column("image_id", Value("string"))
    return rows.add_column("image_id", [f"{split}_{index:06d}" for index in range(len(rows))])


def _with_classes(dataset: DatasetDict, classes: Sequence[str] | None) -> DatasetDict:
    """Only VOC and COCO can be restricted; a data set that brings its classes must bring the wanted ones."""
    if classes and list(classes) != class_names(dataset):
        raise DataError(
            f"classes {', '.join(classes)} are not those of the data set: {', '.join(class_names(dataset))}"
        )
    return dataset


def _limit_rows(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows in their old order: first one for every class, then those with masks, then the others."""
    if limit is None or len(rows) <= limit:
        return rows
    order = np.random.default_rng(seed).permutation(len(rows))
    if "mask" in rows.features:
        order = order[np.argsort(~has_value(rows, "mask")[order], kind="stable")]
    tags = rows["tags"][:]
    chosen, seen = [], set()
    for index in order:
        if not seen.issuperset(tags[index]):
            chosen.append(index)
            seen.update(tags[index])
    chosen = list(dict.fromkeys([*chosen, *order]))[:limit]
    return rows.select(sorted(chosen))
