"""Checkpoints of DeepSpeed's ZeRO, dealt out to another number of processes.

DeepSpeed's own way, a universal checkpoint, knows the optimiser state of Adam alone, leaves out the statistics of
batch norms and, with ZeRO-3, gives all parameters the settings of the first group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad


def deal_out(checkpoint: Path, processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What `processes` processes would have written instead of the `*_states.pt` of a checkpoint: paths and contents.

    ZeRO-2 cuts all parameters of a group as one, into parts of even length, and ZeRO-3 each by itself.

    Raises:
        ValueError: it is not of DeepSpeed, or its parameters are in an order that depends on the processes.
    """
    (optimizer_path, optimizers), (model_path, models) = (_read(checkpoint, kind) for kind in ("optim", "model"))
    optimizer, model = optimizers[0], models[0]
    if optimizer["ds_config"]["zero_optimization"].get("round_robin_gradients"):
        raise ValueError("round_robin_gradients: expected false, got true")
    states = [content["optimizer_state_dict"] for content in optimizers]
    is_third = "fp32_flat_groups" in states[0]
    weights = [state["fp32_flat_groups" if is_third else "single_partition_of_fp32_groups"] for state in states]
    moments = [state["optimizer_state_dict" if is_third else "base_optimizer_state"]["state"] for state in states]
    cut: list[tuple[list, Any, list[int]]] = []  # containers of the parts in all processes, key, values that are cut
    for group, shapes in enumerate(model["param_shapes"]):
        numbers = [shape.numel() for shape in shapes.values()]
        sizes = numbers if is_third else [sum(parts[group].numel() for parts in weights)]
        state = [moment.get(group, {}) for moment in moments]
        cut.append((weights, group, sizes))
        cut += [(state, key, sizes) for key, value in state[0].items() if torch.is_tensor(value) and value.ndim]
    if is_third:
        frozen = [content["frozen_param_fragments"] for content in models]
        cut += [(frozen, key, [shape.numel()]) for key, shape in model["frozen_param_shapes"].items()]
    dealt = [_cut([parts[key] for parts in all_], sizes, processes, 1 if is_third else 2) for all_, key, sizes in cut]
    model["dp_world_size"] = processes
    for process in range(processes):
        for (containers, key, _), parts in zip(cut, dealt, strict=True):
            containers[0][key] = parts[process]
        yield optimizer_path.replace("pp_rank_0", f"pp_rank_{process}"), optimizer
        if is_third or process == 0:
            yield model_path.replace("pp_rank_0", f"pp_rank_{process}"), model


def _read(checkpoint: Path, kind: str) -> tuple[str, list[dict[str, Any]]]:
    """The path to what the first process has written, and what all of them have."""
    files = sorted(checkpoint.glob(f"*/*_{kind}_states.pt"), key=lambda file: (len(file.name), file.name))
    if not files:
        raise ValueError("it is not of DeepSpeed")
    contents = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
    return str(files[0].relative_to(checkpoint)), contents


def _cut(parts: list[torch.Tensor], sizes: list[int], processes: int, unit: int) -> list[torch.Tensor]:
    """The parts of `processes` processes, given those of others: of each of `sizes` values one, in whole units."""
    pieces: list[Sequence[torch.Tensor]] = [parts]
    if len(sizes) > 1:
        lengths = [math.ceil(size / len(parts)) for size in sizes]
        pieces = list(zip(*(part.split(lengths) for part in parts), strict=True))
    fresh = []
    for size, of_one in zip(sizes, pieces, strict=True):
        length = math.ceil(size / (unit * processes)) * unit
        fresh.append(pad(torch.cat(list(of_one))[:size], (0, length * processes - size)).split(length))
    return [torch.cat(of_one) for of_one in zip(*fresh, strict=True)]
