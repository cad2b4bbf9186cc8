"""COCO 2017 or 2014, read from its official layout: tags and masks from the instance annotations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, config
from PIL import Image

from ..models.maps import IGNORE_INDEX
from ..progress import Progress
from .export import require_pycocotools
from .palette import save_mask_png
from .tagged import DataError, check_class_names, open_image, tagged_features, undecoded, upright_size
from .text import brief, is_line

_YEARS = (2017, 2014)  # the first whose annotations are there counts
_LARGEST = 2**63  # of ids and sizes
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89478485)  # Pillow refuses larger images
_ENTRIES: dict[str, dict[str, type]] = {
    "categories": {"id": int, "name": str},
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"id": int, "image_id": int, "category_id": int},
}


def load_coco(
    root: str | Path,
    classes: Sequence[str] | None = None,
    masks: Literal["evaluation", "all"] = "evaluation",
    select: Callable[[Dataset], Dataset] | None = None,
) -> DatasetDict:
    """Read a folder that holds annotations/instances_{train,val}2017.json, train2017/*.jpg and val2017/*.jpg.

    Where there are no annotations of 2017, those of 2014 are read, and train2014/*.jpg and val2014/*.jpg.

    The classes are those of the annotations, in the order of their category ids. `classes` restricts and orders them:
    images with none of them are dropped, their pixels become background. A crowd tags its image as an instance does.

    Only "val" has masks; masks="all" gives "train" its own too, to measure pseudo masks on, or for the fully
    supervised upper bound. Where instances overlap, the smaller one is in front; crowds (iscrowd) are 255, behind all
    instances. Each mask is painted once, by pycocotools, as a PNG in a folder below the cache of `datasets`
    (HF_DATASETS_CACHE), one folder for each annotation file and choice of classes. Images stay files where they are.

    Args:
        select: takes the rows of a split that are wanted, before their masks are painted.

    Raises:
        DataError: names the file and entry that is missing or invalid, the unknown class, or the empty split; or
            pycocotools is not installed.
    """
    if masks not in ("evaluation", "all"):
        raise DataError(f"masks: expected 'evaluation' or 'all', got {masks!r}")
    require_pycocotools()
    root = Path(root)
    splits: dict[str, Dataset] = {}
    categories: dict[int, str] | None = None
    year = next((year for year in _YEARS if _annotation_file(root, "train", year).is_file()), _YEARS[0])
    for split in ("train", "val"):
        folder = f"{split}{year}"
        path = _annotation_file(root, split, year)
        has_masks = split == "val" or masks == "all"
        content = _read_annotations(path, with_shapes=has_masks)
        found = {number: category["name"] for number, category in sorted(_by_id(content, "categories", path).items())}
        if categories not in (None, found):
            raise DataError(f"{path}: expected the categories of train{year}, got others")
        categories = found
        names = _chosen(tuple(classes or categories.values()), categories, path)
        images = _by_id(content, "images", path)
        shown = _annotations_by_image(content["annotations"], images, categories, names, path)
        mask_folder = _mask_folder(path, names) if has_masks else None
        rows = _rows(split, root / folder, path, images, shown, names, categories, mask_folder)
        rows = rows if select is None else select(rows)
        if has_masks:
            labels = {number: names.index(name) + 1 for number, name in categories.items() if name in names}
            _paint_missing(rows, images, shown, labels, path, f"masks of {folder}")
        splits[split] = rows
    return DatasetDict(splits)


def _annotation_file(root: Path, split: str, year: int) -> Path:
    return root / "annotations" / f"instances_{split}{year}.json"


def _read_annotations(path: Path, with_shapes: bool) -> dict[str, list[dict]]:
    """The lists of an annotation file, their entries checked; without shapes it takes a fraction of the memory."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file (root: expected a folder of annotations/, train2017/ and val2017/, or of 2014)"
        )
    try:
        content = json.loads(path.read_bytes(), object_hook=None if with_shapes else _without_shape)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got something else ({error})") from error
    for part, kinds in _ENTRIES.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f"{path}: expected COCO's instance annotations, got no list {part!r}")
        for number, entry in enumerate(entries):
            for key, kind in kinds.items():
                value: Any = entry.get(key) if isinstance(entry, dict) else None
                is_good = isinstance(value, kind) and not isinstance(value, bool)
                if not is_good or not (is_line(value) if kind is str else abs(value) < _LARGEST):
                    where = f"{path}, {part}[{number}].{key}"
                    raise DataError(f"{where}: expected {kind.__name__}, got {brief(value)}")
            if part == "images" and not (entry["height"] > 0 < entry["width"] <= _MAX_PIXELS // entry["height"]):
                where, size = f"{path}, image {entry['id']}", f"{entry['width']}x{entry['height']}"
                raise DataError(f"{where}: expected a size of 1 to {_MAX_PIXELS} pixels, got {size}")
            if part == "annotations" and entry.get("iscrowd", 0) not in (0, 1):
                where = f"{path}, annotation {entry['id']}"
                raise DataError(f"{where}: iscrowd: expected 0 or 1, got {brief(entry['iscrowd'])}")
    return content


def _without_shape(entry: dict) -> dict:
    entry.pop("segmentation", None)
    return entry


def _by_id(content: dict[str, list[dict]], part: str, path: Path) -> dict[int, dict]:
    entries: dict[int, dict] = {}
    for entry in content[part]:
        if entry["id"] in entries:
            raise DataError(f"{path}, {part}: expected ids that differ, got {entry['id']} twice")
        entries[entry["id"]] = entry
    return entries


def _chosen(names: tuple[str, ...], categories: dict[int, str], path: Path) -> tuple[str, ...]:
    known = ", ".join(categories.values())
    unknown = [name for name in names if name not in categories.values()]
    if unknown:
        raise DataError(f"classes: expected COCO classes, got {unknown[0]!r} ({path} has {known})")
    if len(set(names)) < len(names):
        raise DataError(f"classes: expected each name once, got {', '.join(names)}")
    try:
        check_class_names(names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return names


def _annotations_by_image(
    annotations: list[dict], images: dict[int, dict], categories: dict[int, str], names: tuple[str, ...], path: Path
) -> dict[int, list[dict]]:
    """Image id → the annotations of the chosen classes; images without any are left out."""
    shown: dict[int, list[dict]] = {}
    chosen = set(names)
    for annotation in annotations:
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in images:
            raise DataError(f"{path}, annotation {annotation['id']}: image_id: expected that of an image, got {image}")
        if category not in categories:
            where = f"{path}, annotation {annotation['id']}"
            raise DataError(f"{where}: category_id: expected that of a category, got {category}")
        if categories[category] in chosen:
            shown.setdefault(image, []).append(annotation)
    return shown


def _mask_folder(path: Path, names: tuple[str, ...]) -> Path:
    """The folder of the painted masks; another one where the annotations or the classes have changed."""
    state = path.stat()
    identity = json.dumps([str(path.resolve()), state.st_size, state.st_mtime_ns, names])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Path(config.HF_DATASETS_CACHE) / "wsss_hf_coco_masks" / key


def _rows(
    split: str,
    image_folder: Path,
    path: Path,
    images: dict[int, dict],
    shown: dict[int, list[dict]],
    names: tuple[str, ...],
    categories: dict[int, str],
    mask_folder: Path | None,
) -> Dataset:
    """The rows in the order of the images; the files of the masks need not be there yet."""
    index = {name: number for number, name in enumerate(names)}
    columns: dict[str, list[Any]] = {"image_id": [], "image": [], "tags": [], "mask": []}
    for number, image in images.items():
        if number not in shown:
            continue
        file = image_folder / image["file_name"]
        if not file.is_file():
            raise DataError(f"{path}, image {number}: no such file {file}")
        columns["image_id"].append(file.stem)
        columns["image"].append(str(file))
        columns["tags"].append(sorted({index[categories[shape["category_id"]]] for shape in shown[number]}))
        columns["mask"].append(None if mask_folder is None else str(mask_folder / f"{number}.png"))
    if not columns["image_id"]:
        raise DataError(
            f"split {split!r}: expected images of {', '.join(names)}, got none among the {len(images)} of {path}"
        )
    return Dataset.from_dict(columns, features=tagged_features(names, "mask"))


def _paint_missing(
    rows: Dataset,
    images: dict[int, dict],
    annotations: dict[int, list[dict]],
    labels: dict[int, int],
    path: Path,
    title: str,
) -> None:
    """Write the masks of these rows that no earlier call has written, one at a time."""
    files = {Path(row["mask"]["path"]): Path(row["image"]["path"]) for row in undecoded(rows)}
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return
    missing[0].parent.mkdir(parents=True, exist_ok=True)
    with Progress(title, len(missing), unit="image") as progress:
        for file in missing:
            number = int(file.stem)
            image = images[number]
            with open_image(files[file]) as picture:
                size = upright_size(picture)
                if size != (image["width"], image["height"]):
                    got, wanted = f"{image['width']}x{image['height']}", f"{size[0]}x{size[1]}"
                    raise DataError(f"{path}, image {number}: expected the size of {files[file]}, {wanted}, got {got}")
            save_mask_png(file, _paint(image, annotations[number], labels, path))
            progress.advance(1)


def _paint(image: dict, annotations: list[dict], labels: dict[int, int], path: Path) -> np.ndarray:
    """Label map uint8 (H, W) of an image; `labels` has the label of each category id."""
    tools = require_pycocotools()
    height, width = image["height"], image["width"]
    regions = []
    for annotation in annotations:
        try:
            region = _region(annotation.get("segmentation"), height, width)
        except (TypeError, ValueError, OverflowError, LookupError) as error:
            where = f"{path}, annotation {annotation['id']}: segmentation"
            raise DataError(f"{where}: {' '.join(str(error).split())}") from error
        crowd = bool(annotation.get("iscrowd"))
        label = IGNORE_INDEX if crowd else labels[annotation["category_id"]]
        regions.append((not crowd, -int(tools.area(region)), label, region))
    painted = np.zeros((height, width), dtype=np.uint8)
    for *_, label, region in sorted(regions, key=lambda entry: entry[:2]):  # from the back to the front
        painted[tools.decode(region).astype(bool)] = label
    return painted


def _region(segmentation: object, height: int, width: int) -> dict:
    """Polygons [[x0, y0, x1, y1, …], …] or run lengths {"size", "counts"} → compressed run lengths.

    What pycocotools would take memory without end for, or die of, does not come to it.

    Raises:
        ValueError: it is neither, or lies far outside the image.
    """
    tools = require_pycocotools()
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"expected the image's size {[height, width]}, got {brief(segmentation.get('size'))}")
        runs = _uncompressed(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
            raise ValueError(f"expected run lengths as counts, got {brief(counts)}")
        if sum(runs) != height * width:  # pycocotools would leave the other pixels undefined
            raise ValueError(f"expected run lengths of {height * width} pixels, got {sum(runs)}")
        return tools.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    if not isinstance(segmentation, list) or not any(segmentation):
        raise ValueError(f"expected polygons [[x0, y0, x1, y1, …], …] or run lengths, got {brief(segmentation)}")
    for polygon in segmentation:
        _check_polygon(polygon, height, width)
    # Fewer than three points enclose nothing, and pycocotools takes two for a box.
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        return tools.encode(np.zeros((height, width), dtype=np.uint8, order="F"))
    return tools.merge(tools.frPyObjects(polygons, height, width))


def _check_polygon(polygon: object, height: int, width: int) -> None:
    """Numbers in pairs, in pixels, not farther out than the image is large, and no path without end."""
    values: Any = polygon if isinstance(polygon, list) and len(polygon) % 2 == 0 else [None]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise ValueError(f"expected polygons [[x0, y0, x1, y1, …], …] or run lengths, got {brief(polygon)}")
    points = np.array(values, dtype=np.float64).reshape(-1, 2)
    size = np.array([width, height])
    outside = ~((points >= -size) & (points <= 2 * size)).all(axis=1)  # NaN is outside
    if outside.any():
        raise ValueError(f"expected points in an image of {width}x{height}, got {points[outside][0].tolist()}")
    if len(points) >= 3 and points.max() <= 1 < min(width, height):
        raise ValueError(f"expected coordinates in pixels, got numbers up to {points.max():g}: {brief(polygon)}")
    length = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum()
    if length > 10 * (width + 1) * (height + 1):
        raise ValueError(f"expected an outline of an image of {width}x{height}, got one of {length:.0f} pixels")


def _uncompressed(counts: str) -> list[int]:
    """COCO's string of run lengths: five bits a character, from 48 on, with a sign and a bit that says "more".

    From the fourth on each is the difference to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"expected COCO's compressed run lengths, got {brief(counts)}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError(f"expected COCO's compressed run lengths, got a cut one, {brief(counts)}")
    return runs
