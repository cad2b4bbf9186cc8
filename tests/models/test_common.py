"""What the common tests of transformers check of any vision model, for ours on every kind of backbone."""

import copy
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from wsss_hf import CamClassifier, CamConfig, MapRefiner, MapRefinerConfig, Segmenter, SegmenterConfig
from wsss_hf.models.vgg import Vgg16Config
from wsss_hf.training.build import enable_checkpointing

TOKENS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONVOLUTIONS = {"depths": [1, 1], "hidden_sizes": [8, 16]}
BACKBONES = {
    "resnet": {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, **CONVOLUTIONS},
    "convnext": {"model_type": "convnext", "num_stages": 2, "layer_scale_init_value": 1.0, **CONVOLUTIONS},
    "mobilenet_v2": {"model_type": "mobilenet_v2", "depth_multiplier": 0.1, "min_depth": 4},
    "vit": {"model_type": "vit", "image_size": 32, "patch_size": 16, **TOKENS},
    "dinov2": {"model_type": "dinov2", "image_size": 28, "patch_size": 14, **TOKENS},
    "swin": {"model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]},
}
OTHERS = ("convnext", "mobilenet_v2", "dinov2")
METHODS = {"drs": {}, "seam": {}, "plda": {}}
SIZE = (112, 112)  # of images: whole patches of 14 and of 16


def cam_config(backbone, **kwargs):
    return CamConfig(backbone_config=dict(backbone), id2label={0: "cat", 1: "cow", 2: "dog"}, **kwargs)


def segmenter_config(backbone, **kwargs):
    names = {0: "background", 1: "cat", 2: "cow"}
    return SegmenterConfig(backbone_config=dict(backbone), id2label=names, rates=[1, 2], **kwargs)


def refiner_config(backbone, **kwargs):
    return MapRefinerConfig(backbone_config=dict(backbone), id2label={0: "cat", 1: "cow", 2: "dog"}, **kwargs)


MODELS = {
    "cam": (CamClassifier, cam_config),
    "map_refiner": (MapRefiner, refiner_config),
    "segmenter": (Segmenter, segmenter_config),
}


def build(kind, backbone, seed=0, **kwargs):
    torch.manual_seed(seed)
    model_class, config = MODELS[kind]
    return model_class(config(BACKBONES[backbone], **kwargs)).eval()


build_once = functools.cache(build)


# Every kind of backbone under one of the models, the commonest under all.
@pytest.fixture(
    params=[
        "cam-resnet",
        "cam-vit",
        pytest.param("cam-swin", marks=pytest.mark.slow),
        "map_refiner-resnet",
        "segmenter-resnet",
        *(pytest.param(f"segmenter-{name}", marks=pytest.mark.slow) for name in OTHERS),
    ]
)
def model(request):
    """A model that its test may change."""
    return copy.deepcopy(build_once(*request.param.split("-")))


@pytest.fixture(params=MODELS)
def resnet_model(request):
    return build(request.param, "resnet")


def images(batch=2, seed=1):
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def outputs(model, pixel_values=None):
    with torch.no_grad():
        return model(images() if pixel_values is None else pixel_values)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[name], value), name


# saving and loading


@pytest.mark.parametrize("max_shard_size", ["50GB", "8KB"])
def test_a_saved_model_gives_the_same_outputs_in_one_file_and_in_shards(model, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = list(tmp_path.glob("model*.safetensors"))
    assert not list(tmp_path.glob("*.bin"))
    if max_shard_size == "8KB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(shards) > 1 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    else:
        assert [shard.name for shard in shards] == ["model.safetensors"]
    loaded, report = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not loaded.training
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    places = {value.data_ptr() for value in loaded.parameters()}
    assert len(places) == len(list(loaded.named_parameters(remove_duplicate=False)))  # nothing is tied
    assert_equal(outputs(loaded), outputs(model))


def test_missing_and_unexpected_weights_are_reported(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.startswith(("classifier", "head")) and name.endswith("weight"))
    weights["unknown.weight"] = weights.pop(lost).clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {lost} and set(report["unexpected_keys"]) == {"unknown.weight"}
    assert loaded.state_dict()[lost].isfinite().all() and loaded.state_dict()[lost].std() > 0


def test_a_copy_is_a_model_of_its_own(model):
    twin = copy.deepcopy(model)
    assert_equal(outputs(twin), outputs(model))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert_equal(outputs(model), outputs(copy.deepcopy(model)))


# initialisation


def test_initialisation_is_reproducible_and_finite(model):
    (kind,) = [kind for kind, (model_class, _) in MODELS.items() if model_class is type(model)]
    backbone = model.config.backbone_config.model_type
    again, other = build(kind, backbone), build(kind, backbone, seed=1)
    states = [candidate.state_dict() for candidate in (model, again, other)]
    for name, value in states[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, states[1][name]), name
    matrices = [name for name, value in model.named_parameters() if value.ndim > 1 and value.std() > 0]
    assert matrices and all(not torch.equal(states[0][name], states[2][name]) for name in matrices)


def test_weights_that_are_all_missing_are_initialised_as_a_new_model(model):
    """Loading builds the model without weights first; nothing may stay as the memory was."""
    torch.manual_seed(0)
    loaded = type(model).from_pretrained(None, config=model.config, state_dict={})
    for name, value in loaded.named_parameters():
        expected = model.get_parameter(name)
        assert value.isfinite().all(), name
        assert value.mean().item() == pytest.approx(expected.mean().item(), abs=0.1), name
        if expected.numel() > 100:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.5, abs=1e-6), name
    for name, value in loaded.named_buffers():
        assert torch.equal(value, model.get_buffer(name)), name


# outputs


def test_evaluation_is_deterministic_and_leaves_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_equal(outputs(model), outputs(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_image_means_the_same_alone_and_in_a_batch(model):
    pixel_values = images(3)
    batch = outputs(model, pixel_values)
    for index in range(3):
        alone = outputs(model, pixel_values[index : index + 1])
        torch.testing.assert_close(alone.logits[0], batch.logits[index], atol=1e-5, rtol=1e-4)


def test_hidden_states_come_on_request_of_the_call_or_the_configuration(model):
    assert outputs(model).hidden_states is None
    with torch.no_grad():
        states = model(images(), output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == model.backbone.channels
    assert [state.shape[2] for state in states] == [-(-SIZE[0] // stride) for stride in model.backbone.strides]
    model.config.output_hidden_states = True
    for actual, expected in zip(outputs(model).hidden_states, states, strict=True):
        assert torch.equal(actual, expected)
    with torch.no_grad():
        assert model(images(), output_hidden_states=False).hidden_states is None


def test_a_tuple_holds_what_the_outputs_hold(model):
    named = outputs(model)
    with torch.no_grad():
        values = model(images(), return_dict=False)
    assert isinstance(values, tuple)
    for value, expected in zip(values, named.to_tuple(), strict=True):
        assert torch.equal(value, expected)


# precision and devices


def test_a_model_loads_in_the_precision_that_one_asks_for(model, tmp_path):
    dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert {value.dtype for value in loaded.parameters()} == {dtype}
    output = outputs(loaded, images().to(dtype))
    maps = output["maps"] if "maps" in output else output.logits
    assert maps.dtype == dtype and maps.isfinite().all()
    assert loaded.segmentation_scores(output, (20, 30)).dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again", dtype="auto")
    assert {value.dtype for value in again.parameters()} == {dtype}


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "disk"])
def test_a_model_loads_where_one_asks_for(resnet_model, tmp_path, device_map):
    expected = outputs(resnet_model)
    resnet_model.save_pretrained(tmp_path)
    offloads = device_map == "disk"
    if offloads:
        device_map = {name: "cpu" for name, _ in resnet_model.named_children()} | {"backbone": "disk"}
    loaded = type(resnet_model).from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    places = {value.device.type for value in loaded.backbone.parameters()}
    assert places == ({"meta"} if offloads else {"cpu"})
    assert_equal(outputs(loaded), expected)


# configurations


@pytest.mark.parametrize("backbone", [*BACKBONES, "wsss_vgg16"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_nested_configuration_comes_back(kind, backbone, tmp_path):
    inner = BACKBONES.get(backbone, {"model_type": backbone, "extra_channels": [8]})
    extra = METHODS if kind == "cam" else {}
    config = MODELS[kind][1](inner, output_stride=8, **extra)
    config.save_pretrained(tmp_path)
    ways = {
        "from_pretrained": type(config).from_pretrained(tmp_path),
        "AutoConfig": AutoConfig.from_pretrained(tmp_path),
        "from_dict": type(config).from_dict(config.to_dict()),
        "JSON file": type(config).from_json_file(tmp_path / "config.json"),
        "copy": copy.deepcopy(config),
    }
    for way, again in ways.items():
        assert type(again) is type(config) and type(again.backbone_config) is type(config.backbone_config), way
        actual, expected = again.to_dict(), config.to_dict()
        for values in (actual, expected):
            values.pop("_name_or_path", None)
            values.pop("transformers_version", None)
        assert actual == expected, way
        for name, value in inner.items():
            assert getattr(again.backbone_config, name) == value, (way, name)
    if backbone == "wsss_vgg16":
        assert isinstance(ways["AutoConfig"].backbone_config, Vgg16Config)
    # A changed nested value is kept, and not shared with the original.
    changed = copy.deepcopy(config)
    changed.backbone_config.note = "mine"
    assert type(config).from_dict(changed.to_dict()).backbone_config.note == "mine"
    assert not hasattr(config.backbone_config, "note")


@pytest.mark.parametrize("kind", MODELS)
def test_attention_can_be_chosen_for_the_backbone(kind, tmp_path):
    model = build(kind, "vit")
    expected = outputs(model).logits
    model.save_pretrained(tmp_path)
    for choice in ("eager", "sdpa"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=choice)
        assert loaded.backbone.body.config._attn_implementation == choice
        torch.testing.assert_close(outputs(loaded).logits, expected, atol=1e-5, rtol=1e-4)


def test_another_number_of_labels_needs_permission_and_a_new_head_only(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, num_labels=7)
    loaded = type(model).from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded.config.num_labels == 7 and len(loaded.config.id2label) == 7
    assert outputs(loaded).logits.shape[1] == 7 and outputs(loaded).logits.isfinite().all()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], value), name


# gradient checkpointing

CHECKPOINTED = BACKBONES | {
    "resnet": BACKBONES["resnet"] | {"depths": [3, 2]},
    "convnext": BACKBONES["convnext"] | {"drop_path_rate": 0.3},
    "vit": BACKBONES["vit"] | {"hidden_dropout_prob": 0.2},
    "vgg": {"model_type": "wsss_vgg16", "widths": [4, 4, 8, 8, 8], "extra_channels": [8]},
    "wide_resnet": {"model_type": "wsss_wide_resnet38", "widths": [4, 4, 8, 8, 8, 8, 16]},
}
ALL_METHODS = {
    "drs": {},
    "icd": {"hidden_channels": 8},
    "plda": {"hidden": [8], "pamr_iterations": 1, "pamr_dilations": [1]},
    "d2cam": {"embedding_channels": 8},
    "seam": {"stages": [-1], "projections": [8], "embedding": 8, "scale": 0.5},
}
TARGETS = {
    "cam": {"tags": torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])},
    "map_refiner": {"targets": torch.linspace(0, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)},
    "segmenter": {"labels": torch.arange(2 * SIZE[0] * SIZE[1]).view(2, *SIZE) % 3},
}


def train_step(model, **targets):
    """Loss, gradients and buffers of one step; the numbers kept for the backward pass; the layers that it ran anew."""
    kept, calls = [], []
    for module in model.backbone.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_: calls.append(None))
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = model(images(), **targets).loss
    numbers, run = sum(kept), len(calls)
    loss.backward()
    state = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | dict(model.named_buffers())
    return {"loss": loss.detach()} | state, numbers, len(calls) - run


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.parametrize(
    "backbone",
    [name if name in ("resnet", "vit") else pytest.param(name, marks=pytest.mark.slow) for name in CHECKPOINTED],
)
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_computes_anew_instead_of_keeping_and_changes_nothing_else(kind, backbone):
    torch.manual_seed(0)
    model_class, config = MODELS[kind]
    plain = model_class(config(CHECKPOINTED[backbone], **(ALL_METHODS if kind == "cam" else {}))).train()
    if kind == "cam":
        plain.progress = 0.5
    checkpointed = copy.deepcopy(plain)
    enable_checkpointing(checkpointed)
    assert checkpointed.backbone.gradient_checkpointing and not plain.backbone.gradient_checkpointing
    again, off = copy.deepcopy(checkpointed), copy.deepcopy(checkpointed)
    (getattr(off, "activation_checkpointing_disable", None) or off.gradient_checkpointing_disable)()

    expected, numbers, anew = train_step(plain, **TARGETS[kind])
    assert anew == 0
    for model in (checkpointed, again):
        actual, fewer, anew = train_step(model, **TARGETS[kind])
        assert_close(actual, expected)
        assert fewer < numbers and anew > 0
    assert train_step(off, **TARGETS[kind])[1:] == (numbers, 0)


def test_checkpointing_leaves_frozen_batch_norms_and_evaluation_alone(resnet_model):
    plain = resnet_model.train()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    checkpointed = copy.deepcopy(plain)
    enable_checkpointing(checkpointed)
    (kind,) = [kind for kind, (model_class, _) in MODELS.items() if model_class is type(plain)]
    assert_close(train_step(checkpointed, **TARGETS[kind])[0], train_step(plain, **TARGETS[kind])[0])
    assert_equal(outputs(checkpointed.eval()), outputs(plain.eval()))


# compilation


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 cannot compile transformers' code around models")
def test_evaluation_compiles_without_a_break_in_the_graph(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled).logits, outputs(model).logits)
