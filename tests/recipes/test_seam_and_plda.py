"""The published recipes of SEAM and PLDA: their settings, and one small run of all stages."""

import pytest
import torch

from wsss_hf.data.tagged import TaggedData
from wsss_hf.models.modeling_affinity import AffinityNetwork
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.recipes import load_recipe
from wsss_hf.stages.run import run
from wsss_hf.training.build import build_optimizer

SMALL = [
    "image.size=48",
    "cam.backbone_config.widths=[4, 4, 8, 8, 8, 8, 16]",
    "cam.methods.seam={stages: [-3, -2], projections: [4, 4], embedding: 8}",
    "cam.train.epochs=1",
    "cam.train.batch_size=4",
    "segmenter.backbone=null",
    "segmenter.backbone_config={model_type: resnet, layer_type: basic, embedding_size: 8, hidden_sizes: [8, 8, 8, 8], "
    "depths: [1, 1, 1, 1]}",
    "segmenter.size=48",
    "segmenter.train.steps=2",
    "segmenter.train.batch_size=2",
    "affinity.backbone=null",
    "affinity.output_stride=null",
    "affinity.radius=3",
    "affinity.background_threshold=0.4",  # an untrained network's maps are certain of nothing else
    "affinity.train.epochs=1",
    "affinity.train.batch_size=4",
    "evaluation.refine=[]",
    "evaluation.examples=2",
]


@pytest.mark.parametrize("name", ["voc_seam", "voc_plda"])
def test_settings_are_those_of_the_released_program(name):
    recipe = load_recipe(name)
    assert list(recipe.cam.methods) == (["seam"] if name == "voc_seam" else ["seam", "plda"])
    assert recipe.cam.maps == "seam" and recipe.cam.methods.get("plda", {"maps": "seam"})["maps"] == "seam"
    assert recipe.cam.dropout == 0.5 and recipe.image.size == 448
    train = recipe.cam.train
    assert [round(448 * scale) for scale in train.scale] == [448, 768] and train.scaled_side == "long"
    assert (train.color_jitter, train.hue_jitter) == (0.3, 0.1)
    assert (train.epochs, train.batch_size, train.schedule, train.power) == (8, 8, "poly", 0.9)
    masks = recipe.masks
    assert (masks.scales, masks.flip, masks.native, masks.fusion) == ([0.5, 1.0, 1.5, 2.0], True, True, "sum")

    layers = torch.nn.ModuleDict({"backbone": torch.nn.Conv2d(1, 1, 1), "head": torch.nn.Conv2d(1, 1, 1)})
    groups = build_optimizer(layers, train).param_groups
    assert all(group["momentum"] == 0 and not group["nesterov"] for group in groups)
    found = {(round(group["lr"], 6), group["weight_decay"]) for group in groups}
    assert found == {(0.01, 5e-4), (0.02, 0.0), (0.1, 5e-4), (0.2, 0.0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["voc_seam", "voc_plda"])
def test_a_small_run_goes_from_tags_to_figures(name, toy_data, tmp_path):
    pytest.importorskip("pydensecrf")
    small = [*SMALL, "cam.methods.plda.hidden=[8, 8]"] if name == "voc_plda" else SMALL
    result = run(TaggedData(toy_data, source={"source": "toy"}), load_recipe(name, small), tmp_path / "run")
    model = CamClassifier.from_pretrained(result.cam.folder)
    assert model.config.maps == "seam" and set(model.methods) == set(load_recipe(name).cam.methods)
    assert model.config.dropout == 0.5
    network = AffinityNetwork.from_pretrained(result.affinity.folder)
    assert network.config.kind == ("affinitynet" if name == "voc_seam" else "irn")
    masks, segmenter = result.results
    assert masks["num_images"] == len(toy_data["train"]) and 0 <= segmenter["mean_iou"] <= 1
    assert (result.folder / "report.html").is_file()
