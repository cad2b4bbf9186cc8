"""Stage 2: tagged images and a CAM classifier → the same data set with pseudo masks."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_from_disk
from datasets import Image as ImageFeature

from ..data.export import check_free, export_coco, export_voc, require_pycocotools
from ..data.palette import mask_image
from ..data.tagged import class_names, decode_mask, undecoded
from ..labeling.pseudo_masks import label_images, load_labeler
from ..training.progress import Progress
from .outputs import StageOutput


def make_masks(
    data: DatasetDict,
    cam: str | os.PathLike,
    recipe: dict,
    out: str | os.PathLike,
    data_settings: dict | None = None,
    hub_kwargs: dict | None = None,
    quiet: bool = False,
) -> Path:
    """Write `data` with a column `pseudo_mask` in split "train"; true masks are never read.

    The images are split into shards, the shards over the processes of `accelerate launch`. A finished shard is never
    made again, so a killed run goes on where it was.

    Args:
        data: tagged images.
        cam: a trained CAM classifier, a directory or Hub id.
        recipe: a resolved recipe; its `masks` section is used.
        out: folder of the data set; as for `train_cam`.

    Returns:
        `out`, loadable by `datasets.load_from_disk`; masks are palette PNGs, 0 = background, 255 = ignore.
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
        shards = _label_shards(data["train"], cam, recipe["masks"], output.partial, state, hub_kwargs or {}, quiet)
    state.wait_for_everyone()
    if state.is_main_process:
        pseudo = Dataset.from_parquet([str(path) for path in shards], cache_dir=str(output.partial / "cache"))
        rows = data["train"]
        train = rows.remove_columns("pseudo_mask") if "pseudo_mask" in rows.column_names else rows
        labelled = concatenate_datasets([train, pseudo.select_columns("pseudo_mask")], axis=1)
        result = output.partial / "result"
        DatasetDict({**data, "train": labelled}).save_to_disk(result)
        output.finish(result)
    state.wait_for_everyone()
    return output.path


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
) -> list[Path]:
    """Write this process's shards, but those that are there; returns the paths of all shards, in order."""
    model, processor = load_labeler(str(cam), state.device, **hub_kwargs)
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
            masks: list[bytes] = [b""] * len(shard)
            for labelled in label_images(model, processor, shard, settings):
                masks[labelled.index] = encode_mask(labelled.pseudo_mask)
                progress.advance(1)
            _write_shard(path, shard["image_id"], masks)
    return shards


def encode_mask(labels: np.ndarray) -> bytes:
    """Label map (H, W) uint8 → palette PNG."""
    buffer = io.BytesIO()
    mask_image(labels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_shard(path: Path, image_ids: list[str], masks: list[bytes]) -> None:
    features = Features({"image_id": Value("string"), "pseudo_mask": ImageFeature()})
    pictures = [{"bytes": mask, "path": None} for mask in masks]
    fresh = path.with_suffix(".new")
    Dataset.from_dict({"image_id": image_ids, "pseudo_mask": pictures}, features=features).to_parquet(fresh)
    os.replace(fresh, path)
