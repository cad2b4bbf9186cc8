import dataclasses
import os
from dataclasses import dataclass

import pytest
import yaml

from wsss_hf.models.options import Options, option
from wsss_hf.settings import speed
from wsss_hf.stages.cache import OutputError, Record, StageOutput, read_record, write_atomically


@dataclass
class Training(Options):
    epochs: int = option(3)
    scale: list[float] = option([0.7, 1.4])
    workers: int = speed(0, "")


@dataclass
class Section(Options):
    size: int = option(8)
    train: Training = dataclasses.field(default_factory=Training)
    batch_size: int = speed(4, "")


def record(section=None, version=1, **inputs):
    settings = {"seed": 0, "cam": section or Section()}
    return Record("train-cam", version, settings, {"data": "a1", "backbone": "b2"} | inputs, {"source": "toy"})


def begin(out, wanted=None, force=False, work="half of it"):
    """A run that is killed after its first result."""
    with pytest.raises(KeyboardInterrupt):
        with StageOutput(out, wanted or record(), force).working() as folder:
            (folder / "checkpoint").write_text(work)
            raise KeyboardInterrupt


def finish(out, wanted=None, force=False, weights="weights"):
    """What `StageOutput` says before, and what the run finds of an earlier one."""
    output = StageOutput(out, wanted or record(), force)
    with output.working() as folder:
        found = (folder / "checkpoint").read_text() if (folder / "checkpoint").exists() else None
        result = folder / "result"
        result.mkdir(exist_ok=True)
        (result / "model.bin").write_text(weights)
        output.finish(result)
    return output, found


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_result_appears_whole_with_its_record(tmp_path):
    output = StageOutput(tmp_path / "runs" / "cam", record())
    assert not output.done
    with output.working() as folder:
        assert not output.path.exists()
        (folder / "result").mkdir()
        (folder / "result" / "model.bin").write_text("weights")
        (folder / "checkpoint").mkdir()
        output.finish(folder / "result")
    assert tree(tmp_path) == ["runs", "runs/cam", "runs/cam/model.bin", "runs/cam/recipe.yaml"]
    held = yaml.safe_load((output.path / "recipe.yaml").read_text())
    assert held == read_record(output.path) and held["minutes"] >= 0
    assert held["cam"] == dataclasses.asdict(Section()) and held["data"] == {"source": "toy"}
    assert (held["stage"], held["version"], held["seed"]) == ("train-cam", 1, 0)


def test_an_unchanged_result_is_used_again_and_said(tmp_path, capsys):
    finish(tmp_path / "cam")
    assert StageOutput(tmp_path / "cam", record()).done
    assert capsys.readouterr().err == "cam: done before\n"


def test_an_interrupted_run_finds_its_work(tmp_path, capsys):
    begin(tmp_path / "cam")
    assert not (tmp_path / "cam").exists()
    assert finish(tmp_path / "cam")[1] == "half of it"
    assert StageOutput(tmp_path / "cam", record()).done and tree(tmp_path) == [
        "cam",
        "cam/model.bin",
        "cam/recipe.yaml",
    ]
    assert "anew" not in capsys.readouterr().err


CHANGES = [
    (record(Section(train=Training(epochs=4))), "cam.train.epochs was 3 and is 4"),
    (record(Section(train=Training(scale=[0.7, 1.5]))), r"cam.train.scale was [0.7, 1.4] and is [0.7, 1.5]"),
    (record(data="a2"), "data changed"),
    (record(data="a2", backbone="b3"), "data and backbone changed"),
    (record(saliency="c1"), "saliency changed"),
    (record(version=2), "train-cam computes it otherwise now"),
    (dataclasses.replace(record(), settings={"seed": 1, "cam": Section()}), "seed was 0 and is 1"),
]


@pytest.mark.parametrize(("wanted", "reason"), CHANGES, ids=[reason for _, reason in CHANGES])
def test_what_was_made_from_something_else_is_made_again(tmp_path, capsys, wanted, reason):
    finish(tmp_path / "cam")
    output = StageOutput(tmp_path / "cam", wanted)
    assert not output.done and capsys.readouterr().err == f"cam: made again, because {reason}\n"
    assert (tmp_path / "cam" / "model.bin").read_text() == "weights"  # until the new one is whole
    finish(tmp_path / "cam", wanted, weights="others")
    assert (tmp_path / "cam" / "model.bin").read_text() == "others"
    assert StageOutput(tmp_path / "cam", wanted).done and not StageOutput(tmp_path / "cam", record()).done


@pytest.mark.parametrize(("wanted", "reason"), CHANGES, ids=[reason for _, reason in CHANGES])
def test_work_on_something_else_is_begun_anew(tmp_path, capsys, wanted, reason):
    begin(tmp_path / "cam")
    assert finish(tmp_path / "cam", wanted)[1] is None
    assert capsys.readouterr().err == f"cam: begun anew, because {reason}\n"


def test_force_makes_again_what_is_there(tmp_path, capsys):
    finish(tmp_path / "cam")
    assert finish(tmp_path / "cam", force=True, weights="others")[1] is None
    assert capsys.readouterr().err == "cam: made again, because --force asks for it\n"
    assert (tmp_path / "cam" / "model.bin").read_text() == "others" and StageOutput(tmp_path / "cam", record()).done
    begin(tmp_path / "new")
    assert finish(tmp_path / "new", force=True)[1] is None


def test_settings_that_change_the_speed_alone_change_nothing(tmp_path):
    finish(tmp_path / "cam")
    quick = record(Section(batch_size=64, train=Training(workers=8)))
    assert StageOutput(tmp_path / "cam", quick).done
    begin(tmp_path / "new")
    assert finish(tmp_path / "new", quick)[1] == "half of it"


def test_a_setting_that_was_not_there_had_its_default(tmp_path):
    finish(tmp_path / "cam")
    file = tmp_path / "cam" / "recipe.yaml"
    held = yaml.safe_load(file.read_text())
    del held["cam"]["size"], held["cam"]["train"]["epochs"]
    file.write_text(yaml.safe_dump(held))
    assert StageOutput(tmp_path / "cam", record()).done
    assert not StageOutput(tmp_path / "cam", record(Section(size=9))).done
    del held["cam"]["train"]
    file.write_text(yaml.safe_dump(held))
    assert StageOutput(tmp_path / "cam", record()).done
    assert not StageOutput(tmp_path / "cam", record(Section(train=Training(epochs=4)))).done


def test_a_setting_that_is_no_more_does_not_matter(tmp_path):
    finish(tmp_path / "cam")
    file = tmp_path / "cam" / "recipe.yaml"
    held = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(held | {"cam": held["cam"] | {"shape": "round"}}))
    assert StageOutput(tmp_path / "cam", record()).done


@pytest.mark.parametrize("text", ["{", "just text", "- 1", "\xff\xfe"])
def test_work_with_a_damaged_record_is_begun_anew(tmp_path, capsys, text):
    begin(tmp_path / "cam")
    (tmp_path / "cam.partial" / "recipe.yaml").write_bytes(text.encode("latin-1"))
    assert finish(tmp_path / "cam")[1] is None
    said = capsys.readouterr().err
    assert said == f"cam: begun anew, because recipe.yaml of {tmp_path / 'cam.partial'} can't be read\n"


@pytest.mark.parametrize("text", ["{", "just text", "- 1", "stage: make-masks"])
def test_a_result_with_another_record_is_refused(tmp_path, text):
    (tmp_path / "cam").mkdir()
    (tmp_path / "cam" / "recipe.yaml").write_text(text)
    with pytest.raises(OutputError, match="--out .*cam: expected a new folder or a result of train-cam, got .*cam"):
        StageOutput(tmp_path / "cam", record(), force=True)
    assert (tmp_path / "cam" / "recipe.yaml").read_text() == text


@pytest.mark.parametrize("name", ["cam", "cam.partial"])
def test_a_folder_that_is_no_result_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "holiday.jpg").write_text("precious")
    for force in (False, True):
        with pytest.raises(OutputError, match=f"expected a new folder or a result of train-cam, got .*{name}, which"):
            StageOutput(tmp_path / "cam", record(), force)
    assert (tmp_path / name / "holiday.jpg").read_text() == "precious"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "cam").write_text("precious")
    with pytest.raises(OutputError, match="expected a new folder or a result of train-cam, got .*cam"):
        StageOutput(tmp_path / "cam", record())
    assert (tmp_path / "cam").read_text() == "precious"


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "cam").mkdir()
    finish(tmp_path / "cam")
    assert StageOutput(tmp_path / "cam", record()).done


def test_work_that_fails_before_its_first_result_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        with StageOutput(tmp_path / "cam", record()).working() as folder:
            (folder / "empty").mkdir()
            raise ValueError
    assert not list(tmp_path.iterdir())


def test_minutes_of_interrupted_work_count(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("wsss_hf.stages.cache.time.monotonic", lambda: clock[0])

    def work(dies):
        output = StageOutput(tmp_path / "cam", record())
        with output.working() as folder:
            clock[0] += 60
            (folder / "checkpoint").write_text("some")
            if dies:
                raise KeyboardInterrupt
            (folder / "result").mkdir()
            output.finish(folder / "result")

    for dies in (True, True, False):
        with pytest.raises(KeyboardInterrupt) if dies else monkeypatch.context():
            work(dies)
    assert read_record(tmp_path / "cam")["minutes"] == 3


def kill(monkeypatch, at):
    """The call number `at` of os.replace is not reached."""
    replace, calls = os.replace, []

    def mortal(*paths):
        calls.append(paths)
        if len(calls) == at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", mortal)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("again", [record(), record(data="a3")], ids=["same", "changed"])
def test_a_kill_while_files_are_renamed_leaves_a_state_that_goes_on(tmp_path, monkeypatch, at, again):
    """Of the record, of that of the result, of the old result, of the new one."""
    finish(tmp_path / "cam", record(data="old"), weights="old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill(patch, at)
        finish(tmp_path / "cam")
    finish(tmp_path / "cam", again, weights="new")
    assert (tmp_path / "cam" / "model.bin").read_text() == "new" and StageOutput(tmp_path / "cam", again).done
    assert tree(tmp_path) == ["cam", "cam/model.bin", "cam/recipe.yaml"]


def test_a_kill_while_the_rest_is_removed_leaves_a_finished_result(tmp_path, monkeypatch):
    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("wsss_hf.stages.cache.shutil.rmtree", killed)
        finish(tmp_path / "cam")
    assert StageOutput(tmp_path / "cam", record()).done
    finish(tmp_path / "cam", record(data="a3"), weights="new")
    assert (tmp_path / "cam" / "model.bin").read_text() == "new" and not (tmp_path / "cam.partial").exists()


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *_paths: (_ for _ in ()).throw(OSError("killed")))
        write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and tree(tmp_path) == ["results.json"]
