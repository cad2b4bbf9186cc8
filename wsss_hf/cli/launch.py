"""What a process needs before it works: on CPUs the other processes that `accelerate launch` leaves to MPI, and memory
and kernels that stay."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import psutil
from accelerate.commands.launch import launch_command_parser

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LAUNCHERS = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")


def start_missing_processes() -> None:
    """Start the processes that `accelerate launch --cpu --num_processes N` asked for, and end with their status.

    Without MPI accelerate starts one process, whatever N is. Its request is then in the environment and in its command
    line; a process that has been started as one of several has WORLD_SIZE or its MPI's own variable, and goes on.
    """
    environment = os.environ
    started = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & environment.keys()
    # accelerate names a port only where it wants several processes.
    if environment.get("ACCELERATE_USE_CPU") != "True" or "MASTER_PORT" not in environment or started:
        return
    command = psutil.Process().parent().cmdline()
    launchers = [i for i, part in enumerate(command) if os.path.basename(part) in _LAUNCHERS]
    if not launchers:
        return
    wanted = launch_command_parser().parse_args(command[launchers[0] + 1 :]).num_processes
    if wanted is None or wanted < 2:
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={wanted}"]
    sys.exit(subprocess.run([*launcher, *sys.argv]).returncode)


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
