from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from wsss_hf.models.methods import TrainingStep
from wsss_hf.models.seam import (
    Seam,
    SeamConfig,
    enlarged_mean,
    equivariance_loss,
    equivariant_cross_regularization,
    losses_of_maps,
    max_one_hot,
    min_max_normalize,
    pixel_correlation,
    smallest_quarter_mean,
    suppressed_scores,
)

REFERENCE = {
    key.removeprefix("seam/"): value
    for key, value in load_file(Path(__file__).parents[1] / "fixtures" / "official_outputs.safetensors").items()
    if key.startswith("seam/")
}
CLASSES = 3


class Backbone(nn.Module):
    channels = [6, 8, 10]
    strides = [2, 4, 8]

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1)
            for inputs, outputs in zip([3, 6, 8], self.channels, strict=True)
        )
        self.classifier = nn.Conv2d(10, CLASSES, kernel_size=1)
        self.sizes = []

    def forward(self, pixel_values):
        self.sizes.append(tuple(pixel_values.shape[-2:]))
        features = []
        for stage in self.stages:
            pixel_values = stage(pixel_values).relu()
            features.append(pixel_values)
        return tuple(features), self.classifier(pixel_values)


def make_step(seam, network, tags, size=(96, 80)):
    images = torch.rand(len(tags), 3, *size, generator=torch.Generator().manual_seed(3))
    pixel_values = (images - 0.5) / 0.25
    features, cams = network(pixel_values)
    step = TrainingStep(pixel_values, images, torch.tensor(tags), features, cams, progress=0.5, classify=network)
    step.second_view = step.of_view(seam.second_view(pixel_values))
    return step


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Backbone()


@pytest.fixture
def seam(network):
    torch.manual_seed(1)
    return Seam(SeamConfig(projections=[4, 5], embedding=12), network, CLASSES)


TAGS = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


def test_losses_and_their_gradients_match_the_released_program():
    views = {n: REFERENCE[n].clone().requires_grad_() for n in ("cams_1", "cams_2", "refined_1", "refined_2")}
    cams, refined = (views["cams_1"][:, 1:], views["cams_2"][:, 1:]), (views["refined_1"], views["refined_2"])
    tags = REFERENCE["tags"]
    losses = losses_of_maps(cams, refined, tags)
    logits = [enlarged_mean(maps, maps.shape[-2:]) for maps in cams]
    losses["classification"] = sum(F.multilabel_soft_margin_loss(means, tags) for means in logits) / 2
    for name, loss in losses.items():
        torch.testing.assert_close(loss, REFERENCE[f"loss_{name}"][0], atol=1e-6, rtol=1e-5)
    total = sum(losses.values())
    torch.testing.assert_close(total, REFERENCE["loss"][0], atol=1e-6, rtol=1e-5)
    total.backward()
    for name, view in views.items():
        wanted = REFERENCE[f"{name}_grad"]
        assert wanted.abs().max() > 5e-4
        torch.testing.assert_close(view.grad, wanted, atol=1e-7, rtol=1e-4)


def test_pixel_correlation_matches_the_released_program():
    refined = pixel_correlation(REFERENCE["pcm_cams"], REFERENCE["pcm_features"])
    torch.testing.assert_close(refined, REFERENCE["pcm"], atol=1e-5, rtol=0)


def test_pixel_correlation_is_the_affinity_weighted_mean_of_all_pixels():
    generator = torch.Generator().manual_seed(0)
    cams, features = torch.rand(2, 3, 3, 4, generator=generator), torch.randn(2, 5, 3, 4, generator=generator)
    expected = torch.zeros(2, 3, 12)
    for image in range(2):
        embedding, maps = features[image].reshape(5, 12), cams[image].reshape(3, 12)
        for pixel in range(12):
            affinity = torch.stack(
                [
                    torch.cosine_similarity(embedding[:, other], embedding[:, pixel], dim=0).relu()
                    for other in range(12)
                ]
            )
            expected[image, :, pixel] = (maps * affinity).sum(dim=1) / affinity.sum()
    torch.testing.assert_close(pixel_correlation(cams, features), expected.reshape(2, 3, 3, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixel_correlation(cams, 1000 * features), pixel_correlation(cams, features))


def test_pixel_correlation_does_not_mix_unlike_pixels():
    cams = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).T.reshape(1, 2, 1, 4)
    torch.testing.assert_close(
        pixel_correlation(cams, features), torch.tensor([[[[0.5, 0.5, 0.0, 0.0]]]]), atol=1e-4, rtol=0
    )


def test_min_max_normalize():
    maps = torch.tensor([[[[-5.0, 1.0], [3.0, 2.0]], [[2.0, 2.0], [2.0, 2.0]], [[2.0, 4.0], [6.0, 4.0]]]])
    expected = torch.tensor([[[[0.0, 1 / 3], [1.0, 2 / 3]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.5], [1.0, 0.5]]]])
    torch.testing.assert_close(min_max_normalize(maps), expected, atol=1e-4, rtol=0)


def test_max_one_hot_keeps_the_strongest_object_and_the_background():
    scores = torch.tensor([0.9, 0.2, 0.5, 0.4]).reshape(1, 4, 1, 1)
    assert max_one_hot(scores).flatten().tolist() == pytest.approx([0.9, 0.0, 0.5, 0.0])


def test_suppressed_scores():
    cams = torch.tensor([[[[2.0, 4.0, -1.0]], [[1.0, 0.5, -2.0]]]])
    expected = torch.tensor([[[[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]]]])
    torch.testing.assert_close(suppressed_scores(cams), expected, atol=1e-4, rtol=0)
    nothing = suppressed_scores(torch.full((1, 2, 2, 2), -3.0))
    torch.testing.assert_close(nothing, torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2))


def test_cross_regularization_counts_the_largest_differences_against_the_detached_one_hot_target():
    scores = torch.tensor([0.0, 0.8, 0.6, 0.0, 0.1]).reshape(1, 5, 1, 1).requires_grad_()
    refined = torch.tensor([0.5, 0.8, 0.6, 0.1, 0.0]).reshape(1, 5, 1, 1).requires_grad_()
    # Differences 0.5, 0, 0.6 (suppressed), 0.1, 0: the largest 40 % are two.
    loss = equivariant_cross_regularization(scores, refined, fraction=0.4)
    assert loss.item() == pytest.approx(0.55)
    loss.backward()
    assert scores.grad is None
    assert refined.grad.flatten().tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0, 0.0])


def test_smallest_quarter_mean_looks_at_the_strongest_object_of_the_weakest_pixels():
    maps = torch.zeros(1, 2, 2, 4)
    maps[0, 0] = torch.arange(8.0).reshape(2, 4)
    maps[0, 1, 0, 0] = 5.0
    assert smallest_quarter_mean(maps).item() == pytest.approx(1.5)
    assert smallest_quarter_mean(maps[..., :1, :1]).item() == pytest.approx(5.0)


def test_equivariance_loss_vanishes_for_a_network_that_follows_scale(network):
    maps = torch.rand(1, 2, 4, 4)
    assert equivariance_loss(maps, maps).item() == 0
    assert equivariance_loss(maps, maps + 0.5).item() == pytest.approx(0.5)

    # The map is the channel means of the image, which is linear: exactly equivariant.
    def classify(pixel_values):
        ramp = nn.functional.avg_pool2d(pixel_values, 8)
        return (ramp, ramp, ramp), ramp

    backbone = Backbone()
    backbone.channels = [3, 3, 3]
    ramp = torch.linspace(0, 1, 160)[:, None].expand(1, 3, 160, 160).contiguous()
    features, cams = classify(ramp)
    step = TrainingStep(ramp, ramp, torch.ones(1, 3), features, cams, 0.0, classify)
    seam = Seam(SeamConfig(), backbone, 3)
    step.second_view = step.of_view(seam.second_view(ramp))
    assert seam.losses(step)["seam_equivariance"].item() < 1e-4


def test_second_view_is_the_image_at_0_3_of_its_size(seam):
    pixels = torch.rand(2, 3, 448, 375)
    view = seam.second_view(pixels)
    assert view.shape == (2, 3, 134, 112)  # what the released program works on: whole pixels of 134.4 and 112.5
    torch.testing.assert_close(view, F.interpolate(pixels, (134, 112), mode="bilinear", align_corners=True))
    assert torch.equal(view[..., [0, -1], [0, -1]], pixels[..., [0, -1], [0, -1]])
    assert seam.second_view(torch.zeros(1, 3, 2, 90)).shape[-2:] == (1, 27)


@pytest.mark.parametrize(("side", "wanted"), [(224, 70), (448, 140), (28, 14)])
def test_a_network_of_patches_sees_whole_ones(network, side, wanted):
    network.patch_size = 14
    seam = Seam(SeamConfig(), network, CLASSES)
    assert seam.second_view(torch.zeros(1, 3, side, side)).shape[-2:] == (wanted, wanted)


def test_gradients_reach_the_network_from_the_cam_losses_and_only_pcm_from_the_refined_ones(network, seam):
    def gradients(name):
        losses = seam.losses(make_step(seam, network, TAGS))
        network.zero_grad()
        seam.zero_grad()
        losses[name].backward()
        return [
            any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
            for module in (network, seam)
        ]

    assert gradients("classification") == [True, False]
    assert gradients("seam_equivariance") == [True, False]
    assert gradients("seam_cross") == [False, True]
    assert gradients("seam_min") == [False, True]


def test_losses_without_tags_are_zero_but_for_the_classification(network, seam):
    losses = seam.losses(make_step(seam, network, [[0.0] * CLASSES] * 2))
    assert losses["classification"].item() > 0
    for name in ("seam_equivariance", "seam_cross", "seam_min"):
        assert losses[name].item() == 0, name
    sum(losses.values()).backward()
    for parameter in [*network.parameters(), *seam.parameters()]:
        assert parameter.grad.isfinite().all()
    assert all(parameter.grad.abs().sum() == 0 for parameter in seam.parameters())


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_classification_loss_is_the_mean_of_both_views(network, seam, weight):
    seam.config = SeamConfig(projections=[4, 5], embedding=12, classification_weight=weight)
    step = make_step(seam, network, TAGS)
    losses = []
    for view in (step, step.second_view):
        shape = view.pixel_values.shape[-2:]
        logits = F.interpolate(view.cams, shape, mode="bilinear", align_corners=True).mean(dim=(2, 3))
        entropy = F.binary_cross_entropy_with_logits(logits, step.tags)
        losses.append(entropy)
    wanted = (losses[0] + weight * losses[1]) / (1 + weight)
    assert abs(losses[0] - losses[1]) > 1e-4
    torch.testing.assert_close(seam.losses(step)["classification"], wanted)


@pytest.mark.parametrize("tags", [TAGS, [[0.0, 0, 1], [0, 0, 0]], [[1.0, 1, 1], [0, 1, 0]]])
def test_both_views_are_compared_at_the_size_of_the_second_image(network, seam, tags):
    """In training maps of tagged classes alone are enlarged: the same losses as with all of them."""
    step = make_step(seam, network, tags)
    every = torch.arange(CLASSES).expand(2, -1)
    cams, refined = zip(*(seam.at_image_size(view, every) for view in (step, step.second_view)), strict=True)
    assert [maps.shape[-2:] for maps in (*cams, *refined)] == 2 * [(96, 80), (28, 24)]
    losses, wanted = seam.losses(step), losses_of_maps(cams, refined, step.tags)
    assert wanted["cross"] > 1e-4
    for name in ("equivariance", "cross", "min"):
        torch.testing.assert_close(losses[f"seam_{name}"], wanted[name])


def test_the_mean_of_enlarged_maps_needs_no_enlarging():
    maps = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(maps, (21, 16), mode="bilinear", align_corners=True).mean(dim=(2, 3))
    torch.testing.assert_close(enlarged_mean(maps, (21, 16)), wanted)


def test_a_step_without_the_second_view_is_refused(network, seam):
    step = make_step(seam, network, TAGS)
    step.second_view = None
    with pytest.raises(ValueError, match="second_view: expected"):
        seam.losses(step)


def test_weights_scale_their_losses(network, seam):
    plain = seam.losses(make_step(seam, network, TAGS))
    weights = {"equivariance_weight": 3.0, "cross_weight": 4.0, "min_weight": 5.0}
    seam.config = SeamConfig(projections=[4, 5], embedding=12, **weights)
    weighted = seam.losses(make_step(seam, network, TAGS))
    for name, weight in zip(plain, (1.0, *weights.values()), strict=True):
        torch.testing.assert_close(weighted[name], weight * plain[name])


def test_losses_are_float32_and_finite_in_autocast(network, seam):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = seam.losses(make_step(seam, network, TAGS))
    assert all(loss.dtype == torch.float32 and loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in seam.parameters())


def test_maps_are_the_refined_cams(network, seam):
    step = make_step(seam, network, TAGS)
    maps = seam.maps(step)
    assert maps.shape == step.cams.shape
    assert maps.min() >= 0 and maps.max() <= 1
    one_hot = suppressed_scores(step.cams)[:, 1:]
    assert not torch.allclose(maps, one_hot, atol=1e-3)
    # A weighted mean of all pixels lies between their extremes.
    assert (maps.amax(dim=(2, 3)) <= one_hot.amax(dim=(2, 3)) + 1e-5).all()


def test_stages_can_be_chosen_and_are_resized_to_the_map(network):
    seam = Seam(SeamConfig(stages=[0, 1, 2], projections=[2, 3, 4], embedding=7), network, CLASSES)
    assert [projection.in_channels for projection in seam.projections] == Backbone.channels
    assert seam.embedding.in_channels == 3 + 2 + 3 + 4
    assert seam.maps(make_step(seam, network, TAGS)).isfinite().all()


def test_a_stage_that_does_not_exist_is_named(network):
    with pytest.raises(ValueError, match=r"seam.stages: expected stages of this backbone \(-3 to 2\), got -4"):
        Seam(SeamConfig(stages=[-4, -1]), network, CLASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 1.0}, "scale"),
        ({"cross_fraction": 0.0}, "cross_fraction"),
        ({"stages": [-1]}, "projections"),
        ({"embedding": 0}, "embedding"),
        ({"min_weight": -1.0}, "min_weight"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SeamConfig(**options)
