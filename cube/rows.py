"""Row formats: how an embedding vector lies in a store, and how it becomes float32.

    F32    dim little-endian float32
    F16    dim little-endian IEEE 754 binary16
    BF16   dim little-endian bfloat16: the upper half of a float32, rounded to nearest, ties to even
    I8     scale float32, bias float32, dim uint8 q: x = q * scale + bias, each operation rounded to float32
           (row-wise 8-bit quantisation as in fbgemm: scale = (max - min) / 255, bias = min)

An I8 element is off by at most scale / 2, besides float32's own rounding (a spread below 2e-43 is rounded to none). A
constant row has scale 0 and is exact, but for the sign of a zero. A row with a NaN or an infinity anywhere becomes
NaN everywhere in I8, which has no way to say which element it was.

Decoding is fused with the copy that puts a row where it is wanted: `put_row` is inlined by the kernels that move rows.
"""

import sys
from enum import IntEnum
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from cube.errors import BadData, BadRequest
from cube.kernels import U, inlined, kernel

if sys.byteorder != "little":
    raise ImportError("cube reads and writes little-endian rows in place; this machine is big-endian")

RAW, F32, F16, I8 = 0, 1, 2, 4  # kinds of moves, as kernels know them: the row's bytes as they are, or a format


# Comparing a dtype with np.float32 would make one of it each time.
FLOAT32, UINT8, UINT64 = np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.uint64)


class RowFormat(IntEnum):
    """On disk and on the wire: never renumber."""

    F32 = 1
    F16 = 2
    BF16 = 3
    I8 = 4

    def row_bytes(self, dim: int) -> int:
        """Bytes of one row of `dim` elements."""
        return {RowFormat.F32: 4 * dim, RowFormat.F16: 2 * dim, RowFormat.BF16: 2 * dim, RowFormat.I8: 8 + dim}[self]

    @property
    def text(self) -> str:
        """The name in flags, manifests and messages: f32, f16, bf16, i8."""
        return self.name.lower()

    @classmethod
    def parse(cls, text: str, place: str = "row format") -> "RowFormat":
        """The format of a name; raises BadData."""
        if text.upper() not in cls.__members__:
            raise BadData(place, repr(text), " or ".join(f.text for f in cls))
        return cls[text.upper()]

    def encode(self, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        """rows: float32[n, dim] → uint8[n, row_bytes]. Raises BadData where a finite number has no finite code."""
        rows = np.ascontiguousarray(rows, np.float32)
        if self is RowFormat.I8:
            quantised = np.empty((len(rows), self.row_bytes(rows.shape[1])), np.uint8)
            if (wide := _quantise(rows, quantised)) >= 0:
                found = f"elements from {rows[wide].min()} to {rows[wide].max()}"
                raise BadData(f"row {wide}", found, "a spread that float32 can hold, for i8")
            return quantised
        if self is RowFormat.F32:
            coded: NDArray[Any] = rows
        elif self is RowFormat.F16:
            with np.errstate(over="ignore"):
                coded = rows.astype(np.float16)
            lost = np.isinf(coded) & np.isfinite(rows)
        else:
            coded = _bf16(rows)
            lost = (coded & 0x7FFF == 0x7F80) & np.isfinite(rows)
        if self is not RowFormat.F32 and lost.any():
            at = np.argwhere(lost)[0]
            raise BadData(f"row {at[0]} element {at[1]}", rows[tuple(at)], f"a number within the range of {self.text}")
        return coded.view(np.uint8).reshape(len(rows), self.row_bytes(rows.shape[1]))


def _bf16(rows: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = rows.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16  # 64 bits: a NaN must not carry over
    return np.where(np.isnan(rows), (bits >> 16) | 0x40, rounded).astype(np.uint16)


@kernel
def _quantise(rows, out):  # type: ignore[no-untyped-def]
    """Fill out; returns the number of a row whose elements lie further apart than a float32 can say, or -1."""
    parameters = np.empty(2, np.float32)
    raw = parameters.view(np.uint8)
    for i in range(rows.shape[0]):
        low, high, finite = rows[i, 0], rows[i, 0], True
        for j in range(rows.shape[1]):
            x = rows[i, j]
            finite = finite and np.isfinite(x)
            low, high = min(low, x), max(high, x)
        spread = np.float64(high) - np.float64(low)  # float64: the difference of two float32 may be none
        if finite and spread > 3.4e38:
            return i
        scale = spread / 255.0
        parameters[0], parameters[1] = (scale, low) if finite else (np.nan, np.nan)
        for j in range(8):
            out[i, j] = raw[j]
        step = np.float64(parameters[0])
        for j in range(rows.shape[1]):
            code = 0.0
            if finite and step > 0.0:
                code = min((np.float64(rows[i, j]) - np.float64(low)) / step + 0.5, 255.0)
            out[i, 8 + j] = np.uint8(code)
    return -1


def _move(typingctx: Any, kind: Any, add: Any, to: Any, source: Any, size: Any) -> Any:
    """Move one row from the address `source` to the address `to`, decoded to float32, added if `add`.

    kind and add are literals, so that each use is one straight run of vector instructions: eight elements at a time,
    then the rest as four, two and one. size: elements, for RAW bytes. Addresses need no alignment.
    """
    kind_, add_ = kind.literal_value, add.literal_value
    most = 32 if kind_ == RAW else 8
    width = {RAW: 1, RowFormat.F32: 4, RowFormat.F16: 2, RowFormat.BF16: 2, RowFormat.I8: 1}[kind_]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i8, i16, i32, i64, f32 = (*map(ir.IntType, (8, 16, 32, 64)), ir.FloatType())
        to, source = (builder.inttoptr(address, i8.as_pointer()) for address in args[2:4])
        size = args[4]

        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        def load(base: Any, offset: Any, kind: Any) -> Any:
            value = builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()))
            value.align = 1
            return value

        if kind_ == RowFormat.I8:
            scale, bias = load(source, number(0), f32), load(source, number(4), f32)
            source = builder.gep(source, [number(8)])

        def run(lanes: int, element: Any) -> None:
            wide, floats = ir.VectorType(i32, lanes), ir.VectorType(f32, lanes)

            def every(value: float, kind: Any = wide) -> Any:
                return ir.Constant(kind, [value] * lanes)

            def splat(value: Any) -> Any:
                nothing = ir.Constant(floats, ir.Undefined)
                return builder.shuffle_vector(builder.insert_element(nothing, value, i32(0)), nothing, every(0))

            def stored(kind: Any) -> Any:
                return load(source, builder.mul(element, number(width)), ir.VectorType(kind, lanes))

            if kind_ == RAW:
                value = stored(i8)
            elif kind_ == RowFormat.F32:
                value = stored(f32)
            elif kind_ == RowFormat.BF16:
                value = builder.bitcast(builder.shl(builder.zext(stored(i16), wide), every(16)), floats)
            elif kind_ == RowFormat.F16:
                # exponent and fraction moved to float32's places are the number times 2^-112, subnormals included; only
                # infinities and NaNs (all five exponent bits set) need their exponent filled up instead
                half = builder.zext(stored(i16), wide)
                magnitude = builder.shl(builder.and_(half, every(0x7FFF)), every(13))
                grown = builder.fmul(builder.bitcast(magnitude, floats), every(2.0**112, floats))
                special = builder.icmp_unsigned(">=", magnitude, every(0x7C00 << 13))
                filled = builder.or_(magnitude, every(0x7F800000))
                bits = builder.select(special, filled, builder.bitcast(grown, wide))
                sign = builder.shl(builder.and_(half, every(0x8000)), every(16))
                value = builder.bitcast(builder.or_(bits, sign), floats)
            else:
                codes = builder.sitofp(builder.zext(stored(i8), wide), floats)
                value = builder.fadd(builder.fmul(codes, splat(scale)), splat(bias))
            place = builder.gep(to, [element if kind_ == RAW else builder.mul(element, number(4))])
            place = builder.bitcast(place, value.type.as_pointer())
            if add_:
                before = builder.load(place)
                before.align = 1
                value = builder.fadd(before, value)
            builder.store(value, place).align = 1

        with cgutils.for_range(builder, builder.udiv(size, number(most)), intp=i64) as loop:
            run(most, builder.mul(loop.index, number(most)))
        lanes = most // 2
        while lanes:  # ends: lanes halve
            with builder.if_then(builder.icmp_unsigned("!=", builder.and_(size, number(lanes)), number(0))):
                run(lanes, builder.and_(size, number(~(2 * lanes - 1))))
            lanes //= 2
        return context.get_dummy_value()

    return types.void(kind, add, types.uint64, types.uint64, types.uint64), codegen


_move_row: Any = intrinsic(prefer_literal=True)(_move)


@inlined
def put_row(kind, add, to, source, size):  # type: ignore[no-untyped-def]
    """Put the row at address `source` to address `to`: decoded, or as it is (RAW); added, or over what is there.

    size: elements of the row, bytes if kind is RAW, which is never added. All numbers are uint64.
    """
    if add:
        if kind == F32:
            _move_row(1, 1, to, source, size)
        elif kind == I8:
            _move_row(4, 1, to, source, size)
        elif kind == F16:
            _move_row(2, 1, to, source, size)
        else:
            _move_row(3, 1, to, source, size)
    elif kind == F32:
        _move_row(1, 0, to, source, size)
    elif kind == RAW:
        _move_row(0, 0, to, source, size)
    elif kind == I8:
        _move_row(4, 0, to, source, size)
    elif kind == F16:
        _move_row(2, 0, to, source, size)
    else:
        _move_row(3, 0, to, source, size)


@kernel
def _decode(kind, raw, row_bytes, dim, out):  # type: ignore[no-untyped-def]
    to, source = U(out.ctypes.data), U(raw.ctypes.data)
    for i in range(raw.size // row_bytes):
        put_row(kind, False, to + U(i) * U(4 * dim), source + U(i) * U(row_bytes), U(dim))


@inlined
def divide(offsets, sums):  # type: ignore[no-untyped-def]
    """Sums of bags become means; a sum of nothing, and of one, is its own mean."""
    for b in range(sums.shape[0]):
        size = offsets[b + 1] - offsets[b]
        if size > 1:
            for j in range(sums.shape[1]):
                sums[b, j] /= np.float32(size)


@kernel
def _pool(kind, raw, row_bytes, offsets, mean, sums):  # type: ignore[no-untyped-def]
    dim = sums.shape[1]
    to, source = U(sums.ctypes.data), U(raw.ctypes.data)
    sums[:] = 0
    for b in range(sums.shape[0]):
        for i in range(offsets[b], offsets[b + 1]):
            put_row(kind, True, to + U(b) * U(4 * dim), source + U(i) * U(row_bytes), U(dim))
    if mean:
        divide(offsets, sums)


def decode(row_format: RowFormat, raw: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """raw: uint8[n, row_bytes] → out: float32[n, dim], both in C order."""
    if len(raw):
        _decode(int(row_format), flat(raw), raw.shape[1], out.shape[1], flat(out))


def pool(
    row_format: RowFormat, raw: NDArray[np.uint8], offsets: NDArray[np.int64], mean: bool, out: NDArray[np.float32]
) -> None:
    """Sum or mean of the rows raw[offsets[b] : offsets[b + 1]] of each bag b, added from left to right.

    raw: uint8[n, row_bytes]; offsets: int64[bags + 1], checked by `check_offsets`; out: float32[bags, dim], C order.
    """
    _pool(int(row_format), flat(raw), raw.shape[1], offsets, mean, flat(out).view(np.float32).reshape(out.shape))


@kernel
def _scatter(raw, row_bytes, places, out):  # type: ignore[no-untyped-def]
    source, to = U(raw.ctypes.data), U(out.ctypes.data)
    for i in range(places.size):
        if places[i] >= 0:
            put_row(RAW, False, to + U(places[i]) * U(row_bytes), source + U(i) * U(row_bytes), U(row_bytes))


@kernel
def _count_not_finite(kind, raw, row_bytes, row):  # type: ignore[no-untyped-def]
    count, source, to = 0, U(raw.ctypes.data), U(row.ctypes.data)
    for i in range(raw.size // row_bytes):
        put_row(kind, False, to, source + U(i) * U(row_bytes), U(row.size))
        finite = True
        for j in range(row.size):
            finite = finite and np.isfinite(row[j])
        count += not finite
    return count


def scatter(raw: NDArray[np.uint8], places: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """out[places[i]] = raw[i] for rows of bytes, where places[i] is not negative.

    raw: uint8[n, row_bytes]; places: int64[n], each below k; out: uint8[k, row_bytes].
    """
    _scatter(flat(raw), raw.shape[1], places, flat(out))


def not_finite(row_format: RowFormat, raw: NDArray[np.uint8], dim: int) -> int:
    """How many rows (uint8[n, row_bytes]) hold a NaN or an infinity."""
    return int(_count_not_finite(int(row_format), flat(raw), raw.shape[1], np.empty(dim, np.float32)))


def check_offsets(place: str, offsets: NDArray[np.int64], values: int) -> None:
    """Raise BadRequest unless offsets (int64[bags + 1]) run from 0 to `values` and never fall."""
    fits = offsets.dtype == np.int64 and offsets.ndim == 1 and offsets.size >= 1
    if not fits or offsets[0] != 0 or offsets[-1] != values or (offsets[1:] < offsets[:-1]).any():
        found = f"{offsets.dtype} offsets {offsets.reshape(-1)[:8].tolist()}…"
        raise BadRequest(place, found, f"int64 numbers that never fall, from 0 to {values}")


def flat(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array in C order, without a copy."""
    if not array.flags.c_contiguous:
        raise ValueError("rows must lie in C order, without gaps")
    return array.reshape(-1).view(UINT8)
