import io

import numpy as np
import pytest
from rich.console import Console

from wsss_hf.reporting.tables import format_value, markdown_table, print_table

ROWS = [
    {"stage": "plain [CAM]", "mean_iou": 0.4721, "iou": {"cat": 0.5}, "num_images": 190},
    {"stage": "a|b", "mean_iou": None, "mean_iou_interval": (0.44, 0.4899)},
]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.47249, "47.2"),
        (np.float32(1), "100.0"),
        (None, "–"),
        (float("nan"), "–"),
        (12, "12"),
        (np.int64(3), "3"),
        ((0.441, 0.489), "44.1–48.9"),
        ((None, None), "–"),
        ("12 s", "12 s"),
    ],
)
def test_format(value, text):
    assert format_value(value) == text


def test_markdown():
    assert markdown_table(ROWS) == (
        "| stage | mean IoU | images | 95 % interval |\n"
        "| :--- | ---: | ---: | ---: |\n"
        "| plain \\[CAM\\] | 47.2 | 190 | – |\n"
        "| a\\|b | – | – | 44.0–49.0 |\n"
    )
    assert markdown_table(ROWS, ["stage"]).count("\n") == 4


def test_terminal_shows_the_same_text_and_takes_no_markup_from_names():
    stream = io.StringIO()
    print_table(ROWS, "Pseudo masks [x]", Console(file=stream, width=100))
    shown = stream.getvalue()
    for text in ("Pseudo masks [x]", "plain [CAM]", "47.2", "44.0–49.0", "95 % interval"):
        assert text in shown
