import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from wsss_hf import CamClassifier, CamConfig
from wsss_hf.models import icd
from wsss_hf.models.icd import Icd, IcdConfig
from wsss_hf.models.methods import TrainingStep
from wsss_hf.training.build import start_layers

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official_outputs.safetensors"


@pytest.fixture(scope="module")
def reference():
    return {name.removeprefix("icd/"): value for name, value in load_file(FIXTURE).items() if name.startswith("icd/")}


class TinyBackbone(nn.Module):
    channels = [4, 6]
    strides = [2, 4]


def make_method(num_classes=3, **options):
    torch.manual_seed(0)
    return Icd(IcdConfig(hidden_channels=8, **options), TinyBackbone(), num_classes)


def make_step(tags, progress=1.0, superpixels=None, size=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tags = torch.tensor(tags, dtype=torch.float32)
    features = torch.randn(len(tags), 6, size, size, generator=generator, requires_grad=True)
    cams = torch.randn(*tags.shape, size, size, generator=generator, requires_grad=True)
    images = torch.rand(len(tags), 3, 4 * size, 4 * size, generator=generator)
    return TrainingStep(images, images, tags, (features,), cams, progress, lambda pixels: None, superpixels)


# the equations


def test_projection_and_its_training_match_the_released_program(reference):
    features = reference["features"].clone().requires_grad_()
    directions = reference["directions"].clone().requires_grad_()
    scores = icd.projection(features, directions)
    torch.testing.assert_close(scores, reference["projection"], rtol=0, atol=1e-4)

    icd.bottom_up_loss(scores, reference["tags"], scale=1).backward()
    torch.testing.assert_close(directions.grad, reference["direction_grad"], rtol=0, atol=1e-4)
    assert features.grad is None


def test_sign_matches_the_released_program(reference):
    running = icd.running_sign_means(
        reference["projection"], reference["cam"], reference["tags"], reference["running_before"], momentum=0.9
    )
    torch.testing.assert_close(running, reference["running_after"], rtol=0, atol=1e-4)
    resigned = icd.resign(reference["projection"], running)
    torch.testing.assert_close(resigned, reference["resigned"], rtol=0, atol=1e-4)


def test_superpixels_match_the_released_program(reference):
    refined = icd.superpixel_refine(reference["resigned"], reference["superpixels"], reference["tags"])
    torch.testing.assert_close(refined, reference["superpixel_refined"], rtol=0, atol=1e-4)


def test_top_down_gradient_matches_the_released_program(reference):
    logits = reference["top_down_logits"].clone().requires_grad_()
    icd.top_down_loss(logits, reference["superpixel_refined"], reference["tags"]).backward()
    torch.testing.assert_close(logits.grad, reference["top_down_grad"], rtol=0, atol=1e-6)  # up to 0.01


def test_directions_converge_to_the_first_principal_direction():
    generator = torch.Generator().manual_seed(0)
    axis = F.normalize(torch.tensor([1.0, -2.0, 0.5, 1.0]), dim=0)
    pixels = 0.3 * torch.randn(2, 4, 12, 12, generator=generator)
    pixels = pixels + 2 * torch.randn(2, 1, 12, 12, generator=generator) * axis[:, None, None]
    flat = pixels.transpose(0, 1).flatten(1)
    principal = torch.linalg.eigh(flat @ flat.T).eigenvectors[:, -1]

    directions = nn.Parameter(torch.randn(1, 4, generator=generator))
    optimiser = torch.optim.SGD([directions], lr=0.02)
    for _ in range(100):
        optimiser.zero_grad()
        icd.bottom_up_loss(icd.projection(pixels, directions), torch.ones(2, 1)).backward()
        optimiser.step()
    assert F.cosine_similarity(directions[0], principal, dim=0).abs() > 0.9999


def test_only_images_with_one_tag_train_the_directions():
    scores = torch.ones(3, 2, 2, 2, requires_grad=True)
    icd.bottom_up_loss(scores, torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])).backward()
    assert (scores.grad[0, 0] < 0).all()
    assert scores.grad[0, 1].eq(0).all() and scores.grad[1:].eq(0).all()


def test_the_side_with_the_stronger_cam_becomes_the_object():
    scores = torch.tensor([[-1.0, -1.0, 2.0, 2.0], [-1.0, -1.0, 2.0, 2.0]]).view(1, 2, 2, 2)
    cams = torch.tensor([[4.0, 2.0, 1.0, -9.0], [-9.0, 1.0, 3.0, 3.0]]).view(1, 2, 2, 2)
    running = icd.running_sign_means(scores, cams, torch.ones(1, 2), torch.zeros(2, 2), momentum=0.9)
    torch.testing.assert_close(running, torch.tensor([[0.05, 0.3], [0.3, 0.05]]))
    resigned = icd.resign(scores, running)
    torch.testing.assert_close(resigned, torch.stack((-scores[:, 0], scores[:, 1]), dim=1))


def test_an_absent_class_keeps_its_running_means():
    generator = torch.Generator().manual_seed(0)
    running = torch.rand(3, 2, generator=generator)
    scores, cams = torch.randn(2, 2, 3, 4, 4, generator=generator)
    updated = icd.running_sign_means(scores, cams, torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0]]), running)
    assert updated[2].equal(running[2])
    assert not updated[:2].isclose(running[:2]).any()


def test_running_means_of_two_processes_are_those_of_the_whole_batch(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores, cams = torch.randn(2, 4, 3, 4, 4, generator=generator)
    tags, running = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1]]), torch.rand(3, 2, generator=generator)
    whole = icd.running_sign_means(scores, cams, tags, running)

    sent = []
    monkeypatch.setattr(icd, "all_reduce_sum", lambda tensor: sent.append(tensor) or tensor)
    for half in (slice(0, 1), slice(1, 4)):
        icd.running_sign_means(scores[half], cams[half], tags[half], running)
    monkeypatch.setattr(icd, "all_reduce_sum", lambda tensor: sum(sent))
    torch.testing.assert_close(icd.running_sign_means(scores[:1], cams[:1], tags[:1], running), whole)


def refine_one_by_one(scores, superpixels, tags):
    refined = torch.zeros_like(scores)
    for image in range(len(scores)):
        own = scores[image] * tags[image][:, None, None]
        shares = own.relu() / own.max(dim=0).values.clamp(min=1e-5)
        for superpixel in superpixels[image].unique():
            inside = superpixels[image] == superpixel
            is_foreground = own[:, inside].sign().sum(dim=1).max() > 0
            winner = shares[:, inside].mean(dim=1).argmax()
            for label in range(len(own)):
                kept = own[label][inside]
                kept = kept.clamp(min=0) if is_foreground and label == winner else kept.clamp(max=0)
                refined[image, label][inside] = kept.mean()
    return refined


@pytest.mark.parametrize("several_tags", [False, True])
def test_superpixel_refinement_equals_a_plain_loop(several_tags):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, 9, 7, generator=generator)
    superpixels = torch.randint(0, 12, (3, 9, 7), generator=generator) * 5
    tags = torch.tensor([[1.0, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]]) if several_tags else torch.eye(4)[:3]
    refined = icd.superpixel_refine(scores, superpixels, tags)
    torch.testing.assert_close(refined, refine_one_by_one(scores, superpixels, tags))


def test_superpixels_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"superpixels: expected .*, \(1, 4, 4\), got \(1, 8, 8\)"):
        icd.superpixel_refine(torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long), torch.ones(1, 2))


def test_targets_leave_out_scores_within_the_margin_of_each_sign():
    refined = torch.tensor([10.0, 1.9, -0.9, -0.1]).view(1, 1, 2, 2)
    targets, certain = icd.top_down_targets(refined, margin=0.2)
    assert targets.flatten().tolist() == [1, 1, 0, 0]
    assert certain.flatten().tolist() == [True, False, True, False]


def test_top_down_weight_ramps_up():
    weights = [icd.top_down_weight(progress, ramp=0.1) for progress in (0, 0.05, 0.1, 0.9)]
    assert weights == pytest.approx([4.54e-5, 6.74e-3, 1, 1], rel=1e-3)
    assert icd.top_down_weight(0, ramp=0) == 1


# the seeds


def seeds_of(top_down, cams, tags, saliency=None):
    """Seeds of one image whose pixels stand in one row."""
    as_row = [torch.tensor(value, dtype=torch.float32)[None, :, None] for value in (top_down, cams)]
    saliency = None if saliency is None else torch.tensor(saliency)[None, None]
    return icd.icd_seeds(*as_row, torch.tensor([tags], dtype=torch.float32), saliency)[0, 0].tolist()


def test_seeds_of_one_tag_ignore_the_other_classes():
    assert seeds_of([[9, 9, 9], [2, -1, 0]], [[1, 1, 1], [1, 1, 1]], tags=[0, 1]) == [2, 0, 255]


def test_a_contested_seed_goes_to_the_larger_cam_times_score():
    top_down = [[4, 2, 3, -1, -1], [1, 2, 3, 2, -1]]  # pixel shares: 1, .5, .75 and 1/3, 2/3, 1
    assert seeds_of(top_down, [[1, 1, -1, 1, 1], [2, 1, -1, 1, 1]], tags=[1, 1]) == [1, 2, 255, 2, 0]


def test_what_the_cams_of_an_image_have_at_least_is_no_evidence():
    top_down, cams = [[4, -1, -1], [3, 4, -1]], [[5, 4, 4], [6, 5, 4]]
    # Of the first pixel: (5 - 4) / 2 · 4/4 against (6 - 4) / 2 · 3/4; plain CAMs would give 5/6 · 4/4 against 3/4.
    assert seeds_of(top_down, cams, tags=[1, 1]) == [2, 2, 0]


def test_of_several_tags_an_object_pixel_without_any_cam_is_left_open():
    top_down, cams = [[4, 2, -1], [-1, -1, -1]], [[1, -1, 1], [1, -1, 1]]
    assert seeds_of(top_down, cams, tags=[1, 1]) == [1, 255, 0]
    assert seeds_of(top_down, cams, tags=[1, 0]) == [1, 1, 0]  # one tag needs no CAM


def test_saliency_replaces_the_background_of_the_seeds():
    seeds = seeds_of([[2, 2, -2, -2]], [[1, 1, 1, 1]], tags=[1], saliency=[0.5, 0.0, 0.5, 0.0])
    assert seeds == [1, 255, 255, 0]


def test_saliency_that_covers_nothing_leaves_the_background_to_the_scores():
    top_down, cams = [[2, 2, -2, 0] * 50], [[1] * 200]
    assert seeds_of(top_down, cams, tags=[1], saliency=[0.0] * 200) == [1, 1, 0, 255] * 50
    assert seeds_of(top_down, cams, tags=[1], saliency=[0.005] * 199 + [0.5]) == [1, 1, 0, 255] * 50
    barely = seeds_of(top_down, cams, tags=[1], saliency=[0.5, 0.5] + [0.0] * 198)  # 1 %: it counts
    assert barely[:8] == [1, 1, 0, 0, 255, 255, 0, 0]


@pytest.mark.parametrize("name", ["one", "two", "three", "empty"])
def test_seeds_with_saliency_are_those_of_the_released_program(reference, name):
    top_down, cams, classes, saliency, labels = (
        reference[f"seed_{name}/{part}"] for part in ("top_down", "cams", "classes", "saliency", "labels")
    )
    classes = classes.long()
    tags = torch.zeros(1, 20)
    tags[0, classes] = 1
    others = torch.randn(2, 1, 20, *labels.shape, generator=torch.Generator().manual_seed(0))
    scores, maps = (
        other.index_copy(1, classes, known[None]) for other, known in zip(others, (top_down, cams), strict=True)
    )
    assert {0, 255} < set(labels.unique().tolist())
    assert torch.equal(icd.icd_seeds(scores, maps, tags, saliency[None])[0], labels.long())


def test_an_image_without_tags_is_background():
    assert seeds_of([[1, -1], [1, 0]], [[1, 1], [1, 1]], tags=[0, 0]) == [0, 0]


# the module


def test_feature_norm_is_batch_norm_without_a_scale():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = icd.FeatureNorm(6), nn.BatchNorm2d(6)
    with torch.no_grad():
        ours.bias.copy_(torch.randn(6, generator=generator))
        theirs.bias.copy_(ours.bias)
    for _ in range(3):
        features = 3 + 2 * torch.randn(2, 6, 5, 5, generator=generator)
        inputs = [features.clone().requires_grad_() for _ in range(2)]
        outputs = ours(inputs[0]), theirs(inputs[1])
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        for output in outputs:
            output.pow(3).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    assert [name for name, _ in ours.named_parameters()] == ["bias"]
    ours.eval()
    expected = F.batch_norm(features, ours.running_mean, ours.running_var, bias=ours.bias)
    torch.testing.assert_close(ours(features), expected, rtol=1e-4, atol=1e-5)


def test_the_classification_of_a_model_with_icd_is_a_sum_over_classes(resnet_config):
    torch.manual_seed(0)
    config = CamConfig(backbone_config=resnet_config, num_labels=4, icd=IcdConfig())
    model = CamClassifier(config).train()
    tags = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]])
    outputs = model(torch.randn(2, 3, 64, 64), tags=tags)
    entropy = F.binary_cross_entropy_with_logits(outputs.logits, tags, reduction="sum") / 2
    torch.testing.assert_close(outputs.losses["classification"] + outputs.losses["icd_classification"], entropy)


def test_means_over_classes_are_the_sums_on_another_scale(resnet_config):
    losses, tags = [], torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]])
    for average in (False, True):
        torch.manual_seed(0)
        config = CamConfig(backbone_config=resnet_config, num_labels=4, icd=IcdConfig(average_classes=average))
        model = CamClassifier(config).train()
        losses.append(model(torch.randn(2, 3, 64, 64), tags=tags, progress=1.0).loss)
    torch.testing.assert_close(losses[1], losses[0] / 4)


def test_gradients_reach_the_directions_or_the_backbone_never_the_cams():
    method, step = make_method(), make_step([[1, 0, 0], [0, 1, 0]])
    losses = method.losses(step)
    features = step.features[0]

    losses["icd_bottom_up"].backward(retain_graph=True)
    assert features.grad is None and method.directions.grad[:2].any() and not method.directions.grad[2].any()
    method.zero_grad()
    losses["icd_top_down"].backward()
    assert features.grad.any() and step.cams.grad is None and method.directions.grad is None
    trained = [name for name, parameter in method.named_parameters() if parameter.grad is not None]
    assert sorted(trained) == sorted(name for name, _ in method.named_parameters() if name != "directions")


def test_batch_without_tags_is_harmless():
    method, step = make_method(), make_step([[0, 0, 0], [0, 0, 0]])
    losses = method.losses(step)
    assert all(loss.item() == 0 for name, loss in losses.items() if name != "icd_classification")
    sum(losses.values()).backward()
    assert all(parameter.grad.eq(0).all() for parameter in method.parameters())
    assert method.running_means.eq(0).all()


def test_losses_are_finite_float32_under_autocast():
    method, step = make_method(), make_step([[1, 1, 0], [0, 0, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.losses(step)
    exact = make_method().losses(step)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05)


def test_losses_do_not_depend_on_how_often_an_image_is_in_the_batch():
    once, twice = make_step([[1, 1, 0], [0, 0, 1]]), make_step([[1, 1, 0], [0, 0, 1]] * 2)
    twice.features, twice.cams = (once.features[0].repeat(2, 1, 1, 1),), once.cams.repeat(2, 1, 1, 1)
    expected = make_method().losses(once)
    for name, loss in make_method().losses(twice).items():
        torch.testing.assert_close(loss, expected[name])


def test_superpixels_of_the_image_teach_one_target_per_superpixel(monkeypatch):
    superpixels = torch.arange(2).repeat_interleave(10).expand(2, 20, 20)  # left and right half, 10 pixels each
    seen = {}
    original = icd.top_down_loss

    def spy(logits, refined, *others):
        seen["refined"] = refined
        return original(logits, refined, *others)

    monkeypatch.setattr(icd, "top_down_loss", spy)
    make_method().losses(make_step([[1, 0, 0], [0, 1, 0]], superpixels=superpixels, size=4))
    halves = seen["refined"].unflatten(-1, (2, 2)).transpose(2, 3).flatten(3)
    assert halves.eq(halves[..., :1]).all() and halves[0, 0].any()
    make_method().losses(make_step([[1, 0, 0], [0, 1, 0]], size=4))
    assert len(seen["refined"][0, 0].unique()) == 16


def test_top_down_weight_and_options_scale_the_losses():
    def losses_of(progress=1.0, **options):
        return make_method(**options).losses(make_step([[1, 0, 0], [0, 1, 0]], progress))

    base = losses_of()
    assert losses_of(progress=0.0)["icd_top_down"] < 1e-4 * base["icd_top_down"]
    torch.testing.assert_close(losses_of(top_down_weight=0.5)["icd_top_down"], 0.5 * base["icd_top_down"])
    torch.testing.assert_close(losses_of(bottom_up_weight=5)["icd_bottom_up"], 0.5 * base["icd_bottom_up"])


def test_running_state_moves_in_training_only_and_survives_saving():
    method, step = make_method(), make_step([[1, 0, 0], [0, 1, 0]])
    method.losses(step)
    moved = method.running_means.clone()
    assert moved[:2].any()
    method.eval().losses(step)
    assert method.running_means.equal(moved)

    restored = make_method().eval()
    restored.load_state_dict(method.state_dict())
    assert restored.running_means.equal(moved)
    assert restored.maps(step).equal(method.maps(step))


def test_the_map_learns_the_object_from_tags_and_cams():
    generator = torch.Generator().manual_seed(0)
    is_object = torch.zeros(4, 1, 8, 8)
    is_object[:, :, 2:6, 2:6] = 1
    features = 0.2 * torch.randn(4, 6, 8, 8, generator=generator)
    features[:, :4] += 2 * is_object  # a principal axis needs channels that agree: each has variance 1
    cams = torch.zeros(4, 2, 8, 8)
    cams[:, 0, 3, 3] = 5  # the CAM knows one pixel of the object
    step = TrainingStep(
        features, features, torch.tensor([[1.0, 0.0]] * 4), (features,), cams, 1.0, lambda pixels: None
    )
    torch.manual_seed(0)
    method = Icd(IcdConfig(hidden_channels=8, bottom_up_weight=1.0), TinyBackbone(), 2)
    optimiser = torch.optim.Adam(method.parameters(), lr=0.01)
    for _ in range(100):
        optimiser.zero_grad()
        sum(method.losses(step).values()).backward()
        optimiser.step()
    maps = method.eval().maps(step)
    assert maps.shape == (4, 2, 8, 8) and maps.min() >= 0 and maps.max() <= 1
    assert ((maps[:, :1] > 0.5) == is_object.bool()).float().mean() > 0.95


@pytest.mark.parametrize(
    "options",
    [
        {"bottom_up_weight": -1},
        {"top_down_weight": -0.1},
        {"top_down_ramp": 2},
        {"sign_momentum": 1},
        {"margin": -0.2},
        {"hidden_channels": 0},
    ],
)
def test_config_refuses_bad_values(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"icd.{name}: expected a .*number.*, got {options[name]}"):
        IcdConfig.from_dict(options, "icd")


def test_seeds_of_several_tags_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    top_down, cams = (torch.randn(2, 4, 7, 6, generator=generator) for _ in range(2))
    tags = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]])
    seeds = icd.icd_seeds(top_down, cams, tags.float())
    for image in range(2):
        classes = [c for c in range(4) if tags[image, c]]
        lowest = min(cams[image, c].clamp(min=0).min().item() for c in classes)
        highest = max(cams[image, c].max().item() for c in classes) - lowest
        for y in range(7):
            for x in range(6):
                scores = {c: top_down[image, c, y, x].item() for c in classes}
                strength = {
                    c: (max(cams[image, c, y, x].item(), 0) - lowest) / highest
                    * max(score, 0) / top_down[image, c].max().item()
                    for c, score in scores.items()
                }  # fmt: skip
                claims = [c for c, score in scores.items() if score > 0]
                if not claims:
                    expected = 0
                elif len(classes) > 1 and max(strength.values()) <= 0:
                    expected = 255
                else:
                    expected = 1 + (claims[0] if len(claims) == 1 else max(strength, key=strength.get))
                assert seeds[image, y, x] == expected
    assert {0, 1, 2, 3, 4, 255} == set(seeds.unique().tolist())


# on the pooled hidden layers of ICD's VGG-16

VGG = {"model_type": "wsss_vgg16", "widths": [4, 4, 6, 6, 6], "hidden_channels": [8, 8], "pooling": 3}
HIDDEN = ["hidden.fc6", "hidden.fc7"]


def published_model(**options):
    torch.manual_seed(0)
    published = IcdConfig.from_dict({"hidden_channels": 8, "stage": 4, "hidden_from": HIDDEN} | options, "icd")
    config = CamConfig(backbone_config=dict(VGG), num_labels=3, classifier_bias=True, icd=published, maps="icd")
    model = CamClassifier(config)
    start_layers(model, std=0.01)
    return model


def test_new_layers_start_as_in_the_program():
    model = published_model()
    weights = model.state_dict()
    for own, other in (("context", "fc6"), ("mix", "fc7")):
        for kind in ("weight", "bias"):
            copied = weights[f"backbone.body.hidden.{other}.{kind}"]
            assert torch.equal(weights[f"methods.icd.top_down.{own}.{kind}"], copied)
    assert model.new_parameters == {"classifier.weight", "classifier.bias", "methods.icd.top_down.classifier.weight"}
    assert weights["classifier.weight"].std().item() == pytest.approx(0.01, rel=0.5)
    assert not weights["classifier.bias"].any()
    own = published_model(hidden_from=[])
    assert "methods.icd.top_down.mix.weight" in own.new_parameters
    assert not torch.equal(own.methods["icd"].top_down.mix.weight, own.backbone.body.hidden.fc7.weight)


def test_a_training_step_on_hidden_layers_is_that_of_the_program():
    """The program's network and losses, computed plainly; without dropout."""
    model = published_model().train()
    for module in model.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 41, 33, generator=generator)
    superpixels = torch.randint(0, 5, (2, 6, 5), generator=generator)
    fine = superpixels.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, :41, :33]
    tags = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    losses = model(pixels, tags=tags, superpixels=fine, progress=0.05).losses

    hidden = pixels
    for block, layers in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
        for layer in layers:
            kernel, bias = (weights[f"backbone.body.features.{layer}.{kind}"] for kind in ("weight", "bias"))
            rate = 2 if block == 4 else 1
            hidden = F.conv2d(hidden, kernel, bias, padding=rate, dilation=rate).relu()
        if block < 4:
            hidden = F.max_pool2d(hidden, 3, 2 if block < 3 else 1, 1)
    conv5 = hidden
    hidden = F.avg_pool2d(F.max_pool2d(conv5, 3, 1, 1), 3, 1, 1)
    for layer, padding in (("fc6", 1), ("fc7", 0)):
        kernel, bias = (weights[f"backbone.body.hidden.{layer}.{kind}"] for kind in ("weight", "bias"))
        hidden = F.conv2d(hidden, kernel, bias, padding=padding).relu()
    cams = F.conv2d(hidden, weights["classifier.weight"], weights["classifier.bias"])
    entropy = F.binary_cross_entropy_with_logits(cams.mean(dim=(2, 3)), tags, reduction="sum") / 2
    torch.testing.assert_close(losses["classification"] + losses["icd_classification"], entropy)

    features = F.batch_norm(conv5, None, None, training=True)
    directions = F.normalize(weights["methods.icd.directions"], dim=1)
    scores = torch.einsum("bdhw,cd->bchw", features, directions)
    energy = -5 * scores[0, 0].square().mean() / 2  # the first image alone has one tag
    torch.testing.assert_close(losses["icd_bottom_up"], energy)

    for label, image in ((0, 0), (1, 1), (2, 1)):
        sides = [cams[image, label].relu()[scores[image, label] * sign > 0] for sign in (1, -1)]
        positive, negative = (side.mean().item() if side.numel() else 0.0 for side in sides)
        if positive < negative:
            scores[:, label] *= -1
    refined = refine_one_by_one(scores, superpixels, tags)
    context = F.conv2d(features, weights["backbone.body.hidden.fc6.weight"], weights["backbone.body.hidden.fc6.bias"],
                       padding=1).relu()  # fmt: skip
    mix = F.conv2d(context, weights["backbone.body.hidden.fc7.weight"], weights["backbone.body.hidden.fc7.bias"])
    everything = torch.cat([features, context, mix.relu()], dim=1)
    logits = F.conv2d(everything, weights["methods.icd.top_down.classifier.weight"])
    highest = refined.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)
    lowest = (-refined).amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)
    shares = refined.relu() / highest - (-refined).relu() / lowest
    entropy = F.binary_cross_entropy_with_logits(logits, (shares > 0).float(), reduction="none")
    wanted = ((entropy * (shares.abs() > 0.2)).mean(dim=(2, 3)) * tags).sum() / 2
    torch.testing.assert_close(losses["icd_top_down"], math.exp(-5) * wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 3}, None),
        ({"stage": 2}, "icd.stage: expected a stage of stride 8, got 2"),
        ({"stage": 6}, r"icd.stage: expected stages of this backbone \(-6 to 5\), got 6"),
        ({"hidden_from": ["hidden.fc6"]}, "hidden_from: expected two names or none"),
        (
            {"hidden_from": ["hidden.fc7", "hidden.fc6"]},
            r"icd.hidden_from: expected a layer with weights \(8, 6, 3, 3\), got hidden.fc7 with \(8, 8, 1, 1\)",
        ),
        ({"hidden_from": ["fc6", "fc7"]}, r"expected a layer with weights \(8, 6, 3, 3\), got fc6 with \(0,\)"),
        ({"hidden_channels": 9}, r"expected a layer with weights \(9, 6, 3, 3\)"),
    ],
)
def test_layers_that_do_not_fit_are_refused(options, message):
    if message is None:
        published_model(**options)
        return
    with pytest.raises(ValueError, match=message):
        published_model(**options)


def test_superpixels_are_read_at_the_corners_where_the_network_looks_from_corner_to_corner():
    superpixels = torch.arange(17 * 9).view(1, 17, 9)
    found = icd._superpixels_at(superpixels, torch.zeros(1, 2, 3, 2))
    assert found[0].tolist() == [[0, 8], [72, 80], [144, 152]]
    found = icd._superpixels_at(superpixels[:, :16, :8], torch.zeros(1, 2, 2, 1))
    assert found[0].tolist() == [[40], [112]]  # the middle of each half
