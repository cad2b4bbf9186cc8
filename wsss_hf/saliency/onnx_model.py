"""Saliency by a network in an ONNX file, of the kind of U²-Net, IS-Net or BiRefNet: one image in, one map out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import ModelFiles
from .networks import NetworkSettings, NetworkSource, input_format
from .source import SaliencyError

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxSource(NetworkSource):
    """A network in an ONNX file.

    Args:
        files: where it is.

    Raises:
        SaliencyError: onnxruntime is not installed, or the file holds no network, or one of another kind: with two
            inputs, with an input that is no batch of RGB images, or without an output that is one map.
    """

    def __init__(self, files: ModelFiles, settings: NetworkSettings):
        assert files.onnx is not None
        self.name, self.settings = files.name, settings
        self.files = [files.onnx, *files.onnx_weights]
        self._session = _open_session(files.onnx)
        self._input = self._only_input()
        shape = [side if isinstance(side, int) and side > 0 else None for side in self._input.shape]
        self._channels_last = shape[1] != 3 and shape[3] == 3
        channels, *sides = (shape[3], shape[1], shape[2]) if self._channels_last else (shape[1], shape[2], shape[3])
        if channels not in (3, None):
            raise SaliencyError(f"{self.name}: expected an input of 3 channels, got one of shape {self._input.shape}")
        self._batch = shape[0]
        side = (sides[0], sides[1]) if sides[0] and sides[1] else None
        self.format = input_format(self.name, settings, files.processor, side)
        self._output, self._read = self._find_output()
        self.content = [dataclasses.asdict(self.format)]

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        size = self._batch or len(inputs)
        found = []
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            missing = np.zeros((size - len(part), *part.shape[1:]), part.dtype)  # a fixed batch is filled up
            maps = self._read(self._run(np.concatenate([part, missing]), [self._output])[0])
            if len(maps) != size:
                raise SaliencyError(f"batch_size: expected 1, as {self.name} takes single images, got {size}")
            found.append(maps[: len(part)])
        return np.concatenate(found).astype(np.float32)

    def _only_input(self) -> Any:
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(one.name for one in inputs)
            raise SaliencyError(f"{self.name}: expected a network with one input, got {len(inputs)}: {names}")
        if len(inputs[0].shape) != 4 or inputs[0].type not in _FLOATS:
            raise SaliencyError(
                f"{self.name}: expected an input of floats (B, 3, H, W) or (B, H, W, 3), "
                f"got {inputs[0].type} {tuple(inputs[0].shape)}"
            )
        return inputs[0]

    def _run(self, inputs: np.ndarray, names: list[str] | None) -> list[np.ndarray]:
        values = inputs.astype(_FLOATS[self._input.type])
        if self._channels_last:
            values = values.transpose(0, 2, 3, 1)
        try:
            return self._session.run(names, {self._input.name: np.ascontiguousarray(values)})
        except Exception as error:  # onnxruntime's own kinds derive from nothing else
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SaliencyError(f"{self.name}: expected a network that takes {values.shape}, got: {reason}") from error

    def _find_output(self) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
        """The name of the output that is the map, and the function that makes (B, h, w) of it."""
        probe = np.zeros((self._batch or 1, 3, *self.format.size), np.float32)
        names = [output.name for output in self._session.get_outputs()]
        values = self._run(probe, names)
        shapes = ", ".join(f"{name} {np.shape(value)}" for name, value in zip(names, values, strict=True))
        chosen, axis = self.settings.output, 3 if self._channels_last else 1
        if chosen is not None and chosen >= len(names):
            raise SaliencyError(
                f"output: expected a number from 0 of the outputs of {self.name} ({shapes}), got {chosen}"
            )
        fit = [
            (np.shape(read(value)[0]) == self.format.size, name, read)
            for number, (name, value) in enumerate(zip(names, values, strict=True))
            if chosen in (None, number) and (read := _reader(np.shape(value), len(probe), axis)) is not None
        ]
        if not fit:
            raise SaliencyError(
                f"{self.name}: expected an output that is one map, (B, 1, h, w) or (B, h, w), got {shapes}"
            )
        _, name, read = next((one for one in fit if one[0]), fit[0])
        return name, read


def _reader(shape: tuple[int, ...], batch: int, axis: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """The function that makes maps (B, h, w) of an output of this shape; None where it is no map.

    Args:
        axis: of the channels.
    """
    if len(shape) not in (3, 4) or shape[0] != batch:
        return None
    if len(shape) == 4 and shape[axis] != 1:
        return None
    sides = shape[1:] if len(shape) == 3 else [side for number, side in enumerate(shape) if number not in (0, axis)]
    if min(sides) < 2:
        return None
    return np.asarray if len(shape) == 3 else partial(np.squeeze, axis=axis)


def _open_session(file: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise SaliencyError(f'{file}: reading ONNX needs {error.name}: pip install "wsss_hf[onnx]"') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # which a launcher of several processes has set
    options.log_severity_level = 3
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # onnxruntime's own kinds derive from nothing else
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SaliencyError(f"{file}: expected an ONNX network, got another file ({reason})") from error
