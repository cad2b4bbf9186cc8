"""Recipe vit on a tiny vision transformer, and training with a frozen backbone."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from wsss_hf.data.tagged import TaggedData
from wsss_hf.models.modeling_affinity import AffinityNetwork
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.recipes import Recipe
from wsss_hf.stages.run import run
from wsss_hf.stages.train_affinity import train_affinity
from wsss_hf.stages.train_cam import train_cam


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a vision transformer of four layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    folder = tmp_path_factory.mktemp("published")
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture
def vit_recipe(published, tiny_settings):
    small = [text for text in tiny_settings if "backbone_config" not in text and "output_stride" not in text]
    return Recipe.load("vit", small, backbone=str(published))


def trained_backbone(folder):
    values = load_file(folder / "model.safetensors")
    prefix = "backbone.body."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def moved(folder, published):
    """Names of the backbone's weights that are not the published ones."""
    before = load_file(published / "model.safetensors")
    after = trained_backbone(folder)
    assert len(after) > 40
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.slow
def test_recipe_vit_goes_from_tags_to_a_segmenter(toy_data, vit_recipe, tmp_path):
    finished = run(TaggedData(toy_data, source={"source": "toy"}), vit_recipe, tmp_path / "run")
    model = CamClassifier.from_pretrained(finished.folder / "cam")
    assert set(model.config.methods) == {"attention", "toco"} and model.config.maps == "attention"
    assert model.config.backbone_layers == [1, 2, 3, 4] and model.backbone.strides == [8] * 4
    masks, segmenter = finished.results
    assert 0 <= masks["mean_iou"] <= 1 and 0 <= segmenter["mean_iou"] <= 1


def test_a_frozen_backbone_stays_what_it_was_while_the_new_layers_learn(toy_data, vit_recipe, published, tmp_path):
    vit_recipe.cam.train.backbone_lr_factor = 0.0
    vit_recipe.cam.methods["attention"]["learn_heads"] = True
    frozen = train_cam(toy_data, vit_recipe, tmp_path / "frozen")
    assert moved(frozen, published) == set()
    vit_recipe.cam.train.epochs = 1
    shorter = train_cam(toy_data, vit_recipe, tmp_path / "shorter")
    longer, short = (load_file(folder / "model.safetensors") for folder in (frozen, shorter))
    new = [name for name in longer if not name.startswith("backbone.")]
    assert "methods.toco.classifier.weight" in new and "methods.attention.head_weights.layers.0.weight" in new
    assert [name for name in new if torch.equal(longer[name], short[name])] == []


def test_the_layers_of_the_recipe_are_the_stages_and_an_unfrozen_backbone_learns(
    toy_data, vit_recipe, published, tmp_path
):
    vit_recipe.cam.backbone_layers = [2, -1]
    folder = train_cam(toy_data, vit_recipe, tmp_path / "cam")
    assert CamClassifier.from_pretrained(folder).config.backbone_layers == [2, 4]
    assert len(moved(folder, published)) > 40

    recipe = vit_recipe.changed("affinity.from_cam=true", "affinity.refine=[]", "affinity.radius=4")
    recipe.affinity.train.epochs = 1
    network = AffinityNetwork.from_pretrained(train_affinity(toy_data, folder, recipe, tmp_path / "affinity"))
    assert network.config.backbone_layers == [2, 4] and len(network.branches) == 2
