"""Tables of figures, in the same format for the terminal, Markdown and HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from rich.console import Console
from rich.table import Table
from rich.text import Text

MISSING = "–"
RESULT_COLUMNS = ["result", "split", "mean_iou", "mean_iou_interval", "pixel_accuracy", "num_images"]
_HEADINGS = {
    "mean_iou": "mean IoU",
    "mean_iou_interval": "95 % interval",
    "mean_average_precision": "mAP",
    "false_positive_share": "FP share",
    "false_negative_share": "FN share",
}


@dataclass(frozen=True)
class Spread:
    """A fraction measured several times: mean and sample standard deviation (None for a single measurement)."""

    mean: float
    deviation: float | None


def format_value(value) -> str:
    """A cell's text: a float, a fraction, in percent with one decimal; a pair as an interval; None and NaN as a dash.

    Pass other numbers (seconds, learning rates) as text.
    """
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return MISSING
    if isinstance(value, Spread):
        mean = format_value(value.mean)
        return mean if value.deviation is None else f"{mean} ± {format_value(value.deviation)}"
    if isinstance(value, (tuple, list)):
        return MISSING if None in value else "–".join(map(format_value, value))
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{100 * value:.1f}"
    return str(value)


def is_figure(value) -> bool:
    """Whether a cell is aligned to the right."""
    return value is None or isinstance(value, (Real, tuple, list, Spread))


def column_names(rows: Sequence[dict]) -> list[str]:
    """The keys of all rows in order of appearance, without those that hold a dictionary (figures per class)."""
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))


def heading(column: str) -> str:
    """A column's heading: `mean_iou` is "mean IoU", `false_positive_share` "FP share"."""
    return _HEADINGS.get(column) or column.removeprefix("num_").replace("_", " ")


def markdown_text(text: str) -> str:
    """A name that people have chosen, as Markdown shows it: no markup, HTML or link of its own, and in one line."""
    return re.sub(r"([\\`*\[\]|~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def markdown_table(rows: Sequence[dict], columns: Sequence[str] | None = None) -> str:
    """`rows` as a Markdown table with `columns` (default: all); keys that a row lacks become a dash."""
    columns = column_names(rows) if columns is None else columns
    rules = ["---:" if _right(rows, column) else ":---" for column in columns]
    cells = [[markdown_text(format_value(row.get(column))) for column in columns] for row in rows]
    lines = [[markdown_text(heading(column)) for column in columns], rules, *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def print_table(
    rows: Sequence[dict], title: str, console: Console | None = None, columns: Sequence[str] | None = None
) -> None:
    """`rows` as a table in the terminal."""
    columns = column_names(rows) if columns is None else columns
    table = Table(title=Text(title))
    for column in columns:
        table.add_column(Text(heading(column)), justify="right" if _right(rows, column) else "left")
    for row in rows:
        table.add_row(*(Text(format_value(row.get(column))) for column in columns))
    (console or Console()).print(table)


def _right(rows: Sequence[dict], column: str) -> bool:
    return all(is_figure(row.get(column)) for row in rows)
