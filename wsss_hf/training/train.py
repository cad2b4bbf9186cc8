"""What every training stage does: model and augmented examples in, trained model and log out."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset, IterableDataset, concatenate_datasets
from PIL import Image
from transformers import BaseImageProcessor

from ..data.examples import StreamedExamples, TaggedExamples
from ..data.superpixels import superpixel_column
from ..data.transforms import TrainTransform
from ..files import sync
from ..inference.cam_maps import padded_images
from ..inference.weights import diverged
from ..progress import Progress, say
from ..settings import FelzenszwalbSettings, RecipeError, TrainSettings
from .build import enable_checkpointing
from .endings import DIVERGED_ADVICE, TrainingError
from .launcher import build_accelerator, is_sharded
from .loop import Training
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


def train_model(
    accelerator: Accelerator,
    model: Any,
    processor: BaseImageProcessor,
    rows: Dataset | IterableDataset,
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
    transform = train_transform(settings, size, processor)
    wanted = dict.fromkeys(columns, True)
    kind = StreamedExamples if isinstance(rows, IterableDataset) else TaggedExamples
    examples = kind(rows, transform, mask_column=mask_column, seed=seed, targets=targets, **wanted)
    # Of weights that the processes share out, the main process keeps a whole network to put them into at the end.
    sharded = is_sharded(accelerator)
    trained = copy.deepcopy(model) if sharded and accelerator.is_main_process else model
    pictures = None
    if settings.track is not None and settings.track_steps:
        from .pictures import MapPictures  # for trackers alone

        pictures = MapPictures(examples, **pixel_statistics(processor))
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
        # Copies: a result that a kill leaves half-written is made anew.
        shutil.copy(folder / STEP_LOG_FILE, result)
        if (folder / TRACKER_FOLDER).is_dir():
            shutil.copytree(folder / TRACKER_FOLDER, result / TRACKER_FOLDER)
    accelerator.wait_for_everyone()
    return result


def train_transform(settings: TrainSettings, size: int, processor: BaseImageProcessor) -> TrainTransform:
    """The augmentation of a training, to crops of `size` pixels that are normalised as `processor` does it."""
    return TrainTransform(
        crop_size=size,
        scale=(settings.scale[0], settings.scale[1]),
        flip=settings.flip,
        color_jitter=settings.color_jitter,
        hue_jitter=settings.hue_jitter,
        scaled_side=settings.scaled_side,
        **pixel_statistics(processor),
    )


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
    rows: Dataset,
    size: int,
    options: FelzenszwalbSettings,
    accelerator: Accelerator,
    folder: Path,
    model: Any,
    processor: BaseImageProcessor,
) -> Dataset:
    """`rows` with the column `superpixels`, its own or one that the processes compute, a part each, before training.

    A training that was broken off finds the parts in its folder.

    Args:
        size: short side of larger images, where the options name none.
        model: whose backbone's features decide which superpixels are merged.
        processor: how images are shown to it.

    Raises:
        RecipeError: the backbone has no such stage.
    """
    if "superpixels" in rows.features:
        return rows
    count = accelerator.num_processes
    parts = [
        (rows.shard(count, index, contiguous=True), folder / f"superpixels-{index}-of-{count}.arrow")
        for index in range(count)
    ]
    size, depth = options.size or size, len(model.backbone.channels)
    if options.merge_to and not -depth <= options.merge_stage < depth:
        raise RecipeError(
            f"cam.felzenszwalb.merge_stage: expected a stage of this backbone ({-depth} to {depth - 1}), "
            f"got {options.merge_stage}"
        )

    network = model.backbone.to(accelerator.device).eval()

    def features(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        pixels = processor(images=image, do_resize=False, return_tensors="pt")["pixel_values"]
        pixels = padded_images(pixels.to(accelerator.device), size)
        with torch.inference_mode():
            return network(pixels)[options.merge_stage][0].float().cpu().numpy(), (pixels.shape[-2], pixels.shape[-1])

    felzenszwalb = {name: getattr(options, name) for name in ("scale", "sigma", "min_size")}
    compute = partial(superpixel_column, size=size, options=felzenszwalb, merge_to=options.merge_to, features=features)
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
