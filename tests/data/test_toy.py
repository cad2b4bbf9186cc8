import numpy as np
import pytest

from wsss_hf.data.tagged import check_dataset, class_names
from wsss_hf.data.toy import TOY_CLASSES, _draw_object, make_toy


@pytest.fixture(scope="module")
def toy():
    return make_toy(num_train=120, num_val=8)


def test_toy_fits_the_contract(toy):
    check_dataset(toy)
    assert class_names(toy) == list(TOY_CLASSES)
    assert {split: len(rows) for split, rows in toy.items()} == {"train": 120, "val": 8}
    assert toy["train"][0]["image"].size == toy["train"][0]["mask"].size == (96, 96)


def test_tags_are_exactly_the_classes_of_the_mask(toy):
    for row in toy["train"]:
        assert sorted(set(np.unique(row["mask"])) - {0, 255}) == [tag + 1 for tag in row["tags"]]


def test_every_class_and_every_number_of_objects_occurs(toy):
    assert {tag for tags in toy["train"]["tags"] for tag in tags} == set(range(8))
    assert {len(tags) for tags in toy["train"]["tags"]} == {1, 2, 3}


def test_objects_cover_a_fair_part_of_the_picture_and_have_a_void_border(toy):
    masks = np.stack([np.asarray(mask) for mask in toy["train"]["mask"]])
    objects, void = ((masks > 0) & (masks < 255)).mean(), (masks == 255).mean()
    assert 0.08 < objects < 0.3 and 0.02 < void < 0.07
    beside = (masks[:, :, 1:] != masks[:, :, :-1]) & (masks[:, :, 1:] < 255) & (masks[:, :, :-1] < 255)
    assert not beside.any()  # between two labels there is always void


def test_only_the_small_head_tells_two_classes_of_a_kind_apart():
    for label in range(0, 8, 2):
        one, other = (_draw_object(np.random.default_rng(3), each, 128) for each in (label, label + 1))
        body = one.inside & ~one.head & ~other.head
        assert (one.colors[body] == other.colors[body]).all()
        assert (one.inside ^ other.inside).sum() <= (one.head | other.head).sum()
        for each in (one, other):
            assert 0.13 < each.head.sum() / each.inside.sum() < 0.23


def test_same_seed_same_pictures_and_a_small_set_begins_a_larger_one():
    small, large, other = make_toy(2, 1), make_toy(4, 1), make_toy(2, 1, seed=1)
    assert np.array_equal(small["train"][1]["image"], large["train"][1]["image"])
    assert np.array_equal(small["train"][1]["mask"], large["train"][1]["mask"])
    assert not np.array_equal(small["train"][1]["image"], other["train"][1]["image"])
    assert not np.array_equal(small["train"][0]["image"], small["val"][0]["image"])


@pytest.mark.parametrize("arguments", [{"num_train": 0}, {"num_val": 0}, {"image_size": 8}])
def test_impossible_sizes_are_refused(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_toy(**arguments)
