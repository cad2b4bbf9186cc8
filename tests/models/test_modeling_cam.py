import itertools
import json
import re
import shutil
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from wsss_hf import CamClassifier, CamConfig, CamOutput, DrsConfig, Method, Options, option, register_method
from wsss_hf.inference.load import load_labeler
from wsss_hf.models.maps import normalize_maps
from wsss_hf.models.methods import METHODS

NAMES = {0: "cat", 1: "cow", 2: "dog"}


@dataclass
class PeakConfig(Options):
    weight: float = option(1.0, "Weight of the loss.", at_least=0)
    classes: list[int] | None = None


class Peak(Method):
    """A method of somebody's own: an offset per class, and a loss that grows with the progress."""

    def __init__(self, config, backbone, num_classes):
        super().__init__(config, backbone, num_classes)
        self.projection = nn.Conv2d(backbone.channels[-1], num_classes, 1)
        self.seen = []

    def losses(self, step):
        self.seen.append(step)
        maps = self.projection(step.features[-1])
        return {"peak": self.config.weight * step.progress * (maps - step.cams).square().mean()}

    def maps(self, step):
        return self.projection(step.features[-1]).square() * step.tags[:, :, None, None]


@pytest.fixture
def peak():
    """The method, registered for the time of one test."""
    before = dict(METHODS)
    register_method("peak", PeakConfig)(Peak)
    yield Peak
    METHODS.clear()
    METHODS.update(before)


def test_a_run_is_no_model_but_holds_some(cam_folder, tmp_path):
    for name in ("segmenter", "cam"):
        shutil.copytree(cam_folder, tmp_path / name)
    words = f"{tmp_path}: expected a model, got a run; its models are {tmp_path / 'cam'}, {tmp_path / 'segmenter'}"
    for load in (CamClassifier.from_pretrained, CamClassifier.from_backbone, lambda run: load_labeler(run, "cpu")):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            load(tmp_path)
    assert CamClassifier.from_pretrained(tmp_path, subfolder="cam").config.id2label
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no weights in safetensors"):
        CamClassifier.from_pretrained(tmp_path)


@pytest.fixture
def build(resnet_config):
    def build(**kwargs):
        torch.manual_seed(0)
        return CamClassifier(CamConfig(backbone_config=resnet_config, id2label=NAMES, **kwargs)).eval()

    return build


def batch(size=2, classes=3):
    generator = torch.Generator().manual_seed(1)
    tags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])[:size, :classes]
    return torch.randn(size, 3, 64, 96, generator=generator), tags


# forward


def test_logits_are_the_mean_of_the_maps(build):
    pixels, _ = batch()
    output = build(output_stride=16)(pixels)
    assert output.cams.shape == (2, 3, 4, 6)
    torch.testing.assert_close(output.logits, output.cams.flatten(2).mean(2))
    assert output.loss is None and output.losses is None and output.hidden_states is None


def test_maps_are_a_linear_function_of_the_deepest_features(build):
    model, (pixels, _) = build(), batch()
    output = model(pixels, output_hidden_states=True)
    assert [tuple(f.shape[1:]) for f in output.hidden_states] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    weights = model.classifier.weight[:, :, 0, 0]
    torch.testing.assert_close(output.cams, torch.einsum("cd,bdhw->bchw", weights, output.hidden_states[-1]))


def test_dropout_drops_whole_channels_before_the_classifier_in_training_alone(build):
    model, (pixels, _) = build(dropout=0.5), batch()
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(pixels).cams, plain(pixels).cams)
    model.train()
    seen = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features, _ = model.classify(pixels)
    kept = seen[0].flatten(2).any(dim=2)
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(seen[0], 2 * features[-1] * kept[:, :, None, None])
    with pytest.raises(ValueError, match=r"dropout: expected a number in \[0, 1\), got 1"):
        build(dropout=1)


def test_a_configuration_from_before_there_was_dropout_has_none(build, tmp_path):
    build(dropout=0.5).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert values["dropout"] == 0.5 and CamClassifier.from_pretrained(tmp_path).config.dropout == 0.5
    values.pop("dropout")
    file.write_text(json.dumps(values))
    assert CamClassifier.from_pretrained(tmp_path).config.dropout == 0


def test_every_pass_of_a_training_step_drops_channels_of_its_own(build):
    methods = {"seam": {"projections": [4, 4], "embedding": 8}, "plda": {"maps": "seam", "pamr_iterations": 1}}
    model, (pixels, tags) = build(dropout=0.5, output_stride=8, **methods).train(), batch()
    seen = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(pixels, tags=tags)
    assert [tuple(features.shape[-2:]) for features in seen] == [
        (8, 12),
        (3, 4),
        (8, 12),
        (3, 4),
    ]  # both views, and both with their source pixels hidden
    dropped = [~features.flatten(2).any(dim=2) for features in seen]
    assert all(0.3 < channels.float().mean() < 0.7 for channels in dropped)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(dropped, 2))


def test_a_method_may_ask_for_a_second_view_and_replace_the_classification_loss(build, peak, monkeypatch):
    monkeypatch.setattr(peak, "second_view", lambda self, pixel_values: pixel_values[..., ::2, ::2])
    monkeypatch.setattr(
        peak, "losses", lambda self, step: self.seen.append(step) or {"classification": step.second_view.cams.mean()}
    )
    model, (pixels, tags) = build(peak={}).train(), batch()
    output = model(pixels, tags=tags)
    (step,) = model.methods["peak"].seen
    view = step.second_view
    assert torch.equal(view.pixel_values, pixels[..., ::2, ::2]) and view.images.shape == view.pixel_values.shape
    assert view.cams.requires_grad and view.second_view is None
    assert list(output.losses) == ["classification"] and torch.equal(output.loss, view.cams.mean())
    model.eval()
    assert list(model(pixels, tags=tags).losses) == ["classification"] and len(model.methods["peak"].seen) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_multi_label_soft_margin(build, training):
    model, (pixels, tags) = build().train(training), batch()
    output = model(pixels, tags=tags)
    torch.testing.assert_close(output.loss, F.multilabel_soft_margin_loss(output.logits, tags))
    assert set(output.losses) == {"classification"}


def test_integer_and_boolean_tags_mean_the_same(build):
    model, (pixels, tags) = build(), batch()
    expected = model(pixels, tags=tags).loss
    assert torch.equal(model(pixels, tags=tags.long()).loss, expected)
    assert torch.equal(model(pixels, tags=tags.bool()).loss, expected)


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (3,)])
def test_tags_of_another_shape_are_refused(build, shape):
    with pytest.raises(ValueError, match=r"tags: expected shape \(2, 3\), got "):
        build()(batch()[0], tags=torch.zeros(shape))


@pytest.mark.parametrize("drs", [None, DrsConfig()])
def test_a_batch_without_any_tag_is_harmless(build, drs):
    model = build(drs=drs).train()
    model(batch()[0], tags=torch.zeros(2, 3)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.classifier.weight.grad.abs().sum() > 0


def test_a_tuple_on_request(build):
    model, (pixels, tags) = build(), batch()
    output = model(pixels, tags=tags)
    as_tuple = model(pixels, tags=tags, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    assert torch.equal(as_tuple[2], output.cams)
    assert torch.equal(model(pixels, return_dict=False)[0], output.logits)


# methods


def test_methods_that_are_off_cost_nothing(build):
    model = build()
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "classifier"}
    assert model.config.methods == {} and set(METHODS).isdisjoint(model.config.to_dict())
    assert len(build(drs=DrsConfig()).state_dict()) > len(model.state_dict())


def test_a_method_of_ones_own_trains(build, peak):
    model, (pixels, tags) = build(peak={"weight": 3.0}).train(), batch()
    model.progress = 0.5
    output = model(pixels, tags=tags)
    assert set(output.losses) == {"classification", "peak"}
    torch.testing.assert_close(output.loss, output.losses["classification"] + output.losses["peak"])
    output.loss.backward()
    assert model.methods["peak"].projection.weight.grad.abs().sum() > 0

    (step,) = model.methods["peak"].seen
    assert step.progress == 0.5 and torch.equal(step.tags, tags) and torch.equal(step.cams, output.cams)
    torch.testing.assert_close(output.losses["peak"].item(), 1.5 * _gap(model, step).item())


def _gap(model, step):
    return (model.methods["peak"].projection(step.features[-1]) - step.cams).square().mean()


def test_a_method_sees_the_images_in_colour_and_the_network_itself(build, peak):
    model = build(peak=PeakConfig(), image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).train()
    for module in model.modules():
        module.training &= not isinstance(module, nn.BatchNorm2d)
    images, tags = torch.rand(2, 3, 64, 64), batch()[1]
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    saliency = torch.rand(2, 64, 64)
    model((images - mean) / std, tags=tags, saliency=saliency)
    (step,) = model.methods["peak"].seen
    torch.testing.assert_close(step.images, images)
    assert step.saliency is saliency and step.superpixels is None
    features, cams = step.classify(step.pixel_values)
    torch.testing.assert_close(cams, step.cams)
    torch.testing.assert_close(features[-1], step.features[-1])


def test_methods_add_no_loss_outside_training(build, peak):
    model, (pixels, tags) = build(peak={}), batch()
    assert set(model(pixels, tags=tags).losses) == {"classification"}
    assert model.methods["peak"].seen == []


def test_the_maps_of_the_named_method_are_the_maps(build, peak):
    model, (pixels, tags) = build(peak={}, maps="peak"), batch()
    output = model(pixels, tags=tags, output_hidden_states=True)
    expected = model.methods["peak"].projection(output.hidden_states[-1]).square()
    torch.testing.assert_close(output.maps, expected * tags[:, :, None, None])
    torch.testing.assert_close(model(pixels).maps, expected)  # no tag known: every class may be there
    torch.testing.assert_close(output.logits, output.cams.mean(dim=(2, 3)))
    scores = model.segmentation_scores(output, (2, 3), tags=torch.ones(2, 3))
    torch.testing.assert_close(scores[:, 1:], normalize_maps(normalize_maps(output.maps)))


def test_methods_wait_for_the_warmup_and_then_count_their_own_progress(build, peak):
    model = build(peak={}, method_warmup=0.5).train()
    for progress in (0.0, 0.49):
        model.progress = progress
        output = model(*batch())
        assert set(output.losses) == {"classification"}
    output.loss.backward()  # distributed training refuses parameters without a gradient
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.methods["peak"].parameters())

    for progress, counted in ((0.5, 0.0), (0.75, 0.5), (1.0, 1.0)):
        model.progress = progress
        assert set(model(*batch()).losses) == {"classification", "peak"}
        assert model.methods["peak"].seen[-1].progress == pytest.approx(counted)

    with pytest.raises(ValueError, match=r"method_warmup: expected a number in \[0, 1\), got 1"):
        build(peak={}, method_warmup=1)


def test_drs_suppresses_nothing_in_the_warmup_but_always_at_inference(build):
    pixels, tags = batch()
    model, plain = build(drs={"layers": ["*"]}, method_warmup=0.5), build()
    weights = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("methods.")}
    plain.load_state_dict(weights)
    suppressed = model(pixels).cams
    assert not torch.allclose(suppressed, plain(pixels).cams)

    model.train(), plain.train()
    for progress, same in ((0.1, True), (0.6, False)):
        model.progress = progress
        assert torch.allclose(model(pixels, tags).cams, plain(pixels, tags).cams) is same
    model.load_state_dict(weights, strict=False)
    model.progress = 0.1
    torch.testing.assert_close(model.eval()(pixels).cams, suppressed)


def test_another_view_leaves_the_running_statistics_alone(build, peak):
    model = build(peak={}).train()
    model(*batch())
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.methods["peak"].seen[-1].classify(batch()[0])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model.classify(batch()[0])
    assert not all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_method_can_ask_for_the_maps_of_another(build, peak):
    model = build(peak={}, seam={}).train()
    pixels, tags = batch()
    model(pixels, tags)
    step = model.methods["peak"].seen[-1]
    features, cams = model.classify(pixels / 2)
    assert step.localize("cam", pixels / 2, features, cams) is cams
    expected = model.methods["seam"].refine(pixels / 2, features, cams)[:, 1:]
    torch.testing.assert_close(step.localize("seam", pixels / 2, features, cams), expected)


@pytest.mark.parametrize("scale", [0.5, 1])
def test_the_method_asked_sees_a_step_of_the_other_view_alone(build, peak, scale, monkeypatch):
    def maps(self, step):
        self.seen.append(step)
        return step.cams.relu()

    monkeypatch.setattr(peak, "maps", maps)
    model, (pixels, tags) = build(peak={}, contrast={"maps": "peak", "scale": 0.5}).train(), batch()
    superpixels, saliency = torch.zeros(2, 64, 96, dtype=torch.int64), torch.rand(2, 64, 96)
    model(pixels, tags=tags, superpixels=superpixels, saliency=saliency)
    _, second, step = model.methods["peak"].seen  # the contrast asks for both views
    assert second.pixel_values.shape == second.images.shape == (2, 3, 32, 48)
    assert second.superpixels is None and second.saliency is None

    # One half of the images hidden, as PLDA does it.
    view = F.interpolate(pixels, scale_factor=scale) * torch.tensor([0.0, 1.0]).repeat_interleave(int(48 * scale))
    step.localize("peak", view, *model.classify(view))
    seen = model.methods["peak"].seen[-1]
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.image_mean, model.config.image_std))
    assert torch.equal(seen.pixel_values, view) and seen.second_view is None
    torch.testing.assert_close(seen.images, (view * std + mean).clamp(0, 1))
    assert (seen.superpixels is superpixels and seen.saliency is saliency) == (scale == 1)
    assert scale == 1 or (seen.superpixels is None and seen.saliency is None)


def test_the_maps_are_the_cams_unless_a_method_is_named(build, peak):
    output = build(peak={})(batch()[0])
    assert torch.equal(output.maps, output.cams)


def test_maps_of_a_method_that_is_off_are_refused(resnet_config):
    with pytest.raises(ValueError, match=r"maps: expected cam or a method .* \(none is\), got 'icd'"):
        CamConfig(backbone_config=resnet_config, maps="icd", drs={})


def test_maps_of_a_method_that_has_none_are_refused(resnet_config):
    with pytest.raises(ValueError, match=r"maps: expected cam or a method .* \(none is\), got 'drs'"):
        CamConfig(backbone_config=resnet_config, maps="drs", drs={})
    with pytest.raises(ValueError, match=r"plda.maps: expected cam or a method .* \(d2cam\), got 'seam'"):
        CamConfig(backbone_config=resnet_config, plda={"maps": "seam"}, d2cam={})


def test_the_options_of_a_registered_method_come_back(build, peak, tmp_path):
    model = build(peak={"weight": 3.0, "classes": [0, 2]}, drs={"mode": "fixed", "delta": 0.7, "layers": ["*"]})
    model.methods["peak"].projection.weight.data.fill_(7.0)
    model.save_pretrained(tmp_path)
    loaded = CamClassifier.from_pretrained(tmp_path)
    assert loaded.config.methods == {
        "peak": PeakConfig(3.0, [0, 2]),
        "drs": DrsConfig(mode="fixed", delta=0.7, layers=["*"]),
    }
    assert (loaded.methods["peak"].projection.weight == 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wieght": 1}, "peak.wieght: unknown; did you mean peak.weight"),
        ({"weight": -1}, "peak.weight: expected a number >= 0, got -1"),
        (5, "peak: expected a mapping of options, got 5"),
    ],
)
def test_unfit_options_of_a_method_are_refused(resnet_config, peak, options, message):
    with pytest.raises(ValueError, match=message):
        CamConfig(backbone_config=resnet_config, peak=options)


def test_options_that_are_no_options_dataclass_are_refused():
    with pytest.raises(TypeError, match="peak: expected a dataclass that inherits from wsss_hf.Options, got .*dict"):
        register_method("peak", dict)


def test_two_methods_of_one_name_are_refused(peak):
    with pytest.raises(ValueError, match="method 'peak': expected a new name, got that of .*Peak"):

        @register_method("peak", PeakConfig)
        class Summit(Method):
            pass

    assert METHODS["peak"] == (PeakConfig, Peak)


def test_a_class_of_the_same_name_from_elsewhere_is_another_class(peak):
    other = type("Peak", (Method,), {"__module__": "somebody.else", "__qualname__": "Peak"})
    with pytest.raises(ValueError, match="method 'peak': expected a new name"):
        register_method("peak", PeakConfig)(other)


def test_a_method_may_be_defined_again(peak):
    """As a notebook does that runs its cell twice."""
    again = type("Peak", (Method,), {"__module__": __name__, "__qualname__": "Peak"})
    register_method("peak", PeakConfig)(again)
    assert METHODS["peak"] == (PeakConfig, again)


# saving and loading


@pytest.mark.parametrize("drs", [None, DrsConfig(layers=["encoder.*"]), DrsConfig(mode="fixed", delta=0.7)])
def test_a_saved_model_comes_back_bit_by_bit(build, drs, tmp_path):
    model, (pixels, _) = build(drs=drs, output_stride=8, background_threshold=0.3, tag_threshold=0.6), batch()
    model.progress = 0.7
    model.save_pretrained(tmp_path)
    loaded, report = CamClassifier.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels).cams, model(pixels).cams)
    assert loaded.config.drs == model.config.drs
    assert loaded.config.id2label == NAMES and loaded.config.label2id == {"cat": 0, "cow": 1, "dog": 2}
    assert (loaded.config.background_threshold, loaded.config.tag_threshold) == (0.3, 0.6)
    assert loaded.progress == 0.0


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation])
def test_auto_classes_know_the_model(build, auto, tmp_path):
    build().save_pretrained(tmp_path)
    assert type(auto.from_pretrained(tmp_path)) is CamClassifier


def test_a_configuration_comes_back(resnet_config, tmp_path):
    config = CamConfig(
        backbone_config=resnet_config,
        output_stride=16,
        id2label=NAMES,
        drs={"delta": 0.4},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CamConfig
    own = {"_name_or_path": None, "transformers_version": None}
    assert loaded.to_dict() | own == config.to_dict() | own
    assert type(loaded.backbone_config) is type(resnet_config) and loaded.drs == DrsConfig(delta=0.4)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_a_published_backbone_gives_its_weights(resnet_config, family, tmp_path):
    if family == "resnet":
        resnet_config.num_labels = 10
        published = ResNetForImageClassification(resnet_config)
        for module in published.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
        body = published.resnet
    else:
        config = ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32
        )
        published = ViTForImageClassification(config)
        body = published.vit
    published.save_pretrained(tmp_path / "published")

    model = CamClassifier.from_backbone(str(tmp_path / "published"), id2label=NAMES, drs=DrsConfig()).eval()
    weights = model.backbone.body.state_dict()
    assert {name for name in body.state_dict() if not name.startswith("pooler")} == set(weights)
    for name, value in weights.items():
        assert torch.equal(value, body.state_dict()[name]), name
    assert model.config.id2label == NAMES and model.classifier.out_channels == 3
    channels = model.backbone.channels[-1]
    assert model.classifier.weight.std().item() == pytest.approx((3 * channels) ** -0.5, rel=0.3)

    plain = CamClassifier.from_backbone(str(tmp_path / "published"), id2label=NAMES).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = body.eval()(pixels).last_hidden_state
        actual = plain(pixels, output_hidden_states=True).hidden_states[-1]
    if family == "vit":
        expected = expected[:, 1:].mT.unflatten(2, (2, 2))
    torch.testing.assert_close(actual, expected)


def test_hub_arguments_reach_configuration_and_weights(resnet_config, tmp_path):
    ResNetForImageClassification(resnet_config).save_pretrained(tmp_path / "deeper")
    model = CamClassifier.from_backbone(str(tmp_path), hub_kwargs={"subfolder": "deeper"}, id2label=NAMES)
    assert model.backbone.channels == [16, 32, 64, 128]


# from maps to labels


def test_label_names_of_a_mask_start_with_background(build):
    assert build().mask_id2label == {0: "background", 1: "cat", 2: "cow", 3: "dog"}


def outputs(model, cams):
    return CamOutput(logits=cams.mean(dim=(2, 3)), cams=cams, maps=cams)


def test_scores_are_normalized_maps_above_a_background(build):
    model = build(background_threshold=0.4)
    cams = torch.tensor([[[[8.0, 2.0], [2.0, 8.0]], [[-9.0, -9.0], [-9.0, -9.0]], [[0.1, 0.2], [-9.0, -9.0]]]])
    scores = model.segmentation_scores(outputs(model, cams), (2, 2))
    assert scores.shape == (1, 4, 2, 2)
    # Predicted are the tags whose mean logit is positive: the cat alone.
    torch.testing.assert_close(scores[0, 1], torch.tensor([[1.0, 0.25], [0.25, 1.0]]), rtol=0, atol=1e-4)
    assert (scores[0, 0] == 0.4).all() and (scores[0, 2:] == 0).all()
    assert scores.argmax(1)[0].tolist() == [[1, 0], [0, 1]]


def test_given_tags_and_threshold_take_precedence(build):
    model = build()
    cams = torch.tensor([[[[8.0, 2.0], [2.0, 8.0]], [[-9.0, -9.0], [-9.0, -9.0]], [[0.1, 0.2], [-9.0, -9.0]]]])
    scores = model.segmentation_scores(
        outputs(model, cams), (2, 2), tags=torch.tensor([[0, 0, 1]]), background_threshold=0.6
    )
    assert scores.argmax(1)[0].tolist() == [[0, 3], [0, 0]]


def test_tag_threshold_decides_which_tags_are_predicted(build):
    cams = torch.tensor([[[[1.0]], [[3.0]], [[0.1]]]])  # probabilities 0.73, 0.95, 0.52
    found = {}
    for threshold in (0.5, 0.6, 0.9):
        model = build(tag_threshold=threshold)
        scores = model.segmentation_scores(outputs(model, cams), (3, 3))
        found[threshold] = (scores[0, 1:].amax(dim=(1, 2)) > 0).tolist()
    assert found == {0.5: [True, True, True], 0.6: [True, True, False], 0.9: [False, True, False]}
