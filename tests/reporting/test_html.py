import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from wsss_hf.reporting.html import ReportExample, write_gallery, write_report
from wsss_hf.reporting.style import STYLE

NAMES = ["background", "<b>cat</b>", "dog"]
VOID = {"meta", "link", "img", "path", "polyline"}


class Page(HTMLParser):
    """Checks that tags nest, collects texts, attributes and table rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def example(number, **parts):
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    return ReportExample(image, f"img_{number}", ["<b>cat</b>", "dog"], **parts)


@pytest.fixture
def examples():
    labels = np.zeros((30, 40), np.uint8)
    labels[5:20, 5:20], labels[20:, 30:] = 1, 255
    maps = {"<b>cat</b>": np.full((8, 10), 0.3), "dog": np.full((8, 10), 0.9)}
    return [
        example(0, map=maps, pseudo_mask=labels, truth=labels),
        example(1, map=np.full((30, 40), 0.5), truth=labels),
    ]


@pytest.fixture
def page_text(tmp_path, examples):
    table = [
        {"stage": "plain & simple", "mean_iou": 0.4721, "iou": {"background": 0.8, "<b>cat</b>": None, "dog": 0.3}},
        {"stage": "upper bound", "mean_iou": 0.665},
    ]
    curves = {"plain": [(0.0, 0.2), (0.5, 0.47), (1.0, 0.1)]}
    path = tmp_path / "report.html"
    write_report(path, "Demo <1>", table, examples, NAMES, {"seed": 3, "data": "<toy>"}, curves)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_complete(page_text):
    page = Page(page_text)
    assert page.open == []
    texts = " ".join(page.texts)
    for text in (
        "Demo <1>",
        "plain & simple",
        "47.2",
        "66.5",
        "80.0",
        "–",
        "<toy>",
        "img_0",
        "img_1",
        "best 47.0 at 0.5",
    ):
        assert text in texts
    assert page.tags.count("img") == 5 + 3
    assert "ignore" in page.texts


def test_page_needs_nothing_else(page_text):
    page = Page(page_text)
    assert "script" not in page.tags
    assert not re.search(r"https?:|url\(|@import|//", re.sub(r"base64,[^\"]*", "", page_text))
    for name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith("data:")
    sources = [value for name, value in page.attributes if name == "src"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
    assert {picture.size for picture in pictures} == {(40, 30)}


def test_names_are_escaped(page_text):
    page = Page(page_text)
    assert "<b>cat</b>" not in page_text
    assert "<b>cat</b>" in page.texts


def test_steps_stand_between_maps_and_masks(tmp_path, examples):
    trimap = np.repeat(np.array([0, 128, 255], np.uint8), 400).reshape(30, 40)
    examples[1].steps = {"Trimap": {"dog": trimap}, "Alpha": {"dog": trimap}}
    text = write_report(tmp_path / "r.html", "Run", [], examples, NAMES).read_text()
    heads = re.findall("<th>([^<]*)</th>", text)
    assert heads == ["Image", "Map", "Trimap", "Alpha", "Pseudo mask", "Truth"]
    cell = text.rsplit("<tr>", 1)[1].split("</td>")[2]
    shown = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", cell)[1])))
    np.testing.assert_allclose(np.asarray(shown.convert("L")), trimap, atol=12)
    assert ">dog<" in cell


def test_columns_that_no_example_has_are_left_out(page_text):
    texts = Page(page_text).texts
    assert "Pseudo mask" in texts and "Truth" in texts and "Segmenter's mask" not in texts


def test_empty_parts_have_no_heading(tmp_path):
    text = write_report(tmp_path / "r.html", "Empty", [{"stage": "x", "mean_iou": None}], [], NAMES).read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == ["Results"]


@pytest.mark.parametrize("write", [write_gallery, lambda path, bad: write_report(path, "t", [], bad, NAMES)])
def test_a_wrong_size_names_the_image_and_leaves_no_file(tmp_path, write):
    with pytest.raises(ValueError, match="img_4, truth: a label map of 3x2 pixels does not fit an image of 40x30"):
        write(tmp_path / "out", [example(4, truth=np.zeros((2, 3), np.uint8))])
    assert not list(tmp_path.iterdir())


def test_eighteen_series_of_a_plot_look_different(tmp_path):
    names = [f"row {number}" for number in range(18)]
    curves = {name: [(0.0, 0.2), (1.0, 0.3)] for name in names}
    costs = {name: (1.0, 0.3) for name in names}
    page = write_report(
        tmp_path / "page.html", "Plots", [], [], ["background"], curves=curves, costs=costs
    ).read_text()
    lines = re.findall(r'<polyline points="[^"]*" ([^/]*)/>', page)
    keys = re.findall(r'<svg class="key" viewBox="[^"]*">(.*?)</svg>row', page)
    assert len(set(lines)) == len(lines) == 18
    assert len(set(keys[:18])) == len(set(keys[18:])) == 18 and len(keys) == 36
    colors = set(re.findall(r"stroke:(var\(--series-\d\))", page))
    assert len(colors) == 6 and all(STYLE.count(f"{color[4:-1]}: #") == 2 for color in colors)  # light and dark


def test_gallery_is_one_sheet_with_a_column_per_kind(tmp_path, examples):
    sheet = Image.open(write_gallery(tmp_path / "g.png", examples, side=80))
    assert sheet.format == "PNG"
    three_kinds_less = Image.open(write_gallery(tmp_path / "h.png", [example(1)], side=80))
    assert sheet.width - three_kinds_less.width == 3 * (80 + 12)
    assert sheet.height > 2 * 60
    with pytest.raises(ValueError, match="expected at least one, got none"):
        write_gallery(tmp_path / "i.png", [])


def test_gallery_shows_names_with_line_breaks_in_one_line(tmp_path):
    named = replace(example(1), image_id="two\nlines.jpg", tags=["a\r\nb"])
    assert Image.open(write_gallery(tmp_path / "g.png", [named], side=80)).size
