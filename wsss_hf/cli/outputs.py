"""Options that name what a command writes: tried while they are read, before the work whose result they take."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer


class OutputPathError(ValueError):
    """Nothing can be written at a path; the message names the option and says what was expected."""


def folder_to_write(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """`path`, if it is a folder that can be written to, or if such a folder can be made there.

    Raises:
        OutputPathError: it is something else.
    """
    if path is not None and path.exists() and not path.is_dir():
        raise OutputPathError(f"{parameter.opts[-1]} {path}: expected a folder or a new name, got a file")
    return _tried(parameter, path, path)


def file_to_write(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """As [`folder_to_write`], for a file; an existing one is left to the command.

    Raises:
        OutputPathError: it is a folder, or its folder can't be written to.
    """
    if path is not None and path.is_dir():
        raise OutputPathError(f"{parameter.opts[-1]} {path}: expected a file or a new name, got a folder")
    return _tried(parameter, path, None if path is None else path.parent)


def _tried(parameter: typer.CallbackParam, path: Path | None, folder: Path | None) -> Path | None:
    """`path`, if something can be written to `folder`, or to the nearest folder above it that exists."""
    if folder is not None:
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        try:
            with tempfile.TemporaryFile(dir=place):  # leaves nothing, even if this process is killed
                pass
        except OSError as error:
            expected = f"{parameter.opts[-1]} {path}: expected a place that can be written to"
            raise OutputPathError(f"{expected}, got {place} ({error.strerror})") from error
    return path


Out = Annotated[
    Path,
    typer.Option(
        "--out",
        callback=folder_to_write,
        help="Output folder: new, or one of the same command, of which only what changed is redone.",
    ),
]
NewFolder = Annotated[
    Path, typer.Option("--to", "--out", callback=folder_to_write, help="Folder to write: new or empty.")
]
ExportCoco = Annotated[
    Path | None, typer.Option(callback=file_to_write, help="File: also write COCO-JSON, run-length encoded.")
]
