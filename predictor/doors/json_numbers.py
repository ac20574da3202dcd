"""JSON lists of numbers → arrays, without an object for each number: several times faster than a general parser.

Only what is certain to be read exactly is read here, for the rest `read` gives None and a general parser has its turn:
so this code decides nothing about what is allowed. A number is a decimal mantissa m of up to 19 digits and an exponent.
As float32 it is the nearest to m × 10**e, which is computed in float64 with an error of a few 2**-53; where that could
make a difference, both ends of the interval differ as float32, and the number is left to the general parser.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cube.kernels import inlined, kernel
from cube.rpc.calls import Buffer
from predictor.tensors import DTYPES

_POWERS = np.array([10.0**e for e in range(23)])  # all exact
_MOST_EXPONENT = 44  # of ten: two steps of 22
_MARGIN = 2.0**-50
_LARGEST = float(np.finfo(np.float32).max)
_LEFT = -1


def read(datatype: str, shape: Sequence[int], data: Buffer) -> NDArray[Any] | None:
    """The tensor that a list, flat or nested, says; None for what is not surely such a list of that shape.

    Integers of all datatypes and FP32; at least one element.
    """
    dtype = DTYPES.get(datatype)
    count = math.prod(shape)
    text = np.frombuffer(data, np.uint8)
    # Each number takes a digit and a comma: a shape that promises more is not to cost memory.
    if dtype is None or not 0 < count <= text.size or (dtype.kind not in "iu" and datatype != "FP32"):
        return None
    text.flags.writeable = False  # one compiled kernel for all
    begin = bytes(text[:64]).translate(None, b" \t\r\n")
    depth = len(begin) - len(begin.lstrip(b"["))
    if depth not in (1, len(shape)):
        return None
    within = np.array([count] if depth == 1 else [math.prod(shape[at:]) for at in range(depth)], np.int64)
    is_float, signed, bits = dtype.kind == "f", dtype.kind == "i", 8 * dtype.itemsize
    integers, floats = np.empty(0 if is_float else count, np.uint64), np.empty(count if is_float else 0, np.float32)
    most, least = np.uint64((1 << (bits - signed)) - 1), np.uint64(signed << (bits - 1))
    if not _scan(text, within, count, most, least, integers, floats):
        return None
    if is_float:
        return floats.reshape(shape)
    return integers.view(np.int64 if signed else np.uint64).astype(dtype, copy=False).reshape(shape)


def warm() -> None:
    """Have the kernels compiled."""
    read("FP32", [1], b"[0]")
    read("INT64", [1], b"[0]")


@kernel
def _scan(text, within, count, most, least, integers, floats):  # type: ignore[no-untyped-def]
    """Read `count` numbers into whichever of the two arrays has room for them; False for what is not to be read here.

    within: how many numbers each list has, by its depth. most, least: the largest integer and, without its sign, the
    smallest.
    """
    starts = np.zeros(within.size, np.int64)  # numbers before each list that is open
    at = depth = done = 0
    fresh = True  # what comes next is a number or a list; else a comma or the end of a list
    while at < text.size:
        letter = text[at]
        if letter == 0x20 or letter == 0x0A or letter == 0x0D or letter == 0x09:
            at += 1
        elif not fresh:
            at += 1
            if letter == 0x2C and depth > 0:  # ,
                fresh = True
            elif letter == 0x5D and depth > 0:  # ]
                depth -= 1
                if done - starts[depth] != within[depth]:
                    return False
            else:
                return False
        elif letter == 0x5B and depth < within.size:  # [
            starts[depth] = done
            depth += 1
            at += 1
        elif depth < within.size or done == count:
            return False
        else:
            if floats.size:
                at, floats[done] = _float(text, at)
            else:
                at, integers[done] = _integer(text, at, most, least)
            if at == _LEFT:
                return False
            done += 1
            fresh = False
    return depth == 0 and done == count and not fresh


@inlined
def _digits(text, at, mantissa):  # type: ignore[no-untyped-def]
    """Digits from `at` on, behind those of the mantissa. Returns the place behind them and the mantissa."""
    while at < text.size:
        digit = text[at] - np.uint8(0x30)
        if digit > np.uint8(9):
            break
        mantissa = mantissa * np.uint64(10) + np.uint64(digit)
        at += 1
    return at, mantissa


@inlined
def _integer(text, at, most, least):  # type: ignore[no-untyped-def]
    """Returns the place behind a number and its 64 bits."""
    negative = text[at] == 0x2D
    at += negative
    end, mantissa = _digits(text, at, np.uint64(0))
    fits = end > at and (text[at] != 0x30 or end == at + 1) and mantissa <= (least if negative else most)
    if end >= at + 20:
        # 20 digits that begin with 1 are below 2 * 10**19: what is above 2**64 has come out as less than 10**19.
        fits = fits and end == at + 20 and text[at] == 0x31 and mantissa >= np.uint64(10**19)
    end = end if fits else _LEFT
    return end, np.uint64(0) - mantissa if negative else mantissa


@kernel
def _float(text, at):  # type: ignore[no-untyped-def]
    """Returns the place behind a number and the number."""
    left = _LEFT, np.float32(0)
    negative = text[at] == 0x2D
    at += negative
    end, mantissa = _digits(text, at, np.uint64(0))
    digits, exponent = end - at, 0
    if end == at or (text[at] == 0x30 and digits > 1):
        return left
    if end < text.size and text[end] == 0x2E:  # .
        begin = at = end + 1
        if mantissa == 0:
            digits = 0
            while at < text.size and text[at] == 0x30:
                at += 1
        end, mantissa = _digits(text, at, mantissa)
        if end == begin:
            return left
        exponent = begin - end
        digits += end - at
    if digits > 19:
        return left
    if end < text.size and (text[end] == 0x65 or text[end] == 0x45):  # e, E
        at = end + 1
        down = at < text.size and text[at] == 0x2D
        if at < text.size and (text[at] == 0x2D or text[at] == 0x2B):
            at += 1
        end, power = _digits(text, at, np.uint64(0))
        if end == at or end > at + 3:
            return left
        exponent += -int(power) if down else int(power)
    if exponent > _MOST_EXPONENT or exponent < -_MOST_EXPONENT:
        return left
    value = np.float64(mantissa)
    first, second = min(abs(exponent), 22), max(abs(exponent) - 22, 0)
    value = value / _POWERS[first] / _POWERS[second] if exponent < 0 else value * _POWERS[first] * _POWERS[second]
    nearest = np.float32(value * (1.0 + _MARGIN))
    if np.float32(value * (1.0 - _MARGIN)) != nearest or value > _LARGEST:
        return left
    return end, -nearest if negative else nearest
