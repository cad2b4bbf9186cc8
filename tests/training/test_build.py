"""How the layers of the published recipes start, and at which rates they learn."""

import math

import pytest
import torch
from torch import nn

from wsss_hf import CamClassifier, CamConfig, MapRefiner, MapRefinerConfig
from wsss_hf.recipes import load_recipe
from wsss_hf.settings import RecipeError
from wsss_hf.training.build import build_processor, parameter_groups, start_layers

VGG = {"model_type": "wsss_vgg16", "widths": [4, 4, 4, 4, 4], "extra_channels": [64, 64, 64]}


def drs_model(kind=CamClassifier, **options):
    torch.manual_seed(0)
    config_class = {CamClassifier: CamConfig, MapRefiner: MapRefinerConfig}[kind]
    return kind(config_class(backbone_config=dict(VGG), num_labels=20, classifier_bias=True, **options))


def rates(model, settings):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, settings)
    return {
        names[id(p)]: (group["lr"] / settings.lr, group["weight_decay"]) for group in groups for p in group["params"]
    }


def test_parameters_of_drs_learn_and_decay_as_in_its_program():
    recipe = load_recipe("voc_drs")
    model = drs_model(drs=recipe.cam.methods["drs"])
    start_layers(model, recipe.cam.new_layers, recipe.cam.classifier_std)
    found = rates(model, recipe.cam.train)
    assert len(found) == len(list(model.parameters()))
    for name, (rate, decay) in found.items():
        is_new = "extra" in name or "fc" in name or name.startswith("classifier")
        expected = (10 if is_new else 1) * (2 if name.endswith("bias") else 1)
        assert rate == pytest.approx(expected), name
        assert decay == 5e-4, name
    assert sum(rate > 5 for rate, _ in found.values()) == 16 + 3 * 2 + 2  # controllers, extra convolutions, classifier


def test_new_layers_of_drs_start_as_in_its_program():
    recipe = load_recipe("voc_drs")
    model = drs_model(drs=recipe.cam.methods["drs"])
    start_layers(model, recipe.cam.new_layers, recipe.cam.classifier_std)
    assert model.classifier.weight.std().item() == pytest.approx(math.sqrt(2 / (1 * 1 * 20)), rel=0.1)
    for layer in model.backbone.body.extra:
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (3 * 3 * 64)), rel=0.1)
            assert not layer.bias.any()
    refiner = drs_model(MapRefiner)
    before = refiner.backbone.body.features[0].weight.clone()
    start_layers(refiner, recipe.cam.new_layers, recipe.refiner.new_std, deep=True)
    for layer in (*refiner.backbone.body.extra, refiner.classifier):
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1) and not layer.bias.any()
    assert torch.equal(refiner.backbone.body.features[0].weight, before)
    assert set(rates(refiner, recipe.refiner.train).values()) == {(1.0, 0.0)}  # Adam, all alike


@pytest.mark.parametrize(("section", "epochs"), [("cam", (5, 10)), ("refiner", (10, 20))])
def test_rates_of_drs_fall_before_the_epochs_of_its_program(section, epochs):
    settings = getattr(load_recipe("voc_drs"), section).train
    steps = 7  # of an epoch
    for milestone, epoch in zip(settings.milestones, epochs, strict=True):
        first = math.ceil(milestone * settings.epochs * steps)  # step with the lower rate, from 0
        assert first == (epoch - 1) * steps


def test_a_network_without_rules_learns_new_layers_outside_the_backbone():
    model = drs_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_layers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.new_parameters == {"classifier.weight", "classifier.bias"}


def test_layers_that_are_not_there_are_named():
    with pytest.raises(
        RecipeError, match=r"cam.new_layers: expected layers of the backbone, got 'extras.\*', which fits"
    ):
        start_layers(drs_model(), ["extra.*", "extras.*"])


def test_squares_are_shown_to_what_was_trained_on_squares():
    image = torch.randint(0, 256, (3, 20, 50), dtype=torch.uint8)
    shape = [
        build_processor(32, [0.5] * 3, [0.5] * 3, side)(images=image, return_tensors="pt")["pixel_values"].shape[2:]
        for side in ("both", "short")
    ]
    assert shape == [(32, 32), (32, 80)]
