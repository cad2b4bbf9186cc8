"""Nothing runs the code that a model's repository brings, nor asks whether to."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wsss_hf
from wsss_hf import CamClassifier
from wsss_hf.hub.onnx import export_onnx
from wsss_hf.inference.load import load_labeler, load_segmenter
from wsss_hf.models.pretrained import backbone_normalization, from_backbone, resolve_backbone_config
from wsss_hf.refinement.matting import VitMatte
from wsss_hf.refinement.steps import build_refinement
from wsss_hf.saliency.load import load_source
from wsss_hf.training.library_segmenter import build_library_segmenter

PACKAGE = Path(wsss_hf.__file__).parent


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A model with code for its configuration, model and processor, which leaves a file; a question fails the test."""

    def asked(*_arguments):
        pytest.fail("a question on standard input")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("signal.alarm", asked)  # what transformers sets before it asks
    ran = tmp_path / "ran"
    folder = tmp_path / "stranger"
    folder.mkdir()
    names = ("AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation", "AutoBackbone", "AutoImageProcessor")
    auto_map = {name: f"evil.{name}" for name in names}
    (folder / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": auto_map}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": auto_map}))
    classes = "".join(f"class {name}: pass\n" for name in names)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n{classes}")
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    yield str(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "load",
    [
        lambda name: load_labeler(name, "cpu"),
        lambda name: load_segmenter(name, "cpu"),
        lambda name: from_backbone(CamClassifier, name),
        lambda name: resolve_backbone_config(name, None),
        lambda name: build_library_segmenter(name, ["background", "cat"], 32),
        lambda name: VitMatte(name, torch.device("cpu")),
        lambda name: build_refinement([{"walk": {"model": name}}]).prepare(),
        lambda name: export_onnx(name, Path(name).parent / "onnx"),
        lambda name: load_source(model=name),
        lambda name: load_source(spectral=name),
    ],
    ids=["cam", "segmenter", "backbone", "config", "library", "matting", "walk", "onnx", "saliency", "spectral"],
)
def test_no_loader_runs_it_or_asks(stranger, load):
    with pytest.raises((OSError, TypeError, ValueError)):
        load(stranger)


def test_a_processor_alone_runs_nothing(stranger, cam_folder):
    from transformers import AutoConfig

    assert backbone_normalization(stranger, AutoConfig.from_pretrained(cam_folder).backbone_config)


def test_every_load_says_so():
    """`from_pretrained` of an Auto class has trust_remote_code, itself or among the options of `pinned`."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            text = ast.unparse(call.func)
            if text.startswith("Auto") and text.endswith(".from_pretrained"):
                options = {keyword.arg for keyword in call.keywords}
                assert options & {"trust_remote_code", None}, f"{path}:{call.lineno}"
