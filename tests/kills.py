"""Kills before each single file operation, without a process for each: what dies at one can do none after it.

Operations are what Python tells its audit hooks (files opened for writing, folders made, names changed or removed)
and `os.fsync`, which does nothing here but count: that is no power cut. Files that libraries write in C++ or Rust are
not seen; tests of damaged files stand for those.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


class Killed(BaseException):
    """The process has ended here."""


class Process:
    """File operations below `root` count from 1; the one numbered `dies_at`, and all after it, do not happen."""

    def __init__(self, root: Path, dies_at: int = 0):
        self.root, self.dies_at = f"{root}{os.sep}", dies_at
        self.operations: list[str] = []

    @property
    def is_dead(self) -> bool:
        return bool(self.dies_at) and len(self.operations) >= self.dies_at

    def end(self) -> None:
        raise Killed(self.operations[-1])

    def enter(self, event: str, path: object) -> None:
        if not self.is_dead:
            self.operations.append(f"{event} {str(path).removeprefix(self.root)}")
        if self.is_dead:
            self.end()

    def hear(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str) and path.startswith(self.root):
                self.enter(event, path)
        elif event in _CHANGES:
            path = name_of(arguments[0])
            # `shutil.rmtree` names what is in a folder relative to the folder
            if path.startswith(self.root) or not os.path.isabs(path):
                self.enter(event, path)


def name_of(path: str | os.PathLike | int) -> str:
    if isinstance(path, int):  # of an open file
        return os.readlink(f"/proc/self/fd/{path}") if sys.platform == "linux" else "an open file"
    return os.fspath(path)


running: list[Process] = []


def _hook(event: str, arguments: tuple) -> None:
    if running and (event == "open" or event in _CHANGES):
        running[-1].hear(event, arguments)


sys.addaudithook(_hook)  # for good: Python has no way to take one back


@contextmanager
def process(root: Path, dies_at: int = 0) -> Iterator[Process]:
    """Whatever is done inside is done by a process that dies before its file operation number `dies_at`; 0: never."""
    found = Process(root, dies_at)
    with mock.patch("os.fsync", lambda descriptor: found.enter("os.fsync", name_of(descriptor))):
        running.append(found)
        try:
            yield found
        except Killed:
            pass
        finally:
            running.pop()


def every_kill(
    root: Path, work: Callable[[Path], object], prepare: Callable[[Path], object] = lambda folder: None, every: int = 1
) -> Iterator[tuple[str, Path]]:
    """Kill `work(folder)` before its first file operation, in the next folder before its second, and so on.

    Args:
        prepare: called before with each folder, and not killed.
        every: only before each so-manieth operation.

    Yields:
        the operation that did not happen, and the folder as it was left, until one `work` lives on.
    """
    at = 0
    while True:
        at += every
        folder = root / f"{at:04d}"
        folder.mkdir()
        prepare(folder)
        with process(folder, at) as found:
            work(folder)
        if not found.is_dead:
            return
        yield found.operations[-1], folder
