"""One run at a time in a folder: a lock that names its holder and ends with it, also by a crash."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # of some network file systems
_held: set[int] = set()


class OutputError(ValueError):
    """`--out` can't be used; the message names it and says what was expected."""


def partial_of(out: str | os.PathLike) -> Path:
    """The folder that is locked while a result is made that becomes `out` when all of it is there."""
    out = Path(out)
    return out.with_name(f"{out.name}.partial")


@contextmanager
def only_run(folder: Path, prepare: Callable[[], None] = lambda: None, option: str = "--out") -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if it is not there; call it in all processes of a run.

    Args:
        prepare: called in the main process when the lock is held. Where it fails, all processes do.
        option: that names the folder, in the message.

    Raises:
        OutputError: another run works there; names its host and process.
    """
    state = PartialState()
    state.wait_for_everyone()  # all have looked at the folder before one writes to it
    with ExitStack() as held:
        failure: Exception | None = None
        if state.is_main_process:
            try:
                held.enter_context(locked(folder, option))
                prepare()
            except Exception as error:
                failure = error
        message = [None if failure is None else str(failure)]
        broadcast_object_list(message)
        if failure is not None:
            raise failure
        if message[0] is not None:
            raise OutputError(message[0])
        yield


@contextmanager
def locked(folder: Path, option: str = "--out") -> Iterator[None]:
    """What [`only_run`] does, for one process alone. At the end folders that hold nothing by then go, too."""
    file = folder / LOCK_FILE
    # An empty one is somebody's; one that only holds a lock is of a run that was killed.
    ours = [] if _is_empty(folder) else [folder, *(above for above in folder.parents if not above.exists())]
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its holder has just removed the folder
            continue
        _held.add(descriptor)
        try:
            if not _lock(descriptor):
                raise OutputError(f"{option} {folder}: expected no other run in it, got {_describe(file)}")
            if _is_file(descriptor, file):
                break
        except BaseException:
            _release(descriptor)
            raise
        _release(descriptor)  # its holder has just removed the file
    try:
        holder = {"host": socket.gethostname(), "process": os.getpid(), "started": psutil.Process().create_time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        if descriptor in _held:  # a child holds nothing
            try:
                file.unlink(missing_ok=True)
                with suppress(OSError):  # something came of the run
                    for place in ours:
                        with suppress(FileNotFoundError):
                            place.rmdir()
            finally:
                _release(descriptor)


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:  # it is not there
        return False


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours now. Where the file system has none, the holder's process decides."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    holder = _holder(os.read(descriptor, 4096))
    return holder is None or not _lives(holder)


def _lives(holder: dict) -> bool:
    if holder["host"] != socket.gethostname():
        return True  # nobody can tell from here
    try:
        return psutil.Process(holder["process"]).create_time() == holder["started"]
    except psutil.Error:
        return False


def _holder(content: bytes) -> dict | None:
    try:
        holder = json.loads(content)
        return holder if holder.keys() == {"host", "process", "started"} else None
    except (ValueError, AttributeError):  # it died before it wrote its name
        return None


def _describe(file: Path) -> str:
    holder = _holder(file.read_bytes()) if file.is_file() else None
    if holder is None:
        return "one that has just begun"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder["started"]))
    elsewhere = "" if holder["host"] == socket.gethostname() else f"; if it has ended, remove {file}"
    return f"process {holder['process']} on {holder['host']}, running since {since}{elsewhere}"


def _is_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _release(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _forget() -> None:
    """In a child: a lock belongs to all that have the file open, and a child must not keep it when its parent dies."""
    for descriptor in list(_held):
        _release(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
