import pytest
from datasets import Dataset, Features, Value

from wsss_hf.stages.shards import compute_shards

FEATURES = Features({"square": Value("int64")})


def squares(rows):
    for index in reversed(range(len(rows))):
        yield index, {"square": rows[index]["number"] ** 2}


@pytest.mark.parametrize("size", [1, 3, 100])
def test_results_stand_in_the_order_of_the_rows(tmp_path, size):
    rows = Dataset.from_dict({"number": list(range(7))})
    found = compute_shards(squares, rows, FEATURES, tmp_path / "shards", size, "squares", quiet=True)
    assert found["square"][:] == [number**2 for number in range(7)] and found.features == FEATURES


def test_a_finished_shard_is_not_computed_again(tmp_path):
    rows = Dataset.from_dict({"number": list(range(7))})
    seen = []

    def mortal(shard):
        for index, values in squares(shard):
            seen.append(values["square"])
            if len(seen) == 5:
                raise KeyboardInterrupt
            yield index, values

    with pytest.raises(KeyboardInterrupt):
        compute_shards(mortal, rows, FEATURES, tmp_path, 2, "squares", quiet=True)
    seen.extend([-1, -2])  # past the fifth
    found = compute_shards(mortal, rows, FEATURES, tmp_path, 2, "squares", quiet=True)
    assert found["square"][:] == [number**2 for number in range(7)]
    assert seen[7:] == [25, 16, 36]
