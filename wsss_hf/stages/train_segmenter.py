"""Stage 3: images with pseudo masks → segmenter."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict

from ..data.tagged import class_names
from ..models.backbone import pinned
from ..models.configuration_segmenter import SegmenterConfig
from ..models.modeling_cam import CamClassifier
from ..models.modeling_segmenter import Segmenter
from ..progress import Progress
from ..pseudo_labels.area_prior import background_factor, labelled_objects, multiply_background, output_bias
from ..training.build import build_on_backbone, build_processor, resolve_backbone, train_and_save, training_size
from ..training.library_segmenter import build_library_segmenter
from ..training.losses import SegmentationObjective, build_loss, cross_entropy
from .cache import StageOutput

_AREA_IMAGES = 256  # that say how large objects are


def train_segmenter(
    data: DatasetDict,
    recipe: dict,
    out: str | os.PathLike,
    mask_column: str = "pseudo_mask",
    cam: str | os.PathLike | None = None,
    data_settings: dict | None = None,
    hub_kwargs: dict | None = None,
    quiet: bool = False,
) -> Path:
    """Train a segmenter on the pseudo masks of split "train".

    Args:
        data: what `make_masks` wrote.
        recipe: a resolved recipe; its `image` and `segmenter` sections are used.
        out: folder of the model; as for `train_cam`.
        mask_column: "mask" trains on true masks instead, for the fully supervised upper bound.
        cam: the trained CAM classifier; its backbone is the start where the recipe says `from_cam`.

    Returns:
        `out`, loadable by `AutoModelForSemanticSegmentation.from_pretrained`, a classifier of masks by that of
        `AutoModelForUniversalSegmentation`.

    Raises:
        RecipeError: the recipe names no backbone or model, one that can't be used, or an unknown head or loss.
    """
    section = recipe["segmenter"]
    settings = {"stage": "train-segmenter", "data": data_settings, "mask_column": mask_column}
    settings |= {"cam": str(cam) if cam else None} | {key: recipe[key] for key in ("seed", "image", "segmenter")}
    output = StageOutput(out, settings)
    if output.done:
        return output.path
    hub_kwargs = hub_kwargs or {}
    names = ["background", *class_names(data["train"])]
    loss = build_loss(section["loss"], section["loss_options"])
    trust = {"weigh": section["confidence"], "min_confidence": section["min_confidence"]}
    wants_confidence = mask_column != "mask" and any(trust.values())
    recipe = recipe | {"segmenter": section | {"confidence": wants_confidence}}
    keep_area = section["keep_area"]
    if mask_column == "mask":  # true masks are certain: what doubts labels is for pseudo masks
        loss, keep_area = cross_entropy, False

    def build_model():
        if section["model"] is not None:
            side = training_size(recipe, "segmenter")
            model, processor, new = build_library_segmenter(section["model"], names, side, hub_kwargs)
            return SegmentationObjective(model, loss, new, **trust), processor
        options = {key: section[key] for key in ("output_stride", "head", "rates", "input_scales")}
        options["id2label"] = dict(enumerate(names))
        if section["from_cam"] and cam is not None:
            name, there = pinned(cam, hub_kwargs)
            classifier = CamClassifier.from_pretrained(name, **there)
            model = Segmenter(SegmenterConfig(backbone_config=classifier.config.backbone_config, **options))
            model.backbone.load_state_dict(classifier.backbone.state_dict())
            mean, std = classifier.config.image_mean, classifier.config.image_std
        else:
            backbone = resolve_backbone(recipe, "segmenter", hub_kwargs)
            model = build_on_backbone(Segmenter, backbone, hub_kwargs, **options)
            mean, std = backbone["image_mean"], backbone["image_std"]
        return SegmentationObjective(model, loss, **trust), build_processor(recipe, "segmenter", mean, std)

    finish = None
    if keep_area:
        finish = partial(_keep_area, data["train"], mask_column, section["train"]["batch_size"], quiet)
    train_and_save(build_model, data["train"], mask_column, recipe, "segmenter", output, quiet, finish=finish)
    return output.path


def _keep_area(
    rows: Dataset,
    mask_column: str,
    batch_size: int,
    quiet: bool,
    objective: SegmentationObjective,
    processor: Callable,
) -> dict:
    """Objects become no smaller, on the whole, than in the labels; a classifier of masks stays as it is."""
    model = objective.model.eval()
    bias = output_bias(model)
    rows = labelled_objects(rows, mask_column, _AREA_IMAGES)
    if bias is None or not len(rows):
        return {}
    settings = {"scales": [1.0], "flip": True, "workers": 0, "batch_size": batch_size}
    with Progress("objects' area", len(rows), quiet, unit="image") as progress:
        factor = background_factor(
            model, processor, rows, settings, mask_column, only_tagged=False, advance=progress.advance
        )
    factor = min(factor, 1.0)  # where they are larger, it is the coarse maps that cover borders, or objects found anew
    multiply_background(bias, factor)
    return {"background_factor": factor}
