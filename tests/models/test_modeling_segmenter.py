import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    ConvNextConfig,
    ResNetModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
    pipeline,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from wsss_hf import Segmenter, SegmenterConfig, WsssImageProcessor

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


@torch.no_grad()
def test_v1_is_a_wide_view_and_a_point_on_the_deepest_map(build):
    model, (pixels, _) = build(head="deeplab_v1", output_stride=8, rates=[3]).eval(), batch()
    output = model(pixels, output_hidden_states=True)
    weights = model.head.state_dict()
    wide = F.conv2d(output.hidden_states[-1], weights["0.0.weight"], padding=3, dilation=3) / (1 + 1e-5) ** 0.5
    point = F.conv2d(wide.relu(), weights["1.0.weight"]) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(output.logits, F.conv2d(point.relu(), weights["3.weight"], weights["3.bias"]))
    assert output.logits.shape == (2, 4, 8, 12) and weights["0.0.weight"].shape[0] == 512
    first, second = model.train()(pixels).logits, model(pixels).logits
    assert not torch.equal(first, second)  # dropout
    assert SegmenterConfig(backbone_config=model.config.backbone_config, head="deeplab_v1").rates == [12]
    with pytest.raises(ValueError, match=r"rates: expected one for deeplab_v1, got \[6, 12\]"):
        build(head="deeplab_v1", rates=[6, 12])


@pytest.mark.parametrize(("stride", "size"), [(8, (8, 12)), (16, (4, 6)), (None, (2, 3))])
def test_v3_plus_pools_at_the_output_stride_and_decodes_at_stride_four(build, stride, size):
    model, (pixels, labels) = build(head="deeplab_v3_plus", output_stride=stride, rates=[2, 3, 5]), batch()
    seen = []
    model.head.projection.register_forward_hook(lambda module, args, maps: seen.append(args[0]))
    output = model(pixels, labels=labels, output_hidden_states=True)
    assert output.logits.shape == (2, 4, 16, 24) and output.loss.isfinite()
    shallow, deep = output.hidden_states[0], output.hidden_states[-1]
    assert seen[0].shape == (2, 5 * 256, *size) and shallow.shape[-2:] == (16, 24)
    # The branches, in order: 1x1, one per rate, the image's mean.
    convolutions = [branch[0] for branch in model.head.pyramid]
    assert [c.dilation for c in convolutions] == [(1, 1), (2, 2), (3, 3), (5, 5)]
    third = F.conv2d(deep, convolutions[2].weight, padding=3, dilation=3) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(seen[0][:, 512:768], third.relu())
    mean = F.conv2d(deep.mean(dim=(2, 3), keepdim=True), model.head.image_pooling.weight) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(seen[0][:, 1024:], mean.relu().expand(-1, -1, *size))
    # The low-level map has its say: silence it, and other logits come out.
    nn.init.zeros_(model.head.low_level[0].weight)
    assert not torch.allclose(model(pixels).logits, output.logits)


def test_v3_plus_stands_on_any_backbone():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    for config in (ViTConfig(**sizes), ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16])):
        model = Segmenter(SegmenterConfig(backbone_config=config, head="deeplab_v3_plus", id2label=NAMES))
        output = model.train()(torch.randn(1, 3, 64, 64), labels=torch.ones(1, 64, 64, dtype=torch.long))
        output.loss.backward()  # of a single image, too
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_head_starts_wide_enough_to_learn(build):
    head = build(head="deeplab_v3_plus").head
    assert head.decoder[0][0].weight.std().item() == pytest.approx((2 / (304 * 9)) ** 0.5, rel=0.05)
    assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("training", [True, False])
def test_of_several_scales_the_largest_logit_counts(build, training):
    model, (pixels, labels) = build(input_scales=[0.5, 0.75, 1.0], output_stride=8), batch()
    once = build(output_stride=8)
    once.load_state_dict(model.state_dict())
    output = model.train(training)(pixels, labels=labels)
    once.train(training)
    views = []
    for size in ((32, 48), (48, 72), (64, 96)):
        view = once(F.interpolate(pixels, size=size, mode="bilinear", antialias=True)).logits
        views.append(F.interpolate(view, size=(8, 12), mode="bilinear"))
    views.append(torch.stack(views).amax(dim=0))
    torch.testing.assert_close(output.logits, views[-1], atol=1e-4, rtol=1e-4)
    losses = [F.cross_entropy(F.interpolate(v, (64, 96), mode="bilinear"), labels, ignore_index=255) for v in views]
    torch.testing.assert_close(output.loss, sum(losses), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_trainer_takes_the_mean_loss_of_accumulated_batches(tmp_path):
    backbone = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
    )
    torch.manual_seed(0)
    row = {"pixel_values": torch.randn(3, 32, 32), "labels": torch.arange(32 * 32).view(32, 32) % 3}
    moved = []
    for batches in (1, 2):
        torch.manual_seed(0)
        model = Segmenter(SegmenterConfig(backbone_config=backbone, id2label=NAMES, rates=[1]))
        before = model.head[0].weight.detach().clone()
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=batches,
            max_steps=1,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=[row] * batches).train()
        moved.append(model.head[0].weight.detach() - before)
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "deeplab_v4"}, "head: expected deeplab_v1 or deeplab_v2 or deeplab_v3_plus, got 'deeplab_v4'"),
        ({"rates": [6, 0]}, r"rates: expected numbers > 0, got \[6, 0\]"),
        ({"input_scales": [-1, 1]}, r"input_scales: expected numbers > 0, got \[-1, 1\]"),
    ],
)
def test_impossible_heads_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


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


HEADS = [
    {"rates": [1, 2, 5]},
    {"head": "deeplab_v3_plus"},
    {"head": "deeplab_v3_plus", "rates": [2, 4], "input_scales": [0.5, 1.0]},
]


@pytest.mark.parametrize("options", HEADS, ids=["v2", "v3_plus", "multi_scale"])
def test_a_saved_model_comes_back(build, tmp_path, options):
    model, (pixels, _) = build(output_stride=16, **options), batch()
    model.save_pretrained(tmp_path)
    loaded = Segmenter.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():  # where weights lie in memory may change the order of a sum
        torch.testing.assert_close(loaded.eval()(pixels).logits, model(pixels).logits)
    assert loaded.config.id2label == NAMES == loaded.mask_id2label
    assert loaded.config.label2id["dog"] == 3
    for name in ("head", "rates", "input_scales"):
        assert getattr(loaded.config, name) == getattr(model.config, name)


@pytest.mark.parametrize("options", HEADS[1:], ids=["v3_plus", "multi_scale"])
def test_the_pipeline_shows_what_the_model_says(build, tmp_path, options):
    model = build(output_stride=8, **options)
    nn.init.normal_(model.head.classifier.weight)
    model.save_pretrained(tmp_path)
    processor = WsssImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    processor.save_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((70, 50), Image.Resampling.BICUBIC)
    with torch.no_grad():
        output = model(processor(images=image, return_tensors="pt")["pixel_values"])
    labels = model.segmentation_scores(output, (50, 70))[0].argmax(dim=0).numpy()
    found = pipeline("image-segmentation", str(tmp_path))(image)
    assert [entry["label"] for entry in found] == [NAMES[label] for label in np.unique(labels)] and len(found) > 1
    for entry in found:
        assert np.array_equal(np.asarray(entry["mask"]) == 255, labels == model.config.label2id[entry["label"]])


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
