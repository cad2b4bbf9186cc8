"""The whole way on the embedded data, beside plain CAM and full supervision for scale."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time

from datasets import DatasetDict, load_from_disk

from ..data.tagged import decode_image, undecoded
from .make_masks import make_masks
from .run import check_run_folder, finish_run, maps_row, masks_row, segmenter_row, self_train
from .train_cam import train_cam
from .train_refiner import train_refiner
from .train_segmenter import train_segmenter

# What the last line of the demo runs: a stranger's program, in a process of its own.
_PIPELINE_PROGRAM = """
import json, sys
import wsss_hf
from transformers import logging, pipeline
logging.set_verbosity_error()
logging.disable_progress_bar()
segments = pipeline("image-segmentation", model=sys.argv[1])(sys.argv[2])
print(json.dumps([segment["label"] for segment in segments]))
"""


def demo(
    data: DatasetDict, recipe: dict, out: str | os.PathLike, data_settings: dict | None = None, quiet: bool = False
) -> list[dict]:
    """Run all stages on `data`; beside them plain CAM and a fully supervised segmenter, for scale; report, load, try.

    Writes what `run` writes, and `supervised/`; `plain_cam/` too, where the recipe has methods to compare with.
    """
    out = check_run_folder(out)
    common = {"data_settings": data_settings, "quiet": quiet}
    plain = copy.deepcopy(recipe)
    plain["cam"] |= {"methods": {}, "maps": "cam"}
    plain["masks"]["refine"] = []
    started = time.perf_counter()
    cam = train_cam(data, recipe, out / "cam", **common)
    plain_cam = train_cam(data, plain, out / "plain_cam", **common) if recipe["cam"]["methods"] else cam
    labeler = train_refiner(data, cam, recipe, out / "refiner", **common) if recipe["refiner"]["use"] else cam
    masks = make_masks(data, labeler, recipe, out / "masks", **common)
    labelled = load_from_disk(str(masks))
    segmenter = train_segmenter(labelled, recipe, out / "segmenter", cam=cam, **common)
    last, more_rows = self_train(labelled, segmenter, recipe, out, cam, **common)
    supervised = train_segmenter(data, recipe, out / "supervised", mask_column="mask", cam=cam, **common)
    steps = [
        *recipe["cam"]["methods"],
        *["refiner"] * recipe["refiner"]["use"],
        *(next(iter(step)) if isinstance(step, dict) else step for step in recipe["masks"]["refine"]),
    ]
    rows = [
        maps_row("pseudo masks, plain CAM", plain_cam, data, plain, quiet),
        masks_row(f"pseudo masks, {' + '.join(['CAM', *(step.upper() for step in steps)])}", labelled, quiet),
        segmenter_row("segmenter trained on pseudo masks", segmenter, data, recipe, quiet),
        *more_rows,
        segmenter_row("segmenter trained on true masks", supervised, data, recipe, quiet),
    ]
    minutes = (time.perf_counter() - started) / 60
    finish_run(out, rows, data, labeler, last, recipe, data_settings, minutes, quiet, command="demo")

    picture = out / "example.png"
    decode_image(undecoded(data["val"])[0]["image"], "first image of split 'val'").save(picture)
    command = [sys.executable, "-c", _PIPELINE_PROGRAM, str(last), str(picture)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f'pipeline("image-segmentation", model="{last}") finds in {picture}: {", ".join(found)}')
    return rows
