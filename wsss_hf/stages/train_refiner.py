"""Refinement learning (DRS, section 3.3), between stages 1 and 2: tagged images and a CAM classifier → map refiner."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batches import batches_by_size
from ..data.tagged import check_names, class_names, encode_png, source_of
from ..inference.cam_maps import localize
from ..inference.load import load_labeler
from ..models.maps import at_all_classes
from ..models.modeling_cam import CamClassifier
from ..models.modeling_map_refiner import MapRefiner, MapRefinerConfig
from ..recipes import Recipe, check_inputs
from ..settings import RefinerSettings
from ..training.build import build_on_backbone, build_processor, start_layers
from ..training.launcher import with_launcher
from ..training.tracking import check_tracker
from ..training.train import begin_training, train_model
from .cache import Record, StageOutput
from .fingerprint import digest, model_fingerprint, row_fingerprints, rows_fingerprint
from .results import TrainedModel
from .shards import compute_shards

VERSION = 3
_COLUMNS = ("image_id", "tags", "image")
_NETWORK = ("backbone_config", "output_stride", "new_layers", "background_threshold", "tag_threshold")  # of `cam`
_MAP_STRIDE = 4  # network input / stored map: no CAM is finer than that
_MAPS_AT_A_TIME = 256
_FEATURES = Features({"localization_maps": List(Value("binary"))})


def train_refiner(
    data: DatasetDict,
    cam: str | os.PathLike,
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    force: bool = False,
) -> TrainedModel:
    """Train a network like the CAM classifier's, without methods, on the maps that this gives for split "train".

    Args:
        data: tagged images; masks are never read.
        cam: a trained CAM classifier, a directory or Hub id.
        recipe: its `image` and `refiner` sections are used, and the backbone of its `cam` section.
        out: folder of the model, as for [`train_cam`]. The maps are stored while the training lasts.
        force: train again whatever is there.

    Returns:
        the model, loadable by `MapRefiner.from_pretrained(out)`; [`make_masks`] takes it in place of the classifier.
    """
    check_inputs(data, recipe)
    section, rows = with_launcher(recipe.refiner), data["train"]
    check_tracker(section.train)  # before the maps are computed
    fingerprints = row_fingerprints(rows, _COLUMNS)
    inputs = {"data": rows_fingerprint(rows, _COLUMNS, fingerprints), "cam": model_fingerprint(cam)}
    if recipe.cam.backbone is not None and not section.from_cam:
        inputs["backbone"] = model_fingerprint(recipe.cam.backbone)
    network = {name: getattr(recipe.cam, name) for name in _NETWORK}
    settings = {"seed": recipe.seed, "image": recipe.image, "network": network}
    settings["refiner"] = dataclasses.replace(section, use=True)  # which changes what `run` does, not the result
    output = StageOutput(out, Record("train-refiner", VERSION, settings, inputs, source_of(data)), force)
    if not output.done:
        with output.working() as folder:
            classifier, processor = load_labeler(os.fspath(cam), PartialState().device)
            check_names(classifier, class_names(rows), "classifier")
            _build(cam, recipe, class_names(rows))  # says what is wrong before the maps are computed
            compute = partial(_encoded_maps, classifier, processor, settings=section)
            maps = compute_shards(
                compute, rows, fingerprints, _FEATURES, folder / "maps", _MAPS_AT_A_TIME, "maps", digest(inputs)
            )
            accelerator = begin_training(section.train, recipe.seed, folder)
            model, mean, std = _build(cam, recipe, class_names(rows))
            size = recipe.image.size
            result = train_model(
                accelerator,
                model,
                build_processor(size, mean, std, section.train.scaled_side),
                concatenate_datasets([rows, maps], axis=1),
                section.train,
                seed=recipe.seed,
                size=size,
                folder=folder,
                title="refiner",
                targets=True,
            )
            output.finish(result)
    return TrainedModel(output.path)


def _build(
    cam: str | os.PathLike, recipe: Recipe, names: list[str]
) -> tuple[PreTrainedModel, list[float], list[float]]:
    options = {
        "output_stride": recipe.cam.output_stride,
        "classifier_bias": True,
        "id2label": dict(enumerate(names)),
        "background_threshold": recipe.cam.background_threshold,
        "tag_threshold": recipe.cam.tag_threshold,
    }
    if recipe.refiner.from_cam:
        teacher, _ = load_labeler(os.fspath(cam), "cpu")
        mean, std = teacher.config.image_mean, teacher.config.image_std
        options |= {"output_stride": teacher.config.output_stride, "backbone_config": teacher.config.backbone_config}
        model: Any = MapRefiner(MapRefinerConfig(**options, image_mean=mean, image_std=std))
        model.backbone.load_state_dict(teacher.backbone.state_dict())
    else:
        model, mean, std = build_on_backbone(MapRefiner, recipe.cam, recipe.image, "cam", **options)
    start_layers(model, recipe.cam.new_layers, recipe.refiner.new_std, deep=True)
    return model, mean, std


def _encoded_maps(
    model: CamClassifier, processor, rows: Dataset, settings: RefinerSettings
) -> Iterator[tuple[int, dict]]:
    """(index, PNGs of 8 bits, one for each tag, in the order of the tags) of each row."""
    tags = rows["tags"]
    for batch in batches_by_size(rows, processor, settings.batch_size):
        height, width = batch.pixel_values.shape[-2:]
        size = (-(-height // _MAP_STRIDE), -(-width // _MAP_STRIDE))
        pixel_values, multi_hot = batch.pixel_values.to(model.device), batch.tags.to(model.device)
        maps, _ = localize(model, pixel_values, multi_hot, size, settings.scales, settings.flip, settings.fusion)
        maps = _strongest(at_all_classes(maps, multi_hot))[multi_hot.bool()]
        stored = (255 * maps).round().to(torch.uint8).cpu().split([int(count) for count in batch.tags.sum(dim=1)])
        for index, image_tags, image_maps in zip(batch.indices, batch.tags, stored, strict=True):
            by_class = dict(zip(image_tags.nonzero()[:, 0].tolist(), image_maps.numpy(), strict=True))
            encoded = [encode_png(Image.fromarray(by_class[c]))["bytes"] for c in tags[index]]
            yield index, {"localization_maps": encoded}


def _strongest(maps: Tensor) -> Tensor:
    """(B, C, H, W) maps of which, at each pixel, only the strongest class, or all of equal ones, keep their value."""
    return maps * (maps == maps.amax(dim=1, keepdim=True))
