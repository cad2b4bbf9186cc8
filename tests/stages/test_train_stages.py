import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image
from safetensors.torch import load_file

from wsss_hf.data import superpixels
from wsss_hf.data.tagged import DataError, class_names, decode_gray, tagged_features, undecoded
from wsss_hf.inference.load import load_segmenter
from wsss_hf.inference.segmenter import segment_images
from wsss_hf.models import checkpointing
from wsss_hf.models.configuration_cam import CamConfig
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.models.options import OptionError
from wsss_hf.recipes import load_recipe
from wsss_hf.settings import FelzenszwalbSettings, RecipeError
from wsss_hf.stages import train_cam as train_cam_module
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.relabel import relabel
from wsss_hf.stages.train_cam import train_cam
from wsss_hf.stages.train_segmenter import train_segmenter
from wsss_hf.training.loop import TrainingError


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_weights(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def labelled(toy_data, cam_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("labelled") / "masks"
    return load_from_disk(str(make_masks(toy_data, cam_folder, load_recipe(), out)))


def test_a_trained_classifier_holds_what_the_recipe_says(toy_data, tiny_recipe, tmp_path):
    vars(tiny_recipe.cam).update(
        {"background_threshold": 0.3, "tag_threshold": 0.6, "methods": {"drs": {"mode": "fixed"}}}
    )
    vars(tiny_recipe.image).update({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    out = train_cam(toy_data, tiny_recipe, tmp_path / "cam")
    model = CamClassifier.from_pretrained(out)
    config = model.config
    assert [config.id2label[c] for c in range(8)] == class_names(toy_data)
    assert (config.background_threshold, config.tag_threshold, config.drs.mode) == (0.3, 0.6, "fixed")
    assert model.backbone.strides[-1] == 16 and model.backbone.channels == [8, 16, 24, 32]
    processor = WsssImageProcessor.from_pretrained(out)
    assert config.image_mean == list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert config.image_std == list(processor.image_std) == [0.4, 0.5, 0.6]
    assert processor.size["shortest_edge"] == 48
    log = json.loads((out / "training_log.json").read_text())
    assert [record["epoch"] for record in log] == [1, 2] and log[0]["classification"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["cam"]


def test_training_depends_on_the_seed_alone(toy_data, tiny_recipe, tmp_path):
    first = train_cam(toy_data, tiny_recipe, tmp_path / "first")
    torch.manual_seed(99)
    again = train_cam(toy_data, tiny_recipe, tmp_path / "again")
    tiny_recipe.seed = 1
    other = train_cam(toy_data, tiny_recipe, tmp_path / "other")
    assert same_weights(first, again) and not same_weights(first, other)


def test_gradient_checkpointing_is_a_setting(toy_data, tiny_recipe, tmp_path, monkeypatch):
    plain = train_cam(toy_data, tiny_recipe, tmp_path / "plain")
    enable, calls = checkpointing.set_checkpointing, []

    def counted(backbone, enabled, *args):
        calls.append(enabled)
        enable(backbone, enabled, *args)

    monkeypatch.setattr(checkpointing, "set_checkpointing", counted)
    tiny_recipe.cam.train.gradient_checkpointing = True
    out = train_cam(toy_data, tiny_recipe, tmp_path / "checkpointed")
    assert calls == [True] and same_weights(plain, out)


def test_methods_are_given_superpixels_and_saliency(toy_data, tiny_recipe, tmp_path, monkeypatch):
    forward, seen = CamClassifier.forward, []

    def watched(self, *args, **kwargs):
        seen.append(kwargs)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CamClassifier, "forward", watched)
    vars(tiny_recipe.cam).update({"superpixels": True, "saliency": True, "methods": {"icd": {"hidden_channels": 8}}})
    buffer = io.BytesIO()
    Image.new("L", (48, 48), 255).save(buffer, format="PNG")
    salient = {column: toy_data["train"][column][:] for column in ("image_id", "image", "tags")}
    salient["saliency"] = [{"bytes": buffer.getvalue(), "path": None}] * 12
    features = tagged_features(class_names(toy_data), "saliency")
    data = DatasetDict(train=Dataset.from_dict(salient, features=features))
    with pytest.raises(KeyboardInterrupt):
        train_cam(data, tiny_recipe, tmp_path / "cam")
    monkeypatch.setattr(superpixels, "superpixels", None)  # they are there already
    out = train_cam(data, tiny_recipe, tmp_path / "cam")
    assert [path.name for path in tmp_path.iterdir()] == ["cam"] and (out / "model.safetensors").exists()
    for batch in seen:
        assert batch["superpixels"].shape == batch["saliency"].shape == (4, 48, 48)
        assert batch["superpixels"].dtype == torch.int64 and batch["superpixels"].unique().numel() > 4
        assert batch["saliency"].max() == 1


def test_superpixels_are_merged_by_features_of_the_untrained_backbone(toy_data, tiny_recipe, tmp_path, monkeypatch):
    seen = []

    def watched(accelerator, model, processor, rows, *arguments, **options):
        seen.append([len(np.unique(decode_gray(png, "row"))) for png in undecoded(rows)["superpixels"]])
        raise KeyboardInterrupt

    monkeypatch.setattr(train_cam_module, "train_model", watched)
    tiny_recipe.cam.superpixels = True
    for count, folder in ((0, "plain"), (3, "merged")):
        tiny_recipe.cam.felzenszwalb = FelzenszwalbSettings(scale=20.0, min_size=4, merge_to=count)
        with pytest.raises(KeyboardInterrupt):
            train_cam(toy_data, tiny_recipe, tmp_path / folder)
    assert set(seen[1]) == {3} and min(seen[0]) > 3
    tiny_recipe.cam.felzenszwalb = FelzenszwalbSettings(merge_to=3, merge_stage=7)
    with pytest.raises(RecipeError, match=r"merge_stage: expected a stage of this backbone \(-4 to 3\), got 7"):
        train_cam(toy_data, tiny_recipe, tmp_path / "wrong")


def test_missing_saliency_is_named_before_anything_is_written(toy_data, tiny_recipe, tmp_path):
    tiny_recipe.cam.saliency = True
    with pytest.raises(DataError, match="expected a column .*saliency.* cam.saliency"):
        train_cam(toy_data, tiny_recipe, tmp_path / "cam")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_classifier_learns_the_tags(toy_data, tiny_recipe, tmp_path):
    vars(tiny_recipe.cam.train).update({"epochs": 20, "lr": 1e-2, "head_lr_factor": 1.0, "freeze_batch_norm": False})
    vars(tiny_recipe.cam.train).update({"scale": [1.0, 1.0], "color_jitter": 0.0, "batch_size": 12})
    out = train_cam(toy_data, tiny_recipe, tmp_path / "cam")
    losses = [record["classification"] for record in json.loads((out / "training_log.json").read_text())]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_weak_training_never_reads_a_true_mask(toy_data, poisoned_data, unmasked_data, tiny_recipe, tmp_path):
    kinds = {"clean": toy_data, "poisoned": poisoned_data, "unmasked": unmasked_data}
    for name, data in kinds.items():
        folder = tmp_path / name
        cam = train_cam(data, tiny_recipe, folder / "cam")
        masks = make_masks(data, cam, tiny_recipe, folder / "masks")
        segmenter = train_segmenter(load_from_disk(str(masks)), tiny_recipe, folder / "segmenter")
        relabel(data, segmenter, tiny_recipe, folder / "masks-2")
    for name in ("poisoned", "unmasked"):
        assert same_weights(tmp_path / "clean" / "cam", tmp_path / name / "cam")
        for masks in ("masks", "masks-2"):
            found, wanted = (
                load_from_disk(str(tmp_path / kind / masks))["train"]["pseudo_mask"] for kind in (name, "clean")
            )
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert same_weights(tmp_path / "clean" / "segmenter", tmp_path / name / "segmenter")


@pytest.mark.slow
def test_an_interrupted_training_goes_on_where_it_was(toy_data, tiny_recipe, tmp_path, monkeypatch):
    unbroken = train_cam(toy_data, tiny_recipe, tmp_path / "unbroken")
    forward = CamClassifier.forward
    calls = []

    def mortal(self, *args, **kwargs):
        calls.append(self.progress)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CamClassifier, "forward", mortal)
    with pytest.raises(KeyboardInterrupt):
        train_cam(toy_data, tiny_recipe, tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir() if "broken" == path.name] == []
    out = train_cam(toy_data, tiny_recipe, tmp_path / "broken")
    assert calls[5:] == pytest.approx([3 / 6, 4 / 6, 5 / 6])
    assert same_weights(unbroken, out) and not (tmp_path / "broken.partial").exists()


def test_a_finished_training_is_not_done_again_unless_its_settings_change(toy_data, tiny_recipe, tmp_path):
    out = train_cam(toy_data, tiny_recipe, tmp_path / "cam")
    before = times(tmp_path)
    assert train_cam(toy_data, tiny_recipe, tmp_path / "cam") == out
    tiny_recipe.masks.background_threshold = 0.9  # no business of this stage
    train_cam(toy_data, tiny_recipe, tmp_path / "cam")
    assert times(tmp_path) == before
    tiny_recipe.cam.train.epochs = 3
    assert len(train_cam(toy_data, tiny_recipe, tmp_path / "cam").log) == 3
    assert times(tmp_path) != before


def test_methods_are_checked_before_anything_is_written(toy_data, tiny_recipe, tmp_path):
    tiny_recipe.cam.methods = {"drs": {"detla": 0.5}}  # past the checks of `Recipe.load`
    with pytest.raises(OptionError, match=r"drs.detla: unknown; did you mean drs.delta\?"):
        train_cam(toy_data, tiny_recipe, tmp_path / "cam")
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_a_backbone_is_refused(toy_data, tiny_recipe, tmp_path):
    for section, train in (("cam", train_cam), ("segmenter", train_segmenter)):
        getattr(tiny_recipe, section).backbone_config = None
        with pytest.raises(RecipeError, match=rf"{section}.backbone: expected a directory or Hub id \(--backbone\)"):
            train(toy_data, tiny_recipe, tmp_path / section)
    assert not list(tmp_path.iterdir())


def test_a_failed_training_leaves_no_obstacle(toy_data, tiny_recipe, tmp_path):
    good = tiny_recipe.cam.train.lr
    vars(tiny_recipe.cam.train).update({"optimizer": "sgd", "lr": 1e30})
    with pytest.raises(TrainingError, match="the loss 'classification' became (nan|inf)"):
        train_cam(toy_data, tiny_recipe, tmp_path / "cam")
    assert not list(tmp_path.iterdir())
    tiny_recipe.cam.train.lr = good
    assert train_cam(toy_data, tiny_recipe, tmp_path / "cam").folder.is_dir()


def test_a_published_backbone_brings_its_weights_and_normalisation(toy_data, tiny_recipe, cam_folder, tmp_path):
    body = CamClassifier.from_pretrained(cam_folder).backbone.body
    body.save_pretrained(tmp_path / "backbone")
    WsssImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path / "backbone")
    tiny_recipe.cam.backbone = tiny_recipe.segmenter.backbone = str(tmp_path / "backbone")
    vars(tiny_recipe.cam.train).update({"lr": 0.0, "batch_size": 12})
    cam = train_cam(toy_data, tiny_recipe, tmp_path / "cam")
    model = CamClassifier.from_pretrained(cam)
    for name, value in body.state_dict().items():
        assert torch.equal(model.backbone.body.state_dict()[name], value), name
    assert model.config.image_mean == [0.5] * 3 and model.config.image_std == [0.25] * 3


@pytest.mark.slow
def test_a_segmenter_learns_its_masks_with_background_first(labelled, tiny_recipe, tmp_path):
    vars(tiny_recipe.segmenter.train).update({"epochs": 8, "lr": 3e-3, "freeze_batch_norm": False})
    out = train_segmenter(labelled, tiny_recipe, tmp_path / "segmenter")
    model = Segmenter.from_pretrained(out)
    assert [model.config.id2label[i] for i in range(9)] == ["background", *class_names(labelled)]
    assert len(model.head) == len(tiny_recipe.segmenter.rates)
    losses = [record["loss"] for record in json.loads((out / "training_log.json").read_text())]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["deeplab_v2", "deeplab_v3_plus"])
def test_objects_are_as_large_as_in_the_labels(labelled, tiny_recipe, tmp_path, head):
    vars(tiny_recipe.segmenter).update({"head": head, "rates": [1, 2], "input_scales": [1.0, 0.5]})
    vars(tiny_recipe.segmenter.train).update({"epochs": 8, "lr": 3e-3, "freeze_batch_norm": False})
    tiny_recipe.seed = {"deeplab_v2": 5, "deeplab_v3_plus": 4}[head]  # uncorrected, these find too little
    area, shift = {}, {}
    for keep in (True, False):
        tiny_recipe.segmenter.keep_area = keep
        out = train_segmenter(labelled, tiny_recipe, tmp_path / str(keep))
        found = segment_images(*load_segmenter(str(out), "cpu"), labelled["train"], tiny_recipe.evaluation)
        area[keep] = np.mean([(one.labels > 0).mean() for one in found])
        shift[keep] = json.loads((out / "training_log.json").read_text())[-1].get("background_factor")
    wanted = np.mean([(np.asarray(mask) > 0).mean() for mask in labelled["train"]["pseudo_mask"]])
    assert area[True] > wanted - 0.03 > area[False]
    assert shift[False] is None and shift[True] < 1


def test_objects_beyond_the_labels_stay_and_true_masks_need_no_correction(labelled, tiny_recipe, tmp_path):
    vars(tiny_recipe.segmenter.train).update(lr=0.0, epochs=1)  # an untrained one sees objects everywhere

    def train(keep, mask_column):
        tiny_recipe.segmenter.keep_area = keep
        return train_segmenter(labelled, tiny_recipe, tmp_path / f"{keep} {mask_column}", mask_column=mask_column)

    def factor(folder):
        return json.loads((folder / "training_log.json").read_text())[-1].get("background_factor")

    kept, left, true = train(True, "pseudo_mask"), train(False, "pseudo_mask"), train(True, "mask")
    assert factor(kept) == 1 and same_weights(kept, left)
    assert factor(true) is None and same_weights(true, left)


def test_a_segmenter_starts_from_the_classifiers_backbone(labelled, tiny_recipe, cam_folder, tmp_path):
    # Another normalisation and another backbone than the recipe's, so that one can tell where they come from.
    config = CamClassifier.from_pretrained(cam_folder).config
    config = CamConfig(backbone_config=config.backbone_config, id2label=config.id2label, image_mean=[0.3] * 3)
    classifier = CamClassifier(config)
    classifier.save_pretrained(tmp_path / "cam")
    vars(tiny_recipe.segmenter).update({"from_cam": True, "backbone_config": None})
    vars(tiny_recipe.segmenter.train).update({"lr": 0.0})
    out = train_segmenter(labelled, tiny_recipe, tmp_path / "segmenter", cam=tmp_path / "cam")
    model = Segmenter.from_pretrained(out)
    for name, value in classifier.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    assert list(WsssImageProcessor.from_pretrained(out).image_mean) == [0.3] * 3


def test_the_supervised_bound_learns_from_true_masks(labelled, poisoned_data, tiny_recipe, tmp_path):
    true = train_segmenter(labelled, tiny_recipe, tmp_path / "true", mask_column="mask")
    pseudo = train_segmenter(labelled, tiny_recipe, tmp_path / "pseudo")
    assert not same_weights(true, pseudo)
    assert same_weights(pseudo, train_segmenter(labelled, tiny_recipe, tmp_path / "true"))  # made again
    with pytest.raises(DataError, match="column mask: expected an image, got a file that can't be decoded"):
        train_segmenter(poisoned_data, tiny_recipe, tmp_path / "bad", mask_column="mask")


@pytest.mark.slow
def test_what_doubts_labels_is_for_pseudo_masks_alone(labelled, tiny_recipe, tmp_path):
    plain = {name: train_segmenter(labelled, tiny_recipe, tmp_path / name, mask_column=name) for name in ("mask",)}
    plain["pseudo_mask"] = train_segmenter(labelled, tiny_recipe, tmp_path / "pseudo_mask")
    vars(tiny_recipe.segmenter).update({"loss": "symmetric", "loss_options": {"beta": 3.0}})
    robust = {
        name: train_segmenter(labelled, tiny_recipe, tmp_path / f"robust_{name}", mask_column=name) for name in plain
    }
    assert same_weights(plain["mask"], robust["mask"]) and not same_weights(
        plain["pseudo_mask"], robust["pseudo_mask"]
    )


def test_pixels_without_confidence_teach_nothing(labelled, tiny_recipe, tmp_path):
    """Where the confidence of every second image's pixels is 0, these images might as well be ignored."""
    rows = labelled["train"]
    masks = [np.asarray(mask) for mask in rows["pseudo_mask"]]
    ignored = [mask if index % 2 else np.full_like(mask, 255) for index, mask in enumerate(masks)]
    doubted = [np.full_like(mask, 255 * (index % 2)) for index, mask in enumerate(masks)]

    def data(**pictures):
        columns = {name: rows[name][:] for name in ("image_id", "image", "tags")}
        columns |= {name: [Image.fromarray(values) for values in column] for name, column in pictures.items()}
        return DatasetDict(train=Dataset.from_dict(columns, features=tagged_features(class_names(rows), *pictures)))

    tiny_recipe.segmenter.keep_area = False  # which counts labels, whatever their confidence
    vars(tiny_recipe.segmenter.train).update({"freeze_batch_norm": True})
    first = train_segmenter(data(pseudo_mask=ignored), tiny_recipe, tmp_path / "ignored")
    tiny_recipe.segmenter.confidence = True
    trusted = data(pseudo_mask=masks, confidence=doubted)
    second = train_segmenter(trusted, tiny_recipe, tmp_path / "doubted")
    assert same_weights(first, second)
    vars(tiny_recipe.segmenter).update({"confidence": False, "min_confidence": 0.5})
    third = train_segmenter(trusted, tiny_recipe, tmp_path / "certain")
    assert same_weights(first, third)
    with pytest.raises(DataError, match="expected a column .*confidence.* segmenter.confidence"):
        train_segmenter(labelled, tiny_recipe, tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "fcn"}, "head: expected deeplab_v1 or deeplab_v2 or deeplab_v3_plus, got 'fcn'"),
        ({"loss": "hinge"}, "segmenter.loss: 'hinge': unknown; expected cross_entropy, symmetric"),
        ({"loss_options": {"q": 1}}, "segmenter.loss_options.q: unknown; expected none"),
        ({"model": "nowhere/at-all"}, "segmenter.model: nowhere/at-all: We couldn't connect"),
    ],
)
def test_impossible_segmenters_are_refused_before_anything_is_written(
    labelled, tiny_recipe, tmp_path, change, message
):
    vars(tiny_recipe.segmenter).update(change)
    with pytest.raises((ValueError, OSError), match=message):
        train_segmenter(labelled, tiny_recipe, tmp_path / "segmenter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss", ["cross_entropy", "symmetric", "bootstrapped"])
def test_a_segmenter_whose_loss_is_no_number_stops(labelled, tiny_recipe, tmp_path, loss):
    vars(tiny_recipe.segmenter).update({"loss": loss})
    vars(tiny_recipe.segmenter.train).update({"optimizer": "sgd", "lr": 1e30})
    with pytest.raises(TrainingError, match="the loss 'loss' became (nan|inf)"):
        train_segmenter(labelled, tiny_recipe, tmp_path / "segmenter")
    assert not list(tmp_path.iterdir())


def test_data_without_pseudo_masks_are_refused(toy_data, tiny_recipe, tmp_path):
    with pytest.raises(DataError, match="expected a column .*pseudo_mask"):
        train_segmenter(toy_data, tiny_recipe, tmp_path / "segmenter")
    assert not list(tmp_path.iterdir())


def test_a_class_of_all_images_is_said(toy_data, tiny_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_cam_module, "begin_training", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    tags = [[3, *(c for c in tags if c != 3)] for tags in toy_data["train"]["tags"]]
    rows = toy_data["train"].remove_columns("tags")
    everywhere = DatasetDict(train=rows.add_column("tags", tags, feature=toy_data["train"].features["tags"]))
    for data, is_said in ((everywhere, True), (toy_data, False)):
        with pytest.raises(KeyboardInterrupt):
            train_cam(data, tiny_recipe, tmp_path / str(is_said))
        name = class_names(toy_data)[3]
        assert (f"all images have the tag {name!r}" in capsys.readouterr().err) == is_said
