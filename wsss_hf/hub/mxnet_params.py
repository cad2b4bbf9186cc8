"""Files `.params` of MXNet, read without it: named arrays after a magic number, no code.

All numbers are little-endian. A file is uint64 0x112, uint64 0, the arrays, the names; a list is its uint64 length and
its items, a name its uint64 length and its bytes. An array is: a uint32 that tells the version; of version 2 an int32
storage type (0 is dense); uint32 number of dimensions and int64 each; unless there are none, two int32 of a device, an
int32 type and the values. Of the oldest version the number of dimensions, uint32 each, stands in the version's place.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

MAGIC = 0x112
_VERSION_1, _VERSION_2 = 0xF993FAC8, 0xF993FAC9
_MOST_DIMENSIONS = 32  # NumPy's limit; a larger number is no number of dimensions
_TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")


class ParamsError(ValueError):
    """A file that is not whole, or that is something else; the message says what was expected."""


def read_params(file: Path) -> dict[str, Tensor]:
    """The arrays of a file by name, without the prefixes `arg:` and `aux:`.

    Raises:
        ParamsError: it is no such file, it ends too early, or an array is sparse or of an unknown type.
    """
    with file.open("rb") as stream:
        reader = _Reader(stream, file.stat().st_size)
        if reader.left < 8 or reader.number("<Q") != MAGIC:
            raise ParamsError("expected an MXNet file of named arrays, got something else")
        reader.number("<Q")
        arrays = [_read_array(reader) for _ in range(reader.number("<Q"))]
        names = [reader.read(reader.number("<Q")) for _ in range(reader.number("<Q"))]
    if len(names) != len(arrays):
        raise ParamsError(f"expected a name for each of {len(arrays)} arrays, got {len(names)} names")
    decoded = (name.decode("utf-8", "replace") for name in names)
    return {name.removeprefix("arg:").removeprefix("aux:"): array for name, array in zip(decoded, arrays, strict=True)}


class _Reader:
    def __init__(self, stream: BinaryIO, size: int):
        self.stream, self.left = stream, size

    def read(self, count: int) -> bytes:
        if count > self.left:  # asked before, as a wrong number may be larger than any memory
            raise ParamsError("expected a whole MXNet file, got one that ends too early")
        self.left -= count
        return self.stream.read(count)

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(kind, self.read(struct.calcsize(kind)))
        return value


def _read_array(reader: _Reader) -> Tensor:
    version = reader.number("<I")
    if version == _VERSION_2 and (storage := reader.number("<i")) != 0:
        raise ParamsError(f"expected dense arrays, got one of storage type {storage}")
    is_old = version not in (_VERSION_1, _VERSION_2)
    dimensions = version if is_old else reader.number("<I")
    if dimensions > _MOST_DIMENSIONS:
        raise ParamsError(f"expected an array of at most {_MOST_DIMENSIONS} dimensions, got {dimensions}")
    shape = [reader.number("<I" if is_old else "<q") for _ in range(dimensions)]
    if not shape:
        return torch.empty(0)
    reader.read(8)  # the device that it was on
    kind = reader.number("<i")
    if not 0 <= kind < len(_TYPES) or min(shape) < 0:
        raise ParamsError(f"expected arrays of numbers, got one of type {kind} and shape {tuple(shape)}")
    values = reader.read(math.prod(shape) * np.dtype(_TYPES[kind]).itemsize)
    return torch.from_numpy(np.frombuffer(values, _TYPES[kind]).reshape(shape).copy())
