import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, pipeline

from wsss_hf import MapRefiner, MapRefinerConfig, WsssImageProcessor
from wsss_hf.inference.cam_maps import localize
from wsss_hf.models.modeling_cam import CamOutput
from wsss_hf.models.options import OptionError

NAMES = {0: "cat", 1: "cow", 2: "dog"}


@pytest.fixture
def refiner(resnet_config):
    torch.manual_seed(0)
    return MapRefiner(MapRefinerConfig(backbone_config=resnet_config, id2label=NAMES)).eval()


def test_the_loss_is_the_mean_squared_error_at_the_size_of_the_targets(refiner):
    pixels, targets = torch.randn(2, 3, 64, 96), torch.rand(2, 3, 64, 96)
    output = refiner(pixels, targets=targets)
    assert output.maps.shape == (2, 3, 2, 3)
    predicted = F.interpolate(output.maps, size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.loss, (predicted - targets).square().mean())
    assert list(output.losses) == ["refinement"] and output.losses["refinement"] is output.loss
    assert refiner(pixels).loss is None and refiner(pixels, tags=torch.ones(2, 3)).loss is None


def test_a_refiner_learns_maps(refiner):
    pixels, targets = torch.randn(2, 3, 64, 64), torch.zeros(2, 3, 16, 16)
    targets[0, 0, :8], targets[1, 2, :, 8:] = 1, 0.5
    optimizer = torch.optim.AdamW(refiner.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        output = refiner(pixels, targets=targets)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_tags_are_predicted_where_a_map_is_high_somewhere(refiner):
    output = refiner(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(output.logits.sigmoid(), output.maps.amax(dim=(2, 3)).clamp(1e-6, 1 - 1e-6))
    output.maps = torch.tensor([[[[0.9, 0.1]], [[0.3, 0.2]], [[0.0, 0.6]]]])
    output.logits = output.maps.amax(dim=(2, 3)).logit()
    labels = refiner.segmentation_scores(output, (1, 2)).argmax(dim=1)
    assert labels.tolist() == [[[1, 3]]]


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (1, 3, 8, 8), (2, 3, 8)])
def test_targets_of_other_images_or_classes_are_refused(refiner, shape):
    with pytest.raises(ValueError, match=r"targets: expected shape \(2, 3, H, W\), got "):
        refiner(torch.randn(2, 3, 64, 64), targets=torch.zeros(shape))


def test_a_refiner_has_no_methods(resnet_config):
    with pytest.raises(ValueError, match="map refiner: expected no methods, got drs, icd"):
        MapRefinerConfig(backbone_config=resnet_config, drs={}, icd={})


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSemanticSegmentation])
def test_auto_classes_and_the_pipeline_know_the_model(refiner, auto, tmp_path):
    refiner.save_pretrained(tmp_path)
    WsssImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}).save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is MapRefiner and type(AutoConfig.from_pretrained(tmp_path)) is MapRefinerConfig
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.eval()(pixels).maps, refiner(pixels).maps)
    picture = F.interpolate(torch.rand(1, 3, 4, 4), size=(64, 64))[0]
    image = Image.fromarray((255 * picture).byte().permute(1, 2, 0).numpy())
    found = pipeline("image-segmentation", model=str(tmp_path))(image, tags=["cow"])
    assert {segment["label"] for segment in found} <= {"background", "cow"}


def test_maps_make_masks_as_they_are():
    class Denying(nn.Module):
        normalizes_maps = MapRefiner.normalizes_maps

        def forward(self, pixel_values):
            maps = torch.full((1, 3, 4, 4), 0.02) if pixel_values.shape[-1] == 8 else torch.full((1, 3, 5, 5), -0.5)
            maps[:, 1] = 1.5
            return CamOutput(logits=maps.mean(dim=(2, 3)), maps=maps)

    pixels, tags = torch.zeros(1, 3, 8, 8), torch.tensor([[1, 1, 0]])
    for fusion, denied in (("max", 0.02), ("mean", 0.01)):
        maps, _ = localize(Denying(), pixels, tags, (8, 8), scales=(1.0, 1.25), flip=False, fusion=fusion, bf16=False)
        torch.testing.assert_close(maps, torch.tensor([denied, 1.0])[:, None, None].expand(2, 8, 8))


def test_its_maps_are_not_summed_for_min_max_brings_denied_classes_back(refiner):
    with pytest.raises(OptionError, match="masks.fusion: expected mean or max with a map refiner.* got sum"):
        localize(refiner, torch.zeros(1, 3, 64, 64), torch.ones(1, 3), (64, 64), fusion="sum")
