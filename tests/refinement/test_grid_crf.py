"""The CRF in torch alone: mean field against plain loops, and what a grid of pixels is enough for."""

import math

import numpy as np
import pytest
import torch

from wsss_hf.refinement import grid_crf as module
from wsss_hf.refinement.grid_crf import grid_crf


def picture(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width)).astype(np.uint8))


def test_where_the_grid_is_all_pixels_it_is_mean_field():
    image = picture(5, 5)
    scores = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(1)).clamp(min=0.05)
    refined = grid_crf(scores, image, iterations=2, sxy=3.0, srgb=60.0, compat=1.5, grid=5)

    pixels = [(y, x) for y in range(5) for x in range(5)]
    colours = {}
    for y, x in pixels:
        around = [(y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        inside = [image[:, a, b].double() for a, b in around if 0 <= a < 5 and 0 <= b < 5]
        colours[y, x] = sum(inside) / len(inside)

    def kernel(one, other):
        places = math.dist(one, other) / 3.0
        return math.exp(-0.5 * (places**2 + float((colours[one] - colours[other]).square().sum()) / 60.0**2))

    unary = {(y, x): scores[:, y, x].double() / scores[:, y, x].sum() for y, x in pixels}
    belief = dict(unary)
    for _ in range(3):  # two for the grid, and one to all pixels
        weights = {one: {other: kernel(one, other) for other in pixels} for one in pixels}
        message = {
            one: sum(weights[one][o] * belief[o] for o in pixels) / sum(weights[one].values()) for one in pixels
        }
        belief = {one: unary[one] * (1.5 * message[one]).exp() for one in pixels}
        belief = {one: value / value.sum() for one, value in belief.items()}
    expected = torch.stack([belief[pixel] for pixel in pixels], dim=1).reshape(3, 5, 5)
    torch.testing.assert_close(refined.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(96, 96), (80, 100)])
def test_a_class_covers_all_that_has_its_colour_however_far(size):
    height, width = size
    bar = torch.zeros(size, dtype=torch.bool)
    bar[height // 4 : height // 2] = True
    noise = np.random.default_rng(0).normal(0, 8, (3, *size))
    colours = torch.where(bar, torch.tensor([180, 60, 60])[:, None, None], torch.tensor([90, 120, 90])[:, None, None])
    image = (colours + torch.from_numpy(noise)).clamp(0, 255).to(torch.uint8)
    columns, rows = torch.arange(width), torch.arange(height)[:, None]
    blob = torch.exp(-((columns - width / 2) ** 2 + (rows - 0.4 * height) ** 2) / (2 * (0.15 * width) ** 2))
    scores = torch.stack([torch.full(size, 0.15), blob.clamp(min=0.03)])
    before, after = (one.argmax(dim=0) == 1 for one in (scores, grid_crf(scores, image)))
    assert (before == bar).float().mean() < 0.9
    assert (after == bar).float().mean() > 0.97


def test_channels_of_zeros_stay_out_of_it():
    scores = torch.rand(3, 9, 14, generator=torch.Generator().manual_seed(0))
    image = picture(9, 14)
    wider = torch.cat([scores[:2], torch.zeros(2, 9, 14), scores[2:]])
    refined = grid_crf(wider, image)
    assert not refined[2:4].any()
    torch.testing.assert_close(refined[[0, 1, 4]], grid_crf(scores, image))
    torch.testing.assert_close(refined.sum(dim=0), torch.ones(9, 14))
    assert (grid_crf(torch.zeros(4, 9, 14), image) == 0.25).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (33, 2)])
def test_images_may_be_small_and_narrow(size):
    scores = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    refined = grid_crf(scores, picture(*size))
    assert refined.shape == scores.shape and refined.isfinite().all()


def test_chunks_change_nothing(monkeypatch):
    scores = torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0))
    whole = grid_crf(scores, picture(20, 30))
    monkeypatch.setattr(module, "_CHUNK", 77)
    torch.testing.assert_close(grid_crf(scores, picture(20, 30)), whole)
