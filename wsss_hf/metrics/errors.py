"""Error analysis of two segmenters: IoU per class, border pixels, missed objects, and kinds of confusion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accelerate.utils import gather_object
from scipy.ndimage import distance_transform_edt

from .boundary_f import edges
from .mean_iou import MeanIoU, hits_truth_predicted, iou_from_counts, resampled_sums
from .streaming import label_maps, mean_over_present, number, ratio, sum_over_processes

BAND = 5  # pixels on either side of a true border that count as border pixels
MISSED = 0.1  # IoU below which an image's class counts as missed


class Errors:
    """Streams label maps and true ones, and breaks the errors down by kind; memory as of [`MeanIoU`] with intervals.

    Each kind of error is a part of the confusion matrix. Two figures describe it: the fraction of all pixels, and the
    mean IoU that the model would have if these pixels were correct. Errors at borders and in missed objects overlap
    with the other kinds.

    Args:
        names: class names of the labels 0..K-1, background first.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.everywhere = MeanIoU(self.names, intervals=True)
        self.at_borders, self.in_missed = MeanIoU(self.names), MeanIoU(self.names)
        self.objects = np.zeros(2, dtype=np.int64)  # all, and missed ones
        self.images: list[str] = []

    def add(self, prediction, reference, name: str) -> None:
        """Counts one image, see [`MeanIoU`]; `name` is unique to it, and used in error messages."""
        prediction, reference = label_maps(prediction, reference, f"{name}: ")
        self.everywhere.add(prediction, reference, name)
        iou = iou_from_counts(*self.everywhere.image_counts[-1])
        present = np.flatnonzero(self.everywhere.image_counts[-1][1])
        missed = present[(present > 0) & (iou[present] < MISSED)]
        ignore = self.everywhere.ignore_index
        for metric, counted in (
            (self.at_borders, near_borders(reference)),
            (self.in_missed, np.isin(reference, missed)),
        ):
            metric.add(prediction, np.where(counted, reference, ignore), name)
        self.objects += np.array([np.count_nonzero(present), len(missed)])
        self.images.append(name)

    def compute(self) -> dict:
        """The figures over the images of all processes.

        Returns:
            `mean_iou`; `mean_iou_at_borders`, of the pixels at most `BAND` pixels from a true border, and
            `mean_iou_elsewhere`; `iou`: class name -> IoU; `num_objects`: number of pairs of image and true object
            class, and `missed_objects`, the fraction of them with an IoU below `MISSED`; `errors`: kind -> {"share":
            fraction of all counted pixels, "mean_iou_without": the mean IoU if they were correct}; `image_counts`:
            (N, 3, K), see [`MeanIoU`], images sorted by name.
        """
        metrics = (self.everywhere, self.at_borders, self.in_missed)
        matrix, at_borders, in_missed = (metric.all_reduce().counts for metric in metrics)
        objects, missed = sum_over_processes(self.objects)
        order = np.argsort(gather_object(self.images))
        classes = len(self.names)
        true, predicted = np.indices(matrix.shape)
        no_object = (predicted == 0) | (predicted == classes)
        kinds = {
            "objects taken for background": matrix * ((true > 0) & no_object),
            "background taken for objects": matrix * ((true == 0) & (predicted > 0)),
            "objects taken for others": matrix * ((true > 0) & ~no_object & (predicted != true)),
            f"within {BAND} pixels of a border": at_borders * (predicted != true),
            "in missed objects": in_missed * (predicted != true),
        }
        corrected = {
            kind: matrix - wrong + np.eye(*wrong.shape, dtype=np.int64) * wrong.sum(axis=1, keepdims=True)
            for kind, wrong in kinds.items()
        }
        iou = iou_from_counts(*hits_truth_predicted(matrix))
        return {
            "mean_iou": _mean_iou(matrix),
            "mean_iou_at_borders": _mean_iou(at_borders),
            "mean_iou_elsewhere": _mean_iou(matrix - at_borders),
            "missed_objects": number(ratio(missed, objects)),
            "num_objects": int(objects),
            "iou": {name: number(value) for name, value in zip(self.names, iou, strict=True)},
            "errors": {
                kind: {
                    "share": number(ratio(wrong.sum(), matrix.sum())),
                    "mean_iou_without": _mean_iou(corrected[kind]),
                }
                for kind, wrong in kinds.items()
            },
            "image_counts": np.stack(self.everywhere.image_counts)[order],
        }


def near_borders(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels at most `BAND` away from a border; the ignore index counts as a label."""
    found = edges(labels)
    return distance_transform_edt(~found) <= BAND if found.any() else found


def _mean_iou(matrix: np.ndarray) -> float | None:
    return number(mean_over_present(iou_from_counts(*hits_truth_predicted(matrix))))


def compare_errors(model: dict, other: dict) -> dict:
    """The results of two segmenters on the same images, side by side.

    Args:
        model, other: results of [`Errors`].

    Returns:
        `ratio`: mean IoU of the model / that of the other; `ratio_interval`: its bootstrap 95 % interval, the same
        images drawn for both; `num_images`; `model` and `other`: their figures.
    """
    pairs = np.concatenate([model["image_counts"], other["image_counts"]], axis=1)
    images, _, classes = pairs.shape
    sums = resampled_sums(pairs).reshape(-1, 2, 3, classes)
    means = mean_over_present(iou_from_counts(sums[:, :, 0], sums[:, :, 1], sums[:, :, 2]))
    ratios = ratio(*means.T)
    known = ratios[~np.isnan(ratios)]
    return {
        "ratio": number(ratio(model["mean_iou"], other["mean_iou"])),
        "ratio_interval": [float(end) for end in np.quantile(known, [0.025, 0.975])] if len(known) else [None, None],
        "num_images": images,
        **{
            name: {key: value for key, value in figures.items() if key != "image_counts"}
            for name, figures in (("model", model), ("other", other))
        },
    }
