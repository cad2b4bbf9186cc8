"""Saliency without any mask: normalised cut on the features of a backbone.

TokenCut (Wang et al., "Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut", CVPR
2022) and Deep Spectral Methods (Melas-Kyriazi et al., CVPR 2022): an image is a graph of its patches, whose edges say
how alike their features are. Cutting it in two where the edges are weakest separates object and background.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from ..data.batches import batches_by_size
from ..models.backbone import Backbone
from ..models.image_processing_wsss import WsssImageProcessor
from ..models.options import Options, option
from ..models.pamr import refine_pictures
from ..models.pictures import LONGEST
from ..models.pretrained import NO_CODE, backbone_normalization, pinned, pretrained_body, resolve_backbone_config
from ..settings import speed
from .source import SaliencyError, SaliencySource

_WEAK_EDGE = 1e-5  # keeps the graph connected
_ROUNDING = 1e-10  # of eigenvalues, which are at most 1


@dataclass
class SpectralSettings(Options):
    """How a backbone's features become saliency."""

    size: int = option(224, "Short side of the image that the backbone sees, in pixels.", at_least=1)
    output_stride: int | None = option(16, "Of a convolutional backbone, in pixels; null keeps its own.", at_least=2)
    stage: int = option(-1, "Whose features are cut: 0 is the first, -1 the last.")
    tau: float = option(
        0.2, "Patches whose cosine is above it have an edge of 1, others of 1e-5.", at_least=-1, below=1
    )
    center: bool | None = option(None, "Subtract the image's mean feature; null: of convolutional backbones.")
    refine: bool = option(False, "Let the map follow the image's colours (PAMR).")
    batch_size: int = speed(8, "Images that are cut together.", at_least=1)


def feature_affinity(features: Tensor, tau: float = 0.2, center: bool = False) -> Tensor:
    """TokenCut's graph: 1 between patches whose cosine is above `tau`, else 1e-5 (equation 3).

    Args:
        features: (B, D, h, w).
        center: subtract the mean feature of each image before: after a ReLU all features point the same way, and
            their cosines say little.

    Returns:
        (B, N, N) float64, N = h w in rows.
    """
    tokens = features.flatten(2).double()
    if center:
        tokens = tokens - tokens.mean(dim=2, keepdim=True)
    tokens = F.normalize(tokens, dim=1)
    cosine = tokens.transpose(1, 2) @ tokens
    return (cosine > tau).to(cosine).clamp(min=_WEAK_EDGE)


def second_eigenvector(affinity: Tensor) -> Tensor:
    """The second smallest generalised eigenvector of (D - W) x = λ D x, the relaxed normalised cut (Shi & Malik 2000).

    With x = D^(-1/2) y it is the ordinary eigenvector y, with the second largest eigenvalue 1 - λ, of
    D^(-1/2) W D^(-1/2).

    Args:
        affinity: (B, N, N) W, symmetric and positive; N >= 3.

    Returns:
        (B, N) with x' D x = 1, of either sign; zeros where it is not unique, as in an image of one colour.
    """
    scale = affinity.sum(dim=2).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, :, None] * affinity * scale[:, None, :])
    is_unique = values[:, -2] - values[:, -3] > _ROUNDING
    return vectors[:, :, -2] * scale * is_unique[:, None]


def orient(vector: Tensor) -> Tensor:
    """Let the foreground have the values above the mean.

    The foreground is the side that holds the entry of largest absolute value, unless it holds three or four corners of
    the image (TokenCut); whichever sign the vector has, the side is the same.

    Args:
        vector: (h, w).
    """
    mean = vector.mean()
    peak = vector.flatten()[vector.abs().argmax()]
    if peak < mean:
        vector, mean = -vector, -mean
    corners = vector[[0, 0, -1, -1], [0, -1, 0, -1]]
    return -vector if (corners > mean).sum() >= 3 else vector


def soft_map(vector: Tensor) -> Tensor:
    """(h, w) oriented vector → [0, 1]: its least value 0, its mean, where TokenCut cuts, 0.5, its greatest 1.

    A vector that is constant is 0 everywhere.
    """
    centred = vector - vector.mean()
    low, high = -centred.min(), centred.max()
    if not (low > 0 and high > 0):
        return torch.zeros_like(vector)
    return 0.5 + 0.5 * torch.where(centred > 0, centred / high, centred / low)


class SpectralSource(SaliencySource):
    """Normalised cut on the features of a backbone.

    Args:
        name: directory or Hub id (`owner/name@revision`) of any backbone that the package takes.

    Raises:
        SaliencyError, OSError: there is none.
    """

    settings: SpectralSettings

    def __init__(self, name: str, settings: SpectralSettings):
        self.name, self.settings = name, settings
        self.learnt_from = f"no masks: normalised cut on the features of {name}"
        self._repository, self._revision = pinned(name, NO_CODE)
        try:
            self._config = resolve_backbone_config(self._repository, None, **self._revision)
        except OSError as error:  # transformers does not name what it looked for in vain offline
            reason = str(error).splitlines()[0]
            raise SaliencyError(f"spectral: expected a backbone's folder or Hub id, got {name} ({reason})") from error

    def prepare(self, rows: Dataset, device: torch.device) -> None:
        backbone = Backbone(self._config, self.settings.output_stride)
        body = pretrained_body(str(self._repository), self._config, **self._revision)
        backbone.body.load_state_dict(body.state_dict())
        stages = len(backbone.channels)
        if not -stages <= self.settings.stage < stages:
            raise SaliencyError(f"stage: expected {-stages} to {stages - 1}, got {self.settings.stage}")
        self._backbone, self._device = backbone.to(device).eval(), device
        is_convolutional = getattr(self._config, "num_attention_heads", None) is None
        self._center = is_convolutional if self.settings.center is None else self.settings.center
        mean, std = backbone_normalization(str(self._repository), self._config, **self._revision)
        size = {"shortest_edge": self.settings.size, "longest_edge": LONGEST * self.settings.size}
        self._processor = WsssImageProcessor(size=size, image_mean=mean, image_std=std)

    @torch.inference_mode()
    def maps(self, rows: Dataset) -> Iterator[tuple[int, np.ndarray]]:
        for batch in batches_by_size(rows, self._processor, self.settings.batch_size):
            found = self._cut(batch.pixel_values.to(self._device), batch.size)
            if self.settings.refine:
                pictures = torch.stack([torch.from_numpy(np.array(image)) for image in batch.images])
                found = refine_pictures(pictures, found[:, None])[:, 0]
            yield from zip(batch.indices, found.cpu().numpy(), strict=True)

    def _cut(self, pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
        """Images (B, 3, h, w) → maps (B, H, W) float32."""
        features = self._backbone(pixel_values)[self.settings.stage]
        vectors = second_eigenvector(feature_affinity(features, self.settings.tau, self._center))
        maps = torch.stack([soft_map(orient(vector.view(features.shape[-2:]))) for vector in vectors])
        return F.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
