"""Progress of long work: a bar with time left and throughput on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: rich is slow to import
    from rich.progress import Progress as RichProgress

_QUIET = "WSSS_QUIET"  # the state is in the environment, so that child processes inherit it


def set_quiet(quiet: bool) -> None:
    """Whether every [`Progress`] prints nothing from now on, in this process and in those it starts.

    The environment variable WSSS_QUIET=1 does the same from outside.
    """
    if quiet:
        os.environ[_QUIET] = "1"
    else:
        os.environ.pop(_QUIET, None)


def is_quiet() -> bool:
    """Whether [`set_quiet`] or WSSS_QUIET=1 has silenced progress."""
    return os.environ.get(_QUIET) == "1"


def _is_main_process() -> bool:
    torch = sys.modules.get("torch")  # whoever has initialised it has imported it
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return rank in ("0", "-1")  # -1: not distributed


def say(line: str) -> None:
    """Print a line on standard error, where a [`Progress`] would show."""
    if not is_quiet() and _is_main_process():
        print(line, file=sys.stderr)


class Progress:
    """A progress bar on standard error; where that is no terminal, a line every half minute.

    Prints nothing when quiet (see [`set_quiet`]) and in other processes than the main one.

    Args:
        title: what is being done.
        total: number of steps; None where nobody knows, as of a stream.
        unit: what a step is, for the throughput.
    """

    def __init__(self, title: str, total: int | None, unit: str = "step"):
        from rich.console import Console

        self.title, self.total, self.unit = title, total, unit
        self.silent = is_quiet() or not _is_main_process()
        self.done = 0
        self.text = ""
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        self._first: int | None = None
        if not self.silent and self._console.is_terminal:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rate]} {task.fields[text]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(self.title, total=self.total, rate="", text="")
            self._bar.start()
        return self

    def __exit__(self, *_exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, values: dict[str, float]) -> None:
        """Values to show beside the bar."""
        self.text = " ".join(f"{name} {value:.3f}" for name, value in values.items())

    def advance(self, steps: int) -> None:
        """`steps` more are done. The first call may count what an earlier run has done; it is no part of the rate."""
        self.done += steps
        if self._first is None:
            self._first = self.done
        if self.silent:
            return
        now = time.monotonic()
        rate = (self.done - self._first) / max(now - self._started, 1e-9)
        rate_text = f"{rate:.1f} {self.unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=rate_text, text=self.text)
        elif now - self._last_line > 30 or self.done == self.total:
            self._last_line = now
            done = str(self.done)
            if self.total is not None:
                left = (self.total - self.done) / rate if rate else 0
                done = f"{done}/{self.total}, {int(left // 60)}:{int(left % 60):02d} left"
            self._console.print(f"{self.title}: {done}, {rate_text} {self.text}")

    def log(self, record: dict) -> None:
        """A record that stays on the screen."""
        if not self.silent:
            text = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items()
            )
            (self._bar.console if self._bar is not None else self._console).print(
                f"{self.title}: {text}", highlight=False
            )
