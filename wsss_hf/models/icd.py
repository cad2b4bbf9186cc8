"""ICD: "Learning Integral Objects with Intra-Class Discriminator for Weakly-Supervised Segmentation" (CVPR 2020).

The CAM tells classes apart; ICD tells, inside the images of one class, the object from its surroundings. A bottom-up
direction per class finds the principal axis of the features of that class's images, the CAM says which of its ends is
the object, superpixels clean the result, and a top-down classifier learns it and teaches the backbone.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .maps import IGNORE_INDEX
from .method_helpers import all_reduce_sum, check_stages
from .methods import Method, TrainingStep, register_method
from .options import Options, option

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass
class IcdConfig(Options):
    """Options of ICD; the defaults are those of the authors' released program."""

    bottom_up_weight: float = option(10.0, "Weight of the energy that the directions climb.", at_least=0)
    top_down_weight: float = option(1.0, "Final weight of the top-down cross-entropy.", at_least=0)
    top_down_ramp: float = option(
        0.1,
        "Share of the training over which that weight ramps up (the first 2 of 20 epochs).",
        at_least=0,
        at_most=1,
    )
    sign_momentum: float = option(
        0.9, "Momentum of the running CAM means that decide each direction's sign.", at_least=0, below=1
    )
    margin: float = option(
        0.2,
        "Normalised scores with an absolute value up to this teach the top-down classifier nothing.",
        at_least=0,
        below=1,
    )
    hidden_channels: int | None = option(
        None,
        "Channels of both hidden convolutions of the top-down classifier, 1024 in the paper; null takes an eighth of "
        "the backbone's, at least 64, so that a small backbone isn't outweighed by its classifier.",
        at_least=1,
    )
    average_classes: bool = option(
        False,
        "Its losses and the classification are means over classes, not the published sums: where method_warmup lets "
        "ICD begin late, the classification then keeps its size.",
    )
    stage: int = option(-1, "Stage of the backbone that ICD works on, from either end; 4 is conv5 of a VGG-16.")
    hidden_from: list[str] = option(
        [],
        "The backbone's 3x3 and 1x1 convolution that those two start from, as the program's [hidden.fc6, hidden.fc7]; "
        "then all but the last layer learn at the rate of pretrained ones.",
        length=0,
    )

    def check(self) -> None:
        if len(self.hidden_from) not in (0, 2):
            raise ValueError(f"hidden_from: expected two names or none, got {self.hidden_from}")


def projection(features: Tensor, directions: Tensor) -> Tensor:
    """Bottom-up scores: the features projected on each class's unit direction.

    Args:
        features: (B, D, H, W), detached here: the bottom-up branch never trains them.
        directions: (C, D), of any length but 0.

    Returns:
        (B, C, H, W) float32, with a gradient to `directions` only.
    """
    return torch.einsum("bdhw,cd->bchw", features.detach().float(), F.normalize(directions.float(), dim=1))


def bottom_up_loss(scores: Tensor, tags: Tensor, scale: float = 10.0) -> Tensor:
    """Negative energy of the projection; its minimum is the first principal direction of a class's pixels.

    Only images with exactly one tag count: with two, the axis might separate the classes instead of object and ground.

    Args:
        scores: (B, C, H, W) from [`projection`].
        tags: (B, C) float 0/1.

    Returns:
        scalar `-scale / (2HW) * sum of scores**2`, summed over images and pixels, never positive.
    """
    alone = tags * (tags.sum(dim=1, keepdim=True) == 1)
    return -0.5 * scale * (alone * scores.square().mean(dim=(2, 3))).sum()


@torch.no_grad()
def running_sign_means(scores: Tensor, cams: Tensor, tags: Tensor, running: Tensor, momentum: float = 0.9) -> Tensor:
    """The running means of the CAM on the positive and on the negative side of each direction.

    Averaged over the tagged images of the batch, over all training processes; a class without one keeps its value.

    Args:
        scores: (B, C, H, W) from [`projection`].
        cams: (B, C, H, W) CAM logits.
        tags: (B, C) float 0/1.
        running: (C, 2), the means so far: positive side, negative side.

    Returns:
        (C, 2) float32, the new means.
    """
    sides = torch.stack((scores > 0, scores < 0), dim=-1).float()
    side_means = (cams.float().relu()[..., None] * sides).sum(dim=(2, 3)) / sides.sum(dim=(2, 3)).clamp(min=1)
    totals = torch.cat(((side_means * tags[..., None]).sum(dim=0), tags.sum(dim=0)[:, None]), dim=1)
    side_sums, images = all_reduce_sum(totals.float()).split((2, 1), dim=1)
    updated = momentum * running + (1 - momentum) * side_sums / images.clamp(min=1)
    return torch.where(images > 0, updated, running)


@torch.no_grad()
def resign(scores: Tensor, running: Tensor) -> Tensor:
    """Flips the scores of the classes whose CAM is stronger on the negative side, so that positive means object.

    Args:
        scores: (B, C, H, W) from [`projection`].
        running: (C, 2) from [`running_sign_means`].

    Returns:
        (B, C, H, W), the scores, some classes negated.
    """
    positive, negative = running.unbind(dim=1)
    return torch.where((positive < negative)[:, None, None], -scores, scores)


@torch.no_grad()
def superpixel_refine(scores: Tensor, superpixels: Tensor, tags: Tensor) -> Tensor:
    """Gives every superpixel one score per tagged class.

    A superpixel is foreground of at most one class: if for some class most of its pixels are positive, of the class
    with the largest mean share `max(score, 0) / (largest score of any class at that pixel)`. It takes the mean of
    `max(score, 0)` for that class and the mean of `min(score, 0)` for all others.

    Args:
        scores: (B, C, H, W) from [`resign`].
        superpixels: (B, H, W) int64, from 0; the numbers of one image need not be contiguous.
        tags: (B, C) float 0/1.

    Returns:
        (B, C, H, W), constant over each superpixel, 0 for classes that are not tagged.

    Raises:
        ValueError: where the superpixels do not have the size of the scores.
    """
    batch, classes, height, width = scores.shape
    if superpixels.shape != (batch, height, width):
        raise ValueError(
            f"superpixels: expected the shape of the scores, {(batch, height, width)}, got {tuple(superpixels.shape)}"
        )
    per_image = int(superpixels.max()) + 1
    offsets = per_image * torch.arange(batch, device=superpixels.device)
    segments = (superpixels + offsets[:, None, None]).flatten()
    sizes = torch.bincount(segments, minlength=batch * per_image)[:, None].clamp(min=1)

    pixels = (scores * tags[:, :, None, None]).permute(0, 2, 3, 1).reshape(-1, classes)
    shares = pixels.relu() / pixels.amax(dim=1, keepdim=True).clamp(min=1e-5)
    statistics = torch.cat((pixels.sign(), shares, pixels.clamp(min=0), pixels.clamp(max=0)), dim=1)
    sums = statistics.new_zeros(batch * per_image, 4 * classes)
    sums.scatter_add_(0, segments[:, None].expand_as(statistics), statistics)
    signs, shares, positive, negative = (sums / sizes).split(classes, dim=1)

    winners = F.one_hot(shares.argmax(dim=1), classes).bool() & (signs.amax(dim=1, keepdim=True) > 0)
    refined = torch.where(winners, positive, negative)[segments]
    return refined.reshape(batch, height, width, classes).permute(0, 3, 1, 2)


@torch.no_grad()
def top_down_targets(refined: Tensor, margin: float = 0.2) -> tuple[Tensor, Tensor]:
    """What the top-down classifier learns from the refined bottom-up scores.

    Args:
        refined: (B, C, H, W) from [`superpixel_refine`].
        margin: share of the class's own extreme that a score must exceed to count.

    Returns:
        (B, C, H, W) float targets, 1 where the score is positive, and (B, C, H, W) bool, where they count.
    """
    highest = refined.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)
    lowest = refined.amin(dim=(2, 3), keepdim=True).clamp(max=-1e-5)
    normalised = refined.relu() / highest - refined.clamp(max=0) / lowest
    return (normalised > 0).float(), normalised.abs() > margin


def top_down_loss(logits: Tensor, refined: Tensor, tags: Tensor, margin: float = 0.2) -> Tensor:
    """Binary cross-entropy of the top-down classifier on the certain pixels of the tagged classes.

    Args:
        logits: (B, C, H, W) top-down scores.
        refined: (B, C, H, W) from [`superpixel_refine`].
        tags: (B, C) float 0/1.

    Returns:
        scalar, averaged over all H*W pixels, summed over classes and images.
    """
    targets, certain = top_down_targets(refined, margin)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return ((entropy * certain).mean(dim=(2, 3)) * tags).sum()


def top_down_weight(progress: float, ramp: float = 0.1) -> float:
    """exp(-10 r), r falling from 1 to 0 while the training progress goes from 0 to `ramp`; 1 from there on."""
    remaining = max(0.0, 1 - progress / ramp) if ramp > 0 else 0.0
    return math.exp(-10 * remaining)


@torch.no_grad()
def icd_seeds(
    top_down: Tensor, cams: Tensor, tags: Tensor, saliency: Tensor | None = None, saliency_threshold: float = 0.01
) -> Tensor:
    """Label maps from the top-down scores: sure pixels only, the rest is left open.

    A pixel with one positive tagged class is of that class; several are settled by the largest relu(CAM) times score:
    from the CAMs of the tagged classes the lowest value that any of them has in the image is subtracted, then they are
    divided by the highest; each score is divided by its class's highest. In an image with several tags, pixels of an
    object where these products do not tell its classes apart, above all where no CAM is positive, are left open.
    Background is where every tagged class is below 0 or, with saliency, where that is below a threshold; of a map that
    covers less than 1 % of the image, both is asked. A pixel claimed by an object and by background is left open.

    Args:
        top_down: (B, C, H, W) scores of [`Icd.scores`], at the resolution of the seeds.
        cams: (B, C, H, W) CAM logits, at the same resolution.
        tags: (B, C) float 0/1.
        saliency: (B, H, W) float in [0, 1], or None.
        saliency_threshold: published for maps of a network that are all but binary.

    Returns:
        (B, H, W) int64: 0 background, c + 1 class c, 255 open.
    """
    tagged = tags.bool()[:, :, None, None]
    claimed = (top_down > 0) & tagged
    shares = top_down.relu() / top_down.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5) * tagged
    cams = cams.relu()
    lowest = cams.masked_fill(~tagged, math.inf).amin(dim=(1, 2, 3), keepdim=True)
    cams = (cams - lowest).masked_fill(~tagged, 0)
    evidence = cams / cams.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5) * shares
    several = claimed.sum(dim=1) > 1
    foreground = claimed.any(dim=1)
    background = ((top_down < 0) | ~tagged).all(dim=1)
    if saliency is not None:
        outside = saliency < saliency_threshold
        is_empty = (~outside).float().mean(dim=(1, 2), keepdim=True) < 0.01
        background = outside & (background | ~is_empty)

    seeds = torch.where(several, evidence.argmax(dim=1), claimed.int().argmax(dim=1)) + 1
    seeds = seeds.masked_fill(background, 0)
    difference = evidence.amax(dim=1) - evidence.masked_fill(~tagged, math.inf).amin(dim=1)
    unsettled = foreground & (difference <= 1e-5) & (tags.sum(dim=1) > 1)[:, None, None]
    return seeds.masked_fill((foreground == background) | unsettled, IGNORE_INDEX)


class FeatureNorm(nn.Module):
    """Batch normalisation with its scale fixed to 1: only a bias is learnt. Statistics are those of all processes."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, H, W) to the same shape and dtype, every channel with mean `bias` and variance 1 over the batch."""
        values = features.float()
        if self.training:
            pixels = all_reduce_sum(values.new_tensor(values[:, 0].numel()))
            mean = all_reduce_sum(values.sum(dim=(0, 2, 3))) / pixels
            var = all_reduce_sum((values - mean[:, None, None]).square().sum(dim=(0, 2, 3))) / pixels
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var.detach().to(self.running_var.dtype), self.momentum)
        else:
            mean, var = self.running_mean.float(), self.running_var.float()
        scale = torch.rsqrt(var + self.eps)
        shift = self.bias.float() - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(features.dtype)


class TopDownClassifier(nn.Module):
    """Linear classifier per class on [F, relu(conv3x3(F)), relu(conv1x1(.))]: (B, D, H, W) to (B, C, H, W) logits."""

    def __init__(self, channels: int, hidden_channels: int, num_classes: int):
        super().__init__()
        self.context = nn.Conv2d(channels, hidden_channels, kernel_size=3, padding=1)
        self.mix = nn.Conv2d(hidden_channels, hidden_channels, kernel_size=1)
        self.classifier = nn.Conv2d(channels + 2 * hidden_channels, num_classes, kernel_size=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        context = self.context(features).relu()
        return self.classifier(torch.cat((features, context, self.mix(context).relu()), dim=1))


@register_method("icd", IcdConfig)
class Icd(Method):
    """Intra-class discriminator on one stage of the backbone, the last one by default.

    Losses are averaged over the images of the batch, as the authors' optimiser does. The bottom-up loss trains the
    directions only; the top-down loss trains its classifier and the backbone; neither reaches the CAMs. The
    classification is a sum over classes, too: `icd_classification` adds what the model's mean lacks of it, unless the
    other losses become means as well (`average_classes`).
    """

    scheduled = True  # the top-down weight ramps up
    stages_suffice = True
    running_means: Tensor
    paper = (
        "Fan, Zhang, Song and Tan, “Learning Integral Objects with Intra-Class Discriminator for Weakly-Supervised"
        " Semantic Segmentation”, CVPR 2020."
    )

    def __init__(self, config: IcdConfig, backbone: Backbone, num_classes: int):
        super().__init__(config, backbone, num_classes)
        check_stages("icd.stage", [config.stage], backbone)
        if backbone.strides[config.stage] != backbone.strides[-1]:
            raise ValueError(f"icd.stage: expected a stage of stride {backbone.strides[-1]}, got {config.stage}")
        channels = backbone.channels[config.stage]
        if config.hidden_channels is None:
            self.config = dataclasses.replace(config, hidden_channels=max(64, channels // 8))
        self.norm = FeatureNorm(channels)
        self.directions = nn.Parameter(torch.empty(num_classes, channels))
        self.top_down = TopDownClassifier(channels, self.config.hidden_channels, num_classes)
        self.register_buffer("running_means", torch.empty(num_classes, 2))
        self._copies(backbone)
        self.reset_parameters()

    def reset_parameters(self):
        self.norm.reset_parameters()
        nn.init.normal_(self.directions, std=0.01)
        nn.init.zeros_(self.running_means)

    def _copies(self, backbone: Backbone) -> list[tuple[nn.Module, nn.Module]]:
        """(own layer, layer of the backbone that it starts from), of one shape."""
        found: list[tuple[nn.Module, nn.Module]] = []
        for layer, name in zip((self.top_down.context, self.top_down.mix), self.config.hidden_from, strict=False):
            other = dict(backbone.body.named_modules()).get(name)
            expected, shape = tuple(layer.weight.shape), tuple(getattr(other, "weight", torch.empty(0)).shape)
            if other is None or shape != expected:
                raise ValueError(f"icd.hidden_from: expected a layer with weights {expected}, got {name} with {shape}")
            found.append((layer, other))
        return found

    def start_from(self, backbone: Backbone) -> set[str]:
        copies = self._copies(backbone)
        for layer, other in copies:
            layer.load_state_dict(other.state_dict())
        names = {name for name, _ in self.named_parameters() if not name.startswith("top_down.classifier.")}
        return names if copies else set()

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        config = self.config
        features = self.norm(step.features[config.stage])
        logits = self.top_down(features)
        with torch.autocast(logits.device.type, enabled=False):
            tags = step.tags.float()
            scores = projection(features, self.directions)
            if self.training:
                means = running_sign_means(scores, step.cams, tags, self.running_means, config.sign_momentum)
                self.running_means.copy_(means)
            superpixels = _superpixels_at(step.superpixels, scores)
            refined = superpixel_refine(resign(scores, self.running_means), superpixels, tags)
            weight = config.top_down_weight * top_down_weight(step.progress, config.top_down_ramp)
            losses = {
                "icd_bottom_up": bottom_up_loss(scores, tags, config.bottom_up_weight) / len(tags),
                "icd_top_down": weight * top_down_loss(logits.float(), refined, tags, config.margin) / len(tags),
            }
            if config.average_classes:
                return {name: loss / tags.shape[1] for name, loss in losses.items()}
            classification = F.multilabel_soft_margin_loss(step.cams.float().mean(dim=(2, 3)), tags)
            return {"icd_classification": (tags.shape[1] - 1) * classification} | losses

    def scores(self, step: TrainingStep) -> Tensor:
        """(B, C, h, w) float32 top-down scores, positive on the object; what [`icd_seeds`] reads."""
        return self.top_down(self.norm(step.features[self.config.stage])).float()

    def maps(self, step: TrainingStep) -> Tensor:
        """(B, C, h, w) float32 in (0, 1): sigmoid of the top-down score, 0.5 on the learnt object boundary.

        Not its positive part: that would be empty for an image whose scores all stay below 0, and leaves a threshold
        nothing to choose below the boundary.
        """
        return self.scores(step).sigmoid()


def _superpixels_at(superpixels: Tensor | None, scores: Tensor) -> Tensor:
    """Superpixels (B, H, W) at the resolution of the scores; without any, each pixel is a superpixel of its own.

    A network that pads all its strided layers alike looks from corner to corner; then so does this.
    """
    batch, _, height, width = scores.shape
    if superpixels is None:
        return torch.arange(height * width, device=scores.device).view(1, height, width).expand(batch, -1, -1)
    (down, rest_down), (across, rest_across) = (
        divmod(whole - 1, max(part - 1, 1)) for whole, part in zip(superpixels.shape[1:], (height, width), strict=True)
    )
    if min(height, width) > 1 and not rest_down and not rest_across:
        return superpixels[:, ::down, ::across]
    nearest = F.interpolate(superpixels[:, None].double(), size=(height, width), mode="nearest-exact")
    return nearest[:, 0].long()
