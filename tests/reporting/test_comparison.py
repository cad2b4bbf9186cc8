import numpy as np
import pytest
from PIL import Image

from wsss_hf.reporting.comparison import comparison_markdown, comparison_table, summarize, write_comparison
from wsss_hf.reporting.html import ReportExample
from wsss_hf.reporting.tables import Spread, format_value

NAMES = ["background", "cat", "dog"]


def record(row, seed, value, held_out=None, data="pets", dog=0.5):
    figures = {
        "mean_iou": value,
        "mean_iou_interval": (value - 0.1, value + 0.1),
        "iou": {"background": value, "cat": value, "dog": dog},
        "boundary_f": value / 2,
        "num_images": 7,
        "background_threshold": 0.3 + 0.1 * seed,
    }
    best = {"threshold_curve": [[0.2, value], [0.4, value + 0.05]], "best_threshold": [0.4, value + 0.05]}
    cost = {"cam": {"seconds_per_step": 0.1 * (seed + 1), "minutes": 2.0}, "label_seconds_per_image": 0.5}
    if held_out:
        cost["segmenter"] = {"seconds_per_step": 1.0, "minutes": 3.0}
    return {
        "settings": {"data": data, "row": row, "seed": seed, "recipe": {"masks": {"background_threshold": "auto"}}},
        "maps": figures | best,
        "results": [
            {"split": "train", "mean_iou": 0.01},
            *([{"split": "val"} | figures | {"mean_iou": held_out}] if held_out else []),
        ],
        "cost": cost,
        "device": "cpu",
    }


def test_rows_are_means_over_seeds():
    plain, drs = summarize([record("plain", 0, 0.4), record("drs", 0, 0.5), record("plain", 1, 0.5, dog=None)])
    assert (plain["row"], plain["seeds"], plain["threshold"]) == ("plain", [0, 1], "auto")
    assert plain["maps"]["mean_iou"] == {
        "mean": pytest.approx(0.45), "sd": pytest.approx(np.sqrt(0.005)), "values": [0.4, 0.5]
    }  # fmt: skip
    assert plain["maps"]["mean_iou_interval"] == pytest.approx([0.35, 0.55])
    assert plain["maps"]["iou"] == {"background": pytest.approx(0.45), "cat": pytest.approx(0.45), "dog": 0.5}
    assert plain["maps"]["best_threshold_mean_iou"]["mean"] == pytest.approx(0.5)
    assert np.array(plain["threshold_curve"]) == pytest.approx(np.array([[0.2, 0.45], [0.4, 0.5]]))
    assert plain["cost"] == pytest.approx({"seconds_per_step": 0.15, "minutes": 2, "label_seconds_per_image": 0.5})
    assert drs["maps"]["mean_iou"]["sd"] is None and "segmenter" not in drs


def test_a_segmenter_is_judged_on_held_out_images_and_pays_for_both_trainings():
    [row] = summarize([record("plain", seed, 0.4, held_out=0.6 + seed / 10) for seed in range(2)])
    assert row["segmenter"]["mean_iou"]["values"] == [0.6, 0.7]
    assert row["cost"]["minutes"] == 5


def test_the_share_of_the_supervised_twin_is_that_of_each_seed():
    cells = [record("plain", seed, 0.4, held_out=0.4 + seed / 10) for seed in range(2)]
    for cell, twin in zip(cells, (0.5, 1.0), strict=True):
        cell["supervised"] = cell["maps"] | {"mean_iou": twin}
    [row] = comparison_table(summarize(cells))
    assert format_value(row["on true masks, mean IoU"]) == "75.0 ± 35.4"
    assert format_value(row["share of it"]) == "65.0 ± 21.2"  # 80 and 50 %, not 45 of 75
    assert "| plain, segmenter on true masks | 40.0 | " in comparison_markdown(summarize(cells))
    del cells[1]["supervised"]
    assert "share of it" not in comparison_table(summarize(cells))[0]


def test_markdown_says_what_masks_have_chosen():
    rows = summarize([record("plain", 0, 0.4), record("plain", 1, 0.5), record("plain", 0, 0.3, data="cars")])
    text = comparison_markdown(rows)
    header, _, pets, cars = text.splitlines()[:4]
    cells = dict(zip(header.split(" | "), pets.split(" | "), strict=True))
    assert cells["masks, mean IoU"] == "45.0 ± 7.1" and cells["best threshold, by masks"] == "50.0 ± 7.1"
    assert cells["| data"] == "| pets" and cells["at"] == "0.40" and cells["threshold"] == "auto: 0.35"
    assert cars.startswith("| cars | plain | 1 | 30.0 |")
    assert "oracle threshold" in text and "| plain, masks | 45.0 | 45.0 | 50.0 |" in text


def test_a_threshold_that_plays_no_part_is_a_dash():
    cells = [record("saliency", seed, 0.4) for seed in range(2)]
    for cell in cells:
        del cell["maps"]["background_threshold"]
    header, _, row = comparison_markdown(summarize(cells)).splitlines()[:3]
    assert dict(zip(header.split(" | "), row.split(" | "), strict=True))["threshold"] == "–"
    cells[0]["maps"] = {}  # no true mask, so no figures
    assert comparison_table(summarize(cells[:1]))[0]["threshold"] == "auto"


def test_page_holds_curves_costs_and_a_column_per_row(tmp_path):
    labels = np.zeros((20, 30), np.uint8)
    example = ReportExample(Image.new("RGB", (30, 20)), "img", ["cat"], masks={"plain": labels, "drs": labels})
    example.truth = labels
    rows = summarize([record("plain", 0, 0.4), record("drs", 0, 0.5)])
    page = write_comparison(tmp_path / "page.html", "pets", rows, [example], NAMES).read_text()
    assert "<th>Image</th><th>plain</th><th>drs</th><th>Truth</th>" in page
    assert "best 55.0 at 0.4" in page and "50.0 in 2 min" in page
    assert len(comparison_table(rows)) == 2


def test_spread_is_mean_and_deviation():
    assert format_value(Spread(0.4721, 0.0068)) == "47.2 ± 0.7"
    assert format_value(Spread(0.4721, None)) == "47.2"
