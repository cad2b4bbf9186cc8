"""Results of a batch that do not depend on what else is in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def image_by_image(function: Callable) -> Callable:
    """On a CPU, `function(model, pixel_values, …)` for one image after the other, and their results as one batch.

    torch picks its kernels for a CPU by the size of the batch as well, and these round differently. So a batch would
    give other maps than its images alone, as a pipeline sees them, by 1e-5 of the largest. On other devices, where
    batches are faster, they stay whole.

    Args:
        function: `pixel_values` (B, …) and all other tensors among its arguments have one entry per image; so have
            the tensor or the tensors that it returns, or several in a row.
    """

    @wraps(function)
    def alone(model: Any, pixel_values: Tensor, *arguments: Any, **options: Any) -> Any:
        if pixel_values.device.type != "cpu":
            return function(model, pixel_values, *arguments, **options)
        found = []
        for index in range(len(pixel_values)):
            own = [_entry(value, index) for value in (pixel_values, *arguments)]
            found.append(function(model, *own, **{name: _entry(value, index) for name, value in options.items()}))
        return torch.cat(found) if isinstance(found[0], Tensor) else tuple(map(torch.cat, zip(*found, strict=True)))

    return alone


def _entry(value: Any, index: int) -> Any:
    return value[index : index + 1] if isinstance(value, Tensor) else value
