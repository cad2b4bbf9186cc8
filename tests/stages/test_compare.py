import dataclasses
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import DataError, class_names
from wsss_hf.data.toy import make_toy
from wsss_hf.data.voc import VOC_CLASSES
from wsss_hf.inference.load import load_labeler
from wsss_hf.models.drs import DrsConfig
from wsss_hf.settings import MasksSettings, RecipeError, TrainSettings
from wsss_hf.stages import compare as module
from wsss_hf.stages import make_masks, train_cam
from wsss_hf.stages.cache import OutputError
from wsss_hf.stages.compare import CompareError, compare, training_cost
from wsss_hf.stages.evaluate import evaluate_cam, segmenter_row
from wsss_hf.stages.plan import plan_cells, read_plan
from wsss_hf.stages.train_segmenter import train_segmenter

COCO = {"source": "coco", "root": "x", "masks": "all"}


@pytest.fixture(scope="module")
def plan(tiny_settings):
    return {
        "recipe": "default",
        "set": tiny_settings,
        "rows": {"plain": None, "drs": {"cam.methods": {"drs": {}}, "masks": {"background_threshold": 0.3}}},
        "seeds": [0, 1],
        "data": {"toy": {"source": "toy"}},
    }


@pytest.fixture(scope="module")
def finished(plan, tmp_path_factory):
    """Folder and results of `plan`, for tests that leave them as they are."""
    out = tmp_path_factory.mktemp("compared") / "out"
    return compare(plan, out)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_row_with_every_seed_is_one_training_of_its_own(finished):
    out, results = finished.folder, finished
    cells = {tuple(cell["settings"][key] for key in ("data", "row", "seed")) for cell in results.cells}
    assert cells == {("toy", row, seed) for row in ("plain", "drs") for seed in (0, 1)}
    weights = {path.read_bytes() for path in out.glob("cells/toy/*/*/cam/model.safetensors")}
    assert len(weights) == 4
    saved = yaml.safe_load((out / "cells/toy/drs/seed1/cam/recipe.yaml").read_text())
    assert saved["seed"] == 1 and saved["cam"]["methods"] == {"drs": dataclasses.asdict(DrsConfig())}


def test_figures_are_those_of_the_saved_models_and_their_spread(finished):
    out, results = finished.folder, finished
    row = results.rows[1]
    assert (row["row"], row["seeds"], row["threshold"]) == ("drs", [0, 1], 0.3)
    cells = [cell for cell in results.cells if cell["settings"]["row"] == "drs"]
    settings = cells[0]["settings"]
    rows = load_data(**settings["source"])["train"]
    for seed, cell in enumerate(cells):
        labeler = load_labeler(str(out / f"cells/toy/drs/seed{seed}/cam"), "cpu")
        figures = evaluate_cam(*labeler, rows, MasksSettings(**settings["recipe"]["masks"]))
        assert cell["maps"]["mean_iou"] == pytest.approx(figures["mean_iou"])
    values = [cell["maps"]["mean_iou"] for cell in cells]
    assert row["maps"]["mean_iou"]["values"] == values
    assert row["maps"]["mean_iou"]["mean"] == pytest.approx(np.mean(values))
    assert row["maps"]["mean_iou"]["sd"] == pytest.approx(np.std(values, ddof=1))
    best = [max(value for _, value in cell["maps"]["threshold_curve"]) for cell in cells]
    assert row["maps"]["best_threshold_mean_iou"]["values"] == best
    assert all(row["cost"][key] > 0 for key in ("seconds_per_step", "minutes", "label_seconds_per_image"))


def test_tables_and_page_show_every_row(finished):
    out, results = finished.folder, finished
    assert json.loads((out / "results.json").read_text()) == json.loads(
        json.dumps({"rows": results.rows, "cells": results.cells})
    )
    text, page = (out / "comparison.md").read_text(), (out / "comparison.html").read_text()
    for row in results.rows:
        spread = row["maps"]["mean_iou"]
        assert f"{100 * spread['mean']:.1f} ± {100 * spread['sd']:.1f}" in text
        assert row["row"] in page
    assert page.count("<polyline") == 2 and page.count('role="img"') == 2
    assert page.count("data:image/jpeg") == 3 * 4  # examples: image, two rows, truth


def test_a_second_call_trains_nothing_and_a_longer_plan_only_what_is_new(plan, finished, tmp_path):
    out, results = finished.folder, finished
    before = stamps(out / "cells")
    assert json.dumps(compare(plan, out).cells) == json.dumps(results.cells)
    assert stamps(out / "cells") == before
    longer = plan | {"rows": {"plain": None}, "seeds": [0, 2]}
    grown = compare(longer, out)
    assert [row["seeds"] for row in grown.rows] == [[0, 2]]
    after = stamps(out / "cells")
    assert {path: after[path] for path in before} == before and len(after) > len(before)


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_rows_that_differ_in_their_masks_only_share_the_classifier(plan, finished, no_training, tmp_path, elsewhere):
    rows = {"pamr": {"masks.refine": ["pamr"]}, "drs pamr": {"cam.methods": {"drs": {}}, "masks.refine": ["pamr"]}}
    out, results = finished.folder, finished
    if elsewhere:
        pamr = compare(plan | {"rows": rows, "seeds": [1]}, tmp_path / "out", cams=[out])
    else:
        pamr = compare(plan | {"rows": rows}, out)
    plain = {(cell["settings"]["row"], cell["settings"]["seed"]): cell for cell in results.cells}
    for cell in pamr.cells:
        row, seed = cell["settings"]["row"], cell["settings"]["seed"]
        origin = plain["drs" if "drs" in row else "plain", seed]
        assert cell["maps"]["threshold_curve"] == origin["maps"]["threshold_curve"]
        for figure in ("mean_iou", "boundary_f"):  # of the masks after refinement
            assert cell["maps"][figure] != origin["maps"][figure]
        assert cell["cost"]["cam"] == origin["cost"]["cam"]


@pytest.mark.slow
def test_classifiers_of_another_seed_recipe_or_data_are_not_taken(plan, finished, no_training, tmp_path):
    others = [{"seeds": [7]}, {"set": [*plan["set"], "cam.train.lr=1"]}, {"set": [*plan["set"], "toy.num_train=8"]}]
    for number, other in enumerate(others):
        with pytest.raises(CompareError, match=f"{2 * len(other.get('seeds', [0, 1]))} of . cells failed"):
            compare(plan | other, tmp_path / str(number), cams=[finished.folder])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="--cams: expected a comparison or a run with a CAM classifier, got .*empty"):
        compare(plan, tmp_path / "new", cams=[tmp_path / "empty"])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_folder_of_the_data_may_be_named_in_two_ways(plan, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    for root, options in (("kit", {}), (str(tmp_path / "kit"), {"cams": ["kit"]})):
        rooted = plan | {"data": {"source": "toy", "root": root}, "rows": {"plain": {}}, "seeds": [0]}
        compare(rooted, "other" if options else "kit", **options)
        request.getfixturevalue("no_training")
    assert len({path.read_bytes() for path in tmp_path.rglob("model.safetensors")}) == 1


@pytest.fixture
def small(plan):
    """One row, one seed."""
    return plan | {"rows": {"plain": None}, "seeds": [0]}


@pytest.mark.slow
def test_cells_of_other_settings_data_or_code_are_done_again(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    compare(small, out)
    before = stamps(out / "cells")
    compare(small | {"set": [*small["set"], "masks.workers=1", "evaluation.batch_size=2"]}, out)
    assert stamps(out / "cells") == before  # which changes the speed alone
    other = compare(small | {"set": [*small["set"], "masks.background_threshold=0.7"]}, out)
    assert [row["threshold"] for row in other.rows] == [0.7]
    compare(small, out)
    for stage in (train_cam, make_masks):
        before = stamps(out / "cells")
        monkeypatch.setattr(stage, "VERSION", stage.VERSION + 1)
        compare(small, out)
        cell = out / "cells/toy/plain/seed0/cell.json"
        assert stamps(out / "cells")[cell] != before[cell]
        weights = cell.with_name("cam") / "model.safetensors"
        assert (stamps(out / "cells")[weights] != before[weights]) == (stage is train_cam)
    before = stamps(out / "cells")
    compare(small, out, force=True)
    assert not before.items() & stamps(out / "cells").items()


@pytest.mark.slow
def test_old_and_new_cells_never_stand_in_one_table(plan, tmp_path, monkeypatch):
    plan = plan | {"rows": {"plain": None}}
    held = compare(plan, tmp_path / "out")
    assert [row["seeds"] for row in held.rows] == [[0, 1]]
    monkeypatch.setattr(train_cam, "VERSION", train_cam.VERSION + 1)
    run_cell = module.run_cell

    def failing(cell, *arguments):
        if cell.seed == 1:
            raise RuntimeError("no space left")
        return run_cell(cell, *arguments)

    monkeypatch.setattr(module, "run_cell", failing)
    with pytest.raises(CompareError, match="1 of 2 cells failed; plain, seed 1, toy: no space left"):
        compare(plan, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["seeds"] for row in results["rows"]] == [[0]] and len(results["cells"]) == 1


@pytest.mark.slow
def test_a_changed_image_or_tag_changes_its_cell(small, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()

    def write(pictures, tags):
        for name, number in pictures.items():
            pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            Image.fromarray((pixels[..., 0] > 100).astype(np.uint8)).save(folder / f"mask_{name}")
        rows = [f"{name},{tag},mask_{name}" for name, tag in zip(pictures, tags, strict=True)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,tags,mask", *rows]))

    plan = small | {"data": {"source": str(folder)}}
    names = {f"{number}.png": number for number in range(4)}
    figures = []
    for pictures, tags in (
        (names, ["cat", "cat;dog", "cat", "cat"]),
        (names | {"0.png": 9}, ["cat", "cat;dog", "cat", "cat"]),  # another picture
        (names, ["cat;dog", "cat;dog", "cat", "cat"]),  # other tags
        ({"0.png": 0, "1.png": 1}, ["cat", "cat;dog"]),  # fewer images
    ):
        write(pictures, tags)
        found = compare(plan, tmp_path / "out")
        fresh = compare(plan, tmp_path / f"fresh{len(figures)}")
        assert found.cells[0]["maps"] == fresh.cells[0]["maps"]
        figures.append(json.dumps(found.cells[0]["maps"]))
    assert len(set(figures)) == 4


@pytest.mark.slow
def test_whole_runs_are_compared_by_their_segmenters(plan, tmp_path):
    whole = plan | {"rows": {"rounds": {"self_training.rounds": 2}}, "seeds": [0], "segmenter": True}
    results = compare(whole, tmp_path / "out")
    [row], [cell] = results.rows, results.cells
    last = cell["results"][-1]
    assert last["split"] == "val" and row["segmenter"]["mean_iou"]["values"] == [last["mean_iou"]]
    assert row["segmenter"]["mean_iou"]["sd"] is None
    assert set(cell["cost"]) == {"cam", "segmenter", "segmenter-2", "label_seconds_per_image"}
    parts = [part["minutes"] for part in cell["cost"].values() if isinstance(part, dict)]
    assert row["cost"]["minutes"] == pytest.approx(sum(parts)) and min(parts) > 0
    masks = [np.array(Image.open(path)) for path in (tmp_path / "out").rglob("examples/*.png")]
    assert len(masks) == 3 and all(mask.shape == (48, 48) for mask in masks)
    assert "segmenter, mean IoU" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.slow
def test_a_supervised_twin_learns_from_true_masks_once_for_rows_of_one_start(small, tmp_path):
    whole = small | {"rows": {"low": {"masks.background_threshold": 0.2}, "high": {}}, "segmenter": True}
    out = tmp_path / "out"
    compare(whole, out)
    before = stamps(out / "cells")
    results = compare(whole | {"supervised": True}, out)
    trained = {path: stamp for path, stamp in before.items() if path.name == "model.safetensors"}
    assert trained.items() <= stamps(out / "cells").items()  # no training but that of the twin
    low, high = (out / f"cells/toy/{row}/seed0" for row in ("low", "high"))
    assert (low / "supervised/recipe.yaml").read_bytes() == (high / "supervised/recipe.yaml").read_bytes()
    cell = results.cells[0]["settings"]
    data, recipe = load_data(**cell["source"]), plan_cells(whole, out)[0].recipe
    alone = train_segmenter(data, recipe, tmp_path / "alone", mask_column="mask", cam=low / "cam")
    weights = [folder / "model.safetensors" for folder in (alone.folder, low / "supervised", low / "segmenter")]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()
    twin = segmenter_row("", alone, data, recipe.evaluation)["mean_iou"]
    for row in results.rows:
        assert row["supervised"]["mean_iou"]["values"] == [twin]
        assert row["share"]["values"] == [row["segmenter"]["mean_iou"]["values"][0] / twin]
    before = stamps(out / "cells")
    compare(whole | {"supervised": True}, out)
    assert stamps(out / "cells") == before


@pytest.mark.slow
def test_a_supervised_twin_sees_the_masks_that_are_not_evaluated_on(small, tmp_path):
    for folder in ("JPEGImages", "Annotations", "SegmentationClassAug", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    toy = make_toy(num_train=8, num_val=2, image_size=48)
    names = VOC_CLASSES[: len(class_names(toy))]
    for split, rows in toy.items():
        for row in rows:
            name = f"{split}{row['image_id']}"
            row["image"].convert("RGB").save(tmp_path / f"JPEGImages/{name}.jpg")
            tags = "".join(f"<object><name>{names[tag]}</name></object>" for tag in row["tags"])
            (tmp_path / f"Annotations/{name}.xml").write_text(f"<annotation>{tags}</annotation>")
            row["mask"].save(tmp_path / f"SegmentationClassAug/{name}.png")
    for name, split, count in (("train_aug", "train", 8), ("train", "train", 2), ("val", "val", 2)):
        ids = [f"{split}{image_id}\n" for image_id in toy[split]["image_id"][:count]]
        (tmp_path / f"ImageSets/Segmentation/{name}.txt").write_text("".join(ids))
    source = {"source": "voc", "root": str(tmp_path), "classes": list(names)}
    whole = small | {"data": source, "segmenter": True, "supervised": True}
    [cell] = compare(whole, tmp_path / "out").cells
    assert cell["maps"]["num_images"] == 2
    folder, recipe = tmp_path / "out/cells/voc/plain/seed0", plan_cells(whole, "")[0].recipe
    data = load_data(**source, masks="all")
    alone = train_segmenter(data, recipe, tmp_path / "alone", mask_column="mask", cam=folder / "cam")
    weights = [(path / "model.safetensors").read_bytes() for path in (alone.folder, folder / "supervised")]
    assert weights[0] == weights[1]


def test_data_without_masks_are_compared_by_pictures(plan, tmp_path):
    folder = tmp_path / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    refined = {"refiner": {"use": True, "train": {"epochs": 1, "batch_size": 4}}, "masks.background_threshold": "auto"}
    unmasked = plan | {"data": {"source": str(folder)}, "seeds": [0], "rows": {"refined": refined}}
    results = compare(unmasked, tmp_path / "out")
    assert (tmp_path / "out/cells/photos/refined/seed0/refiner/model.safetensors").is_file()
    assert set(results.cells[0]["cost"]) == {"cam", "refiner"}
    assert "maps" not in results.rows[0] and results.rows[0]["data"] == "photos"
    assert (tmp_path / "out" / "comparison.html").read_text().count("data:image/jpeg") == 3 * 2
    with pytest.raises(DataError, match="split 'train': expected true masks"):
        compare(unmasked | {"segmenter": True, "supervised": True}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failed_cell_does_not_stop_the_others(plan, tmp_path):
    broken = {"cam.train": {"optimizer": "sgd", "lr": 1e30, "batch_size": 1}}
    spoiled = plan | {"rows": {"broken": broken, "plain": {}}, "seeds": [0]}
    with pytest.raises(CompareError, match="1 of 2 cells failed; broken, seed 0, toy: the loss"):
        compare(spoiled, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == ["plain"]


def test_cost_counts_the_steps_that_were_taken(tmp_path):
    rates = [{"images_per_second": 8.0}, {"images_per_second": 4.0}]
    (tmp_path / "training_log.json").write_text(json.dumps(rates))
    settings = TrainSettings(epochs=9, batch_size=4)
    whole = training_cost(tmp_path, settings, num_images=14)  # 3 steps of 4 in 1.5 s, then in 3 s
    assert whole == pytest.approx({"seconds_per_step": 4.5 / 6, "minutes": 4.5 / 60})
    part = training_cost(
        tmp_path, dataclasses.replace(settings, steps=4), num_images=14
    )  # one step of 4 in the second epoch
    assert part == pytest.approx({"seconds_per_step": 2.5 / 4, "minutes": 2.5 / 60})
    assert training_cost(tmp_path / "nowhere", settings, num_images=14) == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cells_in_processes_of_their_own_give_the_same(plan, finished, tmp_path):
    both = compare(plan | {"seeds": [0]}, tmp_path / "out", jobs=2)
    for cell in both.cells:
        name = cell["settings"]["row"]
        held = json.loads((finished.folder / f"cells/toy/{name}/seed0/cell.json").read_text())
        assert cell["maps"] == held["maps"]


def test_a_row_may_have_seeds_of_its_own(plan, tmp_path):
    rows = {"plain": None, "drs": {"seeds": [7], "cam.methods": {"drs": {}}}}
    cells = plan_cells(plan | {"rows": rows}, tmp_path)
    assert [(cell.row, cell.recipe.seed) for cell in cells] == [("plain", 0), ("plain", 1), ("drs", 7)]
    with pytest.raises(RecipeError, match="seeds: expected a list of whole numbers, got 7"):
        plan_cells(plan | {"rows": {"plain": {"seeds": 7}}}, tmp_path)


def test_recipes_by_name_are_rows_on_several_data_sets(tmp_path):
    cells = plan_cells(
        {"rows": ["toy", "voc_drs"], "data": {"a": {"source": "toy"}, "b": COCO}},
        tmp_path,
    )
    assert cells[-1].source == COCO
    assert [(cell.data, cell.row, cell.seed) for cell in cells] == [
        (data, row, 0) for data in ("a", "b") for row in ("toy", "voc_drs")
    ]
    assert cells[1].recipe.cam.methods == {"drs": dataclasses.asdict(DrsConfig(mode="learnable"))}
    assert len({cell.folder for cell in cells}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rowz": {}}, r"plan: rowz: unknown; did you mean rows\?"),
        ({"rows": {}}, "plan: rows: expected name: .*, got {}"),
        ({"data": None}, "plan: data: expected for example .*, got None"),
        ({"data": {"toy": {"sauce": "toy"}}}, "plan: data toy: expected source and some of root, .*got {'sauce'"),
        ({"seeds": []}, r"plan: seeds: expected a list of whole numbers, got \[\]"),
        ({"seeds": "0,1"}, "plan: seeds: expected a list of whole numbers, got '0,1'"),
        ({"rows": {"a/b": {}}}, "plan: row: expected a name that can be a folder, got 'a/b'"),
        ({"rows": {"drs": "drs"}}, "plan: row drs: expected a mapping of changes of the recipe, got 'drs'"),
        ({"rows": {"drs": {"cam.metods": {}}}}, "cam.metods: unknown; did you mean cam.methods"),
        ({"segmenter": "no"}, "plan: segmenter: expected true or false, got 'no'"),
        ({"supervised": True}, r"plan: supervised: expected segmenter: true \(--segmenter\) beside it"),
        ({"set": "seed"}, "plan: set: expected a mapping, or a list of key=value, got 'seed'"),
    ],
)
def test_bad_plans(plan, tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        compare(plan | change, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_is_a_mapping_in_yaml(tmp_path):
    for text in ("a: [", "- a"):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(RecipeError, match="plan.yaml: "):
            read_plan(tmp_path / "plan.yaml")


def test_a_foreign_folder_is_refused(plan, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="expected a new folder or a comparison, got something else"):
        compare(plan, tmp_path)
