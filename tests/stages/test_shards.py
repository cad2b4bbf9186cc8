import os

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


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"\x24")] ^= 1  # a value of the shard that holds 36
    path.write_bytes(content)


def foreign(path):
    Dataset.from_dict({"square": [1, 2]}, features=FEATURES).to_parquet(path)


def other_column(path):
    Dataset.from_dict({"cube": [1]}).to_parquet(path)


def text(path):
    path.write_text("something else")


@pytest.mark.parametrize("damage", [truncate, empty, flip, foreign, other_column, text])
def test_a_damaged_shard_is_said_and_made_again(tmp_path, capsys, damage):
    compute(squares, NUMBERS, tmp_path, 2)
    last = sorted(tmp_path.glob("*.parquet"))[-1]
    damage(last)
    capsys.readouterr()
    again = Mortal(0)
    assert compute(again, NUMBERS, tmp_path, 2) == [number**2 for number in NUMBERS]
    assert again.seen == [36] and f"{last} is damaged and made again\n" in capsys.readouterr().err


def test_a_damaged_cache_is_made_again(tmp_path):
    compute(squares, NUMBERS, tmp_path, 2)
    for file in (tmp_path / "cache").rglob("*.arrow"):
        empty(file)
    assert compute(Mortal(0), NUMBERS, tmp_path, 2) == [number**2 for number in NUMBERS]
