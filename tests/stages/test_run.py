import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from datasets import DatasetDict, load_from_disk
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from wsss_hf.data.tagged import TaggedData, class_names
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.recipes import load_recipe
from wsss_hf.settings import RecipeError
from wsss_hf.stages.add_saliency import add_saliency
from wsss_hf.stages.cache import OutputError
from wsss_hf.stages.evaluate import evaluate, evaluate_masks, evaluate_segmenter
from wsss_hf.stages.lock import LOCK_FILE, only_run
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.run import check_run_folder, report_examples, run
from wsss_hf.stages.train_segmenter import train_segmenter


@pytest.fixture(scope="module")
def finished(toy_data, tiny_settings, tmp_path_factory):
    """A run of `tiny_recipe`, for tests that leave it as it is."""
    data = TaggedData(toy_data, source={"source": "toy"})
    return run(data, load_recipe("default", tiny_settings), tmp_path_factory.mktemp("finished") / "run")


def stamps(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_all_stages_leave_models_masks_figures_and_a_report(toy_data, tiny_recipe, finished):
    out, rows = finished.folder, finished.results
    assert finished.affinity is None and finished.refiner is None
    files = {"cam", "masks", "segmenter", "results.json", "report.html", "gallery.png"}
    assert {path.name for path in out.iterdir()} == files
    results = json.loads((out / "results.json").read_text())
    assert results["results"] == json.loads(json.dumps(rows))
    assert results["recipe"] == tiny_recipe.to_dict() and results["data"] == {"source": "toy"}
    assert CamClassifier.from_pretrained(out / "cam").config.num_labels == 8
    assert type(AutoModelForSemanticSegmentation.from_pretrained(out / "segmenter")) is Segmenter
    page = (out / "report.html").read_text()
    shown = [image_id for image_id in toy_data["val"]["image_id"] if image_id in page]
    assert len(shown) == tiny_recipe.evaluation.examples
    assert "<dt>background threshold</dt><dd>0.40</dd>" in page  # not in percent, as figures are
    with Image.open(out / "gallery.png") as gallery:
        assert min(gallery.size) > 100


def test_the_rows_are_what_the_saved_masks_and_models_score(toy_data, tiny_recipe, finished):
    out, (masks, segmenter) = finished.folder, finished.results
    labelled = load_from_disk(str(out / "masks"))
    assert (masks["split"], masks["num_images"]) == ("train", 12)
    assert masks["mean_iou"] == evaluate_masks(labelled["train"])["mean_iou"]
    model = Segmenter.from_pretrained(out / "segmenter").eval()
    processor = WsssImageProcessor.from_pretrained(out / "segmenter")
    again = evaluate_segmenter(model, processor, toy_data["val"], tiny_recipe.evaluation)
    assert (segmenter["split"], segmenter["num_images"]) == ("val", 4)
    assert segmenter["mean_iou"] == pytest.approx(again["mean_iou"])


def test_a_second_call_makes_nothing_again_and_shows_the_table(toy_data, tiny_recipe, finished, capsys):
    out, rows = finished.folder, finished.results
    stages = [out / name for name in ("cam", "masks", "segmenter")]
    before = stamps(*stages)
    assert run(toy_data, tiny_recipe, out).results == rows
    assert before and stamps(*stages) == before
    printed = capsys.readouterr().out
    assert f"{100 * rows[1]['mean_iou']:.1f}" in printed and "report.html" in printed


@pytest.mark.slow
def test_minutes_are_those_of_the_stages_however_often(toy_data, tiny_recipe, finished, no_training, tmp_path):
    out = shutil.copytree(finished.folder, tmp_path / "run")
    for minutes, name in ((1.5, "cam"), (2.25, "masks"), (4.0, "segmenter"), (100.0, "segmenter-2")):
        if name == "segmenter-2":  # of a recipe with more rounds
            shutil.copytree(out / "segmenter", out / name)
        record = yaml.safe_load((out / name / "recipe.yaml").read_text()) | {"minutes": minutes}
        (out / name / "recipe.yaml").write_text(yaml.safe_dump(record))
    for _ in range(2):
        run(toy_data, tiny_recipe, out)
        results = json.loads((out / "results.json").read_text())
        assert results["minutes"] == 7.75 and results["environment"]["threads"] == torch.get_num_threads()


def test_two_runs_at_once_are_noticed_and_a_lock_left_behind_is_not(toy_data, tiny_recipe, finished, tmp_path):
    with only_run(tmp_path / "run"):
        with pytest.raises(OutputError, match=f"run: expected no other run in it, got process {os.getpid()} on"):
            run(toy_data, tiny_recipe, tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).write_text("")  # of a run that was killed at once
    assert check_run_folder(tmp_path / "run") == tmp_path / "run"
    out = shutil.copytree(finished.folder, tmp_path / "again")
    (out / LOCK_FILE).write_text("")
    run(toy_data, tiny_recipe, out)
    assert not (out / LOCK_FILE).exists()


def test_a_foreign_folder_is_refused(toy_data, tiny_recipe, tmp_path):
    (tmp_path / "holiday.jpg").write_text("precious")
    with pytest.raises(OutputError, match="--out .*: expected a new folder or a run, got something else"):
        run(toy_data, tiny_recipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.slow
def test_data_without_masks_give_models_and_a_report_without_figures(unmasked_data, tiny_recipe, tmp_path, capsys):
    rows = run(unmasked_data, tiny_recipe, tmp_path / "run").results
    assert [row.get("mean_iou") for row in rows] == [None, None]
    assert Segmenter.from_pretrained(tmp_path / "run" / "segmenter").config.num_labels == 9
    page = (tmp_path / "run" / "report.html").read_text()
    assert sum(image_id in page for image_id in unmasked_data["train"]["image_id"]) == 3
    said = capsys.readouterr()
    assert "no true masks, so nothing was measured" in said.err and "no true masks" in page
    assert "Results" not in said.out and "–" not in said.out


def test_examples_are_spread_over_the_held_out_images(toy_data, tiny_recipe, finished):
    tiny_recipe.evaluation.examples = 2
    first, last = report_examples(finished, toy_data, tiny_recipe, {"background_threshold": 0.4})
    ids, names = toy_data["val"]["image_id"], class_names(toy_data)
    assert (first.image_id, last.image_id) == (ids[0], ids[-1])
    assert first.tags == list(first.map) == [names[c] for c in toy_data["val"][0]["tags"]]
    assert first.pseudo_mask.shape == first.prediction.shape == first.truth.shape == (48, 48)
    few = DatasetDict(train=toy_data["train"], val=toy_data["val"].select([1]))
    assert [
        example.image_id for example in report_examples(finished, few, tiny_recipe, {"background_threshold": 0.4})
    ] == [ids[1]]


@pytest.mark.slow
def test_stages_may_differ_in_precision(toy_data, tiny_recipe, tmp_path):
    tiny_recipe.segmenter.train.mixed_precision = "bf16"
    rows = run(toy_data, tiny_recipe, tmp_path / "run").results
    assert 0 <= rows[1]["mean_iou"] <= 1
    model = Segmenter.from_pretrained(tmp_path / "run" / "segmenter")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_further_rounds_go_on_from_a_finished_run(toy_data, tiny_recipe, tmp_path):
    out = tmp_path / "run"
    first = run(toy_data, tiny_recipe, out).results
    before = stamps(out / "cam", out / "masks", out / "segmenter")
    vars(tiny_recipe.self_training).update({"rounds": 2, "scales": [1.0], "threshold": 0.1})
    rows = run(toy_data, tiny_recipe, out).results
    assert stamps(out / "cam", out / "masks", out / "segmenter") == before
    assert rows[:2] == first
    assert [row["result"] for row in rows[2:]] == ["pseudo masks, round 2", "segmenter, round 2"]
    assert json.loads((out / "results.json").read_text())["results"] == json.loads(json.dumps(rows))
    assert "segmenter, round 2" in (out / "report.html").read_text()
    labelled = load_from_disk(str(out / "masks-2"))
    for mask, tags in zip(labelled["train"]["pseudo_mask"], labelled["train"]["tags"], strict=True):
        assert set(np.unique(mask)) <= {0, 255, *(tag + 1 for tag in tags)}
    # A round starts as the first one did; only its labels are others.
    again = train_segmenter(labelled, tiny_recipe, tmp_path / "again", cam=out / "cam")
    found, wanted = (load_file(folder / "model.safetensors") for folder in (again, out / "segmenter-2"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    done = stamps(out / "masks-2", out / "segmenter-2")
    assert run(toy_data, tiny_recipe, out).results == rows
    assert stamps(out / "masks-2", out / "segmenter-2") == done
    tiny_recipe.self_training.threshold = 0.2
    run(toy_data, tiny_recipe, out)
    assert stamps(out / "cam", out / "masks", out / "segmenter") == before
    assert not stamps(out / "masks-2").items() & done.items()


def test_names_in_the_place_of_data_and_recipe_are_one_line(toy_data, tiny_recipe, tmp_path):
    for call, expected in (
        (
            lambda: run("photos", tiny_recipe, tmp_path),
            "data: expected splits 'train' of a data set, see load_data, got 'photos'",
        ),
        (lambda: run(toy_data["train"], tiny_recipe, tmp_path), "data: expected splits 'train' .*, got a Dataset"),
        (lambda: run(toy_data, "photos", tmp_path), "recipe: expected a Recipe, see Recipe.load, got 'photos'"),
        (
            lambda: make_masks(toy_data, tiny_recipe, tmp_path, tmp_path / "masks"),
            "recipe: expected a Recipe, see Recipe.load, got PosixPath",
        ),
        (lambda: evaluate("photos"), "data: expected splits of a data set, see load_data, got 'photos'"),
        (lambda: add_saliency(str(tmp_path), tmp_path / "saliency", spectral="x"), "data: expected splits 'train'"),
    ):
        with pytest.raises(RecipeError, match=expected):
            call()
