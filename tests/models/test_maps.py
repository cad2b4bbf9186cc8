import pytest
import torch
from torch.nn import functional as F

from wsss_hf.models.maps import (
    add_background,
    at_all_classes,
    fuse_maps,
    normalize_maps,
    upsample,
)
from wsss_hf.models.probabilities import class_probabilities, mean_probabilities


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("old", "new"), [((3, 5), (17, 9)), ((1, 4), (6, 4)), ((8, 8), (5, 3)), ((7, 2), (7, 2))])
def test_upsampling_is_that_of_torch(old, new, align_corners):
    maps = torch.randn(2, 3, *old, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(maps, size=new, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(upsample(maps, new, align_corners), wanted, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(upsample(maps, new, align_corners), wanted, atol=1e-5, rtol=0)
    assert upsample(maps.bfloat16(), new).dtype == torch.float32


def test_each_class_is_divided_by_its_own_maximum_and_negatives_become_zero():
    maps = torch.tensor([[[[4.0, 2.0], [-1.0, 0.0]], [[0.1, -3.0], [0.05, 0.0]]]])
    expected = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]], [[1.0, 0.0], [0.5, 0.0]]]])
    torch.testing.assert_close(normalize_maps(maps), expected, rtol=0, atol=2e-4)


def test_values_stay_below_one_and_batches_apart():
    maps = torch.rand(2, 3, 4, 5) * torch.tensor([1.0, 100.0])[:, None, None, None]
    normalized = normalize_maps(maps)
    assert 0 <= normalized.min() and normalized.max() < 1
    torch.testing.assert_close(normalized[1:], normalize_maps(maps[1:]))


def test_a_class_without_evidence_is_zero_everywhere():
    assert torch.equal(normalize_maps(-torch.rand(1, 2, 3, 3), torch.ones(1, 2), (6, 6)), torch.zeros(1, 2, 6, 6))


def test_untagged_classes_become_zero():
    normalized = normalize_maps(torch.rand(2, 2, 3, 3) + 1, torch.tensor([[1, 0], [0, 1]]))
    assert (normalized.amax(dim=(2, 3)) > 0.9).tolist() == [[True, False], [False, True]]
    assert normalized[0, 1].max() == normalized[1, 0].max() == 0


def test_negatives_are_cut_and_the_maximum_taken_at_the_right_size():
    """relu before the upsampling, division after it: a lone peak loses height on the way, and its map is 1 again."""
    maps = torch.tensor([[[[-8.0, 4.0, -8.0]]]])
    normalized = normalize_maps(maps, size=(1, 6))
    torch.testing.assert_close(
        normalized[0, 0, 0], torch.tensor([0.0, 1 / 3, 1.0, 1.0, 1 / 3, 0.0]), rtol=0, atol=1e-4
    )


def test_half_precision_is_computed_in_float32():
    maps = torch.rand(1, 2, 3, 3).to(torch.bfloat16)
    normalized = normalize_maps(maps, torch.ones(1, 2, dtype=torch.bool), (6, 6))
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, normalize_maps(maps.float(), size=(6, 6)))


def test_background_wins_where_no_map_reaches_the_threshold():
    maps = torch.tensor([[[[0.9, 0.3, 0.1]], [[0.2, 0.5, 0.3]]]])
    scores = add_background(maps, 0.4)
    assert scores.shape == (1, 3, 1, 3)
    assert scores.argmax(dim=1)[0, 0].tolist() == [1, 2, 0]
    assert torch.equal(scores[:, 1:], maps)


def test_fused_maps_find_their_way_back_to_their_classes():
    tags = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    views = [torch.rand(3, 3, 4, 4), torch.rand(3, 3, 2, 6)]
    for fusion, both in (("mean", torch.add), ("max", torch.maximum)):
        fused = fuse_maps(iter(views), tags, (8, 8), fusion)
        assert fused.shape == (3, 8, 8)
        wanted = normalize_maps(both(*(normalize_maps(view, size=(8, 8)) for view in views)), tags)
        torch.testing.assert_close(at_all_classes(fused, tags), wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="views: expected at least one"):
        fuse_maps([], tags, (8, 8))


def test_probabilities_are_averaged_after_the_softmax():
    views = [torch.randn(2, 4, 3, 3), 5 * torch.randn(2, 4, 5, 2)]
    wanted = sum(F.interpolate(view, size=(9, 7), mode="bilinear").softmax(dim=1) for view in views) / 2
    torch.testing.assert_close(mean_probabilities(views, (9, 7)), wanted, atol=1e-5, rtol=0)


def test_known_classes_share_the_probability_of_the_others():
    probabilities = torch.tensor([0.2, 0.3, 0.1, 0.4])[:, None, None]
    found = class_probabilities(probabilities, torch.tensor([0, 2]), background_factor=0.5)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.1, 0.3, 0.4]) / 0.8)
    assert class_probabilities(probabilities, torch.tensor([], dtype=torch.long)).flatten().tolist() == [1]
    assert probabilities[0] == 0.2
