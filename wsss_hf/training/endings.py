"""How trainings end before their time: by an error, in one line and in all processes; by a batch system's signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator

from ..progress import say

DIVERGED_ADVICE = "a smaller learning rate, clip_gradient=1 or mixed_precision=no may help"
PREEMPTED = 75  # exit status: sysexits' EX_TEMPFAIL, "try again later"
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class TrainingError(RuntimeError):
    """Training can't go on; the message says at which step and why."""


@contextmanager
def ending_together(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """The error of one process becomes that of all who wait for it, each of which writes its own into `folder`.

    Raises:
        TrainingError: another process has failed, or was killed.
    """
    if not accelerator.use_distributed:
        yield
        return
    if accelerator.is_main_process:
        for left in folder.glob("error-*.txt"):  # of an earlier attempt
            left.unlink()
    accelerator.wait_for_everyone()
    try:
        yield
    except Exception as error:
        if not is_of_the_group(error):
            with suppress(OSError):  # the error may be a full disk
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"error-{accelerator.process_index}.txt"
                file.write_text(" ".join(str(error).split()) or type(error).__name__)
            raise
        failed = {file.stem.partition("-")[2]: file.read_text() for file in sorted(folder.glob("error-*.txt"))}
        for process, reason in failed.items():
            raise TrainingError(f"process {process} failed: {reason}") from error
        raise TrainingError("another process has ended without an error; was it killed, for its memory?") from error


def is_of_the_group(error: BaseException) -> bool:
    """Whether a process says that it can't reach another."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
    return isinstance(error, torch.distributed.DistError) or (
        type(error) is RuntimeError and any(words in str(error) for words in lost)
    )


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
