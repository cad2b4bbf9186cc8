"""`predict`: label maps and overlays of image files, whatever is among them and whenever it was stopped."""

import json
import runpy
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from library import needs_segformers_processor
from PIL import Image
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    pipeline,
)
from transformers.models.eomt.image_processing_pil_eomt import EomtImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from wsss_hf import (
    CamClassifier,
    MapRefiner,
    MapRefinerConfig,
    Segmenter,
    SegmenterConfig,
    WsssImageProcessor,
    predict,
)
from wsss_hf.data.tagged import DataError, class_names
from wsss_hf.models.label_colors import overlay
from wsss_hf.models.options import OptionError
from wsss_hf.settings import EvaluationSettings
from wsss_hf.stages import predict as module
from wsss_hf.stages.cache import OutputError
from wsss_hf.stages.predict import find_images

TINY = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
PLAIN = EvaluationSettings(flip=False)


@pytest.fixture(scope="module")
def segmenter_folder(toy_data, tmp_path_factory):
    """A saved segmenter for `toy_data` that has learnt nothing, but is of many minds."""
    torch.manual_seed(0)
    names = dict(enumerate(["background", *class_names(toy_data)]))
    model = Segmenter(SegmenterConfig(backbone_config=TINY, rates=[1], id2label=names))
    torch.nn.init.normal_(model.head[0].weight)
    folder = tmp_path_factory.mktemp("models") / "segmenter"
    model.save_pretrained(folder)
    WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def streets_folder(tmp_path_factory):
    """A model of transformers whose label 0 is a class."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8], "num_encoder_blocks": 2, "depths": [1, 1], "num_attention_heads": [1, 1]}
    sizes |= {"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    config = SegformerConfig(**sizes, decoder_hidden_size=16, id2label={0: "road", 1: "car", 2: "sky"})
    folder = tmp_path_factory.mktemp("models") / "streets"
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(toy_data, tmp_path):
    """Six images of two sizes in two folders."""
    for number in range(6):
        file = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = toy_data["train"][number]["image"]
        (image if number < 3 else image.resize((60, 40))).save(file)
    return tmp_path / "photos"


@pytest.fixture
def passes(monkeypatch):
    """The names of the images that went through a network, one list for each time they did."""
    seen = []
    label = module._Labeler.label

    def counted(self, targets):
        for target, result in label(self, targets):
            seen.append(target.name)
            yield target, result

    monkeypatch.setattr(module._Labeler, "label", counted)
    return seen


def by_name(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def labels_of(predictions, name):
    return next(one.labels for one in predictions if one.name == name)


def from_pipeline(pipe, names, path, **options):
    """The label map that the segments of a pipeline make."""
    segments = pipe(str(path), **options)
    labels = np.zeros(np.asarray(segments[0]["mask"]).shape, np.uint8)
    for segment in segments:
        labels[np.asarray(segment["mask"]) > 0] = names.index(segment["label"])
    return labels


def test_every_image_gets_a_mask_and_an_overlay(photos, segmenter_folder, toy_data, tmp_path):
    out = tmp_path / "out"
    found = predict(photos, segmenter_folder, out, settings=PLAIN)
    assert [one.name for one in found] == ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png", "b/5.png"]
    assert not found.failures and Path(found) == out and len(found) == 6
    names = ["background", *class_names(toy_data)]
    assert found.names == names
    assert json.loads((out / "labels.json").read_text()) == {str(label): name for label, name in enumerate(names)}
    assert set(by_name(out)) == {"recipe.yaml", "labels.json"} | {
        f"{kind}/{name.removesuffix('png')}{suffix}"
        for name in (one.name for one in found)
        for kind, suffix in (("masks", "png"), ("overlays", "jpg"))
    }
    for one in found:
        image = Image.open(one.image)
        assert Image.open(one.mask).mode == "P" and one.labels.shape == (image.height, image.width)
        drawn = np.asarray(Image.open(one.overlay)).astype(int)
        assert np.abs(drawn - np.asarray(overlay(image, one.labels))).mean() < 12  # JPEG
    assert len(np.unique(found.found[0].labels)) > 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_masks_of_a_segmenter_are_those_of_the_pipeline(photos, segmenter_folder, tmp_path, batch_size):
    settings = EvaluationSettings(flip=False, batch_size=batch_size)
    found = predict(photos, segmenter_folder, tmp_path / "out", settings=settings)
    pipe = pipeline("image-segmentation", model=str(segmenter_folder))
    for one in found:
        expected = from_pipeline(pipe, found.names, one.image)
        assert (one.labels != expected).mean() < 0.002  # folded norms round otherwise


@pytest.mark.parametrize("tags", [None, 2])
def test_masks_of_a_cam_classifier_are_those_of_the_pipeline(photos, cam_folder, toy_data, tmp_path, tags):
    tags = class_names(toy_data)[:tags] if tags else None
    settings = EvaluationSettings(scales=[1.0, 1.5], batch_size=4)
    found = predict(photos, cam_folder, tmp_path / "out", settings=settings, tags=tags)
    pipe = pipeline("weak-segmentation", model=str(cam_folder))
    for one in found:
        expected = np.asarray(pipe(str(one.image), tags=tags, scales=[1.0, 1.5], flip=True)["mask"])
        assert (one.labels != expected).mean() < 0.002
    labels = set(np.unique([label for one in found for label in np.unique(one.labels)]))
    assert labels <= {0, 1, 2} if tags else labels - {0, 1, 2}


def test_a_map_refiner_denies_a_class_that_is_given(photos, cam_folder, toy_data, tmp_path):
    """Its maps are used as they are, as by the pipeline: one that is low everywhere stays below the background."""
    refiner, classifier = tmp_path / "refiner", CamClassifier.from_pretrained(cam_folder)
    names, options = class_names(toy_data), {"backbone_config": classifier.config.backbone_config, "output_stride": 16}
    refined = MapRefiner(MapRefinerConfig(**options, id2label=dict(enumerate(names))))
    refined.load_state_dict(classifier.state_dict(), strict=False)
    refined.classifier.weight.data[0] *= 1e-3
    refined.save_pretrained(refiner)
    WsssImageProcessor.from_pretrained(cam_folder).save_pretrained(refiner)
    pipe = pipeline("weak-segmentation", model=str(refiner))
    settings, found_labels = EvaluationSettings(scales=[1.0, 1.5], batch_size=4), []
    for number, tags in enumerate([names[:2], None]):
        found = predict(photos, refiner, tmp_path / f"out{number}", settings=settings, tags=tags)
        for one in found:
            expected = np.asarray(pipe(str(one.image), tags=tags, scales=[1.0, 1.5], flip=True)["mask"])
            assert np.array_equal(one.labels, expected)
        found_labels.append({label for one in found for label in np.unique(one.labels)})
    assert found_labels[0] == {0, 2} and 1 not in found_labels[1] and len(found_labels[1]) > 2


def test_a_segmenter_keeps_to_the_tags(photos, segmenter_folder, toy_data, tmp_path):
    tags = [class_names(toy_data)[3], class_names(toy_data)[1]]
    found = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN, tags=tags)
    assert {0, 2, 4} >= set(np.unique(np.concatenate([one.labels.ravel() for one in found]))) > {0}
    pipe = pipeline("image-segmentation", model=str(segmenter_folder))
    expected = from_pipeline(pipe, found.names, found.found[0].image, tags=tags)
    assert (found.found[0].labels != expected).mean() < 0.002


@needs_segformers_processor
def test_a_model_without_background_draws_and_exports_its_label_0(photos, streets_folder, tmp_path):
    found = predict(photos, streets_folder, tmp_path / "out", settings=PLAIN, coco=True)
    assert found.names == ["road", "car", "sky"]
    pipe = pipeline("image-segmentation", model=str(streets_folder))
    one = next(one for one in found if (one.labels == 0).any())
    assert (one.labels != from_pipeline(pipe, found.names, one.image)).mean() < 0.01
    drawn = np.asarray(Image.open(one.overlay)).astype(int)
    assert (np.abs(drawn - np.asarray(Image.open(one.image)))[one.labels == 0].mean(axis=0) > 12).any()
    written = json.loads((tmp_path / "out" / "predictions.coco.json").read_text())
    assert [category["name"] for category in written["categories"]] == found.names
    with pytest.raises(OptionError, match="tags: expected none, as 'road' is the model's label 0, not background"):
        predict(photos, streets_folder, tmp_path / "out", tags=["car"])


def test_a_mask_classifier_labels_images_that_are_larger_than_its_squares(photos, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_blocks": 1, "num_queries": 8}
    config = EomtConfig(**sizes, image_size=32, id2label={0: "background", 1: "cat", 2: "dog"})
    EomtForUniversalSegmentation(config).save_pretrained(tmp_path / "eomt")
    EomtImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(tmp_path / "eomt")
    found = predict(photos, tmp_path / "eomt", tmp_path / "out", settings=PLAIN)
    assert not found.failures and found.names == ["background", "cat", "dog"]
    assert {one.labels.shape for one in found} == {(48, 48), (40, 60)}


def test_bad_files_stop_nothing(photos, segmenter_folder, tmp_path):
    whole = predict(photos, segmenter_folder, tmp_path / "whole", settings=PLAIN)
    (photos / "a" / "1.jpg").write_bytes(b"no image")
    cut = photos / "b" / "2.jpg"
    Image.new("RGB", (64, 64)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    found = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN)
    assert [failure.image for failure in found.failures] == [photos / "a" / "1.jpg", cut]
    assert all("expected an image, got a file that can't be decoded" in str(failure) for failure in found.failures)
    assert all(str(failure).startswith(f"{failure.image}: expected") for failure in found.failures)
    for one in whole:
        assert np.array_equal(labels_of(found, one.name), one.labels)


def test_an_image_that_the_model_fails_on_is_no_other_images_failure(photos, segmenter_folder, tmp_path, monkeypatch):
    def breaks(model, processor, rows, *options, **kwargs):
        for scored in whole(model, processor, rows, *options, **kwargs):
            if rows["image_id"][scored.index] == "b/3.png":
                raise RuntimeError("out of memory")
            yield scored

    whole = module.score_images
    monkeypatch.setattr(module, "score_images", breaks)
    found = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN)
    assert [(failure.image.name, failure.reason) for failure in found.failures] == [
        ("3.png", "RuntimeError: out of memory")
    ]
    assert len(found) == 5


def test_a_bad_file_takes_the_mask_of_the_image_that_it_replaces_along(photos, segmenter_folder, tmp_path):
    out = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN).folder
    (photos / "a" / "2.png").write_bytes(b"no image")
    assert len(predict(photos, segmenter_folder, out, settings=PLAIN).failures) == 1
    assert not (out / "masks/a/2.png").exists() and not (out / "overlays/a/2.jpg").exists()


def test_a_killed_run_goes_on(photos, segmenter_folder, tmp_path, passes, monkeypatch):
    out, settings = tmp_path / "out", EvaluationSettings(flip=False, batch_size=1)
    written = []

    def killed(*arguments):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(arguments[0].name)
        write(*arguments)

    write = module._write
    monkeypatch.setattr(module, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        predict(photos, segmenter_folder, out, settings=settings)
    monkeypatch.setattr(module, "_write", write)
    passes.clear()
    found = predict(photos, segmenter_folder, out, settings=settings)
    assert sorted(written + passes) == [one.name for one in found] and len(passes) == 2
    assert by_name(out) == by_name(predict(photos, segmenter_folder, tmp_path / "at once", settings=settings).folder)
    passes.clear()
    predict(photos, segmenter_folder, out, settings=settings)
    assert not passes
    predict(photos, segmenter_folder, out, settings=settings, force=True)
    assert len(passes) == 6


def test_what_changed_is_made_again_and_nothing_else(
    photos, segmenter_folder, cam_folder, toy_data, tmp_path, passes, capsys
):
    out = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN).folder
    Image.new("RGB", (30, 20), "red").save(photos / "a" / "2.png")
    (out / "masks/b/3.png").write_bytes(b"cut")
    passes.clear()
    found = predict(photos, segmenter_folder, out, settings=EvaluationSettings(flip=False, batch_size=2, workers=1))
    assert sorted(passes) == ["a/2.png", "b/3.png"]
    assert labels_of(found, "a/2.png").shape == (20, 30)
    for changed, why in (
        ({"settings": EvaluationSettings(flip=True)}, "evaluation.flip was False and is True"),
        ({"tags": class_names(toy_data)[:1]}, "tags was None"),
        ({"model": cam_folder}, "model changed"),
    ):
        passes.clear()
        capsys.readouterr()
        options = {"settings": PLAIN, "model": segmenter_folder} | changed
        predict(photos, out=out, **options)
        assert len(passes) == 6 and f"label maps are made again, because {why}" in capsys.readouterr().err
        predict(photos, segmenter_folder, out, settings=PLAIN)


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory):
    """A segmenter of two classes that no other model here has."""
    torch.manual_seed(1)
    names = dict(enumerate(["background", "round", "square"]))
    model = Segmenter(SegmenterConfig(backbone_config=TINY, rates=[1], id2label=names))
    folder = tmp_path_factory.mktemp("models") / "shapes"
    model.save_pretrained(folder)
    WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}).save_pretrained(folder)
    return folder


def test_label_maps_of_other_labels_never_stand_together(photos, segmenter_folder, shapes_folder, tmp_path):
    out = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN).folder
    before = by_name(out)
    two = [photos / "a" / "0.png", photos / "b" / "1.png"]
    with pytest.raises(OutputError, match="or the labels .*'square'.*, got label maps of 4 other images with"):
        predict(two, shapes_folder, out, settings=PLAIN, force=True)
    with pytest.raises(OutputError, match="got label maps of 6 other images with the labels .*'background'"):
        predict(photos / "b", shapes_folder, out, settings=PLAIN)  # 1.png, which is b/1.png in the folder
    assert by_name(out) == before


def test_a_model_with_other_labels_replaces_all_label_maps_or_none(
    photos, segmenter_folder, shapes_folder, tmp_path, monkeypatch
):
    out = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN).folder
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_write", Mock(side_effect=KeyboardInterrupt))
        predict(photos, shapes_folder, out, settings=PLAIN)
    assert not list((out / "masks").rglob("*.png"))
    predict(photos, shapes_folder, out, settings=PLAIN)
    assert by_name(out) == by_name(predict(photos, shapes_folder, tmp_path / "fresh", settings=PLAIN).folder)


def test_only_label_maps_of_named_images_are_said_to_be_made_again(photos, segmenter_folder, tmp_path, capsys):
    out = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN).folder
    Image.new("RGB", (30, 20), "red").save(tmp_path / "new.png")
    capsys.readouterr()
    predict(tmp_path / "new.png", segmenter_folder, out)
    said = capsys.readouterr().err
    change = "evaluation.flip was False and is True"
    assert f"out: label maps of 6 other images stay as they are, though {change}\n" in said and "again" not in said
    predict(tmp_path / "new.png", segmenter_folder, out, force=True)
    said = capsys.readouterr().err
    assert "out: label maps are made again, because --force asks for it\n" in said and "stay" not in said


def test_label_maps_follow_when_a_namesake_comes_or_goes(photos, segmenter_folder, tmp_path, passes):
    (photos / "a" / "0.png").rename(photos / "a" / "0.PNG")
    out = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN).folder
    Image.new("RGB", (30, 20), "red").save(photos / "a" / "0.jpg")
    passes.clear()
    predict(photos, segmenter_folder, out, settings=PLAIN)
    assert passes == ["a/0.jpg"]
    assert by_name(out) == by_name(predict(photos, segmenter_folder, tmp_path / "both", settings=PLAIN).folder)
    (photos / "a" / "0.PNG").unlink()
    passes.clear()
    predict(photos, segmenter_folder, out, settings=PLAIN)
    assert not passes
    alone = by_name(predict(photos, segmenter_folder, tmp_path / "alone", settings=PLAIN).folder)
    kept = {"masks/a/0.PNG.png", "overlays/a/0.PNG.jpg"}  # of an image that is gone
    assert by_name(out).keys() == alone.keys() | kept and alone.items() <= by_name(out).items()


def test_overlays_come_later_without_the_network_and_never_belong_to_another_mask(
    photos, segmenter_folder, tmp_path, passes
):
    out = tmp_path / "out"
    predict(photos, segmenter_folder, out, settings=PLAIN, overlays=False)
    assert not (out / "overlays").exists()
    passes.clear()
    predict(photos, segmenter_folder, out, settings=PLAIN)
    assert len(list((out / "overlays").rglob("*.jpg"))) == 6 and not passes
    predict(photos, segmenter_folder, out, overlays=False)  # other masks
    assert not list((out / "overlays").rglob("*.jpg"))


def test_coco_decodes_to_the_same_masks(photos, segmenter_folder, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    (photos / "a" / "1.jpg").write_bytes(b"no image")
    found = predict(photos, segmenter_folder, tmp_path / "out", settings=PLAIN, coco=True)
    file = found / "predictions.coco.json"
    read = coco.COCO(str(file))
    assert [image["file_name"] for image in read.imgs.values()] == [one.name for one in found]
    assert {c["id"]: c["name"] for c in read.cats.values()} == dict(enumerate(found.names[1:], start=1))
    for image, one in zip(read.imgs.values(), found, strict=True):
        labels = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in read.loadAnns(read.getAnnIds(image["id"])):
            labels[read.annToMask(annotation) == 1] = annotation["category_id"]
        assert np.array_equal(labels, one.labels)
    predict(photos, segmenter_folder, found.folder, settings=PLAIN)
    assert not file.exists()  # it would be of other images


def test_a_missing_library_is_said_before_the_work(photos, segmenter_folder, tmp_path, passes, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DataError, match="COCO needs pycocotools"):
        predict(photos, segmenter_folder, tmp_path / "out", coco=True)
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ValueError, match="crf"):
        predict(photos, segmenter_folder, tmp_path / "out", settings=EvaluationSettings(refine=["crf"]))
    assert not passes and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["segmenter_folder", "cam_folder"])
def test_refinement_follows_the_image(photos, kind, tmp_path, request):
    model = request.getfixturevalue(kind)
    settings = EvaluationSettings(flip=False, refine=["pamr"])
    plain = predict(photos, model, tmp_path / "plain", settings=PLAIN)
    refined = predict(photos, model, tmp_path / "refined", settings=settings)
    assert any((labels_of(refined, one.name) != one.labels).any() for one in plain)


def names_of(images, out="out"):
    return {one.name: one.mask.relative_to(Path(out) / "masks").as_posix() for one in find_images(images, out)}


def touch(*paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("p/a/1.jpg", "p/a/2.JPEG", "p/b/1.png", "p/b/notes.txt", "p/.cache/3.jpg", "p/b/.4.jpg", "q/5.webp")
    assert names_of("p") == {"a/1.jpg": "a/1.png", "a/2.JPEG": "a/2.png", "b/1.png": "b/1.png"}
    assert names_of("p/a/1.jpg") == {"1.jpg": "1.png"}
    assert names_of(["p/a/1.jpg", Path("p/b/1.png"), "./p/a/1.jpg"]) == {"a/1.jpg": "a/1.png", "b/1.png": "b/1.png"}
    assert names_of("p/*/1.*") == {"a/1.jpg": "a/1.png", "b/1.png": "b/1.png"}
    assert set(names_of("p/b/*")) == {"1.png"}
    assert set(names_of("**/*.jpg")) == {"1.jpg"}
    assert set(names_of(["p/a", "q/*.webp"])) == {"p/a/1.jpg", "p/a/2.JPEG", "q/5.webp"}
    assert set(names_of("?")) == {"p/a/1.jpg", "p/a/2.JPEG", "p/b/1.png", "q/5.webp"}
    assert set(names_of("p/b/notes.txt")) == {"notes.txt"}  # whoever names a file means it


def test_files_of_a_folder_that_are_not_read_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    touch("p/a/1.jpg", "p/2.jfif", "p/a/3.HEIC", "p/b/4.heic", "p/notes.txt", "p/.5.heic", "p/out/6.heic")
    assert set(names_of("p", "p/out")) == {"a/1.jpg", "2.jfif"}
    assert capsys.readouterr().err == "p: not read: 2 files .heic (a/, b/)\n"
    with pytest.raises(DataError, match=r"got p/b, where none is \(not read: 1 file .heic\)"):
        names_of("p/b")


def test_files_that_differ_in_their_suffix_alone_keep_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("p/1.jpg", "p/1.png", "p/2.jpg")
    assert names_of("p") == {"1.jpg": "1.jpg.png", "1.png": "1.png.png", "2.jpg": "2.png"}
    touch("p/1.jpg.png")
    with pytest.raises(DataError, match="expected names of their own, got .*1.jpg.* and .*1.jpg"):
        names_of("p")


def test_what_it_wrote_is_no_image_to_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("p/1.jpg", "p/out/masks/1.png", "p/out/overlays/1.jpg", "p/outside/2.jpg")
    assert set(names_of(".", "p/out")) == {"p/1.jpg", "p/outside/2.jpg"}
    assert set(names_of("p/**/*.jpg", "p/out")) == {"1.jpg", "outside/2.jpg"}


@pytest.mark.parametrize("named", ["nowhere", "no/*.jpg", "empty", [], ["p/1.jpg", "typo.jpg"]])
def test_no_image_where_one_is_named(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    touch("p/1.jpg")
    Path("empty").mkdir()
    with pytest.raises(DataError, match="images: expected"):
        names_of(named)


def test_what_does_not_fit_is_refused_before_the_work(photos, segmenter_folder, cam_folder, tmp_path, passes):
    other = tmp_path / "other"
    touch(other / "thesis.txt")
    with pytest.raises(OutputError, match="expected a new folder or one of predict"):
        predict(photos, segmenter_folder, other)
    with pytest.raises(OptionError, match="tags: expected names from .*, got 'unicorn'"):
        predict(photos, segmenter_folder, tmp_path / "out", tags=["unicorn"])
    with pytest.raises(OptionError, match="window: expected 0 with a CAM classifier, got 32"):
        predict(photos, cam_folder, tmp_path / "out", settings=EvaluationSettings(window=32))
    assert not passes and not (tmp_path / "out").exists() and list(other.iterdir()) == [other / "thesis.txt"]


def test_large_images_come_in_smaller_batches(photos, segmenter_folder, tmp_path, monkeypatch):
    sizes = []

    def noted(model, processor, rows, settings, *options, **kwargs):
        sizes.append(settings.batch_size)
        return scored(model, processor, rows, settings, *options, **kwargs)

    scored = module.score_images
    monkeypatch.setattr(module, "score_images", noted)
    names = predict(photos, segmenter_folder, tmp_path / "few", settings=PLAIN).names
    monkeypatch.setattr(module, "_MAX_SCORES", 2 * 60 * 48 * len(names))
    predict(photos, segmenter_folder, tmp_path / "many", settings=PLAIN)
    assert sizes[0] == 16 and sizes[-1] == 2
    assert (tmp_path / "few/masks/a/0.png").read_bytes() == (tmp_path / "many/masks/a/0.png").read_bytes()


@pytest.mark.slow
def test_two_processes_share_the_images(photos, segmenter_folder, tmp_path, in_processes, monkeypatch, capfd):
    (photos / "a" / "1.jpg").write_bytes(b"no image")
    script = Path(__file__).parents[2] / "scripts/predict.py"
    options = [photos, "--model", segmenter_folder, "--out", tmp_path / "two", "--no-flip", "--coco"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in (script, *options)])
    first, second = in_processes(lambda: runpy.run_path(script, run_name="__main__"))
    out, err = capfd.readouterr()
    assert (first.code, second.code) == (1, 1) and err.count("1.jpg: expected an image") == 1
    assert "label maps of 6 of 7 images" in out
    one = predict(photos, segmenter_folder, tmp_path / "one", settings=PLAIN, coco=True).folder
    assert by_name(one) == by_name(tmp_path / "two")
