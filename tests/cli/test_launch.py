import os
import platform
import subprocess
import sys

import pytest
import torch

PAGES_OF_TEN_STEPS = """
import resource, sys, torch
from wsss_hf.cli.launch import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
step = lambda: torch.zeros(16 << 20).sum()  # 64 MiB
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_is_kept_for_the_next_step():
    pages = {
        how: int(
            subprocess.run([sys.executable, "-c", PAGES_OF_TEN_STEPS, how], capture_output=True, check=True).stdout
        )
        for how in ("keep", "as it is")
    }
    assert pages["keep"] < pages["as it is"] / 10


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
