"""The threshold that is found without masks: its statistics, its choice, and the images it looks at."""

import numpy as np
import pytest
import torch

from wsss_hf.labeling import auto_threshold as module
from wsss_hf.labeling.auto_threshold import (
    THRESHOLDS,
    auto_threshold,
    choose_threshold,
    otsu_threshold,
    view_agreement,
    view_histogram,
    with_threshold,
)
from wsss_hf.labeling.pseudo_masks import load_labeler
from wsss_hf.training.recipes import load_recipe


@pytest.fixture(scope="module")
def labeler(cam_folder):
    return load_labeler(str(cam_folder), "cpu")


@pytest.fixture
def settings():
    return load_recipe()["masks"] | {"batch_size": 4, "background_threshold": "auto"}


def random_views(seed=0, shape=(2, 30, 40)):
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(shape, generator=generator)
    return first, (first + 0.3 * torch.randn(shape, generator=generator)).clamp(0, 1)


def discs(edge, halo, inside, size=80):
    """Two views (1, H, W) of a disc: sure and equal above `edge`, with a halo up to it that moves between the views.

    Args:
        halo: highest value of the halo, below `edge`.
        inside: values within the disc fall from 1 to this at its border.
    """
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    views = []
    for shift in (-8, 8):
        distance = ((rows - 40.0) ** 2 + (columns - 40.0) ** 2).sqrt() / 18
        aside = ((rows - 40.0) ** 2 + (columns - 40.0 - shift) ** 2).sqrt() / 18
        peak = 1 - (1 - inside) * ((rows - 40.0 - shift) ** 2 + (columns - 40.0) ** 2).sqrt() / 26
        around = (halo * (2.2 - aside) / 1.2).clamp(0, halo)
        views.append(torch.where(distance < 1, peak.clamp(inside, 1), around)[None])
    assert inside > edge > halo
    return views


def test_agreement_is_cohens_kappa_of_the_two_masks():
    views = [random_views(seed) for seed in range(3)]
    found = view_agreement(sum(view_histogram(*pair) for pair in views)).numpy()
    first, second = (torch.stack(side).amax(dim=1).numpy().ravel() for side in zip(*views, strict=True))
    for threshold, kappa in zip(THRESHOLDS, found, strict=True):
        a, b = first > np.float32(threshold), second > np.float32(threshold)
        chance = a.mean() * b.mean() + (~a).mean() * (~b).mean()
        np.testing.assert_allclose(kappa, ((a == b).mean() - chance) / (1 - chance), atol=1e-5)


def test_images_count_alike_whatever_their_size():
    large, small = (view_histogram(*random_views(shape=shape)) for shape in ((1, 90, 80), (1, 9, 8)))
    assert large.sum() == pytest.approx(1, abs=1e-5) and small.sum() == pytest.approx(1, abs=1e-5)


def test_empty_and_full_masks_agree_about_nothing():
    for value in (0.0, 1.0):
        agreement = view_agreement(view_histogram(*[torch.full((1, 4, 4), value)] * 2))
        assert not agreement.any()
        assert choose_threshold(view_histogram(*[torch.full((1, 4, 4), value)] * 2)) in THRESHOLDS


def test_otsu_splits_where_the_groups_are_most_distant():
    histogram = view_histogram(*random_views())
    values = (histogram.sum(0) + histogram.sum(1)).numpy()
    centres = (np.arange(20) + 0.5) / 20
    between = []
    for split in range(1, 20):
        low, high = values[:split].sum(), values[split:].sum()
        means = [np.average(centres[part], weights=values[part]) for part in (slice(split), slice(split, None))]
        between.append(low * high * (means[1] - means[0]) ** 2)
    assert otsu_threshold(histogram) == THRESHOLDS[int(np.argmax(between))]


@pytest.mark.parametrize(("edge", "halo", "inside"), [(0.35, 0.3, 0.4), (0.5, 0.44, 0.56), (0.65, 0.6, 0.7)])
def test_the_edge_that_both_views_see_is_found(edge, halo, inside):
    assert choose_threshold(view_histogram(*discs(edge, halo, inside))) == pytest.approx(edge, abs=0.051)


def test_views_that_agree_about_zeros_do_not_mislead():
    """Maps that are exactly zero in the same place far from the object, as after a relu."""
    first, second = discs(0.6, 0.55, 0.65)
    for view in (first, second):
        view[:, :, :70] = view[:, :, :70].clamp(min=0.06)
        view[:, :, 70:] = 0
    histogram = view_histogram(first, second)
    assert view_agreement(histogram).argmax() == 0  # the zeros are what they agree about most
    assert choose_threshold(histogram) == pytest.approx(0.6, abs=0.051)


def test_it_is_found_without_masks_and_the_same_every_time(labeler, toy_data, poisoned_data, unmasked_data, settings):
    found = {auto_threshold(*labeler, data["train"], settings) for data in (toy_data, poisoned_data, unmasked_data)}
    assert len(found) == 1 and found < set(THRESHOLDS)
    assert with_threshold(*labeler, toy_data["train"], settings)["background_threshold"] in found
    fixed = settings | {"background_threshold": 0.3}
    assert with_threshold(None, None, None, fixed) is fixed


def test_one_scale_gets_a_second_view(labeler, toy_data, settings, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "localize", lambda *a, **k: seen.append(a[4]) or random_localize(a[2], a[3]))
    auto_threshold(*labeler, toy_data["train"], settings | {"scales": [1.0]}, num_images=1)
    auto_threshold(*labeler, toy_data["train"], settings | {"scales": [1.0, 0.5, 1.5]}, num_images=1)
    assert seen == [(1.0,), (1.25,), (0.5,), (1.5,)]


def random_localize(tags, size):
    return torch.rand(int(tags.sum()), *size), None


def test_processes_share_the_images_and_agree(labeler, toy_data, settings, monkeypatch):
    """Each process adds its part; together they have looked at what one process looks at."""
    sums = []
    monkeypatch.setattr(module, "all_reduce_sum", lambda histogram: sums.append(histogram.clone()) or histogram)
    auto_threshold(*labeler, toy_data["train"], settings, num_images=7)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        auto_threshold(*labeler, toy_data["train"], settings, num_images=7)
    alone, first, second = sums
    assert (first.sum().round(), second.sum().round(), alone.sum().round()) == (4, 3, 7)
    torch.testing.assert_close(first + second, alone, atol=0.05, rtol=0)


def test_images_without_tags_are_passed_over(labeler, toy_data, settings):
    rows = toy_data["train"].map(lambda row, i: {"tags": row["tags"] if i % 2 else []}, with_indices=True)
    assert auto_threshold(*labeler, rows, settings) in THRESHOLDS
    with pytest.raises(ValueError, match="auto needs images with tags; no row has one"):
        auto_threshold(*labeler, rows.select(range(0, 12, 2)), settings)
