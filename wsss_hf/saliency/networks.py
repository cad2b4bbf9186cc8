"""What networks that were trained to find the foreground have in common: their input, and how their output is read."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from scipy.special import expit
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.tagged import decode_image, undecoded
from ..models.options import Options, option
from ..settings import speed
from .source import SaliencyError, SaliencySource

PROCESSOR_FILE = "preprocessor_config.json"
_METHODS = {
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_KNOWN_METHODS = {int(method): name for name, method in _METHODS.items()}  # as an image processor's file has it
_ROUNDING = 1e-3  # by which a probability may leave [0, 1]
_NOT_RECORDED = "not recorded; such networks are usually trained on class-agnostic masks"


@dataclass
class NetworkSettings(Options):
    """How images are shown to a network, and how its output is read."""

    file: str | None = option(None, "The ONNX file in a folder or repository; null takes the only one.")
    size: int | None = option(None, "Side of the network's square input in pixels; null reads its files.", at_least=1)
    mean: list[float] | None = option(None, "Per channel, for images in [0, 1]; null reads its files.", length=3)
    std: list[float] | None = option(None, "As mean.", above=0, length=3)
    letterbox: bool = option(False, "Pad an image to a square with black, instead of stretching it.")
    resample: Literal["area", "bilinear", "bicubic", "lanczos"] | None = option(
        None, "How images are resized: area | bilinear | bicubic | lanczos; null reads its files, else area."
    )
    output: int | None = option(
        None, "Number of the output that is the map; null takes the first fit one.", at_least=0
    )
    activation: Literal["auto", "sigmoid", "none", "min_max"] = option(
        "auto", "auto: sigmoid if values leave [0, 1] | sigmoid | none | min_max: stretch each map to [0, 1]"
    )
    batch_size: int = speed(4, "Images that go through the network together.", at_least=1)


@dataclass(frozen=True)
class InputFormat:
    """What a network sees of an image.

    Attributes:
        size: (h, w) in pixels.
        mean, std: per channel, for images in [0, 1].
        letterbox: whether the image keeps its aspect and is padded with black.
        resample: area, bilinear, bicubic or lanczos.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    letterbox: bool = False
    resample: str = "area"

    def box(self, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Where an image of (width, height) lies in the input: left, top, right, bottom."""
        height, width = self.size
        if not self.letterbox:
            return 0, 0, width, height
        scale = min(width / image_size[0], height / image_size[1])
        shown = [max(1, int(side * scale + 1e-6)) for side in image_size]
        left, top = (width - shown[0]) // 2, (height - shown[1]) // 2
        return left, top, left + shown[0], top + shown[1]

    def show(self, image: Image.Image) -> np.ndarray:
        """RGB image → (3, h, w) float32."""
        left, top, right, bottom = self.box(image.size)
        canvas = Image.new("RGB", (self.size[1], self.size[0]))
        size = (right - left, bottom - top)
        is_reduced = size[0] <= image.width and size[1] <= image.height
        method = self.resample if is_reduced or self.resample != "area" else "bilinear"  # which enlarges smoothly
        canvas.paste(image.resize(size, _METHODS[method]), (left, top))
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        values = (np.asarray(canvas, np.float32) / 255 - mean) / std
        return values.transpose(2, 0, 1)

    def restore(self, values: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """A map (h', w') of the whole input → (H, W) float32 of the image of (width, height)."""
        picture = Image.fromarray(values.astype(np.float32))
        if self.letterbox:  # cut out before it is resized, so that nothing of the padding comes in
            picture = picture.resize(self.size[::-1], Image.Resampling.BILINEAR).crop(self.box(image_size))
        return np.asarray(picture.resize(image_size, Image.Resampling.BILINEAR))


def input_format(
    name: str,
    settings: NetworkSettings,
    processor_file: Path | None,
    side: tuple[int, int] | None = None,
    default: tuple[int, int] | None = None,
) -> InputFormat:
    """The input of a network: what its file fixes, else the settings, else its image processor, else ImageNet's mean.

    Args:
        name: of the network, for messages.
        processor_file: its `preprocessor_config.json`, if it has one.
        side: (h, w) that its file fixes.
        default: (h, w) where nothing else says it.

    Raises:
        SaliencyError: the size is not known, or not the one that the network takes.
    """
    known = _read_json(processor_file) if processor_file is not None else {}
    wanted = None if settings.size is None else (settings.size, settings.size)
    if side is not None and wanted not in (None, side):
        raise SaliencyError(f"size: expected {_sides(side)}, which {name} takes alone, got {settings.size}")
    size = side or wanted or _processor_size(known.get("size")) or default
    if size is None:
        raise SaliencyError(f"size: expected the side of the input in pixels, which {name} does not say, got none")
    mean, std = _processor_normalization(known)
    resample = settings.resample or _KNOWN_METHODS.get(known.get("resample", -1), "area")
    return InputFormat(size, settings.mean or mean, settings.std or std, settings.letterbox, resample)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SaliencyError(f"{file}: expected an image processor's JSON, got another file ({error})") from error
    return held if isinstance(held, dict) else {}


def _processor_size(size: Any) -> tuple[int, int] | None:
    """(h, w) of `size` in a preprocessor_config.json; a shortest edge is taken as the side of a square."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        height, width = size.get("height", side), size.get("width", side)
        return (int(height), int(width)) if height and width else None
    return None


def _processor_normalization(known: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a preprocessor_config.json for images in [0, 1]."""
    is_plain = known.get("do_normalize") is False
    mean = [0.0] if is_plain else known.get("image_mean") or IMAGENET_DEFAULT_MEAN
    std = [1.0] if is_plain else known.get("image_std") or IMAGENET_DEFAULT_STD
    range_ = 255.0 if known.get("do_rescale") is False else 1.0  # of the images that the network takes
    return (np.broadcast_to(mean, 3) / range_).tolist(), (np.broadcast_to(std, 3) / range_).tolist()


def _sides(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


class NetworkSource(SaliencySource):
    """A network: image in, map out.

    Attributes:
        format: of its input.
        logits: whether its values are logits; None where that is not known.
    """

    settings: NetworkSettings
    format: InputFormat
    logits: bool | None = None
    learnt_from = _NOT_RECORDED

    @abstractmethod
    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs (B, 3, h, w) float32 → maps (B, h', w') float32, as the network gives them."""

    def prepare(self, rows: Dataset, device: torch.device) -> None:
        self._activation = self.settings.activation
        if self._activation == "auto":
            logits = self.logits
            if logits is None:
                logits = not all(_in_unit_range(raw) for _, raw, _ in self._raw_maps(rows))
            self._activation = "sigmoid" if logits else "none"

    @property
    def state(self) -> str:
        return self._activation

    def maps(self, rows: Dataset) -> Iterator[tuple[int, np.ndarray]]:
        ids = rows["image_id"][:]
        for index, raw, size in self._raw_maps(rows):
            yield index, self.format.restore(self._probabilities(raw, f"row {ids[index]!r}"), size).clip(0, 1)

    def _raw_maps(self, rows: Dataset) -> Iterator[tuple[int, np.ndarray, tuple[int, int]]]:
        """(index, map as the network gives it, (width, height) of the image) of every row."""
        rows = undecoded(rows.select_columns(["image_id", "image"]))
        step = self.settings.batch_size
        for start in range(0, len(rows), step):
            images = [
                decode_image(row["image"], f"row {row['image_id']!r}")
                for row in rows.select(range(start, min(start + step, len(rows))))
            ]
            found = self.predict(np.stack([self.format.show(image) for image in images]))
            for offset, (raw, image) in enumerate(zip(found, images, strict=True)):
                yield start + offset, raw, image.size

    def _probabilities(self, raw: np.ndarray, where: str) -> np.ndarray:
        if not np.isfinite(raw).all():
            raise SaliencyError(f"{where}: expected a finite map of {self.name}, got other values")
        if self._activation == "sigmoid":
            return expit(raw)
        if self._activation == "min_max":
            low, high = raw.min(), raw.max()
            return (raw - low) / (high - low) if high > low else np.zeros_like(raw)
        if not _in_unit_range(raw):
            raise SaliencyError(
                f"{where}: expected values of {self.name} in [0, 1], got {raw.min():.3g} to {raw.max():.3g}; "
                "activation: sigmoid is for logits"
            )
        return raw


def _in_unit_range(values: np.ndarray) -> bool:
    return bool(values.min() >= -_ROUNDING and values.max() <= 1 + _ROUNDING)
