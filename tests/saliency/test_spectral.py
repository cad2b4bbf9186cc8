import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from wsss_hf.saliency.load import load_source
from wsss_hf.saliency.source import SaliencyError
from wsss_hf.saliency.spectral import feature_affinity, orient, second_eigenvector, soft_map


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic")
    folder = tmp_path_factory.mktemp("models") / "resnet"
    ResNetModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=56, patch_size=14
    )
    folder = tmp_path_factory.mktemp("models") / "vit"
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def maps_of(folder, rows, **settings):
    source = load_source(spectral=folder, settings={"size": 56} | settings)
    source.prepare(rows, torch.device("cpu"))
    found = dict(source.maps(rows))
    return [found[index] for index in range(len(rows))]


def test_the_eigenvector_is_the_one_that_scipy_finds():
    torch.manual_seed(0)
    affinity = feature_affinity(torch.randn(3, 5, 4, 6), tau=0.1)
    found = second_eigenvector(affinity)
    for vector, weights in zip(found.numpy(), affinity.numpy(), strict=True):
        degrees = np.diag(weights.sum(axis=1))
        _, wanted = scipy.linalg.eigh(degrees - weights, degrees, subset_by_index=[1, 1])
        wanted = wanted[:, 0]  # of length 1 in the norm of the degrees, of either sign
        np.testing.assert_allclose(vector * np.sign(vector @ wanted), wanted, atol=1e-8)


def test_edges_are_strong_above_the_threshold_and_weak_elsewhere():
    features = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.4, 1.0]]).view(1, 2, 1, 3)  # cosines 0.93, 0, 0.37
    strong = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    assert torch.equal(feature_affinity(features, tau=0.2)[0], strong.double().clamp(min=1e-5))
    assert feature_affinity(features, tau=0.5)[0, 1, 2] == 1e-5


def test_centred_features_tell_patches_apart_that_share_a_direction():
    torch.manual_seed(0)
    features = torch.randn(1, 4, 3, 3) + 100
    assert (feature_affinity(features) == 1).all()
    centred = feature_affinity(features, center=True)
    assert 0 < (centred == 1).double().mean() < 1
    torch.testing.assert_close(centred, feature_affinity(features - 100, center=True))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_where_the_greatest_entry_is(sign):
    vector = torch.full((4, 4), -1.0)
    vector[1, 1] = 5
    assert torch.equal(orient(sign * vector), vector)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_has_no_three_corners(sign):
    vector = torch.full((5, 5), -1.0)
    vector[1:4, 1:4] = 1.0
    vector[0, 2] = -3  # the greatest entry is beside the object
    assert torch.equal(orient(sign * vector), vector)
    vector[0, 0] = vector[0, 4] = 1  # now only two corners are
    assert torch.equal(orient(sign * vector), -vector)


def test_the_cut_is_at_one_half():
    torch.manual_seed(0)
    vector = torch.randn(5, 6).double()
    found = soft_map(vector)
    assert found.min() == 0 and found.max() == 1
    assert torch.equal(found > 0.5, vector > vector.mean())
    order = vector.flatten().argsort()
    assert (found.flatten()[order].diff() >= 0).all()


def test_a_constant_vector_is_an_empty_map():
    assert not soft_map(torch.full((2, 3), 0.3)).any()


def test_an_image_without_structure_has_an_empty_map(toy_data, resnet_folder):
    def paint(row):
        return {"image": Image.new("RGB", (48, 48), (90, 120, 20))}

    rows = toy_data["train"].select(range(2)).map(paint)
    assert not np.any(maps_of(resnet_folder, rows, center=False, tau=-1))
    alike = feature_affinity(torch.ones(1, 4, 3, 3))
    assert not second_eigenvector(alike).any()
    assert not second_eigenvector(feature_affinity(torch.eye(9).view(1, 9, 3, 3))).any()


def test_an_object_of_other_features_is_found():
    torch.manual_seed(0)
    features = 0.1 * torch.randn(1, 8, 8, 10)
    features[:, 0] += 1
    features[:, :, 2:6, 3:7] += torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 0]).view(1, 8, 1, 1)
    vector = second_eigenvector(feature_affinity(features))[0]
    wanted = torch.zeros(8, 10, dtype=torch.bool)
    wanted[2:6, 3:7] = True
    assert torch.equal(soft_map(orient(vector.view(8, 10))) > 0.5, wanted)


@pytest.mark.parametrize("fixture", ["resnet_folder", "vit_folder"])
def test_every_image_has_a_map_of_its_size(toy_data, request, fixture):
    rows = toy_data["train"].select(range(4))
    maps = maps_of(request.getfixturevalue(fixture), rows, output_stride=None)
    for image, found in zip(rows["image"], maps, strict=True):
        assert found.shape == (image.height, image.width) and found.dtype == np.float32
        assert found.min() >= 0 and found.max() <= 1 and found.std() > 0.01


def test_maps_do_not_change_with_the_batch(toy_data, resnet_folder):
    rows = toy_data["train"].select(range(5))
    first, second, other = (maps_of(resnet_folder, rows, batch_size=size) for size in (2, 2, 5))
    for one, same, batched in zip(first, second, other, strict=True):
        assert np.array_equal(one, same)
        np.testing.assert_allclose(one, batched, atol=1e-3)


def test_convolutional_features_are_centred_and_tokens_are_not(toy_data, resnet_folder, vit_folder):
    rows = toy_data["train"].select(range(2))
    for folder, by_default in ((resnet_folder, True), (vit_folder, False)):
        default, same, other = (
            np.stack(maps_of(folder, rows, output_stride=None, tau=0.5, **options))
            for options in ({}, {"center": by_default}, {"center": not by_default})
        )
        assert np.array_equal(default, same) and not np.array_equal(default, other)


@pytest.mark.parametrize("change", [{"stage": 0}, {"tau": 0.6}, {"refine": True}, {"size": 96}, {"output_stride": 4}])
def test_every_option_counts(toy_data, resnet_folder, change):
    rows = toy_data["train"].select(range(2))
    assert not np.array_equal(maps_of(resnet_folder, rows), maps_of(resnet_folder, rows, **change))


def test_a_stage_that_is_not_there_is_refused(toy_data, resnet_folder):
    with pytest.raises(SaliencyError, match=r"stage: expected -2 to 1, got 2"):
        maps_of(resnet_folder, toy_data["train"], stage=2)


def test_a_backbone_that_is_not_there_is_named():
    with pytest.raises(SaliencyError, match="spectral: expected a backbone's folder or Hub id, got owner/nothing"):
        load_source(spectral="owner/nothing")


def test_what_it_has_learnt_from_names_the_backbone(resnet_folder):
    source = load_source(spectral=resnet_folder)
    assert source.learnt_from == f"no masks: normalised cut on the features of {resnet_folder}"
