"""Signals by which a batch system announces that it will end a job."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import NoReturn

from ..progress import say

PREEMPTED = 75  # exit status: sysexits' EX_TEMPFAIL, "try again later"
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(SystemExit):
    """A signal ended a training after its checkpoint was written; a process that does not catch it exits."""


class Preemption:
    """Inside this context SIGTERM and SIGUSR1 end nothing; the first of them is noted in `signal`."""

    signal: int | None = None

    def stop(self, title: str, step: int) -> NoReturn:
        """End the training after that step, of which a checkpoint is written.

        Raises:
            Preempted: always.
        """
        by = "a signal to another process" if self.signal is None else signal.Signals(self.signal).name
        say(f"{title}: stopped after step {step} by {by}; the same command goes on from its checkpoint")
        raise Preempted(PREEMPTED)

    def __enter__(self) -> Preemption:
        # Python lets the main thread alone set handlers.
        wanted = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
