import json

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from wsss_hf import MapRefiner, Segmenter, SegmenterConfig, WsssImageProcessor
from wsss_hf.data.batches import batches_by_size
from wsss_hf.data.tagged import class_names, decode_gray
from wsss_hf.inference.cam_maps import localize
from wsss_hf.inference.load import load_labeler
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.options import OptionError
from wsss_hf.recipes import load_recipe
from wsss_hf.stages import train_refiner as module
from wsss_hf.stages.fingerprint import model_fingerprint
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.run import run
from wsss_hf.stages.train_refiner import train_refiner


@pytest.fixture
def recipe(tiny_recipe):
    tiny_recipe.refiner.batch_size = 4
    vars(tiny_recipe.refiner.train).update({"epochs": 2, "batch_size": 4})
    return tiny_recipe


def test_stored_maps_are_the_maximum_over_the_scales_one_for_each_tag(
    toy_data, cam_folder, recipe, tmp_path, monkeypatch
):
    rows, seen = toy_data["train"], []

    def watched(accelerator, model, processor, rows, *arguments, **options):
        seen.append(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_model", watched)
    with pytest.raises(KeyboardInterrupt):
        train_refiner(toy_data, cam_folder, recipe, tmp_path / "refiner")
    stored = [[decode_gray({"bytes": png}, "map") for png in pngs] for pngs in seen[0]["localization_maps"]]
    model, processor = load_labeler(str(cam_folder), "cpu")
    (batch,) = batches_by_size(rows.select([3]), processor, 1)
    maps, _ = localize(model, batch.pixel_values, batch.tags, (12, 12), (0.8, 1.0, 1.2), flip=False, fusion="max")
    assert [len(maps) for maps in stored] == [len(tags) for tags in rows["tags"]]
    order = np.argsort(np.argsort(rows[3]["tags"]))  # localize goes by class
    maps = np.where(np.arange(len(maps))[:, None, None] == maps.numpy().argmax(0), maps.numpy(), 0)
    for position, values in zip(order, stored[3], strict=True):
        assert np.abs(values - 255 * maps[position]).max() <= 0.51


def test_targets_keep_only_the_strongest_class_of_a_pixel():
    maps = torch.tensor([[[[0.9, 0.2, 0.0, 0.5]], [[0.8, 0.3, 0.0, 0.5]], [[0.1, 0.1, 0.0, 0.0]]]])
    expected = torch.tensor([[[[0.9, 0.0, 0.0, 0.5]], [[0.0, 0.3, 0.0, 0.5]], [[0.0, 0.0, 0.0, 0.0]]]])
    assert torch.equal(module._strongest(maps), expected)


@pytest.mark.slow
def test_a_refiner_learns_the_maps_of_the_classifier(toy_data, cam_folder, recipe, tmp_path):
    vars(recipe.refiner.train).update({"epochs": 20, "lr": 3e-3, "freeze_batch_norm": False})
    vars(recipe.refiner.train).update({"scale": [1.0, 1.0], "color_jitter": 0.0})
    out = train_refiner(toy_data, cam_folder, recipe, tmp_path / "refiner")
    losses = [record["refinement"] for record in json.loads((out / "training_log.json").read_text())]
    assert losses[-1] < 0.7 * losses[0]
    model = MapRefiner.from_pretrained(out)
    assert [model.config.id2label[c] for c in range(8)] == class_names(toy_data)
    assert model.backbone.strides[-1] == 16 and model.config.methods == {}
    assert WsssImageProcessor.from_pretrained(out).size["shortest_edge"] == 48
    assert [path.name for path in tmp_path.iterdir()] == ["refiner"]  # the maps are gone
    model, processor = load_labeler(str(out), "cpu")
    assert isinstance(model, MapRefiner)
    masks = load_from_disk(str(make_masks(toy_data, out, recipe, tmp_path / "masks")))
    assert len(np.unique(np.stack(masks["train"]["pseudo_mask"]))) > 2


def test_true_masks_are_never_read(toy_data, poisoned_data, cam_folder, recipe, tmp_path):
    first, second = (
        train_refiner(data, cam_folder, recipe, tmp_path / name)
        for name, data in (("clean", toy_data), ("poisoned", poisoned_data))
    )
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_a_killed_stage_goes_on_where_it_was(toy_data, cam_folder, recipe, tmp_path, monkeypatch):
    unbroken = train_refiner(toy_data, cam_folder, recipe, tmp_path / "unbroken")
    forward, calls = MapRefiner.forward, []

    def mortal(self, *args, **kwargs):
        calls.append(self.progress)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MapRefiner, "forward", mortal)
    with pytest.raises(KeyboardInterrupt):
        train_refiner(toy_data, cam_folder, recipe, tmp_path / "broken")
    monkeypatch.setattr(module, "localize", None)  # the maps are there
    out = train_refiner(toy_data, cam_folder, recipe, tmp_path / "broken")
    assert calls[5:] == pytest.approx([3 / 6, 4 / 6, 5 / 6])
    first, second = (load_file(folder / "model.safetensors") for folder in (unbroken, out))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["background_threshold", "tag_threshold"])
def test_its_thresholds_are_part_of_what_it_is(toy_data, cam_folder, recipe, tmp_path, setting):
    train_refiner(toy_data, cam_folder, recipe, tmp_path / "refiner")
    again = train_refiner(toy_data, cam_folder, recipe.changed(f"cam.{setting}=0.11"), tmp_path / "refiner")
    assert getattr(MapRefiner.from_pretrained(again).config, setting) == 0.11


@pytest.mark.slow
def test_it_may_start_from_the_classifiers_backbone(toy_data, cam_folder, recipe, tmp_path):
    recipe.cam.backbone_config = None
    recipe.refiner.from_cam = True
    with pytest.raises(ValueError, match="cam.backbone: expected a directory or Hub id"):
        train_refiner(toy_data, cam_folder, recipe.changed("refiner.from_cam=false"), tmp_path / "x")
    vars(recipe.refiner.train)["lr"] = 0.0  # past the checks
    out = train_refiner(toy_data, cam_folder, recipe, tmp_path / "refiner")
    teacher, model = CamClassifier.from_pretrained(cam_folder), MapRefiner.from_pretrained(out)
    for name, value in teacher.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    assert model.config.image_mean == teacher.config.image_mean


@pytest.mark.slow
def test_a_run_may_include_it(toy_data, recipe, tmp_path, monkeypatch):
    recipe.refiner.use = True
    result = run(toy_data, recipe, tmp_path / "run")
    assert isinstance(load_labeler(str(tmp_path / "run" / "refiner"), "cpu")[0], MapRefiner)
    assert result.masks.record["inputs"]["cam"] == model_fingerprint(result.refiner)
    assert result.results[0]["mean_iou"] >= 0
    monkeypatch.setattr(module, "train_model", None)
    recipe.refiner.use = False  # a stage of its own takes the same result for its own
    assert train_refiner(toy_data, result.cam, recipe, tmp_path / "run" / "refiner") == result.refiner


def test_a_segmenter_is_no_classifier(toy_data, tiny_recipe, tmp_path):
    config = SegmenterConfig(backbone_config=tiny_recipe.cam.backbone_config, rates=[1])
    Segmenter(config).save_pretrained(tmp_path / "segmenter")
    with pytest.raises(ValueError, match="segmenter: expected a CAM classifier or map refiner, got a wsss_segmenter"):
        train_refiner(toy_data, tmp_path / "segmenter", tiny_recipe, tmp_path / "refiner")
    assert [path.name for path in tmp_path.iterdir()] == ["segmenter"]


@pytest.mark.parametrize("name", ["toy", "voc_seam"])
def test_a_run_whose_maps_cannot_be_fused_so_trains_nothing(toy_data, no_training, tmp_path, name):
    recipe = load_recipe(name, ["refiner.use=true", "masks.fusion=sum", "masks.refine=[]"])
    with pytest.raises(OptionError, match="masks.fusion: expected mean or max with a map refiner"):
        run(toy_data, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
