"""Refiners: chains from a recipe, each refiner's part of the interface, counted fallbacks."""

import sys
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache

import numpy as np
import pytest
import torch

from wsss_hf.models.pamr import pamr
from wsss_hf.pseudo_labels import matting
from wsss_hf.pseudo_labels import refinement as refine_module
from wsss_hf.pseudo_labels.crf import dense_crf
from wsss_hf.pseudo_labels.matting import closed_form_alphas
from wsss_hf.pseudo_labels.refinement import (
    Note,
    RefinementError,
    build_refiner,
    levels,
)

SIZE = (40, 44)


@pytest.fixture
def image():
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    colours = np.where((columns < 22)[..., None], [200, 90, 60], [50, 80, 170]) + 10 * np.sin(rows / 5)[..., None]
    image = (colours + rng.normal(0, 8, colours.shape)).clip(0, 255).astype(np.uint8)
    image.flags.writeable = False  # as NumPy makes it of a PIL image
    return image


@pytest.fixture
def scores():
    """(3, H, W): background 0.4, one class on the left, another one on the upper right."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    left = np.exp(-((columns - 6) ** 2) / 120 - (rows - 20) ** 2 / 300)
    right = np.exp(-((columns - 36) ** 2) / 60 - (rows - 10) ** 2 / 60)
    return torch.from_numpy(np.stack([np.full(SIZE, 0.4), left, right])).float()


def refine(steps, scores, image):
    return build_refiner(steps)(scores, image)


def as_images(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255


def test_no_step_changes_nothing(scores, image):
    assert torch.equal(refine([], scores, image), scores)


def test_pamr_is_the_models_pamr(scores, image):
    expected = pamr(as_images(image), scores[None])[0]
    torch.testing.assert_close(refine(["pamr"], scores, image), expected, atol=1e-6, rtol=0)
    expected = pamr(as_images(image), scores[None], iterations=2, dilations=[1, 3])[0]
    refined = refine([{"pamr": {"iterations": 2, "dilations": [1, 3]}}], scores, image)
    torch.testing.assert_close(refined, expected, atol=1e-6, rtol=0)


def test_crf_takes_its_options(scores, image):
    pytest.importorskip("pydensecrf")
    options = {"iterations": 3, "bilateral_srgb": 40, "gaussian_compat": 1.0}
    refined = refine([{"crf": options}], scores, image)
    np.testing.assert_array_equal(refined, dense_crf(scores.numpy(), image, **options))


def test_matting_gives_alphas_and_the_rest_to_the_background(scores, image):
    refiner, note = build_refiner([{"matting": {"foreground_threshold": 0.6, "erosion": 1}}]), Note()
    refined = refiner(scores, image, note)
    trimaps = refiner.refiners[0].trimaps(levels(scores.numpy()))
    assert {0, 128, 255} == set(np.unique(trimaps))
    wanted = closed_form_alphas(image, trimaps, levels(scores.numpy()), refiner.refiners[0].prior)
    np.testing.assert_array_equal(refined[1:], np.stack(wanted))
    torch.testing.assert_close(refined[0], 1 - refined[1:].amax(dim=0))
    assert not note.fallbacks and np.array_equal(note.pictures["trimap"], trimaps)
    np.testing.assert_allclose(note.pictures["alpha"] / 255, refined[1:], atol=0.51 / 255)


def test_without_a_prior_the_colours_decide_alone(scores, image):
    refiner = build_refiner([{"matting": {"prior": 0.0}}])
    trimaps = refiner.refiners[0].trimaps(levels(scores.numpy()))
    np.testing.assert_array_equal(refiner(scores, image)[1:], np.stack(closed_form_alphas(image, trimaps)))


@pytest.mark.parametrize("background", [0.1, 0.4, 0.8])
def test_trimaps_follow_the_background_score(background):
    maps = np.linspace(0, 1, 41, dtype=np.float32)[None, None]
    scores = np.concatenate([np.full_like(maps, background), maps])
    np.testing.assert_allclose(np.interp([0, background, 1], maps[0, 0], levels(scores)[0, 0]), [0, 0.5, 1], atol=1e-6)
    note, image = Note(), np.zeros((1, 41, 3), dtype=np.uint8)
    build_refiner([{"matting": {"erosion": 0}}])(torch.from_numpy(scores), image, note)
    trimap = note.pictures["trimap"][0]
    unknown = (maps[0] > background / 2 + 1e-4) & (maps[0] < (1 + background) / 2 - 1e-4)
    assert (trimap[unknown] == 128).all() and unknown.any()
    assert (trimap[maps[0] < background / 2 - 1e-4] == 0).all()
    assert (trimap[maps[0] > (1 + background) / 2 + 1e-4] == 255).all()


def test_levels_where_all_or_nothing_is_background():
    maps = np.array([0, 0.3, 1], dtype=np.float32)
    for background, expected in ((0, [0, 0.65, 1]), (1, [0, 0.15, 0.5])):
        scores = np.stack([np.full_like(maps, background), maps])[:, None]
        np.testing.assert_allclose(levels(scores)[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["pamr", "crf", "matting"])
def test_classes_keep_their_order(name, scores, image):
    if name == "crf":
        pytest.importorskip("pydensecrf")
    original = scores.clone()
    refined = refine([name], scores, image)
    swapped = refine([name], scores[[0, 2, 1]], image)
    assert torch.equal(scores, original)
    assert refined.dtype == torch.float32 and refined.min() >= 0 and refined.max() <= 1
    torch.testing.assert_close(swapped, refined[[0, 2, 1]], atol=1e-4, rtol=0)
    assert refined[1, 20, 6] > refined[2, 20, 6] and refined[2, 10, 36] > refined[1, 10, 36]


@pytest.mark.parametrize("name", ["pamr", "crf", "matting"])
def test_one_pixel_one_colour_and_no_class(name):
    if name == "crf":
        pytest.importorskip("pydensecrf")
    for shape in ((1, 1), (1, 6), (9, 8)):
        image = np.full((*shape, 3), 120, dtype=np.uint8)
        scores = torch.full((2, *shape), 0.4)
        scores[1] = torch.linspace(1, 0, shape[1])
        refined = refine([name], scores, image)
        assert refined.shape == scores.shape and refined.min() >= 0 and refined.max() <= 1
        scores[1] = 0.9
        assert (refine([name], scores, image).argmax(dim=0) == 1).all()
    only_background = torch.full((1, 9, 8), 0.4)
    assert torch.equal(refine([name], only_background, image), only_background)


@pytest.mark.parametrize("steps", [["pamr"], ["pamr", "matting"]])
def test_a_batch_is_refined_like_each_image_alone(steps, scores, image, monkeypatch):
    monkeypatch.setattr(refine_module, "_PAMR_PIXELS", 3 * SIZE[0] * SIZE[1])
    wide = np.ascontiguousarray(image.transpose(1, 0, 2))
    batch = [(scores, image), (scores[:2], image[::-1]), (scores[:1], image), (scores[:, ::2], image[::2])]
    batch += [(scores, image[:, ::-1]), (scores[[0, 2]], image), (scores.transpose(1, 2), wide)]
    notes = [Note() for _ in batch]
    found = build_refiner(steps).batch(*zip(*batch, strict=True), notes)
    for (own, picture), result, note in zip(batch, found, notes, strict=True):
        alone = Note()
        torch.testing.assert_close(result, build_refiner(steps)(own, picture, alone), atol=1e-5, rtol=0)
        assert note.fallbacks == alone.fallbacks and note.pictures.keys() == alone.pictures.keys()


def test_workers_find_what_one_process_finds(scores, image, monkeypatch):
    batch = [scores, scores[:1], scores.flip(-1)], [image, image, np.ascontiguousarray(image[:, ::-1])]
    alone, shared = ([Note() for _ in batch[0]] for _ in range(2))
    expected = build_refiner(["pamr", "matting"]).batch(*batch, alone)
    refiner = build_refiner(["pamr", "matting"], workers=1)
    in_this_process = "_refine", lambda *_: pytest.fail("the work stayed here")
    monkeypatch.setattr(refine_module.Matting, *in_this_process)
    found = refiner.batch(*batch, shared)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other)
        assert shared[number].fallbacks == alone[number].fallbacks
        assert {k: v.tobytes() for k, v in shared[number].pictures.items()} == {
            k: v.tobytes() for k, v in alone[number].pictures.items()
        }


def test_a_killed_worker_is_told(scores, image, monkeypatch):
    class Broken:
        def map(self, *_):
            raise BrokenProcessPool

    pools = lru_cache(lambda workers: Broken())
    monkeypatch.setattr(refine_module, "_pool", pools)
    with pytest.raises(RefinementError, match="killed"):
        build_refiner(["matting"], workers=1)(scores, image)
    assert pools.cache_info().currsize == 0


def test_chains_run_in_order(scores, image):
    both = refine(["pamr", "matting"], scores, image)
    assert torch.equal(both, refine(["matting"], refine(["pamr"], scores, image), image))
    assert not torch.allclose(both, refine(["matting", "pamr"], scores, image), atol=1e-2)


def test_zero_maps_and_missing_background_are_counted(scores, image):
    refiner, note = build_refiner(["matting", "matting"]), Note()
    scores[1] = 0
    scores[2] = scores[2] / 2 + 0.5
    refined = refiner.refiners[0](scores, image, note)
    assert (refined[1] == 0).all()
    assert dict(note.fallbacks) == {"class not found": 1, "no certain background": 1}
    # Without matting the class keeps the pixels where it beat the background.
    assert torch.equal(refined.argmax(dim=0), scores.argmax(dim=0))
    refiner(scores, image, note)
    assert note.fallbacks["class not found"] == 3  # once here, and twice by the chain


def test_a_solver_that_does_not_converge_keeps_the_scores(scores, image, monkeypatch):
    monkeypatch.setattr(matting, "_MAX_ITERATIONS", 1)
    refiner = build_refiner([{"matting": {"erosion": 0}}])
    note = Note()
    refined = refiner(scores, image, note)
    assert dict(note.fallbacks) == {"matting did not converge": 2}
    torch.testing.assert_close(refined.argmax(dim=0), scores.argmax(dim=0))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("pamr", "a list such as"),
        (["bilateral"], "'bilateral': there are pamr, crf or matting"),
        ([["pamr"]], "there are pamr, crf or matting"),
        ([{"pamr": {}, "crf": {}}], "one name with its options"),
        ([{"pamr": 3}], "pamr: a mapping of options"),
        ([{"pamr": {"steps": 3}}], "pamr: no option 'steps'; there are iterations, dilations"),
        ([{"pamr": {"iterations": "many"}}], "iterations is 'many'; something like 10"),
        ([{"pamr": {"iterations": 0}}], "pamr: iterations=0"),
        ([{"crf": {"tolerance": 1.0}}], "crf: tolerance=1.0: a share"),
        ([{"pamr": {"dilations": [0, 1]}}], "dilations="),
        ([{"crf": {"bilateral_sxy": 0}}], "crf: bilateral_sxy=0"),
        ([{"matting": {"method": "magic"}}], "closed_form, knn or vitmatte"),
        ([{"matting": {"method": "vitmatte"}}], "needs a directory or Hub id"),
        ([{"matting": {"background_threshold": 0.9}}], "matting: background_threshold=0.9"),
        ([{"matting": {"prior": -1.0}}], "matting: prior=-1.0: 0 or more"),
    ],
)
def test_senseless_steps_are_named(steps, message):
    with pytest.raises(RefinementError, match=message):
        build_refiner(steps)


def test_a_missing_crf_is_reported_before_the_first_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(RefinementError, match=r"pip install wsss_hf\[crf\]"):
        build_refiner(["crf"])


def test_options_may_be_empty(scores, image):
    assert torch.equal(refine([{"pamr": None}], scores, image), refine(["pamr"], scores, image))


def test_scores_have_to_fit_the_image(scores, image):
    for bad in (image[1:], image.astype(np.float32), image[..., 0]):
        with pytest.raises(RefinementError, match="would be right"):
            build_refiner(["pamr"])(scores, bad)
