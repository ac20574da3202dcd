"""Paddle's parameter files: where each parameter lies in them, without reading what it holds.

A parameter is a stream, little-endian:

    uint32 0 · uint64 LoD levels · per level: uint64 bytes, offsets · uint32 0 · int32 length · TensorDesc · elements

A program's parameters are a file each, named as the parameter, or one file of all streams sorted by name. The combined
file holds no names, so every stream is checked against what the program says of the parameter that should be there.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from cube.errors import BadData
from trainer_tools.manifest import inside
from trainer_tools.pb.paddle_framework_pb2 import VarType

DTYPES: dict[int, np.dtype[Any]] = {
    VarType.BOOL: np.dtype("?"), VarType.UINT8: np.dtype("u1"), VarType.INT8: np.dtype("i1"),
    VarType.INT16: np.dtype("<i2"), VarType.INT32: np.dtype("<i4"), VarType.INT64: np.dtype("<i8"),
    VarType.FP16: np.dtype("<f2"), VarType.FP32: np.dtype("<f4"), VarType.FP64: np.dtype("<f8"),
    VarType.COMPLEX64: np.dtype("<c8"), VarType.COMPLEX128: np.dtype("<c16"),
    # numpy lacks these: their bits
    VarType.BF16: np.dtype("<u2"), VarType.FP8_E4M3FN: np.dtype("u1"), VarType.FP8_E5M2: np.dtype("u1"),
}  # fmt: skip
_MOST_LEVELS, _MOST_DESC = 16, 4096  # far beyond what Paddle writes
_PIECE = 8 << 20


class Shape(NamedTuple):
    """Element type (a VarType.Type) and dims of a parameter."""

    dtype: int
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{type_name(self.dtype)} {list(self.dims)}"


class Stored(NamedTuple):
    """One parameter's stream."""

    path: Path
    start: int  # of the stream, bytes
    data: int  # of its elements
    end: int
    shape: Shape

    def array(self) -> NDArray[Any]:
        """The elements, mapped read-only; bfloat16 and float8 as their bits."""
        dtype = DTYPES[self.shape.dtype]
        if self.data == self.end:
            return np.zeros(self.shape.dims, dtype)  # an empty range cannot be mapped
        return np.memmap(self.path, dtype, "r", self.data, self.shape.dims)


def type_name(dtype: int) -> str:
    """FP32, INT64, ...; the number for one that our schema does not know."""
    return VarType.Type.Name(dtype) if dtype in VarType.Type.values() else f"type {dtype}"


def find_separate(directory: Path, parameters: Mapping[str, Shape]) -> dict[str, Stored]:
    """One file per parameter; a missing one is left out. Raises BadData for a file that holds something else."""
    found = {}
    for name, shape in parameters.items():
        path = inside(directory, name, f"{directory}, name of a parameter")
        if not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                stored = _stream(file, path, size, name)
        except OSError as error:
            raise BadData(str(path), error.strerror, f"the file of parameter {name!r}, {shape}") from error
        _check(stored, name, shape)
        if stored.end != size:
            raise BadData(str(path), f"{size - stored.end} bytes after the parameter", "the end of the file")
        found[name] = stored
    return found


def find_combined(path: Path, parameters: Mapping[str, Shape]) -> dict[str, Stored]:
    """All parameters in one file; raises BadData if it is missing or does not hold exactly these."""
    found: dict[str, Stored] = {}
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for name in sorted(parameters):
                if file.tell() == size:
                    raise BadData(f"{path} end", f"{len(found)} parameters", f"{len(parameters)}; next is {name!r}")
                found[name] = _stream(file, path, size, name)
                _check(found[name], name, parameters[name])
                file.seek(found[name].end)
            if file.tell() != size:
                found_after = f"{size - file.tell()} bytes after {len(found)} parameters"
                raise BadData(str(path), found_after, "the end: the program has no more parameters")
    except OSError as error:
        raise BadData(str(path), error.strerror, "the file of the program's parameters") from error
    return found


def write_separate(parameters: Mapping[str, Stored], directory: Path) -> None:
    """Copy each stream into a file of its own."""
    for name, stored in parameters.items():
        path = inside(directory, name, f"{directory}, name of a parameter")
        path.parent.mkdir(parents=True, exist_ok=True)  # names may hold '/'
        write_combined([stored], path)


def write_combined(parameters: Iterable[Stored], path: Path) -> None:
    """Copy streams into one file, in the order given."""
    with path.open("xb") as target:
        for stored in parameters:
            with stored.path.open("rb") as source:
                source.seek(stored.start)
                left = stored.end - stored.start
                while left:
                    piece = source.read(min(left, _PIECE))
                    if not piece:
                        raise BadData(str(stored.path), "an end that moved", "a file that nobody writes meanwhile")
                    target.write(piece)
                    left -= len(piece)


def _stream(file: BinaryIO, path: Path, size: int, name: str) -> Stored:
    """The stream at the file's position, whose elements stay unread."""
    start = file.tell()
    place = f"{path} byte {start} (parameter {name!r})"

    def number(layout: str, what: str, most: int) -> int:
        raw = file.read(struct.calcsize(layout))
        if len(raw) < struct.calcsize(layout):
            raise BadData(place, "the end of the file", what)
        value: int = struct.unpack(layout, raw)[0]
        if not 0 <= value <= most:
            raise BadData(place, value, what)
        return value

    number("<I", "0, the version of a Paddle parameter", 0)
    for _ in range(number("<Q", f"at most {_MOST_LEVELS} LoD levels", _MOST_LEVELS)):
        file.seek(number("<Q", f"the bytes of a LoD level, within the file's {size}", size), os.SEEK_CUR)
    number("<I", "0, the version of a Paddle tensor", 0)
    length = number("<i", f"the length of a TensorDesc, at most {_MOST_DESC}", _MOST_DESC)
    try:
        desc = VarType.TensorDesc.FromString(file.read(length))
    except DecodeError as error:
        raise BadData(place, f"{length} bytes that are no TensorDesc ({error})", "a Paddle parameter") from error
    shape, data = Shape(desc.data_type, tuple(desc.dims)), file.tell()
    if shape.dtype not in DTYPES or any(dim < 0 for dim in shape.dims):
        raise BadData(place, shape, f"dims of 0 or more and one of {', '.join(map(type_name, DTYPES))}")
    end = data + prod(shape.dims) * DTYPES[shape.dtype].itemsize
    if end > size:
        raise BadData(place, f"{size - data} bytes of elements", f"{end - data}: {shape}")
    return Stored(path, start, data, end, shape)


def _check(stored: Stored, name: str, shape: Shape) -> None:
    if stored.shape != shape:
        place = f"{stored.path} byte {stored.start}"
        raise BadData(place, stored.shape, f"parameter {name!r} of the program, {shape}")
