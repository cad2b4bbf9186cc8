"""The training loop of every stage: any model whose output has a `loss`, under Accelerate."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn, optim
from torch.utils.data import DataLoader

from ..progress import Progress
from ..settings import RecipeError, TrainSettings
from . import checkpoints

DIVERGED_ADVICE = "a smaller learning rate, clip_gradient=1 or mixed_precision=no may help"


class TrainingError(RuntimeError):
    """Training can't go on; the message says at which step and why."""


def build_accelerator(settings: TrainSettings, seed: int) -> Accelerator:
    """The Accelerator of a `train` section; the order of the examples depends on `seed` and the epoch alone."""
    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
    return Accelerator(mixed_precision=settings.mixed_precision, dataloader_config=loading)


def fit(
    model: Any,
    examples: Any,
    settings: TrainSettings,
    accelerator: Accelerator,
    folder: Path,
    seed: int = 0,
    title: str = "training",
) -> list[dict]:
    """Train `model` in place; go on from the last finished epoch where `folder` holds one.

    Args:
        model: `model(**example_batch)` gives an output with `loss` and, if it has several, a dict `losses`.
        examples: items are the model's keyword arguments; `set_epoch` is called where it exists.
        settings: a recipe's `train` section.
        folder: keeps `checkpoints/`; a killed run that is started again gives what the unbroken run gives.

    Returns:
        One record per epoch: mean losses, learning rate, images per second.

    Raises:
        RecipeError: the batch can't be split evenly over the processes.
        TrainingError: the loss is not finite.
    """
    processes = accelerator.num_processes
    if settings.batch_size % processes:
        raise RecipeError(f"batch_size: expected a multiple of the {processes} processes, got {settings.batch_size}")
    per_process = settings.batch_size // processes
    loader = DataLoader(
        examples,
        batch_size=min(per_process, max(1, len(examples) // processes)),
        shuffle=True,
        drop_last=True,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
    )
    run = _identity(model, len(examples), settings, seed)
    # Identical on all processes, whatever was drawn before.
    set_seed(seed)
    _freeze(model, settings)
    optimizer = build_optimizer(model, settings)
    inner = model
    # With their channels last, the convolutions of MobileNetV2 run a quarter faster on a CPU.
    model = model.to(memory_format=torch.channels_last)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps_per_epoch = len(loader)
    total_steps = settings.steps or settings.epochs * steps_per_epoch
    epochs = math.ceil(total_steps / steps_per_epoch)
    scheduler = build_scheduler(optimizer.optimizer, settings, total_steps)

    history: list[dict] = []
    saved = checkpoints.resume(accelerator, folder / "checkpoints", run)
    if saved is not None:
        history = saved["history"]
        scheduler.load_state_dict(saved["schedule"])
    with Progress(title, total_steps) as progress:
        progress.advance(len(history) * steps_per_epoch)
        for epoch in range(len(history), epochs):
            # Dropout and the like differ between epochs, and are the same after a resume.
            set_seed(seed + 1000 * (epoch + 1) + accelerator.process_index)
            loader.set_epoch(epoch)
            if hasattr(examples, "set_epoch"):
                examples.set_epoch(epoch)
            model.train()
            _freeze(inner, settings)  # whose parameters have their own names, also in distributed training
            sums: dict[str, torch.Tensor] = {}
            started = time.perf_counter()
            # The last epoch may be a part of one, where the recipe counts steps.
            steps = min(steps_per_epoch, total_steps - epoch * steps_per_epoch)
            for step, batch in enumerate(itertools.islice(loader, steps)):
                if hasattr(inner, "progress"):
                    inner.progress = (epoch * steps_per_epoch + step) / total_steps
                output = model(**batch)
                accelerator.backward(output.loss)
                if settings.clip_gradient:
                    accelerator.clip_grad_norm_(model.parameters(), settings.clip_gradient)
                optimizer.step()
                if not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                optimizer.zero_grad()
                losses = getattr(output, "losses", None) or {"loss": output.loss}
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0) + loss.detach().float()
                if step % 10 == 0 or step + 1 == steps:
                    means = {name: (total / (step + 1)).item() for name, total in sums.items()}
                    _check_finite(means, epoch, step)
                    progress.show(means)
                progress.advance(1)
            seconds = time.perf_counter() - started
            images = steps * loader.total_batch_size
            means = accelerator.reduce({name: total / steps for name, total in sums.items()}, "mean")
            record = {"epoch": epoch + 1, **{name: value.item() for name, value in means.items()}}
            record |= {"lr": scheduler.get_last_lr()[0], "images_per_second": round(images / seconds, 2)}
            history.append(record)
            progress.log(record)
            if epoch + 1 < epochs:
                state = {"history": history, "schedule": scheduler.state_dict()}
                checkpoints.save(accelerator, folder / "checkpoints", (epoch + 1) * steps_per_epoch, state, run=run)
    return history


def _identity(model: nn.Module, count: int, settings: TrainSettings, seed: int) -> str:
    """What tells a training from others, whose checkpoints somebody may have put into its folder."""
    slow = [field.name for field in dataclasses.fields(settings) if not field.metadata.get("speed")]
    parts = [count, seed, {name: getattr(settings, name) for name in slow}]
    parts += [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _check_finite(means: dict[str, float], epoch: int, step: int) -> None:
    for name, value in means.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss {name!r} became {value} in epoch {epoch + 1}, step {step + 1}; {DIVERGED_ADVICE}"
            )


# Optimiser and learning-rate schedule


def is_new(model: nn.Module, name: str) -> bool:
    """Whether the parameter starts from random values: it is in `model.new_parameters` or, where there is no such set,
    outside the backbone.
    """
    new_parameters = getattr(model, "new_parameters", None)
    return not name.startswith("backbone.") if new_parameters is None else name in new_parameters


def parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict]:
    """Groups by where a parameter comes from and what it is: pretrained or new, weight or bias.

    Pretrained layers learn `backbone_lr_factor` times as fast as `lr`, new ones `head_lr_factor` times, biases
    `bias_lr_factor` times their layer; biases and norms do not decay.
    """
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = settings.head_lr_factor if is_new(model, name) else settings.backbone_lr_factor
        if name.endswith(".bias"):
            factor *= settings.bias_lr_factor
        groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
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
        return optim.AdamW(groups)
    nesterov = settings.nesterov and settings.momentum > 0
    return optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)


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


def _freeze(model: nn.Module, settings: TrainSettings) -> None:
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
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        if own and not any(is_new(model, parameter) for parameter in own):
            module.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("backbone_lr_factor: expected more than 0 for a model without new layers, got 0")


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
