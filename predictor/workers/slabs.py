"""Values in memory that two processes share: written once by one, read as views by the other.

A slab is a piece of memory without a name (memfd), whose descriptor goes to the other process over a socket. It is
gone when nobody maps it any more, however the processes end. Pieces say what lies where in it, and travel as messages.
"""

import fcntl
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cube.errors import Internal, Overloaded
from predictor.ops.op import Ragged
from predictor.tensors import Texts

Memory = NDArray[np.uint8]

_ALIGNED = 64  # bytes: a cache line, and what the widest vector instructions like
_LEAST_BYTES = 64 << 10
KEPT_BYTES = 64 << 20  # a larger one is for one batch, or one result, only
_NUMBERS = frozenset("biufc")  # kinds of dtype that are nothing but their bytes


class Span(msgspec.Struct, array_like=True, frozen=True):
    """An array in a slab."""

    dtype: str  # as numpy writes it: "<f4"
    shape: tuple[int, ...]
    at: int  # its first byte
    is_writable: bool  # may the reader change it


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """A value in a slab: an array; data, starts and sizes of Texts; either after the offsets where it is ragged."""

    name: str
    spans: tuple[Span, ...]
    is_ragged: bool
    texts_shape: tuple[int, ...] | None  # None: an array


class Layout(NamedTuple):
    """Where values are to be in a slab."""

    pieces: tuple[Piece, ...]
    size: int  # bytes of all
    arrays: list[tuple[Span, NDArray[Any]]]

    def write(self, memory: Memory) -> None:
        """Copy the values. memory: at least `size` bytes."""
        for span, array in self.arrays:
            np.copyto(_view(span, memory), array)


def lay_out(values: Mapping[str, Any], what: str) -> Layout:
    """Find places for values. what: as "node 'n' input", for messages. Raises Internal for one that is no value."""
    arrays: list[tuple[Span, NDArray[Any]]] = []
    pieces, end = [], 0
    for name, value in values.items():
        parts, texts_shape = _parts(value, f"{what} {name!r}")
        spans = []
        for part in parts:
            span = Span(part.dtype.str, part.shape, end, part.flags.writeable)
            end += -(-part.nbytes // _ALIGNED) * _ALIGNED
            spans.append(span)
            arrays.append((span, part))
        pieces.append(Piece(name, tuple(spans), isinstance(value, Ragged), texts_shape))
    return Layout(tuple(pieces), end, arrays)


def _parts(value: Any, place: str) -> tuple[list[NDArray[Any]], tuple[int, ...] | None]:
    """The arrays that a value is made of, and the shape of its Texts."""
    if isinstance(value, Ragged):
        parts, texts_shape = _parts(value.values, place)
        return [*_parts(value.offsets, f"{place} offsets")[0], *parts], texts_shape
    if isinstance(value, Texts):
        return _compact(value), value.shape
    if not isinstance(value, np.ndarray):
        raise Internal(f"{place}: found a {type(value).__name__}, expected an array, Texts or Ragged")
    if value.dtype.kind not in _NUMBERS:
        raise Internal(f"{place}: found dtype {value.dtype}, expected numbers or booleans")
    return [value], None


def _compact(texts: Texts) -> list[NDArray[Any]]:
    """Data, starts and sizes: a part of a batch has the data of all of it, of which only its own is sent."""
    if not texts.starts.size:
        return [texts.data[:0], texts.starts, texts.sizes]
    first, last = int(texts.starts.min()), int((texts.starts + texts.sizes).max())
    if last - first == texts.data.size:
        return list(texts[1:])
    return [texts.data[first:last], texts.starts - first, texts.sizes]


def read(pieces: Sequence[Piece], memory: Memory) -> dict[str, Any]:
    """The values, as views. Raises ValueError or TypeError for pieces that say what cannot be."""
    return {piece.name: _value(piece, memory) for piece in pieces}


def _value(piece: Piece, memory: Memory) -> Any:
    parts = [_view(span, memory) for span in piece.spans]
    for part, span in zip(parts, piece.spans, strict=True):
        part.flags.writeable = span.is_writable
    offsets = parts.pop(0) if piece.is_ragged else None
    if piece.texts_shape is not None:
        data, starts, sizes = parts
        value: Any = Texts(piece.texts_shape, data, starts, sizes)
    else:
        (value,) = parts
    return value if offsets is None else Ragged(value, offsets)


def _view(span: Span, memory: Memory) -> NDArray[Any]:
    dtype = np.dtype(span.dtype)
    stop = span.at + math.prod(span.shape) * dtype.itemsize
    view: NDArray[Any] = memory[span.at : stop].view(dtype).reshape(span.shape)
    return view


class Slab:
    """Shared memory, mapped here. It is unmapped when the slab and all arrays over it are gone."""

    def __init__(self, descriptor: int, size: int):
        """Map what the descriptor stands for, which stays open. Raises OSError."""
        self.size = size
        self._map = mmap.mmap(descriptor, size)

    @classmethod
    def create(cls, least: int) -> "tuple[Slab, int]":
        """A new one of at least so many bytes, and the descriptor to send and close. Raises Overloaded.

        Sizes are powers of two, so that batches of like sizes find one that fits; memory is only used where written.
        """
        size = max(_LEAST_BYTES, 1 << (least - 1).bit_length() if least else 0)
        descriptor = -1
        try:
            descriptor = os.memfd_create("predictor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, size)
            # Nobody can take memory away from under the other one.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            return cls(descriptor, size), descriptor
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise Overloaded(f"no {size} bytes of memory to share ({error})") from error

    def memory(self, size: int) -> Memory:
        """The first so many bytes. It is an array of its own: all views of it refer to it, and it to the slab."""
        return np.frombuffer(self._map, np.uint8, size)
