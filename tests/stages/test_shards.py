import pytest
from datasets import Dataset, Features, Value

from wsss_hf.stages.shards import compute_shards

FEATURES = Features({"square": Value("int64")})
NUMBERS = list(range(7))


def squares(rows):
    for index in reversed(range(len(rows))):
        yield index, {"square": rows[index]["number"] ** 2}


def compute(function, numbers, folder, size, settings=""):
    rows = Dataset.from_dict({"number": numbers})
    found = compute_shards(function, rows, list(map(str, numbers)), FEATURES, folder, size, "squares", settings)
    assert found.features == FEATURES
    return found["square"][:]


class Mortal:
    """`squares` that notes what it computes and dies at its fifth."""

    def __init__(self, dies_at=5):
        self.seen, self.dies_at = [], dies_at

    def __call__(self, shard):
        for index, values in squares(shard):
            self.seen.append(values["square"])
            if len(self.seen) == self.dies_at:
                raise KeyboardInterrupt
            yield index, values


@pytest.mark.parametrize("size", [1, 3, 100])
def test_results_stand_in_the_order_of_the_rows(tmp_path, size):
    assert compute(squares, NUMBERS, tmp_path / "shards", size) == [number**2 for number in NUMBERS]


def test_a_finished_shard_is_not_computed_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(Mortal(), NUMBERS, tmp_path, 2)
    again = Mortal(0)
    assert compute(again, NUMBERS, tmp_path, 2) == [number**2 for number in NUMBERS]
    assert again.seen == [25, 16, 36]


@pytest.mark.parametrize(
    ("numbers", "computed"),
    [
        ([9, 1, 2, 3, 4, 5, 6], [1, 81, 25, 16, 36]),  # replaced
        ([0, 1, 3, 4, 5, 6], [16, 9, 36, 25]),  # one removed: all after it stand elsewhere
        ([1, 0, 2, 3, 4, 5, 6], [0, 1, 25, 16, 36]),  # in another order
        ([0, 1, 2, 3, 4, 5, 6, 7], [25, 16, 49, 36]),  # one added
    ],
)
def test_a_shard_is_used_for_the_rows_that_it_was_computed_for(tmp_path, numbers, computed):
    with pytest.raises(KeyboardInterrupt):
        compute(Mortal(), NUMBERS, tmp_path, 2)
    again = Mortal(0)
    assert compute(again, numbers, tmp_path, 2) == [number**2 for number in numbers]
    assert again.seen == computed


def test_a_shard_of_other_settings_or_size_is_not_used(tmp_path):
    compute(squares, NUMBERS, tmp_path, 2, "threshold 0.3")
    for size, settings in ((2, "threshold 0.4"), (4, "threshold 0.3")):
        again = Mortal(0)
        assert compute(again, NUMBERS, tmp_path, size, settings) == [number**2 for number in NUMBERS]
        assert len(again.seen) == 7
    again = Mortal(0)
    compute(again, NUMBERS, tmp_path, 2, "threshold 0.3")
    assert not again.seen
