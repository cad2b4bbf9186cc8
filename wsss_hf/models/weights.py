"""Weights are safetensors, and nothing else is opened. Not uploaded with models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OF_A_RUN = {"cam", "segmenter"}  # models that every run has


def check_no_run(name: Any) -> None:
    """Raises ValueError for the folder of a run, in which models are one level deeper."""
    if name is None or not os.path.isdir(name) or os.path.exists(os.path.join(name, "config.json")):
        return
    models = [file.parent for file in sorted(Path(name).glob("*/config.json"))]
    if _OF_A_RUN & {model.name for model in models}:
        raise ValueError(f"{name}: expected a model, got a run; its models are {', '.join(map(str, models))}")


def from_safetensors(load: Callable, name: str | os.PathLike | None, *args, **kwargs):
    """`load(name, …)`, some `from_pretrained`, a ValueError for all but whole safetensors: pickles run code."""
    if not kwargs.get("subfolder"):
        check_no_run(name)
    refusal = (
        f"{name}: no weights in safetensors; pickled ones (.bin, .pth, .pt) are never opened here, "
        "`wsss convert` makes safetensors of the published checkpoints that it knows"
    )
    is_other_file = name is not None and os.path.isfile(name) and not str(name).endswith(".safetensors")
    if kwargs.pop("use_safetensors", None) is False or is_other_file:
        raise ValueError(refusal)
    try:
        return load(name, *args, use_safetensors=True, **kwargs)
    except OSError as error:
        if ".safetensors" in str(error):
            raise ValueError(refusal) from error
        if str(name) not in str(error):  # transformers does not name what it looked for in vain offline
            raise OSError(f"{name}: {error}") from error
        raise
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{name}: expected weights that fit its configuration, got some of other shapes (with "
            "ignore_mismatched_sizes=True these start anew)"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{name}: expected weights in safetensors, got a damaged file ({error})") from error
