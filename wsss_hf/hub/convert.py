"""Conversion of published checkpoints: ImageNet VGG-16 and Wide ResNet-38, and those of DRS, ICD, SEAM and PLDA.

A layout is recognised by the names in the file alone; widths, numbers of classes and so on follow from the shapes. The
MXNet files that the programs of SEAM, PLDA (Wide ResNet-38) and ICD (VGG-16) start from, and those that ICD's writes,
are read without MXNet.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files import whole_folder
from ..models.image_processing_wsss import WsssImageProcessor
from ..models.modeling_cam import CamClassifier
from ..models.modeling_map_refiner import MapRefiner
from ..models.pictures import LONGEST
from ..models.vgg import Vgg16Backbone
from ..models.wide_resnet import WideResNet38Backbone
from ..stages.lock import locked, partial_of
from .layouts import (
    CheckpointOptions,
    ConvertError,
    Layout,
    Weights,
    layouts_for,
    renamed_from_mxnet,
    without_duplicates,
)
from .mxnet_params import ParamsError, read_params

_MODELS: dict[type, type] = {
    model.config_class: model for model in (CamClassifier, MapRefiner, Vgg16Backbone, WideResNet38Backbone)
}


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
            values = renamed_from_mxnet(read_params(path))
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
    weights = without_duplicates({n: value for n, value in weights.items() if not n.endswith("num_batches_tracked")})
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
    layouts = layouts_for(weights)
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
