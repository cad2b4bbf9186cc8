"""Models on published backbones. Not uploaded with checkpoints, which need no backbone of anybody else."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import is_timm_available

from .backbone import BackboneConfigMixin, body_class, usable_config
from .portable_model import PortableModel, processor_for
from .weights import check_no_run, from_safetensors

NO_CODE = {"trust_remote_code": False}
"""Options of every load: code that a repository brings is not run, and nobody is asked whether to run it."""


def pinned(name: Any, hub_kwargs: dict) -> tuple[Any, dict]:
    """A model's name and the options of its download: `owner/name@revision` is the id, at that revision.

    Directories, plain ids and None come back as they are.

    Raises:
        FileNotFoundError: it is empty, or can only be a path, and nothing is there.
        ValueError: it is a revision of a folder, or the folder of a run.
    """
    repo_id, _, revision = str(name).partition("@")
    if name is not None and not str(name).strip():
        raise FileNotFoundError(f"expected a model's folder or its id on the Hub, got {str(name)!r}")
    if name is not None and not os.path.exists(name) and (os.path.isabs(repo_id) or repo_id.startswith(".")):
        raise FileNotFoundError(f"{name}: expected a model's folder or its id on the Hub, found nothing there")
    if not hub_kwargs.get("subfolder"):
        check_no_run(name)
    if not revision or os.path.exists(name):
        return name, hub_kwargs
    if os.path.isdir(repo_id):
        raise ValueError(f"{name}: expected no revision of a model's folder, got {revision!r}")
    return repo_id, hub_kwargs | {"revision": revision}


def load_config(name: str | os.PathLike, **hub_kwargs) -> Any:
    """The configuration of a model, in a directory or on the Hub. Errors name it, which the library's do not always.

    Raises:
        OSError, ValueError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(name, **(NO_CODE | hub_kwargs))
    except (OSError, ValueError) as error:
        if str(name) in str(error):
            raise
        raise OSError(f"{name}: {error}") from error


def resolve_backbone_config(
    backbone: str | None, backbone_config: PreTrainedConfig | dict | None, **hub_kwargs
) -> PreTrainedConfig:
    """The configuration of a backbone from a directory, a Hub id, a dict with `model_type`, or a configuration.

    Its label names are dropped: they are those of another task. Of a model of images and texts (CLIP, SigLIP) it is
    the configuration of the vision tower.

    Raises:
        ValueError: there is none, or it is of another kind.
        ImportError: a network of timm, which is not installed or does not work.
    """
    if backbone_config is None:
        if backbone is None:
            raise ValueError("backbone: expected a directory or Hub id, or a backbone_config, got neither")
        backbone, hub_kwargs = pinned(backbone, hub_kwargs)
        try:
            backbone_config = load_config(backbone, **hub_kwargs)
        except ImportError as error:  # which transformers raises for timm alone, in three lines
            raise ImportError(_NEEDS_TIMM.format(backbone)) from error
    elif isinstance(backbone_config, dict):
        backbone_config = usable_config(backbone_config)
    kind = getattr(backbone_config, "model_type", None)
    if isinstance(backbone_config, BackboneConfigMixin):
        raise ValueError(f"backbone: expected a network for all tasks, got {backbone or kind}, a {kind} on a backbone")
    config = usable_config(getattr(backbone_config, "vision_config", backbone_config))
    return _completed_timm(config) if config.model_type.startswith("timm") else config


_NEEDS_TIMM = "backbone: {} is a network of timm, which needs torchvision: pip install timm"


def _completed_timm(config: Any) -> PreTrainedConfig:
    """With what the configuration of a plain vision transformer does not say: depth, heads, patches; for any size."""
    if config.model_type != "timm_wrapper":
        raise ValueError(
            f"backbone_config: expected model_type timm_wrapper with an architecture, got {config.model_type}"
        )
    if not is_timm_available():
        raise ImportError(_NEEDS_TIMM.format(config.architecture))
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config).timm_model
    if hasattr(model, "dynamic_img_size"):
        config.model_args = {**(config.model_args or {}), "dynamic_img_size": True}
        config.num_hidden_layers, config.num_attention_heads = len(model.blocks), model.blocks[0].attn.num_heads
        config.patch_size = model.patch_embed.patch_size[0]
    return config


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
    options = NO_CODE | hub_kwargs | kwargs
    return from_safetensors(auto_class.from_pretrained, backbone, config=config, **options)


def backbone_normalization(backbone: str | None, config, **hub_kwargs) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation that a backbone was trained with, for images in [0, 1].

    From its preprocessor_config.json where `backbone`, a directory or Hub id, has one; else its model type's default
    in transformers, or what timm says; else ImageNet's.
    """
    if getattr(config, "model_type", None) == "timm_wrapper":  # whose processor does not show them
        given = getattr(config, "pretrained_cfg", {})
        return list(given.get("mean", IMAGENET_DEFAULT_MEAN)), list(given.get("std", IMAGENET_DEFAULT_STD))
    try:
        known = AutoImageProcessor.from_pretrained(backbone, **(NO_CODE | hub_kwargs)) if backbone else None
    except (OSError, ValueError):  # published without a processor
        known = None
    if known is None and type(config) in IMAGE_PROCESSOR_MAPPING:
        classes: Any = IMAGE_PROCESSOR_MAPPING[type(config)]
        known = classes.get("pil")
    mean, std = getattr(known, "image_mean", None), getattr(known, "image_std", None)
    return list(mean or IMAGENET_DEFAULT_MEAN), list(std or IMAGENET_DEFAULT_STD)
