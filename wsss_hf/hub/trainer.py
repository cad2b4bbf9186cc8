"""The library's Trainer, which pushes models of this package as they push themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..models.configuration_cam import CamConfig
from ..models.portable_model import PortableModel
from ..training.callbacks import ScheduleCallback, TagCollator
from .cards import short_card


class WsssTrainer(Trainer):
    """`transformers.Trainer` with what our models need: tags by name, the schedule of methods, our card.

    It takes the Trainer's own arguments, from the fourth on by name. `push_to_hub` makes the repository that
    `model.push_to_hub` makes (weights, image processor, the code of `trust_remote_code=True`, and a card unless there
    is one), and adds the Trainer's `training_args.bin`.
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
