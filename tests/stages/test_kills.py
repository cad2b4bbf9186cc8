"""Every stage, killed before each single file operation and started again, gives what the unbroken one gives."""

import json
import multiprocessing
import os
import shutil
import signal
from functools import partial

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Value, load_from_disk
from kills import Process, every_kill, running
from safetensors.torch import load_file

from wsss_hf.data.tagged import undecoded
from wsss_hf.data.toy import make_toy
from wsss_hf.recipes import Recipe
from wsss_hf.stages.cache import Record, StageOutput, write_atomically
from wsss_hf.stages.compare import compare
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.relabel import relabel
from wsss_hf.stages.run import run
from wsss_hf.stages.shards import compute_shards
from wsss_hf.stages.train_affinity import train_affinity
from wsss_hf.stages.train_cam import train_cam
from wsss_hf.stages.train_refiner import train_refiner
from wsss_hf.stages.train_segmenter import train_segmenter

VOLATILE = {"minutes", "images_per_second", "seconds_per_step", "label_seconds_per_image", "memory_gb"}


def without_times(values):
    if isinstance(values, dict):
        return {name: without_times(value) for name, value in values.items() if name not in VOLATILE}
    return [without_times(value) for value in values] if isinstance(values, list) else values


def contents(folder):
    """What all files below a folder say, bit for bit but for how long it took; the names are those of all files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "a folder"
        elif path.suffix == ".json" and path.name != "state.json":
            found[name] = without_times(json.loads(path.read_text().replace(str(folder), "OUT")))
        elif path.suffix == ".jsonl":
            found[name] = without_times([json.loads(line) for line in path.read_text().splitlines()])
        elif path.suffix == ".yaml":
            found[name] = without_times(yaml.safe_load(path.read_text().replace(str(folder), "OUT")))
        elif path.suffix == ".safetensors":
            found[name] = {key: value.numpy().tobytes() for key, value in load_file(path).items()}
        elif path.name == "dataset_info.json" or path.suffix == ".arrow":
            continue
        elif path.name == "dataset_dict.json":
            found[name] = path.read_bytes()
        elif path.suffix in (".html", ".md"):
            found[name] = "a page"
        else:
            found[name] = path.read_bytes() if path.name != "state.json" else "state"
    for path in folder.rglob("dataset_dict.json"):
        rows = load_from_disk(str(path.parent))
        found[f"{path.relative_to(folder)}, rows"] = {split: undecoded(part)[:] for split, part in rows.items()}
    return found


def all_resume(tmp_path, work, prepare=lambda folder: None, every=1):
    """Kill `work(folder)` everywhere, or before each so-manieth file operation; how many kills there were."""
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    prepare(unbroken)
    work(unbroken)
    wanted, kills = contents(unbroken), 0
    (tmp_path / "killed").mkdir()
    for operation, folder in every_kill(tmp_path / "killed", work, prepare, every):
        kills += 1
        work(folder)
        found = contents(folder)
        assert found.keys() == wanted.keys(), operation
        for name, value in wanted.items():
            assert found[name] == value, (operation, name)
        work(folder)
        assert contents(folder) == found, operation  # done before
        shutil.rmtree(folder)
    return kills


# A stage that only writes


FEATURES = Features({"square": Value("int64")})


def write_stage(out, data="a1", shards=True):
    output = StageOutput(out / "cam", Record("train-cam", 1, {"seed": 0}, {"data": data}))
    if output.done:
        return
    with output.working() as folder:
        if shards:
            rows = Dataset.from_dict({"number": [1, 2, 3]})
            compute_shards(squares, rows, ["1", "2", "3"], FEATURES, folder / "shards", 2, "squares", data)
        write_atomically(folder / "checkpoint", data)
        result = folder / "result"
        result.mkdir()
        (result / "numbers.json").write_text(json.dumps([data, 1, 4, 9]))
        output.finish(result)


def squares(rows):
    for index, row in enumerate(rows):
        yield index, {"square": row["number"] ** 2}


@pytest.mark.slow
def test_a_stage_that_is_killed_goes_on(tmp_path):
    assert all_resume(tmp_path, write_stage) > 40


def test_a_stage_that_is_killed_while_it_replaces_a_result_goes_on(tmp_path):
    replaced = partial(write_stage, data="old", shards=False)
    assert all_resume(tmp_path, partial(write_stage, shards=False), replaced) > 30


def test_a_stage_that_is_killed_takes_other_data_the_next_time(tmp_path):
    for operation, folder in every_kill(tmp_path, partial(write_stage, shards=False)):
        write_stage(folder, "b2")
        assert json.loads((folder / "cam" / "numbers.json").read_text()) == ["b2", 1, 4, 9], operation
        assert [path.name for path in folder.iterdir()] == ["cam"], operation


# The stages


BACKBONE = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 4,
    "hidden_sizes": [4, 6],
    "depths": [1, 1],
}
SETTINGS = [
    "image.size=32",
    f"cam.backbone_config={BACKBONE}",
    "cam.train.epochs=3",
    "cam.train.batch_size=2",
    "refiner.use=true",
    "refiner.train.epochs=2",
    "refiner.train.batch_size=2",
    "refiner.scales=[1.0]",
    "masks.scales=[1.0]",
    "masks.shard_size=2",
    "masks.keep=2",
    "masks.refine=[]",
    "affinity.refine=[]",
    "affinity.from_cam=true",
    "affinity.radius=2",
    "affinity.background_threshold=0.5",
    "affinity.train.epochs=2",
    "affinity.train.batch_size=2",
    f"segmenter.backbone_config={BACKBONE}",
    "segmenter.train.epochs=2",
    "segmenter.train.batch_size=2",
    "self_training.scales=[1.0]",
    "self_training.refine=[]",
    "evaluation.examples=2",
    "evaluation.scales=[1.0]",
    "evaluation.refine=[]",
]


@pytest.fixture(scope="module")
def data():
    return make_toy(num_train=4, num_val=2, image_size=32)


@pytest.fixture(scope="module")
def recipe():
    return Recipe.load("default", SETTINGS)


@pytest.fixture(scope="module")
def finished(data, recipe, tmp_path_factory):
    """A whole run, whose parts the stages after them are given."""
    return run(data, recipe, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("WSSS_QUIET", "1")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


STAGES = {
    "train-cam": lambda data, recipe, done, out: train_cam(data, recipe, out / "cam"),
    "train-refiner": lambda data, recipe, done, out: train_refiner(data, done.cam, recipe, out / "refiner"),
    "train-affinity": lambda data, recipe, done, out: train_affinity(data, done.cam, recipe, out / "affinity"),
    "make-masks": lambda data, recipe, done, out: make_masks(data, done.refiner, recipe, out / "masks"),
    "train-segmenter": lambda data, recipe, done, out: train_segmenter(done.masks.data, recipe, out / "segmenter"),
    "relabel": lambda data, recipe, done, out: relabel(done.masks.data, done.segmenter, recipe, out / "masks-2"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("every", "count"), [(31, 0), pytest.param(1, 30, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_goes_on_after_any_kill(tmp_path, data, recipe, finished, stage, every, count):
    assert all_resume(tmp_path, lambda out: STAGES[stage](data, recipe, finished, out), every=every) > count


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_the_report_is_written_after_any_kill(tmp_path, data, recipe, finished):
    def stages_are_done(out):
        shutil.copytree(finished.folder, out / "run")
        for name in ("results.json", "report.html", "gallery.png"):
            (out / "run" / name).unlink()

    assert all_resume(tmp_path, lambda out: run(data, recipe, out / "run"), stages_are_done) > 10


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_comparison_goes_on_after_any_kill(tmp_path):
    """Of two rows that share a classifier."""
    changes = [*SETTINGS, "toy.num_train=4", "toy.num_val=2", "toy.image_size=32", "cam.train.epochs=1"]
    plan = {"recipe": "default", "set": [*changes, "refiner.use=false"], "seeds": [0], "data": {"source": "toy"}}
    plan["rows"] = {"plain": None, "strict": {"masks.background_threshold": 0.6}}
    assert all_resume(tmp_path, lambda out: compare(plan, out / "compared", jobs=1)) > 60


def die_for_real(folder, at, data, recipe):
    process = Process(folder, at)
    process.end = lambda: os.kill(os.getpid(), signal.SIGKILL)
    running.append(process)
    train_cam(data, recipe, folder / "cam")


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 36, *(pytest.param(at, marks=pytest.mark.exhaustive) for at in (12, 24, 48, 60))])
def test_a_process_that_is_killed_goes_on(tmp_path, data, recipe, finished, at):
    killed = multiprocessing.get_context("fork").Process(target=die_for_real, args=(tmp_path, at, data, recipe))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL and not (tmp_path / "cam" / "model.safetensors").exists()
    train_cam(data, recipe, tmp_path / "cam")
    assert [path.name for path in tmp_path.iterdir()] == ["cam"]
    wanted = load_file(finished.cam / "model.safetensors")
    found = load_file(tmp_path / "cam" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
