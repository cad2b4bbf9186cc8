"""Stage 2: tagged images and a CAM classifier → the same data set with pseudo masks."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from ..data.export import check_free, export_coco, export_voc, require_pycocotools
from ..data.palette import mask_image
from ..data.tagged import class_names, decode_mask, encode_png, undecoded
from ..models.modeling_cam import CamClassifier
from ..pseudo_labels.label_images import Labelled, label_images, load_labeler
from ..pseudo_labels.threshold import AUTO, with_threshold
from .cache import StageOutput, write_atomically
from .evaluate import check_names
from .shards import compute_shards

SUMMARY_FILE = "summary.json"
_COLUMNS = ("pseudo_mask", "confidence")


def make_masks(
    data: DatasetDict,
    cam: str | os.PathLike,
    recipe: dict,
    out: str | os.PathLike,
    data_settings: dict | None = None,
    hub_kwargs: dict | None = None,
    quiet: bool = False,
) -> Path:
    """Write `data` with a column `pseudo_mask`, and `confidence` if wanted, in split "train".

    True masks are never read. Old columns of these names are replaced.

    The images are split into shards, the shards over the processes of `accelerate launch`. A finished shard is never
    made again, so a killed run goes on where it was.

    Args:
        data: tagged images.
        cam: a trained CAM classifier, a directory or Hub id.
        recipe: a resolved recipe; its `masks` section is used.
        out: folder of the data set; as for `train_cam`.

    Returns:
        `out`, loadable by `datasets.load_from_disk`; masks are palette PNGs, 0 = background, 255 = ignore. Confidence
        is 0..255 for 0..1, see [`Labelled`]. `summary.json` is read by `read_summary`; `steps/` has the maps, trimaps
        and alphas of the first `masks.keep` rows, by row and class index.

    Raises:
        DataError: the classifier has other classes than the data.
    """
    settings = {"stage": "make-masks", "data": data_settings, "seed": recipe["seed"]}
    settings |= {"cam": str(cam), "masks": recipe["masks"]}
    output = StageOutput(out, settings)
    if output.done:
        return output.path
    output.begin()
    state, rows, steps = PartialState(), data["train"], output.partial / "steps"
    with output.nothing_left_behind():
        model, processor = load_labeler(str(cam), state.device, **(hub_kwargs or {}))
        check_names(model, class_names(rows), "classifier")
        if recipe["masks"]["background_threshold"] == AUTO and state.is_main_process and not quiet:
            print("masks: looking for the background threshold in the maps", file=sys.stderr)
        masks = with_threshold(model, processor, rows, recipe["masks"])
        columns = _COLUMNS if masks["confidence"] else _COLUMNS[:1]
        features = Features({name: ImageFeature() for name in columns} | {"fallbacks": Value("string")})  # as JSON
        kept = {image_id: row for row, image_id in enumerate(rows["image_id"][: masks["keep"]])}
        compute = partial(_encoded, model, processor, settings=masks, kept=kept, steps=steps)
        shards, size = output.partial / "masks", masks["shard_size"]
        made = compute_shards(compute, rows, features, shards, size, "masks", quiet)
    if state.is_main_process:
        rows = rows.remove_columns([name for name in _COLUMNS if name in rows.column_names])
        labelled = concatenate_datasets([rows, made.remove_columns("fallbacks")], axis=1)
        result = output.partial / "result"
        DatasetDict({**data, "train": labelled}).save_to_disk(result)
        if steps.is_dir():
            shutil.copytree(steps, result / "steps")
        threshold = masks["background_threshold"]
        fallbacks = sum((Counter(json.loads(counts)) for counts in made["fallbacks"]), Counter())
        summary = {"background_threshold": threshold, "images": len(rows)}
        summary["fallbacks"] = dict(sorted(fallbacks.items()))
        write_atomically(result / SUMMARY_FILE, json.dumps(summary, indent=1))
        output.finish(result)
        if not quiet:
            taken = ", ".join(f"{name} {count}" for name, count in summary["fallbacks"].items()) or "none"
            print(f"masks: background threshold {threshold}, {len(rows)} images, fallbacks: {taken}", file=sys.stderr)
    state.wait_for_everyone()
    return output.path


def read_summary(masks: str | os.PathLike) -> dict:
    """What `make_masks` did: `background_threshold`, `images`, and `fallbacks` by name."""
    return json.loads((Path(masks) / SUMMARY_FILE).read_text())


def export_masks(
    masks: str | os.PathLike, voc: str | os.PathLike | None = None, coco: str | os.PathLike | None = None
) -> None:
    """Write the pseudo masks that `make_masks` made for other programs.

    Args:
        masks: what `make_masks` returned.
        voc: folder for palette PNGs in VOC's layout, see [`export_voc`].
        coco: file for COCO-JSON, see [`export_coco`].

    Raises:
        DataError: one of them exists, or an image_id is no file name.
    """
    if not PartialState().is_main_process or (voc is None and coco is None):
        return
    rows = load_from_disk(str(masks))["train"]
    if voc is not None:
        export_voc(voc, _pseudo_masks(rows), class_names(rows))
    if coco is not None:
        export_coco(coco, _pseudo_masks(rows), class_names(rows))


def check_exports(voc: str | os.PathLike | None = None, coco: str | os.PathLike | None = None) -> None:
    """What would stop `export_masks`, known before hours of work.

    Raises:
        DataError: one of them exists, or COCO-JSON needs what is not installed.
    """
    if voc is not None:
        check_free(voc, "--export-voc")
    if coco is not None:
        check_free(coco, "--export-coco")
        require_pycocotools()


def _pseudo_masks(rows: Dataset) -> Iterator[tuple[str, np.ndarray]]:
    for row in undecoded(rows.select_columns(["image_id", "pseudo_mask"])):
        yield row["image_id"], decode_mask(row["pseudo_mask"], f"row {row['image_id']!r}, column pseudo_mask")


def _encoded(
    model: CamClassifier, processor, rows: Dataset, settings: dict, kept: dict[str, int], steps: Path
) -> Iterator[tuple[int, dict]]:
    """What the columns hold for each of `rows`; writes the steps of those whose image_id is in `kept`."""
    ids = rows["image_id"][:]
    for labelled in label_images(model, processor, rows, settings):
        values = {
            "pseudo_mask": encode_png(mask_image(labelled.pseudo_mask)),
            "fallbacks": json.dumps(labelled.note.fallbacks),
        }
        if settings["confidence"]:
            levels = (255 * labelled.confidence).round().astype(np.uint8)
            values["confidence"] = encode_png(Image.fromarray(levels))
        if ids[labelled.index] in kept:
            _keep_steps(steps, kept[ids[labelled.index]], labelled)
        yield labelled.index, values


def _keep_steps(folder: Path, row: int, labelled: Labelled) -> None:
    """Write `<row>_<class index>_<step>.png`: the class's map and what refinement noted, as grey pictures."""
    folder.mkdir(exist_ok=True)
    pictures = {"map": (255 * labelled.maps).round().astype(np.uint8)} | labelled.note.pictures
    for step, planes in pictures.items():
        for label, plane in zip(labelled.classes, planes, strict=True):
            Image.fromarray(plane).save(folder / f"{row:06d}_{label:03d}_{step}.png")
