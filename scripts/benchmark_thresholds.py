"""The threshold that `masks.background_threshold: auto` finds, against the best one that true masks would choose.

For every classifier: both thresholds and their mean IoU on the images of split "train" that have a mask, for the plain
maps and, with --pamr, for the refined ones. With --confidence also how well the confidence of a pixel tells right
labels from wrong ones (area under the ROC curve), against the absolute margin. The masks serve the measuring only.

    python scripts/benchmark_thresholds.py --data toy --recipe toy runs/demo/cam
    python scripts/benchmark_thresholds.py --data voc --root VOCdevkit/VOC2012 --classes cat,cow a/cam b/cam:icd
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy.stats import rankdata

from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import class_names, decode_mask, undecoded
from wsss_hf.evaluation.evaluate import rows_with
from wsss_hf.evaluation.thresholds import ThresholdCurve
from wsss_hf.labeling.auto_threshold import THRESHOLDS, auto_threshold
from wsss_hf.labeling.localization import label_map
from wsss_hf.labeling.pseudo_masks import label_images, load_labeler
from wsss_hf.labeling.refine import build_refiner
from wsss_hf.models.maps import IGNORE_INDEX, add_background
from wsss_hf.training.recipes import load_recipe


def area_under_curve(scores: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right pixel has a higher score than a wrong one."""
    hits = right.sum()
    return (rankdata(scores)[right].sum() - hits * (hits + 1) / 2) / max(1, hits * (len(right) - hits))


def measure(model, processor, rows, settings: dict, steps: dict[str, list], confidence: bool) -> list[dict]:
    """One row per entry of `steps`, refinement that leaves the background score as it is."""
    names = class_names(rows)
    found = {name: auto_threshold(model, processor, rows, settings | {"refine": steps[name]}) for name in steps}
    curves = {name: ThresholdCurve(["background", *names], (0.0, *THRESHOLDS)) for name in steps}
    areas = {name: [] for name in steps}
    masks = undecoded(rows.select_columns(["image_id", "mask"]))
    plain = settings | {"background_threshold": 0.5, "refine": []}
    for labelled in label_images(model, processor, rows, plain):
        if not len(labelled.classes):
            continue
        truth = decode_mask(masks[labelled.index]["mask"], masks[labelled.index]["image_id"])
        for name, chain in steps.items():
            scores = add_background(torch.from_numpy(labelled.maps)[None], found[name])[0]
            refined = build_refiner(chain)(scores, np.asarray(labelled.image))
            maps = np.zeros((len(names), *truth.shape), dtype=np.float32)
            maps[labelled.classes] = refined[1:].clamp(0, 1)
            curves[name].add(maps, truth)
            if confidence:
                labels, relative = label_map(refined, torch.from_numpy(labelled.classes))
                top = refined.topk(2, dim=0).values
                counted = truth != IGNORE_INDEX
                right = labels.numpy()[counted] == truth[counted]
                margins = [values.numpy()[counted] for values in (relative, top[0] - top[1])]
                areas[name].append([right, *margins])
    results = []
    for name, curve in curves.items():
        points = curve.compute()
        means, (best, best_mean) = dict(points["curve"]), points["best"]
        result = {"maps": name, "auto": found[name], "at auto": means[found[name]], "best": best, "at best": best_mean}
        result |= {
            "ratio": means[found[name]] / best_mean,
            "0.4": means[0.4] / best_mean,
            "0.5": means[0.5] / best_mean,
        }
        if confidence:
            right, relative, absolute = (np.concatenate(parts) for parts in zip(*areas[name], strict=True))
            result |= {"confidence": area_under_curve(relative, right), "margin": area_under_curve(absolute, right)}
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cams", nargs="+", help="classifiers, with :NAME for other maps than the configured ones")
    parser.add_argument("--data", default="toy")
    parser.add_argument("--root", help="VOC2012 folder, for --data voc")
    parser.add_argument("--classes", help="a,b,c")
    parser.add_argument("--recipe", default="default", help="its masks section says how maps are made")
    parser.add_argument("--images", type=int, help="at most so many, evenly spaced")
    parser.add_argument("--pamr", action="store_true")
    parser.add_argument("--confidence", action="store_true")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    toy = recipe["toy"] if arguments.data == "toy" else None
    classes = arguments.classes.split(",") if arguments.classes else None
    data = load_data(arguments.data, root=arguments.root, classes=classes, toy=toy)
    rows = rows_with(data["train"], "mask")
    if arguments.images is not None:
        rows = rows.select(np.unique(np.linspace(0, len(rows) - 1, arguments.images).astype(int)))
    steps = {"plain": []} | ({"+ PAMR": ["pamr"]} if arguments.pamr else {})
    for cam in arguments.cams:
        folder, _, maps = cam.partition(":")
        model, processor = load_labeler(folder, "cuda" if torch.cuda.is_available() else "cpu")
        model.config.maps = maps or model.config.maps
        for row in measure(model, processor, rows, recipe["masks"], steps, arguments.confidence):
            figures = "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{value:8s}" for key, value in row.items()
            )
            print(f"{cam}  {figures}", flush=True)


if __name__ == "__main__":
    main()
