"""Models on published backbones. Not uploaded with checkpoints, which need no backbone of anybody else."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from .backbone import body_class, from_safetensors, usable_config
from .portable_model import PortableModel, processor_for


def pinned(name: Any, hub_kwargs: dict) -> tuple[Any, dict]:
    """A model's name and the options of its download: `owner/name@revision` is the id, at that revision.

    Directories, plain ids and None come back as they are.

    Raises:
        FileNotFoundError: it can only be a path, and nothing is there.
    """
    repo_id, _, revision = str(name).partition("@")
    if name is not None and not os.path.exists(name) and (os.path.isabs(repo_id) or repo_id.startswith(".")):
        raise FileNotFoundError(f"{name}: expected a model's folder or its id on the Hub, found nothing there")
    if not revision or os.path.exists(name):
        return name, hub_kwargs
    return repo_id, hub_kwargs | {"revision": revision}


def resolve_backbone_config(
    backbone: str | None, backbone_config: PreTrainedConfig | dict | None, **hub_kwargs
) -> PreTrainedConfig:
    """The configuration of a backbone from a directory, a Hub id, a dict with `model_type`, or a configuration.

    Its label names are dropped: they are those of another task.
    """
    if backbone_config is None:
        if backbone is None:
            raise ValueError("backbone: expected a directory or Hub id, or a backbone_config, got neither")
        backbone, hub_kwargs = pinned(backbone, hub_kwargs)
        backbone_config = AutoConfig.from_pretrained(backbone, **hub_kwargs)
    return usable_config(backbone_config)


def from_backbone(
    model_class: type[PortableModel], backbone: str, hub_kwargs: dict | None = None, **config_kwargs
) -> PortableModel:
    """[`PortableModel.from_backbone`]."""
    backbone, hub_kwargs = pinned(backbone, hub_kwargs or {})
    backbone_config = resolve_backbone_config(backbone, config_kwargs.pop("backbone_config", None), **hub_kwargs)
    config_class: Any = model_class.config_class
    config = config_class(backbone_config=backbone_config, **config_kwargs)
    mean, std = backbone_normalization(backbone, backbone_config, **hub_kwargs)
    for key, value in (("image_mean", mean), ("image_std", std)):
        if hasattr(config, key) and key not in config_kwargs:
            setattr(config, key, value)
    model = model_class(config)
    body = pretrained_body(backbone, config.backbone_config, **hub_kwargs)
    model.backbone.body.load_state_dict(body.state_dict())
    model.image_processor = processor_for(config, mean, std)
    return model


def pretrained_body(backbone: str, config: PreTrainedConfig, **hub_kwargs) -> nn.Module:
    """The transformers model behind `backbone` (a directory or Hub id) with its published weights."""
    auto_class, kwargs = body_class(config)
    if auto_class is AutoBackbone:  # whose own from_pretrained takes no directory
        auto_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    return from_safetensors(auto_class.from_pretrained, backbone, config=config, **kwargs, **hub_kwargs)


def backbone_normalization(backbone: str | None, config, **hub_kwargs) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation that a backbone was trained with, for images in [0, 1].

    From its preprocessor_config.json where `backbone`, a directory or Hub id, has one; else its model type's default
    in transformers; else ImageNet's.
    """
    try:
        known = AutoImageProcessor.from_pretrained(backbone, **hub_kwargs) if backbone else None
    except (OSError, ValueError):  # published without a processor
        known = None
    if known is None and type(config) in IMAGE_PROCESSOR_MAPPING:
        classes: Any = IMAGE_PROCESSOR_MAPPING[type(config)]
        known = classes.get("pil")
    mean, std = getattr(known, "image_mean", None), getattr(known, "image_std", None)
    return list(mean or IMAGENET_DEFAULT_MEAN), list(std or IMAGENET_DEFAULT_STD)
