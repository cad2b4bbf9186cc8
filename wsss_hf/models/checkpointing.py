"""Gradient checkpointing of backbones, those that transformers has none for among them. Not uploaded with models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from torch import Tensor, nn

from .backbone import Backbone
from .method_helpers import statistics_kept


def set_checkpointing(backbone: Backbone, enable: bool, function: Callable, every: int = 1) -> None:
    """Turn gradient checkpointing on or off: of a block only the input is kept for the backward pass.

    Batch norms do not count the images of the second computation again.

    Args:
        function: `torch.utils.checkpoint.checkpoint` with its options.
        every: only every n-th block.
    """
    backbone.gradient_checkpointing = enable
    function = partial(_counted_once, backbone, function)
    if backbone.body.supports_gradient_checkpointing:
        backbone.body._set_gradient_checkpointing(enable, function, every)
    else:
        checkpoint_blocks(backbone.body, function if enable else None, every)


def _counted_once(backbone: Backbone, function: Callable, block: Callable, maps: Tensor, *args, **kwargs):
    # Reentrant checkpointing gives no gradients where the input wants none, as an image does not.
    maps = maps if maps.requires_grad else maps.detach().requires_grad_()
    first = iter([nullcontext()])

    def run(*inputs, **options):
        with next(first, None) or statistics_kept(backbone):
            return block(*inputs, **options)

    return function(run, maps, *args, **kwargs)


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
