"""Refinement: scores + image → better scores, in the steps that a recipe names.

Scores are (K+1, H, W) in [0, 1], background first, then the image's K tagged classes; their argmax is the label.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, BaseImageProcessor

from ..models.maps import normalize_maps
from ..models.modeling_affinity import AffinityNetwork
from ..models.options import OptionError, Options, option, unknown_name
from ..models.pamr import refine_pictures
from ..models.pretrained import NO_CODE, load_config, pinned
from .crf import dense_crf, require_densecrf
from .grid_crf import grid_crf
from .matting import VitMatte, closed_form_alphas, knn_alphas
from .trimap import BACKGROUND, FOREGROUND, trimaps

_PIXELS = 1 << 20  # of images that a step refines together: PAMR's affinities take 200 bytes for each


class RefinementError(OptionError):
    """A refinement step that lacks its library or model, or scores that do not fit their image."""


@dataclass
class Note:
    """What the refinement of one image gives beside its scores.

    Attributes:
        fallbacks: how often which fallback was taken.
        pictures: intermediate results, name → (K, H, W) uint8, one of each tagged class; "trimap" and "alpha" of
            matting.
    """

    fallbacks: Counter = field(default_factory=Counter)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class RefinementStep(Options):
    """Turns scores into better scores with the help of the image; its fields are the step's options."""

    @property
    def makes_maps(self) -> bool:
        """Whether it makes maps, each divided by its maximum, that do not depend on the background score."""
        return False

    @property
    def keeps_channels_apart(self) -> bool:
        """Whether each channel is refined as if it were the only one."""
        return False

    @property
    def reads_background(self) -> bool:
        """Whether the class scores that it gives depend on the background score."""
        return not self.keeps_channels_apart

    @property
    def replaces_background(self) -> bool:
        """Whether the background score that it gives comes from the class scores alone."""
        return False

    def prepare(self) -> None:
        """Load what the step needs.

        Raises:
            RefinementError: its library is not installed, or its model is not there.
        """

    @abstractmethod
    def refine(
        self, scores: list[Tensor], images: list[np.ndarray], notes: list[Note], workers: Workers
    ) -> list[Tensor]:
        """Refined scores of several images, each with at least one tagged class.

        Args:
            scores: (K+1, H, W) float32 of each image; not changed.
            images: (H, W, 3) uint8.
            notes: are filled.
            workers: processes that may share the images.
        """


class ImageStep(RefinementStep):
    """A step that refines image by image on the CPU, so that several processes can share the images."""

    @property
    def can_be_sent(self) -> bool:
        """Whether other processes can do the work."""
        return True

    def refine(
        self, scores: list[Tensor], images: list[np.ndarray], notes: list[Note], workers: Workers
    ) -> list[Tensor]:
        if not (workers.count and self.can_be_sent):
            return [self.refine_one(*one) for one in zip(scores, images, notes, strict=True)]
        found = workers.map(self._in_worker, [score.cpu().numpy() for score in scores], images)
        for note, (_, made) in zip(notes, found, strict=True):
            note.fallbacks.update(made.fallbacks)
            note.pictures |= made.pictures
        return [torch.from_numpy(array).to(score.device) for (array, _), score in zip(found, scores, strict=True)]

    def _in_worker(self, scores: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, Note]:
        note = Note()
        return self.refine_one(torch.from_numpy(scores), image, note).numpy(), note

    @abstractmethod
    def refine_one(self, scores: Tensor, image: np.ndarray, note: Note) -> Tensor:
        """What [`RefinementStep.refine`] does, of one image."""


@dataclass
class Pamr(RefinementStep):
    """Pixel-adaptive refinement on the device of the scores, see `models.pamr`."""

    iterations: int = option(10, "Number of times.", at_least=1)
    dilations: list[int] = option([1, 2, 4, 8, 12, 24], "Distances to the neighbours in pixels.", at_least=1)

    @property
    def keeps_channels_apart(self) -> bool:
        return True

    def refine(
        self, scores: list[Tensor], images: list[np.ndarray], notes: list[Note], workers: Workers
    ) -> list[Tensor]:
        refined = list(scores)
        for together, pictures, padded in _of_one_size(scores, images):
            results = refine_pictures(torch.from_numpy(pictures), padded, self.iterations, self.dilations)
            for i, result in zip(together, results, strict=True):
                refined[i] = result[: len(scores[i])]
        return refined


def _of_one_size(
    scores: Sequence[Tensor], images: Sequence[np.ndarray]
) -> Iterator[tuple[list[int], np.ndarray, Tensor]]:
    """Images of one size together: indices, images (B, H, W, 3), and scores (B, K, H, W), padded by channels of 0.

    For steps in which channels do not influence each other, so that those of the padding do no harm.
    """
    of_size: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        of_size.setdefault(image.shape, []).append(i)
    for members in of_size.values():
        count = _count_together(scores[members[0]])
        for together in (members[start : start + count] for start in range(0, len(members), count)):
            padded = pad_sequence([scores[i] for i in together], batch_first=True)
            yield together, np.stack([images[i] for i in together]), padded


def _count_together(scores: Tensor) -> int:
    """How many images of the size of these scores are refined together.

    On a CPU each stays alone, so that its result does not depend on the others, see `image_by_image`.
    """
    return 1 if scores.device.type == "cpu" else max(1, _PIXELS // (scores.shape[-2] * scores.shape[-1]))


@dataclass
class Walk(RefinementStep):
    """A random walk of the class maps along learnt affinities, see `models.affinity`; IRN's and AffinityNet's.

    The walked map of each class is divided by its maximum. The background score stays what it is or, with
    `background_alpha`, walks along, and no map is divided by anything: AffinityNet's way, whose labels are the argmax.
    """

    model: str = option("", "Directory or Hub id of an affinity network; empty is that of the run, or of --affinity.")
    steps: int = option(
        64, "Of the walk; more blur boundaries that are not certain. IRN's program takes 256.", at_least=0
    )
    power: float = option(10.0, "Of the affinities: larger values stop at weaker boundaries.", above=0)
    radius: int = option(5, "A step leads to positions nearer than this.", at_least=2)
    background_alpha: float | None = option(
        None, "The background score (1 - largest map)^alpha walks along with the classes.", above=0
    )

    @property
    def makes_maps(self) -> bool:
        return self.background_alpha is None

    @property
    def reads_background(self) -> bool:
        return False

    @property
    def replaces_background(self) -> bool:
        return self.background_alpha is not None

    def prepare(self) -> None:
        if not self.model:
            raise RefinementError(
                "walk.model: expected an affinity network (--affinity, or walk: {model: DIR}), got none; "
                "`wsss train-affinity` makes one, `wsss run` for masks.refine alone"
            )
        try:
            self._network  # noqa: B018  (loads it)
        except (OSError, ValueError) as error:
            raise RefinementError(f"walk.model: {error}") from error

    @cached_property
    def _network(self) -> tuple[Any, BaseImageProcessor]:
        name, revision = pinned(self.model, NO_CODE)
        config = load_config(name, **revision)
        if not isinstance(config, AffinityNetwork.config_class):
            raise ValueError(f"{self.model}: expected an affinity network, got a {config.model_type}")
        network = AffinityNetwork.from_pretrained(name, **revision).eval()
        return network, AutoImageProcessor.from_pretrained(name, **revision)

    def refine(
        self, scores: list[Tensor], images: list[np.ndarray], notes: list[Note], workers: Workers
    ) -> list[Tensor]:
        network, processor = self._network
        refined = list(scores)
        for together, pictures, padded in _of_one_size(scores, images):
            network.to(padded.device)
            # Pictures, not arrays: a (3, W, 3) array could be taken for channels first.
            inputs = processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
            if self.background_alpha is not None:
                largest = padded[:, 1:].amax(dim=1, keepdim=True)
                padded = torch.cat([(1 - largest).clamp(min=0) ** self.background_alpha, padded[:, 1:]], dim=1)
            pixel_values = inputs["pixel_values"].to(padded.device)
            walked = network.walk(pixel_values, padded, self.radius, self.power, self.steps)
            if self.background_alpha is None:
                walked = torch.cat([padded[:, :1], normalize_maps(walked[:, 1:])], dim=1)
            for i, result in zip(together, walked, strict=True):
                refined[i] = result[: len(scores[i])]
        return refined


@dataclass
class Crf(ImageStep):
    """Dense CRF, see `crf.dense_crf`; the scores become probabilities that sum to 1."""

    iterations: int = option(10, "At most so many.", at_least=1)
    gaussian_sxy: float = option(3.0, "Width of the smoothness kernel in pixels.", above=0)
    gaussian_compat: float = option(3.0, "Weight of the smoothness kernel.")
    bilateral_sxy: float = option(80.0, "Width of the appearance kernel in pixels.", above=0)
    bilateral_srgb: float = option(13.0, "Width of the appearance kernel in colours of 0..255.", above=0)
    bilateral_compat: float = option(10.0, "Weight of the appearance kernel.")
    tolerance: float = option(
        0.001, "Stop after an iteration that moves less than this share of the probability.", at_least=0, below=1
    )

    def prepare(self) -> None:
        try:
            require_densecrf()
        except ImportError as error:
            raise RefinementError(str(error)) from error

    def refine_one(self, scores: Tensor, image: np.ndarray, note: Note) -> Tensor:
        refined = dense_crf(scores.cpu().numpy(), image, **dataclasses.asdict(self))
        return torch.from_numpy(refined).to(scores.device)


@dataclass
class GridCrf(ImageStep):
    """A fully connected CRF in torch alone, see `grid_crf.grid_crf`; the scores become probabilities that sum to 1."""

    iterations: int = option(5, "Number of times.", at_least=1)
    sxy: float = option(80.0, "Width of the kernel in pixels.", above=0)
    srgb: float = option(8.0, "Width of the kernel in colours of 0..255.", above=0)
    compat: float = option(4.0, "Weight of the kernel.")
    grid: int = option(16, "Pixels along the longer side that all pixels are compared with.", at_least=1)

    def refine_one(self, scores: Tensor, image: np.ndarray, note: Note) -> Tensor:
        colours = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(scores.device)
        return grid_crf(scores, colours, **dataclasses.asdict(self))


@dataclass
class Matting(ImageStep):
    """Mat-Label: the class scores become trimaps, these alphas; the background score is 1 - the largest alpha.

    So the argmax is an object where its alpha exceeds 0.5. `merge_alphas` of `refined[1:]` ignores the uncertain rest.

    Fallbacks, counted in the image's note by these names, once per class:
    - "class not found": no certain foreground and no score above the background threshold; its alpha is 0.
    - "no certain background", "matting did not converge": known pixels keep their values; the alpha of the others is
      their level, above 0.5 just where the class beat the background before.

    The thresholds are those of `levels`, so they follow the background score; where it is 0.4, the defaults are scores
    of 0.7 and 0.2.
    """

    method: Literal["closed_form", "knn", "vitmatte"] = option("closed_form", "closed_form | knn | vitmatte")
    model: str = option("", "Directory or Hub id of vitmatte.")
    device: str = option("cpu", "Where vitmatte runs.")
    foreground_threshold: float = option(0.75, "Level above which a pixel is foreground.", at_least=0, at_most=1)
    background_threshold: float = option(0.25, "Level below which a pixel is background.", at_least=0, at_most=1)
    erosion: int = option(3, "Pixels at the border of either that become unknown.", at_least=0)
    prior: float = option(
        0.01,
        "How much an unknown pixel tends to its own level, see closed_form_alphas; not of vitmatte. With 0 colours "
        "decide alone, and where scores are rough carry an alpha far beyond its object.",
        at_least=0,
    )

    def check(self) -> None:
        if (self.method == "vitmatte") != bool(self.model):
            wanted = "a directory or Hub id with method vitmatte" if not self.model else "none without method vitmatte"
            raise ValueError(f"model: expected {wanted}, got {self.model!r} with {self.method}")
        if self.background_threshold >= self.foreground_threshold:
            raise ValueError(
                f"background_threshold: expected a number below foreground_threshold ({self.foreground_threshold}), "
                f"got {self.background_threshold}"
            )

    def prepare(self) -> None:
        try:
            self._matte  # noqa: B018  (loads vitmatte)
        except (OSError, ValueError) as error:
            raise RefinementError(f"matting.model: {error}") from error

    @cached_property
    def _matte(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], list[np.ndarray | None]]:
        if self.method == "vitmatte":
            return VitMatte(self.model, self.device)
        return partial(closed_form_alphas if self.method == "closed_form" else knn_alphas, prior=self.prior)

    @property
    def can_be_sent(self) -> bool:
        return self.method != "vitmatte"  # which works on its device

    def trimaps(self, maps: np.ndarray) -> np.ndarray:
        """(K, H, W) `levels` of the class scores → (K, H, W) uint8 trimaps."""
        return trimaps(maps, self.foreground_threshold, self.background_threshold, self.erosion)

    def refine_one(self, scores: Tensor, image: np.ndarray, note: Note) -> Tensor:
        maps = levels(scores.cpu().numpy())
        known = self.trimaps(maps)
        alphas = []
        for k, alpha in enumerate(self._matte(image, known, maps)):
            if not (known[k] != BACKGROUND).any():
                note.fallbacks["class not found"] += 1
            elif alpha is None:
                has_background = (known[k] == BACKGROUND).any()
                note.fallbacks["matting did not converge" if has_background else "no certain background"] += 1
            if alpha is None:
                certain = [known[k] == FOREGROUND, known[k] == BACKGROUND]
                alpha = np.select(certain, [1.0, 0.0], default=maps[k]).astype(np.float32)
            alphas.append(alpha)
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


STEPS: dict[str, type[RefinementStep]] = {
    "walk": Walk,
    "pamr": Pamr,
    "crf": Crf,
    "grid_crf": GridCrf,
    "matting": Matting,
}


class Workers:
    """Processes of one thread each that share the images of a batch; started when they are first needed.

    Args:
        count: 0 is none.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable, *arguments: Iterable) -> list:
        """`function` of each argument, in order.

        Raises:
            RefinementError: a process was killed.
        """
        if self._pool is None:
            # New processes, since a fork of one that has threads may never end.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.count, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
            )
        try:
            return list(self._pool.map(function, *arguments))
        except BrokenProcessPool as error:
            self.close()
            raise RefinementError(
                "refinement: expected all workers to live, got one that was killed; workers=0 needs least memory"
            ) from error

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class RefinementChain:
    """Steps one after another; none leaves the scores as they are.

    A context manager that owns its worker processes: they end with the block. `prepare` is called at its begin.

    Args:
        steps: the steps, in order.
        workers: processes that share the images of a batch in steps that work image by image; 0 refines in this one.
    """

    def __init__(self, steps: Sequence[RefinementStep], workers: int = 0):
        self.steps = list(steps)
        self.workers = Workers(workers)

    def __enter__(self) -> RefinementChain:
        self.prepare()
        return self

    def __exit__(self, *_exception) -> None:
        self.workers.close()

    @property
    def keeps_channels_apart(self) -> bool:
        """Whether each channel is refined as if it were the only one."""
        return all(step.keeps_channels_apart for step in self.steps)

    def reads_background(self, afterwards: bool) -> bool:
        """Whether the background score that it is given plays a part.

        Args:
            afterwards: whether the background of the refined scores does.
        """
        for step in self.steps:
            if step.reads_background or step.replaces_background:
                return step.reads_background
        return afterwards

    def prepare(self) -> None:
        """Load what the steps need, before hours of work.

        Raises:
            RefinementError: a library or model is missing.
        """
        for step in self.steps:
            step.prepare()

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
        """The same of several images, which a step may treat together."""
        for score, image in zip(scores, images, strict=True):
            if score.ndim != 3 or image.dtype != np.uint8 or image.shape != (*score.shape[1:], 3):
                raise RefinementError(
                    "refinement: expected scores (K+1, H, W) and an image (H, W, 3) of uint8, "
                    f"got {tuple(score.shape)} and {image.shape} of {image.dtype}"
                )
        refined = [score.float() for score in scores]
        tagged = [i for i, score in enumerate(refined) if len(score) > 1]
        results = [refined[i] for i in tagged]
        for step in self.steps:
            results = step.refine(results, [images[i] for i in tagged], [notes[i] for i in tagged], self.workers)
        for i, result in zip(tagged, results, strict=True):
            refined[i] = result
        return refined


def build_refinement(steps: Sequence[str | Mapping], where: str = "masks.refine", workers: int = 0) -> RefinementChain:
    """The chain of steps that a recipe names; nothing is loaded yet, see [`RefinementChain.prepare`].

    Args:
        steps: names, or one-key mappings of a name to its options: `[]`, `[pamr]`, `[{crf: {iterations: 10}}]`,
            `[pamr, {matting: {method: knn}}]`. The options are the fields of `Walk`, `Pamr`, `Crf`, `GridCrf`
            and `Matting`.
        where: the option that names them; begins the messages.
        workers: as of [`RefinementChain`].

    Raises:
        OptionError: an unknown name or option, or an unfit value.
    """
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise OptionError(f"{where}: expected a list such as [pamr, crf], got {steps!r}")
    return RefinementChain([_build_step(step, f"{where}[{i}]") for i, step in enumerate(steps)], workers)


def _build_step(step: Any, where: str) -> RefinementStep:
    name, options = step, None
    if isinstance(step, Mapping):
        if len(step) != 1:
            raise OptionError(f"{where}: expected one name with its options, got {dict(step)!r}")
        ((name, options),) = step.items()
    if not isinstance(name, str) or name not in STEPS:
        raise OptionError(unknown_name(f"{where}: {name!r}", name, STEPS))
    return STEPS[name].from_dict(options, f"{where}.{name}")
