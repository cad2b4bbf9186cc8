"""Stage 3: images with pseudo masks → segmenter."""

from __future__ import annotations

import os
from pathlib import Path

from datasets import DatasetDict

from ..data.tagged import class_names
from ..models.configuration_segmenter import SegmenterConfig
from ..models.modeling_cam import CamClassifier
from ..models.modeling_segmenter import Segmenter
from .outputs import StageOutput
from .train_model import build_on_backbone, build_processor, resolve_backbone, train_and_save


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
        `out`, loadable by `Segmenter.from_pretrained`.
    """
    section = recipe["segmenter"]
    settings = {"stage": "train-segmenter", "data": data_settings, "mask_column": mask_column}
    settings |= {"cam": str(cam) if cam else None} | {key: recipe[key] for key in ("seed", "image", "segmenter")}
    output = StageOutput(out, settings)
    if output.done:
        return output.path
    hub_kwargs = hub_kwargs or {}

    def build_model():
        options = {
            **{key: section[key] for key in ("output_stride", "head", "rates", "input_scales")},
            "id2label": dict(enumerate(["background", *class_names(data["train"])])),
        }
        if section["from_cam"] and cam is not None:
            classifier = CamClassifier.from_pretrained(cam)
            model = Segmenter(SegmenterConfig(backbone_config=classifier.config.backbone_config, **options))
            model.backbone.load_state_dict(classifier.backbone.state_dict())
            return model, build_processor(recipe, classifier.config.image_mean, classifier.config.image_std)
        backbone = resolve_backbone(recipe, "segmenter", hub_kwargs)
        model = build_on_backbone(Segmenter, backbone, hub_kwargs, **options)
        return model, build_processor(recipe, backbone["image_mean"], backbone["image_std"])

    train_and_save(build_model, data["train"], mask_column, recipe, "segmenter", output, quiet)
    return output.path
