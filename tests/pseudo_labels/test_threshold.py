"""The threshold that is found without masks: its histogram, its choice, and the images it looks at."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from wsss_hf import AffinityConfig, AffinityNetwork
from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import DataError, decode_saliency, encode_png, tagged_features, undecoded
from wsss_hf.inference.load import load_labeler
from wsss_hf.models.background_threshold import (
    THRESHOLDS,
    choose_threshold,
    explained_features,
    object_areas,
    value_histogram,
)
from wsss_hf.pseudo_labels import threshold as module
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.pseudo_labels.rules import rows_to_label
from wsss_hf.pseudo_labels.threshold import (
    at_thresholds,
    auto_threshold,
    otsu_threshold,
    saliency_threshold,
    thresholds_of,
    with_threshold,
)
from wsss_hf.refinement.steps import build_refinement
from wsss_hf.settings import MasksSettings


@pytest.fixture(scope="module")
def labeler(cam_folder):
    return load_labeler(str(cam_folder), "cpu")


@pytest.fixture
def settings():
    return MasksSettings(batch_size=4, background_threshold="auto")


def blurred_disc(radius, low, high, slope, size=80):
    """(1, H, W) map: `high` inside a disc, falling to `low` outside over `slope` pixels."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = ((rows - 40.0) ** 2 + (columns - 40.0) ** 2).sqrt()
    return (low + (high - low) * ((radius - distance) / slope + 0.5).clamp(0, 1))[None]


def by_values(maps):
    """The threshold where features say nothing."""
    return choose_threshold(value_histogram(maps), torch.zeros(1, len(THRESHOLDS)))


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
    found = by_values(blurred_disc(18, low, high, 6))
    assert found == pytest.approx((low + high) / 2, abs=0.13)
    assert low < found < high


def test_wide_slopes_leave_it_to_the_area():
    """A halo as wide as the image belongs to no object."""
    maps = blurred_disc(25, 0.0, 1.0, 90)
    histogram = value_histogram(maps)
    area = object_areas(histogram)[THRESHOLDS.index(by_values(maps))]
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
    assert by_values(torch.full((1, 4, 4), value)) in THRESHOLDS


def test_it_is_found_without_masks_and_the_same_every_time(labeler, toy_data, poisoned_data, unmasked_data, settings):
    found = {auto_threshold(*labeler, data["train"], settings) for data in (toy_data, poisoned_data, unmasked_data)}
    assert len(found) == 1 and found < set(THRESHOLDS)
    assert with_threshold(*labeler, toy_data["train"], settings).background_threshold in found
    fixed = replace(settings, background_threshold=0.3)
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
    for alone, first, second in (sums[::3], sums[1::3], sums[2::3]):  # images, values, and features
        assert first.any() and second.any()
        torch.testing.assert_close(first + second, alone, atol=0.02, rtol=0)


def test_images_without_tags_are_passed_over(labeler, toy_data, settings):
    rows = toy_data["train"].map(lambda row, i: {"tags": row["tags"] if i % 2 else []}, with_indices=True)
    assert auto_threshold(*labeler, rows, settings) in THRESHOLDS
    with pytest.raises(ValueError, match="auto: expected images with tags, got none"):
        auto_threshold(*labeler, rows.select(range(0, 12, 2)), settings)


@pytest.mark.parametrize("steps", [["pamr"], ["crf"], ["pamr", "crf"]])
def test_refined_masks_cover_what_the_plain_ones_cover(labeler, toy_data, settings, steps):
    if "crf" in steps:
        pytest.importorskip("pydensecrf")
    rows = toy_data["train"].select(range(2))

    def area(threshold, refine):
        made = label_images(*labeler, rows, replace(settings, background_threshold=threshold, refine=refine))
        return np.mean([(labelled.pseudo_mask > 0).mean() for labelled in made])

    plain, refined = (auto_threshold(*labeler, rows, replace(settings, refine=refine)) for refine in ([], steps))
    wanted = area(plain, [])
    areas = {threshold: area(threshold, steps) for threshold in THRESHOLDS}
    distance = {threshold: abs(areas[threshold] - wanted) for threshold in THRESHOLDS}
    assert distance[refined] == pytest.approx(min(distance.values()), abs=0.01)
    assert auto_threshold(*labeler, rows, replace(settings, refine=[*steps, "matting", "pamr"])) == refined


# The saliency threshold

SHARED = Path(__file__).parents[3] / "shared"


def salient_rows(maps):
    columns = {"image_id": [f"x{i}" for i in range(len(maps))], "image": maps, "tags": [[0]] * len(maps)}
    return Dataset.from_dict(columns | {"saliency": maps}, features=tagged_features(["cat"], "saliency"))


def two_levels(low, high, size=20, area=0.3):
    values = np.full((size, size), low, dtype=np.uint8)
    values[: round(area * size)] = high
    return Image.fromarray(values)


def test_otsu_maximises_the_variance_between_both_sides():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(60, 12, 3000), rng.normal(170, 25, 1000)]).round().clip(0, 255)
    histogram = torch.from_numpy(np.bincount(values.astype(int), minlength=256)).float()

    def between(threshold):
        below, above = values[values <= 255 * threshold], values[values > 255 * threshold]
        return len(below) * len(above) * (below.mean() - above.mean()) ** 2

    found = otsu_threshold(histogram)
    assert between(found) >= 0.9995 * max(between((level + 0.5) / 255) for level in range(70, 200))
    assert otsu_threshold(histogram * 7) == found


def test_the_saliency_threshold_lies_between_what_maps_distinguish():
    assert saliency_threshold(salient_rows([two_levels(20, 200), two_levels(40, 180)])) == pytest.approx(
        (40 + 180) / 2 / 255, abs=0.01
    )
    assert saliency_threshold(salient_rows([two_levels(0, 255)])) == 0.5  # binary ones: far from both
    assert 0 < saliency_threshold(salient_rows([two_levels(7, 7)])) < 1


def test_every_saliency_map_counts_the_same_whatever_its_size():
    small, large = two_levels(20, 120, size=20), two_levels(150, 250, size=200)
    alone = saliency_threshold(salient_rows([large]))
    assert saliency_threshold(salient_rows([small, large])) < alone
    same = saliency_threshold(salient_rows([small, two_levels(150, 250, size=20)]))
    assert saliency_threshold(salient_rows([small, large])) == same


def test_maps_that_are_missing_are_named_when_the_threshold_is_searched():
    with pytest.raises(DataError, match="saliency_threshold: auto, got none for 1 of 2 images: x1"):
        saliency_threshold(salient_rows([two_levels(0, 9), None]))


def test_processes_share_the_maps_and_agree(monkeypatch):
    sums = []
    monkeypatch.setattr(module, "all_reduce_sum", lambda total: sums.append(total.clone()) or total)
    rows = salient_rows([two_levels(20 * i, 200, area=0.1 * i) for i in range(1, 6)])
    saliency_threshold(rows)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        saliency_threshold(rows)
    alone, first, second = sums
    assert first.any() and second.any()
    torch.testing.assert_close(first + second, alone)


def test_found_thresholds_serve_other_rows(labeler, toy_data, settings):
    rows = toy_data["train"].add_column(
        "saliency", [encode_png(two_levels(20, 200, 48))] * 12, feature=toy_data["train"].features["mask"]
    )
    drs = replace(settings, seeds="drs", seed_options={"conflict_threshold": 0.8})
    found = with_threshold(*labeler, rows, drs)
    thresholds = thresholds_of(found)
    assert found.seed_options == {"conflict_threshold": 0.8, "saliency_threshold": saliency_threshold(rows)}
    assert thresholds == {"saliency_threshold": saliency_threshold(rows)}  # no other one plays a part
    assert at_thresholds(drs, thresholds | {"images": 12}) == found
    given = replace(drs, seed_options={"saliency_threshold": 0.2})
    assert thresholds_of(with_threshold(*labeler, rows, given))["saliency_threshold"] == 0.2
    assert at_thresholds(given, thresholds).seed_options == given.seed_options
    assert set(thresholds_of(with_threshold(*labeler, rows, settings))) == {"background_threshold"}
    for data, both in ((rows, True), (toy_data["train"], False)):  # without saliency there is nothing to search on
        found = with_threshold(*labeler, data, replace(settings, seeds="auto"))
        assert list(thresholds_of(found)) == ["saliency_threshold" if both else "background_threshold"]


@pytest.mark.skipif(not (SHARED / "voc_animals_saliency").is_dir(), reason="the photographs are not here")
def test_the_found_threshold_is_nearly_the_best_on_photographs():
    root, maps = SHARED / "voc_animals/VOCdevkit/VOC2012", SHARED / "voc_animals_saliency"
    names = ["cat", "cow", "dog", "horse", "person", "sheep"]
    rows = load_data("voc", root=root, classes=names, saliency=maps)["train"].filter(
        lambda mask: mask is not None, input_columns="mask"
    )
    counts = np.zeros((2, 256))  # by truth and level
    for row in undecoded(rows):
        levels = (255 * decode_saliency(row["saliency"], None, "")).round().astype(int)
        with Image.open(row["mask"]["path"] or io.BytesIO(row["mask"]["bytes"])) as mask:
            truth = np.asarray(mask)
        for side, inside in enumerate((truth == 0, (truth > 0) & (truth < 255))):
            counts[side] += np.bincount(levels[inside], minlength=256)

    def mean_iou(threshold):
        above = np.arange(256) > 255 * threshold
        inside, outside = counts[1, above].sum(), counts[0, ~above].sum()
        return (
            inside / (counts[1].sum() + counts[0, above].sum()) + outside / (counts[0].sum() + counts[1, ~above].sum())
        ) / 2

    best = max(mean_iou((level + 0.5) / 255) for level in range(255))
    assert len(rows) == 190 and best > 0.8
    assert mean_iou(saliency_threshold(rows)) > 0.97 * best


@pytest.fixture(scope="module")
def walk(labeler, tmp_path_factory):
    """Options of the step, with an affinity network that has learnt nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "affinity"
    backbone = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16]}
    AffinityNetwork(AffinityConfig(backbone_config=backbone | {"depths": [1, 1]}, radius=4)).save_pretrained(folder)
    labeler[1].save_pretrained(folder)
    return {"model": str(folder), "radius": 3, "steps": 8}


@pytest.mark.parametrize(
    ("seeds", "steps", "is_read"),
    [
        ("argmax", [], True),
        ("argmax", ["walk", "pamr"], True),
        ("argmax", ["pamr", "alpha walk"], False),  # whose background comes from the maps
        ("argmax", ["alpha walk", "grid_crf"], False),
        ("argmax", ["grid_crf", "alpha walk"], True),  # the CRF weighs the maps against it
        ("saliency", ["pamr", "walk"], False),
        ("saliency", ["grid_crf"], True),
        ("drs", [], False),
        ("auto", [], False),
        ("auto without saliency", [], True),
        ("mat_label", ["matting"], True),  # the trimaps are of levels around it
    ],
)
def test_the_threshold_is_searched_where_it_plays_a_part(
    labeler, toy_data, settings, walk, monkeypatch, seeds, steps, is_read
):
    named = {"walk": {"walk": walk}, "alpha walk": {"walk": walk | {"background_alpha": 4.0}}}
    seeds, _, without = seeds.partition(" without ")
    settings = replace(settings, seeds=seeds, refine=[named.get(step, step) for step in steps], confidence=True)
    rows = toy_data["train"].select(range(3))
    if not without:
        maps = [encode_png(two_levels(20, 200, 48))] * 3
        rows = rows.add_column("saliency", maps, feature=rows.features["mask"])
    monkeypatch.setattr(module, "auto_threshold", lambda *_: 0.45)
    found = with_threshold(*labeler, rows, settings)
    assert found.background_threshold == (0.45 if is_read else "auto")
    given = replace(found, background_threshold=0.45)
    assert ("background_threshold" in thresholds_of(with_threshold(*labeler, rows, given))) == is_read
    low, high, left_open = (
        [(item.pseudo_mask, item.confidence) for item in label_images(*labeler, rows, replace(found, **change))]
        for change in ({"background_threshold": 0.1}, {"background_threshold": 0.8}, {})
    )

    def are_equal(some, others):
        return all(
            np.array_equal(a, b)
            for one, other in zip(some, others, strict=True)
            for a, b in zip(one, other, strict=True)
        )

    assert are_equal(low, high) != is_read
    assert are_equal(left_open, high) != is_read
    if is_read:
        with pytest.raises(ValueError, match="masks.background_threshold: expected a number, got 'auto'"):
            list(label_images(*labeler, rows, replace(found, background_threshold="auto")))
        assert not len(rows_to_label(replace(found, background_threshold="auto"), rows))
    assert len(rows_to_label(found, rows)) == 3


def test_it_looks_at_the_maps_that_a_walk_makes(labeler, toy_data, settings, walk, monkeypatch):
    walk = {"walk": walk}
    rows = toy_data["train"].select(range(6))
    seen = []
    add = module.ThresholdSearch.add

    def watched(search, maps, features):
        seen.append(maps)
        add(search, maps, features)

    monkeypatch.setattr(module.ThresholdSearch, "add", watched)
    auto_threshold(*labeler, rows, replace(settings, refine=[walk, "pamr"]))
    auto_threshold(*labeler, rows, replace(settings, refine=["pamr"]))
    walked, plain = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    refine = build_refinement([walk])
    assert len(walked) == len(plain) == 6
    for i, (own, before) in enumerate(zip(walked, plain, strict=True)):
        image = np.asarray(rows[i]["image"])
        expected = refine(torch.cat([torch.full_like(before[:1], 0.5), before]), image)[1:]
        torch.testing.assert_close(own, expected)
        assert (own - before).abs().max() > 0.01
