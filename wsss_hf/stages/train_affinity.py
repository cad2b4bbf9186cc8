"""The affinity network, between CAM classifier and masks: tagged images and a classifier's maps → affinities (IRN)."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image
from transformers import PreTrainedModel

from ..data.tagged import DataError, check_names, class_names, encode_png, source_of
from ..inference.cam_maps import check_fusion
from ..inference.load import load_labeler
from ..models.maps import IGNORE_INDEX
from ..models.modeling_affinity import AffinityConfig, AffinityNetwork
from ..progress import is_quiet
from ..pseudo_labels.affinity_labels import certain_labels, needs_affinity
from ..pseudo_labels.label_images import build_rules
from ..recipes import Recipe, check_inputs
from ..refinement.crf import require_densecrf
from ..refinement.steps import RefinementChain, build_refinement
from ..settings import AffinitySettings
from ..training.build import build_on_backbone, build_processor
from ..training.launcher import with_launcher
from ..training.tracking import check_tracker
from ..training.train import begin_training, train_model
from .cache import Record, StageOutput
from .fingerprint import digest, model_fingerprint, row_fingerprints, rows_fingerprint
from .results import TrainedModel
from .shards import compute_shards

VERSION = 3
_COLUMNS = ("image_id", "tags", "image")
_LABELS = "certain_labels"
_FEATURES = Features({_LABELS: ImageFeature(), "objects": Value("float64"), "background": Value("float64")})
_MAP_SETTINGS = ("scales", "flip", "fusion", "native", "pad", "bf16")  # of the masks


def train_affinity(
    data: DatasetDict,
    cam: str | os.PathLike,
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    force: bool = False,
) -> TrainedModel:
    """Train an affinity network on what the maps of a classifier are certain of in split "train".

    Args:
        data: tagged images; masks are never read.
        cam: a trained CAM classifier or map refiner, a directory or Hub id.
        recipe: its `image` and `affinity` sections are used, and of its `masks` section how maps are made.
        out: folder of the model, as for [`train_cam`]. The labels are stored while the training lasts.
        force: train again whatever is there.

    Returns:
        the model, loadable by `AffinityNetwork.from_pretrained(out)`; the step `walk` of [`make_masks`] uses it.

    Raises:
        RefinementError: the library of a refinement step is missing.
        DataError: the classifier has other classes than the data, or its maps are certain of no object or of no
            background.
    """
    check_inputs(data, recipe)
    section, rows = with_launcher(recipe.affinity), data["train"]
    recipe = dataclasses.replace(recipe, affinity=section)
    check_tracker(section.train)  # before the maps are computed
    fingerprints = row_fingerprints(rows, _COLUMNS)
    record = affinity_record(data, cam, recipe, fingerprints)
    output = StageOutput(out, record, force)
    if not output.done:
        refine = _refinement(recipe)
        with output.working() as folder:
            _build(cam, recipe)  # says what is wrong before the maps are computed
            labels = _labels(rows, fingerprints, cam, recipe, refine, folder, digest(record.inputs))
            accelerator = begin_training(section.train, recipe.seed, folder)
            model, mean, std = _build(cam, recipe)
            size = recipe.image.size
            result = train_model(
                accelerator,
                model,
                build_processor(size, mean, std, section.train.scaled_side),
                concatenate_datasets([rows, labels], axis=1),
                section.train,
                seed=recipe.seed,
                size=size,
                folder=folder,
                title="affinity",
                mask_column=_LABELS,
            )
            output.finish(result)
    return TrainedModel(output.path)


def affinity_record(
    data: DatasetDict, cam: str | os.PathLike, recipe: Recipe, fingerprints: list[str] | None = None
) -> Record:
    """What an affinity network of this recipe, data and classifier is made from.

    Args:
        fingerprints: of the rows, if they are known.
    """
    section = with_launcher(_backbone(recipe))
    inputs = {"data": rows_fingerprint(data["train"], _COLUMNS, fingerprints), "cam": model_fingerprint(cam)}
    if not section.from_cam and section.backbone is not None:
        inputs["backbone"] = model_fingerprint(section.backbone)
    maps = {name: getattr(recipe.masks, name) for name in _MAP_SETTINGS}
    settings = {"seed": recipe.seed, "image": recipe.image, "affinity": section, "maps": maps}
    return Record("train-affinity", VERSION, settings, inputs, source_of(data))


def affinity_of_run(
    data: DatasetDict, cam: str | os.PathLike, recipe: Recipe, out: str | os.PathLike, *, force: bool = False
) -> TrainedModel | None:
    """[`train_affinity`] where a step `walk` of `masks.refine` names no model; else None."""
    return train_affinity(data, cam, recipe, out, force=force) if needs_affinity(recipe.masks) else None


def check_masks(recipe: Recipe) -> None:
    """What would stop `affinity_of_run` or `make_masks` of a run, known before hours of training.

    Raises:
        RefinementError: the library or model of a refinement step is missing.
        RuleError: the label rule lacks something.
        OptionError: `masks.fusion` does not fit the map refiner.
        RecipeError, OSError, ValueError: there is no such backbone of the affinity network, or it can't be used.
    """
    check_fusion(recipe.masks.fusion, normalize=not recipe.refiner.use)
    trained_first = needs_affinity(recipe.masks)
    if trained_first:
        _refinement(recipe)
        if not recipe.affinity.from_cam:
            _build("", recipe)
    build_rules(recipe.masks, trained_first)


def _refinement(recipe: Recipe) -> RefinementChain:
    section = recipe.affinity
    if section.label_confidence is not None:
        require_densecrf()
        return RefinementChain([])
    chain = build_refinement(section.refine, "affinity.refine", recipe.masks.workers)
    chain.prepare()
    return chain


def _labels(
    rows: Dataset,
    fingerprints: list[str],
    cam: str | os.PathLike,
    recipe: Recipe,
    refine: RefinementChain,
    folder: Path,
    key: str,
) -> Dataset:
    """The column that is learnt from; what kinds of pixels there are is said, and a kind that is missing refused."""
    state = PartialState()
    model, processor = load_labeler(os.fspath(cam), state.device, optimize=recipe.masks.optimize)
    check_names(model, class_names(rows), "classifier")

    def compute(shard: Dataset) -> Iterator[tuple[int, dict]]:
        for index, labels in certain_labels(model, processor, shard, recipe.masks, recipe.affinity, refine):
            shares = {"objects": np.mean((labels > 0) & (labels != IGNORE_INDEX)), "background": np.mean(labels == 0)}
            yield index, {_LABELS: encode_png(Image.fromarray(labels)), **shares}

    with refine:
        size = recipe.masks.shard_size
        made = compute_shards(compute, rows, fingerprints, _FEATURES, folder / "labels", size, "labels", key)
    shares = {kind: float(np.mean(made[kind])) for kind in ("objects", "background")}
    for kind, option in (("objects", "foreground_threshold"), ("background", "background_threshold")):
        if shares[kind] == 0:
            raise DataError(
                f"affinity: expected pixels that are certainly {kind} in some image, got none in {len(rows)}; "
                f"another affinity.{'alphas' if recipe.affinity.alphas else option} may find some"
            )
    if state.is_main_process and not is_quiet():
        words = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        print(f"affinity: pixels that the maps are certain of: {words}", file=sys.stderr)
    return made.select_columns([_LABELS])


def _backbone(recipe: Recipe) -> AffinitySettings:
    """The settings with the backbone that they leave to those of the classifier."""
    section, cam = recipe.affinity, recipe.cam
    if section.from_cam or section.backbone is not None or section.backbone_config is not None:
        return section
    return dataclasses.replace(section, backbone=cam.backbone, backbone_config=cam.backbone_config)


def _build(cam: str | os.PathLike, recipe: Recipe) -> tuple[PreTrainedModel, list[float], list[float]]:
    section = recipe.affinity
    options: dict[str, Any] = {"kind": section.kind, "radius": section.radius}
    if not section.from_cam:
        stride = {"output_stride": section.output_stride}
        return build_on_backbone(AffinityNetwork, _backbone(recipe), recipe.image, "affinity", **options, **stride)
    teacher, _ = load_labeler(os.fspath(cam), "cpu", optimize=False)
    mean, std = teacher.config.image_mean, teacher.config.image_std
    for name in ("backbone_config", "output_stride", "backbone_layers"):
        options[name] = getattr(teacher.config, name)
    model = AffinityNetwork(AffinityConfig(**options, image_mean=mean, image_std=std))
    model.backbone.load_state_dict(teacher.backbone.state_dict())
    return model, mean, std
