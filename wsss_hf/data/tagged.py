"""The data contract as code: the columns of a tagged data set, and how its images, masks and tags are read."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

IGNORE_INDEX = 255
_MAX_CLASSES = IGNORE_INDEX - 1
_ORIENTATION = 0x0112  # the EXIF tag
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # Pillow, on bad files


class DataError(ValueError):
    """The data do not fit the contract; the message names the row or file and what would be right."""


def tagged_features(class_names: Sequence[str], *image_columns: str) -> Features:
    """Columns image_id, image and tags (class indices without background), then nullable image columns by name."""
    if not 1 <= len(class_names) <= _MAX_CLASSES:
        raise DataError(f"a data set has 1 to {_MAX_CLASSES} classes, not {len(class_names)}")
    columns = {"image_id": Value("string"), "image": ImageFeature(), "tags": List(ClassLabel(names=list(class_names)))}
    return Features(columns | {name: ImageFeature() for name in image_columns})


def class_names(dataset: Dataset | DatasetDict) -> list[str]:
    """The names of classes 0..C-1, background not among them."""
    features = (next(iter(dataset.values())) if isinstance(dataset, DatasetDict) else dataset).features
    tags = features.get("tags")
    if not isinstance(tags, List) or not isinstance(tags.feature, ClassLabel):
        raise DataError(f"column 'tags' must be List(ClassLabel(names=[…])), not {tags}")
    return list(tags.feature.names)


def tags_to_multi_hot(tags: Sequence[int], num_classes: int) -> torch.Tensor:
    """Class indices → float32 (num_classes,) of zeros and ones. No tags, all zeros."""
    outside = [tag for tag in tags if not 0 <= tag < num_classes]
    if outside:
        raise DataError(f"tag {outside[0]} is not a class index 0..{num_classes - 1}")
    multi_hot = torch.zeros(num_classes)
    multi_hot[list(tags)] = 1
    return multi_hot


def undecoded(dataset: Dataset) -> Dataset:
    """The same rows with every image column as {"bytes", "path"}, so that whoever opens a bad file can name it."""
    for name, feature in dataset.features.items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
    return dataset


def has_value(dataset: Dataset, column: str) -> np.ndarray:
    """Where a nullable column is filled → bool (rows,)."""
    return np.asarray(dataset.select_columns([column]).with_format("arrow")[:][column].is_valid())


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        reason = str(error).split("<_io.")[0].strip() or type(error).__name__
        raise DataError(f"{where}: cannot be decoded as an image ({reason}); replace or remove it") from error


def _open(value: dict | Image.Image | None, where: str) -> Image.Image:
    """Open without reading the pixels."""
    if isinstance(value, Image.Image):
        return value
    if not value or (value.get("bytes") is None and value.get("path") is None):
        raise DataError(f"{where}: has no image; give it one or remove the row")
    with _naming(where):
        return Image.open(value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"]))


def encode_png(image: Image.Image, **options) -> dict:
    """PIL image → what an image column takes: a PNG, written with `options` of Pillow."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", **options)
    return {"bytes": stream.getvalue(), "path": None}


def decode_image(value: dict | Image.Image, where: str) -> Image.Image:
    """Any image file or bytes → upright PIL image of mode "RGB"; 16-bit grey is scaled, transparency put on white.

    Raises DataError, which begins with `where`, if it does not decode.
    """
    image = _open(value, where)
    with _naming(where):
        image = ImageOps.exif_transpose(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def decode_mask(value: dict | Image.Image, where: str) -> np.ndarray:
    """Image of mode "L" or "P" → label map uint8 (H, W). Raises DataError, which begins with `where`, on all else."""
    image = _open(value, where)
    if image.mode not in ("L", "P"):
        raise DataError(
            f"{where}: the mask has mode {image.mode}; right is one 8-bit channel of labels "
            "(mode L or P; 0 = background, c + 1 = class c, 255 = void)"
        )
    with _naming(where):
        return np.array(image)


def decode_gray(value: dict | Image.Image, where: str) -> np.ndarray:
    """Image of one channel of 8 or 16 bits → values int32 (H, W). Raises DataError, which begins with `where`."""
    image = _open(value, where)
    if image.mode != "L" and not image.mode.startswith("I"):
        raise DataError(f"{where}: the image has mode {image.mode}; one channel (mode L, or I;16) would be right")
    with _naming(where):
        return np.array(image).astype(np.int32)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def check_dataset(dataset: DatasetDict) -> None:
    """Hold a data set against the contract. Opens every image (its header only) and reads every mask.

    Raises DataError with one line that names the split, the row and what would be right.
    """
    if "train" not in dataset:
        raise DataError(f"the data set has no split 'train', only {list(dataset)}")
    for split, rows in dataset.items():
        _check_columns(split, rows)
        names, train_names = class_names(rows), class_names(dataset["train"])
        if names != train_names:
            raise DataError(f"split {split!r} has classes {names}, 'train' has {train_names}; they must be the same")
        _check_rows(split, rows)
    if not any(dataset["train"]["tags"]):
        raise DataError("no row of split 'train' has tags; weak supervision needs images that are tagged with classes")


def _check_columns(split: str, rows: Dataset) -> None:
    if not len(rows):
        raise DataError(f"split {split!r} is empty; give it rows or leave it out")
    missing = [name for name in ("image_id", "image", "tags") if name not in rows.features]
    if missing:
        raise DataError(
            f"split {split!r} lacks column {', '.join(missing)}; it has {', '.join(rows.features)}: "
            "rename them or map them with `columns`"
        )
    for name in ("image", "mask", "saliency", "superpixels"):
        if name in rows.features and not isinstance(rows.features[name], ImageFeature):
            found = rows.features[name]
            raise DataError(f"column {name!r} of split {split!r} must hold images (datasets.Image), not {found}")


def _check_rows(split: str, rows: Dataset) -> None:
    num_classes = len(class_names(rows))
    columns = [name for name in ("image_id", "image", "tags", "mask") if name in rows.features]
    seen = set()
    for row in undecoded(rows.select_columns(columns)):
        where = f"split {split!r}, row {row['image_id']!r}"
        if row["image_id"] is None or row["image_id"] in seen:
            raise DataError(f"{where}: every row needs an image_id of its own")
        seen.add(row["image_id"])
        if row["tags"] is None or not all(tag is not None and 0 <= tag < num_classes for tag in row["tags"]):
            raise DataError(f"{where}: tags {row['tags']} must be a list of class indices 0..{num_classes - 1}")
        image = _open(row["image"], f"{where}, {row['image'] and row['image']['path'] or 'column image'}")
        if row.get("mask") is not None:
            _check_mask(decode_mask(row["mask"], f"{where}, column mask"), _upright_size(image), num_classes, where)


def _check_mask(mask: np.ndarray, size: tuple[int, int], num_classes: int, where: str) -> None:
    height, width = mask.shape
    if (width, height) != size:
        raise DataError(
            f"{where}: the mask is {width}x{height} but its image is {size[0]}x{size[1]}; they must be the same"
        )
    counts = np.bincount(mask.ravel(), minlength=256)
    unknown = np.flatnonzero(counts[num_classes + 1 : IGNORE_INDEX]) + num_classes + 1
    if len(unknown):
        raise DataError(f"{where}: the mask has the value {unknown[0]}; right are 0 to {num_classes} and 255 for void")
