"""Reports of results: one self-contained HTML page, or one PNG contact sheet."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files import whole_file
from ..models.label_colors import display_colors, overlay
from .fonts import font_for
from .pictures import blend, heatmap
from .style import STYLE
from .tables import column_names, format_value, heading, is_figure

IMAGE, MAP, PSEUDO_MASK, PREDICTION, TRUTH = "Image", "Map", "Pseudo mask", "Segmenter's mask", "Truth"
_ORDER = (IMAGE, MAP, "Trimap", "Alpha", PSEUDO_MASK, PREDICTION)  # then other masks, then the truth
PICTURE_SIDE = 360  # longest side of an embedded picture


@dataclass
class ReportExample:
    """One image with its maps and masks; what is None in all examples has no column.

    Attributes:
        image: the picture.
        image_id: its name.
        tags: names of its classes.
        map: class name -> (h, w) map in [0, 1], or one such map; any resolution.
        steps: column heading -> class name -> (H, W) uint8 picture of a refinement step: trimap, alpha.
        pseudo_mask, prediction, truth: (H, W) labels of the image's size, 255 = ignore.
        masks: column heading -> further labels (H, W), one column each.
    """

    image: Image.Image
    image_id: str
    tags: list[str] = field(default_factory=list)
    map: dict[str, np.ndarray] | np.ndarray | None = None
    steps: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    pseudo_mask: np.ndarray | None = None
    prediction: np.ndarray | None = None
    truth: np.ndarray | None = None
    masks: dict[str, np.ndarray] = field(default_factory=dict)


def write_report(
    path: str | Path,
    title: str,
    table: Sequence[dict],
    examples: Sequence[ReportExample],
    class_names: Sequence[str],
    notes: dict | None = None,
    curves: dict[str, Sequence[tuple[float, float]]] | None = None,
    costs: dict[str, tuple[float, float]] | None = None,
    caption: str = "",
) -> Path:
    """Writes one self-contained HTML file: pictures and style are embedded, nothing is fetched, no script runs.

    Args:
        path: the file; it appears complete or not at all.
        title: heading of the page.
        table: one row per model or stage: its name under the first key, then figures (see `tables.format_value`).
            A row may hold `iou`, class name -> IoU, which fills the table of classes.
        examples: images, one row each.
        class_names: names of the labels 0..C, background first.
        notes: name -> value: data, device and other conditions of the figures.
        curves: name -> [(threshold, mIoU), ...], drawn as one plot.
        costs: name -> (minutes, mIoU), drawn as one plot.
        caption: text under the table, on the meaning of its columns.

    Raises:
        ValueError: a label map has another size than its image; the image is named.
    """
    sections = [
        _notes(notes or {}),
        _section("Results", _results_table(table) + (f"<p>{_text(caption)}</p>" if caption else "")),
        _section("IoU per class", _class_table(table, class_names)),
        _section("Mean IoU against background threshold", _curve_plot(curves or {})),
        _section("Mean IoU against minutes of training", _cost_plot(costs or {})),
        _section("Examples", _example_table(examples, class_names)),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{_ICON}'
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<title>{_text(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main><h1>{_text(title)}</h1>\n{''.join(sections)}</main></body></html>\n"
    )
    return _write_whole(path, page.encode("utf-8"))


def write_gallery(path: str | Path, examples: Sequence[ReportExample], side: int = 240) -> Path:
    """Writes the examples as one PNG contact sheet: a row per image, each picture at most `side` pixels.

    Arrows lead from image and tags to the map, the masks that are made of it, and the segmenter's mask. Words stay
    legible at half the size.

    Raises:
        ValueError: there is no example, or a label map has another size than its image.
    """
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    rows = [
        {name: _fit(picture, side, enlarge=True) for name, panels in row.items() for picture in panels.values()}
        for row in map(_pictures, map(_one_map, examples))
    ]
    columns = _columns(rows)
    gap, header, caption = 12, 44, 44
    heights = [max(picture.height for picture in row.values()) + caption for row in rows]
    sheet = Image.new("RGB", (gap + len(columns) * (side + gap), header + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    bold = ImageFont.load_default(20)
    lefts = {column: gap + index * (side + gap) for index, column in enumerate(columns)}
    for column, left in lefts.items():
        words = "Image and tags" if column == IMAGE else column
        draw.text((left + side / 2, header / 2), words, fill="#1c2430", font=bold, anchor="mm")
        if column in _ORDER[1:]:
            tip = left - gap / 2 + 8, header / 2
            draw.polygon([tip, (tip[0] - 14, tip[1] - 8), (tip[0] - 14, tip[1] + 8)], fill="#3566d6")
    top = header
    for example, row, height in zip(examples, rows, heights, strict=True):
        for column, picture in row.items():
            sheet.paste(picture, (lefts[column] + (side - picture.width) // 2, top))
        top += height
        words = " ".join(f"tags: {', '.join(example.tags) or 'none'}   ({example.image_id})".split())
        font = font_for(words, 18)
        while draw.textlength(words, font=font) > sheet.width - 2 * gap:
            words = words[:-2] + "…"
        draw.text((gap, top - caption + 16), words, fill="#566072", font=font, anchor="lm")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return _write_whole(path, buffer.getvalue())


def _write_whole(path: str | Path, content: bytes) -> Path:
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)
    return Path(path)


# Pictures of an example


def _pictures(example: ReportExample) -> dict[str, dict[str, Image.Image]]:
    """Column heading -> {caption: picture}, for what the example has."""
    image = example.image.convert("RGB")
    maps = {} if example.map is None else example.map if isinstance(example.map, dict) else {"": example.map}
    masks = {PSEUDO_MASK: example.pseudo_mask, PREDICTION: example.prediction, **example.masks}
    masks[TRUTH] = example.truth
    columns = {
        IMAGE: {"": image},
        MAP: {name: blend(image, heatmap(values)) for name, values in maps.items()},
    }
    for step, pictures in example.steps.items():
        columns[step] = {name: Image.fromarray(picture) for name, picture in pictures.items()}
    for name, labels in masks.items():
        try:
            columns[name] = {} if labels is None else {"": overlay(image, labels)}
        except ValueError as error:
            raise ValueError(f"{example.image_id}, {name.lower()}: {error}") from error
    return {name: panels for name, panels in columns.items() if panels}


def _one_map(example: ReportExample) -> ReportExample:
    """The example with its highest class map at each position, and without steps."""
    if not isinstance(example.map, dict):
        return replace(example, steps={})
    return replace(example, map=np.max(list(example.map.values()), axis=0) if example.map else None, steps={})


def _columns(rows: Sequence[dict]) -> list[str]:
    """Headings from the image to the truth."""
    names = dict.fromkeys(name for row in rows for name in row)
    return sorted(names, key=lambda name: (name == TRUTH, _ORDER.index(name) if name in _ORDER else len(_ORDER)))


def _fit(picture: Image.Image, side: int, enlarge: bool = False) -> Image.Image:
    scale = side / max(picture.size)
    if scale > 1 and not enlarge:
        return picture
    return picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.LANCZOS)


# HTML


def _text(value) -> str:
    return html.escape(str(value))


def _section(name: str, body: str) -> str:
    return f"<section><h2>{_text(name)}</h2>\n{body}</section>\n" if body else ""


def _notes(notes: dict) -> str:
    items = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(format_value(value))}</dd></div>" for name, value in notes.items()
    )
    return f"<dl>{items}</dl>\n" if items else ""


def _results_table(rows: Sequence[dict]) -> str:
    if not rows:
        return ""
    columns = column_names(rows)
    kinds = {
        column: " ".join(
            ["figure"] * all(is_figure(row.get(column)) for row in rows) + ["main"] * (column == "mean_iou")
        )
        for column in columns
    }

    def cell(row: dict, column: str) -> str:
        return f'<td class="{kinds[column]}">{_text(format_value(row.get(column)))}</td>'

    head = "".join(f'<th class="{kinds[column]}">{_text(heading(column))}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(cell(row, column) for column in columns)}</tr>\n" for row in rows)
    return (
        f'<div class="card"><table class="figures"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )


def _class_table(rows: Sequence[dict], class_names: Sequence[str]) -> str:
    rows = [row for row in rows if row.get("iou")]
    if not rows:
        return ""

    def cell(value: float | None) -> str:
        width = 0 if value is None else 100 * value
        return f'<td><span class="bar"><i style="width:{width:.1f}%"></i></span><b>{format_value(value)}</b></td>'

    share = 82 / len(rows)
    head = "<th>class</th>" + "".join(
        f'<th style="width:{share:.1f}%">{_text(next(iter(row.values())))}</th>' for row in rows
    )
    body = "".join(
        f"<tr><td>{_swatch(label)}{_text(name)}</td>{''.join(cell(row['iou'].get(name)) for row in rows)}</tr>\n"
        for label, name in enumerate(class_names)
    )
    return (
        f'<div class="card"><table class="classes"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )


def _swatch(label: int) -> str:
    """The colour of a label in overlays; background is empty, ignore hatched."""
    red, green, blue = display_colors()[label]
    color = {
        0: "none",
        255: "repeating-linear-gradient(135deg,#c8c8c8 0 2px,#808080 2px 5px)",
    }.get(label, f"#{red:02x}{green:02x}{blue:02x}")
    return f'<span class="swatch" style="background:{color}"></span>'


class _Plot:
    """Inline SVG, 640 x 300, axes from 0; shares upwards, to the next tenth above the highest.

    Its series have six colours; from the seventh on lines are dashed and marks have another shape.
    """

    left, right, top, bottom = 48, 620, 14, 256
    colors = 6
    dashes = ("", "7 4", "2 3")
    marks = ("M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z", "M-4 -4H4V4H-4Z", "M0 -5.5L5.5 4.5H-5.5Z")

    def __init__(self, points: Sequence[tuple[float, float]], axis: str, label: str):
        self.limit_x = max(x for x, _ in points) or 1.0
        self.limit_y = min(1.0, np.ceil(10 * max(y for _, y in points) + 0.1) / 10)
        self.label = label
        self.parts: list[str] = []
        self.legend: list[str] = []
        for tick in np.arange(0, self.limit_y + 0.05, 0.1 if self.limit_y <= 0.6 else 0.2):
            _, y = self.place(0, tick)
            self.parts.append(f'<path class="grid" d="M{self.left} {y:.1f}H{self.right}"/>')
            self.parts.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:.0f}</text>')
        for tick in np.linspace(0, self.limit_x, 6):
            x, _ = self.place(tick, 0)
            self.parts.append(f'<text x="{x:.1f}" y="{self.bottom + 20}" text-anchor="middle">{tick:.2g}</text>')
        middle = (self.left + self.right) / 2
        self.parts.append(f'<text x="{middle}" y="{self.bottom + 40}" text-anchor="middle">{_text(axis)}</text>')

    def place(self, x: float, y: float) -> tuple[float, float]:
        return (
            self.left + (self.right - self.left) * x / self.limit_x,
            self.bottom - (self.bottom - self.top) * y / self.limit_y,
        )

    def add(self, name: str, note: str, mark: tuple[float, float], line: Sequence[tuple[float, float]] = ()) -> None:
        """A series in the next colour: a line, if it has one, and its mark."""
        turn, number = divmod(len(self.legend), self.colors)
        color, dash = f"var(--series-{number})", self.dashes[turn % len(self.dashes)]
        stroke = f'style="stroke:{color}"' + (f' stroke-dasharray="{dash}"' if dash else "")
        shape = f'<path d="{self.marks[turn % len(self.marks)]}" style="fill:{color}"'
        if line:
            points = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in line)
            self.parts.append(f'<polyline points="{points}" {stroke}/>')
        x, y = self.place(*mark)
        self.parts.append(f'{shape} transform="translate({x:.1f} {y:.1f})"/>')
        key = (f'<path class="line" d="M-15 0H15" {stroke}/>' if line else "") + f"{shape}/>"
        self.legend.append(
            f'<span class="chip"><svg class="key" viewBox="-15 -6 30 12">{key}</svg>{_text(name)}'
            f"<small>{_text(note)}</small></span>"
        )

    def html(self) -> str:
        svg = f'<svg viewBox="0 0 640 300" role="img" aria-label="{_text(self.label)}">{"".join(self.parts)}</svg>'
        return f'<div class="card plot">{svg}<p class="chips">{"".join(self.legend)}</p></div>'


def _curve_plot(curves: dict[str, Sequence[tuple[float, float]]]) -> str:
    if not curves:
        return ""
    label = "Mean IoU in percent against the background threshold"
    plot = _Plot([point for curve in curves.values() for point in curve], "background threshold", label)
    for name, curve in curves.items():
        best = max(curve, key=lambda point: point[1])
        plot.add(name, f"best {format_value(best[1])} at {best[0]:.2g}", best, curve)
    return plot.html()


def _cost_plot(costs: dict[str, tuple[float, float]]) -> str:
    if not costs:
        return ""
    plot = _Plot(list(costs.values()), "minutes of training", "Mean IoU in percent against minutes of training")
    for name, (minutes, value) in costs.items():
        plot.add(name, f"{format_value(value)} in {minutes:.3g} min", (minutes, value))
    return plot.html()


def _example_table(examples: Sequence[ReportExample], class_names: Sequence[str]) -> str:
    if not examples:
        return ""
    rows = [_pictures(example) for example in examples]
    columns = _columns(rows)
    legend = "".join(
        f'<span class="chip">{_swatch(label)}{_text(name)}</span>' for label, name in enumerate(class_names)
    )
    masks = [
        mask
        for example in examples
        for mask in (example.pseudo_mask, example.prediction, example.truth, *example.masks.values())
    ]
    if any(mask is not None and (np.asarray(mask) == 255).any() for mask in masks):
        legend += f'<span class="chip">{_swatch(255)}ignore</span>'
    if MAP in columns:
        legend += '<span class="chip">map: 0<span class="ramp"></span>1</span>'
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(_example_cell(example, row, column, class_names) for column in columns)}</tr>\n"
        for example, row in zip(examples, rows, strict=True)
    )
    return (
        f'<p class="chips">{legend}</p>\n'
        f'<table class="examples"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n'
    )


def _example_cell(example: ReportExample, row: dict, column: str, class_names: Sequence[str]) -> str:
    figures = "".join(
        f'<figure><img src="{_data_url(picture)}" alt="{_text(column)} of {_text(example.image_id)}" loading="lazy">'
        + (f"<figcaption>{_text(caption)}</figcaption>" if caption else "")
        + "</figure>"
        for caption, picture in row.get(column, {}).items()
    )
    kind = "many" if len(row.get(column, {})) > 1 else ""
    words = ""
    if column == IMAGE:
        labels = {name: label for label, name in enumerate(class_names)}
        chips = "".join(
            f'<span class="chip">{_swatch(labels[tag]) if tag in labels else ""}{_text(tag)}</span>'
            for tag in example.tags
        )
        words = f'<p class="chips"><code>{_text(example.image_id)}</code>{chips}</p>'
    return f'<td><div class="{kind}">{figures}</div>{words}</td>'


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    _fit(picture, PICTURE_SIDE).save(buffer, format="JPEG", quality=88, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


_ICON = '<link rel="icon" href="data:,">'  # browsers would otherwise ask for one
