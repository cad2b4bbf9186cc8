"""Pictures of what a model in training says about a few of its images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ..models.label_colors import overlay


class MapPictures:
    """Calling it with a model gives the first training images, each with the model's label map for its tags drawn on
    it.

    The model is one with `segmentation_scores`, any segmenter, or a training objective that holds one as `model`. It
    is left in evaluation mode. The images and their crops are the same at every call.

    Args:
        examples: [`TaggedExamples`] or [`StreamedExamples`].
        image_mean, image_std, blue_first: how `pixel_values` came about.
        count: of images.
    """

    def __init__(
        self,
        examples: Any,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        blue_first: bool = False,
        count: int = 4,
    ):
        self.examples, self.count, self.blue_first = examples, count, blue_first
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (image_mean, image_std))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, np.ndarray]:
        """{"maps": (N, H, W, 3) uint8}."""
        model.eval()
        weight = next(model.parameters())
        pixel_values, tags = (torch.stack([e[name] for e in self._chosen]) for name in ("pixel_values", "tags"))
        size = tuple(pixel_values.shape[-2:])
        outputs = model(pixel_values=pixel_values.to(weight.device, weight.dtype))
        network: Any = getattr(model, "model", model)
        if hasattr(network, "segmentation_scores"):
            scores = network.segmentation_scores(outputs, size, tags.to(weight.device))
        else:
            scores = F.interpolate(outputs.logits.float(), size=size, mode="bilinear", align_corners=False)
        labels = scores.argmax(dim=1).to(torch.uint8).cpu().numpy()
        images = (pixel_values * self.std + self.mean).clamp(0, 1).mul(255).round().to(torch.uint8)
        images = images.flip(1) if self.blue_first else images
        drawn = [
            np.asarray(overlay(Image.fromarray(image.permute(1, 2, 0).numpy()), mask))
            for image, mask in zip(images, labels, strict=True)
        ]
        return {"maps": np.stack(drawn)}

    @cached_property
    def _chosen(self) -> list[dict[str, torch.Tensor]]:
        """Read in the process that shows them, when it does."""
        return self.examples.first(self.count)
