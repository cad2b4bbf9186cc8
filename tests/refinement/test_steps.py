"""Refinement: chains from a recipe, the steps, workers, counted fallbacks."""

import sys
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_hf import AffinityConfig, AffinityNetwork, WsssImageProcessor
from wsss_hf.models.options import OptionError
from wsss_hf.models.pamr import pamr
from wsss_hf.refinement import matting
from wsss_hf.refinement import steps as steps_module
from wsss_hf.refinement.crf import dense_crf
from wsss_hf.refinement.grid_crf import grid_crf
from wsss_hf.refinement.matting import closed_form_alphas
from wsss_hf.refinement.steps import Matting, Note, RefinementChain, RefinementError, build_refinement, levels
from wsss_hf.training.build import build_processor

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
    return build_refinement(steps)(scores, image)


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


def test_grid_crf_takes_its_options(scores, image):
    options = {"iterations": 2, "sxy": 30.0, "srgb": 20.0, "compat": 2.0, "grid": 5}
    expected = grid_crf(scores, torch.from_numpy(image.copy()).permute(2, 0, 1), **options)
    assert torch.equal(refine([{"grid_crf": options}], scores, image), expected)


def test_crf_takes_its_options(scores, image):
    pytest.importorskip("pydensecrf")
    options = {"iterations": 3, "bilateral_srgb": 40, "gaussian_compat": 1.0}
    refined = refine([{"crf": options}], scores, image)
    np.testing.assert_array_equal(refined, dense_crf(scores.numpy(), image, **options))


def test_matting_gives_alphas_and_the_rest_to_the_background(scores, image):
    chain, note = build_refinement([{"matting": {"foreground_threshold": 0.6, "erosion": 1}}]), Note()
    refined = chain(scores, image, note)
    trimaps = chain.steps[0].trimaps(levels(scores.numpy()))
    assert {0, 128, 255} == set(np.unique(trimaps))
    wanted = closed_form_alphas(image, trimaps, levels(scores.numpy()), chain.steps[0].prior)
    np.testing.assert_array_equal(refined[1:], np.stack(wanted))
    torch.testing.assert_close(refined[0], 1 - refined[1:].amax(dim=0))
    assert not note.fallbacks and np.array_equal(note.pictures["trimap"], trimaps)
    np.testing.assert_allclose(note.pictures["alpha"] / 255, refined[1:], atol=0.51 / 255)


def test_without_a_prior_the_colours_decide_alone(scores, image):
    chain = build_refinement([{"matting": {"prior": 0.0}}])
    trimaps = chain.steps[0].trimaps(levels(scores.numpy()))
    np.testing.assert_array_equal(chain(scores, image)[1:], np.stack(closed_form_alphas(image, trimaps)))


@pytest.mark.parametrize("background", [0.1, 0.4, 0.8])
def test_trimaps_follow_the_background_score(background):
    maps = np.linspace(0, 1, 41, dtype=np.float32)[None, None]
    scores = np.concatenate([np.full_like(maps, background), maps])
    np.testing.assert_allclose(np.interp([0, background, 1], maps[0, 0], levels(scores)[0, 0]), [0, 0.5, 1], atol=1e-6)
    note, image = Note(), np.zeros((1, 41, 3), dtype=np.uint8)
    build_refinement([{"matting": {"erosion": 0}}])(torch.from_numpy(scores), image, note)
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


@pytest.fixture
def walk(tmp_path):
    """The step, with an affinity network that has learnt nothing."""
    torch.manual_seed(0)
    backbone = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16]}
    AffinityNetwork(AffinityConfig(backbone_config=backbone | {"depths": [1, 1]}, radius=4)).save_pretrained(tmp_path)
    build_processor(max(SIZE), [0.5] * 3, [0.5] * 3).save_pretrained(tmp_path)
    return {"walk": {"model": str(tmp_path), "radius": 3, "steps": 8}}


@pytest.mark.parametrize("height", [1, 3])
def test_the_network_of_a_walk_sees_a_thin_picture_as_it_is(height, walk, monkeypatch):
    seen = []
    monkeypatch.setattr(AffinityNetwork, "walk", lambda self, pixels, scores, *_: seen.append(pixels) or scores)
    image = np.broadcast_to(np.array([255, 51, 0], np.uint8), (height, 9, 3))
    refine([walk], torch.rand(2, height, 9), image)
    (pixels,) = seen
    assert pixels.shape[2] < pixels.shape[3]
    expected = torch.tensor([1.0, -0.6, -1.0])[:, None, None].expand_as(pixels[0])  # (value / 255 - 0.5) / 0.5
    torch.testing.assert_close(pixels[0], expected)


@torch.no_grad()
def test_walked_maps_are_divided_by_their_maximum_unless_the_background_walks_along(scores, image, walk):
    folder = walk["walk"]["model"]
    network, processor = AffinityNetwork.from_pretrained(folder).eval(), WsssImageProcessor.from_pretrained(folder)
    pixels = processor(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"]
    walked = network.walk(pixels, scores[None, 1:], radius=3, power=10, steps=8)[0]
    found = refine([walk], scores, image)
    assert torch.equal(found[0], scores[0])
    torch.testing.assert_close(found[1:], walked / walked.amax(dim=(1, 2), keepdim=True), atol=1e-4, rtol=0)
    background = (1 - scores[1:].amax(dim=0)) ** 6
    with_background = torch.cat([background[None], scores[1:]])
    expected = network.walk(pixels, with_background[None], radius=3, power=10, steps=8)[0]
    found = refine([{"walk": walk["walk"] | {"background_alpha": 6.0}}], scores, image)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_what_else_is_refined_on_a_cpu_changes_no_bit(scores, image, walk):
    for steps in ([walk], ["pamr"], [walk, "pamr"]):
        chain = build_refinement(steps)
        batch = [scores, scores[:2], scores.flip(-1)], [image, image, np.ascontiguousarray(image[:, ::-1])]
        found = chain.batch(*batch, [Note() for _ in batch[0]])
        for own, picture, result in zip(*batch, found, strict=True):
            assert torch.equal(result, chain(own, picture))


@pytest.mark.parametrize("steps", [["pamr"], ["pamr", "matting"]])
def test_a_batch_is_refined_like_each_image_alone(steps, scores, image, monkeypatch):
    monkeypatch.setattr(steps_module, "_count_together", lambda _scores: 3)  # as on a GPU
    wide = np.ascontiguousarray(image.transpose(1, 0, 2))
    batch = [(scores, image), (scores[:2], image[::-1]), (scores[:1], image), (scores[:, ::2], image[::2])]
    batch += [(scores, image[:, ::-1]), (scores[[0, 2]], image), (scores.transpose(1, 2), wide)]
    notes = [Note() for _ in batch]
    found = build_refinement(steps).batch(*zip(*batch, strict=True), notes)
    for (own, picture), result, note in zip(batch, found, notes, strict=True):
        alone = Note()
        torch.testing.assert_close(result, build_refinement(steps)(own, picture, alone), atol=1e-5, rtol=0)
        assert note.fallbacks == alone.fallbacks and note.pictures.keys() == alone.pictures.keys()


@pytest.mark.slow
def test_workers_find_what_one_process_finds(scores, image, monkeypatch):
    batch = [scores, scores[:1], scores.flip(-1)], [image, image, np.ascontiguousarray(image[:, ::-1])]
    alone, shared = ([Note() for _ in batch[0]] for _ in range(2))
    expected = build_refinement(["pamr", "matting"]).batch(*batch, alone)
    with build_refinement(["pamr", "matting"], workers=1) as chain:
        in_this_process = "refine_one", lambda *_: pytest.fail("the work stayed here")
        monkeypatch.setattr(Matting, *in_this_process)
        found = chain.batch(*batch, shared)
        (process,) = chain.workers._pool._processes.values()
        assert process.is_alive()
    assert not process.is_alive()
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other)
        assert shared[number].fallbacks == alone[number].fallbacks
        assert {k: v.tobytes() for k, v in shared[number].pictures.items()} == {
            k: v.tobytes() for k, v in alone[number].pictures.items()
        }


def test_a_killed_worker_is_reported(scores, image, monkeypatch):
    class Broken:
        def __init__(self, *_, **__):
            pass

        def map(self, *_):
            raise BrokenProcessPool

        def shutdown(self, **_):
            ended.append(self)

    ended = []
    monkeypatch.setattr(steps_module, "ProcessPoolExecutor", Broken)
    with pytest.raises(RefinementError, match="killed"):
        build_refinement(["matting"], workers=1)(scores, image)
    assert len(ended) == 1


def test_chains_run_in_order(scores, image):
    both = refine(["pamr", "matting"], scores, image)
    assert torch.equal(both, refine(["matting"], refine(["pamr"], scores, image), image))
    assert not torch.allclose(both, refine(["matting", "pamr"], scores, image), atol=1e-2)


def test_zero_maps_and_missing_background_are_counted(scores, image):
    chain, note = build_refinement(["matting", "matting"]), Note()
    scores[1] = 0
    scores[2] = scores[2] / 2 + 0.5
    refined = RefinementChain(chain.steps[:1])(scores, image, note)
    assert (refined[1] == 0).all()
    assert dict(note.fallbacks) == {"class not found": 1, "no certain background": 1}
    # Without matting the class keeps the pixels where it beat the background.
    assert torch.equal(refined.argmax(dim=0), scores.argmax(dim=0))
    chain(scores, image, note)
    assert note.fallbacks["class not found"] == 3  # once here, and twice by the chain


def test_a_solver_that_does_not_converge_keeps_the_scores(scores, image, monkeypatch):
    monkeypatch.setattr(matting, "_MAX_ITERATIONS", 1)
    chain = build_refinement([{"matting": {"erosion": 0}}])
    note = Note()
    refined = chain(scores, image, note)
    assert dict(note.fallbacks) == {"matting did not converge": 2}
    torch.testing.assert_close(refined.argmax(dim=0), scores.argmax(dim=0))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("pamr", r"refine: expected a list such as \[pamr, crf\], got 'pamr'"),
        (["bilateral"], r"refine\[0\]: 'bilateral': unknown; expected walk, pamr, crf, grid_crf or matting"),
        (["crf", "pamir"], r"refine\[1\]: 'pamir': unknown; did you mean pamr"),
        ([["pamr"]], r"refine\[0\]: \['pamr'\]: unknown"),
        ([{"pamr": {}, "crf": {}}], "expected one name with its options"),
        ([{"pamr": 3}], r"refine\[0\].pamr: expected a mapping of options, got 3"),
        ([{"pamr": {"steps": 3}}], r"refine\[0\].pamr.steps: unknown; expected iterations or dilations"),
        ([{"pamr": {"iterations": "many"}}], "pamr.iterations: expected a whole number >= 1, got 'many'"),
        ([{"pamr": {"iterations": 0}}], "pamr.iterations: expected a whole number >= 1, got 0"),
        ([{"crf": {"tolerance": 1.0}}], r"crf.tolerance: expected a number in \[0, 1\), got 1.0"),
        ([{"pamr": {"dilations": [0, 1]}}], "pamr.dilations: expected a list of whole numbers >= 1"),
        ([{"crf": {"bilateral_sxy": 0}}], "crf.bilateral_sxy: expected a number > 0, got 0"),
        ([{"matting": {"method": "magic"}}], "matting.method: expected closed_form, knn or vitmatte, got 'magic'"),
        ([{"matting": {"method": "vitmatte"}}], "matting.model: expected a directory or Hub id"),
        ([{"matting": {"model": "some/model"}}], "matting.model: expected none without method vitmatte"),
        ([{"matting": {"background_threshold": 0.9}}], "matting.background_threshold: expected a number below"),
        ([{"matting": {"prior": -1.0}}], "matting.prior: expected a number >= 0, got -1.0"),
    ],
)
def test_unfit_steps_are_named(steps, message):
    with pytest.raises(OptionError, match=message):
        build_refinement(steps, "evaluation.refine")


def test_a_missing_crf_is_reported_before_the_first_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    chain = build_refinement(["crf"])
    with pytest.raises(RefinementError, match="pip install pydensecrf2"), chain:
        pytest.fail("it went on")


def test_a_missing_matting_model_is_reported_before_the_first_image(tmp_path):
    chain = build_refinement([{"matting": {"method": "vitmatte", "model": str(tmp_path / "nothing")}}])
    with pytest.raises(RefinementError, match="matting.model: .*nothing"):
        chain.prepare()


def test_options_may_be_empty(scores, image):
    assert torch.equal(refine([{"pamr": None}], scores, image), refine(["pamr"], scores, image))


def test_scores_have_to_fit_the_image(scores, image):
    for bad in (image[1:], image.astype(np.float32), image[..., 0]):
        with pytest.raises(RefinementError, match="refinement: expected scores"):
            build_refinement(["pamr"])(scores, bad)
