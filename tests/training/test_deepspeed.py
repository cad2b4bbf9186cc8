"""DeepSpeed's ZeRO on two CPU processes, with the packaged configuration files; where DeepSpeed is installed."""

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

SETTINGS = {"epochs": 6, "optimizer": "adamw", "lr": 1e-3, "warmup": 0, "freeze_batch_norm": True, "save_steps": 2}
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


@pytest.mark.parametrize("name", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", ["train-cam", "train-segmenter"])
def test_zero_trains_what_one_process_trains(name, stage, tmp_path, environment):
    more = ["--supervised", "--set", "segmenter.from_cam=false"] if stage == "train-segmenter" else []
    # With DeepSpeed processes count alike, whatever of their pixels is labelled; without padding all are.
    changes = {"epochs": 2, "scale": [1.0, 1.4]}
    subprocess.run([*launcher(name, tmp_path), *command(stage, tmp_path / "two", **changes), *more], check=True)
    alone = [sys.executable, "-m", "wsss_hf", *command(stage, tmp_path / "one", **changes), *more]
    subprocess.run(alone, check=True)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_killed_training_goes_on_with_as_many_processes(name, tmp_path, environment):
    launch = launcher(name, tmp_path)
    subprocess.run([*launch, *command("train-cam", tmp_path / "unbroken")], check=True)
    killed = tmp_path / "killed"
    run = subprocess.Popen([*launch, *command("train-cam", killed)], start_new_session=True)
    checkpoint = tmp_path / "killed.partial/checkpoints/step-00000004"
    while not checkpoint.is_dir() and run.poll() is None:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert checkpoint.is_dir() and not killed.exists()
    shutil.copytree(tmp_path / "killed.partial", tmp_path / "other.partial")
    alone = [*launcher(name, tmp_path, processes=1), *command("train-cam", tmp_path / "other")]
    refused = subprocess.run(alone, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "expected 2 processes, as DeepSpeed has written it, got 1" in refused.stderr
    subprocess.run([*launch, *command("train-cam", killed)], check=True)
    unbroken = weights(tmp_path / "unbroken")
    assert all(torch.equal(value, unbroken[key]) for key, value in weights(killed).items())
