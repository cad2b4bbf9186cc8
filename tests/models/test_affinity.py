import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from wsss_hf.models.affinity import (
    affinity_losses,
    boundary_affinity,
    feature_affinity,
    offsets,
    path,
    random_walk,
)

OFFICIAL = load_file(Path(__file__).parents[1] / "fixtures" / "official_outputs.safetensors")


def dense(affinity, radius):
    """(1, P, h, w) → the symmetric matrix of all pairs, with ones on its diagonal."""
    height, width = affinity.shape[-2:]
    matrix = torch.eye(height * width)
    for p, (down, right) in enumerate(offsets(radius)):
        for y in range(height):
            for x in range(width):
                if 0 <= y + down < height and 0 <= x + right < width:
                    one, other = y * width + x, (y + down) * width + x + right
                    matrix[one, other] = matrix[other, one] = affinity[0, p, y, x]
    return matrix


def inner(affinity, radius):
    """As the programs compute their matrices: without the pairs whose first position has neighbours outside."""
    height, width = affinity.shape[-2:]
    kept = torch.zeros_like(affinity)
    kept[..., : height - radius + 1, radius - 1 : width - radius + 1] = 1
    return affinity * kept


def test_neighbours_are_half_of_the_disc_and_no_two_are_opposite():
    for radius in (2, 5, 10):
        half = set(offsets(radius))
        disc = {(y, x) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1)}
        disc = {(y, x) for y, x in disc if 0 < math.hypot(y, x) < radius}
        assert half | {(-y, -x) for y, x in half} == disc
        assert not half & {(-y, -x) for y, x in half}


def test_a_path_holds_both_ends_and_what_is_nearer_than_1_to_the_line():
    assert path(0, 3) == ((0, 0), (0, 1), (0, 2), (0, 3))
    assert set(path(2, -2)) == {(0, 0), (1, -1), (2, -2), (0, -1), (1, 0), (1, -2), (2, -1)}
    assert set(path(1, 2)) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}
    assert set(path(3, 4)) & {(0, 2), (3, 2), (0, 1)} == {(0, 1)}  # 1.2, 1.2 and 0.6 from the line


def test_irns_losses_and_gradient_are_the_released_programs():
    logits = OFFICIAL["irn/edge_logits"].clone().requires_grad_()
    affinity = boundary_affinity(logits.sigmoid()[:, 0], 10)
    losses = affinity_losses(affinity, OFFICIAL["irn/labels"], 10)
    for name, part, share in (
        ("background", "background", 4),
        ("foreground", "foreground", 4),
        ("negative", "different", 2),
    ):
        torch.testing.assert_close(share * losses[f"{part}_pairs"], OFFICIAL[f"irn/loss_{name}"][0], atol=1e-4, rtol=0)
    loss = sum(losses.values())
    torch.testing.assert_close(loss, OFFICIAL["irn/loss"][0], atol=1e-4, rtol=0)
    loss.backward()
    torch.testing.assert_close(logits.grad, OFFICIAL["irn/edge_logits_grad"], atol=1e-6, rtol=1e-4)


def test_affinities_are_the_released_programs():
    affinity = boundary_affinity(OFFICIAL["irn/edge_small"][None], 5)
    torch.testing.assert_close(dense(inner(affinity, 5), 5), OFFICIAL["irn/affinity_dense_small"], atol=1e-4, rtol=0)
    affinity = feature_affinity(OFFICIAL["affinitynet/features"], 5)
    torch.testing.assert_close(dense(inner(affinity, 5), 5), OFFICIAL["affinitynet/affinity_dense"], atol=1e-4, rtol=0)


def test_walks_are_the_released_programs():
    boundary = OFFICIAL["irn/walk_edge"]
    maps = (OFFICIAL["irn/walk_cams"] * (1 - boundary))[None]
    walked = random_walk(maps, boundary_affinity(boundary, 5), 5, power=10, steps=2**8)
    torch.testing.assert_close(walked[0], OFFICIAL["irn/walked"], atol=1e-4, rtol=0)
    affinity = inner(feature_affinity(OFFICIAL["affinitynet/features"], 5), 5)
    walked = random_walk(OFFICIAL["affinitynet/scores"][None], affinity, 5, power=8, steps=2**6)
    torch.testing.assert_close(walked[0], OFFICIAL["affinitynet/walked"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(6, 7), (3, 2), (1, 9)])
def test_a_walk_is_a_power_of_the_normalised_matrix_of_all_pairs(size):
    generator = torch.Generator().manual_seed(0)
    boundary = torch.rand(2, *size, generator=generator)
    maps = torch.rand(2, 3, *size, generator=generator)
    affinity = boundary_affinity(boundary, 4)
    walked = random_walk(maps, affinity, 4, power=3, steps=5)
    for one in range(2):
        matrix = dense(affinity[one : one + 1], 4) ** 3
        matrix = torch.linalg.matrix_power(matrix / matrix.sum(dim=0), 5)
        torch.testing.assert_close(walked[one].flatten(1), maps[one].flatten(1) @ matrix, atol=1e-5, rtol=0)


def test_nothing_walks_across_a_boundary_or_out_of_the_image():
    boundary = torch.zeros(1, 8, 9)
    boundary[:, :, 4] = 1
    maps = torch.zeros(1, 2, 8, 9)
    maps[:, 0, :, :4], maps[:, 1] = 1, 1
    walked = random_walk(maps, boundary_affinity(boundary, 5), 5, power=10, steps=100)
    torch.testing.assert_close(walked, maps, atol=1e-5, rtol=0)


def test_small_label_maps_still_teach_and_missing_kinds_of_pairs_give_zero():
    affinity = torch.full((1, len(offsets(5)), 3, 3), 0.5)
    losses = affinity_losses(affinity, torch.zeros(1, 3, 3), 5)
    assert losses["background_pairs"] == pytest.approx(math.log(2) / 4, abs=1e-3)
    assert losses["foreground_pairs"] == losses["different_pairs"] == 0
    nothing = affinity_losses(affinity, torch.full((1, 3, 3), 255.0), 5)
    assert all(loss == 0 for loss in nothing.values())


def test_feature_affinity_is_1_between_equal_features_and_0_outside():
    features = torch.ones(1, 4, 5, 6)
    affinity = feature_affinity(features, 3)
    inside = F.pad(torch.ones(5, 6), [2, 2, 0, 2])
    for p, (down, right) in enumerate(offsets(3)):
        expected = inside[down : down + 5, 2 + right : 8 + right]
        torch.testing.assert_close(affinity[0, p], expected)
