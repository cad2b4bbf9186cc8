"""From scores to labels: the rules, some of them published, that a recipe names in `masks.seeds`.

Rules for the tagged classes of one image count 0 background, k + 1 the k-th *tagged* class, 255 open; `class_labels`
turns that into labels of the data set.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..inference.cam_maps import label_map
from ..models.icd import icd_seeds
from ..models.maps import IGNORE_INDEX
from .crf import refine_labels, require_densecrf
from .matting import merge_alphas
from .refinement import same_kind


class SeedError(ValueError):
    """A seed rule that is not known, or that this model, these data or this installation have nothing for."""


@dataclass
class Evidence:
    """All that a seed rule may look at of one image.

    Attributes:
        scores: (K+1, H, W) in [0, 1], refined, background first, then the K tagged classes.
        classes: (K,) class indices of these.
        num_classes: classes of the data set, background not among them.
        image: (H, W, 3) uint8.
        saliency: (H, W) in [0, 1], or None.
        averages: maps and CAM logits, (K, H, W) each, see `localization.average_maps`; None where the rule has no use
            for them.
    """

    scores: Tensor
    classes: Tensor
    num_classes: int
    image: np.ndarray
    saliency: Tensor | None = None
    averages: tuple[Tensor, Tensor] | None = None


@dataclass
class SeedRule:
    """`label(evidence)` gives an image's labels (H, W) uint8: 0 background, c + 1 class c, 255 open.

    Attributes:
        saliency: whether the data's column is "unused", "optional" or "needed".
        averages: whether it looks at `Evidence.averages`.
        alphas: whether it reads the class scores as alphas, which only matting makes.
    """

    label: Callable[[Evidence], Tensor]
    saliency: str = "unused"
    averages: bool = False
    alphas: bool = False


def build_seeds(name: str, options: dict | None = None) -> SeedRule:
    """The rule that a recipe names, with its options bound.

    - argmax: the largest score, as `localization.label_map` has it.
    - drs: `seed_drs` on the refined class scores; the background is what is not salient.
    - icd: `seed_icd` on unrefined maps that are probabilities of being object. Where the data have no saliency, the
      dense CRF closes the open pixels, see `crf.refine_labels`.
    - mat_label: `matting.merge_alphas`, which leaves uncertain alphas and near-ties open.

    Args:
        options: of that rule: `object_threshold`, `conflict_threshold` (drs), `confidence`, `iterations` (icd),
            `uncertain`, `tie` (mat_label).

    Raises:
        SeedError: there is no such rule or option, or the rule needs a library that is not installed.
    """
    if name not in SEEDS:
        raise SeedError(f"masks.seeds is {name!r}; there are {', '.join(SEEDS)}")
    if name == "icd":
        try:
            require_densecrf()
        except ImportError as error:
            raise SeedError(f"masks.seeds: icd: {error}") from error
    rule = SEEDS[name]
    known = {key: parameter.default for key, parameter in list(inspect.signature(rule.label).parameters.items())[1:]}
    for key, value in (options or {}).items():
        if key not in known:
            raise SeedError(f"masks.seed_options.{key}: no such option; {name} has {', '.join(known) or 'none'}")
        if not same_kind(known[key], value):
            raise SeedError(f"masks.seed_options.{key} is {value!r}; something like {known[key]!r} would be right")
    if rule.alphas:
        merge_alphas(torch.zeros(0, 1, 1), **(options or {}))  # reports senseless numbers now, not at the first image
    return replace(rule, label=functools.partial(rule.label, **(options or {})))


def seed_drs(
    scores: Tensor, saliency: Tensor, object_threshold: float = 0.2, conflict_threshold: float = 0.9
) -> Tensor:
    """DRS's pseudo labels with saliency (AAAI 2021; its released program).

    Class scores below `object_threshold` become 0; the background score is 1 - saliency, which is 1 above 50/255, else
    0; the largest score wins. Open (255) is where more than two of these scores exceed `conflict_threshold`, and where
    saliency is 1 but the label is background.

    Args:
        scores: (K+1, H, W) in [0, 1]; the background score is not used.
        saliency: (H, W) in [0, 1].

    Returns:
        (H, W) uint8: 0 background, k + 1 for the k-th class, 255 open.

    Raises:
        SeedError: saliency has another size.
    """
    if saliency.shape != scores.shape[1:]:
        raise SeedError(f"saliency of {tuple(saliency.shape)} pixels does not fit scores of {tuple(scores.shape[1:])}")
    salient = saliency > 50 / 255
    objects = scores[1:].masked_fill(scores[1:] < object_threshold, 0)
    channels = torch.cat([(~salient)[None].to(scores), objects])
    labels = channels.argmax(dim=0)
    conflict = (channels > conflict_threshold).sum(dim=0) > 2
    return labels.masked_fill(conflict | (salient & (labels == 0)), IGNORE_INDEX).to(torch.uint8)


def seed_icd(top_down: Tensor, cams: Tensor, saliency: Tensor | None = None) -> Tensor:
    """ICD's seeds (CVPR 2020) of one image, see `models.icd.icd_seeds`.

    Without saliency, ICD closes the open pixels with `crf.refine_labels`.

    Args:
        top_down: (K, H, W) top-down scores of the tagged classes.
        cams: (K, H, W) CAM logits of these classes, at the same resolution.
        saliency: (H, W) in [0, 1], or None.

    Returns:
        (H, W) uint8: 0 background, k + 1 for the k-th class, 255 open.
    """
    # One more class that is not tagged, so that an image without any tag needs no rule of its own.
    tags = F.pad(top_down.new_ones(1, len(top_down)), (0, 1))
    top_down, cams = (F.pad(maps, (0, 0, 0, 0, 0, 1))[None] for maps in (top_down, cams))
    seeds = icd_seeds(top_down, cams, tags, None if saliency is None else saliency[None])
    return seeds[0].to(torch.uint8)


def class_labels(labels: Tensor, classes: Tensor) -> Tensor:
    """(H, W) uint8 labels that count an image's tagged classes → uint8 labels of the data set.

    Args:
        labels: 0 background, k + 1 for the k-th tagged class, 255 open.
        classes: (K,) class indices c of the tagged classes; their label is c + 1.
    """
    values = torch.full((256,), IGNORE_INDEX, dtype=torch.uint8, device=labels.device)
    values[0] = 0
    values[1 : len(classes) + 1] = (classes + 1).to(values)
    return values[labels.long()]


def _label_argmax(evidence: Evidence) -> Tensor:
    return label_map(evidence.scores, evidence.classes)[0]


def _label_drs(evidence: Evidence, object_threshold: float = 0.2, conflict_threshold: float = 0.9) -> Tensor:
    seeds = seed_drs(evidence.scores, evidence.saliency, object_threshold, conflict_threshold)
    return class_labels(seeds, evidence.classes)


def _label_icd(evidence: Evidence, confidence: float = 0.5, iterations: int = 10) -> Tensor:
    maps, cams = evidence.averages
    if maps.numel() and not (maps.min() >= 0 and maps.max() <= 1):
        raise SeedError(
            "masks.seeds: icd reads maps that are probabilities, above 0.5 on the object; this classifier's are not "
            "(train it with cam.maps: icd)"
        )
    labels = class_labels(seed_icd(torch.logit(maps, eps=1e-6), cams, evidence.saliency), evidence.classes)
    if evidence.saliency is not None:
        return labels
    closed = refine_labels(labels.cpu().numpy(), evidence.image, evidence.num_classes + 1, confidence, iterations)
    return torch.from_numpy(closed).to(labels.device)


def _label_mat_label(evidence: Evidence, uncertain: tuple[float, float] = (0.4, 0.6), tie: float = 0.1) -> Tensor:
    return class_labels(merge_alphas(evidence.scores[1:], uncertain, tie), evidence.classes)


SEEDS = {
    "argmax": SeedRule(_label_argmax),
    "drs": SeedRule(_label_drs, saliency="needed"),
    "icd": SeedRule(_label_icd, saliency="optional", averages=True),
    "mat_label": SeedRule(_label_mat_label, alphas=True),
}
