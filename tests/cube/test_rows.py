"""Row formats: what is coded is what is decoded, within each format's bound."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cube.errors import BadData, BadRequest
from cube.rows import RowFormat, check_offsets, decode, not_finite, pool

ANY_F32 = st.floats(width=32)
NORMAL = st.floats(-60000, 60000, width=32)


def rows_of(elements):
    return st.tuples(st.integers(0, 5), st.integers(1, 40)).flatmap(
        lambda shape: arrays(np.float32, shape, elements=elements)
    )


def decoded(row_format, raw, dim):
    out = np.empty((len(raw), dim), np.float32)
    decode(row_format, raw, out)
    return out


def slowly_decoded(row_format, raw):
    """What rows.py's docstring says, in numpy."""
    if row_format is RowFormat.F32:
        return raw.view(np.float32)
    if row_format is RowFormat.F16:
        return raw.view(np.float16).astype(np.float32)
    if row_format is RowFormat.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    parameters = np.ascontiguousarray(raw[:, :8]).view(np.float32)
    return raw[:, 8:].astype(np.float32) * parameters[:, :1] + parameters[:, 1:]


@pytest.mark.parametrize("row_format", RowFormat)
@given(rows=rows_of(NORMAL))
def test_the_kernels_decode_as_numpy_does_to_the_bit(row_format, rows):
    raw = row_format.encode(rows)
    assert raw.shape == (len(rows), row_format.row_bytes(rows.shape[1]))
    assert decoded(row_format, raw, rows.shape[1]).tobytes() == slowly_decoded(row_format, raw).tobytes()


@given(rows=rows_of(ANY_F32))
def test_f32_keeps_every_bit(rows):
    assert decoded(RowFormat.F32, RowFormat.F32.encode(rows), rows.shape[1]).tobytes() == rows.tobytes()


def test_every_f16_decodes_as_numpy_does():
    halves = np.arange(65536, dtype=np.uint16).reshape(-1, 16)
    got = decoded(RowFormat.F16, halves.view(np.uint8), 16)
    with np.errstate(invalid="ignore"):
        want = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(got, want, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(want))


@given(rows=rows_of(NORMAL))
def test_f16_and_bf16_are_off_by_at_most_half_of_the_last_place(rows):
    for row_format, bits, least in ((RowFormat.F16, 11, 2.0**-25), (RowFormat.BF16, 8, 2.0**-134)):
        got = decoded(row_format, row_format.encode(rows), rows.shape[1]).astype(np.float64)
        assert (np.abs(got - rows) <= np.maximum(np.abs(rows.astype(np.float64)) * 2.0**-bits, least)).all()


@given(rows=rows_of(st.floats(-1e6, 1e6, width=32)))
def test_i8_is_off_by_at_most_half_a_step(rows):
    got = decoded(RowFormat.I8, RowFormat.I8.encode(rows), rows.shape[1]).astype(np.float64)
    exact = rows.astype(np.float64)
    step = (exact.max(axis=1) - exact.min(axis=1)) / 255 if len(rows) else np.empty(0)
    rounding = 4 * np.spacing(np.abs(rows).max(axis=1)).astype(np.float64) if len(rows) else np.empty(0)
    assert (np.abs(got - exact) <= (step * 0.5 + rounding)[:, None]).all()


def test_a_constant_row_is_exact_in_i8():
    rows = np.array([[0.1] * 5, [0.0] * 5, [-3e38] * 5], np.float32)
    assert np.array_equal(decoded(RowFormat.I8, RowFormat.I8.encode(rows), 5), rows)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_throughout_in_i8_and_its_neighbours_are_not_hurt(odd):
    rows = np.array([[1, 2, 3], [1, odd, 3], [4, 5, 6]], np.float32)
    got = decoded(RowFormat.I8, RowFormat.I8.encode(rows), 3)
    assert np.isnan(got).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert not_finite(RowFormat.I8, RowFormat.I8.encode(rows), 3) == 1


@pytest.mark.parametrize("row_format", [RowFormat.F32, RowFormat.F16, RowFormat.BF16])
def test_nan_and_infinities_are_kept(row_format):
    rows = np.array([[np.nan, np.inf], [-np.inf, 1]], np.float32)
    raw = row_format.encode(rows)
    assert np.array_equal(decoded(row_format, raw, 2), rows, equal_nan=True)
    assert not_finite(row_format, raw, 2) == 2


@pytest.mark.parametrize(
    ("row_format", "row", "message"),
    [
        (RowFormat.F16, [1.0, 65520.0], "row 1 element 1: found 65520.0, expected a number within the range of f16"),
        (RowFormat.BF16, [1.0, 3.4e38], "row 1 element 1: found 3.*e.38, expected a number within the range of bf16"),
        (
            RowFormat.I8,
            [-3e38, 3e38],
            "row 1: found elements from -3.0.*e.38 to 3.0.*e.38, expected a spread that float32",
        ),
    ],
)
def test_numbers_that_a_format_cannot_hold_are_refused(row_format, row, message):
    with pytest.raises(BadData, match=message):
        row_format.encode(np.array([[0.0, 0.0], row], np.float32))


def test_an_unknown_format_is_named_with_those_there_are():
    with pytest.raises(BadData, match="row format: found 'int4', expected f32 or f16 or bf16 or i8"):
        RowFormat.parse("int4")


@pytest.mark.parametrize("row_format", RowFormat)
@given(rows=rows_of(NORMAL), sizes=st.lists(st.integers(0, 4), max_size=8), mean=st.booleans())
def test_pooling_adds_from_left_to_right(row_format, rows, sizes, mean):
    offsets = np.minimum(np.concatenate([[0], np.cumsum(sizes)]), len(rows)).astype(np.int64)
    raw = row_format.encode(rows)
    got, one_by_one = np.full((len(sizes), rows.shape[1]), np.nan, np.float32), slowly_decoded(row_format, raw)
    pool(row_format, raw, offsets, mean, got)
    for bag, (first, last) in enumerate(itertools.pairwise(offsets)):
        want = np.zeros(rows.shape[1], np.float32)
        for row in one_by_one[first:last]:
            want += row
        if mean and last - first > 1:
            want /= np.float32(last - first)
        assert np.array_equal(got[bag], want)


@pytest.mark.parametrize("offsets", [[], [1, 2], [0, 1], [0, 3, 2], [0, 3]])
def test_offsets_that_do_not_fit_are_refused(offsets):
    with pytest.raises(BadRequest, match="bags: found int64 offsets"):
        check_offsets("bags", np.array(offsets, np.int64), 2)


@pytest.mark.parametrize(
    "offsets",
    [
        np.array([0, 10**12, 2], np.uint64),
        np.array([0, 2**63 - 1, -(2**63), -(2**62), 2]),
        np.array([0, 2], np.int32),
        np.zeros((1, 2), np.int64),
    ],
)
def test_offsets_whose_differences_do_not_tell_are_refused(offsets):
    with pytest.raises(BadRequest, match=r"bags: found .* offsets"):
        check_offsets("bags", offsets, 2)
