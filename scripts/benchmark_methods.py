"""What each method costs: time and memory of a training step, relative to plain CAM on the same backbone and batch.

All variants take turns step by step in one run, so that whatever else the machine does falls on all of them; a ratio
is the median over the turns. On a GPU seconds are those of the clock; on a CPU processor seconds, which other programs
hardly lengthen. Memory is the largest sum of tensors that one step adds to model and optimiser. Images are noise.

    python scripts/benchmark_methods.py --backbone google/mobilenet_v2_1.0_224 --set cam.train.batch_size=8

The table of model_cards/results.md:

    python scripts/benchmark_methods.py --recipe scripts/plans/rows/small_methods.yaml \\
        --backbone google/mobilenet_v2_1.0_224 --out runs/costs.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import logging as transformers_logging

from wsss_hf import CamClassifier
from wsss_hf.cli.launch import keep_freed_memory
from wsss_hf.models.methods import METHODS
from wsss_hf.recipes import Recipe
from wsss_hf.training.build import build_on_backbone
from wsss_hf.training.loop import build_optimizer, freeze_batch_norm

LIMITS = {"drs": 1.15, "icd": 1.6, "d2cam": 1.3, "plda": 2.2, "seam": 1.5}


class Variant:
    """A classifier with some methods, and its optimiser, halfway through a training."""

    def __init__(self, recipe: Recipe, methods: dict, num_classes: int, device: torch.device):
        torch.manual_seed(0)
        self.model: Any
        self.model, _, _ = build_on_backbone(
            CamClassifier,
            recipe.cam,
            recipe.image,
            "cam",
            output_stride=recipe.cam.output_stride,
            id2label={c: f"class {c}" for c in range(num_classes)},
            **methods,
        )
        self.model.to(device, memory_format=torch.channels_last)  # as the training loop does
        self.settings = recipe.cam.train
        self.model.train()
        if self.settings.freeze_batch_norm:
            freeze_batch_norm(self.model)
        self.model.progress = 0.5
        self.optimizer = build_optimizer(self.model, self.settings)
        self.device = device
        self.seconds: list[float] = []

    def step(self, batch: dict) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.mixed_precision == "bf16"):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed_step(self, batch: dict) -> None:
        started = self._now()
        self.step(batch)
        self.seconds.append(self._now() - started)

    def _now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time() / torch.get_num_threads()
        torch.cuda.synchronize()
        return time.perf_counter()

    def peak_memory(self, batch: dict) -> int:
        """Bytes of the tensors that one step needs beside those that are there before it."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(batch)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.step(batch)  # the profiler misses the beginning of what it records
            with record_function("measured"):
                self.step(batch)
        events = recorded.profiler.kineto_results.events()
        begin = next(event.start_ns() for event in events if event.name() == "measured")
        memory = [event for event in events if event.name() == "[memory]" and event.start_ns() >= begin]
        held = (event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns()))
        return max(accumulate(held))


def random_batch(recipe: Recipe, num_classes: int, device: torch.device) -> dict:
    """Noise with one or two tags per image."""
    size, count = recipe.image.size, recipe.cam.train.batch_size
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(count, 3, size, size, generator=generator)
    tags = torch.zeros(count, num_classes).scatter_(1, torch.randint(num_classes, (count, 2), generator=generator), 1)
    return {"pixel_values": pixel_values.to(device), "tags": tags.to(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="default", help="its image size, backbone and cam.train are used")
    parser.add_argument("--backbone", help="directory or Hub id; the recipe's without it")
    parser.add_argument("--set", action="append", default=[], help="change a setting, such as cam.train.batch_size=8")
    parser.add_argument("--only", nargs="+", choices=[*METHODS], default=[*METHODS], help="methods to measure")
    parser.add_argument("--turns", type=int, default=14)
    # On a CPU the memory that is kept still grows in the first steps, most for what needs most; trainings are longer.
    parser.add_argument("--warmup", type=int, default=20, help="turns before those that count")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe = Recipe.load(arguments.recipe, arguments.set, backbone=arguments.backbone)
    device = torch.device(arguments.device)
    batch = random_batch(recipe, arguments.classes, device)

    options = {name: recipe.cam.methods.get(name) or {} for name in arguments.only}
    chosen: dict[str, dict] = {"plain CAM": {}} | {name: {name: values} for name, values in options.items()}
    if len(options) > 1:
        chosen["all together"] = options
    variants = {name: Variant(recipe, methods, arguments.classes, device) for name, methods in chosen.items()}
    for _ in range(arguments.warmup):
        for variant in variants.values():
            variant.step(batch)
    memory = {name: variant.peak_memory(batch) for name, variant in variants.items()}
    for _ in range(arguments.turns):
        for variant in variants.values():
            variant.timed_step(batch)

    plain = variants["plain CAM"].seconds
    rows: list[dict[str, Any]] = []
    for name, variant in variants.items():
        ratios = [seconds / reference for seconds, reference in zip(variant.seconds, plain, strict=True)]
        rows.append(
            {
                "methods": name,
                "seconds": statistics.median(variant.seconds),
                "time": statistics.median(ratios),
                "limit": LIMITS.get(name),
                "MiB": memory[name] / 2**20,
                "memory": memory[name] / memory["plain CAM"],
            }
        )
    alone = [row["time"] for row in rows if row["methods"] in options]
    for row in rows:
        if row["methods"] == "all together":
            row["limit"] = 1 + sum(time - 1 for time in alone)  # plain CAM and what each adds
    precision = "bfloat16" if recipe.cam.train.mixed_precision == "bf16" else "float32"
    size, stride = recipe.image.size, recipe.cam.output_stride
    title = f"{size} pixels, batch {len(batch['tags'])}, stride {stride}, {precision}, {device.type}"
    print(f"{title}; time and memory relative to plain CAM")
    for row in rows:
        limit = "" if row["limit"] is None else f"(limit {row['limit']:.2f})"
        print(
            f"{row['methods']:13s} {1000 * row['seconds']:6.0f} ms {row['time']:6.2f} {limit:13s} "
            f"{row['MiB']:6.0f} MiB {row['memory']:6.2f}"
        )
    if len(options) > 1:
        print(f"one after the other the methods take {sum(alone):.2f}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
