"""Stage 2: tagged images and a CAM classifier → the same data set with pseudo masks."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from ..data.export import check_free, export_coco, export_voc, require_pycocotools
from ..data.palette import mask_image
from ..data.tagged import class_names, decode_mask, undecoded
from ..labeling.auto_threshold import with_threshold
from ..labeling.pseudo_masks import Labelled, label_images, load_labeler
from ..training.progress import Progress
from .outputs import StageOutput, write_atomically

SUMMARY_FILE = "summary.json"


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
    """
    settings = {"stage": "make-masks", "data": data_settings, "seed": recipe["seed"]}
    settings |= {"cam": str(cam), "masks": recipe["masks"]}
    output = StageOutput(out, settings)
    if output.done:
        return output.path
    state = PartialState()
    state.wait_for_everyone()  # all have looked at the folder before one writes to it
    if state.is_main_process:
        output.begin()
    state.wait_for_everyone()
    with output.nothing_left_behind():
        shards, threshold = _label_shards(
            data["train"], cam, recipe["masks"], output.partial, state, hub_kwargs or {}, quiet
        )
    state.wait_for_everyone()
    if state.is_main_process:
        pseudo = Dataset.from_parquet([str(path) for path in shards], cache_dir=str(output.partial / "cache"))
        rows, made = data["train"], [name for name in ("pseudo_mask", "confidence") if name in pseudo.column_names]
        rows = rows.remove_columns([name for name in ("pseudo_mask", "confidence") if name in rows.column_names])
        labelled = concatenate_datasets([rows, pseudo.select_columns(made)], axis=1)
        result = output.partial / "result"
        DatasetDict({**data, "train": labelled}).save_to_disk(result)
        if (output.partial / "steps").is_dir():
            shutil.copytree(output.partial / "steps", result / "steps")
        summary = _summary(shards, threshold, len(rows))
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


def _summary(shards: list[Path], threshold: float, images: int) -> dict:
    fallbacks = sum((Counter(json.loads(path.with_suffix(".json").read_text())) for path in shards), Counter())
    return {"background_threshold": threshold, "images": images, "fallbacks": dict(sorted(fallbacks.items()))}


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


def _label_shards(
    rows: Dataset, cam, settings: dict, partial: Path, state: PartialState, hub_kwargs: dict, quiet: bool
) -> tuple[list[Path], float]:
    """Write this process's shards, but those that are there.

    Returns:
        the paths of all shards, in order; beside each lies a JSON of its fallbacks. And the background threshold.
    """
    model, processor = load_labeler(str(cam), state.device, **hub_kwargs)
    settings = with_threshold(model, processor, rows, settings)
    size = settings["shard_size"]
    folder = partial / "shards"
    folder.mkdir(exist_ok=True)
    shards = [folder / f"{start:08d}.parquet" for start in range(0, len(rows), size)]
    mine = shards[state.process_index :: state.num_processes]
    ranges = {path: range(int(path.stem), min(int(path.stem) + size, len(rows))) for path in mine}
    finished = [path for path in mine if path.exists()]
    total = sum(map(len, ranges.values()))
    with Progress("masks", total, quiet or not state.is_main_process, unit="image") as progress:
        progress.advance(sum(len(ranges[path]) for path in finished))
        for path in mine:
            if path in finished:
                continue
            shard = rows.select(ranges[path])
            columns = {"image_id": shard["image_id"][:], "pseudo_mask": [b""] * len(shard)}
            if settings["confidence"]:
                columns["confidence"] = [b""] * len(shard)
            fallbacks: Counter = Counter()
            for labelled in label_images(model, processor, shard, settings):
                columns["pseudo_mask"][labelled.index] = _png(mask_image(labelled.pseudo_mask))
                if settings["confidence"]:
                    levels = (255 * labelled.confidence).round().astype(np.uint8)
                    columns["confidence"][labelled.index] = _png(Image.fromarray(levels))
                fallbacks += labelled.note.fallbacks
                row = ranges[path][labelled.index]
                if row < settings["keep"]:
                    _keep_steps(partial / "steps", row, labelled)
                progress.advance(1)
            write_atomically(path.with_suffix(".json"), json.dumps(fallbacks))
            _write_shard(path, columns)
    return shards, settings["background_threshold"]


def _keep_steps(folder: Path, row: int, labelled: Labelled) -> None:
    """Write `<row>_<class index>_<step>.png`: the class's map and what refinement noted, as grey pictures."""
    folder.mkdir(exist_ok=True)
    pictures = {"map": (255 * labelled.maps).round().astype(np.uint8)} | labelled.note.pictures
    for step, planes in pictures.items():
        for label, plane in zip(labelled.classes, planes, strict=True):
            Image.fromarray(plane).save(folder / f"{row:06d}_{label:03d}_{step}.png")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _write_shard(path: Path, columns: dict[str, list]) -> None:
    pictures = {
        name: [{"bytes": picture, "path": None} for picture in values]
        for name, values in columns.items()
        if name != "image_id"
    }
    features = Features({"image_id": Value("string")} | {name: ImageFeature() for name in pictures})
    fresh = path.with_suffix(".new")
    Dataset.from_dict({"image_id": columns["image_id"]} | pictures, features=features).to_parquet(fresh)
    os.replace(fresh, path)
