import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, ResNetModel, ViTConfig, ViTModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from wsss_hf import Segmenter, SegmenterConfig

NAMES = {0: "background", 1: "cat", 2: "cow", 3: "dog"}


@pytest.fixture
def build(resnet_config):
    def build(**kwargs):
        torch.manual_seed(0)
        kwargs = {"backbone_config": resnet_config, "id2label": NAMES, "rates": [1, 3]} | kwargs
        return Segmenter(SegmenterConfig(**kwargs)).eval()

    return build


def batch():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (2, 64, 96), generator=generator)
    labels[:, :20] = 255
    return torch.randn(2, 3, 64, 96, generator=generator), labels


def test_logits_are_the_sum_of_the_parallel_convolutions(build):
    model, (pixels, _) = build(output_stride=8), batch()
    output = model(pixels, output_hidden_states=True)
    assert output.logits.shape == (2, 4, 8, 12)
    features = output.hidden_states[-1]
    expected = sum(
        F.conv2d(features, c.weight, c.bias, padding=rate, dilation=rate)
        for c, rate in zip(model.head, (1, 3), strict=True)
    )
    torch.testing.assert_close(output.logits, expected)
    assert output.loss is None and model(pixels).hidden_states is None


def test_the_loss_is_the_mean_over_the_pixels_that_count(build):
    model, (pixels, labels) = build(), batch()
    output = model(pixels, labels=labels)
    log_probabilities = F.interpolate(output.logits, (64, 96), mode="bilinear").log_softmax(dim=1)
    counted = [
        -log_probabilities[b, labels[b, y, x], y, x] for b in range(2) for y in range(20, 64) for x in range(96)
    ]
    torch.testing.assert_close(output.loss, torch.stack(counted).mean())


def test_a_batch_that_is_ignored_everywhere_teaches_nothing(build):
    model, (pixels, labels) = build().train(), batch()
    loss = model(pixels, labels=torch.full_like(labels, 255)).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_a_tuple_on_request(build):
    model, (pixels, labels) = build(), batch()
    output = model(pixels, labels=labels)
    loss, logits = model(pixels, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


def test_scores_are_probabilities_at_the_asked_size(build):
    model, (pixels, _) = build(), batch()
    output = model(pixels)
    scores = model.segmentation_scores(output, (50, 70))
    torch.testing.assert_close(scores, F.interpolate(output.logits, (50, 70), mode="bilinear").softmax(dim=1))


def test_absent_classes_get_no_pixel(build):
    model = build()
    logits = torch.tensor([[1.0, 5.0, 2.0, 0.0], [1.0, 5.0, 2.0, 0.0]])[:, :, None, None].expand(2, 4, 3, 3)
    output = SemanticSegmenterOutput(logits=logits)
    assert (model.segmentation_scores(output, (6, 6)).argmax(1) == 1).all()
    scores = model.segmentation_scores(output, (6, 6), tags=torch.tensor([[0, 1, 1], [0, 0, 1]]))
    assert (scores[0].argmax(0) == 2).all()
    assert (scores[1].argmax(0) == 0).all()  # background is always allowed
    assert (scores[:, 1] == 0).all() and (scores[1, 2] == 0).all()
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2, 6, 6))
    everything_absent = model.segmentation_scores(output, (6, 6), tags=torch.zeros(2, 3))
    assert (everything_absent[:, 0] == 1).all()


def test_a_saved_model_comes_back_bit_by_bit(build, tmp_path):
    model, (pixels, _) = build(output_stride=16, rates=[1, 2, 5]), batch()
    model.save_pretrained(tmp_path)
    loaded = Segmenter.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels).logits, model(pixels).logits)
    assert loaded.config.id2label == NAMES == loaded.mask_id2label
    assert loaded.config.label2id["dog"] == 3
    assert loaded.config.rates == [1, 2, 5]


def test_auto_classes_know_the_model(build, tmp_path):
    build().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SegmenterConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is Segmenter
    assert type(AutoModelForSemanticSegmentation.from_pretrained(tmp_path)) is Segmenter


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_a_published_backbone_gives_its_weights(resnet_config, family, tmp_path):
    if family == "resnet":
        published = ResNetModel(resnet_config)
    else:
        published = ViTModel(
            ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
        )
    published.save_pretrained(tmp_path)
    model = Segmenter.from_backbone(str(tmp_path), id2label=NAMES, rates=[1])
    for name, value in model.backbone.body.state_dict().items():
        assert torch.equal(value, published.state_dict()[name]), name
    assert model.head[0].weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert model.config.id2label == NAMES
