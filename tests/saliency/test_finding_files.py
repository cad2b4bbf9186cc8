from types import SimpleNamespace

import pytest

from wsss_hf.models.options import OptionError
from wsss_hf.saliency import files as module
from wsss_hf.saliency.files import find_files
from wsss_hf.saliency.load import load_source
from wsss_hf.saliency.source import SaliencyError


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["u2net.onnx"], "u2net.onnx"),
        (["model_fp16.onnx", "model.onnx"], "model.onnx"),
        (["onnx/model.onnx", "onnx/model_quantized.onnx"], "onnx/model.onnx"),
        (["model.safetensors"], None),
    ],
)
def test_the_usual_onnx_file_of_a_folder_is_taken(tmp_path, names, wanted):
    fill(tmp_path, "config.json", *names)
    assert find_files(tmp_path).onnx == (tmp_path / wanted if wanted else None)


def test_the_wanted_onnx_file_is_taken(tmp_path):
    fill(tmp_path, "a.onnx", "b.onnx")
    assert find_files(tmp_path, "b.onnx").onnx == tmp_path / "b.onnx"
    with pytest.raises(SaliencyError, match=r"file: expected .*\(a.onnx, b.onnx\), got c.onnx"):
        find_files(tmp_path, "c.onnx")
    with pytest.raises(SaliencyError, match=r"file: expected .*\(a.onnx, b.onnx\), got none"):
        find_files(tmp_path)


def test_weights_and_processor_belong_to_it(tmp_path):
    fill(tmp_path, "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_q.onnx_data", "preprocessor_config.json")
    found = find_files(tmp_path)
    assert found.onnx_weights == (tmp_path / "onnx/model.onnx_data",)
    assert found.processor == tmp_path / "preprocessor_config.json"
    fill(tmp_path, "onnx/preprocessor_config.json")
    assert find_files(tmp_path / "onnx/model.onnx").processor == tmp_path / "onnx/preprocessor_config.json"


@pytest.mark.parametrize("name", ["nothing.onnx", "./nothing", "/nowhere/model"])
def test_a_file_that_is_not_there_is_named(name):
    with pytest.raises(FileNotFoundError, match=name):
        find_files(name)


def test_another_file_is_refused(tmp_path):
    fill(tmp_path, "weights.pth")
    with pytest.raises(SaliencyError, match="expected an ONNX file, a folder or an id of the Hub, got the file"):
        find_files(tmp_path / "weights.pth")


def test_a_repository_is_listed_and_only_what_is_needed_downloaded(tmp_path, monkeypatch):
    names = [
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "onnx/model_fp16.onnx",
        "preprocessor_config.json",
        "README.md",
    ]
    asked = []

    def listed(repository, revision=None):
        asked.append((repository, revision))
        return names

    def downloaded(repository, name, revision=None):
        asked.append((name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr(module, "HfApi", lambda: SimpleNamespace(list_repo_files=listed))
    monkeypatch.setattr(module, "hf_hub_download", downloaded)
    found = find_files("owner/name@v1")
    assert found.onnx == tmp_path / "onnx/model.onnx"
    assert found.onnx_weights == (tmp_path / "onnx/model.onnx_data",)
    assert found.processor == tmp_path / "preprocessor_config.json"
    assert asked[0] == ("owner/name", "v1") and {one for one, _ in asked[1:]} == {names[0], names[1], names[3]}
    assert all(revision == "v1" for _, revision in asked)


def test_without_network_a_downloaded_repository_is_found(tmp_path, monkeypatch):
    cache = tmp_path / "models--owner--name"
    fill(cache / "snapshots" / "c0ffee", "model.onnx", "preprocessor_config.json")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = find_files("owner/name")
    assert found.onnx == cache / "snapshots" / "c0ffee" / "model.onnx"
    assert found.processor == cache / "snapshots" / "c0ffee" / "preprocessor_config.json"
    with pytest.raises(FileNotFoundError, match="model: expected an ONNX file, a folder or an id of the Hub, got a/b"):
        find_files("a/b")


@pytest.mark.parametrize(("model", "spectral", "got"), [(None, None, "neither"), ("a.onnx", "b", "both")])
def test_there_is_one_source(model, spectral, got):
    with pytest.raises(SaliencyError, match=f"expected --model or --spectral, got {got}"):
        load_source(model, spectral)


@pytest.mark.parametrize(("source", "name"), [({"model": "a.onnx"}, "tau"), ({"spectral": "b"}, "letterbox")])
def test_options_of_the_other_source_are_refused(source, name):
    with pytest.raises(OptionError, match=f"saliency.{name}: unknown"):
        load_source(**source, settings={name: 1})
