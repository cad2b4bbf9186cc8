"""The bias of the logits is found by what it does."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.pseudo_labels.area_prior import multiply_background, output_bias

PROCESSOR = WsssImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
HEADS = [{}, {"head": "deeplab_v3_plus", "rates": [1, 2]}, {"input_scales": [0.5, 1.0]}]


class Layers(nn.Module):
    """A segmenter of three classes, and layers after its classifier."""

    device = torch.device("cpu")
    config = SimpleNamespace(model_type="layers", num_labels=3)

    def __init__(self, *after):
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Sequential(nn.Conv2d(3, 3, 4, stride=4), *after)
        self.auxiliary = nn.Conv2d(3, 3, 1)  # whose bias comes last, and is none of the logits

    def forward(self, pixel_values):
        self.auxiliary(pixel_values)
        return SimpleNamespace(logits=self.logits(pixel_values))


@pytest.mark.parametrize("options", HEADS, ids=["v2", "v3_plus", "multi_scale"])
@torch.no_grad()
def test_a_factor_on_the_background_reaches_every_pixel(resnet_config, options):
    config = SegmenterConfig(backbone_config=resnet_config, num_labels=3, **options)
    model = Segmenter(config).eval()
    images, weights = torch.randn(2, 3, 64, 64), copy.deepcopy(model.state_dict())
    before = model(images).logits.softmax(dim=1)
    bias = output_bias(model, PROCESSOR)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    multiply_background(bias, 3.0)
    after = model(images).logits.softmax(dim=1)
    torch.testing.assert_close(after[:, 0] / after[:, 1], 3 * before[:, 0] / before[:, 1])
    torch.testing.assert_close(after[:, 2] / after[:, 1], before[:, 2] / before[:, 1])


def test_the_last_bias_of_that_length_may_be_another():
    model = Layers()
    assert output_bias(model.eval(), PROCESSOR) is model.logits[0].bias


def test_a_norm_after_the_classifier_has_the_bias_that_counts():
    model = Layers(nn.BatchNorm2d(3))
    model.logits[1].running_var.fill_(4.0)
    assert output_bias(model.eval(), PROCESSOR) is model.logits[1].bias


@pytest.mark.parametrize("after", [nn.LogSoftmax(dim=1), nn.ReLU(), nn.BatchNorm2d(3, affine=False)])
def test_without_a_bias_that_moves_the_background_alone_there_is_none(after):
    model = Layers(after)
    if isinstance(after, nn.BatchNorm2d):
        after.running_var.fill_(4.0)
    assert output_bias(model.eval(), PROCESSOR) is None
