"""Training examples: one split of a tagged data set, decoded and augmented."""

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from .tagged import (
    IGNORE_INDEX,
    DataError,
    class_names,
    decode_gray,
    decode_image,
    decode_mask,
    has_value,
    tags_to_multi_hot,
    undecoded,
)

# Image columns that training may read beside the masks, and the section of a recipe that asks for them.
MAPS = {"superpixels": "cam", "saliency": "cam", "confidence": "segmenter"}


class TaggedExamples(torch.utils.data.Dataset):
    """Item i → {"pixel_values": float32 (3, S, S), "tags": float32 (C,)}; with masks also "labels": int64 (S, S).

    With `superpixels` also "superpixels": int64 (S, S), indices from 0, what lies outside the image being one of its
    own; with `saliency` or `confidence` also these: float32 (S, S) in [0, 1]. All from the column of that name. With
    `targets` also "targets": float32 (C, S, S) in [0, 1] from the column `localization_maps`, a grey PNG for each tag.

    `transform(image, mask, rng, followers)` makes the tensors (see TrainTransform). Its random numbers depend on
    (seed, epoch, i) alone, so they are the same for any number of workers and processes. With `mask_column`, rows
    without a mask are left out. Raises DataError for a column that does not exist or holds no mask, for a file that
    does not decode, and for a mask or confidence that does not fit its image or the classes.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[..., tuple[Tensor, Tensor | None]],
        mask_column: str | None = None,
        seed: int = 0,
        superpixels: bool = False,
        saliency: bool = False,
        targets: bool = False,
        confidence: bool = False,
    ):
        self.maps = [name for name, wanted in zip(MAPS, (superpixels, saliency, confidence), strict=True) if wanted]
        columns = ["image_id", "image", "tags", *self.maps, *["localization_maps"] * targets]
        for column in self.maps:
            if column not in dataset.features:
                raise DataError(
                    f"the recipe wants {column} ({MAPS[column]}.{column}) and there is no column {column!r}, only "
                    f"{', '.join(dataset.features)}"
                )
        if mask_column is not None:
            if mask_column not in dataset.features:
                raise DataError(f"no column {mask_column!r} to learn from; there are {', '.join(dataset.features)}")
            dataset = dataset.select(np.flatnonzero(has_value(dataset, mask_column)))
            if not len(dataset):
                raise DataError(f"no row has a {mask_column!r} to learn from")
            columns.append(mask_column)
        self.targets = targets
        self.num_classes = len(class_names(dataset))
        self.rows = undecoded(dataset.select_columns(columns))
        self.transform, self.mask_column, self.seed = transform, mask_column, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see the new epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        where = f"row {row['image_id']!r}"
        image = decode_image(row["image"], f"{where}, {row['image'] and row['image']['path'] or 'column image'}")
        mask = None
        if self.mask_column is not None:
            mask = decode_mask(row[self.mask_column], f"{where}, column {self.mask_column}")
            _check_size(mask, image, f"{where}: {self.mask_column}")
            outside = mask[(mask > self.num_classes) & (mask != IGNORE_INDEX)]
            if outside.size:
                raise DataError(
                    f"{where}: {self.mask_column} has the value {outside[0]}; right are 0 to {self.num_classes} "
                    "(background and the classes of the data) and 255"
                )
        rng = np.random.default_rng((self.seed, int(self._epoch), index))
        followers = self._followers(row, where)
        if "confidence" in followers:
            _check_size(followers["confidence"][0], image, f"{where}: confidence")
        pixel_values, labels, *followed = self.transform(image, mask, rng, [*followers.values()])
        example = {"pixel_values": pixel_values, "tags": tags_to_multi_hot(row["tags"], self.num_classes)}
        if labels is not None:
            example["labels"] = labels
        followed = dict(zip(followers, followed, strict=True))
        if self.targets:
            example["targets"] = torch.zeros(self.num_classes, *pixel_values.shape[-2:])
            for tag in row["tags"]:
                example["targets"][tag] = followed.pop(tag)
        return example | followed

    def _followers(self, row: dict, where: str) -> dict[str | int, tuple[np.ndarray, int]]:
        """What the transform does to other maps than masks, by column or, for localisation maps, by class."""
        followers = {}
        for name in self.maps:
            values = decode_gray(row[name], f"{where}, column {name}")
            is_index = name == "superpixels"
            followers[name] = (values, int(values.max()) + 1) if is_index else (_share(values), 0)
        if self.targets:
            for tag, png in zip(row["tags"], row["localization_maps"], strict=True):
                followers[tag] = _share(decode_gray({"bytes": png}, f"{where}, localization_maps")), 0
        return followers


def _share(values: np.ndarray) -> np.ndarray:
    """0..255 → float32 in [0, 1]."""
    return values.astype(np.float32) / 255


def _check_size(values: np.ndarray, image: Image.Image, what: str) -> None:
    if values.shape != (image.height, image.width):
        raise DataError(
            f"{what} is {values.shape[1]}x{values.shape[0]} but its image is {image.width}x{image.height}; "
            "they must be the same"
        )
