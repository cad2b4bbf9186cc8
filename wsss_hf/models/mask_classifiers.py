"""Models of transformers that classify masks (EoMT, Mask2Former, MaskFormer) as models that label pixels."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)

from .weights import from_safetensors

MASK_CLASSIFIERS = {"eomt", "eomt_dinov3", "mask2former", "maskformer"}
"""Model types with queries that each have a mask and a class, and want nothing but images."""

_SQUARES = {"eomt", "eomt_dinov3"}  # of these, those that take squares of config.image_size alone


def pixel_logits(class_queries_logits: Tensor, masks_queries_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, K, H, W) of pixels, float32: log Σ_q p(class | q) p(pixel in the mask of q).

    The scores are those of semantic inference with masks (Cheng et al., "Per-Pixel Classification is Not All You Need
    for Semantic Segmentation", NeurIPS 2021, section 3.4), so both have the same argmax; a softmax of the logits
    normalises the scores over the classes, and every loss of pixels can follow.

    Args:
        class_queries_logits: (B, Q, K+1), the last one is "no object".
        masks_queries_logits: (B, Q, h, w).
        size: (H, W) of the image; masks are enlarged to it before anything else, as the papers do.
    """
    with torch.autocast(class_queries_logits.device.type, enabled=False):
        classes = class_queries_logits.float().softmax(dim=-1)[..., :-1]
        masks = F.interpolate(masks_queries_logits.float(), size=size, mode="bilinear", align_corners=False).sigmoid()
        scores = torch.einsum("bqk,bqhw->bkhw", classes, masks)
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that loads a model of this configuration, a segmentation model or an affinity network."""
    if config.model_type == "wsss_affinity":
        return AutoModel
    is_mask_classifier = config.model_type in MASK_CLASSIFIERS
    return AutoModelForUniversalSegmentation if is_mask_classifier else AutoModelForSemanticSegmentation


def check_segments(config: PreTrainedConfig, name: str | os.PathLike) -> None:
    """Raises ValueError unless a configuration is that of a model that labels pixels, with classes."""
    if config.model_type not in MASK_CLASSIFIERS and type(config) not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        raise ValueError(f"{name}: expected a model for semantic segmentation, got a {config.model_type}")
    if not config.id2label:
        raise ValueError(f"{name}, id2label: expected the names of classes, got none")


def load_segmentation_model(name: str | os.PathLike, options: dict | None = None, **hub_kwargs):
    """Any semantic segmentation model, mask classifier or affinity network from its safetensors; its outputs have
    `logits`.

    A mask classifier stays the transformers model that it is, and is saved as such: a hook adds the logits
    (B, K, H, W) of [`pixel_logits`], of the images' size, to its outputs.

    Args:
        name: directory or Hub id.
        options: `config`, `output_loading_info` … of `from_pretrained`.
        hub_kwargs: `revision`, `token`, `cache_dir`.

    Returns:
        what `from_pretrained` returns.

    Raises:
        OSError, ValueError: there is none, or its weights are pickled.
    """

    hub_kwargs = {"trust_remote_code": False} | hub_kwargs

    def load(name, config=None, **options):
        config = config or AutoConfig.from_pretrained(name, **hub_kwargs)
        return auto_class(config).from_pretrained(name, config=config, **options, **hub_kwargs)

    loaded = from_safetensors(load, name, **(options or {}))
    model: PreTrainedModel = loaded[0] if isinstance(loaded, tuple) else loaded
    if model.config.model_type in MASK_CLASSIFIERS:
        model.register_forward_hook(_add_logits, with_kwargs=True)
    return loaded


def _add_logits(_model, args: tuple, kwargs: dict, output):
    pixel_values = args[0] if args else kwargs["pixel_values"]
    size = tuple(pixel_values.shape[-2:])
    output["logits"] = pixel_logits(output.class_queries_logits, output.masks_queries_logits, size)
    return output


def square_side(model) -> int:
    """Side in pixels of the squares that a model takes, and takes alone; 0 where it is not bound to such."""
    config: Any = getattr(model, "config", None)
    return config.image_size if getattr(config, "model_type", None) in _SQUARES else 0
