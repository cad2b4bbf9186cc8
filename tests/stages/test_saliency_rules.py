"""Label rules with saliency through the stages: what is refused before training, and what is made of it."""

import json

import numpy as np
import pytest
from datasets import DatasetDict
from PIL import Image

from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import DataError, TaggedData, encode_png
from wsss_hf.stages.compare import compare
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.run import report_examples, run
from wsss_hf.stages.train_cam import train_cam

TOLD = {"source": "owner/net", "learnt_from": "class-agnostic masks"}


def with_maps(rows, filled):
    """Maps from the true masks, blurred in their values: objects from 150, background to 60."""
    maps = []
    for index, mask in enumerate(rows["mask"]):
        noise = np.random.default_rng(index).integers(0, 60, np.shape(mask))
        values = np.where(np.asarray(mask) > 0, 200 - noise, noise).astype(np.uint8)
        maps.append(encode_png(Image.fromarray(values)) if index < filled else None)
    return rows.add_column("saliency", maps, feature=rows.features["mask"])


@pytest.fixture(scope="module")
def salient(toy_data):
    """Every training image has a map, and no other one."""
    splits = {"train": with_maps(toy_data["train"], 12), "val": with_maps(toy_data["val"], 0)}
    return TaggedData(splits, {"source": "given", "saliency": TOLD})


def salient_recipe(recipe, seeds="drs", *changes):
    return recipe.changed(f"masks.seeds={seeds}", *changes)


@pytest.mark.parametrize("seeds", ["drs", "saliency"])
def test_a_rule_without_its_column_is_refused_before_any_training(
    toy_data, salient, tiny_recipe, tmp_path, no_training, cam_folder, seeds
):
    recipe = salient_recipe(tiny_recipe, seeds)
    some = DatasetDict(train=with_maps(toy_data["train"], 4))
    none = DatasetDict(train=with_maps(toy_data["train"], 0))
    for data, message in (
        (toy_data, f"expected a column 'saliency' for masks.seeds: {seeds}, got image_id"),
        (none, f"expected a column 'saliency' for masks.seeds: {seeds}, got an empty one"),
        (some, f"for masks.seeds: {seeds}, got none for 8 of 12 images: train_00004, .*train_00008, …"),
    ):
        for work in (
            lambda data=data: run(data, recipe, tmp_path / "run"),
            lambda data=data: train_cam(data, recipe, tmp_path / "cam"),
            lambda data=data: make_masks(data, cam_folder, recipe, tmp_path / "masks"),
        ):
            with pytest.raises(DataError, match=message):
                work()
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="for cam.saliency, got none for 8 of 12"):
        train_cam(some, tiny_recipe.changed("cam.saliency=true"), tmp_path / "cam")


@pytest.fixture(scope="module")
def finished(salient, tiny_settings, tmp_path_factory):
    from wsss_hf.recipes import load_recipe

    recipe = load_recipe("default", [*tiny_settings, "masks.seeds=saliency"])
    return run(salient, recipe, tmp_path_factory.mktemp("run") / "out"), recipe


@pytest.mark.slow
def test_a_val_split_without_maps_ends_in_a_report(salient, finished):
    result, recipe = finished
    assert result.results[0]["mean_iou"] > 0.2  # the background is that of the maps
    examples = report_examples(result, salient, recipe, result.masks.summary)
    assert len(examples) == 3 and all(example.pseudo_mask is None for example in examples)
    assert all(example.prediction.shape == example.truth.shape for example in examples)
    page = (result.folder / "report.html").read_text()
    assert "owner/net" in page and "saliency threshold" in page
    on_train = report_examples(result, DatasetDict(train=salient["train"]), recipe, result.masks.summary)
    assert all(example.pseudo_mask.any() and example.map for example in on_train)
    partly = DatasetDict(train=salient["train"], val=with_maps(salient["val"].remove_columns("saliency"), 2))
    found = report_examples(result, partly, recipe, result.masks.summary)
    assert [example.pseudo_mask is not None for example in found] == [True, False, False]  # rows 0, 2 and 3


def test_the_results_say_which_thresholds_and_maps_were_used(finished):
    result, _ = finished
    summary = result.masks.summary
    assert 60 / 255 < summary["saliency_threshold"] < 140 / 255
    assert "background_threshold" not in summary  # which the rule does not read
    assert summary["saliency"] == "saliency maps of owner/net; what they learnt from: class-agnostic masks"
    record = json.loads((result.folder / "results.json").read_text())
    assert record["saliency"] == summary["saliency"] and record["data"]["saliency"] == TOLD
    assert record["saliency_threshold"] == summary["saliency_threshold"] and "background_threshold" not in record
    assert "background threshold" not in (result.folder / "report.html").read_text().lower()
    assert result.masks.data.source["saliency"] == TOLD
    assert load_data(result.masks.folder).source["saliency"] == TOLD


def test_a_threshold_that_plays_no_part_is_neither_searched_nor_told(
    salient, tiny_recipe, cam_folder, tmp_path, capsys
):
    recipe = salient_recipe(tiny_recipe, "saliency", "masks.background_threshold=auto")
    masks = make_masks(salient, cam_folder, recipe, tmp_path / "masks")
    told = capsys.readouterr().err
    assert "background threshold" not in told and "masks: saliency threshold 0." in told
    assert "background_threshold" not in masks.summary
    recipe = salient_recipe(tiny_recipe, "auto", "masks.background_threshold=auto")
    for data, name in ((salient, "saliency"), (DatasetDict(train=salient["val"]), "background")):
        masks = make_masks(data, cam_folder, recipe, tmp_path / name)
        assert [key for key in masks.summary if key.endswith("_threshold")] == [f"{name}_threshold"]
        assert f"masks: {name} threshold 0." in capsys.readouterr().err


@pytest.mark.slow
def test_masks_are_made_again_when_a_map_or_the_threshold_changes(salient, tiny_recipe, cam_folder, tmp_path, capsys):
    recipe = salient_recipe(tiny_recipe)
    first = make_masks(salient, cam_folder, recipe, tmp_path / "masks")
    capsys.readouterr()
    make_masks(salient, cam_folder, recipe, tmp_path / "masks")
    assert "done before" in capsys.readouterr().err
    before = [np.asarray(mask) for mask in first.data["train"]["pseudo_mask"]]
    given = salient_recipe(tiny_recipe, "drs", "masks.seed_options.saliency_threshold=0.9")
    second = make_masks(salient, cam_folder, given, tmp_path / "masks")
    assert second.summary["saliency_threshold"] == 0.9 and second.summary["fallbacks"]["empty saliency map"] == 12
    assert all(set(np.unique(mask)) <= {0, 255} for mask in second.data["train"]["pseudo_mask"])
    maps = [*salient["train"]["saliency"][1:], salient["train"]["saliency"][0]]
    others = (
        salient["train"]
        .remove_columns("saliency")
        .add_column("saliency", [encode_png(image) for image in maps], feature=salient["train"].features["mask"])
    )
    third = make_masks(DatasetDict(train=others), cam_folder, recipe, tmp_path / "masks")
    assert any(not np.array_equal(a, b) for a, b in zip(before, third.data["train"]["pseudo_mask"], strict=True))
    plain = tiny_recipe.changed("masks.background_threshold=0.3")
    make_masks(salient, cam_folder, plain, tmp_path / "plain")
    capsys.readouterr()
    make_masks(DatasetDict(train=others), cam_folder, plain, tmp_path / "plain")
    assert "done before" in capsys.readouterr().err  # argmax reads no map


@pytest.mark.slow
def test_a_comparison_of_rules_needs_no_maps_of_its_example_images(salient, tiny_settings, tmp_path):
    salient.save_to_disk(tmp_path / "data")
    plan = {
        "recipe": "default",
        "set": tiny_settings,
        "rows": {"argmax": None, "saliency": {"masks.seeds": "saliency"}},
        "data": {"toys": {"source": str(tmp_path / "data")}},
    }
    result = compare(plan, tmp_path / "out")
    assert (tmp_path / "out" / "comparison.html").is_file()
    examples = {row: list(tmp_path.glob(f"out/cells/toys/{row}/*/examples/*.png")) for row in plan["rows"]}
    assert len(examples["argmax"]) == 3 and not examples["saliency"]
    figures = {row["row"]: cell["maps"] for row, cell in zip(result.rows, result.cells, strict=True)}
    assert "saliency_threshold" in figures["saliency"] and "saliency_threshold" not in figures["argmax"]
    assert figures["saliency"]["mean_iou"] > figures["argmax"]["mean_iou"]
