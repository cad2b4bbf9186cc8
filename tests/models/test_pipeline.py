import ast
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DPTImageProcessorPil,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from wsss_hf import (
    CamClassifier,
    CamConfig,
    DrsConfig,
    MapRefiner,
    MapRefinerConfig,
    MaskPipeline,
    Segmenter,
    SegmenterConfig,
    TagPipeline,
    WsssImageProcessor,
)

CLASSES = ["cat", "cow", "dog"]
SIZE = {"shortest_edge": 64, "longest_edge": 128}


def backbone_config():
    return ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 12, 16, 24], embedding_size=8, layer_type="basic")


def photograph(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saved models of both kinds, large heads so that every class and the background are found."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    cam = CamClassifier(
        CamConfig(
            backbone_config=backbone_config(),
            output_stride=8,
            drs=DrsConfig(),
            id2label=dict(enumerate(CLASSES)),
            background_threshold=0.55,
            tag_threshold=0.4,
        )
    )
    segmenter = Segmenter(
        SegmenterConfig(
            backbone_config=backbone_config(),
            output_stride=8,
            rates=[1, 2],
            id2label=dict(enumerate(["background", *CLASSES])),
        )
    )
    pixels = WsssImageProcessor(size=SIZE)(photograph(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        # Orthogonal to the mean feature: each map is then positive somewhere and negative elsewhere.
        mean = cam.eval().classify(pixels)[0][-1].mean(dim=(0, 2, 3))
        weight = torch.randn(len(CLASSES), len(mean))
        weight -= (weight @ mean)[:, None] * mean / mean.square().sum()
        cam.classifier.weight.copy_(weight[:, :, None, None])
        for convolution in segmenter.head:
            convolution.weight.normal_()
    for name, model in (("cam", cam), ("segmenter", segmenter)):
        model.save_pretrained(root / name)
        WsssImageProcessor(size=SIZE).save_pretrained(root / name)
    photograph().save(root / "photograph.png")
    return root


@pytest.fixture(scope="module")
def segmentation(models):
    return {name: pipeline("image-segmentation", str(models / name)) for name in ("cam", "segmenter")}


def found(result):
    return [entry["label"] for entry in result]


def label_map(result, names):
    """The masks of a result as one map; -1 where there is none."""
    labels = np.full((50, 70), -1)
    for entry in result:
        labels[np.asarray(entry["mask"]) == 255] = names.index(entry["label"])
    return labels


# image-segmentation


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_masks_are_of_the_size_of_the_image_and_share_it_out(segmentation, kind):
    result = segmentation[kind](photograph())
    masks = np.stack([np.asarray(entry["mask"]) for entry in result])
    assert masks.shape[1:] == (50, 70) and all(entry["mask"].mode == "L" for entry in result)
    assert set(np.unique(masks)) == {0, 255}
    assert ((masks == 255).sum(axis=0) == 1).all()
    assert len(result) > 1 and all(0 < entry["score"] <= 1 for entry in result)


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_names_scores_and_masks_are_those_of_the_model(segmentation, models, kind):
    model = {"cam": CamClassifier, "segmenter": Segmenter}[kind].from_pretrained(models / kind).eval()
    pixels = WsssImageProcessor(size=SIZE)(photograph(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores = model.segmentation_scores(model(pixels), (50, 70))[0]
    names = ["background", *CLASSES]
    result = segmentation[kind](photograph())
    assert np.array_equal(label_map(result, names), scores.argmax(0).numpy())
    for entry in result:
        here = scores.argmax(0) == names.index(entry["label"])
        assert entry["score"] == pytest.approx(scores.amax(0)[here].mean().item())


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_given_tags_are_the_only_labels(segmentation, kind):
    for tags in (["dog"], ["cow", "cat"]):
        result = segmentation[kind](photograph(), tags=tags)
        assert set(found(result)) - {"background"} == set(tags)
    assert found(segmentation[kind](photograph(), tags="dog")) == found(segmentation[kind](photograph(), tags=["dog"]))
    assert found(segmentation[kind](photograph(), tags=[])) == ["background"]


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_an_unknown_tag_is_refused_with_the_known_ones(segmentation, kind):
    with pytest.raises(ValueError, match=r"tags: expected classes of this model \(cat, cow, dog\), got 'horse'"):
        segmentation[kind](photograph(), tags=["cat", "horse"])


def test_the_threshold_sets_the_background(segmentation):
    assert found(segmentation["cam"](photograph(), threshold=1.0)) == ["background"]
    sizes = [
        (label_map(segmentation["cam"](photograph(), tags=CLASSES, threshold=t), ["background", *CLASSES]) == 0).sum()
        for t in (0.0, 0.3, 0.6, 0.9)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] < 50 * 70


def test_a_threshold_for_the_segmenter_is_refused(segmentation):
    with pytest.raises(ValueError, match="threshold: expected none, as Segmenter has none, got"):
        segmentation["segmenter"](photograph(), threshold=0.5)


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_a_batch_gives_each_image_its_result(segmentation, kind):
    images = [photograph(0), photograph(1)]
    names = ["background", *CLASSES]
    results = segmentation[kind](images, tags=["cat", "dog"], batch_size=2)
    assert len(results) == 2
    for image, result in zip(images, results, strict=True):
        expected = segmentation[kind](image, tags=["cat", "dog"])
        assert np.array_equal(label_map(result, names), label_map(expected, names))


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_images_of_any_mode_may_come_one_after_the_other(segmentation, kind):
    images = [photograph(seed).convert(mode) for seed, mode in enumerate(("RGB", "RGBA", "L", "LA", "P"))]
    names = ["background", *CLASSES]
    for batch_size in (1, 2):
        results = list(segmentation[kind]((image for image in images), batch_size=batch_size))
        for image, result in zip(images, results, strict=True):
            expected = segmentation[kind](image.convert("RGB"))
            assert np.array_equal(label_map(result, names), label_map(expected, names))


@pytest.mark.parametrize(("task", "kind"), [("image-segmentation", "segmenter"), ("image-classification", "cam")])
def test_a_pipeline_is_saved_and_loaded(models, task, kind, tmp_path):
    pipe = pipeline(task, str(models / kind))
    pipe.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (models / kind).iterdir()}
    again = pipeline(task, str(tmp_path))
    assert type(again) is type(pipe) and again(photograph()) == pipe(photograph())


def test_paths_are_images_too(segmentation, models):
    expected = segmentation["segmenter"](photograph())
    assert found(segmentation["segmenter"](str(models / "photograph.png"))) == found(expected)


LIBRARY = """
import json, sys

if sys.argv[2] == "with wsss_hf":
    import wsss_hf

from pathlib import Path
from PIL import Image
from transformers import pipeline

root, results = Path(sys.argv[1]), []
image = Image.open(root / "photograph.png")
for task, folder in (("image-segmentation", "segformer"), ("image-classification", "vit")):
    pipe = pipeline(task, str(root / folder))
    found = pipe(image)
    for entry in found:
        if "mask" in entry:
            entry["mask"] = entry["mask"].histogram()
    parts = [name for name in vars(pipe) if name.endswith(("processor", "extractor", "tokenizer"))]
    kinds = {name: str(type(getattr(pipe, name))) for name in parts}
    results.append([f"{type(pipe).__module__}.{type(pipe).__name__}", kinds, found])
print(json.dumps(results))
"""


@pytest.mark.slow
def test_the_import_changes_no_pipeline_of_other_models(tmp_path):
    torch.manual_seed(0)
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        id2label={0: "background", 1: "sky", 2: "tree"},
        label2id={"background": 0, "sky": 1, "tree": 2},
    )
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=64)
    for folder, model in (
        ("segformer", SegformerForSemanticSegmentation(config)),
        ("vit", ViTForImageClassification(vit)),
    ):
        model.save_pretrained(tmp_path / folder)
        DPTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / folder)
    photograph().save(tmp_path / "photograph.png")
    (tmp_path / "library.py").write_text(LIBRARY)
    with_import, without = (
        json.loads(
            subprocess.run(
                [sys.executable, "library.py", str(tmp_path), mode],
                cwd=tmp_path,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                capture_output=True,
                check=True,
            ).stdout
        )
        for mode in ("with wsss_hf", "alone")
    )
    assert with_import == without
    assert [kind for kind, *_ in without] == [
        "transformers.pipelines.image_segmentation.ImageSegmentationPipeline",
        "transformers.pipelines.image_classification.ImageClassificationPipeline",
    ]


def test_our_models_get_our_pipelines(models):
    for kind in ("cam", "segmenter"):
        pipe = pipeline("image-segmentation", str(models / kind))
        assert type(pipe) is MaskPipeline and pipe.video_processor is None
    assert type(pipeline("image-classification", str(models / "cam"))) is TagPipeline


# image-classification


def test_tags_are_named_and_scored_independently(models):
    model = CamClassifier.from_pretrained(models / "cam").eval()
    pixels = WsssImageProcessor(size=SIZE)(photograph(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = model(pixels).logits[0].sigmoid().tolist()
    result = pipeline("image-classification", str(models / "cam"))(photograph())
    assert {entry["label"]: entry["score"] for entry in result} == pytest.approx(
        dict(zip(CLASSES, probabilities, strict=True))
    )
    assert [entry["score"] for entry in result] == pytest.approx(sorted(probabilities, reverse=True))


def test_no_pipeline_calls_our_models_unsupported(models, caplog):
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        pipeline("image-classification", str(models / "cam"))(photograph())
        for kind in ("cam", "segmenter"):
            pipeline("image-segmentation", str(models / kind))(photograph())
    finally:
        library.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "not supported" not in caplog.text


@pytest.mark.parametrize(
    ("task", "kind"),
    [("image-segmentation", "cam"), ("image-segmentation", "segmenter"), ("image-classification", "cam")],
)
def test_nobody_is_asked_whether_to_run_code_that_is_installed(models, task, kind, monkeypatch):
    questions = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "n")
    installed = pipeline(task, str(models / kind))
    assert questions == []
    assert type(installed.model) in (CamClassifier, Segmenter)


# where this package is not installed

REMOTE = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "wsss_hf":
            raise ImportError("wsss_hf is not installed here")

if sys.argv[2] == "remote":
    sys.meta_path.insert(0, Blocker())
    try:
        import wsss_hf
    except ImportError:
        pass
    else:
        raise SystemExit("wsss_hf can be imported")
else:
    import wsss_hf

from pathlib import Path
from PIL import Image
from transformers import pipeline

root, results = Path(sys.argv[1]), {}
image = Image.open(root / "photograph.png")
origin = {"cam": root / "cam", "segmenter": root / "segmenter"}
for turn in ("given", "saved again")[: 2 if sys.argv[2] == "remote" else 1]:
    for kind in ("cam", "segmenter"):
        segment = pipeline("image-segmentation", model=str(origin[kind]), trust_remote_code=True)
        results[f"{turn} {kind}"] = [
            [
                {"label": e["label"], "score": e["score"], "pixels": e["mask"].histogram()[255]}
                for e in segment(image, **options)
            ]
            for options in ({}, {"tags": ["cow"]})
        ]
        if turn == "given":
            origin[kind] = Path("again") / kind
            segment.save_pretrained(origin[kind])
    classify = pipeline("image-classification", model=str(origin["cam"]), trust_remote_code=True)
    results[f"{turn} classes"] = classify(image)
Path("results.json").write_text(json.dumps(results))
"""


def run(models, folder, who):
    (folder / "script.py").write_text(REMOTE)
    environment = os.environ | {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "script.py", str(models), who], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text()), done.stderr


def expected_results(segmentation, models):
    results = {}
    for kind in ("cam", "segmenter"):
        results[kind] = [
            [
                {"label": e["label"], "score": e["score"], "pixels": e["mask"].histogram()[255]}
                for e in segmentation[kind](photograph(), **options)
            ]
            for options in ({}, {"tags": ["cow"]})
        ]
    results["classes"] = pipeline("image-classification", str(models / "cam"))(photograph())
    return results


def same(actual, expected):
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same(actual[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(actual) == len(expected) and all(same(a, e) for a, e in zip(actual, expected, strict=True))
    return actual == pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else actual == expected


@pytest.mark.parametrize("who", ["remote", "installed"])
@pytest.mark.slow
def test_models_bring_their_code_along(segmentation, models, tmp_path, who):
    """trust_remote_code=True gives the same results, where the package cannot be imported and where it is."""
    results, log = run(models, tmp_path, who)
    assert "not supported" not in log
    for name, expected in expected_results(segmentation, models).items():
        for turn in ("given", "saved again") if who == "remote" else ("given",):
            assert same(results[f"{turn} {name}"], expected), (turn, name)
    if who == "remote":
        for kind in ("cam", "segmenter"):
            # What remote code saved is a whole model where the package is installed.
            again = pipeline("image-segmentation", str(tmp_path / "again" / kind))
            assert found(again(photograph())) == found(segmentation[kind](photograph()))
            assert files(tmp_path / "again" / kind) == files(models / kind)


def files(folder):
    return {path.name for path in folder.iterdir()}


def references(value):
    """Every "module.Class" in the values of a JSON object."""
    if isinstance(value, dict):
        return [r for v in value.values() for r in references(v)]
    if isinstance(value, list):
        return [r for v in value for r in references(v)]
    return [value] if isinstance(value, str) and value.count(".") == 1 else []


def relative_imports(tree):
    return [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_a_saved_model_holds_the_code_it_needs_and_no_more(models, kind):
    folder = models / kind
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    entries = references([config["auto_map"], config["custom_pipelines"], processor["auto_map"]])
    needed, open_ = set(), [reference.split(".")[0] for reference in entries]
    while open_:
        module = open_.pop()
        if module not in needed:
            needed.add(module)
            open_ += relative_imports(ast.parse((folder / f"{module}.py").read_text()))
    data = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert files(folder) == data | {f"{module}.py" for module in needed}


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_a_saved_model_imports_the_library_and_its_neighbours_only(models, kind):
    installed = {"torch", "transformers", "huggingface_hub", "PIL", "numpy"}  # wherever transformers shows images
    for path in (models / kind).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                package = name.partition(".")[0]
                allowed = package in sys.stdlib_module_names or package in installed
                assert allowed, f"{path.name} imports {name}"


def sizes():
    return [
        photograph(seed).resize(size) for seed, size in enumerate([(70, 50), (40, 90), (70, 50), (64, 64), (50, 70)])
    ]


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_batches_hold_photographs_of_any_size(models, kind):
    pipe = pipeline("image-segmentation", model=str(models / kind))
    calls = []
    hook = pipe.model.register_forward_hook(lambda _model, args, _output: calls.append(len(args[0])))
    together, images = pipe(sizes(), batch_size=8), sizes()
    hook.remove()
    assert sorted(calls) == [1, 1, 1, 2]  # images of one size in one pass
    for image, parts, alone in zip(images, together, [pipe(image) for image in images], strict=True):
        assert found(parts) == found(alone)
        assert [part["score"] for part in parts] == pytest.approx([part["score"] for part in alone], abs=1e-5)
        for part, other in zip(parts, alone, strict=True):
            assert part["mask"].size == image.size
            assert np.mean(np.asarray(part["mask"]) != np.asarray(other["mask"])) < 0.01


def test_batches_of_tags_hold_photographs_of_any_size(models):
    pipe = pipeline("image-classification", model=str(models / "cam"))
    for parts, image in zip(pipe(sizes(), batch_size=8), sizes(), strict=True):
        alone = pipe(image)
        assert found(parts) == found(alone)
        assert [part["score"] for part in parts] == pytest.approx([part["score"] for part in alone], abs=1e-5)


@pytest.mark.parametrize("kind", ["map refiner", "segmenter on a vision transformer"])
def test_batches_of_the_other_models_hold_photographs_of_any_size(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "map refiner":
        model = MapRefiner(MapRefinerConfig(backbone_config=backbone_config(), id2label=dict(enumerate(CLASSES))))
    else:
        sizes_of = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        vit = ViTConfig(**sizes_of, image_size=32, patch_size=8)
        names = dict(enumerate(["background", *CLASSES]))
        model = Segmenter(SegmenterConfig(backbone_config=vit, rates=[1], id2label=names))
    model.image_processor = WsssImageProcessor(size=SIZE)
    model.save_pretrained(tmp_path)
    pipe = pipeline("image-segmentation", model=str(tmp_path))
    for image, together in zip(sizes(), pipe(sizes(), batch_size=8), strict=True):
        alone = pipe(image)
        assert found(together) == found(alone)
        for part, other in zip(together, alone, strict=True):
            assert part["mask"].size == image.size
            assert np.mean(np.asarray(part["mask"]) != np.asarray(other["mask"])) < 0.01
