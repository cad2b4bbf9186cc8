"""Augmentation of an image together with its mask and other maps."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..models.maps import IGNORE_INDEX

_SIDES = ("short", "long", "both", "native")
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


class TrainTransform:
    """Random scale, crop, flip and colour; then normalisation.

    At scale 1 the short (or long, see `scaled_side`) side of the image is `crop_size`; "both" squashes the image to a
    square, "native" leaves it as it is. Where the scaled image is smaller than the crop it lies at a random place in
    it; the rest has pixel value 0 (after normalisation) and label 255.
    """

    def __init__(
        self,
        crop_size: int,
        scale: tuple[float, float] = (0.7, 1.4),
        flip: float = 0.5,
        color_jitter: float = 0.2,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        blue_first: bool = False,
        hue_jitter: float = 0.0,
        scaled_side: str = "short",
    ):
        if crop_size < 1:
            raise ValueError(f"crop_size: expected a positive number of pixels, got {crop_size}")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale: expected two positive numbers, the smaller first, got {scale}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip: expected a number in [0, 1], got {flip}")
        if not 0 <= color_jitter < 1:
            raise ValueError(f"color_jitter: expected a number in [0, 1), got {color_jitter}")
        self.crop_size, self.scale, self.flip, self.color_jitter = crop_size, scale, flip, color_jitter
        if not 0 <= hue_jitter <= 0.5:
            raise ValueError(f"hue_jitter: expected a number in [0, 0.5], got {hue_jitter}")
        if scaled_side not in _SIDES:
            raise ValueError(f"scaled_side: expected {' or '.join(_SIDES)}, got {scaled_side!r}")
        self.hue_jitter, self.scaled_side = hue_jitter, scaled_side
        self.mean = torch.tensor(image_mean).view(3, 1, 1)
        self.std = torch.tensor(image_std).view(3, 1, 1)
        self.blue_first = blue_first  # channels of pixel_values in the order blue, green, red

    def __call__(
        self,
        image: Image.Image,
        mask: np.ndarray | None,
        rng: np.random.Generator,
        followers: Sequence[tuple[np.ndarray, int]] = (),
    ) -> tuple[torch.Tensor | None, ...]:
        """RGB image, mask uint8 (H, W) or None → pixel_values float32 (3, S, S), mask int64 (S, S) or None.

        After them comes a tensor (S, S) for every one of `followers`: maps (h, w) of the whole image, at a resolution
        of their own, each with the value that it gets outside the image. Of int32 ones, indices, the nearest are
        taken, as int64; float32 ones are interpolated.
        """
        size = self.crop_size
        across, down = self._factors(image.size, rng.uniform(*self.scale))
        left, width, x = self._crop_axis(image.width, across, rng)
        top, height, y = self._crop_axis(image.height, down, rng)
        box = (left, top, left + width / across, top + height / down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # no rounding beyond the border
        flip = rng.random() < self.flip

        crop = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        crop = self._turn_hue(crop, rng) if self.hue_jitter else crop
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255
        pixels = (self._jitter(pixels, rng) - self.mean) / self.std
        pixels = pixels.flip(0) if self.blue_first else pixels
        pixel_values = torch.zeros(3, size, size)
        pixel_values[:, y : y + height, x : x + width] = pixels
        pixel_values = pixel_values.flip(-1) if flip else pixel_values

        def follow(values: np.ndarray, outside: int) -> torch.Tensor:
            across, down = values.shape[1] / image.width, values.shape[0] / image.height
            part = (box[0] * across, box[1] * down, min(box[2] * across, values.shape[1]), box[3] * down)
            part = (*part[:3], min(part[3], values.shape[0]))
            smooth = values.dtype == np.float32
            resample = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
            crop = Image.fromarray(values).resize((width, height), resample, box=part)
            followed = torch.full((size, size), outside, dtype=torch.float32 if smooth else torch.int64)
            followed[y : y + height, x : x + width] = torch.from_numpy(np.array(crop)).to(followed.dtype)
            return followed.flip(-1) if flip else followed

        labels = None if mask is None else follow(mask, IGNORE_INDEX)
        return pixel_values, labels, *(follow(values, outside) for values, outside in followers)

    def _factors(self, sides: tuple[int, int], scale: float) -> tuple[float, float]:
        """How many times as wide and as high the scaled image is."""
        if self.scaled_side == "native":
            return scale, scale
        width, height = (self.crop_size / side * scale for side in sides)
        if self.scaled_side == "both":
            return width, height
        factor = max(width, height) if self.scaled_side == "short" else min(width, height)
        return factor, factor

    def _crop_axis(self, length: int, factor: float, rng: np.random.Generator) -> tuple[float, int, int]:
        """One axis → where the crop begins in the image, its length in the output, where it is put in the output."""
        scaled = max(round(length * factor), 1)
        place = rng.random()
        if scaled >= self.crop_size:
            return place * (length - min(self.crop_size / factor, length)), self.crop_size, 0
        return 0.0, scaled, int(place * (self.crop_size - scaled + 1))

    def _turn_hue(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The hue of every pixel by the same part of a turn in ± hue_jitter."""
        hue, saturation, value = image.convert("HSV").split()
        turn = round(255 * rng.uniform(-self.hue_jitter, self.hue_jitter))
        turned = hue.point([(level + turn) % 256 for level in range(256)])
        return Image.merge("HSV", (turned, saturation, value)).convert("RGB")

    def _jitter(self, pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Brightness, contrast and saturation, each by a factor in 1 ± color_jitter."""
        brightness, contrast, saturation = rng.uniform(1 - self.color_jitter, 1 + self.color_jitter, 3).tolist()
        pixels = pixels * brightness
        mean = pixels.mean()
        pixels = mean + contrast * (pixels - mean)
        gray = (pixels * _LUMA).sum(0, keepdim=True)
        return (gray + saturation * (pixels - gray)).clamp(0, 1)
