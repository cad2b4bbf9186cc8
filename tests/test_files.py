import os

import pytest

from wsss_hf.files import remove_unfinished, whole_file, whole_folder


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


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path, whole):
    """The names are those that the processes would give."""
    with whole(tmp_path / "result") as unfinished:
        fill(unfinished)
        own = unfinished.name
    gone = own.replace(str(os.getpid()), str(2**22 + 1))  # no number of a process
    alive = own.replace(str(os.getpid()), str(os.getppid()))
    elsewhere = own.replace(own.split(".")[2], "00000000")  # on another machine
    for name in (own, gone, alive, elsewhere, ".notes.part", "result.part", gone.replace("result", "other")):
        (tmp_path / name).mkdir() if whole is whole_folder else (tmp_path / name).touch()
    remove_unfinished(tmp_path, "result")
    left = {alive, elsewhere, ".notes.part", "result.part", gone.replace("result", "other"), "result"}
    assert {path.name for path in tmp_path.iterdir()} == left
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left - {gone.replace("result", "other")}
    remove_unfinished(tmp_path / "missing")


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_contents_are_on_disk_before_the_name_is_and_the_name_after(tmp_path, monkeypatch, whole):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    with whole(tmp_path / "result") as unfinished:
        (unfinished / "file" if unfinished.is_dir() else unfinished).write_text("new")
    contents = [str(unfinished / "file"), str(unfinished)] if whole is whole_folder else [str(unfinished)]
    assert events == [*contents, "replace", str(tmp_path)]
