"""Models on backbones, as a recipe describes them, with the image processors that go with them."""

from __future__ import annotations

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


def start_layers(model: Any, classifier_std: float | None) -> None:
    """How the new layers of a CAM classifier start, before a training: methods may take weights of the backbone.

    Args:
        classifier_std: the 1×1 convolution starts from N(0, this), its bias at 0; None leaves it as it is.
    """
    if classifier_std is not None:
        nn.init.normal_(model.classifier.weight, std=classifier_std)
        if model.classifier.bias is not None:
            nn.init.zeros_(model.classifier.bias)
    known = {
        f"methods.{name}.{parameter}"
        for name, method in model.methods.items()
        for parameter in method.start_from(model.backbone)
    }
    names = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    model.new_parameters = names - known


def build_processor(size: int, image_mean: list[float], image_std: list[float]) -> WsssImageProcessor:
    """The image processor that shows a model images at the scale it was trained at.

    Args:
        size: side of a training crop in pixels.
    """
    shape = {"shortest_edge": size, "longest_edge": LONGEST * size}
    return WsssImageProcessor(size=shape, image_mean=image_mean, image_std=image_std)
