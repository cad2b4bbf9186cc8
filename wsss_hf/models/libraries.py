"""The libraries that the models need, imported in less time. Not uploaded with checkpoints."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """For imports: look for no garbage meanwhile, as what they make stays; finding that out takes a fifth of the time.

    What was made counts as old afterwards: the next searches, which are for new garbage, pass it over.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if was_enabled:
            gc.enable()


with without_collections():
    importlib.import_module("transformers.pipelines")  # and with it torch and most of transformers
