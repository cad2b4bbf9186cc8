"""Stage 2: tagged images and a CAM classifier → the same data set with pseudo masks."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from ..data.export import check_free, export_coco, export_voc, require_pycocotools
from ..data.saliency import check_saliency, describe_saliency
from ..data.saving import save_data
from ..data.streams import sample_of
from ..data.tagged import DataError, check_names, class_names, decode_mask, encode_png, source_of, undecoded
from ..files import whole_file
from ..inference.load import load_labeler
from ..models.label_colors import mask_image
from ..models.modeling_cam import CamClassifier
from ..progress import is_quiet
from ..pseudo_labels.affinity_labels import walk_models, with_affinity
from ..pseudo_labels.label_images import Labelled, build_rules, label_images
from ..pseudo_labels.rules import columns_to_read, reads_background
from ..pseudo_labels.threshold import thresholds_of, with_threshold
from ..recipes import Recipe, check_inputs
from ..settings import AUTO, MasksSettings
from .cache import Record, StageOutput, embedding, write_atomically
from .fingerprint import data_fingerprint, digest, model_fingerprint, row_fingerprints, rows_fingerprint
from .lock import locked, partial_of
from .moved import follow_moved_images
from .results import SUMMARY_FILE, LabelledData
from .shards import compute_shards

VERSION = 7
_COLUMNS = ("pseudo_mask", "confidence")


def make_masks(
    data: DatasetDict,
    cam: str | os.PathLike,
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    affinity: str | os.PathLike | None = None,
    embed_images: bool = False,
    force: bool = False,
) -> LabelledData:
    """Write `data` with a column `pseudo_mask`, and `confidence` if wanted, in split "train".

    True masks are never read. Old columns of these names are replaced.

    The images are split into shards, the shards over the processes of `accelerate launch`. A finished shard is used
    again for the very images, tags, classifier and settings it was made from.

    Of a stream (see [`load_stream`]) the folder holds image_id, tags and the masks alone, beside whose rows the stream
    is read again, unless `embed_images` asks for all its columns. Thresholds that the recipe leaves open are found on
    [`sample_of`] it.

    Args:
        data: tagged images, also as a stream.
        cam: a trained CAM classifier or map refiner, a directory or Hub id.
        recipe: its `masks` section is used.
        out: folder of the data set, as for [`train_cam`].
        affinity: an affinity network, a directory or Hub id, for steps `walk` of `masks.refine` that name none.
        embed_images: copy the images into the data set, see [`save_data`].
        force: make the masks again whatever is there.

    Returns:
        the data set, loadable by `datasets.load_from_disk(out)` as well; masks are palette PNGs, 0 = background,
        c + 1 = class c, 255 = ignore. Confidence is 0..255 for 0..1, see [`Labelled`]. `steps/` has the maps, trimaps
        and alphas of the first `masks.keep` rows, by row and class index.

    Raises:
        DataError: the classifier has other classes than the data, a column that the label rule needs is missing, or
            two rows of a stream have one image_id: known before where its first rows show it, else at the end.
    """
    check_inputs(data, recipe)
    rows, settings = data["train"], recipe.masks
    is_streamed = isinstance(rows, IterableDataset)
    if is_streamed:
        fingerprints = [data_fingerprint(data, ())]
        inputs = {"data": fingerprints[0]}
    else:
        columns = columns_to_read(settings, rows)
        fingerprints = row_fingerprints(rows, columns)
        inputs = {"data": rows_fingerprint(rows, columns, fingerprints)}
    inputs["cam"] = model_fingerprint(cam)
    for number, name in enumerate(dict.fromkeys(name or affinity for name in walk_models(settings))):
        if name is not None:
            inputs[f"affinity-{number}" if number else "affinity"] = model_fingerprint(name)
    settled = {"masks": settings} | embedding(embed_images)
    output = StageOutput(out, Record("make-masks", VERSION, settled, inputs, source_of(data)), force)
    settings = with_affinity(settings, affinity)
    if output.done:
        return LabelledData(output.path) if is_streamed else follow_moved_images(output, data, _COLUMNS)
    known = rows
    if is_streamed:
        known = _checked_sample(rows)
        columns = columns_to_read(settings, known)
    state = PartialState()
    with output.working() as folder:
        model, processor = load_labeler(os.fspath(cam), state.device, optimize=settings.optimize)
        check_names(model, class_names(rows), "classifier")
        is_searched = settings.background_threshold == AUTO and reads_background(settings, known)
        if is_searched and state.is_main_process and not is_quiet():
            print("masks: searching the background threshold on the maps", file=sys.stderr)
        settings = with_threshold(model, processor, known, settings)
        names = _COLUMNS if settings.confidence else _COLUMNS[:1]
        features = Features({name: ImageFeature() for name in names} | {"fallbacks": Value("string")})  # as JSON
        first = itertools.islice(rows.select_columns(["image_id"]), settings.keep)
        kept = {row["image_id"]: number for number, row in enumerate(first)}
        rules = build_rules(settings)
        thresholds = thresholds_of(settings)
        models = [value for name, value in inputs.items() if name != "data"]
        key, shards = digest([*models, json.dumps(thresholds)]), folder / "shards"
        steps = folder / "steps" / key  # of these very thresholds, as the shards
        compute = partial(
            _encoded, model, processor, columns=columns, settings=settings, rules=rules, kept=kept, steps=steps
        )
        size = settings.shard_size
        others = [name for name in rows.features if name not in _COLUMNS]
        beside = [] if not is_streamed else others if embed_images else ["image_id", "tags"]
        with rules[0]:  # which may own worker processes
            made = compute_shards(compute, rows, fingerprints, features, shards, size, "masks", key, beside)
        if state.is_main_process:
            if is_streamed:
                _check_ids(made["image_id"])
            labelled, result = made.remove_columns("fallbacks"), folder / "result"
            if not is_streamed:
                labelled = concatenate_datasets([rows.select_columns(others), labelled], axis=1)
            save_data(DatasetDict({**({} if is_streamed else data), "train": labelled}), result, embed_images)
            if steps.is_dir():
                shutil.copytree(steps, result / "steps")
            fallbacks = sum((Counter(json.loads(counts)) for counts in made["fallbacks"]), Counter())
            summary: dict[str, Any] = thresholds | {"images": len(labelled)}
            if "saliency" in columns:
                summary["saliency"] = describe_saliency(source_of(data).get("saliency"))
            summary["fallbacks"] = dict(sorted(fallbacks.items()))
            write_atomically(result / SUMMARY_FILE, json.dumps(summary, indent=1))
            output.finish(result)
            _print_summary(summary)
    state.wait_for_everyone()
    return LabelledData(output.path)


def _checked_sample(rows: IterableDataset) -> Dataset:
    """Some rows of a stream, the first ones of its shards.

    Raises:
        DataError: there is none, or masks can't be found by their image_id.
    """
    sample = sample_of(rows)
    _check_ids(sample["image_id"])
    return sample


def _check_ids(image_ids: Iterable[str]) -> None:
    twice = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if twice:
        raise DataError(
            f"stream: expected an image_id that no other row has, got {twice[0]!r} twice (map a column of names to "
            "image_id)"
        )


def _print_summary(summary: dict) -> None:
    if not is_quiet():
        taken = ", ".join(f"{name} {count}" for name, count in summary["fallbacks"].items()) or "none"
        found = [f"{name.replace('_', ' ')} {summary[name]}" for name in summary if name.endswith("_threshold")]
        parts = [*found, f"{summary['images']} images", f"fallbacks: {taken}"]
        print(f"masks: {', '.join(parts)}", file=sys.stderr)
        if "saliency" in summary:
            print(f"masks: with {summary['saliency']}", file=sys.stderr)


def export_masks(
    masks: LabelledData, voc: str | os.PathLike | None = None, coco: str | os.PathLike | None = None
) -> None:
    """Write pseudo masks for other programs.

    Args:
        masks: what [`make_masks`] returned.
        voc: folder for palette PNGs in VOC's layout, see [`export_voc`].
        coco: file for COCO-JSON, see [`export_coco`].

    Raises:
        DataError: one of them exists, or an image_id is no file name.
        OutputError: another run writes to `voc`.
    """
    if not PartialState().is_main_process or (voc is None and coco is None):
        return
    rows = masks.data["train"]
    if voc is not None:
        with locked(partial_of(voc), "--export-voc"):
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
    model: CamClassifier,
    processor,
    rows: Dataset,
    columns: list[str],
    settings: MasksSettings,
    rules: tuple,
    kept: dict[str, int],
    steps: Path,
) -> Iterator[tuple[int, dict]]:
    """What the new columns hold for each of `rows`, of which `columns` are read; writes the steps of those whose
    image_id is in `kept`."""
    rows, ids = rows.select_columns(columns), rows["image_id"][:]
    if "saliency" in columns:
        check_saliency(rows, f"masks.seeds: {settings.seeds}")  # that of a stream is not known before
    for labelled in label_images(model, processor, rows, settings, rules):
        values = {
            "pseudo_mask": encode_png(mask_image(labelled.pseudo_mask)),
            "fallbacks": json.dumps(labelled.note.fallbacks),
        }
        if settings.confidence:
            levels = (255 * labelled.confidence).round().astype(np.uint8)
            values["confidence"] = encode_png(Image.fromarray(levels))
        if ids[labelled.index] in kept:
            _keep_steps(steps, kept[ids[labelled.index]], labelled)
        yield labelled.index, values


def _keep_steps(folder: Path, row: int, labelled: Labelled) -> None:
    """Write `<row>_<class index>_<step>.png`: the class's map and what refinement noted, as grey pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"map": (255 * labelled.maps).round().astype(np.uint8)} | labelled.note.pictures
    for step, planes in pictures.items():
        for label, plane in zip(labelled.classes, planes, strict=True):
            with whole_file(folder / f"{row:06d}_{label:03d}_{step}.png") as unfinished:
                Image.fromarray(plane).save(unfinished, format="PNG")
