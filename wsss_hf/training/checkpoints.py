"""Checkpoints of a training: numbered folders, of which the newest whole one is found again after any kill.

    checkpoints/step-00000400/   what `Accelerator.save_state` writes, progress.json, files.json
    checkpoints/step-00000600/
    checkpoints/step-00000600.dealt/   while it is loaded: a copy of DeepSpeed's for another number of processes

A checkpoint is written under another name, forced to disk and renamed; the one before stays beside it. `files.json`
holds the size and digest of every file, so that a damaged checkpoint is recognised before anything of it is loaded.
No pickle is opened that could run code: Accelerate reads what it wrote with `weights_only`, except for objects of
`register_for_checkpointing`, which are refused here; DeepSpeed and torch's sharded state dicts are made to.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from ..files import file_digest, sync, sync_tree
from ..progress import say
from .endings import is_of_the_group
from .launcher import is_sharded
from .zero import deal_out

_PROGRESS_FILE, _MANIFEST_FILE = "progress.json", "files.json"
_SHARDING = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
_NO_SHARDING = "neither FSDP nor DeepSpeed"
_UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, pickle.PickleError, SafetensorError),
    CheckpointException,  # of torch's shards, and no Exception
)


class CheckpointError(ValueError):
    """A training can't go on from its checkpoint; the message names it."""


def save(
    accelerator: Accelerator, folder: Path, step: int, progress: dict[str, Any], keep: int = 2, run: str = ""
) -> None:
    """Write a checkpoint of all that `accelerator` has prepared; call it in all processes.

    Args:
        folder: holds the checkpoints of one training, and nothing else. It gets `step-<step>`.
        step: optimiser steps that are done.
        progress: whatever else [`resume`] is to give back, as JSON has it: the schedule's state, the log …
        keep: newest checkpoints that stay.
        run: what tells this training from others; [`resume`] takes no checkpoint of another one.

    Raises:
        OSError: the disk is full, or refuses.
        ValueError: an object was registered for checkpointing, which would be read as a pickle.
    """
    checkpoint = folder / f"step-{step:08d}"
    fresh = folder / f"{checkpoint.name}.new"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for left in set(folder.iterdir()) - set(_checkpoints(folder)):  # of a run that was killed here
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(fresh))
    except (RuntimeError, SafetensorError, CheckpointException) as error:  # a full disk, as libraries say it
        raise OSError(f"{fresh}: can't be written ({_words(error)})") from error
    accelerator.wait_for_everyone()
    if any(fresh.glob("custom_checkpoint_*")):
        raise ValueError("register_for_checkpointing: expected no object, its state would be a pickle")
    if accelerator.is_main_process:
        (fresh / _PROGRESS_FILE).write_text(json.dumps(progress))
        written_by = {"processes": accelerator.num_processes, "sharding": _sharding(accelerator)}
        manifest = {"run": run, **written_by, "files": _contents(fresh)}
        (fresh / _MANIFEST_FILE).write_text(json.dumps(manifest))
        sync_tree(fresh)
        if checkpoint.exists():  # damaged: the training went on from the one before
            shutil.rmtree(checkpoint)
        os.replace(fresh, checkpoint)
        sync(folder)
        before = [path for path in _checkpoints(folder) if path.name < checkpoint.name][: keep - 1]
        for old in set(_checkpoints(folder)) - {checkpoint, *before}:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, run: str = "") -> dict[str, Any] | None:
    """Load the newest whole checkpoint of `run` into all that `accelerator` has prepared; call it in all processes.

    Returns:
        the `progress` that was saved with it; None where `folder` holds no whole checkpoint.

    Raises:
        CheckpointError: it is whole, but of another network, optimiser or sharding, or can't be dealt out to this
            number of processes, which DeepSpeed wants.
    """
    found: list[Path | None] = [newest(folder, run) if accelerator.is_main_process else None]
    broadcast_object_list(found)
    checkpoint = found[0]
    if checkpoint is None:
        return None
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    try:
        progress = json.loads((checkpoint / _PROGRESS_FILE).read_text())
        manifest, sharding = json.loads((checkpoint / _MANIFEST_FILE).read_text()), _sharding(accelerator)
        before = manifest.get("sharding", sharding)
        if before != sharding:
            raise CheckpointError(
                f"{checkpoint}: expected a training with {before or _NO_SHARDING}, which wrote it, got one with "
                f"{sharding or _NO_SHARDING}; remove {folder} to begin anew"
            )
        for shards in checkpoint.rglob(".metadata"):  # which torch opens as any pickle
            with shards.open("rb") as file:
                _ShardRecords(file).load()
        with _weights_only(deepspeed):
            if deepspeed and manifest.get("processes") != accelerator.num_processes:
                _load_dealt_out(accelerator, checkpoint)
            else:
                accelerator.load_state(str(checkpoint))
    except _UNREADABLE as error:
        if isinstance(error, CheckpointError) or is_of_the_group(error):
            raise
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint of this training, got another ({_words(error)}); "
            f"remove {folder} to begin anew"
        ) from error
    return progress


def _sharding(accelerator: Accelerator) -> str:
    """What shares the weights out over the processes, if anything does."""
    return _SHARDING.get(accelerator.distributed_type, "")


def _load_dealt_out(accelerator: Accelerator, checkpoint: Path) -> None:
    """Load what DeepSpeed takes from as many processes as have written it only, from a copy for those of now."""
    processes, copy = accelerator.num_processes, checkpoint.with_suffix(".dealt")
    if accelerator.is_main_process:
        say(f"{checkpoint} is dealt out to {processes} processes")
        try:
            shutil.rmtree(copy, ignore_errors=True)  # of a run that was killed here
            shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("*_states.pt"))
            for path, content in deal_out(checkpoint, processes):
                torch.save(content, copy / path)
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{checkpoint}: can't be dealt out to {processes} processes ({_words(error)})"
            ) from error
    accelerator.wait_for_everyone()
    accelerator.load_state(str(copy))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(copy, ignore_errors=True)


class _ShardRecords(pickle.Unpickler):
    """Reads what torch says about the shards of a state dict: which tensors, how large, in which file."""

    _known = {
        "pathlib": {"PosixPath"},
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        },
        "torch.serialization": {"_get_layout"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._known.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no record of a shard")
        return super().find_class(module, name)


@contextmanager
def _weights_only(deepspeed: bool) -> Iterator[None]:
    """Libraries open some files as any pickle; here they may hold numbers and DeepSpeed's own records only."""
    records: list = []
    if deepspeed:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        records = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals(records):
            yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def _words(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # whose words are the tracebacks of all processes
        error = next(failure for failure, _ in error.failures.values())
    return " ".join(str(error).split())[:200] or type(error).__name__


def newest(folder: Path, run: str | None = None) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; says what is wrong with newer ones.

    Args:
        run: whose checkpoints count; None is any training's.
    """
    for checkpoint in _checkpoints(folder):
        damage = _damage(checkpoint, run)
        if damage is None:
            return checkpoint
        say(f"{checkpoint} is damaged ({damage}), going on from what was before it")
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    numbered = folder.glob("step-" + 8 * "[0-9]") if folder.is_dir() else ()
    return sorted((path for path in numbered if path.is_dir()), reverse=True)


def _contents(checkpoint: Path) -> dict[str, list]:
    """Path → size and digest of all files but the list of files itself."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != _MANIFEST_FILE)
    return {str(path.relative_to(checkpoint)): [path.stat().st_size, file_digest(path)] for path in files}


def _damage(checkpoint: Path, run: str | None) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest, held = json.loads((checkpoint / _MANIFEST_FILE).read_text()), _contents(checkpoint)
    except (OSError, ValueError) as error:
        return f"{_MANIFEST_FILE} can't be read: {error}"
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict):
        return f"{_MANIFEST_FILE} lists no files"
    if run is not None and manifest.get("run") != run:
        return "it is of another training"
    for name in sorted({*listed, *held}):
        if name not in held:
            return f"{name} is missing"
        if held[name] != listed.get(name):
            return f"{name} is not as it was written"
    return None


def save_without_wrappers(accelerator: Accelerator) -> None:
    """Let checkpoints name weights as the model does, whether it is compiled and distributed or not."""
    if is_sharded(accelerator):
        return

    def without(models: list[nn.Module], weights: list[dict], _folder: str) -> None:
        weights[:] = [accelerator.unwrap_model(model, keep_torch_compile=False).state_dict() for model in models]

    def load(models: list[nn.Module], _folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]

    accelerator.register_save_state_pre_hook(without)
    accelerator.register_load_state_pre_hook(load)
