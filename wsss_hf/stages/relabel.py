"""Self-training: a segmenter relabels the tagged images, for the next segmenter to learn from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from ..data.palette import mask_image
from ..data.tagged import encode_png
from ..inference.segmenter_scores import load_segmenter
from ..pseudo_labels.area_prior import background_factor, labelled_objects
from ..pseudo_labels.self_training import relabel_images
from .cache import StageOutput
from .evaluate import check_classes
from .shards import compute_shards

_FEATURES = Features({"pseudo_mask": ImageFeature(), "confidence": ImageFeature()})


def relabel(
    data: DatasetDict,
    segmenter: str | os.PathLike,
    recipe: dict,
    out: str | os.PathLike,
    data_settings: dict | None = None,
    hub_kwargs: dict | None = None,
    quiet: bool = False,
) -> Path:
    """Write `data` with new columns `pseudo_mask` and `confidence` in split "train"; true masks are never read.

    Finished shards are never made again, so a killed run goes on where it was.

    Args:
        data: tagged images; where they have pseudo masks, the new ones cover as much, unless the recipe says no.
        segmenter: a trained segmenter, a directory or Hub id.
        recipe: a resolved recipe; its `self_training` section is used, but for the number of rounds, and the windows
            of its `evaluation` section.
        out: folder of the data set; as for `train_cam`.

    Returns:
        `out`, loadable by `datasets.load_from_disk`; masks are palette PNGs, 0 = background, 255 = ignore, confidence
        is grey, 255 = certain.

    Raises:
        DataError: the segmenter has other classes than the data.
    """
    self_training = {key: value for key, value in recipe["self_training"].items() if key != "rounds"}
    if recipe["evaluation"]["window"]:  # a segmenter that is to see windows of images sees them here, too
        self_training |= {key: recipe["evaluation"][key] for key in ("window", "window_stride")}
    settings = {"stage": "relabel", "data": data_settings, "segmenter": str(segmenter), "self_training": self_training}
    output = StageOutput(out, settings)
    if output.done:
        return output.path
    state = PartialState()
    output.begin()
    rows = data["train"]
    with output.nothing_left_behind():
        model, processor = load_segmenter(str(segmenter), state.device, **(hub_kwargs or {}))
        check_classes(model, rows)
        factor = 1.0
        if self_training["keep_area"] and "pseudo_mask" in rows.column_names:
            some = labelled_objects(rows, "pseudo_mask", num_images=96)
            factor = background_factor(model, processor, some, self_training)
        compute = partial(_encoded, model, processor, settings=self_training | {"background_factor": factor})
        shards, size = output.partial / "shards", self_training["shard_size"]
        made = compute_shards(compute, rows, _FEATURES, shards, size, "relabelling", quiet)
    if state.is_main_process:
        rows = rows.remove_columns([name for name in _FEATURES if name in rows.column_names])
        result = output.partial / "result"
        DatasetDict({**data, "train": concatenate_datasets([rows, made], axis=1)}).save_to_disk(result)
        output.finish(result)
    state.wait_for_everyone()
    return output.path


def _encoded(model, processor, rows: Dataset, settings: dict) -> Iterator[tuple[int, dict]]:
    for relabelled in relabel_images(model, processor, rows, settings):
        mask = encode_png(mask_image(relabelled.pseudo_mask))
        levels = (255 * relabelled.confidence).round().astype(np.uint8)
        yield relabelled.index, {"pseudo_mask": mask, "confidence": encode_png(Image.fromarray(levels))}
