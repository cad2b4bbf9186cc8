"""What every method has in common: what it sees of a step, what it returns, where it is registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class TrainingStep:
    """What a method sees of one step.

    Attributes:
        pixel_values: (B, 3, H, W) normalised images.
        images: (B, 3, H, W) the same images in [0, 1], for colour affinities.
        tags: (B, C) float 0/1, the image-level labels.
        features: backbone stage maps, shallow to deep, (B, D_i, h_i, w_i); the last one feeds the classifier.
        cams: (B, C, h, w) CAM logits before the relu, with gradient.
        progress: training progress in [0, 1].
        classify: `classify(pixel_values) -> (features, cams)`, the same network once more, on another view of the
            images; it does not move the running statistics of batch norms.
        superpixels: (B, H, W) int64 superpixel indices, or None.
        saliency: (B, H, W) float in [0, 1], or None.
        localize: `localize(name, pixel_values, features, cams)`, the maps of the method `name` on these images,
            (B, C, h, w); "cam" gives `cams` back.
    """

    pixel_values: Tensor
    images: Tensor
    tags: Tensor
    features: tuple[Tensor, ...]
    cams: Tensor
    progress: float
    classify: Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor]]
    superpixels: Tensor | None = None
    saliency: Tensor | None = None
    localize: Callable[[str, Tensor, tuple[Tensor, ...], Tensor], Tensor] = lambda name, images, features, cams: cams


class Method(nn.Module):
    """Base of all methods: turns features, maps and tags into named losses and, if it has any, better maps.

    Args:
        config: the method's own config dataclass. A method that fills in what depends on the backbone puts a completed
            copy into `self.config`; the model saves that.
        backbone: the [`Backbone`] it will stand on; read its `channels` and `strides`, do not keep it.
        num_classes: number of object classes C.

    Attributes:
        active: False while the training is in the warmup that comes before the methods.
        leads: True if its losses are computed before those of others. So are those that run the network once more
            without gradient: what that needs for a moment is then not needed beside what the others keep.
        paper: where it was published, for the cards of models trained with it.
    """

    active: bool = True
    leads: bool = False
    paper: str | None = None

    def __init__(self, config, backbone: nn.Module, num_classes: int):
        super().__init__()
        self.config = config
        self.num_classes = num_classes

    def reset_parameters(self):
        """Initialise, with `torch.nn.init`, what needs other values than N(0, 0.01) or has no weight matrix."""

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        """Named, weighted, scalar float32 losses of this step."""
        return {}

    def maps(self, step: TrainingStep) -> Tensor | None:
        """(B, C, h, w) non-negative localisation maps that are better than the CAM, or None."""
        return None


METHODS: dict[str, tuple[type, type[Method]]] = {}
"""Name of a method → (its config dataclass, its module). The name is its field in `CamConfig`."""


def register_method(name: str, config_class: type) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: from now on `CamConfig(name=config_class(...))` trains with the decorated method.

    Raises:
        ValueError: another class holds the name.
    """

    def register(module_class: type[Method]) -> type[Method]:
        holder = METHODS.get(name, (None, module_class))[1]
        # A notebook may run its cell again.
        if (holder.__module__, holder.__qualname__) != (module_class.__module__, module_class.__qualname__):
            raise ValueError(
                f"method {name!r} is {holder.__module__}.{holder.__qualname__} already; give the new one another name"
            )
        METHODS[name] = (config_class, module_class)
        return module_class

    return register


def check_stages(method: str, stages: Sequence[int], backbone: nn.Module) -> None:
    """Whether a backbone has the stages that a method's options name, counted from either end.

    Raises:
        ValueError: it has not.
    """
    depth = len(backbone.channels)
    for stage in stages:
        if not -depth <= stage < depth:
            raise ValueError(
                f"{method}: stages names stage {stage}, but this backbone has {depth}: "
                f"{-depth} to {depth - 1} would be right"
            )


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
