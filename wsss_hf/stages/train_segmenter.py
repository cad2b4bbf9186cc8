"""Stage 3: images with pseudo masks → segmenter."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.tagged import class_names, source_of
from ..inference.load import load_labeler
from ..models.configuration_segmenter import SegmenterConfig
from ..models.modeling_segmenter import Segmenter
from ..progress import Progress
from ..pseudo_labels.area_prior import background_factor, labelled_objects, multiply_background, output_bias
from ..recipes import Recipe, check_inputs
from ..settings import SegmenterSettings, SelfTrainingSettings
from ..training.build import build_on_backbone, build_processor
from ..training.launcher import with_launcher
from ..training.library_segmenter import build_library_segmenter
from ..training.losses import CrossEntropy, SegmentationObjective, build_loss
from ..training.train import begin_training, train_model
from .cache import Record, StageOutput
from .fingerprint import data_fingerprint, model_fingerprint
from .results import TrainedModel

VERSION = 2
_AREA_IMAGES = 256  # enough to measure the object area


def train_segmenter(
    data: DatasetDict,
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    mask_column: str = "pseudo_mask",
    cam: str | os.PathLike | None = None,
    force: bool = False,
) -> TrainedModel:
    """Train a segmenter on the pseudo masks of split "train".

    Args:
        data: what [`make_masks`] wrote, also as a stream, see [`load_stream`].
        recipe: its `image` and `segmenter` sections are used.
        out: folder of the model, as for [`train_cam`].
        mask_column: "mask" trains on true masks instead, for the fully supervised upper bound; the loss is then
            cross-entropy, and all that doubts labels is off.
        cam: the trained CAM classifier; its backbone is the start where the recipe says `from_cam`.
        force: train again whatever is there.

    Returns:
        the model, loadable by `AutoModelForSemanticSegmentation.from_pretrained(out)` as well, a mask classifier by
        `AutoModelForUniversalSegmentation`.

    Raises:
        RecipeError: the recipe names no backbone or model, or one that can't be used.
    """
    check_inputs(data, recipe)
    section, rows = with_launcher(recipe.segmenter), data["train"]
    supervised = mask_column == "mask"
    by_confidence = _by_confidence(section, mask_column)
    from_cam = _start_from_cam(section, cam)
    output = StageOutput(out, segmenter_record(data, recipe, mask_column=mask_column, cam=cam), force)
    if not output.done:
        with output.working() as folder:
            accelerator = begin_training(section.train, recipe.seed, folder)
            model, processor, new_parameters = _build(from_cam, recipe, ["background", *class_names(rows)])
            objective = SegmentationObjective(
                model,
                CrossEntropy() if supervised else build_loss(section.loss, section.loss_options),
                new_parameters,
                weigh=section.confidence,
                min_confidence=section.min_confidence,
            )
            keep_area = partial(_keep_area, rows, mask_column, section.train.batch_size)
            result = train_model(
                accelerator,
                objective,
                processor,
                rows,
                section.train,
                seed=recipe.seed,
                size=_size(recipe),
                folder=folder,
                title="segmenter",
                mask_column=mask_column,
                columns=("confidence",) if by_confidence else (),
                finish=keep_area if section.keep_area and not supervised else None,
            )
            output.finish(result)
    return TrainedModel(output.path)


def segmenter_record(
    data: DatasetDict, recipe: Recipe, *, mask_column: str = "pseudo_mask", cam: str | os.PathLike | None = None
) -> Record:
    """What [`train_segmenter`] makes its model from."""
    section = with_launcher(recipe.segmenter)
    from_cam = _start_from_cam(section, cam)
    masks = ["image_id", mask_column, *(["confidence"] if _by_confidence(section, mask_column) else [])]
    inputs = {"data": data_fingerprint(data, ["image_id", "tags", "image"]), "masks": data_fingerprint(data, masks)}
    for name, start in (("cam", from_cam), ("backbone", section.backbone), ("model", section.model)):
        if start is not None and (name != "backbone" or from_cam is None):
            inputs[name] = model_fingerprint(start)
    settings: dict[str, Any] = {"mask_column": mask_column, "seed": recipe.seed, "image": recipe.image}
    settings["segmenter"] = section
    return Record("train-segmenter", VERSION, settings, inputs, source_of(data))


def _by_confidence(section: SegmenterSettings, mask_column: str) -> bool:
    """Whether the confidence of the pseudo masks is read."""
    return mask_column != "mask" and bool(section.confidence or section.min_confidence)


def _start_from_cam(section: SegmenterSettings, cam: str | os.PathLike | None) -> str | os.PathLike | None:
    """The CAM classifier whose backbone is the start, if the recipe says so."""
    return cam if section.from_cam and section.model is None else None


def check_start(data: DatasetDict, recipe: Recipe) -> None:
    """Builds what the segmenter of a run starts from, or a network like it where that is the CAM classifier to come.

    Raises:
        RecipeError, OSError, ValueError: there is no such backbone or model, or it can't be used.
    """
    section = recipe.segmenter
    if section.from_cam and section.model is None:
        start: dict[str, Any] = {name: getattr(recipe.cam, name) for name in ("backbone", "backbone_config")}
        recipe = dataclasses.replace(recipe, segmenter=dataclasses.replace(section, **start))
    _build(None, recipe, ["background", *class_names(data["train"])])


def _size(recipe: Recipe) -> int:
    return recipe.segmenter.size or recipe.image.size


def _build(
    cam: str | os.PathLike | None, recipe: Recipe, names: list[str]
) -> tuple[PreTrainedModel, BaseImageProcessor, set[str] | None]:
    """The segmenter, its image processor, and the names of its new parameters (None: all but the backbone's)."""
    section = recipe.segmenter
    if section.model is not None:
        return build_library_segmenter(section.model, names, _size(recipe))
    options = {name: getattr(section, name) for name in ("output_stride", "head", "rates", "input_scales")}
    options["id2label"] = dict(enumerate(names))
    if cam is None:
        model, mean, std = build_on_backbone(Segmenter, section, recipe.image, "segmenter", **options)
    else:
        classifier, _ = load_labeler(os.fspath(cam), "cpu")
        model = Segmenter(SegmenterConfig(backbone_config=classifier.config.backbone_config, **options))
        model.backbone.load_state_dict(classifier.backbone.state_dict())
        mean, std = classifier.config.image_mean, classifier.config.image_std
    return model, build_processor(_size(recipe), mean, std, section.train.scaled_side), None


def _keep_area(
    rows: Dataset | IterableDataset,
    mask_column: str,
    batch_size: int,
    objective: SegmentationObjective,
    processor: BaseImageProcessor,
) -> dict:
    """Add a logit bias to the background, so that the predicted object area is not below that of the labels.

    Segmenters trained on noisy masks under-predict objects. Larger objects than in the labels are left alone: coarse
    maps cover borders rightly. Mask classifiers have no such bias and stay as they are.
    """
    model = objective.model.eval()
    bias = output_bias(model, processor)
    if isinstance(rows, IterableDataset):
        rows = Dataset.from_list(list(rows.take(_AREA_IMAGES)), features=rows.features)
    rows = labelled_objects(rows, mask_column, _AREA_IMAGES)
    if bias is None or not len(rows):
        return {}
    settings = SelfTrainingSettings(scales=[1.0], flip=True, batch_size=batch_size)
    with Progress("object area", len(rows), unit="image") as progress:
        factor = background_factor(
            model, processor, rows, settings, mask_column, only_tagged=False, advance=progress.advance
        )
    factor = min(factor, 1.0)
    multiply_background(bias, factor)
    return {"background_factor": factor}
