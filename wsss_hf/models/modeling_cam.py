"""The CAM classifier: learns image tags, gives class activation maps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone import Backbone
from .configuration_cam import CamConfig
from .maps import add_background, normalize_maps
from .methods import METHODS, TrainingStep
from .portable_model import PortableModelMixin


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


class CamClassifier(PortableModelMixin, PreTrainedModel):
    """Any backbone, a 1×1 convolution to C maps, and their global average as tag logits.

    The maps *are* the class activation maps. Methods that are on in the configuration change the backbone's
    activations (DRS) or add named losses.
    """

    config_class = CamConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    auto_classes = ("AutoModel", "AutoModelForImageClassification", "AutoModelForSemanticSegmentation")

    def __init__(self, config: CamConfig):
        super().__init__(config)
        self._progress = 0.0
        self.backbone = Backbone(config.backbone_config, config.output_stride)
        channels, bias = self.backbone.channels[-1], config.classifier_bias
        self.classifier = nn.Conv2d(channels, config.num_labels, kernel_size=1, bias=bias)
        self.methods = nn.ModuleDict(
            {
                name: METHODS[name][1](options, self.backbone, config.num_labels)
                for name, options in config.methods.items()
            }
        )
        for name, method in self.methods.items():
            setattr(config, name, method.config)  # which may have been completed for this backbone
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
        """Share of the training that is done, in [0, 1]; the training loop moves it."""
        return self._progress

    @progress.setter
    def progress(self, progress: float):
        self._progress = progress
        for method in self.methods.values():
            method.active = progress >= self.config.method_warmup

    def classify(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Images (B, 3, H, W) → stage maps of the backbone, and CAM logits (B, C, h, w)."""
        features = self.backbone(pixel_values)
        return features, self.classifier(features[-1])

    def classify_view(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """[`classify`] on another view of the batch, which leaves the running statistics of batch norms alone.

        They describe the images themselves, as inference sees them; not images at a third of their size (SEAM) or
        with holes (PLDA).
        """
        with self.backbone.statistics_kept():
            return self.classify(pixel_values)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        tags: Tensor | None = None,
        output_hidden_states: bool | None = None,
        superpixels: Tensor | None = None,
        saliency: Tensor | None = None,
        **kwargs,
    ) -> CamOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) normalised images.
            tags: (B, C) 0/1 image-level labels; gives a loss.
            output_hidden_states: also return the stage maps of the backbone; None does as the configuration says.
            superpixels: (B, H, W) int64, for methods that use them.
            saliency: (B, H, W) float in [0, 1], for methods that use it.

        Raises:
            ValueError: tags are not (B, C).
        """
        features, cams = self.classify(pixel_values)
        logits = cams.mean(dim=(-2, -1))
        losses, maps = None, cams
        if tags is not None:
            _check_tags(tags, logits)
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
            loss=None if losses is None else sum(losses.values()),
            logits=logits,
            cams=cams,
            maps=maps,
            losses=losses,
            hidden_states=features if self._shows_hidden_states(output_hidden_states) else None,
        )

    def _step(self, pixel_values: Tensor, tags: Tensor | None, features, cams, superpixels, saliency) -> TrainingStep:
        mean, std = (
            pixel_values.new_tensor(v)[:, None, None] for v in (self.config.image_mean, self.config.image_std)
        )
        step = TrainingStep(
            pixel_values=pixel_values,
            images=(pixel_values * std + mean).clamp(0, 1),
            tags=torch.ones_like(cams[:, :, 0, 0]).float() if tags is None else tags.float(),
            features=features,
            cams=cams,
            progress=max(0.0, self.progress - self.config.method_warmup) / (1 - self.config.method_warmup),
            classify=self.classify_view,
            superpixels=superpixels,
            saliency=saliency,
        )

        def localize(name: str, pixel_values: Tensor, features: tuple[Tensor, ...], cams: Tensor) -> Tensor:
            if name == "cam":
                return cams
            view = dataclasses.replace(step, pixel_values=pixel_values, features=features, cams=cams)
            return self.methods[name].maps(view)

        step.localize = localize
        return step

    @property
    def mask_id2label(self) -> dict[int, str]:
        """Names of the values of a mask: background is 0, class c is c + 1."""
        return {0: "background"} | {c + 1: name for c, name in self.config.id2label.items()}

    def segmentation_scores(
        self,
        outputs: CamOutput,
        size: tuple[int, int],
        tags: Tensor | None = None,
        background_threshold: float | None = None,
    ) -> Tensor:
        """Scores (B, C+1, H, W) whose argmax is the label map; channel 0 is background.

        Args:
            outputs: what `forward` gave.
            size: (H, W) of the label map.
            tags: (B, C) 0/1; None takes the tags that the model predicts.
            background_threshold: None takes the configured one.
        """
        if tags is None:
            tags = outputs.logits.float().sigmoid() > self.config.tag_threshold
        _check_tags(tags, outputs.logits)
        if background_threshold is None:
            background_threshold = self.config.background_threshold
        return add_background(normalize_maps(outputs.maps, tags, size), background_threshold)


def _check_tags(tags: Tensor, logits: Tensor) -> None:
    if tags.shape != logits.shape:
        raise ValueError(f"tags have shape {tuple(tags.shape)}; {tuple(logits.shape)} would be right")
