"""Methods whose losses depend on the progress of the training, in any training loop."""

import logging

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as library_logging

from wsss_hf import CamClassifier, CamConfig, ScheduleCallback

METHODS = {
    "drs": {},
    "icd": {"hidden_channels": 8},
    "plda": {"hidden": [16, 8], "pamr_iterations": 2, "pamr_dilations": [1, 2], "dropout": 0.0},
    "contrast": {"scale": 0.5, "embedding": 8, "intra_weight": 0.0},  # which draws pixels by chance
    "d2cam": {"embedding_channels": 8, "ramp": 1.0},
    "seam": {"projections": [8, 8], "embedding": 16, "scale": 0.5},
}
STEPS, BATCH = 4, 2
TAGS = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]])


class Images(Dataset):
    def __len__(self):
        return STEPS * BATCH

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "tags": TAGS[index % len(TAGS)]}


class Recorder(CamClassifier):
    """Keeps the losses of every training step."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.losses is not None:
            vars(self).setdefault("history", []).append({k: v.item() for k, v in output.losses.items()})
        return output


RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24],
    "depths": [1, 1, 1],
}


def build(methods=METHODS, **options):
    torch.manual_seed(0)
    return Recorder(CamConfig(backbone_config=dict(RESNET), id2label={0: "a", 1: "b", 2: "c"}, **methods, **options))


def train(model, folder, callbacks=(), **options):
    """`transformers.Trainer` on the images in their order."""
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="sgd",
        remove_unused_columns=False,
        label_names=["tags"],
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def test_trainer_and_a_plain_loop_have_the_same_losses(tmp_path):
    with_trainer = build()
    trainer = train(with_trainer, tmp_path, [ScheduleCallback()])
    plain = build().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    images = Images()
    for step in range(STEPS):
        batch = [images[step * BATCH + index] for index in range(BATCH)]
        batch = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        plain(**batch, progress=step / STEPS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(plain.history) == len(with_trainer.history) == STEPS
    for actual, expected in zip(with_trainer.history, plain.history, strict=True):
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # Were the progress never set, these would be 0 throughout.
    assert plain.history[0]["d2cam_category"] == 0 < plain.history[-1]["d2cam_category"]
    assert plain.progress == with_trainer.progress == (STEPS - 1) / STEPS

    found = trainer.predict(Images())
    assert found.predictions.shape == (STEPS * BATCH, 3) and found.label_ids.shape == (STEPS * BATCH, 3)
    assert trainer.evaluate()["eval_loss"] > 0


class Watcher(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append((model.progress, all(method.active for method in model.methods.values())))


def test_the_callback_ends_the_warmup(tmp_path):
    watcher = Watcher()
    train(build({"seam": METHODS["seam"]}, method_warmup=0.5), tmp_path, [ScheduleCallback(), watcher])
    assert watcher.seen == [(0.0, False), (0.25, False), (0.5, True), (0.75, True)]


def test_the_callback_finds_the_model_inside_wrappers():
    model = build()
    wrapped = torch.nn.Sequential(torch.nn.Sequential(model))

    class State:
        global_step, max_steps = 3, 4

    ScheduleCallback().on_step_begin(None, State, None, model=wrapped)
    assert model.progress == 0.75


@pytest.fixture
def warnings(caplog):
    """Messages of transformers' logger about the progress; it says each of them once per process."""
    library = logging.getLogger("transformers")
    package = library_logging.get_logger("wsss_hf.models.modeling_cam")
    type(package).warning_once.cache_clear()
    for logger in (library, package):
        logger.addHandler(caplog.handler)
        caplog.set_level(logging.WARNING, logger.name)
    yield lambda: {record.getMessage() for record in caplog.records if "progress" in record.getMessage()}
    for logger in (library, package):
        logger.removeHandler(caplog.handler)


def step(model, **options):
    images = torch.stack([Images()[index]["pixel_values"] for index in range(BATCH)])
    return model(images, tags=TAGS[:BATCH], **options)


@pytest.mark.parametrize("name", ["icd", "plda", "d2cam"])
def test_a_schedule_that_nobody_moves_is_named(name, warnings):
    model = build({name: METHODS[name]}).train()
    step(model)
    (words,) = warnings()
    assert "progress=" in words and "ScheduleCallback" in words and "\n" not in words


def test_the_warning_comes_once(warnings, caplog):
    for _ in range(2):
        model = build({"icd": METHODS["icd"]}).train()
        step(model)
        step(model)
    assert len({id(record) for record in caplog.records if "progress" in record.getMessage()}) == 1


def test_a_warmup_that_nobody_ends_is_named(warnings):
    model = build({"drs": {}}, method_warmup=0.5).train()
    step(model)
    assert len(warnings()) == 1


@pytest.mark.parametrize(
    ("methods", "options"),
    [({"drs": {}}, {}), ({"seam": METHODS["seam"]}, {}), ({}, {}), (METHODS, {"progress": 0.0})],
)
def test_nothing_is_said_where_nothing_is_missing(methods, options, warnings):
    step(build(methods).train(), **options)
    assert warnings() == set()


def test_nothing_is_said_outside_training(warnings):
    step(build().eval())
    build().train()(torch.randn(1, 3, 32, 32))
    assert warnings() == set()
