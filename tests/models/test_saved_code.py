"""The code that is saved with a model: little, and only what the model uses."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch

from wsss_hf import CamClassifier, CamConfig, MapRefiner, MapRefinerConfig, Segmenter, SegmenterConfig

# The demo's classifier but for its sizes, which change no line of code.
RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
}
VGG = {"model_type": "wsss_vgg16", "widths": [4, 4, 8, 8, 8]}
VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": 32,
}
WIDE = {"model_type": "wsss_wide_resnet38", "widths": [4, 4, 8, 8, 8, 8, 16]}
NAMES = {0: "cat", 1: "cow"}
METHODS = {
    "drs": {},
    "icd": {"hidden_channels": 8},
    "plda": {"hidden": [8], "pamr_iterations": 1, "pamr_dilations": [1]},
    "contrast": {"embedding": 8},
    "d2cam": {"embedding_channels": 8},
    "seam": {"projections": [8, 8], "embedding": 8},
    "toco": {},
}
PARTS = {*METHODS, "attention", "patch_attentions", "plain_vit", "vgg", "wide_resnet"}


def build(backbone=RESNET, kind=CamClassifier, **options):
    torch.manual_seed(0)
    config_class = {CamClassifier: CamConfig, MapRefiner: MapRefinerConfig, Segmenter: SegmenterConfig}[kind]
    names = {0: "background", 1: "cat"} if kind is Segmenter else NAMES
    return kind(config_class(backbone_config=dict(backbone), id2label=names, **options)).eval()


def code(folder):
    return {path.stem: path.read_text() for path in folder.glob("*.py")}


def test_a_classifier_comes_with_little_code(tmp_path):
    build().save_pretrained(tmp_path)
    files = code(tmp_path)
    lines = {name: len(text.splitlines()) for name, text in files.items()}
    assert sum(lines.values()) <= 1500, lines
    assert not (PARTS | {"methods", "options", "method_helpers", "deeplab", "pretrained"}) & set(files)
    for name, text in files.items():
        assert "HfApi" not in text and "ModelCard" not in text, name


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        *((lambda name=name: build(**{name: METHODS[name]}), {name}) for name in METHODS),
        (lambda: build(VGG, drs={}, seam=METHODS["seam"]), {"vgg", "drs", "seam"}),
        (lambda: build(WIDE), {"wide_resnet"}),
        (lambda: build(VIT), {"plain_vit"}),
        (lambda: build(VIT, attention={}), {"plain_vit", "attention", "patch_attentions"}),
        (lambda: build(kind=Segmenter, rates=[1]), set()),
        (lambda: build(VGG, kind=Segmenter, rates=[1]), {"vgg"}),
        (lambda: build(kind=MapRefiner), set()),
    ],
    ids=[
        *METHODS,
        "vgg with drs and seam",
        "wide_resnet",
        "vit",
        "vit with attention",
        "segmenter",
        "segmenter on vgg",
        "map refiner",
    ],
)
def test_only_what_a_model_uses_is_saved(model, parts, tmp_path):
    model().save_pretrained(tmp_path)
    files = code(tmp_path)
    assert PARTS & set(files) == parts
    for name, text in files.items():
        imported = [n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level == 1]
        assert set(imported) <= set(files), name


REMOTE = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "wsss_hf":
            raise ImportError("wsss_hf is not installed here")

sys.meta_path.insert(0, Blocker())

import torch
from pathlib import Path
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation

root, results = Path(sys.argv[1]), {}
for folder in sorted(root.iterdir()):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert AutoImageProcessor.from_pretrained(folder, trust_remote_code=True).size
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(Path("again") / folder.name)
    again = AutoModelForSemanticSegmentation.from_pretrained(Path("again") / folder.name, trust_remote_code=True)
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        outputs = [network.eval()(pixels).logits.flatten().tolist() for network in (model, again)]
    results[folder.name] = [sorted(getattr(config, "methods", {})), *outputs]
try:
    type(model).from_backbone("anything")
except ImportError as error:
    results["from_backbone"] = str(error)
Path("results.json").write_text(json.dumps(results))
"""


@pytest.mark.slow
def test_models_load_and_are_saved_where_the_package_is_not_installed(tmp_path):
    models = {
        "all methods on vgg": build(VGG, maps="seam", **METHODS),
        "plain": build(),
        "plda": build(plda=METHODS["plda"]),
        "vit": build(VIT, maps="attention", attention={"learn_heads": True}, toco={}),
        "refiner on wide resnet": build(WIDE, kind=MapRefiner),
        "segmenter": build(kind=Segmenter, rates=[1]),
    }
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    for name, model in models.items():
        model.save_pretrained(tmp_path / "models" / name)
    (tmp_path / "remote.py").write_text(REMOTE)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "remote.py", "models"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert "wsss_hf is not installed" in results.pop("from_backbone")
    assert results.keys() == models.keys()
    for name, model in models.items():
        methods, loaded, again = results[name]
        with torch.no_grad():
            expected = model(pixels).logits.flatten().tolist()
        assert methods == sorted(getattr(model.config, "methods", {}))
        assert loaded == again == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert code(tmp_path / "again" / name) == code(tmp_path / "models" / name)
