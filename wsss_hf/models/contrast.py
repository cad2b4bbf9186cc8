"""Pixel-to-prototype contrast (Du et al., "Weakly Supervised Semantic Segmentation by Pixel-to-Prototype Contrast",
CVPR 2022).

A projection gives every pixel p of the image and of a smaller view of it a unit vector v_p; a map of the network gives
it a label y_p, "background" among the labels. In each view, class c has a prototype P_c, the mean direction of the
pixels that its map is surest of. With sim(v, P) = v·P / temperature, a pixel's loss is

    L(v, y, P) = −log (exp sim(v, P_y) / Σ_c exp sim(v, P_c)),

averaged over pixels and views, three times, in the paper's words:

    cross prototype:  own label, prototypes of the other view ("Cross-view Contrast")
    cross CAM:        label of the other view, own prototypes (the same section)
    intra view:       own label and prototypes; only semi-hard prototypes are negatives, and of every class only some
                      pixels count, half of them hard ones ("Intra-view Contrast")

Where paper and released program differ, the program is followed, but for the background: there all pixels are equally
sure of it, so that its prototype is the mean of any; here one minus the strongest map says how sure they are. And a
class that no image of the batch has gets no prototype. The program stands on SEAM, whose views and refined maps it
takes; this one takes the maps that `maps` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method_helpers import Float32Conv2d, all_reduce_sum, min_max_normalize, patch_size, smaller_view
from .methods import Method, TrainingStep, register_method
from .options import Options, option

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass
class ContrastConfig(Options):
    """Options of the pixel-to-prototype contrast; numbers are those of the released program."""

    scale: float = option(
        0.3,
        "Size of the second view relative to the image. SEAM, where it is on, takes this view too, not one of its own "
        "scale: the network sees one second view.",
        above=0,
        below=1,
    )
    maps: str = option("cam", "Whose maps say which class a pixel is of: cam, or a method that is on and has maps.")
    embedding: int = option(128, "Length of a pixel's unit vector.", at_least=1)
    background: float = option(0.2, "A pixel whose normalised maps are all below it is background.", above=0, below=1)
    top_share: float = option(
        0.125, "A prototype is the mean of so many pixels of the batch, as a share of one view's pixels.", above=0
    )
    temperature: float = option(0.1, "Of all three losses; smaller is stricter.", above=0)
    cross_prototype_weight: float = option(0.1, "Weight of the contrast with the other view's prototypes.", at_least=0)
    cross_cam_weight: float = option(0.1, "Weight of the contrast with the other view's labels.", at_least=0)
    intra_weight: float = option(0.1, "Weight of the contrast inside a view.", at_least=0)


def confidences(maps: Tensor, tags: Tensor) -> Tensor:
    """How sure the maps are of every class and of the background.

    Args:
        maps: (B, C, h, w) localisation maps, min-max normalised here.
        tags: (B, C) float 0/1; other classes get 0.

    Returns:
        (B, 1 + C, h, w) in [0, 1], the background first: one minus the strongest class; 0 in an image without tags.
    """
    objects = min_max_normalize(maps) * tags[:, :, None, None]
    any_tag = tags.amax(dim=1)[:, None, None, None]
    return torch.cat([any_tag - objects.amax(dim=1, keepdim=True), objects], dim=1)


def pixel_labels(sure: Tensor, background: float = 0.2) -> Tensor:
    """The label of every pixel: its strongest class, or 0 where no class exceeds `background`.

    Args:
        sure: (B, 1 + C, h, w) from [`confidences`].

    Returns:
        (B, h, w) int64: 0 background, c + 1 class c.
    """
    highest, winners = sure[:, 1:].max(dim=1)
    return torch.where(highest > background, winners + 1, 0)


@torch.no_grad()
def estimated_prototypes(embeddings: Tensor, sure: Tensor, count: int) -> Tensor:
    """The prototypes of a view: the mean of the pixels of the batch that are surest, weighted by how sure they are.

    With several training processes it is the mean over the surest pixels of each.

    Args:
        embeddings: (B, E, h, w) non-negative, not yet of unit length.
        sure: (B, K, h, w) from [`confidences`].
        count: how many pixels per class.

    Returns:
        (K, E) unit vectors; zeros for a class of which no pixel is sure.
    """
    weights, pixels = sure.transpose(0, 1).flatten(1).topk(min(count, sure[:, 0].numel()), dim=1)
    vectors = embeddings.transpose(0, 1).flatten(1).T[pixels]
    return F.normalize(all_reduce_sum(torch.einsum("kp,kpe->ke", weights, vectors)), dim=1)


def similarities(units: Tensor, prototypes: Tensor, temperature: float = 0.1) -> Tensor:
    """How near every pixel is to every prototype.

    Args:
        units: (N, E) unit vectors of pixels.
        prototypes: (K, E) from [`estimated_prototypes`].

    Returns:
        (N, K) cosines divided by the temperature; −10000 for a class without a prototype.
    """
    return (units @ prototypes.T / temperature).masked_fill(~prototypes.any(dim=1), -1e4)


def cross_view_loss(similarity: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """The mean loss of pixels against all prototypes.

    Args:
        similarity: (N, K) from [`similarities`].
        labels: (N,) int64.
        counted: (N,) bool, which pixels count.

    Returns:
        scalar >= 0; 0 where no pixel counts.
    """
    losses = F.cross_entropy(similarity, labels, reduction="none")
    return torch.where(counted, losses, 0).sum() / counted.sum().clamp(min=1)


def semi_hard_loss(similarity: Tensor, labels: Tensor) -> Tensor:
    """The loss of each pixel against semi-hard prototypes ("semi-hard prototype mining").

    Of the K prototypes the nearest 60 % are considered, and the farthest of these, half of K, are negatives: the very
    nearest may be of the pixel's true class.

    Args:
        similarity: (N, K) from [`similarities`].
        labels: (N,) int64.

    Returns:
        (N,) >= 0.
    """
    kinds = similarity.shape[1]
    considered, kept = -(-3 * kinds // 5), kinds // 2
    negatives = similarity.topk(considered, dim=1).values[:, considered - kept :]
    own = similarity.gather(1, labels[:, None])
    return (torch.cat([own, negatives], dim=1).logsumexp(dim=1, keepdim=True) - own)[:, 0]


def _ranks(values: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
    """(N,) int64: the place of each of the values (N,) among those of its group, the smallest at 0."""
    order = values.argsort()
    order = order[groups[order].argsort(stable=True)]
    starts = sizes.cumsum(dim=0) - sizes
    places = torch.arange(len(values), device=values.device) - starts[groups[order]]
    return torch.empty_like(places).scatter(0, order, places)


@torch.no_grad()
def hard_pixel_weights(own: Tensor, labels: Tensor, counted: Tensor, kinds: int, keys: Tensor) -> Tensor:
    """How much each pixel counts inside a view ("hard pixel sampling").

    Of every class half of the pixels are drawn by chance, and as many hard ones: those farthest from their prototype,
    but for the farthest tenth, whose label is likely wrong. A pixel that is both counts twice.

    Args:
        own: (N,) similarity of each pixel and its own prototype.
        labels: (N,) int64 in [0, kinds).
        counted: (N,) bool; the other pixels are as if they were not there.
        kinds: number of labels K.
        keys: (N,) random numbers.

    Returns:
        (N,) weights, which sum to 1 / (number of classes) in each class; to 0 in a class of one pixel.
    """
    groups = torch.where(counted, labels, kinds)
    sizes = F.one_hot(groups, kinds + 1).sum(dim=0)
    half, end = sizes // 2, 3 * sizes // 5
    by_chance = _ranks(keys, groups, sizes) < half[groups]
    places = _ranks(own, groups, sizes)
    hard = (places < end[groups]) & (places >= (end - half)[groups])
    classes = (sizes[:kinds] > 0).sum()
    return (by_chance.float() + hard.float()) * counted / (2 * half[groups] * classes).clamp(min=1)


@register_method("contrast", ContrastConfig)
class Contrast(Method):
    """Pixel-to-prototype contrast on any CAM, on the image and a smaller view.

    The maps of the larger view are brought to the size of the smaller one's. Labels and prototypes have no gradient;
    the losses train the projection and the network up to its last features.
    """

    stages_suffice = True
    paper = (
        "Du, Fu, Liu and Wang, “Weakly Supervised Semantic Segmentation by Pixel-to-Prototype Contrast”, CVPR 2022."
    )

    def __init__(self, config: ContrastConfig, backbone: Backbone, num_classes: int):
        super().__init__(config, backbone, num_classes)
        self.patch_size = patch_size(backbone)
        self.projection = Float32Conv2d(backbone.channels[-1], config.embedding, kernel_size=1, bias=False)

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.projection.weight)

    def second_view(self, pixel_values: Tensor) -> Tensor:
        return smaller_view(pixel_values, self.config.scale, self.patch_size)

    def view(self, step: TrainingStep, size: torch.Size) -> tuple[Tensor, Tensor]:
        """(B, E, *size) non-negative embeddings and (B, 1 + C, *size) confidences of the pixels of one view."""
        with torch.no_grad():
            maps = step.localize(self.config.maps, step.pixel_values, step.features, step.cams)
        # In half precision the gradient of a short vector's direction overflows.
        with torch.autocast(maps.device.type, enabled=False):
            embeddings = self.projection(step.features[-1]).relu()
            embeddings, maps = (
                F.interpolate(values, size, mode="bilinear", align_corners=True)
                for values in (embeddings, maps.float().relu())
            )
            return embeddings, confidences(maps, step.tags)

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        config = self.config
        if step.second_view is None:
            raise ValueError("second_view: expected the view that the contrast's `second_view` gives, got none")
        size = step.second_view.cams.shape[-2:]
        count = max(1, int(config.top_share * size.numel()))
        views = [self.view(view, size) for view in (step, step.second_view)]
        found: dict[str, list[Tensor]] = {"cross_prototype": [], "cross_cam": [], "intra": []}
        with torch.autocast(step.cams.device.type, enabled=False):
            tagged = step.tags.any(dim=1).repeat_interleave(size.numel())
            labels = [pixel_labels(sure, config.background).flatten() for _, sure in views]
            prototypes = [estimated_prototypes(embeddings, sure, count) for embeddings, sure in views]
            # A pixel counts where the class of its label has a prototype.
            known = [exist.any(dim=1) for exist in prototypes]
            for own, other in ((0, 1), (1, 0)):
                units = F.normalize(views[own][0].permute(0, 2, 3, 1).flatten(0, 2), dim=1)
                near, across = (similarities(units, prototypes[view], config.temperature) for view in (own, other))
                mine, theirs = labels[own], labels[other]
                found["cross_prototype"].append(cross_view_loss(across, mine, tagged & known[other][mine]))
                found["cross_cam"].append(cross_view_loss(near, theirs, tagged & known[own][theirs]))
                to_own, keys = near.gather(1, mine[:, None])[:, 0], torch.rand(len(mine), device=near.device)
                weights = hard_pixel_weights(to_own, mine, tagged & known[own][mine], near.shape[1], keys)
                found["intra"].append((weights * semi_hard_loss(near, mine)).sum())
        return {
            f"contrast_{name}": getattr(config, f"{name}_weight") * torch.stack(both).mean()
            for name, both in found.items()
        }
