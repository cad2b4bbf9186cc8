"""Losses for label maps of which some labels are wrong, and the training objective of segmenters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.maps import IGNORE_INDEX
from ..models.options import OptionError, Options, option, unknown_name
from .build import enable_checkpointing


class PixelLoss(Options):
    """A loss of each pixel; its fields are the loss's options."""

    @abstractmethod
    def __call__(self, log_probabilities: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            log_probabilities: (B, C+1, H, W).
            labels: (B, H, W) int64, 255 is ignored.

        Returns:
            (B, H, W), 0 at ignored pixels.
        """


@dataclass
class CrossEntropy(PixelLoss):
    """−log p of the label."""

    def __call__(self, log_probabilities: Tensor, labels: Tensor) -> Tensor:
        return F.nll_loss(log_probabilities, labels, ignore_index=IGNORE_INDEX, reduction="none")


@dataclass
class SymmetricCrossEntropy(PixelLoss):
    """`alpha` × cross-entropy + `beta` × reverse cross-entropy, −Σ p log q with log 0 = `log_zero`.

    Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019, equations 5 and 6. With
    one-hot labels the reverse part is −log_zero · (1 − p of the label): it is bounded, and so is the effect of a wrong
    label.
    """

    alpha: float = option(1.0, "Weight of the cross-entropy.", at_least=0)
    beta: float = option(1.0, "Weight of the reverse cross-entropy.", at_least=0)
    log_zero: float = option(-4.0, "What log 0 counts as.", below=0)

    def __call__(self, log_probabilities: Tensor, labels: Tensor) -> Tensor:
        forward = CrossEntropy()(log_probabilities, labels)
        return self.alpha * forward + self.beta * -self.log_zero * (1 - (-forward).exp())


@dataclass
class BootstrappedCrossEntropy(PixelLoss):
    """Cross-entropy against `beta` × label + (1 − `beta`) × the label that the model itself finds most likely.

    Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping", ICLR 2015 workshop, equation 7.
    """

    beta: float = option(0.8, "Weight of the given label.", at_least=0, at_most=1)

    def __call__(self, log_probabilities: Tensor, labels: Tensor) -> Tensor:
        own = -log_probabilities.amax(dim=1) * (labels != IGNORE_INDEX)
        return self.beta * CrossEntropy()(log_probabilities, labels) + (1 - self.beta) * own


LOSSES: dict[str, type[PixelLoss]] = {
    "cross_entropy": CrossEntropy,
    "symmetric": SymmetricCrossEntropy,
    "bootstrapped": BootstrappedCrossEntropy,
}


def build_loss(name: str, options: Mapping | None = None, where: str = "segmenter") -> PixelLoss:
    """The loss of that name.

    Args:
        options: its fields.
        where: the recipe's section; begins the messages.

    Raises:
        OptionError: no such loss or option, or an unfit value.
    """
    if name not in LOSSES:
        raise OptionError(unknown_name(f"{where}.loss: {name!r}", name, LOSSES))
    return LOSSES[name].from_dict(options, f"{where}.loss_options")


class SegmentationObjective(nn.Module):
    """The training objective of a segmenter: a loss of its logits against label maps, pixel by pixel.

    Works for every model with `logits` (B, C+1, h, w); where these are the maximum over scales, the loss is summed
    over the maximum and the scales.

    Args:
        model: the segmenter.
        loss: what `build_loss` gives.
        new_parameters: names of the model's parameters that start from random values; None: all but the backbone's.
        weigh: multiply the loss of each pixel by its confidence, where that is given.
        min_confidence: pixels with less confidence are ignored.
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
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        confidence: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> ModelOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) normalised images.
            labels: (B, H, W) int64, 255 is ignored.
            confidence: (B, H, W) float in [0, 1]; None weighs all alike.
            tags: not used; examples have them.

        Returns:
            `loss`, the weighted mean over the pixels that are not ignored, 0 where there is none; `weight`, the mean
            weight of all pixels, by which the loss counts beside those of other images. Without labels, what the
            segmenter gives.
        """
        if labels is None:
            return self.model(pixel_values)
        weights = (labels != IGNORE_INDEX).float()
        if confidence is not None:
            weights = weights * (confidence >= self.min_confidence)
            weights = weights * confidence if self.weigh else weights
        output = self.model(pixel_values)
        views = (output.logits, *(getattr(output, "scale_logits", None) or ()))
        loss = sum(self._mean(logits, labels, weights) for logits in views)
        return ModelOutput(loss=loss, weight=weights.mean())

    def _mean(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        loss = self.loss(logits.log_softmax(dim=1), labels) * weights
        # 0 where the whole batch is ignored; the plain mean would be 0 / 0.
        return loss.sum() / weights.sum().clamp_min(1)

    def activation_checkpointing_enable(self) -> None:
        """Compute the model's activations anew in the backward pass instead of keeping them."""
        enable_checkpointing(self.model)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save the segmenter alone."""
        self.model.save_pretrained(save_directory, **kwargs)
