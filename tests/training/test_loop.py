import copy
from dataclasses import dataclass

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers.utils import ModelOutput

from wsss_hf.data.examples import TaggedExamples
from wsss_hf.data.transforms import TrainTransform
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.options import OptionError
from wsss_hf.settings import TrainSettings
from wsss_hf.training.launcher import build_accelerator
from wsss_hf.training.loop import Training, TrainingError


def settings(**changes):
    plain = {"optimizer": "sgd", "lr": 0.1, "head_lr_factor": 1.0, "weight_decay": 0.0, "momentum": 0.0}
    return TrainSettings(**plain | {"epochs": 3, "batch_size": 4} | changes)


@dataclass
class Output(ModelOutput):
    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None


class Line(nn.Module):
    """Learns y = 2 x; notes which examples it saw, and at which progress."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))
        self.progress = 0.0
        self.seen, self.moments = [], []

    def forward(self, x, y):
        self.seen.append(x.tolist())
        self.moments.append(self.progress)
        losses = {"square": (self.slope * x - y).square().mean(), "size": 0 * self.slope.abs().sum()}
        return Output(loss=sum(losses.values()), losses=losses)


class Points(torch.utils.data.Dataset):
    def __init__(self, count=12):
        self.x = torch.linspace(-1, 1, count)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": 2 * self.x[index]}


def train(model, examples, folder, seed=0, **changes):
    wanted = settings(**changes)
    return Training(model, examples, wanted, build_accelerator(wanted), folder, seed).run()


def test_the_loss_goes_down_and_the_history_tells(tmp_path):
    model = Line()
    history = train(model, Points(), tmp_path, epochs=6, lr=1.0)
    assert history[-1]["square"] < 0.1 * history[0]["square"]
    assert model.slope.item() == pytest.approx(2, abs=0.3)
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]
    assert set(history[0]) == {"epoch", "square", "size", "lr", "images_per_second"}
    assert history[-1]["lr"] == pytest.approx(0, abs=1e-9) and history[0]["lr"] > history[1]["lr"]


def test_every_epoch_shows_every_example_once_in_an_order_of_its_own(tmp_path):
    model, examples = Line(), Points()
    train(model, examples, tmp_path, epochs=2)
    epochs = [sum(model.seen[:3], []), sum(model.seen[3:], [])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == pytest.approx(examples.x.tolist())
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed_alone(tmp_path):
    orders = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(orders))
        model = Line()
        train(model, Points(), tmp_path / folder, seed=seed)
        orders.append(model.seen)
    assert orders[0] == orders[1] != orders[2]


def test_the_model_knows_how_far_training_is(tmp_path):
    model = Line()
    train(model, Points(), tmp_path, epochs=2)
    assert model.moments == pytest.approx([step / 6 for step in range(6)])


def test_a_clipped_gradient_takes_small_steps(tmp_path):
    model = Line()
    train(model, Points(), tmp_path, epochs=1, lr=1.0, clip_gradient=1e-3)
    assert 0 < model.slope.item() <= 3e-3


class Killed(Exception):
    """Stands for a kill at that place."""


class Mortal:
    """Examples on which training dies in the middle of an epoch, if it is told so."""

    def __init__(self, examples, dies_in=None):
        self.examples, self.dies_in = examples, dies_in
        self.epochs = []

    def __len__(self):
        return len(self.examples)

    def set_epoch(self, epoch):
        if epoch not in self.epochs:  # the loader sets it too
            self.epochs.append(epoch)
            self.reads = 0
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)

    def __getitem__(self, index):
        self.reads += 1
        if self.epochs[-1] == self.dies_in and self.reads > 6:
            raise Killed
        return self.examples[index]


def figures(history):
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in history]


def assert_same_weights(first, second):
    second = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second[name]), name


@pytest.fixture
def classifier(cam_folder):
    """A CAM classifier with DRS, whose random numbers in training come from dropout."""
    model = CamClassifier.from_pretrained(cam_folder)
    model.backbone.register_forward_hook(lambda module, args, maps: (*maps[:-1], nn.functional.dropout(maps[-1])))
    return model


def tagged_examples(toy_data):
    return TaggedExamples(toy_data["train"], TrainTransform(48))


WITH_STATE = {"optimizer": "adamw", "lr": 1e-3, "freeze_batch_norm": False, "warmup": 0.3}


def test_a_resumed_run_equals_the_unbroken_one(classifier, toy_data, tmp_path):
    broken = copy.deepcopy(classifier)
    unbroken = train(classifier, Mortal(tagged_examples(toy_data)), tmp_path / "unbroken", **WITH_STATE)
    start = copy.deepcopy(broken)
    with pytest.raises(Killed):
        train(broken, Mortal(tagged_examples(toy_data), dies_in=1), tmp_path / "broken", **WITH_STATE)
    AcceleratorState._reset_state()
    torch.manual_seed(123)
    again = Mortal(tagged_examples(toy_data))
    resumed = train(start, again, tmp_path / "broken", **WITH_STATE)
    assert again.epochs == [1, 2]
    assert figures(resumed) == figures(unbroken)
    assert_same_weights(start, classifier)


def test_checkpoints_of_another_training_are_not_taken(tmp_path):
    """Of the same network and length, but of another seed, rate or number of examples."""
    for name, points, changes in (("seed", 12, {"seed": 1}), ("rate", 12, {"lr": 0.2}), ("examples", 13, {})):
        with pytest.raises(Killed):
            train(Line(), Mortal(Points(points), dies_in=2), tmp_path / name, **changes)
        again = Mortal(Points())
        train(Line(), again, tmp_path / name)
        assert again.epochs == [0, 1, 2], name


def test_a_loss_that_is_no_number_is_named(tmp_path):
    class Broken(Line):
        def forward(self, x, y):
            output = super().forward(x, y)
            output.losses["prototypes"] = output.loss = output.loss * float("nan")
            return output

    with pytest.raises(TrainingError, match="the loss 'prototypes' became nan in epoch 1, step 1; a smaller learning"):
        train(Broken(), Points(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_diverging_training_stops_before_the_epoch_ends(tmp_path):
    model = Line()
    with pytest.raises(TrainingError, match="the loss 'square' became (inf|nan) in epoch 1, step"):
        train(model, Points(400), tmp_path, lr=1e3, epochs=1)
    assert len(model.seen) < 100


def test_fewer_examples_than_a_batch_are_one_batch(tmp_path):
    model = Line()
    history = train(model, Points(3), tmp_path, epochs=2)
    assert [len(seen) for seen in model.seen] == [3, 3] and history[1]["square"] < history[0]["square"]


def test_a_number_of_steps_ends_in_the_middle_of_an_epoch(tmp_path):
    model = Line()
    history = train(model, Points(), tmp_path, epochs=9, steps=8)  # three batches an epoch
    assert len(model.seen) == 8 and [record["epoch"] for record in history] == [1, 2, 3]
    assert model.moments == pytest.approx([step / 8 for step in range(8)])
    assert history[-1]["lr"] == pytest.approx(0, abs=1e-9)  # the schedule ends with the steps
    broken = Line()
    with pytest.raises(Killed):
        train(broken, Mortal(Points(), dies_in=1), tmp_path / "broken", steps=8)
    resumed = Line()
    again = Mortal(Points())
    assert figures(train(resumed, again, tmp_path / "broken", steps=8)) == figures(history)
    assert again.epochs == [1, 2]
    assert_same_weights(model, resumed)


def test_an_unknown_precision_is_refused():
    with pytest.raises(OptionError, match="mixed_precision: expected no, bf16 or fp16, got 'bf61'"):
        settings(mixed_precision="bf61")


def test_bf16_keeps_weights_in_float32_and_losses_finite(cam_folder, toy_data, tmp_path):
    model = CamClassifier.from_pretrained(cam_folder)
    maps = []
    model.classifier.register_forward_hook(lambda module, args, cams: maps.append(cams.dtype))
    history = train(model, tagged_examples(toy_data), tmp_path, epochs=1, mixed_precision="bf16", **{"lr": 1e-3})
    assert set(maps) == {torch.bfloat16}
    assert 0 < history[0]["classification"] < 10
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_is_frozen_if_the_recipe_says_so(cam_folder, toy_data, tmp_path, frozen):
    model = CamClassifier.from_pretrained(cam_folder)
    before = copy.deepcopy(model.state_dict())
    train(model, tagged_examples(toy_data), tmp_path, epochs=2, freeze_batch_norm=frozen)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    norms = {name for name in changed if "running_mean" in name or "normalization" in name}
    assert "classifier.weight" in changed and bool(norms) is not frozen
