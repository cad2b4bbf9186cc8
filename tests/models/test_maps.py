import torch

from wsss_hf.models.maps import add_background, normalize_maps


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
