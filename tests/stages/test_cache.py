import os

import pytest
import yaml

from wsss_hf.stages.cache import OutputError, StageOutput, write_atomically

SETTINGS = {"stage": "train-cam", "data": None, "cam": {"train": {"epochs": 3, "scale": [0.7, 1.4]}}}
OTHER = {"stage": "train-cam", "data": None, "cam": {"train": {"epochs": 4, "scale": [0.7, 1.4]}}}


def finish(out, settings=SETTINGS):
    output = StageOutput(out, settings)
    result = output.begin() / "result"
    result.mkdir()
    (result / "model.bin").write_text("weights")
    (output.partial / "checkpoint").mkdir()
    output.finish(result)
    return output


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_result_appears_whole_with_its_settings(tmp_path):
    output = StageOutput(tmp_path / "runs" / "cam", SETTINGS)
    assert not output.done
    output.begin()
    assert not output.path.exists() and not output.done
    finish(output.path)
    assert output.done and StageOutput(output.path, SETTINGS).done
    assert tree(tmp_path) == ["runs", "runs/cam", "runs/cam/model.bin", "runs/cam/recipe.yaml"]
    assert yaml.safe_load((output.path / "recipe.yaml").read_text()) == SETTINGS


def test_an_interrupted_run_finds_its_work(tmp_path):
    first = StageOutput(tmp_path / "cam", SETTINGS)
    (first.begin() / "checkpoint").write_text("half of it")
    again = StageOutput(tmp_path / "cam", SETTINGS)
    assert not again.done and (again.begin() / "checkpoint").read_text() == "half of it"


def test_another_runs_result_is_refused_and_left_alone(tmp_path):
    finish(tmp_path / "cam")
    before = tree(tmp_path)
    wanted = r"--out .*cam: .*cam holds another run \(cam.train.epochs is 3 there and 4 here\); take another folder"
    with pytest.raises(OutputError, match=wanted):
        StageOutput(tmp_path / "cam", OTHER)
    assert tree(tmp_path) == before


def test_another_runs_unfinished_work_is_refused(tmp_path):
    StageOutput(tmp_path / "cam", SETTINGS).begin()
    (tmp_path / "cam.partial" / "checkpoint").write_text("an epoch")
    with pytest.raises(OutputError, match=r"cam.partial holds another run \(cam.train.epochs is 3 there and 4 here\)"):
        StageOutput(tmp_path / "cam", OTHER)


def test_a_setting_that_only_one_of_them_has_is_a_difference(tmp_path):
    finish(tmp_path / "cam")
    with pytest.raises(OutputError, match="data is None there and {'limit': 5} here"):
        StageOutput(tmp_path / "cam", SETTINGS | {"data": {"limit": 5}})
    with pytest.raises(OutputError, match="seed is None there and 1 here"):
        StageOutput(tmp_path / "cam", SETTINGS | {"seed": 1})


@pytest.mark.parametrize("name", ["cam", "cam.partial"])
def test_a_folder_that_is_no_result_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "holiday.jpg").write_text("precious")
    with pytest.raises(OutputError, match=f"{name} exists and is no result of this stage; take another"):
        StageOutput(tmp_path / "cam", SETTINGS)
    assert (tmp_path / name / "holiday.jpg").read_text() == "precious"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "cam").write_text("precious")
    with pytest.raises(OutputError, match="cam exists and is no result of this stage"):
        StageOutput(tmp_path / "cam", SETTINGS)


@pytest.mark.parametrize("text", ["{", "just text", "- 1"])
def test_a_recipe_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "cam").mkdir()
    (tmp_path / "cam" / "recipe.yaml").write_text(text)
    with pytest.raises(OutputError, match="--out .*cam"):
        StageOutput(tmp_path / "cam", SETTINGS)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "cam").mkdir()
    assert finish(tmp_path / "cam").done


def test_a_kill_before_the_settings_are_written_is_no_obstacle(tmp_path, monkeypatch):
    def killed(*_paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        StageOutput(tmp_path / "cam", SETTINGS).begin()
    assert finish(tmp_path / "cam").done


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *_paths: (_ for _ in ()).throw(OSError("killed")))
        write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and tree(tmp_path) == ["results.json"]
