import os
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from datasets import ClassLabel, List
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, SegformerConfig, pipeline

from wsss_hf import Segmenter, SegmenterConfig, WeakSegmentationPipeline, WsssImageProcessor
from wsss_hf.data.tagged import class_names, decode_image, encode_png
from wsss_hf.inference.load import load_labeler, load_segmenter
from wsss_hf.inference.segmenter import score_images, segment_images
from wsss_hf.models.background_threshold import THRESHOLDS, ThresholdSearch
from wsss_hf.models.label_colors import overlay
from wsss_hf.models.pamr import pamr
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.pseudo_labels.threshold import auto_threshold
from wsss_hf.settings import EvaluationSettings, MasksSettings, SelfTrainingSettings

TINY = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


@pytest.fixture(scope="module")
def pipes(cam_folder, toy_data):
    """The pipeline on a CAM classifier and on a segmenter, for the classes of `toy_data`."""
    torch.manual_seed(0)
    names = dict(enumerate(["background", *class_names(toy_data)]))
    segmenter = Segmenter(SegmenterConfig(backbone_config=TINY, rates=[1], id2label=names)).eval()
    processor = WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 192})
    with torch.no_grad():
        segmenter.head[0].weight.normal_()
    return {
        "cam": pipeline("weak-segmentation", model=str(cam_folder)),
        "segmenter": pipeline("weak-segmentation", model=segmenter, image_processor=processor),
    }


@pytest.fixture
def image(toy_data):
    return toy_data["train"][0]["image"].resize((60, 40))


KINDS = pytest.mark.parametrize("kind", ["cam", "segmenter"])


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert np.array_equal(actual["mask"], expected["mask"]) and np.array_equal(actual["overlay"], expected["overlay"])
    assert actual["maps"].keys() == expected["maps"].keys()
    for name, scores in expected["maps"].items():
        assert np.allclose(actual["maps"][name], scores, atol=1e-6)


@KINDS
def test_a_result_holds_together(pipes, toy_data, image, kind):
    pipe, names = pipes[kind], ["background", *class_names(toy_data)]
    assert type(pipe) is WeakSegmentationPipeline
    result = pipe(image, tags=names[1:4])
    labels = np.asarray(result["mask"])
    assert result["mask"].mode == "P" and labels.shape == (40, 60) and labels.any()
    assert [names[label] for label in np.unique(labels)] == [segment["label"] for segment in result["segments"]]
    for segment in result["segments"]:
        assert np.array_equal(np.asarray(segment["mask"]) == 255, labels == names.index(segment["label"]))
        assert 0 < segment["score"] <= 1
    assert list(result["maps"]) == names[1:4]
    for scores in result["maps"].values():
        assert scores.shape == (40, 60) and scores.dtype == np.float32 and 0 <= scores.min() <= scores.max() <= 1
    assert np.array_equal(result["overlay"], overlay(image, labels))


@KINDS
def test_masks_are_those_of_image_segmentation(pipes, toy_data, image, kind):
    built_in = pipeline("image-segmentation", model=pipes[kind].model, image_processor=pipes[kind].image_processor)
    for options in ({}, {"tags": class_names(toy_data)[:2]}):
        expected = built_in(image, **options)
        actual = pipes[kind](image, **options)["segments"]
        assert [(e["label"], e["score"]) for e in actual] == [(e["label"], e["score"]) for e in expected]
        assert all(np.array_equal(a["mask"], e["mask"]) for a, e in zip(actual, expected, strict=True))


@pytest.fixture
def web_folder(tmp_path):
    """A folder and the address of the server that shows it."""
    handler_class = type("Silent", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler_class, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@KINDS
def test_every_way_to_give_an_image_gives_the_same(pipes, image, web_folder, kind):
    folder, address = web_folder
    image.save(folder / "image.png")
    expected = pipes[kind](image)
    places = [str(folder / "image.png"), f"{address}/image.png"]
    for given in (*places, np.asarray(image), {"image": image}, {"image": np.asarray(image)}):
        assert_same(pipes[kind](given), expected)
    (listed,) = pipes[kind]([image])
    assert_same(listed, expected)
    (generated,) = pipes[kind](entry for entry in [image])
    assert_same(generated, expected)


def plain(result):
    """Pictures and arrays in lists and dicts as lists of numbers."""
    if isinstance(result, dict):
        return {key: plain(value) for key, value in result.items()}
    if isinstance(result, list):
        return [plain(value) for value in result]
    return np.asarray(result).tolist() if isinstance(result, Image.Image | np.ndarray) else result


@KINDS
@pytest.mark.parametrize("task", ["image-segmentation", "image-classification", "weak-segmentation"])
def test_pipelines_read_images_as_training_does(pipes, toy_data, tmp_path, kind, task):
    if task == "image-classification" and kind != "cam":
        return
    model, processor = pipes[kind].model, pipes[kind].image_processor
    pipe = pipeline(task, model=model, image_processor=processor)
    pixels = np.asarray(toy_data["train"][0]["image"].convert("L"))
    deep = Image.fromarray(pixels.astype(np.uint16) * 257)
    clear = Image.fromarray(np.dstack([pixels] * 3 + [np.where(pixels > 100, 255, 0).astype(np.uint8)]))
    exif = Image.Exif()
    exif[0x0112] = 8
    for number, image in enumerate((deep, Image.fromarray(pixels.astype(np.float32) / 255), clear)):
        file = tmp_path / f"{number}.{'png' if image is clear else 'tif'}"
        image.save(file, **({"exif": exif} if image is clear else {}))
        expected = pipe(decode_image({"path": str(file)}, "row"))
        for given in (str(file), Image.open(file)):
            assert plain(pipe(given)) == plain(expected)
    (tmp_path / "12 bits.png").write_bytes(encode_png(Image.fromarray(pixels.astype(np.uint16) * 16))["bytes"])
    with pytest.raises(ValueError, match="expected 16-bit values that use their range"):
        pipe(str(tmp_path / "12 bits.png"))


REMOTE = """
import base64, io, sys
from pathlib import Path

sys.modules["wsss_hf"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import pipeline

model, address = sys.argv[1:]
for task in sys.argv[1].endswith("cam") * ["image-classification"] + ["image-segmentation", "weak-segmentation"]:
    pipe = pipeline(task, model=model, trust_remote_code=True)
    assert pipe.preprocess.__func__.__module__.startswith("transformers_modules."), task
    for file in sorted(Path("images").iterdir()):
        content = file.read_bytes()
        text = base64.b64encode(content).decode()
        ways = [str(file), f"{address}/images/{file.name}", text, content, Image.open(io.BytesIO(content))]
        try:
            seen = [pipe.preprocess(given)["pixel_values"][0] for given in ways]
            assert all(torch.equal(values, seen[0]) for values in seen), file
            assert pipe(str(file))
            torch.save(seen[0], f"{task}-{file.name}.pt")
        except ValueError as error:
            Path(f"{task}-{file.name}.txt").write_text(str(error))
"""


@pytest.mark.slow
@KINDS
def test_where_the_package_is_not_installed_images_are_read_alike(pipes, toy_data, web_folder, kind):
    folder, address = web_folder
    model, processor = pipes[kind].model, pipes[kind].image_processor
    model.save_pretrained(folder / kind)
    processor.save_pretrained(folder / kind)
    pixels = np.asarray(toy_data["train"][0]["image"].convert("L"))
    alpha = np.where(pixels > 100, 255, 0).astype(np.uint8)
    (folder / "images").mkdir()
    Image.fromarray(pixels.astype(np.uint16) * 257).save(folder / "images" / "16.png")
    Image.fromarray(pixels.astype(np.float32) / 255).save(folder / "images" / "float.tif")
    Image.fromarray(np.dstack([pixels] * 3 + [alpha])).save(folder / "images" / "alpha.png")
    Image.fromarray(pixels.astype(np.uint16) * 16).save(folder / "images" / "12.png")
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, kind, address], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for task in (kind == "cam") * ["image-classification"] + ["image-segmentation", "weak-segmentation"]:
        for name in ("16.png", "float.tif", "alpha.png"):
            image = decode_image({"path": str(folder / "images" / name)}, name)
            expected = processor(images=[image], return_tensors="pt")["pixel_values"]
            assert torch.equal(torch.load(folder / f"{task}-{name}.pt", weights_only=True), expected)
        said = (folder / f"{task}-12.png.txt").read_text()
        assert said.startswith("images/12.png: expected 16-bit values that use their range, 0..65535, got ")
        assert "\n" not in said


@KINDS
@pytest.mark.parametrize("task", ["weak-segmentation", "image-segmentation", "image-classification"])
def test_a_column_of_a_data_set_gives_results_one_by_one(pipes, toy_data, task, kind):
    if (task, kind) == ("image-classification", "segmenter"):
        pytest.skip("a segmenter has no such pipeline")
    pipe = pipeline(task, model=pipes[kind].model, image_processor=pipes[kind].image_processor)
    column = toy_data["val"]["image"]
    expected = pipe(list(column))
    streamed = toy_data["val"].to_iterable_dataset()["image"]
    for found in (pipe(column), pipe(column, batch_size=2), pipe(streamed)):
        assert iter(found) is found
        for one, wanted in zip(found, expected, strict=True):
            if task == "weak-segmentation":
                assert_same(one, wanted)
            else:
                assert [part["label"] for part in one] == [part["label"] for part in wanted]


@KINDS
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_data_set_brings_its_tags(pipes, toy_data, kind, batch_size):
    rows, names = toy_data["train"].select(range(5)), class_names(toy_data)
    results = list(pipes[kind](rows, batch_size=batch_size))
    assert len(results) == 5
    for row, result in zip(rows, results, strict=True):
        tags = [names[tag] for tag in row["tags"]]
        assert sorted(result["maps"]) == sorted(tags)
        assert_same(result, pipes[kind](row["image"], tags=tags))
    untagged = rows.remove_columns("tags")
    assert_same(next(iter(pipes[kind](untagged))), pipes[kind](rows[0]["image"]))


def test_a_class_is_known_by_its_name_not_by_its_place(pipes, toy_data):
    names = class_names(toy_data)
    rows = toy_data["train"].select([0])
    values = [[names[::-1].index(names[tag]) for tag in rows[0]["tags"]]]
    turned = rows.remove_columns("tags").add_column("tags", values, feature=List(ClassLabel(names=names[::-1])))
    assert turned[0]["tags"] != rows[0]["tags"]
    assert_same(next(iter(pipes["cam"](turned))), next(iter(pipes["cam"](rows))))


def test_tags_of_a_row_go_first(pipes, toy_data, image):
    names = class_names(toy_data)
    results = pipes["cam"]([{"image": image, "tags": names[:1]}, image], tags=names[1:2])
    assert [list(result["maps"]) for result in results] == [names[:1], names[1:2]]
    assert pipes["cam"](image, tags=[])["maps"] == {}


def test_without_tags_the_maps_are_of_what_is_predicted(pipes, toy_data, image):
    pipe, names = pipes["cam"], class_names(toy_data)
    pixels = pipe.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predicted = (pipe.model(pixels).logits[0].sigmoid() > pipe.model.config.tag_threshold).nonzero()[:, 0]
    assert list(pipe(image)["maps"]) == [names[i] for i in predicted]
    result = pipes["segmenter"](image)
    assert list(result["maps"]) == [s["label"] for s in result["segments"] if s["label"] != "background"]


def test_the_threshold_moves_the_background(pipes, toy_data, image):
    names = class_names(toy_data)
    sizes = [
        (np.asarray(pipes["cam"](image, tags=names[:2], threshold=threshold)["mask"]) == 0).sum()
        for threshold in (0.0, 0.4, 0.8, 1.0)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] < sizes[3] == 40 * 60


def test_scales_and_mirror_images_are_averaged(pipes, toy_data, image):
    names = class_names(toy_data)
    for kind, pipe in pipes.items():
        plain, fused = pipe(image, tags=names[:2]), pipe(image, tags=names[:2], scales=[0.5, 1.0, 1.5], flip=True)
        assert not np.allclose(plain["maps"][names[0]], fused["maps"][names[0]], atol=1e-3), kind
        # A mirrored image has mirrored maps then, and only then.
        mirrored = pipe(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), tags=names[:2], flip=True)["maps"][names[0]]
        assert np.allclose(mirrored[:, ::-1], pipe(image, tags=names[:2], flip=True)["maps"][names[0]], atol=1e-3)


def test_a_scale_of_one_is_the_image_itself(pipes, toy_data, image):
    tags = class_names(toy_data)[:2]
    for kind, pipe in pipes.items():
        once = pipe(image, tags=tags)
        for scales in ([1.0], [1.0, 1.0]):
            assert_same(pipe(image, tags=tags, scales=scales), once), kind


@KINDS
def test_pamr_refines_the_scores(pipes, toy_data, image, kind):
    tags = class_names(toy_data)[:2]
    plain, refined = (pipes[kind](image, tags=tags, refine=refine) for refine in (None, "pamr"))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    for name, scores in plain["maps"].items():
        expected = pamr(pixels, torch.from_numpy(scores)[None, None])[0, 0]
        assert np.allclose(refined["maps"][name], expected, atol=1e-5)
        assert not np.allclose(refined["maps"][name], scores, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("cam", {"tags": ["unicorn"]}, "tags: expected classes of this model .* got 'unicorn'"),
        ("cam", {"refine": "crf"}, "refine: expected 'pamr' or None, got 'crf'"),
        ("cam", {"scales": []}, "scales: expected positive numbers"),
        ("cam", {"scales": [1.0, -1.0]}, "scales: expected positive numbers"),
        ("segmenter", {"threshold": 0.5}, "threshold: expected none, as Segmenter has none, got 0.5"),
    ],
)
def test_impossible_options_are_refused(pipes, image, kind, options, words):
    with pytest.raises(ValueError, match=words):
        pipes[kind](image, **options)


@pytest.mark.parametrize("given", [np.zeros((4, 5, 7), np.uint8), np.zeros((4, 5, 3)), {"picture": None}])
def test_other_things_than_images_are_refused(pipes, given):
    with pytest.raises(ValueError, match="image: expected an array|row: expected an image"):
        pipes["cam"](given)


def test_models_of_the_library_have_their_own_pipeline(pipes):
    tiny = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    segformer = AutoModelForSemanticSegmentation.from_config(SegformerConfig(**tiny))
    with pytest.raises(ValueError, match="expected a model of wsss_hf, got SegformerForSemanticSegmentation"):
        pipeline("weak-segmentation", model=segformer, image_processor=pipes["cam"].image_processor)


def bits_of(result, names):
    """Mask and maps of a result, for comparison to the bit."""
    return np.asarray(result["mask"]), {names.index(name): scores for name, scores in result["maps"].items()}


def check_identical(mask, maps, wanted_mask, wanted_maps):
    assert np.array_equal(mask, wanted_mask) and maps.keys() == wanted_maps.keys()
    assert all(np.array_equal(maps[c], wanted_maps[c]) for c in maps)


@pytest.mark.parametrize("refine", [None, "pamr"])
@pytest.mark.parametrize(("scales", "flip"), [([1.0], False), ([0.75, 1.0, 1.25], True)])
def test_masks_are_those_of_make_masks(cam_folder, toy_data, refine, scales, flip):
    """One path from the image to maps and masks: what labels a data set gives the same as both pipelines."""
    rows, names = toy_data["train"].select(range(4)), class_names(toy_data)
    settings = MasksSettings(scales=scales, flip=flip, background_threshold=0.3, refine=[refine] if refine else [])
    weak = pipeline("weak-segmentation", model=str(cam_folder))
    built_in = pipeline("image-segmentation", model=str(cam_folder))
    found = set()
    for labelled in label_images(*load_labeler(cam_folder, "cpu"), rows, settings):
        tags, picture = [names[c] for c in labelled.classes], rows[labelled.index]["image"]
        result = weak(picture, tags=tags, threshold=0.3, scales=scales, flip=flip, refine=refine)
        mask, maps = bits_of(result, names)
        wanted_maps = dict(zip(labelled.classes.tolist(), labelled.maps, strict=True))
        check_identical(mask, maps if refine is None else wanted_maps, labelled.pseudo_mask, wanted_maps)
        if (scales, flip, refine) == ([1.0], False, None):
            for segment in built_in(picture, tags=tags, threshold=0.3):
                here = np.asarray(segment["mask"]) == 255
                assert np.array_equal(here, labelled.pseudo_mask == ["background", *names].index(segment["label"]))
        found |= set(np.unique(mask))
    assert len(found) > 3


@pytest.mark.parametrize(("scales", "flip"), [([1.0], False), ([0.75, 1.25], True)])
def test_labels_are_those_of_evaluation_and_relabelling(pipes, toy_data, tmp_path, scales, flip):
    pipes["segmenter"].model.save_pretrained(tmp_path)
    pipes["segmenter"].image_processor.save_pretrained(tmp_path)
    model, processor = load_segmenter(tmp_path, "cpu")
    rows, names = toy_data["train"].select(range(4)), class_names(toy_data)
    weak = pipeline("weak-segmentation", model=str(tmp_path))
    built_in = pipeline("image-segmentation", model=str(tmp_path))
    settings = EvaluationSettings(scales=scales, flip=flip)
    for segmented in segment_images(model, processor, rows, settings):
        picture = rows[segmented.index]["image"]
        assert np.array_equal(weak(picture, scales=scales, flip=flip)["mask"], segmented.labels)
        if not flip:
            for segment in built_in(picture):
                here = np.asarray(segment["mask"]) == 255
                assert np.array_equal(here, segmented.labels == ["background", *names].index(segment["label"]))
    settings = SelfTrainingSettings(scales=scales, flip=flip, refine=["pamr"])
    for scored in score_images(model, processor, rows, settings, only_tagged=True):
        tags = [names[c] for c in scored.classes.tolist()]
        result = weak(rows[scored.index]["image"], tags=tags, scales=scales, flip=flip, refine="pamr")
        wanted_maps = dict(zip(scored.classes.tolist(), scored.scores[1:].numpy(), strict=True))
        values = np.array([0, *(scored.classes + 1).tolist()])
        check_identical(*bits_of(result, names), values[scored.scores.argmax(dim=0)], wanted_maps)


@pytest.mark.slow
@pytest.mark.parametrize("refine", [None, "pamr"])
def test_auto_is_the_threshold_of_a_data_set_of_one_image(cam_folder, toy_data, refine):
    names, weak = class_names(toy_data), pipeline("weak-segmentation", model=str(cam_folder))
    settings = MasksSettings(background_threshold="auto", scales=[1.0, 1.5], refine=[refine] if refine else [])
    labeler, thresholds = load_labeler(cam_folder, "cpu"), set()
    for index in range(3):
        row, rows = toy_data["train"][index], toy_data["train"].select([index])
        options = {"tags": [names[tag] for tag in row["tags"]], "scales": [1.0, 1.5], "flip": True, "refine": refine}
        masks = {
            limit: np.asarray(weak(row["image"], threshold=limit, **options)["mask"])
            for limit in ("auto", *THRESHOLDS)
        }
        chosen = auto_threshold(*labeler, rows, settings)
        assert np.array_equal(masks["auto"], masks[chosen])
        assert any(not np.array_equal(masks["auto"], mask) for mask in masks.values())
        thresholds.add(chosen)
    assert len(thresholds) > 1


def test_auto_looks_at_the_features(pipes, toy_data, image, monkeypatch):
    seen = []
    add = ThresholdSearch.add
    monkeypatch.setattr(ThresholdSearch, "add", lambda self, *given: seen.append(given) or add(self, *given))
    pipes["cam"](image, tags=class_names(toy_data)[:2], threshold="auto")
    ((maps, features),) = seen
    assert maps.shape == (2, 40, 60)
    assert [len(stage) for stage in features] == list(pipes["cam"].model.backbone.channels)


def test_auto_without_tags_leaves_the_background(pipes, image):
    assert not np.asarray(pipes["cam"](image, tags=[], threshold="auto")["mask"]).any()


def test_a_threshold_is_a_number_or_auto(pipes, image):
    with pytest.raises(ValueError, match="threshold: expected a number in .* got 'best'"):
        pipes["cam"](image, threshold="best")
    with pytest.raises(ValueError, match="threshold: expected none, as Segmenter has none, got 'auto'"):
        pipes["segmenter"](image, threshold="auto")


@pytest.mark.parametrize(
    "options", [{}, {"scales": [0.5, 1.0], "flip": True, "refine": "pamr"}, {"threshold": "auto"}]
)
@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_batches_hold_photographs_of_any_size(pipes, image, kind, options):
    if kind == "segmenter" and "threshold" in options:
        pytest.skip("it has none")
    pipe, images = pipes[kind], [image.resize(size) for size in [(70, 50), (40, 90), (70, 50), (64, 64)]]
    for image, found in zip(images, pipe(images, batch_size=8, **options), strict=True):
        alone = pipe(image, **options)
        assert found["mask"].size == image.size and found["maps"].keys() == alone["maps"].keys()
        for name, scores in found["maps"].items():
            np.testing.assert_allclose(scores, alone["maps"][name], atol=1e-4)
