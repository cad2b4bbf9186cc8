import json
import sys

import numpy as np
import pytest
import torch

from wsss_hf.saliency.load import load_source
from wsss_hf.saliency.source import SaliencyError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT


def network(path, shape=("B", 3, 32, 32), nodes=None, outputs=(("map", None),), inputs=None, kind=FLOAT):
    """Write a network; by default its output is the mean of the channels (B, 1, H, W)."""
    nodes = nodes or [helper.make_node("ReduceMean", ["image"], ["map"], axes=[1], keepdims=1)]
    given = inputs or [helper.make_tensor_value_info("image", kind, shape)]
    made = [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs]
    model = helper.make_model(
        helper.make_graph(nodes, "net", given, made), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    onnx.save(model, path)
    return path


def maps_of(path, rows, **settings):
    source = load_source(path, settings={"mean": [0, 0, 0], "std": [1, 1, 1]} | settings)
    source.prepare(rows, torch.device("cpu"))
    return [found for _, found in sorted(source.maps(rows), key=lambda one: one[0])]


def brightness(rows):
    return [np.asarray(image.convert("RGB"), np.float32).mean(axis=-1) / 255 for image in rows["image"]]


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis", "keep"),
    [
        (("B", 3, 32, 32), 1, 1),
        ((1, 3, 32, 32), 1, 1),
        ((3, 3, 32, 32), 1, 0),
        (("B", 3, "H", "W"), 1, 0),
        (("B", 32, 32, 3), 3, 1),
        (("B", "C", "H", "W"), 1, 1),
    ],
)
def test_every_layout_gives_the_same_maps(toy_data, tmp_path, letterbox, shape, axis, keep):
    rows = toy_data["train"].select(range(5))
    nodes = [helper.make_node("ReduceMean", ["image"], ["map"], axes=[axis], keepdims=keep)]
    path = network(tmp_path / "net.onnx", shape, nodes)
    size = {} if 32 in shape else {"size": 32}
    for found, wanted in zip(maps_of(path, rows, letterbox=letterbox, **size), brightness(rows), strict=True):
        assert found.shape == wanted.shape and found.dtype == np.float32
        assert abs(found - wanted).mean() < 0.1
        assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.7


def test_half_precision_is_taken(toy_data, tmp_path):
    rows = toy_data["train"].select(range(2))
    path = network(tmp_path / "half.onnx", kind=onnx.TensorProto.FLOAT16)
    wanted = maps_of(network(tmp_path / "net.onnx"), rows)
    for found, full in zip(maps_of(path, rows), wanted, strict=True):
        np.testing.assert_allclose(found, full, atol=2e-3)


def test_the_output_is_the_first_map_of_the_inputs_size(toy_data, tmp_path):
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["vector"]),
        helper.make_node("ReduceMean", ["image"], ["map"], axes=[1], keepdims=1),
        helper.make_node("AveragePool", ["map"], ["small"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Sqrt", ["map"], ["second"]),
    ]
    path = network(
        tmp_path / "net.onnx", nodes=nodes, outputs=[(n, None) for n in ("vector", "small", "map", "second")]
    )
    rows = toy_data["train"].select(range(2))
    maps = {number: np.stack(maps_of(path, rows, output=number)) for number in (None, 1, 2, 3)}
    assert np.array_equal(maps[None], maps[2])
    assert not np.array_equal(maps[2], maps[3]) and not np.array_equal(maps[1], maps[2])
    with pytest.raises(SaliencyError, match="expected an output that is one map"):
        maps_of(path, rows, output=0)
    with pytest.raises(SaliencyError, match="output: expected a number from 0 of the outputs .* got 4"):
        maps_of(path, rows, output=4)


def test_the_processor_beside_it_is_read(tmp_path):
    path = network(tmp_path / "net.onnx", ("B", 3, "H", "W"))
    held = {"size": {"height": 24, "width": 24}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(held))
    found = load_source(path).format
    assert (found.size, found.mean, found.std) == ((24, 24), [0.1, 0.2, 0.3], [1, 2, 3])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([("image", ("B", 3, 8, 8)), ("point", (1, 2))], "expected a network with one input, got 2: image, point"),
        ([("image", ("B", 3, 8))], r"expected an input of floats \(B, 3, H, W\)"),
        ([("image", ("B", 1, 8, 8))], "expected an input of 3 channels"),
    ],
)
def test_networks_of_another_kind_are_refused(tmp_path, inputs, message):
    given = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs]
    path = network(tmp_path / "net.onnx", inputs=given)
    with pytest.raises(SaliencyError, match=f"net.onnx: {message}"):
        load_source(path)


def test_a_network_without_a_map_is_refused(tmp_path):
    nodes = [helper.make_node("GlobalAveragePool", ["image"], ["map"])]
    with pytest.raises(SaliencyError, match=r"expected an output that is one map, .* got map \(1, 3, 1, 1\)"):
        load_source(network(tmp_path / "net.onnx", nodes=nodes))


def test_a_file_that_is_no_network_is_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no network")
    with pytest.raises(SaliencyError, match="net.onnx: expected an ONNX network, got another file"):
        load_source(tmp_path / "net.onnx")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    path = network(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SaliencyError, match=r'needs onnxruntime: pip install "wsss_hf\[onnx\]"'):
        load_source(path)
