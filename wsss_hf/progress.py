"""How long work shows itself: a bar with time left and throughput on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A progress bar on standard error; where that is no terminal, a line every half minute; nothing when quiet.

    Args:
        title: what is being done.
        total: number of steps.
        quiet: print nothing (other processes than the main one are always quiet).
        unit: what a step is, for the throughput.
    """

    def __init__(self, title: str, total: int, quiet: bool = False, unit: str = "step"):
        self.title, self.total, self.quiet, self.unit = title, total, quiet, unit
        self.done = 0
        self.text = ""
        self._console = Console(stderr=True)
        self._bar = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        self._first = None
        if not self.quiet and self._console.is_terminal:
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
        if self.quiet:
            return
        now = time.monotonic()
        rate = (self.done - self._first) / max(now - self._started, 1e-9)
        rate_text = f"{rate:.1f} {self.unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=rate_text, text=self.text)
        elif now - self._last_line > 30 or self.done == self.total:
            self._last_line = now
            left = (self.total - self.done) / rate if rate else 0
            minutes = f"{int(left // 60)}:{int(left % 60):02d} left"
            self._console.print(f"{self.title}: {self.done}/{self.total}, {minutes}, {rate_text} {self.text}")

    def log(self, record: dict) -> None:
        """A record that stays on the screen."""
        if not self.quiet:
            text = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items()
            )
            (self._bar.console if self._bar is not None else self._console).print(
                f"{self.title}: {text}", highlight=False
            )
