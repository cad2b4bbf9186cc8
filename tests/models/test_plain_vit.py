"""Plain vision transformers as backbones: layers as stages, sizes, all methods, saving."""

import json

import pytest
import torch
from transformers import (
    BeitConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    ResNetConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
)

from wsss_hf import CamClassifier, CamConfig
from wsss_hf.models.backbone import Backbone
from wsss_hf.models.modeling_affinity import AffinityConfig, AffinityNetwork

TOKENS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
MLP = {"intermediate_size": 64}
FAMILIES = {
    "vit": lambda: ViTConfig(image_size=32, patch_size=16, **TOKENS, **MLP),
    "deit": lambda: DeiTConfig(image_size=32, patch_size=16, **TOKENS, **MLP),
    "beit": lambda: BeitConfig(
        image_size=32,
        patch_size=16,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=False,
        **TOKENS,
        **MLP,
    ),
    "dinov2": lambda: Dinov2Config(image_size=56, patch_size=14, **TOKENS),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(
        image_size=56, patch_size=14, num_register_tokens=3, **TOKENS
    ),
    "dinov3": lambda: DINOv3ViTConfig(image_size=32, patch_size=16, num_register_tokens=3, **TOKENS, **MLP),
    "clip": lambda: CLIPVisionConfig(image_size=32, patch_size=16, **TOKENS, **MLP),
    "siglip": lambda: SiglipVisionConfig(image_size=32, patch_size=16, **TOKENS, **MLP),
}
SPECIAL_TOKENS = {"vit": 1, "deit": 2, "beit": 1, "dinov2": 1, "dinov2_with_registers": 4, "dinov3": 4, "clip": 1}
METHODS = {
    "attention": {"learn_heads": True},
    "contrast": {"scale": 0.5, "embedding": 8},
    "d2cam": {"embedding_channels": 8},
    "drs": {},
    "icd": {"hidden_channels": 8},
    "plda": {"hidden": [16, 8], "pamr_iterations": 2, "pamr_dilations": [1, 2]},
    "seam": {"projections": [8, 8], "embedding": 16, "scale": 0.5},
    "toco": {},
}
NAMES = {0: "a", 1: "b", 2: "c"}
TAGS = torch.tensor([[1.0, 0, 0], [0, 1, 1]])

family = pytest.mark.parametrize("family", FAMILIES)


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def build(family: str, **options) -> CamClassifier:
    torch.manual_seed(0)
    return CamClassifier(CamConfig(backbone_config=FAMILIES[family](), id2label=NAMES, **options))


def varied(backbone: Backbone) -> Backbone:
    """With position embeddings, scales and biases that are not all alike, as training leaves them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return backbone.eval()


@family
def test_stages_are_the_patch_tokens_after_the_layers_asked_for(family):
    torch.manual_seed(0)
    backbone = varied(Backbone(FAMILIES[family](), layers=[2, -1]))
    patch = backbone.strides[-1]
    assert backbone.channels == [32, 32] and backbone.strides == [patch, patch]
    pixels = images(2 * patch, 3 * patch)
    with torch.no_grad():
        outputs = backbone.body(pixels, output_hidden_states=True, **backbone._options)
        second, last = backbone(pixels)
    assert second.shape == last.shape == (2, 32, 2, 3)
    tokens = outputs.hidden_states[2]
    special = SPECIAL_TOKENS.get(family, 0)
    assert tokens.shape[1] == special + 6
    if getattr(backbone.body.config, "apply_layernorm", False):
        norm = [m for name, m in backbone.body.named_modules() if name in ("norm", "layernorm")]
        tokens = norm[0](tokens)
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(second[:, :, row, column], tokens[:, special + 3 * row + column])
    assert not torch.allclose(second, last)


@family
def test_all_methods_train_every_parameter_on_images_of_any_size(family):
    model = build(family, maps="attention", **METHODS).train()
    model.progress = 0.5
    patch = model.backbone.strides[-1]
    height, width = 6 * patch - 5, 4 * patch + 3
    output = model(images(height, width), tags=TAGS)
    assert output.cams.shape == (2, 3, 6, 4)
    for name in METHODS.keys() - {"drs"}:
        assert any(loss.startswith(name) for loss in output.losses), name
    output.loss.backward()
    assert output.loss.isfinite()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    with torch.no_grad():
        output = model(images(height, width))
    assert output.maps.shape == (2, 3, 6, 4)
    assert model.segmentation_scores(output, (height, width), TAGS).shape == (2, 4, height, width)


@family
def test_a_saved_and_reloaded_model_gives_equal_logits_and_maps(family, tmp_path):
    model = build(family, maps="attention", **METHODS).eval()
    varied(model.backbone)
    model.save_pretrained(tmp_path)
    loaded = CamClassifier.from_pretrained(tmp_path).eval()
    assert loaded.config.backbone_layers == [1, 2, 3, 4]
    assert loaded.config.methods == model.config.methods
    pixels = images(90, 70)
    with torch.no_grad():
        expected, actual = model(pixels), loaded(pixels)
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.maps, expected.maps)


@family
@pytest.mark.parametrize("kind", ["irn", "affinitynet"])
def test_affinities_are_learnt_from_its_layers(family, kind, tmp_path):
    torch.manual_seed(0)
    model = AffinityNetwork(AffinityConfig(backbone_config=FAMILIES[family](), kind=kind, radius=2)).train()
    patch = model.backbone.strides[-1]
    pixels = images(4 * patch, 6 * patch)
    logits = model(pixels).logits
    logits.square().sum().backward()
    assert len(model.branches) == (4 if kind == "irn" else 3)
    trained = [*model.branches.parameters(), *model.head.parameters()]
    assert all(parameter.grad is not None for parameter in trained)
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    model.save_pretrained(tmp_path)
    loaded = AffinityNetwork.from_pretrained(tmp_path)
    assert loaded.config.backbone_layers == [1, 2, 3, 4]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels).logits, model.eval()(pixels).logits)


@family
def test_positions_are_interpolated_for_other_sizes(family):
    """With the same patches everywhere, only their positions can tell tokens apart."""
    if family == "dinov3":
        pytest.skip("its positions are rotations of keys and queries, which change nothing where all tokens are alike")
    torch.manual_seed(0)
    backbone = varied(Backbone(FAMILIES[family]()))
    patch = backbone.strides[-1]
    with torch.no_grad():
        (last,) = backbone(torch.ones(1, 3, 3 * patch, 5 * patch))
    tokens = last[0].flatten(1)
    assert torch.cdist(tokens.T, tokens.T).add(torch.eye(15)).min() > 1e-4


def test_the_map_covers_an_image_whose_size_is_no_multiple_of_the_patch():
    """The network itself would leave out the last 13 rows and 7 columns."""
    torch.manual_seed(0)
    backbone = Backbone(FAMILIES["vit"]()).eval()
    pixels = images(5 * 16 + 13, 3 * 16 + 7).requires_grad_()
    (last,) = backbone(pixels)
    assert last.shape[-2:] == (6, 3)
    last.square().sum().backward()
    seen = pixels.grad.abs().sum(dim=(0, 1))
    assert (seen[-8:].sum(dim=1) > 0).any() and (seen[:, -4:].sum(dim=0) > 0).any()
    assert Backbone(FAMILIES["vit"]()).eval()(images(5, 40))[0].shape[-2:] == (1, 2)


@pytest.mark.parametrize(("depth", "layers"), [(1, [1]), (2, [1, 2]), (6, [2, 3, 5, 6]), (12, [3, 6, 9, 12])])
def test_by_default_four_layers_evenly_spaced_are_stages(depth, layers):
    config = ViTConfig(
        image_size=32, hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=depth
    )
    assert Backbone(config, layers=None).plain_vit.layers == layers
    assert CamClassifier(CamConfig(backbone_config=config)).config.backbone_layers == layers


def test_a_stage_before_the_last_layer_freezes_what_comes_after_it():
    backbone = Backbone(FAMILIES["vit"](), layers=[1, 3])
    *_, before_last, last = (module for name, module in backbone.body.named_modules() if name.endswith("attention"))
    assert all(parameter.requires_grad for parameter in before_last.parameters())
    assert not any(parameter.requires_grad for parameter in last.parameters())
    backbone(images(32, 32))[-1].square().sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        ("vit", [1, 5], r"backbone_layers: expected layers of this backbone \(1 to 4, or -4 to -1\), got 5"),
        ("vit", [-5], r"backbone_layers: expected layers of this backbone \(1 to 4, or -4 to -1\), got -5"),
        ("vit", [0], r"backbone_layers: expected layers of this backbone \(1 to 4, or -4 to -1\), got 0"),
        ("resnet", [1], r"backbone_layers: expected none for the backbone 'resnet', got \[1\]"),
    ],
)
def test_layers_that_are_not_there_are_refused(config, layers, message):
    backbone = (
        ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8) if config == "resnet" else FAMILIES[config]()
    )
    with pytest.raises(ValueError, match=message):
        CamClassifier(CamConfig(backbone_config=backbone, backbone_layers=layers))


def test_one_stage_is_too_few_for_methods_that_read_two():
    for method, option in (("seam", "stages"), ("toco", "stage")):
        with pytest.raises(
            ValueError, match=rf"{method}.{option}: expected stages of this backbone \(-1 to 0\), got -2"
        ):
            build("vit", backbone_layers=[-1], **{method: METHODS[method]})


def test_a_model_saved_before_there_was_a_choice_has_its_one_stage(tmp_path):
    model = build("dinov2", backbone_layers=[], d2cam=METHODS["d2cam"]).eval()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("backbone_layers") == []
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = CamClassifier.from_pretrained(tmp_path).eval()
    assert loaded.backbone.channels == [32]
    pixels = images(56, 56)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_a_configuration_saved_without_a_model_keeps_the_default_layers(tmp_path):
    CamConfig(backbone_config=FAMILIES["vit"]()).save_pretrained(tmp_path)
    assert CamClassifier(CamConfig.from_pretrained(tmp_path)).backbone.channels == [32] * 4


@pytest.mark.parametrize(("model_class", "config_class"), [(CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)])
def test_of_a_model_of_images_and_texts_the_vision_tower_is_the_backbone(model_class, config_class, tmp_path):
    text = {**TOKENS, **MLP, "num_hidden_layers": 1, "vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"image_size": 32, "patch_size": 16, **TOKENS, **MLP}
    published = model_class(config_class(text_config=text, vision_config=vision))
    published.save_pretrained(tmp_path)
    model = CamClassifier.from_backbone(str(tmp_path), id2label=NAMES, seam=METHODS["seam"])
    expected = published.vision_model.state_dict()
    found = model.backbone.body.state_dict()
    assert found and all(torch.equal(value, expected[name]) for name, value in found.items())
