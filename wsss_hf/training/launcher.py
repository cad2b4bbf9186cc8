"""The processes of a training: what `accelerate launch` asks for beside the recipe, and the Accelerator of both."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from transformers.integrations import unset_hf_deepspeed_config

from ..models.options import OptionError
from ..progress import say
from ..settings import TrainSettings

# Processes wait for each other while one of them writes a data set, or has the larger images.
GROUP_TIMEOUT = timedelta(hours=6)


def with_launcher(section: Any) -> Any:
    """A recipe's section with the `train` settings that `accelerate launch` or its configuration file asks for.

    `--mixed_precision`, `--gradient_accumulation_steps` and `--dynamo_backend` go before the recipe; a line says what
    of it gave way. As the batch size counts the images of a step, accumulation leaves it as it is.

    Raises:
        OptionError: a precision that training does not have, or compilation with a torch that can't.
    """
    environment, settings = os.environ, section.train
    asked = {
        "mixed_precision": environment.get("ACCELERATE_MIXED_PRECISION", "no"),
        "accumulate": int(environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")),
        "compile": environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no",
    }
    silent = {"mixed_precision": "no", "accumulate": 1, "compile": False}  # what it says if it is not asked
    changes = {name: value for name, value in asked.items() if value not in (silent[name], getattr(settings, name))}
    for name, value in changes.items():
        say(f"train.{name}: {value} from the launcher instead of {getattr(settings, name)} from the recipe")
    if (settings.compile or asked["compile"]) and torch.__version__ < "2.7":
        # It fails in what transformers wraps around every model's forward.
        raise OptionError(f"train.compile: expected torch > 2.6, got {torch.__version__}")
    return dataclasses.replace(section, train=dataclasses.replace(settings, **changes)) if changes else section


def build_accelerator(settings: TrainSettings, folder: Path | None = None) -> Accelerator:
    """The Accelerator of a `train` section.

    Args:
        folder: for the files of a tracker that writes some.
    """
    accumulation = GradientAccumulationPlugin(
        num_steps=settings.accumulate, adjust_scheduler=False, sync_with_dataloader=False
    )
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_plugin=accumulation,
        dynamo_plugin=_dynamo(settings),
        # The loop's batches come in multiples of the processes: there is nothing to fill up.
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        step_scheduler_with_optimizer=False,  # of which Accelerate would make one for each process
        log_with=settings.track,
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)],
    )
    # Models are built whole, for the main process to keep, before they are shared out; with ZeRO-3 transformers would
    # build parts.
    unset_hf_deepspeed_config()
    return accelerator


def _dynamo(settings: TrainSettings) -> TorchDynamoPlugin:
    """With the launcher's backend and mode, if it has them."""
    asked = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
    return TorchDynamoPlugin(backend=None if asked else "inductor" if settings.compile else "no")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights only (FSDP, DeepSpeed ZeRO)."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
