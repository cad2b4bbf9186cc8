"""All stages on generated images, beside plain CAM and full supervision for scale."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from datasets import DatasetDict

from ..data.tagged import decode_image, undecoded
from ..recipes import Recipe
from .evaluate import maps_row, masks_row, segmenter_row
from .lock import only_run
from .make_masks import make_masks
from .results import RunResult
from .run import check_recipe, check_run_folder, self_train, write_results
from .train_affinity import affinity_of_run
from .train_cam import train_cam
from .train_refiner import train_refiner
from .train_segmenter import train_segmenter

# What the last line of the demo runs: a program of somebody else, in a process of its own.
_PIPELINE_PROGRAM = """
import json, sys
import wsss_hf
from transformers import logging, pipeline
logging.set_verbosity_error()
logging.disable_progress_bar()
segments = pipeline("image-segmentation", model=sys.argv[1])(sys.argv[2])
print(json.dumps([segment["label"] for segment in segments]))
"""


def demo(data: DatasetDict, recipe: Recipe, out: str | os.PathLike, *, force: bool = False) -> RunResult:
    """Run all stages on `data`; beside them plain CAM and a fully supervised segmenter, for scale; report, load, try.

    Writes what [`run`] writes, and `supervised/`; `plain_cam/` too, where the recipe has methods to compare with.
    """
    out = check_run_folder(out)
    check_recipe(data, recipe)
    with only_run(out):
        return _demo(data, recipe, out, force)


def _demo(data: DatasetDict, recipe: Recipe, out: Path, force: bool) -> RunResult:
    plain = recipe.changed("cam.maps=cam", *(f"cam.methods.{name}=null" for name in recipe.cam.methods))
    plain = plain.changed("masks.refine=[]")
    cam = train_cam(data, recipe, out / "cam", force=force)
    plain_cam = train_cam(data, plain, out / "plain_cam", force=force) if recipe.cam.methods else cam
    refiner = train_refiner(data, cam, recipe, out / "refiner", force=force) if recipe.refiner.use else None
    affinity = affinity_of_run(data, refiner or cam, recipe, out / "affinity", force=force)
    masks = make_masks(data, refiner or cam, recipe, out / "masks", affinity=affinity, force=force)
    segmenter = train_segmenter(masks.data, recipe, out / "segmenter", cam=cam, force=force)
    steps = [
        *recipe.cam.methods,
        *(["refiner"] if refiner else []),
        *(next(iter(step)) if isinstance(step, dict) else step for step in recipe.masks.refine),
    ]
    protocol = recipe.evaluation
    rows = [
        maps_row("pseudo masks, plain CAM", plain_cam, data, plain.masks),
        masks_row(
            f"pseudo masks, {' + '.join(['CAM', *(step.upper().replace('_', ' ') for step in steps)])}", masks.data
        ),
        segmenter_row("segmenter trained on pseudo masks", segmenter, data, protocol),
    ]
    result = self_train(data, RunResult(out, cam, refiner, affinity, masks, segmenter, rows), recipe, force=force)
    supervised = train_segmenter(data, recipe, out / "supervised", mask_column="mask", cam=cam, force=force)
    last = segmenter_row("segmenter trained on true masks", supervised, data, protocol)
    result = dataclasses.replace(result, results=[*result.results, last])
    beside = ("supervised", *(["plain_cam"] if recipe.cam.methods else []))
    write_results(result, data, recipe, command="demo", beside=beside)

    picture = out / "example.png"
    decode_image(undecoded(data["val"])[0]["image"], "first image of split 'val'").save(picture)
    command = [sys.executable, "-c", _PIPELINE_PROGRAM, str(result.segmenter), str(picture)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f'pipeline("image-segmentation", model="{result.segmenter}") finds in {picture}: {", ".join(found)}')
    return result
