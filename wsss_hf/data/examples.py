"""Training examples: one split of a tagged data set, decoded and augmented."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import Tensor

from ..models.maps import IGNORE_INDEX
from .streams import whole_shards
from .tagged import (
    DataError,
    class_names,
    decode_gray,
    decode_image,
    decode_mask,
    decode_saliency,
    has_value,
    tags_to_multi_hot,
    undecoded,
)

# Image columns that training may read beside the masks → the setting of a recipe that asks for them.
MAPS = {"superpixels": "cam.superpixels", "saliency": "cam.saliency", "confidence": "segmenter.confidence"}


BUFFER = 1000  # rows of a stream


class TaggedExamples(torch.utils.data.Dataset):
    """Item i → {"pixel_values": float32 (3, S, S), "tags": float32 (C,)}; with masks also "labels": int64 (S, S).

    With `superpixels` also "superpixels": int64 (S, S), indices from 0, the padding being one more; with `saliency` or
    `confidence` also these: float32 (S, S) in [0, 1]. All from the column of that name. With `targets` also "targets":
    float32 (C, S, S) in [0, 1] from the column `localization_maps`, a grey PNG for each tag.

    `transform(image, mask, rng, followers)` makes the tensors (see TrainTransform). Its random numbers depend on
    (seed, epoch, i) alone, so they are the same for any number of workers and processes. With `mask_column`, rows
    without a mask are left out.

    Attributes:
        views: crops of an image, which epochs show in turn; 0 makes new ones in every epoch.

    Raises:
        DataError: a column does not exist or holds no mask, a file does not decode, or a mask, confidence or saliency
            does not fit its image or the classes.
    """

    views = 0

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        transform: Callable[..., tuple[Any, ...]],
        mask_column: str | None = None,
        seed: int = 0,
        superpixels: bool = False,
        saliency: bool = False,
        targets: bool = False,
        confidence: bool = False,
    ):
        wanted = {"superpixels": superpixels, "saliency": saliency, "confidence": confidence}
        self.maps = [name for name in MAPS if wanted[name]]
        columns = ["image_id", "image", "tags", *self.maps, *["localization_maps"] * targets]
        for column in self.maps:
            if column not in dataset.features:
                raise DataError(
                    f"data set: expected a column {column!r} for {MAPS[column]}, got {', '.join(dataset.features)}"
                )
        if mask_column is not None:
            if mask_column not in dataset.features:
                raise DataError(f"data set: expected a column {mask_column!r}, got {', '.join(dataset.features)}")
            dataset = _with_masks(dataset, mask_column)
            columns.append(mask_column)
        self.targets = targets
        self.num_classes = len(class_names(dataset))
        self.rows = undecoded(dataset.select_columns(columns))
        self.transform, self.mask_column, self.seed = transform, mask_column, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see the new epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch % self.views if self.views else epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.example(self.rows[index], np.random.default_rng((self.seed, int(self._epoch), index)))

    def first(self, count: int) -> list[dict[str, Tensor]]:
        """At most `count` items of the first rows, the same at every call and in every epoch."""
        rows = enumerate(itertools.islice(self.rows, count))
        return [self.example(row, np.random.default_rng((self.seed, 0, index))) for index, row in rows]

    def example(self, row: dict, rng: np.random.Generator) -> dict[str, Tensor]:
        """The item of a row."""
        where = f"row {row['image_id']!r}"
        image = decode_image(row["image"], f"{where}, {row['image'] and row['image']['path'] or 'column image'}")
        mask = None
        if self.mask_column is not None:
            mask = decode_mask(row[self.mask_column], f"{where}, column {self.mask_column}")
            _check_size(mask, image, f"{where}: {self.mask_column}")
            outside = mask[(mask > self.num_classes) & (mask != IGNORE_INDEX)]
            if outside.size:
                raise DataError(
                    f"{where}: {self.mask_column}: expected labels 0..{self.num_classes} and 255, got {outside[0]}"
                )
        followers = self._followers(row, image.size, where)
        if "confidence" in followers:
            _check_size(followers["confidence"][0], image, f"{where}: confidence")
        pixel_values, labels, *maps = self.transform(image, mask, rng, [*followers.values()])
        example = {"pixel_values": pixel_values, "tags": tags_to_multi_hot(row["tags"], self.num_classes)}
        if labels is not None:
            example["labels"] = labels
        if self.targets:
            example["targets"] = torch.zeros(self.num_classes, *pixel_values.shape[-2:])
        for key, values in zip(followers, maps, strict=True):
            if isinstance(key, str):
                example[key] = values
            else:
                example["targets"][key] = values
        return example

    def _followers(self, row: dict, size: tuple[int, int], where: str) -> dict[str | int, tuple[np.ndarray, int]]:
        """The other maps that the transform crops, and their values for padding; by column or, for localisation
        maps, by class."""
        followers: dict[str | int, tuple[np.ndarray, int]] = {}
        for name in self.maps:
            place = f"{where}, column {name}"
            if name == "saliency":
                followers[name] = decode_saliency(row[name], size, place), 0
                continue
            values = decode_gray(row[name], place)
            is_index = name == "superpixels"
            followers[name] = (values, int(values.max()) + 1) if is_index else (_unit_range(values), 0)
        if self.targets:
            for tag, png in zip(row["tags"], row["localization_maps"], strict=True):
                followers[tag] = _unit_range(decode_gray({"bytes": png}, f"{where}, localization_maps")), 0
        return followers


class StreamedExamples(TaggedExamples, torch.utils.data.IterableDataset):
    """The items of a stream without end: after its last row it begins again, in another order.

    Rows are drawn from a buffer of `BUFFER`, and shards in an order of their own, by seed and pass. The processes get
    different shards where their number divides by that of the processes, else every so-manyth row.

    Attributes:
        start: items that are left out, for a training that goes on: their rows are read again, and not decoded.
        process, processes: whose items these are.

    Raises:
        DataError: as of [`TaggedExamples`]; a process finds no row at all.
    """

    start, process, processes = 0, 0, 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        shuffled = self.rows.shuffle(seed=self.seed, buffer_size=BUFFER)
        rows = split_dataset_by_node(shuffled, rank=self.process, world_size=self.processes)
        done = 0
        for number in itertools.count():
            rows.set_epoch(number)
            before = done
            with whole_shards():
                for row in rows:
                    if done >= self.start:
                        yield self.example(row, np.random.default_rng((self.seed, self.process, done)))
                    done += 1
            if done == before:
                raise DataError(f"stream: expected rows for each of {self.processes} processes, got none for one")

    def first(self, count: int) -> list[dict[str, Tensor]]:
        with whole_shards():
            return super().first(count)


def _with_masks(rows: Dataset | IterableDataset, column: str) -> Dataset | IterableDataset:
    if isinstance(rows, IterableDataset):
        return rows.filter(lambda row: row[column] is not None)
    rows = rows.select(np.flatnonzero(has_value(rows, column)))
    if not len(rows):
        raise DataError(f"column {column!r}: expected a mask in at least one row, got none")
    return rows


def _unit_range(values: np.ndarray) -> np.ndarray:
    """0..255 → float32 in [0, 1]."""
    return values.astype(np.float32) / 255


def _check_size(values: np.ndarray, image: Image.Image, what: str) -> None:
    if values.shape != (image.height, image.width):
        raise DataError(
            f"{what}: expected the image's size, {image.width}x{image.height}, got {values.shape[1]}x{values.shape[0]}"
        )
