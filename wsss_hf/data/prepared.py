"""Rows and image headers are read and checked once: later commands, and other processes, find the result on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import DatasetDict, config, load_from_disk

from ..files import whole_folder
from .saving import save_data
from .tagged import check_dataset, undecoded

_VERSION = 1  # of what is checked
_WORTHWHILE = 1000  # rows; fewer are read in no time, unless they are some of many


def read_once(
    read: Callable[[], DatasetDict], arguments: Mapping[str, Any], *folders: str | Path, paints: bool = False
) -> DatasetDict:
    """The checked data that `read` gives: memory-mapped from the datasets' cache where they are in it.

    They are used again as long as no file in `folders` has another name, size or time of change, and for the same
    `arguments`. Images are not copied. Of several processes the main one reads, and the others open what it has
    written.

    Args:
        paints: `read` makes the files of the masks, elsewhere; it does so again where they are gone.

    Raises:
        DataError: as of `read` and [`check_dataset`].
    """
    with _main_process_first():
        place = _place("rows", arguments, *map(tree_state, folders))
        if place.is_dir():
            held = load_from_disk(str(place))
            if not paints or _has_masks(held):
                return held
        data = read()
        check_dataset(data)
        if not _is_worthwhile(data, arguments):
            return data
        try:
            with whole_folder(place) as folder:
                save_data(data, folder)
        except OSError:  # no place to keep them, or they are there
            return data
        return load_from_disk(str(place))


def check_once(data: DatasetDict, arguments: Mapping[str, Any], *folders: str | Path) -> None:
    """[`check_dataset`] for data that are in files of their own already, in `folders` or in the datasets' cache.

    Raises:
        DataError: as of [`check_dataset`].
    """
    with _main_process_first():
        identities = [rows._fingerprint for rows in data.values()]
        mark = _place("checked", arguments, identities, *map(tree_state, folders))
        if mark.is_dir():
            return
        check_dataset(data)
        if _is_worthwhile(data, arguments):
            _keep(mark)


def once(check: Callable[[], None], what: str, *folders: str | Path) -> None:
    """`check()`, but not again where it has passed and no file in `folders` has changed since; `what` names it."""
    with _main_process_first():
        mark = _place("checked", what, *map(tree_state, folders))
        if not mark.is_dir():
            check()
            _keep(mark)


def _keep(mark: Path) -> None:
    with suppress(OSError):  # no place for it
        mark.mkdir(parents=True, exist_ok=True)


def _is_worthwhile(data: DatasetDict, arguments: Mapping[str, Any]) -> bool:
    return arguments.get("limit") is not None or sum(map(len, data.values())) >= _WORTHWHILE


def _has_masks(data: DatasetDict) -> bool:
    """Whether the files of all masks are there."""
    masks = (undecoded(rows)["mask"] for rows in data.values() if "mask" in rows.features)
    paths = (mask["path"] for column in masks for mask in column if mask is not None and mask["bytes"] is None)
    return all(map(os.path.exists, paths))


def _place(kind: str, *identity: Any) -> Path:
    key = hashlib.blake2b(json.dumps([_VERSION, *identity], default=str).encode(), digest_size=16).hexdigest()
    return Path(config.HF_DATASETS_CACHE) / f"wsss_hf_{kind}" / key


def tree_state(folder: str | Path) -> str:
    """A digest of a file, or of all files in a folder: their names, sizes and times of change, and where they are."""
    state = hashlib.blake2b(os.path.abspath(folder).encode(), digest_size=16)
    if os.path.isfile(folder):
        found = os.stat(folder)
        state.update(f"{found.st_size}\0{found.st_mtime_ns}".encode())
    elif os.path.isdir(folder):
        for line in _file_states(os.fspath(folder)):
            state.update(line.encode(errors="surrogateescape"))
    return state.hexdigest()


def _file_states(folder: str) -> Iterator[str]:
    """A line for each file in a folder and those below it, in the order of their paths."""
    with os.scandir(folder) as entries:
        names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
    prefix = os.path.join(folder, "")
    for name in names:
        path = prefix + name
        if name.endswith("/"):
            yield from _file_states(path)
        else:
            found = os.stat(path)
            yield f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n"


@contextmanager
def _main_process_first() -> Iterator[None]:
    """The others come after the main process, also where it has failed: they find the same fault, and say it."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    is_first = not several or PartialState().is_main_process
    if not is_first:
        PartialState().wait_for_everyone()
    try:
        yield
    finally:
        if several and is_first:
            PartialState().wait_for_everyone()
