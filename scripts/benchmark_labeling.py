"""From maps to masks against plain implementations, side by side in one run, image by image on the same inputs.

- localisation: `localize` on the model that `masks.optimize` loads against the plain loop, one image, one scale and
  one mirror image at a time, all maps at image size, in float32 on the model as `from_pretrained` gives it. Memory and
  kernels are kept for both. Of --passes the fastest counts, batch by batch; a single one would also count the kernels
  that oneDNN compiles for sizes it has not met, and the first pages of memory;
- dense CRF: the refinement step, in this process and shared by several, against pydensecrf2 called with the channels
  of all classes of the data;
- closed-form matting: `closed_form_alphas` against pymatting's `estimate_alpha_cf`, per class;
- random walk: `random_walk` of 256 steps at every 4th pixel against the matrix of all pairs, normalised and squared 8
  times, as IRN's program has it. The matrix takes minutes and 0.5 GB for one photograph of 500 × 375 pixels, so it is
  made of the first --dense images only.

On one thread seconds are processor seconds, which other programs hardly lengthen; on several they are those of the
clock. Scores, tags and trimaps are made from true masks, for measuring only. Images are the embedded ones, or
photographs in the layout of a VOC devkit. The classifier knows the classes of the data; it is the one of --cam, or an
untrained one, on a published backbone with --backbone.

    python scripts/benchmark_labeling.py
    python scripts/benchmark_labeling.py --root VOCdevkit/VOC2012 --backbone google/mobilenet_v2_1.0_224
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F

from wsss_hf.cli.launch import keep_freed_memory, keep_kernels
from wsss_hf.data.batches import ImageBatch, batches_by_size
from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import class_names, decode_image, decode_mask, tagged_features, undecoded
from wsss_hf.data.voc import VOC_CLASSES
from wsss_hf.inference.cam_maps import localize
from wsss_hf.inference.load import load_labeler
from wsss_hf.inference.optimize import for_inference
from wsss_hf.models.affinity import boundary_affinity, offsets, random_walk
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.tta import resize_images
from wsss_hf.recipes import Recipe
from wsss_hf.refinement.crf import require_densecrf
from wsss_hf.refinement.matting import closed_form_alphas, load_pymatting
from wsss_hf.refinement.steps import Note, build_refinement
from wsss_hf.refinement.trimap import BACKGROUND, FOREGROUND, UNKNOWN
from wsss_hf.training.build import build_on_backbone, build_processor

SCALES = (0.75, 1.0, 1.25)


def timed(function: Callable, clock: Callable[[], float] | None = None) -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    start = clock()
    result = function()
    return clock() - start, result


def load_pairs(root: str | None, every: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    """RGB images (H, W, 3) with their masks, and the names of the classes."""
    if root is None:
        rows = undecoded(load_data("toy", toy={"num_train": 1, "num_val": 40, "image_size": 96})["val"])
        found, names = [(row["image"], row["mask"], row["image_id"]) for row in rows], class_names(rows)
    else:
        masks = sorted((Path(root) / "SegmentationClassAug").glob("*.png"))
        if not masks:
            sys.exit(f"{root}: expected a folder VOCdevkit/VOC2012 with SegmentationClassAug/*.png, found none there")
        photographs = [Path(root) / "JPEGImages" / f"{path.stem}.jpg" for path in masks]
        found = [({"path": str(a)}, {"path": str(b)}, b.stem) for a, b in zip(photographs, masks, strict=True)]
        names = list(VOC_CLASSES)
    return [(np.asarray(decode_image(a, name)), decode_mask(b, name)) for a, b, name in found[::every]], names


def tagged_rows(pairs: list[tuple[np.ndarray, np.ndarray]], names: list[str]) -> Dataset:
    columns = {
        "image_id": [str(i) for i in range(len(pairs))],
        "image": [Image.fromarray(image) for image, _ in pairs],
        "tags": [(np.setdiff1d(mask, [0, 255]) - 1).tolist() for _, mask in pairs],
    }
    return Dataset.from_dict(columns, features=tagged_features(names))


def untrained_classifier(names: list[str], backbone: str | None) -> tuple[CamClassifier, WsssImageProcessor]:
    recipe = Recipe.load("toy" if backbone is None else "default", [f"cam.backbone={backbone or 'null'}"])
    torch.manual_seed(0)
    options = {"id2label": dict(enumerate(names)), "output_stride": recipe.cam.output_stride}
    model, mean, std = build_on_backbone(CamClassifier, recipe.cam, recipe.image, "cam", **options)
    return model.eval(), build_processor(Recipe().image.size, mean, std)  # photographs at the default size


@torch.inference_mode()
def localize_plainly(model, pixel_values: torch.Tensor, tags: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N, H, W) maps of one image's tagged classes; every view on its own, all maps at image size."""
    total = torch.zeros(())
    for scale in SCALES:
        scaled = pixel_values if scale == 1 else resize_images(pixel_values, scale)
        for mirrored in (False, True):
            maps = model(scaled.flip(-1) if mirrored else scaled).maps
            maps = F.interpolate((maps.flip(-1) if mirrored else maps).relu(), size=size, mode="bilinear")
            total = total + maps / (maps.amax(dim=(2, 3), keepdim=True) + 1e-5)
    return (total / (total.amax(dim=(2, 3), keepdim=True) + 1e-5))[0][tags[0].bool()]


def compare_localization(rows: Dataset, plain, model, processor, batch_size: int, passes: int) -> list[dict]:
    """Images per second one by one and in batches, both on the models' device, their ratio and how far maps differ."""
    batches, device = list(batches_by_size(rows, processor, batch_size)), plain.device
    clock = time.perf_counter if device.type == "cuda" else None

    def batched(batch: ImageBatch, bf16: bool) -> list[torch.Tensor]:
        pixel_values, tags = batch.pixel_values.to(device), batch.tags.to(device)
        maps, _ = localize(model, pixel_values, tags, batch.size, SCALES, bf16=bf16)
        return list(maps.cpu().split([int(count) for count in batch.tags.sum(dim=1)]))

    def one_by_one(batch: ImageBatch) -> list[torch.Tensor]:
        images = zip(batch.pixel_values.to(device).split(1), batch.tags.to(device).split(1), strict=True)
        return [localize_plainly(plain, image, tags, batch.size).cpu() for image, tags in images]

    ways: dict[str, Callable] = {
        "plain": one_by_one,
        "float32": partial(batched, bf16=False),
        "bf16": partial(batched, bf16=True),
    }
    seconds, differences = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for batch in batches:
        found, taken = {}, dict.fromkeys(ways, float("inf"))
        for name in [*ways] * passes:
            passed, found[name] = timed(partial(ways[name], batch), clock)
            taken[name] = min(taken[name], passed)
        for name, maps in found.items():
            seconds[name] += taken[name]
            differences[name] = max(
                [differences[name], *(float((a - b).abs().max()) for a, b in zip(maps, found["plain"], strict=True))]
            )
    compared = [
        {
            "precision": name,
            "plain": len(rows) / seconds["plain"],
            "batched": len(rows) / seconds[name],
            "ratio": seconds["plain"] / seconds[name],
            "difference": differences[name],
        }
        for name in ("float32", "bf16")
    ]
    for row in compared:
        print(
            f"localisation in {row['precision']}: plain loop in float32 {row['plain']:.2f} images/s, batched "
            f"{row['batched']:.2f} images/s, ratio {row['ratio']:.2f}, largest difference {row['difference']:.1e}",
            flush=True,
        )
    return compared


def blurred_scores(mask: np.ndarray, threshold: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """(K+1, H, W) scores, blurred and shifted masks as a CAM would be, and the labels of the channels."""
    labels = np.setdiff1d(mask, [0, 255])
    width = max(mask.shape) / 30
    maps = [ndimage.gaussian_filter(ndimage.shift((mask == c) * 1.0, (width / 2, -width / 2)), width) for c in labels]
    scores = [np.full(mask.shape, threshold), *(one / (one.max() + 1e-5) for one in maps)]
    return np.stack(scores).astype(np.float32), np.r_[0, labels]


def crf_of_all_classes(scores: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Labels (H, W) as pydensecrf2's examples make them."""
    from pydensecrf.utils import unary_from_softmax

    count, height, width = scores.shape
    crf = require_densecrf().DenseCRF2D(width, height, count)
    crf.setUnaryEnergy(unary_from_softmax(scores / scores.sum(axis=0)))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image.copy(), compat=10)
    return np.argmax(crf.inference(10), axis=0).reshape(height, width)


def compare_crf(pairs: list[tuple[np.ndarray, np.ndarray]], num_labels: int, workers: int) -> None:
    scores, labels = zip(*(blurred_scores(mask) for _, mask in pairs), strict=True)
    images = [image for image, _ in pairs]
    given = [torch.from_numpy(one) for one in scores], images, [Note() for _ in pairs]
    wanted, one_by_one, on_the_clock = [], 0.0, 0.0
    for image, few, present in zip(images, scores, labels, strict=True):
        everything = np.zeros((num_labels, *few.shape[1:]), dtype=np.float32)
        everything[present] = few
        started = time.perf_counter()
        seconds, found = timed(lambda scores=everything, image=image: crf_of_all_classes(scores, image))
        on_the_clock += time.perf_counter() - started
        one_by_one += seconds
        wanted.append(found)
    seconds, found = timed(lambda: build_refinement(["crf"]).batch(*given))
    agreement = [
        float((present[refined.argmax(dim=0)] == other).mean())
        for present, refined, other in zip(labels, found, wanted, strict=True)
    ]
    print(
        f"dense CRF: {num_labels} channels {one_by_one / len(pairs):.2f} s, those present "
        f"{seconds / len(pairs):.2f} s, ratio {one_by_one / seconds:.2f}, same labels "
        f"{100 * np.mean(agreement):.2f} % (least {100 * min(agreement):.2f} %)",
        flush=True,
    )
    with build_refinement(["crf"], workers=workers) as shared:
        shared.batch(*given)  # until all processes have started, which does not count
        seconds, _ = timed(lambda: shared.batch(*given), time.perf_counter)
    print(
        f"dense CRF, by the clock: {num_labels} channels {on_the_clock / len(pairs):.2f} s, those present in "
        f"{workers} processes {seconds / len(pairs):.2f} s, ratio {on_the_clock / seconds:.2f}",
        flush=True,
    )


def measured_trimaps(mask: np.ndarray, band: int) -> np.ndarray:
    """(K, H, W) trimaps of the classes that keep a certain foreground; `band` pixels unknown on either side."""
    made = []
    for value in np.setdiff1d(mask, [0, 255]):
        inside = ndimage.distance_transform_edt(mask == value)
        outside = ndimage.distance_transform_edt((mask != value) & (mask != 255))
        trimap = np.full(mask.shape, UNKNOWN, dtype=np.uint8)
        trimap[inside > band] = FOREGROUND
        trimap[outside > band] = BACKGROUND
        if (inside > band).any() and (outside > band).any():
            made.append(trimap)
    return np.array(made, dtype=np.uint8).reshape(-1, *mask.shape)


def compare_mattes(image: np.ndarray, trimaps: np.ndarray) -> list[dict]:
    """One row per class: seconds of both and the mean absolute difference of their alphas."""
    seconds, fast = timed(lambda: closed_form_alphas(image, trimaps))
    rows = []
    for alpha, trimap in zip(fast, trimaps, strict=True):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints performance warnings
            plain_seconds, plain = timed(
                lambda trimap=trimap: load_pymatting().estimate_alpha_cf(image / 255, trimap / 255)
            )
        difference = np.full(trimap.shape, np.nan) if alpha is None else np.abs(alpha - plain)
        rows.append(
            {
                "closed_form_alphas": seconds / len(trimaps),
                "pymatting": plain_seconds,
                "difference": difference.mean(),
                "unknown": difference[trimap == UNKNOWN].mean(),
            }
        )
    return rows


def compare_matting(pairs: list[tuple[np.ndarray, np.ndarray]], bands: list[int]) -> None:
    # What is loaded at the first call does not count.
    warm_up = np.repeat(np.array([0, 128, 255], dtype=np.uint8), 3).reshape(1, 3, 3).repeat(3, axis=1)
    compare_mattes(np.zeros((*warm_up.shape[1:], 3), dtype=np.uint8), warm_up)
    for band in bands:
        rows = []
        for image, mask in pairs:
            trimaps = measured_trimaps(mask, band)
            rows += compare_mattes(image, trimaps) if len(trimaps) else []
        if not rows:
            print(f"matting: no object is wider than {2 * band} pixels")
            continue
        column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        print(
            f"matting, {band} pixels unknown on either side, {len(rows)} classes: pymatting "
            f"{column['pymatting'].mean():.2f} s, closed_form_alphas {column['closed_form_alphas'].mean():.2f} s "
            f"per class, ratio {column['pymatting'].sum() / column['closed_form_alphas'].sum():.1f} "
            f"(least {(column['pymatting'] / column['closed_form_alphas']).min():.1f}), alpha differs by "
            f"{column['difference'].mean():.4f} (most {column['difference'].max():.4f}), where unknown by "
            f"{column['unknown'].mean():.4f} (most {column['unknown'].max():.4f})",
            flush=True,
        )


def walk_of_all_pairs(maps: torch.Tensor, affinity: torch.Tensor, radius: int, power: float, squarings: int):
    """(K, h, w) maps after the walk by the (N, N) matrix of all pairs."""
    height, width = maps.shape[-2:]
    index = torch.arange(height * width).view(height, width)
    matrix = torch.eye(height * width)
    for (down, right), one in zip(offsets(radius), affinity, strict=True):
        left = slice(max(0, -right), width - max(0, right))
        start, end = index[: height - down, left], index[down:, max(0, right) : width + min(0, right)]
        matrix[start, end] = matrix[end, start] = one[: height - down, left]
    matrix = matrix**power
    matrix = matrix / matrix.sum(dim=0, keepdim=True)
    for _ in range(squarings):
        matrix = matrix @ matrix
    return (maps.flatten(1) @ matrix).view_as(maps)


def compare_walks(pairs: list[tuple[np.ndarray, np.ndarray]], num_dense: int) -> None:
    radius, power, squarings = 5, 10, 8
    ours, plain, difference = [], [], 0.0
    for i, (image, mask) in enumerate(pairs):
        size = tuple(-(-side // 4) for side in mask.shape)
        grey = torch.from_numpy(ndimage.gaussian_gradient_magnitude(image.mean(axis=2), 1))[None, None]
        boundary = (F.interpolate(grey, size=size, mode="area")[0, 0] / 30).clamp(0, 1).float()
        scores = torch.from_numpy(blurred_scores(mask)[0])[None]
        maps = F.interpolate(scores, size=size, mode="area")[0] * (1 - boundary)

        def walk(maps=maps, boundary=boundary) -> torch.Tensor:
            return random_walk(maps[None], boundary_affinity(boundary[None], radius), radius, power, 2**squarings)[0]

        seconds, walked = timed(walk)
        ours.append(seconds)
        if i < num_dense:
            affinity = boundary_affinity(boundary[None], radius)[0]
            seconds, wanted = timed(partial(walk_of_all_pairs, maps, affinity, radius, power, squarings))
            plain.append(seconds)
            difference = max(difference, float((walked - wanted).abs().max()))
    print(f"random walk, {2**squarings} steps: {np.mean(ours):.2f} s per image", end="")
    if plain:
        ratio = sum(plain) / sum(ours[: len(plain)])
        print(
            f"; of the first {len(plain)}: matrix of all pairs {np.mean(plain):.0f} s, stencil "
            f"{np.mean(ours[: len(plain)]):.2f} s, ratio {ratio:.0f}, largest difference {difference:.1e}",
            end="",
        )
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="VOC2012 folder of a devkit; without it the embedded data")
    parser.add_argument("--cam", help="classifier for the localisation")
    parser.add_argument("--backbone", help="without --cam: directory or Hub id of a pretrained backbone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the localisation")
    parser.add_argument("--passes", type=int, default=3, help="of the localisation over the images")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that share the CRF")
    parser.add_argument("--bands", type=int, nargs="+", default=[8, 20], help="unknown pixels on either side")
    parser.add_argument("--every", type=int, default=1, help="take every n-th image only")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--parts", nargs="+", choices=("localization", "crf", "matting", "walk"), default=None)
    parser.add_argument("--dense", type=int, default=1, help="images that also walk by the matrix of all pairs")
    arguments = parser.parse_args()
    parts = arguments.parts or ["localization", "crf", "matting", "walk"]
    torch.set_num_threads(1)
    keep_freed_memory()  # both as the command line does
    keep_kernels()
    pairs, names = load_pairs(arguments.root, arguments.every)
    if "localization" in parts:
        torch.set_num_threads(arguments.threads)
        plain: Any
        model: Any
        if arguments.cam:
            model, processor = load_labeler(arguments.cam, "cpu", optimize=True)
            plain, _ = load_labeler(arguments.cam, "cpu")
        else:
            plain, processor = untrained_classifier(names, arguments.backbone)
            model = for_inference(copy.deepcopy(plain), "cpu")
        if list(model.config.id2label.values()) != names:
            sys.exit(f"--cam {arguments.cam}: expected a classifier of the data's classes, {', '.join(names)}")
        rows = tagged_rows(pairs, names)
        compare_localization(rows, plain, model, processor, arguments.batch_size, arguments.passes)
        torch.set_num_threads(1)
    if "crf" in parts:
        compare_crf(pairs, max(21, len(names) + 1), arguments.workers)
    if "matting" in parts:
        compare_matting(pairs, arguments.bands)
    if "walk" in parts:
        compare_walks(pairs, arguments.dense)


if __name__ == "__main__":
    main()
