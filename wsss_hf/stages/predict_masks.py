"""A segmenter and images → its label maps as files: PNGs, the archive of VOC's test server, COCO-JSON."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset

from ..data.export import check_free, export_coco, file_stem, require_pycocotools, write_mask_pngs
from ..data.tagged import check_classes, class_names, decode_mask
from ..data.voc_results import check_results_archive, export_voc_results
from ..inference.load import load_segmenter
from ..inference.segmenter import segment_images
from ..progress import Progress
from ..settings import EvaluationSettings
from .lock import only_run, partial_of


def predict_masks(
    segmenter: str | os.PathLike,
    rows: Dataset,
    settings: EvaluationSettings,
    out: str | os.PathLike,
    voc_archive: str | os.PathLike | None = None,
    coco: str | os.PathLike | None = None,
) -> Path:
    """Write the label map of every row as `<out>/<image_id>.png`, a palette PNG; true masks are never read.

    Args:
        segmenter: directory or Hub id.
        settings: the test protocol.
        out: folder; appears complete or not at all, and must not hold anything.
        voc_archive: also an archive for VOC's test server, see [`export_voc_results`].
        coco: also COCO-JSON, see [`export_coco`].

    Returns:
        `out`.

    Raises:
        DataError: a target exists or can't be written, the classes differ, or an image_id is no file name.
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
        mine = rows.select(range(state.process_index, len(rows), state.num_processes))
        with Progress("label maps", len(mine), unit="image") as progress:

            def label_maps() -> Iterator[tuple[str, np.ndarray]]:
                for segmented in segment_images(model, processor, mine, settings):
                    yield segmented.image_id, segmented.labels
                    progress.advance(1)

            try:
                write_mask_pngs(begun, label_maps())
            except BaseException:
                shutil.rmtree(begun, ignore_errors=True)
                raise
        state.wait_for_everyone()
        if state.is_main_process:
            if out.is_dir():
                out.rmdir()  # an empty folder that the user made
            os.replace(begun, out)
            if voc_archive is not None:
                export_voc_results(voc_archive, _saved(out, rows), names)
            if coco is not None:
                export_coco(coco, _saved(out, rows), names)
        state.wait_for_everyone()
    return out


def _saved(folder: Path, rows: Dataset) -> Iterator[tuple[str, np.ndarray]]:
    for image_id in rows["image_id"]:
        file = str(folder / f"{file_stem(image_id)}.png")
        yield image_id, decode_mask({"path": file}, file)
