"""Parts and unions of values along rows: joined parts are the whole, chosen rows are those rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.ops.op import Port, Ragged
from predictor.rows import blank, copied, frozen, join_rows, put_rows, slice_rows, take_rows
from predictor.tensors import Texts, texts


def elements(port, count, rng):
    """A flat value with so many entries."""
    shape = (count, *(abs(size) for size in port.shape[1:]))
    if port.datatype == "BYTES":
        size = int(np.prod(shape))
        return texts([bytes(rng.integers(65, 91, rng.integers(0, 4), np.uint8)) for _ in range(size)], shape)
    return rng.integers(0, 100, shape).astype({"FP32": "f4", "INT64": "i8"}[port.datatype])


def value_of(port, rows, seed=0):
    rng = np.random.default_rng(seed)
    if not port.ragged:
        return elements(port, rows * port.per_row, rng)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 4, rows * port.per_row))]).astype(np.int64)
    return Ragged(elements(port, int(offsets[-1]), rng), offsets)


def listed(value, port, rows):
    """A value as Python has it: a list with the entries of each row."""
    if isinstance(value, Ragged):
        flat = listed(value.values, Port(port.datatype, port.shape), int(value.offsets[-1]))
        bags = [flat[a:b] for a, b in zip(value.offsets[:-1], value.offsets[1:], strict=True)]
        return [bags[i * port.per_row : (i + 1) * port.per_row] for i in range(rows)]
    if isinstance(value, Texts):
        each = [bytes(value.data[s : s + n]) for s, n in zip(value.starts, value.sizes, strict=True)]
        width = len(each) // value.shape[0] if value.shape[0] else 0
        flat = [each[i * width : (i + 1) * width] for i in range(value.shape[0])]
    else:
        flat = value.tolist()
    return [flat[i * port.per_row : (i + 1) * port.per_row] for i in range(rows)]


PORTS = st.builds(
    Port,
    st.sampled_from(["FP32", "INT64", "BYTES"]),
    st.sampled_from([(-1,), (-1, 2), (-1, 2, 1)]),
    ragged=st.booleans(),
    per_row=st.integers(1, 3),
)


@given(PORTS, st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 99))
def test_parts_joined_are_the_whole(port, sizes, seed):
    rows = sum(sizes)
    value = value_of(port, rows, seed)
    ends = np.cumsum(sizes).tolist()
    parts = [slice_rows(value, port, end - size, end) for size, end in zip(sizes, ends, strict=True)]
    whole = listed(value, port, rows)
    for part, size, end in zip(parts, sizes, ends, strict=True):
        assert port.misfit(part, size) == ""
        assert listed(part, port, size) == whole[end - size : end]
    joined = join_rows(parts, port)
    assert port.misfit(joined, rows) == ""
    assert listed(joined, port, rows) == whole


@given(PORTS, st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 99))
def test_chosen_rows_come_and_go(port, chosen, seed):
    rows, marks = len(chosen), np.array(chosen)
    value = value_of(port, rows, seed)
    whole = listed(value, port, rows)
    taken = take_rows(value, port, marks)
    assert listed(taken, port, sum(chosen)) == [row for row, is_chosen in zip(whole, chosen, strict=True) if is_chosen]
    if not any(chosen):
        return
    put = put_rows(taken, port, marks, rows)
    assert port.misfit(put, rows) == ""
    nothing = listed(blank(port, rows), port, rows)
    expected = [row if is_chosen else none for row, none, is_chosen in zip(whole, nothing, chosen, strict=True)]
    assert listed(put, port, rows) == expected


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_a_frozen_value_cannot_be_changed_and_a_copy_can(ragged, datatype):
    port = Port(datatype, (-1, 2), ragged=ragged)
    value = value_of(port, 3)
    for made, may_change in ((frozen(value), False), (copied(frozen(value)), True)):
        assert listed(made, port, 3) == listed(value, port, 3)
        inner = made.values if ragged else made
        array = inner.data if datatype == "BYTES" else inner
        assert array.flags.writeable is may_change
    inner = value.values if ragged else value
    assert datatype == "BYTES" or inner.flags.writeable  # what it was made of stays as it was


def test_what_does_not_go_by_rows_is_everybodys():
    port, value = Port("FP32", (3,)), np.arange(3, dtype=np.float32)
    assert slice_rows(value, port, 0, 1) is value
    assert join_rows([value, value], port) is value
