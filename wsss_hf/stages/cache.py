"""Where a stage writes, and what it wrote there from: a result is used again only while that has not changed.

`recipe.yaml` in the folder of a result is its [`Record`]. Where today's record differs the stage runs again; the old
result stays until the new one is whole. A kill at any moment leaves what the same command goes on from: of the working
folder `recipe.yaml` is the first file and the last.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from ..files import remove_unfinished, sync, sync_tree, whole_file
from ..models.options import Options
from ..progress import is_quiet
from .lock import LOCK_FILE, OutputError, locked, only_run, partial_of

SETTINGS_FILE = "recipe.yaml"
_MINUTES_FILE = ".minutes"


@dataclass(frozen=True)
class Record:
    """What a result is made from.

    Attributes:
        stage: name of the stage.
        version: of the stage; raised when its code changes results.
        settings: name → section of a recipe or plain value: all that determines the result. Settings that change the
            speed alone are written down and not compared.
        inputs: name → fingerprint of what is read: rows and models, by their contents.
        source: what the data are; written down and not compared.
    """

    stage: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    source: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = {"stage": self.stage, "version": self.version, "data": dict(self.source)}
        return values | {name: _plain(section) for name, section in self.settings.items()} | {"inputs": self.inputs}

    def difference(self, held: Mapping[str, Any]) -> str | None:
        """What has changed since the record `held` was written; None where a result can be used again."""
        if held.get("version") != self.version:
            return f"{self.stage} computes it otherwise now"
        for name, section in self.settings.items():
            found = _first_difference(_comparable(held.get(name), section), _comparable(section, section), name)
            if found:
                return found
        known = held.get("inputs")
        known = known if isinstance(known, dict) else {}
        changed = [name for name in {**known, **self.inputs} if known.get(name) != self.inputs.get(name)]
        return f"{' and '.join(changed)} changed" if changed else None


def embedding(embed_images: bool) -> dict[str, bool]:
    """What a record says of the images in a data set: one that holds them serves those who ask for none, too."""
    return {"embed_images": True} if embed_images else {}


def read_record(folder: Path) -> dict[str, Any]:
    """The record in the folder of a result; {} where there is none."""
    try:
        held = yaml.safe_load((folder / SETTINGS_FILE).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return held if isinstance(held, dict) else {}


class StageOutput:
    """The folder of one stage: built in `<out>.partial`, renamed to `<out>` when it is finished.

    Args:
        out: the final folder.
        record: what the result is made from.
        force: run the stage again even if nothing has changed.

    Attributes:
        done: the result is there, and nothing has changed since.

    Raises:
        OutputError: `out` or its unfinished part is something else than a result of this stage.
    """

    def __init__(self, out: str | os.PathLike, record: Record, force: bool = False):
        self.path = Path(out)
        self.partial = partial_of(out)
        self.record, self.force = record, force
        finished = self._held(self.path)
        changed = None if finished is None else record.difference(finished)
        self.done = finished is not None and not changed and not force
        if self.done:
            self._say("done before")
            self._sweep_after_a_kill()
            return
        begun = self._held(self.partial)
        if finished is not None:
            self._say(f"made again, because {changed or '--force asks for it'}")
        elif begun is not None and self._is_stale(begun):
            damaged = None if begun else f"{SETTINGS_FILE} of {self.partial} can't be read"
            self._say(f"begun anew, because {damaged or record.difference(begun) or '--force asks for it'}")

    def _held(self, folder: Path) -> dict[str, Any] | None:
        """The record of what `folder` holds; None where it holds nothing."""
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        if folder == self.partial and not _holds_work(folder):
            return None
        held = read_record(folder)
        if folder == self.partial and not held and (folder / SETTINGS_FILE).exists():
            return {}  # damaged: nothing of it can be trusted
        if held.get("stage") != self.record.stage:
            expected = f"expected a new folder or a result of {self.record.stage}"
            advice = "; move it away to begin anew" if folder == self.partial else ""
            raise OutputError(f"--out {self.path}: {expected}, got {folder}, which holds something else{advice}")
        return held

    def _is_stale(self, begun: dict[str, Any]) -> bool:
        return self.force or self.record.difference(begun) is not None

    @contextmanager
    def working(self, renewing: bool = False) -> Iterator[Path]:
        """The folder to work in, the same for all processes; what an interrupted run left there is still in it.

        Work that fails before its first result takes its folder along; what can be resumed stays.

        Args:
            renewing: a finished result is written again from what it holds; its time and machines stay in the record.

        Raises:
            OutputError: another run works there, or has just finished.
        """
        state = PartialState()
        self._started = time.monotonic()
        self._renewing = renewing
        with only_run(self.partial, self._prepare):
            try:
                yield self.partial
            except BaseException:
                if state.is_main_process:
                    self._leave()
                raise
            state.wait_for_everyone()

    def _prepare(self) -> None:
        """Now that no other run can change them, look at the folders and make the one to work in ready."""
        finished, begun = self._held(self.path), self._held(self.partial)
        self._before = _minutes_of(self.partial)
        try:
            is_current = finished is not None and not self.force and self.record.difference(finished) is None
            if is_current and not self._renewing:
                raise OutputError(f"--out {self.path}: another run has just finished it; the same command uses it")
            if begun is not None and self._is_stale(begun):
                self._sweep()
                self._before, begun = 0.0, None
            for left in (self.partial / "result", self.partial / "old"):
                if left.exists():
                    shutil.rmtree(left)
            remove_unfinished(self.partial)
            if self._renewing and finished is not None:
                self._before, self._computed_with = finished.get("minutes", 0.0), finished.get("computed_with", [])
            else:
                self._computed_with = self._all_machines(begun or {})
            write_atomically(self.partial / _MINUTES_FILE, str(self._before))
            self._write_record(self.partial)
        except BaseException:
            self._leave()
            raise

    def _all_machines(self, begun: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What has computed here, in order; says where that is now another than before."""
        state = PartialState()
        machine = {"device": state.device.type, "processes": state.num_processes, "threads": torch.get_num_threads()}
        machine["torch"] = str(torch.__version__)
        before = begun.get("computed_with")
        if not isinstance(before, list) or not all(isinstance(other, dict) for other in before):
            before = []
        if before and before[-1] != machine:
            changes = (
                f"{name} was {before[-1].get(name)} and is {value}"
                for name, value in machine.items()
                if before[-1].get(name) != value
            )
            self._say(f"the result may differ in its last digits from that of an unbroken run: {', '.join(changes)}")
        return before if before and before[-1] == machine else [*before, machine]

    def _leave(self) -> None:
        """Of what has failed or was interrupted, keep what can be gone on from, and how long it took."""
        if not _holds_work(self.partial):
            shutil.rmtree(self.partial, ignore_errors=True)
        else:
            with suppress(OSError):  # a full disk is said already
                write_atomically(self.partial / _MINUTES_FILE, str(self._minutes()))

    def finish(self, result: Path) -> None:
        """Move `result`, a folder inside the working folder, to its final name and drop the rest.

        For the main process; the others do nothing.
        """
        if not PartialState().is_main_process:
            return
        self._write_record(result, minutes=round(self._minutes(), 2))
        sync_tree(result)
        if self.path.exists():
            os.replace(self.path, self.partial / "old")
        os.replace(result, self.path)
        sync(self.path.parent)
        self._sweep()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _sweep(self) -> None:
        """Empty the working folder, but for the lock; the record, which says whose it is, goes last."""
        kept = (LOCK_FILE, SETTINGS_FILE)
        for path in [path for path in self.partial.iterdir() if path.name not in kept] + [
            self.partial / SETTINGS_FILE
        ]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _sweep_after_a_kill(self) -> None:
        """Remove the working folder of a run that was killed after its result stood under its name."""
        if not PartialState().is_main_process or not self.partial.is_dir():
            return
        begun = read_record(self.partial)
        is_same = begun.get("stage") == self.record.stage and self.record.difference(begun) is None
        if not is_same and {path.name for path in self.partial.iterdir()} - {LOCK_FILE}:
            return
        with suppress(OutputError, OSError), locked(self.partial):
            self._sweep()
            shutil.rmtree(self.partial, ignore_errors=True)

    def _write_record(self, folder: Path, **more: Any) -> None:
        values = self.record.to_dict() | {"computed_with": self._computed_with} | more
        write_atomically(folder / SETTINGS_FILE, yaml.safe_dump(values, sort_keys=False))

    def _minutes(self) -> float:
        """Of this attempt and of those before it."""
        return self._before + (time.monotonic() - self._started) / 60

    def _say(self, what: str) -> None:
        if PartialState().is_main_process and not is_quiet():
            print(f"{self.path.name}: {what}", file=sys.stderr)


def _minutes_of(partial: Path) -> float:
    """That runs have worked in a folder: what the last one wrote down, and from then to its last sign of life."""
    file = partial / _MINUTES_FILE
    try:
        before, begun = float(file.read_text()), file.stat().st_mtime
        written = [path.stat().st_mtime for path in partial.rglob("*") if path.is_file() and path.name != LOCK_FILE]
    except (OSError, ValueError):
        return 0.0
    return before + (max(written) - begun) / 60


def _plain(section: Any) -> Any:
    return (
        dataclasses.asdict(section) if dataclasses.is_dataclass(section) and not isinstance(section, type) else section
    )


def _comparable(values: Any, section: Any) -> Any:
    """`values` without settings that only change speed; those that are not there have their defaults."""
    if not isinstance(section, Options):
        return values
    held = _plain(values)
    if not isinstance(held, dict):
        return held
    found = {}
    default = type(section)()
    for option in dataclasses.fields(section):  # type: ignore[arg-type]
        if not option.metadata.get("speed"):
            value = held.get(option.name, _plain(getattr(default, option.name)))
            found[option.name] = _comparable(value, getattr(section, option.name))
    return found


def _first_difference(held: Any, wanted: Any, name: str) -> str | None:
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in {**held, **wanted}:
            found = _first_difference(held.get(key), wanted.get(key), f"{name}.{key}")
            if found:
                return found
        return None
    return None if held == wanted else f"{name} was {held!r} and is {wanted!r}"


def _holds_work(folder: Path) -> bool:
    """Settings and empty folders are what a run left that ended before its first result."""
    files = (path.name for path in folder.rglob("*") if path.is_file())
    return any(name != SETTINGS_FILE and not name.startswith(".") for name in files)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text)
