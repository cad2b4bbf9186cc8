"""PASCAL VOC 2012, read from its devkit folder: tags from the annotations, masks from SegmentationClass(Aug)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from datasets import Dataset, DatasetDict

from ..models.label_colors import mask_image
from ..models.maps import IGNORE_INDEX
from .tagged import DataError, decode_mask, encode_png, tagged_features

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def load_voc(
    root: str | Path, classes: Sequence[str] | None = None, masks: Literal["evaluation", "all"] = "evaluation"
) -> DatasetDict:
    """Read a folder VOC2012 (JPEGImages, Annotations, ImageSets/Segmentation, SegmentationClassAug or …Class).

    "train" is train_aug.txt or, without one, train.txt; "val" is val.txt. In "train" only the images of train.txt have
    a mask, to evaluate pseudo masks on; masks="all" gives every mask there is, for the fully supervised upper bound.
    `classes` restricts and orders the classes: images with none of them are dropped, their pixels become background.
    Images stay files where they are. Raises DataError that names the missing folder or file, or the unknown class.
    """
    root = Path(root)
    classes = tuple(classes or VOC_CLASSES)
    unknown = [name for name in classes if name not in VOC_CLASSES]
    if unknown or len(set(classes)) < len(classes):
        got = repr(unknown[0]) if unknown else f"one twice in {', '.join(classes)}"
        raise DataError(f"classes: expected VOC classes, got {got} (known are {', '.join(VOC_CLASSES)})")
    if masks not in ("evaluation", "all"):
        raise DataError(f"masks: expected 'evaluation' or 'all', got {masks!r}")
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        if not (root / folder).is_dir():
            raise DataError(f"{root / folder}: no such folder (root: expected the VOC2012 folder of a devkit)")

    evaluated = _read_ids(root, "train")
    augmented = (root / "ImageSets/Segmentation/train_aug.txt").is_file()
    train = _read_ids(root, "train_aug") if augmented else evaluated
    val = _read_ids(root, "val")
    return DatasetDict(
        {
            "train": _read_split(root, "train", train, classes, needs_mask=set(evaluated), wants_all=masks == "all"),
            "val": _read_split(root, "val", val, classes, needs_mask=set(val), wants_all=False),
        }
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path


def _read_ids(root: Path, name: str) -> list[str]:
    path = _existing(root / "ImageSets" / "Segmentation" / f"{name}.txt")
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def _read_split(
    root: Path, split: str, image_ids: list[str], classes: tuple[str, ...], needs_mask: set[str], wants_all: bool
) -> Dataset:
    columns: dict[str, list[Any]] = {"image_id": [], "image": [], "tags": [], "mask": []}
    for image_id in image_ids:
        tags = _read_tags(_existing(root / "Annotations" / f"{image_id}.xml"), classes)
        if not tags:
            continue
        columns["image_id"].append(image_id)
        columns["image"].append(str(_existing(root / "JPEGImages" / f"{image_id}.jpg")))
        columns["tags"].append(tags)
        columns["mask"].append(_read_mask(root, image_id, classes, image_id in needs_mask, wants_all))
    if not columns["image_id"]:
        raise DataError(f"split {split!r}: expected images of {', '.join(classes)}, got none among {len(image_ids)}")
    return Dataset.from_dict(columns, features=tagged_features(classes, "mask"))


def _read_tags(path: Path, classes: tuple[str, ...]) -> list[int]:
    try:
        objects = {node.text for node in ElementTree.parse(path).iterfind("object/name")}
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: expected XML, got something else ({error})") from error
    unknown = sorted(str(name) for name in objects.difference(VOC_CLASSES))
    if unknown:
        raise DataError(f"{path}: expected VOC classes, got {unknown[0]!r} (known are {', '.join(VOC_CLASSES)})")
    return [index for index, name in enumerate(classes) if name in objects]


def _read_mask(root: Path, image_id: str, classes: tuple[str, ...], needed: bool, wanted: bool) -> str | dict | None:
    """The mask's path or, where classes are restricted, a PNG with the labels renumbered."""
    augmented = root / "SegmentationClassAug"
    path = (augmented if augmented.is_dir() else root / "SegmentationClass") / f"{image_id}.png"
    if needed:
        _existing(path)
    elif not (wanted and path.is_file()):
        return None
    if classes == VOC_CLASSES:
        return str(path)
    new_labels = np.zeros(256, dtype=np.uint8)
    new_labels[IGNORE_INDEX] = IGNORE_INDEX
    for index, name in enumerate(classes):
        new_labels[VOC_CLASSES.index(name) + 1] = index + 1
    return encode_png(mask_image(new_labels[decode_mask({"path": str(path)}, str(path))]))
