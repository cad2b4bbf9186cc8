"""The library's own trainer and PEFT on our models, without special arguments."""

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from transformers import ResNetConfig, Trainer, TrainerCallback, TrainingArguments, ViTConfig

from wsss_hf import (
    CamClassifier,
    CamConfig,
    SeamConfig,
    Segmenter,
    SegmenterConfig,
    TagCollator,
    WsssTrainer,
)
from wsss_hf.models.deeplab import HEADS

RESNET = {
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
}
NAMES = {0: "background", 1: "cat", 2: "cow"}


def backbone(kind):
    if kind == "vgg":  # whose first block takes the image
        return {"model_type": "wsss_vgg16", "widths": [4, 4, 8, 8, 8]}
    return ViTConfig(**VIT) if kind == "vit" else ResNetConfig(**RESNET)


def build(kind, body="resnet", **options):
    torch.manual_seed(0)
    config_class, model_class = (CamConfig, CamClassifier) if kind == "cam" else (SegmenterConfig, Segmenter)
    options = options if kind == "cam" else {"rates": [1]} | options
    return model_class(config_class(backbone_config=backbone(body), id2label=NAMES, **options))


def rows(kind, count=8):
    """Images whose colour says what is in them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        pixels = torch.randn(3, 32, 32, generator=generator) + index % 3
        labels = torch.full((32, 32), index % 3)
        found.append({"pixel_values": pixels, "labels": torch.eye(3)[index % 3] if kind == "cam" else labels})
    return found


def trainer(kind, folder, model=None, data=None, trainer_class=Trainer, more=None, **options):
    arguments = TrainingArguments(
        folder,
        max_steps=options.pop("max_steps", 4),
        learning_rate=options.pop("learning_rate", 1e-2),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = data or rows(kind)
    return trainer_class(model or build(kind), arguments, train_dataset=data, eval_dataset=data, **(more or {}))


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_both_models_train_and_evaluate_without_special_arguments(kind, tmp_path):
    run = trainer(kind, tmp_path, max_steps=20)
    run.compute_metrics = lambda found: {
        "right": float(
            np.mean(found.predictions.argmax(1) == (found.label_ids.argmax(1) if kind == "cam" else label_map(found)))
        )
    }
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert after["eval_right"] >= before["eval_right"]


def label_map(found):
    """The label maps at the size of the logits."""
    side = found.predictions.shape[-1]
    step = found.label_ids.shape[-1] // side
    return found.label_ids[:, ::step, ::step][:, :side, :side]


def test_tags_and_labels_are_the_same(tmp_path):
    model, batch = build("cam").eval(), rows("cam", 2)
    pixels, tags = (torch.stack([row[key] for row in batch]) for key in ("pixel_values", "labels"))
    assert torch.equal(model(pixels, tags=tags).loss, model(pixels, labels=tags).loss)
    named = [{"pixel_values": row["pixel_values"], "tags": row["labels"]} for row in rows("cam")]
    run = trainer("cam", tmp_path, data=named, label_names=["tags"])
    assert run.train().training_loss > 0 and run.evaluate()["eval_loss"] > 0


def named_rows():
    """The rows of the classifier with names as tags: none, one, or two of them, as a data set of the library."""
    names = [["background"], ["cat", "cow"], ["cow"], []]
    pixels = [row["pixel_values"].numpy() for row in rows("cam")]
    return Dataset.from_dict({"pixel_values": pixels, "tags": names * 2})


@pytest.mark.parametrize("trainer_class", [Trainer, WsssTrainer])
def test_tags_may_be_names(trainer_class, tmp_path):
    more = {"data_collator": TagCollator(list(NAMES.values()))} if trainer_class is Trainer else None
    run = trainer("cam", tmp_path, data=named_rows(), trainer_class=trainer_class, more=more, max_steps=20)
    before = run.predict(named_rows())
    wanted = [[1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]] * 2
    assert before.label_ids.tolist() == wanted
    run.train()
    assert run.evaluate()["eval_loss"] < 0.9 * before.metrics["test_loss"]


def test_tags_may_be_indices_or_zeros_and_ones():
    collate = TagCollator(["cat", "cow", "dog"])
    forms = ([0, 2], ["cat", "dog"], np.array([2, 0]), torch.tensor([1.0, 0.0, 1.0]))
    batch = collate([{"tags": tags, "pixel_values": torch.zeros(3, 4, 4)} for tags in forms])
    assert batch["pixel_values"].shape == (4, 3, 4, 4) and "tags" not in batch
    assert batch["labels"].tolist() == [[1.0, 0.0, 1.0]] * 4


@pytest.mark.parametrize(
    ("tags", "words"), [(["horse"], r"of this model \(cat, cow\), got 'horse'"), ([2], r"indices 0\.\.1, got 2")]
)
def test_a_tag_of_no_class_is_refused(tags, words):
    with pytest.raises(ValueError, match=words):
        TagCollator(["cat", "cow"])([{"tags": tags}])


def test_our_trainer_moves_the_schedule_of_methods(tmp_path):
    seen = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.progress)

    model = build("cam", seam=SeamConfig(projections=[4, 4], embedding=4), method_warmup=0.5)
    trainer("cam", tmp_path, model, trainer_class=WsssTrainer, more={"callbacks": [Recorder()]}).train()
    assert seen == [0.0, 0.25, 0.5, 0.75] and model.methods["seam"].active


def test_our_trainer_leaves_label_maps_alone(tmp_path):
    run = trainer("segmenter", tmp_path, trainer_class=WsssTrainer)
    assert run.train().training_loss > 0 and run.evaluate()["eval_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_accumulated_batches_move_the_weights_like_one(kind, tmp_path):
    moved = []
    for size, batches in ((4, 1), (1, 4)):
        model = build(kind, "vit")  # without batch statistics
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches, "optim": "sgd"}
        options |= {"max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.1}
        trainer(kind, tmp_path, model, rows(kind)[:4], **options).train()
        moved.append({name: weight.detach() - before[name] for name, weight in model.named_parameters()})
    assert max(change.abs().max() for change in moved[0].values()) > 1e-4
    for name, change in moved[1].items():
        torch.testing.assert_close(change, moved[0][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0]])
def test_our_trainer_counts_labelled_pixels_alike_in_any_number_of_batches(scales, tmp_path):
    """Where images are ignored in part, or all."""
    partly = rows("segmenter", 4)
    for number, row in enumerate(partly):
        row["labels"][: [0, 31, 32, 12][number]] = 255
    moved, losses = [], []
    for size, batches in ((4, 1), (1, 4)):
        model = build("segmenter", "vgg", input_scales=scales)  # without batch statistics
        whole = {key: torch.stack([row[key] for row in partly]) for key in partly[0]}
        wanted = model.train()(**whole).loss.item()
        before = [weight.detach().clone() for weight in model.parameters()]
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches, "optim": "sgd"}
        options |= {"max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.1}
        run = trainer("segmenter", tmp_path, model, partly, WsssTrainer, per_device_eval_batch_size=4, **options)
        assert run.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)
        losses.append(run.train().training_loss)
        moved.append(torch.cat([(w.detach() - b).flatten() for w, b in zip(model.parameters(), before, strict=True)]))
    assert losses == pytest.approx([wanted, wanted], rel=1e-4) and moved[0].abs().max() > 1e-3
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("body", ["resnet", "vit", "vgg"])
@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_gradient_checkpointing_in_both_modes_changes_no_gradient(kind, body, reentrant):
    batch = rows(kind, 4)
    inputs = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
    gradients, statistics = [], []
    for checkpointed in (False, True):
        model = build(kind, body).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
        statistics.append(dict(model.named_buffers()))
    assert any(gradient is not None for name, gradient in gradients[0].items() if name.startswith("backbone"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    for name, value in statistics[0].items():
        torch.testing.assert_close(statistics[1][name], value, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_trainer_checkpoints_gradients(reentrant, tmp_path):
    losses = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        losses.append(trainer("cam", tmp_path, build("cam", "vit"), **options).train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("head", [*HEADS, "cam"])
def test_lora_trains_and_keeps_whole_heads(head, tmp_path):
    kind = "cam" if head == "cam" else "segmenter"
    model = build(kind, "vit", **({} if head == "cam" else {"head": head}))
    saved = "classifier" if head == "cam" else "head"
    targets = ["q_proj", "v_proj", "query", "value"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=[saved], r=2))
    run = trainer(kind, tmp_path / "run", adapted, trainer_class=WsssTrainer)
    assert run.evaluate()["eval_loss"] > 0
    run.train()
    pixels = torch.stack([row["pixel_values"] for row in rows(kind, 2)])
    wanted = adapted.eval()(pixel_values=pixels).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        build(kind, "vit", **({} if head == "cam" else {"head": head})), tmp_path / "adapter"
    )
    torch.testing.assert_close(again.eval()(pixel_values=pixels).logits, wanted)
    torch.testing.assert_close(
        again.merge_and_unload().eval()(pixel_values=pixels).logits, wanted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_one_module_that_another_may_wrap(head):
    """As PEFT's `modules_to_save` does, which refuses lists of modules."""
    model = build("segmenter", head=head)
    assert not isinstance(model.head, torch.nn.ModuleList | torch.nn.ModuleDict)
    names = [name for name, _ in model.head.named_parameters()]
    wanted = {"deeplab_v1": "3.weight", "deeplab_v2": "0.weight", "deeplab_v3_plus": "classifier.weight"}[head]
    assert wanted in names  # as in models that were saved before
