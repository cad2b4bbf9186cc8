import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from torch.nn import functional as F

from wsss_hf.data import superpixels as module
from wsss_hf.data.superpixels import mean_features, merge_superpixels, superpixel_column, superpixels
from wsss_hf.data.tagged import DataError, decode_gray, tagged_features, undecoded
from wsss_hf.data.toy import make_toy

OPTIONS = {"scale": 100.0, "sigma": 0.5, "min_size": 20}


def two_halves(size):
    image = Image.new("RGB", size, (200, 40, 40))
    ImageDraw.Draw(image).rectangle([size[0] // 2, 0, *size], fill=(40, 40, 200))
    return image


def test_regions_of_one_colour_are_superpixels():
    found = superpixels(two_halves((40, 30)), 100, **OPTIONS)
    assert found.shape == (30, 40) and found.dtype == np.uint16
    left, right = found[:, :18], found[:, 22:]
    assert (left == left[0, 0]).all() and (right == right[0, 0]).all() and left[0, 0] != right[0, 0]


def test_large_photographs_are_reduced_first():
    assert superpixels(two_halves((90, 60)), 20, **OPTIONS).shape == (20, 30)


def test_they_follow_the_objects_of_the_embedded_data():
    for row in make_toy(4, 1)["train"]:
        found, mask = superpixels(row["image"], 96, **OPTIONS), np.array(row["mask"])
        counts = np.zeros((found.max() + 1, 256))
        np.add.at(counts, (found[mask < 255], mask[mask < 255]), 1)
        assert counts.max(axis=1).sum() > 0.95 * counts.sum()  # nearly all pixels are of their superpixel's label
        assert len(counts) < 150


def test_more_than_16_bits_can_number_are_refused(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 1)
    with pytest.raises(DataError, match="expected at most 1 in an image, got [0-9]; use a larger min_size"):
        superpixels(two_halves((40, 30)), 100, **OPTIONS)


def merge_plainly(labels, features, count):
    """Every pair is compared anew in each round."""
    groups = [np.flatnonzero(labels.ravel() == number) for number in range(labels.max() + 1)]
    features = [row.copy() for row in features]
    while len(groups) > count:
        best, pair = -np.inf, None
        for i in range(len(groups)):
            for j in range(i + 1, len(groups)):
                cosine = features[i] @ features[j] / np.linalg.norm(features[i]) / np.linalg.norm(features[j])
                likeness = cosine + 1 - (len(groups[i]) + len(groups[j])) / labels.size
                if likeness > best:
                    best, pair = likeness, (i, j)
        i, j = pair
        total = len(groups[i]) + len(groups[j])
        features[i] = (features[i] * len(groups[i]) + features[j] * len(groups[j])) / total
        groups[i] = np.concatenate([groups[i], groups[j]])
        del groups[j], features[j]
    merged = np.zeros(labels.size, dtype=int)
    for number, pixels in enumerate(groups):
        merged[pixels] = number
    return merged.reshape(labels.shape)


def test_the_most_alike_superpixels_are_merged_as_in_a_plain_loop():
    rng = np.random.default_rng(0)
    labels = np.arange(12).repeat(rng.integers(3, 30, 12))[None]
    features = rng.random((12, 5))
    for count in (1, 4, 11, 12, 64):
        merged = merge_superpixels(labels, features, count)
        assert merged.dtype == np.uint16 and merged.max() + 1 == min(count, 12)
        np.testing.assert_array_equal(merged, merge_plainly(labels, features, count))


def test_mean_features_are_those_of_the_enlarged_map():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (19, 22))
    features = rng.random((3, 5, 6)).astype(np.float32)
    whole = F.interpolate(torch.from_numpy(features)[None], (33, 41), mode="bilinear", align_corners=True)[0]
    inside = whole[:, :19, :22].numpy()
    wanted = [inside[:, labels == number].mean(axis=1) for number in range(4)]
    np.testing.assert_allclose(mean_features(labels, features, (33, 41)), wanted, rtol=1e-5)


def test_a_column_of_merged_superpixels(tmp_path):
    rows, options = make_toy(5, 1, image_size=64)["train"].select([3, 1]), OPTIONS | {"min_size": 5}
    seen = []

    def features(image):
        seen.append(image.size)
        return np.asarray(image.resize((4, 4)), dtype=np.float32).transpose(2, 0, 1), (40, 40)

    column = superpixel_column(rows, 48, options, tmp_path / "cache.arrow", merge_to=3, features=features)
    counts = [len(np.unique(decode_gray(row["superpixels"], "row"))) for row in undecoded(column)]
    assert counts == [3, 3] and seen == [(48, 48), (48, 48)]
    assert min(len(np.unique(superpixels(image, 48, **options))) for image in rows["image"]) > 3


def test_a_column_is_computed_once(tmp_path, monkeypatch):
    rows = make_toy(5, 1, image_size=32)["train"].select([3, 1, 4])
    done = []
    column = superpixel_column(rows, 32, OPTIONS, tmp_path / "cache.arrow", done.append)
    assert sum(done) == 3 and column.column_names == ["superpixels"]
    for image, row in zip(rows["image"], undecoded(column), strict=True):
        assert np.array_equal(decode_gray(row["superpixels"], "row"), superpixels(image, 32, **OPTIONS))
    monkeypatch.setattr(module, "superpixels", None)
    again = superpixel_column(rows, 32, OPTIONS, tmp_path / "cache.arrow", done.append)
    assert undecoded(again)[:] == undecoded(column)[:] and sum(done) == 3


def test_a_bad_image_is_named(tmp_path):
    columns = {"image_id": ["a"], "image": [{"bytes": b"no image", "path": None}], "tags": [[0]]}
    rows = Dataset.from_dict(columns, features=tagged_features(["cat"]))
    with pytest.raises(DataError, match="row 'a': expected an image, got a file that can't be decoded"):
        superpixel_column(rows, 32, OPTIONS, tmp_path / "cache.arrow")
    assert not list(tmp_path.iterdir())
