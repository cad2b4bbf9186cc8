"""Trimaps: what is certain, for one class and between classes, and what remains where a side is empty."""

import numpy as np
import pytest

from wsss_hf.refinement.trimap import BACKGROUND, FOREGROUND, UNKNOWN, trimap, trimaps


def ramp(size=21):
    """(1, size) scores that rise from 0 to 1 in steps of 0.05."""
    return np.linspace(0, 1, size)[None]


def nowhere(scores):
    return np.zeros(scores.shape, dtype=bool)


def test_thresholds_split_the_map_in_three():
    scores = ramp()
    result = trimap(scores, nowhere(scores), 0.72, 0.22, erosion=0)
    expected = np.where(scores > 0.72, FOREGROUND, np.where(scores < 0.22, BACKGROUND, UNKNOWN))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


def test_erosion_makes_borders_unknown_but_not_the_border_of_the_image():
    scores = np.zeros((20, 20))
    scores[:, :10] = 1
    result = trimap(scores, nowhere(scores), erosion=2)
    for columns, value in ((slice(0, 8), FOREGROUND), (slice(8, 12), UNKNOWN), (slice(12, 20), BACKGROUND)):
        assert (result[:, columns] == value).all()


def test_erosion_keeps_a_region_that_it_would_remove():
    scores = np.zeros((20, 20))
    scores[9:11, 9:11] = 1
    assert ((trimap(scores, nowhere(scores), erosion=3) == FOREGROUND) == (scores == 1)).all()


def test_certain_foreground_of_another_class_is_background():
    maps = np.full((2, 12, 12), 0.5)
    maps[0, :, :4] = 0.9
    maps[1, :, 8:] = 0.9
    first, second = trimaps(maps, erosion=0)
    assert (first[:, :4] == FOREGROUND).all() and (second[:, :4] == BACKGROUND).all()
    assert (first[:, 8:] == BACKGROUND).all() and (second[:, 8:] == FOREGROUND).all()
    assert (first[:, 4:8] == UNKNOWN).all() and (second[:, 4:8] == UNKNOWN).all()


def test_what_several_classes_claim_is_unknown_to_all():
    maps = np.zeros((2, 1, 9))
    maps[0, 0, :6] = 1
    maps[1, 0, 3:] = 1
    assert (trimaps(maps, erosion=0)[:, 0, 3:6] == UNKNOWN).all()


def test_a_class_claimed_everywhere_keeps_its_claim():
    maps = np.zeros((2, 1, 9))
    maps[0] = 1
    maps[1, 0, 3:6] = 0.8
    whole, part = trimaps(maps, erosion=0)
    assert (part[0, 3:6] == FOREGROUND).all() and (part[0, [0, 8]] == BACKGROUND).all()
    assert (whole[0, 3:6] == UNKNOWN).all() and (whole[0, [0, 8]] == FOREGROUND).all()


def test_without_certain_foreground_the_largest_score_is_it():
    scores = ramp() * 0.6
    result = trimap(scores, nowhere(scores), erosion=0)
    assert result[0, -1] == FOREGROUND and (result == FOREGROUND).sum() == 1


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_map_without_evidence_is_background(value):
    scores = np.full((5, 5), value)
    assert (trimap(scores, nowhere(scores)) == BACKGROUND).all()


def test_without_background_there_is_none():
    scores = np.full((9, 9), 0.5)
    scores[3:6, 3:6] = 1
    assert set(np.unique(trimap(scores, nowhere(scores), erosion=0))) == {UNKNOWN, FOREGROUND}


def test_one_pixel_and_no_class():
    assert trimaps(np.ones((1, 1, 1))).tolist() == [[[FOREGROUND]]]
    assert trimaps(np.zeros((0, 4, 5))).shape == (0, 4, 5)


def test_unfit_settings_are_named():
    scores = ramp()
    with pytest.raises(ValueError, match="background_threshold, foreground_threshold: expected .*, got 0.8, 0.7"):
        trimap(scores, nowhere(scores), 0.7, 0.8)
    with pytest.raises(ValueError, match="erosion: expected .*, got -1"):
        trimaps(scores[None], erosion=-1)
    with pytest.raises(ValueError, match="one shape"):
        trimap(scores, np.zeros((3, 3), dtype=bool))
