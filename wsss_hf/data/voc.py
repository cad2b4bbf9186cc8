"""PASCAL VOC 2012, read from its devkit folder: tags from the annotations, masks from SegmentationClass(Aug)."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from datasets import Dataset, DatasetDict

from ..models.label_colors import mask_image
from ..models.maps import IGNORE_INDEX
from .palette import check_palette
from .tagged import DataError, decode_mask, encode_png, open_image, tagged_features
from .text import brief, read_text

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_AUGMENTED = ("train_aug", "trainaug")  # names of the list of SBD's and VOC's images


def load_voc(
    root: str | Path, classes: Sequence[str] | None = None, masks: Literal["evaluation", "all"] = "evaluation"
) -> DatasetDict:
    """Read a folder VOC2012 (JPEGImages, Annotations, ImageSets/Segmentation, SegmentationClassAug or …Class).

    "train" is train_aug.txt or trainaug.txt or, without these, train.txt; "val" is val.txt. A line of a list is an id,
    or the paths of an image and its mask, as published programs have them: the image's stem is the id. In "train" only
    the images of train.txt have a mask, to evaluate pseudo masks on; masks="all" gives every mask there is, for the
    fully supervised upper bound. `classes` restricts and orders the classes: images with none of them are dropped,
    their pixels become background.
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
    lists = [_read_ids(root, name) for name in _AUGMENTED if (root / f"ImageSets/Segmentation/{name}.txt").is_file()]
    if any(set(found) != set(lists[0]) for found in lists):
        raise DataError(
            f"{root / 'ImageSets/Segmentation'}: expected one list, got train_aug.txt and another trainaug.txt"
        )
    train = lists[0] if lists else evaluated
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
    ids: dict[str, None] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where, parts = f"{path}, line {number}", line.split()
        if not parts:
            continue
        first = PurePosixPath(parts[0])
        image_id = first.stem if len(first.parts) > 1 else first.name
        if len(parts) > 2 or (len(parts) == 2 and PurePosixPath(parts[1]).stem != image_id):
            raise DataError(f"{where}: expected an id, or paths of an image and its mask, got {brief(line)}")
        if image_id in ids:
            raise DataError(f"{where}: expected each image once, got {image_id!r} again")
        ids[image_id] = None
    return list(ids)


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
        annotation = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the others: of encodings
        raise DataError(f"{path}: expected XML, got something else ({error})") from error
    if annotation.tag != "annotation":
        raise DataError(f"{path}: expected an element <annotation>, got <{annotation.tag}>")
    objects = {(node.text or "").strip() for node in annotation.iterfind("object/name")}
    unknown = sorted(objects.difference(VOC_CLASSES))
    if unknown:
        raise DataError(f"{path}: expected VOC classes, got {brief(unknown[0])} (known are {', '.join(VOC_CLASSES)})")
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
    with open_image(path) as mask:
        labels = decode_mask(mask, str(path))
        check_palette(mask, len(VOC_CLASSES) + 1, str(path))
    unknown_labels = np.setdiff1d(labels, (*range(len(VOC_CLASSES) + 1), IGNORE_INDEX))
    if unknown_labels.size:
        raise DataError(f"{path}: expected labels 0..{len(VOC_CLASSES)} and 255 (ignore), got {unknown_labels[0]}")
    return encode_png(mask_image(new_labels[labels]))
