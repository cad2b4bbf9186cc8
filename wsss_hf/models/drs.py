"""DRS: suppress the most discriminative activations, so that attention spreads over the object.

Kim, Han and Kim, "Discriminative Region Suppression for Weakly-Supervised Semantic Segmentation", AAAI 2021.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS

from .methods import Method, register_method
from .options import Options, either, option

if TYPE_CHECKING:
    from .backbone import Backbone

_ACTIVATIONS: Any = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})


@dataclass
class DrsConfig(Options):
    """Options of DRS."""

    mode: Literal["learnable", "fixed"] = option(
        "learnable", "A controller per image and channel that learns, or one fixed `delta` for all."
    )
    delta: float = option(0.55, "Share of its maximum that a channel may keep in fixed mode.", above=0, at_most=1)
    layers: list[str] | None = option(
        None,
        "Names of the backbone's activation functions to suppress after, as shell patterns ('*' is all of them); null "
        "takes those that `PLACEMENTS` has for the backbone's family, or all where a small one lacks these.",
    )


@dataclass(frozen=True)
class Placement:
    """Activations of a family of backbones.

    Attributes:
        patterns: shell patterns of their names.
        deepest: how many of those that fit, counted from the end of the network; None is all.
    """

    patterns: tuple[str, ...] = ("*",)
    deepest: int | None = None

    def choose(self, names: Sequence[str]) -> list[str]:
        """Those of `names`, which are in the order of execution, that are suppressed."""
        fitting = [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.patterns)]
        return fitting if self.deepest is None else fitting[-self.deepest :]


EVERYWHERE = Placement()
# A controller is a square matrix of its activation's channels. After the four times widened hidden layers of ConvNeXt
# and of transformers those of all blocks would outweigh the network.
LAST_BLOCKS = Placement(deepest=4)
PLACEMENTS: dict[str, Placement] = {
    "wsss_vgg16": EVERYWHERE,  # the paper's placement: after each of the 13 relus and those of the extra convolutions
    "wsss_wide_resnet38": EVERYWHERE,
    # Beside cheap convolutions, suppressing the large early activations would cost more than all the rest.
    "resnet": Placement(("encoder.stages.[23].*",)),  # strides 16 and 32, inside the blocks and after each
    # The last blocks, after their depthwise convolutions. From stride 16 on it took the tags' average precision of a
    # pretrained network from 0.96 to 0.67.
    "mobilenet_v2": Placement(("layer.1[45].conv_3x3.*", "conv_1x1.*")),
    "convnext": LAST_BLOCKS,  # after the GELU inside a block, (B, h, w, 4D)
    "convnextv2": LAST_BLOCKS,
    "vit": LAST_BLOCKS,  # after the GELU of the MLP, (B, N, 4D): the maximum is over all tokens
    "dinov2": LAST_BLOCKS,
    "dinov2_with_registers": LAST_BLOCKS,
    "dinov3_vit": LAST_BLOCKS,
}
"""Model type of a backbone → the activations that DRS suppresses if the configuration names none."""


def default_placement(backbone_config: PreTrainedConfig) -> Placement:
    """What `PLACEMENTS` has for the family; for others the last blocks of a transformer and every activation else."""
    has_attention = getattr(backbone_config, "num_attention_heads", None) is not None
    return PLACEMENTS.get(backbone_config.model_type, LAST_BLOCKS if has_attention else EVERYWHERE)


def activation_outputs(backbone: Backbone) -> dict[str, tuple[int, int]]:
    """Name in `backbone.body` → (channels, channel axis) of every activation's output, in order of execution."""
    found = {}

    def recorder(name: str):
        def record(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor):
            shape = output.shape
            channels_last = len(shape) == 3 or (shape[1] == shape[2] != shape[3])
            axis = len(shape) - 1 if channels_last else 1
            found[name] = (shape[axis], axis)

        return record

    with torch.no_grad():
        backbone.probe({m: recorder(n) for n, m in backbone.body.named_modules() if isinstance(m, _ACTIVATIONS)})
    return found


def suppress(features: Tensor, controller: Tensor | float, channel_axis: int = 1) -> Tensor:
    """Cut each channel at a share of its own spatial maximum (section 3.1): Y = min(X, max(X) · controller).

    Args:
        features: activations, (B, D, H, W) or any layout with its channels on `channel_axis`.
        controller: share in (0, 1]; a number, or one for each image and channel, (B, D) with any axes of length 1.
    """
    positions, axis = _flatten(features, channel_axis)
    if isinstance(controller, Tensor) and controller.ndim:
        controller = controller.flatten(1).unsqueeze(axis)
    return _unflatten(_suppress(positions, controller, axis), axis, features.shape, channel_axis)


def _flatten(features: Tensor, channel_axis: int) -> tuple[Tensor, int]:
    """(B, D, positions) or (B, positions, D), whichever moves no channels in memory, and the axis of the positions."""
    if channel_axis == 1 and features.is_contiguous():
        return features.flatten(2), 2
    return features.movedim(channel_axis, -1).flatten(1, -2), 1


def _unflatten(positions: Tensor, axis: int, shape: torch.Size, channel_axis: int) -> Tensor:
    if axis == 2:
        return positions.view(shape)
    spatial = [*shape[1:channel_axis], *shape[channel_axis + 1 :]]
    return positions.unflatten(1, spatial).movedim(-1, channel_axis)


def _suppress(features: Tensor, controller: Tensor | float, axis: int) -> Tensor:
    if torch.is_grad_enabled() and features.requires_grad:
        return _Suppress.apply(features, controller, axis)
    return torch.clamp(features, max=_bound(features.amax(dim=axis, keepdim=True), controller))


def _bound(maximum: Tensor, controller: Tensor | float) -> Tensor:
    # A channel that is negative everywhere has nothing to suppress.
    return (maximum.clamp_min(0) * controller).to(maximum.dtype)


def _maximum(features: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """`features.max(dim=axis, keepdim=True)`; on a CPU by a pooling, ten times as fast for channels last."""
    if features.device.type != "cpu" or torch.compiler.is_compiling():  # a pooling's size would be fixed
        return features.max(dim=axis, keepdim=True)
    maps = features.movedim(axis, 2).unsqueeze(2)
    maximum, places = F.max_pool2d(maps, maps.shape[2:], return_indices=True)
    return maximum.squeeze(2).movedim(2, axis), places.squeeze(2).movedim(2, axis)


class _Suppress(torch.autograd.Function):
    """Suppression with a gradient that costs a few passes over the activations, where that of its parts takes dozens.

    What is cut gives its gradient to the controller and to the place of the maximum (the first, if there are several).
    Activations are (B, D, positions) or (B, positions, D), `axis` is that of the positions.
    """

    @staticmethod
    def forward(ctx, features: Tensor, controller: Tensor | float, axis: int) -> Tensor:
        maximum, places = _maximum(features, axis)
        bound = _bound(maximum, controller)
        suppressed = torch.clamp(features, max=bound)
        ctx.axis = axis
        ctx.share = None if isinstance(controller, Tensor) else controller
        ctx.save_for_backward(suppressed, bound, maximum, places, controller if ctx.share is None else None)
        return suppressed

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        suppressed, bound, maximum, places, controller = ctx.saved_tensors
        # The gradient where bound - suppressed > 0, in the place of that; masking it would take ten times as long.
        kept = bound - suppressed
        torch.ops.aten.threshold_backward.grad_input(gradient, kept, 0, grad_input=kept)
        cut = gradient.sum(dim=ctx.axis, keepdim=True) - kept.sum(dim=ctx.axis, keepdim=True)
        to_maximum = cut * (maximum >= 0) * (ctx.share if controller is None else controller)
        kept.scatter_add_(ctx.axis, places, to_maximum.to(kept.dtype))
        return kept, None if controller is None else cut * maximum.clamp_min(0), None


class Suppression(nn.Module):
    """DRS after one activation; with a `delta` it is fixed and has no parameters, without one it learns.

    The learnable controller is s = sigmoid(W · mean over positions), W (D, D) without bias, N(0, 0.01) (section 3.2).
    """

    def __init__(self, channels: int, channel_axis: int = 1, delta: float | None = None):
        super().__init__()
        self.active = True
        self.channel_axis = channel_axis
        self.delta = delta
        self.fc = nn.Linear(channels, channels, bias=False) if delta is None else None

    def forward(self, features: Tensor) -> Tensor:
        controller: Any = self.delta
        if self.fc is not None:
            positions, axis = _flatten(features, self.channel_axis)
            controller = torch.sigmoid(self.fc(positions.mean(dim=axis)))
        return suppress(features, controller, self.channel_axis)

    def hook(self, _module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return self(output) if self.active or not self.training else output


@register_method("drs", DrsConfig)
class Drs(Method):
    """Suppression modules after the chosen activations of a backbone. It has no losses and no maps of its own."""

    paper = (
        "Kim, Han and Kim, “Discriminative Region Suppression for Weakly-Supervised Semantic Segmentation”, AAAI 2021."
    )

    def __init__(self, config: DrsConfig, backbone: Backbone, num_classes: int):
        super().__init__(config, backbone, num_classes)
        activations = activation_outputs(backbone)
        if config.layers is None:
            # Kept in the configuration, so that a saved model does not depend on today's table.
            names = default_placement(backbone.body.config).choose(list(activations))
            self.config = dataclasses.replace(config, layers=names or [*activations] or ["*"])
        for pattern in self.config.layers:
            if not any(fnmatchcase(name, pattern) for name in activations):
                raise ValueError(_no_such_layer(pattern, list(activations)))
        self.layers = nn.ModuleDict()
        for name in Placement(tuple(self.config.layers)).choose(list(activations)):
            channels, axis = activations[name]
            suppression = Suppression(channels, axis, config.delta if config.mode == "fixed" else None)
            self.layers[name.replace(".", "/")] = suppression
            # A bound method, not a closure: deep copies of the model then hook their own copy.
            backbone.body.get_submodule(name).register_forward_hook(suppression.hook)

    @property
    def active(self) -> bool:
        return all(suppression.active for suppression in self.layers.values())

    @active.setter
    def active(self, active: bool):
        for suppression in self.layers.values():
            suppression.active = active  # type: ignore[assignment]


def _no_such_layer(pattern: str, names: list[str]) -> str:
    if not names:
        return f"drs.layers: expected activations of the backbone, which has none, got {pattern!r}"
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or [names[0], names[-1]]
    return (
        f"drs.layers: expected one of the backbone's {len(names)} activations, such as {either(near)}, got {pattern!r}"
    )
