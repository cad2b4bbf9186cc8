"""On a CPU, masks do not depend on what else is in a batch: by default they are those of the pipelines, to the bit."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from transformers import MobileNetV2Config, pipeline

from wsss_hf import CamClassifier, CamConfig, Recipe, SeamConfig, WsssImageProcessor, make_masks, predict
from wsss_hf.data.tagged import class_names
from wsss_hf.inference.cam_maps import average_maps, localize
from wsss_hf.inference.image_by_image import image_by_image
from wsss_hf.inference.segmenter import predict_scores
from wsss_hf.settings import MasksSettings

pytestmark = pytest.mark.slow


@pytest.fixture(params=[1, 2])
def threads(request):
    """Of torch, which chooses its kernels by their number, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def classifier(names, **options):
    """1x1 and depthwise convolutions and batch norms, untrained, with maps of high and low places."""
    torch.manual_seed(0)
    body = MobileNetV2Config(depth_multiplier=0.25)
    model = CamClassifier(CamConfig(backbone_config=body, id2label=dict(enumerate(names)), **options)).eval()
    with torch.no_grad():
        for layer in model.backbone.modules():
            if isinstance(layer, torch.nn.Conv2d):  # transformers' own initial weights let features vanish
                torch.nn.init.kaiming_normal_(layer.weight)
        mean = model.classify(torch.randn(8, 3, 64, 64))[0][-1].mean(dim=(0, 2, 3))
        weight = torch.randn(len(names), len(mean))
        weight -= (weight @ mean)[:, None] * mean / mean.square().sum()
        model.classifier.weight.copy_(weight[:, :, None, None])
    return model


@pytest.fixture(scope="module")
def data(toy_data):
    """Images of one size, whose views are more than the 16 at which a kernel changes."""
    return DatasetDict(train=toy_data["train"].select(range(9)))


@pytest.fixture(scope="module", params=["cam", "seam"])
def saved(request, toy_data, tmp_path_factory):
    methods = {"seam": SeamConfig(), "maps": "seam"} if request.param == "seam" else {}
    folder = tmp_path_factory.mktemp(request.param)
    classifier(class_names(toy_data), output_stride=16, **methods).save_pretrained(folder)
    WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}).save_pretrained(folder)
    return folder


def test_masks_of_default_settings_are_those_of_the_pipeline(saved, data, tmp_path):
    recipe = Recipe.load("default", ["masks.refine=[pamr]"])
    assert recipe.masks.batch_size > 8 and recipe.masks.flip and len(recipe.masks.scales) == 3
    labelled = make_masks(data, saved, recipe, tmp_path / "masks").data["train"]
    weak, names, found = pipeline("weak-segmentation", model=str(saved)), class_names(data), set()
    for row in labelled:
        options = {"tags": [names[tag] for tag in row["tags"]], "scales": [0.75, 1.0, 1.25], "flip": True}
        mask = np.asarray(weak(row["image"], refine="pamr", **options)["mask"])
        assert np.array_equal(np.asarray(row["pseudo_mask"]), mask)
        found |= set(np.unique(mask))
    assert len(found) > 3


def test_predicted_masks_are_those_of_the_pipeline(saved, data, tmp_path):
    rows = data["train"]
    for number, image in enumerate(rows["image"][:]):
        image.save(tmp_path / f"{number:02d}.png")
    made = predict([str(tmp_path)], saved, tmp_path / "out", overlays=False)
    weak, labels = pipeline("weak-segmentation", model=str(saved)), {Path(one.name).stem: one.labels for one in made}
    for number, image in enumerate(rows["image"][:]):
        assert np.array_equal(labels[f"{number:02d}"], np.asarray(weak(image, flip=True)["mask"]))


def test_an_image_has_the_same_maps_alone_and_among_others(threads):
    torch.manual_seed(0)
    model, images, tags = classifier("abcd", output_stride=16), torch.randn(9, 3, 80, 96), torch.ones(9, 4)
    probable = classifier("abcd", output_stride=16, icd={}, maps="icd")
    tags[4, 1:3] = 0
    for function, network in ((localize, model), (average_maps, probable)):
        first, second = function(network, images, tags, (60, 72), (0.75, 1.0), True)
        alone = function(network, images[4:5], tags[4:5], size=(60, 72), scales=(0.75, 1.0))
        assert torch.equal(first[16:18], alone[0]) and alone[0].std() > 0
        assert torch.equal(second[4:5] if function is localize else second[16:18], alone[1])

    def segmenter(pixel_values):
        return SimpleNamespace(logits=model(pixel_values).cams)

    scores = predict_scores(segmenter, images, (60, 72), (0.75, 1.0))
    assert torch.equal(scores[4:5], predict_scores(segmenter, images[4:5], (60, 72), (0.75, 1.0)))


def test_elsewhere_a_batch_stays_whole():
    seen = []

    @image_by_image
    def shapes(model, pixel_values, tags, *, offset):
        seen.append((len(pixel_values), len(tags)))
        return pixel_values + offset

    for device, wanted in (("cpu", [(1, 1)] * 3), ("meta", [(3, 3)])):
        seen.clear()
        images = torch.arange(3.0, device=device)
        found = shapes(None, images, tags=images, offset=2)
        assert seen == wanted and found.shape == (3,)
    assert shapes(None, torch.arange(3.0), tags=torch.arange(3.0), offset=2).tolist() == [2, 3, 4]


def test_optimisation_has_to_be_asked_for():
    assert MasksSettings().optimize is False
