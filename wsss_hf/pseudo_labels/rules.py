"""From scores to labels: the rules, some of them published, that a recipe names in `masks.seeds`.

Published rules for the tagged classes of one image count 0 background, k + 1 the k-th *tagged* class, 255 ignore;
`class_labels` turns that into labels of the data set.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from ..data.saliency import check_saliency, rows_with_saliency
from ..data.tagged import class_names
from ..inference.cam_maps import label_map
from ..models.icd import icd_seeds
from ..models.maps import IGNORE_INDEX
from ..models.options import OptionError, Options, option, unknown_name
from ..refinement.crf import refine_labels, require_densecrf
from ..refinement.matting import merge_alphas
from ..refinement.steps import build_refinement
from ..settings import AUTO, MasksSettings

_THRESHOLD_TEXT = "Pixels whose saliency is above it are salient; auto finds it on all maps, without any mask."


class RuleError(OptionError):
    """A label rule for which this model, these data or this installation lack something."""


@dataclass
class Evidence:
    """All that a label rule may look at of one image.

    Attributes:
        scores: (K+1, H, W) in [0, 1], refined, background first, then the K tagged classes.
        classes: (K,) class indices of these.
        num_classes: classes of the data set, background not among them.
        image: (H, W, 3) uint8.
        saliency: (H, W) in [0, 1], or None.
        averages: logits of the maps and of the CAMs, (K, H, W) each, see `cam_maps.average_maps`; None where the rule
            does not use them.
    """

    scores: Tensor
    classes: Tensor
    num_classes: int
    image: np.ndarray
    saliency: Tensor | None = None
    averages: tuple[Tensor, Tensor] | None = None


class Rule(Options):
    """Gives an image its labels; its fields are the rule's options.

    Attributes:
        saliency: whether the data's column is "unused", "optional" or "needed".
        saliency_threshold: where a saliency map is above it a pixel is salient; "auto" until it is found.
        averages: whether it looks at `Evidence.averages`.
        scores: whether it looks at `Evidence.scores`.
        background: whether at their background, too: "always", "never", or where the data are "without saliency".
        alphas: whether it reads the class scores as alphas, which only matting makes.
    """

    saliency = "unused"
    saliency_threshold: float | str | None = None
    averages = False
    scores = True
    background = "always"
    alphas = False

    @abstractmethod
    def label(self, evidence: Evidence) -> Tensor:
        """(H, W) uint8: 0 background, c + 1 class c, 255 ignore."""

    def decisive_scores(self, evidence: Evidence) -> Tensor:
        """(K+1, H, W) in [0, 1], background first, whose largest one is the label, where that is not ignored; the
        confidence of the labels is theirs, see `cam_maps.label_confidence`."""
        return evidence.scores

    @property
    def salient_above(self) -> float:
        """The saliency threshold as a number.

        Raises:
            RuleError: it is not found yet, see `threshold.with_threshold`.
        """
        threshold = self.saliency_threshold
        if threshold is None or isinstance(threshold, str):
            raise RuleError(f"masks.seed_options.saliency_threshold: expected a number, got {threshold!r}")
        return threshold

    def prepare(self) -> None:
        """Load what the rule needs.

        Raises:
            RuleError: its library is not installed.
        """

    def check_classes(self, num_classes: int) -> None:
        """Whether the options fit a data set of so many classes that has no saliency maps.

        Raises:
            RuleError: names the option.
        """


@dataclass
class ArgmaxRule(Rule):
    """The largest score, see `cam_maps.label_map`."""

    def label(self, evidence: Evidence) -> Tensor:
        return label_map(evidence.scores, evidence.classes)


@dataclass
class DrsRule(Rule):
    """DRS: [`seed_drs`] on the refined class scores; the background is what is not salient."""

    saliency = "needed"
    background = "never"

    object_threshold: float = option(0.2, "Class scores below it become 0.", at_least=0, at_most=1)
    conflict_threshold: float = option(
        0.9, "Pixels with more than two scores above it are ignored.", at_least=0, at_most=1
    )
    saliency_threshold: float | Literal["auto"] = option(AUTO, _THRESHOLD_TEXT, at_least=0, at_most=1)

    def label(self, evidence: Evidence) -> Tensor:
        assert evidence.saliency is not None
        thresholds = self.object_threshold, self.conflict_threshold, self.salient_above
        return class_labels(seed_drs(evidence.scores, evidence.saliency, *thresholds), evidence.classes)

    def decisive_scores(self, evidence: Evidence) -> Tensor:
        assert evidence.saliency is not None
        return _drs_scores(evidence.scores, evidence.saliency > self.salient_above, self.object_threshold)


@dataclass
class SaliencyRule(Rule):
    """The class with the largest score where the image is salient, background elsewhere. Not published: it is for
    saliency maps that are trusted, and for images of one tag above all.

    Ignored are only salient pixels of a tagged image where every score is 0.
    """

    saliency = "needed"
    background = "never"

    object_threshold: float = option(
        1.0, "Pixels with a class score above it are objects, salient or not; 1 is none.", at_least=0, at_most=1
    )
    saliency_threshold: float | Literal["auto"] = option(AUTO, _THRESHOLD_TEXT, at_least=0, at_most=1)

    def label(self, evidence: Evidence) -> Tensor:
        assert evidence.saliency is not None
        scores = self.decisive_scores(evidence)
        unknown = (evidence.saliency > self.salient_above) & (scores.amax(dim=0) <= 0)
        return label_map(scores, evidence.classes).masked_fill(unknown, IGNORE_INDEX)

    def decisive_scores(self, evidence: Evidence) -> Tensor:
        """The background's is `object_threshold` where the image is not salient, else 0."""
        assert evidence.saliency is not None
        objects = evidence.scores[1:]
        if not len(objects):
            return torch.ones_like(evidence.scores)
        background = (evidence.saliency <= self.salient_above).to(objects) * self.object_threshold
        return torch.cat([background[None], objects])


@dataclass
class AutoRule(SaliencyRule):
    """[`SaliencyRule`] where the data have saliency maps, [`ArgmaxRule`] where they have none."""

    saliency = "optional"
    background = "without saliency"

    def label(self, evidence: Evidence) -> Tensor:
        if evidence.saliency is None:
            return label_map(evidence.scores, evidence.classes)
        return super().label(evidence)

    def decisive_scores(self, evidence: Evidence) -> Tensor:
        return evidence.scores if evidence.saliency is None else super().decisive_scores(evidence)


@dataclass
class IcdRule(Rule):
    """ICD: [`seed_icd`] on unrefined maps that are probabilities of being object.

    Where the data have no saliency, the dense CRF labels the ignored pixels, see `crf.refine_labels`.
    """

    saliency = "optional"
    averages = True
    scores = False
    background = "never"

    saliency_threshold: float | Literal["auto"] = option(AUTO, _THRESHOLD_TEXT, at_least=0, at_most=1)
    confidence: float = option(
        0.5, "Of a given label in the CRF; each other one of n labels has (1 - confidence) / n.", above=0, below=1
    )
    iterations: int = option(10, "Of the CRF.", at_least=1)

    def probability(self, num_labels: int) -> float:
        """`confidence` as a share of all labels' sum, as in the released program.

        Args:
            num_labels: of the data set, background counted; 2 or more.

        Raises:
            RuleError: the confidence does not favour the given label.
        """
        if self.confidence * (num_labels + 1) <= 1:
            raise RuleError(
                f"masks.seed_options.confidence: expected a number above 1/{num_labels + 1} for {num_labels} labels, "
                f"got {self.confidence:g}"
            )
        others = (1 - self.confidence) * (num_labels - 1) / num_labels
        return self.confidence / (self.confidence + others)

    def check_classes(self, num_classes: int) -> None:
        self.probability(num_classes + 1)

    def prepare(self) -> None:
        try:
            require_densecrf()
        except ImportError as error:
            raise RuleError(f"masks.seeds: icd: {error}") from error

    def label(self, evidence: Evidence) -> Tensor:
        assert evidence.averages is not None
        if evidence.saliency is not None:
            seeds = seed_icd(*evidence.averages, evidence.saliency, self.salient_above)
            return class_labels(seeds, evidence.classes)
        labels = class_labels(seed_icd(*evidence.averages), evidence.classes)
        num_labels = evidence.num_classes + 1
        probability = self.probability(num_labels)
        closed = refine_labels(labels.cpu().numpy(), evidence.image, num_labels, probability, self.iterations)
        return torch.from_numpy(closed).to(labels.device)

    def decisive_scores(self, evidence: Evidence) -> Tensor:
        """The probabilities of the maps and, of the background, 1 - the largest. Classes that share a pixel are told
        apart by their CAMs, and open pixels closed by the CRF: against these scores, some of them."""
        assert evidence.averages is not None
        probabilities = evidence.averages[0].sigmoid()
        rest = 1 - probabilities.amax(dim=0, keepdim=True) if len(probabilities) else torch.ones_like(evidence.scores)
        return torch.cat([rest, probabilities])


@dataclass
class MatLabelRule(Rule):
    """Mat-Label: `matting.merge_alphas`, which ignores uncertain alphas and near-ties."""

    background = "never"
    alphas = True

    uncertain: list[float] = option(
        [0.4, 0.6], "Lowest and highest of the alphas that are ignored.", at_least=0, at_most=1, length=2
    )
    tie: float = option(
        0.1, "Object pixels whose two largest alphas differ by less are ignored.", at_least=0, at_most=1
    )

    def check(self) -> None:
        if self.uncertain[0] > self.uncertain[1]:
            raise ValueError(f"uncertain: expected the lower number first, got {self.uncertain}")

    def label(self, evidence: Evidence) -> Tensor:
        return class_labels(merge_alphas(evidence.scores[1:], self.uncertain, self.tie), evidence.classes)


RULES: dict[str, type[Rule]] = {
    "argmax": ArgmaxRule,
    "saliency": SaliencyRule,
    "auto": AutoRule,
    "drs": DrsRule,
    "icd": IcdRule,
    "mat_label": MatLabelRule,
}


def build_rule(name: str, options: Mapping | None = None, where: str = "masks") -> Rule:
    """The label rule of that name.

    Args:
        options: its fields.
        where: the recipe's section; begins the messages.

    Raises:
        OptionError: there is no such rule or option, or a value is unfit.
    """
    if name not in RULES:
        raise OptionError(unknown_name(f"{where}.seeds: {name!r}", name, RULES))
    return RULES[name].from_dict(options, f"{where}.seed_options")


def reads_saliency(settings: MasksSettings, rows: Dataset) -> bool:
    """Whether the label rule that the settings name looks at the column `saliency` of these rows."""
    rule = build_rule(settings.seeds, settings.seed_options)
    return rule.saliency == "needed" or (rule.saliency == "optional" and len(rows_with_saliency(rows)) > 0)


def reads_background(settings: MasksSettings, rows: Dataset) -> bool:
    """Whether the background threshold plays a part in the labels of some of these rows."""
    rule = build_rule(settings.seeds, settings.seed_options)
    if not rule.scores:
        return False
    by_rule = rule.background == "always"
    if rule.background == "without saliency":
        by_rule = len(rows_with_saliency(rows)) < len(rows)
    return build_refinement(settings.refine).reads_background(by_rule)


def columns_to_read(settings: MasksSettings, rows: Dataset) -> list[str]:
    """The columns that pseudo masks are made from.

    Raises:
        DataError, RuleError: as of [`check_columns`].
    """
    check_columns(settings, rows)
    return ["image_id", "tags", "image", *(["saliency"] if reads_saliency(settings, rows) else [])]


def check_columns(settings: MasksSettings, rows: Dataset) -> None:
    """Check that rows have what the label rule looks at, and that its options fit them.

    Raises:
        DataError: they have no saliency maps, or some of them have none.
        RuleError: as of [`Rule.check_classes`].
    """
    if reads_saliency(settings, rows):
        check_saliency(rows, f"masks.seeds: {settings.seeds}")
    else:
        build_rule(settings.seeds, settings.seed_options).check_classes(len(class_names(rows)))


def rows_to_label(settings: MasksSettings, rows: Dataset) -> np.ndarray:
    """Indices of the rows that have what the label rule looks at; perhaps of none.

    Of rows whose labels would need a background threshold that is left open, since the data that it was to be found on
    did not need it, none: a rule may do without saliency, but not differently from row to row.
    """
    found = rows_with_saliency(rows) if reads_saliency(settings, rows) else np.arange(len(rows))
    is_open = settings.background_threshold == AUTO and reads_background(settings, rows.select(found))
    return found[:0] if is_open else found


def seed_drs(
    scores: Tensor,
    saliency: Tensor,
    object_threshold: float = 0.2,
    conflict_threshold: float = 0.9,
    saliency_threshold: float = 50 / 255,
) -> Tensor:
    """DRS's pseudo labels with saliency (AAAI 2021; its released program, whose thresholds are the defaults).

    Class scores below `object_threshold` become 0; the background score is 0 on salient pixels, else 1; the largest
    score wins. Ignored (255) are pixels where more than two of these scores exceed `conflict_threshold`, and salient
    ones whose label is background.

    Args:
        scores: (K+1, H, W) in [0, 1]; the background score is not used.
        saliency: (H, W) in [0, 1]; salient is what is above `saliency_threshold`.

    Returns:
        (H, W) uint8: 0 background, k + 1 for the k-th class, 255 ignore.

    Raises:
        RuleError: saliency has another size.
    """
    if saliency.shape != scores.shape[1:]:
        raise RuleError(f"saliency: expected shape {tuple(scores.shape[1:])}, got {tuple(saliency.shape)}")
    salient = saliency > saliency_threshold
    channels = _drs_scores(scores, salient, object_threshold)
    labels = channels.argmax(dim=0)
    conflict = (channels > conflict_threshold).sum(dim=0) > 2
    return labels.masked_fill(conflict | (salient & (labels == 0)), IGNORE_INDEX).to(torch.uint8)


def _drs_scores(scores: Tensor, salient: Tensor, object_threshold: float) -> Tensor:
    objects = scores[1:].masked_fill(scores[1:] < object_threshold, 0)
    return torch.cat([(~salient)[None].to(scores), objects])


def seed_icd(
    top_down: Tensor, cams: Tensor, saliency: Tensor | None = None, saliency_threshold: float = 0.01
) -> Tensor:
    """ICD's seeds (CVPR 2020) of one image, see `models.icd.icd_seeds`.

    Without saliency, ICD labels the ignored pixels with `crf.refine_labels`.

    Args:
        top_down: (K, H, W) top-down scores of the tagged classes.
        cams: (K, H, W) CAM logits of these classes, at the same resolution.
        saliency: (H, W) in [0, 1], or None.
        saliency_threshold: below it is background.

    Returns:
        (H, W) uint8: 0 background, k + 1 for the k-th class, 255 ignore.
    """
    # One more class that is not tagged, so that an image without any tag needs no rule of its own.
    tags = F.pad(top_down.new_ones(1, len(top_down)), (0, 1))
    top_down, cams = (F.pad(maps, (0, 0, 0, 0, 0, 1))[None] for maps in (top_down, cams))
    seeds = icd_seeds(top_down, cams, tags, None if saliency is None else saliency[None], saliency_threshold)
    return seeds[0].to(torch.uint8)


def class_labels(labels: Tensor, classes: Tensor) -> Tensor:
    """(H, W) uint8 labels that count an image's tagged classes → uint8 labels of the data set.

    Args:
        labels: 0 background, k + 1 for the k-th tagged class, 255 ignore.
        classes: (K,) class indices c of the tagged classes; their label is c + 1.
    """
    values = torch.full((256,), IGNORE_INDEX, dtype=torch.uint8, device=labels.device)
    values[0] = 0
    values[1 : len(classes) + 1] = (classes + 1).to(values)
    return values[labels.long()]
