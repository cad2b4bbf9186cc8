"""The source of saliency that `--model` or `--spectral` names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..models.options import Options
from .files import find_files
from .networks import NetworkSettings
from .onnx_model import OnnxSource
from .source import SaliencyError, SaliencySource
from .spectral import SpectralSettings, SpectralSource
from .transformers_model import TransformersSource


def load_source(
    model: str | os.PathLike | None = None,
    spectral: str | os.PathLike | None = None,
    settings: Mapping | Options | None = None,
    trust_remote_code: bool = False,
) -> SaliencySource:
    """The source of saliency, its options checked and its files found; [`SaliencySource.prepare`] loads it.

    Args:
        model: a network: an ONNX file; a folder or Hub repository (`owner/name@revision`) that holds one; else a model
            of transformers. With `trust_remote_code` the latter even where there is an ONNX file.
        spectral: instead, a backbone for the normalised cut: a directory or Hub id.
        settings: options of [`NetworkSettings`] or [`SpectralSettings`].
        trust_remote_code: run the code that a model of transformers brings.

    Raises:
        SaliencyError, OptionError, FileNotFoundError: there is no such source, or its options do not fit.
    """
    if (model is None) == (spectral is None):
        got = "neither" if model is None else "both"
        raise SaliencyError(f"add-saliency: expected --model or --spectral, got {got}")
    if spectral is not None:
        return SpectralSource(os.fspath(spectral), _checked(SpectralSettings, settings))
    assert model is not None
    checked = _checked(NetworkSettings, settings)
    files = find_files(model, checked.file)
    if files.onnx is not None and not trust_remote_code:
        return OnnxSource(files, checked)
    return TransformersSource(files, checked, trust_remote_code)


def _checked(kind: Any, settings: Mapping | Options | None):
    return settings if isinstance(settings, kind) else kind.from_dict(settings, "saliency")
