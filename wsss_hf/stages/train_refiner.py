"""Refinement learning, between stages 1 and 2: tagged images and a CAM classifier → map refiner."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from PIL import Image

from ..data.batches import batches_by_size
from ..data.tagged import class_names, encode_png
from ..inference.cam_maps import localize
from ..models.backbone import pinned
from ..models.modeling_cam import CamClassifier
from ..models.modeling_map_refiner import MapRefiner, MapRefinerConfig
from ..pseudo_labels.label_images import load_labeler
from ..training.build import build_on_backbone, build_processor, resolve_backbone, train_and_save
from .cache import StageOutput
from .shards import compute_shards

_MAP_STRIDE = 4  # network input / stored map: no CAM is finer than that
_FEATURES = Features({"localization_maps": List(Value("binary"))})


def train_refiner(
    data: DatasetDict,
    cam: str | os.PathLike,
    recipe: dict,
    out: str | os.PathLike,
    data_settings: dict | None = None,
    hub_kwargs: dict | None = None,
    quiet: bool = False,
) -> Path:
    """Train a network like the CAM classifier's, without methods, on the maps that this gives for split "train".

    Args:
        data: tagged images; masks are never read.
        cam: a trained CAM classifier, a directory or Hub id.
        recipe: a resolved recipe; its `image` and `refiner` sections are used, and the backbone of its `cam` section.
        out: folder of the model; as for `train_cam`. The maps are stored while the training lasts.

    Returns:
        `out`, loadable by `MapRefiner.from_pretrained`; `make_masks` takes it in place of the CAM classifier.
    """
    section = recipe["refiner"]
    network = {key: recipe["cam"][key] for key in ("backbone", "backbone_config", "output_stride")}
    settings = {"stage": "train-refiner", "data": data_settings, "cam": str(cam), "network": network}
    settings |= {"seed": recipe["seed"], "image": recipe["image"]}
    settings["refiner"] = {key: value for key, value in section.items() if key != "use"}  # which speaks of a run
    output = StageOutput(out, settings)
    if output.done:
        return output.path
    hub_kwargs = hub_kwargs or {}

    given = None if section["from_cam"] else resolve_backbone(recipe, "cam", hub_kwargs)

    def build_model():
        options = {
            "output_stride": network["output_stride"],
            "classifier_bias": True,
            "id2label": dict(enumerate(class_names(data["train"]))),
            "background_threshold": recipe["cam"]["background_threshold"],
            "tag_threshold": recipe["cam"]["tag_threshold"],
        }
        if given is not None:
            statistics = {key: given[key] for key in ("image_mean", "image_std")}
            model = build_on_backbone(MapRefiner, given, hub_kwargs, **options, **statistics)
            return model, build_processor(recipe, "refiner", **statistics)
        name, there = pinned(cam, hub_kwargs)
        teacher = CamClassifier.from_pretrained(name, **there)
        statistics = {key: getattr(teacher.config, key) for key in ("image_mean", "image_std")}
        options |= {"output_stride": teacher.config.output_stride, "backbone_config": teacher.config.backbone_config}
        model = MapRefiner(MapRefinerConfig(**options, **statistics))
        model.backbone.load_state_dict(teacher.backbone.state_dict())
        return model, build_processor(recipe, "refiner", **statistics)

    output.begin()
    with output.nothing_left_behind():
        rows = _with_maps(data["train"], cam, section, output.partial / "maps", hub_kwargs, quiet)
    train_and_save(build_model, rows, None, recipe, "refiner", output, quiet, targets=True)
    return output.path


def _with_maps(rows: Dataset, cam, section: dict, folder: Path, hub_kwargs: dict, quiet: bool) -> Dataset:
    """`rows` with the column `localization_maps`: PNGs of 8 bits, one for each tag, in the order of the tags."""
    model, processor = load_labeler(str(cam), PartialState().device, **hub_kwargs)
    compute = partial(_encoded_maps, model, processor, settings=section)
    maps = compute_shards(compute, rows, _FEATURES, folder, section["shard_size"], "maps", quiet)
    return concatenate_datasets([rows, maps], axis=1)


def _encoded_maps(model: CamClassifier, processor, rows: Dataset, settings: dict) -> Iterator[tuple[int, dict]]:
    views = {key: settings[key] for key in ("scales", "flip", "fusion")}
    tags = rows["tags"]
    for batch in batches_by_size(rows, processor, settings["batch_size"]):
        size = tuple(-(-side // _MAP_STRIDE) for side in batch.pixel_values.shape[-2:])
        maps, _ = localize(model, batch.pixel_values.to(model.device), batch.tags.to(model.device), size, **views)
        stored = (255 * maps).round().to(torch.uint8).cpu().split([int(count) for count in batch.tags.sum(dim=1)])
        for index, image_tags, image_maps in zip(batch.indices, batch.tags, stored, strict=True):
            by_class = dict(zip(image_tags.nonzero()[:, 0].tolist(), image_maps.numpy(), strict=True))
            encoded = [encode_png(Image.fromarray(by_class[c]))["bytes"] for c in tags[index]]
            yield index, {"localization_maps": encoded}
