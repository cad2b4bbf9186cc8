"""Stages on streams: shards that are read while a stage runs."""

import io
import itertools
import json
import os
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import (
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    concatenate_datasets,
    config,
    load_from_disk,
)
from safetensors.torch import load_file

from wsss_hf.cli.launch import prepare_libraries
from wsss_hf.cli.main import main
from wsss_hf.data import examples as module
from wsss_hf.data.examples import StreamedExamples
from wsss_hf.data.sources import load_data
from wsss_hf.data.streams import load_stream, sample_of
from wsss_hf.data.tagged import DataError, class_names, undecoded
from wsss_hf.data.toy import TOY_CLASSES
from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.recipes import RecipeError, load_recipe
from wsss_hf.stages import evaluate as evaluate_module
from wsss_hf.stages import make_masks as make_masks_module
from wsss_hf.stages import predict_masks as predict_masks_module
from wsss_hf.stages.evaluate import evaluate
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.run import run
from wsss_hf.stages.train_cam import train_cam
from wsss_hf.stages.train_segmenter import train_segmenter
from wsss_hf.training.loop import Training


@pytest.fixture(scope="module", autouse=True)
def no_sleep():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s for each iterator that is left
        yield


@pytest.fixture
def shards(toy_data, tmp_path, monkeypatch):
    """The 12 training images in four Parquet shards."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "shards").mkdir()
    for index in range(4):
        part = toy_data["train"].shard(4, index, contiguous=True)
        part.to_parquet(tmp_path / "shards" / f"train-{index:05d}-of-00004.parquet")
    return tmp_path / "shards"


def streamed(shards, process=0, processes=1):
    """Items that hold their rows' image ids and random numbers."""
    found = StreamedExamples(load_stream(shards)["train"], lambda *_: None)
    found.process, found.processes = process, processes
    found.example = lambda row, rng: (row["image_id"], rng.random())
    return found


def test_a_stream_has_our_columns_and_no_length(shards, toy_data):
    data = load_stream(shards, columns={"pseudo_mask": "mask"})
    rows = data["train"]
    assert isinstance(rows, IterableDataset) and class_names(rows) == class_names(toy_data)
    assert data.source == {"source": str(shards), "streaming": True, "columns": {"pseudo_mask": "mask"}}
    for ours, theirs in zip(rows, toy_data["train"], strict=True):
        assert ours["image_id"] == theirs["image_id"] and ours["tags"] == theirs["tags"]
        assert ours["image"]["bytes"] and ours["pseudo_mask"]["bytes"]


def test_names_and_multi_hot_tags_take_the_order_of_the_classes(tmp_path, toy_data):
    for name, tags, feature in (
        ("names", [["dog"], [], ["cat", "dog"]], List(Value("string"))),
        ("hot", [[0, 1], [0, 0], [1, 1]], List(Value("int8"))),
    ):
        rows = toy_data["train"].select(range(3)).remove_columns(["tags", "image_id"])
        rows.add_column("tags", tags, feature=feature).to_parquet(tmp_path / f"{name}.parquet")
        found = load_stream(tmp_path / f"{name}.parquet", classes=["cat", "dog"])["train"]
        assert [row["tags"] for row in found] == [[1], [], [0, 1]]
        with pytest.raises(DataError, match="expected --classes for a stream whose tags are List"):
            load_stream(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="row 'train_000000': tags: expected names from cat, got 'dog'"):
        list(load_stream(tmp_path / "names.parquet", classes=["cat"])["train"])


@pytest.mark.parametrize("processes", [1, 2, 3])  # whole shards, and every third row
def test_each_pass_gives_each_row_to_one_process(shards, toy_data, processes):
    ids, orders = toy_data["train"]["image_id"][:], []
    parts = [list(itertools.islice(streamed(shards, p, processes), 24 // processes)) for p in range(processes)]
    for number in range(2):
        half = 12 // processes
        found = [name for part in parts for name, _ in part[number * half : (number + 1) * half]]
        assert sorted(found) == sorted(ids)
        orders.append(found)
    assert orders[0] != orders[1] and orders[0] != ids
    assert len({value for part in parts for _, value in part}) == 24


def test_a_stream_goes_on_where_it_was(shards, monkeypatch):
    monkeypatch.setattr(module, "BUFFER", 4)
    whole = list(itertools.islice(streamed(shards), 30))
    rest = streamed(shards)
    rest.start = 17  # in the middle of the second pass
    assert list(itertools.islice(rest, 13)) == whole[17:]


def test_the_first_items_of_a_stream_are_always_the_same(shards, toy_data):
    found = streamed(shards).first(5)  # of two shards
    assert [name for name, _ in found] == toy_data["train"]["image_id"][:5]
    other = streamed(shards, process=1, processes=2)
    other.start = 3
    assert other.first(5) == other.first(5) == found and len(other.first(100)) == 12


def test_an_empty_stream_ends_in_a_line(shards, tmp_path, toy_data):
    toy_data["train"].select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="expected rows for each of 1 processes, got none"):
        next(iter(StreamedExamples(load_stream(tmp_path / "empty.parquet")["train"], lambda *_: None)))


@pytest.mark.slow
def test_a_classifier_learns_from_a_stream_and_goes_on_after_a_kill(shards, tiny_recipe, tmp_path, monkeypatch):
    data = load_stream(shards)
    with pytest.raises(RecipeError, match="train.steps: expected a number of steps for data that are streamed"):
        train_cam(data, tiny_recipe, tmp_path / "without")
    recipe = tiny_recipe.changed("cam.train.steps=5", "cam.train.save_steps=2", "cam.train.accumulate=2")
    whole = train_cam(data, recipe, tmp_path / "whole")
    assert len(whole.log) == 1 and np.isfinite(whole.log[0]["classification"])
    original = Training._update_weights

    def mortal(training):
        original(training)
        if training.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_update_weights", mortal)
    with pytest.raises(KeyboardInterrupt):
        train_cam(data, recipe, tmp_path / "broken")
    monkeypatch.setattr(Training, "_update_weights", original)
    again = train_cam(data, recipe, tmp_path / "broken")
    weights = [load_file(result / "model.safetensors") for result in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # It is known by the files it comes from.
    assert train_cam(load_stream(shards), recipe, tmp_path / "whole").record == whole.record
    with pytest.raises(RecipeError, match="batch_size: expected a multiple of 3 for data that are streamed"):
        train_cam(data, recipe.changed("cam.train.accumulate=3"), tmp_path / "uneven")


def test_a_segmenter_learns_from_a_stream(shards, tiny_recipe, tmp_path):
    recipe = tiny_recipe.changed("segmenter.train.steps=3")
    found = train_segmenter(load_stream(shards, columns={"pseudo_mask": "mask"}), recipe, tmp_path / "segmenter")
    assert found.log[-1]["background_factor"] > 0


# Labelling

QUICK = ["masks.scales=[1.0]", "masks.batch_size=4", "masks.background_threshold=auto"]
FIXED = "masks.background_threshold=0.3"
TINY_BACKBONE = {"model_type": "resnet", "layer_type": "basic", "depths": [1, 1], "hidden_sizes": [8, 16]}


def masks_by_id(data):
    return {row["image_id"]: row["pseudo_mask"]["bytes"] for row in undecoded(data["train"])}


@pytest.fixture(scope="module")
def wanted(toy_data, cam_folder, tmp_path_factory):
    """What labelling the rows as a data set gives, with the found threshold."""
    return make_masks(toy_data, cam_folder, load_recipe("default", QUICK), tmp_path_factory.mktemp("wanted") / "masks")


@pytest.fixture(scope="module")
def segmenter_folder(toy_data, tmp_path_factory):
    """A saved segmenter that has learnt nothing."""
    names = dict(enumerate(["background", *class_names(toy_data)]))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "segmenter"
    Segmenter(SegmenterConfig(backbone_config=TINY_BACKBONE, rates=[1], id2label=names)).save_pretrained(folder)
    WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}).save_pretrained(folder)
    return folder


@pytest.fixture
def mask_recipe():
    return load_recipe("default", [*QUICK, "masks.shard_size=2"])


@pytest.mark.parametrize("size", [2, 3, 100])  # of shards of three rows: parts, exactly one, less than one
def test_a_stream_gets_the_masks_of_the_same_rows(shards, wanted, cam_folder, mask_recipe, tmp_path, size):
    found = make_masks(
        load_stream(shards), cam_folder, mask_recipe.changed(f"masks.shard_size={size}"), tmp_path / "m"
    )
    assert found.summary == wanted.summary and found.summary["background_threshold"] > 0
    held = load_from_disk(str(found))
    assert held["train"].column_names == ["image_id", "tags", "pseudo_mask"]  # no copy of the images
    assert list(masks_by_id(held).items()) == list(masks_by_id(wanted.data).items())
    rows = found.data["train"]  # beside the images
    assert isinstance(rows, IterableDataset) and masks_by_id({"train": rows}) == masks_by_id(wanted.data)
    images = {row["image_id"]: row["image"]["bytes"] for row in undecoded(wanted.data["train"])}
    assert {row["image_id"]: row["image"]["bytes"] for row in rows} == images


def test_a_segmenter_learns_from_the_masks_of_a_stream(
    shards, toy_data, cam_folder, mask_recipe, tiny_recipe, tmp_path
):
    masks = make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks")
    recipe = tiny_recipe.changed("segmenter.train.steps=2")
    assert len(train_segmenter(masks.data, recipe, tmp_path / "segmenter").log) == 1
    with pytest.raises(DataError, match="the masks of a stream are read with --streaming"):
        load_data(tmp_path / "masks")
    with pytest.raises(DataError, match="masks: expected no classes, columns or separator beside the masks of"):
        load_stream(tmp_path / "masks", columns={"image_id": "name"})
    toy_data["val"].to_parquet(shards / "train-00004.parquet")
    with pytest.raises(DataError, match=f"row '{toy_data['val'][0]['image_id']}': expected a pseudo mask in .*masks"):
        list(load_stream(masks)["train"])


@pytest.fixture
def photos(toy_data, tmp_path, monkeypatch):
    """The 12 training images with metadata.csv, whose tags are separated by `|`."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, names = tmp_path / "photos", class_names(toy_data)
    (folder / "masks").mkdir(parents=True)
    lines = ["file_name,tags,mask"]
    for row in undecoded(toy_data["train"]):
        name = f"{row['image_id']}.png"
        (folder / name).write_bytes(row["image"]["bytes"])
        (folder / "masks" / name).write_bytes(row["mask"]["bytes"])
        lines.append(f"{name},{'|'.join(names[tag] for tag in row['tags'])},masks/{name}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_a_folder_of_photographs_is_streamed_as_it_is_loaded(photos, cam_folder, mask_recipe, tiny_recipe, tmp_path):
    options = {"classes": list(TOY_CLASSES), "separator": "|"}
    stream, loaded = load_stream(photos, **options), load_data(photos, **options)
    assert stream.source == {"source": str(photos), "streaming": True, "classes": list(TOY_CLASSES), "separator": "|"}
    assert isinstance(stream["train"], IterableDataset) and stream["train"].num_shards == 12
    assert list(stream["train"]) == list(undecoded(loaded["train"]))
    assert stream["train"].features == undecoded(loaded["train"]).features
    masks = make_masks(stream, cam_folder, mask_recipe.changed(FIXED), tmp_path / "masks")
    wanted = make_masks(loaded, cam_folder, mask_recipe.changed(FIXED), tmp_path / "wanted")
    assert masks_by_id(load_stream(str(masks))) == masks_by_id(wanted.data)
    assert len(train_segmenter(masks.data, tiny_recipe.changed("segmenter.train.steps=2"), tmp_path / "s").log) == 1


def test_a_folder_of_class_folders_is_streamed(photos, tmp_path):
    for split in ("train", "validation"):
        for name in ("cat", "background"):
            (tmp_path / "classes" / split / name).mkdir(parents=True)
            (tmp_path / "classes" / split / name / "a.png").write_bytes((photos / "train_00000.png").read_bytes())
    found, wanted = load_stream(tmp_path / "classes"), load_data(tmp_path / "classes")
    for split in ("train", "val"):
        assert list(found[split]) == list(undecoded(wanted[split]))
    with pytest.raises(DataError, match="revision: expected a Hub data set, got"):
        load_stream(tmp_path / "classes", revision="main")
    (tmp_path / "classes" / "train" / "cat" / "a.png").unlink()
    with pytest.raises(DataError, match="expected classes that training images have, got 'cat'"):
        load_stream(tmp_path / "classes")


def test_images_are_copied_on_request(shards, wanted, cam_folder, mask_recipe, tmp_path):
    found = make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks", embed_images=True)
    rows = load_from_disk(str(found))["train"]
    assert rows.features == {name: wanted.data["train"].features[name] for name in rows.features}
    assert undecoded(rows)[:] == undecoded(wanted.data["train"])[:]


def test_a_killed_labelling_of_a_stream_goes_on(shards, wanted, cam_folder, mask_recipe, tmp_path, labelled_rows):
    (seen, stop_at), ids = labelled_rows, list(masks_by_id(wanted.data))
    stop_at[0] = 7  # in the first shard's third row: shards of three rows are kept in parts of two and one
    with pytest.raises(KeyboardInterrupt):
        make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks")
    seen.clear()
    stop_at[0] = None
    parts = sorted((tmp_path / "masks.partial" / "shards").glob("*.parquet"))
    parts[1].write_bytes(b"damaged")
    found = make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks")
    assert seen == [ids[2], *ids[6:]] and masks_by_id(found.data) == masks_by_id(wanted.data)
    seen.clear()
    assert make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks").data and not seen


def test_finished_shards_are_not_opened(shards, cam_folder, mask_recipe, tmp_path, labelled_rows, monkeypatch):
    labelled_rows[1][0] = 7
    with pytest.raises(KeyboardInterrupt):
        make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks")
    opened, shard = [], IterableDataset.shard
    monkeypatch.setattr(IterableDataset, "shard", lambda rows, *of: opened.append(of[1]) or shard(rows, *of))
    labelled_rows[1][0] = None
    make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks")
    assert opened == [0, 1, 2, 3, 2, 3]  # for the thresholds, then for what is left


@pytest.mark.slow
def test_other_shards_make_the_masks_again(shards, cam_folder, mask_recipe, tmp_path, labelled_rows):
    make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks")
    labelled_rows[0].clear()
    os.utime(next(shards.iterdir()), ns=(0, 0))
    make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks")
    assert len(labelled_rows[0]) == 12


def test_rows_that_no_image_id_tells_apart_are_not_labelled(toy_data, cam_folder, mask_recipe, tmp_path, no_training):
    for index in range(2):
        part = toy_data["train"].remove_columns("image_id").shard(2, index)
        part.to_parquet(tmp_path / "shards" / f"train-{index}.parquet")
    with pytest.raises(DataError, match="expected an image_id that no other row has, got 'train_000000' twice"):
        make_masks(load_stream(tmp_path / "shards"), cam_folder, mask_recipe, tmp_path / "masks")
    with pytest.raises(DataError, match="expected a stream that load_stream opened, got a IterableDatasetDict"):
        plain = IterableDatasetDict({"train": load_stream(tmp_path / "shards")["train"]})
        make_masks(plain, cam_folder, mask_recipe, tmp_path / "masks")


def test_an_empty_shard_is_no_obstacle(shards, wanted, toy_data, cam_folder, mask_recipe, tmp_path):
    toy_data["train"].select([]).to_parquet(shards / "train-00001a-of-00004.parquet")
    found = make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "masks")
    assert masks_by_id(found.data) == masks_by_id(wanted.data)
    for file in shards.iterdir():
        toy_data["train"].select([]).to_parquet(file)
    with pytest.raises(DataError, match="stream: expected rows, got none"):
        make_masks(load_stream(shards), cam_folder, mask_recipe, tmp_path / "none")


def test_saliency_that_is_missing_later_is_named(shards, toy_data, cam_folder, mask_recipe, tmp_path):
    rows = toy_data["train"].add_column("saliency", undecoded(toy_data["train"])["mask"][:], feature=Image())
    late = undecoded(rows).map(lambda row, n: {"saliency": row["saliency"] if n < 10 else None}, with_indices=True)
    (tmp_path / "one").mkdir()
    for column in ("image", "mask", "saliency"):
        late = late.cast_column(column, Image())
    late.to_parquet(tmp_path / "one" / "train.parquet")
    recipe = mask_recipe.changed("masks.seeds=drs", FIXED)
    with pytest.raises(DataError, match="'saliency': expected a map of every image for masks.seeds: drs"):
        make_masks(load_stream(tmp_path / "one"), cam_folder, recipe, tmp_path / "masks")


# Evaluation


@pytest.mark.slow
def test_figures_of_a_stream_are_those_of_the_same_rows(
    shards, toy_data, wanted, cam_folder, mask_recipe, segmenter_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate_module, "WINDOW", 2)
    for index in range(2):
        part = toy_data["val"].shard(2, index, contiguous=True)
        part.to_parquet(shards / f"validation-{index:05d}-of-00002.parquet")
    data, recipe = load_stream(shards), mask_recipe.changed("evaluation.batch_size=4")
    for options in ({"cam": cam_folder}, {"segmenter": segmenter_folder}):
        found, expected = evaluate(data, recipe, **options), evaluate(toy_data, recipe, **options)
        assert found.results == expected.results and found.results[0]["num_images"] in (4, 12)
        assert found.data == data.source
    masks = make_masks(data, cam_folder, mask_recipe, tmp_path / "masks")
    figures = [evaluate(of.data).results[0] | {"result": ""} for of in (masks, wanted)]
    assert figures[0] == figures[1] and figures[0]["num_images"] == 12
    models = {"segmenter": segmenter_folder, "against": segmenter_folder}
    gaps = [evaluate(of, recipe, **models).gap for of in (data, toy_data)]
    assert gaps[0] == gaps[1]


def test_label_maps_of_a_stream_are_those_of_the_same_rows(shards, toy_data, segmenter_folder, tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(predict_masks_module, "WINDOW", 2)
    found = {}
    for name, data in (("stream", load_stream(shards)), ("rows", toy_data)):
        out, coco = tmp_path / name, tmp_path / f"{name}.json"
        figures = evaluate(data, segmenter=segmenter_folder, split="train", save_masks=out, export_coco=coco)
        found[name] = figures.results, coco.read_bytes(), {file.name: file.read_bytes() for file in out.iterdir()}
    assert found["stream"] == found["rows"] and len(found["rows"][2]) == 12
    assert not list(tmp_path.glob("*.partial"))


def test_label_maps_of_a_stream_need_rows_and_files_of_their_own(shards, toy_data, segmenter_folder, tmp_path):
    toy_data["train"].remove_columns("mask").to_parquet(tmp_path / "plain.parquet")
    data = load_stream(tmp_path / "plain.parquet")
    evaluate(data, segmenter=segmenter_folder, split="train", save_masks=tmp_path / "maps")  # nothing to measure on
    assert len(list((tmp_path / "maps").iterdir())) == 12
    toy_data["train"].select([0]).to_parquet(shards / "train-00004-of-00004.parquet")
    options = {"segmenter": segmenter_folder, "split": "train", "save_masks": tmp_path / "none"}
    with pytest.raises(DataError, match="expected a file of its own, got .*.png of row"):
        evaluate(load_stream(shards), **options)
    toy_data["train"].select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="label maps: expected rows to make them of, got none"):
        evaluate(load_stream(tmp_path / "empty.parquet"), **options)
    assert not (tmp_path / "none").exists()


def test_a_stream_without_true_masks_is_said(shards, toy_data, cam_folder, mask_recipe, tmp_path):
    toy_data["train"].remove_columns("mask").to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(DataError, match="split 'train': expected true masks to evaluate on, and no row has one"):
        evaluate(load_stream(tmp_path / "plain.parquet"), mask_recipe, cam=cam_folder)
    empty = undecoded(toy_data["train"]).map(lambda row: {"mask": None}).cast_column("image", Image())
    empty.cast_column("mask", Image()).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="column 'mask': expected masks to evaluate on, and no row has one"):
        evaluate(load_stream(tmp_path / "empty.parquet"), mask_recipe.changed(FIXED), cam=cam_folder)


def test_commands_label_and_evaluate_streams(shards, wanted, cam_folder, tmp_path, capsys):
    changes = list(itertools.chain.from_iterable(("--set", change) for change in QUICK))
    shared = ["--streaming", "--quiet", "--recipe", "default", *changes]
    for command in (
        [
            "make-masks",
            "--data",
            shards,
            "--cam",
            cam_folder,
            "--out",
            tmp_path / "m",
            "--export-voc",
            tmp_path / "voc",
        ],
        ["evaluate", "--data", tmp_path / "m", "--json", tmp_path / "figures.json"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, command), *shared])
        assert not ended.value.code, capsys.readouterr().err
    assert masks_by_id(load_from_disk(str(tmp_path / "m"))) == masks_by_id(wanted.data)
    assert len(list((tmp_path / "voc" / "SegmentationClass").iterdir())) == 12
    assert json.loads((tmp_path / "figures.json").read_text())["results"][0]["num_images"] == 12
    with pytest.raises(SystemExit):
        main(["evaluate", "--data", str(shards), *shared, "--model", "m", "--save-masks", str(tmp_path / "s")])
    assert "error: --split: expected train, got val" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_stream(shards, toy_data, tiny_recipe, tmp_path, no_training, monkeypatch):
    toy_data["val"].to_parquet(shards / "validation-00000-of-00001.parquet")
    data, recipe = load_stream(shards), tiny_recipe.changed(*QUICK, "cam.train.steps=3")
    for changes, message in (
        ([], "segmenter.train.steps: expected a number of steps for data that are streamed, got 0"),
        (["self_training.rounds=2"], "expected data that are not streamed for self_training.rounds above 1"),
        (["masks.refine=[walk]"], "expected data that are not streamed for a walk without a model in masks.refine"),
        (["refiner.use=true"], "expected data that are not streamed for refiner.use"),
    ):
        with pytest.raises(RecipeError, match=message):
            run(data, recipe.changed(*changes), tmp_path / "refused")
    monkeypatch.undo()
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    result = run(data, recipe.changed("segmenter.train.steps=3"), tmp_path / "run")
    assert [(row["split"], row["num_images"]) for row in result.results] == [("train", 12), ("val", 4)]
    assert (tmp_path / "run" / "report.html").read_text().count(toy_data["val"]["image_id"][0])
    assert load_from_disk(str(result.masks))["train"].column_names == ["image_id", "tags", "pseudo_mask"]
    figures = evaluate(data, recipe, segmenter=result.segmenter).results[0]
    assert figures["iou"] == result.results[1]["iou"]


# What is wrong with a stream


def with_tags(rows, tags, file):
    """Rows as Parquet with any numbers as tags, which the library would not write."""
    table = rows.data.table.combine_chunks()
    place = table.schema.get_field_index("tags")
    values = pa.array(tags, table.schema.field("tags").type)
    pq.write_table(table.set_column(place, table.schema.field("tags"), values), file)
    return file


@pytest.mark.parametrize("wrong", [None, [8], [-1], [0, None]])
def test_tags_that_are_no_class_name_their_row(toy_data, tmp_path, wrong):
    tags = [wrong if number == 5 else value for number, value in enumerate(toy_data["train"]["tags"])]
    file = with_tags(toy_data["train"], tags, tmp_path / "tags.parquet")
    message = f"tags.parquet: row 'train_00005': tags: expected class indices 0..7, got {wrong}"
    with pytest.raises(DataError, match=re.escape(message)):
        list(load_stream(file)["train"])


def test_one_image_id_far_from_the_other_is_found_before_the_masks_have_a_name(
    shards, toy_data, cam_folder, mask_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(make_masks_module, "sample_of", lambda rows: sample_of(rows, 4))
    concatenate_datasets([toy_data["val"], toy_data["train"].select([1])]).to_parquet(shards / "train-00004.parquet")
    with pytest.raises(DataError, match="expected an image_id that no other row has, got 'train_00001' twice"):
        make_masks(load_stream(shards), cam_folder, mask_recipe.changed(FIXED), tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def tar_of(rows, file):
    tag = class_names(rows)[0].encode()
    with tarfile.open(file, "w") as shard:
        for row in undecoded(rows):
            contents = {"png": row["image"]["bytes"], "mask.png": row["mask"]["bytes"], "txt": tag}
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{row['image_id']}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_damaged_shard_ends_every_stage_in_a_line(
    shards, toy_data, cam_folder, segmenter_folder, mask_recipe, tiny_recipe, tmp_path, kind
):
    options = {}
    if kind == "tar":
        options = {"columns": {"image": "png", "mask": "mask.png", "tags": "txt"}, "classes": class_names(toy_data)}
        for file in shards.iterdir():
            file.unlink()
        for number in range(2):
            tar_of(toy_data["train"].shard(2, number), shards / f"train-{number}.tar")
    data = load_stream(shards, **options)  # a tar file that is damaged already is named here
    damaged = max(shards.iterdir())
    content = bytearray(damaged.read_bytes())
    if kind == "tar":
        del content[len(content) // 2 :]
    else:  # whose end tells where everything is
        content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    damaged.write_bytes(content)
    for stage in (
        lambda: make_masks(data, cam_folder, mask_recipe.changed(FIXED), tmp_path / "masks"),
        lambda: evaluate(data, segmenter=segmenter_folder, split="train"),
        lambda: train_cam(data, tiny_recipe.changed("cam.train.steps=8"), tmp_path / "cam"),
    ):
        with pytest.raises(DataError, match="stream: expected shards that can be read, got one that can't be"):
            stage()
    for file in shards.iterdir():
        file.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DataError, match="shards" if kind == "tar" else "train-00000.*: expected a Parquet file"):
        list(load_stream(shards, **options)["train"])


def test_columns_that_are_not_there_or_hold_no_images_are_said_at_once(shards, tmp_path):
    for columns, message in (
        ({"masks": "mask"}, "columns: expected one of image_id, image, tags, mask, .*, got 'masks'"),
        ({"mask": "truth"}, "columns: expected a column of .*, image_id, image, tags, mask, got 'truth'"),
        ({"mask": "tags"}, r"column 'tags': expected images \(datasets.Image\), got List"),
        ({"image": "image_id"}, r"column 'image_id': expected images \(datasets.Image\), got Value"),
    ):
        with pytest.raises(DataError, match=message):
            load_stream(shards, columns=columns)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.csv").write_text("image,tags\na.png,cat\n")
    with pytest.raises(DataError, match="texts: expected either metadata.csv .*, got none of these"):
        load_stream(tmp_path / "texts")
    with pytest.raises(DataError, match="columns: expected a column of .*texts, image, got 'tags'"):
        load_stream(tmp_path / "texts", columns={"tags": "tags"})


@pytest.mark.slow
def test_a_broken_image_in_a_worker_is_one_line(shards, toy_data, tiny_settings, tmp_path, capsys):
    rows = undecoded(toy_data["train"])
    cut = {"bytes": rows[0]["image"]["bytes"][:200], "path": None}
    broken = rows.map(lambda row, n: {"image": cut if n == 5 else row["image"]}, with_indices=True)
    for column in ("image", "mask"):
        broken = broken.cast_column(column, Image())
    broken.to_parquet(tmp_path / "broken.parquet")
    changes = [*tiny_settings, "cam.train.steps=3", "cam.train.workers=1"]
    options = ["--streaming", "--quiet", *itertools.chain.from_iterable(("--set", change) for change in changes)]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train-cam", "--data", str(tmp_path / "broken.parquet"), "--out", str(tmp_path / "cam"), *options])
    said = "row 'train_00005', column image: expected an image, got a file that can't be decoded"
    assert capsys.readouterr().err.startswith(f"error: {said}")


# Two processes


@pytest.mark.slow
def test_two_processes_share_a_stream(
    shards,
    wanted,
    toy_data,
    cam_folder,
    mask_recipe,
    segmenter_folder,
    tmp_path,
    tiny_settings,
    labelled_rows,
    in_processes,
    monkeypatch,
):
    toy_data["train"].to_parquet(tmp_path / "one.parquet")
    settings = [*tiny_settings, *QUICK, "masks.shard_size=2", "cam.train.steps=3", "cam.train.workers=0"]
    recipe = load_recipe("default", settings)
    labelled_rows[1][0] = 7
    with pytest.raises(KeyboardInterrupt):  # what one process has begun two go on with
        make_masks(load_stream(shards), cam_folder, recipe, tmp_path / "shards-masks")
    labelled_rows[1][0] = None
    example = StreamedExamples.example

    def work():
        prepare_libraries(True)
        seen, figures = {}, {}
        for source in ("shards", "one.parquet"):
            seen[source] = []

            def noted(examples, row, rng, ids=seen[source]):
                ids.append(row["image_id"])
                return example(examples, row, rng)

            monkeypatch.setattr(StreamedExamples, "example", noted)
            data = load_stream(tmp_path / source)
            make_masks(data, cam_folder, recipe, tmp_path / f"{source}-masks")
            found = [evaluate(data, recipe, cam=cam_folder)]
            found.append(evaluate(data, recipe, segmenter=segmenter_folder, split="train"))
            saved = {"save_masks": tmp_path / f"{source}-maps", "export_coco": tmp_path / f"{source}-coco.json"}
            found.append(evaluate(data, recipe, segmenter=segmenter_folder, split="train", **saved))
            train_cam(data, recipe, tmp_path / f"{source}-cam")
            figures[source] = [one.results for one in found]
        return seen, figures

    (first, made), (second, _) = in_processes(work)
    models = {"cam": cam_folder}, {"segmenter": segmenter_folder, "split": "train"}
    saved = {"save_masks": tmp_path / "maps", "export_coco": tmp_path / "coco.json"}
    models += ({**models[1], **saved},)
    figures = [evaluate(toy_data, recipe, **options).results for options in models]
    for source in ("shards", "one.parquet"):  # two shards for each process, and one for both
        masks = masks_by_id(load_from_disk(str(tmp_path / f"{source}-masks")))
        assert list(masks.items()) == list(masks_by_id(wanted.data).items())
        assert made[source] == figures
        assert (tmp_path / f"{source}-coco.json").read_text() == (tmp_path / "coco.json").read_text()
        for file in (tmp_path / "maps").iterdir():
            assert (tmp_path / f"{source}-maps" / file.name).read_bytes() == file.read_bytes()
        assert len(first[source]) == len(second[source]) == 6 and {*first[source], *second[source]} == masks.keys()


def test_a_process_without_rows_ends_a_training_in_a_line(toy_data, tmp_path, tiny_settings, in_processes, capfd):
    (tmp_path / "half").mkdir()
    for index, rows in enumerate([range(4), range(0)]):
        toy_data["train"].select(rows).to_parquet(tmp_path / "half" / f"train-{index}.parquet")
    changes = itertools.chain.from_iterable(("--set", change) for change in (*tiny_settings, "cam.train.steps=3"))
    command = ["train-cam", "--data", tmp_path / "half", "--streaming", "--quiet", "--out", tmp_path / "cam", *changes]
    ended = in_processes(lambda: main(list(map(str, command))))
    assert all(error.code for error in ended)
    assert "stream: expected rows for each of 2 processes, got none for one" in capfd.readouterr().err


def test_other_stages_and_options_refuse_streams_in_one_line(shards, tmp_path, capsys):
    for arguments, message in (
        (
            ["train-affinity", "--cam", "cam"],
            "--streaming: expected one of run, train-cam, make-masks, train-segmenter, evaluate, got train-affinity",
        ),
        (["train-cam", "--limit", "3"], "--streaming: expected no --limit beside it"),
        (["train-cam", "--separator", "|"], "separator: expected a directory of tagged images, got"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--data", str(shards), "--streaming", "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
