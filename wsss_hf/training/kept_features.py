"""Features of a frozen backbone: computed once, and kept on disk while a training lasts."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ..models.backbone import Backbone
from ..progress import say

_LEAST_SHARE, _LEAST_BYTES = 0.1, 10 * 2**30  # of the disk that stay free, whichever is less
_DIGEST_SIZE = 16  # bytes; it stands before the values


@contextmanager
def kept_features(model: nn.Module, folder: Path) -> Iterator[None]:
    """While this lasts, the frozen backbone of a training model sees no image twice.

    Nothing is kept where the backbone learns, or a method needs more of it than stage maps.

    Args:
        folder: gets a file for each image, of the size of its stage maps. Nothing more is kept where neither 10 GiB
            nor a tenth of the disk are free.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone) or not _stages_suffice(model, backbone):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    say(f"the backbone is frozen: its features are computed once, and kept in {folder} until the training is done")
    backbone.forward = KeptFeatures(model, backbone, folder)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backbone.forward


def _stages_suffice(model: nn.Module, backbone: nn.Module) -> bool:
    methods: Any = getattr(model, "methods", None) or {}
    # A method that reads the maps of another one needs what that one reads.
    return not any(parameter.requires_grad for parameter in backbone.parameters()) and all(
        method.stages_suffice and getattr(method.config, "maps", "cam") == "cam" for method in methods.values()
    )


class KeptFeatures:
    """Stands for the `forward` of a frozen backbone: images (B, 3, H, W) → their stage maps.

    A file's name is the digest of the backbone, its precision, and the image's values, so that a file never holds the
    features of another image or network.
    """

    def __init__(self, model: nn.Module, backbone: Backbone, folder: Path):
        self.model, self.folder, self.compute = model, folder, backbone.forward
        self.has_room = True
        digest = hashlib.blake2b(repr((backbone.stage_indices, backbone.strides)).encode())
        for name, values in backbone.state_dict().items():
            digest.update(name.encode() + _bytes(values))
        self.key = digest.digest()

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        if not self.model.training:  # pictures of maps, whose images don't come again
            return self.compute(pixel_values)
        files = [self.folder / self._name(image) for image in pixel_values]
        held = [_read(file) for file in files]
        if not all(held):
            # All images, whichever are held: rounding depends on the batch, and may not on where a run was broken off.
            computed = self.compute(pixel_values)
            for place, file in enumerate(files):
                if not held[place]:
                    held[place] = [stage[place] for stage in computed]
                    self._write(file, held[place])
        stages = zip(*held, strict=True)
        return tuple(torch.stack([values.to(pixel_values.device) for values in stage]) for stage in stages)

    def _name(self, image: Tensor) -> str:
        kind = image.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image.dtype
        return hashlib.blake2b(
            self.key + repr((precision, image.shape)).encode() + _bytes(image), digest_size=20
        ).hexdigest()

    def _write(self, file: Path, stages: list[Tensor]) -> None:
        if not self.has_room:
            return
        values = save({str(index): values.contiguous() for index, values in enumerate(stages)})
        try:
            disk = shutil.disk_usage(self.folder)
            self.has_room = disk.free > min(_LEAST_SHARE * disk.total, _LEAST_BYTES)
            if self.has_room:
                file.write_bytes(hashlib.blake2b(values, digest_size=_DIGEST_SIZE).digest() + values)
        except OSError:  # a quota
            self.has_room = False
        if not self.has_room:
            say(f"the disk is nearly full: the features of further images are not kept in {self.folder}")


def _read(file: Path) -> list[Tensor]:
    """The stage maps (D_i, h_i, w_i) of an image; nothing where there is no file, or not as it was written."""
    if not file.is_file():
        return []
    held = file.read_bytes()
    digest, values = held[:_DIGEST_SIZE], held[_DIGEST_SIZE:]
    if hashlib.blake2b(values, digest_size=_DIGEST_SIZE).digest() != digest:
        return []
    stages = load(values)
    return [stages[str(index)] for index in range(len(stages))]


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
