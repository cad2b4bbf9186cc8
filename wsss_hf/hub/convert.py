"""Conversion of published checkpoints: ImageNet VGG-16 and Wide ResNet-38, and those of DRS, ICD, SEAM and PLDA.

A layout is recognised by the names in the file alone; widths, numbers of classes and so on follow from the shapes. The
MXNet files that the programs of SEAM, PLDA (Wide ResNet-38) and ICD (VGG-16) start from, and those that ICD's writes,
are read without MXNet.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.voc import VOC_CLASSES
from ..files import whole_folder
from ..models.configuration_cam import CamConfig
from ..models.drs import DrsConfig
from ..models.icd import IcdConfig
from ..models.image_processing_wsss import WsssImageProcessor
from ..models.modeling_cam import CamClassifier
from ..models.modeling_map_refiner import MapRefiner, MapRefinerConfig
from ..models.pictures import LONGEST
from ..models.plda import PldaConfig
from ..models.seam import SeamConfig
from ..models.vgg import DEPTHS, Vgg16Backbone, Vgg16Config
from ..models.wide_resnet import WideResNet38Backbone, WideResNet38Config
from ..stages.lock import locked, partial_of
from .mxnet_params import ParamsError, read_params

IMAGENET_SIZE, DRS_SIZE, ICD_SIZE, SEAM_SIZE = 224, 320, 321, 448  # short side of the images they were trained at
KINDS = ("classifier", "refiner")
_MODELS: dict[type, type] = {
    model.config_class: model for model in (CamClassifier, MapRefiner, Vgg16Backbone, WideResNet38Backbone)
}

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


def convert_checkpoint(
    file: str | os.PathLike,
    out: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    drs_delta: float | None = None,
    extra_channels: Sequence[int] | None = None,
    kind: str | None = None,
) -> Path:
    """Convert a published checkpoint to a model of this package, with its image processor.

    ImageNet weights become a backbone (ICD's VGG-16 keeps its fc6 and fc7), everything else a [`CamClassifier`] or, on
    request, a [`MapRefiner`]. The configuration names the layout of the file under `converted_from`. `out` appears
    complete or not at all.

    Args:
        file: `.safetensors`; or `.pth`, `.pt` or `.bin` that holds nothing but tensors, numbers and strings; or
            MXNet's `.params`.
        out: the folder to write; must not exist, or be empty.
        class_names: names of the object classes in the order of the file; those of VOC if there are 20.
        drs_delta: the fixed DRS that a classifier's DRS file without controllers was trained with.
        extra_channels: 3×3 convolutions on top of an ImageNet VGG-16, [512, 512, 512] for DRS. They are not in the
            file: they start from random weights whenever the directory is loaded.
        kind: of a DRS file without controllers, which does not tell: "refiner" for the network of DRS's refinement
            learning; "classifier" (default) for one with fixed DRS of `drs_delta`, or without DRS.

    Returns:
        `out`.

    Raises:
        ConvertError: the file can't be read, has another layout, or an option does not apply to it.
        OutputError: another run writes there.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConvertError(f"--to {out}: expected a folder that does not exist yet, got an existing one")
    options = CheckpointOptions(
        None if class_names is None else list(class_names),
        drs_delta,
        None if extra_channels is None else list(extra_channels),
        kind,
    )
    with locked(partial_of(out), "--to"):
        try:
            model, layout, weights = _converted(read_weights(file), options)
        except ConvertError as error:
            raise ConvertError(f"{file}: {error}") from error
        with whole_folder(out) as result:
            model.save_pretrained(result, state_dict=weights)
            processor = WsssImageProcessor(
                size={"shortest_edge": layout.size, "longest_edge": LONGEST * layout.size},
                image_mean=list(layout.image_mean),
                image_std=list(layout.image_std),
            )
            processor.save_pretrained(result)
    return out


def read_weights(file: str | os.PathLike) -> Weights:
    """The tensors of a checkpoint by name, taken from `model` or `state_dict` if nested, without a prefix `module.`.

    No code in a pickle is run: it may contain tensors, numbers and strings only.

    Raises:
        ConvertError: there is no such file, it has another format, or it contains something else.
    """
    path = Path(file)
    if not path.is_file():
        raise ConvertError("no such file")
    if path.suffix == ".safetensors":
        try:
            values: Any = load_file(path)
        except SafetensorError as error:
            raise ConvertError(f"expected a safetensors file, got something else ({error})") from error
    elif path.suffix in (".pth", ".pt", ".bin"):
        values = _unpickled(path)
    elif path.suffix == ".params":
        try:
            values = _renamed_from_mxnet(read_params(path))
        except ParamsError as error:
            raise ConvertError(str(error)) from error
    else:
        raise ConvertError("expected a file .safetensors, .pth, .pt, .bin or .params, got another suffix")
    for key in ("model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise ConvertError(f"expected a dictionary of tensors (a state_dict), got {_kind(values)}")
    return {name.removeprefix("module."): value for name, value in values.items()}


def _kind(values: object) -> str:
    if not isinstance(values, dict):
        return type(values).__name__
    other = next((name for name, value in values.items() if not isinstance(value, Tensor)), None)
    return "an empty one" if not values else f"{type(values[other]).__name__} under {other!r}"


def _unpickled(path: Path) -> Any:
    # The DRS program stores its best score, a NumPy number, beside the weights; NumPy 1 and 2 name it differently.
    number = np.float64(0).__reduce__()[0]
    harmless: list = [(number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*harmless, np.dtype, np.dtypes.Float64DType]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConvertError(
            "expected a pickle of tensors, numbers and strings, got one with other objects, which could run any code"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ConvertError(f"expected a PyTorch file, got something else ({error})") from error


def _converted(weights: Weights, options: CheckpointOptions) -> tuple[PreTrainedModel, Layout, Weights]:
    # num_batches_tracked of batch norms is in newer files only, and nothing depends on it.
    weights = _without_duplicates({n: value for n, value in weights.items() if not n.endswith("num_batches_tracked")})
    layout = _recognised(weights)
    for name, value in vars(options).items():
        if value is not None and name not in layout.options:
            given = " or ".join(layout.options) or "no options"
            raise ConvertError(f"{name}: expected {given} for {layout.name}, got {name}")
    config, weights = layout.build({n: weights[n] for n in layout.required}, options)
    config.converted_from = layout.name
    with torch.device("meta"):  # only names and shapes are needed
        model = _MODELS[type(config)](config)
    return model, layout, _completed(model, weights)


def _completed(model: nn.Module, weights: Weights) -> Weights:
    """The weights of the model that are in the file, their shapes checked, and its counters at zero."""
    completed: Weights = {}
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            completed[name] = torch.zeros_like(value, device="cpu")
        elif name in weights:
            if weights[name].shape != value.shape:
                file_shape = tuple(weights[name].shape)
                raise ConvertError(f"{name}: expected the shape {tuple(value.shape)}, got {file_shape}")
            completed[name] = weights[name].float().contiguous()
    return completed


def _recognised(weights: Weights) -> Layout:
    layouts = _layouts(weights)
    differences = [layout.difference(weights) for layout in layouts]
    sizes = [len(missing) + len(left_over) for missing, left_over in differences]
    nearest = min(range(len(layouts)), key=sizes.__getitem__)
    if sizes[nearest]:
        missing, left_over = differences[nearest]
        raise ConvertError(
            f"expected a known layout, got one nearest to {layouts[nearest].name}, "
            f"with {_listed(missing)} missing and {_listed(left_over)} unexpected"
        )
    return layouts[nearest]


def _listed(names: list[str]) -> str:
    if not names:
        return "no keys"
    more = ", …" if len(names) > 5 else ""
    return f"{len(names)} key{'s' if len(names) > 1 else ''} ({', '.join(names[:5])}{more})"


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


def _renamed_from_mxnet(weights: Weights) -> Weights:
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


def _layouts(weights: Weights) -> list[Layout]:
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


def _without_duplicates(weights: Weights) -> Weights:
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
