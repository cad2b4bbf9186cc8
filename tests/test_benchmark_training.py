"""scripts/benchmark_training.py at the smallest size: what it writes, not how fast anything is."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TINY = [
    *("image.size=32", "masks.scales=[1.0]", "masks.refine=[walk]", "masks.batch_size=4"),
    *(f"{stage}.train.batch_size=2" for stage in ("cam", "affinity", "segmenter")),
    *("segmenter.train.steps=7", "cam.train.epochs=3"),
]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("WSSS_QUIET", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return importlib.import_module("benchmark_training")


@pytest.fixture
def benchmark(script, monkeypatch, tmp_path):
    """Runs the script with some parts → what it wrote as JSON."""

    def run(*parts, more=()):
        out = tmp_path / "training.json"
        options = [word for change in TINY for word in ("--set", change)]
        sizes = ["--images", "6", "--steps", "2", "--turns", "1", "--passes", "1", "--workers", "1"]
        command = ["--device", "cpu", "--quiet", "--out", str(out), *options, *sizes, *more, "--parts", *parts]
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "benchmark_training.py"), *command])
        script.main()
        return json.loads(out.read_text())

    return run


@pytest.mark.slow
def test_loops_end_alike_and_the_table_follows_the_recipe(benchmark, tmp_path):
    measured = benchmark("loop", "labelling", "localisation", more=["--table", str(tmp_path / "costs.md")])
    stages = ["train-cam", "train-affinity", "make-masks", "train-segmenter"]
    assert list(measured["stages"]) == stages and list(measured["loop"]) == [stages[0], stages[1], stages[3]]
    for found in measured["loop"].values():
        assert found["difference"] == 0.0
        assert found["ours"] > 0 and found["overhead"] > -1
    assert measured["stages"]["train-cam"]["passes"] == 3
    assert measured["stages"]["train-segmenter"]["images"] == 14  # 7 steps of 2 images, whatever the data
    assert measured["stages"]["make-masks"]["passes"] == 1  # a threshold is found on some of the images
    labels = measured["labelling"]["affinity_labels_per_second"]
    assert measured["stages"]["train-affinity"]["labels_per_second"] == labels > 0
    assert measured["bytes"]["maps"] > measured["bytes"]["pseudo masks"] > 50
    assert [row["precision"] for row in measured["localisation"]] == ["float32", "bf16"]
    assert measured["localisation"][0]["difference"] < 1e-4
    table = (tmp_path / "costs.md").read_text().splitlines()
    assert "all, on 64" in table[0] and len(table) == 5


@pytest.mark.slow
def test_waiting_and_processes_are_measured(benchmark):
    measured = benchmark("wait", "processes", more=["--processes", "2"])
    assert [found["workers"] for found in measured["wait"]] == [0, 1]
    assert all(0 <= found["share"] <= 1 for found in measured["wait"])
    assert measured["wait"][0]["share"] > 0  # images are read where the network is trained
    assert measured["processes"]["count"] == 2
    assert measured["processes"]["one"] > 0 and measured["processes"]["many"] > 0


@pytest.mark.slow
def test_the_share_of_the_peak_is_of_the_compiled_network(benchmark, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")  # nothing to build
    measured = benchmark("peak", more=["--peak", "0.05"])["peak"]
    assert measured["ratio"] == pytest.approx(measured["bf16, compiled"] / measured["float32"])
    done = measured["bf16, compiled"] * measured["GFLOP per image"] * 1e9
    assert measured["share of peak"] == pytest.approx(done / 0.05e12)
    assert 0.001 < measured["GFLOP per image"] < 1


def test_images_are_repeated_until_a_turn_fits_into_an_epoch(script):
    """Epochs end with checkpoints, which are no part of the loop."""
    recipe = script.Recipe.load("toy", TINY)
    rows = script.load_data("toy", toy={"num_train": 3, "num_val": 1, "image_size": 32})["train"]
    examples = script.build_case("cam", recipe, rows, steps=4).examples
    assert [row["image_id"] for row in examples.rows] == [rows[i % 3]["image_id"] for i in range(8)]
    assert len(script.build_case("cam", recipe, rows).examples) == 3


def test_a_table_needs_what_it_is_made_of(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark("loop", more=["--table", str(tmp_path / "costs.md")])
    assert "--table: expected the parts loop and labelling, got loop" in capsys.readouterr().err


@pytest.mark.slow
def test_its_imports_leave_the_number_of_threads():
    """Else processes side by side have a thread for each core, and wait for each other."""
    program = "import torch, benchmark_training; print(torch.get_num_threads())"
    one = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, env=one)
    assert done.stdout.split()[-1] == "1"
