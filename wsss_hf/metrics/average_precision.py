"""Mean average precision of predicted image tags.

Also a script: `evaluate.load("wsss_hf/metrics/average_precision.py")`.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


class MeanAveragePrecision(evaluate.Metric):
    """[`mean_average_precision`] as an `evaluate.Metric`; the library keeps its scores on disk until `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        predictions = datasets.List(datasets.Value("float64"))
        references = datasets.List(datasets.Value("int32"))
        return evaluate.MetricInfo(
            description=mean_average_precision.__doc__,
            citation="",
            inputs_description="predictions: (N, C) scores; references: (N, C) 0/1; class_names: see above.",
            features=datasets.Features({"predictions": predictions, "references": references}),
        )

    def _compute(self, predictions, references, class_names: Sequence[str] | None = None) -> dict:
        return mean_average_precision(predictions, references, class_names)


def mean_average_precision(scores: np.ndarray, tags: np.ndarray, class_names: Sequence[str] | None = None) -> dict:
    """Multi-label mean average precision.

    The average precision of a class is the sum over its distinct scores s, from high to low, of
    (recall(s) - recall(before s)) * precision(s), where images that score at least s count as found: no interpolation,
    and images of equal score enter together. The mean is over the classes that some image has.

    Args:
        scores: (N, C) numbers, higher is more certain.
        tags: (N, C) 0/1.
        class_names: C names, background not among them; default "0", "1", ...

    Returns:
        `mean_average_precision` (None if there is no tag at all), `average_precision`: class name -> value, None where
        no image has the class, and `num_images`.

    Raises:
        ValueError: shapes differ, a score is not finite, or a tag is neither 0 nor 1.
    """
    scores, tags = np.asarray(scores), np.asarray(tags)
    if scores.ndim != 2 or scores.shape != tags.shape or not scores.size:
        raise ValueError(f"scores and tags: expected (images, classes) for both, got {scores.shape} and {tags.shape}")
    if not np.isfinite(scores).all():
        image = np.argwhere(~np.isfinite(scores))[0, 0]
        raise ValueError(f"scores of image {image}: expected finite numbers, got {scores[image].tolist()}")
    if not np.isin(tags, (0, 1)).all():
        raise ValueError(f"tags: expected 0 or 1, got {tags[~np.isin(tags, (0, 1))][0]}")
    names = [str(index) for index in range(scores.shape[1])] if class_names is None else list(class_names)
    per_class = {name: _average_precision(*columns) for name, *columns in zip(names, scores.T, tags.T, strict=True)}
    known = [value for value in per_class.values() if value is not None]
    return {
        "mean_average_precision": float(np.mean(known)) if known else None,
        "average_precision": per_class,
        "num_images": len(scores),
    }


def _average_precision(scores: np.ndarray, tags: np.ndarray) -> float | None:
    if not tags.any():
        return None
    order = np.argsort(scores)[::-1]
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = np.cumsum(tags[order], dtype=np.int64)[last_of_ties]
    precision = found / (last_of_ties + 1)
    return float(np.sum(np.diff(found, prepend=0) * precision) / tags.sum())
