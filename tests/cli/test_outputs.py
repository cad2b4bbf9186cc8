"""What a command is to write is tried before it works."""

import os
import tempfile

import pytest
import typer

from wsss_hf.cli.main import app, main

DATA = ["--data", "toy"]
ARGUMENTS = {
    "demo": [],
    "run": DATA,
    "add-saliency": DATA,
    "train-cam": DATA,
    "train-refiner": [*DATA, "no-classifier"],
    "train-affinity": [*DATA, "--cam", "no-classifier"],
    "make-masks": [*DATA, "--cam", "no-classifier"],
    "train-segmenter": DATA,
    "evaluate": DATA,
    "predict": ["no-image", "--model", "no-model"],
    "compare": [],
    "convert": ["no-checkpoint"],
    "export-onnx": ["no-model"],
}
OPTIONS = {"--out": "folder", "--export-voc": "folder", "--save-masks": "folder"}
OPTIONS |= {"--json": "file", "--export-coco": "file", "--voc-archive": "file"}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
WRITTEN = [
    (name, option) for name, command in COMMANDS.items() for p in command.params for option in {*OPTIONS} & {*p.opts}
]


@pytest.fixture
def refused(capsys, monkeypatch):
    """The one line with which a command ends that could not even begin to work."""

    def work(*_arguments, **_options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("wsss_hf.cli.options.prepare_libraries", work)
    monkeypatch.setattr("wsss_hf.cli.main.prepare", work)
    monkeypatch.setattr("wsss_hf.cli.hub.prepare_libraries", work)

    def call(name, option, path):
        other = ["--out", path.parent.parent / "new"] if option != "--out" and (name, "--out") in WRITTEN else []
        with pytest.raises(SystemExit) as stopped:
            main([name, *ARGUMENTS[name], *map(str, other), option, str(path)])
        assert stopped.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {option} {path}: expected ") and error.count("\n") == 1
        return error

    return call


def test_all_commands_that_write_are_here():
    assert {name for name, _ in WRITTEN} == ARGUMENTS.keys()
    assert {option for _, option in WRITTEN} == OPTIONS.keys()
    assert {("evaluate", "--json"), ("make-masks", "--export-voc"), ("make-masks", "--export-coco")} < {*WRITTEN}


@pytest.mark.parametrize(("name", "option"), WRITTEN)
def test_a_path_of_another_kind_is_refused(refused, tmp_path, name, option):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    if OPTIONS[option] == "folder":
        assert "expected a folder or a new name, got a file" in refused(name, option, tmp_path / "a" / "file")
    else:
        (tmp_path / "a" / "folder").mkdir()
        assert "expected a file or a new name, got a folder" in refused(name, option, tmp_path / "a" / "folder")
    line = refused(name, option, tmp_path / "a" / "file" / "result")
    assert line.endswith(f"got {tmp_path}/a/file (Not a directory)\n")


@pytest.mark.parametrize("name", [name for name, option in WRITTEN if option == "--out"])
def test_a_place_without_permission_is_refused(refused, tmp_path, monkeypatch, name):
    def deny(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", deny)
    line = refused(name, "--out", tmp_path / "new" / "result")
    assert line.endswith(f"expected a place that can be written to, got {tmp_path} (Permission denied)\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is permitted to the superuser")
def test_permissions_of_the_system_count(refused, tmp_path):
    (tmp_path / "a").mkdir(mode=0o500)
    refused("train-cam", "--out", tmp_path / "a" / "result")


def test_nothing_is_left_where_it_was_tried(tmp_path):
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "missing.pth"), "--out", str(tmp_path / "new" / "model")])
    assert not list(tmp_path.iterdir())
