"""`accelerate launch` on CPUs: the processes that it leaves to MPI."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
from accelerate.commands.launch import launch_command_parser

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
