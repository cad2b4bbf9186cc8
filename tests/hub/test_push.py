"""Pushing to a Hub, and loading as a stranger: a process that cannot import wsss_hf and has an empty cache."""

import ast
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import HfApi, ModelCard
from library import has_segformers_processor, needs_segformers_processor
from loopback_hub import TOKEN
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessorPil,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    pipeline,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from wsss_hf import CamClassifier, MapRefiner, MapRefinerConfig, Segmenter, SegmenterConfig, WsssImageProcessor
from wsss_hf.cli.main import main
from wsss_hf.hub.push import push_model
from wsss_hf.hub.upload import HubError, push_folder
from wsss_hf.inference.load import load_segmenter

NAMES = {0: "background", 1: "cat", 2: "dog"}
TINY = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
RESULTS = {
    "command": "run",
    "data": {"source": "voc", "root": "/home/somebody/VOCdevkit/VOC2012", "classes": ["cat", "dog"]},
    "recipe": {
        "seed": 0,
        "cam": {"backbone": "/home/somebody/weights/resnet", "methods": {"drs": {}}},
        "masks": {"scales": [1.0], "refine": ["pamr"]},
        "segmenter": {"backbone": "/home/somebody/weights/resnet", "train": {"epochs": 2}},
    },
    "results": [
        {"result": "pseudo masks", "split": "train", "of": "masks", "mean_iou": 0.5, "pixel_accuracy": 0.75}
        | {"mean_iou_interval": [0.4, 0.6], "iou": {"background": 0.7, "cat": 0.5, "dog": 0.3}, "num_images": 9},
        {"result": "the segmenter", "split": "val", "of": "segmenter", "mean_iou": 0.625, "pixel_accuracy": 0.8}
        | {"mean_iou_interval": [0.5, 0.75], "iou": {"background": 0.9, "cat": 0.55, "dog": 0.425}, "num_images": 7},
    ],
    "minutes": 12.3,
    "environment": {"device": "2 CPU cores", "wsss_hf": "0.1.0"},
}


def save_segmenter(folder, seed=0):
    torch.manual_seed(seed)
    model = Segmenter(SegmenterConfig(backbone_config=TINY, rates=[1, 2], id2label=NAMES))
    model.config.backbone_config._name_or_path = "/home/somebody/weights/resnet"
    model.save_pretrained(folder)
    WsssImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return model.eval()


@pytest.fixture
def run_folder(tmp_path, cam_folder):
    """What a run leaves, with figures."""
    root = tmp_path / "run"
    save_segmenter(root / "segmenter")
    shutil.copytree(cam_folder, root / "cam")
    (root / "cam" / "recipe.yaml").write_text("stage: train-cam")
    (root / "segmenter" / "recipe.yaml").write_text("{stage: train-segmenter, mask_column: pseudo_mask}")
    (root / "results.json").write_text(json.dumps(RESULTS))
    Image.new("RGB", (8, 8), "teal").save(root / "gallery.png")
    for unwanted in ("training_log.json", "notes.txt"):
        (root / "segmenter" / unwanted).write_text("{}")
    return root


@pytest.fixture
def wsss(capsys):
    def call(*arguments):
        AcceleratorState._reset_state()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


# what is pushed


def test_a_run_is_pushed_in_one_commit(hub, wsss, run_folder):
    code, out, err = wsss("push", run_folder, "tester/pets", "--license", "apache-2.0")
    assert (code, err) == (0, "") and f"{hub.url}/tester/pets" in out
    repository = hub.repositories["model", "tester/pets"]
    assert not repository.private and len(repository.commits) == 2  # the first one is the Hub's
    files = hub.files("tester/pets")
    data = {"config.json", "model.safetensors", "preprocessor_config.json", "results.json", "recipe.yaml"}
    code_files = {name for name in files if name.endswith(".py")}
    assert set(files) == data | code_files | {"README.md", "gallery.png", ".gitattributes"}
    assert code_files == needed_code(files)
    assert files["gallery.png"] == (run_folder / "gallery.png").read_bytes()


def needed_code(files):
    """The code that the configurations name, and what it imports."""
    config, processor = (json.loads(files[name]) for name in ("config.json", "preprocessor_config.json"))
    text = json.dumps([config["auto_map"], config["custom_pipelines"], processor["auto_map"]])
    open_, needed = re.findall(r'"(\w+)\.\w+"', text), set()
    while open_:
        module = open_.pop()
        if f"{module}.py" not in needed:
            needed.add(f"{module}.py")
            tree = ast.parse(files[f"{module}.py"])
            open_ += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1]
    return needed


SEGFORMER = SegformerConfig(
    depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, id2label=NAMES
)
EOMT = EomtConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, num_blocks=1, id2label=NAMES
)


CUTTING = partial(EomtImageProcessorPil, do_split_image=True)


@pytest.mark.parametrize(
    ("kind", "config", "processor", "call"),
    [
        pytest.param(
            SegformerForSemanticSegmentation,
            SEGFORMER,
            SegformerImageProcessorPil,
            '("photo.jpg")',
            marks=needs_segformers_processor,
        ),
        (EomtForUniversalSegmentation, EOMT, CUTTING, '("photo.jpg", subtask="semantic")'),
    ],
    ids=["segformer", "eomt"],
)
def test_a_segmenter_of_the_library_is_pushed_as_one(hub, tmp_path, kind, config, processor, call):
    kind(config).save_pretrained(tmp_path / "segmenter")
    processor().save_pretrained(tmp_path / "segmenter")
    push_model(tmp_path / "segmenter", "tester/plain")
    files = hub.files("tester/plain")
    weights = (tmp_path / "segmenter" / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == weights and not any(name.endswith(".py") for name in files)
    card = files["README.md"].decode()
    assert "A semantic segmentation model. It knows 2 classes: cat, dog;" in card
    assert f"segmenter{call}" in card and "tags=" not in card
    assert ("the library's own pipeline takes them one by one" in card) == (kind is EomtForUniversalSegmentation)


@needs_segformers_processor
@pytest.mark.parametrize("processor", [SegformerImageProcessorPil, WsssImageProcessor])
def test_a_pushed_segmenter_of_the_library_takes_batches_of_any_photographs(hub, tmp_path, processor):
    SegformerForSemanticSegmentation(SEGFORMER).save_pretrained(tmp_path / "segmenter")
    processor(size={"shortest_edge": 32, "longest_edge": 64}, default_to_square=False).save_pretrained(
        tmp_path / "segmenter"
    )
    push_model(tmp_path / "segmenter", "tester/plain")
    for name, content in hub.files("tester/plain").items():
        (tmp_path / "pushed" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pushed" / name).write_bytes(content)
    assert b"resized to squares" in hub.files("tester/plain")["README.md"]
    segment = pipeline("image-segmentation", str(tmp_path / "pushed"))
    draw, sizes = np.random.default_rng(0), ((50, 70), (90, 40), (64, 64), (50, 70))
    images = [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    for image, together in zip(images, segment(images, batch_size=8), strict=True):
        alone = segment(image)
        assert [entry["label"] for entry in together] == [entry["label"] for entry in alone]
        for one, other in zip(together, alone, strict=True):
            assert one["mask"].size == image.size
            assert np.mean(np.asarray(one["mask"]) != np.asarray(other["mask"])) < 0.01


def test_nothing_of_this_machine_leaves_it(hub, run_folder):
    push_model(run_folder, "tester/pets")
    files = hub.files("tester/pets")
    for name, content in files.items():
        assert b"somebody" not in content and TOKEN.encode() not in content, name
    assert yaml.safe_load(files["recipe.yaml"])["segmenter"] == {"backbone": "resnet", "train": {"epochs": 2}}
    assert json.loads(files["results.json"])["data"]["root"] == "VOC2012"


def test_pictures_stay_at_home_if_one_wants(hub, wsss, run_folder):
    assert wsss("push", run_folder, "pets", "--no-pictures")[0] == 0
    files = hub.files("tester/pets")
    assert "gallery.png" not in files and b"gallery.png" not in files["README.md"]


@pytest.mark.slow
def test_a_second_push_sends_what_is_new(hub, wsss, run_folder):
    first = push_model(run_folder, "tester/pets")
    sent = len(hub.uploads)
    again = push_model(run_folder, "tester/pets")
    assert (again.commit, again.changed, len(hub.uploads)) == (first.commit, False, sent)
    code, out, err = wsss("push", run_folder, "tester/pets")
    assert code == 0 and "already" in out and err == "" and len(hub.uploads) == sent

    changed = json.loads(json.dumps(RESULTS))
    changed["results"][1]["mean_iou"] = 0.25
    (run_folder / "results.json").write_text(json.dumps(changed))
    assert push_model(run_folder, "tester/pets", licence="mit").changed
    assert hub.uploads[sent:] == ["README.md", "results.json"]
    assert not push_model(run_folder, "tester/pets").changed  # its licence stays
    assert ModelCard(hub.files("tester/pets")["README.md"].decode()).data.license == "mit"


@pytest.mark.parametrize("licence", ["", "MIT", "mit ", "-x", "GPL 3", "mit\n", "a: b"])
def test_what_is_no_identifier_of_a_licence_is_refused_before_anything_is_sent(hub, wsss, run_folder, licence):
    (run_folder / "masks").mkdir()
    (run_folder / "masks" / "dataset_dict.json").touch()
    for kind in ([], ["--dataset"]):
        code, out, err = wsss("push", run_folder, "tester/pets", f"--license={licence}", *kind)
        wanted = "error: --license: expected an identifier of the Hub, such as apache-2.0 or other, got "
        assert code == 1 and out == "" and err == f"{wanted}{licence!r}\n"
    assert not hub.requests


def test_a_licence_that_the_hub_does_not_know_leaves_no_repository(hub, wsss, run_folder):
    code, out, err = wsss("push", run_folder, "tester/pets", "--license", "my-own")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert err.startswith('error: README.md: the Hub refuses its metadata: \'"license" must be one of [apache-2.0, ')
    assert not hub.repositories
    for licence in ("openrail++", "other"):
        assert push_model(run_folder, "tester/pets", licence=licence).changed
        assert ModelCard(hub.files("tester/pets")["README.md"].decode()).data.license == licence


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("<html>\n <b>Bad request</b></html>", "'<html> <b>Bad request</b></html>'"),
        ('{"error": "Invalid content"}', """'{"error": "Invalid content"}'"""),
        ('{"errors": ["Invalid content"]}', """'{"errors": ["Invalid content"]}'"""),
        ("", "'it gives no reason'"),
    ],
)
def test_a_refusal_in_any_form_is_one_line(hub, wsss, run_folder, answer, said):
    hub.refusal = answer.encode()
    code, out, err = wsss("push", run_folder, "tester/pets")
    assert (code, out, err) == (1, "", f"error: README.md: the Hub refuses its metadata: {said}\n")
    assert not hub.repositories


@pytest.mark.slow
def test_code_and_weights_that_are_no_longer_needed_go_and_foreign_files_stay(hub, run_folder):
    push_model(run_folder / "cam", "tester/pets")
    held = hub.repositories["model", "tester/pets"].files()
    theirs = "data/train-00000-of-00001.parquet"  # of ours only where a repository holds a data set
    held |= {
        "notes.md": b"mine",
        theirs: b"rows",
        "my_script.py": b"",
        "model-00001-of-00002.safetensors": b"old shard",
    }
    assert "modeling_cam.py" in held
    push_model(run_folder, "tester/pets")
    files = hub.files("tester/pets")
    assert {"notes.md", theirs, "my_script.py", "modeling_segmenter.py"} <= set(files)
    assert not {"modeling_cam.py", "drs.py", "model-00001-of-00002.safetensors"} & set(files)


def test_a_branch_leaves_main_as_it_is(hub, wsss, run_folder):
    assert wsss("push", run_folder, "tester/pets", "--branch", "v2", "--private")[0] == 0
    assert hub.repositories["model", "tester/pets"].private
    assert "config.json" in hub.files("tester/pets", "v2") and "config.json" not in hub.files("tester/pets")


@pytest.mark.slow
def test_a_model_pushes_itself_too(hub, run_folder, tmp_path):
    model = Segmenter.from_pretrained(run_folder / "segmenter")
    model.push_to_hub("tester/own", tags=["pets"])
    repository = hub.repositories["model", "tester/own"]
    assert len(repository.commits) == 2  # the first one is the Hub's
    files = hub.files("tester/own")
    code_files = {name for name in files if name.endswith(".py")}
    data = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", ".gitattributes"}
    assert set(files) == data | code_files and code_files == needed_code(files)
    assert json.loads(files["preprocessor_config.json"])["size"] == {"shortest_edge": 32, "longest_edge": 64}
    assert not any(b"somebody" in content or str(tmp_path).encode() in content for content in files.values())
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "image-segmentation" and "pets" in card.data.tags and not card.data.eval_results
    for words in ("`Segmenter`", "`resnet`", "2 classes: cat, dog;", 'model="tester/own"', "is not recorded here"):
        assert words in card.text

    sent = len(hub.uploads)
    model.push_to_hub("tester/own")
    assert len(hub.uploads) == sent and len(repository.commits) == 2
    files["README.md"] = b"---\nlicense: mit\n---\nmy own words\n"
    model.save_pretrained(tmp_path / "own", push_to_hub=True, private=True)
    model.config.note = "changed"
    model.save_pretrained(tmp_path / "elsewhere", push_to_hub=True, repo_id="tester/own", commit_message="Note it")
    assert hub.uploads[sent:] == ["config.json"] and repository.messages[-1] == "Note it"
    assert hub.files("tester/own")["README.md"].endswith(b"my own words\n")
    model.push_to_hub("tester/own", revision="v2", private=True)
    assert hub.files("tester/own", "v2") == hub.files("tester/own")


def test_of_several_rounds_the_last_is_pushed(hub, run_folder):
    for number in (2, 10):
        save_segmenter(run_folder / f"segmenter-{number}", seed=number)
    results = json.loads(json.dumps(RESULTS))
    results["recipe"]["self_training"] = {"rounds": 10}
    results["results"].append(RESULTS["results"][1] | {"result": "round 10", "of": "segmenter-10", "mean_iou": 0.75})
    (run_folder / "results.json").write_text(json.dumps(results))
    push_model(run_folder, "tester/pets")
    files = hub.files("tester/pets")
    assert files["model.safetensors"] == (run_folder / "segmenter-10" / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 0.75 and "10 rounds in all" in card.text


# what is refused


@pytest.mark.slow
def test_a_broken_connection_publishes_nothing(hub, wsss, run_folder):
    push_model(run_folder, "tester/pets")
    before = dict(hub.files("tester/pets"))
    save_segmenter(run_folder / "segmenter", seed=1)
    hub.cut_commits = True
    for repo_id in ("tester/pets", "tester/fresh"):
        code, out, err = wsss("push", run_folder, repo_id)
        assert code == 1 and out == ""
        assert err.startswith(f"error: {repo_id}: the connection to the Hub broke") and err.count("\n") == 1
    assert hub.files("tester/pets") == before
    assert set(hub.files("tester/fresh")) == {".gitattributes"}
    hub.cut_commits = False
    assert wsss("push", run_folder, "tester/pets")[0] == 0
    assert hub.files("tester/pets")["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize("repo_id", ["../pets", "tester/..", "/etc/passwd", "a/b/c", "tester/a--b", "tester/pets.git"])
def test_impossible_ids_are_refused_before_anything_is_sent(hub, wsss, run_folder, repo_id):
    code, _, err = wsss("push", run_folder, repo_id)
    assert code == 1 and err.startswith("error: expected the id of a repository")
    assert hub.requests == []


@pytest.mark.parametrize("branch", ["../main", "/v1", "a b", "v1.lock", "-v", "a//b", "v1."])
def test_impossible_branches_are_refused_before_anything_is_sent(hub, wsss, run_folder, branch):
    code, _, err = wsss("push", run_folder, "tester/pets", f"--branch={branch}")
    assert code == 1 and err.startswith("error: --branch: expected the name of a branch")
    assert hub.requests == []


def test_names_of_others_need_their_token(hub, wsss, run_folder, monkeypatch):
    code, _, err = wsss("push", run_folder, "somebody/pets")
    assert code == 1 and "somebody/pets: the Hub wants a token that may write there" in err
    monkeypatch.delenv("HF_TOKEN")
    for repo_id in ("tester/pets", "pets"):
        code, _, err = wsss("push", run_folder, repo_id)
        assert code == 1 and f"{repo_id}: the Hub wants a token" in err and err.count("\n") == 1
    assert not hub.repositories


def test_a_public_repository_does_not_become_private_in_silence(hub, wsss, run_folder):
    push_model(run_folder, "tester/pets")
    code, _, err = wsss("push", run_folder, "tester/pets", "--private")
    assert code == 1 and "tester/pets is public already" in err


def test_what_is_no_model_is_refused(hub, wsss, tmp_path):
    code, _, err = wsss("push", tmp_path, "tester/pets")
    assert code == 1 and f"{tmp_path}: expected a folder with config.json" in err
    assert hub.requests == []


def test_weights_that_do_not_fit_are_refused(hub, run_folder):
    weights = load_file(run_folder / "segmenter" / "model.safetensors")
    weights["stray"] = weights.pop(sorted(weights)[-1])
    save_file(weights, run_folder / "segmenter" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HubError, match="the weights do not fit the configuration"):
        push_model(run_folder, "tester/pets")
    assert not hub.repositories


@pytest.mark.parametrize("trick", ["link", "kind", "token", "late token"])
def test_only_files_of_a_model_are_sent(hub, tmp_path, trick):
    folder = tmp_path / "staged"
    folder.mkdir()
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    if trick == "link":
        (folder / "config.json").symlink_to(secret)
    elif trick == "kind":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    else:
        before = " " * (2**20 - 20 if trick == "late token" else 0)  # files are read in blocks
        (folder / "config.json").write_text(before + json.dumps({"token": TOKEN}))
    with pytest.raises(HubError, match="holds your Hub token" if "token" in trick else "expected a file of a model"):
        push_folder(folder, "tester/pets", "model", "no")
    assert not hub.repositories


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, RuntimeError])  # as Xet raises them
def test_what_the_storage_of_large_files_says_is_named(hub, tmp_path, monkeypatch, error):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(HfApi, "preupload_lfs_files", mock.Mock(side_effect=error("reset by peer")))
    with pytest.raises(HubError, match=r"tester/masks: the connection to the Hub broke \(reset by peer\)"):
        push_folder(tmp_path, "tester/masks", "dataset", "no", large=[tmp_path / "train.parquet"])


@pytest.mark.slow
def test_a_token_is_never_printed(hub, wsss, run_folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    answers = [wsss("push", run_folder, "tester/pets", "--token", TOKEN) for _ in range(2)]
    hub.cut_commits = True
    save_segmenter(run_folder / "segmenter", seed=1)
    answers.append(wsss("push", run_folder, "tester/pets", "--token", TOKEN))
    answers.append(wsss("push", run_folder, "tester/pets", "--token", f"{TOKEN}Wrong"))
    assert [code for code, _, _ in answers] == [0, 0, 1, 1]
    assert not any(TOKEN in out + err for _, out, err in answers)


# the card


def test_the_card_says_what_was_measured(hub, run_folder):
    push_model(run_folder, "tester/pets", licence="apache-2.0")
    card = ModelCard(hub.files("tester/pets")["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-segmentation" and card.data.model_name == "pets"
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures == {"mean_iou": 0.625, "pixel_accuracy": 0.8}
    assert {result.dataset_split for result in card.data.eval_results} == {"val"}
    for words in ("| the segmenter | val | 62.5 | 50.0–75.0 | 80.0 | 7 |", "| dog | 42.5 |", "weakest class is dog"):
        assert words in card.text
    for words in ("Flickr", "12 minutes", "2 CPU cores", "image tags only", "(gallery.png)", "AAAI 2021", "PAMR"):
        assert words in card.text
    command = re.search(r"```bash\n(wsss .*)\n```", card.text)[1]
    assert (
        command.split()
        == ("wsss run --data voc --root VOC2012 --classes cat,dog --recipe recipe.yaml --out runs/again").split()
    )


def test_the_figures_of_a_classifier_are_those_of_its_maps_alone(hub, run_folder):
    # The run's pseudo masks are refined, so another program would not get their figures from this model.
    push_model(run_folder / "cam", "tester/cam")
    card = ModelCard(hub.files("tester/cam")["README.md"].decode())
    assert not card.data.eval_results and "weakest class" not in card.text
    assert "| pseudo masks | train | 50.0 |" in card.text and "the maps alone were not measured" in card.text
    results = json.loads(json.dumps(RESULTS))
    results["results"].insert(0, RESULTS["results"][0] | {"result": "masks, plain", "mean_iou": 0.25, "of": "cam"})
    (run_folder / "results.json").write_text(json.dumps(results))
    push_model(run_folder / "cam", "tester/cam")
    card = ModelCard(hub.files("tester/cam")["README.md"].decode())
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures["Mean IoU (masks, plain)"] == 0.25 and "Mean IoU (pseudo masks)" not in figures
    assert "This model: masks, plain." in card.text and "refined with pamr" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"PASCAL VOC 2012"}


def test_the_upper_bound_does_not_pass_for_weakly_supervised(hub, run_folder):
    settings = {"stage": "train-segmenter", "mask_column": "mask", "data": {"source": "toy"}}
    (run_folder / "segmenter" / "recipe.yaml").write_text(yaml.safe_dump(settings))
    push_model(run_folder, "tester/pets")
    text = hub.files("tester/pets")["README.md"].decode()
    assert "trained on **true masks**" in text and "image tags only" not in text


CLAIM, NO_CLAIM = "It was trained with **image tags only**", "Nothing is recorded of the labels that it was trained"


@pytest.mark.parametrize(
    ("part", "record", "in_run", "claims"),
    [
        ("segmenter", {"stage": "train-segmenter", "mask_column": "pseudo_mask"}, True, True),
        ("segmenter", {"stage": "train-segmenter", "mask_column": "pseudo_mask"}, False, False),  # of whatever masks
        ("segmenter", None, True, False),  # a model that somebody put there
        ("segmenter", None, False, False),
        ("segmenter", {"stage": "wsss convert"}, False, False),
        ("cam", {"stage": "train-cam"}, True, True),
        ("cam", {"stage": "train-cam"}, False, True),  # which never reads a mask
        ("cam", {"stage": "train-refiner"}, False, False),
        ("cam", None, False, False),
    ],
)
def test_a_card_claims_tags_only_where_the_record_shows_it(hub, run_folder, part, record, in_run, claims):
    file = run_folder / part / "recipe.yaml"
    file.unlink() if record is None else file.write_text(yaml.safe_dump(record))
    if not in_run:
        (run_folder / "results.json").unlink()
    push_model(run_folder / part, "tester/pets")
    text = hub.files("tester/pets")["README.md"].decode()
    assert (CLAIM in text, NO_CLAIM in text) == (claims, not claims)
    assert ("Tags do not say where a class is" in text) == claims


def test_a_model_without_figures_claims_none(hub, run_folder):
    (run_folder / "results.json").unlink()
    push_model(run_folder, "tester/pets")
    files = hub.files("tester/pets")
    card = ModelCard(files["README.md"].decode())
    assert "Nothing was measured" in card.text and card.data.eval_results is None
    assert "results.json" not in files and "gallery.png" not in files


# loading

STRANGER = """
import sys
sys.path.append(sys.argv[1])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "wsss_hf":
            raise ModuleNotFoundError("wsss_hf is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import wsss_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("wsss_hf can be imported")

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, logging, pipeline

logging.set_verbosity_error()
logging.disable_progress_bar()
folder, wanted, first_commit = Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
photograph = str(folder / "photograph.png")
offline = sys.argv[5] == "offline"
result = {}


def outputs(model, processor):
    pixel_values = processor(images=[photograph], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.eval()(pixel_values).logits.contiguous()


def attempt(load):
    try:
        load()
    except (OSError, ValueError) as error:
        return str(error)


tensors = {}
for name, trust in wanted.items():
    options = {"trust_remote_code": True} if trust else {}
    model = AutoModelForSemanticSegmentation.from_pretrained(f"tester/{name}", **options)
    tensors[name] = outputs(model, AutoImageProcessor.from_pretrained(f"tester/{name}", **options))
    # The task of a library's model is on its card, which nobody can ask for offline.
    task = ("image-segmentation",) if offline and not trust else ()
    found = pipeline(*task, model=f"tester/{name}", **options)(photograph)
    result[name] = [[entry["label"], entry["mask"].histogram()[255]] for entry in found]
    if trust:
        weak = pipeline("weak-segmentation", model=f"tester/{name}", **options)(photograph, refine="pamr")
        result[name].append(weak["mask"].histogram())
old = AutoModelForSemanticSegmentation.from_pretrained("tester/pets", revision=first_commit, trust_remote_code=True)
tensors["pets of old"] = outputs(old, AutoImageProcessor.from_pretrained("tester/pets", trust_remote_code=True))
pinned = pipeline(model="tester/pets", revision=first_commit, trust_remote_code=True)
tensors["pinned pipeline"] = outputs(pinned.model, pinned.image_processor)
if not offline:
    load = AutoModelForSemanticSegmentation.from_pretrained
    result["wrong revision"] = attempt(lambda: load("tester/pets", revision="v9", trust_remote_code=True))
    result["private"] = attempt(lambda: load("tester/secret", trust_remote_code=True))
    result["untrusted"] = attempt(lambda: load("tester/pets", trust_remote_code=False))
    load("tester/own", trust_remote_code=True).save_pretrained(folder / "saved by a stranger")
    result["plain"] = type(AutoModel.from_pretrained("tester/own", trust_remote_code=True)).__name__
    tagger = pipeline("image-classification", model="tester/cam", trust_remote_code=True)
    result["tags"] = [entry["label"] for entry in tagger(photograph)]
save_file(tensors, folder / "outputs.safetensors")
(folder / "result.json").write_text(json.dumps(result))
"""


def stranger(folder, environment, wanted, first_commit, mode):
    (folder / "stranger.py").write_text(STRANGER)
    site_packages = Path(torch.__file__).parents[1]
    # -I: no environment variable and no folder adds to the path; -S: an editable installation neither.
    command = [
        sys.executable,
        "-I",
        "-S",
        "stranger.py",
        site_packages,
        folder,
        json.dumps(wanted),
        first_commit,
        mode,
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text()), load_file(folder / "outputs.safetensors")


@pytest.mark.slow
def test_a_stranger_gets_the_owners_outputs_bit_for_bit(hub, client_environment, run_folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC).save(tmp_path / "photograph.png")
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(SEGFORMER).save_pretrained(tmp_path / "segformer")
    WsssImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(tmp_path / "segformer")

    models = {"pets of old": (Segmenter, run_folder / "segmenter")}
    expected = {name: logits(kind, folder, tmp_path) for name, (kind, folder) in models.items()}
    first_commit = push_model(run_folder, "tester/pets").commit
    push_model(run_folder, "tester/secret", private=True)
    save_segmenter(run_folder / "segmenter", seed=1)
    push_model(run_folder, "tester/pets")
    push_model(run_folder / "cam", "tester/cam")
    sources = {"pets": (Segmenter, run_folder / "segmenter"), "cam": (CamClassifier, run_folder / "cam")}
    if has_segformers_processor:
        push_model(tmp_path / "segformer", "tester/segformer")
        WsssImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "segformer")  # as pushed
        sources["segformer"] = (SegformerForSemanticSegmentation, tmp_path / "segformer")
        assert not [name for name in hub.files("tester/segformer") if name.endswith(".py")]
        assert b"trust_remote_code" not in hub.files("tester/segformer")["README.md"]
    # Models that push themselves; they must be found as well as those of `wsss push`.
    Segmenter.from_pretrained(run_folder / "segmenter").push_to_hub("tester/own")
    refiner = MapRefiner(MapRefinerConfig(backbone_config=TINY, id2label={0: "cat", 1: "dog"}))
    refiner.save_pretrained(tmp_path / "refiner")
    refiner.push_to_hub("tester/refiner")
    sources |= {"own": (Segmenter, run_folder / "segmenter"), "refiner": (MapRefiner, tmp_path / "refiner")}
    expected |= {name: logits(kind, folder, tmp_path) for name, (kind, folder) in sources.items()}
    masks = {name: weak_histogram(folder, tmp_path) for name, (_, folder) in sources.items() if name != "segformer"}

    wanted = {name: name != "segformer" for name in sources}
    result, outputs = stranger(tmp_path, client_environment, wanted, first_commit, "online")
    expected["pinned pipeline"] = expected["pets of old"]
    assert outputs.keys() == expected.keys()
    for name in expected:
        assert torch.equal(outputs[name], expected[name]), name
    assert not torch.equal(outputs["pets of old"], outputs["pets"])
    assert {name: result[name].pop() for name in masks} == masks
    assert result["own"] == result["pets"]
    for name in sources.keys() & {"pets", "segformer"}:
        assert {label for label, _ in result[name]} <= set(NAMES.values())
        assert sum(pixels for _, pixels in result[name]) == 70 * 50
    assert "v9 is not a valid git identifier" in result["wrong revision"]
    assert "private" in result["private"] and "token" in result["private"]
    assert "trust_remote_code=True" in result["untrusted"]
    photograph = str(tmp_path / "photograph.png")
    assert result["plain"] == "Segmenter"
    assert result["tags"] == [
        e["label"] for e in pipeline("image-classification", str(run_folder / "cam"))(photograph)
    ]
    passed_on = {path.name for path in (tmp_path / "saved by a stranger").iterdir()}
    assert passed_on == set(hub.files("tester/own")) - {"README.md", ".gitattributes"}

    asked = len(hub.requests)
    offline = client_environment | {"HF_HUB_OFFLINE": "1"}
    again, outputs = stranger(tmp_path, offline, wanted, first_commit, "offline")
    assert len(hub.requests) == asked
    assert {name: again[name].pop() for name in masks} == masks
    assert all(again[name] == result[name] and torch.equal(outputs[name], expected[name]) for name in wanted)


def logits(kind, folder, tmp_path):
    pixel_values = AutoImageProcessor.from_pretrained(folder)(
        images=[str(tmp_path / "photograph.png")], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        return kind.from_pretrained(folder).eval()(pixel_values).logits


def weak_histogram(folder, tmp_path):
    return pipeline("weak-segmentation", str(folder))(str(tmp_path / "photograph.png"), refine="pamr")[
        "mask"
    ].histogram()


@pytest.mark.slow
def test_a_private_model_is_evaluated_at_its_revision(hub, wsss, run_folder, tmp_path, monkeypatch):
    for split in ("train", "val"):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        for name, picture in zip(("cat", "dog"), pixels, strict=True):
            Image.fromarray(picture).save(folder / f"{name}.png")
            Image.fromarray(picture[..., 0] % 3).save(folder / f"{name}_mask.png")
        (folder / "metadata.csv").write_text(
            "file_name,tags,mask\ncat.png,cat,cat_mask.png\ndog.png,dog,dog_mask.png\n"
        )
    push_model(run_folder, "tester/pets", private=True)
    save_segmenter(run_folder / "segmenter", seed=1)
    push_model(run_folder, "tester/pets", private=True, revision="tuned")
    monkeypatch.delenv("HF_TOKEN")
    command = ["evaluate", "--data", tmp_path / "photos", "--model", "tester/pets", "--quiet"]
    assert wsss(*command)[0] == 1
    with_access = [*command, "--token", TOKEN, "--cache-dir", tmp_path / "elsewhere"]
    figures = {}
    for revision in ("main", "tuned"):
        file = tmp_path / f"{revision}.json"
        code, _, err = wsss(*with_access, "--model-revision", revision, "--json", file)
        assert code == 0, err
        figures[revision] = json.loads(file.read_text())["results"][0]["iou"]
        assert TOKEN not in file.read_text()
    assert figures["main"] != figures["tuned"]
    assert list((tmp_path / "elsewhere").rglob("model.safetensors")) and not (tmp_path / "cache").exists()


# security


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickled_weights_are_never_opened(run_folder, name, tmp_path):
    folder = run_folder / "segmenter"
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "trap sprung",))

    torch.save({"weight": Trap()}, folder / name)
    words = r"no weights in safetensors; pickled ones .* are never opened here, `wsss convert`"
    with pytest.raises(ValueError, match=words):
        Segmenter.from_pretrained(folder)
    with pytest.raises(ValueError, match=words):
        Segmenter.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(ValueError, match=words):
        Segmenter.from_pretrained(folder / name, config=SegmenterConfig(backbone_config=TINY))
    with pytest.raises(ValueError, match=words):
        Segmenter.from_backbone(str(folder), backbone_config=TINY)
    with pytest.raises(ValueError, match=words):
        load_segmenter(str(folder), "cpu")
    assert not (tmp_path / "trap sprung").exists()
