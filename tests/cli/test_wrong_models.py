"""Models of the wrong kind, for other classes, or damaged: refused in one line before work begins."""

import io
import json
import shutil
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from wsss_hf import CamClassifier, CamConfig, Segmenter, SegmenterConfig, WsssImageProcessor
from wsss_hf.cli.main import main
from wsss_hf.data.tagged import class_names
from wsss_hf.models.modeling_affinity import AffinityConfig, AffinityNetwork
from wsss_hf.progress import Progress


@pytest.fixture(scope="module")
def world(toy_data, cam_folder, tmp_path_factory):
    """Models, good and bad, in the folder in which the commands are called."""
    folder = tmp_path_factory.mktemp("world") / "world"
    shutil.copytree(cam_folder, folder / "cam")
    classifier = CamClassifier.from_pretrained(cam_folder)
    body = classifier.config.backbone_config
    classifier.backbone.body.save_pretrained(folder / "backbone")
    names = dict(enumerate(["background", *class_names(toy_data)]))
    torch.manual_seed(0)
    models = {
        "cam of others": CamClassifier(CamConfig(backbone_config=body, id2label={0: "ape", 1: "bee"})),
        "segmenter": Segmenter(SegmenterConfig(backbone_config=body, rates=[1], id2label=names)),
        "segmenter of others": Segmenter(
            SegmenterConfig(backbone_config=body, rates=[1], id2label={0: "background", 1: "ape"})
        ),
        "affinity": AffinityNetwork(AffinityConfig(backbone_config=body)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        WsssImageProcessor.from_pretrained(cam_folder).save_pretrained(folder / name)
    for name in ("cam", "segmenter"):
        bad = folder / f"{name} with nan"
        shutil.copytree(folder / name, bad)
        weights = load_file(bad / "model.safetensors")
        key = next(key for key in weights if key.startswith(("classifier", "head")))
        weights[key] = weights[key] * float("nan")
        save_file(weights, bad / "model.safetensors", {"format": "pt"})
    for name, change in {"no classes": {"id2label": {}}, "a word": {"background_threshold": "low"}}.items():
        shutil.copytree(folder / "cam", folder / name)
        values = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(values | change))
    shutil.copytree(folder / "segmenter", folder / "no processor")
    (folder / "no processor" / "preprocessor_config.json").unlink()
    for name in ("cam", "segmenter"):
        shutil.copytree(folder / name, folder / "run" / name)
    toy_data["train"][0]["image"].save(folder / "photo.png")
    return folder


@pytest.fixture
def said(world, tmp_path, tiny_settings, monkeypatch):
    """Runs a command that must be refused before it computes anything, and leaves nothing → its one line."""

    def begin(*_arguments, **_options):
        raise AssertionError("the work has begun")

    monkeypatch.delenv("WSSS_TRACEBACK", raising=False)
    monkeypatch.setattr(Progress, "__enter__", begin)
    monkeypatch.setattr("torch.export.export", begin)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", begin)
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)

    def call(name, *options):
        AcceleratorState._reset_state()
        before = {path for path in here.rglob("*")}
        error = io.StringIO()
        monkeypatch.setattr(sys, "stderr", error)
        settings = [part for setting in tiny_settings for part in ("--set", setting)]
        data = [] if name in ("predict", "push", "export-onnx") else ["--quiet", *settings]
        data += [] if name in ("demo", "predict", "push", "export-onnx") else ["--data", "toy"]
        with pytest.raises(SystemExit) as stopped:
            main([name, *data, *options])
        assert stopped.value.code == 1
        assert error.getvalue().count("\n") == 1 and error.getvalue().startswith("error: ")
        assert {path for path in here.rglob("*")} == before
        return error.getvalue()

    return call


OUT = ("--out", "out")
KIND = "expected a CAM classifier or map refiner, got a "
NOTHING = "nothing: We couldn't connect"
RUN = "run: expected a model, got a run; its models are run/cam, run/segmenter"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("compare", "--recipes", "toy", "--backbone", "nothing", *OUT), NOTHING),
        (
            (
                "compare",
                "--recipes",
                "toy",
                "--segmenter",
                "--set",
                "segmenter.backbone=nothing",
                "--set",
                "segmenter.from_cam=false",
                *OUT,
            ),
            NOTHING,
        ),
        (("compare", "--recipes", "toy", "--set", "masks.refine=[{matting: {model: nothing}}]", *OUT), "nothing"),
        (
            ("compare", "--recipes", "toy", "--set", "masks.seeds=drs", *OUT),
            "expected a column 'saliency' for masks.se",
        ),
        (("compare", "--recipes", "toy", "--backbone", "", *OUT), "a model's folder or its id on the Hub, got ''"),
        (("run", "--backbone", "nothing", *OUT), NOTHING),
        (
            ("train-cam", "--backbone", "segmenter", *OUT),
            "a network for all tasks, got segmenter, a wsss_seg",
        ),
        (("train-cam", "--backbone", "cam", *OUT), "expected a network for all tasks, got cam, a wsss_cam on a backb"),
        (("add-saliency", "--spectral", "cam", *OUT), "expected a network for all tasks, got cam, a wsss_cam on a b"),
        (("run", "--set", "segmenter.backbone=nothing", "--set", "segmenter.from_cam=false", *OUT), NOTHING),
        (("run", "--set", "segmenter.model=backbone", *OUT), "segmenter.model: expected a model of AutoModelForSem"),
        (
            (
                "run",
                "--set",
                "masks.refine=[walk]",
                "--set",
                "affinity.backbone=nothing",
                "--set",
                "affinity.from_cam=false",
                *OUT,
            ),
            NOTHING,
        ),
        (
            ("run", "--set", "segmenter.from_cam=true", "--set", "segmenter.output_stride=3", *OUT),
            "output_stride: expec",
        ),
        (("run", "--set", "image.std=[0,1,1]", *OUT), "image.std: expected "),
        (("demo", "--set", "segmenter.backbone=nothing", "--set", "segmenter.from_cam=false", *OUT), NOTHING),
        (("train-segmenter", "--supervised", "--set", "segmenter.from_cam=true", "--cam", "backbone", *OUT), KIND),
        (("train-segmenter", "--supervised", "--set", "segmenter.from_cam=true", "--cam", "segmenter", *OUT), KIND),
        (("train-refiner", "segmenter", *OUT), KIND),
        (("train-refiner", "cam of others", *OUT), "classifier: expected the classes of the data, "),
        (("train-refiner", "cam", "--set", "cam.backbone=nothing", *OUT), NOTHING),
        (
            (
                "train-affinity",
                "--cam",
                "cam",
                "--set",
                "affinity.backbone=nothing",
                "--set",
                "affinity.from_cam=false",
                *OUT,
            ),
            NOTHING,
        ),
        (("evaluate", "--cam", "cam of others"), "classifier: expected the classes of the data, "),
        (("evaluate", "--cam", "cam", "--model", "nothing"), NOTHING),
        (
            ("evaluate", "--cam", "cam", "--model", "segmenter of others"),
            "segmenter: expected the classes of the data",
        ),
        (("evaluate", "--model", "segmenter", "--against", "cam"), "segmenter: expected the classes of the data, "),
        (("evaluate", "--model", "segmenter", "--against", "segmenter with nan"), "holds nan: its training has div"),
        (("evaluate", "--model", "segmenter", "--against", "backbone"), "expected a model for semantic segmentation"),
        (
            ("evaluate", "--model", "segmenter", "--model-revision", "v1"),
            "segmenter@v1: expected no revision of a model",
        ),
        (("evaluate", "--model", "segmenter", "--revision", "v1"), "revision: expected a Hub data set, got 'toy'"),
        (("evaluate", "--cam", "a word"), "a word, background_threshold: expected a number in [0, 1], got 'low'"),
        (("evaluate", "--cam", "no classes"), "no classes, id2label: expected the names of classes, got none"),
        (("evaluate", "--model", "no classes"), "no classes, id2label: expected the names of classes, got none"),
        (("make-masks", "--cam", "cam with nan", *OUT), "classifier.weight holds nan: its training has diverged"),
        (
            ("predict", "photo.png", "--model", "affinity", *OUT),
            "affinity: expected a model for semantic segmentation",
        ),
        (
            ("predict", "photo.png", "--model", "backbone", *OUT),
            "backbone: expected a model for semantic segmentation",
        ),
        (("predict", "photo.png", "--model", "segmenter with nan", *OUT), "holds nan: its training has diverged"),
        (("predict", "photo.png", "--model", "no processor", *OUT), "'no processor'"),
        (("predict", "photo.png", "--model", "run", *OUT), RUN),
        (("make-masks", "--cam", "run", *OUT), RUN),
        (("evaluate", "--model", "run"), RUN),
        (("train-cam", "--backbone", "run", *OUT), RUN),
        (("push", "cam with nan", "somebody/cam"), "classifier.weight holds nan: its training has diverged"),
        (("export-onnx", "segmenter with nan", *OUT), "holds nan: its training has diverged"),
        (("export-onnx", "no processor", *OUT), "'no processor'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.slow
def test_a_model_that_does_not_fit_is_refused_before_work_begins(said, command, words):
    assert words in said(*command)
