"""What lies between a segmenter and a better one: classes, borders, missed objects, and kinds of confusion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accelerate.utils import gather_object
from scipy.ndimage import distance_transform_edt

from ..reporting.tables import format_value, markdown_table
from .boundary_f import edges
from .mean_iou import MeanIoU, hits_truth_predicted, iou_from_counts, resampled_sums
from .streaming import label_maps, mean_over_present, number, ratio, sum_over_processes

BAND = 5  # pixels on either side of a true border
MISSED = 0.1  # IoU below which an image's class counts as not found


class Errors:
    """Streams label maps against true ones and tells the errors apart; memory as of [`MeanIoU`] with intervals.

    Each kind of error is a part of the confusion matrix: its share of the pixels is given, and the mean IoU that there
    would be if just these pixels were right. Errors at borders and in missed objects overlap with the other kinds.

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
        """Counts one image, see [`MeanIoU`]; `name` is its own, and stands in error messages."""
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
        self.objects += (np.count_nonzero(present), len(missed))
        self.images.append(name)

    def compute(self) -> dict:
        """The figures over the images of all processes.

        Returns:
            `mean_iou`; `mean_iou_at_borders`, of the pixels at most `BAND` pixels from a true border, and
            `mean_iou_elsewhere`; `iou`: class name -> IoU; `num_objects`: number of pairs of image and true object
            class, and `missed_objects`, the share of them with an IoU below `MISSED`; `errors`: kind -> {"share": of
            all counted pixels, "mean_iou_without": the mean IoU if they were right}; `image_counts`: (N, 3, K), see
            [`MeanIoU`], images sorted by name.
        """
        metrics = (self.everywhere, self.at_borders, self.in_missed)
        matrix, at_borders, in_missed = (metric.all_reduce().counts for metric in metrics)
        objects, missed = sum_over_processes(self.objects)
        order = np.argsort(gather_object(self.images))
        classes = len(self.names)
        true, said = np.indices(matrix.shape)
        nothing = (said == 0) | (said == classes)
        kinds = {
            "objects taken for background": matrix * ((true > 0) & nothing),
            "background taken for objects": matrix * ((true == 0) & (said > 0)),
            "objects taken for others": matrix * ((true > 0) & ~nothing & (said != true)),
            f"within {BAND} pixels of a border": at_borders * (said != true),
            "in missed objects": in_missed * (said != true),
        }
        mended = {
            kind: matrix - wrong + np.eye(*wrong.shape, dtype=int) * wrong.sum(axis=1, keepdims=True)
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
                    "mean_iou_without": _mean_iou(mended[kind]),
                }
                for kind, wrong in kinds.items()
            },
            "image_counts": np.stack(self.everywhere.image_counts)[order],
        }


def near_borders(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels at most `BAND` from one that has a neighbour of another label, ignore included."""
    found = edges(labels)
    return distance_transform_edt(~found) <= BAND if found.any() else found


def _mean_iou(matrix: np.ndarray) -> float | None:
    return number(mean_over_present(iou_from_counts(*hits_truth_predicted(matrix))))


def compare_errors(model: dict, other: dict) -> dict:
    """Two results of [`Errors`] on the same images.

    Returns:
        `ratio`: mean IoU of the model / that of the other; `ratio_interval`: its bootstrap 95 % interval, the same
        images drawn for both; `model` and `other`: their figures.
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


def gap_markdown(gap: dict, model: str, other: str) -> str:
    """What [`compare_errors`] found, as Markdown; `model` and `other` are the names of the two."""

    def row(name: str, first: float | None, second: float | None) -> dict:
        difference = None if first is None or second is None else first - second
        return {"in percent": name, "model": first, "other": second, "difference": difference}

    ours, theirs = gap["model"], gap["other"]
    words = {
        "mean_iou": "mean IoU",
        "mean_iou_at_borders": f"mean IoU within {BAND} pixels of a border",
        "mean_iou_elsewhere": "mean IoU elsewhere",
        "missed_objects": f"objects missed (IoU below {format_value(MISSED)})",
    }
    rows = [row(text, ours[key], theirs[key]) for key, text in words.items()]
    for kind in ours["errors"]:
        both = (ours["errors"][kind], theirs["errors"][kind])
        rows.append(row(f"pixels wrong: {kind}", *(figures["share"] for figures in both)))
        rows.append(row(f"mean IoU without: {kind}", *(figures["mean_iou_without"] for figures in both)))
    rows += [row(f"IoU of {name}", value, theirs["iou"][name]) for name, value in ours["iou"].items()]
    return (
        f"{model} reaches {format_value(gap['ratio'])} % of the mean IoU of {other} "
        f"(95 % interval {format_value(gap['ratio_interval'])}, {gap['num_images']} images)\n\n{markdown_table(rows)}"
    )
