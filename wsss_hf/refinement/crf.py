"""Fully connected CRF (Krähenbühl & Koltun, NeurIPS 2011) through pydensecrf2, an optional extra."""

from __future__ import annotations

import numpy as np

from ..models.maps import IGNORE_INDEX

_SMALLEST = 1e-5  # probability; what the library's unary_from_softmax clips at


def require_densecrf():
    """The module `pydensecrf.densecrf`.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        # Imported here: an optional extra that has to be compiled.
        from pydensecrf import densecrf
    except ImportError as error:
        raise ImportError(
            "crf: expected the library pydensecrf2, got none; pip install pydensecrf2 (needs a C++ compiler)"
        ) from error
    return densecrf


def dense_crf(
    scores: np.ndarray,
    image: np.ndarray,
    iterations: int = 10,
    gaussian_sxy: float = 3,
    gaussian_compat: float = 3,
    bilateral_sxy: float = 80,
    bilateral_srgb: float = 13,
    bilateral_compat: float = 10,
    tolerance: float = 0.001,
) -> np.ndarray:
    """Scores that follow the colours of the image; the default kernels are those of ICD's seeds.

    The cost grows with the number of channels, so channels that are zero everywhere are left out. They would win
    nowhere.

    Args:
        scores: (K, H, W), non-negative; their shares at a pixel are the unary probabilities.
        image: (H, W, 3) uint8.
        iterations: at most so many.
        tolerance: no further iteration after one that moves less than this share of all probability between channels;
            0 stops at `iterations` only. The default changes 0.1 % of the labels and saves a third of the iterations
            (`scripts/benchmark_labeling.py`).

    Returns:
        (K, H, W) float32, summing to 1 over K; 0 for channels that were left out. Where `scores` are 0 throughout,
        every channel starts with the same probability.

    Raises:
        ImportError: pydensecrf2 is not installed.
    """
    result = np.zeros(scores.shape, dtype=np.float32)
    present = scores.reshape(len(scores), -1).max(axis=1) > 0
    if present.sum() < 2:
        # A single channel has probability 1 everywhere; none at all stays at the same probability for each.
        result[:] = (present if present.any() else np.full(len(scores), 1 / len(scores)))[:, None, None]
        return result
    total = scores.sum(axis=0, keepdims=True)
    probabilities = np.divide(scores[present], total, where=total > 0, out=np.zeros_like(scores[present]))
    result[present] = _inference(
        -np.log(np.clip(probabilities, _SMALLEST, 1)),
        image,
        iterations,
        (gaussian_sxy, gaussian_compat),
        (bilateral_sxy, bilateral_srgb, bilateral_compat),
        tolerance,
    )
    return result


def refine_labels(
    labels: np.ndarray, image: np.ndarray, num_labels: int, confidence: float = 0.5, iterations: int = 10
) -> np.ndarray:
    """A label map without ignored pixels: what ICD does with its seeds where no saliency is given.

    Every label has the probability `confidence` where it was given, and each of the other labels of the data set an
    equal share of the rest, whether it is present or not; at ignored pixels all are equally probable. Only the labels
    present enter the CRF.

    Args:
        labels: (H, W) uint8, 255 = ignore.
        image: (H, W, 3) uint8.
        num_labels: labels of the data set, background counted: 21 in VOC.

    Returns:
        (H, W) uint8 with the labels present in `labels`; all 255 where every pixel is ignored.

    Raises:
        ImportError: pydensecrf2 is not installed.
        ValueError: `confidence` is not above 1 / num_labels and below 1: it would not favour the label.
    """
    if not 1 / num_labels < confidence < 1:
        raise ValueError(
            f"confidence: expected a number in (1 / {num_labels}, 1) for {num_labels} labels, got {confidence}"
        )
    present = np.setdiff1d(labels, [IGNORE_INDEX])
    if len(present) < 2:
        return np.full_like(labels, present[0] if len(present) else IGNORE_INDEX)
    given = labels == present[:, None, None]
    probabilities = np.where(given, confidence, (1 - confidence) / (num_labels - 1))
    probabilities[:, labels == IGNORE_INDEX] = 1 / num_labels
    refined = _inference(-np.log(probabilities), image, iterations, gaussian=(3, 3), bilateral=(80, 13, 10))
    return present[refined.argmax(axis=0)].astype(labels.dtype)


def _inference(
    energies: np.ndarray, image: np.ndarray, iterations: int, gaussian, bilateral, tolerance: float = 0
) -> np.ndarray:
    """(K, H, W) unary energies → (K, H, W) probabilities."""
    count, height, width = energies.shape
    crf = require_densecrf().DenseCRF2D(width, height, count)
    crf.setUnaryEnergy(np.ascontiguousarray(energies.reshape(count, -1), dtype=np.float32))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    # A copy: the library refuses read-only arrays, such as NumPy makes of a PIL image.
    crf.addPairwiseBilateral(
        sxy=bilateral[0], srgb=bilateral[1], rgbim=np.array(image, order="C"), compat=bilateral[2]
    )
    state = crf.startInference()
    after = np.array(state[0], dtype=np.float32)
    for _ in range(iterations):
        before = after
        crf.stepInference(*state)
        after = np.array(state[0], dtype=np.float32)  # the library works in place
        if np.abs(after - before).sum() < 2 * tolerance * height * width:
            break
    return after.reshape(energies.shape)
