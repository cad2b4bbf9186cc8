"""Which files a model has that `--model` names: of a file, a folder or a repository of the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import httpx

from ..models.pretrained import pinned
from .networks import PROCESSOR_FILE
from .source import SaliencyError

_USUAL = ("onnx/model.onnx", "model.onnx")
_UNREACHABLE = (
    OSError,
    ValueError,
    httpx.HTTPError,
)  # what huggingface_hub raises without network, repository or access


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, all on this machine.

    Attributes:
        name: as the user named it.
        onnx: the ONNX file; None where there is none.
        onnx_weights: files that it keeps its weights in.
        processor: `preprocessor_config.json`, if there is one.
    """

    name: str
    onnx: Path | None = None
    onnx_weights: tuple[Path, ...] = ()
    processor: Path | None = None


def find_files(name: str | os.PathLike, file: str | None = None) -> ModelFiles:
    """Find the ONNX file that `name` names, and download it if it is on the Hub; or find that there is none.

    Args:
        name: an ONNX file, a folder, or a repository of the Hub (`owner/name@revision`).
        file: the ONNX file inside; None takes the only one, else onnx/model.onnx or model.onnx.

    Raises:
        FileNotFoundError: there is nothing of this name.
        SaliencyError: there are several ONNX files, or not the one that `file` names.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix != ".onnx":
            raise SaliencyError(f"model: expected an ONNX file, a folder or an id of the Hub, got the file {path}")
        return _in_folder(str(name), path.parent, path.name)
    if path.is_dir():
        listed = [found.relative_to(path).as_posix() for found in sorted(path.rglob("*.onnx"))]
        return _in_folder(str(name), path, _choose(str(name), listed, file))
    if path.suffix == ".onnx":
        raise FileNotFoundError(f"model: expected an ONNX file, a folder or an id of the Hub, found nothing at {path}")
    return _on_hub(str(name), file)


def _choose(name: str, listed: Sequence[str], file: str | None) -> str | None:
    """The ONNX file among those that are there."""
    known = [one for one in listed if one.endswith(".onnx")]
    if file is not None:
        if file not in known:
            raise SaliencyError(f"file: expected an ONNX file of {name} ({', '.join(known) or 'none'}), got {file}")
        return file
    if len(known) > 1:
        usual = [one for one in _USUAL if one in known]
        if not usual:
            raise SaliencyError(
                f"file: expected the name of one of {name}'s ONNX files ({', '.join(known)}), got none"
            )
        return usual[0]
    return known[0] if known else None


def _weights(listed: Sequence[str], onnx: str) -> list[str]:
    """model.onnx_data, model.onnx.data, model.onnx_data_1 …"""
    return [one for one in sorted(listed) if one.startswith(onnx) and one != onnx and "data" in one[len(onnx) :]]


def _processor_names(onnx: str | None) -> list[str]:
    """Beside the ONNX file, else beside the folder `onnx` that it is in."""
    parent = PurePosixPath(onnx or "").parent
    return list(dict.fromkeys([str(parent / PROCESSOR_FILE), PROCESSOR_FILE]))


def _in_folder(name: str, folder: Path, onnx: str | None) -> ModelFiles:
    processor = next((folder / one for one in _processor_names(onnx) if (folder / one).is_file()), None)
    if onnx is None:
        return ModelFiles(name, processor=processor)
    beside = [one.relative_to(folder).as_posix() for one in (folder / onnx).parent.iterdir()]
    return ModelFiles(name, folder / onnx, tuple(folder / one for one in _weights(beside, onnx)), processor)


def _on_hub(name: str, file: str | None) -> ModelFiles:
    repository, options = pinned(name, {})
    listed = _listing(name, str(repository), options.get("revision"))
    onnx = _choose(name, listed, file)

    def local(one: str) -> Path:
        return Path(hf_hub_download(str(repository), one, **options))

    processor = next((local(one) for one in _processor_names(onnx) if one in listed), None)
    if onnx is None:
        return ModelFiles(name, processor=processor)
    return ModelFiles(name, local(onnx), tuple(local(one) for one in _weights(listed, onnx)), processor)


def _listing(name: str, repository: str, revision: str | None) -> list[str]:
    """The files of a repository; without network, those of it that have been downloaded before."""
    try:
        return HfApi().list_repo_files(repository, revision=revision)
    except _UNREACHABLE as error:
        try:
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except _UNREACHABLE:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"model: expected an ONNX file, a folder or an id of the Hub, got {name} ({reason})"
            ) from error
    return [found.relative_to(folder).as_posix() for found in folder.rglob("*") if found.is_file()]
