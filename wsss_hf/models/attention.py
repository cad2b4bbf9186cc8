"""Attention affinity: the CAM of a vision transformer, spread over the patches that attend to each other.

CLIP-ES (Lin et al., "CLIP is Also an Efficient Segmenter: A Text-Driven Approach for Weakly Supervised Semantic
Segmentation", CVPR 2023), section "Class-aware attention-based affinity", here on any classifier's CAM: the map is
Aᵗ · vec(CAM), A = (D + Dᵀ) / 2, D the mean attention of the last layers, doubly normalised. Nothing is trained.
With `learn_heads` the mean is weighted: WeakTr (Zhu et al., "WeakTr: Exploring Plain Vision Transformer for
Weakly-supervised Semantic Segmentation", 2023), section "Adaptive attention fusion module".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method_helpers import Float32Linear
from .methods import Method, TrainingStep, register_method
from .options import Options, option
from .patch_attentions import PatchAttentions

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass
class AttentionConfig(Options):
    """Options of the attention affinity; the defaults are those of CLIP-ES's released program."""

    layers: int | None = option(
        None,
        "How many of the last layers give their attentions; null takes two thirds, 8 of 12. In training each of them "
        "keeps heads · patches² numbers for an image, unless the backbone is frozen.",
        at_least=1,
    )
    rounds: int = option(3, "Normalisations of the affinity's columns, then of its rows.", at_least=1)
    power: int = option(2, "How often the affinity is applied to the CAM.", at_least=1)
    learn_heads: bool = option(False, "Learn from the tags how much each head counts in an image (WeakTr).")
    reduction: int = option(4, "Heads of all layers, over hidden units of the network that weighs them.", at_least=1)
    weight: float = option(1.0, "Weight of the classification loss that the heads' weights learn from.", at_least=0)


def doubly_normalize(affinity: Tensor, rounds: int = 3, eps: float = 1e-12) -> Tensor:
    """Sinkhorn's normalisation, made symmetric: A = (D + Dᵀ) / 2 (CLIP-ES).

    Args:
        affinity: (B, N, N), non-negative.
        rounds: how often the columns, then the rows are divided by their sums; D is what they lead to, a matrix whose
            rows and columns sum to 1.

    Returns:
        (B, N, N) float32.
    """
    affinity = affinity.float()
    for _ in range(rounds):
        affinity = affinity / affinity.sum(dim=1, keepdim=True).clamp(min=eps)
        affinity = affinity / affinity.sum(dim=2, keepdim=True).clamp(min=eps)
    return (affinity + affinity.transpose(1, 2)) / 2


def spread(maps: Tensor, affinity: Tensor, times: int = 1) -> Tensor:
    """Each position becomes the sum of all positions, weighted by its affinity to them: vec(M) ← Aᵗ · vec(M).

    CLIP-ES also leaves out what lies outside of boxes around the strong parts of the CAM, which is not done here.

    Args:
        maps: (B, C, h, w).
        affinity: (B, N, N) with N = h·w; row i holds the affinities of position i.
        times: the power t; A is applied t times, which takes t · N² · C steps, a power of A would take N³.

    Returns:
        (B, C, h, w) float32.
    """
    vectors = maps.float().flatten(2).transpose(1, 2)
    for _ in range(times):
        vectors = affinity @ vectors
    return vectors.transpose(1, 2).unflatten(2, maps.shape[-2:])


def fuse_heads(attentions: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """The mean of the attentions of all heads of all layers, each times its weight.

    Args:
        attentions: of each layer, (B, heads, N, N).
        weights: (B, layers · heads), the heads of the first layer first; None is 1 for each.

    Returns:
        (B, N, N) float32.
    """
    fused = torch.zeros((), device=attentions[0].device)
    every = len(attentions) * attentions[0].shape[1]
    for layer, heads in enumerate(attentions):
        if weights is None:
            fused = fused + heads.float().sum(dim=1)
        else:
            chosen = weights[:, layer * heads.shape[1] : (layer + 1) * heads.shape[1]]
            fused = fused + torch.einsum("bk,bkij->bij", chosen.float(), heads.float())
    return fused / every


class HeadWeights(nn.Module):
    """How much each head counts in an image: K shares → K/r, relu → K, sigmoid; without biases (WeakTr).

    A head's share is the attention that its patches pay to patches, not to class and register tokens, in the mean. The
    released program takes the mean over all tokens, which is the same for all heads.

    Args:
        heads: K, of all layers.
        reduction: r.
    """

    def __init__(self, heads: int, reduction: int):
        super().__init__()
        hidden = max(1, heads // reduction)
        self.layers = nn.Sequential(
            Float32Linear(heads, hidden, bias=False),
            nn.ReLU(),
            Float32Linear(hidden, heads, bias=False),
            nn.Sigmoid(),
        )

    def reset_parameters(self):
        layer: Any
        for layer in (self.layers[0], self.layers[2]):
            layer.reset_parameters()

    def forward(self, attentions: Sequence[Tensor]) -> Tensor:
        """Of each layer (B, heads, N, N) → weights (B, layers · heads) in (0, 1)."""
        shares = torch.cat([heads.float().sum(dim=3).mean(dim=2) for heads in attentions], dim=1)
        return self.layers(shares)


@register_method("attention", AttentionConfig)
class AttentionAffinity(Method):
    """Maps that attention has spread, on any plain vision transformer.

    Without learnt weights it has no losses. With them it has one, which trains these weights and nothing else: the
    positive CAM, spread once by the fused attention, must give the tags (WeakTr). The Sinkhorn
    normalisation has no part in it, for it keeps the mean of a map, which is the logit, whatever the weights are.
    """

    paper = (
        "Lin et al., “CLIP is Also an Efficient Segmenter: A Text-Driven Approach for Weakly Supervised Semantic "
        "Segmentation”, CVPR 2023; Zhu et al., “WeakTr: Exploring Plain Vision Transformer for Weakly-supervised "
        "Semantic Segmentation”, 2023."
    )

    def __init__(self, config: AttentionConfig, backbone: Backbone, num_classes: int):
        super().__init__(config, backbone, num_classes)
        layers = config.layers or -(-2 * getattr(backbone.body.config, "num_hidden_layers", 1) // 3)
        self.config = dataclasses.replace(config, layers=layers)
        self.attentions = PatchAttentions(backbone, layers, every_head=config.learn_heads)
        heads = layers * backbone.body.config.num_attention_heads
        self.head_weights = HeadWeights(heads, config.reduction) if config.learn_heads else None
        self.stages_suffice = not config.learn_heads

    def reset_parameters(self):
        if self.head_weights is not None:
            self.head_weights.reset_parameters()

    def fused(self, features: Any) -> Tensor:
        """(B, N, N) float32 attention from patch to patch, the mean of all heads; a gradient to their weights only."""
        attentions = [heads.detach() for heads in features.attentions]
        return fuse_heads(attentions, None if self.head_weights is None else self.head_weights(attentions))

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        if self.head_weights is None:
            return {}
        fused = self.fused(step.features)
        with torch.autocast(fused.device.type, enabled=False):
            logits = spread(step.cams.detach().relu(), fused).mean(dim=(2, 3))
            loss = F.multilabel_soft_margin_loss(logits, step.tags.float())
        return {"attention_classification": self.config.weight * loss}

    def maps(self, step: TrainingStep) -> Tensor:
        """(B, C, h, w) float32, non-negative: the positive CAM, spread by the doubly normalised attention."""
        fused = self.fused(step.features)
        with torch.autocast(fused.device.type, enabled=False):
            affinity = doubly_normalize(fused, self.config.rounds)
            return spread(step.cams.relu(), affinity, self.config.power)
