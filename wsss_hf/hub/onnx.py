"""Export of trained models to ONNX."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AutoImageProcessor, PreTrainedModel

from ..files import whole_folder
from ..inference.weights import check_weights
from ..models.mask_classifiers import load_segmentation_model, square_side
from ..models.pretrained import NO_CODE, pinned
from ..stages.lock import locked, partial_of

ONNX_FILE, INT8_FILE = "model.onnx", "model_int8.onnx"
_SMALLEST_SIDE, _LARGEST_SIDE, _LARGEST_BATCH = 64, 4096, 1024


class ExportError(ValueError):
    """A model that can't be exported, or an output path that can't be used; the message says what was expected."""


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
    """`torch.export` of a model in eval mode, for any number of images.

    Args:
        size: side of the square images that the program takes, at most 4096; None takes any from 64 to 4096 pixels.

    Returns:
        the program (B, 3, H, W) → its outputs; and their names, `logits` and, of a classifier, `maps`.

    Raises:
        ExportError: the network can't be exported, or only for one size.
    """
    if square_side(model):  # EoMT: values in its checkpoint decide what is computed
        raise ExportError(
            f"model: expected one that can be exported, like DeepLab or SegFormer, got {model.config.model_type}"
        )
    if size is not None and not 1 <= size <= _LARGEST_SIDE:
        raise ExportError(f"size: expected 1 to {_LARGEST_SIDE} pixels, got {size}")
    model = model.eval()
    height, width = (96, 160) if size is None else (size, size)
    example = torch.zeros(2, 3, height, width, device=model.device, dtype=model.dtype)
    try:
        with torch.no_grad():
            names = _output_names(model(example))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"size: expected one that the network takes, got {height}x{width} ({reason})") from error
    dynamic_sizes = {0: Dim("batch", min=1, max=_LARGEST_BATCH)}
    if size is None:
        for axis, side in ((2, "height"), (3, "width")):
            dynamic_sizes[axis] = Dim(side, min=_SMALLEST_SIDE, max=_LARGEST_SIDE)
    try:
        program = torch.export.export(
            _Tensors(model), (example,), dynamic_shapes={"pixel_values": dynamic_sizes}, strict=False
        )
    except torch._dynamo.exc.UserError as error:
        backbone = getattr(model.config, "backbone_config", model.config).model_type
        raise ExportError(
            f"size: expected a number like 224 (--size 224, for squares of 224 pixels), got none; {backbone} can't be "
            "exported for images of any size"
        ) from error
    return program, names


def export_onnx(
    source: str | os.PathLike, out: str | os.PathLike, size: int | None = None, int8: bool = False
) -> Path:
    """Write a model as ONNX, with its configuration and image processor beside it.

    `config.json` has a section `onnx`: the names of `inputs` and `outputs`, and the `size` of its images or null.
    `out` appears complete or not at all.

    Args:
        source: a model's folder or Hub id, also owner/name@revision.
        out: the folder to write; must not exist, or be empty.
        size: side of the square images that it takes; None takes any.
        int8: also write the model with its weights as 8-bit integers (dynamic quantisation).

    Raises:
        ExportError: the model can't be exported, `out` is not empty, or a library is missing or too old.
        OSError, ValueError: there is no such model, it has no image processor, or its training has diverged.
        OutputError: another run writes there.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ExportError(f'ONNX export needs {error.name}: pip install "wsss_hf[onnx]"') from error
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"--to {out}: expected a folder that does not exist yet, got an existing one")
    with locked(partial_of(out), "--to"):
        name, revision = pinned(source, NO_CODE)
        assert name is not None  # as `source` is not
        model = load_segmentation_model(name, **revision).float()
        check_weights(model, source)
        processor = AutoImageProcessor.from_pretrained(name, **revision)
        if torch.__version__ < "2.7":  # its exporter fails on these networks
            raise ExportError(f"ONNX export: expected torch > 2.6, got {torch.__version__}")
        program, names = export_program(model, size)
        with whole_folder(out) as result:
            model.config.save_pretrained(result)
            processor.save_pretrained(result)
            config = json.loads((result / "config.json").read_text())
            config["onnx"] = {"inputs": ["pixel_values"], "outputs": names, "size": size}
            (result / "config.json").write_text(json.dumps(config, indent=2))
            exported = torch.onnx.export(
                program, dynamo=True, input_names=["pixel_values"], output_names=names, verbose=False
            )
            assert exported is not None  # None only where torch writes the file itself
            exported.save(result / ONNX_FILE)
            if int8:
                quantize_dynamic(result / ONNX_FILE, result / INT8_FILE, weight_type=QuantType.QUInt8)
    return out
