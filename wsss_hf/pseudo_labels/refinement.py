"""Refinement: scores + image → better scores, in steps that a recipe names.

Scores are (K+1, H, W) in [0, 1], background first, then the image's K tagged classes; their argmax is the label.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.pamr import pamr
from .crf import dense_crf, require_densecrf
from .matting import VitMatte, closed_form_alphas, knn_alphas
from .trimap import BACKGROUND, FOREGROUND, trimaps

MATTING_METHODS = ("closed_form", "knn", "vitmatte")
_PAMR_PIXELS = 1 << 20  # of images that PAMR refines together: its affinities take 200 bytes for each


class RefinementError(ValueError):
    """Refinement steps that can't be built, or scores that don't fit their image."""


@dataclass
class Note:
    """What refinement of one image leaves besides its scores.

    Attributes:
        fallbacks: how often which fallback was taken.
        pictures: steps on the way, name → (K, H, W) uint8, one of each tagged class; "trimap" and "alpha" of matting.
    """

    fallbacks: Counter = field(default_factory=Counter)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class Refiner(ABC):
    """Turns scores into better scores with the help of the image."""

    def __call__(self, scores: Tensor, image: np.ndarray, note: Note | None = None) -> Tensor:
        """(K+1, H, W) float scores in [0, 1] and (H, W, 3) uint8 image → (K+1, H, W) float32 scores in [0, 1].

        The result is on the device of `scores`, which are not changed. An image without tagged classes has nothing to
        refine.

        Args:
            note: is filled.

        Raises:
            RefinementError: scores and image don't fit.
        """
        return self.batch([scores], [image], [note or Note()])[0]

    def batch(self, scores: Sequence[Tensor], images: Sequence[np.ndarray], notes: Sequence[Note]) -> list[Tensor]:
        """`__call__` of several images, which a refiner may treat together."""
        for score, image in zip(scores, images, strict=True):
            if score.ndim != 3 or image.dtype != np.uint8 or image.shape != (*score.shape[1:], 3):
                raise RefinementError(
                    "scores (K+1, H, W) and an image (H, W, 3) of uint8 would be right, "
                    f"got {tuple(score.shape)} and {image.shape} of {image.dtype}"
                )
        refined = [score.float() for score in scores]
        tagged = [i for i, score in enumerate(refined) if len(score) > 1]
        results = self._refine_batch(
            [refined[i] for i in tagged], [images[i] for i in tagged], [notes[i] for i in tagged]
        )
        for i, result in zip(tagged, results, strict=True):
            refined[i] = result
        return refined

    @abstractmethod
    def _refine_batch(self, scores: list[Tensor], images: list[np.ndarray], notes: list[Note]) -> list[Tensor]:
        """What `batch` does, for images with at least one tagged class."""


class OneByOne(Refiner):
    """A refiner of single images, which several processes may share.

    Attributes:
        workers: processes that refine the images of a batch; 0 refines in this one.
    """

    workers = 0

    @property
    def can_be_sent(self) -> bool:
        """Whether other processes can do the work."""
        return True

    def _refine_batch(self, scores: list[Tensor], images: list[np.ndarray], notes: list[Note]) -> list[Tensor]:
        if not (self.workers and self.can_be_sent):
            return [self._refine(*one) for one in zip(scores, images, notes, strict=True)]
        arrays = [score.cpu().numpy() for score in scores]
        try:
            found = list(_pool(self.workers).map(self._in_worker, arrays, images))
        except BrokenProcessPool as error:
            _pool.cache_clear()
            raise RefinementError("a process that refines was killed; workers=0 needs least memory") from error
        for note, (_, made) in zip(notes, found, strict=True):
            note.fallbacks.update(made.fallbacks)
            note.pictures |= made.pictures
        return [torch.from_numpy(array).to(score.device) for (array, _), score in zip(found, scores, strict=True)]

    def _in_worker(self, scores: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, Note]:
        note = Note()
        return self._refine(torch.from_numpy(scores), image, note).numpy(), note

    @abstractmethod
    def _refine(self, scores: Tensor, image: np.ndarray, note: Note) -> Tensor:
        """What `__call__` does, for an image with at least one tagged class."""


class Chain(Refiner):
    """Refiners one after another; none leaves the scores as they are."""

    def __init__(self, refiners: Sequence[Refiner]):
        self.refiners = list(refiners)

    def _refine_batch(self, scores: list[Tensor], images: list[np.ndarray], notes: list[Note]) -> list[Tensor]:
        for refiner in self.refiners:
            scores = refiner.batch(scores, images, notes)
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

    def _refine_batch(self, scores: list[Tensor], images: list[np.ndarray], notes: list[Note]) -> list[Tensor]:
        refined = list(scores)
        of_size: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            of_size.setdefault(image.shape, []).append(i)
        for (height, width, _), members in of_size.items():
            count = max(1, _PAMR_PIXELS // (height * width))
            for together in (members[start : start + count] for start in range(0, len(members), count)):
                # Channels do not influence each other, so those that fill up are no harm.
                padded = pad_sequence([scores[i] for i in together], batch_first=True)
                colours = torch.from_numpy(np.stack([images[i] for i in together])).to(padded.device)
                results = pamr(colours.permute(0, 3, 1, 2) / 255, padded, self.iterations, self.dilations)
                for i, result in zip(together, results, strict=True):
                    # The affinities sum to 1 up to rounding.
                    refined[i] = result[: len(scores[i])].clamp(0, 1)
        return refined


@dataclass
class Crf(OneByOne):
    """Dense CRF, see `crf.dense_crf`; the scores become probabilities that sum to 1."""

    iterations: int = 10
    gaussian_sxy: float = 3.0
    gaussian_compat: float = 3.0
    bilateral_sxy: float = 80.0
    bilateral_srgb: float = 13.0
    bilateral_compat: float = 10.0
    tolerance: float = 0.001

    def __post_init__(self):
        _at_least_one(self, "iterations")
        for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
            if getattr(self, name) <= 0:
                raise RefinementError(f"{name}={getattr(self, name)}: a positive number would be right")
        if not 0 <= self.tolerance < 1:
            raise RefinementError(f"tolerance={self.tolerance}: a share in [0, 1) would be right")
        try:
            require_densecrf()
        except ImportError as error:
            raise RefinementError(str(error)) from error

    def _refine(self, scores: Tensor, image: np.ndarray, note: Note) -> Tensor:
        refined = dense_crf(scores.cpu().numpy(), image, **dataclasses.asdict(self))
        return torch.from_numpy(refined).to(scores.device)


@dataclass
class Matting(OneByOne):
    """Mat-Label: the class scores become trimaps, these alphas; the background score is 1 - the largest alpha.

    So the argmax is an object where its alpha exceeds 0.5. `merge_alphas` of `refined[1:]` leaves the rest open.

    Fallbacks, counted in the image's note by these names, once per class:
    - "class not found": no certain foreground and no score above the background threshold; its alpha is 0.
    - "no certain background", "matting did not converge": known pixels keep their values; the alpha of the others is
      their level, above 0.5 just where the class beat the background before.

    Attributes:
        method: closed_form, knn or vitmatte.
        model: vitmatte's directory or Hub id.
        device: where vitmatte runs.
        foreground_threshold, background_threshold, erosion: see `trimap`. The thresholds are those of `levels`, so
            they follow the background score; where it is 0.4, the defaults are scores of 0.7 and 0.2.
        prior: how much an unknown pixel tends to its own level, see `closed_form_alphas`; not of vitmatte. With 0, as
            elsewhere, colours decide alone, and where scores are rough carry an alpha far beyond its object.
    """

    method: str = "closed_form"
    model: str = ""
    device: str = "cpu"
    foreground_threshold: float = 0.75
    background_threshold: float = 0.25
    erosion: int = 3
    prior: float = 0.01

    def __post_init__(self):
        if self.prior < 0:
            raise RefinementError(f"prior={self.prior}: 0 or more would be right")
        if self.method not in MATTING_METHODS:
            raise RefinementError(f"method={self.method!r}: {_either(MATTING_METHODS)} would be right")
        if (self.method == "vitmatte") != bool(self.model):
            raise RefinementError(
                f"method={self.method!r}, model={self.model!r}: vitmatte, and only vitmatte, needs a directory or Hub "
                "id as its model"
            )
        solver = {"closed_form": closed_form_alphas, "knn": knn_alphas}.get(self.method)
        self._matte = partial(solver, prior=self.prior) if solver else VitMatte(self.model, self.device)
        self.trimaps(np.zeros((0, 1, 1)))  # reports senseless thresholds now, not at the first image

    @property
    def can_be_sent(self) -> bool:
        return self.method != "vitmatte"  # which works on its device

    def trimaps(self, maps: np.ndarray) -> np.ndarray:
        """(K, H, W) `levels` of the class scores → (K, H, W) uint8 trimaps that this refiner mattes."""
        return trimaps(maps, self.foreground_threshold, self.background_threshold, self.erosion)

    def _refine(self, scores: Tensor, image: np.ndarray, note: Note) -> Tensor:
        maps = levels(scores.cpu().numpy())
        known = self.trimaps(maps)
        alphas = self._matte(image, known, maps)
        for k, alpha in enumerate(alphas):
            if not (known[k] != BACKGROUND).any():
                note.fallbacks["class not found"] += 1
            elif alpha is None:
                has_background = (known[k] == BACKGROUND).any()
                note.fallbacks["matting did not converge" if has_background else "no certain background"] += 1
                certain = [known[k] == FOREGROUND, known[k] == BACKGROUND]
                alphas[k] = np.select(certain, [1.0, 0.0], default=maps[k]).astype(np.float32)
        note.pictures |= {"trimap": known, "alpha": (255 * np.stack(alphas)).round().astype(np.uint8)}
        refined = torch.from_numpy(np.stack(alphas)).to(scores.device)
        return torch.cat([1 - refined.amax(dim=0, keepdim=True), refined])


def levels(scores: np.ndarray) -> np.ndarray:
    """How near class scores are to 1 or to 0, seen from the background score.

    What a map's value means depends on the method that made it; the background score, fixed or found, says where its
    objects begin. Piecewise linear: 0 stays 0, the background score becomes 0.5, 1 stays 1.

    Args:
        scores: (K+1, H, W) in [0, 1], background first.

    Returns:
        (K, H, W) in [0, 1].
    """
    background, maps = scores[:1], scores[1:]
    below = np.divide(maps, background, where=background > 0, out=np.zeros_like(maps))
    above = np.divide(maps - background, 1 - background, where=background < 1, out=np.zeros_like(maps))
    return np.where((maps < background) | (maps == 0), below, 1 + above) / 2


REFINERS = {"pamr": Pamr, "crf": Crf, "matting": Matting}


@lru_cache(maxsize=1)
def _pool(workers: int) -> ProcessPoolExecutor:
    """New processes, since a fork of one that has threads may never end; each with a single thread."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,))


def build_refiner(steps: Sequence[str | dict], workers: int = 0) -> Chain:
    """The chain of refiners that a recipe names.

    Args:
        steps: names, or one-key mappings of a name to its options: `[]`, `[pamr]`, `[{crf: {iterations: 10}}]`,
            `[pamr, {matting: {method: knn}}]`. The options are the fields of `Pamr`, `Crf` and `Matting`.
        workers: processes that share the images of a batch in steps that work image by image on the CPU.

    Raises:
        RefinementError: an unknown name, option or value, or a library that is not installed.
    """
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise RefinementError(f"refinement steps {steps!r}: a list such as [pamr, crf] would be right")
    refiners = [_build_step(step) for step in steps]
    for refiner in refiners:
        if isinstance(refiner, OneByOne):
            refiner.workers = workers
    return Chain(refiners)


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
        if not same_kind(default, value):
            raise RefinementError(
                f"refinement step {name}: {key} is {value!r}; something like {default!r} would be right"
            )
    try:
        return REFINERS[name](**options)
    except ValueError as error:
        raise RefinementError(f"refinement step {name}: {error}") from error


def same_kind(default, value) -> bool:
    """Whether an option's value is of its default's type; whole numbers will do for broken ones, lists for tuples."""
    if isinstance(default, list | tuple):
        return isinstance(value, list) and all(same_kind(default[0], item) for item in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _at_least_one(refiner: Pamr | Crf, name: str) -> None:
    if getattr(refiner, name) < 1:
        raise RefinementError(f"{name}={getattr(refiner, name)}: 1 or more would be right")


def _either(names) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
