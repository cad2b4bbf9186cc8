"""Trainings on several processes, in micro-batches, broken off anywhere: all end alike."""

import copy
import errno
import itertools
import json
import os
import signal
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from test_loop import Killed, Line, Mortal, Points, assert_same_weights, figures, settings, tagged_examples
from torch import nn

from wsss_hf.cli.launch import _join_processes
from wsss_hf.data.examples import StreamedExamples
from wsss_hf.models.configuration_cam import CamConfig
from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.settings import RecipeError
from wsss_hf.training import checkpoints, loop
from wsss_hf.training.build import freeze_batch_norm
from wsss_hf.training.launcher import build_accelerator
from wsss_hf.training.loop import Training, TrainingError
from wsss_hf.training.losses import SegmentationObjective, build_loss


def train(model, examples, folder, seed=0, **changes):
    wanted = settings(**changes)
    return Training(model, examples, wanted, build_accelerator(wanted), folder, seed).run()


class DroppingLine(Line):
    """Drops points at random."""

    def forward(self, x, y):
        return super().forward(nn.functional.dropout(x), y)


# Micro-batches and processes


def trained_slope(model, examples, folder, **changes):
    train(model, examples, folder, **changes)
    return model.slope.item()


def test_micro_batches_and_processes_give_one_result(tmp_path, in_processes):
    shared = {"epochs": 2, "batch_size": 8, "lr": 0.5}
    whole = DroppingLine()
    alone = trained_slope(whole, Points(24), tmp_path / "alone", accumulate=4, **shared)

    # The same by hand: a step of gradient descent on the mean of four losses.
    slope, steps = 0.0, 6
    for step in range(steps):
        parts = [torch.tensor(x) for x in whole.seen[4 * step : 4 * step + 4]]
        # Where a point is left, dropout has doubled its x, which then is its y.
        gradient = sum((2 * (slope * x - x) * x).mean().item() for x in parts) / 4
        slope -= 0.5 * (1 - step / steps) ** 0.9 * gradient
    assert len(whole.seen) == 4 * steps and {len(x) for x in whole.seen} == {2}
    assert alone == pytest.approx(slope, abs=1e-5) and alone > 0.05

    def work():
        return trained_slope(DroppingLine(), Points(24), tmp_path / "two", accumulate=2, **shared)

    first, second = in_processes(work)
    assert first == second == pytest.approx(alone, abs=1e-5)


def test_a_batch_that_does_not_divide_is_shared_unevenly(tmp_path, in_processes):
    shared = {"epochs": 2, "batch_size": 5, "lr": 0.5}
    alone, in_parts = Line(), Line()
    train(alone, Points(15), tmp_path / "alone", **shared)
    train(in_parts, Points(15), tmp_path / "parts", accumulate=3, **shared)
    assert [len(x) for x in in_parts.seen[:3]] == [2, 2, 1]
    assert [sum(in_parts.seen[k : k + 3], []) for k in (0, 3)] == alone.seen[:2]

    def work():
        model = Line()
        history = train(model, Points(15), tmp_path / "two", **shared)
        return model.slope.item(), figures(history), [len(x) for x in model.seen[:2]]

    (slope, history, sizes), (same, _, other_sizes) = in_processes(work)
    assert (sizes, other_sizes) == ([3, 3], [2, 2])
    assert alone.slope.item() == pytest.approx(in_parts.slope.item(), abs=1e-6)
    assert alone.slope.item() == pytest.approx(slope, abs=1e-6) and slope == same
    expected = figures(train(Line(), Points(15), tmp_path / "again", **shared))
    assert [record["square"] for record in history] == pytest.approx([r["square"] for r in expected], rel=1e-5)


@pytest.fixture
def partly_labelled(toy_data):
    """Images of which some are labelled in a corner or nowhere, and what trains on them."""
    shares = [48, 4, 0, 12, 0, 30, 48, 7, 1, 48, 20, 2]  # of 48 rows

    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            random = torch.Generator().manual_seed(index)
            labels = torch.randint(0, 9, (48, 48), generator=random)
            labels[shares[index] :] = 255
            confidence = torch.rand(48, 48, generator=random)
            return {
                "pixel_values": torch.randn(3, 48, 48, generator=random),
                "labels": labels,
                "confidence": confidence,
            }

    def build():
        torch.manual_seed(0)
        config = SegmenterConfig(backbone_config=dict(TINY), id2label=dict(enumerate("_abcdefgh")), rates=[1])
        return SegmentationObjective(Segmenter(config), build_loss("cross_entropy"))

    return build, Examples()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"clip_gradient": 0.1}], ids=str)
def test_ignored_pixels_count_alike_in_any_number_of_parts(partly_labelled, tmp_path, in_processes, changes):
    """The loss of a step is the mean over its labelled pixels, wherever they are."""
    build, examples = partly_labelled
    shared = {"epochs": 2, "batch_size": 6, "lr": 0.05} | changes

    def work(folder, accumulate):
        model = build()
        history = train(model, examples, tmp_path / folder, accumulate=accumulate, **shared)
        logged = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        assert abs(json.loads(logged[0])["loss"] - 2.2) < 0.4  # about log 9, of whatever share of the pixels
        return {name: value.tolist() for name, value in model.state_dict().items()}, figures(history)

    whole, wanted = work("whole", 1)
    start = {name: value.tolist() for name, value in build().state_dict().items()}
    assert whole["model.head.0.weight"] != start["model.head.0.weight"]
    tolerance = 1e-5 if not changes.get("mixed_precision") else 3e-3
    for found, history in (
        work("parts", 6),
        *in_processes(lambda: work("two", 3)),
        *in_processes(lambda: work("2", 1)),
    ):
        for name, value in whole.items():
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), atol=tolerance, rtol=tolerance)
        assert [record["loss"] for record in history] == pytest.approx([r["loss"] for r in wanted], rel=tolerance)


def test_a_step_in_which_nothing_is_labelled_teaches_nothing(partly_labelled, tmp_path, in_processes):
    build, examples = partly_labelled
    nothing = [examples[number] for number in (2, 4, 2, 4)]

    def work():
        model = build()
        history = train(model, nothing, tmp_path, epochs=1)
        return {name: value.tolist() for name, value in model.state_dict().items()}, history[0]["loss"]

    for weights, loss in in_processes(work):
        assert loss == 0 and weights == {name: value.tolist() for name, value in build().state_dict().items()}


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (1, {}, "training images: expected at least 2, one for each process, got 1"),
        (
            12,
            {"batch_size": 1},
            "batch_size: expected at least 2, an image for each of 2 processes x 1 micro-b.* got 1",
        ),
        (
            12,
            {"accumulate": 3},
            "batch_size: expected at least 6, an image for each of 2 processes x 3 micro-.* got 4",
        ),
        (12, {"sync_batch_norm": True}, "sync_batch_norm: expected processes on GPUs, got cpu"),
    ],
)
def test_what_two_processes_can_not_share_is_refused(tmp_path, in_processes, count, changes, message):
    def work():
        wanted = settings(**changes)
        accelerator = build_accelerator(wanted)
        accelerator.wait_for_everyone()  # neither is gone before the other has found it
        Training(Line(), Points(count), wanted, accelerator, tmp_path)

    for error in in_processes(work):
        assert isinstance(error, RecipeError)
        with pytest.raises(RecipeError, match=message):
            raise error


def test_processes_on_gpus_share_the_statistics_of_norms_that_learn(cam_folder):
    model = CamClassifier.from_pretrained(cam_folder)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    gpus = SimpleNamespace(use_distributed=True, device=torch.device("cuda", 0))
    synced = loop._with_synced_norms(model, gpus)
    norms = [module for module in synced.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(norms) == count > 0
    freeze_batch_norm(synced.train())  # what is kept waits for nobody
    assert not any(norm.training for norm in norms)


@pytest.mark.parametrize("meet", [lambda: build_accelerator(settings()), _join_processes], ids=["python", "command"])
def test_processes_wait_for_each_other_for_hours(in_processes, meet):
    def work():
        meet()
        group = torch.distributed.group.WORLD
        return group._get_backend(torch.device("cpu")).options._timeout

    assert in_processes(work) == [timedelta(hours=6)] * 2


def test_fewer_images_than_a_batch_make_fewer_micro_batches(tmp_path):
    model = Line()
    train(model, Points(3), tmp_path, epochs=1, accumulate=4)
    assert [len(x) for x in model.seen] == [1, 1, 1]


def test_the_error_of_a_process_ends_the_others(tmp_path, in_processes):
    class Unreadable(Points):
        def __getitem__(self, index):
            if os.environ["RANK"] == "1" and index == 7:
                raise ValueError("row 'img7': expected an image,\ngot nothing")
            return super().__getitem__(index)

    waiting, failing = in_processes(lambda: train(Line(), Unreadable(), tmp_path, epochs=4))
    assert isinstance(failing, ValueError)
    assert isinstance(waiting, TrainingError)
    assert str(waiting) == "process 1 failed: row 'img7': expected an image, got nothing"


def test_a_process_that_is_killed_ends_the_others(tmp_path, in_processes):
    class Deadly(Points):
        def __getitem__(self, index):
            if os.environ["RANK"] == "1" and index == 7:
                raise SystemExit  # without a word to the others
            return super().__getitem__(index)

    waiting, _ = in_processes(lambda: train(Line(), Deadly(), tmp_path, epochs=4))
    assert isinstance(waiting, TrainingError)
    assert "another process has ended without an error" in str(waiting)


def test_a_batch_that_does_not_fit_says_what_to_set(tmp_path):
    class Huge(Line):
        def forward(self, x, y):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(TrainingError, match="4 images at a time do not fit into the memory of cpu .* accumulate=2 "):
        train(Huge(), Points(), tmp_path)
    with pytest.raises(TrainingError, match="1 images .* in epoch 1, step 1; gradient_checkpointing=true"):
        train(Huge(), Points(), tmp_path, accumulate=4)


def test_the_optimisers_state_may_be_what_does_not_fit(tmp_path, monkeypatch):
    def step(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(TrainingError, match="4 images at a time do not fit into the memory of cpu in epoch 1, step 1"):
        train(Line(), Points(), tmp_path, optimizer="adamw")


# Broken off


class Interrupting(Mortal):
    """Examples that send this process a signal when the `reads`-th of an epoch is read."""

    def __init__(self, examples, epoch, reads, number):
        super().__init__(examples)
        self.at, self.number = (epoch, reads), number

    def __getitem__(self, index):
        if (self.epochs[-1], self.reads) == self.at:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


TINY = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
}
METHODS = {
    "drs": {},
    "icd": {"hidden_channels": 8},
    "plda": {"hidden": [8], "pamr_iterations": 1, "pamr_dilations": [1]},
}
IN_THE_MIDDLE = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "freeze_batch_norm": False,
    "warmup": 0.3,
    "accumulate": 2,
    "ema": 0.6,
    "save_minutes": 0,
}


@pytest.fixture
def network():
    """A CAM classifier whose methods keep running means and draw random numbers."""
    torch.manual_seed(0)
    return CamClassifier(CamConfig(backbone_config=TINY, id2label=dict(enumerate("abcdefgh")), **METHODS))


@pytest.mark.slow
def test_a_classifier_learns_alike_in_micro_batches_and_processes(toy_data, tmp_path, in_processes):
    """What compares no images: of one process and two, each micro-batch holds the same ones."""
    torch.manual_seed(0)
    seam = {"projections": [8, 8], "embedding": 8}
    start = CamClassifier(CamConfig(backbone_config=TINY, id2label=dict(enumerate("abcdefgh")), drs={}, seam=seam))

    def work(folder, accumulate):
        model = copy.deepcopy(start)
        examples = tagged_examples(toy_data)
        history = train(model, examples, tmp_path / folder, epochs=2, batch_size=8, lr=1e-2, accumulate=accumulate)
        return {name: value.tolist() for name, value in model.state_dict().items()}, figures(history)

    alone, wanted = work("alone", 4)
    assert alone["classifier.weight"] != start.state_dict()["classifier.weight"].tolist()
    for found, history in in_processes(lambda: work("two", 2)):
        for name, value in alone.items():
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), atol=1e-5, rtol=0, msg=name)
        for record, expected in zip(history, wanted, strict=True):
            assert record == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_training_stopped_in_an_epoch_goes_on_bit_for_bit(network, toy_data, tmp_path, number, capfd):
    stopped, resumed = copy.deepcopy(network), copy.deepcopy(network)
    examples = Mortal(tagged_examples(toy_data))
    wanted = train(network, examples, tmp_path / "unbroken", **IN_THE_MIDDLE)
    assert any(state.any() for name, state in network.named_buffers() if name.startswith("methods"))

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as stop:
        again = Interrupting(tagged_examples(toy_data), epoch=1, reads=4, number=number)
        train(stopped, again, tmp_path / "broken", **IN_THE_MIDDLE)
    assert stop.value.code == 75
    assert f"stopped after step 4 by {number.name}; the same command goes on" in capfd.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert checkpoints.newest(tmp_path / "broken" / "checkpoints").name == "step-00000004"

    torch.manual_seed(123)
    rest = Mortal(tagged_examples(toy_data))
    history = train(resumed, rest, tmp_path / "broken", **IN_THE_MIDDLE)
    assert rest.epochs == [1, 2]
    assert figures(history) == figures(wanted)
    assert_same_weights(resumed, network)


def test_another_number_of_processes_goes_on_where_one_was_stopped(tmp_path, in_processes):
    shared = {"epochs": 3, "optimizer": "adamw"}
    whole = DroppingLine()
    wanted = train(whole, Points(), tmp_path / "unbroken", accumulate=2, **shared)
    with pytest.raises(SystemExit):
        stopping = Interrupting(Points(), epoch=1, reads=5, number=signal.SIGUSR1)
        train(DroppingLine(), stopping, tmp_path / "broken", accumulate=2, **shared)

    def work():
        model = DroppingLine()
        return train(model, Points(), tmp_path / "broken", **shared), model.slope.item()

    (history, slope), (_, same) = in_processes(work)
    assert slope == same == pytest.approx(whole.slope.item(), abs=1e-6)
    assert [r["square"] for r in history] == pytest.approx([r["square"] for r in wanted], abs=1e-6)


class Stream(StreamedExamples):
    """Points 0, 1, 2 … without end, of which each process gets every so-manyth; notes those that are read."""

    def __init__(self):
        self.read = []

    def __iter__(self):
        for number in itertools.count(self.process + self.start * self.processes, self.processes):
            self.read.append(number)
            yield {"x": torch.tensor([number % 5 / 5 - 0.4]), "y": torch.tensor([number % 5 / 5 - 0.4])}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_goes_on_with_another_number_of_processes(tmp_path, in_processes, capfd, processes):
    """It stops after two steps of four images; these are read again by nobody."""
    shared = {"steps": 6, "optimizer": "adamw", "save_steps": 2}

    def begin():
        training = Training(
            Line(), Stream(), settings(**shared), build_accelerator(settings(**shared)), tmp_path / "broken"
        )
        update = training._update_weights

        def mortal():
            update()
            if training.step == 3:
                raise Killed

        training._update_weights = mortal
        with pytest.raises(Killed):
            training.run()

    def go_on():
        model, stream = Line(), Stream()
        train(model, stream, tmp_path / "broken", **shared)
        return sorted(stream.read), model.slope.item()

    if processes == 2:
        begin()
        results = in_processes(go_on)
    else:
        in_processes(begin)
        capfd.readouterr()
        results = [go_on()]
    assert (
        f"training: goes on after step 2 on {processes} instead of {3 - processes} processes" in capfd.readouterr().err
    )
    whole = Line()
    train(whole, Stream(), tmp_path / "unbroken", **shared)
    read = [number for numbers, _ in results for number in numbers]
    assert sorted(read) == list(range(8, 24))  # here, where rows are dealt alike, none is lost
    assert all(slope == pytest.approx(whole.slope.item(), abs=1e-6) for _, slope in results)


def test_a_signal_to_one_process_stops_both(tmp_path, in_processes):
    def work():
        examples = Points(48)
        if os.environ["RANK"] == "1":
            examples = Interrupting(Points(48), epoch=0, reads=5, number=signal.SIGUSR1)
        train(Line(), examples, tmp_path, epochs=100)

    for stop in in_processes(work):
        assert isinstance(stop, SystemExit) and stop.code == 75
    assert checkpoints.newest(tmp_path / "checkpoints") is not None


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"save_steps": 2}, ["step-00000002", "step-00000003"]),
        ({"save_steps": 1, "keep": 1}, ["step-00000003"]),
        ({"save_minutes": 1e-9, "keep": 3}, ["step-00000001", "step-00000002", "step-00000003"]),
        ({"save_minutes": 0}, ["step-00000003"]),
    ],
)
def test_checkpoints_are_written_when_they_are_due(tmp_path, changes, kept):
    with pytest.raises(Killed):
        train(Line(), Mortal(Points(), dies_in=1), tmp_path, **changes)  # before the first step of the second epoch
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    saved = []

    def save_state(accelerator, folder):
        if saved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
        saved.append(folder)
        return whole_save(accelerator, folder)

    whole_save = checkpoints.Accelerator.save_state
    monkeypatch.setattr(checkpoints.Accelerator, "save_state", save_state)
    with pytest.raises(
        TrainingError, match="checkpoint of step 6 could not .* No space left .* step 3 is whole"
    ) as full:
        train(Line(), Points(), tmp_path)
    assert "\n" not in str(full.value)
    assert checkpoints.newest(tmp_path / "checkpoints").name == "step-00000003"


def test_a_full_disk_ends_all_processes_with_one_line(tmp_path, in_processes, monkeypatch):
    def save_state(accelerator, folder):
        if accelerator.is_main_process:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)

    monkeypatch.setattr(checkpoints.Accelerator, "save_state", save_state)
    writing, waiting = in_processes(lambda: train(Line(), Points(), tmp_path))
    assert isinstance(writing, TrainingError) and isinstance(waiting, TrainingError)
    assert "checkpoint of step 3 could not be written" in str(writing) and "there is none before it" in str(writing)
    assert str(waiting) == f"process 0 failed: {writing}"


# Settings


def test_the_average_of_the_weights_is_saved_in_their_place(tmp_path):
    model = Line()
    wanted = settings(epochs=1, ema=0.75, lr=0.5)
    training = Training(model, Points(), wanted, build_accelerator(wanted), tmp_path)
    update, slopes = training._update_weights, []

    def watched():
        update()
        slopes.append(model.slope.item())

    training._update_weights = watched
    training.run()
    average = slopes[0]
    for slope in slopes[1:]:
        average = 0.75 * average + 0.25 * slope
    assert len(slopes) == 3 and slopes[0] < slopes[2]
    assert model.slope.item() == pytest.approx(average, rel=1e-6) != slopes[-1]


SPEED = [{"fused": True}, {"channels_last": False}, {"fused": True, "optimizer": "adamw"}]


@pytest.mark.parametrize("changes", SPEED)
def test_settings_of_speed_change_nothing_but_rounding(cam_folder, toy_data, tmp_path, changes):
    fast, plain = (CamClassifier.from_pretrained(cam_folder) for _ in range(2))
    seen = []
    fast.backbone.register_forward_hook(
        lambda *_: seen.append(fast.backbone.body.embedder.embedder.convolution.weight)
    )
    changes = {"lr": 1e-2, "epochs": 1} | changes
    wanted = settings(**changes)
    training = Training(fast, tagged_examples(toy_data), wanted, build_accelerator(wanted), tmp_path / "fast")
    training.run()
    train(plain, tagged_examples(toy_data), tmp_path / "plain", **changes | {"fused": False, "channels_last": True})
    for name, value in plain.state_dict().items():
        assert torch.allclose(fast.state_dict()[name], value, atol=1e-4), name
    assert bool(training.optimizer.defaults["fused"]) is wanted.fused
    assert seen[0].is_contiguous(memory_format=torch.channels_last) is wanted.channels_last


def test_the_log_of_steps_goes_on_with_the_training(tmp_path):
    with pytest.raises(Killed):
        train(Line(), Mortal(Points(48), dies_in=1), tmp_path, epochs=2)
    log = tmp_path / "log.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 11, 12]
    with log.open("a") as file:
        file.write('{"step": 1')  # cut off by the kill
    train(Line(), Mortal(Points(48)), tmp_path, epochs=2)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 11, 12, 13, 23, 24]
    assert set(records[0]) == {"step", "square", "size", "lr", "images_per_second", "memory_gb"}
    assert 0 < records[0]["memory_gb"] < 100
