"""What the patches of a plain vision transformer attend to."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.utils import logging

if TYPE_CHECKING:
    from .backbone import Backbone

logger = logging.get_logger(__name__)


class AttendedMaps(tuple):
    """The stage maps of a backbone whose attentions are shown, with these.

    Attributes:
        attentions: of the last layers, shallow to deep, (B, heads, N, N) each: the attention that a patch (third axis)
            pays to another (fourth axis), over the N = h·w positions of the map, row by row. A row sums to less than
            1: the rest goes to class and register tokens.
    """

    attentions: list[Tensor]


class PatchAttentions(nn.Module):
    """Keeps the attentions of the last layers while a backbone runs; its stage maps are [`AttendedMaps`] from then on.

    These layers get the eager implementation of attention, since sdpa and flash attention give no attentions; the
    other layers keep theirs.

    Args:
        backbone: of a plain vision transformer.
        layers: how many of its last layers.
        every_head: the attentions of each head, not the mean of all as that of one.

    Raises:
        ValueError: the backbone has fewer layers, or no attentions.
    """

    def __init__(self, backbone: Backbone, layers: int, every_head: bool = False):
        super().__init__()
        config = backbone.body.config
        if backbone.plain_vit is None:
            raise ValueError(f"attention: expected a plain vision transformer as backbone, got {config.model_type!r}")
        if layers > config.num_hidden_layers:
            depth = config.num_hidden_layers
            raise ValueError(f"attention.layers: expected at most {depth}, as the backbone has, got {layers}")
        # Whatever calls an attention function of transformers tells it whether it is causal.
        attending: list[Any] = [module for module in backbone.body.modules() if hasattr(module, "is_causal")][-layers:]
        if len(attending) < layers:
            raise ValueError(f"attention: expected a backbone that gives its attentions, got {config.model_type!r}")
        if config._attn_implementation != "eager":
            logger.warning_once(
                f"The last {layers} layers of the backbone {config.model_type!r} use the attention implementation "
                f"eager from now on: {config._attn_implementation} gives no attentions."
            )
        self.every_head = every_head
        self._seen: list[Tensor] | None = None
        # Bound methods, not closures: deep copies of the model then hook their own copy.
        for module in attending:
            module.config = copy(module.config)
            module.config._attn_implementation = "eager"
            module.register_forward_hook(self._see)
        backbone.register_forward_pre_hook(self._begin)
        backbone.register_forward_hook(self._end)

    def _begin(self, _backbone: nn.Module, _inputs: tuple) -> None:
        self._seen = []

    def _see(self, _module: nn.Module, _inputs: tuple, output: tuple) -> None:
        if self._seen is not None:  # a checkpointed layer runs again in the backward pass
            self._seen.append(output[1] if self.every_head else output[1].mean(dim=1, keepdim=True))

    def _end(self, _backbone: nn.Module, _inputs: tuple, output: tuple[Tensor, ...]) -> AttendedMaps:
        patches = output[-1].shape[-2] * output[-1].shape[-1]
        maps = AttendedMaps(output)
        maps.attentions = [seen[..., -patches:, -patches:] for seen in self._seen or ()]
        self._seen = None
        return maps
