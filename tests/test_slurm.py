"""The SLURM scripts, with stand-ins for SLURM's own commands."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[1] / "scripts" / "slurm"
TASKS = """
case "$1" in --*) shift;; esac
for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=$id "$@" || status=$?; done  # one after the other
exit ${status:-0}
"""
WSSS = """
echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $ACCELERATE_MIXED_PRECISION $*"
exit $STATUS
"""
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> calls; fi',
    "srun": TASKS,
    "wsss": WSSS,
}


@pytest.fixture
def slurm(tmp_path):
    """Runs a script as a job → exit status, output, what was asked of scontrol."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)

    def run(script, *arguments, status=0, task=1):
        job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "2", "STATUS": str(status)}
        job |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "8", "SLURM_ARRAY_TASK_ID": str(task)}
        environment = os.environ | job | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", str(SLURM / script), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        calls = tmp_path / "calls"
        return done.returncode, done.stdout + done.stderr, calls.read_text() if calls.exists() else ""

    return run


# 75: after a checkpoint; 138 and 143: SIGUSR1 and SIGTERM outside a training; 137: killed, most likely for its memory.
@pytest.mark.parametrize(
    ("status", "queues_up"), [(0, False), (1, False), (137, False), (75, True), (138, True), (143, True)]
)
def test_training_starts_a_process_per_task_and_queues_up_again(slurm, status, queues_up):
    code, printed, calls = slurm("train.sh", "--data", "my photos", status=status)
    assert (code, calls) == (status, "requeue 41234\n" if queues_up else "")
    port = 20000 + 41234 % 20000
    assert printed.splitlines() == [f"{rank}/2 {rank} node7:{port} bf16 run --data my photos" for rank in (0, 1)]


def test_each_task_of_an_array_labels_a_folder(slurm, tmp_path):
    (tmp_path / "list.txt").write_text("photos/a\nphotos/b c\n")
    code, printed, _ = slurm("label_array.sh", "list.txt", "model", "masks", task=2)
    assert code == 0 and "predict photos/b c --model model --out masks/2" in printed
    code, printed, _ = slurm("label_array.sh", "list.txt", "model", "masks", task=3)
    assert code == 1 and printed == "list.txt: expected a line 3, got 2 lines\n"
