"""Segmenter: a DeepLab head on any backbone, trained on pseudo masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone import Backbone
from .configuration_segmenter import SegmenterConfig
from .deeplab import HEADS
from .maps import IGNORE_INDEX
from .portable_model import PortableModel
from .probabilities import class_probabilities, mean_probabilities


@dataclass
class SegmenterOutput(SemanticSegmenterOutput):
    """Output of [`Segmenter`]: that of every semantic segmenter, and what a loss on several scales needs.

    Attributes:
        scale_logits: with several `input_scales`, the logits (B, C+1, h, w) of each, all at the size of `logits`, of
            which they are the sources.
    """

    scale_logits: tuple[Tensor, ...] | None = None


class Segmenter(PortableModel):
    """A DeepLab head on the stage maps of any backbone; see `deeplab.py` for the heads.

    With several `config.input_scales` the logits are their maximum over the scales, in training and afterwards, and
    the loss is summed over the maximum and the scales (DeepLab v2, section 4.3).
    """

    config_class = SegmenterConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    auto_classes = ("AutoModel", "AutoModelForSemanticSegmentation")

    def __init__(self, config: SegmenterConfig):
        super().__init__(config)
        self.backbone = Backbone(config.backbone_config, config.output_stride)
        self.head = HEADS[config.head](
            self.backbone.channels, self.backbone.strides, config.num_labels, rates=config.rates
        )
        self.post_init()

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self):
        super().initialize_weights()
        # N(0, 0.01) is right for layers that give logits, too flat for those below a batch norm.
        for module in self.head.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SegmenterOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) normalised images.
            labels: (B, H, W) int64 label maps, 255 is ignored; gives a loss.

        Returns:
            `logits` (B, C+1, h, w) at the head's stride, background at channel 0, and `loss`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        features = self.backbone(pixel_values)
        logits = self.head(features)
        scale_logits = None
        if self.config.input_scales != [1.0]:
            scale_logits = tuple(self._at_scale(pixel_values, scale, logits) for scale in self.config.input_scales)
            logits = torch.stack(scale_logits).amax(dim=0)
        loss = None
        if labels is not None:
            loss = pixel_cross_entropy(logits, labels)
            for view in scale_logits or ():
                loss = loss + pixel_cross_entropy(view, labels)
        return SegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=features if output_hidden_states else None,
            scale_logits=scale_logits,
        )

    def _at_scale(self, pixel_values: Tensor, scale: float, logits: Tensor) -> Tensor:
        """Logits of the scaled image at the size of `logits`, those of the image itself."""
        if scale == 1:
            return logits
        scaled = F.interpolate(pixel_values, scale_factor=scale, mode="bilinear", align_corners=False, antialias=True)
        scaled_logits = self.head(self.backbone(scaled))
        return F.interpolate(scaled_logits, size=logits.shape[-2:], mode="bilinear", align_corners=False)

    @property
    def mask_id2label(self) -> dict[int, str]:
        """Names of the values of a mask."""
        return dict(self.config.id2label)

    def segmentation_scores(
        self,
        outputs: SemanticSegmenterOutput | list[ModelOutput],
        size: tuple[int, int],
        tags: Tensor | None = None,
    ) -> Tensor:
        """Probabilities (B, C+1, H, W) whose argmax is the label map; channel 0 is background.

        Args:
            outputs: what `forward` gave; or a list of views, see `tta.views`, whose probabilities are averaged.
            size: (H, W) of the label map.
            tags: (B, C) 0/1; classes that are known to be absent get no pixel. None allows all.
        """
        views: list[Any] = outputs if isinstance(outputs, list) else [outputs]
        scores = mean_probabilities((view.logits for view in views), size)
        if tags is None:
            return scores
        possible = torch.zeros_like(scores)
        for image, present in enumerate(tags.to(scores.device)):
            classes = present.nonzero()[:, 0]
            channels = torch.cat([classes.new_zeros(1), classes + 1])
            possible[image, channels] = class_probabilities(scores[image], classes)
        return possible


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not 255, at the labels' size; 0 where all are.

    Args:
        logits: (B, C+1, h, w).
        labels: (B, H, W) int64.
    """
    upsampled = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(upsampled, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    # A batch that is ignored everywhere teaches nothing; the plain mean would be 0 / 0.
    return total / (labels != IGNORE_INDEX).sum().clamp_min(1)
