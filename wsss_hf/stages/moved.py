"""Data sets that stages have made name image files by their paths: where those move, the data sets follow."""

from __future__ import annotations

import shutil
from collections.abc import Collection

from accelerate import PartialState
from datasets import Dataset, DatasetDict, concatenate_datasets

from ..data.saving import names_other_files, save_data
from ..progress import say
from .cache import SETTINGS_FILE, StageOutput
from .results import LabelledData

_DATA_FILE = "dataset_dict.json"


def follow_moved_images(
    output: StageOutput, data: DatasetDict, made: Collection[str], splits: Collection[str] = ("train",)
) -> LabelledData:
    """The finished data set of a stage. Where it names image files of `data` by other paths than these have now, it
    is written again with the new ones; what the stage has made of the images stays.

    A copied or moved folder of images has the same fingerprint, as this knows of files their names, sizes and times
    of change; the old paths lead nowhere then, or to files that were left behind.

    Args:
        made: columns of the stage, in `splits`.

    Raises:
        ValueError: the data set is damaged.
    """
    held = LabelledData(output.path).data
    if not names_other_files(held, data):
        return LabelledData(output.path)
    say(f"{output.path.name}: image files have moved; their new paths are written")
    state = PartialState()
    with output.working(renewing=True) as folder:
        if state.is_main_process:
            result = folder / "result"
            shutil.copytree(output.path, result, ignore=shutil.ignore_patterns(*held, _DATA_FILE, SETTINGS_FILE))
            renewed = {split: _with_made(rows, held[split], made) for split, rows in data.items() if split in splits}
            save_data(DatasetDict({**data, **renewed}), result)
            output.finish(result)
    state.wait_for_everyone()
    return LabelledData(output.path)


def _with_made(rows: Dataset, held: Dataset, made: Collection[str]) -> Dataset:
    others = [name for name in rows.features if name not in made]
    return concatenate_datasets(
        [rows.select_columns(others), held.select_columns([name for name in made if name in held.features])], axis=1
    )
