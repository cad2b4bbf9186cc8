"""How trainings fail: with one line, and all processes together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator

DIVERGED_ADVICE = "a smaller learning rate, clip_gradient=1 or mixed_precision=no may help"


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


def is_of_the_group(error: Exception) -> bool:
    """Whether a process says that it can't reach another."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
    return isinstance(error, torch.distributed.DistError) or (
        type(error) is RuntimeError and any(words in str(error) for words in lost)
    )
