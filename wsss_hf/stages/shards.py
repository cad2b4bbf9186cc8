"""What is computed for every image of a data set: in shards, over all processes, none of them twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, Features

from ..progress import Progress
from .fingerprint import digest


def compute_shards(
    compute: Callable[[Dataset], Iterable[tuple[int, dict]]],
    rows: Dataset,
    fingerprints: Sequence[str],
    features: Features,
    folder: Path,
    size: int,
    title: str,
    settings: str = "",
) -> Dataset:
    """One row of `features` for each of `rows`, in their order, kept in `folder` as parquet files.

    The shards are split over the processes of `accelerate launch`. A finished one is used again for the very rows that
    it was computed for: its name holds their fingerprint.

    Args:
        compute: gives (index, values of `features`) for each row of a shard, in any order.
        fingerprints: one of each row.
        size: images of a shard.
        title: of the progress bar.
        settings: fingerprint of whatever else determines the values and is not the same for all that `folder` holds.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for start in range(0, len(rows), size):
        part = range(start, min(start + size, len(rows)))
        shards[folder / f"{start:08d}-{digest([settings, *fingerprints[part.start : part.stop]])}.parquet"] = part
    mine = list(shards)[state.process_index :: state.num_processes]
    finished = {path for path in mine if path.exists()}
    total = sum(len(shards[path]) for path in mine)
    with Progress(title, total, unit="image") as progress:
        progress.advance(sum(len(shards[path]) for path in finished))
        for path in mine:
            if path in finished:
                continue
            shard = rows.select(shards[path])
            values: list[dict] = [{}] * len(shard)
            for index, row_values in compute(shard):
                values[index] = row_values
                progress.advance(1)
            fresh = path.with_suffix(".new")
            Dataset.from_list(values, features=features).to_parquet(fresh)
            os.replace(fresh, path)
    state.wait_for_everyone()
    found = Dataset.from_parquet([str(path) for path in shards], features=features, cache_dir=str(folder / "cache"))
    state.wait_for_everyone()  # all have read the files before one may remove them
    return found
