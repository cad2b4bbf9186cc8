"""The training loop of every stage: any model whose output has a `loss`, under Accelerate."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType, find_batch_size, send_to_device, set_seed
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from ..data.examples import StreamedExamples
from ..progress import Progress, say
from ..settings import RecipeError, TrainSettings
from . import checkpoints
from .build import build_optimizer, build_scheduler, freeze
from .endings import DIVERGED_ADVICE, Preemption, TrainingError, ending_together, is_of_the_group
from .launcher import is_sharded
from .tracking import TrainingLog

_NO_WEIGHT = 1e-12  # images: nothing is labelled, and neither loss nor gradient is other than 0
_LOOK_AT_LOSSES = 10  # steps: every look lets a GPU run empty


class MicroBatches(BatchSampler):
    """Batches of `batch_size` indices, each cut into `parts` whose sizes differ by one at most.

    Accelerate deals them out: of P processes the p-th gets parts p, p + P, p + 2P … of a batch.
    """

    def __init__(self, sampler: RandomSampler, batch_size: int, parts: int):
        self.sampler: Any = sampler
        self.images, self.parts = batch_size, parts
        self.drop_last = True

    def __len__(self) -> int:
        return self.sampler.num_samples // self.images * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for batch in BatchSampler(self.sampler, self.images, drop_last=True):
            yield from (part.tolist() for part in np.array_split(batch, self.parts))


class Training:
    """One training; it goes on from the newest checkpoint where `folder` holds one.

    Random numbers depend on the seed, the step and the micro-batch alone, and the data on the seed and the epoch: a
    training that was broken off anywhere ends with what the unbroken one gives, as does one with N processes and one
    with N micro-batches, but for rounding. What compares images, or takes their statistics, does so within one
    micro-batch. DeepSpeed keeps its gradients to itself: with it, `weight` counts where a step is one micro-batch in
    each process.

    Args:
        model: `model(**example_batch)` gives an output with `loss` and, if it has several, a dict `losses`; where
            they are means over a part of the pixels, also `weight`, the size of that part in [0, 1]. Micro-batches and
            processes then count by it. It is trained in place.
        examples: items are the model's keyword arguments; `set_epoch` is called where it exists. [`StreamedExamples`]
            are one epoch of `settings.steps`. On another number of processes they go on at the same step, but are
            dealt otherwise: some rows of that pass are seen twice or not at all.
        settings: a recipe's `train` section.
        accelerator: of `build_accelerator`.
        folder: keeps `checkpoints/` and `log.jsonl`.
        pictures: makes named pictures, arrays (N, H, W, 3) uint8, of the model for the tracker.

    Raises:
        RecipeError: there are fewer images in a batch, or in all, than processes and micro-batches, or a setting does
            not go together with these processes.
    """

    def __init__(
        self,
        model: Any,
        examples: Any,
        settings: TrainSettings,
        accelerator: Accelerator,
        folder: Path,
        seed: int = 0,
        title: str = "training",
        pictures: Callable[[nn.Module], dict[str, np.ndarray]] | None = None,
    ):
        self.examples, self.settings, self.accelerator = examples, settings, accelerator
        self.folder, self.seed, self.title, self.pictures = folder, seed, title, pictures
        self.is_streamed = isinstance(examples, StreamedExamples)
        count = _images_of_stream(settings, accelerator) if self.is_streamed else len(examples)
        self.batch_size, self.parts = _shares(settings, accelerator, count)
        self.steps_per_epoch = count // self.batch_size
        self.total_steps = settings.steps or settings.epochs * self.steps_per_epoch
        frozen = settings.backbone_lr_factor == 0 and not self.is_streamed
        self.views: int = int(frozen) if settings.views is None else settings.views
        if hasattr(examples, "views"):
            examples.views = self.views
        self.step = 0  # optimiser steps that are done
        self.history: list[dict] = []
        self._saved_step, self._saved_at = 0, time.monotonic()  # the newest checkpoint
        self.sums: dict[str, torch.Tensor] = {}  # of the losses of the running epoch, over its images
        self._step_sums: dict[str, torch.Tensor] = {}  # of the running step, over images × weights
        self._is_weighed = False
        self._identity = _identity(model, count, settings, seed)

        set_seed(seed)  # identical on all processes, whatever was drawn before
        freeze(model, settings)
        if settings.sync_batch_norm:
            model = _with_synced_norms(model, accelerator)
        if settings.channels_last and not is_sharded(accelerator):  # which wants contiguous weights
            # The convolutions of MobileNetV2 then run a quarter faster on a CPU.
            model = model.to(memory_format=torch.channels_last)
        self.inner = model
        loader: Any
        if self.is_streamed:
            examples.process, examples.processes = accelerator.process_index, accelerator.num_processes
            loader = DataLoader(examples, self.batch_size // self.parts, num_workers=min(settings.workers, 1))
        else:
            self.order = SeedableRandomSampler(examples, data_seed=seed)
            loader = DataLoader(
                examples,
                batch_sampler=MicroBatches(self.order, self.batch_size, self.parts),
                num_workers=settings.workers,
                persistent_workers=settings.workers > 0,
                pin_memory=accelerator.device.type == "cuda",
            )
        _tell_deepspeed(accelerator, self.batch_size // self.parts, settings)
        optimizer = build_optimizer(model, settings)
        scheduler = build_scheduler(optimizer, settings, self.total_steps)
        average = _average(model, settings, accelerator)
        if self.is_streamed:  # which deals its rows out itself
            self.model, self.optimizer, self.scheduler = accelerator.prepare(model, optimizer, scheduler)
            self.loader = loader
        else:
            self.model, self.optimizer, self.loader, self.scheduler = accelerator.prepare(
                model, optimizer, loader, scheduler
            )
        self.average: Any = average and accelerator.prepare_model(average, evaluation_mode=True)
        checkpoints.save_without_wrappers(accelerator)

    def run(self) -> list[dict]:
        """Train to the end.

        Returns:
            One record per epoch: mean losses, learning rate, images per second.

        Raises:
            TrainingError: the loss is not finite, a batch does not fit into memory, or a checkpoint can't be written.
            Preempted: a batch system asked for the end; a checkpoint was written.
        """
        with ending_together(self.accelerator, self.folder), self._features_kept():
            self._resume()
            log = TrainingLog(self.accelerator, self.folder, self.title, self.settings, self.step)
            with Preemption() as preemption, Progress(self.title, self.total_steps) as progress, log:
                progress.advance(self.step)
                try:
                    while self.step < self.total_steps:
                        self._run_epoch(progress, log, preemption)
                except Exception:
                    if not self._saved_step:
                        log.discard()
                    raise
        if self.average is not None:
            with torch.no_grad():
                for weight, mean in zip(self.inner.parameters(), self.average.module.parameters(), strict=True):
                    weight.copy_(mean)
        return self.history

    def _features_kept(self) -> AbstractContextManager:
        """What a frozen backbone makes of views that come again is computed once."""
        epochs = -(-self.total_steps // self.steps_per_epoch)
        if not 0 < self.views < epochs or is_sharded(self.accelerator) or self.settings.compile:
            return nullcontext()
        from .kept_features import kept_features  # for these trainings alone

        return kept_features(self.inner, self.folder / "features")

    def _run_epoch(self, progress: Progress, log: TrainingLog, preemption: Preemption) -> None:
        epoch, first = divmod(self.step, self.steps_per_epoch)
        # The last epoch may be a part of one, where the recipe counts steps.
        steps = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        begin, started = self.step, time.perf_counter()
        self._train_mode()
        for number, batch in enumerate(self._batches(epoch, first, steps), first * self._micro_batches):
            try:
                with self.accelerator.accumulate(self.model):
                    self._add_gradients(batch, epoch, number)
                    if self.accelerator.sync_gradients:
                        self._update_weights()
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                raise TrainingError(self._too_large(find_batch_size(batch), epoch)) from error
            if not self.accelerator.sync_gradients:
                continue
            done = self.step - epoch * self.steps_per_epoch
            if (done - 1) % _LOOK_AT_LOSSES == 0 or done == steps:
                means = self._means()
                _check_finite(means, epoch, done - 1)
                progress.show(means)
                rate = (self.step - begin) * self.batch_size / (time.perf_counter() - started)
                log.write(self.step, means | {"lr": self.scheduler.get_last_lr()[0], "images_per_second": rate})
            if self.pictures is not None and log.wants_pictures(self.step):
                self._show_pictures(log, self.pictures)
            progress.advance(1)
            if done < steps:
                self._save_if_due(preemption)
        record = self._record(epoch, (self.step - begin) * self.batch_size / (time.perf_counter() - started))
        self.history.append(record)
        self.sums = {}
        progress.log(record)
        if self.step < self.total_steps:
            self._save()
            if any(self._agreed(preemption.signal is not None)):
                preemption.stop(self.title, self.step)

    def _show_pictures(self, log: TrainingLog, pictures: Callable[[nn.Module], dict[str, np.ndarray]]) -> None:
        """The main process makes them alone, but where each has a part of the weights."""
        sharded = is_sharded(self.accelerator)
        if sharded or self.accelerator.is_main_process:
            made = pictures(self.model if sharded else self.inner)
            if self.accelerator.is_main_process:
                log.show_pictures(self.step, made)
            self._train_mode()

    @property
    def _micro_batches(self) -> int:
        """Of a step, in each process."""
        return self.parts // self.accelerator.num_processes

    def _train_mode(self) -> None:
        self.model.train()
        freeze(self.inner, self.settings)  # whose parameters have their own names, also in distributed training

    def _batches(self, epoch: int, first: int, steps: int) -> Iterator[dict]:
        """The micro-batches of an epoch's steps from `first` to `steps`."""
        if self.is_streamed:
            self.examples.start = first * self.batch_size // self.accelerator.num_processes
            batches = itertools.islice(self.loader, (steps - first) * self._micro_batches)
            return (send_to_device(batch, self.accelerator.device) for batch in batches)
        self.order.set_epoch(epoch)
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)
        loader = skip_first_batches(self.loader, first * self._micro_batches) if first else self.loader
        loader.set_epoch(epoch)  # else it starts with epoch 0
        return itertools.islice(loader, (steps - first) * self._micro_batches)

    def _add_gradients(self, batch: dict, epoch: int, number: int) -> None:
        """Forward and backward pass of one micro-batch, the `number`-th of the epoch in this process."""
        images = find_batch_size(batch)
        place = number * self.accelerator.num_processes + self.accelerator.process_index
        set_seed(int(np.random.SeedSequence((self.seed, epoch, place)).generate_state(1)[0]))
        if hasattr(self.inner, "progress"):
            self.inner.progress = self.step / self.total_steps
        # DeepSpeed holds the weights in the precision of the training, and casts no images.
        precision = next(self.inner.parameters()).dtype
        output = self.model(**{key: x.to(precision) if x.is_floating_point() else x for key, x in batch.items()})
        weight = getattr(output, "weight", None) if self._weighs else None
        counted = images if weight is None else images * weight
        # Gradients are averaged over the parts; those with an image less count less.
        share = counted * self.parts / self.batch_size
        if weight is not None and self._hides_gradients:
            share = share * self._weight_factor(counted)
        self.accelerator.backward(output.loss * share)
        losses = getattr(output, "losses", None) or {"loss": output.loss}
        values = {name: loss.detach().float() for name, loss in losses.items()}
        for name, value in (values | {"images": torch.ones_like(output.loss.detach().float())}).items():
            self._step_sums[name] = self._step_sums.get(name, 0) + value * counted
        self._is_weighed = weight is not None

    @property
    def _weighs(self) -> bool:
        """Whether there are several means in a step, and their gradients can be weighed."""
        return self.parts > 1 and not (self._hides_gradients and self._micro_batches > 1)

    @property
    def _hides_gradients(self) -> bool:
        """Whether a step's mean weight must be known before the backward pass, in which DeepSpeed updates weights."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _weight_factor(self, counted: torch.Tensor) -> torch.Tensor:
        """What a step is multiplied by for its mean weight, given images × weights of each process."""
        return self.batch_size / self.accelerator.reduce(counted, "sum").clamp_min(_NO_WEIGHT)

    def _end_step(self) -> None:
        """Divides losses and gradients of a step by its mean weight, unless that is done; losses join the epoch's."""
        sums, self._step_sums = self._step_sums, {}
        if self._is_weighed:
            factor = self._weight_factor(sums["images"])
            if not self._hides_gradients:
                gradients = (parameter.grad for parameter in self.model.parameters())
                torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], factor)
            sums = {name: value * factor for name, value in sums.items()}
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def _update_weights(self) -> None:
        self._end_step()
        if self.settings.clip_gradient:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_gradient)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.inner)
        self.step += 1

    def _too_large(self, images: int, epoch: int) -> str:
        step = self.step - epoch * self.steps_per_epoch + 1
        finer = self.settings.accumulate * 2
        fewer = f"accumulate={finer} makes it fit in smaller parts, " if images > 1 else ""
        return (
            f"{images} images at a time do not fit into the memory of {self.accelerator.device} in epoch {epoch + 1}, "
            f"step {step}; {fewer}gradient_checkpointing=true, mixed_precision=bf16, a smaller image.size save memory"
        )

    def _means(self) -> dict[str, float]:
        """Mean losses of the epoch so far, in this process."""
        names = [name for name in self.sums if name != "images"]
        images = self.sums["images"].clamp_min(_NO_WEIGHT)
        values = torch.stack([self.sums[name] / images for name in names])
        return dict(zip(names, values.tolist(), strict=True))

    def _totals(self) -> dict[str, float]:
        """The sums of all processes."""
        return {name: value.item() for name, value in self.accelerator.reduce(self.sums, "sum").items()}

    def _record(self, epoch: int, rate: float) -> dict[str, Any]:
        totals = self._totals()
        images = max(totals.pop("images"), _NO_WEIGHT)
        record: dict[str, Any] = {"epoch": epoch + 1} | {name: total / images for name, total in totals.items()}
        return record | {"lr": self.scheduler.get_last_lr()[0], "images_per_second": round(rate, 2)}

    # Checkpoints

    def _save_if_due(self, preemption: Preemption) -> None:
        settings = self.settings
        if settings.save_steps and self.step % settings.save_steps == 0:
            self._save()
        # Processes must agree on what clocks and signals say; asking lets a GPU run empty.
        if self.accelerator.use_distributed and self.step % _LOOK_AT_LOSSES and self.accelerator.device.type != "cpu":
            return
        late = bool(settings.save_minutes) and time.monotonic() - self._saved_at > 60 * settings.save_minutes
        late, stop = self._agreed(late and self.accelerator.is_main_process, preemption.signal is not None)
        if late or stop:
            self._save()
        if stop:
            preemption.stop(self.title, self.step)

    def _agreed(self, *flags: bool) -> list[bool]:
        """Whether any process says so."""
        if not self.accelerator.use_distributed:
            return list(flags)
        said = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(said, "sum").tolist()]

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        state = {
            "step": self.step,
            "history": self.history,
            "sums": self._totals() if self.sums else {},
            "processes": self.accelerator.num_processes,
        }
        try:
            folder, keep = self.folder / "checkpoints", self.settings.keep
            checkpoints.save(self.accelerator, folder, self.step, state, keep, self._identity)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has many names
            if is_of_the_group(error):
                raise
            held = f"the one of step {self._saved_step} is whole" if self._saved_step else "there is none before it"
            reason = " ".join(str(error).split())
            raise TrainingError(
                f"the checkpoint of step {self.step} could not be written ({reason}); {held}"
            ) from error
        self._saved_step, self._saved_at = self.step, time.monotonic()

    def _resume(self) -> None:
        saved = checkpoints.resume(self.accelerator, self.folder / "checkpoints", self._identity)
        if saved is None:
            return
        self.history = saved["history"]
        self.step = self._saved_step = saved["step"]
        before, processes = saved.get("processes"), self.accelerator.num_processes
        if self.is_streamed and before not in (None, processes):
            say(
                f"{self.title}: goes on after step {self.step} on {processes} instead of {before} processes, to which "
                "the stream's rows are dealt otherwise: until it begins again, some are seen twice or not at all"
            )
        if saved["sums"]:  # of all processes
            share = float(self.accelerator.is_main_process)
            device = self.accelerator.device
            self.sums = {name: torch.tensor(share * value, device=device) for name, value in saved["sums"].items()}


def _identity(model: nn.Module, count: int, settings: TrainSettings, seed: int) -> str:
    """What tells a training from others, whose checkpoints somebody may have put into its folder.

    Not how many parts a batch is cut into: it may go on with other processes and micro-batches.
    """
    fields = (field for field in dataclasses.fields(settings) if not field.metadata.get("speed"))
    slow = [field.name for field in fields if field.name != "accumulate"]
    parts = [count, seed, {name: getattr(settings, name) for name in slow}]
    parts += [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _shares(settings: TrainSettings, accelerator: Accelerator, num_examples: int) -> tuple[int, int]:
    """Images of a step, and the number of parts that the processes cut them into."""
    processes = accelerator.num_processes
    if num_examples < processes:
        raise RecipeError(f"training images: expected at least {processes}, one for each process, got {num_examples}")
    parts = processes * settings.accumulate
    if settings.batch_size < parts:
        raise RecipeError(
            f"batch_size: expected at least {parts}, an image for each of {processes} processes x "
            f"{settings.accumulate} micro-batches, got {settings.batch_size}"
        )
    batch_size = min(settings.batch_size, num_examples)
    accelerator.gradient_accumulation_steps = min(settings.accumulate, batch_size // processes)
    return batch_size, processes * accelerator.gradient_accumulation_steps


def _images_of_stream(settings: TrainSettings, accelerator: Accelerator) -> int:
    """That its only epoch has."""
    if not settings.steps:
        raise RecipeError("train.steps: expected a number of steps for data that are streamed, got 0")
    if settings.views:
        raise RecipeError(f"train.views: expected 0 or null for data that are streamed, got {settings.views}")
    parts = accelerator.num_processes * settings.accumulate
    if settings.batch_size % parts:
        raise RecipeError(
            f"batch_size: expected a multiple of {parts} for data that are streamed, {accelerator.num_processes} "
            f"processes x {settings.accumulate} micro-batches, got {settings.batch_size}"
        )
    return settings.steps * settings.batch_size


def _with_synced_norms(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    if not accelerator.use_distributed:
        return model
    if accelerator.device.type != "cuda":
        raise RecipeError(f"sync_batch_norm: expected processes on GPUs, got {accelerator.device.type}")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _average(model: nn.Module, settings: TrainSettings, accelerator: Accelerator) -> AveragedModel | None:
    """The moving average of the weights; the statistics of its norms are the model's."""
    if not settings.ema:
        return None
    if is_sharded(accelerator):
        raise RecipeError(f"ema: expected 0 where each process holds a part of the weights, got {settings.ema}")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))


def _tell_deepspeed(accelerator: Accelerator, micro_batch: int, settings: TrainSettings) -> None:
    """DeepSpeed takes from its own configuration what others are told by calls."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "gradient_clipping": settings.clip_gradient,
        }


def _check_finite(means: dict[str, float], epoch: int, step: int) -> None:
    for name, value in means.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss {name!r} became {value} in epoch {epoch + 1}, step {step + 1}; {DIVERGED_ADVICE}"
            )
