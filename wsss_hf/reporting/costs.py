"""What a whole run costs, from the throughput that `scripts/benchmark_training.py` has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DATA_SETS = {"VOC train_aug": 10_582, "COCO train2017": 118_287, "a million images": 1_000_000}
"""Name → training images."""


def stage_hours(stage: Mapping[str, Any], images: int) -> float:
    """Hours that a stage takes on the device that it was measured on.

    Args:
        stage: its `images_per_second`, and either `passes` over the images or, where the recipe counts steps, the
            `images` that all steps together see; `labels_per_second` where it labels all images first.
        images: in the data set.
    """
    seen = stage["images"] if stage.get("passes") is None else stage["passes"] * images
    labelling = images / stage["labels_per_second"] if "labels_per_second" in stage else 0
    return (seen / stage["images_per_second"] + labelling) / 3600


def cost_rows(measured: Mapping[str, Any], devices: Sequence[int] = (1, 8, 64)) -> list[dict[str, Any]]:
    """A row for each data set: hours of each stage and of all on one device and on several, and space on disk.

    N devices count as N times one: what they tell each other, and what one of them does alone, is left out.

    Args:
        measured: what `benchmark_training.py --out` wrote: `device`, the kind of device as one word or two ("GPU"),
            `stages`, see [`stage_hours`], and `bytes` of an image's `pseudo mask` and of its `maps`.
        devices: how many.

    Returns:
        rows of text, as of [`markdown_table`].
    """
    rows: list[dict[str, Any]] = []
    for name, images in DATA_SETS.items():
        hours = {stage: stage_hours(figures, images) for stage, figures in measured["stages"].items()}
        row = {"data": name, "images": f"{images:,}"} | {stage: duration(value) for stage, value in hours.items()}
        for count in devices:
            plural = "" if count == 1 else "s"
            row[f"all, on {count} {measured['device']}{plural}"] = duration(sum(hours.values()) / count)
        row |= {f"{what} on disk": space(size * images) for what, size in measured["bytes"].items()}
        rows.append(row)
    return rows


def duration(hours: float) -> str:
    """Hours as text of two digits or more: "3.2 min", "12 h", "4.1 days"."""
    value, unit = (60 * hours, "min") if hours < 1 else (hours, "h") if hours < 48 else (hours / 24, "days")
    return f"{_digits(value)} {unit}"


def space(size: float) -> str:
    """Bytes as text: "84 MB", "1.3 TB"."""
    units = ["kB", "MB", "GB", "TB"]
    size /= 1000
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{_digits(size)} {units[0]}"


def _digits(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
