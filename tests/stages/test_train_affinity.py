import json

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk

from wsss_hf import AffinityNetwork, CamClassifier, Recipe, WsssImageProcessor
from wsss_hf.data.tagged import DataError, decode_gray
from wsss_hf.inference.load import load_labeler
from wsss_hf.pseudo_labels.affinity_labels import certain_labels
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.refinement import steps as steps_module
from wsss_hf.refinement.crf import refine_labels
from wsss_hf.refinement.steps import RefinementError, build_refinement
from wsss_hf.stages import train_affinity as module
from wsss_hf.stages.evaluate import evaluate
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.run import run
from wsss_hf.stages.train_affinity import train_affinity


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe.changed(
        "affinity.refine=[]",
        "affinity.from_cam=true",
        "affinity.radius=4",
        "affinity.train.epochs=2",
        "affinity.train.batch_size=4",
        "masks.refine=[{walk: {steps: 8, radius: 3}}]",
    )


@pytest.fixture(scope="module")
def affinity_folder(toy_data, cam_folder, tmp_path_factory):
    recipe = Recipe.load("toy", ["affinity.refine=[]", "affinity.radius=4", "affinity.train.epochs=2"])
    recipe = recipe.changed(
        "affinity.from_cam=true", "affinity.train.batch_size=4", "image.size=48", "masks.scales=[1.0]"
    )
    return train_affinity(toy_data, cam_folder, recipe, tmp_path_factory.mktemp("affinity") / "out").folder


@pytest.mark.slow
def test_it_learns_on_the_frozen_backbone_of_the_classifier(toy_data, cam_folder, recipe, tmp_path):
    recipe = recipe.changed("affinity.train.epochs=25", "affinity.train.scale=[1.0, 1.0]")
    out = train_affinity(toy_data, cam_folder, recipe, tmp_path / "affinity")
    losses = [sum(value for name, value in record.items() if name.endswith("pairs")) for record in out.log]
    assert losses[-1] < 0.95 * losses[0]
    teacher, network = CamClassifier.from_pretrained(cam_folder), AffinityNetwork.from_pretrained(out)
    for name, value in teacher.backbone.state_dict().items():
        assert torch.equal(network.backbone.state_dict()[name], value), name
    assert WsssImageProcessor.from_pretrained(out).size["shortest_edge"] == recipe.image.size
    assert out.record["stage"] == "train-affinity"


def test_it_may_start_from_the_published_backbone_of_the_classifier(toy_data, cam_folder, recipe, tmp_path):
    fresh = CamClassifier(CamClassifier.from_pretrained(cam_folder).config)
    fresh.backbone.body.save_pretrained(tmp_path / "backbone")
    backbone = f"cam.backbone={tmp_path / 'backbone'}"
    recipe = recipe.changed("affinity.from_cam=false", backbone, "affinity.output_stride=null")
    out = train_affinity(toy_data, cam_folder, recipe, tmp_path / "affinity")
    network = AffinityNetwork.from_pretrained(out)
    for name, value in fresh.backbone.body.state_dict().items():
        assert torch.equal(network.backbone.body.state_dict()[name], value), name


@pytest.mark.slow
def test_it_learns_from_certain_labels_and_from_no_mask(toy_data, cam_folder, recipe, tmp_path, monkeypatch):
    seen = []

    def watched(accelerator, model, processor, rows, *arguments, **options):
        seen.append((rows, options["mask_column"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_model", watched)
    with pytest.raises(KeyboardInterrupt):
        train_affinity(toy_data, cam_folder, recipe, tmp_path / "affinity")
    rows, column = seen[0]
    assert column == "certain_labels"
    settings = {"background_threshold": 0.6, "refine": []}
    masks = recipe.changed(*(f"masks.{name}={value}" for name, value in settings.items())).masks
    model, processor = load_labeler(str(cam_folder), "cpu")
    high = {found.index: found for found in label_images(model, processor, toy_data["train"], masks)}
    masks.background_threshold = 0.3
    for low in label_images(model, processor, toy_data["train"], masks):
        objects, background = high[low.index].pseudo_mask, low.pseudo_mask == 0
        expected = np.where(objects > 0, objects, np.where(background, 0, 255))
        stored = decode_gray({"bytes": _bytes(rows, low.index)}, "labels")
        np.testing.assert_array_equal(stored, expected)


def _bytes(rows, index):
    from wsss_hf.data.tagged import undecoded

    return undecoded(rows)[index]["certain_labels"]["bytes"]


@pytest.mark.parametrize("native", ["false", "true"])
def test_affinitynets_labels_are_background_where_both_claim_a_pixel(toy_data, cam_folder, recipe, native):
    recipe = recipe.changed("affinity.alphas=[4, 24]", "affinity.kind=affinitynet", f"masks.native={native}")
    model, processor = load_labeler(str(cam_folder), "cpu")
    rows, refine = toy_data["train"].select([0, 1, 2]), build_refinement([])
    rows = rows.map(lambda row: {"image": row["image"].resize((72, 64))}, load_from_cache_file=False)
    labels = dict(certain_labels(model, processor, rows, recipe.masks, recipe.affinity, refine))
    for found in label_images(model, processor, rows, recipe.changed("masks.refine=[]").masks):
        largest, best = found.maps.max(axis=0), found.classes[found.maps.argmax(axis=0)] + 1
        is_object, is_background = largest > (1 - largest) ** 4, largest <= (1 - largest) ** 24
        expected = np.where(is_background, 0, np.where(is_object, best, 255))
        # Where both scores are within rounding of each other either label is right.
        np.testing.assert_array_equal(labels[found.index], expected)


def test_irns_labels_are_what_the_crf_makes_of_both_thresholds(toy_data, cam_folder, recipe):
    pytest.importorskip("pydensecrf")
    thresholds = {"foreground_threshold": 0.5, "background_threshold": 0.3}
    recipe = recipe.changed(*(f"affinity.{name}={value}" for name, value in thresholds.items()))
    model, processor = load_labeler(str(cam_folder), "cpu")
    rows, refine = toy_data["train"].select([0, 1, 2]), build_refinement([])
    rows = rows.map(lambda row, i: {"tags": row["tags"] if i else []}, with_indices=True, load_from_cache_file=False)
    plain = dict(certain_labels(model, processor, rows, recipe.masks, recipe.affinity, refine))
    recipe = recipe.changed("affinity.label_confidence=0.7")
    labels = dict(certain_labels(model, processor, rows, recipe.masks, recipe.affinity, refine))
    for found in label_images(model, processor, rows, recipe.changed("masks.refine=[]").masks):
        expected = np.zeros_like(labels[found.index])
        if len(found.classes):
            best, largest = found.classes[found.maps.argmax(axis=0)] + 1, found.maps.max(axis=0)
            objects, others = (
                refine_labels(
                    np.where(largest > threshold, best, 0).astype(np.uint8),
                    np.asarray(found.image),
                    len(found.classes) + 1,
                    0.7,
                )
                for threshold in thresholds.values()
            )
            expected = np.where(objects > 0, objects, np.where(others == 0, 0, 255))
        np.testing.assert_array_equal(labels[found.index], expected)
    assert any((labels[index] != plain[index]).any() for index in plain)


@pytest.mark.parametrize("alphas", ["null", "[4, 24]"])
def test_pamr_refines_the_maps_once_for_both_backgrounds(toy_data, cam_folder, recipe, alphas, monkeypatch):
    recipe = recipe.changed(f"affinity.alphas={alphas}")
    model, processor = load_labeler(str(cam_folder), "cpu")
    rows, refine = toy_data["train"].select(range(4)), build_refinement(["pamr"])
    rows = rows.map(lambda row, i: {"tags": row["tags"] if i else []}, with_indices=True, load_from_cache_file=False)
    calls = []
    refine_pictures = steps_module.refine_pictures
    monkeypatch.setattr(steps_module, "refine_pictures", lambda *given: calls.append(1) or refine_pictures(*given))

    def labels():
        return dict(certain_labels(model, processor, rows, recipe.masks, recipe.affinity, refine))

    once = labels()
    assert len(calls) == len(rows)
    monkeypatch.setattr(type(refine.steps[0]), "keeps_channels_apart", False)
    apart = labels()
    assert len(calls) == len(rows) + 2 * (len(rows) - 1)  # the image without tags has nothing to refine
    assert any((one == 255).any() for one in apart.values())
    for index, expected in apart.items():
        np.testing.assert_array_equal(once[index], expected)


def test_maps_that_are_certain_of_nothing_are_one_line(toy_data, cam_folder, recipe, tmp_path):
    untagged = DatasetDict({"train": toy_data["train"].map(lambda row: {"tags": []}, load_from_cache_file=False)})
    with pytest.raises(DataError, match="expected pixels that are certainly objects .* affinity.foreground_threshold"):
        train_affinity(untagged, cam_folder, recipe, tmp_path / "affinity")


@pytest.mark.slow
def test_masks_walk_by_the_network_that_is_given(toy_data, cam_folder, affinity_folder, recipe, tmp_path):
    plain = make_masks(toy_data, cam_folder, recipe.changed("masks.refine=[]"), tmp_path / "plain")
    walked = make_masks(toy_data, cam_folder, recipe, tmp_path / "walked", affinity=affinity_folder)
    named = recipe.changed(f"masks.refine=[{{walk: {{model: '{affinity_folder}', steps: 8, radius: 3}}}}]")
    by_name = make_masks(toy_data, cam_folder, named, tmp_path / "named")
    masks = [load_from_disk(str(found))["train"]["pseudo_mask"] for found in (plain, walked, by_name)]
    as_arrays = [[np.asarray(mask) for mask in column] for column in masks]
    assert any((a != b).any() for a, b in zip(as_arrays[0], as_arrays[1], strict=True))
    for a, b in zip(as_arrays[1], as_arrays[2], strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(RefinementError, match="walk.model: expected an affinity network"):
        make_masks(toy_data, cam_folder, recipe, tmp_path / "none")


def test_the_probabilities_of_a_segmenter_walk_by_the_network_that_is_given(
    toy_data, segmenter_folder, affinity_folder, recipe
):
    walks = recipe.changed("evaluation.refine=[walk]")
    plain, walked = (
        evaluate(toy_data, changed, segmenter=segmenter_folder, affinity=affinity_folder).results[0]["iou"]
        for changed in (recipe, walks)
    )
    assert walked != plain
    with pytest.raises(RefinementError, match="walk.model: expected an affinity network"):
        evaluate(toy_data, walks, segmenter=segmenter_folder)


def test_masks_are_made_again_when_the_network_has_changed(
    toy_data, cam_folder, affinity_folder, recipe, tmp_path, capsys
):
    make_masks(toy_data, cam_folder, recipe, tmp_path / "masks", affinity=affinity_folder)
    changed = AffinityNetwork.from_pretrained(affinity_folder)
    changed.image_processor = WsssImageProcessor.from_pretrained(affinity_folder)
    with torch.no_grad():
        changed.head.bias += 5
    changed.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    make_masks(toy_data, cam_folder, recipe, tmp_path / "masks", affinity=tmp_path / "other")
    assert "made again, because affinity changed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_trains_it_where_a_walk_names_no_network(toy_data, recipe, tmp_path):
    result = run(toy_data, recipe, tmp_path / "run")
    assert result.affinity is not None and (result.affinity / "model.safetensors").is_file()
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["recipe"]["masks"]["refine"] == [{"walk": {"steps": 8, "radius": 3}}]
    stages = (result.cam, result.affinity, result.masks, result.segmenter)
    assert written["minutes"] == pytest.approx(sum(stage.minutes for stage in stages)) and result.affinity.minutes > 0
    figures = evaluate(toy_data, recipe, cam=result.cam, affinity=result.affinity).results[0]
    assert figures["mean_iou"] == pytest.approx(result.results[0]["mean_iou"])


def test_another_kind_of_model_is_one_line(cam_folder):
    with pytest.raises(RefinementError, match=r"walk.model: .*expected an affinity network, got a wsss_cam"):
        build_refinement([{"walk": {"model": str(cam_folder)}}]).prepare()


def test_what_the_launcher_asks_for_is_done_and_recorded(toy_data, cam_folder, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    out = train_affinity(toy_data, cam_folder, recipe, tmp_path / "affinity")
    assert out.record["affinity"]["train"]["accumulate"] == 2
