"""What `transformers.Trainer` needs to train a CAM classifier with methods."""

from __future__ import annotations

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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
