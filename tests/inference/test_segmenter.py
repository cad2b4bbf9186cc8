from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from wsss_hf.inference.segmenter import predict_scores, segment_images
from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.refinement.steps import build_refinement
from wsss_hf.settings import EvaluationSettings

SIZE = (40, 56)


@pytest.fixture
def model(resnet_config):
    torch.manual_seed(0)
    names = {0: "background", 1: "cat", 2: "dog"}
    model = Segmenter(SegmenterConfig(backbone_config=resnet_config, output_stride=16, id2label=names)).eval()
    for convolution in model.head:
        torch.nn.init.normal_(convolution.weight, std=0.05)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def predict_plainly(model, images, size, scales, flip):
    """One image, one scale, one mirror image at a time."""
    scores = []
    for image in images:
        views = []
        for scale in scales:
            side = [round(length * scale) for length in image.shape[-2:]]
            scaled = F.interpolate(image[None], size=side, mode="bilinear", antialias=True)
            for mirrored in (False, True) if flip else (False,):
                logits = model(scaled.flip(-1) if mirrored else scaled).logits
                logits = F.interpolate(logits.flip(-1) if mirrored else logits, size=size, mode="bilinear")
                views.append(logits.softmax(dim=1)[0])
        scores.append(sum(views) / len(views))
    return torch.stack(scores)


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0,), True), ((0.5, 1.0, 1.25), True)])
def test_batched_views_are_the_plain_loop(model, images, scales, flip):
    scores = predict_scores(model, images, SIZE, scales, flip)
    torch.testing.assert_close(scores, predict_plainly(model, images, SIZE, scales, flip), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2, *SIZE))


def test_every_view_counts(model, images):
    single, flipped, scaled = (
        predict_scores(model, images, SIZE, scales, flip)
        for scales, flip in [((1.0,), False), ((1.0,), True), ((1.0, 1.25), False)]
    )
    assert (single - flipped).abs().max() > 1e-3 and (single - scaled).abs().max() > 1e-3


def test_mirrored_images_give_mirrored_scores(model, images):
    scores = predict_scores(model, images, SIZE, (1.0, 1.25), flip=True)
    mirrored = predict_scores(model, images.flip(-1), SIZE, (1.0, 1.25), flip=True)
    torch.testing.assert_close(mirrored.flip(-1), scores, atol=1e-5, rtol=0)


class Pixelwise:
    """A model whose logits at a pixel are its colour; it remembers the sizes that it was shown."""

    device = torch.device("cpu")

    def __init__(self, stride=1):
        self.stride, self.sizes = stride, []

    def __call__(self, pixel_values):
        self.sizes.append(tuple(pixel_values.shape))
        return SimpleNamespace(logits=F.avg_pool2d(pixel_values, self.stride))


class Positional(Pixelwise):
    """A model whose logits say where in its input a pixel lies."""

    def __call__(self, pixel_values):
        height, width = pixel_values.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([rows, columns, torch.zeros_like(rows)]).float()
        return SimpleNamespace(logits=places.expand(len(pixel_values), 3, height, width))


def processor(images, return_tensors):
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 50 for image in images]
    return {"pixel_values": torch.stack(pixels)}


@pytest.mark.parametrize(("window", "stride"), [(16, 0), (16, 5), (100, 0), (23, 23)])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_that_see_enough_give_what_the_whole_image_gives(window, stride, flip):
    images = torch.randn(2, 3, 23, 37)
    whole = predict_scores(Pixelwise(), images, (30, 40), (1.0, 1.5), flip)
    slid = predict_scores(Pixelwise(), images, (30, 40), (1.0, 1.5), flip, window, stride)
    assert torch.allclose(whole, slid, atol=1e-5)


def test_no_window_is_larger_than_asked_for_and_all_have_one_size():
    model = Pixelwise()
    predict_scores(model, torch.randn(1, 3, 23, 37), (23, 37), flip=False, window=16)
    assert set(model.sizes) == {(1, 3, 16, 16)} and len(model.sizes) == 2 * 4


def test_overlapping_windows_are_averaged():
    images = torch.zeros(1, 3, 4, 6)
    logits = torch.log(predict_scores(Positional(), images, (4, 6), flip=False, window=4, window_stride=2))
    column = (logits[0, 1] - logits[0, 2])[0]
    # Columns 2 and 3 are seen twice: as 2 and 0, as 3 and 1; 4 and 5 are the second window's 2 and 3.
    assert column.tolist() == pytest.approx([0, 1, 1, 2, 2, 3], abs=1e-4)


def test_every_row_gets_the_argmax_at_its_own_size(toy_data):
    settings = EvaluationSettings(flip=False, batch_size=3)
    found = {s.index: s for s in segment_images(Pixelwise(), processor, toy_data["val"], settings)}
    for index, row in enumerate(toy_data["val"]):
        assert found[index].image_id == row["image_id"] and found[index].labels.dtype == np.uint8
        assert np.array_equal(found[index].labels, np.array(row["image"]).argmax(axis=2))


def test_refinement_of_the_probabilities_makes_the_labels(toy_data):
    rows = toy_data["val"].select([0])
    settings = EvaluationSettings(flip=False, refine=[{"pamr": {"iterations": 3}}])
    [segmented] = segment_images(Pixelwise(), processor, rows, settings)
    image = np.array(rows[0]["image"])
    scores = (torch.from_numpy(image).permute(2, 0, 1).float() / 50).softmax(dim=0)
    refined = build_refinement([{"pamr": {"iterations": 3}}])(scores, image).argmax(dim=0).numpy()
    assert np.array_equal(segmented.labels, refined)
    assert not np.array_equal(segmented.labels, image.argmax(axis=2))


def test_logits_that_are_not_finite_are_reported_with_their_row(toy_data):
    class Broken(Pixelwise):
        def __call__(self, pixel_values):
            self.sizes.append(tuple(pixel_values.shape))
            logits = pixel_values.clone()
            if len(self.sizes) == 2:
                logits[0, 0, 3, 3] = float("nan")
            return SimpleNamespace(logits=logits)

    settings = EvaluationSettings(flip=False)
    culprit = toy_data["val"]["image_id"][1]
    with pytest.raises(ValueError, match=f"row '{culprit}': expected finite logits"):
        list(segment_images(Broken(), processor, toy_data["val"], settings))
