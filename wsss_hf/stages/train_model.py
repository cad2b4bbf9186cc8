"""What training a CAM classifier and training a segmenter have in common."""

from __future__ import annotations

import json
from collections.abc import Callable

from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedModel

from ..data.examples import TaggedExamples
from ..data.transforms import TrainTransform
from ..models.backbone import resolve_backbone_config
from ..models.image_processing_wsss import WsssImageProcessor, backbone_normalization
from ..training.loop import build_accelerator, fit
from ..training.recipes import RecipeError
from .outputs import StageOutput

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
    config = resolve_backbone_config(backbone, config, **hub_kwargs)
    mean, std = recipe["image"]["mean"], recipe["image"]["std"]
    if mean is None or std is None:
        known_mean, known_std = backbone_normalization(backbone, config, **hub_kwargs)
        mean, std = mean or known_mean, std or known_std
    return {"backbone": backbone, "backbone_config": config, "image_mean": mean, "image_std": std}


def build_on_backbone(
    model_class: type[PreTrainedModel], backbone: dict, hub_kwargs: dict, **options
) -> PreTrainedModel:
    """A model on what `resolve_backbone` found: on published weights where it has a name, else on random ones."""
    if backbone["backbone"] is None:
        return model_class(model_class.config_class(backbone_config=backbone["backbone_config"], **options))
    return model_class.from_backbone(backbone["backbone"], hub_kwargs, **options)


def build_processor(recipe: dict, image_mean: list[float], image_std: list[float]) -> WsssImageProcessor:
    """The image processor that shows a model images at the scale it was trained at."""
    side = recipe["image"]["size"]
    size = {"shortest_edge": side, "longest_edge": 4 * side}
    return WsssImageProcessor(size=size, image_mean=image_mean, image_std=image_std)


def train_and_save(
    build_model: Callable,
    rows: Dataset,
    mask_column: str | None,
    recipe: dict,
    section: str,
    output: StageOutput,
    quiet: bool,
) -> list[dict]:
    """Train what `build_model()` gives, (model, processor), and put both where `output` says; returns the log."""
    settings = recipe[section]["train"]
    AcceleratorState._reset_state()  # each stage of a run has its own precision
    accelerator = build_accelerator(settings, recipe["seed"])
    set_seed(recipe["seed"])
    model, processor = build_model()
    if settings["gradient_checkpointing"]:
        model.activation_checkpointing_enable()
    transform = TrainTransform(
        crop_size=recipe["image"]["size"],
        scale=tuple(settings["scale"]),
        flip=settings["flip"],
        color_jitter=settings["color_jitter"],
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )
    examples = TaggedExamples(rows, transform, mask_column=mask_column, seed=recipe["seed"])
    accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
    if accelerator.is_main_process:
        output.begin()
    accelerator.wait_for_everyone()
    with output.nothing_left_behind():
        history = fit(model, examples, settings, accelerator, output.partial, recipe["seed"], section, quiet)
    if accelerator.is_main_process:
        result = output.partial / "result"
        model.save_pretrained(result)
        processor.save_pretrained(result)
        (result / LOG_FILE).write_text(json.dumps(history, indent=1))
        output.finish(result)
    accelerator.wait_for_everyone()
    return history
