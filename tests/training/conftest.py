import multiprocessing
import os
import socket
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture
def in_processes():
    """Calls a function in forked processes that `accelerate launch --cpu` might have started → results by rank.

    Where the function raises, its result is the exception.
    """
    if sys.platform == "win32":
        pytest.skip("forks")
    fork = multiprocessing.get_context("fork")

    def work(function, rank, count, port, queue):
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
            ACCELERATE_USE_CPU="true",
            OMP_NUM_THREADS="1",
        )
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        try:
            result = function()
        except BaseException as error:
            result = error
        queue.put((rank, result))
        queue.close()
        queue.join_thread()
        if torch.distributed.is_initialized() and not isinstance(result, Exception):
            torch.distributed.destroy_process_group()
        os._exit(0)

    def run(function, count=2):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        queue = fork.Queue()
        processes = [fork.Process(target=work, args=(function, rank, count, port, queue)) for rank in range(count)]
        for process in processes:
            process.start()
        results = dict(queue.get(timeout=60) for _ in processes)
        for process in processes:
            process.join()
        return [results[rank] for rank in range(count)]

    return run
