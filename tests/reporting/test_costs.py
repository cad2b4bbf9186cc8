import pytest

from wsss_hf.reporting.costs import DATA_SETS, cost_rows, duration, space, stage_hours
from wsss_hf.reporting.tables import markdown_table

MEASURED = {
    "device": "GPU",
    "stages": {
        "train-cam": {"images_per_second": 100.0, "passes": 4},
        "make-masks": {"images_per_second": 20.0, "passes": 1},
        "train-segmenter": {"images_per_second": 50.0, "passes": None, "images": 200_000},
    },
    "bytes": {"pseudo masks": 2_000, "maps": 30_000},
}


def test_a_stage_sees_its_images_as_often_as_the_recipe_says():
    assert stage_hours({"images_per_second": 10.0, "passes": 3}, 12_000) == pytest.approx(1.0)
    # Labels are made once.
    assert stage_hours({"images_per_second": 10.0, "passes": 3, "labels_per_second": 5.0}, 18_000) == pytest.approx(
        2.5
    )
    # Steps are the same number whatever the data.
    steps = {"images_per_second": 10.0, "passes": None, "images": 72_000}
    assert stage_hours(steps, 12_000) == stage_hours(steps, 10**6) == pytest.approx(2.0)


def test_a_row_for_each_data_set():
    voc, coco, million = cost_rows(MEASURED)
    assert voc["images"] == "10,582" and coco["images"] == "118,287" and million["images"] == "1,000,000"
    # 4e6 images at 100, 1e6 at 20, 2e5 at 50 per second: 40,000 s, 50,000 s, 4,000 s.
    assert [million[stage] for stage in MEASURED["stages"]] == ["11 h", "14 h", "1.1 h"]
    assert million["all, on 1 GPU"] == "26 h" and million["all, on 8 GPUs"] == "3.3 h"
    assert million["all, on 64 GPUs"] == "24 min"
    assert million["pseudo masks on disk"] == "2.0 GB" and million["maps on disk"] == "30 GB"
    assert voc["pseudo masks on disk"] == "21 MB"


def test_the_number_of_devices_is_a_choice():
    (row, *_) = cost_rows(MEASURED, devices=[4])
    assert [key for key in row if key.startswith("all")] == ["all, on 4 GPUs"]


def test_it_is_a_table():
    lines = markdown_table(cost_rows(MEASURED)).splitlines()
    assert len(lines) == 2 + len(DATA_SETS) and lines[2].startswith("| VOC train_aug | 10,582 |")


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.05, "3.0 min"), (0.5, "30 min"), (1, "1.0 h"), (47, "47 h"), (48, "2.0 days"), (2400, "100 days")],
)
def test_durations(hours, text):
    assert duration(hours) == text


@pytest.mark.parametrize(
    ("size", "text"), [(2_000, "2.0 kB"), (84e6, "84 MB"), (1.26e9, "1.3 GB"), (5e15, "5,000 TB")]
)
def test_spaces(size, text):
    assert space(size) == text
