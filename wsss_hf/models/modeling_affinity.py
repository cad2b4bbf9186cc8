"""The affinity network: learns from certain labels which neighbours belong together, for random walks of maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.generic import can_return_tuple

from .affinity import affinity_losses, boundary_affinity, feature_affinity, random_walk
from .backbone import Backbone, BackboneConfigMixin
from .maps import upsample
from .portable_model import PortableModel

Kind = Literal["irn", "affinitynet"]
_GRID = {"irn": 4, "affinitynet": 8}  # input size / size of the grid of positions
_IRN_CHANNELS, _IRN_GROUPS = 32, 4
_AFFINITYNET_CHANNELS = (64, 128, 256)


class AffinityConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of an [`AffinityNetwork`].

    Args:
        backbone, backbone_config, output_stride, backbone_layers: as of [`CamConfig`].
        kind: "irn" learns boundaries, which part positions that lie on both sides of them; "affinitynet" learns
            features, whose differences part them.
        radius: pairs nearer than this are learnt from, in positions of the grid: every 4th pixel for "irn", every 8th
            for "affinitynet".
        image_mean, image_std: the normalisation of `pixel_values`, per channel, for images in [0, 1].

    Raises:
        ValueError: an option is unknown or out of range.
    """

    model_type = "wsss_affinity"

    def __init__(
        self,
        backbone: str | None = None,
        backbone_config: PreTrainedConfig | dict | None = None,
        output_stride: int | None = None,
        backbone_layers: list[int] | None = None,
        kind: Kind = "irn",
        radius: int = 10,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs,
    ):
        if kind not in get_args(Kind):
            raise ValueError(f"kind: expected irn or affinitynet, got {kind!r}")
        if not (isinstance(radius, int) and radius >= 2):
            raise ValueError(f"radius: expected a whole number of at least 2, got {radius!r}")
        self._set_backbone(backbone, backbone_config)
        self.output_stride = output_stride
        self.backbone_layers = backbone_layers
        self.kind = kind
        self.radius = radius
        self.image_mean = list(image_mean or IMAGENET_DEFAULT_MEAN)
        self.image_std = list(image_std or IMAGENET_DEFAULT_STD)
        super().__init__(**self._completed(kwargs))


@dataclass
class AffinityOutput(ModelOutput):
    """Output of an [`AffinityNetwork`].

    Attributes:
        loss: sum of `losses`, where labels were given.
        logits: what affinities are computed from: (B, 1, h, w) logits of boundaries of kind "irn", (B, 448, h, w)
            features of "affinitynet".
        losses: those of pairs of background, of the same class and of different labels.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class AffinityNetwork(PortableModel):
    """A frozen backbone, and 1×1 convolutions of its stages that learn affinities between neighbouring positions."""

    config: AffinityConfig
    config_class = AffinityConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    auto_classes: tuple[str, ...] = ("AutoModel",)

    def __init__(self, config: AffinityConfig):
        super().__init__(config)
        backbone = Backbone(config.backbone_config, config.output_stride, config.backbone_layers)
        self.backbone = backbone.requires_grad_(False)
        config.backbone_layers = getattr(backbone.plain_vit, "layers", [])
        channels = self.backbone.channels
        if config.kind == "irn":
            self.branches = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(depth, _IRN_CHANNELS, kernel_size=1, bias=False),
                    nn.GroupNorm(_IRN_GROUPS, _IRN_CHANNELS),
                    nn.ReLU(),
                )
                for depth in channels
            )
            self.head: nn.Module = nn.Conv2d(_IRN_CHANNELS * len(channels), 1, kernel_size=1)
        else:
            widths = _AFFINITYNET_CHANNELS[-len(channels) :]
            self.branches = nn.ModuleList(
                nn.Sequential(nn.Conv2d(depth, width, kernel_size=1, bias=False), nn.ELU())
                for depth, width in zip(channels[-len(widths) :], widths, strict=True)
            )
            total = sum(widths)
            self.head = nn.Sequential(nn.Conv2d(total, total, kernel_size=1, bias=False), nn.ELU())
        self.post_init()

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self):
        super().initialize_weights()
        for part in (self.branches, self.head):
            for module in part.modules():
                if isinstance(module, nn.Conv2d | nn.GroupNorm):
                    module.reset_parameters()
        if self.config.kind == "affinitynet":  # whose features, in the released programs, differ from the start
            layers: Any = (*self.branches, self.head)
            *branches, head = (layer[0].weight for layer in layers)
            for weight in branches:
                nn.init.kaiming_normal_(weight)
            nn.init.xavier_uniform_(head, gain=4)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()  # frozen
        return self

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> AffinityOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) normalised images.
            labels: (B, H, W) int64, 0 background, c + 1 class c, 255 ignore; gives a loss.

        Raises:
            ValueError: the labels are not (B, H, W).
        """
        size = [-(-side // _GRID[self.config.kind]) for side in pixel_values.shape[-2:]]
        with torch.no_grad():
            stages = self.backbone(pixel_values)[-len(self.branches) :]
        maps = [
            F.interpolate(branch(stage), size=size, mode="bilinear", align_corners=False)
            for branch, stage in zip(self.branches, stages, strict=True)
        ]
        logits = self.head(torch.cat(maps, dim=1))
        losses = None
        if labels is not None:
            expected = (len(pixel_values), *pixel_values.shape[-2:])
            if labels.shape != expected:
                raise ValueError(f"labels: expected shape {expected}, got {tuple(labels.shape)}")
            labels = F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0]
            losses = affinity_losses(self.affinity(logits, self.config.radius), labels, self.config.radius)
        loss = None if losses is None else sum(losses.values(), torch.zeros((), device=logits.device))
        return AffinityOutput(loss=loss, logits=logits, losses=losses)

    def affinity(self, logits: Tensor, radius: int) -> Tensor:
        """Logits of `forward` → (B, P, h, w) affinities with the neighbours nearer than `radius`, see
        `affinity.offsets`."""
        if self.config.kind == "irn":
            return boundary_affinity(logits.float().sigmoid()[:, 0], radius)
        return feature_affinity(logits.float(), radius)

    @torch.inference_mode()
    def walk(self, pixel_values: Tensor, maps: Tensor, radius: int, power: float, steps: int) -> Tensor:
        """Maps after a random walk, at their size.

        The logits are the mean over image and mirror image. Maps of kind "irn" start from 0 on boundaries.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            maps: (B, K, h, w) of these images, not negative.
            radius, power, steps: as of [`random_walk`].

        Returns:
            (B, K, h, w) float32.
        """
        logits = self(pixel_values).logits + self(pixel_values.flip(-1)).logits.flip(-1)
        logits = logits.float() / 2
        grid = F.interpolate(maps.float(), size=logits.shape[-2:], mode="area")
        if self.config.kind == "irn":
            grid = grid * (1 - logits.sigmoid())
        walked = random_walk(grid, self.affinity(logits, radius), radius, power, steps)
        return upsample(walked, (maps.shape[-2], maps.shape[-1]))
