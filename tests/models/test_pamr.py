from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wsss_hf.models.pamr import colour_affinity, pamr

REFERENCE = load_file(Path(__file__).parents[1] / "fixtures" / "official_outputs.safetensors")


def test_matches_the_released_program():
    refined = pamr(REFERENCE["pamr/image"], REFERENCE["pamr/scores"], iterations=10, dilations=(1, 2, 4, 8, 12, 24))
    torch.testing.assert_close(refined, REFERENCE["pamr/refined"], atol=1e-4, rtol=0)


def test_affinity_is_the_softmax_of_colour_similarity_with_repeated_borders():
    image = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    affinity = colour_affinity(image, dilations=(1, 3))

    def colour(row, column):
        return image[0, :, min(max(row, 0), 3), min(max(column, 0), 4)]

    for row in range(4):
        for column in range(5):
            window = [
                colour(row + down, column + right) for d in (1, 3) for down in (-d, 0, d) for right in (-d, 0, d)
            ]
            outer = [neighbour for index, neighbour in enumerate(window) if index % 9 != 4]
            scale = 0.1 * torch.stack(window).std(dim=0) + 1e-8
            similarity = torch.stack(
                [-((neighbour - colour(row, column)).abs() / scale).mean() for neighbour in outer]
            )
            torch.testing.assert_close(affinity[0, :, row, column], similarity.softmax(0))


def test_scores_spread_inside_a_colour_and_stop_at_its_edge():
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 1.0
    scores = torch.zeros(1, 1, 16, 16)
    scores[..., 4, 2] = 1.0
    refined = pamr(images, scores)
    assert (refined[..., :8] > 0).all()
    assert refined[..., 8:].abs().max() < 1e-6 * refined.max()


def test_keeps_distributions_and_a_flat_image_finite():
    scores = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    refined = pamr(torch.full((2, 3, 9, 7), 0.3), scores, dilations=(1, 2))
    torch.testing.assert_close(refined.sum(dim=1), torch.ones(2, 9, 7))
    assert refined.std() < scores.std()


def test_images_are_resized_to_the_scores_and_may_be_normalised():
    generator = torch.Generator().manual_seed(2)
    images, scores = torch.rand(2, 3, 32, 24, generator=generator), torch.rand(2, 3, 8, 6, generator=generator)
    refined = pamr(images, scores)
    assert refined.shape == scores.shape
    small = torch.nn.functional.interpolate(images, size=(8, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(refined, pamr(small, scores))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(pamr(normalised, scores), refined, atol=1e-5, rtol=0)


def test_has_no_gradient_and_computes_in_float32():
    scores = torch.rand(1, 2, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    refined = pamr(torch.rand(1, 3, 6, 6, dtype=torch.bfloat16), scores)
    assert refined.dtype == torch.float32 and not refined.requires_grad


@pytest.mark.parametrize(
    ("images", "scores", "dilations", "message"),
    [
        ((2, 3, 8, 8), (1, 2, 8, 8), (1,), "of one batch size"),
        ((3, 8, 8), (1, 2, 8, 8), (1,), "of one batch size"),
        ((1, 3, 8, 8), (1, 2, 8, 8), (), "at least one dilation"),
        ((1, 3, 8, 8), (1, 2, 8, 8), (1, 0), "at least one dilation"),
    ],
)
def test_bad_input_is_named(images, scores, dilations, message):
    with pytest.raises(ValueError, match=message):
        pamr(torch.zeros(images), torch.zeros(scores), dilations=dilations)
