import pytest
import torch
from torch.nn import functional as F

from wsss_hf.inference.segmenter_scores import predict_scores, resize_images
from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.modeling_segmenter import Segmenter

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


@pytest.mark.parametrize(("size", "scale", "wanted"), [((48, 64), 0.75, (36, 48)), ((1, 3), 0.25, (1, 1))])
def test_no_side_shrinks_to_nothing(size, scale, wanted):
    resized = resize_images(torch.full((1, 3, *size), 0.5), scale)
    assert resized.shape == (1, 3, *wanted)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.5))
