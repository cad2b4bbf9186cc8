"""Layouts of published checkpoints: names of their weights, and what models of this package they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.voc import VOC_CLASSES
from ..models.configuration_cam import CamConfig
from ..models.drs import DrsConfig
from ..models.icd import IcdConfig
from ..models.modeling_map_refiner import MapRefinerConfig
from ..models.plda import PldaConfig
from ..models.seam import SeamConfig
from ..models.vgg import DEPTHS, Vgg16Config
from ..models.wide_resnet import WideResNet38Backbone, WideResNet38Config

KINDS = ("classifier", "refiner")
IMAGENET_SIZE, DRS_SIZE, ICD_SIZE, SEAM_SIZE = 224, 320, 321, 448  # short side of the images they were trained at
Weights = dict[str, Tensor]


class ConvertError(ValueError):
    """A checkpoint that can't be converted; the message names the file and what was expected."""


@dataclass(frozen=True)
class CheckpointOptions:
    """Facts about a checkpoint that are not in the file, as the caller gives them; None is not given."""

    class_names: list[str] | None = None
    drs_delta: float | None = None
    extra_channels: list[int] | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Layout:
    """One kind of checkpoint.

    Attributes:
        name: in messages and in the converted configuration.
        size: short side of an image for the image processor.
        required: the names of its weights.
        build: (weights, options) → configuration, and the weights with the names of the model here.
        options: the fields of [`CheckpointOptions`] that apply to it.
        ignored: prefixes of names that may occur and are left out.
        image_mean, image_std: per channel, of the images in [0, 1] that it was trained on.
    """

    name: str
    size: int
    required: frozenset[str]
    build: Callable[[Weights, CheckpointOptions], tuple[PreTrainedConfig, Weights]]
    options: tuple[str, ...] = ("class_names",)
    ignored: tuple[str, ...] = ()
    image_mean: Sequence[float] = tuple(IMAGENET_DEFAULT_MEAN)
    image_std: Sequence[float] = tuple(IMAGENET_DEFAULT_STD)

    def difference(self, weights: Weights) -> tuple[list[str], list[str]]:
        """Names that are missing, and names that are unexpected."""
        missing = [name for name in sorted(self.required) if name not in weights]
        return missing, [n for n in weights if n not in self.required and not n.startswith(self.ignored)]


# Names of the layouts' weights


def _vgg_positions() -> dict[str, int]:
    """DRS's name of a convolution → its index in torchvision's `features`: "layer1_conv2" is 2."""
    positions: dict[str, int] = {}
    position = 0
    for block, depth in enumerate(DEPTHS, start=1):
        for place in range(1, depth + 1):
            positions[f"layer{block}_conv{place}"] = position
            position += 2
        position += 1
    return positions


_VGG_POSITIONS = _vgg_positions()
_VGG = [f"features.{n}.{kind}" for n in _VGG_POSITIONS.values() for kind in ("weight", "bias")]
_DRS = (
    {name: f"backbone.body.{name}" for name in _VGG}
    | {
        f"extra_conv{k}.{kind}": f"backbone.body.extra.{2 * k - 2}.{kind}"
        for k in (1, 2, 3)
        for kind in ("weight", "bias")
    }
    | {f"extra_conv4.{kind}": f"classifier.{kind}" for kind in ("weight", "bias")}
)
_ICD_HIDDEN = {f"{layer}.{kind}": f"hidden.{layer}.{kind}" for layer in ("fc6", "fc7") for kind in ("weight", "bias")}
_ICD = {
    "fc8.weight": "classifier.weight",
    "fc8.bias": "classifier.bias",
    "icd_bu.weight": "methods.icd.directions",
    "icd_accum_resign.running_mean": "methods.icd.running_means",
    "conv_ft.weight": "methods.icd.top_down.classifier.weight",
    **{f"feat_bn.{kind}": f"methods.icd.norm.{kind}" for kind in ("bias", "running_mean", "running_var")},
    **{f"fc6_ft.{kind}": f"methods.icd.top_down.context.{kind}" for kind in ("weight", "bias")},
    **{f"fc7_ft.{kind}": f"methods.icd.top_down.mix.{kind}" for kind in ("weight", "bias")},
}
_ICD_MEAN, _ICD_STD = (127 / 255,) * 3, (1 / 255,) * 3  # the program subtracts 127 from the levels
_CONTROLLERS = {
    f"{name.replace('conv', 'relu')}.fc.0.weight": f"methods.drs.layers.features/{n + 1}.fc.weight"
    for name, n in _VGG_POSITIONS.items()
} | {f"extra_relu{k}.fc.0.weight": f"methods.drs.layers.extra/{2 * k - 1}.fc.weight" for k in (1, 2, 3)}
_SEAM = {
    "fc8.weight": "classifier.weight",
    "f8_3.weight": "methods.seam.projections.0.weight",
    "f8_4.weight": "methods.seam.projections.1.weight",
    "f9.weight": "methods.seam.embedding.weight",
}
_DISCRIMINATOR = {
    f"discriminator.d_conv{k}.{kind}": f"methods.plda.domain_classifier.layers.{3 * k - 3}.{kind}"
    for k in (1, 2)
    for kind in ("weight", "bias")
}


_MXNET_KINDS = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
_MXNET_BLOCK = re.compile(r"(res|bn)(\d)(?:a|b(\d+))_(branch\w+)")


def renamed_from_mxnet(weights: Weights) -> Weights:
    """Weights of Wide ResNet-38 and VGG-16 under the names that PyTorch's files have; others as MXNet names them.

    "bn4b2_branch2a_moving_var" is "b4_2.bn_branch2a.running_var", "conv1_2_bias" is "features.2.bias".
    """
    renamed: Weights = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition("_")
        if layer.endswith("_moving"):
            layer, kind = layer.removesuffix("_moving"), f"moving_{kind}"
        if block := _MXNET_BLOCK.fullmatch(layer):
            unit, group, index, branch = block.groups()
            place = f"b{group}_{index}" if index else f"b{group}"
            layer = f"{place}.{'conv' if unit == 'res' else 'bn'}_{branch}"
        elif (vgg := f"layer{layer.removeprefix('conv').replace('_', '_conv')}") in _VGG_POSITIONS:
            layer = f"features.{_VGG_POSITIONS[vgg]}"
        renamed[f"{layer}.{_MXNET_KINDS.get(kind, kind)}" if layer else name] = value
    return renamed


def _wide_resnet_names() -> list[str]:
    with torch.device("meta"):
        names = WideResNet38Backbone(WideResNet38Config()).state_dict()
    return [name for name in names if not name.endswith("num_batches_tracked")]


def layouts_for(weights: Weights) -> list[Layout]:
    """All layouts, with as many classes as these weights have."""
    wide = _wide_resnet_names()
    heads = {f"head_list.{c}.{kind}" for c in range(_num_heads(weights)) for kind in ("weight", "bias")}
    drs = {n for n in _DRS if n != "extra_conv4.bias" or n in weights}
    return [
        Layout(
            "an ImageNet VGG-16",
            IMAGENET_SIZE,
            frozenset(_VGG),
            _vgg_backbone,
            options=("extra_channels",),
            ignored=("classifier.", "pre_logits.", "head."),
        ),
        Layout(
            "an ImageNet VGG-16 of ICD",
            IMAGENET_SIZE,
            frozenset([*_VGG, *_ICD_HIDDEN]),
            _icd_vgg_backbone,
            options=(),
            ignored=("fc8.",),
            image_mean=_ICD_MEAN,
            image_std=_ICD_STD,
        ),
        Layout(
            "ICD",
            ICD_SIZE,
            frozenset([*_VGG, *_ICD_HIDDEN, *_ICD]),
            _icd_classifier,
            ignored=("feat_bn.weight",),  # fixed to 1
            image_mean=_ICD_MEAN,
            image_std=_ICD_STD,
        ),
        Layout("a DRS classifier", DRS_SIZE, frozenset(drs | set(_CONTROLLERS)), _drs_classifier),
        Layout(
            "a DRS network without controllers, a refiner or a classifier with fixed DRS",
            DRS_SIZE,
            frozenset(drs),
            _drs_without_controllers,
            options=("class_names", "drs_delta", "kind"),
        ),
        Layout(
            "an ImageNet Wide ResNet-38",
            IMAGENET_SIZE,
            frozenset(wide),
            _wide_resnet_backbone,
            options=(),
            ignored=("linear1000.",),
        ),
        Layout("SEAM", SEAM_SIZE, frozenset([*wide, *_SEAM]), _seam_classifier),
        Layout(
            "PLDA",
            SEAM_SIZE,
            frozenset([*wide, *_SEAM, *_DISCRIMINATOR, *heads]),
            _seam_classifier,
            ignored=("PAMR.",),  # constants: which neighbours a pixel is compared with
        ),
    ]


def _num_heads(weights: Weights) -> int:
    found = {name.split(".")[1] for name in weights if name.startswith("head_list.")}
    return len(found) or len(VOC_CLASSES)


def without_duplicates(weights: Weights) -> Weights:
    """DRS files contain each convolution of VGG-16 twice, as `features.0` and as `layer1_conv1`; keep the first."""
    single: Weights = {}
    for name, value in weights.items():
        layer, _, kind = name.partition(".")
        single_name = f"features.{_VGG_POSITIONS[layer]}.{kind}" if layer in _VGG_POSITIONS else name
        if not torch.equal(single.setdefault(single_name, value), value):
            raise ConvertError(f"{name}: expected the values of {single_name}, its other name, got others")
    return single


# From each layout to a configuration and renamed weights


def _vgg_backbone(weights: Weights, options: CheckpointOptions) -> tuple[PreTrainedConfig, Weights]:
    return _vgg_config(weights, options.extra_channels or []), weights


def _icd_vgg_backbone(weights: Weights, options: CheckpointOptions) -> tuple[PreTrainedConfig, Weights]:
    if weights["fc6.weight"].ndim != 4:
        shape = tuple(weights["fc6.weight"].shape)
        raise ConvertError(f"fc6.weight: expected the 3×3 convolution of ICD's VGG-16, got the shape {shape}")
    hidden = [len(weights[f"{layer}.weight"]) for layer in ("fc6", "fc7")]
    config = _vgg_config(weights, [], hidden_channels=hidden, pooling=3)
    return config, {_ICD_HIDDEN.get(name, name): value for name, value in weights.items()}


def _icd_classifier(weights: Weights, options: CheckpointOptions) -> tuple[PreTrainedConfig, Weights]:
    backbone_config, body = _icd_vgg_backbone(weights, options)
    names = _class_names(len(weights["fc8.weight"]), options.class_names)
    config = CamConfig(
        backbone_config=backbone_config,
        classifier_bias=True,
        icd=IcdConfig(
            hidden_channels=len(weights["fc6_ft.weight"]), stage=4, hidden_from=["hidden.fc6", "hidden.fc7"]
        ),
        maps="icd",
        background_threshold=0.5,  # of a probability
        id2label=dict(enumerate(names)),
        image_mean=list(_ICD_MEAN),
        image_std=list(_ICD_STD),
    )
    return config, {_ICD.get(name, f"backbone.body.{name}"): value for name, value in body.items()}


def _vgg_config(weights: Weights, extra_channels: list[int], **options: Any) -> Vgg16Config:
    for width in extra_channels:
        if not 1 <= width <= 8192:
            raise ConvertError(f"extra_channels: expected 1 to 8192 channels, got {width}")
    widths = [len(weights[f"features.{_VGG_POSITIONS[f'layer{block}_conv1']}.weight"]) for block in range(1, 6)]
    return Vgg16Config(widths=widths, extra_channels=extra_channels, **options)


def _drs_classifier(weights: Weights, options: CheckpointOptions) -> tuple[PreTrainedConfig, Weights]:
    return _drs_network(CamConfig, weights, options, drs=DrsConfig(mode="learnable"))


def _drs_without_controllers(weights: Weights, options: CheckpointOptions) -> tuple[PreTrainedConfig, Weights]:
    if options.kind not in (None, *KINDS):
        raise ConvertError(f"kind: expected {' or '.join(KINDS)}, got {options.kind!r}")
    if options.kind == "refiner":
        if options.drs_delta is not None:
            raise ConvertError(
                f"drs_delta: expected none for a refiner, got {options.drs_delta} (or use a classifier)"
            )
        return _drs_network(MapRefinerConfig, weights, options)
    drs = None if options.drs_delta is None else DrsConfig(mode="fixed", delta=options.drs_delta)
    return _drs_network(CamConfig, weights, options, drs=drs)


def _drs_network(
    config_class: type[CamConfig], weights: Weights, options: CheckpointOptions, **methods
) -> tuple[PreTrainedConfig, Weights]:
    names = _class_names(len(weights["extra_conv4.weight"]), options.class_names)
    config = config_class(
        backbone_config=_vgg_config(weights, [len(weights[f"extra_conv{k}.weight"]) for k in (1, 2, 3)]),
        classifier_bias="extra_conv4.bias" in weights,
        id2label=dict(enumerate(names)),
        **methods,
    )
    return config, {(_DRS | _CONTROLLERS)[name]: value for name, value in weights.items()}


def _wide_resnet_backbone(weights: Weights, options: CheckpointOptions) -> tuple[PreTrainedConfig, Weights]:
    return _wide_resnet_config(weights), weights


def _wide_resnet_config(weights: Weights) -> WideResNet38Config:
    last = [f"b{group}.conv_branch2b{2 if group > 5 else 1}" for group in range(2, 8)]
    return WideResNet38Config(widths=[len(weights[f"{name}.weight"]) for name in ("conv1a", *last)])


def _seam_classifier(weights: Weights, options: CheckpointOptions) -> tuple[PreTrainedConfig, Weights]:
    weights = dict(weights)
    rows = len(weights["fc8.weight"])
    heads = [name for name in weights if name.startswith("head_list.")]
    num_classes = len(heads) // 2 or len(options.class_names or VOC_CLASSES)
    if rows not in (num_classes, num_classes + 1):
        got = len(options.class_names) if options.class_names else "none (VOC has 20)"
        raise ConvertError(f"class_names: expected {rows - 1} (fc8 has {rows} rows, one of background), got {got}")
    if rows == num_classes + 1:
        # PCM makes its background from the objects; the first row, trained as a class of its own, is never read.
        weights["fc8.weight"] = weights["fc8.weight"][1:]
    names = _class_names(len(weights["fc8.weight"]), options.class_names)
    plda = None
    if heads:
        plda = PldaConfig(maps="seam", hidden=[len(weights[f"discriminator.d_conv{k}.weight"]) for k in (1, 2)])
        for kind in ("weight", "bias"):
            stacked = torch.cat([weights.pop(f"head_list.{c}.{kind}") for c in range(num_classes)])
            weights[f"methods.plda.domain_classifier.heads.{kind}"] = stacked
    config = CamConfig(
        backbone_config=_wide_resnet_config(weights),
        seam=SeamConfig(
            stages=[-3, -2],
            projections=[len(weights["f8_3.weight"]), len(weights["f8_4.weight"])],
            embedding=len(weights["f9.weight"]),
        ),
        plda=plda,
        dropout=0.5,
        maps="seam",
        id2label=dict(enumerate(names)),
    )
    renamed = _SEAM | _DISCRIMINATOR
    body = set(_wide_resnet_names())
    return config, {renamed.get(n, f"backbone.body.{n}" if n in body else n): value for n, value in weights.items()}


def _class_names(count: int, given: list[str] | None) -> list[str]:
    names = list(VOC_CLASSES) if given is None else given
    if len(names) != count:
        found = "none (VOC has 20)" if given is None else len(names)
        raise ConvertError(f"class_names: expected {count}, the classes of the file, got {found}")
    return names
