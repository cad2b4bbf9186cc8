"""Before all training: images and a source of saliency → the same data set with a column `saliency`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from ..data.saving import save_data
from ..data.tagged import encode_png, source_of
from ..files import file_digest
from ..models.options import Options
from ..progress import is_quiet
from ..recipes import check_splits
from ..saliency.load import load_source
from ..saliency.source import SaliencySource
from .cache import Record, StageOutput, write_atomically
from .fingerprint import digest, model_fingerprint, row_fingerprints, rows_fingerprint
from .moved import follow_moved_images
from .results import SUMMARY_FILE, LabelledData
from .shards import compute_shards

VERSION = 2
_SHARD_SIZE = 128  # images
_FIRST_ROWS = 8  # that a source may look at before it starts


def add_saliency(
    data: DatasetDict,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    spectral: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | Options | None = None,
    learnt_from: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
) -> LabelledData:
    """Write `data` with a column `saliency` in every split: how much each pixel looks like foreground.

    The maps come from the images alone; a column of this name is replaced. The images are split into shards, the
    shards over the processes of `accelerate launch`; a finished shard is used again for the very images and source it
    was made from.

    Args:
        data: tagged images.
        out: folder of the data set, as for [`train_cam`].
        model: a network that finds the foreground: an ONNX file, a folder or Hub repository that holds one, or a model
            of transformers, see [`load_source`].
        spectral: instead, a backbone (directory or Hub id) for a normalised cut on its features: no network that has
            learnt from masks.
        settings: options of [`NetworkSettings`] for `model`, of [`SpectralSettings`] for `spectral`.
        learnt_from: the labels that `model` has learnt from, in words; stands in the summary and the record.
        trust_remote_code: run the code that a model of transformers brings.
        force: make the maps again whatever is there.

    Returns:
        the data set, loadable by `datasets.load_from_disk(out)` as well; maps are grey PNGs of the image's size,
        0..255 for 0..1. `data.source["saliency"]` and `summary["saliency"]` are {"source", "learnt_from"}.

    Raises:
        SaliencyError, OptionError, OSError: the source can't be used.
        DataError: an image does not decode; names the row.
    """
    check_splits(data, "train")
    source = load_source(model, spectral, settings, trust_remote_code)
    told = {"source": source.name, "learnt_from": learnt_from or source.learnt_from}
    inputs = {"data": digest(map(_data_fingerprint, data.values())), "source": _source_fingerprint(source)}
    settled = {"saliency": source.settings, "learnt_from": learnt_from}
    record = Record("add-saliency", VERSION, settled, inputs, source_of(data) | {"saliency": told})
    output = StageOutput(out, record, force)
    if output.done:
        return follow_moved_images(output, data, ["saliency"], data.keys())
    state = PartialState()
    with output.working() as folder:
        first = data["train"].select(range(min(_FIRST_ROWS, len(data["train"]))))
        source.prepare(first, state.device)
        features = Features({"saliency": ImageFeature(), "kind": Value("string")})
        key = digest([inputs["source"], source.state])
        made = {
            split: compute_shards(
                partial(_encoded, source),
                rows,
                row_fingerprints(rows, ["image_id", "image"]),
                features,
                folder / "shards" / split,
                _SHARD_SIZE,
                f"saliency of {split}",
                key,
            )
            for split, rows in data.items()
        }
        if state.is_main_process:
            result = folder / "result"
            save_data(DatasetDict({split: _with_column(rows, made[split]) for split, rows in data.items()}), result)
            kinds = Counter(kind for part in made.values() for kind in part["kind"])
            summary = {"saliency": told, "images": {split: len(part) for split, part in made.items()}}
            summary |= {kind: kinds[kind] for kind in ("constant", "empty", "all_salient")}
            write_atomically(result / SUMMARY_FILE, json.dumps(summary, indent=1))
            output.finish(result)
            _print_summary(summary)
    state.wait_for_everyone()
    return LabelledData(output.path)


def _data_fingerprint(rows: Dataset) -> str:
    """Of all that the result holds beside the maps."""
    return rows_fingerprint(rows, [name for name in rows.column_names if name != "saliency"])


def _source_fingerprint(source: SaliencySource) -> str:
    files = [file_digest(file) for file in source.files]
    return digest([type(source).__name__, files or model_fingerprint(source.name), source.content])


def _encoded(source: SaliencySource, rows: Dataset) -> Iterator[tuple[int, dict]]:
    """What the columns hold for each of `rows`."""
    for index, found in source.maps(rows):
        levels = (255 * found).round().astype(np.uint8)
        yield index, {"saliency": encode_png(Image.fromarray(levels)), "kind": _kind(levels)}


def _kind(levels: np.ndarray) -> str:
    """constant, empty or all_salient (no pixel, or every pixel, above half) or the empty string."""
    if levels.min() == levels.max():
        return "constant"
    salient = levels > 127
    return "" if salient.any() and not salient.all() else "all_salient" if salient.any() else "empty"


def _with_column(rows: Dataset, made: Dataset) -> Dataset:
    kept = rows.remove_columns([name for name in ("saliency",) if name in rows.column_names])
    return concatenate_datasets([kept, made.remove_columns("kind")], axis=1)


def _print_summary(summary: dict) -> None:
    if is_quiet():
        return
    images, source = sum(summary["images"].values()), summary["saliency"]
    counts = ", ".join(f"{summary[kind]} {kind.replace('_', '-')}" for kind in ("constant", "empty", "all_salient"))
    print(f"saliency: {images} maps of {source['source']} ({source['learnt_from']}); {counts}", file=sys.stderr)
    if summary["constant"] == images:
        print("saliency: warning: all maps are constant; see the options of size, mean and std", file=sys.stderr)
