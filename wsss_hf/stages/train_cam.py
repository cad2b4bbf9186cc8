"""Stage 1: tagged images → CAM classifier."""

from __future__ import annotations

import os
from pathlib import Path

from datasets import DatasetDict

from ..data.tagged import class_names
from ..models.methods import METHODS
from ..models.modeling_cam import CamClassifier
from ..recipes import RecipeError
from ..training.build import build_on_backbone, build_processor, resolve_backbone, train_and_save
from .cache import StageOutput


def train_cam(
    data: DatasetDict,
    recipe: dict,
    out: str | os.PathLike,
    data_settings: dict | None = None,
    hub_kwargs: dict | None = None,
    quiet: bool = False,
) -> Path:
    """Train a CAM classifier on the tags of split "train"; masks are never read.

    Args:
        data: tagged images, see `wsss_hf.data`.
        recipe: a resolved recipe; its `image` and `cam` sections are used.
        out: folder of the model. Where it holds the result of the same settings nothing is done; an interrupted
            training goes on.
        data_settings: what `data` is, for the record.
        hub_kwargs: `revision`, `token`, `cache_dir` for the backbone.

    Returns:
        `out`, loadable by `CamClassifier.from_pretrained`.
    """
    section = recipe["cam"]
    settings = {"stage": "train-cam", "data": data_settings} | {key: recipe[key] for key in ("seed", "image", "cam")}
    output = StageOutput(out, settings)
    if output.done:
        return output.path
    hub_kwargs = hub_kwargs or {}
    for name in section["methods"]:
        if name not in METHODS:
            raise RecipeError(f"cam.methods.{name}: no such method; there are {', '.join(METHODS)}")

    def build_model():
        backbone = resolve_backbone(recipe, "cam", hub_kwargs)
        model = build_on_backbone(
            CamClassifier,
            backbone,
            hub_kwargs,
            output_stride=section["output_stride"],
            id2label=dict(enumerate(class_names(data["train"]))),
            method_warmup=section["method_warmup"],
            maps=section["maps"],
            background_threshold=section["background_threshold"],
            tag_threshold=section["tag_threshold"],
            image_mean=backbone["image_mean"],
            image_std=backbone["image_std"],
            **section["methods"],
        )
        return model, build_processor(recipe, "cam", backbone["image_mean"], backbone["image_std"])

    train_and_save(build_model, data["train"], None, recipe, "cam", output, quiet)
    return output.path
