"""Stage 1: tagged images → CAM classifier."""

from __future__ import annotations

import dataclasses
import os

from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedModel

from ..data.saliency import check_saliency
from ..data.tagged import DataError, class_names, source_of
from ..models.modeling_cam import CamClassifier
from ..progress import say
from ..pseudo_labels.rules import check_columns
from ..recipes import Recipe, check_inputs
from ..training.build import build_on_backbone, build_processor, start_layers
from ..training.launcher import with_launcher
from ..training.train import begin_training, train_model, with_superpixels
from .cache import Record, StageOutput
from .fingerprint import data_fingerprint, model_fingerprint
from .results import TrainedModel

VERSION = 3


def train_cam(data: DatasetDict, recipe: Recipe, out: str | os.PathLike, *, force: bool = False) -> TrainedModel:
    """Train a CAM classifier on the tags of split "train"; masks are never read.

    Args:
        data: tagged images, see [`load_data`] and, for a stream, [`load_stream`].
        recipe: its `image` and `cam` sections are used.
        out: folder of the model. A result that was made from the same images, tags, settings and backbone is used
            again; an interrupted training goes on.
        force: train again whatever is there.

    Returns:
        the model, loadable by `CamClassifier.from_pretrained(out)` as well.

    Raises:
        RecipeError: the recipe names no backbone.
        DataError: a column that the recipe wants, here or for its masks, is missing.
        OutputError: `out` holds something else.
    """
    check_inputs(data, recipe)
    section, rows = with_launcher(recipe.cam), data["train"]
    recipe = dataclasses.replace(recipe, cam=section)
    check_data(data, recipe)
    output = StageOutput(out, cam_record(data, recipe), force)
    if not output.done:
        with output.working() as folder:
            _say_what_is_everywhere(rows)
            accelerator = begin_training(section.train, recipe.seed, folder)
            model, mean, std = build_cam(recipe, class_names(rows))
            size = recipe.image.size
            processor = build_processor(size, mean, std, section.train.scaled_side)
            if section.superpixels:
                rows = with_superpixels(rows, size, section.felzenszwalb, accelerator, folder, model, processor)
            result = train_model(
                accelerator,
                model,
                processor,
                rows,
                section.train,
                seed=recipe.seed,
                size=size,
                folder=folder,
                title="cam",
                columns=_columns(recipe),
            )
            output.finish(result)
    return TrainedModel(output.path)


def check_data(data: DatasetDict, recipe: Recipe) -> None:
    """Whether the data have what a classifier and its masks need.

    Raises:
        DataError: a column is missing.
    """
    section, rows = recipe.cam, data["train"]
    if isinstance(rows, IterableDataset):
        if section.superpixels:
            raise DataError("cam.superpixels: expected data that are not streamed")
    else:
        if section.saliency:
            check_saliency(rows, "cam.saliency")
        check_columns(recipe.masks, rows)  # which come later, but nobody should train for them in vain


def _say_what_is_everywhere(rows: Dataset | IterableDataset) -> None:
    if isinstance(rows, IterableDataset):
        return
    everywhere = set(range(len(class_names(rows))))
    for tags in rows["tags"]:
        everywhere &= set(tags)
        if not everywhere:
            return
    name = class_names(rows)[min(everywhere)]
    say(
        f"cam: all images have the tag {name!r}, so nothing tells it from the background; expected some without it, "
        "for example in a folder background/"
    )


def build_cam(recipe: Recipe, names: list[str]) -> tuple[PreTrainedModel, list[float], list[float]]:
    """The classifier that a training starts from, and the mean and standard deviation of its images."""
    section = recipe.cam
    model, mean, std = build_on_backbone(
        CamClassifier,
        section,
        recipe.image,
        "cam",
        output_stride=section.output_stride,
        dropout=section.dropout,
        classifier_bias=section.classifier_bias,
        backbone_layers=section.backbone_layers,
        id2label=dict(enumerate(names)),
        method_warmup=section.method_warmup,
        maps=section.maps,
        background_threshold=section.background_threshold,
        tag_threshold=section.tag_threshold,
        **section.methods,
    )
    start_layers(model, section.new_layers, section.classifier_std)
    return model, mean, std


def cam_record(data: DatasetDict, recipe: Recipe) -> Record:
    """What a classifier of this recipe and data is made from."""
    section = with_launcher(recipe.cam)
    inputs = {"data": data_fingerprint(data, ["image_id", "tags", "image", *_columns(recipe)])}
    if section.backbone is not None:
        inputs["backbone"] = model_fingerprint(section.backbone)
    settings = {"seed": recipe.seed, "image": recipe.image, "cam": section}
    return Record("train-cam", VERSION, settings, inputs, source_of(data))


def _columns(recipe: Recipe) -> tuple[str, ...]:
    """Further columns that the methods read."""
    return tuple(name for name in ("superpixels", "saliency") if getattr(recipe.cam, name))
