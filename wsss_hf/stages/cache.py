"""Where a stage writes: nothing stands under its final name before it is whole, and nothing is overwritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from accelerate import PartialState

from ..files import whole_file

SETTINGS_FILE = "recipe.yaml"


class OutputError(ValueError):
    """`--out` can't be used; the message names it and what would be right."""


class StageOutput:
    """The folder of one stage: built in `<out>.partial`, renamed to `<out>` when it is finished.

    Args:
        out: the final folder.
        settings: all that determines the result; saved as `recipe.yaml` beside it.

    Raises:
        OutputError: `out` or its unfinished part holds the result of other settings, or something else.
    """

    def __init__(self, out: str | os.PathLike, settings: dict):
        self.path = Path(out)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.settings = settings
        for folder in (self.path, self.partial):
            if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
                continue
            if folder == self.partial and not _holds_work(folder):
                continue
            held = folder / SETTINGS_FILE
            if not held.is_file():
                raise OutputError(f"--out {self.path}: {folder} exists and is no result of this stage; take another")
            try:
                difference = first_difference(yaml.safe_load(held.read_text()), settings)
            except yaml.YAMLError:
                difference = f"{SETTINGS_FILE} is not YAML"
            if difference:
                raise OutputError(f"--out {self.path}: {folder} holds another run ({difference}); take another folder")

    @property
    def done(self) -> bool:
        """The result of these very settings is there already."""
        return (self.path / SETTINGS_FILE).is_file()

    def begin(self) -> Path:
        """The folder to work in, the same for all processes; what an interrupted run left there is still in it."""
        state = PartialState()
        state.wait_for_everyone()  # all have looked at the folder before one writes to it
        if state.is_main_process:
            self.partial.mkdir(parents=True, exist_ok=True)
            write_atomically(self.partial / SETTINGS_FILE, yaml.safe_dump(self.settings, sort_keys=False))
        state.wait_for_everyone()
        return self.partial

    @contextmanager
    def nothing_left_behind(self) -> Iterator[None]:
        """Work that fails before its first result takes its folder along; what can be resumed stays."""
        try:
            yield
        except Exception:
            if self.partial.is_dir() and not _holds_work(self.partial):
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def finish(self, result: Path) -> None:
        """Move `result`, a folder inside the working folder, to its final name and drop the rest."""
        shutil.copyfile(self.partial / SETTINGS_FILE, result / SETTINGS_FILE)
        if self.path.exists():
            self.path.rmdir()  # an empty folder that the user made
        os.replace(result, self.path)
        shutil.rmtree(self.partial)


def _holds_work(folder: Path) -> bool:
    """Settings and empty folders are what a run left that ended before its first result."""
    files = (path.name for path in folder.rglob("*") if path.is_file())
    return any(name != SETTINGS_FILE and not name.startswith(".") for name in files)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text)


def first_difference(held, wanted, prefix: str = "") -> str | None:
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in {**held, **wanted}:
            found = first_difference(held.get(key), wanted.get(key), f"{prefix}{key}.")
            if found:
                return found
        return None
    return None if held == wanted else f"{prefix[:-1]} is {held!r} there and {wanted!r} here"
