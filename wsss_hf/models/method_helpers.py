"""What several methods share: sums over processes, normalised maps, layers in float32, a smaller view, batch norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .backbone import Backbone


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Meanwhile the batch norms of a network do not move their running statistics."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def check_stages(option: str, stages: Sequence[int], backbone: Backbone) -> None:
    """Whether a backbone has the stages that an option (method.option) names, counted from either end.

    Raises:
        ValueError: it has not.
    """
    depth = len(backbone.channels)
    for stage in stages:
        if not -depth <= stage < depth:
            raise ValueError(f"{option}: expected stages of this backbone ({-depth} to {depth - 1}), got {stage}")


class Float32Conv2d(nn.Conv2d):
    """A convolution in float32, whatever the precision that the weights of the model are kept in.

    The weights are read in its own forward, by which time they are whole where processes share them out.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) of any dtype to (B, E, h, w) float32; autocast, where it is on, chooses."""
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(features.float(), self.weight.float(), bias)


class Float32Linear(nn.Linear):
    """A linear layer in float32, like [`Float32Conv2d`]."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) of any dtype to (B, E) float32; autocast, where it is on, chooses."""
        return F.linear(features.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def min_max_normalize(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Each map's positive part stretched to [0, 1): relu, minus its spatial minimum, divided by its spatial range.

    Args:
        maps: (B, K, h, w).

    Returns:
        (B, K, h, w) in [0, 1); a constant map gives zeros.
    """
    maps = maps.relu()
    lowest, highest = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    return (maps - lowest - eps).relu() / (highest - lowest + eps)


def patch_size(backbone: Backbone) -> int:
    """Side in pixels of the patches of a network that sees patches of one size; 1 for others."""
    size = getattr(backbone, "patch_size", None)
    return size if isinstance(size, int) else 1


def smaller_view(pixel_values: Tensor, scale: float, patch_size: int = 1) -> Tensor:
    """(B, 3, H, W) images at `scale`, corner on corner, in whole patches of a network of patches; at least one."""
    height, width = (max(1, round(int(side * scale) / patch_size)) * patch_size for side in pixel_values.shape[-2:])
    return F.interpolate(pixel_values, size=(height, width), mode="bilinear", align_corners=True)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient)
        return gradient


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all training processes, differentiable (the tensor itself where there is only one)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return _AllReduceSum.apply(tensor)
    return tensor
