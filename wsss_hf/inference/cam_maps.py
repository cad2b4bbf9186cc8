"""CAM maps of images over scales and mirror images, and the labels that scores give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..models.maps import IGNORE_INDEX, fuse_maps, normalize_maps, upsample
from ..models.method_helpers import min_max_normalize
from ..models.options import OptionError
from ..models.tta import views
from .image_by_image import image_by_image


@image_by_image
@torch.inference_mode()
def localize(
    model: Any,
    pixel_values: Tensor,
    tags: Tensor | None,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    fusion: str = "mean",
    bf16: bool | None = None,
    pad: int = 0,
) -> tuple[Tensor, Tensor]:
    """Normalised maps of images of one size, fused over scales and mirror images.

    Args:
        model: a CAM classifier in eval mode, or a map refiner, whose maps are not normalised.
        pixel_values: (B, 3, h, w) normalised images at scale 1.
        tags: (B, C) 0/1; only maps of tagged classes are upsampled. None takes those that the model predicts, see
            `CamClassifier.predicted_tags`.
        size: (H, W) of the maps to return.
        scales, flip: as of [`views`].
        fusion: "mean" or "max" over the views, see [`fuse_maps`], or "sum", see [`sum_maps`].
        bf16: compute the network in bfloat16; None does so on GPUs only. Maps are normalised and fused in float32.
        pad: of images that are as large as their maps, `pixel_values` get zeros at the bottom and at the right up to
            this side; what the maps have there is cut off before they are normalised again.

    Returns:
        maps (N, H, W) in [0, 1), one per tagged class of an image, in row-major order of `tags`; and the tag logits
        (B, C), averaged over the views.

    Raises:
        OptionError: as of [`check_fusion`].
        ValueError: `fusion` is unknown, or the maps or logits are not finite.
    """
    normalize = getattr(model, "normalizes_maps", True)
    check_fusion(fusion, normalize)
    logits: list[Tensor] = []
    shown: list[Any] = []  # (h, w) of what the network saw

    def network(images: Tensor):
        shown.append(images.shape[-2:])
        return model(images)

    padded = padded_images(pixel_values, pad)
    whole = (padded.shape[-2], padded.shape[-1]) if pad else size

    def maps() -> Iterator[tuple[Tensor, tuple[int, int]]]:  # one view at a time, to spare memory
        for view in views(network, padded, scales, flip, _use_bf16(bf16, padded)):
            logits.append(view.logits.float())
            yield view.maps, shown[-1]

    seen: Iterable[tuple[Tensor, tuple[int, int]]] = maps()
    if tags is None:
        seen = list(seen)  # the last view decides about tags, too
        tags = model.predicted_tags([ModelOutput(logits=view) for view in logits])
    if fusion == "sum":
        fused = sum_maps(seen, tags, whole)
    else:
        fused = fuse_maps((view for view, _ in seen), tags, whole, fusion, normalize)
    if whole != size:
        fused = fused[:, : size[0], : size[1]]
        fused = normalize_maps(fused[None])[0] if normalize else fused
    mean_logits = torch.stack(logits).mean(dim=0)
    if not (fused.isfinite().all() and mean_logits.isfinite().all()):
        raise ValueError("maps: expected finite ones, the classifier gives NaN or inf: its training has diverged")
    return fused, mean_logits


def check_fusion(fusion: str, normalize: bool) -> None:
    """Whether `masks.fusion` fits the model.

    Args:
        fusion: as of [`localize`].
        normalize: whether the model's maps are normalised; a map refiner's are not.

    Raises:
        OptionError: "sum" of maps that are used as they are: its min-max would bring the map of a class that a map
            refiner denies back at full strength.
    """
    if fusion == "sum" and not normalize:
        raise OptionError(
            "masks.fusion: expected mean or max with a map refiner, whose maps are used as they are, got sum"
        )


def sum_maps(views: Iterable[tuple[Tensor, tuple[int, int]]], tags: Tensor, size: tuple[int, int]) -> Tensor:
    """The maps of the tagged classes as the released programs of SEAM and PLDA fuse them: summed, then min-max.

    A view counts by the strength of its maps. They are enlarged to the size at which the network saw the image, corner
    on corner, and from there to the size of the image.

    Args:
        views: (B, C, h, w) localisation maps of the same images, and (H', W'), the size at which the network saw
            these; at least one.
        tags: (B, C) 0/1; the maps of other classes are not looked at.
        size: (H, W) of the images.

    Returns:
        (N, H, W) in [0, 1), as of [`fuse_maps`].
    """
    images, classes = tags.nonzero(as_tuple=True)
    total: Tensor | None = None
    for view, shown in views:
        maps = upsample(upsample(view[images, classes], shown, align_corners=True), size)
        total = maps if total is None else total + maps
    if total is None:
        raise ValueError("views: expected at least one, got none")
    return min_max_normalize(total[None])[0]


@image_by_image
@torch.inference_mode()
def average_maps(
    model: Callable,
    pixel_values: Tensor,
    tags: Tensor,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    bf16: bool | None = None,
    pad: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits of the maps, which are probabilities, and CAM logits, averaged over scales and mirror images.

    Args:
        model, pixel_values, tags, size, scales, flip, bf16, pad: as of [`localize`].

    Returns:
        both (N, H, W) float32, one per tagged class of an image.

    Raises:
        OptionError: a map has a value outside [0, 1].
    """
    padded = padded_images(pixel_values, pad)
    whole = (padded.shape[-2], padded.shape[-1]) if pad else size
    images, classes = tags.nonzero(as_tuple=True)
    total: Tensor | None = None
    count = 0
    for view in views(model, padded, scales, flip, _use_bf16(bf16, padded)):
        maps = view.maps[images, classes].float()
        if maps.numel() and not (maps.min() >= 0 and maps.max() <= 1):
            raise OptionError(
                "masks.seeds: expected maps that are probabilities, above 0.5 on the object, got others; "
                "cam.maps: icd trains a classifier that has them"
            )
        both = torch.stack([maps.logit(eps=1e-6), view.cams[images, classes].float()])
        both = upsample(both, whole)[..., : size[0], : size[1]]
        total, count = both if total is None else total + both, count + 1
    if total is None:
        raise ValueError("scales: expected at least one, got none")
    maps, cams = total / count
    return maps, cams


def padded_images(pixel_values: Tensor, side: int) -> Tensor:
    """(B, 3, h, w) → (B, 3, max(h, side), max(w, side)): zeros, the mean colour, at the bottom and at the right."""
    height, width = pixel_values.shape[-2:]
    return F.pad(pixel_values, (0, max(side - width, 0), 0, max(side - height, 0)))


def _use_bf16(bf16: bool | None, pixel_values: Tensor) -> bool:
    return pixel_values.is_cuda if bf16 is None else bf16


def label_map(scores: Tensor, classes: Tensor) -> Tensor:
    """One image's labels: of each pixel the largest score, of equal ones the first.

    Args:
        scores: (K+1, H, W) in [0, 1], background first, then the image's K tagged classes.
        classes: (K,) class indices c of these.

    Returns:
        (H, W) uint8, 0 = background, c + 1 = class c.
    """
    values = torch.cat([classes.new_zeros(1), classes + 1])
    return values[scores.argmax(dim=0)].to(torch.uint8)


def label_confidence(scores: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """How far scores speak for the labels: the relative margin 1 - best other / chosen.

    Of the margins this one separates correct from wrong labels best, on plain and on refined maps
    (`scripts/benchmark_thresholds.py --confidence`).

    Args:
        scores: (K+1, H, W), not negative, background first.
        labels: (H, W) uint8: 0 background, c + 1 class c, 255 ignore.
        classes: (K,) class indices c of the tagged classes.

    Returns:
        (H, W) in [0, 1]; 0 is a tie, another channel has a larger score, or the pixel is ignored.
    """
    channels = torch.zeros(256, dtype=torch.long, device=labels.device)
    channels[classes + 1] = torch.arange(1, len(classes) + 1, device=labels.device)
    chosen = channels[labels.long()][None]
    own = scores.gather(0, chosen)[0]
    other = scores.scatter(0, chosen, 0).amax(dim=0)
    margin = torch.where(own > 0, 1 - other / own.clamp(min=1e-12), 0).clamp(min=0)
    return margin.masked_fill(labels == IGNORE_INDEX, 0)
