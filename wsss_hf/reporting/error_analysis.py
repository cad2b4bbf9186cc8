"""The error analysis of two segmenters as a table."""

from __future__ import annotations

from ..metrics.errors import BAND, MISSED
from .tables import format_value, markdown_table


def errors_markdown(comparison: dict, model: str, other: str) -> str:
    """The result of [`compare_errors`] as Markdown.

    Args:
        comparison: the result.
        model, other: names of the two segmenters.
    """

    def row(name: str, model: float | None, other: float | None) -> dict:
        difference = None if model is None or other is None else model - other
        return {"in percent": name, "model": model, "other": other, "difference": difference}

    first, second = comparison["model"], comparison["other"]
    words = {
        "mean_iou": "mean IoU",
        "mean_iou_at_borders": f"mean IoU within {BAND} pixels of a border",
        "mean_iou_elsewhere": "mean IoU elsewhere",
        "missed_objects": f"missed objects (IoU below {format_value(MISSED)})",
    }
    rows = [row(text, first[key], second[key]) for key, text in words.items()]
    for kind in first["errors"]:
        both = (first["errors"][kind], second["errors"][kind])
        rows.append(row(f"wrong pixels, {kind}", *(figures["share"] for figures in both)))
        rows.append(row(f"mean IoU without {kind}", *(figures["mean_iou_without"] for figures in both)))
    rows += [row(f"IoU of {name}", value, second["iou"][name]) for name, value in first["iou"].items()]
    return (
        f"{model} reaches {format_value(comparison['ratio'])} % of the mean IoU of {other} "
        f"(95 % interval {format_value(comparison['ratio_interval'])}, {comparison['num_images']} images)\n\n"
        f"{markdown_table(rows)}"
    )
