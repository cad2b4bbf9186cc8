"""What a process of the command line does around its command: signals, launchers, memory, errors in one line."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import typer

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_PR_SET_PDEATHSIG = 1  # of Linux' prctl.h
_ACCELERATE = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")
_LAUNCHERS = (*_ACCELERATE, "torchrun", "torch.distributed.run", "torch.distributed.elastic.multiprocessing")
_NO_MEMORY = (
    "a batch does not fit into memory; a smaller masks.batch_size, evaluation.batch_size … (of predict: --batch-size) "
    "or smaller images need less"
)


class Interrupted(BaseException):
    """A signal asked this process to end; no `except Exception` swallows it."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


def run_app(app: typer.Typer, arguments: list[str] | None = None) -> None:
    """Run a command; what the user can mend is one line on standard error and exit status 1, or 2 for what is no
    command, option or value of the right type.

    A signal ends it with 128 and its number; a training that a batch system's SIGTERM or SIGUSR1 stops, after it has
    written a checkpoint, with 75.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _interrupt)
    end_with_launcher()
    pass_on_accumulation()
    start_missing_processes()
    keep_freed_memory()
    keep_kernels()
    try:
        status = app(args=arguments, standalone_mode=False) or 0
    except Interrupted as interruption:
        status = 128 + interruption.number
        print(f"interrupted by {interruption}; the same command goes on where it was", file=sys.stderr)
    except Exception as error:
        if isinstance(error.__cause__, EOFError):  # for which typer says "Aborted."
            error = error.__cause__
        usage: Any = error if hasattr(error, "format_message") else None  # typer's: no command, option or value
        if usage is None and (os.environ.get("WSSS_TRACEBACK") or not _is_for_users(error)):
            raise
        status = 1 if usage is None else usage.exit_code
        text = " ".join((_reason(error) if usage is None else usage.format_message()).split())
        if text:  # without arguments there is the help
            print(f"error: {text}", file=sys.stderr)
    finally:
        _leave_process_group()
    sys.exit(status)  # an error, and no longer with its frames


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


def _is_for_users(error: Exception) -> bool:
    if isinstance(error, ValueError | OSError | EOFError | ImportError):  # a library that is missing, too
        return True
    # The last two: damaged weights and rows, and full disks, as their libraries say it.
    named = type(error).__name__ in ("TrainingError", "CompareError", "SafetensorError", "DatasetGenerationError")
    return named or _is_out_of_memory(error)


def _is_out_of_memory(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # which says why
    if _is_out_of_memory(error):
        return _NO_MEMORY
    text = str(error).strip()
    if " in DataLoader worker process " in text.partition("\n")[0]:  # then torch's report, with the error at its end
        text = text.splitlines()[-1].partition(": ")[2]
    return text or type(error).__name__


def _leave_process_group() -> None:
    """End the process group before the interpreter ends.

    Its threads must not outlive the interpreter, nor may a model in training be the last to hold the group: it would
    wait for the threads under the lock that they wait for.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def prepare_libraries(quiet: bool) -> None:
    """Settle how much libraries say, and which processes there are; before a command works.

    Args:
        quiet: libraries say nothing but errors; otherwise those do whose own environment variable, such as
            TRANSFORMERS_VERBOSITY, does not ask for more.
    """
    gc.disable()  # what imports make is in use until the end: no search for garbage has to begin with it
    from datasets import logging as datasets_logging
    from datasets.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers import logging as transformers_logging

    if not gc.get_freeze_count():
        gc.freeze()
    gc.enable()
    for library, variable in (
        (transformers_logging, "TRANSFORMERS_VERBOSITY"),
        (datasets_logging, "DATASETS_VERBOSITY"),
        (hub_logging, "HF_HUB_VERBOSITY"),
    ):
        if quiet or not os.environ.get(variable):  # which the library has read itself
            library.set_verbosity_error()
    logging.getLogger("wsss_hf").setLevel(transformers_logging.get_verbosity())
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    _join_processes()


def _join_processes() -> None:
    """Meet the other processes, if this one was started as one of several."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import is_torch_xla_available, parse_flag_from_env

    from ..training.launcher import GROUP_TIMEOUT

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not torch.accelerator.is_available() and not is_torch_xla_available():
        os.environ["ACCELERATE_USE_CPU"] = "True"  # as `torchrun` does not say; else each would be alone
    with _ended_by_signals() if several else nullcontext():
        # Whoever asks first decides whether there are other processes, and a bare PartialState() ignores this flag.
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=GROUP_TIMEOUT)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """The system's own way with signals, while libraries wait for others and Python's handlers do not run."""
    ours = [number for number in signal.valid_signals() if signal.getsignal(number) is _interrupt]
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _interrupt)


def end_with_launcher() -> None:
    """Let the system end this process when the launcher that started it has ended, even if that was killed (Linux)."""
    if sys.platform == "linux" and any(os.path.basename(part) in _LAUNCHERS for part in _parent_command()):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def pass_on_accumulation() -> None:
    """Put `accelerate launch --gradient_accumulation_steps N` where Accelerate looks for it.

    The launcher itself does so for DeepSpeed only.
    """
    asked = _asked_of_accelerate("gradient_accumulation_steps")
    if asked is not None:
        os.environ.setdefault("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(asked))


def start_missing_processes() -> None:
    """Become the launcher of the processes that `accelerate launch --cpu --num_processes N` asked for.

    Without MPI accelerate starts one process, whatever N is. Its request is then in the environment and in its command
    line; a process that has been started as one of several has WORLD_SIZE or its MPI's own variable, and goes on.
    """
    environment = os.environ
    started = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & environment.keys()
    # accelerate names a port only where it wants several processes.
    if environment.get("ACCELERATE_USE_CPU") != "True" or "MASTER_PORT" not in environment or started:
        return
    wanted = _asked_of_accelerate("num_processes")
    if wanted is None or wanted < 2:
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={wanted}"]
    os.execv(sys.executable, [*launcher, *_this_command()])


def _this_command() -> list[str]:
    """What stands behind `python` to run this process: a file or a module, and the options."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return sys.argv
    return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def _asked_of_accelerate(option: str) -> int | None:
    """The value of an option in the command line of the `accelerate launch` that started this process."""
    command = _parent_command()
    launchers = [i for i, part in enumerate(command) if os.path.basename(part) in _ACCELERATE]
    if not launchers:
        return None
    from accelerate.commands.launch import launch_command_parser

    return getattr(launch_command_parser().parse_args(command[launchers[0] + 1 :]), option)


def _parent_command() -> list[str]:
    import psutil

    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent is not None else []
    except psutil.Error:  # it has ended, or belongs to somebody else
        return []


def keep_freed_memory() -> None:
    """Keep memory that tensors have left for the next ones; glibc gives large pieces back and asks for them again.

    Every step of a network on the CPU needs the same memory, and fresh pages are the slowest there are. Other C
    libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def keep_kernels() -> None:
    """Keep what oneDNN compiles for a layer and a size of its input, unless the environment says how much.

    Photographs come in dozens of sizes, at each scale; of the 1024 kernels it keeps otherwise, none is there any more
    when its size comes again. So many take 30 kB each, at most 250 MB.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # read before the first layer
