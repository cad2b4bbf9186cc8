"""A segmenter and images → its label maps as files: PNGs, the archive of VOC's test server, COCO-JSON."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from ..data.export import check_free, export_coco, file_stem, require_pycocotools, write_mask_pngs
from ..data.streams import WINDOW, windows
from ..data.tagged import DataError, check_classes, class_names, decode_mask
from ..data.voc_results import check_results_archive, export_voc_results
from ..inference.load import load_segmenter
from ..inference.segmenter import segment_images
from ..progress import Progress
from ..settings import EvaluationSettings
from .lock import only_run, partial_of


def predict_masks(
    segmenter: str | os.PathLike,
    rows: Dataset | IterableDataset,
    settings: EvaluationSettings,
    out: str | os.PathLike,
    voc_archive: str | os.PathLike | None = None,
    coco: str | os.PathLike | None = None,
) -> Path:
    """Write the label map of every row as `<out>/<image_id>.png`, a palette PNG; true masks are never read.

    Every process of `accelerate launch` writes those of its share. All image_ids are in memory.

    Args:
        segmenter: directory or Hub id.
        rows: images, also as a stream.
        settings: the test protocol.
        out: folder; appears complete or not at all, and must not hold anything.
        voc_archive: also an archive for VOC's test server, see [`export_voc_results`].
        coco: also COCO-JSON, see [`export_coco`].

    Returns:
        `out`.

    Raises:
        DataError: a target exists or can't be written, the classes differ, an image_id is no file name, or two rows
            have one; of a stream, also that it has no row.
        OutputError: another run writes there.
    """
    state, out = PartialState(), check_free(out, "--save-masks")
    names = class_names(rows)
    if voc_archive is not None:
        check_results_archive(voc_archive, names)
    if coco is not None:
        check_free(coco, "--export-coco")
        require_pycocotools()
    partial = partial_of(out)
    with only_run(partial, option="--save-masks"):
        model, processor = load_segmenter(os.fspath(segmenter), state.device)
        check_classes(model, rows)
        begun = partial / "masks"
        if state.is_main_process:
            shutil.rmtree(begun, ignore_errors=True)  # of a run that was killed
        state.wait_for_everyone()
        places: list[tuple[str, int, str]] = []
        count = None if isinstance(rows, IterableDataset) else -(-len(rows) // state.num_processes)
        with Progress("label maps", count, unit="image") as progress:

            def label_maps() -> Iterator[tuple[str, np.ndarray]]:
                for name, part in _share(rows):
                    for segmented in segment_images(model, processor, part, settings):
                        yield segmented.image_id, segmented.labels
                        places.append((name, segmented.index, segmented.image_id))
                        progress.advance(1)

            try:
                write_mask_pngs(begun, label_maps())
                ids = [image_id for *_, image_id in sorted(gather_object(places))]
                _check_ids(ids)
            except BaseException:
                shutil.rmtree(begun, ignore_errors=True)
                raise
        state.wait_for_everyone()
        if state.is_main_process:
            if out.is_dir():
                out.rmdir()  # an empty folder that the user made
            os.replace(begun, out)
            if voc_archive is not None:
                export_voc_results(voc_archive, _saved(out, ids), names)
            if coco is not None:
                export_coco(coco, _saved(out, ids), names)
        state.wait_for_everyone()
    return out


def _share(rows: Dataset | IterableDataset) -> Iterable[tuple[str, Dataset]]:
    """This process's share of the rows, in parts with names by which these are in the order of the rows."""
    if isinstance(rows, IterableDataset):
        return windows(rows, WINDOW)
    state = PartialState()
    return [(f"{state.process_index:06d}", rows.shard(state.num_processes, state.process_index, contiguous=True))]


def _check_ids(ids: Sequence[str]) -> None:
    """That there are rows, and that all processes together have written a file for each."""
    if not ids:
        raise DataError("label maps: expected rows to make them of, got none")
    twice = [name for name, count in Counter(map(file_stem, ids)).items() if count > 1]
    if twice:
        raise DataError(f"label maps: expected a file of its own for each row, got {twice[0]}.png for two")


def _saved(folder: Path, ids: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    for image_id in ids:
        file = str(folder / f"{file_stem(image_id)}.png")
        yield image_id, decode_mask({"path": file}, file)
