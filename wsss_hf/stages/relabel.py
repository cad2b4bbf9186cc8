"""Self-training: a segmenter relabels the tagged images, for the next segmenter to learn from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from functools import partial

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from ..data.saving import save_data
from ..data.tagged import check_classes, encode_png, source_of
from ..inference.load import load_segmenter
from ..models.label_colors import mask_image
from ..pseudo_labels.area_prior import background_factor, labelled_objects
from ..pseudo_labels.self_training import relabel_images
from ..recipes import Recipe, check_inputs
from ..settings import SelfTrainingSettings
from .cache import Record, StageOutput, embedding
from .fingerprint import digest, model_fingerprint, row_fingerprints, rows_fingerprint
from .moved import follow_moved_images
from .results import LabelledData
from .shards import compute_shards

VERSION = 3
_AREA_IMAGES = 96
_FEATURES = Features({"pseudo_mask": ImageFeature(), "confidence": ImageFeature()})


def relabel(
    data: DatasetDict,
    segmenter: str | os.PathLike,
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    embed_images: bool = False,
    force: bool = False,
) -> LabelledData:
    """Write `data` with new columns `pseudo_mask` and `confidence` in split "train"; true masks are never read.

    Args:
        data: tagged images; where they have pseudo masks, the new ones cover as much, unless the recipe says no.
        segmenter: a trained segmenter, a directory or Hub id.
        recipe: its `self_training` section is used, but for the number of rounds; a window that is null there is that
            of its `evaluation` section.
        out: folder of the data set, as for [`train_cam`].
        embed_images: copy the image files into the data set, see [`save_data`].
        force: relabel whatever is there.

    Returns:
        the data set; masks are palette PNGs, 0 = background, 255 = ignore, confidence is grey, 255 = certain.

    Raises:
        DataError: the segmenter has other classes than the data.
    """
    check_inputs(data, recipe)
    rows = data["train"]
    settings = dataclasses.replace(recipe.self_training, rounds=1)
    if settings.window is None:
        protocol = recipe.evaluation
        settings = dataclasses.replace(settings, window=protocol.window, window_stride=protocol.window_stride)
    keeps_area = settings.keep_area and "pseudo_mask" in rows.column_names
    columns = ["image_id", "tags", "image", *(["pseudo_mask"] if keeps_area else [])]
    fingerprints = row_fingerprints(rows, columns)
    inputs = {"data": rows_fingerprint(rows, columns, fingerprints), "segmenter": model_fingerprint(segmenter)}
    settled = {"self_training": settings} | embedding(embed_images)
    output = StageOutput(out, Record("relabel", VERSION, settled, inputs, source_of(data)), force)
    if output.done:
        return follow_moved_images(output, data, _FEATURES)
    state = PartialState()
    with output.working() as folder:
        model, processor = load_segmenter(os.fspath(segmenter), state.device)
        check_classes(model, rows)
        factor = 1.0
        if keeps_area:
            some = labelled_objects(rows, "pseudo_mask", num_images=_AREA_IMAGES)
            factor = background_factor(model, processor, some, settings)
        compute = partial(_encoded, model, processor, settings=settings, factor=factor)
        key = digest([inputs["segmenter"], str(factor)])
        made = compute_shards(
            compute, rows, fingerprints, _FEATURES, folder / "shards", recipe.masks.shard_size, "relabelling", key
        )
        if state.is_main_process:
            rows = rows.remove_columns([name for name in _FEATURES if name in rows.column_names])
            result = folder / "result"
            labelled = concatenate_datasets([rows, made], axis=1)
            save_data(DatasetDict({**data, "train": labelled}), result, embed_images)
            output.finish(result)
    state.wait_for_everyone()
    return LabelledData(output.path)


def _encoded(
    model, processor, rows: Dataset, settings: SelfTrainingSettings, factor: float
) -> Iterator[tuple[int, dict]]:
    for relabelled in relabel_images(model, processor, rows, settings, factor):
        mask = encode_png(mask_image(relabelled.pseudo_mask))
        levels = (255 * relabelled.confidence).round().astype(np.uint8)
        yield relabelled.index, {"pseudo_mask": mask, "confidence": encode_png(Image.fromarray(levels))}
