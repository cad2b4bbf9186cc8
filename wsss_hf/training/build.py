"""What a training starts from: a model on its backbone with its image processor, optimiser, schedule, frozen parts."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn, optim
from transformers import PreTrainedModel

from ..models.image_processing_wsss import WsssImageProcessor
from ..models.pictures import LONGEST
from ..models.pretrained import backbone_normalization, resolve_backbone_config
from ..settings import AffinitySettings, CamSettings, ImageSettings, RecipeError, SegmenterSettings, TrainSettings


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


# Optimiser, schedule and what stays as it is


def is_new(model: nn.Module, name: str) -> bool:
    """Whether the parameter starts from random values: it is in `model.new_parameters` or, where there is no such set,
    outside the backbone.
    """
    new_parameters = getattr(model, "new_parameters", None)
    return not name.startswith("backbone.") if new_parameters is None else name in new_parameters


def parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict]:
    """Groups by where a parameter comes from and what it is: pretrained or new, weight or bias.

    Pretrained layers learn `backbone_lr_factor` times as fast as `lr`, new ones `head_lr_factor` times, biases
    `bias_lr_factor` times their layer; biases and norms do not decay unless `decay_biases`.
    """
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = settings.head_lr_factor if is_new(model, name) else settings.backbone_lr_factor
        if name.endswith(".bias"):
            factor *= settings.bias_lr_factor
        groups.setdefault((factor, parameter.ndim > 1 or settings.decay_biases), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.lr * factor,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (factor, decays), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, settings: TrainSettings) -> optim.Optimizer:
    """The optimiser of a `train` section."""
    groups = parameter_groups(model, settings)
    if settings.optimizer == "adamw":
        return optim.AdamW(groups, fused=settings.fused or None)
    nesterov = settings.nesterov and settings.momentum > 0
    return optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=settings.fused or None
    )


def build_scheduler(
    optimizer: optim.Optimizer, settings: TrainSettings, total_steps: int
) -> optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule of a `train` section over `total_steps` optimiser steps."""

    def factor(done: float) -> float:
        if settings.schedule == "poly":
            return (1 - done) ** settings.power
        return 0.1 ** sum(done >= milestone for milestone in settings.milestones)

    def rate(step: int) -> float:
        done = min(step / total_steps, 1.0)
        warm = min(1.0, (step + 1) / (settings.warmup * total_steps)) if settings.warmup else 1.0
        return warm * factor(done)

    return optim.lr_scheduler.LambdaLR(optimizer, rate)


def freeze(model: nn.Module, settings: TrainSettings) -> None:
    """What a `train` section keeps as it is."""
    if settings.freeze_batch_norm:
        freeze_batch_norm(model)
    if settings.backbone_lr_factor == 0:
        freeze_pretrained(model)


def freeze_pretrained(model: nn.Module) -> None:
    """Keep all pretrained parameters and statistics; call again after each `model.train()`.

    Modules without a new parameter do not drop anything either, and keep nothing for a backward pass.

    Raises:
        RecipeError: there are no others.
    """
    for name, parameter in model.named_parameters():
        if not is_new(model, name):
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        own = [parameter for parameter, _ in module.named_parameters(prefix=name)]
        if own and not any(is_new(model, parameter) for parameter in own):
            module.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("backbone_lr_factor: expected more than 0 for a model without new layers, got 0")


def freeze_batch_norm(model: nn.Module) -> None:
    """Keep statistics and affine parameters of every pretrained batch norm; call again after each `model.train()`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and not is_new(model, f"{name}.weight"):
            module.eval()
            module.requires_grad_(False)


def enable_checkpointing(model) -> None:
    """Compute activations anew in the backward pass instead of keeping them.

    Before 5.21, the first version without Python 3.10, transformers called that gradient checkpointing.
    """
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
