"""The fast reader of JSON numbers reads what a general parser reads, bit for bit, or leaves it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.doors.json_numbers import read
from predictor.tensors import DTYPES


def slowly(datatype, shape, text):
    """Its twin; None for what is no list of such numbers in this shape."""
    try:
        nested = json.loads(text)
        values = np.array(nested, object)
        if values.shape not in (tuple(shape), (int(np.prod(shape)),)):
            return None
        kinds = {int, float} if datatype == "FP32" else {int}
        if {type(value) for value in values.ravel()} - kinds:
            return None
        if datatype == "FP32":
            with np.errstate(over="ignore"):
                return values.astype(np.float64).astype(np.float32).reshape(shape)
        return np.array(nested, DTYPES[datatype]).reshape(shape)
    except (ValueError, OverflowError):
        return None


def same(fast, slow):
    return slow is not None and fast.dtype == slow.dtype and fast.tobytes() == slow.tobytes()


NUMBERS = st.one_of(
    st.integers(-(2**65), 2**65).map(str),
    st.integers(-300, 300).map(str),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.from_regex(r"-?[0-9]{0,21}(\.[0-9]{0,21})?([eE][+-]?[0-9]{0,3})?", fullmatch=True),
)


@settings(max_examples=300)
@given(st.sampled_from(["FP32", "INT64", "UINT64", "INT8", "UINT16"]), st.data())
def test_what_is_read_fast_is_what_a_parser_reads(datatype, data):
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    numbers = data.draw(st.lists(NUMBERS, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    if data.draw(st.booleans()):
        text = "[" + data.draw(st.sampled_from([",", " ,\n"])).join(numbers) + "]"
    else:
        text = str(np.array(numbers, object).reshape(shape).tolist()).replace("'", "")
    text += data.draw(st.sampled_from(["", "", "", " \t", "]", ",", "x"]))
    fast = read(datatype, shape, text.encode())
    assert fast is None or same(fast, slowly(datatype, shape, text)), text


@given(st.integers(0, 0x7F7FFFFE), st.integers(-3, 3))
def test_a_number_between_two_float32_becomes_the_right_one(bits, steps):
    below = np.array(bits, np.uint32).view(np.float32)[()]
    middle = (np.float64(below) + np.float64(np.nextafter(below, np.float32(np.inf)))) / 2
    for _ in range(abs(steps)):
        middle = np.nextafter(middle, np.inf * steps)
    text = json.dumps([float(middle)])
    fast = read("FP32", [1], text.encode())
    assert fast is None or same(fast, slowly("FP32", [1], text))


@given(st.text("[],0123456789-. ", max_size=24))
def test_what_is_no_list_of_numbers_is_left(text):
    for shape in ([1], [2], [2, 1], [1, 2], [2, 2]):
        for datatype in ("FP32", "INT32"):
            fast = read(datatype, shape, text.encode())
            assert fast is None or same(fast, slowly(datatype, shape, text)), text


@pytest.mark.parametrize(
    "text", ["[01]", "[-]", "[1.]", "[.5]", "[+1]", "[1e]", "[1 2]", "[1,]", "[,1]", "[1]]", "1", "[", ""]
)
def test_what_is_no_json_is_left(text):
    assert read("FP32", [1], text.encode()) is None
    assert read("INT64", [1], text.encode()) is None


def test_usual_numbers_are_all_read_fast():
    rng = np.random.default_rng(0)
    for value, datatype in (
        (rng.standard_normal((50, 13)).astype(np.float32), "FP32"),
        (rng.integers(0, 2**64, (50, 26), np.uint64), "UINT64"),
        (rng.integers(-(2**31), 2**31, (7, 2, 3)).astype(np.int32), "INT32"),
        (np.array([0.0, -0.0, 1e-9, 1e30], np.float32), "FP32"),
        (np.array([-(2**63), 2**63 - 1]), "INT64"),
    ):
        for nested in (value, value.ravel()):
            assert same(read(datatype, value.shape, json.dumps(nested.tolist()).encode()), value)
