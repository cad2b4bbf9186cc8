import platform
import subprocess
import sys

import pytest

PAGES_OF_TEN_STEPS = """
import resource, sys, torch
from wsss_hf.launch import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
step = lambda: torch.zeros(16 << 20).sum()  # 64 MiB
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_is_kept_for_the_next_step():
    pages = {
        how: int(
            subprocess.run([sys.executable, "-c", PAGES_OF_TEN_STEPS, how], capture_output=True, check=True).stdout
        )
        for how in ("keep", "as it is")
    }
    assert pages["keep"] < pages["as it is"] / 10
