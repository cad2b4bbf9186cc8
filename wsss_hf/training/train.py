"""What every training stage does: a model on a backbone and augmented examples in, trained model and log out."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset, concatenate_datasets
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.examples import TaggedExamples
from ..data.superpixels import superpixel_column
from ..data.transforms import TrainTransform
from ..files import sync
from ..inference.weights import diverged
from ..models.image_processing_wsss import WsssImageProcessor
from ..models.pictures import LONGEST
from ..models.pretrained import backbone_normalization, resolve_backbone_config
from ..progress import Progress, say
from ..settings import (
    AffinitySettings,
    CamSettings,
    FelzenszwalbSettings,
    ImageSettings,
    RecipeError,
    SegmenterSettings,
    TrainSettings,
)
from .endings import DIVERGED_ADVICE, TrainingError
from .launcher import build_accelerator, is_sharded
from .loop import Training, enable_checkpointing
from .tracking import STEP_LOG_FILE, TRACKER_FOLDER, check_tracker

LOG_FILE = "training_log.json"


def begin_training(settings: TrainSettings, seed: int, folder: Path) -> Accelerator:
    """The Accelerator of a training; random numbers start from `seed`. Call it before the model is built.

    Args:
        folder: the training's own, see [`train_model`].

    Raises:
        RecipeError: the tracker is not installed.
    """
    check_tracker(settings)
    AcceleratorState._reset_state()  # each stage of a run has its own precision
    accelerator = build_accelerator(settings, folder)
    set_seed(seed)
    return accelerator


def build_on_backbone(
    model_class: Any,  # a model of this package
    section: CamSettings | AffinitySettings | SegmenterSettings,
    image: ImageSettings,
    name: str,
    **options: Any,
) -> tuple[PreTrainedModel, list[float], list[float]]:
    """A model on the backbone of a recipe's section: on published weights where it has a name, else on random ones.

    Args:
        name: of the section, for messages.
        options: arguments of the model's configuration.

    Returns:
        the model, and the mean and standard deviation per channel that its images are normalised with.

    Raises:
        RecipeError: the section names no backbone.
    """
    if section.backbone is not None:
        model = model_class.from_backbone(section.backbone, **options)
        mean, std = model.image_processor.image_mean, model.image_processor.image_std
    elif section.backbone_config is not None:
        config = resolve_backbone_config(None, section.backbone_config)
        model = model_class(model_class.config_class(backbone_config=config, **options))
        mean, std = backbone_normalization(None, config)
    else:
        raise RecipeError(f"{name}.backbone: expected a directory or Hub id (--backbone), got null")
    mean, std = list(image.mean or mean), list(image.std or std)
    if hasattr(model.config, "image_mean"):
        model.config.image_mean, model.config.image_std = mean, std
    return model, mean, std


def build_processor(size: int, image_mean: list[float], image_std: list[float]) -> WsssImageProcessor:
    """The image processor that shows a model images at the scale it was trained at.

    Args:
        size: side of a training crop in pixels.
    """
    shape = {"shortest_edge": size, "longest_edge": LONGEST * size}
    return WsssImageProcessor(size=shape, image_mean=image_mean, image_std=image_std)


def train_model(
    accelerator: Accelerator,
    model: Any,
    processor: BaseImageProcessor,
    rows: Dataset,
    settings: TrainSettings,
    *,
    seed: int,
    size: int,
    folder: Path,
    title: str,
    mask_column: str | None = None,
    columns: tuple[str, ...] = (),
    targets: bool = False,
    finish: Callable[[Any, BaseImageProcessor], dict] | None = None,
) -> Path:
    """Train `model` in place and save it; go on from the newest checkpoint where `folder` holds one.

    Args:
        model: gives a loss in training, and has `save_pretrained`.
        settings: a recipe's `train` section.
        size: side of a training crop in pixels.
        folder: keeps the checkpoints, and gets `result/`.
        title: of the progress bar.
        mask_column: label maps to learn from; None learns from tags, or
        targets: from the localisation maps of the rows.
        columns: further columns that the model reads, see [`TaggedExamples`].
        finish: called in the main process with the trained model and its processor, before they are saved; what it
            returns joins the last record of the log.

    Returns:
        `folder/result`: the model, its processor, `training_log.json` (a record per epoch) and `log.jsonl` (one every
        few steps), written by the main process.

    Raises:
        TrainingError: a loss or, at the end, a weight is no number that one can compute with.
    """
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    statistics = pixel_statistics(processor)
    transform = TrainTransform(
        crop_size=size,
        scale=(settings.scale[0], settings.scale[1]),
        flip=settings.flip,
        color_jitter=settings.color_jitter,
        hue_jitter=settings.hue_jitter,
        scaled_side=settings.scaled_side,
        **statistics,
    )
    wanted = dict.fromkeys(columns, True)
    examples = TaggedExamples(rows, transform, mask_column=mask_column, seed=seed, targets=targets, **wanted)
    # Of weights that the processes share out, the main process keeps a whole network to put them into at the end.
    sharded = is_sharded(accelerator)
    trained = copy.deepcopy(model) if sharded and accelerator.is_main_process else model
    pictures = None
    if settings.track is not None and not sharded:
        from .pictures import MapPictures  # for trackers alone

        pictures = MapPictures(model, examples, **statistics)
    training = Training(model, examples, settings, accelerator, folder, seed, title, pictures)
    history = training.run()
    if sharded:
        weights = accelerator.get_state_dict(training.model)
        if accelerator.is_main_process:
            trained.load_state_dict(weights)
    found = [diverged(trained) if accelerator.is_main_process else None]
    broadcast_object_list(found)
    if found[0] is not None:
        if accelerator.is_main_process and not (folder / "checkpoints").is_dir():  # nothing to go on from
            (folder / STEP_LOG_FILE).unlink(missing_ok=True)
        raise TrainingError(f"the training of {title} has diverged: {found[0]} after the last step; {DIVERGED_ADVICE}")
    result = folder / "result"
    if accelerator.is_main_process:
        if finish is not None:
            history[-1] |= finish(trained, processor)
        trained.save_pretrained(result)
        processor.save_pretrained(result)
        (result / LOG_FILE).write_text(json.dumps(history, indent=1))
        for name in (STEP_LOG_FILE, TRACKER_FOLDER):
            if (folder / name).exists():
                os.replace(folder / name, result / name)
    accelerator.wait_for_everyone()
    return result


def pixel_statistics(processor: Any) -> dict[str, Any]:
    """How an image processor turns pixels in [0, 1] into its values: `image_mean`, `image_std`, `blue_first`."""
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return {
        "image_mean": [value / factor for value in mean],
        "image_std": [value / factor for value in std],
        "blue_first": bool(getattr(processor, "do_flip_channel_order", False)),
    }


def with_superpixels(
    rows: Dataset, size: int, options: FelzenszwalbSettings, accelerator: Accelerator, folder: Path
) -> Dataset:
    """`rows` with the column `superpixels`, its own or one that the processes compute, a part each, before training.

    A training that was broken off finds the parts in its folder.
    """
    if "superpixels" in rows.features:
        return rows
    count = accelerator.num_processes
    parts = [
        (rows.shard(count, index, contiguous=True), folder / f"superpixels-{index}-of-{count}.arrow")
        for index in range(count)
    ]
    compute = partial(superpixel_column, size=size, options=vars(options))
    mine, file = parts[accelerator.process_index]
    if file.exists() and not _is_whole(file, len(mine)):
        say(f"{file} is damaged and made again")
        file.unlink()
    with Progress("superpixels", len(mine), unit="image") as progress:
        compute(mine, cache_file=file, advance=progress.advance)
    sync(file)
    sync(folder)
    accelerator.wait_for_everyone()
    column = concatenate_datasets([compute(part, cache_file=file) for part, file in parts])
    return concatenate_datasets([rows, column], axis=1)


def _is_whole(file: Path, count: int) -> bool:
    """Whether an Arrow file has `count` rows to its end."""
    try:
        return len(Dataset.from_file(str(file))) == count
    except (OSError, pa.ArrowException):
        return False
