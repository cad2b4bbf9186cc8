"""Many trainings in one table: means and standard deviations over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .html import ReportExample, write_report
from .tables import Spread, markdown_table, print_table

_SHARES = (
    "mean_iou",
    "pixel_accuracy",
    "boundary_f",
    "false_positive_share",
    "false_negative_share",
    "mean_average_precision",
    "best_threshold_mean_iou",
)
_MAIN_COLUMNS = ("segmenter, mean IoU", "on true masks, mean IoU", "share of it", "masks, mean IoU")
NOTES = """\
In percent. ± is the sample standard deviation over seeds; an interval is the bootstrap 95 % interval over images, its
ends averaged over seeds. "threshold" is the recipe's background threshold, chosen without masks, where labels need it;
the column "best threshold, by masks" is the mean IoU at the oracle threshold (of maps before refinement), which reads
true masks: it shows how good the maps are, and is no result of weak supervision. "on true masks" is the same segmenter
trained on them: an upper bound. Minutes and seconds are those of training.
"""


def summarize(records: Sequence[dict]) -> list[dict]:
    """One row per data set and row of the plan, from the records of its cells (see `stages.compare`).

    Returns:
        rows with `data`, `row`, `seeds`, `threshold` (a number or "auto"); `maps` and, where one was trained,
        `segmenter` and `supervised`, its twin on true masks: figure name -> {"mean", "sd", "values"}, `iou`: class
        name -> mean IoU, and `mean_iou_interval`; `share`: how much of its twin's mean IoU the segmenter reaches;
        `threshold_curve`, `used_threshold` (None where it plays no part) and `best_threshold`, means over seeds;
        `cost`: `seconds_per_step`, `minutes`, `label_seconds_per_image`.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["settings"]["data"], record["settings"]["row"]), []).append(record)
    return [_summary(data, row, cells) for (data, row), cells in groups.items()]


def _summary(data: str, row: str, cells: list[dict]) -> dict:
    summary = {
        "data": data,
        "row": row,
        "seeds": [cell["settings"]["seed"] for cell in cells],
        "threshold": cells[0]["settings"]["recipe"]["masks"]["background_threshold"],
        "device": cells[0]["device"],
    }
    maps = [cell["maps"] for cell in cells if "mean_iou" in cell["maps"]]
    if maps:
        best = [figures["best_threshold"] for figures in maps]
        figures = [f | {"best_threshold_mean_iou": b[1]} for f, b in zip(maps, best, strict=True)]
        summary["maps"] = _figures(figures)
        curve = np.mean([figures["threshold_curve"] for figures in maps], axis=0)
        summary["threshold_curve"] = curve.tolist()
        used = [figures.get("background_threshold") for figures in maps]
        summary["used_threshold"] = None if None in used else float(np.mean(used))
        summary["best_threshold"] = float(np.mean([threshold for threshold, _ in best]))
    held_out = [[result for result in cell["results"] if result["split"] == "val"] for cell in cells]
    last = [results[-1] for results in held_out if results and "mean_iou" in results[-1]]
    if last:
        summary["segmenter"] = _figures(last)
    twins = [cell["supervised"] for cell in cells if "mean_iou" in cell.get("supervised", {})]
    if last and len(twins) == len(last):
        summary["supervised"] = _figures(twins)
        summary["share"] = _spread_of(
            [own["mean_iou"] / twin["mean_iou"] for own, twin in zip(last, twins, strict=True)]
        )
    summary["cost"] = _cost([cell["cost"] for cell in cells])
    return summary


def _figures(figures: list[dict]) -> dict:
    summary: dict = {}
    for key in _SHARES:
        values = [f[key] for f in figures if f.get(key) is not None]
        if values:
            summary[key] = _spread_of(values)
    summary["iou"] = {}
    for name in figures[0]["iou"]:
        known = [f["iou"][name] for f in figures if f["iou"][name] is not None]
        summary["iou"][name] = float(np.mean(known)) if known else None
    intervals = [f["mean_iou_interval"] for f in figures if None not in f["mean_iou_interval"]]
    summary["mean_iou_interval"] = np.mean(intervals, axis=0).tolist() if intervals else [None, None]
    summary["num_images"] = figures[0]["num_images"]
    return summary


def _spread_of(values: list[float]) -> dict:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": deviation, "values": values}


def _cost(costs: list[dict]) -> dict:
    """Means over seeds; `minutes` are those of all trainings of a cell."""

    def mean(values: list) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    trainings = [[part for part in cost.values() if isinstance(part, dict) and part] for cost in costs]
    return {
        "seconds_per_step": mean([cost["cam"].get("seconds_per_step") for cost in costs]),
        "minutes": mean([sum(part["minutes"] for part in parts) if parts else None for parts in trainings]),
        "label_seconds_per_image": mean([cost.get("label_seconds_per_image") for cost in costs]),
    }


def print_comparison(rows: Sequence[dict]) -> None:
    """Prints the main columns in the terminal."""
    short = ("data", "method", "seeds", *_MAIN_COLUMNS, "threshold", "best threshold, by masks", "s/step")
    table = comparison_table(rows)
    columns = [column for column in short if any(column in cells for cells in table)]
    print_table(table, "Methods compared (percent)", columns=columns)


def comparison_table(rows: Sequence[dict]) -> list[dict]:
    """The rows of [`summarize`] as rows of a table."""
    several = len({row["data"] for row in rows}) > 1
    table = []
    for row in rows:
        maps, segmenter, cost = row.get("maps", {}), row.get("segmenter"), row["cost"]
        cells = ({"data": row["data"]} if several else {}) | {"method": row["row"], "seeds": len(row["seeds"])}
        if segmenter:
            cells |= {
                "segmenter, mean IoU": _spread(segmenter, "mean_iou"),
                "segmenter, 95 % interval": segmenter["mean_iou_interval"],
                "segmenter, boundary F": _spread(segmenter, "boundary_f"),
            }
        if "supervised" in row:
            cells |= {
                "on true masks, mean IoU": _spread(row["supervised"], "mean_iou"),
                "share of it": _spread(row, "share"),
            }
        cells |= {
            "masks, mean IoU": _spread(maps, "mean_iou"),
            "masks, 95 % interval": maps.get("mean_iou_interval"),
            "threshold": _threshold(row),
            "best threshold, by masks": _spread(maps, "best_threshold_mean_iou"),
            "at": f"{row['best_threshold']:.2f}" if "best_threshold" in row else None,
            "boundary F": _spread(maps, "boundary_f"),
            "FP share": _spread(maps, "false_positive_share"),
            "FN share": _spread(maps, "false_negative_share"),
            "mAP": _spread(maps, "mean_average_precision"),
            "s/step": _plain(cost["seconds_per_step"], ".3f"),
            "minutes": _plain(cost["minutes"], ".1f"),
        }
        table.append(cells)
    return table


def _threshold(row: dict) -> str | None:
    used = row.get("used_threshold")
    if used is None:
        return None if "used_threshold" in row else str(row["threshold"])
    return f"{row['threshold']}: {used:.2f}" if isinstance(row["threshold"], str) else str(row["threshold"])


def _spread(figures: dict, key: str) -> Spread | None:
    return Spread(figures[key]["mean"], figures[key]["sd"]) if key in figures else None


def _plain(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def comparison_markdown(rows: Sequence[dict]) -> str:
    """The table, the meaning of its columns, and the IoU of each class."""
    per_class = [
        {"method": f"{row['row']}, {kind}", **row[kind]["iou"]}
        for row in rows
        for kind in ("segmenter", "supervised", "maps")
        if kind in row
    ]
    names = {"maps": "masks", "supervised": "segmenter on true masks"}
    for cells in per_class:
        name, _, kind = cells["method"].rpartition(", ")
        cells["method"] = f"{name}, {names.get(kind, kind)}"
    parts = [markdown_table(comparison_table(rows)), NOTES]
    if per_class:
        parts.append("IoU per class:\n\n" + markdown_table(per_class))
    return "\n".join(parts)


def write_comparison(
    path: str | Path, name: str, rows: Sequence[dict], examples: Sequence[ReportExample], class_names: Sequence[str]
) -> Path:
    """One HTML page of the rows of [`summarize`] of one data set: table, classes, curves, costs, pictures.

    Args:
        name: of the data set.
        examples: images with the masks of every row under `masks`.
        class_names: names of the labels, background first.
    """
    table = [
        cells | {"iou": (row.get("segmenter") or row.get("maps") or {}).get("iou")}
        for row, cells in zip(rows, comparison_table(rows), strict=True)
    ]
    best = {
        row["row"]: (row.get("segmenter") or row.get("maps") or {}).get("mean_iou", {}).get("mean") for row in rows
    }
    costs = {
        row["row"]: (row["cost"]["minutes"], best[row["row"]])
        for row in rows
        if row["cost"]["minutes"] is not None and best[row["row"]] is not None
    }
    curves = {row["row"]: row["threshold_curve"] for row in rows if "threshold_curve" in row}
    notes = {"data": name, "classes": len(class_names) - 1, "device": rows[0]["device"]}
    return write_report(path, "Methods compared", table, examples, class_names, notes, curves, costs, caption=NOTES)
