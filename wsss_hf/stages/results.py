"""What stages give back: folders, and what is in them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import DatasetDict, load_from_disk
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from ..data.streams import load_stream
from ..data.tagged import TaggedData
from ..models.mask_classifiers import load_segmentation_model
from ..training.train import LOG_FILE
from .cache import read_record

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class StageResult(os.PathLike):
    """The folder of a finished stage; stands wherever a folder is asked for.

    Attributes:
        folder: as `out` named it.
    """

    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """What it was made from: `recipe.yaml`."""
        return read_record(self.folder)

    @property
    def minutes(self) -> float:
        """How long the stage took."""
        minutes = self.record.get("minutes")
        return float(minutes) if isinstance(minutes, int | float) else 0.0

    def __fspath__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __str__(self) -> str:
        return str(self.folder)


class TrainedModel(StageResult):
    """A trained model: CAM classifier, map refiner, affinity network or segmenter."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model itself, in eval mode."""
        return load_segmentation_model(self.folder).eval()

    @cached_property
    def processor(self) -> BaseImageProcessor:
        """Its image processor."""
        return AutoImageProcessor.from_pretrained(self.folder, trust_remote_code=False)

    @property
    def log(self) -> list[dict[str, Any]]:
        """Mean losses, learning rate and images per second of every epoch."""
        return json.loads((self.folder / LOG_FILE).read_text())


class LabelledData(StageResult):
    """A data set with pseudo masks."""

    @cached_property
    def data(self) -> DatasetDict:
        """The data set; split "train" has the column `pseudo_mask`. What was labelled as a stream is one again, see
        [`load_stream`].

        Raises:
            ValueError: a file of it is damaged.
        """
        try:
            held = load_from_disk(str(self.folder))
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.folder}: damaged ({reason}); remove it to have it made again") from error
        if "image" not in held["train"].features:
            return load_stream(self.folder)
        return TaggedData(held, source=self.record.get("data") or {})

    @property
    def summary(self) -> dict[str, Any]:
        """`images`, and how often which fallback was taken; `background_threshold` where it plays a part; where the
        label rule read saliency also `saliency_threshold` and, in words, `saliency`; {} after self-training."""
        file = self.folder / SUMMARY_FILE
        return json.loads(file.read_text()) if file.is_file() else {}


@dataclass(frozen=True)
class RunResult(StageResult):
    """All results of a run.

    Attributes:
        cam: the CAM classifier.
        refiner: the map refiner, where the recipe has one.
        affinity: the affinity network, where the recipe walks.
        masks: the data set with the pseudo masks that the last segmenter learnt from.
        segmenter: the last one.
        results: rows of figures, as `results.json` holds them.
    """

    cam: TrainedModel
    refiner: TrainedModel | None
    affinity: TrainedModel | None
    masks: LabelledData
    segmenter: TrainedModel
    results: list[dict[str, Any]]
