"""What tests of several rooms share: tiny data, a recipe that trains on them in a moment, an untrained model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network

import multiprocessing
import signal
import socket
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from datasets import DatasetDict, Image
from transformers import ResNetConfig

from wsss_hf.data.tagged import class_names, undecoded
from wsss_hf.data.toy import make_toy
from wsss_hf.models.configuration_cam import CamConfig
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.recipes import Recipe, load_recipe

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

TINY_BACKBONE = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
}
TINY_SETTINGS = [
    "image.size=48",
    "toy.num_train=12",
    "toy.num_val=4",
    "toy.image_size=48",
    f"cam.backbone_config={TINY_BACKBONE}",
    "cam.output_stride=16",
    "cam.train.epochs=2",
    "cam.train.batch_size=4",
    "masks.batch_size=4",
    "masks.shard_size=4",
    f"segmenter.backbone_config={TINY_BACKBONE}",
    "segmenter.train.epochs=2",
    "segmenter.train.batch_size=4",
    "evaluation.batch_size=4",
    "evaluation.examples=3",
]


@pytest.fixture(autouse=True)
def own_process():
    """No test leaves environment variables (quietness, tokens) or signal handlers to the next one.

    None waits for the disk: what `os.fsync` is called for is held by tests that listen to it.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with mock.patch.dict(os.environ), mock.patch("os.fsync", lambda descriptor: None):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_training(monkeypatch):
    """Whoever trains fails."""

    def refused(*_arguments, **_options):
        raise RuntimeError("this test trains nothing")

    monkeypatch.setattr(Accelerator, "backward", refused)


@pytest.fixture
def resnet_config():
    return ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128], embedding_size=16, layer_type="basic")


@pytest.fixture(scope="session")
def tiny_settings() -> list[str]:
    """The `--set` strings of `tiny_recipe`; their toy data are `toy_data`."""
    return list(TINY_SETTINGS)


@pytest.fixture
def tiny_recipe() -> Recipe:
    """The default recipe on a ResNet of a few thousand weights, two epochs each; a test may change its copy."""
    return load_recipe("default", TINY_SETTINGS)


@pytest.fixture(scope="session")
def toy_data() -> DatasetDict:
    """12 training and 4 held-out images of 48 pixels, with masks."""
    return make_toy(num_train=12, num_val=4, image_size=48)


@pytest.fixture(scope="session")
def poisoned_data(toy_data) -> DatasetDict:
    """`toy_data` with true masks that nobody can read."""

    def poison(rows):
        features = undecoded(rows).features
        rows = undecoded(rows).map(lambda row: {"mask": {"bytes": b"true mask", "path": None}}, features=features)
        for name in ("image", "mask"):
            rows = rows.cast_column(name, Image())
        return rows

    return DatasetDict({split: poison(rows) for split, rows in toy_data.items()})


@pytest.fixture(scope="session")
def unmasked_data(toy_data) -> DatasetDict:
    """The training images of `toy_data` alone, without a column of masks."""
    return DatasetDict({"train": toy_data["train"].remove_columns("mask")})


@pytest.fixture(scope="session")
def cam_folder(toy_data, tmp_path_factory):
    """A saved CAM classifier for `toy_data` that has learnt nothing, but has maps with high and low places."""
    torch.manual_seed(0)
    names = dict(enumerate(class_names(toy_data)))
    model = CamClassifier(CamConfig(backbone_config=TINY_BACKBONE, output_stride=16, id2label=names, drs={}))
    processor = WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 192})
    pixel_values = processor(images=toy_data["train"]["image"][:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        mean = model.eval().classify(pixel_values)[0][-1].mean(dim=(0, 2, 3))
    weight = torch.randn(8, len(mean))
    weight -= (weight @ mean)[:, None] * mean / mean.square().sum()  # the mean of a map over all images is zero
    model.classifier.weight.data = weight[:, :, None, None]
    folder = tmp_path_factory.mktemp("models") / "cam"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def in_two_processes(tmp_path):
    """Calls a function of the rank in two forked processes of one gloo group → the two results."""
    if sys.platform == "win32":
        pytest.skip("forks")
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()

    def work(function, rank):
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
        os.environ.update({"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"})
        rendezvous = Path(tmp_path, "meet")
        torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
        PartialState._reset_state()
        PartialState(cpu=True)
        queue.put(function(rank))
        queue.close()
        queue.join_thread()
        os._exit(0)  # with torch 2.6, taking the group down may never end

    def run(function):
        processes = [fork.Process(target=work, args=(function, rank)) for rank in range(2)]
        for process in processes:
            process.start()
        results = [queue.get(timeout=30) for _ in processes]
        for process in processes:
            process.join()
        return results

    return run


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
        results = dict(queue.get(timeout=240) for _ in processes)
        for process in processes:
            process.join()
        return [results[rank] for rank in range(count)]

    return run
