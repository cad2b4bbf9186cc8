"""What a training tells while it runs: `log.jsonl` always, and a tracker of Accelerate if one is asked for."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..files import whole_file
from ..settings import RecipeError, TrainSettings

STEP_LOG_FILE = "log.jsonl"
TRACKER_FOLDER = "wsss_hf"  # which TensorBoard's files stand in, and the project of the other trackers


def check_tracker(settings: TrainSettings) -> None:
    """
    Raises:
        RecipeError: the tracker is not installed.
    """
    if settings.track is not None and settings.track not in map(str, get_available_trackers()):
        raise RecipeError(f"track: expected an installed tracker, got {settings.track}; pip install {settings.track}")


class TrainingLog:
    """Losses by name, rate, images per second and memory, a line of JSON every few steps.

    Args:
        folder: gets `log.jsonl`; a training that goes on continues the file from its checkpoint.
        title: begins the names in the tracker.
        step: optimiser steps that are done.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, title: str, settings: TrainSettings, step: int):
        self.accelerator, self.title, self.settings = accelerator, title, settings
        self.file = folder / STEP_LOG_FILE
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process and self.file.exists():
            lines = self.file.read_text(errors="replace").splitlines(keepends=True)  # the last may be cut off
            with whole_file(self.file) as unfinished:
                unfinished.write_text("".join(line for line in lines if _step_of(line) <= step))

    def __enter__(self) -> TrainingLog:
        if self.settings.track is not None:
            try:
                self.accelerator.init_trackers(TRACKER_FOLDER, _plain(self.settings))
            except Exception as error:  # of any library: no account, no network …
                reason = " ".join(str(error).split()) or type(error).__name__
                raise RecipeError(f"track: {self.settings.track} can't begin: {reason}") from error
        return self

    def __exit__(self, *_exception) -> None:
        for tracker in self.accelerator.trackers:  # `end_training` would also part the processes
            tracker.finish()

    def write(self, step: int, values: dict[str, float]) -> None:
        """What the main process measured up to `step`."""
        if not self.accelerator.is_main_process:
            return
        values = values | {"memory_gb": round(_memory(self.accelerator.device) / 1e9, 3)}
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log({f"{self.title}/{name}": value for name, value in values.items()}, step=step)

    def discard(self) -> None:
        """Remove `log.jsonl`, of a training that failed before there was anything to go on from."""
        if self.accelerator.is_main_process:
            self.file.unlink(missing_ok=True)

    def wants_pictures(self, step: int) -> bool:
        """Whether it is time for pictures."""
        every = self.settings.track_steps
        return bool(self.settings.track and every and step % every == 0)

    def show_pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Named stacks of pictures (N, H, W, 3) uint8."""
        named = {f"{self.title}/{name}": stack for name, stack in pictures.items()}
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":  # Accelerate has no way to give it pictures
                picture: Any = importlib.import_module("trackio").Image
                tracker.log(
                    {name: picture(np.concatenate(list(stack), axis=1)) for name, stack in named.items()}, step
                )
            elif tracker.name == "tensorboard":
                tracker.log_images(named, step, dataformats="NHWC")
            else:
                tracker.log_images(named, step)


def _memory(device: torch.device) -> int:
    """Bytes: the most that the GPU has held, or what the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process(os.getpid()).memory_info().rss


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off by a kill
        return float("inf")


def _plain(settings: TrainSettings) -> dict[str, Any]:
    """As trackers take them: numbers and text."""
    values = dataclasses.asdict(settings)
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
