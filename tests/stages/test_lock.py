import errno
import json
import multiprocessing
import os
import re
import signal
import time

import psutil
import pytest
import typer
from accelerate import PartialState

from wsss_hf import CamClassifier, Segmenter, SegmenterConfig, WsssImageProcessor
from wsss_hf.cli.main import app, main
from wsss_hf.data.tagged import class_names
from wsss_hf.stages import lock
from wsss_hf.stages.lock import LOCK_FILE, OutputError, only_run

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def start():
    """Starts a process that runs a function; it is ended at the end of the test."""
    started = []

    def start(function, *arguments):
        started.append(FORK.Process(target=function, args=arguments))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def hold(folder, ready):
    with only_run(folder):
        ready.set()
        time.sleep(60)


def hold_with_a_worker(folder, ready, worker):
    with only_run(folder):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        worker.value = child
        ready.set()
        time.sleep(60)


def test_another_run_is_named(tmp_path, start):
    ready = FORK.Event()
    process = start(hold, tmp_path / "cam.partial", ready)
    assert ready.wait(30)
    with pytest.raises(OutputError) as caught:
        with only_run(tmp_path / "cam.partial"):
            raise AssertionError("two runs in one folder")
    message = str(caught.value)
    assert f"process {process.pid} on {os.uname().nodename}, running since 20" in message and "\n" not in message
    assert message.startswith(f"--out {tmp_path}/cam.partial: expected no other run in it, got process")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process_whose_children_live_on(tmp_path, start, number):
    ready, worker = FORK.Event(), FORK.Value("i")
    process = start(hold_with_a_worker, tmp_path, ready, worker)
    assert ready.wait(30)
    with pytest.raises(OutputError):
        with only_run(tmp_path):
            pass
    os.kill(process.pid, number)
    process.join()
    try:
        assert psutil.pid_exists(worker.value) and (tmp_path / LOCK_FILE).exists()
        with only_run(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()
    finally:
        os.kill(worker.value, signal.SIGKILL)


def test_a_lock_leaves_nothing_behind(tmp_path):
    for _ in range(2):
        with only_run(tmp_path / "new" / "folder"):
            assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [LOCK_FILE]
        assert not (tmp_path / "new").exists()
    with pytest.raises(KeyboardInterrupt):
        with only_run(tmp_path):
            raise KeyboardInterrupt
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_a_folder_that_a_killed_run_has_left_goes_and_one_that_holds_something_stays(tmp_path):
    for name in ("left", "used"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK_FILE).touch()
    (tmp_path / "used" / "result").touch()
    for name in ("left", "used"):
        with only_run(tmp_path / name):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "result"]


def test_what_fails_while_the_folder_is_made_ready_releases_it(tmp_path):
    def refuse():
        raise OutputError("not today")

    with pytest.raises(OutputError, match="not today"):
        with only_run(tmp_path, refuse):
            pass
    with only_run(tmp_path):
        pass


def test_a_file_that_its_holder_has_removed_holds_nothing(tmp_path, monkeypatch):
    """It is removed between the moments at which the next run opens and locks it."""
    take, taken = lock._lock, []

    def late(descriptor):
        taken.append(descriptor)
        if len(taken) == 1:
            (tmp_path / LOCK_FILE).unlink()
        return take(descriptor)

    monkeypatch.setattr(lock, "_lock", late)
    with only_run(tmp_path):
        assert len(taken) == 2 and (tmp_path / LOCK_FILE).exists()


class Elsewhere:
    """A file system without locks."""

    LOCK_EX = LOCK_NB = 0

    def flock(self, *_arguments):
        raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize(
    ("host", "process", "started", "locked"),
    [
        ("here", "own", 0.0, True),
        ("here", "own", -1.0, False),  # the number was given to another process since
        ("here", 2**22 + 1, 0.0, False),  # no number of a process
        ("another", 1, 0.0, True),
    ],
)
def test_without_locks_of_the_file_system_the_process_decides(tmp_path, monkeypatch, host, process, started, locked):
    monkeypatch.setattr(lock, "fcntl", Elsewhere())
    process = os.getpid() if process == "own" else process
    holder = {"host": os.uname().nodename if host == "here" else host, "process": process}
    holder["started"] = psutil.Process().create_time() + started
    (tmp_path / LOCK_FILE).write_text(json.dumps(holder))
    if not locked:
        with only_run(tmp_path):
            return
    with pytest.raises(OutputError) as caught:
        with only_run(tmp_path):
            pass
    assert ("if it has ended, remove" in str(caught.value)) == (host == "another")
    assert json.loads((tmp_path / LOCK_FILE).read_text()) == holder


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 1}', "\x00"])
def test_a_lock_without_a_name_is_that_of_a_run_that_died_at_once(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lock, "fcntl", Elsewhere())
    (tmp_path / LOCK_FILE).write_text(text)
    with only_run(tmp_path):
        pass


def test_all_processes_of_a_run_are_refused_together(tmp_path, in_two_processes):
    def work(rank):
        assert PartialState().process_index == rank
        with only_run(tmp_path / "free"):
            pass
        try:
            with only_run(tmp_path / "taken"):
                return rank, "let in"
        except OutputError as error:
            return rank, str(error)

    with only_run(tmp_path / "taken"):
        (_, first), (_, second) = sorted(in_two_processes(work))
    assert first == second and f"got process {os.getpid()} on" in first


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FOLDERS = [
    (name, option)
    for name, command in COMMANDS.items()
    for parameter in command.params
    for option in parameter.opts[-1:]
    if option in ("--out", "--export-voc", "--save-masks")
]


@pytest.fixture(scope="module")
def inputs(toy_data, cam_folder, tmp_path_factory):
    """What commands read, by name."""
    folder = tmp_path_factory.mktemp("inputs")
    classifier = CamClassifier.from_pretrained(cam_folder)
    classifier.backbone.body.save_pretrained(folder / "backbone")
    names = dict(enumerate(["background", *class_names(toy_data)]))
    segmenter = Segmenter(
        SegmenterConfig(backbone_config=classifier.config.backbone_config, rates=[1], id2label=names)
    )
    segmenter.save_pretrained(folder / "segmenter")
    WsssImageProcessor.from_pretrained(cam_folder).save_pretrained(folder / "segmenter")
    toy_data["train"][0]["image"].save(folder / "photo.png")
    return {"cam": cam_folder} | {name: folder / name for name in ("backbone", "segmenter", "photo.png")}


def arguments_of(name, inputs):
    data = ["--data", "toy"]
    return {
        "demo": [],
        "run": data,
        "add-saliency": [*data, "--spectral", inputs["backbone"]],
        "train-cam": data,
        "train-refiner": [*data, inputs["cam"]],
        "train-affinity": [*data, "--cam", inputs["cam"]],
        "make-masks": [*data, "--cam", inputs["cam"]],
        "train-segmenter": [*data, "--supervised"],
        "evaluate": [*data, "--model", inputs["segmenter"]],
        "predict": [inputs["photo.png"], "--model", inputs["cam"]],
        "compare": [*data, "--recipes", "default"],
        "convert": ["nothing.pth"],
        "export-onnx": [inputs["cam"]],
    }[name]


@pytest.mark.parametrize(("name", "option"), FOLDERS)
def test_a_second_command_is_one_line(tmp_path, capsys, monkeypatch, tiny_settings, inputs, name, option):
    monkeypatch.delenv("WSSS_TRACEBACK", raising=False)
    out = tmp_path / "out"
    # Some commands build their result in its folder, the others beside it.
    held = out if name in ("demo", "run", "compare", "predict") else tmp_path / "out.partial"
    command = [name, *arguments_of(name, inputs), option, out]
    parameters = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    if "--set" in parameters:
        command += [part for setting in tiny_settings for part in ("--set", setting)]
    if option == "--export-voc":
        command += ["--out", tmp_path / "masks", "--set", "masks.refine=[]"]
    if "--quiet" in parameters:
        command.append("--quiet")
    with only_run(held):
        with pytest.raises(SystemExit) as stopped:
            main([str(part) for part in command])
        assert {path.name for path in held.iterdir()} == {LOCK_FILE}
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert re.match(rf"error: \S+ {held}: expected no other run in it, got process {os.getpid()} on ", err)
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == (["masks"] if option == "--export-voc" else [])
