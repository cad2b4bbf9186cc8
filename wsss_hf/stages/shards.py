"""What is computed for every image of a data set: in shards, over all processes, none of them twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset, Features

from ..files import sync
from ..progress import Progress, say
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
    it was computed for: its name holds their fingerprint. One that was damaged since is computed again.

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
    finished = {path for path in mine if path.exists() and _is_whole(path, features, len(shards[path]))}
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
            Dataset.from_list(values, features=features).to_parquet(fresh, write_page_checksum=True)
            sync(fresh)
            os.replace(fresh, path)
            sync(folder)
    cache = folder / "cache"
    if state.is_main_process and cache.exists():  # of a run that was killed: it may be short
        shutil.rmtree(cache)
    state.wait_for_everyone()
    found = Dataset.from_parquet([str(path) for path in shards], features=features, cache_dir=str(cache))
    state.wait_for_everyone()  # all have read the files before one may remove them
    return found


def _is_whole(path: Path, features: Features, count: int) -> bool:
    """Whether a file of a finished shard reads as it was written; says where not."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.schema_arrow.names == list(features) and file.metadata.num_rows == count:
                for _ in file.iter_batches():
                    pass
                return True
    except (OSError, pa.ArrowException):
        pass
    say(f"{path} is damaged and made again")
    return False
