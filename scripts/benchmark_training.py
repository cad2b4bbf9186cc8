"""What training costs beside the network, how it scales, and what whole recipes cost at the throughput measured.

- loop: our training loop against a bare one (model, optimiser, schedule, data loader; no log, no checks), of the same
  weights, images, order and precision, turn by turn in one run; ratios are medians over the turns. On a CPU seconds
  are processor seconds, which other programs hardly lengthen. Of each stage that trains: the classifier, the affinity
  network where masks.refine has a walk, the segmenter. The last column says how far the trained weights are apart;
- wait: the share of the clock's time in which our loop waits for images, with 0 workers and with --workers;
- rate: images per second of our loop by the clock, in as many processes as a launcher started;
- processes: the same in 1 and in --processes processes, each started anew. They share the cores that there are;
- localisation: multi-scale maps in batches against the plain loop of `benchmark_labeling.py`;
- labelling: from photograph to pseudo mask, in this process, seconds as of loop, and masks and maps as PNG files; also
  to what an affinity network learns from, where the recipe walks;
- peak: bf16 and torch.compile on one batch of noise, as share of --peak, against a float32 loop. Of GPUs.

Masks, of segmenter and affinity network, are true ones, for measuring only. The model is untrained, on a published
backbone with --backbone. Images are the embedded ones, or photographs in the layout of a VOC devkit.

    python scripts/benchmark_training.py
    python scripts/benchmark_training.py --recipe photos --backbone google/mobilenet_v2_1.0_224 \\
        --root VOCdevkit/VOC2012 --out runs/training.json --table runs/training.md
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from benchmark_labeling import compare_localization
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import BaseImageProcessor
from transformers import logging as transformers_logging

from wsss_hf import AffinityNetwork, CamClassifier, Segmenter
from wsss_hf.cli.launch import keep_freed_memory, keep_kernels
from wsss_hf.data.examples import TaggedExamples
from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import class_names, encode_png
from wsss_hf.inference.optimize import for_inference
from wsss_hf.progress import Progress, set_quiet
from wsss_hf.pseudo_labels.affinity_labels import certain_labels, needs_affinity
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.recipes import Recipe
from wsss_hf.refinement.steps import build_refinement
from wsss_hf.reporting.costs import cost_rows
from wsss_hf.reporting.tables import markdown_table, print_table
from wsss_hf.settings import TrainSettings
from wsss_hf.training.build import (
    build_on_backbone,
    build_optimizer,
    build_processor,
    build_scheduler,
    freeze_batch_norm,
)
from wsss_hf.training.loop import Training
from wsss_hf.training.losses import SegmentationObjective, build_loss
from wsss_hf.training.train import begin_training, train_transform

PARTS = ("loop", "wait", "processes", "localisation", "labelling", "peak")
STAGES = {"cam": "train-cam", "affinity": "train-affinity", "segmenter": "train-segmenter"}
ORDER = ("train-cam", "train-affinity", "make-masks", "train-segmenter")


@dataclass
class Case:
    """A stage that trains: its untrained network, its images, its settings."""

    model: Any
    processor: BaseImageProcessor
    examples: Any
    settings: TrainSettings


def build_case(stage: str, recipe: Recipe, rows: Dataset, steps: int = 1) -> Case:
    """The network and examples of a stage, as the stage itself builds them.

    Images are repeated until so many steps fit into an epoch: each but the last ends with a checkpoint.
    """
    torch.manual_seed(recipe.seed)
    section, names = getattr(recipe, stage), class_names(rows)
    size, options = recipe.image.size, {"output_stride": section.output_stride}
    model: Any
    if stage == "cam":
        options |= {"id2label": dict(enumerate(names)), "maps": section.maps, "dropout": section.dropout}
        options |= {"method_warmup": section.method_warmup, **section.methods}
        model, mean, std = build_on_backbone(CamClassifier, section, recipe.image, stage, **options)
    elif stage == "affinity":
        if section.backbone is None and section.backbone_config is None:
            section = replace(section, backbone=recipe.cam.backbone, backbone_config=recipe.cam.backbone_config)
        options |= {"kind": section.kind, "radius": section.radius}
        model, mean, std = build_on_backbone(AffinityNetwork, section, recipe.image, stage, **options)
    else:
        size = section.size or size
        options |= {name: getattr(section, name) for name in ("head", "rates", "input_scales")}
        options["id2label"] = dict(enumerate(["background", *names]))
        model, mean, std = build_on_backbone(Segmenter, section, recipe.image, stage, **options)
        model = SegmentationObjective(model, build_loss(section.loss, **section.loss_options))
    train = section.train
    processor = build_processor(size, mean, std, train.scaled_side)
    transform = train_transform(train, size, processor)
    masks = None if stage == "cam" else "mask"
    rows = rows.select(np.resize(np.arange(len(rows)), max(len(rows), steps * train.batch_size)))
    return Case(model, processor, TaggedExamples(rows, transform, mask_column=masks, seed=recipe.seed), train)


class Watched(Training):
    """A training that says how long it waited for each batch, in seconds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.waits: list[float] = []

    def _batches(self, *where) -> Iterator[dict]:
        batches = super()._batches(*where)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waits.append(time.perf_counter() - started)
            if batch is None:
                return
            yield batch


def our_loop(case: Case, folder: str, **changes: Any) -> Watched:
    """Our training of a copy of the network, ready to run."""
    settings = replace(case.settings, **changes)
    accelerator = begin_training(settings, 0, Path(folder))
    return Watched(copy.deepcopy(case.model), case.examples, settings, accelerator, Path(folder))


class BareLoop:
    """What one would write by hand, on the same batches."""

    def __init__(self, case: Case, device: torch.device, **changes: Any):
        self.settings, self.examples, self.device = replace(case.settings, **changes), case.examples, device
        self.model = copy.deepcopy(case.model).to(device)
        if self.settings.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.model.train()
        if self.settings.freeze_batch_norm:
            freeze_batch_norm(self.model)
        self.optimizer = build_optimizer(self.model, self.settings)
        self.scheduler = build_scheduler(self.optimizer, self.settings, self.settings.steps)
        self.order = SeedableRandomSampler(self.examples, data_seed=0)
        self.loader = DataLoader(
            self.examples,
            batch_size=min(self.settings.batch_size, len(self.examples)),
            sampler=self.order,
            drop_last=True,
            num_workers=self.settings.workers,
            pin_memory=device.type == "cuda",
        )

    def run(self) -> None:
        steps = self.settings.steps
        for epoch in range(-(-steps // len(self.loader))):
            self.order.set_epoch(epoch)
            self.examples.set_epoch(epoch)
            for number, batch in enumerate(islice(self.loader, steps - epoch * len(self.loader))):
                if hasattr(self.model, "progress"):
                    self.model.progress = (epoch * len(self.loader) + number) / steps
                batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
                half = self.settings.mixed_precision == "bf16"
                with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                    loss = self.model(**batch).loss
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """On a CPU processor seconds per thread, on a GPU those of the clock."""
    if device.type == "cpu":
        started = time.process_time()
        run()
        return (time.process_time() - started) / torch.get_num_threads()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def compare_loops(case: Case, device: torch.device, steps: int, turns: int) -> dict[str, float]:
    """Images per second of both loops, the overhead of ours, and how far the weights are apart at the end."""
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn in range(turns + 1):
        with tempfile.TemporaryDirectory() as folder:
            ours, bare = our_loop(case, folder, steps=steps), BareLoop(case, device, steps=steps)
            ways: dict[str, Callable[[], Any]] = {"ours": ours.run, "bare": bare.run}
            for name in sorted(ways, reverse=turn % 2 == 1):  # neither is always the first
                seconds[name].append(seconds_of(ways[name], device))
    seconds = {name: taken[1:] for name, taken in seconds.items()}  # the first turn warms up
    images = steps * ours.batch_size
    pairs = zip(ours.inner.parameters(), bare.model.parameters(), strict=True)
    ratios = [mine / plain for mine, plain in zip(seconds["ours"], seconds["bare"], strict=True)]
    return {name: images / statistics.median(taken) for name, taken in seconds.items()} | {
        "overhead": statistics.median(ratios) - 1,
        "difference": max((a - b).detach().abs().max().item() for a, b in pairs),
    }


def waiting(case: Case, steps: int, workers: int) -> dict[str, float]:
    """Share of the time that our loop waits for images; the first batch, for which workers start, does not count."""
    with tempfile.TemporaryDirectory() as folder:
        training = our_loop(case, folder, steps=steps, workers=workers)
        started = time.perf_counter()
        training.run()
        passed = time.perf_counter() - started
    first, *waits = training.waits
    return {"workers": workers, "share": sum(waits) / (passed - first)}


def rate(case: Case, steps: int) -> float:
    """Images per second of our loop, over all processes, by the clock."""
    with tempfile.TemporaryDirectory() as folder:
        training = our_loop(case, folder, steps=steps)
        started = time.perf_counter()
        training.run()
        return steps * training.batch_size / (time.perf_counter() - started)


def rate_of_processes(count: int) -> float:
    """[`rate`] in so many processes of this very command, which share the threads of this one."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rate.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
        command = [*launcher, *sys.argv, "--parts", "rate", "--out", str(out), "--quiet"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(out.read_text())["rate"]


def labelling(case: Case, recipe: Recipe, rows: Dataset, device: torch.device) -> dict[str, float]:
    """Images per second from photograph to pseudo mask, and bytes of an image's mask and of its maps.

    Where the recipe walks, also images per second from photograph to what the affinity network learns from.
    """
    masks = replace(recipe.masks, workers=0)
    if isinstance(masks.background_threshold, str):
        masks = replace(masks, background_threshold=0.4)  # found on some images, whatever their number
    learns_affinity, measured = needs_affinity(masks), {}
    with tempfile.TemporaryDirectory() as folder:
        if learns_affinity:
            affinity = build_case("affinity", recipe, rows)
            affinity.model.save_pretrained(folder)
            affinity.processor.save_pretrained(folder)
            masks = replace(masks, refine=[_with_model(step, folder) for step in masks.refine])
        model: Any = copy.deepcopy(case.model).to(device).eval()
        model = for_inference(model, device) if masks.optimize else model
        sizes = []

        def label() -> None:
            with Progress("labelling", len(rows), unit="image") as progress:
                for found in label_images(model, case.processor, rows, masks):
                    maps = (255 * found.maps).round().astype(np.uint8)
                    sizes.append((png_size(found.pseudo_mask), sum(map(png_size, maps))))
                    progress.advance(1)

        seconds = seconds_of(label, device)
    if learns_affinity:
        refine = build_refinement(recipe.affinity.refine)
        refine.prepare()

        def find_certain() -> None:
            with Progress("affinity labels", len(rows), unit="image") as progress:
                for _ in certain_labels(model, case.processor, rows, masks, recipe.affinity, refine):
                    progress.advance(1)

        measured["affinity_labels_per_second"] = len(rows) / seconds_of(find_certain, device)
    mask, maps = np.mean(sizes, axis=0)
    return measured | {"images_per_second": len(rows) / seconds, "mask_bytes": mask, "map_bytes": maps}


def _with_model(step: Any, model: str) -> Any:
    """A step of masks.refine; a walk gets an affinity network."""
    name, options = (step, {}) if isinstance(step, str) else next(iter(step.items()))
    return {name: (options or {}) | {"model": model}} if name == "walk" else step


def png_size(values: np.ndarray) -> int:
    """Bytes of (H, W) uint8 as PNG."""
    return len(encode_png(Image.fromarray(values))["bytes"])


class Noise(torch.utils.data.Dataset):
    """One image of noise again and again, so that reading takes no time."""

    def __init__(self, example: dict[str, torch.Tensor], count: int):
        self.example, self.count = example | {"pixel_values": torch.randn_like(example["pixel_values"])}, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, _index: int) -> dict[str, torch.Tensor]:
        return self.example

    def set_epoch(self, _epoch: int) -> None:
        """All epochs are the same."""


def peak_share(case: Case, device: torch.device, steps: int, peak: float | None) -> dict[str, float | None]:
    """Images per second in bfloat16, compiled, and in float32, and the share of `peak` TFLOP/s of the first."""
    count = case.settings.batch_size
    held = replace(case, examples=Noise(case.examples[0], count * steps))
    model = copy.deepcopy(case.model).to(device).train()
    batch = {name: value.expand(count, *value.shape).to(device) for name, value in held.examples.example.items()}
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    per_image = counter.get_total_flops() / count
    del model
    with tempfile.TemporaryDirectory() as folder:
        fast = {"mixed_precision": "bf16", "compile": True, "fused": True, "channels_last": True, "workers": 0}
        training = our_loop(held, folder, steps=0, epochs=2, **fast)
        first_epoch_compiles, second = (record["images_per_second"] for record in training.run())
    plain = BareLoop(held, device, steps=steps, mixed_precision="no", fused=False, channels_last=False, workers=0)
    plain.run()  # warms up
    float32 = count * steps / seconds_of(plain.run, device)
    return {
        "bf16, compiled": second,
        "first epoch": first_epoch_compiles,
        "float32": float32,
        "ratio": second / float32,
        "GFLOP per image": per_image / 1e9,
        "share of peak": None if peak is None else second * per_image / (peak * 1e12),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="toy", help="its stages are measured")
    parser.add_argument("--backbone", help="directory or Hub id; the recipe's without it")
    parser.add_argument("--set", action="append", default=[], help="change a setting, such as cam.train.batch_size=8")
    parser.add_argument("--root", help="VOC2012 folder of a devkit; without it the embedded data")
    parser.add_argument("--classes", help="a,b,c: of the devkit")
    parser.add_argument("--images", type=int, default=256, help="at most so many")
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="of the part wait")
    parser.add_argument("--processes", type=int, default=2, help="of the part processes")
    parser.add_argument("--passes", type=int, default=3, help="of the localisation over the images")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the GPU in bfloat16, as its data sheet has it")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "rate"), help="all but rate, and peak on a GPU")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--table", type=Path, help="write here what VOC, COCO and a million images cost")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    keep_freed_memory()  # both as the command line does
    keep_kernels()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.quiet:
        set_quiet(True)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    parts = arguments.parts or [part for part in PARTS if part != "peak" or device.type == "cuda"]
    if arguments.table is not None and "rate" not in parts and not {"loop", "labelling"} <= {*parts}:
        parser.error(f"--table: expected the parts loop and labelling, got {' '.join(parts)}")
    recipe = Recipe.load(arguments.recipe, arguments.set, backbone=arguments.backbone)
    if arguments.root is None:
        toy = {"num_train": arguments.images, "num_val": 1, "image_size": recipe.toy.image_size}
        data = load_data("toy", toy=toy)
    else:
        classes = arguments.classes.split(",") if arguments.classes else None
        data = load_data("voc", root=arguments.root, classes=classes, limit=arguments.images)
    rows = data["train"]
    stages = [stage for stage in STAGES if stage != "affinity" or needs_affinity(recipe.masks)]
    steps = arguments.steps
    cases = {stage: build_case(stage, recipe, rows, steps) for stage in stages}
    cam = cases["cam"]
    if "rate" in parts:
        alone = rate(cam, steps)
        if os.environ.get("RANK", "0") == "0":
            write(arguments.out, {"rate": alone})
        return

    cores = torch.get_num_threads()
    kind = "GPU" if device.type == "cuda" else "CPU core" if cores == 1 else f"{cores}-core CPU"
    on = f"1 {kind}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    title = f"{arguments.recipe}, {recipe.image.size} pixels, batch {cam.settings.batch_size}, {on}"
    measured: dict[str, Any] = {"title": title, "device": kind, "stages": {}}
    if "loop" in parts:
        measured["loop"] = {}
        for stage, case in cases.items():
            measured["loop"][STAGES[stage]] = compare_loops(case, device, steps, arguments.turns)
            train = case.settings
            measured["stages"][STAGES[stage]] = {
                "images_per_second": measured["loop"][STAGES[stage]]["ours"],
                "passes": None if train.steps else train.epochs,
                "images": train.steps * train.batch_size or None,
            }
        table = [
            {
                "training": stage,
                "bare loop": f"{found['bare']:.2f} images/s",
                "ours": f"{found['ours']:.2f} images/s",
                "overhead": f"{100 * found['overhead']:+.1f} %",
                "weights differ by": f"{found['difference']:.0e}",
            }
            for stage, found in measured["loop"].items()
        ]
        print_table(table, title)
    if "wait" in parts:
        measured["wait"] = [waiting(cam, steps, workers) for workers in (0, arguments.workers)]
        for found in measured["wait"]:
            print(f"waiting for images, {found['workers']} workers: {100 * found['share']:.1f} % of the time")
    if "processes" in parts:
        one, many = (rate_of_processes(count) for count in (1, arguments.processes))
        measured["processes"] = {"count": arguments.processes, "one": one, "many": many}
        print(f"processes: 1 gives {one:.2f} images/s, {arguments.processes} give {many:.2f}, ratio {many / one:.2f}")
    if "localisation" in parts:
        plain, model = copy.deepcopy(cam.model).to(device).eval(), for_inference(copy.deepcopy(cam.model), device)
        measured["localisation"] = compare_localization(
            rows, plain, model, cam.processor, recipe.masks.batch_size, arguments.passes
        )
    if "labelling" in parts:
        found = measured["labelling"] = labelling(cam, recipe, rows, device)
        print(f"labelling: {found['images_per_second']:.2f} images/s")
        measured["stages"]["make-masks"] = {"images_per_second": found["images_per_second"], "passes": 1}
        if "affinity_labels_per_second" in found:
            labels = found["affinity_labels_per_second"]
            print(f"affinity labels: {labels:.2f} images/s")
            if "train-affinity" in measured["stages"]:
                measured["stages"]["train-affinity"]["labels_per_second"] = labels
        measured["bytes"] = {"pseudo masks": found["mask_bytes"], "maps": found["map_bytes"]}
    if "peak" in parts:
        measured["peak"] = peak_share(cam, device, steps, arguments.peak)
        print(", ".join(f"{key} {value:.3g}" for key, value in measured["peak"].items() if value is not None))
    measured["stages"] = {stage: measured["stages"][stage] for stage in ORDER if stage in measured["stages"]}
    write(arguments.out, measured)
    if arguments.table is not None:
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        arguments.table.write_text(markdown_table(cost_rows(measured)))


def write(file: Path | None, measured: dict[str, Any]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
