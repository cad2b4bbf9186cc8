"""Gradient checkpointing for networks that transformers has none for. Not uploaded with checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn


def checkpoint_blocks(body: nn.Module, function: Callable | None, every: int = 1) -> None:
    """Compute every n-th block of a network anew in the backward pass; a block is the smallest part with two layers.

    Args:
        function: `torch.utils.checkpoint.checkpoint` with its options; None undoes it.
    """
    for block in _blocks(body)[::every]:
        if function is None:
            vars(block).pop("forward", None)
        else:
            block.forward = partial(_checkpointed_forward, block, function)


def _blocks(body: nn.Module) -> list[nn.Module]:
    """The smallest parts of a network that hold two layers of weights or more."""
    layers = {
        module: sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules())
        for module in body.modules()
        if not isinstance(module, nn.ModuleList | nn.ModuleDict)
    }
    parts = {module for module, count in layers.items() if count > 1}
    return [module for module in layers if module in parts and parts.isdisjoint([*module.modules()][1:])]


def _checkpointed_forward(block: nn.Module, function: Callable, *args, **kwargs):
    forward = partial(type(block).forward, block)
    return function(forward, *args, **kwargs) if block.training else forward(*args, **kwargs)
