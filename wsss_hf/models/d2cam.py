"""D2CAM, the double-decoupled CAM of Mat-Label ("Treating Pseudo-labels Generation as Image Matting", ICCV 2023).

No program was released: the equations and all numbers here are this library's reading of the abstract. A projection
head gives every pixel a unit vector. Metric learning decouples the categories from each other and, inside every image,
the foreground from the background; two constraints keep the maps stable and exclusive. The similarity of a pixel to
the prototype of a class is the map.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .maps import normalize_maps
from .method_helpers import Float32Conv2d, all_reduce_sum, check_stages
from .methods import Method, TrainingStep, register_method
from .options import Options, option

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass
class D2camConfig(Options):
    """Options of D2CAM."""

    stages: list[int] | None = option(
        None,
        "Backbone stages that the projection head reads (negative ones count from the last); null takes the last two, "
        "or the one there is.",
    )
    train_backbone: bool = option(
        True,
        "Whether the losses train the backbone too; false leaves it to the tags, and the head learns from features as "
        "they are.",
    )
    embedding_channels: int = option(128, "Length of a pixel's unit vector.", at_least=1)
    foreground_threshold: float = option(
        0.7, "A normalised CAM above it is certain foreground of its class.", above=0, below=1
    )
    background_threshold: float = option(
        0.2, "Where all normalised CAMs are below it is certain background.", above=0, below=1
    )
    temperature: float = option(0.1, "Of both InfoNCE losses; smaller is stricter.", above=0)
    momentum: float = option(0.9, "Momentum of the prototype bank.", at_least=0, below=1)
    ramp: float = option(
        0.1,
        "Share of the training over which all weights grow linearly from 0, as the CAM must first be learnt.",
        at_least=0,
        at_most=1,
    )
    category_weight: float = option(0.1, "Weight of the category decoupling.", at_least=0)
    foreground_weight: float = option(0.1, "Weight of the foreground-background decoupling.", at_least=0)
    stabilisation_weight: float = option(0.5, "Weight of the stabilisation constraint.", at_least=0)
    exclusivity_weight: float = option(0.1, "Weight of the exclusivity constraint.", at_least=0)

    def check(self) -> None:
        if self.background_threshold > self.foreground_threshold:
            raise ValueError(
                f"background_threshold: expected at most foreground_threshold ({self.foreground_threshold:g}), "
                f"got {self.background_threshold:g}"
            )


def certain_regions(
    cams: Tensor, tags: Tensor, foreground_threshold: float, background_threshold: float
) -> tuple[Tensor, Tensor]:
    """The pixels that the CAM is sure of.

    Args:
        cams: (B, C, h, w) normalised CAMs in [0, 1].
        tags: (B, C) float 0/1; the CAMs of other classes are not looked at.

    Returns:
        (B, C, h, w) bool, certain foreground of each class (a pixel that two classes claim is certain of neither), and
        (B, h, w) bool, certain background.
    """
    cams = cams * tags[:, :, None, None]
    claimed = cams > foreground_threshold
    return claimed & (claimed.sum(dim=1, keepdim=True) == 1), (cams < background_threshold).all(dim=1)


@torch.no_grad()
def updated_prototypes(
    prototypes: Tensor, seen: Tensor, embeddings: Tensor, foreground: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Moves each class's prototype towards the mean of its certain pixels, over all training processes.

    A class seen for the first time takes that mean; a class without a certain pixel keeps what it has.

    Args:
        prototypes: (C, E) unit vectors.
        seen: (C,) bool, whether a class has a prototype yet.
        embeddings: (B, E, h, w) unit vectors.
        foreground: (B, C, h, w) bool from [`certain_regions`].

    Returns:
        the new (C, E) prototypes and (C,) bool `seen`.
    """
    members = foreground.float()
    sums = torch.einsum("bchw,behw->ce", members, embeddings)
    totals = all_reduce_sum(torch.cat((sums, members.sum(dim=(0, 2, 3))[:, None]), dim=1))
    present = totals[:, -1] > 0
    means = F.normalize(totals[:, :-1], dim=1)
    moved = F.normalize(momentum * prototypes + (1 - momentum) * means, dim=1)
    updated = torch.where(seen[:, None], moved, means)
    return torch.where(present[:, None], updated, prototypes), seen | present


def prototype_maps(embeddings: Tensor, prototypes: Tensor, seen: Tensor) -> Tensor:
    """The D2CAM map: the positive part of the cosine between a pixel and each prototype.

    Args:
        embeddings: (B, E, h, w) unit vectors.
        prototypes: (C, E) unit vectors.
        seen: (C,) bool; the map of a class without a prototype is 0.

    Returns:
        (B, C, h, w) in [0, 1].
    """
    return torch.einsum("behw,ce->bchw", embeddings, prototypes).relu() * seen[:, None, None]


def category_decoupling_loss(
    embeddings: Tensor, foreground: Tensor, prototypes: Tensor, seen: Tensor, temperature: float = 0.1
) -> Tensor:
    """InfoNCE of every certain foreground pixel: its own class's prototype against those of all classes.

    Classes without a prototype neither attract nor repel. Averaged over a region, the regions of an image, the batch,
    so that small objects count like large ones.

    Args:
        embeddings: (B, E, h, w) unit vectors.
        foreground: (B, C, h, w) bool from [`certain_regions`].
        prototypes: (C, E) unit vectors, not trained.
        seen: (C,) bool.

    Returns:
        scalar >= 0; 0 without a certain pixel.
    """
    similarities = torch.einsum("behw,ce->bchw", embeddings, prototypes) / temperature
    # A large finite number, not -inf, so that an empty bank gives no NaN.
    log_shares = similarities.masked_fill(~seen[:, None, None], -1e4).log_softmax(dim=1)
    members = foreground & seen[:, None, None]
    regions = _mean_where(-log_shares, members, dims=(2, 3))
    return _mean_where(regions, members.any(dim=(2, 3)), dims=1).mean()


def foreground_background_loss(
    embeddings: Tensor, foreground: Tensor, background: Tensor, temperature: float = 0.1
) -> Tensor:
    """InfoNCE inside each image: every certain pixel's own side against the other side.

    The two prototypes of an image are the directions of the mean vectors of its certain foreground (of any class) and
    of its certain background; they are not trained. Both sides weigh the same; an image that lacks one adds 0.

    Args:
        embeddings: (B, E, h, w) unit vectors.
        foreground: (B, C, h, w) bool from [`certain_regions`].
        background: (B, h, w) bool from [`certain_regions`].

    Returns:
        scalar >= 0, averaged over the batch.
    """
    sides = torch.stack((foreground.any(dim=1), background), dim=1)
    centres = F.normalize(torch.einsum("behw,bshw->bse", embeddings.detach(), sides.float()), dim=2)
    similarities = torch.einsum("behw,bse->bshw", embeddings, centres) / temperature
    both = sides.any(dim=(2, 3)).all(dim=1)
    side_losses = _mean_where(-similarities.log_softmax(dim=1), sides, dims=(2, 3))
    return (side_losses.mean(dim=1) * both).mean()


def stabilisation_loss(maps: Tensor, cams: Tensor, counted: Tensor) -> Tensor:
    """Keeps the maps close to the CAMs they grew from, so that the embedding cannot drift.

    Args:
        maps: (B, C, h, w) from [`prototype_maps`].
        cams: (B, C, h, w) normalised CAMs in [0, 1], detached here.
        counted: (B, C, h, w) bool, the certain pixels of the tagged classes that have a prototype.

    Returns:
        scalar mean absolute difference, over an image, then over the batch; 0 where nothing counts.
    """
    return _mean_where((maps - cams.detach()).abs(), counted, dims=(1, 2, 3)).mean()


def exclusivity_loss(maps: Tensor, tags: Tensor) -> Tensor:
    """Penalises pixels that are active for a tagged class and for another class at once.

    Args:
        maps: (B, C, h, w) from [`prototype_maps`].
        tags: (B, C) float 0/1.

    Returns:
        scalar >= 0: the product of a tagged class's map and another class's, averaged over pixels, pairs, the batch.
    """
    products = (maps * (maps.sum(dim=1, keepdim=True) - maps)).mean(dim=(2, 3)) / max(maps.shape[1] - 1, 1)
    return _mean_where(products, tags.bool(), dims=1).mean()


@register_method("d2cam", D2camConfig)
class D2cam(Method):
    """Double-decoupled CAM on one or more backbone stages.

    The losses train the projection head and, by `train_backbone`, the features it reads; the CAMs are read without
    gradient. The last stage knows the class and little else; an earlier one also knows what the rest of the object
    looks like.
    """

    scheduled = True  # all weights ramp up
    stages_suffice = True
    prototypes: Tensor
    seen: Tensor
    paper = (
        "Wang et al., “Treating Pseudo-labels Generation as Image Matting for Weakly Supervised Semantic "
        "Segmentation”, ICCV 2023."
    )

    def __init__(self, config: D2camConfig, backbone: Backbone, num_classes: int):
        super().__init__(config, backbone, num_classes)
        if config.stages is None:
            self.config = dataclasses.replace(config, stages=[-2, -1][-len(backbone.channels) :])
        check_stages("d2cam.stages", self.config.stages, backbone)
        size = config.embedding_channels
        channels = sum(backbone.channels[stage] for stage in self.config.stages)
        self.head = nn.Sequential(Float32Conv2d(channels, size, 1), nn.ReLU(), Float32Conv2d(size, size, 1))
        self.register_buffer("prototypes", torch.empty(num_classes, size))
        self.register_buffer("seen", torch.empty(num_classes, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self):
        """Empties the prototype bank; the head is initialised like every other convolution."""
        nn.init.zeros_(self.prototypes)
        nn.init.zeros_(self.seen)

    def embeddings(self, features: tuple[Tensor, ...]) -> Tensor:
        """Stage maps (B, D_i, h_i, w_i) to (B, E, h, w) float32 unit vectors, at the resolution of the last stage."""
        size = features[-1].shape[-2:]
        # In half precision the gradient of a short vector's direction overflows.
        with torch.autocast(features[-1].device.type, enabled=False):
            stages = [features[stage].float() for stage in self.config.stages]
            # The last stage, in a dilated network others too, have that size already; resizing would copy them.
            stages = [
                stage if stage.shape[-2:] == size else F.interpolate(stage, size, mode="bilinear", align_corners=False)
                for stage in stages
            ]
            return F.normalize(self.head(torch.cat(stages, dim=1)), dim=1)

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        config = self.config
        features = step.features
        if not config.train_backbone:
            features = tuple(stage.detach() for stage in features)
        embeddings = self.embeddings(features)
        with torch.autocast(embeddings.device.type, enabled=False):
            cams = normalize_maps(step.cams.detach())
            foreground, background = certain_regions(
                cams, step.tags, config.foreground_threshold, config.background_threshold
            )
            prototypes, seen = self.prototypes.float(), self.seen
            if self.training:
                prototypes, seen = updated_prototypes(prototypes, seen, embeddings, foreground, config.momentum)
                self.prototypes.copy_(prototypes)
                self.seen.copy_(seen)
            maps = prototype_maps(embeddings, prototypes, seen)
            certain = foreground.any(dim=1) | background
            counted = certain[:, None] & (step.tags.bool() & seen)[:, :, None, None]
            ramp = min(1.0, step.progress / config.ramp) if config.ramp > 0 else 1.0
            category = category_decoupling_loss(embeddings, foreground, prototypes, seen, config.temperature)
            sides = foreground_background_loss(embeddings, foreground, background, config.temperature)
            return {
                "d2cam_category": ramp * config.category_weight * category,
                "d2cam_foreground": ramp * config.foreground_weight * sides,
                "d2cam_stabilisation": ramp * config.stabilisation_weight * stabilisation_loss(maps, cams, counted),
                "d2cam_exclusivity": ramp * config.exclusivity_weight * exclusivity_loss(maps, step.tags),
            }

    def maps(self, step: TrainingStep) -> Tensor:
        """(B, C, h, w) float32 in [0, 1]: the D2CAM map; the normalised CAM for a class that has no prototype."""
        embeddings = self.embeddings(step.features)
        with torch.autocast(embeddings.device.type, enabled=False):
            maps = prototype_maps(embeddings, self.prototypes.float(), self.seen)
        return torch.where(self.seen[:, None, None], maps, normalize_maps(step.cams))


def _mean_where(values: Tensor, counted: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Mean over `dims` of the values that count; 0, with a gradient of 0, where none does."""
    return torch.where(counted, values, 0).sum(dim=dims) / counted.sum(dim=dims).clamp(min=1)
