"""Any semantic segmentation model or mask classifier of transformers as a segmenter with our classes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from ..models.backbone import freeze_idle_parameters
from ..models.maps import IGNORE_INDEX
from ..models.mask_classifiers import MASK_CLASSIFIERS, auto_class, load_segmentation_model
from ..models.pictures import LONGEST
from ..models.pretrained import NO_CODE, pinned
from ..settings import RecipeError

# What an image processor may do beside resizing and normalising; none of it suits a label map of the whole image.
_OFF = ("do_center_crop", "do_pad", "do_reduce_labels", "keep_aspect_ratio")


def build_library_segmenter(
    name: str, names: list[str], side: int
) -> tuple[PreTrainedModel, BaseImageProcessor, set[str]]:
    """A pretrained `AutoModelForSemanticSegmentation`, or a mask-classification model, with a new last layer.

    An auxiliary head is dropped: its loss cannot be weighted per pixel. A mask-classification model keeps its queries
    and masks, and is trained on the pixel logits that they give.

    Args:
        name: directory or Hub id.
        names: the classes, background first. A model that knows these very classes keeps its last layer.
        side: pixels of a training crop's side; the model must take such images.

    Returns:
        the model, with `logits` (B, C+1, h, w); its own image processor, which keeps the normalisation and shows
        images at the scale of training: the short side at `side`, or squares where the model takes nothing else; the
        names of the parameters that do not come from the checkpoint.

    Raises:
        RecipeError: there is no such model, its weights are pickled, it is none for semantic segmentation, or takes no
            images of this size.
    """
    name, revision = pinned(name, NO_CODE)
    try:
        config = AutoConfig.from_pretrained(name, **revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"segmenter.model: {name}: {' '.join(str(error).split())}") from error
    if config.model_type not in MASK_CLASSIFIERS and type(config) not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        needs = ", which needs a task beside each image" if config.model_type == "oneformer" else ""
        raise RecipeError(
            "segmenter.model: expected a model of AutoModelForSemanticSegmentation (SegFormer, UperNet, DPT …), EoMT, "
            f"Mask2Former or MaskFormer, got {name} ({config.model_type}{needs})"
        )
    known = list(config.id2label.values())
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}
    if getattr(config, "use_auxiliary_head", False):
        config.use_auxiliary_head = False
    options = {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, loading = load_segmentation_model(name, options, **revision)
    except ValueError as error:
        raise RecipeError(f"segmenter.model: {error}") from error
    new = {*loading["missing_keys"], *(key for key, *_shapes in loading["mismatched_keys"])}
    new &= {key for key, _ in model.named_parameters()}
    if len(known) == len(names) and known != names:  # of the same shape, but for other classes
        learnt = _sized_by_the_labels(config) - new
        for module in {key.rpartition(".")[0] for key in learnt}:
            model.get_submodule(module).reset_parameters()
        new |= learnt
    any_shape = _check_images(model, name, side, len(names))
    return model, _own_processor(name, config, side, any_shape, revision), new


def _sized_by_the_labels(config: PreTrainedConfig) -> set[str]:
    """Names of the parameters whose shape depends on the number of labels."""
    shapes = []
    known = len(config.id2label or {})
    for count in (known, known + 1):
        counted = copy.deepcopy(config)
        counted.num_labels = count
        with torch.device("meta"):
            model = auto_class(counted).from_config(counted)
        shapes.append({name: parameter.shape for name, parameter in model.named_parameters()})
    return {name for name, shape in shapes[0].items() if shapes[1][name] != shape}


def _check_images(model: PreTrainedModel, name: str, side: int, num_labels: int) -> bool:
    """Whether the model takes images of any shape; freezes the parameters that its logits do not depend on.

    Raises:
        RecipeError: not even squares of `side` pixels.
    """
    try:
        logits = _logits(model, side, side)
    except (RuntimeError, ValueError) as error:
        fixed = getattr(model.config, "image_size", None)
        expected = f"image.size={fixed}" if fixed else "an image.size that it takes"
        reason = " ".join(str(error).split())
        raise RecipeError(f"segmenter.model: {name}: expected {expected}, got {side} ({reason})") from error
    if logits.ndim != 4 or logits.shape[1] != num_labels:
        raise RecipeError(
            f"segmenter.model: {name}: expected logits of shape (1, {num_labels}, h, w), background and classes, got "
            f"{tuple(logits.shape)}"
        )
    freeze_idle_parameters(model, logits)
    try:
        with torch.no_grad():
            height, width = _logits(model, side, side + side // 2).shape[-2:]
    except (RuntimeError, ValueError):
        return False
    return width > height


def _logits(model: nn.Module, height: int, width: int) -> torch.Tensor:
    return model.eval()(torch.zeros(1, 3, height, width)).logits


def _own_processor(name: str, config, side: int, any_shape: bool, revision: dict[str, Any]) -> BaseImageProcessor:
    size = {"shortest_edge": side, "longest_edge": LONGEST * side} if any_shape else {"height": side, "width": side}
    try:
        processor = AutoImageProcessor.from_pretrained(name, **revision)
    except (OSError, ValueError):  # published without one
        classes: Any = IMAGE_PROCESSOR_MAPPING[type(config)]
        processor = classes["pil"]()
    options = {"size": size, "do_resize": True} | {key: False for key in _OFF if hasattr(processor, key)}
    if hasattr(processor, "do_split_image"):  # EoMT's cuts images into squares, and puts their label maps together
        options |= {"size": {"shortest_edge": side}, "do_split_image": True, "ignore_index": None}
    elif hasattr(processor, "ignore_index"):
        options["ignore_index"] = IGNORE_INDEX
    return type(processor).from_dict(processor.to_dict() | options)


def of_one_shape(processor: Any) -> Any:
    """An image processor that shows squares where `processor` keeps the aspect of photographs.

    The library's own pipeline batches images of one size only; so do its published models of these architectures.
    EoMT's processor, which cuts images into squares, stays as it is.
    """
    side = processor.size.get("shortest_edge")
    if side is None or getattr(processor, "do_split_image", False):
        return processor
    return type(processor).from_dict(processor.to_dict() | {"size": {"height": side, "width": side}})
