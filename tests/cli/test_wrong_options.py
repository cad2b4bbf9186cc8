"""Random wrong values of every option of every command: refused in one line before work begins, or right."""

import inspect
import io
import random
import shutil
import sys

import pytest
import torch
import typer
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from wsss_hf import CamClassifier, Segmenter, SegmenterConfig, WsssImageProcessor
from wsss_hf.cli.main import app, main
from wsss_hf.data.tagged import class_names
from wsss_hf.progress import Progress

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# Commands that work, in the folder `world`, but for what a test changes.
ARGUMENTS = {
    "demo": [],
    "run": ["--data", "toy"],
    "add-saliency": ["--data", "toy", "--spectral", "backbone"],
    "train-cam": ["--data", "toy"],
    "train-refiner": ["cam", "--data", "toy"],
    "train-affinity": ["--data", "toy", "--cam", "cam"],
    "make-masks": ["--data", "toy", "--cam", "cam"],
    "train-segmenter": ["--data", "toy", "--supervised"],
    "evaluate": ["--data", "toy", "--model", "segmenter"],
    "predict": ["data", "--model", "segmenter"],
    "compare": ["--data", "toy", "--recipes", "default"],
    "recipe": ["default"],
    "convert": ["vgg.safetensors"],
    "push": ["cam", "somebody/cam"],
    "push-metric": ["mean_iou", "somebody/metric"],
    "export-onnx": ["cam"],
}
TEXTS = ["", " ", "x", ",", "a,,b", "a\nb", "é", "a=b", "=", "-1", "0", "nan", "no/such", "../..", "x" * 300, "\udcff"]
NUMBERS = ["", "x", "-1", "0", "1", "nan", "inf", "-inf", "1e30", "9" * 30, "0.5", "1,2"]
LISTS = ["0", "-1", "nan", "inf", "1e9", "1,", "0.5,x", "9" * 30]
PATHS = ["", "file", "file/x", "data", "empty", "no/such", "/dev/null/x", "/proc/x", "data/cat/0.png"]
SETTINGS = ["", "=", "x=1", "seed", "seed=null", "cam.train.epochs=0", "masks.refine=[x]", "cam.methods={drs: 1}"]
TYPES = {
    command.callback.__name__.replace("_", "-"): {
        name: str(parameter.annotation.__origin__)
        for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items()
    }
    for command in app.registered_commands
}


def values_of(command, parameter):
    if parameter.name == "changes":
        return SETTINGS
    kind = TYPES[command][parameter.name]
    values = NUMBERS if "int" in kind or "float" in kind else PATHS if "Path" in kind else TEXTS
    if parameter.name in ("scales", "seeds", "mean", "std", "extra_channels"):
        return [*values, *LISTS]
    is_model = parameter.name in ("cam", "model", "affinity", "against", "backbone", "spectral")
    return [*values, *PATHS] if is_model or parameter.name in ("source", "images", "recipe") else values


CASES = [
    (name, parameter, value)
    for name, command in COMMANDS.items()
    for parameter in command.params
    if not getattr(parameter, "is_flag", False) and parameter.name not in ("token", "help")
    for value in dict.fromkeys(values_of(name, parameter))
]

# What messages about these are about instead.
ALSO = {
    "source": {"split"},
    "classes": {"class_names"},
    "recipes": {"row", "recipe"},
    "name": {"recipe", "metric"},
    "repo_id": {"id of a repository"},
    "revision": {"cam@"},
    "changes": {"key=value"},
}


class Begun(BaseException):
    """The work has begun: nothing was found wrong before."""


@pytest.fixture(scope="module")
def world(toy_data, cam_folder, tmp_path_factory):
    """What commands read, in the folder in which they are called."""
    folder = tmp_path_factory.mktemp("world") / "world"
    shutil.copytree(cam_folder, folder / "cam")
    classifier = CamClassifier.from_pretrained(cam_folder)
    classifier.backbone.body.save_pretrained(folder / "backbone")
    names = dict(enumerate(["background", *class_names(toy_data)]))
    config = SegmenterConfig(backbone_config=classifier.config.backbone_config, rates=[1], id2label=names)
    Segmenter(config).save_pretrained(folder / "segmenter")
    WsssImageProcessor.from_pretrained(cam_folder).save_pretrained(folder / "segmenter")
    (folder / "empty").mkdir()
    (folder / "file").write_text("no image, no model, no table")
    (folder / "data" / "cat").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (24, 24), (9 * number, 0, 0)).save(folder / "data" / "cat" / f"{number}.png")
    weights, channels = {}, 3
    for layer in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        weights |= {
            f"features.{layer}.weight": torch.zeros(4, channels, 3, 3),
            f"features.{layer}.bias": torch.zeros(4),
        }
        channels = 4
    save_file(weights, folder / "vgg.safetensors")
    return folder


@pytest.fixture
def call(world, tmp_path, tiny_settings, monkeypatch):
    """Runs a command with one wrong value; says what is wrong about its end, None where nothing is."""

    def begin(*_arguments, **_options):
        raise Begun

    monkeypatch.delenv("WSSS_TRACEBACK", raising=False)
    monkeypatch.setattr(Progress, "__enter__", begin)  # which all long work has
    monkeypatch.setattr("torch.export.export", begin)
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):  # which --cache-dir sets, for the process
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", begin)
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)

    def call(name, parameter, value):
        before = {path for path in here.rglob("*")}
        AcceleratorState._reset_state()
        said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")  # as Python's own is
        monkeypatch.setattr(sys, "stderr", said)
        code = 0
        try:
            main(command_line(name, parameter, value, tiny_settings))
        except Begun:
            pass
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        said.seek(0)
        err = said.read()
        left = {path for path in here.rglob("*")} - before
        for path in sorted(left):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if not code or (name in ("push", "push-metric") and ("offline mode is enabled" in err or "HF_TOKEN" in err)):
            return None
        if name == "compare":  # of whose cells others may have been trained
            left = {path for path in left if path.suffix}
        return what_is_wrong(err, name, parameter, value) or (left and f"leaves {left}")

    return call


def command_line(name, parameter, value, settings):
    known = {option for p in COMMANDS[name].params for option in p.opts}
    line = [*ARGUMENTS[name]]
    if parameter.param_type_name == "argument":
        arguments = [p.name for p in COMMANDS[name].params if p.param_type_name == "argument"]
        place = arguments.index(parameter.name)
        line[place : place + 1 if name != "compare" else place] = [value]
    else:
        line += [parameter.opts[0], value]
    line += ["--out", "out"] if "--out" in known - {*parameter.opts} else []
    line += [part for setting in settings for part in ("--set", setting)] if "--set" in known else []
    return [name, *line, *(["--quiet"] if "--quiet" in known else [])]


def what_is_wrong(err, name, parameter, value):
    """Of an error: it has one line, which says what it is about."""
    if not err.startswith("error: ") or err.count("\n") != 1 or len(err) > 1200:
        return f"not one line: {err[:500]!r}"
    shown = value.encode("utf-8", "backslashreplace").decode()
    words = {parameter.name, *(option.strip("-") for option in parameter.opts)}
    words |= {word.replace("_", "-") for word in words}
    words |= {f"{quote}{text}{quote}" for quote in "'\"" for text in (shown, " ".join(shown.split()))}
    words |= {repr(value), f"got {shown}", f": {shown}", shown} - {"", *shown}
    words |= ALSO.get(parameter.name, set()) | ({"No such option", "Missing argument"} if value[:1] == "-" else set())
    words |= {value.partition("=")[0]} if parameter.name == "changes" else set()
    return None if any(word and word in err for word in words) else f"does not say: {err}"


def test_every_command_is_here():
    assert COMMANDS.keys() == ARGUMENTS.keys() == TYPES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_some_values(call, name):
    cases = random.Random(name).sample([case for case in CASES if case[0] == name], 8)
    wrong = {(parameter.name, value): call(name, parameter, value) for name, parameter, value in cases}
    assert not {case: said for case, said in wrong.items() if said}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COMMANDS)
def test_all_values(call, name):
    cases = [case for case in CASES if case[0] == name]
    wrong = {(parameter.name, value): call(name, parameter, value) for name, parameter, value in cases}
    assert not {case: said for case, said in wrong.items() if said}
