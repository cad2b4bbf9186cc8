"""The command line from outside: what it prints, writes and refuses; and its scripts on two processes."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import weakref
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, SegformerConfig, SegformerForSemanticSegmentation

from wsss_hf.cli.main import main
from wsss_hf.data.tagged import class_names
from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.recipes import Recipe
from wsss_hf.stages.compare import Comparison
from wsss_hf.stages.plan import plan_cells
from wsss_hf.training.loop import TrainingError
from wsss_hf.version import __version__

TINY_BACKBONE = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16]}
TINY_BACKBONE |= {"depths": [1, 1]}
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def wsss(capsys, monkeypatch):
    """Runs a command in this process → exit code, standard output, standard error."""
    monkeypatch.delenv("WSSS_TRACEBACK", raising=False)

    def call(*arguments):
        capsys.readouterr()  # what fixtures have printed
        AcceleratorState._reset_state()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def tiny(tiny_settings):
    return [part for setting in tiny_settings for part in ("--set", setting)]


@pytest.fixture
def photos(tmp_path):
    """A folder of six tagged images of 20 pixels; a test may spoil it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = ["file_name,tags,mask"]
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{['cat', 'dog'][i % 2]},")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


def test_help_names_every_stage(wsss):
    code, out, _ = wsss("--help")
    assert code == 0
    stages = ("train-cam", "train-refiner", "make-masks", "train-segmenter")
    for command in ("demo", "run", *stages, "evaluate", "compare"):
        assert command in out
        code, text, _ = wsss(command, "--help")
        assert code == 0 and "--set" in text and "--recipe" in text


def test_help_shows_patterns_as_one_writes_them(wsss):
    assert "photos/*/*.jpg" in wsss("predict", "--help")[1]


def test_a_tracker_is_asked_for_all_trainings_before_work(wsss, tiny, tmp_path, monkeypatch):
    command = ["run", "--data", "toy", *tiny, "--out", tmp_path / "run", "--quiet"]
    monkeypatch.setattr("wsss_hf.training.tracking.get_available_trackers", lambda: ["wandb"])
    code, _, err = wsss(*command, "--track", "trackio")
    assert code == 1
    assert err == "error: track: expected an installed tracker, got trackio; pip install trackio\n"
    code, _, err = wsss(*command, "--track", "paper")
    assert code == 1 and "cam.train.track: expected tensorboard, trackio or wandb or null, got 'paper'" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], "'nothing'"),
        (["train-cam", "--nothing"], "--nothing"),
        (["train-cam", "--data", "toy"], "--out"),
        (["train-cam", "--data", "toy", "--out", "new", "--limit", "x"], "--limit"),
    ],
)
def test_what_is_no_command_option_or_value_is_one_line(wsss, arguments, named):
    code, out, err = wsss(*arguments)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and named in err


def test_no_arguments_show_the_help(wsss):
    _, out, err = wsss()
    assert "train-cam" in out + err


@pytest.mark.slow
def test_the_stages_one_by_one(wsss, tiny, tmp_path, toy_data):
    common = ["--data", "toy", "--quiet", *tiny]
    assert wsss("train-cam", *common, "--out", tmp_path / "cam", "--seed", 3)[0] == 0
    model = CamClassifier.from_pretrained(tmp_path / "cam")
    assert list(model.config.id2label.values()) == class_names(toy_data)
    written = yaml.safe_load((tmp_path / "cam" / "recipe.yaml").read_text())
    assert written["seed"] == 3 and written["cam"]["train"]["epochs"] == 2 and written["data"]["source"] == "toy"

    assert wsss("make-masks", *common, "--cam", tmp_path / "cam", "--out", tmp_path / "masks")[0] == 0
    labelled = load_from_disk(str(tmp_path / "masks"))
    assert labelled["train"]["image_id"][:] == toy_data["train"]["image_id"][:]

    refine = ["--set", "refiner.train.epochs=1", "--out", tmp_path / "refiner"]
    assert wsss("train-refiner", tmp_path / "cam", *common, *refine)[0] == 0
    assert wsss("make-masks", *common, "--cam", tmp_path / "refiner", "--out", tmp_path / "refined")[0] == 0
    pair = [load_from_disk(str(tmp_path / name))["train"]["pseudo_mask"][:] for name in ("masks", "refined")]
    assert any(np.asarray(a).tolist() != np.asarray(b).tolist() for a, b in zip(*pair, strict=True))

    common[1] = tmp_path / "masks"
    assert wsss("train-segmenter", *common, "--out", tmp_path / "segmenter")[0] == 0
    assert Segmenter.from_pretrained(tmp_path / "segmenter").config.id2label[0] == "background"
    assert wsss("train-segmenter", *common, "--out", tmp_path / "supervised", "--supervised")[0] == 0
    pair = [load_file(tmp_path / name / "model.safetensors") for name in ("segmenter", "supervised")]
    assert any(not torch.equal(value, pair[1][name]) for name, value in pair[0].items())

    code, out, _ = wsss("evaluate", *common)
    assert code == 0 and "pseudo masks of" in out and "12" in out
    code, out, _ = wsss(
        "evaluate", *common, "--recipe", "toy", "--cam", tmp_path / "cam", "--model", tmp_path / "segmenter"
    )
    assert code == 0 and "masks of" in out and "segmenter" in out and "mean IoU" in out


@pytest.mark.slow
def test_run_takes_a_folder_from_tags_to_report(wsss, tiny, tmp_path, photos):
    code, out, err = wsss("run", "--data", photos, "--out", tmp_path / "run", "--limit", 4, "--quiet", *tiny)
    assert code == 0 and not err and not out  # there are no true masks, so there are no results
    assert len(load_from_disk(str(tmp_path / "run" / "masks"))["train"]) == 4
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_compare_takes_a_plan_or_options(wsss, tiny, tmp_path):
    (tmp_path / "plan.yaml").write_text("rows: {plain: {}, drs: {cam.methods: {drs: {}}}}\nseeds: [5, 6]\n")
    options = ["--data", "toy", "--recipe", "default", "--seeds", "0", "--out", tmp_path / "out", "--quiet", *tiny]
    code, out, err = wsss("compare", tmp_path / "plan.yaml", *options)
    assert code == 0 and not err and "drs" in out and "Methods compared" in out
    trained = {path.parent.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("cell.json")}
    assert trained == {"cells/toy/plain/seed0", "cells/toy/drs/seed0"}
    assert_one_line(wsss("compare", "--data", "toy", "--out", tmp_path / "new"), "plan: rows: expected name: ")
    assert_one_line(wsss("compare", "--recipes", "toy", "--out", tmp_path / "new"), "plan: data: expected ")


def test_options_that_name_data_change_the_data_of_a_plan(wsss, tmp_path, monkeypatch):
    asked = []

    def fake(plan, out, **options):
        asked.append((plan, out, options))
        return Comparison(Path(out), [], [])

    monkeypatch.setattr("wsss_hf.stages.compare.compare", fake)
    plan = tmp_path / "plan.yaml"
    plan.write_text("rows: {plain: {}}\ndata: {a: {source: voc, limit: 9}, b: {source: coco, masks: all}}\n")
    options = ["--root", "kit", "--classes", "cat,dog", "--columns", "image=img", "--limit", 3, "--revision", "v1"]
    options += ["--cams", "one", "--cams", "two"]
    assert wsss("compare", plan, "--out", tmp_path / "out", "--quiet", *options)[0] == 0
    given = {"root": "kit", "classes": ["cat", "dog"], "columns": {"image": "img"}, "limit": 3, "revision": "v1"}
    [(wanted, _, options)] = asked
    assert options["cams"] == [Path("one"), Path("two")]
    assert [cell.source for cell in plan_cells(wanted, tmp_path)] == [
        {"source": "voc"} | given,
        {"source": "coco", "masks": "all"} | given,
    ]
    plan.write_text("rows: {plain: {}}\n")
    assert_one_line(wsss("compare", plan, "--out", tmp_path / "out", "--limit", 3), "plan: data: expected ")


@pytest.mark.parametrize("plan", sorted(SCRIPTS.glob("plans/*.yaml")), ids=lambda plan: plan.stem)
def test_plans_run_by_the_command_that_they_begin_with(wsss, tmp_path, monkeypatch, plan):
    asked = []

    def fake(plan, out, **options):
        asked.append((plan, out, options))
        return Comparison(Path(out), [], [])

    monkeypatch.setattr("wsss_hf.stages.compare.compare", fake)
    monkeypatch.chdir(SCRIPTS.parent)
    command = plan.read_text().splitlines()[0].removeprefix("# wsss ").split()
    assert wsss(*command, "--quiet")[0] == 0
    [(wanted, out, *_)] = asked
    cells = plan_cells(wanted, out)
    assert cells and all("root" in cell.source for cell in cells if cell.source["source"] == "voc")
    assert all(cell.recipe.cam.backbone or cell.recipe.cam.backbone_config for cell in cells)


@pytest.mark.slow
def test_rounds_are_an_option_of_a_run(wsss, tiny, tmp_path, photos):
    code, out, err = wsss("run", "--data", photos, "--out", tmp_path / "run", "--quiet", *tiny, "--rounds", 2)
    assert code == 0 and not err and not out
    assert {"masks-2", "segmenter-2"} < {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_has_at_least_one_round(wsss, tiny, tmp_path, photos):
    arguments = ["run", "--data", photos, "--out", tmp_path / "run", "--quiet", *tiny]
    assert_one_line(wsss(*arguments, "--rounds", 0), "self_training.rounds: expected a whole number >= 1, got 0")
    result = wsss(*arguments, "--set", "self_training.rounds=0")
    assert_one_line(result, "self_training.rounds: expected a whole number >= 1, got 0")


def test_a_backbone_folder_is_where_training_starts(wsss, tiny, tmp_path, cam_folder, photos):
    body = CamClassifier.from_pretrained(cam_folder).backbone.body
    body.save_pretrained(tmp_path / "backbone")
    arguments = ["--data", photos, "--backbone", tmp_path / "backbone", "--out", tmp_path / "cam", "--quiet"]
    assert wsss("train-cam", *arguments, *tiny, "--set", "cam.train.lr=1e-30")[0] == 0
    found = CamClassifier.from_pretrained(tmp_path / "cam").backbone.body.state_dict()
    assert all(torch.equal(found[name], value) for name, value in body.state_dict().items())


def unknown_class(photos):
    return ["--classes", "cat,cow"], "tags: expected names from cat, cow, got 'dog'"


def no_image(photos):
    (photos / "3.png").write_bytes(b"not an image")
    return [], "row '3.png'"


def half_an_image(photos):
    whole = (photos / "3.png").read_bytes()
    (photos / "3.png").write_bytes(whole[: len(whole) // 2])
    return [], "row '3.png'"


def mask_of_another_size(photos):
    Image.new("L", (20, 10)).save(photos / "mask.png")
    text = (photos / "metadata.csv").read_text()
    (photos / "metadata.csv").write_text(text.replace("2.png,cat,", "2.png,cat,mask.png"))
    return [], "row '2.png': expected a mask of the image's size, 20x20, got one of 20x10"


def no_tags(photos):
    (photos / "metadata.csv").unlink()
    return [], "photos: expected either metadata.csv"


def empty_split(photos):
    for split in ("train", "val"):
        (photos / split).mkdir()
    for file in list(photos.glob("*.*")):
        file.rename(photos / "train" / file.name)
    (photos / "val" / "metadata.csv").write_text("file_name,tags\n")
    return [], "split 'val': expected at least one row"


def no_such_folder(photos):
    return ["--data", photos / "nowhere"], f"got '{photos / 'nowhere'}'"


def unknown_setting(photos):
    return ["--set", "cam.train.epoch=3"], "cam.train.epoch: unknown; did you mean cam.train.epochs?"


def unknown_recipe(photos):
    return ["--recipe", "voc13"], "recipe voc13 (no such file): unknown; "


def unknown_method(photos):
    return ["--set", "cam.methods={dsr: {}}"], "cam.methods.dsr: unknown; did you mean cam.methods.drs?"


def no_saliency(photos):
    return ["--set", "cam.saliency=true"], "data set: expected a column"


def unknown_layer(photos):
    layer = "encoder.stages.0.layers.0.activatoin"
    return [
        "--set",
        f"cam.methods={{drs: {{layers: [{layer}]}}}}",
    ], "drs.layers: expected one of the backbone's 9 activations, such as encoder.stages.0.layers.0.activation, "


def unknown_option_of_a_method(photos):
    return ["--set", "cam.methods={drs: {detla: 0.5}}"], "drs.detla: unknown; did you mean cam.methods.drs.delta?"


def backbone_without_maps(photos):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(**sizes, vocab_size=10)).save_pretrained(photos.parent / "bert")
    return [
        "--backbone",
        photos.parent / "bert",
    ], "takes pixel_values, got one that takes input_ids"


def no_backbone(photos):
    return ["--backbone", photos.parent / "nowhere"], f"{photos.parent / 'nowhere'}"


def loss_that_explodes(photos):
    changes = ["cam.train.optimizer=sgd", "cam.train.lr=1.0e+30", "cam.train.batch_size=1"]
    return [part for change in changes for part in ("--set", change)], "the loss 'classification' became"


def no_limit(photos):
    return ["--limit", 0], "limit: expected at least 1 row, got 0"


BAD_INPUTS = [
    unknown_class,
    no_image,
    half_an_image,
    mask_of_another_size,
    no_tags,
    empty_split,
    no_such_folder,
    unknown_setting,
    unknown_recipe,
    unknown_method,
    unknown_option_of_a_method,
    unknown_layer,
    no_saliency,
    backbone_without_maps,
    no_backbone,
    loss_that_explodes,
    no_limit,
]


def assert_one_line(result, culprit):
    code, _, err = result
    assert code == 1
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert culprit in err


@pytest.mark.parametrize("command", ["train-cam", "run"])
@pytest.mark.parametrize("spoil", BAD_INPUTS, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_one_line_and_leaves_nothing(wsss, tiny, tmp_path, photos, spoil, command):
    options, culprit = spoil(photos)
    before = {path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"}
    out = tmp_path / "runs" / "out"
    result = wsss(command, "--data", photos, "--out", out, "--quiet", *tiny, *options)
    assert_one_line(result, culprit)
    assert not (out if command == "train-cam" else out / "cam").exists()
    assert {path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"} == before


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_only_what_changed_is_made_again(wsss, tiny, tmp_path, photos):
    arguments = ["train-cam", "--data", photos, "--out", tmp_path / "cam", *tiny]
    assert wsss(*arguments)[0] == 0
    before = times(tmp_path / "cam")
    for options in ([], ["--set", "cam.train.workers=1"], ["--set", "masks.flip=false"]):
        code, _, err = wsss(*arguments, *options)
        assert code == 0 and err == "cam: done before\n" and times(tmp_path / "cam") == before
    for options, reason in (
        (["--seed", 9], "seed was 0 and is 9"),
        (["--seed", 9, "--limit", 4], "data changed"),
        (["--seed", 9, "--limit", 4, "--force"], "--force asks for it"),
    ):
        code, _, err = wsss(*arguments, *options)
        assert code == 0 and f"cam: made again, because {reason}\n" in err
    assert yaml.safe_load((tmp_path / "cam" / "recipe.yaml").read_text())["data"]["limit"] == 4


def test_quiet_commands_say_nothing(wsss, tiny, tmp_path, photos):
    arguments = ["train-cam", "--data", photos, "--out", tmp_path / "cam", "--quiet", *tiny]
    assert [wsss(*arguments)[2], wsss(*arguments)[2], wsss(*arguments, "--force")[2]] == ["", "", ""]


def test_more_toy_images_make_it_again(wsss, tiny, tmp_path):
    arguments = ["train-cam", "--data", "toy", "--out", tmp_path / "cam", *tiny]
    assert wsss(*arguments)[0] == 0
    assert "cam: made again, because data changed" in wsss(*arguments, "--set", "toy.num_train=13")[2]


def test_a_recipe_is_printed_and_can_be_used(wsss, tmp_path):
    code, out, _ = wsss("recipe", "toy", "--set", "cam.train.epochs=3", "--seed", 5)
    assert code == 0 and "Passes over the images." in out
    (tmp_path / "mine.yaml").write_text(out)
    assert Recipe.load(str(tmp_path / "mine.yaml")) == Recipe.load("toy", ["cam.train.epochs=3", "seed=5"])
    assert_one_line(wsss("recipe", "tooy"), "recipe tooy (no such file): unknown; did you mean toy?")


def test_the_version_is_printed(wsss):
    assert wsss("--version")[:2] == (0, f"wsss_hf {__version__}\n")


def test_a_foreign_folder_is_refused(wsss, tiny, tmp_path, photos):
    arguments = ["--data", photos, "--out", photos, "--quiet", *tiny]
    assert_one_line(wsss("train-cam", *arguments), "expected a new folder or a result of train-cam, got")


@pytest.mark.parametrize("text", ["image", "image=", "=img"])
def test_columns_are_pairs(wsss, tmp_path, photos, text):
    result = wsss("train-cam", "--data", photos, "--out", tmp_path / "cam", "--columns", text)
    assert_one_line(result, f"--columns: expected pairs such as image=img,tags=labels, got {text}")


def test_masks_are_made_by_a_classifier(wsss, tiny, tmp_path, photos):
    arguments = ["make-masks", "--data", photos, "--out", tmp_path / "masks", "--quiet", *tiny]
    assert_one_line(wsss(*arguments, "--cam", tmp_path / "nowhere"), "nowhere")
    assert_one_line(wsss(*arguments, "--cam", photos), "photos")
    assert not (tmp_path / "masks").exists()


def test_a_process_group_ends_after_the_models_of_a_failed_training(wsss, monkeypatch):
    class Model:
        pass

    models, alive = [], []

    def train(**options):
        model = Model()
        model.itself = model  # as wrapped models hold themselves
        models.append(weakref.ref(model))
        raise TrainingError("the loss became nan")

    monkeypatch.setattr("wsss_hf.cli.main.app", train)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: alive.append(models[0]()))
    assert_one_line(wsss(), "error: the loss became nan")
    assert alive == [None]


def test_a_library_that_a_model_wants_is_named_in_one_line(wsss, tiny, tmp_path, monkeypatch):
    """As transformers says it of image processors that it has with torchvision alone."""
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(
        SegformerConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
    ).save_pretrained(tmp_path / "segformer")

    def load(*arguments, **options):
        raise ImportError("\nSegformerImageProcessor requires the Torchvision library\nPlease install it.\n")

    monkeypatch.setattr("wsss_hf.training.library_segmenter.AutoImageProcessor.from_pretrained", load)
    command = ["train-segmenter", "--data", "toy", "--supervised", "--out", tmp_path / "segmenter", "--quiet", *tiny]
    result = wsss(*command, "--set", f"segmenter.model={tmp_path / 'segformer'}", "--set", "segmenter.size=64")
    assert_one_line(result, "SegformerImageProcessor requires the Torchvision library Please install it.")


def test_a_segmenter_wants_pseudo_masks(wsss, tiny, tmp_path, photos):
    result = wsss("train-segmenter", "--data", photos, "--out", tmp_path / "segmenter", "--quiet", *tiny)
    assert_one_line(result, "data set: expected a column")


def test_a_segmenter_of_other_classes_is_not_evaluated(wsss, tiny, tmp_path, photos):
    Image.new("L", (20, 20), 1).save(photos / "mask.png")
    text = (photos / "metadata.csv").read_text()
    (photos / "metadata.csv").write_text(text.replace("2.png,cat,", "2.png,cat,mask.png"))
    train = ["train-segmenter", "--supervised", "--data", "toy", "--out", tmp_path / "segmenter", "--quiet", *tiny]
    assert wsss(*train)[0] == 0
    (photos / "train").mkdir()
    for file in list(photos.glob("*.*")):
        file.rename(photos / "train" / file.name)
    (photos / "train").rename(photos / "val")
    (photos / "train").symlink_to(photos / "val")
    result = wsss("evaluate", "--data", photos, "--model", tmp_path / "segmenter", "--quiet", *tiny)
    assert_one_line(result, "segmenter: expected the classes of the data, background, cat, dog, got background, vixel")


@pytest.fixture
def in_two(in_processes):
    """Runs a script as two processes that nobody launched → exit code, standard output and error of the first."""

    def call(script, *arguments):
        words = [str(part) for part in (SCRIPTS / script, *arguments, "--quiet")]

        def work():
            sys.argv = words
            with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
                with pytest.raises(SystemExit) as stopped:
                    runpy.run_path(words[0], run_name="__main__")
            return stopped.value.code or 0, out.getvalue(), err.getvalue()

        return in_processes(work)[0]

    return call


@pytest.mark.slow
def test_two_processes_share_a_batch(tiny, tmp_path, in_two):
    arguments = [*tiny, "--data", "toy", "--out", tmp_path / "cam", "--set", "cam.train.batch_size=1"]
    code, _, err = in_two("train_cam.py", *arguments)
    assert (
        code
        and "error: batch_size: expected at least 2, an image for each of 2 processes x 1 micro-batches, got 1" in err
    )


@pytest.mark.slow
def test_two_processes_train_as_one(wsss, tiny, tmp_path, in_two):
    """The same global batches, plain SGD, no batch statistics: only the order of additions differs."""
    changes = ["cam.train.optimizer=sgd", "cam.train.lr=0.01", "cam.train.freeze_batch_norm=true"]
    options = [*tiny, *(part for change in changes for part in ("--set", change)), "--data", "toy"]
    assert wsss("train-cam", *options, "--out", tmp_path / "cam1", "--quiet")[0] == 0
    assert in_two("train_cam.py", *options, "--out", tmp_path / "cam2")[0] == 0
    one, two = (load_file(tmp_path / f"cam{count}" / "model.safetensors") for count in (1, 2))
    torch.manual_seed(0)
    start = CamClassifier(CamClassifier.from_pretrained(tmp_path / "cam1").config).state_dict()
    moved = max((value - start[name]).abs().max().item() for name, value in one.items())
    apart = max((value - two[name]).abs().max().item() for name, value in one.items())
    assert apart < 1e-5 and moved > 1e-3


@pytest.mark.slow
def test_two_processes_label_and_evaluate_as_one(wsss, tiny, tmp_path, cam_folder, in_two):
    tiny = [*tiny, "--cam", cam_folder]
    assert wsss("make-masks", *tiny, "--data", "toy", "--out", tmp_path / "masks1", "--quiet")[0] == 0
    assert in_two("make_masks.py", *tiny, "--data", "toy", "--out", tmp_path / "masks2")[0] == 0
    one, two = (load_from_disk(str(tmp_path / f"masks{count}"))["train"] for count in (1, 2))
    assert one["image_id"][:] == two["image_id"][:]
    assert all(np.array_equal(a, b) for a, b in zip(one["pseudo_mask"], two["pseudo_mask"], strict=True))
    arguments = [*tiny, "--recipe", "toy", "--data", tmp_path / "masks1"]
    code, table, _ = wsss("evaluate", *arguments, "--quiet")
    assert code == 0 and table.count("mean IoU") == 1
    assert in_two("evaluate_models.py", *arguments)[:2] == (0, table)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_stages_run_on_two_processes_of_the_launcher(tiny, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", SCRIPTS / "run.py"]
    command += ["--data", "toy", *tiny, "--out", tmp_path / "run", "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    files = {"cam", "masks", "segmenter", "results.json", "report.html", "gallery.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files


def test_masks_are_exported_for_other_programs(wsss, tiny, tmp_path, cam_folder):
    devkit, coco = tmp_path / "devkit", tmp_path / "coco.json"
    command = ["make-masks", "--data", "toy", "--cam", cam_folder, "--out", tmp_path / "masks", "--quiet", *tiny]
    exports = ["--export-voc", devkit, "--export-coco", coco]
    assert wsss(*command, *exports)[0] == 0
    train = load_from_disk(str(tmp_path / "masks"))["train"]
    for row in train:
        assert np.array_equal(Image.open(devkit / "SegmentationClass" / f"{row['image_id']}.png"), row["pseudo_mask"])
    assert len(json.loads(coco.read_text())["images"]) == len(train)
    # Known before anything is labelled.
    code, _, err = wsss(*command, "--out", tmp_path / "other", "--export-voc", devkit)
    assert code == 1 and f"--export-voc {devkit}: expected a path" in err and not (tmp_path / "other").exists()


@pytest.fixture
def segmented(photos, tmp_path):
    """`photos` under VOC's names in the splits train and val, the latter with masks; and an untrained segmenter."""
    rows = ["file_name,tags,mask"]
    for i, file in enumerate(sorted(photos.glob("*.png"))):
        file.rename(photos / f"2008_00000{i}.png")
        labels = np.random.default_rng(i).integers(0, 3, (20, 20), dtype=np.uint8)
        Image.fromarray(labels).save(photos / f"mask{i}.png")
        rows.append(f"2008_00000{i}.png,{['cat', 'dog'][i % 2]},mask{i}.png")
    (photos / "metadata.csv").write_text("\n".join(rows))
    photos.rename(tmp_path / "val")
    photos.mkdir()
    (tmp_path / "val").rename(photos / "val")
    (photos / "train").symlink_to(photos / "val")
    torch.manual_seed(0)
    names = {0: "background", 1: "cat", 2: "dog"}
    Segmenter(SegmenterConfig(backbone_config=TINY_BACKBONE, id2label=names)).save_pretrained(tmp_path / "segmenter")
    WsssImageProcessor(size={"shortest_edge": 32, "longest_edge": 128}).save_pretrained(tmp_path / "segmenter")
    return ["--data", photos, "--model", tmp_path / "segmenter", "--quiet"]


def test_a_segmenter_is_evaluated_and_its_label_maps_written(wsss, tmp_path, segmented):
    protocol = ["--scales", "0.5,1", "--window", "24", "--set", "evaluation.refine=[pamr]"]
    masks, archive, coco, figures = (tmp_path / name for name in ("masks", "r.tgz", "r.json", "figures.json"))
    exports = ["--save-masks", masks, "--voc-archive", archive, "--export-coco", coco, "--json", figures]
    code, out, err = wsss("evaluate", *segmented, *protocol, *exports)
    assert code == 0 and "IoU per class" in out, err
    names = [f"2008_00000{i}.png" for i in range(6)]
    assert sorted(path.name for path in masks.iterdir()) == names
    with tarfile.open(archive) as results:
        assert [Path(name).name for name in results.getnames()] == names
    assert [image["file_name"] for image in json.loads(coco.read_text())["images"]] == names
    code, _, _ = wsss("evaluate", *segmented, *protocol, "--json", tmp_path / "again.json")
    held, again = (json.loads(path.read_text())["results"][0] for path in (figures, tmp_path / "again.json"))
    assert held == again and held["num_images"] == 6 and held["boundary_f"] is not None
    plain = wsss("evaluate", *segmented, "--json", tmp_path / "plain.json")[0]
    assert plain == 0 and json.loads((tmp_path / "plain.json").read_text())["results"][0]["iou"] != held["iou"]

    files = ["evaluate", *segmented[:2], "--masks", masks, "--quiet"]
    assert wsss(*files)[0] == 0
    (masks / names[3]).unlink()
    assert_one_line(wsss(*files), f"{masks / names[3]}: expected a label map of every image, 1 of 6 missing")
    assert_one_line(
        wsss("evaluate", *segmented, "--save-masks", masks),
        f"--save-masks {masks}: expected a path",
    )


def test_the_published_test_protocol_ends_in_the_crf(wsss, segmented, tmp_path):
    pytest.importorskip("pydensecrf", reason="the extra crf is not installed")
    ways = {
        "plain": ["--recipe", "voc_deeplab_v2", "--set", "evaluation.refine=[]"],
        "recipe": ["--recipe", "voc_deeplab_v2"],
        "both": ["--recipe", "voc_deeplab_v2", "--crf"],
        "option": ["--crf", "--scales", "1.17", "--set", "evaluation.flip=false"],
    }
    maps = {}
    for way, options in ways.items():
        code, _, err = wsss("evaluate", *segmented, *options, "--save-masks", tmp_path / way)
        assert code == 0, err
        maps[way] = [np.array(Image.open(file)).tolist() for file in sorted((tmp_path / way).glob("*.png"))]
    assert len(maps["plain"]) == 6 and maps["recipe"] == maps["both"]  # the recipe's CRF is not run twice
    assert len({str(found) for found in maps.values()}) == 3


def test_a_missing_crf_is_one_line_before_any_work(wsss, tiny, segmented, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    line = "crf: expected the library pydensecrf2, got none; pip install"
    assert_one_line(wsss("evaluate", *segmented, "--crf"), line)
    run = ["run", "--data", "toy", "--out", tmp_path / "run", "--quiet", *tiny]
    for section in ("masks", "evaluation"):
        assert_one_line(wsss(*run, "--set", f"{section}.refine=[crf]"), line)
    assert not (tmp_path / "run").exists()


def test_two_segmenters_are_held_against_each_other(wsss, segmented, tmp_path):
    model = Segmenter.from_pretrained(segmented[3])
    torch.nn.init.normal_(model.head[0].bias)
    model.save_pretrained(tmp_path / "other")
    WsssImageProcessor(size={"shortest_edge": 32, "longest_edge": 128}).save_pretrained(tmp_path / "other")
    figures = tmp_path / "gap.json"
    code, out, err = wsss("evaluate", *segmented, "--against", tmp_path / "other", "--json", figures)
    assert code == 0 and "objects" in out and "IoU of cat" in out, err
    gap = json.loads(figures.read_text())["gap"]
    for name, folder in (("model", segmented[3]), ("other", tmp_path / "other")):
        assert wsss("evaluate", *segmented[:2], "--model", folder, "--quiet", "--json", tmp_path / "one.json")[0] == 0
        alone = json.loads((tmp_path / "one.json").read_text())["results"][0]
        assert gap[name]["mean_iou"] == pytest.approx(alone["mean_iou"]) and gap[name]["iou"] == alone["iou"]
    assert gap["ratio"] != 1 and gap["ratio_interval"][0] <= gap["ratio"] <= gap["ratio_interval"][1]


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (
            ["--against", "new", "--save-masks", "new"],
            "--against: expected --model beside it, and no files",
        ),
        (["--against", "nowhere"], "error: nowhere: "),
        (["--scales", "1,big"], "--scales: expected positive numbers a,b,c, got 1,big"),
        (["--window", "-3"], "evaluation.window: expected a whole number >= 0, got -3"),
        (["--voc-archive", "r.tgz"], "--voc-archive, --export-coco: expected --model and --save-masks beside them"),
        (["--split", "test"], "split 'test': expected one of train, val"),
        (["--save-masks", "new", "--split", "test"], "--split: expected train or val, got test"),
        (
            ["--save-masks", "new", "--voc-archive", "r.zip"],
            "--voc-archive: expected a file .tar, .tgz",
        ),
    ],
)
def test_bad_options_of_evaluate(wsss, segmented, options, culprit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert_one_line(wsss("evaluate", *segmented, *options), culprit)
    assert set(tmp_path.iterdir()) == before


def test_nothing_to_evaluate_on_is_said(wsss, segmented):
    photos = segmented[1]
    text = (photos / "val" / "metadata.csv").read_text()
    (photos / "val" / "metadata.csv").write_text(re.sub(r"mask\d.png", "", text))
    assert_one_line(wsss("evaluate", *segmented), "split 'val': expected true masks to evaluate on")
    assert_one_line(wsss("evaluate", *segmented[:2]), "split 'train': expected true masks to evaluate on")
    (photos / "train").unlink()
    (photos / "val").rename(photos / "train")
    assert_one_line(wsss("evaluate", *segmented), "split 'val': expected one of train")


def test_an_empty_split_is_nothing_to_evaluate_on(wsss, segmented):
    photos = segmented[1]
    (photos / "train").unlink()
    (photos / "val").rename(photos / "train")
    (photos / "val").mkdir()
    (photos / "val" / "metadata.csv").write_text("file_name,tags,mask\n")
    for what in (["--model", segmented[3]], ["--masks", photos]):
        assert_one_line(wsss("evaluate", "--data", photos, *what, "--quiet"), "split 'val': expected at least one row")


def test_a_classifier_of_other_classes_makes_no_masks(wsss, segmented, cam_folder, tmp_path):
    for command in (["evaluate"], ["make-masks", "--out", tmp_path / "masks"]):
        result = wsss(*command, *segmented[:2], "--cam", cam_folder, "--quiet", "--set", "masks.refine=[]")
        assert_one_line(result, "classifier: expected the classes of the data, cat, dog, got vixel, bramby, finnet, ")
    assert not (tmp_path / "masks").exists()


def test_logits_that_are_no_numbers_are_one_line(wsss, segmented):
    folder = segmented[3]
    model = Segmenter.from_pretrained(folder)
    model.head[0].bias.data[1] = float("nan")
    model.save_pretrained(folder)
    assert_one_line(wsss("evaluate", *segmented), "head.0.bias holds nan: its training has diverged")
