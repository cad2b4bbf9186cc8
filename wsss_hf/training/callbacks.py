"""What `transformers.Trainer` needs to train a CAM classifier with methods, from tags by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from ..data.tagged import DataError, tags_to_multi_hot


class TagCollator:
    """Rows with a column `tags` → a batch with `labels` (B, C) float 0/1, which the Trainer evaluates with.

    Tags are names or indices of classes, as many as an image has, or C zeros and ones as a tensor of floats. Other
    columns are collated as the Trainer does it.

    Args:
        names: the classes, in the order of the model's `config.id2label`.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """
        Raises:
            DataError: a tag is none of the classes.
        """
        batch = default_data_collator([{key: row[key] for key in row if key != "tags"} for row in rows])
        if "tags" in rows[0]:
            batch["labels"] = torch.stack([self._multi_hot(row["tags"]) for row in rows])
        return batch

    def _multi_hot(self, tags: Any) -> torch.Tensor:
        if isinstance(tags, torch.Tensor) and tags.is_floating_point():
            return tags
        for tag in tags:
            if isinstance(tag, str) and tag not in self.names:
                raise DataError(f"tags: expected classes of this model ({', '.join(self.names)}), got {tag!r}")
        indices = [self.names.index(tag) if isinstance(tag, str) else int(tag) for tag in tags]
        return tags_to_multi_hot(indices, len(self.names))


class ScheduleCallback(TrainerCallback):
    """Tells the model at the beginning of each step which share of the training is done.

    Methods weigh their losses by it (ICD, PLDA, D2CAM), and `CamConfig(method_warmup=…)` waits for it:

        Trainer(model, args, callbacks=[ScheduleCallback()], …)
    """

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs,
    ) -> None:
        # Wrappers, of distributed training or of adapters, have the model inside.
        for module in [] if model is None else model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module, "progress"):
                setattr(module, "progress", state.global_step / state.max_steps)  # noqa: B010 (not declared by all)
