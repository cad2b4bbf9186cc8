"""Files and folders that appear complete or not at all, and are on disk when they do."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_UNFINISHED = ".part"
_HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` at the end, removed if anything fails.

    What is there after the renaming is on disk: a power cut leaves the old file or the new one.
    """
    path = Path(path)
    unfinished = _unfinished(path)
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` to write to; renamed to `path` at the end, removed if anything fails.

    `path` must not exist, or be an empty folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent, path.name)
    unfinished = _unfinished(path)
    unfinished.mkdir()
    try:
        yield unfinished
        sync_tree(unfinished)
        if path.is_dir():
            path.rmdir()
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}{_UNFINISHED}")


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove from `folder` what killed processes of this machine were writing under a temporary name.

    Args:
        name: what was to become this file or folder; None: whatever it was.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.name.startswith(".") or path.suffix != _UNFINISHED:
            continue
        rest, _, process = path.stem.rpartition(".")
        if not rest.endswith(f".{_HOST}") or not process.isdecimal():
            continue
        wanted = name is None or rest == f".{name}.{_HOST}"
        if wanted and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the contents of a file, or the names in a folder, on disk; folders where the system can."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have a folder and all that is in it on disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def file_digest(path: Path) -> str:
    """32 hexadecimal digits of the contents of a file."""
    content = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()
