"""Saliency by a model of transformers that gives a foreground map or an alpha."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageSegmentation, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING

from ..models.pretrained import pinned
from ..models.weights import from_safetensors
from .files import ModelFiles
from .networks import NetworkSettings, NetworkSource, input_format
from .source import SaliencyError

# In this order: what a repository's own code offers.
_AUTO_CLASSES = (AutoModelForImageSegmentation, AutoModelForSemanticSegmentation, AutoModel)


class TransformersSource(NetworkSource):
    """A model of transformers, or one that brings its own code.

    Args:
        files: its name and image processor.
        trust_remote_code: run the code that its repository brings.

    Raises:
        SaliencyError: it brings its own code, which may not run, or is of a kind that gives no foreground map.
    """

    def __init__(self, files: ModelFiles, settings: NetworkSettings, trust_remote_code: bool = False):
        self.name, self.settings, self._trust = files.name, settings, trust_remote_code
        if settings.file is not None:
            raise SaliencyError(f"file: expected a model with ONNX files, got {self.name}, which has none")
        self._repository, self._revision = pinned(files.name, {})
        self._config = self._read_config()
        self._auto_class = self._find_class()
        if self._auto_class is AutoModelForSemanticSegmentation and not self._trust:
            self.logits = self._config.num_labels == 1  # of two, `foreground` gives the probability
        side = getattr(self._config, "image_size", None)
        default = (side, side) if isinstance(side, int) else None
        self.format = input_format(self.name, settings, files.processor, default=default)
        code = sorted(Path(files.name).glob("*.py")) if trust_remote_code else []  # on the Hub its commit counts
        self.content = [dataclasses.asdict(self.format), [file.read_text() for file in code]]

    def _read_config(self):
        try:
            return AutoConfig.from_pretrained(self._repository, trust_remote_code=self._trust, **self._revision)
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise SaliencyError(
                    f"{self.name}: expected a model that transformers has, got one with code of its own, which "
                    "--trust-remote-code runs (read it first)"
                ) from error
            reason = str(error).splitlines()[0]
            raise SaliencyError(
                f"{self.name}: expected an ONNX file or a model of transformers, got another ({reason})"
            ) from error

    def _find_class(self) -> type:
        offered = getattr(self._config, "auto_map", None) or {}
        if self._trust and offered:
            for auto_class in _AUTO_CLASSES:
                if auto_class.__name__ in offered:
                    return auto_class
        if type(self._config) in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING and self._config.num_labels in (1, 2):
            return AutoModelForSemanticSegmentation
        raise SaliencyError(
            f"{self.name}: expected a model of foreground maps (semantic segmentation with 1 or 2 labels), "
            f"got a {self._config.model_type} with {self._config.num_labels} labels"
        )

    def prepare(self, rows: Dataset, device: torch.device) -> None:
        kwargs: dict[str, Any] = {"config": self._config, "trust_remote_code": self._trust, **self._revision}
        auto_class: Any = self._auto_class
        model: nn.Module = from_safetensors(auto_class.from_pretrained, self._repository, **kwargs)
        self._model = model.float().to(device).eval()
        self._device = device
        super().prepare(rows, device)

    @torch.inference_mode()
    def predict(self, inputs: np.ndarray) -> np.ndarray:
        output = self._model(torch.from_numpy(inputs).to(self._device))
        return foreground(output, len(inputs), self.name, self.settings.output).float().cpu().numpy()


def foreground(output: Any, batch: int, name: str, number: int | None = None) -> Tensor:
    """The map (B, h, w) in what a model returns: its `alphas`, its `logits`, or the last of a list (BiRefNet).

    Of two channels the second is the foreground's, and its probability is returned; of one, the values as they are.

    Args:
        name: of the model, for messages.
        number: of the output in a list, instead of the last.

    Raises:
        SaliencyError: there is no such map.
    """
    if isinstance(output, Mapping):
        named = [output[key] for key in ("alphas", "logits") if output.get(key) is not None]
        return foreground(named[0] if named else list(output.values()), batch, name, number)
    if isinstance(output, list | tuple) and output:
        if number is not None and number >= len(output):
            raise SaliencyError(f"output: expected the number of one of {name}'s {len(output)} outputs, got {number}")
        return foreground(output[-1 if number is None else number], batch, name)
    if isinstance(output, Tensor) and len(output) == batch:
        if output.ndim == 3:
            return output
        if output.ndim == 4 and output.shape[1] == 1:
            return output[:, 0]
        if output.ndim == 4 and output.shape[1] == 2:
            return output.float().softmax(dim=1)[:, 1]
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise SaliencyError(f"{name}: expected one map, (B, 1, h, w) or (B, h, w), got {found}")
