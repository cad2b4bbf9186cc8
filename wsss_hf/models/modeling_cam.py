"""The CAM classifier: learns image tags, gives class activation maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .backbone import Backbone
from .configuration_cam import CamConfig
from .maps import add_background, at_all_classes, fuse_maps
from .portable_model import PortableModel
from .registry import METHODS

logger = logging.get_logger(__name__)


@dataclass
class CamOutput(ModelOutput):
    """Output of [`CamClassifier`].

    Attributes:
        loss: sum of `losses`, when tags were given.
        logits: (B, C) tag logits.
        cams: (B, C, h, w) class activation maps before the relu; their spatial mean is `logits`.
        maps: (B, C, h, w) localisation maps: the CAMs, or those of the method that `config.maps` names.
        losses: the named, weighted losses that `loss` sums.
        hidden_states: with `output_hidden_states=True`, all stage maps of the backbone.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cams: Tensor | None = None
    maps: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class CamClassifier(PortableModel):
    """Any backbone, a 1×1 convolution to C maps, and their global average as tag logits.

    The maps *are* the class activation maps. Methods that are on in the configuration change the backbone's
    activations (DRS) or add named losses.
    """

    config_class = CamConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    auto_classes: tuple[str, ...] = (
        "AutoModel",
        "AutoModelForImageClassification",
        "AutoModelForSemanticSegmentation",
    )

    normalizes_maps = True  # before views are fused; False where maps are meant to lie in [0, 1] as they are
    methods: Any  # nn.ModuleDict of [`Method`]

    def __init__(self, config: CamConfig):
        super().__init__(config)
        self._progress: float | None = None
        self.backbone = Backbone(config.backbone_config, config.output_stride, config.backbone_layers)
        config.backbone_layers = getattr(self.backbone.plain_vit, "layers", [])
        channels, bias = self.backbone.channels[-1], config.classifier_bias
        self.classifier = nn.Conv2d(channels, self.config.num_labels, kernel_size=1, bias=bias)
        self.methods = nn.ModuleDict(
            {
                name: METHODS[name][1](options, self.backbone, config.num_labels)
                for name, options in config.methods.items()
            }
        )
        for name, method in self.methods.items():
            setattr(config, name, method.config)  # which may have been completed for this backbone
            method.active = config.method_warmup == 0
        self.post_init()

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self):
        super().initialize_weights()
        # N(0, 0.01) is right for controllers; a classifier that starts so flat keeps the backbone from learning.
        self.classifier.reset_parameters()
        for method in self.methods.values():
            method.reset_parameters()

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]: what the training loop has set, or gave to `forward`."""
        return self._progress or 0.0

    @progress.setter
    def progress(self, progress: float):
        self._progress = progress
        for method in self.methods.values():
            method.active = progress >= self.config.method_warmup

    @property
    def scheduled(self) -> bool:
        """Whether training depends on `progress`."""
        return any(method.scheduled or self.config.method_warmup > 0 for method in self.methods.values())

    def classify(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Images (B, 3, H, W) → stage maps of the backbone, and CAM logits (B, C, h, w)."""
        features = self.backbone(pixel_values)
        return features, self.classifier(F.dropout2d(features[-1], self.config.dropout, self.training))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        tags: Tensor | None = None,
        output_hidden_states: bool | None = None,
        superpixels: Tensor | None = None,
        saliency: Tensor | None = None,
        progress: float | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> CamOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) normalised images.
            tags: (B, C) 0/1 image-level labels; gives a loss.
            output_hidden_states: also return the stage maps of the backbone; None does as the configuration says.
            superpixels: (B, H, W) int64, for methods that use them.
            saliency: (B, H, W) float in [0, 1], for methods that use it.
            progress: share of the training that is done, in [0, 1], which becomes `self.progress`; None leaves it.
            labels: the tags by the name that `transformers.Trainer` evaluates with; `tags` go first.

        Raises:
            ValueError: tags are not (B, C).
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        tags = labels if tags is None else tags
        if progress is not None:
            self.progress = progress
        features, cams = self.classify(pixel_values)
        logits = cams.mean(dim=(-2, -1))
        losses: dict[str, Tensor] | None = None
        maps = cams
        if tags is not None:
            _check_tags(tags, logits)
            if self.training and self._progress is None and self.scheduled:
                logger.warning_once(
                    "The losses of this model depend on the share of the training that is done, which was never set: "
                    "give the model `progress=` (0 to 1) at each step, or the Trainer wsss_hf.ScheduleCallback()."
                )
            losses = {"classification": F.multilabel_soft_margin_loss(logits.float(), tags.float())}
            if self.training and any(method.active for method in self.methods.values()):
                step = self._step(pixel_values, tags, features, cams, superpixels, saliency)
                for method in sorted(self.methods.values(), key=lambda method: not method.leads):
                    losses |= method.losses(step)
            elif self.training and len(self.methods):
                # Distributed training wants a gradient for every parameter.
                idle = sum(parameter.sum() for parameter in self.methods.parameters())
                losses["classification"] = losses["classification"] + 0 * idle
        if self.config.maps != "cam" and not self.training:
            step = self._step(pixel_values, tags, features, cams, superpixels, saliency)
            maps = step.localize(self.config.maps, pixel_values, features, cams)
        return CamOutput(
            loss=None if losses is None else sum(losses.values(), torch.zeros((), device=cams.device)),
            logits=logits,
            cams=cams,
            maps=maps,
            losses=losses,
            hidden_states=features if output_hidden_states else None,
        )

    def _step(self, *seen):
        """What the methods see. Any of them has the function: its file is not saved with a model without methods."""
        method, *_ = self.methods.values()
        return method.step(self, *seen)

    @property
    def mask_id2label(self) -> dict[int, str]:
        """Names of the values of a mask: background is 0, class c is c + 1."""
        return {0: "background"} | {c + 1: name for c, name in self.config.id2label.items()}

    def predicted_tags(self, outputs: Any) -> Tensor:
        """(B, C) bool: the tags whose probability, by the mean logit of the views, is above `config.tag_threshold`."""
        views = outputs if isinstance(outputs, list) else [outputs]
        logits = torch.stack([view.logits.float() for view in views]).mean(dim=0)
        return logits.sigmoid() > self.config.tag_threshold

    def segmentation_scores(
        self,
        outputs: Any,
        size: tuple[int, int],
        tags: Tensor | None = None,
        background_threshold: float | None = None,
    ) -> Tensor:
        """Scores (B, C+1, H, W) whose argmax is the label map; channel 0 is background.

        Args:
            outputs: what `forward` gave; or a list of views, see `tta.views`, whose maps are averaged.
            size: (H, W) of the label map.
            tags: (B, C) 0/1; None takes the tags that the model predicts.
            background_threshold: None takes the configured one.
        """
        views = outputs if isinstance(outputs, list) else [outputs]
        tags = self.predicted_tags(views) if tags is None else tags.to(views[0].logits.device)
        _check_tags(tags, views[0].logits)
        if background_threshold is None:
            background_threshold = self.config.background_threshold
        maps = fuse_maps((view.maps for view in views), tags, size, normalize=self.normalizes_maps)
        return add_background(at_all_classes(maps, tags), background_threshold)


def _check_tags(tags: Tensor, logits: Tensor) -> None:
    if tags.shape != logits.shape:
        raise ValueError(f"tags: expected shape {tuple(logits.shape)}, got {tuple(tags.shape)}")
