"""Matting: known pixels, pymatting's alphas, reduced systems, classes together, ViTMatte, merging."""

import contextlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import VitDetConfig, VitMatteConfig, VitMatteForImageMatting, VitMatteImageProcessorPil

from wsss_hf.refinement import matting
from wsss_hf.refinement.matting import (
    VitMatte,
    closed_form_alphas,
    knn_alphas,
    merge_alphas,
)
from wsss_hf.refinement.trimap import BACKGROUND, FOREGROUND, UNKNOWN


def soft_disc(size, centre=(0.5, 0.5), radius=0.28):
    """A disc with a soft border on a shaded ground, and its trimap: image (size, size, 3), trimap (size, size)."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] / size
    distance = np.hypot(rows - centre[0], columns - centre[1])
    alpha = np.clip((radius - distance) / 0.06 + 0.5, 0, 1)[..., None]
    colours = alpha * [210, 90, 40] + (1 - alpha) * np.stack([60 + 40 * rows, 120 * columns, 150 - 30 * rows], axis=-1)
    image = (colours + rng.normal(0, 3, colours.shape)).clip(0, 255).astype(np.uint8)
    trimap = np.full((size, size), UNKNOWN, dtype=np.uint8)
    trimap[distance < radius - 0.1] = FOREGROUND
    trimap[distance > radius + 0.1] = BACKGROUND
    return image, trimap


@pytest.fixture(scope="module")
def vitmatte(tmp_path_factory):
    """Directory of a ViTMatte of a few thousand random weights."""
    torch.manual_seed(0)
    backbone = VitDetConfig(
        num_channels=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        out_features=["stage1"],
        window_block_indices=[],
        residual_block_indices=[],
        initializer_range=0.5,  # so that inputs make a difference without training
    )
    config = VitMatteConfig(
        backbone_config=backbone,
        hidden_size=8,
        convstream_hidden_sizes=[4, 4, 4],
        fusion_hidden_sizes=[8, 4, 4, 4],
        initializer_range=0.5,
    )
    directory = tmp_path_factory.mktemp("vitmatte")
    VitMatteForImageMatting(config).save_pretrained(directory)
    VitMatteImageProcessorPil().save_pretrained(directory)
    return str(directory)


def test_a_pickled_vitmatte_is_not_opened(vitmatte, tmp_path):
    model = VitMatteForImageMatting.from_pretrained(vitmatte)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no weights in safetensors; pickled ones"):
        VitMatte(str(tmp_path))


@pytest.fixture(params=["closed_form", "knn", "vitmatte"])
def method(request):
    if request.param == "vitmatte":
        return VitMatte(request.getfixturevalue("vitmatte"))
    return {"closed_form": closed_form_alphas, "knn": knn_alphas}[request.param]


def pymatting_alpha(estimate, image, trimap):
    with contextlib.redirect_stdout(io.StringIO()):
        return estimate(image / 255, trimap / 255)


def test_known_pixels_keep_their_values(method):
    image, trimap = soft_disc(48)
    (alpha,) = method(image, trimap[None])
    assert alpha.dtype == np.float32 and alpha.min() >= 0 and alpha.max() <= 1
    assert (alpha[trimap == FOREGROUND] == 1).all() and (alpha[trimap == BACKGROUND] == 0).all()
    assert 0.05 < alpha[trimap == UNKNOWN].mean() < 0.95


def test_a_trimap_without_unknown_pixels_is_its_alpha(method):
    image, trimap = soft_disc(32)
    trimap[trimap == UNKNOWN] = BACKGROUND
    known = np.stack([trimap, np.full_like(trimap, FOREGROUND), np.full_like(trimap, BACKGROUND)])
    np.testing.assert_array_equal(np.stack(method(image, known)), known / 255)


def test_a_missing_side_has_no_alpha(method):
    image, trimap = soft_disc(32)
    no_foreground = np.where(trimap == FOREGROUND, UNKNOWN, trimap).astype(np.uint8)
    no_background = np.where(trimap == BACKGROUND, UNKNOWN, trimap).astype(np.uint8)
    alphas = method(image, np.stack([no_foreground, trimap, no_background, np.full_like(trimap, UNKNOWN)]))
    assert [alpha is None for alpha in alphas] == [True, False, True, True]


def test_tiny_and_uniform_images_have_alphas(method):
    row = np.array([[FOREGROUND, UNKNOWN, BACKGROUND]], dtype=np.uint8)
    for trimap in (row, row.T, np.repeat(row, 3, axis=0)):
        (alpha,) = method(np.full((*trimap.shape, 3), 90, dtype=np.uint8), trimap[None])
        assert alpha.shape == trimap.shape and np.isfinite(alpha).all()
    one_pixel = np.full((1, 1, 1), UNKNOWN, dtype=np.uint8)
    assert method(np.zeros((1, 1, 3), dtype=np.uint8), one_pixel) == [None]


def closed_form_alpha(image, trimap):
    (alpha,) = closed_form_alphas(image, trimap[None])
    return alpha


def test_closed_form_equals_pymatting_where_nothing_is_reduced():
    from pymatting import estimate_alpha_cf

    image, trimap = soft_disc(64)
    assert (trimap == UNKNOWN).sum() < matting._SOLVED_EXACTLY
    expected = pymatting_alpha(estimate_alpha_cf, image, trimap)
    assert np.abs(closed_form_alpha(image, trimap) - expected).max() < 2e-3


@pytest.mark.parametrize("size", [121, 128])
def test_reduced_closed_form_stays_close_to_pymatting(size, monkeypatch):
    from pymatting import estimate_alpha_cf

    image, trimap = soft_disc(size)
    monkeypatch.setattr(matting, "_SOLVED_EXACTLY", 1000)
    difference = np.abs(closed_form_alpha(image, trimap) - pymatting_alpha(estimate_alpha_cf, image, trimap))
    assert difference[trimap == UNKNOWN].mean() < 0.03
    assert difference.max() > 0  # it was reduced


def test_huge_systems_are_reduced_further(monkeypatch):
    image, trimap = soft_disc(121)
    exact = closed_form_alpha(image, trimap)
    monkeypatch.setattr(matting, "_SOLVED_EXACTLY", 100)
    monkeypatch.setattr(matting, "_LARGEST_SYSTEM", 500)
    solved = []
    solve = matting._conjugate_gradients
    monkeypatch.setattr(
        matting, "_conjugate_gradients", lambda system, *rest: solved.append(system.shape[0]) or solve(system, *rest)
    )
    assert np.abs(closed_form_alpha(image, trimap) - exact)[trimap == UNKNOWN].mean() < 0.06
    assert 0 < solved[0] <= 600


def test_knn_equals_pymatting_where_nothing_is_reduced():
    from pymatting import estimate_alpha_knn

    image, trimap = soft_disc(48)
    (alpha,) = knn_alphas(image, trimap[None])
    expected = pymatting_alpha(estimate_alpha_knn, image, trimap)
    # pymatting holds known pixels by a weight only.
    unknown = trimap == UNKNOWN
    assert np.abs(alpha - expected)[unknown].mean() < 2e-3


def test_classes_are_solved_together_as_alone(method):
    image, left = soft_disc(64, centre=(0.4, 0.3), radius=0.2)
    _, right = soft_disc(64, centre=(0.6, 0.7), radius=0.2)
    together = method(image, np.stack([left, right]))
    for trimap, alpha in zip((left, right), together, strict=True):
        np.testing.assert_allclose(alpha, method(image, trimap[None])[0], atol=2e-3)
    np.testing.assert_array_equal(method(image, np.stack([right, left]))[1], together[0])


@pytest.mark.parametrize("solver", [closed_form_alphas, knn_alphas])
@pytest.mark.parametrize("exact", [True, False])
def test_a_prior_draws_unknown_pixels_to_what_is_expected(solver, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(matting, "_SOLVED_EXACTLY", 100)
    image, trimap = soft_disc(48)
    columns = np.arange(48)[None].repeat(48, axis=0)
    expected, unknown = np.where(columns < 24, 0.8, 0.3)[None], trimap == UNKNOWN

    def distance(prior):
        (alpha,) = solver(image, trimap[None], expected, prior)
        assert (alpha[trimap == FOREGROUND] == 1).all() and (alpha[trimap == BACKGROUND] == 0).all()
        return np.abs(alpha - expected[0])[unknown].mean()

    np.testing.assert_array_equal(solver(image, trimap[None], expected), solver(image, trimap[None]))
    assert distance(0) > distance(0.1) > distance(1) > distance(1e3)
    if exact:  # the upsampled alphas follow the colours, too
        assert distance(1e3) < 0.02


def test_a_solver_that_does_not_converge_has_no_alpha(monkeypatch):
    image, trimap = soft_disc(48)
    monkeypatch.setattr(matting, "_MAX_ITERATIONS", 1)
    assert closed_form_alphas(image, trimap[None]) == [None]
    assert knn_alphas(image, trimap[None]) == [None]


def test_vitmatte_sees_image_and_trimap(vitmatte):
    image, trimap = soft_disc(40)
    model = VitMatte(vitmatte)
    (alpha,) = model(image, trimap[None])
    unknown = trimap == UNKNOWN
    assert np.ptp(alpha[unknown]) > 0
    shrunk = np.where(np.indices(trimap.shape)[1] > 20, trimap, UNKNOWN).astype(np.uint8)
    assert not np.array_equal(model(image, shrunk[None])[0][unknown], alpha[unknown])
    assert not np.array_equal(model(255 - image, trimap[None])[0][unknown], alpha[unknown])


def test_merging_takes_the_largest_alpha():
    alphas = torch.tensor([[[0.9, 0.2, 0.0, 0.5]], [[0.1, 0.8, 0.3, 0.0]]])
    assert merge_alphas(alphas, uncertain=(0.5, 0.5), tie=0).tolist() == [[1, 2, 0, 1]]
    assert merge_alphas(alphas.flip(0), uncertain=(0.5, 0.5), tie=0).tolist() == [[2, 1, 0, 2]]


def test_merging_leaves_the_band_and_near_ties_open():
    alphas = torch.tensor([[[0.55, 0.45, 0.39, 0.9, 0.9, 0.2]], [[0.0, 0.0, 0.0, 0.85, 0.7, 0.19]]])
    assert merge_alphas(alphas, uncertain=(0.4, 0.6), tie=0.1).tolist() == [[255, 255, 0, 255, 1, 0]]


def test_merging_one_class_and_none():
    labels = merge_alphas(torch.tensor([[[0.8, 0.1]]]))
    assert labels.dtype == torch.uint8 and labels.tolist() == [[1, 0]]
    assert merge_alphas(torch.zeros(0, 2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("options", [{"uncertain": (0.6, 0.4)}, {"uncertain": (0, 1.2)}, {"tie": -0.1}])
def test_merging_refuses_unfit_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        merge_alphas(torch.zeros(1, 2, 2), **options)


@pytest.mark.slow
def test_matting_leaves_the_threads_of_torch_alone():
    script = (
        "import numpy as np, torch\n"
        "from wsss_hf.refinement.matting import closed_form_alphas\n"
        "trimap = np.repeat(np.array([[0, 128, 255]], dtype=np.uint8), 3, axis=0)\n"
        "closed_form_alphas(np.zeros((3, 3, 3), dtype=np.uint8), trimap[None])\n"
        "print(torch.get_num_threads())"
    )
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True, env=one)
    assert done.stdout.split()[-1] == "1"
