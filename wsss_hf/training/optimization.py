"""Optimiser and learning-rate schedule of a recipe."""

from __future__ import annotations

from torch import nn, optim

from .recipes import RecipeError


def parameter_groups(model: nn.Module, settings: dict) -> list[dict]:
    """Groups by where a parameter lives and what it is: backbone or new, weight or bias.

    New layers learn `head_lr_factor` times as fast, biases `bias_lr_factor` times; biases and norms do not decay.
    """
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0 if name.startswith("backbone.") else settings["head_lr_factor"]
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
        return optim.SGD(groups, lr=settings["lr"], momentum=settings["momentum"], nesterov=settings["momentum"] > 0)
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
    """Keep statistics and affine parameters of every batch norm as they are; call again after each `model.train()`."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
