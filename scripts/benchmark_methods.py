"""What each method costs: time and memory of a training step, relative to plain CAM on the same backbone and batch.

All variants take turns step by step in one run, so that whatever else the machine does falls on all of them; a ratio
is the median over the turns. On a GPU seconds are those of the clock; on a CPU processor seconds, which other programs
hardly lengthen. Memory is the largest sum of tensors that one step adds to model and optimiser. Images are noise.

What stands beside the methods is measured in the same way, each relative to the first of its group:

- methods: training steps; also that of the affinity network, whose backbone is frozen;
- labelling: a batch from images to pseudo masks, plain and with the random walk, and its spectral saliency;
- vit: training step and labelling on a vision transformer, with attention affinity and without.

    python scripts/benchmark_methods.py --backbone google/mobilenet_v2_1.0_224 --set cam.train.batch_size=8

The table of model_cards/results.md:

    python scripts/benchmark_methods.py --recipe scripts/plans/rows/small_methods.yaml \
        --backbone google/mobilenet_v2_1.0_224 --out runs/costs.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import logging as transformers_logging

from wsss_hf import AffinityNetwork, CamClassifier
from wsss_hf.cli.launch import keep_freed_memory
from wsss_hf.data.tagged import tagged_features
from wsss_hf.models.methods import METHODS
from wsss_hf.progress import Progress, set_quiet
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.recipes import Recipe
from wsss_hf.saliency.spectral import SpectralSettings, SpectralSource
from wsss_hf.training.build import build_on_backbone, build_optimizer, build_processor, freeze_batch_norm

GROUPS = ("methods", "labelling", "vit")
ANYWHERE = [name for name in METHODS if name != "attention"]  # which wants a vision transformer
LIMITS = {"drs": 1.15, "icd": 1.6, "d2cam": 1.3, "plda": 2.2, "seam": 1.5, "labelling, random walk": 2.0}
VIT = {  # DINOv2-S but for its weights
    "model_type": "vit",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}


class Variant:
    """Something that takes time, again and again."""

    def __init__(self, run: Callable[[], Any], device: torch.device):
        self.run, self.device = run, device
        self.seconds: list[float] = []

    def timed_run(self) -> None:
        started = self._now()
        self.run()
        self.seconds.append(self._now() - started)

    def _now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time() / torch.get_num_threads()
        torch.cuda.synchronize()
        return time.perf_counter()

    def peak_memory(self) -> int:
        """Bytes of the tensors that one run needs beside those that are there before it."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.run()  # the profiler misses the beginning of what it records
            with record_function("measured"):
                self.run()
        events = recorded.profiler.kineto_results.events()
        begin = next(event.start_ns() for event in events if event.name() == "measured")
        memory = [event for event in events if event.name() == "[memory]" and event.start_ns() >= begin]
        held = (event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns()))
        return max(accumulate(held))


def classifier(recipe: Recipe, methods: dict, num_classes: int, **options: Any) -> tuple[Any, Any]:
    """The recipe's CAM classifier with some methods, and its image processor."""
    torch.manual_seed(0)
    options |= {"output_stride": recipe.cam.output_stride, "id2label": {c: f"class {c}" for c in range(num_classes)}}
    model, mean, std = build_on_backbone(CamClassifier, recipe.cam, recipe.image, "cam", **options, **methods)
    return model, build_processor(recipe.image.size, mean, std, recipe.cam.train.scaled_side)


def affinity_network(recipe: Recipe) -> tuple[Any, Any]:
    """The recipe's affinity network on the classifier's backbone, and its image processor."""
    torch.manual_seed(0)
    options = {name: getattr(recipe.affinity, name) for name in ("kind", "radius", "output_stride")}
    model, mean, std = build_on_backbone(AffinityNetwork, recipe.cam, recipe.image, "affinity", **options)
    return model, build_processor(recipe.image.size, mean, std, recipe.affinity.train.scaled_side)


def training_step(model: Any, recipe: Recipe, batch: dict, device: torch.device) -> Variant:
    """A step in the middle of a training."""
    settings = recipe.cam.train
    model.to(device, memory_format=torch.channels_last)  # as the training loop does
    model.train()
    if settings.freeze_batch_norm:
        freeze_batch_norm(model)
    if hasattr(model, "progress"):
        model.progress = 0.5
    optimizer = build_optimizer(model, settings)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Variant(step, device)


def random_batch(recipe: Recipe, num_classes: int, device: torch.device) -> dict:
    """Noise with one or two tags per image."""
    size, count = recipe.image.size, recipe.cam.train.batch_size
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(count, 3, size, size, generator=generator)
    tags = torch.zeros(count, num_classes).scatter_(1, torch.randint(num_classes, (count, 2), generator=generator), 1)
    return {"pixel_values": pixel_values.to(device), "tags": tags.to(device)}


def random_rows(recipe: Recipe, num_classes: int) -> Dataset:
    """A batch of noise as photographs, a third wider than high, with one or two tags each."""
    size, count, draw = recipe.image.size, recipe.cam.train.batch_size, np.random.default_rng(0)
    columns = {
        "image_id": [str(i) for i in range(count)],
        "image": [Image.fromarray(draw.integers(0, 256, (size, size * 4 // 3, 3), dtype=np.uint8))] * count,
        "tags": [np.unique(draw.integers(num_classes, size=2)).tolist() for _ in range(count)],
    }
    return Dataset.from_dict(columns, features=tagged_features([f"class {c}" for c in range(num_classes)]))


def methods_group(recipe: Recipe, chosen: dict[str, dict], num_classes: int, device: torch.device) -> dict:
    """Training steps: plain CAM, each method, all together, and the affinity network."""
    batch = random_batch(recipe, num_classes, device)
    steps: dict[str, dict] = {"plain CAM": {}} | {name: {name: values} for name, values in chosen.items()}
    if len(chosen) > 1:
        steps["all together"] = chosen
    variants = {
        name: training_step(classifier(recipe, methods, num_classes)[0], recipe, batch, device)
        for name, methods in steps.items()
    }
    certain = torch.randint(3, (len(batch["tags"]), *batch["pixel_values"].shape[-2:]), device=device)
    labelled = {"pixel_values": batch["pixel_values"], "labels": torch.where(certain == 2, 255, certain)}
    return variants | {"affinity network": training_step(affinity_network(recipe)[0], recipe, labelled, device)}


def labelling_group(recipe: Recipe, folder: Path, num_classes: int, device: torch.device) -> dict:
    """Labelling, plain and with a walk, and saliency.

    Args:
        folder: gets the networks that are named by where they lie.
    """
    model, processor = classifier(recipe, {}, num_classes)
    model.to(device).eval()
    rows, network = random_rows(recipe, num_classes), affinity_network(recipe)
    for part in network:
        part.save_pretrained(folder / "affinity")
    model.backbone.body.save_pretrained(folder / "body")
    spectral = SpectralSource(str(folder / "body"), SpectralSettings(size=recipe.image.size))
    spectral.prepare(rows, device)
    walk = [{"walk": {"model": str(folder / "affinity")}}]
    return {
        "labelling": labelling(model, processor, rows, recipe, [], device),
        "labelling, random walk": labelling(model, processor, rows, recipe, walk, device),
        "saliency, spectral": Variant(lambda: list(spectral.maps(rows)), device),
    }


def labelling(
    model: Any, processor: Any, rows: Dataset, recipe: Recipe, refine: list, device: torch.device
) -> Variant:
    settings = replace(recipe.masks, refine=refine, background_threshold=0.4, seeds="argmax", batch_size=len(rows))
    return Variant(lambda: list(label_images(model, processor, rows, settings)), device)


def vit_group(recipe: Recipe, backbone: str | None, num_classes: int, device: torch.device) -> dict:
    """Training step and labelling on a vision transformer, with attention affinity and without."""
    side = 16 * max(1, recipe.image.size // 16)
    config = None if backbone else VIT | {"image_size": side}
    cam = replace(recipe.cam, backbone=backbone, backbone_config=config, output_stride=None)
    recipe = replace(recipe, cam=cam, image=replace(recipe.image, size=side))
    batch, rows = random_batch(recipe, num_classes, device), random_rows(recipe, num_classes)
    variants: dict[str, Variant] = {}
    added: dict[str, dict] = {"": {}, ", attention affinity": {"attention": {}}}
    for words, methods in added.items():
        maps = "attention" if methods else "cam"
        trained, _ = classifier(recipe, methods, num_classes, maps=maps)
        variants[f"ViT, step{words}"] = training_step(trained, recipe, batch, device)
        model, processor = classifier(recipe, methods, num_classes, maps=maps)
        variants[f"ViT, labelling{words}"] = labelling(model.to(device).eval(), processor, rows, recipe, [], device)
    return variants


def measure(variants: dict[str, Variant], references: dict[str, str], warmup: int, turns: int) -> list[dict[str, Any]]:
    """A row for each variant.

    Args:
        references: name of a variant → name of the one that it is compared with.
    """
    with Progress(next(iter(variants)), (warmup + turns) * len(variants), unit="run") as progress:
        for _ in range(warmup):
            for variant in variants.values():
                variant.run()
                progress.advance(1)
        memory = {name: variant.peak_memory() for name, variant in variants.items()}
        for _ in range(turns):
            for variant in variants.values():
                variant.timed_run()
                progress.advance(1)
    rows = []
    for name, variant in variants.items():
        plain = references[name]
        pairs = zip(variant.seconds, variants[plain].seconds, strict=True)
        rows.append(
            {
                "methods": name,
                "seconds": statistics.median(variant.seconds),
                "time": statistics.median(seconds / reference for seconds, reference in pairs),
                "limit": LIMITS.get(name),
                "MiB": memory[name] / 2**20,
                "memory": memory[name] / memory[plain],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="default", help="its image size, backbone, cam.train and masks are used")
    parser.add_argument("--backbone", help="directory or Hub id; the recipe's without it")
    parser.add_argument("--vit", help="directory or Hub id of a vision transformer; without it untrained, of size S")
    parser.add_argument("--set", action="append", default=[], help="change a setting, such as cam.train.batch_size=8")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=[*GROUPS])
    parser.add_argument("--only", nargs="+", choices=ANYWHERE, default=ANYWHERE, help="methods to measure")
    parser.add_argument("--turns", type=int, default=14)
    # On a CPU the memory that is kept still grows in the first steps, most for what needs most; trainings are longer.
    parser.add_argument("--warmup", type=int, default=20, help="turns before those that count")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.quiet:
        set_quiet(True)
    keep_freed_memory()  # as the command line does
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe = Recipe.load(arguments.recipe, arguments.set, backbone=arguments.backbone)
    device = torch.device(arguments.device)
    chosen = {name: recipe.cam.methods.get(name) or {} for name in arguments.only}

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for group in arguments.groups:
            if group == "methods":
                variants = methods_group(recipe, chosen, arguments.classes, device)
                references = dict.fromkeys(variants, "plain CAM")
            elif group == "labelling":
                variants = labelling_group(recipe, Path(folder), arguments.classes, device)
                references = dict.fromkeys(variants, "labelling")
            else:
                variants = vit_group(recipe, arguments.vit, arguments.classes, device)
                references = {name: ", ".join(name.split(", ")[:2]) for name in variants}
            rows += measure(variants, references, arguments.warmup, arguments.turns)
            del variants
    alone = [row["time"] for row in rows if row["methods"] in chosen]
    for row in rows:
        if row["methods"] == "all together":
            row["limit"] = 1 + sum(time - 1 for time in alone)  # plain CAM and what each adds
    precision = "bfloat16" if recipe.cam.train.mixed_precision == "bf16" else "float32"
    size, stride, count = recipe.image.size, recipe.cam.output_stride, recipe.cam.train.batch_size
    title = f"{size} pixels, batch {count}, stride {stride}, {precision}, {device.type}"
    print(f"{title}; time and memory relative to plain CAM, plain labelling, plain CAM on a ViT")
    for row in rows:
        limit = "" if row["limit"] is None else f"(limit {row['limit']:.2f})"
        print(
            f"{row['methods']:35s} {1000 * row['seconds']:6.0f} ms {row['time']:6.2f} {limit:13s} "
            f"{row['MiB']:6.0f} MiB {row['memory']:6.2f}"
        )
    if len(alone) > 1:
        print(f"one after the other the methods take {sum(alone):.2f}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
