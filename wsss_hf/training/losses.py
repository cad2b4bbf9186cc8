"""Losses of segmenters that learn from labels of which some are wrong."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.maps import IGNORE_INDEX
from ..recipes import RecipeError
from .optimizer import enable_checkpointing

PixelLoss = Callable[..., Tensor]


def cross_entropy(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """−log p of the label."""
    return F.nll_loss(log_probabilities, labels, ignore_index=IGNORE_INDEX, reduction="none")


def symmetric_cross_entropy(
    log_probabilities: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 1.0, log_zero: float = -4.0
) -> Tensor:
    """`alpha` × cross-entropy + `beta` × reverse cross-entropy, −Σ p log q with log 0 = `log_zero`.

    Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019, equations 5 and 6. With
    one-hot labels the reverse part is −log_zero · (1 − p of the label): it is bounded, so a wrong label can't pull
    without end.
    """
    forward = cross_entropy(log_probabilities, labels)
    return alpha * forward + beta * -log_zero * (1 - (-forward).exp())


def bootstrapped_cross_entropy(log_probabilities: Tensor, labels: Tensor, beta: float = 0.8) -> Tensor:
    """Cross-entropy against `beta` × label + (1 − `beta`) × what the model itself says most likely.

    Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping", ICLR 2015 workshop, equation 7.
    """
    own = -log_probabilities.amax(dim=1) * (labels != IGNORE_INDEX)
    return beta * cross_entropy(log_probabilities, labels) + (1 - beta) * own


LOSSES: dict[str, PixelLoss] = {
    "cross_entropy": cross_entropy,
    "symmetric": symmetric_cross_entropy,
    "bootstrapped": bootstrapped_cross_entropy,
}


def build_loss(name: str, options: dict | None = None) -> PixelLoss:
    """The loss of that name with its options bound: (log_probabilities (B, C+1, H, W), labels (B, H, W)) → (B, H, W).

    Raises:
        RecipeError: no such loss, or no such option.
    """
    if name not in LOSSES:
        raise RecipeError(f"segmenter.loss: {name!r}; {', '.join(LOSSES)} would be right")
    known = list(inspect.signature(LOSSES[name]).parameters)[2:]
    for option in options or {}:
        if option not in known:
            raise RecipeError(
                f"segmenter.loss_options.{option}: no such option; {name} has {', '.join(known) or 'none'}"
            )
    return functools.partial(LOSSES[name], **(options or {}))


class SegmentationObjective(nn.Module):
    """What a segmenter learns: a loss of its logits against label maps, pixel by pixel.

    Works for every model with `logits` (B, C+1, h, w); where these are the maximum over scales, the loss is summed
    over the maximum and the scales.

    Args:
        model: the segmenter.
        loss: what `build_loss` gives.
        new_parameters: names of the model's parameters that start from random values; None: all but the backbone's.
        weigh: each pixel counts as much as its confidence, where confidence is given.
        min_confidence: pixels with less confidence than this count nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: PixelLoss,
        new_parameters: set[str] | None = None,
        weigh: bool = True,
        min_confidence: float = 0.0,
    ):
        super().__init__()
        self.model = model
        self.loss = loss
        self.weigh, self.min_confidence = weigh, min_confidence
        names = [name for name, _ in model.named_parameters()]
        if new_parameters is None:
            new_parameters = {name for name in names if not name.startswith("backbone.")}
        self.new_parameters = {f"model.{name}" for name in names if name in new_parameters}

    def forward(
        self, pixel_values: Tensor, labels: Tensor, confidence: Tensor | None = None, tags: Tensor | None = None
    ) -> ModelOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) normalised images.
            labels: (B, H, W) int64, 255 is ignored.
            confidence: (B, H, W) float in [0, 1]; None trusts all alike.
            tags: not used; examples have them.

        Returns:
            `loss`, the weighted mean over the pixels that are not ignored; 0 where there is none.
        """
        weights = (labels != IGNORE_INDEX).float()
        if confidence is not None:
            weights = weights * (confidence >= self.min_confidence)
            weights = weights * confidence if self.weigh else weights
        output = self.model(pixel_values)
        views = (output.logits, *(getattr(output, "scale_logits", None) or ()))
        return ModelOutput(loss=sum(self._mean(logits, labels, weights) for logits in views))

    def _mean(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        loss = self.loss(logits.log_softmax(dim=1), labels) * weights
        # A batch that is ignored everywhere teaches nothing; the plain mean would be 0 / 0.
        return loss.sum() / weights.sum().clamp_min(1)

    def activation_checkpointing_enable(self) -> None:
        """Compute the model's activations anew in the backward pass instead of keeping them."""
        enable_checkpointing(self.model)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save the segmenter; the loss stays here."""
        self.model.save_pretrained(save_directory, **kwargs)
