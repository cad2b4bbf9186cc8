"""Heads of the DeepLab family: stage maps of a backbone in, class logits out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOW_LEVEL_STRIDE = 4


class DeepLabV1Head(nn.Sequential):
    """One dilated 3×3 convolution with a large field of view and a 1×1 one on the deepest map, then dropout.

    Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", ICLR 2015,
    section 3.1, with the widths and batch norms of SEAM's segmenter.

    Args:
        channels, strides, num_labels: as of [`DeepLabV2Head`].
        rates: its dilation.

    Raises:
        ValueError: there is not one rate.
    """

    default_rates = (12,)

    def __init__(self, channels: list[int], strides: list[int], num_labels: int, rates: list[int], width: int = 512):
        if len(rates) != 1:
            raise ValueError(f"rates: expected one for deeplab_v1, got {rates}")
        super().__init__(
            _convolution(channels[-1], width, 3, dilation=rates[0]),
            _convolution(width, width, 1),
            nn.Dropout(0.5),
            nn.Conv2d(width, num_labels, kernel_size=1),
        )

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """Stage maps (B, D_i, h_i, w_i) → logits (B, C+1, h, w) at the deepest stage's size."""
        return super().forward(features[-1])


class DeepLabV2Head(nn.Sequential):
    """Parallel dilated 3×3 convolutions on the deepest map, summed.

    Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
    Connected CRFs", TPAMI 2018, section 3.2.

    Args:
        channels: channels of the backbone's stages, shallow to deep.
        strides: their strides.
        num_labels: classes and background.
        rates: dilations; the paper takes 6 12 18 24.
    """

    default_rates = (6, 12, 18, 24)

    def __init__(self, channels: list[int], strides: list[int], num_labels: int, rates: list[int]):
        # Side by side all the same: a ModuleList is what PEFT can't wrap.
        super().__init__(
            *(nn.Conv2d(channels[-1], num_labels, kernel_size=3, padding=rate, dilation=rate) for rate in rates)
        )

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """Stage maps (B, D_i, h_i, w_i) → logits (B, C+1, h, w) at the deepest stage's size."""
        return sum(convolution(features[-1]) for convolution in self)


class DeepLabV3PlusHead(nn.Module):
    """Atrous spatial pyramid pooling with image pooling, and a decoder that skips to a low-level map.

    Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018,
    section 3.1, with plain instead of separable convolutions, as for its ResNets.

    Args:
        channels: channels of the backbone's stages, shallow to deep.
        strides: their strides; the low-level map is that of the stride nearest to 4.
        num_labels: classes and background.
        rates: dilations of the pyramid; the paper takes 6 12 18 at output stride 16, twice these at 8.
    """

    default_rates = (6, 12, 18)

    def __init__(
        self,
        channels: list[int],
        strides: list[int],
        num_labels: int,
        rates: list[int],
        width: int = 256,
        low_level_width: int = 48,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.low_level_stage = min(range(len(strides)), key=lambda i: abs(strides[i] - LOW_LEVEL_STRIDE))
        deep = channels[-1]
        self.pyramid = nn.ModuleList(
            [_convolution(deep, width, 1), *(_convolution(deep, width, 3, dilation=rate) for rate in rates)]
        )
        self.image_pooling = nn.Conv2d(deep, width, kernel_size=1, bias=False)
        self.image_pooling_norm = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        self.projection = _convolution((len(rates) + 2) * width, width, 1)
        self.low_level = _convolution(channels[self.low_level_stage], low_level_width, 1)
        self.decoder = nn.Sequential(_convolution(width + low_level_width, width, 3), _convolution(width, width, 3))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(width, num_labels, kernel_size=1)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """Stage maps (B, D_i, h_i, w_i) → logits (B, C+1, h, w) at the low-level stage's size."""
        deep, shallow = features[-1], self.low_level(features[self.low_level_stage])
        # Spread out before its norm: batch statistics of a single image would otherwise be those of one pixel.
        pooled = self.image_pooling(deep.mean(dim=(-2, -1), keepdim=True)).expand(-1, -1, *deep.shape[-2:])
        maps = torch.cat([*(branch(deep) for branch in self.pyramid), self.image_pooling_norm(pooled)], dim=1)
        maps = F.interpolate(self.projection(maps), size=shallow.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.dropout(self.decoder(torch.cat([maps, shallow], dim=1))))


def _convolution(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


HEADS: dict[str, Any] = {
    "deeplab_v1": DeepLabV1Head,
    "deeplab_v2": DeepLabV2Head,
    "deeplab_v3_plus": DeepLabV3PlusHead,
}
