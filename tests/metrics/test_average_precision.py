import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from wsss_hf.metrics.average_precision import mean_average_precision


def plain_average_precision(scores, tags):
    """Precision at each distinct score, weighted by the recall gained there."""
    total, before = 0.0, 0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = [tag for score, tag in zip(scores, tags, strict=True) if score >= threshold]
        total += (sum(found) - before) / sum(tags) * sum(found) / len(found)
        before = sum(found)
    return total


@pytest.mark.parametrize("decimals", [1, 6])  # with many ties, and without
def test_agrees_with_a_plain_loop(decimals):
    rng = np.random.default_rng(decimals)
    tags = (rng.random((60, 5)) < 0.3).astype(int)
    tags[:, 3] = 0
    scores = (tags * 0.4 + rng.random(tags.shape)).round(decimals)
    result = mean_average_precision(scores, tags, ["a", "b", "c", "absent", "e"])
    expected = [plain_average_precision(scores[:, c], tags[:, c]) for c in (0, 1, 2, 4)]
    assert result["average_precision"].pop("absent") is None
    assert list(result["average_precision"].values()) == pytest.approx(expected, abs=1e-9)
    assert result["mean_average_precision"] == pytest.approx(np.mean(expected), abs=1e-9)


@pytest.mark.parametrize("decimals", [1, 6])
def test_agrees_with_scikit_learn(decimals):
    rng = np.random.default_rng(decimals)
    tags = (rng.random((200, 4)) < 0.2).astype(int)
    scores = (tags * 0.3 + rng.random(tags.shape)).round(decimals)
    result = mean_average_precision(scores, tags)
    expected = average_precision_score(tags, scores, average=None)
    assert list(result["average_precision"].values()) == pytest.approx(expected.tolist(), abs=1e-9)


def test_order_of_images_does_not_matter_among_ties():
    tags = np.array([[1], [0], [0], [0]])
    scores = np.full((4, 1), 0.5)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        assert mean_average_precision(scores, tags[order])["mean_average_precision"] == 0.25


def test_no_tag_at_all_has_no_mean():
    assert mean_average_precision(np.ones((3, 2)), np.zeros((3, 2)))["mean_average_precision"] is None


@pytest.mark.parametrize(
    ("scores", "tags", "message"),
    [
        (np.ones((3, 2)), np.ones((3, 1)), r"got \(3, 2\) and \(3, 1\)"),
        (np.ones((0, 2)), np.ones((0, 2)), r"got \(0, 2\)"),
        (np.array([[0.1], [np.nan]]), np.ones((2, 1)), "scores of image 1"),
        (np.ones((2, 1)), np.full((2, 1), 2), "tags: expected 0 or 1, got 2"),
    ],
)
def test_bad_input(scores, tags, message):
    with pytest.raises(ValueError, match=message):
        mean_average_precision(scores, tags)
