"""Models of the Hub at the revision that one names: `owner/name@revision`, wherever a model is named."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import load_from_disk
from loopback_hub import TOKEN, Repository
from safetensors.torch import load_file
from transformers import (
    ResNetConfig,
    ResNetModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    VitDetConfig,
    VitMatteConfig,
    VitMatteForImageMatting,
    VitMatteImageProcessorPil,
)

from wsss_hf import CamClassifier, CamConfig, Segmenter, SegmenterConfig, WsssImageProcessor
from wsss_hf.cli.main import main
from wsss_hf.inference.load import load_labeler, load_segmenter
from wsss_hf.models.pretrained import pinned
from wsss_hf.refinement.matting import VitMatte
from wsss_hf.training.library_segmenter import build_library_segmenter

TINY = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
NAMES = {0: "background", 1: "cat"}


def vitmatte():
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    body = VitDetConfig(**sizes, num_channels=4, out_features=["stage1"], window_block_indices=[])
    layers = {"convstream_hidden_sizes": [4, 4, 4], "fusion_hidden_sizes": [8, 4, 4, 4]}
    return VitMatteForImageMatting(VitMatteConfig(backbone_config=body, hidden_size=8, **layers))


def segformer():
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, id2label=NAMES))


MODELS = {
    "backbone": lambda: ResNetModel(ResNetConfig.from_dict(TINY)),
    "classifier": lambda: CamClassifier(CamConfig(backbone_config=dict(TINY))),
    "segmenter": lambda: Segmenter(SegmenterConfig(backbone_config=dict(TINY), id2label=NAMES, rates=[1])),
    "library segmenter": segformer,
    "matting": vitmatte,
}
DOORS = {
    "backbone": lambda name: CamClassifier.from_backbone(name).backbone.body,
    "classifier": lambda name: load_labeler(name, "cpu")[0],
    "segmenter": lambda name: load_segmenter(name, "cpu")[0],
    "library segmenter": lambda name: build_library_segmenter(name, list(NAMES.values()), 64)[0],
    "matting": lambda name: VitMatte(name).model,
}


def publish(hub, repo_id, folder, branch="main"):
    repository = hub.repositories.setdefault(("model", repo_id), Repository())
    return repository.commit(branch, {path.name: path.read_bytes() for path in folder.iterdir()}, "a model")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_every_door_opens_the_revision(hub, kind, tmp_path):
    repo_id = f"tester/{kind.replace(' ', '-')}"  # each its own: a process remembers what a branch was
    commits, weights = {}, {}
    for seed, branch in enumerate(("main", "v2")):
        torch.manual_seed(seed)
        folder = tmp_path / branch
        processor = VitMatteImageProcessorPil() if kind == "matting" else WsssImageProcessor()
        processor.save_pretrained(folder)
        MODELS[kind]().save_pretrained(folder)
        commits[branch] = publish(hub, repo_id, folder, branch)
        weights[branch] = load_file(folder / "model.safetensors")
    for name, branch in (("", "main"), ("@main", "main"), ("@v2", "v2"), (f"@{commits['v2']}", "v2")):
        state = DOORS[kind](repo_id + name).state_dict()
        shared = state.keys() & weights[branch].keys()
        near = partial(torch.allclose, rtol=1e-4)  # norms that do next to nothing may be part of them
        assert len(shared) > 5 and all(near(state[key], weights[branch][key]) for key in shared), name
    assert any(not near(weights["main"][key], weights["v2"][key]) for key in shared)
    with pytest.raises((OSError, ValueError), match="v3"):
        DOORS[kind](f"{repo_id}@v3")


def test_a_folder_may_have_such_a_name(tmp_path):
    folder = tmp_path / "cam@home"
    folder.mkdir()
    assert pinned(folder, {}) == (folder, {})
    assert pinned(None, {"token": "t"}) == (None, {"token": "t"})
    for path in (f"{folder}/missing", "./missing", "../missing@v1"):
        with pytest.raises(FileNotFoundError, match="expected a model's folder or its id on the Hub"):
            pinned(path, {})
    assert pinned("owner/name@v1", {"token": "t", "revision": "v0"})[1] == {"token": "t", "revision": "v1"}


@pytest.fixture
def wsss(tiny_settings, capsys):
    frozen = {"epochs": 1, "lr": 1e-50, "weight_decay": 0.0}
    sections = ("cam", "refiner", "segmenter")
    changed = [f"{section}.train.{key}={value}" for section in sections for key, value in frozen.items()]
    settings = [part for value in [*tiny_settings, *changed] for part in ("--set", value)]

    def call(command, *arguments):
        AcceleratorState._reset_state()
        with pytest.raises(SystemExit) as stopped:
            main([command, *map(str, arguments), *settings, "--token", TOKEN, "--quiet"])
        printed = "".join(capsys.readouterr())
        assert not stopped.value.code and TOKEN not in printed, printed

    return call


@pytest.mark.slow
def test_the_commands_take_and_record_revisions_but_no_token(hub, wsss, cam_folder, tmp_path, monkeypatch):
    """All of them train at a rate that is 0 in float32: what they start from is what they end with."""
    monkeypatch.delenv("HF_TOKEN")
    for repo_id in ("tester/cam", "tester/body"):
        hub.repositories["model", repo_id] = Repository(private=True)
    publish(hub, "tester/cam", cam_folder)
    other = CamClassifier.from_pretrained(cam_folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    commit = publish(hub, "tester/cam", tmp_path / "other", "v2")
    ResNetModel(ResNetConfig.from_dict(TINY)).save_pretrained(tmp_path / "body")
    publish(hub, "tester/body", tmp_path / "body", "v2")

    masks = {}
    for name in ("tester/cam@main", "tester/cam@v2"):
        wsss("make-masks", "--data", "toy", "--cam", name, "--out", tmp_path / name[-2:])
        masks[name] = [np.asarray(mask) for mask in load_from_disk(tmp_path / name[-2:])["train"]["pseudo_mask"]]
    assert any((a != b).any() for a, b in zip(*masks.values(), strict=True))

    from_cam = [part for section in ("refiner", "segmenter") for part in ("--set", f"{section}.from_cam=true")]
    starts = {
        "refiner": ("train-refiner", "tester/cam@v2", "--data", "toy", *from_cam),
        "segmenter": ("train-segmenter", "--cam", "tester/cam@v2", "--data", tmp_path / "v2", *from_cam),
        "classifier": ("train-cam", "--data", "toy", "--backbone", "tester/body@v2"),
    }
    expected = {name: parameter for name, parameter in other.named_parameters() if name.startswith("backbone")}
    for folder, command in starts.items():
        wsss(*command, "--out", tmp_path / folder)
        weights = load_file(tmp_path / folder / "model.safetensors")
        if folder == "classifier":
            body = ResNetModel.from_pretrained(tmp_path / "body").named_parameters()
            expected = {f"backbone.body.{name}": parameter for name, parameter in body}
        assert all(torch.equal(weights[name], parameter) for name, parameter in expected.items()), folder
        recorded = "tester/body@v2" if folder == "classifier" else f"tester/cam@{commit}"
        assert recorded in json.dumps(yaml.safe_load((tmp_path / folder / "recipe.yaml").read_text()))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 50 and not [path for path in written if TOKEN.encode() in path.read_bytes()]
