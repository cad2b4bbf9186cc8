import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from wsss_hf import AffinityConfig, AffinityNetwork
from wsss_hf.models.affinity import boundary_affinity, feature_affinity, random_walk

BACKBONE = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [1, 1, 1]}
BACKBONE |= {"layer_type": "basic"}


@pytest.fixture(params=["irn", "affinitynet"])
def network(request):
    torch.manual_seed(0)
    return AffinityNetwork(AffinityConfig(backbone_config=BACKBONE, kind=request.param, radius=4))


def test_only_the_new_layers_learn(network):
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 3, (2, 64, 96))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    output = network(images, labels)
    output.loss.backward()
    optimizer.step()
    assert output.loss.item() == pytest.approx(sum(loss.item() for loss in output.losses.values()))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_the_grid_is_every_4th_or_8th_pixel_rounded_up(network):
    stride = {"irn": 4, "affinitynet": 8}[network.config.kind]
    logits = network.eval()(torch.randn(1, 3, 70, 50)).logits
    channels = 1 if network.config.kind == "irn" else 64 + 128 + 256
    assert logits.shape == (1, channels, -(-70 // stride), -(-50 // stride))


def test_a_walk_of_the_mirror_image_is_the_mirror_image_of_the_walk(network):
    network.eval()
    images, maps = torch.randn(2, 3, 64, 64), torch.rand(2, 3, 32, 32)
    walked = network.walk(images, maps, radius=3, power=2, steps=5)
    mirrored = network.walk(images.flip(-1), maps.flip(-1), radius=3, power=2, steps=5)
    assert walked.shape == maps.shape
    torch.testing.assert_close(mirrored.flip(-1), walked, atol=1e-5, rtol=0)
    assert 0 <= walked.min() and walked.max() <= 1


@torch.no_grad()
def test_it_walks_by_the_mean_of_both_images_and_from_nothing_on_boundaries(network):
    network.eval()
    images, maps = torch.randn(1, 3, 64, 64), torch.rand(1, 2, 32, 32)
    logits = (network(images).logits + network(images.flip(-1)).logits.flip(-1)) / 2
    grid = F.avg_pool2d(maps, 32 // logits.shape[-1])
    if network.config.kind == "irn":
        boundary = logits.sigmoid()
        affinity, grid = boundary_affinity(boundary[:, 0], 3), grid * (1 - boundary)
    else:
        affinity = feature_affinity(logits, 3)
    expected = F.interpolate(random_walk(grid, affinity, 3, 2, 5), size=(32, 32), mode="bilinear")
    found = network.walk(images, maps, radius=3, power=2, steps=5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_it_is_saved_and_loaded_by_the_auto_class(network, tmp_path):
    network.eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, AffinityNetwork)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(images).logits, network(images).logits, atol=0, rtol=0)


def test_images_smaller_than_the_radius_walk_and_teach(network):
    images, labels = torch.randn(1, 3, 33, 40), torch.randint(0, 2, (1, 33, 40))
    assert network(images, labels).loss.isfinite()
    assert network.eval().walk(images, torch.rand(1, 1, 33, 40), radius=12, power=2, steps=2).isfinite().all()


def test_a_backbone_of_one_stage_is_enough(network):
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    single = AffinityNetwork(AffinityConfig(backbone_config=backbone, kind=network.config.kind, radius=4))
    images, labels = torch.randn(1, 3, 64, 64), torch.randint(0, 2, (1, 64, 64))
    assert len(single.branches) == 1 and single(images, labels).loss.isfinite()
    assert single.eval().walk(images, torch.rand(1, 1, 64, 64), radius=4, power=2, steps=2).isfinite().all()


def test_affinitynets_layers_start_as_in_the_released_programs():
    torch.manual_seed(0)
    network = AffinityNetwork(AffinityConfig(backbone_config=BACKBONE, kind="affinitynet"))
    for branch, channels in zip(network.branches, (8, 12, 16), strict=True):
        assert branch[0].weight.std().item() == pytest.approx((2 / channels) ** 0.5, rel=0.1)
    weights = network.head[0].weight.abs()
    assert weights.max().item() == pytest.approx(4 * (6 / (448 + 448)) ** 0.5, rel=0.01)
    assert weights.mean().item() == pytest.approx(weights.max().item() / 2, rel=0.01)


@pytest.mark.parametrize(("options", "message"), [({"kind": "x"}, "kind: expected irn"), ({"radius": 1}, "radius")])
def test_unfit_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AffinityConfig(backbone_config=BACKBONE, **options)


def test_labels_of_another_size_are_named(network):
    with pytest.raises(ValueError, match=r"labels: expected shape \(1, 64, 64\), got \(1, 32, 32\)"):
        network(torch.randn(1, 3, 64, 64), torch.zeros(1, 32, 32, dtype=torch.long))
