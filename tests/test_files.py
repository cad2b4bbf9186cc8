import pytest

from wsss_hf.files import whole_file, whole_folder


def fill(name):
    (name / "half").write_text("half") if name.is_dir() else name.write_text("half")


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_what_fails_leaves_nothing(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "result") as unfinished:
        fill(unfinished)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old" and unfinished.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_in_place_of_an_empty_one(tmp_path, exists):
    path = tmp_path / "results" / "first"
    if exists:
        path.mkdir(parents=True)
    with whole_folder(path) as unfinished:
        fill(unfinished)
        assert not list(path.glob("*"))
    assert [file.name for file in path.iterdir()] == ["half"] and list(path.parent.iterdir()) == [path]
    other = tmp_path / "other"
    other.mkdir()
    assert path.stat().st_mode == other.stat().st_mode  # others may read it


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "photograph").write_text("precious")
    with pytest.raises(OSError), whole_folder(tmp_path / "held") as unfinished:
        fill(unfinished)
    assert [path.name for path in tmp_path.rglob("*")] == ["held", "photograph"]
