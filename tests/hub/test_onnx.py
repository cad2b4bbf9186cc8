"""ONNX files give what the models give, for images of any number and size."""

import json
import logging

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion
from transformers import EomtConfig, EomtForUniversalSegmentation

from wsss_hf import CamClassifier, CamConfig, Segmenter, SegmenterConfig, WsssImageProcessor
from wsss_hf.cli.main import main
from wsss_hf.hub.onnx import ExportError, export_onnx, export_program

onnxruntime = pytest.importorskip("onnxruntime")

RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}
VIT = {"model_type": "vit", "image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1}
VIT |= {"num_attention_heads": 2, "intermediate_size": 32}
TF_PADDED = {"model_type": "mobilenet_v2", "depth_multiplier": 0.1, "min_depth": 4, "tf_padding": True}
NAMES = {0: "background", 1: "cat", 2: "dog"}

new_torch = pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 exports for one size, and not to ONNX")


def cam():
    return CamClassifier(
        CamConfig(backbone_config=dict(RESNET), output_stride=4, id2label={0: "cat", 1: "dog"}, drs={})
    )


def segmenter(backbone=VIT):
    return Segmenter(SegmenterConfig(backbone_config=dict(backbone), rates=[1, 2], id2label=NAMES))


def expected(model, pixel_values):
    with torch.no_grad():
        outputs = model.eval()(pixel_values)
    return [outputs[name] for name in ("logits", "maps") if name in outputs]


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@new_torch
@pytest.mark.slow
@pytest.mark.parametrize("build", [cam, segmenter])
def test_onnx_gives_what_the_model_gives(build, tmp_path, caplog, capsys):
    caplog.set_level(logging.ERROR)
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "model")
    WsssImageProcessor().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stopped:
        main(["export-onnx", str(tmp_path / "model"), "--to", str(tmp_path / "onnx"), "--int8"])
    assert not stopped.value.code, capsys.readouterr().err
    files = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert files >= {"model.onnx", "model_int8.onnx", "config.json", "preprocessor_config.json"}
    about = json.loads((tmp_path / "onnx" / "config.json").read_text())["onnx"]
    assert about["size"] is None

    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    int8 = onnxruntime.InferenceSession(tmp_path / "onnx" / "model_int8.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == about["outputs"]
    for shape in ((1, 3, 64, 64), (3, 3, 80, 144), (2, 3, 97, 131)):
        pixel_values = images(*shape)
        actual = session.run(None, {"pixel_values": pixel_values.numpy()})
        for value, truth in zip(actual, expected(model, pixel_values), strict=True):
            assert value.shape == truth.shape and np.abs(value - truth.numpy()).max() < 1e-4
        coarse = int8.run(None, {"pixel_values": pixel_values.numpy()})
        for value, truth in zip(coarse, actual, strict=True):
            assert value.shape == truth.shape and np.corrcoef(value.ravel(), truth.ravel())[0, 1] > 0.9


@new_torch
@pytest.mark.slow
@pytest.mark.parametrize(("build", "outputs"), [(cam, ["logits", "maps"]), (segmenter, ["logits"])])
def test_an_exported_program_survives_a_round_trip(build, outputs, tmp_path):
    torch.manual_seed(0)
    model = build()
    program, names = export_program(model)
    assert names == outputs
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((1, 3, 64, 128), (3, 3, 97, 131)):
        pixel_values = images(*shape)
        for value, truth in zip(again(pixel_values), expected(model, pixel_values), strict=True):
            torch.testing.assert_close(value, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_network_that_counts_its_pixels_is_exported_for_one_size(tmp_path):
    """MobileNetV2 with TensorFlow's padding pads by the size of its input."""
    torch.manual_seed(0)
    model = segmenter(TF_PADDED)
    with pytest.raises(
        ExportError, match="size: expected a number .*mobilenet_v2 can't be exported for images of any size"
    ):
        export_program(model)
    program, _ = export_program(model, size=64)
    pixel_values = images(3, 3, 64, 64)
    (value,), (truth,) = program.module()(pixel_values), expected(model, pixel_values)
    torch.testing.assert_close(value, truth, atol=1e-4, rtol=1e-4)


def test_what_decides_by_its_weights_what_it_computes_is_refused():
    config = EomtConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, num_blocks=1)
    with pytest.raises(ExportError, match="model: expected one that can be exported, .*, got eomt"):
        export_program(EomtForUniversalSegmentation(config), size=64)


def test_onnx_with_torch_2_6_is_refused(tmp_path, monkeypatch):
    segmenter().save_pretrained(tmp_path / "model")
    WsssImageProcessor().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cpu"))
    with pytest.raises(ExportError, match=r"^ONNX export: expected torch > 2.6, got 2.6.0\+cpu$"):
        export_onnx(tmp_path / "model", tmp_path / "onnx")


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ExportError, match="expected a folder that does not exist yet"):
        export_onnx(tmp_path / "model", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
