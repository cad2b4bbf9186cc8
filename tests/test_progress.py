import subprocess
import sys

import pytest
import torch
from rich.console import Console

from wsss_hf import progress as module
from wsss_hf.progress import Progress, is_quiet, set_quiet


@pytest.fixture(autouse=True)
def loud_main_process(monkeypatch):
    for name in ("WSSS_QUIET", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = {"time": 1000.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: now["time"])

    def wait(seconds):
        now["time"] += seconds

    return wait


def printed(capsys):
    out, err = capsys.readouterr()
    assert not out
    return [" ".join(line.split()) for line in err.splitlines()]


def test_elsewhere_than_on_a_terminal_a_line_comes_every_half_minute_and_at_the_end(clock, capsys):
    with Progress("training", 10) as progress:
        progress.advance(0)
        for step in range(10):
            clock(10)
            progress.show({"loss": 1 / (step + 1)})
            progress.advance(1)
    lines = printed(capsys)
    assert lines == [
        "training: 4/10, 1:00 left, 0.1 step/s loss 0.250",
        "training: 8/10, 0:20 left, 0.1 step/s loss 0.125",
        "training: 10/10, 0:00 left, 0.1 step/s loss 0.100",
    ]


def test_where_nobody_knows_how_many_there_are_they_are_counted(clock, capsys):
    with Progress("masks", None, unit="image") as progress:
        progress.advance(80)
        clock(40)
        progress.advance(10)
    assert printed(capsys) == ["masks: 90, 0.2 image/s"]


def test_what_an_earlier_run_did_is_no_part_of_the_rate(clock, capsys):
    with Progress("masks", 100, unit="image") as progress:
        progress.advance(80)
        clock(40)
        progress.advance(10)
    assert printed(capsys) == ["masks: 90/100, 0:40 left, 0.2 image/s"]


def test_a_record_stays_on_the_screen(capsys):
    with Progress("cam", 1) as progress:
        progress.log({"epoch": 3, "loss": 0.123456})
    assert printed(capsys) == ["cam: epoch 3, loss 0.1235"]


def work(clock):
    with Progress("cam", 2) as progress:
        clock(60)
        progress.advance(2)
        progress.log({"epoch": 1})


def test_quiet_prints_nothing_until_it_is_over(clock, capsys):
    set_quiet(True)
    work(clock)
    assert is_quiet() and printed(capsys) == []
    set_quiet(False)
    work(clock)
    assert not is_quiet() and len(printed(capsys)) == 2


@pytest.mark.slow
def test_child_processes_inherit_quietness():
    program = f"import runpy; print(runpy.run_path({module.__file__!r})['is_quiet']())"  # without the package
    for quiet in (True, False):
        set_quiet(quiet)
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert child.stdout.strip() == str(quiet)


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({"RANK": "1"}, False),
        ({"RANK": "0"}, True),
        ({"LOCAL_RANK": "3"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
    ],
)
def test_only_the_main_process_speaks(clock, capsys, monkeypatch, environment, speaks):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    work(clock)
    assert bool(printed(capsys)) == speaks


def test_where_torch_distributed_is_initialised_its_rank_counts(clock, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, speaks in ((1, False), (0, True)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        work(clock)
        assert bool(printed(capsys)) == speaks


def test_a_terminal_gets_a_bar_with_figures_and_records_above_it(monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("cam", 4) as progress:
        progress.advance(0)
        progress.show({"loss": 0.5})
        progress.advance(4)
        progress.log({"epoch": 1})
    text = "\n".join(printed(capsys))
    for part in ("cam", "4/4", "step/s loss 0.500", "epoch 1"):
        assert part in text


def test_the_bar_is_closed_when_the_work_fails(monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", True)
    with pytest.raises(ZeroDivisionError), Progress("cam", 4) as progress:
        progress.advance(1 // 0)
    assert progress._bar.live.is_started is False
