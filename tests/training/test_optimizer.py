import dataclasses

import pytest
import torch
from torch import nn

from wsss_hf.settings import RecipeError, TrainSettings
from wsss_hf.training.build import (
    build_optimizer,
    build_scheduler,
    freeze_batch_norm,
    freeze_pretrained,
    parameter_groups,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.classifier = nn.Conv2d(4, 2, 1)
    model.forward = lambda x: model.classifier(model.backbone(x))
    return model


@pytest.fixture
def settings():
    def change(**changes):
        return dataclasses.replace(TrainSettings(), **changes)

    return change


def rates(settings, total_steps):
    optimizer = build_optimizer(nn.Linear(1, 1), dataclasses.replace(settings, head_lr_factor=1.0))
    scheduler = build_scheduler(optimizer, settings, total_steps)
    found = []
    for _ in range(total_steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_rate_and_decay_of_a_parameter_follow_from_what_it_is(model, settings):
    changes = {"lr": 0.1, "head_lr_factor": 10.0, "bias_lr_factor": 2.0, "weight_decay": 0.5}
    groups = parameter_groups(model, settings(**changes))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found == {
        "backbone.0.weight": (pytest.approx(0.1), 0.5),
        "backbone.0.bias": (pytest.approx(0.2), 0.0),
        "backbone.1.weight": (pytest.approx(0.1), 0.0),
        "backbone.1.bias": (pytest.approx(0.2), 0.0),
        "classifier.weight": (pytest.approx(1.0), 0.5),
        "classifier.bias": (pytest.approx(2.0), 0.0),
    }


def test_frozen_parameters_are_in_no_group(model, settings):
    freeze_batch_norm(model)
    grouped = [parameter for group in parameter_groups(model, settings()) for parameter in group["params"]]
    assert len(grouped) == 4 and all(parameter.requires_grad for parameter in grouped)


def test_the_backbone_may_have_a_rate_of_its_own(model, settings):
    groups = parameter_groups(model, settings(lr=0.1, backbone_lr_factor=0.05, head_lr_factor=3.0, bias_lr_factor=2.0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert found["backbone.0.weight"] == pytest.approx(0.005)
    assert found["backbone.0.bias"] == pytest.approx(0.01)
    assert found["classifier.weight"] == pytest.approx(0.3)


def test_an_optimizer_moves_every_group_at_its_own_rate(model, settings):
    changes = {"optimizer": "sgd", "lr": 0.1, "head_lr_factor": 10.0, "weight_decay": 0.0, "momentum": 0.0}
    optimizer = build_optimizer(model, settings(**changes))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - parameter).mean().item() for name, parameter in model.named_parameters()}
    assert moved["backbone.0.weight"] == pytest.approx(0.1, rel=1e-4)
    assert moved["classifier.weight"] == pytest.approx(1.0, rel=1e-4)


def test_momentum_is_nesterovs(settings):
    layer = nn.Linear(1, 1, bias=False)
    start = layer.weight.item()
    changes = {"optimizer": "sgd", "lr": 1.0, "head_lr_factor": 1.0, "weight_decay": 0.0, "momentum": 0.5}
    optimizer = build_optimizer(layer, settings(**changes))
    layer.weight.grad = torch.ones(1, 1)
    optimizer.step()
    assert start - layer.weight.item() == pytest.approx(1.5)  # 1 + momentum · 1; without Nesterov the first step is 1


def test_momentum_may_be_plain(settings):
    layer = nn.Linear(1, 1, bias=False)
    start = layer.weight.item()
    changes = {"optimizer": "sgd", "lr": 1.0, "head_lr_factor": 1.0, "weight_decay": 0.0, "nesterov": False}
    optimizer = build_optimizer(layer, settings(**changes))
    layer.weight.grad = torch.ones(1, 1)
    optimizer.step()
    assert start - layer.weight.item() == pytest.approx(1.0)


def test_poly_falls_to_zero(settings):
    found = rates(settings(lr=2.0, schedule="poly", power=0.9), 10)
    assert found == pytest.approx([2 * (1 - step / 10) ** 0.9 for step in range(11)])


def test_step_divides_by_ten_at_each_milestone(settings):
    found = rates(settings(lr=1.0, schedule="step", milestones=[0.3, 0.8]), 10)
    assert found == pytest.approx([1] * 3 + [0.1] * 5 + [0.01] * 3)


def test_warmup_rises_in_equal_steps_and_then_follows_the_schedule(settings):
    found = rates(settings(lr=1.0, schedule="step", milestones=[], warmup=0.4), 10)
    assert found == pytest.approx([0.25, 0.5, 0.75] + [1] * 8)
    warm, plain = (rates(settings(lr=1.0, warmup=share), 10) for share in (0.4, 0.0))
    assert warm[3:] == pytest.approx(plain[3:]) and warm[0] < plain[0]


def test_frozen_batch_norm_keeps_statistics_and_parameters(model, settings):
    freeze_batch_norm(model.train())
    norm = model.backbone[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, settings(lr=0.1))
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8) * 5 + 3).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"backbone.0.weight", "backbone.0.bias", "classifier.weight", "classifier.bias"}
    assert not norm.training and model.backbone[0].training


def test_a_frozen_backbone_keeps_all_it_has_drops_nothing_and_needs_no_backward_pass(model, settings):
    model.backbone.append(nn.Dropout(0.5))
    freeze_pretrained(model.train())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, settings(lr=0.1, backbone_lr_factor=0.0))
    pixels = torch.randn(2, 3, 8, 8) * 5 + 3
    for _ in range(3):
        model(pixels).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert model.training and not any(module.training for module in model.backbone.modules())
    assert not model.backbone(pixels).requires_grad


def test_a_model_without_new_layers_cannot_be_frozen(model):
    model.new_parameters = set()
    with pytest.raises(RecipeError, match="backbone_lr_factor: expected more than 0 for a model without new layers"):
        freeze_pretrained(model)
