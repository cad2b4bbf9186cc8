import dataclasses
import os
import shutil
import time
from dataclasses import dataclass

import pytest
import yaml

from wsss_hf.models.options import Options, option
from wsss_hf.settings import speed
from wsss_hf.stages.cache import OutputError, Record, StageOutput, read_record, write_atomically
from wsss_hf.stages.lock import only_run


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


def test_minutes_of_killed_work_count_up_to_its_last_file(tmp_path):
    begin(tmp_path / "cam")
    partial = tmp_path / "cam.partial"
    began = time.time() - 10_000
    (partial / ".minutes").write_text("5.0")  # of the attempts before
    os.utime(partial / ".minutes", (began, began))
    os.utime(partial / "recipe.yaml", (began, began))
    os.utime(partial / "checkpoint", (began + 120, began + 120))
    finish(tmp_path / "cam")
    assert read_record(tmp_path / "cam")["minutes"] == pytest.approx(7, abs=0.05)


@pytest.mark.parametrize("text", ["", "many", "\0"])
def test_damaged_minutes_are_none(tmp_path, text):
    begin(tmp_path / "cam")
    (tmp_path / "cam.partial" / ".minutes").write_text(text)
    assert finish(tmp_path / "cam")[1] == "half of it"
    assert read_record(tmp_path / "cam")["minutes"] == pytest.approx(0, abs=0.05)


def test_minutes_do_not_grow_when_a_result_is_used_again(tmp_path):
    finish(tmp_path / "cam")
    before = (tmp_path / "cam" / "recipe.yaml").read_bytes()
    assert StageOutput(tmp_path / "cam", record()).done
    assert (tmp_path / "cam" / "recipe.yaml").read_bytes() == before


def test_other_threads_are_recorded_and_said(tmp_path, capsys, monkeypatch):
    threads = [1]
    monkeypatch.setattr("torch.get_num_threads", lambda: threads[0])
    begin(tmp_path / "cam")
    begin(tmp_path / "cam")
    assert "digits" not in capsys.readouterr().err
    threads[0] = 8
    assert finish(tmp_path / "cam")[1] == "half of it"
    assert capsys.readouterr().err == (
        "cam: the result may differ in its last digits from that of an unbroken run: threads was 1 and is 8\n"
    )
    machines = read_record(tmp_path / "cam")["computed_with"]
    assert [machine["threads"] for machine in machines] == [1, 8]
    assert machines[0].keys() == {"device", "processes", "threads", "torch"}
    finish(tmp_path / "new")
    assert [machine["threads"] for machine in read_record(tmp_path / "new")["computed_with"]] == [8]
    assert StageOutput(tmp_path / "cam", record()).done  # the numbers of threads make no other result


@pytest.mark.parametrize("held", ["fast", ["fast"], {"threads": 1}, None])
def test_damaged_machines_are_none(tmp_path, held):
    begin(tmp_path / "cam")
    file = tmp_path / "cam.partial" / "recipe.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"computed_with": held}))
    finish(tmp_path / "cam")
    assert len(read_record(tmp_path / "cam")["computed_with"]) == 1


@pytest.mark.parametrize("change", [{"inputs": 5}, {"inputs": ["data"]}, {"cam": 3}, {"cam": {"train": "fast"}}])
def test_work_with_a_record_of_other_types_is_begun_anew(tmp_path, change):
    begin(tmp_path / "cam")
    file = tmp_path / "cam.partial" / "recipe.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    assert finish(tmp_path / "cam")[1] is None


def test_work_without_its_record_is_said_with_what_to_do(tmp_path):
    begin(tmp_path / "cam")
    (tmp_path / "cam.partial" / "recipe.yaml").unlink()
    with pytest.raises(OutputError, match="got .*cam.partial, which holds something else; move it away to begin anew"):
        StageOutput(tmp_path / "cam", record())


def test_two_runs_at_once_are_noticed(tmp_path):
    with StageOutput(tmp_path / "cam", record()).working() as folder:
        (folder / "checkpoint").write_text("some")
        for other in (record(), record(data="a2")):
            for force in (False, True):
                with pytest.raises(OutputError, match=f"expected no other run in it, got process {os.getpid()} on "):
                    with StageOutput(tmp_path / "cam", other, force).working():
                        raise AssertionError("two runs at once")
        assert (folder / "checkpoint").read_text() == "some"
    assert finish(tmp_path / "cam")[1] == "some"


def test_a_run_that_another_has_overtaken_says_so_and_leaves_its_result(tmp_path):
    late = StageOutput(tmp_path / "cam", record())
    finish(tmp_path / "cam")
    with pytest.raises(OutputError, match="cam: another run has just finished it; the same command uses it"):
        with late.working():
            raise AssertionError("the work is done")
    assert tree(tmp_path) == ["cam", "cam/model.bin", "cam/recipe.yaml"]


def test_work_on_something_else_beside_a_result_stays(tmp_path):
    finish(tmp_path / "cam")
    begin(tmp_path / "cam", record(data="a2"))
    assert StageOutput(tmp_path / "cam", record()).done
    assert finish(tmp_path / "cam", record(data="a2"))[1] == "half of it"


def test_left_overs_beside_a_result_are_swept_unless_a_run_works_there(tmp_path):
    finish(tmp_path / "cam")
    shutil.copytree(tmp_path / "cam", tmp_path / "cam.partial")
    with only_run(tmp_path / "cam.partial"):
        assert StageOutput(tmp_path / "cam", record()).done
        assert (tmp_path / "cam.partial" / "model.bin").exists()
    assert StageOutput(tmp_path / "cam", record()).done
    assert tree(tmp_path) == ["cam", "cam/model.bin", "cam/recipe.yaml"]


def test_what_stands_under_its_name_is_on_disk(tmp_path, monkeypatch):
    """Every file and folder of a result is forced to disk before the renaming, and the renaming after it."""
    events, replace = [], os.replace

    def noted_replace(old, new):
        events.append(("replace", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "fsync", lambda file: events.append(("fsync", os.readlink(f"/proc/self/fd/{file}"))))
    finish(tmp_path / "cam")
    renamed = events.index(("replace", str(tmp_path / "cam")))
    before, after = events[:renamed], events[renamed + 1 :]
    for name in ("result/model.bin", "result/recipe.yaml", "result"):
        assert ("fsync", str(tmp_path / "cam.partial" / name)) in before
    assert after[0] == ("fsync", str(tmp_path))


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *_paths: (_ for _ in ()).throw(OSError("killed")))
        write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and tree(tmp_path) == ["results.json"]
