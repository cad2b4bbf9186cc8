import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_hf.data.transforms import TrainTransform

PLAIN = {"color_jitter": 0, "image_mean": (0, 0, 0), "image_std": (1, 1, 1)}


def gradient(width, height):
    """An image whose red is its mask: column number times 4."""
    columns = np.tile(np.arange(width, dtype=np.uint8) * 4, (height, 1))
    return Image.fromarray(np.stack([columns, columns * 0, columns * 0], axis=-1)), columns


def test_scale_one_of_a_square_image_is_the_image():
    image, mask = gradient(32, 32)
    pixels, labels = TrainTransform(32, scale=(1, 1), flip=0, **PLAIN)(image, mask, np.random.default_rng(0))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert labels.shape == (32, 32) and labels.dtype == torch.int64
    assert np.array_equal(labels, mask) and torch.allclose(pixels[0] * 255, labels.float())


@pytest.mark.parametrize("size", [(40, 30), (30, 50), (61, 17)])
def test_mask_follows_image_through_scale_crop_and_flip(size):
    image, mask = gradient(*size)
    transform = TrainTransform(24, scale=(0.5, 2), **PLAIN)
    directions = set()
    for seed in range(30):
        pixels, labels = transform(image, mask, np.random.default_rng(seed))
        inside = labels < 255
        assert ((pixels[0] * 255 - labels)[inside].abs() <= 8).all()  # at most two columns off
        assert (pixels[:, ~inside] == 0).all()
        directions.add(bool((labels.diff(dim=1)[inside[:, 1:] & inside[:, :-1]] >= 0).all()))
    assert directions == {True, False}


@pytest.mark.parametrize("factor", [1, 2])
def test_other_maps_follow_at_a_resolution_of_their_own(factor):
    image, mask = gradient(40, 30)
    coarse = np.ascontiguousarray(mask[::factor, ::factor]).astype(np.int32) + 1000
    transform = TrainTransform(24, scale=(0.5, 2), **PLAIN)
    for seed in range(30):
        _, labels, followed = transform(image, mask, np.random.default_rng(seed), [(coarse, 7)])
        inside = labels < 255
        assert ((followed - 1000 - labels)[inside].abs() <= 4 * factor).all() and (followed[~inside] == 7).all()
        assert torch.equal(labels, transform(image, mask, np.random.default_rng(seed))[1])


def test_smaller_images_are_padded_at_a_random_place():
    image = Image.new("RGB", (20, 20), "white")
    transform = TrainTransform(20, scale=(0.5, 0.5), image_mean=(0.5,) * 3, image_std=(0.5,) * 3, color_jitter=0)
    places = set()
    for seed in range(20):
        pixels, labels = transform(image, np.full((20, 20), 3, dtype=np.uint8), np.random.default_rng(seed))
        inside = labels == 3
        assert inside.sum() == 100 and (labels[~inside] == 255).all()
        assert (pixels[:, inside] == 1).all() and (pixels[:, ~inside] == 0).all()
        places.add(int(inside.flatten().int().argmax()))
    assert len(places) > 10


@pytest.mark.parametrize(("side", "columns"), [("short", 80), ("long", 40)])
def test_scale_one_brings_the_named_side_to_the_crop(side, columns):
    image, mask = gradient(60, 30)
    transform = TrainTransform(40, scale=(1, 1), flip=0, scaled_side=side, **PLAIN)
    _, labels = transform(image, mask, np.random.default_rng(0))
    rows = labels[(labels < 255).any(dim=1)]
    assert len(rows) == {"short": 40, "long": 20}[side]
    assert rows[0].diff().float().mean().item() == pytest.approx(4 * 60 / columns, abs=0.3)


def test_both_sides_make_a_square():
    image, mask = gradient(60, 30)
    transform = TrainTransform(40, scale=(1, 1), flip=0, scaled_side="both", **PLAIN)
    pixels, labels = transform(image, mask, np.random.default_rng(0))
    assert (labels < 255).all()
    squashed = np.asarray(image.resize((40, 40), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    assert np.abs(pixels.permute(1, 2, 0).numpy() - squashed).max() < 0.02
    transform = TrainTransform(40, scale=(1.2, 1.2), flip=0, scaled_side="both", **PLAIN)  # squares of 48 pixels
    places = set()
    larger = np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    for seed in range(10):
        pixels = transform(image, mask, np.random.default_rng(seed))[0].permute(1, 2, 0).numpy()
        errors = {x: np.abs(pixels - larger[4:44, x : x + 40]).mean() for x in range(9)}
        places.add(min(errors, key=errors.get))
    assert len(places) > 3


def test_the_native_scale_is_that_of_the_image():
    image, mask = gradient(60, 30)
    transform = TrainTransform(40, scale=(0.5, 0.5), flip=0, scaled_side="native", **PLAIN)
    _, labels = transform(image, mask, np.random.default_rng(0))
    inside = labels < 255
    assert (inside.any(dim=1).sum(), inside.any(dim=0).sum()) == (15, 30)


def test_the_hue_turns_and_nothing_else():
    image = Image.new("RGB", (8, 8), (200, 80, 40))
    red = colorsys.rgb_to_hsv(200 / 255, 80 / 255, 40 / 255)
    transform = TrainTransform(8, scale=(1, 1), hue_jitter=0.1, **PLAIN)
    turns = []
    for seed in range(40):
        pixels, _ = transform(image, None, np.random.default_rng(seed))
        hue, saturation, value = colorsys.rgb_to_hsv(*pixels[:, 0, 0].tolist())
        assert (saturation, value) == pytest.approx(red[1:], abs=0.02)
        turns.append((hue - red[0] + 0.5) % 1 - 0.5)
    assert max(turns) > 0.05 and min(turns) < -0.05 and max(map(abs, turns)) < 0.11


def test_blue_may_come_first():
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    plain, flipped = (
        TrainTransform(8, scale=(1, 1), color_jitter=0, blue_first=first)(image, None, np.random.default_rng(0))[0]
        for first in (False, True)
    )
    assert torch.equal(flipped, plain.flip(0)) and not torch.equal(flipped, plain)


def test_colors_are_jittered_and_normalised_and_the_mask_is_optional():
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    transform = TrainTransform(8, scale=(1, 1), color_jitter=0.2)
    first, labels = transform(image, None, np.random.default_rng(0))
    second, _ = transform(image, None, np.random.default_rng(1))
    assert labels is None and not torch.allclose(first, second)
    plain, _ = TrainTransform(8, scale=(1, 1), color_jitter=0)(image, None, np.random.default_rng(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(plain[:, 0, 0], (torch.tensor([200, 100, 50]) / 255 - mean) / std, atol=1e-5)
    colors = first[:, 0, 0] * std + mean
    assert (
        (colors >= 0).all()
        and (colors <= 1).all()
        and ((colors - torch.tensor([200, 100, 50]) / 255).abs() < 0.4).all()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size: expected a positive number of pixels, got 0"),
        ({"scale": (0, 1)}, r"scale: expected two positive numbers, the smaller first, got \(0, 1\)"),
        ({"scale": (2, 1)}, "scale: expected"),
        ({"flip": 2}, r"flip: expected a number in \[0, 1\], got 2"),
        ({"color_jitter": 1}, r"color_jitter: expected a number in \[0, 1\), got 1"),
        ({"hue_jitter": 0.6}, r"hue_jitter: expected a number in \[0, 0.5\], got 0.6"),
        ({"scaled_side": "wide"}, "scaled_side: expected short or long or both or native, got 'wide'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(**{"crop_size": 8} | options)
