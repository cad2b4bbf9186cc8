"""Weights shared out over processes (FSDP2, on the CPU), and the configuration files for the launcher."""

import os
import shutil
import signal
from importlib import resources
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_loop import Mortal, figures, settings, tagged_examples
from test_scale import Interrupting
from test_tracking import Notebook

from wsss_hf.models.configuration_cam import CamConfig
from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.settings import RecipeError
from wsss_hf.training import train as train_module
from wsss_hf.training.checkpoints import newest
from wsss_hf.training.launcher import build_accelerator
from wsss_hf.training.loop import Training
from wsss_hf.training.losses import SegmentationObjective, build_loss
from wsss_hf.training.pictures import MapPictures
from wsss_hf.training.train import train_model

TINY = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
}


def sharding(wanted):
    """An Accelerator with FSDP2, which Accelerate itself chooses on accelerators only."""
    accelerator = build_accelerator(wanted)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="no_wrap",
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    if wanted.mixed_precision != "no":
        plugin.set_mixed_precision(wanted.mixed_precision)
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def build(kind):
    torch.manual_seed(0)
    names = dict(enumerate("abcdefgh"))
    if kind == "cam":
        return CamClassifier(CamConfig(backbone_config=dict(TINY), id2label=names, drs={}, icd={"hidden_channels": 8}))
    config = SegmenterConfig(backbone_config=dict(TINY), id2label=dict(enumerate("_abcdefgh")), rates=[1])
    return SegmentationObjective(Segmenter(config), build_loss("cross_entropy"))


shards_on_cpus = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 shards weights on accelerators only"
)
SHARED = {"epochs": 2, "optimizer": "adamw", "lr": 1e-3, "save_minutes": 0}


def train_whole(kind, toy_data, folder, wanted, accelerator):
    mask_column = "mask" if kind == "segmenter" else None
    options = {"seed": 0, "size": 48, "title": kind, "mask_column": mask_column, "folder": folder}
    train_model(accelerator, build(kind), WsssImageProcessor(), toy_data["train"], wanted, **options)


@shards_on_cpus
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_sharded_training_saves_whole_weights(kind, toy_data, tmp_path, in_processes):
    def work(folder=tmp_path / "two", build_accelerator=sharding):
        wanted = settings(**SHARED | {"optimizer": "sgd", "lr": 1e-2})
        train_whole(kind, toy_data, folder, wanted, build_accelerator(wanted))

    assert in_processes(work) == [None, None]
    AcceleratorState._reset_state()
    # ICD looks at the batch of all processes; a segmenter's loss is the mean over their labelled pixels.
    work(tmp_path / "one", train_module.build_accelerator)
    model_class = CamClassifier if kind == "cam" else Segmenter
    one, two = (model_class.from_pretrained(tmp_path / name / "result").state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


@shards_on_cpus
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_a_tracker_gets_the_maps_of_sharded_weights(kind, toy_data, tmp_path, in_processes):
    def work(folder=tmp_path / "two", build_accelerator=sharding):
        wanted = settings(**SHARED | {"epochs": 1, "lr": 1e-2, "track_steps": 1})
        accelerator = build_accelerator(wanted)
        accelerator.trackers, wanted.track = [Notebook()], "wandb"
        train_whole(kind, toy_data, folder, wanted, accelerator)
        return accelerator.trackers[0].pictures

    main, other = in_processes(work)
    AcceleratorState._reset_state()
    alone = work(tmp_path / "one", build_accelerator)
    assert list(main) == list(alone) == [1, 2, 3] and not other
    for step, found in alone.items():
        (name,) = found
        assert name == f"{kind}/maps" and np.mean(main[step][name] != found[name]) < 0.01  # a pixel on an edge


METHODS = {
    "attention": {"learn_heads": True},
    "contrast": {"embedding": 8},
    "d2cam": {"embedding_channels": 8},
    "icd": {"hidden_channels": 8},
    "plda": {"hidden": [8], "pamr_iterations": 1, "pamr_dilations": [1]},
    "seam": {"projections": [8, 8], "embedding": 8},
    "toco": {},
}
# Without batch norms, which torch does not compute on CPUs where their weights alone are of half precision.
VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": 48,
}


@shards_on_cpus
@pytest.mark.slow
def test_all_methods_train_sharded_in_half_precision(toy_data, tmp_path, in_processes):
    def work():
        torch.manual_seed(0)
        config = CamConfig(backbone_config=dict(VIT), id2label=dict(enumerate("abcdefgh")), drs={}, **METHODS)
        wanted, examples = settings(**SHARED, mixed_precision="bf16", track_steps=3), tagged_examples(toy_data)
        accelerator = sharding(wanted)
        accelerator.trackers, wanted.track = [Notebook()], "wandb"
        pictures = MapPictures(examples, [0.5] * 3, [0.25] * 3)
        training = Training(CamClassifier(config), examples, wanted, accelerator, tmp_path, pictures=pictures)
        return figures(training.run()), list(accelerator.trackers[0].pictures)

    results = in_processes(work)
    assert [shown for _, shown in results] == [[3, 6], []]
    for history, _ in results:
        for record in history:
            assert all(any(name.startswith(method) for name in record) for method in METHODS), record
            assert torch.tensor(list(record.values())).isfinite().all(), record


@shards_on_cpus
@pytest.mark.slow
def test_a_sharded_training_goes_on_from_its_checkpoint(toy_data, tmp_path, in_processes):
    def work(folder, stop=False, build_accelerator=sharding):
        wanted = settings(**SHARED)
        examples = Mortal(tagged_examples(toy_data))
        if stop and os.environ["RANK"] == "0":
            examples = Interrupting(tagged_examples(toy_data), epoch=1, reads=4, number=signal.SIGTERM)
        training = Training(build("cam"), examples, wanted, build_accelerator(wanted), folder)
        history = training.run()
        weights = training.accelerator.get_state_dict(training.model)
        return figures(history), {name: value.tolist() for name, value in weights.items()}, examples.epochs

    unbroken, _ = in_processes(lambda: work(tmp_path / "unbroken"))
    stops = in_processes(lambda: work(tmp_path / "broken", stop=True))
    assert [stop.code for stop in stops] == [75, 75]
    for name in ("other", "alone"):
        shutil.copytree(tmp_path / "broken", tmp_path / name)
    assert len(list(newest(tmp_path / "other" / "checkpoints").glob("optimizer_0/*.distcp"))) == 2  # of each its own
    resumed, _ = in_processes(lambda: work(tmp_path / "broken"))
    assert resumed[2] == [1] and resumed[1] == unbroken[1]
    for record, wanted in zip(resumed[0], unbroken[0], strict=True):
        assert record == pytest.approx(wanted, rel=1e-6)
    _, weights, epochs = in_processes(lambda: work(tmp_path / "other"), 3)[0]
    assert epochs == [1]
    (error,) = in_processes(lambda: work(tmp_path / "alone", build_accelerator=build_accelerator), 1)
    assert "expected a training with FSDP, which wrote it, got one with neither" in str(error)
    for name, value in unbroken[1].items():
        torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(value), rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_an_average_of_sharded_weights_is_refused(tmp_path, in_processes):
    def work():
        wanted = settings(**SHARED, ema=0.9)
        accelerator = sharding(wanted)
        accelerator.wait_for_everyone()
        Training(build("cam"), range(4), wanted, accelerator, tmp_path)

    for error in in_processes(work):
        assert isinstance(error, RecipeError)
        assert str(error) == "ema: expected 0 where each process holds a part of the weights, got 0.9"


@pytest.mark.parametrize(("name", "kind"), [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")])
def test_the_launcher_reads_the_packaged_configurations(name, kind):
    file = resources.files("wsss_hf.training") / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.distributed_type == kind and config.num_processes == 8
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        return
    # As the launcher hands it on, and with what these tests train.
    environment = {key.upper(): str(value) for key, value in config.fsdp_config.items()}
    with mock.patch.dict(os.environ, environment):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.cpu_ram_efficient_loading) == (2, False)
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and plugin.auto_wrap_policy is None
