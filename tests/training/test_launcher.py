"""What `accelerate launch` asks for goes before the recipe, and says so."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState
from test_loop import Line, Points, settings
from torch.torch_version import TorchVersion

from wsss_hf.cli import launch
from wsss_hf.models.options import OptionError
from wsss_hf.recipes import load_recipe
from wsss_hf.stages.train_cam import cam_record
from wsss_hf.training.launcher import build_accelerator, with_launcher
from wsss_hf.training.loop import Training


@pytest.fixture
def launched(monkeypatch):
    """As `accelerate launch` leaves the environment of a process without options, and with these."""
    if torch.__version__ < "2.7":  # which compiles the small network of these tests
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.0"))

    def set_environment(precision="no", accumulation=None, backend="no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
        if accumulation is not None:
            monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulation))

    return set_environment


@pytest.mark.parametrize(
    ("asked", "recipe", "expected", "lines"),
    [
        ({}, [], ("no", 1, False), []),
        ({}, ["mixed_precision=bf16", "accumulate=2", "compile=true"], ("bf16", 2, True), []),
        ({"precision": "bf16"}, ["mixed_precision=bf16"], ("bf16", 1, False), []),
        (
            {"precision": "bf16", "accumulation": 4, "backend": "EAGER"},
            ["mixed_precision=fp16"],
            ("bf16", 4, True),
            [
                "train.mixed_precision: bf16 from the launcher instead of fp16 from the recipe",
                "train.accumulate: 4 from the launcher instead of 1 from the recipe",
                "train.compile: True from the launcher instead of False from the recipe",
            ],
        ),
    ],
)
def test_launcher_and_recipe_agree_or_a_line_says_so(launched, capfd, asked, recipe, expected, lines):
    launched(**asked)
    section = with_launcher(load_recipe("default", [f"cam.train.{change}" for change in recipe]).cam)
    train = section.train
    assert (train.mixed_precision, train.accumulate, train.compile) == expected
    assert capfd.readouterr().err.splitlines() == lines
    assert with_launcher(section) == section and not capfd.readouterr().err


def test_a_precision_that_training_lacks_is_refused(launched):
    launched(precision="fp8")
    with pytest.raises(OptionError, match="mixed_precision: expected no, bf16 or fp16, got 'fp8'"):
        with_launcher(load_recipe().cam)


@pytest.mark.parametrize("backend", ["no", "INDUCTOR"])
def test_compilation_with_torch_2_6_is_refused(launched, monkeypatch, backend):
    launched(backend=backend)
    section = load_recipe("toy", [f"cam.train.compile={backend == 'no'}"]).cam
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cpu"))
    with pytest.raises(OptionError, match=r"^train.compile: expected torch > 2.6, got 2.6.0\+cpu$"):
        with_launcher(section)


@pytest.mark.parametrize(
    ("asked", "difference"),
    [
        ({"precision": "bf16"}, "cam.train.mixed_precision was 'no' and is 'bf16'"),
        ({"accumulation": 2}, "cam.train.accumulate was 1 and is 2"),
    ],
)
def test_a_result_is_of_what_the_launcher_asked_for(launched, toy_data, tiny_recipe, asked, difference):
    launched()
    before = cam_record(toy_data, tiny_recipe).to_dict()
    launched(**asked)
    assert cam_record(toy_data, tiny_recipe).difference(before) == difference


def test_the_accelerator_accumulates_and_compiles_as_asked(launched, tmp_path):
    launched(accumulation=2, backend="EAGER")
    section = with_launcher(load_recipe("toy", ["cam.train.batch_size=4"]).cam)
    training = Training(Line(), Points(), section.train, build_accelerator(section.train), tmp_path)
    assert training.accelerator.gradient_accumulation_steps == 2
    assert isinstance(training.model, torch._dynamo.OptimizedModule)
    assert training.accelerator.state.dynamo_plugin.backend.value == "EAGER"
    AcceleratorState._reset_state()
    launched()
    compiled = settings(compile=True)
    assert build_accelerator(compiled).state.dynamo_plugin.backend.value == "INDUCTOR"


@pytest.mark.slow
def test_a_compiled_training_equals_the_plain_one(tmp_path, launched):
    slopes = []
    for backend in ("no", "EAGER"):
        launched(backend=backend)
        AcceleratorState._reset_state()
        model, wanted = Line(), settings(epochs=2, compile=backend != "no")
        Training(model, Points(), wanted, build_accelerator(wanted), tmp_path / backend).run()
        slopes.append(model.slope.item())
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-5) and slopes[0] > 0.1


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -m accelerate.commands.launch --gradient_accumulation_steps 4 --cpu train.py --seed 1", "4"),
        ("accelerate launch --mixed_precision bf16 train.py", None),
        ("bash", None),
    ],
)
def test_accumulation_is_read_off_the_launchers_command(monkeypatch, command, expected):
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
    monkeypatch.setattr(launch, "_parent_command", command.split)
    launch.pass_on_accumulation()
    assert os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == expected
