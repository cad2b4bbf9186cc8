import multiprocessing
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def in_two_processes(tmp_path):
    """Calls a function of the rank in two forked processes of one gloo group → the two results."""
    if sys.platform == "win32":
        pytest.skip("forks")
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()

    def work(function, rank):
        rendezvous = Path(tmp_path, "meet")
        torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
        queue.put(function(rank))
        torch.distributed.destroy_process_group()

    def run(function):
        processes = [fork.Process(target=work, args=(function, rank)) for rank in range(2)]
        for process in processes:
            process.start()
        results = [queue.get(timeout=30) for _ in processes]
        for process in processes:
            process.join()
        return results

    return run
