import json

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from wsss_hf.data.tagged import class_names
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.recipes import load_recipe
from wsss_hf.stages.cache import OutputError
from wsss_hf.stages.evaluate import evaluate_masks, evaluate_segmenter
from wsss_hf.stages.run import report_examples, run
from wsss_hf.stages.train_segmenter import train_segmenter


@pytest.fixture(scope="module")
def finished(toy_data, tiny_settings, tmp_path_factory):
    """Folder and rows of a run of `tiny_recipe`, for tests that leave it as it is."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(toy_data, load_recipe("default", tiny_settings), out, {"source": "toy"}, quiet=True)


def stamps(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_all_stages_leave_models_masks_figures_and_a_report(toy_data, tiny_recipe, finished):
    out, rows = finished
    files = {"cam", "masks", "segmenter", "results.json", "report.html", "gallery.png"}
    assert {path.name for path in out.iterdir()} == files
    results = json.loads((out / "results.json").read_text())
    assert results["results"] == json.loads(json.dumps(rows))
    assert results["recipe"] == tiny_recipe and results["data"] == {"source": "toy"}
    assert CamClassifier.from_pretrained(out / "cam").config.num_labels == 8
    assert type(AutoModelForSemanticSegmentation.from_pretrained(out / "segmenter")) is Segmenter
    page = (out / "report.html").read_text()
    shown = [image_id for image_id in toy_data["val"]["image_id"] if image_id in page]
    assert len(shown) == tiny_recipe["evaluation"]["examples"]
    assert "<dt>background threshold</dt><dd>0.40</dd>" in page  # not in percent, as figures are
    with Image.open(out / "gallery.png") as gallery:
        assert min(gallery.size) > 100


def test_the_rows_are_what_the_saved_masks_and_models_score(toy_data, tiny_recipe, finished):
    out, (masks, segmenter) = finished
    labelled = load_from_disk(str(out / "masks"))
    assert (masks["split"], masks["num_images"]) == ("train", 12)
    assert masks["mean_iou"] == evaluate_masks(labelled["train"], quiet=True)["mean_iou"]
    model = Segmenter.from_pretrained(out / "segmenter").eval()
    processor = WsssImageProcessor.from_pretrained(out / "segmenter")
    again = evaluate_segmenter(model, processor, toy_data["val"], tiny_recipe["evaluation"], quiet=True)
    assert (segmenter["split"], segmenter["num_images"]) == ("val", 4)
    assert segmenter["mean_iou"] == pytest.approx(again["mean_iou"])


def test_a_second_call_makes_nothing_again_and_shows_the_table(toy_data, tiny_recipe, finished, capsys):
    out, rows = finished
    stages = [out / name for name in ("cam", "masks", "segmenter")]
    before = stamps(*stages)
    assert run(toy_data, tiny_recipe, out, {"source": "toy"}) == rows
    assert before and stamps(*stages) == before
    printed = capsys.readouterr().out
    assert f"{100 * rows[1]['mean_iou']:.1f}" in printed and "report.html" in printed


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("cam", {"tag_threshold": 0.6}, "cam.tag_threshold is 0.5 there and 0.6 here"),
        ("masks", {"fusion": "max"}, "masks.fusion is 'mean' there and 'max' here"),
        ("segmenter", {"rates": [1]}, r"segmenter.rates is \[1, 3, 6, 9\] there and \[1\] here"),
    ],
)
def test_another_recipe_wants_another_folder(toy_data, tiny_recipe, finished, section, change, message):
    tiny_recipe[section] |= change
    before = stamps(finished[0])
    with pytest.raises(OutputError, match=message):
        run(toy_data, tiny_recipe, finished[0], {"source": "toy"}, quiet=True)
    assert stamps(finished[0]) == before


def test_data_without_masks_give_models_and_a_report_without_figures(unmasked_data, tiny_recipe, tmp_path):
    rows = run(unmasked_data, tiny_recipe, tmp_path / "run", quiet=True)
    assert [row.get("mean_iou") for row in rows] == [None, None]
    assert Segmenter.from_pretrained(tmp_path / "run" / "segmenter").config.num_labels == 9
    page = (tmp_path / "run" / "report.html").read_text()
    assert sum(image_id in page for image_id in unmasked_data["train"]["image_id"]) == 3


def test_examples_are_spread_over_the_held_out_images(toy_data, tiny_recipe, finished):
    tiny_recipe["evaluation"]["examples"] = 2
    models = finished[0] / "cam", finished[0] / "segmenter"
    first, last = report_examples(toy_data, *models, tiny_recipe)
    ids, names = toy_data["val"]["image_id"], class_names(toy_data)
    assert (first.image_id, last.image_id) == (ids[0], ids[-1])
    assert first.tags == list(first.map) == [names[c] for c in toy_data["val"][0]["tags"]]
    assert first.pseudo_mask.shape == first.prediction.shape == first.truth.shape == (48, 48)
    few = DatasetDict(train=toy_data["train"], val=toy_data["val"].select([1]))
    assert [example.image_id for example in report_examples(few, *models, tiny_recipe)] == [ids[1]]


def test_stages_may_differ_in_precision(toy_data, tiny_recipe, tmp_path):
    tiny_recipe["segmenter"]["train"] = tiny_recipe["segmenter"]["train"] | {"mixed_precision": "bf16"}
    rows = run(toy_data, tiny_recipe, tmp_path / "run", quiet=True)
    assert 0 <= rows[1]["mean_iou"] <= 1
    model = Segmenter.from_pretrained(tmp_path / "run" / "segmenter")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_further_rounds_go_on_from_a_finished_run(toy_data, tiny_recipe, tmp_path):
    out = tmp_path / "run"
    first = run(toy_data, tiny_recipe, out, {"source": "toy"}, quiet=True)
    before = stamps(out / "cam", out / "masks", out / "segmenter")
    tiny_recipe["self_training"] |= {"rounds": 2, "scales": [1.0], "threshold": 0.1}
    rows = run(toy_data, tiny_recipe, out, {"source": "toy"}, quiet=True)
    assert stamps(out / "cam", out / "masks", out / "segmenter") == before
    assert rows[:2] == first
    assert [row["result"] for row in rows[2:]] == ["pseudo masks, round 2", "segmenter, round 2"]
    assert json.loads((out / "results.json").read_text())["results"] == json.loads(json.dumps(rows))
    assert "segmenter, round 2" in (out / "report.html").read_text()
    labelled = load_from_disk(str(out / "masks-2"))
    for mask, tags in zip(labelled["train"]["pseudo_mask"], labelled["train"]["tags"], strict=True):
        assert set(np.unique(mask)) <= {0, 255, *(tag + 1 for tag in tags)}
    # A round starts as the first one did; only its labels are others.
    again = train_segmenter(labelled, tiny_recipe, tmp_path / "again", cam=out / "cam", quiet=True)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (again, out / "segmenter-2"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    done = stamps(out / "masks-2", out / "segmenter-2")
    assert run(toy_data, tiny_recipe, out, {"source": "toy"}, quiet=True) == rows
    assert stamps(out / "masks-2", out / "segmenter-2") == done
    tiny_recipe["self_training"]["threshold"] = 0.2
    with pytest.raises(OutputError, match="self_training.threshold is 0.1 there and 0.2 here"):
        run(toy_data, tiny_recipe, out, {"source": "toy"}, quiet=True)
