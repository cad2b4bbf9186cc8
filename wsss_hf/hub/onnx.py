"""Our models as ONNX files, for everything that is no Python."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AutoImageProcessor, PreTrainedModel

from ..files import whole_folder
from ..models.backbone import pinned
from ..models.mask_classifiers import load_segmentation_model, square_side

ONNX_FILE, INT8_FILE = "model.onnx", "model_int8.onnx"
_SMALLEST_SIDE, _LARGEST_SIDE, _LARGEST_BATCH = 64, 4096, 1024


class ExportError(ValueError):
    """A model that can't be exported, or a place where it can't go; the message says what would be right."""


class _Tensors(nn.Module):
    """A model whose outputs are plain tensors."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values)
        return tuple(outputs[name] for name in _output_names(outputs))


def _output_names(outputs) -> list[str]:
    return ["logits", "maps"] if "maps" in outputs else ["logits"]


def export_program(model: PreTrainedModel, size: int | None = None) -> tuple[ExportedProgram, list[str]]:
    """`torch.export` of a model in evaluation, for any number of images.

    Args:
        size: side of the square images that the program takes; None takes any from 64 to 4096 pixels.

    Returns:
        the program (B, 3, H, W) → its outputs; and their names, `logits` and, of a classifier, `maps`.

    Raises:
        ExportError: the network can't be exported, or not with open sizes.
    """
    if square_side(model):  # EoMT: values in its checkpoint decide what is computed
        raise ExportError(
            f"{model.config.model_type}: this network can't be exported; a semantic segmentation model, for example "
            "DeepLab or SegFormer, would be right"
        )
    model = model.eval()
    height, width = (96, 160) if size is None else (size, size)
    example = torch.zeros(2, 3, height, width, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        names = _output_names(model(example))
    open_sizes = {0: Dim("batch", min=1, max=_LARGEST_BATCH)}
    if size is None:
        for axis, side in ((2, "height"), (3, "width")):
            open_sizes[axis] = Dim(side, min=_SMALLEST_SIDE, max=_LARGEST_SIDE)
    try:
        program = torch.export.export(_Tensors(model), (example,), dynamic_shapes={"pixel_values": open_sizes})
    except torch._dynamo.exc.UserError as error:
        backbone = getattr(model.config, "backbone_config", model.config).model_type
        raise ExportError(
            f"{backbone}: this network can't be exported for images of any size; --size 224 would be right, for "
            "squares of 224 pixels"
        ) from error
    return program, names


def export_onnx(
    source: str | os.PathLike, out: str | os.PathLike, size: int | None = None, int8: bool = False, **hub_kwargs
) -> Path:
    """Write a model as ONNX, with its configuration and image processor beside it.

    `config.json` says under `onnx` what has to be known: `inputs`, `outputs`, and the `size` of its images or null.
    Either `out` is whole in the end, or it is not there.

    Args:
        source: a model's folder or Hub id.
        out: the folder to write; must not hold anything.
        size: side of the square images that it takes; None takes any.
        int8: also write the model with its weights as 8-bit integers (dynamic quantisation).
        hub_kwargs: `revision`, `token`, `cache_dir`.

    Raises:
        ExportError: the model can't be exported, `out` holds something, or the libraries are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ExportError(f'{error.name} is not installed; `pip install ".[onnx]"` would be right') from error
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"--to {out}: it exists already; take another folder")
    source, hub_kwargs = pinned(source, hub_kwargs)
    model = load_segmentation_model(source, **hub_kwargs).float()
    program, names = export_program(model, size)
    with whole_folder(out) as result:
        model.config.save_pretrained(result)
        AutoImageProcessor.from_pretrained(source, **hub_kwargs).save_pretrained(result)
        config = json.loads((result / "config.json").read_text())
        config["onnx"] = {"inputs": ["pixel_values"], "outputs": names, "size": size}
        (result / "config.json").write_text(json.dumps(config, indent=2))
        exported = torch.onnx.export(
            program, dynamo=True, input_names=["pixel_values"], output_names=names, verbose=False
        )
        exported.save(result / ONNX_FILE)
        if int8:
            quantize_dynamic(result / ONNX_FILE, result / INT8_FILE, weight_type=QuantType.QUInt8)
    return out
