"""Refinement: scores + image → better scores, in steps that a recipe names; and published rules for seeds.

Scores are (K+1, H, W) in [0, 1], background first, then the image's K tagged classes; their argmax is the label.
Label maps here count in the same way: 0 background, k + 1 the k-th *tagged* class of the image, 255 open;
`class_labels` turns that into class indices.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.icd import icd_seeds
from ..models.maps import IGNORE_INDEX
from ..models.pamr import pamr
from .crf import dense_crf, require_densecrf
from .matting import VitMatte, closed_form_alphas, knn_alphas
from .trimap import BACKGROUND, FOREGROUND, trimaps

MATTING_METHODS = ("closed_form", "knn", "vitmatte")


class RefinementError(ValueError):
    """Refinement steps that can't be built, or scores that don't fit their image."""


class Refiner(ABC):
    """Turns scores into better scores with the help of the image.

    Attributes:
        fallbacks: how often which fallback was taken since the refiner was built.
    """

    fallbacks: Counter

    def __call__(self, scores: Tensor, image: np.ndarray) -> Tensor:
        """(K+1, H, W) float scores in [0, 1] and (H, W, 3) uint8 image → (K+1, H, W) float32 scores in [0, 1].

        The result is on the device of `scores`, which are not changed. An image without tagged classes has nothing to
        refine.

        Raises:
            RefinementError: scores and image don't fit.
        """
        if scores.ndim != 3 or image.dtype != np.uint8 or image.shape != (*scores.shape[1:], 3):
            raise RefinementError(
                "scores (K+1, H, W) and an image (H, W, 3) of uint8 would be right, "
                f"got {tuple(scores.shape)} and {image.shape} of {image.dtype}"
            )
        scores = scores.float()
        return scores if len(scores) < 2 else self._refine(scores, image)

    @abstractmethod
    def _refine(self, scores: Tensor, image: np.ndarray) -> Tensor:
        """What `__call__` does, for an image with at least one tagged class."""


class Chain(Refiner):
    """Refiners one after another; none leaves the scores as they are."""

    def __init__(self, refiners: Sequence[Refiner]):
        self.refiners = list(refiners)

    @property
    def fallbacks(self) -> Counter:
        return sum((refiner.fallbacks for refiner in self.refiners), Counter())

    def _refine(self, scores: Tensor, image: np.ndarray) -> Tensor:
        for refiner in self.refiners:
            scores = refiner(scores, image)
        return scores


@dataclass
class Pamr(Refiner):
    """Pixel-adaptive refinement on the device of the scores, see `models.pamr`."""

    iterations: int = 10
    dilations: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 12, 24])

    def __post_init__(self):
        _at_least_one(self, "iterations")
        if not self.dilations or min(self.dilations) < 1:
            raise RefinementError(f"dilations={self.dilations}: numbers of at least 1 would be right")
        self.fallbacks = Counter()

    def _refine(self, scores: Tensor, image: np.ndarray) -> Tensor:
        images = torch.from_numpy(image.copy()).to(scores.device).permute(2, 0, 1)[None] / 255
        # The affinities sum to 1 up to rounding.
        return pamr(images, scores[None], self.iterations, self.dilations)[0].clamp(0, 1)


@dataclass
class Crf(Refiner):
    """Dense CRF, see `crf.dense_crf`; the scores become probabilities that sum to 1."""

    iterations: int = 10
    gaussian_sxy: float = 3.0
    gaussian_compat: float = 3.0
    bilateral_sxy: float = 80.0
    bilateral_srgb: float = 13.0
    bilateral_compat: float = 10.0

    def __post_init__(self):
        _at_least_one(self, "iterations")
        for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
            if getattr(self, name) <= 0:
                raise RefinementError(f"{name}={getattr(self, name)}: a positive number would be right")
        try:
            require_densecrf()
        except ImportError as error:
            raise RefinementError(str(error)) from error
        self.fallbacks = Counter()

    def _refine(self, scores: Tensor, image: np.ndarray) -> Tensor:
        refined = dense_crf(scores.cpu().numpy(), image, **dataclasses.asdict(self))
        return torch.from_numpy(refined).to(scores.device)


@dataclass
class Matting(Refiner):
    """Mat-Label: the class scores become trimaps, these alphas; the background score is 1 - the largest alpha.

    So the argmax is an object where its alpha exceeds 0.5. `merge_alphas` of `refined[1:]` leaves the rest open.

    Fallbacks, counted in `fallbacks` by these names, once per class:
    - "class not found": no certain foreground and no score above the background threshold; its alpha is 0.
    - "no certain background", "matting did not converge": known pixels keep their values; the alpha of the others is
      score / (score + background score), above 0.5 just where the class beat the background before.

    Attributes:
        method: closed_form, knn or vitmatte.
        model: vitmatte's directory or Hub id.
        device: where vitmatte runs.
        foreground_threshold, background_threshold, erosion: see `trimap`.
    """

    method: str = "closed_form"
    model: str = ""
    device: str = "cpu"
    foreground_threshold: float = 0.7
    background_threshold: float = 0.2
    erosion: int = 3

    def __post_init__(self):
        if self.method not in MATTING_METHODS:
            raise RefinementError(f"method={self.method!r}: {_either(MATTING_METHODS)} would be right")
        if (self.method == "vitmatte") != bool(self.model):
            raise RefinementError(
                f"method={self.method!r}, model={self.model!r}: vitmatte, and only vitmatte, needs a directory or Hub "
                "id as its model"
            )
        self._matte = {"closed_form": closed_form_alphas, "knn": knn_alphas}.get(self.method) or VitMatte(
            self.model, self.device
        )
        self.trimaps(np.zeros((0, 1, 1)))  # reports senseless thresholds now, not at the first image
        self.fallbacks = Counter()

    def trimaps(self, maps: np.ndarray) -> np.ndarray:
        """(K, H, W) class scores → (K, H, W) uint8 trimaps that this refiner mattes."""
        return trimaps(maps, self.foreground_threshold, self.background_threshold, self.erosion)

    def _refine(self, scores: Tensor, image: np.ndarray) -> Tensor:
        background, maps = scores[0].cpu().numpy(), scores[1:].cpu().numpy()
        known = self.trimaps(maps)
        alphas = self._matte(image, known)
        for k, alpha in enumerate(alphas):
            if not (known[k] != BACKGROUND).any():
                self.fallbacks["class not found"] += 1
            elif alpha is None:
                has_background = (known[k] == BACKGROUND).any()
                self.fallbacks["matting did not converge" if has_background else "no certain background"] += 1
                total = maps[k] + background
                share = np.divide(maps[k], total, where=total > 0, out=np.zeros_like(total))
                certain = [known[k] == FOREGROUND, known[k] == BACKGROUND]
                alphas[k] = np.select(certain, [1.0, 0.0], default=share).astype(np.float32)
        refined = torch.from_numpy(np.stack(alphas)).to(scores.device)
        return torch.cat([1 - refined.amax(dim=0, keepdim=True), refined])


REFINERS = {"pamr": Pamr, "crf": Crf, "matting": Matting}


def build_refiner(steps: Sequence[str | dict]) -> Chain:
    """The chain of refiners that a recipe names.

    Args:
        steps: names, or one-key mappings of a name to its options: `[]`, `[pamr]`, `[{crf: {iterations: 10}}]`,
            `[pamr, {matting: {method: knn}}]`. The options are the fields of `Pamr`, `Crf` and `Matting`.

    Raises:
        RefinementError: an unknown name, option or value, or a library that is not installed.
    """
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise RefinementError(f"refinement steps {steps!r}: a list such as [pamr, crf] would be right")
    return Chain([_build_step(step) for step in steps])


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
        RefinementError: saliency has another size.
    """
    if saliency.shape != scores.shape[1:]:
        raise RefinementError(
            f"saliency of {tuple(saliency.shape)} pixels does not fit scores of {tuple(scores.shape[1:])}"
        )
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


def _build_step(step: str | dict) -> Refiner:
    name, options = step, {}
    if isinstance(step, dict):
        if len(step) != 1:
            raise RefinementError(f"refinement step {step!r}: one name with its options would be right")
        ((name, options),) = step.items()
    if not isinstance(name, str) or name not in REFINERS:
        raise RefinementError(f"refinement step {name!r}: there are {_either(REFINERS)}")
    if options is not None and not isinstance(options, dict):
        raise RefinementError(f"refinement step {name}: a mapping of options would be right, not {options!r}")
    options = options or {}
    known = {option.name: option for option in dataclasses.fields(REFINERS[name])}
    for key, value in options.items():
        if key not in known:
            raise RefinementError(f"refinement step {name}: no option {key!r}; there are {', '.join(known)}")
        option = known[key]
        default = option.default_factory() if option.default is dataclasses.MISSING else option.default
        if not _same_kind(default, value):
            raise RefinementError(
                f"refinement step {name}: {key} is {value!r}; something like {default!r} would be right"
            )
    try:
        return REFINERS[name](**options)
    except ValueError as error:
        raise RefinementError(f"refinement step {name}: {error}") from error


def _same_kind(default, value) -> bool:
    if isinstance(default, list):
        return isinstance(value, list) and all(_same_kind(default[0], item) for item in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _at_least_one(refiner: Pamr | Crf, name: str) -> None:
    if getattr(refiner, name) < 1:
        raise RefinementError(f"{name}={getattr(refiner, name)}: 1 or more would be right")


def _either(names) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
