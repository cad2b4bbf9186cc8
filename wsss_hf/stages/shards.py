"""What is computed for every image of a data set: in shards, over all processes, none of them twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, concatenate_datasets
from datasets import Image as ImageFeature

from ..data.streams import windows
from ..files import sync
from ..progress import Progress, say
from .fingerprint import digest


def compute_shards(
    compute: Callable[[Dataset], Iterable[tuple[int, dict]]],
    rows: Dataset | IterableDataset,
    fingerprints: Sequence[str],
    features: Features,
    folder: Path,
    size: int,
    title: str,
    settings: str = "",
    keep: Sequence[str] = (),
) -> Dataset:
    """One row of `features` for each of `rows`, in their order, kept in `folder` as parquet files.

    The shards are split over the processes of `accelerate launch`; those of a stream are its [`windows`]. A finished
    one is used again for the very rows that it was computed for: its name holds their fingerprint. One that was
    damaged since is computed again.

    Args:
        compute: gives (index, values of `features`) for each row of a shard, in any order.
        fingerprints: one of each row; of a stream, one in all.
        size: images of a shard.
        title: of the progress bar.
        settings: fingerprint of whatever else determines the values and is not the same for all that `folder` holds.
        keep: columns of `rows` that the result has before those of `features`.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: rows.features[name] for name in keep}
    columns = Features(
        {name: ImageFeature() if isinstance(feature, ImageFeature) else feature for name, feature in kept.items()}
        | features
    )
    todo: Iterable[tuple[Path, Dataset]]
    if isinstance(rows, IterableDataset):
        ending, total = f"-{digest([settings, *fingerprints, size])}.parquet", None
        finished = {path: _num_rows(path) for path in folder.glob(f"*{ending}") if _is_whole(path, columns)}
        parts = windows(rows, size, lambda name: finished.get(folder / f"{name}{ending}"))
        todo = ((folder / f"{name}{ending}", part) for name, part in parts)
    else:
        shards = {}
        for start in range(0, len(rows), size):
            part = range(start, min(start + size, len(rows)))
            shards[folder / f"{start:08d}-{digest([settings, *fingerprints[part.start : part.stop]])}.parquet"] = part
        mine = list(shards)[state.process_index :: state.num_processes]
        total = sum(len(shards[path]) for path in mine)
        counts = {path: len(shards[path]) for path in mine if path.exists()}
        finished = {path: count for path, count in counts.items() if _is_whole(path, columns, count)}
        todo = ((path, rows.select(shards[path])) for path in mine if path not in finished)
    with Progress(title, total, unit="image") as progress:
        progress.advance(sum(finished.values()))
        for path, shard in todo:
            values: list[dict] = [{}] * len(shard)
            for index, row_values in compute(shard) if len(shard) else ():
                values[index] = row_values
                progress.advance(1)
            made = Dataset.from_dict({name: [row[name] for row in values] for name in features}, features=features)
            if keep:
                made = concatenate_datasets([shard.select_columns(list(keep)), made], axis=1)
            fresh = path.with_suffix(".new")
            made.to_parquet(fresh, write_page_checksum=True)
            sync(fresh)
            os.replace(fresh, path)
            sync(folder)
    cache = folder / "cache"
    if state.is_main_process and cache.exists():  # of a run that was killed: it may be short
        shutil.rmtree(cache)
    state.wait_for_everyone()
    paths = sorted(folder.glob(f"*{ending}")) if isinstance(rows, IterableDataset) else shards
    found = Dataset.from_parquet([str(path) for path in paths], features=columns, cache_dir=str(cache))
    state.wait_for_everyone()  # all have read the files before one may remove them
    return found


def _num_rows(path: Path) -> int:
    return pq.read_metadata(path).num_rows


def _is_whole(path: Path, features: Features, count: int | None = None) -> bool:
    """Whether a file of a finished shard, of `count` rows where that is known, reads as written; says where not."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.schema_arrow.names == list(features) and count in (None, file.metadata.num_rows):
                for _ in file.iter_batches():
                    pass
                return True
    except (OSError, pa.ArrowException):
        pass
    say(f"{path} is damaged and made again")
    return False
