import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wsss_hf import CamClassifier, CamConfig, ContrastConfig
from wsss_hf.models.contrast import (
    Contrast,
    confidences,
    cross_view_loss,
    estimated_prototypes,
    hard_pixel_weights,
    pixel_labels,
    semi_hard_loss,
    similarities,
)
from wsss_hf.models.methods import TrainingStep

CLASSES = 3
TAGS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


class Backbone:
    channels = [4, 6]
    strides = [8, 16]


def make_step(size=(4, 6), second=(3, 4), tags=TAGS):
    generator = torch.Generator().manual_seed(0)

    def view(height, width):
        features = torch.randn(len(tags), 6, height, width, generator=generator, requires_grad=True)
        cams = torch.randn(len(tags), tags.shape[1], height, width, generator=generator)
        pixels = torch.zeros(len(tags), 3, 16 * height, 16 * width)
        return TrainingStep(pixels, pixels, tags, (features,), cams, 0.5, lambda pixel_values: None)

    step = view(*size)
    step.second_view = view(*second)
    return step


def make_method(num_classes=CLASSES, **options):
    torch.manual_seed(1)
    return Contrast(ContrastConfig(**{"embedding": 16} | options), Backbone(), num_classes)


def test_confidences_are_normalised_maps_of_tagged_classes_and_what_they_leave_to_the_background():
    maps = torch.tensor([[[[-1.0, 0.0, 2.0, 4.0]], [[8.0, 0.0, 0.0, 0.0]]]]).repeat(2, 1, 1, 1)
    sure = confidences(maps, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    expected = [[[1, 1, 0.5, 0]], [[0, 0, 0.5, 1]], [[0, 0, 0, 0]]]
    torch.testing.assert_close(sure[0], torch.tensor(expected), atol=1e-4, rtol=0)
    assert (sure[1] == 0).all()  # no tags: nothing is known, not even the background


def test_a_pixel_is_of_its_strongest_class_unless_all_are_weak():
    sure = torch.tensor([[[[0.9, 0.6, 0.1, 0.8]], [[0.1, 0.4, 0.9, 0.2]], [[0.0, 0.3, 0.3, 0.2]]]])
    assert pixel_labels(sure, 0.2).tolist() == [[[0, 1, 1, 0]]]
    assert pixel_labels(sure[:, [0, 2, 1]], 0.35).tolist() == [[[0, 2, 2, 0]]]


def test_a_prototype_is_the_weighted_mean_of_the_surest_pixels_of_the_batch():
    embeddings = torch.tensor([[[[3.0, 0.0]], [[0.0, 5.0]]], [[[0.0, 9.0]], [[2.0, 9.0]]]])  # (2, 2, 1, 2)
    sure = torch.tensor([[[[0.8, 0.0]], [[0.0, 0.0]]], [[[0.4, 0.3]], [[0.0, 0.0]]]])
    prototypes = estimated_prototypes(embeddings, sure, 2)
    expected = F.normalize(0.8 * torch.tensor([3.0, 0.0]) + 0.4 * torch.tensor([0.0, 2.0]), dim=0)
    torch.testing.assert_close(prototypes[0], expected)
    assert (prototypes[1] == 0).all()
    assert estimated_prototypes(embeddings, sure, 100).isfinite().all()


def test_a_class_without_prototype_neither_attracts_nor_repels():
    units = F.normalize(torch.rand(4, 5), dim=1)
    prototypes = F.normalize(torch.rand(3, 5), dim=1)
    with_empty = torch.cat([prototypes, torch.zeros(1, 5)])
    labels, counted = torch.tensor([0, 1, 2, 2]), torch.ones(4, dtype=torch.bool)
    expected = cross_view_loss(similarities(units, prototypes, 0.1), labels, counted)
    torch.testing.assert_close(cross_view_loss(similarities(units, with_empty, 0.1), labels, counted), expected)
    assert cross_view_loss(similarities(units, torch.zeros(4, 5), 0.1), labels, ~counted) == 0


def test_the_semi_hard_prototypes_of_the_program_with_its_21_labels():
    """Its fourth to thirteenth nearest are the negatives."""
    similarity = torch.randn(7, 21, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 20, 4, 4, 9, 1, 13])
    losses = semi_hard_loss(similarity, labels)
    for loss, row, label in zip(losses.tolist(), similarity.tolist(), labels.tolist(), strict=True):
        negatives = sorted(row, reverse=True)[3:13]
        own = math.exp(row[label])
        assert loss == pytest.approx(-math.log(own / (own + sum(map(math.exp, negatives)))), rel=1e-5)


def test_half_of_each_class_by_chance_and_half_hard_but_not_the_hardest():
    own = torch.arange(22.0) / 22
    labels = torch.tensor([1] * 20 + [2] + [0])
    counted = torch.tensor([True] * 21 + [False])
    keys = torch.linspace(1, 0, 22)
    weights = hard_pixel_weights(own, labels, counted, 3, keys)
    # Of class 1: places 2 to 11 from the hardest are hard, the last ten have the lowest keys; there are two classes.
    expected = torch.tensor([0] * 2 + [1] * 8 + [2] * 2 + [1] * 8 + [0, 0]) / (2 * 10) / 2
    torch.testing.assert_close(weights, expected)
    order = torch.randperm(22)
    torch.testing.assert_close(
        hard_pixel_weights(own[order], labels[order], counted[order], 3, keys[order]), expected[order]
    )
    assert (hard_pixel_weights(own, labels, torch.zeros(22, dtype=torch.bool), 3, keys) == 0).all()


def _plain_losses(method, step, keys):
    """All three losses, pixel by pixel."""
    config, size = method.config, step.second_view.cams.shape[-2:]
    kinds = step.tags.shape[1] + 1
    vectors, labels, prototypes = [], [], []
    for view in (step, step.second_view):
        embeddings = F.conv2d(view.features[-1], method.projection.weight).relu()
        embeddings = F.interpolate(embeddings, size, mode="bilinear", align_corners=True)
        maps = F.interpolate(view.cams.relu(), size, mode="bilinear", align_corners=True)
        pixels = []  # (vector, confidences)
        for image in range(len(maps)):
            for y in range(size[0]):
                for x in range(size[1]):
                    sure = []
                    for c in range(kinds - 1):
                        low, high = maps[image, c].min(), maps[image, c].max()
                        value = max(0.0, float((maps[image, c, y, x] - low - 1e-5) / (high - low + 1e-5)))
                        sure.append(value * float(step.tags[image, c]))
                    pixels.append((embeddings[image, :, y, x].detach(), [1 - max(sure), *sure]))
        vectors.append([vector / vector.norm() for vector, _ in pixels])
        scores = [[config.background, *sure[1:]] for _, sure in pixels]
        labels.append([row.index(max(row)) for row in scores])
        count = size[0] * size[1] // 8
        centres = []
        for kind in range(kinds):
            best = sorted(pixels, key=lambda pixel: -pixel[1][kind])[:count]
            centre = sum(sure[kind] * vector for vector, sure in best)
            centres.append(centre / centre.norm())
        prototypes.append(centres)

    def loss(vector, label, centres, negatives=None):
        values = [float(vector @ centre / config.temperature) for centre in centres]
        positive = math.exp(values[label])
        others = values if negatives is None else sorted(values, reverse=True)[negatives]
        return -math.log(positive / (sum(map(math.exp, others)) + (0 if negatives is None else positive)))

    cross_prototype = cross_cam = intra = 0.0
    for own, other in ((0, 1), (1, 0)):
        total = len(vectors[own])
        for vector, mine, theirs in zip(vectors[own], labels[own], labels[other], strict=True):
            cross_prototype += loss(vector, mine, prototypes[other]) / total / 2
            cross_cam += loss(vector, theirs, prototypes[own]) / total / 2
        classes = sorted(set(labels[own]))
        for kind in classes:
            members = [n for n in range(total) if labels[own][n] == kind]
            half = len(members) // 2
            chance = sorted(members, key=lambda n: keys[own][n])[:half]
            nearness = {n: float(vectors[own][n] @ prototypes[own][kind]) for n in members}
            hard = sorted(members, key=lambda n: nearness[n])[: int(len(members) * 0.6)][-half:] if half else []
            chosen = [loss(vectors[own][n], kind, prototypes[own], slice(1, 3)) for n in chance + hard]
            intra += sum(chosen) / max(1, len(chosen)) / len(classes) / 2
    return {"cross_prototype": cross_prototype, "cross_cam": cross_cam, "intra": intra}


def test_losses_are_those_of_a_plain_computation():
    """With four labels the nearest three prototypes are considered, and the farthest two of them are negatives."""
    method, step = make_method(), make_step(size=(6, 8), second=(4, 4))
    for view in (step, step.second_view):
        view.cams = view.cams.exp()  # without the zeros of which pixels could be equally sure
    torch.manual_seed(5)
    keys = [torch.rand(32).tolist(), torch.rand(32).tolist()]
    torch.manual_seed(5)
    losses = method.losses(step)
    for name, value in _plain_losses(method, step, keys).items():
        assert losses[f"contrast_{name}"].item() == pytest.approx(0.1 * value, rel=1e-4), name
        assert value > 0.1


def test_weights_are_those_of_the_options():
    step = make_step()
    torch.manual_seed(5)
    losses = make_method().losses(step)
    torch.manual_seed(5)
    weighted = make_method(cross_prototype_weight=0.3, cross_cam_weight=0.0, intra_weight=0.2).losses(step)
    torch.testing.assert_close(weighted["contrast_cross_prototype"], 3 * losses["contrast_cross_prototype"])
    torch.testing.assert_close(weighted["contrast_intra"], 2 * losses["contrast_intra"])
    assert weighted["contrast_cross_cam"] == 0


def test_projection_and_features_of_both_views_are_trained_and_the_maps_are_not():
    method, step = make_method(), make_step()
    for view in (step, step.second_view):
        view.cams.requires_grad_()
    sum(method.losses(step).values()).backward()
    assert method.projection.weight.grad.abs().sum() > 0
    for view in (step, step.second_view):
        assert view.features[-1].grad.abs().sum() > 0 and view.cams.grad is None


def test_an_image_without_tags_does_not_count():
    method, step = make_method(), make_step(tags=torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    sum(method.losses(step).values()).backward()
    gradient = step.features[-1].grad
    assert gradient[0].abs().sum() > 0 and (gradient[1] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 5)])
def test_maps_of_a_pixel_or_a_row(size):
    losses = make_method().losses(make_step(size=size, second=(1, 1)))
    assert all(loss.isfinite() for loss in losses.values())


def test_one_class():
    method = make_method(num_classes=1)
    losses = method.losses(make_step(tags=torch.ones(2, 1)))
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_the_maps_may_be_those_of_another_method():
    step, asked = make_step(), []

    def localize(name, pixel_values, features, cams):
        asked.append((name, pixel_values.shape, cams.shape))
        return cams.abs()

    step.localize = step.second_view.localize = localize
    make_method(maps="seam").losses(step)
    assert asked == [("seam", (2, 3, 64, 96), (2, 3, 4, 6)), ("seam", (2, 3, 48, 64), (2, 3, 3, 4))]


def test_without_its_second_view_it_says_so():
    step = make_step()
    step.second_view = None
    with pytest.raises(ValueError, match="second_view: expected the view .* got none"):
        make_method().losses(step)


def _two_patterns():
    """Images of a small object on a textured ground, and a network whose features tell both apart badly."""
    generator = torch.Generator().manual_seed(0)
    is_object = torch.zeros(4, 8, 8, dtype=torch.bool)
    is_object[:, 2:6, 2:6] = True
    features = torch.randn(4, 6, 8, 8, generator=generator).abs() * 0.3 + 0.5
    tags = torch.eye(2).repeat(2, 1)
    for c in range(2):
        features[:, c] += torch.where(is_object & (tags[:, c] > 0)[:, None, None], 0.6, 0.0)
    return features, is_object, tags


def test_training_makes_pixels_of_a_class_alike_and_pixels_of_others_not():
    features, is_object, tags = _two_patterns()
    body = nn.Conv2d(6, 6, 1)
    torch.manual_seed(0)
    body.reset_parameters()
    method = make_method(num_classes=2)
    optimiser = torch.optim.Adam([*body.parameters(), *method.parameters()], lr=0.02)
    cams = torch.where(is_object[:, None], 1.5, -1.0).repeat(1, 2, 1, 1)
    pixels = torch.zeros(4, 3, 32, 32)

    def spread():
        units = F.normalize(method.projection(body(features)).relu().permute(0, 2, 3, 1), dim=-1)
        kinds = [units[is_object & (tags[:, c] > 0)[:, None, None]] for c in range(2)] + [units[~is_object]]
        centres = F.normalize(torch.stack([kind.mean(dim=0) for kind in kinds]), dim=1)
        inside = torch.stack([(kind @ centre).mean() for kind, centre in zip(kinds, centres, strict=True)]).mean()
        between = (centres @ centres.T)[~torch.eye(3, dtype=torch.bool)].mean()
        return inside.item(), between.item()

    _, before = spread()
    for _ in range(60):
        trained = body(features)
        step = TrainingStep(pixels, pixels, tags, (trained,), cams, 1.0, lambda pixel_values: None)
        step.second_view = TrainingStep(pixels, pixels, tags, (trained,), cams, 1.0, lambda pixel_values: None)
        optimiser.zero_grad()
        sum(method.losses(step).values()).backward()
        optimiser.step()
    inside, between = spread()
    assert inside > 0.9 and between < 0.75 < before


def test_a_network_of_patches_sees_whole_ones():
    backbone = Backbone()
    backbone.patch_size = 14
    method = Contrast(ContrastConfig(scale=0.3), backbone, CLASSES)
    assert method.second_view(torch.zeros(1, 3, 224, 448)).shape[-2:] == (70, 140)


def test_its_scale_is_the_one_of_the_second_view_also_beside_seam():
    backbone = {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 12],
        "depths": [1, 1],
    }
    config = CamConfig(
        backbone_config=backbone,
        id2label={0: "cat", 1: "cow"},
        contrast={"scale": 0.5, "maps": "seam"},
        seam={"scale": 0.25, "projections": [8, 8], "embedding": 8},
    )
    model = CamClassifier(config).train()
    sizes = []
    model.backbone.register_forward_hook(lambda module, arguments, outputs: sizes.append(arguments[0].shape[-2:]))
    losses = model(torch.randn(2, 3, 64, 64), tags=torch.eye(2)).losses
    assert sizes == [(64, 64), (32, 32)]
    assert {"contrast_intra", "seam_cross"} <= set(losses)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 1.0}, "scale: expected a number in \\(0, 1\\), got 1.0"),
        ({"background": 0}, "background: expected a number in \\(0, 1\\), got 0"),
        ({"temperature": 0}, "temperature: expected a number > 0, got 0"),
        ({"intra_weight": -1}, "intra_weight: expected a number >= 0, got -1"),
        ({"embedding": 0}, "embedding: expected a whole number >= 1, got 0"),
    ],
)
def test_config_refuses_bad_values(options, words):
    with pytest.raises(ValueError, match=f"contrast.{words}"):
        ContrastConfig.from_dict(options, "contrast")


def test_maps_of_a_method_that_is_off():
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    with pytest.raises(ValueError, match=r"contrast.maps: expected cam or a method that is on .* got 'seam'"):
        CamConfig(backbone_config=backbone, contrast={"maps": "seam"})
