"""Alpha mattes of the classes of an image from their trimaps, and the label map they merge into (Mat-Label).

Foreground is 255, background 0, everything else unknown, as `trimap` makes them. All functions take every class of an
image at once, because the costly part depends on the image only.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, VitMatteForImageMatting

from ..models.maps import IGNORE_INDEX
from ..models.pretrained import NO_CODE, pinned
from ..models.weights import from_safetensors
from .trimap import BACKGROUND, FOREGROUND

_MARGIN = 4  # known pixels kept around the unknown ones: a window of the matting Laplacian reaches 2 pixels
_SOLVED_EXACTLY = 4096  # pixels to solve for up to which nothing is reduced
_LARGEST_SYSTEM = 40_000  # pixels to solve for; more are reduced more than once
_GUIDE_EPSILON = 1e-5  # regularises the local colour model of the upsampling
_MAX_ITERATIONS = 500


def closed_form_alphas(
    image: np.ndarray, trimaps: np.ndarray, expected: np.ndarray | None = None, prior: float = 0.0
) -> list[np.ndarray | None]:
    """Closed-form matting (Levin, Lischinski & Weiss, 2008) of every class of an image.

    What makes it fast: the matting Laplacian is shared by the classes; only the bounding box of the unknown pixels is
    looked at; unless few pixels are unknown, the systems are solved at half the resolution (or less, so that no system
    is huge) and their alphas upsampled as local linear functions of the full-resolution colours, which is the model
    behind the Laplacian itself.

    Args:
        image: (H, W, 3) uint8.
        trimaps: (K, H, W) uint8.
        expected: (K, H, W) in [0, 1], alphas that unknown pixels tend to; None is 0 everywhere.
        prior: weight of that, beside an entry of the Laplacian; 0 leaves unknown pixels to the colours.

    Returns:
        K alphas (H, W) float32 in [0, 1], 0 and 1 at known pixels; None where a side is missing or conjugate gradients
        did not converge.
    """
    return _alphas(trimaps, expected, lambda known, own: _closed_form(image, known, own, prior))


def knn_alphas(
    image: np.ndarray, trimaps: np.ndarray, expected: np.ndarray | None = None, prior: float = 0.0
) -> list[np.ndarray | None]:
    """KNN matting (Chen, Li & Tang, 2013), which also connects distant pixels of one colour.

    The same arguments and results as `closed_form_alphas`. It looks at the whole image, reduced unless that is small.
    """
    return _alphas(trimaps, expected, lambda known, own: _knn(image, known, own, prior))


class VitMatte:
    """Learned matting with a ViTMatte model; the arguments and results of `closed_form_alphas`, but no prior.

    Args:
        model: directory or Hub id (`owner/name@revision`) of a `VitMatteForImageMatting` with its image processor.
        device: where it runs.

    Raises:
        OSError, ValueError: there is no such model there.
    """

    def __init__(self, model: str, device: torch.device | str = "cpu"):
        name, revision = pinned(model, NO_CODE)
        self.model = from_safetensors(VitMatteForImageMatting.from_pretrained, name, **revision).to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(name, **revision)

    def __call__(
        self, image: np.ndarray, trimaps: np.ndarray, expected: np.ndarray | None = None
    ) -> list[np.ndarray | None]:
        return _alphas(trimaps, expected, lambda solvable, _: self._alphas(image, solvable))

    @torch.inference_mode()
    def _alphas(self, image: np.ndarray, trimaps: np.ndarray) -> list[np.ndarray | None]:
        # Pictures, not arrays: a (3, W, 3) array could be taken for channels first.
        inputs = self.processor(
            images=[Image.fromarray(image)] * len(trimaps),
            trimaps=[Image.fromarray(trimap) for trimap in trimaps],
            return_tensors="pt",
        )
        height, width = image.shape[:2]
        alphas = self.model(**inputs.to(self.model.device)).alphas[:, 0, :height, :width].float().cpu().numpy()
        return [alpha if np.isfinite(alpha).all() else None for alpha in alphas]


def merge_alphas(alphas: Tensor, uncertain: Sequence[float] = (0.4, 0.6), tie: float = 0.1) -> Tensor:
    """One label map out of the alphas of an image's classes (Mat-Label).

    The largest alpha decides; below 0.5 everywhere is background. Ignored (255) are the pixels whose largest alpha
    lies in the uncertain band and object pixels whose two largest alphas nearly tie.

    Args:
        alphas: (K, H, W) in [0, 1], one per tagged class.
        uncertain: (lowest, highest), the open interval of alphas that are ignored; equal numbers ignore none.
        tie: an object pixel whose two largest alphas differ by less is ignored; 0 ignores none.

    Returns:
        (H, W) uint8: 0 background, k + 1 for the k-th class, 255 ignore.

    Raises:
        ValueError: the band is not ordered inside [0, 1], or the tie is not in it.
    """
    if len(uncertain) != 2 or not 0 <= uncertain[0] <= uncertain[1] <= 1:
        raise ValueError(f"uncertain: expected 0 <= lowest <= highest <= 1, got {list(uncertain)}")
    lowest, highest = uncertain
    if not 0 <= tie <= 1:
        raise ValueError(f"tie: expected a number in [0, 1], got {tie}")
    if not len(alphas):
        return torch.zeros(alphas.shape[1:], dtype=torch.uint8, device=alphas.device)
    top = alphas.topk(min(2, len(alphas)), dim=0)
    largest, is_object = top.values[0], top.values[0] >= 0.5
    unsure = (largest > lowest) & (largest < highest)
    if len(alphas) > 1:
        unsure |= is_object & (largest - top.values[1] < tie)
    labels = torch.where(is_object, top.indices[0] + 1, 0)
    return labels.masked_fill(unsure, IGNORE_INDEX).to(torch.uint8)


def _alphas(trimaps: np.ndarray, expected: np.ndarray | None, solve: Callable) -> list[np.ndarray | None]:
    """`solve`s the trimaps that have something to solve, given what is expected; known pixels keep their values."""
    expected = np.zeros(trimaps.shape) if expected is None else expected
    foreground, background = trimaps == FOREGROUND, trimaps == BACKGROUND
    unknown = ~(foreground | background)
    results: list[np.ndarray | None] = [None] * len(trimaps)
    solvable = [k for k in range(len(trimaps)) if unknown[k].any() and foreground[k].any() and background[k].any()]
    solved = dict(zip(solvable, solve(trimaps[solvable], expected[solvable]), strict=True)) if solvable else {}
    for k in range(len(trimaps)):
        alpha = solved.get(k) if unknown[k].any() else foreground[k]
        if alpha is not None:
            results[k] = np.where(unknown[k], np.clip(alpha, 0, 1), foreground[k]).astype(np.float32)
    return results


@cache
def load_pymatting():
    """The library, imported when it is needed: loading numba's functions takes seconds.

    Its import would let torch have a thread per core from then on, whatever OMP_NUM_THREADS says.
    """
    threads = torch.get_num_threads()
    import pymatting

    torch.set_num_threads(threads)
    return pymatting


def _closed_form(
    image: np.ndarray, trimaps: np.ndarray, expected: np.ndarray, prior: float
) -> list[np.ndarray | None]:
    unknown = (trimaps != FOREGROUND) & (trimaps != BACKGROUND)
    box = _bounding_box(unknown.any(axis=0), _MARGIN)
    colours, factor = image[box] / 255.0, _reduction(unknown.sum(axis=(1, 2)).max())
    small = _at_least_3x3(_block_mean(colours, factor))
    known = np.stack([_at_least_3x3(_reduced_trimap(trimap[box], factor)) for trimap in trimaps])
    laplacian = load_pymatting().cf_laplacian(small, is_known=~np.isnan(known).any(axis=0))
    results = []
    for values, own in zip(known, expected, strict=True):
        solution = _solve_known(laplacian, values, _at_least_3x3(_block_mean(own[box], factor)), prior)
        if solution is not None:
            full = np.zeros(image.shape[:2], dtype=np.float32)
            full[box] = _upsampled(solution, small, colours, factor)
            solution = full
        results.append(solution)
    return results


def _solve_known(
    laplacian: sparse.csr_matrix, values: np.ndarray, expected: np.ndarray, prior: float
) -> np.ndarray | None:
    """The harmonic extension of `values` into their NaNs, drawn to what is `expected`; None without convergence."""
    solution = values.ravel().copy()
    unknown = np.isnan(solution)
    if unknown.any():
        rows = laplacian[unknown]
        system = rows[:, unknown]
        system.setdiag(system.diagonal() + prior)
        right = prior * expected.ravel()[unknown] - rows[:, ~unknown].dot(solution[~unknown])
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints when it has to try again
                preconditioner = load_pymatting().ichol(system, discard_threshold=1e-3)
        except ValueError:
            return None
        solved = _conjugate_gradients(system, right, preconditioner)
        if solved is None:
            return None
        solution[unknown] = solved
    return np.clip(solution, 0, 1).reshape(values.shape)


def _knn(image: np.ndarray, trimaps: np.ndarray, expected: np.ndarray, prior: float) -> list[np.ndarray | None]:
    colours, factor = image / 255.0, _reduction(image.shape[0] * image.shape[1])
    small = _block_mean(colours, factor)
    pixels = small.shape[0] * small.shape[1]
    laplacian = load_pymatting().knn_laplacian(small, n_neighbors=[min(20, pixels), min(10, pixels)])
    results = []
    for trimap, own in zip(trimaps, expected, strict=True):
        values = _reduced_trimap(trimap, factor).ravel()
        unknown = np.isnan(values)
        weights = np.where(unknown, prior, 100.0)  # pymatting's own of the known pixels
        wanted = np.where(unknown, _block_mean(own, factor).ravel(), values)
        system = laplacian + sparse.diags(weights)
        solution = _conjugate_gradients(system, weights * wanted, load_pymatting().jacobi(system))
        if solution is not None:
            solution = np.clip(solution, 0, 1).reshape(small.shape[:2])
            solution = _upsampled(solution, small, colours, factor)
        results.append(solution)
    return results


def _conjugate_gradients(system: sparse.csr_matrix, right: np.ndarray, preconditioner: Callable) -> np.ndarray | None:
    operator = LinearOperator(system.shape, matvec=preconditioner, dtype=np.float64)
    with np.errstate(all="ignore"):
        solution, failed = cg(system, right, M=operator, rtol=1e-5, maxiter=_MAX_ITERATIONS)
    return solution if not failed and np.isfinite(solution).all() else None


def _bounding_box(region: np.ndarray, margin: int) -> tuple[slice, slice]:
    rows, columns = np.nonzero(region.any(axis=1))[0], np.nonzero(region.any(axis=0))[0]
    return (
        slice(max(0, rows[0] - margin), rows[-1] + 1 + margin),
        slice(max(0, columns[0] - margin), columns[-1] + 1 + margin),
    )


def _reduction(count: int) -> int:
    """How many times smaller each side has to be for a system of `count` pixels: 1, 2, 4, …"""
    factor = 1 if count <= _SOLVED_EXACTLY else 2
    while count > _LARGEST_SYSTEM * factor**2:
        factor *= 2
    return factor


def _block_mean(values: np.ndarray, factor: int) -> np.ndarray:
    """Means of (H, W, …) over squares of `factor` pixels; the last squares repeat the border."""
    if factor == 1:
        return values
    padding = [(0, -side % factor) for side in values.shape[:2]] + [(0, 0)] * (values.ndim - 2)
    padded = np.pad(values, padding, mode="edge")
    blocks = [padded[down::factor, right::factor] for down in range(factor) for right in range(factor)]
    return np.sum(blocks, axis=0) / factor**2


def _reduced_trimap(trimap: np.ndarray, factor: int) -> np.ndarray:
    """(h, w) with 1 foreground, 0 background, NaN unknown: a square is what most of its known pixels are."""
    balance = _block_mean((trimap == FOREGROUND).astype(float) - (trimap == BACKGROUND), factor)
    return np.where(balance > 0, 1.0, np.where(balance < 0, 0.0, np.nan))


def _at_least_3x3(values: np.ndarray) -> np.ndarray:
    """Repeats the last rows and columns where there are fewer than a window of the Laplacian has."""
    padding = [(0, max(0, 3 - side)) for side in values.shape[:2]] + [(0, 0)] * (values.ndim - 2)
    return np.pad(values, padding, mode="edge")


def _upsampled(alpha: np.ndarray, small: np.ndarray, colours: np.ndarray, factor: int) -> np.ndarray:
    """`alpha` of the reduced image at full resolution: locally a linear function of the colours (fast guided filter).

    Args:
        alpha: (h, w) in [0, 1], for the colours `small` (h, w, 3).
        colours: (H, W, 3) in [0, 1], `factor` times as large.

    Returns:
        (H, W) float32 in [0, 1].
    """
    height, width = colours.shape[:2]
    if factor == 1:
        return alpha[:height, :width].astype(np.float32)
    guide, coarse = _as_planes(small), torch.from_numpy(alpha).float()[None]
    pairs = torch.stack([guide[i] * guide[j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))])
    means = _window_mean(torch.cat([guide, coarse, pairs, guide * coarse]))
    colour, mean, pairs, cross = means.split([3, 1, 6, 3])
    cross = cross - colour * mean
    r, g, b = colour
    rr, gg, bb = (pairs[i] - c * c + _GUIDE_EPSILON for i, c in ((0, r), (3, g), (5, b)))
    rg, rb, gb = pairs[1] - r * g, pairs[2] - r * b, pairs[4] - g * b
    # slope = inverse covariance of the colours · covariance with alpha, by the adjugate: a batched solve is slower.
    a00, a01, a02 = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
    a11, a12, a22 = rr * bb - rb * rb, rg * rb - rr * gb, rr * gg - rg * rg
    adjugate = torch.stack([a00, a01, a02, a01, a11, a12, a02, a12, a22]).unflatten(0, (3, 3))
    slope = torch.einsum("ijhw,jhw->ihw", adjugate, cross) / (rr * a00 + rg * a01 + rb * a02)
    line = _window_mean(torch.cat([slope, mean - (slope * colour).sum(dim=0, keepdim=True)]))
    line = F.interpolate(line[None], scale_factor=factor, mode="bilinear", align_corners=False)[0, :, :height, :width]
    return ((line[:3] * _as_planes(colours)).sum(dim=0) + line[3]).clamp(0, 1).numpy()


def _as_planes(colours: np.ndarray) -> Tensor:
    return torch.from_numpy(colours).permute(2, 0, 1).float()


def _window_mean(planes: Tensor) -> Tensor:
    """(N, h, w) means over 3x3 windows; beyond the border its pixels are repeated."""
    return F.avg_pool2d(F.pad(planes[None], [1] * 4, mode="replicate"), kernel_size=3, stride=1)[0]
