"""Tensors on the wire: whatever the bytes are, an array or an error that names the place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cube.errors import BadRequest
from predictor.tensors import DTYPES, Texts, datatype_of, decode, encode, texts


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3), st.randoms())
def test_numbers_survive_the_wire(datatype, shape, random):
    count = int(np.prod(shape))
    raw = random.randbytes(count * DTYPES[datatype].itemsize)
    if datatype == "BOOL":
        raw = bytes(b & 1 for b in raw)
    value = decode(datatype, shape, raw, "x")
    assert value.shape == tuple(shape)
    assert datatype_of(value) == datatype
    assert encode(value) == raw


@given(st.lists(st.binary(max_size=9), max_size=9))
def test_texts_survive_the_wire(elements):
    got = decode("BYTES", [len(elements)], encode(texts(elements)), "x")
    assert isinstance(got, Texts)
    assert [got.data[s : s + n].tobytes() for s, n in zip(got.starts, got.sizes, strict=True)] == elements


def test_big_endian_arrays_are_sent_little_endian():
    assert encode(np.array([1], ">u4")) == b"\1\0\0\0"
    assert datatype_of(np.array([1], ">u4")) == "UINT32"


@given(st.integers(0, 5), st.binary(max_size=40))
def test_any_bytes_are_texts_or_an_error_that_names_the_place(count, raw):
    read = 0
    for _ in range(count):  # the slow twin
        size = int.from_bytes(raw[read : read + 4], "little") if read + 4 <= len(raw) else len(raw)
        read += 4 + size
    if read == len(raw):
        assert encode(decode("BYTES", [count], raw, "x")) == raw
    else:
        with pytest.raises(BadRequest, match="input 'x': found"):
            decode("BYTES", [count], raw, "input 'x'")


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "message"),
    [
        ("FP32", [2], bytes(7), r"x: found 7 bytes, expected 8: FP32 of shape \[2\]"),
        ("FP32", [-1], bytes(8), r"x shape: found \[-1\], expected at most 16 sizes from 0"),
        ("FP32", [1] * 17, bytes(4), "x shape: found .*, expected at most 16 sizes"),
        ("FP32", [2**62, 0], b"", "x shape: found"),
        ("FP32", [2**39, 2**39, 0], b"", "x shape: found .*, expected fewer than 1099511627776 elements"),
        ("FP8", [1], b"0", "x datatype: found 'FP8', expected one of"),
        ("FP32", [2**39], b"", "x: found 0 bytes"),
        ("BYTES", [2**39], b"", "x: found 0 bytes, expected at least"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(datatype, shape, raw, message):
    with pytest.raises(BadRequest, match=message):
        decode(datatype, shape, raw, "x")


def test_arrays_without_a_datatype_are_refused():
    with pytest.raises(BadRequest, match="found dtype complex128"):
        datatype_of(np.zeros(1, complex))
