"""Networks of timm, in transformers' own wrapper; without timm these tests are left out."""

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from transformers import TimmWrapperConfig, TimmWrapperModel

from wsss_hf import CamClassifier, CamConfig
from wsss_hf.models.backbone import Backbone
from wsss_hf.models.pretrained import resolve_backbone_config

NAMES = {0: "a", 1: "b"}


def config(architecture, **model_args):
    return resolve_backbone_config(None, TimmWrapperConfig(architecture=architecture, model_args=model_args or None))


@pytest.mark.parametrize(
    ("output_stride", "strides"), [(None, [2, 4, 8, 16, 32]), (16, [2, 4, 8, 16, 16]), (8, [2, 4, 8, 8, 8])]
)
def test_a_convolutional_network_has_its_resolutions_as_stages_and_can_be_dilated(output_stride, strides):
    backbone = Backbone(config("resnet18"), output_stride).eval()
    assert (backbone.channels, backbone.strides) == ([64, 64, 128, 256, 512], strides)
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 64, 96))[-1].shape[-2:] == (64 // strides[-1], 96 // strides[-1])


def test_a_vision_transformer_has_layers_as_stages_and_takes_any_size():
    backbone = Backbone(config("vit_tiny_patch16_224", depth=4), layers=[2, 4]).eval()
    assert backbone.channels == [192, 192] and backbone.strides == [16, 16]
    network = backbone.body.timm_model
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = backbone(pixels)
        after = network.forward_intermediates(pixels, intermediates_only=True)[1]
        last = network.forward_features(pixels)[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
        assert backbone(torch.randn(1, 3, 50, 75))[-1].shape == (1, 192, 3, 5)
    torch.testing.assert_close(maps[0], after)
    torch.testing.assert_close(maps[1], last)


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny_patch16_224"])
def test_published_weights_train_and_come_back(architecture, tmp_path):
    torch.manual_seed(0)
    published = TimmWrapperModel(TimmWrapperConfig(architecture=architecture))
    published.save_pretrained(tmp_path / "published")
    model = CamClassifier.from_backbone(str(tmp_path / "published"), id2label=NAMES, seam={}, d2cam={})
    found = model.backbone.body.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in published.state_dict().items())
    model.train().progress = 0.5
    output = model(torch.randn(2, 3, 64, 96), tags=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval().save_pretrained(tmp_path / "trained")
    loaded = CamClassifier.from_pretrained(tmp_path / "trained").eval()
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_it_gives_no_attentions():
    with pytest.raises(
        ValueError, match="attention: expected a backbone that gives its attentions, got 'timm_wrapper'"
    ):
        CamClassifier(CamConfig(backbone_config=config("vit_tiny_patch16_224"), attention={}))
