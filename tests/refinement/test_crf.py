"""The dense CRF: the library's own labels from fewer channels, seeds without ignored pixels, and a missing library."""

import sys
from itertools import pairwise

import numpy as np
import pytest

from wsss_hf.refinement.crf import dense_crf, refine_labels


@pytest.fixture
def photograph():
    """A noisy disc of one colour on another, and scores (3, H, W) that know it only roughly."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:60, :80]
    disc = (rows - 30) ** 2 + (columns - 40) ** 2 < 18**2
    colours = np.where(disc[..., None], [200, 80, 40], [40, 90, 160])
    image = (colours + rng.normal(0, 12, (60, 80, 3))).clip(0, 255).astype(np.uint8)
    rough = np.exp(-((rows - 27) ** 2 + (columns - 44) ** 2) / 400) + rng.uniform(-0.1, 0.1, disc.shape)
    other = rng.uniform(0, 0.3, disc.shape)
    return image, disc, np.stack([np.full(disc.shape, 0.5), rough, other]).clip(0, 1).astype(np.float32)


def test_labels_are_those_of_the_library_with_all_classes(photograph):
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    utils = pytest.importorskip("pydensecrf.utils")
    image, _, scores = photograph
    present = [0, 5, 15]
    every = np.zeros((21, *scores.shape[1:]), dtype=np.float32)
    every[present] = scores
    crf = densecrf.DenseCRF2D(80, 60, 21)
    crf.setUnaryEnergy(utils.unary_from_softmax(every / every.sum(axis=0)))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    expected = np.array(crf.inference(10)).argmax(axis=0).reshape(60, 80)
    refined = dense_crf(scores, image)
    assert (np.array(present)[refined.argmax(axis=0)] == expected).mean() >= 0.995
    # Channels that are zero everywhere change nothing, and stay zero.
    widened = dense_crf(every, image)
    np.testing.assert_array_equal(widened[present], refined)
    assert widened.sum() == pytest.approx(refined.sum())


def test_scores_follow_the_colours(photograph):
    pytest.importorskip("pydensecrf")
    image, disc, scores = photograph
    refined = dense_crf(scores, image)
    np.testing.assert_allclose(refined.sum(axis=0), 1, atol=1e-4)
    assert ((scores.argmax(axis=0) == 1) == disc).mean() < 0.93
    assert ((refined.argmax(axis=0) == 1) == disc).mean() > 0.99


def test_iterations_end_where_they_move_little(photograph):
    pytest.importorskip("pydensecrf")
    image, _, scores = photograph
    by_count = [dense_crf(scores, image, iterations=count, tolerance=0) for count in range(1, 11)]
    moved = [np.abs(after - before).sum() / (2 * 60 * 80) for before, after in pairwise(by_count)]
    assert moved[0] > 0.002 > min(moved)
    for tolerance in (0.002, 1.5 * min(moved)):
        last = 1 + next(i for i, share in enumerate(moved) if share < tolerance)
        np.testing.assert_array_equal(dense_crf(scores, image, tolerance=tolerance), by_count[last])
    np.testing.assert_array_equal(dense_crf(scores, image, iterations=3, tolerance=0.0001), by_count[2])


def test_fewer_than_two_channels_need_no_library(photograph, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    image, _, scores = photograph
    only_background = dense_crf(scores * np.array([1, 0, 0])[:, None, None], image)
    assert (only_background[0] == 1).all() and (only_background[1:] == 0).all()
    np.testing.assert_allclose(dense_crf(np.zeros_like(scores), image), 1 / 3)


def test_one_pixel_and_one_row():
    pytest.importorskip("pydensecrf")
    for height, width in ((1, 1), (1, 7)):
        scores = np.stack([np.full((height, width), 0.3), np.full((height, width), 0.6)])
        refined = dense_crf(scores, np.zeros((height, width, 3), dtype=np.uint8))
        assert (refined.argmax(axis=0) == 1).all()


def test_seeds_lose_their_open_pixels(photograph):
    pytest.importorskip("pydensecrf")
    image, disc, _ = photograph
    seeds = np.full(disc.shape, 255, dtype=np.uint8)
    seeds[25:35, 35:45] = 7
    seeds[:6] = seeds[-6:] = 0
    refined = refine_labels(seeds, image, num_labels=21)
    assert refined.dtype == np.uint8 and set(np.unique(refined)) == {0, 7}
    assert ((refined == 7) == disc).mean() > 0.97


def test_seeds_of_one_label_or_none(photograph):
    image = photograph[0]
    open_pixels = np.full(image.shape[:2], 255, dtype=np.uint8)
    assert (refine_labels(open_pixels, image, num_labels=3) == 255).all()
    one = open_pixels.copy()
    one[3, 4] = 2
    assert (refine_labels(one, image, num_labels=3) == 2).all()
    # Between two labels a confidence of 0.5 says nothing.
    with pytest.raises(ValueError, match="confidence: expected .*, got 0.5"):
        refine_labels(one, image, num_labels=2)


def test_missing_library_says_how_to_get_it(photograph, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    image, _, scores = photograph
    with pytest.raises(ImportError, match="pip install pydensecrf2"):
        dense_crf(scores, image)
