import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import typer
import yaml
from accelerate import PartialState
from forks import Command

from wsss_hf.cli.launch import run_app
from wsss_hf.cli.main import main

PAGES_OF_TEN_STEPS = """
import resource, torch
from wsss_hf.cli.launch import keep_freed_memory
step = lambda: torch.zeros(16 << 20).sum()  # 64 MiB
def pages():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
as_it_is = pages()
keep_freed_memory()
print(as_it_is, pages())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_is_kept_for_the_next_step():
    command = [sys.executable, "-c", PAGES_OF_TEN_STEPS]
    as_it_is, kept = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert kept < as_it_is / 10


FROZEN = """
import gc
from wsss_hf.cli.launch import prepare_libraries
prepare_libraries(True)
first = gc.get_freeze_count()
held = [[] for _ in range(10**5)]
prepare_libraries(True)
print(gc.isenabled(), first, gc.get_freeze_count() - first, len(gc.get_objects()) - len(held))
"""


@pytest.mark.slow
def test_what_a_command_imports_is_never_searched_for_garbage():
    done = subprocess.run([sys.executable, "-c", FROZEN], capture_output=True, text=True, check=True)
    is_enabled, frozen, later, others = done.stdout.split()
    assert is_enabled == "True" and int(frozen) > 10**5  # objects
    assert int(later) <= 0 and int(others) < 10**4  # and only they


KERNELS_OF_TWO_PASSES = """
import sys, torch
from wsss_hf.cli.launch import keep_kernels
if sys.argv[1] == "keep":
    keep_kernels()
torch.set_num_threads(1)
layer = torch.nn.Conv2d(8, 8, 3)
for _ in range(2):
    for size in range(800):
        layer(torch.zeros(2, 8, 8 + size % 40, 8 + size // 40))
    print("pass", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
def test_kernels_of_many_sizes_are_kept():
    compiled = {}
    for how in ("keep", "as it is"):
        command = [sys.executable, "-c", KERNELS_OF_TWO_PASSES, how]
        environment = os.environ | {"ONEDNN_VERBOSE": "profile_create"}
        environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
        printed = subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout
        _, second, _ = printed.split("pass\n")
        compiled[how] = second.count("cache_miss")
    assert compiled["keep"] == 0 and compiled["as it is"] > 800


SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system ends processes with their launcher on Linux only")
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (signal.SIGTERM, signal.SIGHUP))],
)
def test_nothing_runs_on_when_the_launcher_has_ended(tmp_path, number):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    command += [str(SCRIPTS / "train_cam.py"), "--data", "toy", "--out", str(tmp_path / "cam"), "--quiet"]
    command += ["--set", "toy.num_train=16", "--set", "toy.num_val=1", "--set", "cam.train.epochs=10000"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = psutil.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    deadline = time.monotonic() + 120
    while not (tmp_path / "cam.partial" / "checkpoints").is_dir() and time.monotonic() < deadline:
        time.sleep(0.2)
    processes = launcher.children(recursive=True)
    assert len(processes) >= 3  # torchrun and its two workers, in training
    launcher.send_signal(number)
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    launcher.wait()
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_command_is_one_line(tmp_path, number):
    command = ["train-cam", "--data", "toy", "--out", str(tmp_path / "cam"), "--quiet"]
    command += ["--set", "toy.num_train=16", "--set", "toy.num_val=1", "--set", "cam.train.epochs=10000"]
    process = Command(command, tmp_path / "errors")
    deadline = time.monotonic() + 60
    while not (tmp_path / "cam.partial" / "checkpoints").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    name = signal.Signals(number).name
    assert process.wait() == (128 + number, f"interrupted by {name}; the same command goes on where it was\n")


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """`nohup wsss …` outlives its terminal."""
    set_to = {}
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == signal.SIGHUP else None)
    monkeypatch.setattr(signal, "signal", set_to.__setitem__)
    with pytest.raises(SystemExit):
        run_app(lambda **_options: sys.exit(0))
    assert set(set_to) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def test_a_file_that_ends_too_early_is_no_unexplained_abort(capsys, monkeypatch):
    monkeypatch.delenv("WSSS_TRACEBACK", raising=False)
    app = typer.Typer()

    @app.command()
    def read():
        raise EOFError("weights.pt: ran out of input")

    with pytest.raises(SystemExit) as stopped:
        run_app(app, [])
    assert stopped.value.code == 1 and capsys.readouterr().err.strip() == "error: weights.pt: ran out of input"


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried …",
    ],
)
def test_a_batch_that_does_not_fit_says_what_to_set(capsys, monkeypatch, words):
    monkeypatch.delenv("WSSS_TRACEBACK", raising=False)
    app = typer.Typer()

    @app.command()
    def label():
        raise RuntimeError(words)

    with pytest.raises(SystemExit) as stopped:
        run_app(app, [])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said.count("\n") == 1
    assert said.startswith("error: a batch does not fit into memory; a smaller masks.batch_size, ")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")
@pytest.mark.parametrize("name", ["SIGUSR1", pytest.param("SIGTERM", marks=pytest.mark.exhaustive)])
def test_a_preempted_training_exits_with_its_own_code_and_goes_on(tmp_path, name):
    """As SLURM sends it, in the middle of the only epoch."""
    command = ["train-cam", "--data", "toy", "--out", str(tmp_path / "cam")]
    for change in ("toy.num_train=160", "toy.num_val=1", "cam.train.epochs=1", "cam.train.batch_size=1"):
        command += ["--set", change]
    process = Command(command, tmp_path / "errors")
    log = tmp_path / "cam.partial" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not log.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    code, err = process.wait()
    assert code == 75
    stopped = re.search(rf"cam: stopped after step (\d+) by {name}; the same command goes on from its checkpoint", err)
    assert stopped and 0 < int(stopped[1]) < 160 and "Traceback" not in err
    code, err = Command(command, tmp_path / "errors").wait()
    assert code == 0 and (tmp_path / "cam" / "model.safetensors").is_file(), err
    steps = [json.loads(line)["step"] for line in (tmp_path / "cam" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 160


@pytest.mark.slow
def test_what_the_launcher_asks_for_is_done_and_said(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    command += ["--gradient_accumulation_steps", "4", "--mixed_precision", "bf16"]
    command += [str(SCRIPTS / "train_cam.py"), "--data", "toy", "--out", str(tmp_path / "cam")]
    for change in ("toy.num_train=16", "toy.num_val=1", "cam.train.epochs=1"):
        command += ["--set", change]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "train.mixed_precision: bf16 from the launcher instead of no from the recipe\n" in done.stderr
    assert "train.accumulate: 4 from the launcher instead of 1 from the recipe\n" in done.stderr
    record = yaml.safe_load((tmp_path / "cam" / "recipe.yaml").read_text())["cam"]["train"]
    assert (record["mixed_precision"], record["accumulate"]) == ("bf16", 4)


HOW_MANY = """
import os, sys
from pathlib import Path
from wsss_hf.cli.launch import run_app
def app(**_options):
    from wsss_hf.cli.launch import prepare_libraries
    prepare_libraries(True)
    from accelerate import Accelerator
    found = Accelerator()
    seen = f"{found.process_index}/{found.num_processes} {found.device.type}"
    Path(f"{sys.argv[1]}/seen-{os.environ['RANK']}").write_text(seen)  # lines of two processes could mix
run_app(app)
"""


@pytest.mark.slow
def test_torchrun_without_a_gpu_starts_processes_that_know_of_each_other(tmp_path):
    (tmp_path / "how_many.py").write_text(HOW_MANY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)
    command += [str(tmp_path / "how_many.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in (0, 1)] == ["0/2 cpu", "1/2 cpu"]


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the group of processes on CPUs is made here")
def test_a_signal_ends_a_process_that_waits_for_the_others(tmp_path):
    """The first of two, of which the second never starts."""
    (tmp_path / "how_many.py").write_text(HOW_MANY)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    one_of_two = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    one_of_two |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "how_many.py"), str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | one_of_two, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("localhost", port)):
            break  # it waits there
        time.sleep(0.05)
    process.terminate()
    try:
        assert process.wait(20) == -signal.SIGTERM and "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_a_signal_before_the_processes_have_met_is_one_line(capsys, monkeypatch):
    """Accelerate's state is then half made."""
    monkeypatch.setattr(PartialState, "_shared_state", {"_cpu": True, "device": None})

    def app(**_options):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        run_app(app)
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "interrupted by SIGTERM; the same command goes on where it was\n"


VERBOSITY_OF_LIBRARIES = """
import logging
from wsss_hf.cli.launch import prepare_libraries
for quiet in (False, True):
    prepare_libraries(quiet)
    import transformers, datasets
    print(transformers.logging.get_verbosity(), datasets.logging.get_verbosity(), logging.getLogger("wsss_hf").level)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "shown"), [({}, "40 40 40"), ({"TRANSFORMERS_VERBOSITY": "info"}, "20 40 20")], ids=["none", "info"]
)
def test_libraries_say_what_their_variables_ask_for_unless_quiet(variables, shown):
    environment = {name: value for name, value in os.environ.items() if "VERBOSITY" not in name} | variables
    command = [sys.executable, "-c", VERBOSITY_OF_LIBRARIES]
    done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    assert done.stdout.splitlines()[:2] == [shown, "40 40 40"]


@pytest.mark.parametrize(
    ("words", "found"), [("wsss train-c", "train-cam"), ("wsss run --recipe voc_dr", "voc_drs")], ids=["name", "value"]
)
def test_a_shell_completes_commands_and_recipes(monkeypatch, capsys, words, found):
    monkeypatch.setattr(sys, "argv", ["wsss"])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", "", raising=False)  # no module that -m has started
    monkeypatch.setenv("_WSSS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.split() == [found]
