"""DeepSpeed's ZeRO on two CPU processes, with the packaged configuration files; where DeepSpeed is installed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

# AdamW would make much of rounding where gradients are small.
SETTINGS = {"epochs": 6, "optimizer": "sgd", "lr": 0.01, "warmup": 0, "freeze_batch_norm": True, "save_steps": 2}
ADAM = {"optimizer": "adamw", "lr": 1e-4}
DATA = ["--data", "toy", "--recipe", "toy", "--set", "toy.num_train=32", "--set", "toy.num_val=4"]


def command(stage, out, **changes):
    section = "cam" if stage == "train-cam" else "segmenter"
    values = SETTINGS | changes
    settings = [part for key, value in values.items() for part in ("--set", f"{section}.train.{key}={value}")]
    return [stage, *DATA, *settings, "--out", str(out)]


def launcher(name, folder, processes=2):
    config = yaml.safe_load((resources.files("wsss_hf.training") / f"{name}.yaml").read_text())
    file = folder / f"{name}-{processes}.yaml"
    file.write_text(yaml.safe_dump(config | {"num_processes": processes}))
    script = Path(__file__).with_name("deepspeed_on_cpu.py")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), str(script)]


@pytest.fixture
def environment(monkeypatch):
    for name, value in {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("name", "stage"), [("zero2", "train-cam"), ("zero3", "train-segmenter")])
def test_a_tracker_gets_the_maps_of_shared_weights(name, stage, tmp_path, environment):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ["--supervised", "--set", "segmenter.from_cam=false"] if stage == "train-segmenter" else []
    train = command(stage, tmp_path / "two", epochs=2, track="tensorboard", track_steps=2)
    subprocess.run([*launcher(name, tmp_path), *train, *more], check=True)
    files = [events.EventAccumulator(str(file)).Reload() for file in (tmp_path / "two").rglob("events.*")]
    shown = {name: file.Images(name) for file in files for name in file.Tags()["images"]}
    assert shown and all([picture.step for picture in pictures] == [2, 4] for pictures in shown.values())


@pytest.mark.parametrize("name", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", ["train-cam", "train-segmenter"])
def test_zero_trains_what_one_process_trains(name, stage, tmp_path, environment):
    more = ["--supervised", "--set", "segmenter.from_cam=false"] if stage == "train-segmenter" else []
    subprocess.run([*launcher(name, tmp_path), *command(stage, tmp_path / "two", epochs=2), *more], check=True)
    alone = [sys.executable, "-m", "wsss_hf", *command(stage, tmp_path / "one", epochs=2), *more]
    subprocess.run(alone, check=True)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(("before", "after", "changes"), [(2, 1, {}), (1, 2, ADAM)], ids=["fewer", "more"])
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_killed_training_goes_on_with_any_number_of_processes(name, before, after, changes, tmp_path, environment):
    launch = launcher(name, tmp_path, before)
    subprocess.run([*launch, *command("train-cam", tmp_path / "unbroken", **changes)], check=True)
    killed = tmp_path / "killed"
    run = subprocess.Popen([*launch, *command("train-cam", killed, **changes)], start_new_session=True)
    checkpoint = tmp_path / "killed.partial/checkpoints/step-00000004"
    while not checkpoint.is_dir() and run.poll() is None:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert checkpoint.is_dir() and not killed.exists()
    shutil.copytree(tmp_path / "killed.partial", tmp_path / "other.partial")
    (tmp_path / "other.partial/checkpoints/step-00000004.dealt").mkdir()  # of a run that was killed as it resumed
    other = [*launcher(name, tmp_path, after), *command("train-cam", tmp_path / "other", **changes)]
    said = subprocess.run(other, check=True, stderr=subprocess.PIPE, text=True).stderr
    assert said.count(f" is dealt out to {after} processes\n") == 1
    subprocess.run([*launch, *command("train-cam", killed, **changes)], check=True)
    unbroken, other = weights(tmp_path / "unbroken"), weights(tmp_path / "other")
    for key, value in weights(killed).items():
        assert torch.equal(value, unbroken[key])
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_half_precision_is_near_to_whole(name, tmp_path, environment):
    norms_of_layers = "{model_type: convnext, num_stages: 2, depths: [1, 1], hidden_sizes: [16, 32]}"
    for precision in ("no", "bf16"):
        changes = {"epochs": 2, "mixed_precision": precision}
        train = [
            *command("train-cam", tmp_path / precision, **changes),
            "--set",
            f"cam.backbone_config={norms_of_layers}",
        ]
        subprocess.run([*launcher(name, tmp_path), *train], check=True)
    whole, half = (json.loads((tmp_path / name / "training_log.json").read_text()) for name in ("no", "bf16"))
    losses = [[record["classification"] for record in log] for log in (whole, half)]
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0][-1] < 0.9 * losses[0][0]  # so that they say something
