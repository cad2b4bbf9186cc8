"""Weights of a training that has diverged, recognised before anything is made with them."""

from __future__ import annotations

import math

import torch
from torch import nn

_LARGEST = 1e6  # trained weights stay below 1e3; one larger step than that leads past this


def diverged(model: nn.Module) -> str | None:
    """What is wrong with the weights of a model: one is NaN, infinite or beyond ±1e6, in words; None if none is.

    Statistics, as of batch norms, may be large, but must be finite.
    """
    for limit, tensors in ((_LARGEST, model.named_parameters()), (math.inf, model.named_buffers())):
        for name, values in tensors:
            if values.is_floating_point() and values.numel():
                largest = torch.linalg.vector_norm(values.detach().float(), ord=math.inf).item()
                if not math.isfinite(largest) or largest > limit:
                    return f"{name} holds {largest:.3g}"
    return None


def check_weights(model: nn.Module, name: object) -> None:
    """What [`diverged`] asks, as a condition.

    Args:
        name: of the model, for the message.

    Raises:
        ValueError: a weight is NaN, infinite or beyond ±1e6.
    """
    found = diverged(model)
    if found is not None:
        raise ValueError(f"{name}: expected the weights of a trained model, but {found}: its training has diverged")
