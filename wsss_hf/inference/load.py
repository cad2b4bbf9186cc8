"""Trained models for inference, with their image processors."""

from __future__ import annotations

import os

import torch
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from ..models.configuration_cam import CamConfig
from ..models.mask_classifiers import check_segments, load_segmentation_model
from ..models.modeling_cam import CamClassifier
from ..models.modeling_map_refiner import MapRefiner, MapRefinerConfig
from ..models.pretrained import NO_CODE, load_config, pinned
from .optimize import for_inference
from .weights import check_weights


def load_labeler(
    name: str | os.PathLike, device: torch.device | str, optimize: bool = False
) -> tuple[CamClassifier, BaseImageProcessor]:
    """A trained CAM classifier or map refiner in eval mode, and its image processor.

    Args:
        name: directory or Hub id (`owner/name@revision`).
        optimize: make it faster on a CPU, see [`for_inference`]; its outputs then differ by rounding, and it can
            neither be trained nor saved. The environment variable WSSS_OPTIMIZE, 0 or 1, decides instead where set.

    Raises:
        OSError, ValueError: there is none, it is another kind of model, its configuration or weights are damaged, or
            its training has diverged.
    """
    found, revision = _pinned(name)
    config = load_config(found, **revision)
    if not isinstance(config, CamConfig):
        raise ValueError(f"{name}: expected a CAM classifier or map refiner, got a {config.model_type}")
    check_segments(config, name)
    for option in ("background_threshold", "tag_threshold"):
        value = getattr(config, option)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{name}, {option}: expected a number in [0, 1], got {value!r}")
    model_class = MapRefiner if isinstance(config, MapRefinerConfig) else CamClassifier
    model = _ready(model_class.from_pretrained(found, **revision), name, device, optimize)
    return model, AutoImageProcessor.from_pretrained(found, **revision)


def load_segmenter(
    name: str | os.PathLike, device: torch.device | str, optimize: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A trained segmenter, a [`Segmenter`] or a model of transformers, in eval mode, and its image processor.

    Args:
        name, optimize: as of [`load_labeler`].

    Returns:
        the model, and a processor that keeps images whole.

    Raises:
        OSError, ValueError: there is none, its weights are pickled, or its training has diverged.
    """
    found, revision = _pinned(name)
    check_segments(load_config(found, **revision), name)
    model = _ready(load_segmentation_model(found, **revision), name, device, optimize)
    processor = AutoImageProcessor.from_pretrained(found, **revision)
    if getattr(processor, "do_split_image", False):  # EoMT's; here `predict_scores` cuts images
        processor.do_split_image = False
    return model, processor


def _pinned(name: str | os.PathLike) -> tuple[str, dict]:
    found, revision = pinned(os.fspath(name), NO_CODE)
    return str(found), revision


def _ready(model, name: str | os.PathLike, device: torch.device | str, optimize: bool):
    check_weights(model, name)
    if os.environ.get("WSSS_OPTIMIZE", str(int(optimize))) == "1":
        return for_inference(model, device)
    return model.to(device).eval()
