"""DRS: suppress the most discriminative activations, so that attention spreads over the object.

Kim, Han and Kim, "Discriminative Region Suppression for Weakly-Supervised Semantic Segmentation", AAAI 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .methods import Method, register_method


@dataclass
class DrsConfig:
    """Options of DRS.

    Attributes:
        mode: "learnable" (a controller per image and channel) or "fixed" (one `delta` for all).
        delta: share of its maximum that a channel may keep in fixed mode, in (0, 1].
        layers: names of the backbone's activation functions to suppress after, as shell patterns; "*" is all of them,
            the paper's placement.
    """

    mode: str = "learnable"
    delta: float = 0.55
    layers: list[str] = field(default_factory=lambda: ["*"])

    def __post_init__(self):
        if self.mode not in ("learnable", "fixed"):
            raise ValueError(f"drs.mode={self.mode!r}: 'learnable' or 'fixed' would be right")
        if not isinstance(self.delta, int | float) or not 0 < self.delta <= 1:
            raise ValueError(f"drs.delta={self.delta!r}: a number in (0, 1] would be right")
        if not isinstance(self.layers, list | tuple) or not self.layers:
            raise ValueError(f"drs.layers={self.layers!r}: a list of names or patterns would be right, such as ['*']")


def suppress(features: Tensor, controller: Tensor | float, channel_axis: int = 1) -> Tensor:
    """Cut each channel at a share of its own spatial maximum (section 3.1): Y = min(X, max(X) · controller).

    Args:
        features: activations, (B, D, H, W) or any layout with its channels on `channel_axis`.
        controller: share in (0, 1]; a number, or a tensor that broadcasts against `features`.
    """
    axes = _spatial_axes(features, channel_axis)
    # A channel that is negative everywhere has nothing to suppress.
    maximum = features.amax(dim=axes, keepdim=True).clamp_min(0)
    return torch.minimum(features, maximum * controller)


def _spatial_axes(features: Tensor, channel_axis: int) -> list[int]:
    return [axis for axis in range(1, features.ndim) if axis != channel_axis]


class Suppression(nn.Module):
    """DRS after one activation; with a `delta` it is fixed and has no parameters, without one it learns.

    The learnable controller is s = sigmoid(W · mean over positions), W (D, D) without bias, N(0, 0.01) (section 3.2).
    """

    def __init__(self, channels: int, channel_axis: int = 1, delta: float | None = None):
        super().__init__()
        self.channel_axis = channel_axis
        self.delta = delta
        self.fc = nn.Linear(channels, channels, bias=False) if delta is None else None

    def forward(self, features: Tensor) -> Tensor:
        if self.fc is None:
            return suppress(features, self.delta, self.channel_axis)
        axes = _spatial_axes(features, self.channel_axis)
        controller = torch.sigmoid(self.fc(features.mean(dim=axes)))
        shape = [1] * features.ndim
        shape[0], shape[self.channel_axis] = controller.shape
        return suppress(features, controller.view(shape), self.channel_axis)

    def hook(self, _module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return self(output)


@register_method("drs", DrsConfig)
class Drs(Method):
    """Suppression modules after the chosen activations of a backbone. It has no losses and no maps of its own."""

    def __init__(self, config: DrsConfig, backbone: nn.Module, num_classes: int):
        super().__init__(config, backbone, num_classes)
        activations = backbone.activations()
        for pattern in config.layers:
            if not any(fnmatchcase(name, pattern) for name in activations):
                known = ", ".join(activations) or "none"
                raise ValueError(f"drs.layers: no activation of the backbone is named {pattern!r}; it has: {known}")
        self.layers = nn.ModuleDict()
        for name, (channels, axis) in activations.items():
            if any(fnmatchcase(name, pattern) for pattern in config.layers):
                suppression = Suppression(channels, axis, config.delta if config.mode == "fixed" else None)
                self.layers[name.replace(".", "/")] = suppression
                # A bound method, not a closure: deep copies of the model then hook their own copy.
                backbone.body.get_submodule(name).register_forward_hook(suppression.hook)
