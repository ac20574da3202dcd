"""From a request to a program's inputs, and how far two outputs are apart: against slow twins."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trainer_tools import feeding, manifest
from trainer_tools.pruning import TOLERANCE, Difference, difference
from trainer_tools.torch_proof import pool

DIM, PADDING = 2, 5
KEYS = st.integers(0, 9)


def rows_of(table, keys):
    """Key k reads [k, -k]; from 8 on keys are absent."""
    known = np.where(keys < 8, keys, 0).astype(np.float32)
    return np.stack([known, -known], 1)


def made_of(pooling, weights=None, padding=None, slots=2):
    """A manifest of one dense input and one lookup."""
    lookup = manifest.Lookup(
        keys="keys",
        text="text",
        lengths=None if pooling == "none" else "lengths",
        slots=[manifest.Slot(str(number), number) for number in range(slots)],
        table="t",
        pooling=pooling,
        weights=weights,
        feed="rows",
        feed_shape=[-1, slots, DIM] if pooling == "none" else None,
        padding=padding,
    )
    return manifest.Manifest(
        schema=1, name="m", version=1, program=manifest.Program("p", "torch.export", ""), sign="none",
        inputs=[manifest.Tensor("x", "FP32", [-1])], lookups=[lookup], tables={}, outputs=[], cube=None,
        source_sha256="", tool="",
    )  # fmt: skip


@st.composite
def bags(draw):
    """Keys and weights of two slots of some samples."""
    each = st.lists(st.tuples(KEYS, st.integers(-4, 4)), max_size=4)
    return draw(st.lists(st.tuples(each, each), min_size=1, max_size=5))


def request_of(samples):
    flat = [pair for sample in samples for slot in sample for pair in slot]
    return {
        "x": np.arange(len(samples), dtype=np.float32),
        "keys": np.array([key for key, _ in flat], np.uint64),
        "weights": np.array([weight for _, weight in flat], np.float32),
        "lengths": np.array([[len(slot) for slot in sample] for sample in samples], np.int32),
    }


def slow(samples, pooling, weighted, padding):
    """Bag by bag."""
    pooled = []
    for slot in (slot for sample in samples for slot in sample):
        kept = [
            np.float32(weight if weighted else 1) * rows_of("t", np.array([key]))[0]
            for key, weight in slot
            if key != padding
        ]
        reduce = {"sum": np.sum, "mean": np.mean, "max": np.max}[pooling]
        pooled.append(reduce(kept, axis=0) if kept else np.zeros(DIM))
    return np.array(pooled, np.float32)


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize(("pooling", "weights"), [("sum", None), ("mean", None), ("max", None), ("sum", "weights")])
@settings(max_examples=25)
@given(samples=bags(), size=st.integers(1, 6))
def test_bags_are_pooled_as_a_slow_twin_does_however_samples_are_split(pooling, weights, padding, samples, size):
    said = made_of(pooling, weights, padding)
    request = {name: array for name, array in request_of(samples).items() if weights or name != "weights"}
    parts = list(feeding.parts(said, request, size))
    assert sum(feeding.len_of(said, part) for part in parts) == len(samples)
    fed = [feeding.feeds(said, part, rows_of, pool) for part in parts]
    np.testing.assert_allclose(
        np.concatenate([feed["rows"] for feed in fed]), slow(samples, pooling, weights, padding), rtol=1e-6
    )
    assert np.array_equal(np.concatenate([feed["x"] for feed in fed]), request["x"])


@given(keys=arrays.arrays(np.uint64, st.tuples(st.integers(1, 5), st.just(2)), elements=KEYS))
def test_rows_that_are_not_pooled_come_in_the_shape_of_their_keys_and_padding_reads_zeros(keys):
    request = {"x": np.zeros(len(keys), np.float32), "keys": keys}
    fed = feeding.feeds(made_of("none", padding=PADDING), request, rows_of)["rows"]
    assert fed.shape == (*keys.shape, DIM)
    expected = [[rows_of("t", np.array([k]))[0] * (k != PADDING) for k in sample] for sample in keys]
    assert np.array_equal(fed, np.array(expected, np.float32))


FLOATS = st.floats(width=32) | st.floats(-1, 1, width=32)


@given(one=st.lists(FLOATS, min_size=1, max_size=4), steps=st.integers(0, 3), at=st.integers(0, 3))
def test_a_difference_is_counted_in_steps_between_neighbouring_numbers(one, steps, at):
    first = np.array(one, np.float32)
    second = first.copy()
    at %= len(one)
    for _ in range(steps):
        with np.errstate(over="ignore"):  # of the largest number
            second[at] = np.nextafter(second[at], np.float32(np.inf))
    found = difference(first, second)
    a, b = float(first[at]), float(second[at])
    if a == b or math.isnan(a):
        assert found == Difference()
    elif math.isinf(a) or math.isinf(b):
        assert found.largest == found.ulps == found.relative == math.inf
    else:
        assert found.largest == abs(a - b)
        assert steps / 2 <= found.ulps <= steps, "half as many, where a power of two lies between"
        assert found.relative == abs(a - b) / max(1, abs(a), abs(b)) <= TOLERANCE


@pytest.mark.parametrize(
    ("one", "other", "largest"),
    [
        (np.float32([1, np.nan]), np.float32([1, np.nan]), 0),
        (np.float32([1, np.nan]), np.float32([1, 2]), math.inf),
        (np.float32([np.inf]), np.float32([-np.inf]), math.inf),
        (np.float32([1]), np.float32([[1]]), math.inf),
        (np.float32([1]), np.float64([1]), math.inf),
        (np.int64([3, 7]), np.int64([3, 9]), 2),
        (np.array([True]), np.array([False]), 1),
        (np.float32([]), np.float32([]), 0),
    ],
)
def test_what_is_no_number_or_no_float_is_compared_too(one, other, largest):
    assert difference(one, other).largest == largest
