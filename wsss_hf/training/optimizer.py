"""Optimiser and learning-rate schedule of a recipe."""

from __future__ import annotations

from torch import nn, optim

from ..recipes import RecipeError


def is_new(model: nn.Module, name: str) -> bool:
    """Whether the parameter starts from random values: `model.new_parameters` has it or, where there is no such set,
    it is none of the backbone's.
    """
    new_parameters = getattr(model, "new_parameters", None)
    return not name.startswith("backbone.") if new_parameters is None else name in new_parameters


def parameter_groups(model: nn.Module, settings: dict) -> list[dict]:
    """Groups by where a parameter comes from and what it is: pretrained or new, weight or bias.

    New layers learn `head_lr_factor` times as fast, biases `bias_lr_factor` times; biases and norms do not decay.
    """
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = settings["head_lr_factor"] if is_new(model, name) else 1.0
        if name.endswith(".bias"):
            factor *= settings["bias_lr_factor"]
        groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings["lr"] * factor,
            "weight_decay": settings["weight_decay"] if decays else 0.0,
        }
        for (factor, decays), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, settings: dict) -> optim.Optimizer:
    """The optimiser of a `train` section.

    Raises:
        RecipeError: the optimiser is unknown.
    """
    groups = parameter_groups(model, settings)
    if settings["optimizer"] == "adamw":
        return optim.AdamW(groups)
    if settings["optimizer"] == "sgd":
        nesterov = settings["nesterov"] and settings["momentum"] > 0
        return optim.SGD(groups, lr=settings["lr"], momentum=settings["momentum"], nesterov=nesterov)
    raise RecipeError(f"optimizer: {settings['optimizer']!r}; adamw or sgd would be right")


def build_scheduler(optimizer: optim.Optimizer, settings: dict, total_steps: int) -> optim.lr_scheduler.LambdaLR:
    """The schedule of a `train` section over `total_steps` optimiser steps.

    Raises:
        RecipeError: the schedule is unknown.
    """
    if settings["schedule"] == "poly":

        def factor(done: float) -> float:
            return (1 - done) ** settings["power"]

    elif settings["schedule"] == "step":

        def factor(done: float) -> float:
            return 0.1 ** sum(done >= milestone for milestone in settings["milestones"])

    else:
        raise RecipeError(f"schedule: {settings['schedule']!r}; poly or step would be right")

    def rate(step: int) -> float:
        done = min(step / total_steps, 1.0)
        warm = min(1.0, (step + 1) / (settings["warmup"] * total_steps)) if settings["warmup"] else 1.0
        return warm * factor(done)

    return optim.lr_scheduler.LambdaLR(optimizer, rate)


def freeze_batch_norm(model: nn.Module) -> None:
    """Keep statistics and affine parameters of every pretrained batch norm; call again after each `model.train()`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not is_new(model, f"{name}.weight"):
            module.eval()
            module.requires_grad_(False)


def enable_checkpointing(model) -> None:
    """Compute activations anew in the backward pass instead of keeping them.

    Before 5.21, the first version without Python 3.10, transformers called that gradient checkpointing.
    """
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
