"""Plain vision transformers (ViT, DeiT, BEiT, DINOv2 and 3, CLIP, SigLIP) as backbones: their layers are stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


class PlainVit(nn.Module):
    """Which layers of a plain vision transformer are the stages of its [`Backbone`], and which images it is shown.

    Args:
        config: of a network for which `fits` is true.
        layers: the stages, from 1, negative ones from the last; None takes four, evenly spaced (3, 6, 9 and 12 of 12);
            an empty list takes the last one alone.

    Attributes:
        layers: the stages, from 1, shallow to deep.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(self, config: PreTrainedConfig, layers: Sequence[int] | None):
        super().__init__()
        self.patch_size, self.depth = config.patch_size, config.num_hidden_layers
        self.has_embeddings = config.model_type != "timm_wrapper"  # among its hidden states
        depth = self.depth
        for layer in layers or ():
            if not 1 <= abs(layer) <= depth:
                raise ValueError(
                    f"backbone_layers: expected layers of this backbone (1 to {depth}, or {-depth} to -1), got {layer}"
                )
        if layers is None:
            layers = [-(-depth * quarter // 4) for quarter in (1, 2, 3, 4)]
        self.layers = sorted({layer % (depth + 1) for layer in layers})

    @staticmethod
    def fits(config: PreTrainedConfig) -> bool:
        """Whether it is the configuration of a plain vision transformer: one resolution, square patches."""
        names = ("num_hidden_layers", "num_attention_heads", "patch_size")
        return all(type(getattr(config, name, None)) is int for name in names)

    def stage_indices(self, count: int) -> list[int]:
        """Places of the stages among `count` hidden states: the embeddings, all layers, perhaps the last normed."""
        first = 1 if self.has_embeddings else 0
        return [count - 1 if layer == self.depth else first + layer - 1 for layer in self.layers or [self.depth]]

    def as_map(self, tokens: Tensor, image_size: torch.Size) -> Tensor:
        """(B, N, D) tokens, class and register tokens first, → the patches' (B, D, h, w); too few stay as they are."""
        height, width = (side // self.patch_size for side in image_size)
        if tokens.shape[1] < height * width:
            return tokens
        return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, H, W) at the nearest size in whole patches: the network leaves out the pixels of part of one,
        and the map would not cover the image.
        """
        size = tuple(pixel_values.shape[-2:])
        patch = self.patch_size
        whole = tuple(max(1, (2 * side + patch - 1) // (2 * patch)) * patch for side in size)
        is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # not in torch 2.6
        if not is_exporting() and size == whole:  # a program for images of any size knows none
            return pixel_values
        return F.interpolate(pixel_values, size=whole, mode="bilinear", align_corners=False)
