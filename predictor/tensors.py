"""Tensors as requests carry them: KServe's datatypes and raw layout on one side, numpy arrays and texts on the other.

Raw layout (Open Inference Protocol v2): little-endian, row-major; BOOL one byte; BYTES elements each a uint32 length
and the bytes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadRequest
from cube.kernels import kernel

DTYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"), "UINT16": np.dtype("<u2"), "UINT32": np.dtype("<u4"), "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"), "INT16": np.dtype("<i2"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
}  # fmt: skip
MAX_DIMENSIONS, MAX_ELEMENTS = 16, 1 << 40
_DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


class Texts(NamedTuple):
    """A BYTES tensor: element i is data[starts[i] : starts[i] + sizes[i]], in row-major order of `shape`."""

    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


Value = NDArray[Any] | Texts


def datatype_of(value: Value) -> str:
    """KServe's name of a value's type; raises BadRequest for one that has none."""
    if isinstance(value, Texts):
        return "BYTES"
    dtype = value.dtype
    name = _DATATYPES.get(dtype if dtype.isnative else dtype.newbyteorder("<"))
    if name is None:
        raise BadRequest("tensor", f"dtype {value.dtype}", f"one of {', '.join(DTYPES)}, BYTES")
    return name


def shape_text(shape: Sequence[int]) -> str:
    """[-1, 13], for messages."""
    return f"[{', '.join(map(str, shape))}]"


def decode(datatype: str, shape: Sequence[int], raw: bytes, place: str) -> Value:
    """A tensor from its raw bytes, without copying them; raises BadRequest naming `place`."""
    count = count_of(shape, place)
    if datatype == "BYTES":
        return _texts(tuple(shape), count, np.frombuffer(raw, np.uint8), place)
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise BadRequest(f"{place} datatype", repr(datatype), f"one of {', '.join(DTYPES)}, BYTES")
    if len(raw) != count * dtype.itemsize:
        raise BadRequest(
            place, f"{len(raw)} bytes", f"{count * dtype.itemsize}: {datatype} of shape {shape_text(shape)}"
        )
    return np.frombuffer(raw, dtype).reshape(tuple(shape))


def count_of(shape: Sequence[int], place: str) -> int:
    """Elements of a tensor; raises BadRequest for a shape that no array can have."""
    if 0 < len(shape) <= MAX_DIMENSIONS and min(shape) > 0 and (count := math.prod(shape)) < MAX_ELEMENTS:
        return count  # what nearly every tensor has
    if len(shape) > MAX_DIMENSIONS or any(not 0 <= size < MAX_ELEMENTS for size in shape):
        expected = f"at most {MAX_DIMENSIONS} sizes from 0 to {MAX_ELEMENTS - 1}"
        raise BadRequest(f"{place} shape", shape_text(shape), expected)
    count = math.prod(shape)
    if math.prod(size or 1 for size in shape) >= MAX_ELEMENTS:  # numpy refuses it for an empty array too
        raise BadRequest(f"{place} shape", shape_text(shape), f"fewer than {MAX_ELEMENTS} elements")
    return count


def check_alike(groups: Sequence[Sequence[str]], lengths: Mapping[str, NDArray[Any]]) -> None:
    """Raise BadRequest unless a sample has as much in each of a group of names as in any other: they are joined."""
    for first, *others in groups:
        one = lengths[first].ravel()
        for name in others:
            other = lengths[name].ravel()
            if not np.array_equal(one, other):
                at = int(np.flatnonzero(one != other)[0])
                found = f"{one[at]} and {other[at]} in sample {at}"
                raise BadRequest(f"inputs {first!r} and {name!r}", found, "as many in both, which the program joins")


def encode(value: Value) -> bytes:
    """The raw bytes of a tensor."""
    if not isinstance(value, Texts):
        return (value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("<"))).tobytes()
    out = np.empty(int(value.sizes.sum()) + 4 * value.sizes.size, np.uint8)
    _pack(value.data, value.starts, value.sizes, out)
    return out.tobytes()


def texts(elements: Sequence[bytes], shape: tuple[int, ...] | None = None) -> Texts:
    """A BYTES tensor of these elements; shape: [n] unless given."""
    sizes = np.fromiter(map(len, elements), np.int64, len(elements))
    return Texts(
        (len(elements),) if shape is None else shape,
        np.frombuffer(b"".join(elements), np.uint8),
        np.cumsum(sizes) - sizes,
        sizes,
    )


def _texts(shape: tuple[int, ...], count: int, data: NDArray[np.uint8], place: str) -> Texts:
    if count > data.size // 4:
        raise BadRequest(
            place, f"{data.size} bytes", f"at least {4 * count}: {count} elements with a length of 4 bytes each"
        )
    starts, sizes = np.empty(count, np.int64), np.empty(count, np.int64)
    used = _unpack(data, starts, sizes)
    if used != data.size:
        raise BadRequest(place, f"{data.size} bytes", f"the lengths and bytes of {count} BYTES elements, and no more")
    return Texts(shape, data, starts, sizes)


@kernel
def _unpack(data, starts, sizes):  # type: ignore[no-untyped-def]
    """Where each length-prefixed element lies. Returns bytes used, or -1 if the elements run past the end."""
    at = 0
    for i in range(starts.size):
        if at + 4 > data.size:
            return -1
        size = np.int64(data[at]) + 256 * (data[at + 1] + 256 * (data[at + 2] + 256 * np.int64(data[at + 3])))
        if at + 4 + size > data.size:
            return -1
        starts[i], sizes[i] = at + 4, size
        at += 4 + size
    return at


@kernel
def _pack(data, starts, sizes, out):  # type: ignore[no-untyped-def]
    at = 0
    for i in range(starts.size):
        for b in range(4):
            out[at + b] = (sizes[i] >> (8 * b)) & 255
        for j in range(sizes[i]):
            out[at + 4 + j] = data[starts[i] + j]
        at += 4 + sizes[i]
