"""The threshold that is found without masks: its statistics, its choice, and the images it looks at."""

import numpy as np
import pytest
import torch

from wsss_hf.labeling import auto_threshold as module
from wsss_hf.labeling.auto_threshold import (
    THRESHOLDS,
    auto_threshold,
    choose_threshold,
    view_statistics,
    with_threshold,
)
from wsss_hf.labeling.pseudo_masks import load_labeler
from wsss_hf.models.pamr import pamr
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


def test_statistics_are_cohens_kappa_and_the_area_of_the_two_masks():
    first, second = random_views()
    kappas, areas = view_statistics(first, second).numpy()
    first, second = (view.amax(dim=0).numpy() for view in (first, second))
    for threshold, kappa, area in zip(THRESHOLDS, kappas, areas, strict=True):
        a, b = first > np.float32(threshold), second > np.float32(threshold)
        chance = a.mean() * b.mean() + (~a).mean() * (~b).mean()
        np.testing.assert_allclose(kappa, ((a == b).mean() - chance) / (1 - chance), atol=1e-5)
        np.testing.assert_allclose(area, (a.mean() + b.mean()) / 2, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_empty_and_full_masks_agree_about_nothing(value):
    statistics = view_statistics(*[torch.full((1, 4, 4), value)] * 2)
    assert not statistics[0].any() and (statistics[1] == value).all() and choose_threshold(statistics) in THRESHOLDS


@pytest.mark.parametrize(("edge", "halo", "inside"), [(0.35, 0.3, 0.4), (0.5, 0.44, 0.56), (0.65, 0.6, 0.7)])
def test_the_edge_that_both_views_see_is_found(edge, halo, inside):
    assert choose_threshold(view_statistics(*discs(edge, halo, inside))) == pytest.approx(edge, abs=0.051)


def test_views_that_agree_everywhere_leave_it_to_the_usual_area():
    rows, columns = torch.meshgrid(torch.arange(80), torch.arange(80), indexing="ij")
    narrow, wide = ((-((rows - 40.0) ** 2 + (columns - 40.0) ** 2) / (2 * sigma**2)).exp()[None] for sigma in (8, 25))
    for view, widest, narrowest in ((narrow, 0.05, 0.2), (wide, 0.6, 0.8)):
        assert widest <= choose_threshold(view_statistics(view, view)) <= narrowest


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
    monkeypatch.setattr(module, "all_reduce_sum", lambda total: sums.append(total.clone()) or total)
    auto_threshold(*labeler, toy_data["train"], settings, num_images=7)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        auto_threshold(*labeler, toy_data["train"], settings, num_images=7)
    alone, first, second = sums
    assert first.any() and second.any()
    torch.testing.assert_close(first + second, alone, atol=0.02, rtol=0)


def test_images_without_tags_are_passed_over(labeler, toy_data, settings):
    rows = toy_data["train"].map(lambda row, i: {"tags": row["tags"] if i % 2 else []}, with_indices=True)
    assert auto_threshold(*labeler, rows, settings) in THRESHOLDS
    with pytest.raises(ValueError, match="auto needs images with tags; no row has one"):
        auto_threshold(*labeler, rows.select(range(0, 12, 2)), settings)


def test_refined_maps_get_the_threshold_that_keeps_most_of_the_area(labeler, toy_data, settings, monkeypatch):
    seen = []
    statistics = module.view_statistics
    monkeypatch.setattr(module, "view_statistics", lambda *views: seen.append(views) or statistics(*views))
    rows = toy_data["train"].select([0])
    found = auto_threshold(*labeler, rows, settings | {"refine": ["pamr", "matting"]})
    plain, refined = seen
    colours = torch.from_numpy(np.array(rows["image"][0])).permute(2, 0, 1)[None] / 255
    for before, after in zip(plain, refined, strict=True):
        torch.testing.assert_close(pamr(colours, before[None])[0], after, atol=1e-5, rtol=0)
    chosen = THRESHOLDS.index(choose_threshold(statistics(*plain)))
    shares = statistics(*refined)[1] / statistics(*plain)[1, chosen]
    assert found == THRESHOLDS[int((shares - 0.75).abs().argmin())]
