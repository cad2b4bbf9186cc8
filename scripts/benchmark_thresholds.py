"""The threshold that `masks.background_threshold: auto` finds, against the best one that true masks would choose.

For every classifier: both thresholds and their mean IoU on the images of split "train" that have a mask, for the plain
maps and, with --refine, for refined ones; beside it the share of the best that 0.4 would reach. With --confidence also
how well the confidence of a pixel separates correct from wrong labels (area under the ROC curve), against the absolute
margin. The masks serve the measuring only.

    python scripts/benchmark_thresholds.py --data toy --recipe toy runs/demo/cam
    python scripts/benchmark_thresholds.py --data voc --root VOCdevkit/VOC2012 --classes cat,cow a/cam b/cam:icd
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

import numpy as np
import torch
from scipy.stats import rankdata

from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import class_names, decode_mask, undecoded
from wsss_hf.inference.cam_maps import label_confidence, label_map
from wsss_hf.inference.load import load_labeler
from wsss_hf.metrics.mean_iou import MeanIoU
from wsss_hf.models.background_threshold import THRESHOLDS
from wsss_hf.models.maps import IGNORE_INDEX, add_background
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.pseudo_labels.threshold import auto_threshold
from wsss_hf.recipes import Recipe
from wsss_hf.refinement.steps import build_refinement
from wsss_hf.settings import MasksSettings
from wsss_hf.stages.evaluate import rows_with


def area_under_curve(scores: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right pixel has a higher score than a wrong one."""
    hits = right.sum()
    return (rankdata(scores)[right].sum() - hits * (hits + 1) / 2) / max(1, hits * (len(right) - hits))


def measure(model, processor, rows, settings: MasksSettings, steps: dict[str, list], confidence: bool) -> list[dict]:
    """One row per entry of `steps`, the steps of refinement."""
    names = class_names(rows)
    metrics = {(name, t): MeanIoU(["background", *names]) for name in steps for t in THRESHOLDS}
    chains = {name: build_refinement(chain) for name, chain in steps.items()}
    found = {
        name: auto_threshold(model, processor, rows, replace(settings, refine=chain)) for name, chain in steps.items()
    }
    certainty: dict[str, list[list[np.ndarray]]] = {name: [] for name in steps}
    masks = undecoded(rows.select_columns(["image_id", "mask"]))
    for labelled in label_images(model, processor, rows, replace(settings, background_threshold=0.5, refine=[])):
        truth = decode_mask(masks[labelled.index]["mask"], masks[labelled.index]["image_id"])
        maps, classes = torch.from_numpy(labelled.maps)[None], torch.from_numpy(labelled.classes)
        for (name, threshold), metric in metrics.items():
            refined = chains[name](add_background(maps, threshold)[0], np.asarray(labelled.image))
            labels = label_map(refined, classes)
            metric.add(prediction=labels, reference=truth)
            if confidence and threshold == found[name] and len(classes):
                relative = label_confidence(refined, labels, classes)
                top = refined.topk(2, dim=0).values
                counted = truth != IGNORE_INDEX
                right = labels.numpy()[counted] == truth[counted]
                differences = [values.numpy()[counted] for values in (relative, top[0] - top[1])]
                certainty[name].append([right, *differences])
    results = []
    for name in steps:
        means = {threshold: metrics[name, threshold].compute()["mean_iou"] for threshold in THRESHOLDS}
        best = max(means, key=lambda threshold: means[threshold])
        result = {"maps": name, "auto": found[name], "at auto": means[found[name]], "best": best}
        result |= {"at best": means[best], "ratio": means[found[name]] / means[best], "0.4": means[0.4] / means[best]}
        if confidence:
            right, ratios, margins = (np.concatenate(parts) for parts in zip(*certainty[name], strict=True))
            result |= {"confidence": area_under_curve(ratios, right), "margin": area_under_curve(margins, right)}
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
    parser.add_argument("--refine", nargs="+", default=[], choices=("pamr", "crf"), help="each by itself")
    parser.add_argument("--confidence", action="store_true")
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.recipe)
    toy = asdict(recipe.toy) if arguments.data == "toy" else None
    classes = arguments.classes.split(",") if arguments.classes else None
    data = load_data(arguments.data, root=arguments.root, classes=classes, toy=toy)
    rows = rows_with(data["train"], "mask")
    if arguments.images is not None:
        rows = rows.select(np.unique(np.linspace(0, len(rows) - 1, arguments.images).astype(int)))
    steps = {"plain": []} | {f"+ {name}": [name] for name in arguments.refine}
    for cam in arguments.cams:
        folder, _, maps = cam.partition(":")
        model, processor = load_labeler(folder, "cuda" if torch.cuda.is_available() else "cpu")
        model.config.maps = maps or model.config.maps
        for row in measure(model, processor, rows, recipe.masks, steps, arguments.confidence):
            figures = "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{value:8s}" for key, value in row.items()
            )
            print(f"{cam}  {figures}", flush=True)


if __name__ == "__main__":
    main()
