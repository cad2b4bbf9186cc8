"""Models on backbones, as a recipe describes them, with the image processors that go with them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.image_processing_wsss import WsssImageProcessor
from ..models.pictures import LONGEST
from ..models.pretrained import backbone_normalization, resolve_backbone_config
from ..settings import AffinitySettings, CamSettings, ImageSettings, RecipeError, SegmenterSettings


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


def start_layers(model: Any, patterns: Sequence[str] = (), std: float | None = None, deep: bool = False) -> None:
    """How the new layers of a CAM classifier or map refiner start, before a training.

    Its methods take weights of the backbone; `model.new_parameters` becomes what learns at the rate of new layers.

    Args:
        patterns: shell patterns of the names of the backbone's layers that are new.
        std: the 1×1 convolution starts from N(0, std), its bias at 0; None leaves it as it is.
        deep: so do the backbone's new layers.

    Raises:
        RecipeError: the backbone has no such layers.
    """
    layers = dict(model.backbone.body.named_modules())
    new = {name for pattern in patterns for name in fnmatch.filter(layers, pattern)}
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise RecipeError(f"cam.new_layers: expected layers of the backbone, got {pattern!r}, which fits none")
    for layer in [model.classifier, *(layers[name] for name in sorted(new) if deep)]:
        if std is not None and isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    known = {
        f"methods.{name}.{parameter}"
        for name, method in model.methods.items()
        for parameter in method.start_from(model.backbone)
    }
    prefixes = tuple(f"backbone.body.{name}." for name in new)
    names = (name for name, _ in model.named_parameters())
    model.new_parameters = {n for n in names if not n.startswith("backbone.") or n.startswith(prefixes)} - known


def build_processor(
    size: int, image_mean: list[float], image_std: list[float], scaled_side: str = "short"
) -> WsssImageProcessor:
    """The image processor that shows a model images at the scale it was trained at.

    Args:
        size: side of a training crop in pixels.
        scaled_side: as of [`TrainTransform`]; "both" gives squares.
    """
    shape = {"shortest_edge": size, "longest_edge": LONGEST * size}
    if scaled_side == "both":
        shape = {"height": size, "width": size}
    return WsssImageProcessor(size=shape, image_mean=image_mean, image_std=image_std)
