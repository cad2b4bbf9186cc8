"""How many files a reader walks through from a command to a result: no more than today."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRACER = Path(__file__).with_name("trace_files.py")
WAYS = {
    "training": (36, {"cli/main.py", "stages/train_cam.py", "training/loop.py", "models/modeling_cam.py"}),
    "masks": (8, {"pseudo_labels/label_images.py", "models/pamr.py", "models/label_colors.py"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_way_through_the_files_does_not_get_longer(way):
    most, on_the_way = WAYS[way]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, TRACER, way], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    files = {line.split()[0] for line in done.stdout.splitlines()}
    assert on_the_way <= files and len(files) <= most, done.stdout
