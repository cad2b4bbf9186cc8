"""The threshold that is found without masks: its histogram, its choice, and the images it looks at."""

import numpy as np
import pytest
import torch

from wsss_hf.models.background_threshold import (
    THRESHOLDS,
    choose_threshold,
    explained_features,
    object_areas,
    value_histogram,
)
from wsss_hf.pseudo_labels import threshold as module
from wsss_hf.pseudo_labels.label_images import label_images, load_labeler
from wsss_hf.pseudo_labels.threshold import auto_threshold, with_threshold
from wsss_hf.recipes import load_recipe


@pytest.fixture(scope="module")
def labeler(cam_folder):
    return load_labeler(str(cam_folder), "cpu")


@pytest.fixture
def settings():
    return load_recipe()["masks"] | {"batch_size": 4, "background_threshold": "auto"}


def blurred_disc(radius, low, high, slope, size=80):
    """(1, H, W) map: `high` inside a disc, falling to `low` outside over `slope` pixels."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = ((rows - 40.0) ** 2 + (columns - 40.0) ** 2).sqrt()
    return (low + (high - low) * ((radius - distance) / slope + 0.5).clamp(0, 1))[None]


def test_histogram_and_areas_are_those_of_the_highest_class():
    maps = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
    histogram = value_histogram(maps)
    highest = maps.amax(dim=0).numpy()
    expected, _ = np.histogram(highest, bins=100, range=(0, 1))
    np.testing.assert_allclose(histogram, expected / 1200, atol=1e-6)
    for threshold, area in zip(THRESHOLDS, object_areas(histogram), strict=True):
        np.testing.assert_allclose(area, (highest > threshold).mean(), atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.5), (0.2, 0.9), (0.05, 0.75)])
def test_it_is_the_middle_of_two_groups(low, high):
    found = choose_threshold(value_histogram(blurred_disc(18, low, high, 6)))
    assert found == pytest.approx((low + high) / 2, abs=0.13)
    assert low < found < high


def test_wide_slopes_leave_it_to_the_area():
    """A halo as wide as the image belongs to no object."""
    maps = blurred_disc(25, 0.0, 1.0, 90)
    histogram = value_histogram(maps)
    area = object_areas(histogram)[THRESHOLDS.index(choose_threshold(histogram))]
    values = np.sort(maps.flatten().numpy())
    middle = 0.5
    for _ in range(50):  # Otsu's threshold alone, as the fixed point of the mean of both means
        middle = (values[values > middle].mean() + values[values <= middle].mean()) / 2
    assert area < 0.8 * (values > middle).mean()


def test_explained_features_are_the_variance_between_the_groups():
    generator = torch.Generator().manual_seed(0)
    maps, features = torch.rand(2, 12, 16, generator=generator), torch.randn(5, 12, 16, generator=generator)
    features += 3 * maps.amax(dim=0)
    found = explained_features(maps, [features, 1e-3 * features])
    values, highest = features.flatten(1).numpy(), maps.amax(dim=0).flatten().numpy()
    total = ((values - values.mean(axis=1, keepdims=True)) ** 2).sum()
    for threshold, share in zip(THRESHOLDS, found[0], strict=True):
        sides = [values[:, highest > threshold], values[:, highest <= threshold]]
        within = sum(((side - side.mean(axis=1, keepdims=True)) ** 2).sum() for side in sides if side.size)
        np.testing.assert_allclose(share, 1 - within / total, atol=1e-5)
    torch.testing.assert_close(found[1], found[0])
    nothing = explained_features(torch.ones(1, 12, 16), [features])
    assert nothing.abs().max() < 1e-6


def test_features_decide_between_maps_of_the_same_values():
    maps = blurred_disc(25, 0.0, 1.0, 60)
    rows, columns = torch.meshgrid(torch.arange(80), torch.arange(80), indexing="ij")
    distance = ((rows - 40.0) ** 2 + (columns - 40.0) ** 2).sqrt()[None]

    def chosen(radius):
        coarse = torch.nn.functional.avg_pool2d((distance < radius).float(), 4)
        return choose_threshold(value_histogram(maps), explained_features(maps, [coarse]))

    assert chosen(14) > chosen(24) > chosen(34)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_maps_of_one_value_get_some_threshold(value):
    assert choose_threshold(value_histogram(torch.full((1, 4, 4), value))) in THRESHOLDS


def test_it_is_found_without_masks_and_the_same_every_time(labeler, toy_data, poisoned_data, unmasked_data, settings):
    found = {auto_threshold(*labeler, data["train"], settings) for data in (toy_data, poisoned_data, unmasked_data)}
    assert len(found) == 1 and found < set(THRESHOLDS)
    assert with_threshold(*labeler, toy_data["train"], settings)["background_threshold"] in found
    fixed = settings | {"background_threshold": 0.3}
    assert with_threshold(None, None, None, fixed) is fixed


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
    for alone, first, second in (sums[::2], sums[1::2]):  # values, and features
        assert first.any() and second.any()
        torch.testing.assert_close(first + second, alone, atol=0.02, rtol=0)


def test_images_without_tags_are_passed_over(labeler, toy_data, settings):
    rows = toy_data["train"].map(lambda row, i: {"tags": row["tags"] if i % 2 else []}, with_indices=True)
    assert auto_threshold(*labeler, rows, settings) in THRESHOLDS
    with pytest.raises(ValueError, match="auto needs images with tags; no row has one"):
        auto_threshold(*labeler, rows.select(range(0, 12, 2)), settings)


@pytest.mark.parametrize("steps", [["pamr"], ["crf"], ["pamr", "crf"]])
def test_refined_masks_cover_what_the_plain_ones_cover(labeler, toy_data, settings, steps):
    if "crf" in steps:
        pytest.importorskip("pydensecrf")
    rows = toy_data["train"].select(range(4))

    def area(threshold, refine):
        made = label_images(*labeler, rows, settings | {"background_threshold": threshold, "refine": refine})
        return np.mean([(labelled.pseudo_mask > 0).mean() for labelled in made])

    plain, refined = (auto_threshold(*labeler, rows, settings | {"refine": refine}) for refine in ([], steps))
    wanted = area(plain, [])
    areas = {threshold: area(threshold, steps) for threshold in THRESHOLDS}
    distance = {threshold: abs(areas[threshold] - wanted) for threshold in THRESHOLDS}
    assert distance[refined] == pytest.approx(min(distance.values()), abs=0.01)
    assert auto_threshold(*labeler, rows, settings | {"refine": [*steps, "matting", "pamr"]}) == refined
