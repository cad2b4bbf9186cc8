"""The format of a tagged data set: its columns, and how its images, masks and tags are read and checked."""

from __future__ import annotations

import io
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..models.maps import IGNORE_INDEX
from ..models.pictures import PictureError, check_shape, open_picture, orientation, to_rgb, upright
from .palette import check_palette
from .text import DataError, brief, is_line

_MAX_CLASSES = IGNORE_INDEX - 1
_ROWS_AT_A_TIME = 1000
_NAMED = 10  # rows in a message
_UNREADABLE = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)  # Pillow, on bad files


class TaggedData(DatasetDict):
    """A `DatasetDict` of tagged images (splits "train" and, if there is one, "val") that knows where it is from.

    Its methods (`map`, `filter`, …) return plain `DatasetDict`s, which are accepted wherever data are.

    Attributes:
        source: the arguments of `load_data` that name the data; `load_data(**source)` loads them again.
    """

    def __init__(self, splits: Mapping[str, Dataset], source: Mapping[str, Any] | None = None):
        super().__init__(splits)
        self.source = dict(source or {})


def source_of(data: DatasetDict) -> dict[str, Any]:
    """The arguments of `load_data` that name `data`; {} where they are not known."""
    return dict(data.source) if isinstance(data, TaggedData) else {}


def tagged_features(class_names: Sequence[str], *image_columns: str) -> Features:
    """Columns image_id, image and tags (class indices without background), then nullable image columns by name."""
    check_class_names(class_names)
    columns = {"image_id": Value("string"), "image": ImageFeature(), "tags": List(ClassLabel(names=list(class_names)))}
    return Features(columns | {name: ImageFeature() for name in image_columns})


def check_class_names(names: Sequence[str]) -> None:
    """Check that these can be the classes of a data set.

    Raises:
        DataError: too many or none, one twice, one that no file or page can show, or one called background.
    """
    if not 1 <= len(names) <= _MAX_CLASSES:
        raise DataError(f"classes: expected 1 to {_MAX_CLASSES} names, got {len(names)}")
    for name in names:
        if not name.strip() or not is_line(name):
            raise DataError(f"classes: expected names in one line of text, got {brief(name)}")
        if name.strip().casefold() == "background":
            raise DataError(
                f"classes: expected names of objects, got {name!r}, which is label 0 of every mask (an image of "
                "background alone has no tags)"
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"classes: expected names that differ, got {twice[0]!r} twice")


def class_names(dataset: Dataset | DatasetDict) -> list[str]:
    """The names of classes 0..C-1, background not among them."""
    features = (next(iter(dataset.values())) if isinstance(dataset, DatasetDict) else dataset).features
    tags = features.get("tags")
    if not isinstance(tags, List) or not isinstance(tags.feature, ClassLabel):
        raise DataError(f"column 'tags': expected List(ClassLabel(names=[…])), got {tags}")
    return list(tags.feature.names)


def check_classes(model, rows: Dataset | DatasetDict) -> list[str]:
    """The names of a segmenter's labels, background first, which must be those of the data.

    Args:
        model: a model whose `config.id2label` has background at 0.

    Raises:
        DataError: they are others.
    """
    names = ["background", *class_names(rows)]
    check_names(model, names, "segmenter")
    return names


def check_names(model, names: Sequence[str], what: str) -> None:
    """Check that the classes of a model (`what` it is called in the message) are `names`, in this order.

    Raises:
        DataError: they are others.
    """
    known = [model.config.id2label[i] for i in sorted(model.config.id2label)]
    if known != list(names):
        raise DataError(f"{what}: expected the classes of the data, {', '.join(names)}, got {', '.join(known)}")


def tags_to_multi_hot(tags: Sequence[int], num_classes: int) -> torch.Tensor:
    """Class indices → float32 (num_classes,) of zeros and ones. No tags, all zeros."""
    outside = [tag for tag in tags if not 0 <= tag < num_classes]
    if outside:
        raise DataError(f"tags: expected class indices 0..{num_classes - 1}, got {outside[0]}")
    multi_hot = torch.zeros(num_classes)
    multi_hot[list(tags)] = 1
    return multi_hot


def undecoded(dataset: Dataset) -> Dataset:
    """The same rows with image columns as {"bytes", "path"}: who decodes them can name the row of a bad file."""
    for name, feature in dataset.features.items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
    return dataset


def has_value(dataset: Dataset, column: str) -> np.ndarray:
    """Where a nullable column is filled → bool (rows,)."""
    tables = dataset.select_columns([column]).with_format("arrow").iter(_ROWS_AT_A_TIME)
    return np.concatenate([np.zeros(0, dtype=bool), *(np.asarray(table[column].is_valid()) for table in tables)])


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except PictureError as error:
        raise DataError(f"{where}: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{where}: expected an image, got no such file as {error.filename}") from error
    except _UNREADABLE as error:
        reason = str(error).split("<_io.")[0].strip() or type(error).__name__
        raise DataError(f"{where}: expected an image, got a file that can't be decoded ({reason})") from error


def _open(value: dict | Image.Image | None, where: str) -> Image.Image:
    """Open without reading the pixels."""
    if isinstance(value, Image.Image):
        return value
    if not value or (value.get("bytes") is None and value.get("path") is None):
        raise DataError(f"{where}: expected an image, got none")
    with _naming(where):
        return open_picture(value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"]))


def open_image(path: Path) -> Image.Image:
    """An image file, its pixels not read yet. Raises DataError, which begins with its path."""
    return _open({"path": str(path)}, str(path))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the upright image, without reading its pixels."""
    width, height = image.size
    return (height, width) if (orientation(image) or 1) >= 5 else (width, height)


def encode_png(image: Image.Image, **options) -> dict:
    """PIL image → a value of an image column: {"bytes": PNG, "path": None}; `options` are those of Pillow's writer."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", **options)
    return {"bytes": stream.getvalue(), "path": None}


def decode_image(value: dict | Image.Image, where: str) -> Image.Image:
    """Any image file or bytes → upright PIL image of mode "RGB", see [`to_rgb`].

    Raises DataError, which begins with `where`, if it does not decode, or has values or a shape that can't be shown.
    """
    image = _open(value, where)
    with _naming(where):
        return to_rgb(image)


def decode_mask(value: dict | Image.Image, where: str) -> np.ndarray:
    """Image of mode "L" or "P", turned as its EXIF data say → label map uint8 (H, W).

    Raises DataError, which begins with `where`, on all else.
    """
    image = _open(value, where)
    if image.mode not in ("L", "P"):
        raise DataError(
            f"{where}: expected one 8-bit channel of labels (mode L or P; 0 = background, c + 1 = class c, "
            f"255 = ignore), got mode {image.mode}"
        )
    with _naming(where):
        return np.array(upright(image))


def decode_gray(value: dict | Image.Image, where: str) -> np.ndarray:
    """Image of one channel of 8 or 16 bits → values int32 (H, W). Raises DataError, which begins with `where`."""
    image = _open(value, where)
    if image.mode != "L" and not image.mode.startswith("I"):
        raise DataError(f"{where}: expected an image of one channel (mode L or I;16), got mode {image.mode}")
    with _naming(where):
        return np.array(image).astype(np.int32)


def decode_saliency(value: dict | Image.Image, size: tuple[int, int] | None, where: str) -> np.ndarray:
    """A saliency map of any bit depth → float32 (H, W) in [0, 1] of its image's size.

    The full range of the file's type is 1: 1, 8 or 16 bits; floating-point numbers are in [0, 1] as they are. Of
    colours the grey value counts, of transparency nothing.

    Args:
        size: (width, height) of the upright image. A map of another size is resized bilinearly; None leaves it.

    Raises:
        DataError: it does not decode, has numbers above 1, or another aspect; begins with `where`.
    """
    image = _open(value, where)
    if size is not None:
        _check_aspect(image, size, where)
    with _naming(where):
        image = upright(image)
        highest = 1 if image.mode == "F" else 65535 if image.mode.startswith("I") else 255
        if highest == 255:
            image = image if image.mode in ("1", "L", "LA") else image.convert("RGB")  # drops transparency
            image = image.convert("L")
        values: np.ndarray = np.asarray(image).astype(np.float32) / highest
    if not (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):  # nor NaN
        raise DataError(
            f"{where}: expected a saliency map of 1, 8 or 16 bits, or of numbers in [0, 1], got one of mode "
            f"{image.mode} from {values.min():g} to {values.max():g}"
        )
    if size is not None and values.shape != size[::-1]:
        values = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))
    return values.clip(0, 1)


def _check_aspect(image: Image.Image, size: tuple[int, int], where: str) -> None:
    """A resized image has its aspect but for 1 %, or for one pixel of rounding in the smaller of the two."""
    with _naming(where):
        found = upright_size(image)
    (width, height), (full_width, full_height) = sorted([found, size])
    across, down = width / full_width, height / full_height
    pixels = abs(across - down) * min(full_width, full_height)
    if pixels > 1 + 1e-6 and abs(across / down - 1) > 0.01:
        raise DataError(
            f"{where}: expected a saliency map with the aspect of its image, {size[0]}x{size[1]}, got "
            f"{found[0]}x{found[1]}"
        )


def check_dataset(dataset: DatasetDict) -> None:
    """Check columns, classes and rows of a data set. Opens every image and saliency map (their headers only) and
    reads every mask.

    Raises:
        DataError: one line that names the split, the row, and what was expected; and the other rows whose images can't
            be used either.
    """
    unusable: list[tuple[str, str]] = []
    if "train" not in dataset:
        raise DataError(f"data set: expected a split 'train', got {', '.join(dataset) or 'none'}")
    for split, rows in dataset.items():
        _check_columns(split, rows)
        check_class_names(class_names(rows))
        names, train_names = class_names(rows), class_names(dataset["train"])
        if names != train_names:
            raise DataError(f"split {split!r}: expected the classes of 'train', {train_names}, got {names}")
        unusable += _check_rows(split, rows)
    if unusable:
        (_, message), *others = unusable
        named = [repr(image_id) for image_id, _ in others[:_NAMED]] + ["…"] * (len(others) > _NAMED)
        raise DataError(f"{message}; nor can {len(others)} more be used: {', '.join(named)}" if others else message)
    if not any(dataset["train"]["tags"]):
        raise DataError("split 'train': expected images with tags, got none with any")


def _check_columns(split: str, rows: Dataset) -> None:
    if not len(rows):
        raise DataError(f"split {split!r}: expected at least one row, got none")
    missing = [name for name in ("image_id", "image", "tags") if name not in rows.features]
    if missing:
        raise DataError(
            f"split {split!r}: expected a column {', '.join(missing)}, got {', '.join(rows.features)} "
            "(rename yours, or map them with `columns`)"
        )
    for name in ("image", "mask", "saliency", "superpixels"):
        if name in rows.features and not isinstance(rows.features[name], ImageFeature):
            found = rows.features[name]
            raise DataError(f"split {split!r}, column {name!r}: expected images (datasets.Image), got {found}")


def _check_rows(split: str, rows: Dataset) -> list[tuple[str, str]]:
    """(image_id, message) of the rows whose images can't be used. Raises DataError for all else."""
    num_classes = len(class_names(rows))
    columns = [name for name in ("image_id", "image", "tags", "mask", "saliency") if name in rows.features]
    seen = set()
    num_tagged_masks, shows_a_tag = 0, False
    unusable = []
    for row in undecoded(rows.select_columns(columns)):
        where = f"split {split!r}, row {row['image_id']!r}"
        if row["image_id"] is None or row["image_id"] in seen:
            raise DataError(f"{where}: expected an image_id that no other row has, got {row['image_id']!r}")
        seen.add(row["image_id"])
        if row["tags"] is None or not all(tag is not None and 0 <= tag < num_classes for tag in row["tags"]):
            raise DataError(f"{where}: tags: expected class indices 0..{num_classes - 1}, got {row['tags']}")
        try:
            place = f"{where}, {row['image'] and row['image']['path'] or 'column image'}"
            image, size = _checked_image(row["image"], place)
        except DataError as error:
            unusable.append((row["image_id"], str(error)))
            continue
        if row.get("mask") is not None:
            labels = _check_mask(row["mask"], image, size, num_classes, where)
            num_tagged_masks += bool(row["tags"])
            shows_a_tag = shows_a_tag or any(tag + 1 in labels for tag in row["tags"])
        if row.get("saliency") is not None:
            place = f"{where}, {row['saliency']['path'] or 'column saliency'}"
            _check_aspect(_open(row["saliency"], place), size, place)
    if num_tagged_masks and not shows_a_tag and not unusable:
        raise DataError(
            f"split {split!r}, column mask: expected label c + 1 where class c of an image's tags is, got none of "
            f"them in any of {num_tagged_masks} masks (0 is background, 255 is ignored)"
        )
    return unusable


def _checked_image(value: dict | Image.Image, where: str) -> tuple[Image.Image, tuple[int, int]]:
    """The image and its upright (width, height). Raises DataError, which begins with `where`."""
    image = _open(value, where)
    with _naming(where):
        check_shape(image)
        size = upright_size(image)
    if image.mode == "F" or image.mode.startswith("I"):
        decode_image(image, where)
    return image, size


def _check_mask(
    value: dict | Image.Image, image: Image.Image, size: tuple[int, int], num_classes: int, where: str
) -> set[int]:
    """The labels in a mask."""
    mask = _open(value, f"{where}, column mask")
    labels = decode_mask(mask, f"{where}, column mask")
    height, width = labels.shape
    if (width, height) != size:
        raise DataError(
            f"{where}: expected a mask of the image's size, {size[0]}x{size[1]}, got one of {width}x{height}"
        )
    turned = orientation(image) or 1
    if turned > 1 and (turned < 5 or width == height) and orientation(mask) is None:
        raise DataError(
            f"{where}: expected an image without an EXIF orientation, got {turned}: whether its mask is turned, too, "
            "can't be seen (save the image upright, or give the mask the orientation that it needs)"
        )
    counts = np.bincount(labels.ravel(), minlength=256)
    unknown = np.flatnonzero(counts[num_classes + 1 : IGNORE_INDEX]) + num_classes + 1
    if len(unknown):
        raise DataError(f"{where}: mask: expected labels 0..{num_classes} and 255 (ignore), got {unknown[0]}")
    check_palette(mask, num_classes + 1, f"{where}, column mask")
    return set(np.flatnonzero(counts).tolist())
