"""What training a CAM classifier and training a segmenter have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from datasets import Dataset, concatenate_datasets
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.examples import MAPS, TaggedExamples
from ..data.superpixels import superpixel_column
from ..data.transforms import TrainTransform
from ..models.backbone import pinned, resolve_backbone_config
from ..models.image_processing_wsss import WsssImageProcessor, backbone_normalization
from ..progress import Progress
from ..recipes import RecipeError
from ..stages.cache import StageOutput
from .loop import build_accelerator, fit
from .optimizer import enable_checkpointing

LOG_FILE = "training_log.json"


def resolve_backbone(recipe: dict, section: str, hub_kwargs: dict) -> dict:
    """`backbone` and `backbone_config` of a section, with the image mean and std that belong to them.

    Raises:
        RecipeError: the section names no backbone.
    """
    backbone, config = recipe[section]["backbone"], recipe[section]["backbone_config"]
    if backbone is None and config is None:
        raise RecipeError(f"{section}.backbone is empty; --backbone with a directory or Hub id would be right")
    if backbone is not None:
        config = None  # a pretrained backbone brings its own
    name, options = pinned(backbone, hub_kwargs)
    config = resolve_backbone_config(name, config, **options)
    mean, std = recipe["image"]["mean"], recipe["image"]["std"]
    if mean is None or std is None:
        known_mean, known_std = backbone_normalization(name, config, **options)
        mean, std = mean or known_mean, std or known_std
    return {"backbone": backbone, "backbone_config": config, "image_mean": mean, "image_std": std}


def build_on_backbone(
    model_class: type[PreTrainedModel], backbone: dict, hub_kwargs: dict, **options
) -> PreTrainedModel:
    """A model on what `resolve_backbone` found: on published weights where it has a name, else on random ones."""
    if backbone["backbone"] is None:
        return model_class(model_class.config_class(backbone_config=backbone["backbone_config"], **options))
    return model_class.from_backbone(backbone["backbone"], hub_kwargs, **options)


def build_processor(recipe: dict, section: str, image_mean: list[float], image_std: list[float]) -> WsssImageProcessor:
    """The image processor that shows a model images at the scale it was trained at."""
    side = training_size(recipe, section)
    size = {"shortest_edge": side, "longest_edge": 4 * side}
    return WsssImageProcessor(size=size, image_mean=image_mean, image_std=image_std)


def training_size(recipe: dict, section: str) -> int:
    """Side of a training crop in pixels: the section's own, or that of all images."""
    return recipe[section].get("size") or recipe["image"]["size"]


def pixel_statistics(processor: BaseImageProcessor) -> dict:
    """How an image processor turns pixels in [0, 1] into its values: `image_mean`, `image_std`, `blue_first`."""
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return {
        "image_mean": [value / factor for value in mean],
        "image_std": [value / factor for value in std],
        "blue_first": bool(getattr(processor, "do_flip_channel_order", False)),
    }


def train_and_save(
    build_model: Callable,
    rows: Dataset,
    mask_column: str | None,
    recipe: dict,
    section: str,
    output: StageOutput,
    quiet: bool,
    targets: bool = False,
    finish: Callable | None = None,
) -> list[dict]:
    """Train what `build_model()` gives, (model, processor), and put both where `output` says; returns the log.

    Args:
        build_model: its model gives a loss in training, and has `save_pretrained`.
        mask_column: label maps to learn from; None learns from tags, or
        targets: from the localisation maps of the rows.
        finish: called in the main process with the trained model and its processor, before they are saved; what it
            returns joins the last record of the log.
    """
    settings = recipe[section]["train"]
    AcceleratorState._reset_state()  # each stage of a run has its own precision
    accelerator = build_accelerator(settings, recipe["seed"])
    set_seed(recipe["seed"])
    model, processor = build_model()
    if settings["gradient_checkpointing"]:
        enable_checkpointing(model)
    transform = TrainTransform(
        crop_size=training_size(recipe, section),
        scale=tuple(settings["scale"]),
        flip=settings["flip"],
        color_jitter=settings["color_jitter"],
        **pixel_statistics(processor),
    )
    output.begin()
    wanted = {name: recipe[section].get(name, False) for name in MAPS}
    with output.nothing_left_behind():
        if wanted["superpixels"]:
            rows = _with_superpixels(rows, recipe, section, accelerator, output, quiet)
        examples = TaggedExamples(
            rows, transform, mask_column=mask_column, seed=recipe["seed"], targets=targets, **wanted
        )
        history = fit(model, examples, settings, accelerator, output.partial, recipe["seed"], section, quiet)
    if accelerator.is_main_process:
        if finish is not None:
            history[-1] |= finish(model, processor)
        result = output.partial / "result"
        model.save_pretrained(result)
        processor.save_pretrained(result)
        (result / LOG_FILE).write_text(json.dumps(history, indent=1))
        output.finish(result)
    accelerator.wait_for_everyone()
    return history


def _with_superpixels(
    rows: Dataset, recipe: dict, section: str, accelerator: Accelerator, output: StageOutput, quiet: bool
) -> Dataset:
    """`rows` with the column `superpixels`, its own or one that the processes compute, a part each, before training.

    A training that was broken off finds the parts in its folder.
    """
    if "superpixels" in rows.features:
        return rows
    count = accelerator.num_processes
    parts = [
        (rows.shard(count, index, contiguous=True), output.partial / f"superpixels-{index}-of-{count}.arrow")
        for index in range(count)
    ]
    compute = partial(superpixel_column, size=training_size(recipe, section), options=recipe[section]["felzenszwalb"])
    mine, file = parts[accelerator.process_index]
    with Progress("superpixels", len(mine), quiet or not accelerator.is_main_process, unit="image") as progress:
        compute(mine, cache_file=file, advance=progress.advance)
    accelerator.wait_for_everyone()
    column = concatenate_datasets([compute(part, cache_file=file) for part, file in parts])
    return concatenate_datasets([rows, column], axis=1)
