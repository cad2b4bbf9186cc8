import copy

import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, MobileNetV1Config, MobileNetV2Config, ResNetConfig, SegformerConfig
from transformers import SegformerForSemanticSegmentation as Segformer

from wsss_hf.inference import optimize
from wsss_hf.inference.load import load_labeler, load_segmenter
from wsss_hf.inference.optimize import for_inference
from wsss_hf.models.configuration_cam import CamConfig
from wsss_hf.models.configuration_segmenter import SegmenterConfig
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.models.vgg import Vgg16Config
from wsss_hf.models.wide_resnet import WideResNet38Config

BACKBONES = {
    "resnet": lambda: ResNetConfig(depths=[1, 1, 2, 2], hidden_sizes=[16, 32, 48, 64], embedding_size=8),
    "mobilenet_v1": lambda: MobileNetV1Config(depth_multiplier=0.25),
    "mobilenet_v2": lambda: MobileNetV2Config(depth_multiplier=0.25),
    "mobilenet_v2, padded evenly": lambda: MobileNetV2Config(depth_multiplier=0.25, tf_padding=False),
    "convnext": lambda: ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 16, 32, 64], layer_scale_init_value=1.0),
    "vgg": lambda: Vgg16Config(widths=(8, 8, 16, 16, 16), extra_channels=[16]),
    "wide_resnet": lambda: WideResNet38Config(widths=[8, 8, 16, 16, 16, 16, 16]),
}
KINDS = {
    "classifier": lambda body: CamClassifier(CamConfig(backbone_config=body, num_labels=4)),
    "dilated": lambda body: CamClassifier(CamConfig(backbone_config=body, num_labels=4, output_stride=16)),
    "with DRS": lambda body: CamClassifier(CamConfig(backbone_config=body, num_labels=4, drs={})),
    "segmenter": lambda body: Segmenter(
        SegmenterConfig(backbone_config=body, num_labels=4, rates=[1, 2], input_scales=[1.0, 0.5])
    ),
}


def build(kind, backbone):
    """With batch norms that do something."""
    torch.manual_seed(0)
    model = KINDS[kind](BACKBONES[backbone]())
    with torch.no_grad():
        for norm in batch_norms(model):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    return model.eval()


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_outputs_stay_the_same(backbone, kind):
    if (backbone, kind) == ("mobilenet_v1", "dilated"):
        pytest.skip("this backbone cannot be dilated")
    model = build(kind, backbone)
    faster = for_inference(copy.deepcopy(model), "cpu")
    for size in ((64, 96), (79, 81)):  # TensorFlow pads even and odd sides differently
        images = torch.randn(2, 3, *size)
        wanted, found = (one(images, output_hidden_states=True) for one in (model, faster))
        for a, b in zip((found.logits, *found.hidden_states), (wanted.logits, *wanted.hidden_states), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("backbone", "remaining"), [("resnet", 0), ("mobilenet_v1", 0), ("mobilenet_v2", 0), ("wide_resnet", 17)]
)
def test_batch_norms_are_folded_where_a_convolution_feeds_them_alone(backbone, remaining):
    model = build("classifier", backbone)
    before = len(batch_norms(model))
    norms = batch_norms(for_inference(model, "cpu"))
    assert before > 20 and len(norms) == remaining
    if norms:  # what enters a block goes around its first norm as well, or is a sum
        assert model.backbone.body.b2_1.bn_branch2a in norms and model.backbone.body.bn7 in norms


def test_activations_work_in_place_where_nothing_else_reads_their_input():
    body = for_inference(build("classifier", "resnet"), "cpu").backbone.body
    block = body.encoder.stages[0].layers[0]
    assert block.layer[0].activation.inplace and not block.activation.inplace  # whose input is a sum
    features = for_inference(build("classifier", "vgg"), "cpu").backbone.body.features
    assert all(layer.inplace for layer in features if isinstance(layer, nn.ReLU))


@torch.no_grad()
def test_convolutions_include_their_activation_unless_something_is_between():
    body = for_inference(build("classifier", "resnet"), "cpu").backbone.body
    first, *_, second = (part.convolution for part in body.encoder.stages[0].layers[0].layer)
    assert first(torch.randn(2, first.in_channels, 8, 8)).min() == 0
    assert second(torch.randn(2, second.in_channels, 8, 8)).min() < 0  # the block's sum goes on with an activation


@torch.no_grad()
def test_weights_are_laid_out_once_for_many_sizes(monkeypatch):
    model = for_inference(build("classifier", "mobilenet_v2"), "cpu")
    laid_out, call = [], torch.ops.mkldnn._reorder_convolution_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", lambda *a: laid_out.append(a) or call(*a))
    for known in (False, True):
        for size in (64, 80, 96):
            laid_out.clear()
            model(torch.zeros(2, 3, size, size))
            assert bool(laid_out) != known


@pytest.mark.parametrize("backbone", ["resnet", "mobilenet_v2"])
@torch.no_grad()
def test_lower_precision_and_torch_without_onednn(backbone, monkeypatch):
    model, images = build("classifier", backbone), torch.randn(2, 3, 64, 64)
    wanted, faster = model(images).cams, for_inference(copy.deepcopy(model), "cpu")
    near = {"atol": 0.05 * float(wanted.abs().max()), "rtol": 0}
    for _ in range(2):  # float32 between, so both kinds of weights are there
        with torch.autocast("cpu", torch.bfloat16):
            low = faster(images).cams
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), wanted, **near)
        torch.testing.assert_close(faster(images).cams, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    monkeypatch.setattr(optimize, "_ONEDNN_FUNCTIONS", ("no such function",))
    slower = for_inference(copy.deepcopy(model), "cpu")
    assert all("_conv_forward" not in vars(module) for module in slower.modules())
    torch.testing.assert_close(slower(images).cams, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@torch.no_grad()
def test_hooks_on_activations_see_and_change_what_they_did():
    model, images, seen = build("classifier", "resnet"), torch.randn(2, 3, 64, 64), []
    activation = model.backbone.body.encoder.stages[0].layers[0].layer[0].activation

    def hook(_module, _inputs, output):
        seen.append(output.mean())
        return 2 * output

    activation.register_forward_hook(hook)
    wanted = model(images).logits
    torch.testing.assert_close(for_inference(model, "cpu")(images).logits, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[-1], seen[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", ["convolution", "normalization"])
@pytest.mark.parametrize("change", [lambda output: None, lambda output: 2 * output], ids=["read", "changed"])
@torch.no_grad()
def test_what_a_hook_sees_stays(layer, change):
    model = build("classifier", "resnet")
    embedder, seen, images = model.backbone.body.embedder.embedder, [], torch.randn(2, 3, 64, 64)

    def hook(_module, _inputs, output):
        seen.append(output.mean())
        return change(output)

    embedder.get_submodule(layer).register_forward_hook(hook)
    wanted = model(images).logits
    torch.testing.assert_close(for_inference(model, "cpu")(images).logits, wanted, atol=1e-5, rtol=1e-5)
    assert batch_norms(model) == [embedder.normalization]
    torch.testing.assert_close(seen[-1], seen[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_convolution_with_two_norms_keeps_both():
    model = build("classifier", "resnet")
    embedder = model.backbone.body.embedder.embedder
    first, second = embedder.normalization, copy.deepcopy(embedder.normalization)
    second.weight.mul_(2)
    embedder.other = second
    convolution = embedder.convolution
    embedder.forward = lambda images: first(convolution(images)) + second(convolution(2 * images))
    images = torch.randn(2, 3, 64, 64)
    wanted = model(images).logits
    torch.testing.assert_close(for_inference(model, "cpu")(images).logits, wanted, atol=1e-5, rtol=1e-5)
    assert set(batch_norms(model)) == {first, second}


@torch.no_grad()
def test_loaded_models_are_ready_and_their_files_stay(cam_folder, tmp_path):
    weights = (cam_folder / "model.safetensors").read_bytes()
    labeler, _ = load_labeler(str(cam_folder), "cpu", optimize=True)
    assert not labeler.training and not batch_norms(labeler)
    assert (cam_folder / "model.safetensors").read_bytes() == weights
    assert batch_norms(CamClassifier.from_pretrained(cam_folder))
    build("segmenter", "mobilenet_v2").save_pretrained(tmp_path)
    segmenter, images = load_segmenter(str(tmp_path), "cpu", optimize=True)[0], torch.randn(1, 3, 64, 64)
    assert segmenter.config.backbone_config.tf_padding  # as it was saved
    wanted = Segmenter.from_pretrained(tmp_path).eval()(images).logits
    torch.testing.assert_close(segmenter(images).logits, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_models_of_transformers_keep_their_weights():
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    model = Segformer(SegformerConfig(**sizes)).eval()
    faster, images = for_inference(copy.deepcopy(model), "cpu"), torch.randn(1, 3, 64, 64)
    weights = dict(faster.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in model.named_parameters())
    torch.testing.assert_close(faster(images).logits, model(images).logits, atol=1e-5, rtol=1e-5)


REFUSED = "this model is optimised for inference: load it with from_pretrained to train or save it"


@pytest.mark.parametrize("copied", [False, True])
def test_an_optimised_model_is_neither_trained_nor_saved(cam_folder, tmp_path, copied):
    model, _ = load_labeler(cam_folder, "cpu", optimize=True)
    if copied:
        model = copy.deepcopy(model)
    for forbidden in (
        model.train,
        model.state_dict,
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: model.push_to_hub("owner/name"),
        lambda: nn.Sequential(model).train(),
    ):
        with pytest.raises(RuntimeError, match=REFUSED):
            forbidden()
    assert not (tmp_path / "model").exists()
    assert isinstance(model, CamClassifier) and model.eval() is model and not model.training


def test_an_optimised_model_of_transformers_is_not_saved_either(tmp_path):
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    with pytest.raises(RuntimeError, match=REFUSED):
        for_inference(Segformer(SegformerConfig(**sizes)), "cpu").save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("switch", ["default", "environment"])
@torch.no_grad()
def test_without_optimisation_a_model_is_the_saved_one(cam_folder, tmp_path, monkeypatch, switch):
    if switch == "environment":
        monkeypatch.setenv("WSSS_OPTIMIZE", "0")
    optimised = {"optimize": True} if switch == "environment" else {}
    build("segmenter", "resnet").save_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    for load, folder, kind in ((load_labeler, cam_folder, CamClassifier), (load_segmenter, tmp_path, Segmenter)):
        model, plain = load(folder, "cpu", **optimised)[0], kind.from_pretrained(folder)
        assert torch.equal(model(images).logits, plain(images).logits)
        assert model.state_dict().keys() == plain.state_dict().keys() and model.train().training


def test_the_environment_can_ask_for_optimisation(cam_folder, monkeypatch):
    monkeypatch.setenv("WSSS_OPTIMIZE", "1")
    with pytest.raises(RuntimeError, match=REFUSED):
        load_labeler(cam_folder, "cpu")[0].state_dict()


def test_another_kind_of_model_is_no_labeler(tmp_path):
    build("segmenter", "resnet").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a CAM classifier or map refiner, got a wsss_segmenter"):
        load_labeler(tmp_path, "cpu")
