import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from kills import every_kill
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from wsss_hf.training import checkpoints
from wsss_hf.training.checkpoints import CheckpointError, newest, resume, save


class Training:
    """A few steps of Adam whose random numbers come from torch; `slope` says where it stands."""

    def __init__(self, width=3, optimizer=torch.optim.AdamW):
        AcceleratorState._reset_state()
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        self.width, model = width, nn.Linear(width, 1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer(model.parameters(), lr=0.1))
        self.steps = 0

    def step(self):
        self.optimizer.zero_grad()
        self.accelerator.backward(self.model(torch.randn(4, self.width)).square().mean())
        self.optimizer.step()
        self.steps += 1

    def go_on(self, folder, until, keep=2):
        saved = resume(self.accelerator, folder)
        self.steps = saved["steps"] if saved else 0
        first = self.steps
        while self.steps < until:
            self.step()
            save(self.accelerator, folder, self.steps, {"steps": self.steps, "lr": 0.1}, keep)
        return first

    @property
    def weights(self):
        return self.model.weight.tolist()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    """Checkpoints after steps 2 and 3."""
    Training().go_on(tmp_path / "checkpoints", 3)
    return tmp_path / "checkpoints"


@pytest.fixture
def unbroken(tmp_path):
    training = Training()
    training.go_on(tmp_path / "unbroken", 5)
    return training.weights


def test_a_training_goes_on_where_it_was(folder, unbroken):
    training = Training()
    torch.manual_seed(123)  # the random state is the checkpoint's
    assert training.go_on(folder, 5) == 3
    assert training.weights == unbroken


def test_nothing_to_go_on_from_is_no_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert newest(tmp_path / name) is None and resume(Training().accelerator, tmp_path / name) is None


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (9, [1, 2, 3])])
def test_the_newest_stay(tmp_path, keep, left):
    Training().go_on(tmp_path, 3, keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]
    assert newest(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_kill_before_any_file_operation_loses_one_step_at_most(tmp_path, unbroken, keep):
    reached = []

    def work(folder):
        reached.append(0)
        training = Training()
        while training.steps < 3:
            training.step()
            save(training.accelerator, folder / "checkpoints", training.steps, {"steps": training.steps}, keep)
            reached[-1] = training.steps

    kills = 0
    for operation, killed in every_kill(tmp_path, work):
        kills += 1
        training = Training()
        assert training.go_on(killed / "checkpoints", 5, keep) >= reached[-1], operation
        assert training.weights == unbroken, operation
        assert names(killed / "checkpoints") == ["step-00000004", "step-00000005"][-keep:], operation
    assert kills > 30


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path):
    path.write_bytes(b"something else")


FILES = ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json", "files.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, empty, flip, replace, Path.unlink])
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(folder, unbroken, capsys, file, damage):
    assert names(folder / "step-00000003") == sorted(FILES)
    damage(folder / "step-00000003" / file)
    training = Training()
    capsys.readouterr()
    assert training.go_on(folder, 5) == 2
    said = capsys.readouterr().err
    assert "step-00000003 is damaged (" in said and said.count("\n") == 1
    assert file in said or (damage, file) == (flip, "files.json")  # which then tells of another file
    assert training.weights == unbroken and names(folder) == ["step-00000004", "step-00000005"]


def test_a_training_without_a_whole_checkpoint_begins_anew(folder, unbroken, capsys):
    for checkpoint in folder.iterdir():
        empty(checkpoint / "model.safetensors")
    training = Training()
    assert training.go_on(folder, 5) == 0 and training.weights == unbroken
    assert capsys.readouterr().err.count("is damaged") == 2


def test_what_is_no_checkpoint_is_never_taken_and_swept(folder):
    shutil.copytree(folder / "step-00000003", folder / "step-00000009.new")
    (folder / "step-00000008").write_text("a file")
    assert Training().go_on(folder, 4) == 3
    assert names(folder) == ["step-00000003", "step-00000004"]


class Poison:
    """Makes the file OWNED where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin"])
def test_no_code_of_a_checkpoint_is_run(folder, tmp_path, file, listed):
    for checkpoint in folder.iterdir():
        torch.save({"state": Poison(tmp_path / "OWNED")}, checkpoint / file)
        if listed:  # by somebody who knows the format
            manifest = {"run": "", "files": checkpoints._contents(checkpoint)}
            (checkpoint / "files.json").write_text(json.dumps(manifest))
    training = Training()
    try:
        training.go_on(folder, 4)
    except CheckpointError as error:
        assert listed and str(error).startswith(f"{folder}/step-00000003: expected a checkpoint of this training")
    assert not (tmp_path / "OWNED").exists()


def test_no_code_in_the_records_of_shards_is_run(folder, tmp_path):
    """Which torch opens as any pickle where FSDP's checkpoints are sharded."""
    checkpoint = folder / "step-00000003"
    (checkpoint / "optimizer_0").mkdir()
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Poison(tmp_path / "OWNED")))
    (checkpoint / "files.json").write_text(json.dumps({"run": "", "files": checkpoints._contents(checkpoint)}))
    with pytest.raises(CheckpointError, match="is no record of a shard"):
        resume(Training().accelerator, folder)
    assert not (tmp_path / "OWNED").exists()


def test_an_object_whose_state_would_be_a_pickle_is_refused(tmp_path):
    training = Training()
    training.accelerator.register_for_checkpointing(torch.optim.lr_scheduler.ConstantLR(training.optimizer.optimizer))
    with pytest.raises(
        ValueError, match="register_for_checkpointing: expected no object, its state would be a pickle"
    ):
        save(training.accelerator, tmp_path / "checkpoints", 1, {})
    assert newest(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("other", [{"width": 5}, {"optimizer": lambda p, lr: torch.optim.SGD(list(p)[:1], lr)}])
def test_a_checkpoint_of_another_training_is_one_line(folder, other):
    with pytest.raises(CheckpointError) as caught:
        resume(Training(**other).accelerator, folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}/step-00000003: expected a checkpoint of this training, got another (")
    assert message.endswith(f"; remove {folder} to begin anew") and "\n" not in message


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("FSDP", "NO", "with FSDP, which wrote it, got one with neither FSDP nor DeepSpeed; remove "),
        ("MULTI_CPU", "FSDP", "with neither FSDP nor DeepSpeed, which wrote it, got one with FSDP; remove "),
    ],
    ids=["FSDP", "neither"],
)
def test_a_checkpoint_of_weights_shared_out_otherwise_is_one_line(tmp_path, monkeypatch, before, after, said):
    accelerator, state = Accelerator(cpu=True), AcceleratorState._shared_state
    monkeypatch.setattr(accelerator, "save_state", lambda folder: Path(folder).mkdir())
    monkeypatch.setitem(state, "distributed_type", DistributedType[before])
    save(accelerator, tmp_path, 1, {})
    monkeypatch.setitem(state, "distributed_type", DistributedType[after])
    with pytest.raises(CheckpointError, match=f"step-00000001: expected a training {said}"):
        resume(accelerator, tmp_path)


def test_a_checkpoint_of_another_run_is_not_taken(folder, capsys):
    accelerator = Training().accelerator
    assert newest(folder, "seed 1") is None and resume(accelerator, folder, "seed 1") is None
    assert capsys.readouterr().err.count("is damaged (it is of another training)") == 4
    save(accelerator, folder, 4, {}, run="seed 1")
    assert newest(folder, "seed 1").name == "step-00000004" and newest(folder, "").name == "step-00000003"


FULL = RuntimeError("enforce fail at inline")


@pytest.mark.parametrize("error", [SafetensorError("enforce fail"), FULL, CheckpointException("", {0: (FULL, None)})])
def test_a_full_disk_is_an_error_of_the_system(folder, monkeypatch, error):
    training = Training()

    def full(*_arguments, **_options):
        raise error

    monkeypatch.setattr(training.accelerator, "save_state", full)
    with pytest.raises(OSError, match=rf"{folder}/step-00000004.new: can't be written \(enforce fail"):
        save(training.accelerator, folder, 4, {})
    assert newest(folder).name == "step-00000003"


def test_processes_save_and_resume_together(tmp_path, in_two_processes):
    """Each has random numbers of its own, and one checkpoint holds both."""

    def work(rank):
        training = Training()
        assert training.accelerator.process_index == rank
        torch.manual_seed(rank)
        training.step()
        save(training.accelerator, tmp_path / "checkpoints", 1, {"steps": 1})
        wanted = torch.rand(3).tolist()
        torch.manual_seed(99)
        again = Training()
        saved = resume(again.accelerator, tmp_path / "checkpoints")
        return rank, saved, torch.rand(3).tolist() == wanted, wanted

    (_, *first), (_, *second) = sorted(in_two_processes(work))
    assert first[:2] == second[:2] == [{"steps": 1}, True] and first[2] != second[2]
    assert names(tmp_path / "checkpoints") == ["step-00000001"]
