"""What every source of saliency maps offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from ..models.options import Options


class SaliencyError(ValueError):
    """A source of saliency that can't be used, or gives no maps; the message names it and what was expected."""


class SaliencySource(ABC):
    """Gives images a map of their foreground.

    Attributes:
        name: as the user named it.
        settings: its options.
        learnt_from: one sentence about the labels that it has learnt from; None where the source can't know.
        content: what determines its maps beside `settings` and the model named `name`: plain values.
        files: what determines its maps: files, by their contents; empty where `name` is a model's folder or Hub id.
    """

    name: str
    settings: Options
    learnt_from: str | None = None
    content: list = []
    files: list[Path] = []

    @abstractmethod
    def prepare(self, rows: Dataset, device: torch.device) -> None:
        """Load the model.

        Args:
            rows: a first few images of the data, the same in all processes.

        Raises:
            SaliencyError: it is another kind of model.
        """

    @property
    def state(self) -> str:
        """What [`prepare`] has found out that determines the maps; the empty string where that is nothing."""
        return ""

    @abstractmethod
    def maps(self, rows: Dataset) -> Iterator[tuple[int, np.ndarray]]:
        """(index in `rows`, (H, W) float32 in [0, 1] of the image's size) of every row, in any order.

        Raises:
            DataError: an image does not decode; names the row.
        """
