"""The library's Trainer, which pushes models of this package as they push themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..models.configuration_cam import CamConfig
from ..models.configuration_segmenter import SegmenterConfig
from ..models.maps import IGNORE_INDEX
from ..models.modeling_segmenter import pixel_cross_entropy
from ..models.portable_model import PortableModel
from ..training.callbacks import ScheduleCallback, TagCollator
from .cards import short_card


class WsssTrainer(Trainer):
    """`transformers.Trainer` with what our models need: tags by name, the schedule of methods, our card.

    It takes the Trainer's own arguments, from the fourth on by name. `push_to_hub` makes the repository that
    `model.push_to_hub` makes (weights, image processor, the code of `trust_remote_code=True`, and a card unless there
    is one), and adds the Trainer's `training_args.bin`.

    A [`Segmenter`]'s loss is the mean over the labelled pixels of a step, in however many batches and processes; with
    the plain Trainer it is the mean of the batches' means, as it is here with `torch.nn.DataParallel`.
    """

    def __init__(
        self,
        model: PreTrainedModel | Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        *,
        callbacks: list | None = None,
        **options: Any,
    ):
        config = getattr(model, "config", None)
        if data_collator is None and isinstance(config, CamConfig):
            data_collator = TagCollator(list((config.id2label or {}).values()))
        callbacks = [ScheduleCallback(), *(callbacks or [])]
        super().__init__(model, args, data_collator, callbacks=callbacks, **options)
        if isinstance(config, SegmenterConfig) and self.compute_loss_func is None and self.args.n_gpu <= 1:
            self.compute_loss_func = _loss_in_step

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> Any:
        """Of label maps the pixels that are not ignored; the Trainer leaves out -100."""
        if self.compute_loss_func is _loss_in_step:
            batch_samples = [
                {"labels": batch["labels"].masked_fill(batch["labels"] == IGNORE_INDEX, -100)}
                for batch in batch_samples
                if "labels" in batch
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def create_model_card(  # type: ignore[override]
        self, *, tags: str | list[str] | None = None, **facts: Any
    ) -> None:
        """Write `README.md` beside the model, see [`short_card`]; where the model is none of ours, the Trainer's card.

        Args:
            tags: further ones.
            facts: what else the Trainer's card tells; ours does not.
        """
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PortableModel):
            super().create_model_card(tags=tags, **facts)
            return
        repo_id = self.hub_model_id or Path(str(self.args.output_dir)).name
        card = Path(str(self.args.output_dir)) / "README.md"
        if not self.is_world_process_zero() or card.exists():
            return
        if self.hub_model_id is None or not HfApi(token=self.args.hub_token).file_exists(repo_id, card.name):
            short_card(model, repo_id, [tags] if isinstance(tags, str) else tags or []).save(card)


def _loss_in_step(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """The loss of a [`Segmenter`] on a batch, as a part of the mean over `num_items_in_batch` pixels."""
    views = (outputs.logits, *(outputs.scale_logits or ()))
    loss = torch.stack([pixel_cross_entropy(view, labels) for view in views]).sum()
    if num_items_in_batch is None:
        return loss
    return loss * (labels != IGNORE_INDEX).sum() / num_items_in_batch.clamp_min(1)
