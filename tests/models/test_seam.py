import pytest
import torch
from torch import nn

from wsss_hf.models.methods import TrainingStep
from wsss_hf.models.seam import (
    Seam,
    SeamConfig,
    equivariance_loss,
    equivariant_cross_regularization,
    max_one_hot,
    min_max_normalize,
    pixel_correlation,
    smallest_quarter_mean,
    suppressed_scores,
)

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


def make_step(network, tags, size=(96, 80)):
    images = torch.rand(len(tags), 3, *size, generator=torch.Generator().manual_seed(3))
    pixel_values = (images - 0.5) / 0.25
    features, cams = network(pixel_values)
    return TrainingStep(pixel_values, images, torch.tensor(tags), features, cams, progress=0.5, classify=network)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Backbone()


@pytest.fixture
def seam(network):
    torch.manual_seed(1)
    return Seam(SeamConfig(projections=[4, 5], embedding=12), network, CLASSES)


TAGS = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


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
    assert Seam(SeamConfig(), backbone, 3).losses(step)["seam_equivariance"].item() < 1e-4


def test_second_view_is_scaled_in_whole_strides(network, seam):
    step = make_step(network, TAGS, size=(96, 80))
    network.sizes.clear()
    seam.losses(step)
    assert network.sizes == [(32, 24)]
    assert seam.smaller_view(torch.zeros(1, 3, 16, 448)).shape[-2:] == (8, 136)


def test_gradients_reach_the_network_from_the_cam_losses_and_only_pcm_from_the_refined_ones(network, seam):
    def gradients(name):
        losses = seam.losses(make_step(network, TAGS))
        network.zero_grad()
        seam.zero_grad()
        losses[name].backward()
        return [
            any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
            for module in (network, seam)
        ]

    assert gradients("seam_classification") == [True, False]
    assert gradients("seam_equivariance") == [True, False]
    assert gradients("seam_cross") == [False, True]
    assert gradients("seam_min") == [False, True]


def test_losses_without_tags_are_zero_but_for_the_classification(network, seam):
    losses = seam.losses(make_step(network, [[0.0] * CLASSES] * 2))
    assert losses["seam_classification"].item() > 0
    for name in ("seam_equivariance", "seam_cross", "seam_min"):
        assert losses[name].item() == 0, name
    sum(losses.values()).backward()
    for parameter in [*network.parameters(), *seam.parameters()]:
        assert parameter.grad.isfinite().all()
    assert all(parameter.grad.abs().sum() == 0 for parameter in seam.parameters())


def test_classification_loss_is_that_of_the_second_view(network, seam):
    step = make_step(network, TAGS)
    _, cams = network(seam.smaller_view(step.pixel_values))
    expected = nn.functional.multilabel_soft_margin_loss(cams.mean(dim=(2, 3)), step.tags)
    torch.testing.assert_close(seam.losses(step)["seam_classification"], expected)


def test_cross_and_lowest_quarter_losses_treat_both_views_alike(network, seam):
    step = make_step(network, TAGS)
    view = seam.smaller_view(step.pixel_values)
    view_features, view_cams = network(view)
    losses = seam.losses(step)
    tags = step.tags[:, :, None, None]
    refined = seam.refine(step.pixel_values, step.features, step.cams)
    view_refined = seam.refine(view, view_features, view_cams)
    lowest = [smallest_quarter_mean(maps[:, 1:] * tags) for maps in (refined, view_refined)]
    torch.testing.assert_close(losses["seam_min"], torch.stack(lowest).mean())

    def scores(cams):
        objects = nn.functional.interpolate(
            min_max_normalize(cams), size=view_cams.shape[-2:], mode="bilinear", align_corners=True
        )
        return torch.cat([1 - (objects * tags).amax(dim=1, keepdim=True), objects * tags], dim=1)

    def refined_scores(maps):
        maps = nn.functional.interpolate(
            min_max_normalize(maps), size=view_cams.shape[-2:], mode="bilinear", align_corners=True
        )
        return torch.cat([maps[:, :1], maps[:, 1:] * tags], dim=1)

    expected = equivariant_cross_regularization(scores(view_cams), refined_scores(refined))
    expected = expected + equivariant_cross_regularization(scores(step.cams), refined_scores(view_refined))
    torch.testing.assert_close(losses["seam_cross"], expected)


def test_weights_scale_their_losses(network, seam):
    plain = seam.losses(make_step(network, TAGS))
    weights = {"classification_weight": 2.0, "equivariance_weight": 3.0, "cross_weight": 4.0, "min_weight": 5.0}
    seam.config = SeamConfig(projections=[4, 5], embedding=12, **weights)
    weighted = seam.losses(make_step(network, TAGS))
    for name, weight in zip(plain, weights.values(), strict=True):
        torch.testing.assert_close(weighted[name], weight * plain[name])


def test_losses_are_float32_and_finite_in_autocast(network, seam):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = seam.losses(make_step(network, TAGS))
    assert all(loss.dtype == torch.float32 and loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in seam.parameters())


def test_maps_are_the_refined_cams(network, seam):
    step = make_step(network, TAGS)
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
    assert seam.maps(make_step(network, TAGS)).isfinite().all()


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
