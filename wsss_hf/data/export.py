"""Export of label maps: palette PNGs in the layout of PASCAL VOC, and COCO-JSON for annotation tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType

import numpy as np

from ..files import whole_file, whole_folder
from ..models.maps import IGNORE_INDEX
from .metadata import IMAGE_SUFFIXES
from .palette import save_mask_png
from .tagged import DataError

LabelMaps = Iterable[tuple[str, np.ndarray]]
"""(image_id, label map (H, W) uint8: 0 background, c + 1 class c, 255 ignore) of one image after another."""


def export_voc(
    folder: str | os.PathLike, label_maps: LabelMaps, class_names: Sequence[str], split: str = "train"
) -> int:
    """Write a folder in the layout of a VOC devkit; the photographs are not copied.

    `SegmentationClass/<image_id>.png` are the label maps, `ImageSets/Segmentation/<split>.txt` names them, and
    `labels.txt` the classes, background first. Images are taken one at a time.

    Args:
        folder: appears complete or not at all; must not exist, or be empty.
        class_names: names of the classes 0..C-1, background not among them.
        split: name of the list of images.

    Returns:
        the number of label maps.

    Raises:
        DataError: `folder` is not empty, a label map has other values than 0..C and 255, or an image_id is no name
            for a file inside a folder, or shares its file with another one.
    """
    folder = check_free(folder, "--export-voc")
    with whole_folder(folder) as unfinished:
        names = write_mask_pngs(unfinished / "SegmentationClass", _checked(label_maps, len(class_names)))
        list_file = unfinished / "ImageSets" / "Segmentation" / f"{split}.txt"
        list_file.parent.mkdir(parents=True)
        list_file.write_text("".join(f"{name}\n" for name in names))
        (unfinished / "labels.txt").write_text("".join(f"{name}\n" for name in ("background", *class_names)))
    return len(names)


def write_mask_pngs(folder: str | os.PathLike, label_maps: LabelMaps) -> list[str]:
    """Write `<folder>/<name>.png`, palette PNGs of the labels; each appears complete or not at all.

    Returns:
        the names, in order: see [`file_stem`].

    Raises:
        DataError: an image_id is no name for a file inside `folder`, or shares its file with another one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    for image_id, labels in label_maps:
        name = file_stem(image_id)
        if name in written:
            raise DataError(f"row {image_id!r}: expected a file of its own, got {name}.png of row {written[name]!r}")
        written[name] = image_id
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_mask_png(path, labels)
    return list(written)


def export_coco(path: str | os.PathLike, label_maps: LabelMaps, class_names: Sequence[str]) -> int:
    """Write a COCO-JSON: one annotation per class and image, its region run-length encoded as COCO's own tools do.

    Category c + 1 is class c; background and ignored pixels have no annotation. An image is named by its image_id, to
    which `.jpg` is added where it has no suffix of an image file. Images are taken one at a time.

    Args:
        path: the file; appears complete or not at all, and must not exist yet.
        class_names: names of the classes 0..C-1, background not among them.

    Returns:
        the number of images.

    Raises:
        DataError: `path` exists, pycocotools is not installed, a label map has other values than 0..C and 255, or an
            image_id is no name for a file inside a folder.
    """
    path = check_free(path, "--export-coco")
    encode = require_pycocotools().encode
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": c, "name": name} for c, name in enumerate(class_names, start=1)]
    images: list[dict] = []
    with whole_file(path) as unfinished, unfinished.open("w") as file:
        file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')
        count = 0
        for image_id, labels in _checked(label_maps, len(class_names)):
            name = image_id if _is_image_name(image_id) else f"{image_id}.jpg"
            height, width = labels.shape
            file_stem(image_id)  # raises for names outside the folder
            images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
            for region in _regions(labels, encode):
                file.write(",\n" if count else "\n")
                count += 1
                file.write(json.dumps({"id": count, "image_id": len(images)} | region))
        file.write(f'],\n"images": {json.dumps(images)}}}\n')
    return len(images)


def check_free(path: str | os.PathLike, option: str) -> Path:
    """`path`, if nothing would be overwritten there.

    Args:
        option: its name in the message.

    Raises:
        DataError: it is a file, or a folder that is not empty.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise DataError(f"{option} {path}: expected a path that does not exist yet, got an existing one")
    return path


def require_pycocotools() -> ModuleType:
    """The module `pycocotools.mask`.

    Raises:
        DataError: it is not installed; the message says how to install it.
    """
    try:
        # Imported here: an optional extra.
        from pycocotools import mask
    except ImportError as error:
        raise DataError('COCO needs pycocotools: pip install "wsss_hf[coco]"') from error
    return mask


def file_stem(image_id: str) -> str:
    """The file name of an image's label map without `.png`: its image_id, without the suffix of an image file.

    Ids may have folders, `cat/001.jpg`.

    Raises:
        DataError: it is no name for a file inside a folder.
    """
    parts = image_id.split("/")
    outside = any(part in ("", ".", "..") for part in parts) or PureWindowsPath(image_id).anchor
    if outside or any(character in image_id for character in "\\\0\n\r"):
        raise DataError(f"image_id: expected a file name or folder/name, which names its mask, got {image_id!r}")
    return str(PurePosixPath(image_id).with_suffix("")) if _is_image_name(image_id) else image_id


def _is_image_name(image_id: str) -> bool:
    return PurePosixPath(image_id).suffix.lower() in IMAGE_SUFFIXES


def _checked(label_maps: LabelMaps, num_classes: int) -> Iterator[tuple[str, np.ndarray]]:
    for image_id, labels in label_maps:
        values = np.setdiff1d(labels, IGNORE_INDEX)
        if values.size and values[-1] > num_classes:
            raise DataError(f"row {image_id!r}: expected labels 0..{num_classes} and 255, got {values[-1]}")
        yield image_id, labels


def _regions(labels: np.ndarray, encode) -> Iterator[dict]:
    """COCO annotations, without ids, of the classes in a label map."""
    for value in np.setdiff1d(labels, (0, IGNORE_INDEX)).tolist():
        region = labels == value
        rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
        left, top, right, bottom = (int(side) for side in (columns[0], rows[0], columns[-1], rows[-1]))
        runs = encode(np.asfortranarray(region, dtype=np.uint8))
        yield {
            "category_id": value,
            "segmentation": {"size": list(labels.shape), "counts": runs["counts"].decode("ascii")},
            "area": int(region.sum()),
            "bbox": [left, top, right - left + 1, bottom - top + 1],
            "iscrowd": 0,
        }
