"""What a tracker of Accelerate gets to see, and what happens without one."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from datasets import config
from test_loop import Line, Points, settings, tagged_examples

from wsss_hf.data.streams import load_stream
from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.settings import RecipeError, TrainSettings
from wsss_hf.stages.train_cam import train_cam
from wsss_hf.stages.train_refiner import train_refiner
from wsss_hf.training import tracking
from wsss_hf.training.launcher import build_accelerator
from wsss_hf.training.loop import Training
from wsss_hf.training.losses import SegmentationObjective, build_loss
from wsss_hf.training.pictures import MapPictures
from wsss_hf.training.tracking import TrainingLog


class Notebook(GeneralTracker):
    """Keeps what it is given."""

    name = "notebook"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.configuration, self.values, self.pictures, self.finished = {}, {}, {}, False

    def store_init_configuration(self, values):
        self.configuration = values

    def log(self, values, step, **_options):
        self.values[step] = values

    def log_images(self, values, step, **_options):
        self.pictures[step] = values

    def finish(self):
        self.finished = True


@pytest.fixture
def tracked(monkeypatch):
    """(notebook, function that gives an Accelerator which writes into it)"""
    notebook = Notebook()

    def build(wanted):
        accelerator = build_accelerator(wanted)
        accelerator.log_with = [notebook]
        return accelerator

    monkeypatch.setattr("wsss_hf.training.launcher.Accelerator", _without_tracker)
    return notebook, build


def _without_tracker(log_with=None, **options):
    from accelerate import Accelerator

    return Accelerator(**options)


def test_a_tracker_gets_losses_rates_memory_and_pictures(tmp_path, tracked):
    notebook, build = tracked
    wanted = settings(epochs=2, track="wandb", track_steps=4)
    shown = np.zeros((2, 3, 3, 3), np.uint8)
    training = Training(Line(), Points(), wanted, build(wanted), tmp_path, 0, "cam", lambda _: {"maps": shown})
    training.run()
    assert notebook.finished and notebook.configuration["track_steps"] == 4
    assert list(notebook.values) == [1, 3, 4, 6]
    names = {"cam/square", "cam/size", "cam/lr", "cam/images_per_second", "cam/memory_gb"}
    assert all(set(values) == names for values in notebook.values.values())
    assert notebook.pictures.keys() == {4} and notebook.pictures[4]["cam/maps"] is shown
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["square"] for line in lines] == [values["cam/square"] for values in notebook.values.values()]


@pytest.mark.slow
def test_the_main_process_shows_pictures_and_the_processes_stay_together(tmp_path, tracked, in_processes):
    notebook, build = tracked

    def work():
        wanted = settings(epochs=1, track="wandb", track_steps=1)
        accelerator = build(wanted)
        Training(Line(), Points(), wanted, accelerator, tmp_path, pictures=lambda _: {"maps": np.zeros(0)}).run()
        return len(notebook.pictures), torch.distributed.is_initialized()

    assert in_processes(work) == [(3, True), (0, True)]


def test_pictures_change_nothing_of_the_training(tmp_path, tracked, cam_folder, toy_data):
    weights = []
    for steps in (0, 1):
        AcceleratorState._reset_state()
        model = CamClassifier.from_pretrained(cam_folder)
        examples = tagged_examples(toy_data)
        wanted = settings(epochs=2, lr=1e-2, freeze_batch_norm=False, track="wandb", track_steps=steps)
        pictures = MapPictures(examples, [0.5] * 3, [0.25] * 3)
        Training(model, examples, wanted, tracked[1](wanted), tmp_path / str(steps), pictures=pictures).run()
        weights.append(model.state_dict())
    assert len(tracked[0].pictures) == 6
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def tracked_stages(tracked, monkeypatch):
    """The notebook, into which the trainings of stages write."""
    notebook, build = tracked
    monkeypatch.setattr("wsss_hf.training.train.build_accelerator", lambda wanted, _: build(wanted))
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    return notebook


@pytest.mark.slow
def test_pictures_of_a_stream_are_those_of_its_first_images(
    tmp_path, tracked_stages, toy_data, tiny_recipe, monkeypatch
):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s for each iterator that is left
    toy_data["train"].to_parquet(tmp_path / "train.parquet")
    data, original = load_stream(tmp_path / "train.parquet"), Training._update_weights
    recipe = tiny_recipe.changed(*(f"cam.train.{name}" for name in ("steps=3", "save_steps=1", "track_steps=1")))
    recipe.cam.train.track = "wandb"
    train_cam(data, recipe, tmp_path / "whole")
    wanted, tracked_stages.pictures = tracked_stages.pictures, {}
    assert list(wanted) == [1, 2, 3] and wanted[1]["cam/maps"].shape == (4, 48, 48, 3)

    def mortal(training):
        original(training)
        if training.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_update_weights", mortal)
    with pytest.raises(KeyboardInterrupt):
        train_cam(data, recipe, tmp_path / "broken")
    tracked_stages.pictures = {}
    monkeypatch.setattr(Training, "_update_weights", original)
    train_cam(data, recipe, tmp_path / "broken")
    assert list(tracked_stages.pictures) == [2, 3]
    for step, found in tracked_stages.pictures.items():
        assert np.array_equal(found["cam/maps"], wanted[step]["cam/maps"])


def test_trackio_gets_its_own_kind_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda pixels: ("picture", pixels.shape)))
    notebook = Notebook()
    notebook.name = "trackio"
    accelerator = build_accelerator(settings())
    accelerator.trackers = [notebook]
    log = TrainingLog(accelerator, tmp_path, "cam", settings(), 0)
    log.show_pictures(7, {"maps": np.zeros((4, 5, 6, 3), np.uint8)})
    assert notebook.values == {7: {"cam/maps": ("picture", (5, 24, 3))}}


@pytest.mark.parametrize("kind", ["cam", "segmenter", "objective"])
def test_pictures_show_images_with_their_maps(kind, cam_folder, toy_data):
    torch.manual_seed(0)  # of a segmenter with which background wins somewhere
    examples = tagged_examples(toy_data)
    model = CamClassifier.from_pretrained(cam_folder)
    if kind != "cam":
        names = dict(enumerate(["background", *model.config.id2label.values()]))
        config = SegmenterConfig(backbone_config=model.config.backbone_config, id2label=names, rates=[1])
        model = Segmenter(config)
    if kind == "objective":
        model = SegmentationObjective(model, build_loss("cross_entropy"))
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    stack = MapPictures(examples, **statistics)(model)["maps"]
    assert stack.shape == (4, 48, 48, 3) and stack.dtype == np.uint8
    plain = examples[0]["pixel_values"] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    plain = (plain + torch.tensor([0.485, 0.456, 0.406])[:, None, None]).clamp(0, 1) * 255
    untouched = np.abs(stack[0] - plain.permute(1, 2, 0).numpy()).max(axis=2) < 1
    assert untouched.any() and (kind != "cam" or not untouched.all())


@pytest.mark.parametrize("train", [train_cam, train_refiner])
def test_a_tracker_that_is_not_installed_is_one_line_before_work(
    train, toy_data, tiny_recipe, tmp_path, monkeypatch, no_training
):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    for section in (tiny_recipe.cam, tiny_recipe.refiner):
        section.train.track = "wandb"
    data = (toy_data,) if train is train_cam else (toy_data, "nowhere")
    monkeypatch.setattr("wsss_hf.stages.train_refiner.model_fingerprint", lambda _: "", raising=True)
    with pytest.raises(RecipeError, match="track: expected an installed tracker, got wandb; pip install wandb"):
        train(*data, tiny_recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_can_not_log_in_is_one_line(tmp_path, monkeypatch):
    def refused(*_arguments):
        raise ConnectionError("no API key,\nlog in first")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refused)
    monkeypatch.setattr("wsss_hf.training.launcher.Accelerator", _without_tracker)
    wanted = TrainSettings(track="wandb")
    with pytest.raises(RecipeError, match="track: wandb can't begin: no API key, log in first"):
        Training(Line(), Points(), wanted, build_accelerator(wanted), tmp_path).run()
