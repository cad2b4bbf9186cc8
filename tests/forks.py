"""Commands of `wsss` in processes of their own without the price of a new interpreter: forks of the tests' process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

from wsss_hf.cli.main import main


class Command:
    """`wsss …` in a forked process, which has the libraries of this one; it has begun when the constructor returns."""

    def __init__(self, arguments: list[str], errors: Path):
        self.errors = errors
        self._process = multiprocessing.get_context("fork").Process(target=self._work, args=(arguments,))
        self._process.start()

    def _work(self, arguments: list[str]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        os.environ.pop("WSSS_TRACEBACK", None)
        AcceleratorState._reset_state()
        PartialState._reset_state()
        with self.errors.open("w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            main(arguments)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float = 60) -> tuple[int, str]:
        """Exit code and standard error."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, self.errors.read_text()
        return self._process.exitcode, self.errors.read_text()
