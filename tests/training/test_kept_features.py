import dataclasses

import pytest
import torch

from wsss_hf.data.examples import TaggedExamples
from wsss_hf.data.transforms import TrainTransform
from wsss_hf.models.configuration_cam import CamConfig
from wsss_hf.models.modeling_affinity import AffinityConfig, AffinityNetwork
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.settings import RecipeError, TrainSettings
from wsss_hf.training import kept_features
from wsss_hf.training.launcher import build_accelerator
from wsss_hf.training.loop import Training

RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
VIT |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
NAMES = {index: f"class {index}" for index in range(8)}
SEAM = {"stages": [0], "projections": [8], "scale": 0.5}


@pytest.fixture(scope="module")
def rows(toy_data):
    return toy_data["train"].select(range(8))


def classifier(backbone=RESNET, **methods):
    torch.manual_seed(0)
    return CamClassifier(CamConfig(backbone_config=dict(backbone), id2label=NAMES, **methods))


class Training4(Training):
    """Of four epochs, two steps each; may stop early, as a kill does."""

    def __init__(self, model, rows, folder, mask_column=None, **changes):
        plain = {"epochs": 4, "batch_size": 4, "backbone_lr_factor": 0.0, "lr": 1e-2}
        settings = TrainSettings(**plain | changes)
        examples = TaggedExamples(rows, TrainTransform(32), seed=0, mask_column=mask_column)
        super().__init__(model, examples, settings, build_accelerator(settings), folder)
        self.images = 0
        model.backbone.body.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _body, inputs, options):
        self.images += len(inputs[0])

    def run(self, until=None):
        self.until = until
        return super().run()

    def _save(self):
        super()._save()
        if self.step == self.until:
            raise KeyboardInterrupt


def train(model, rows, folder, **changes):
    training = Training4(model, rows, folder, **changes)
    training.run()
    return training


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("methods", "passes"),
    [({}, 1), ({"seam": SEAM}, 2), ({"d2cam": {"stages": [-1]}}, 1)],
    ids=["cam", "seam", "d2cam"],
)
def test_a_frozen_backbone_sees_each_view_once_and_the_rest_learns_as_without(
    rows, tmp_path, monkeypatch, methods, passes
):
    model = classifier(**methods)
    assert train(model, rows, tmp_path / "kept").images == passes * len(rows)
    monkeypatch.setattr(kept_features, "_stages_suffice", lambda *_: False)
    plain = classifier(**methods)
    assert train(plain, rows, tmp_path / "plain").images == 4 * passes * len(rows)
    assert not (tmp_path / "plain/features").exists()
    for (name, value), (_, other) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=name)


def test_each_of_several_views_is_seen_once(rows, tmp_path):
    assert train(classifier(), rows, tmp_path, views=3).images == 3 * len(rows)


@pytest.mark.parametrize("changes", [{"views": 0}, {"views": 4}, {"backbone_lr_factor": 0.1}], ids=str)
def test_nothing_is_kept_that_does_not_come_again_or_changes(rows, tmp_path, changes):
    assert train(classifier(), rows, tmp_path, **changes).images == 4 * len(rows)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("backbone", "methods", "is_kept"),
    [
        (RESNET, {"drs": {"layers": ["*"]}}, False),
        (RESNET, {"plda": {}}, False),
        (VIT, {"attention": {}}, True),
        (VIT, {"attention": {"learn_heads": True}}, False),
        (VIT, {"attention": {}, "contrast": {"maps": "attention", "scale": 0.5}}, False),
    ],
    ids=str,
)
def test_nothing_is_kept_where_a_method_needs_more_than_stage_maps(rows, tmp_path, backbone, methods, is_kept):
    train(classifier(backbone, **methods), rows, tmp_path)
    assert (tmp_path / "features").exists() == is_kept


def test_affinity_networks_keep_features_where_views_come_again(rows, tmp_path):
    network = AffinityNetwork(AffinityConfig(backbone_config=dict(RESNET), radius=3))
    frozen = {"mask_column": "mask", "backbone_lr_factor": 1.0}
    assert train(network, rows, tmp_path / "new", **frozen).images == 4 * len(rows)
    assert train(network, rows, tmp_path / "kept", views=2, **frozen).images == 2 * len(rows)


@pytest.mark.parametrize("until", [1, 5])
def test_a_broken_training_ends_as_the_unbroken_one(rows, tmp_path, until):
    rows = rows.select(range(7))  # every epoch leaves out some
    changes = {"batch_size": 3, "save_steps": 1}
    unbroken = classifier()
    train(unbroken, rows, tmp_path / "unbroken", **changes)
    with pytest.raises(KeyboardInterrupt):
        Training4(classifier(), rows, tmp_path / "broken", **changes).run(until)
    for file in [*(tmp_path / "broken/features").iterdir()][::3]:
        file.write_bytes(file.read_bytes()[:-1])
    model = classifier()
    train(model, rows, tmp_path / "broken", **changes)
    assert all(torch.equal(value, weights(unbroken)[name]) for name, value in weights(model).items())


def test_other_networks_and_precisions_have_files_of_their_own(rows, tmp_path):
    train(classifier(), rows, tmp_path)
    changed = classifier()
    with torch.no_grad():
        next(changed.backbone.parameters()).add_(1)
    (tmp_path / "features").rename(tmp_path / "other-features")
    (tmp_path / "again").mkdir()
    (tmp_path / "other-features").rename(tmp_path / "again/features")
    assert train(changed, rows, tmp_path / "again").images == len(rows)
    assert len([*(tmp_path / "again/features").iterdir()]) == 2 * len(rows)


def test_a_disk_that_fills_up_is_left_its_room(rows, tmp_path, monkeypatch, capfd):
    usage = kept_features.shutil.disk_usage(tmp_path)
    full = type(usage)(total=100, used=91, free=9)
    monkeypatch.setattr(kept_features.shutil, "disk_usage", lambda _: full)
    assert train(classifier(), rows, tmp_path).images == 4 * len(rows)
    assert capfd.readouterr().err.count("the disk is nearly full") == 1


def test_pictures_of_a_model_that_is_not_training_are_not_kept(rows, tmp_path):
    model = classifier().requires_grad_(False)
    with kept_features.kept_features(model.eval(), tmp_path / "features"):
        model(torch.zeros(1, 3, 32, 32))
    assert not [*(tmp_path / "features").iterdir()]
    assert "forward" not in vars(model.backbone)


def test_views_of_a_stream_never_come_again():
    settings = dataclasses.replace(TrainSettings(), steps=4, views=2)
    from wsss_hf.training.loop import _images_of_stream

    with pytest.raises(RecipeError, match="train.views: expected 0 or null for data that are streamed, got 2"):
        _images_of_stream(settings, build_accelerator(settings))
