"""The ops: what a request may hold, what becomes of it."""

import asyncio
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDEN

from cube.client import Answer, Rows
from cube.errors import BadConfig, BadRequest, DeadlineExceeded
from cube.rpc.calls import Call
from cube.version import Version
from predictor.ops.gather import Gather, found_of, rows_of
from predictor.ops.pool import pool
from predictor.ops.read import SAMPLES, Read, offsets_of
from predictor.ops.sign import Sign, signed
from predictor.tensors import texts
from predictor.workflow import stages
from trainer_tools.manifest import Lookup, Slot, Tensor

CALL = Call("/test", {}, None)
LOOKUP = Lookup(
    keys="keys",
    text="text",
    lengths="lengths",
    slots=[Slot("A", 1), Slot("B", 26), Slot("C", 7)],
    table="t",
    pooling="mean",
    feed="pooled",
)
READ = Read([Tensor("dense", "FP32", [-1, 2])], [LOOKUP], max_samples=100, max_keys=1000, finite=True)


def request(**changes):
    """Two samples of 2 dense numbers and 3 slots with 1, 2, 0 and 1, 0, 1 keys."""
    values = {
        "dense": np.zeros((2, 2), np.float32),
        "keys": np.arange(5, dtype=np.uint64),
        "lengths": np.array([[1, 2, 0], [1, 0, 1]], np.int32),
    }
    return {name: value for name, value in (values | changes).items() if value is not None}


def test_a_good_request_becomes_offsets_and_a_count():
    made = READ.run(request(), CALL)
    assert made[SAMPLES] == 2
    assert made[offsets_of(LOOKUP)].tolist() == [0, 1, 3, 3, 4, 4, 5]


nan, inf = np.array([[0, 0], [0, np.nan]], np.float32), np.array([[np.inf, 0], [0, 0]], np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": None}, r"input 'dense': found nothing, expected FP32 \[-1, 2\]"),
        ({"lengths": None}, r"input 'lengths': found nothing, expected INT32 \[-1, 3\]"),
        ({"keys": None}, "inputs 'keys' and 'text': found neither"),
        ({"text": texts([b"x"] * 5)}, "inputs 'keys' and 'text': found both"),
        ({"more": np.zeros(1)}, "input 'more': found a name the model does not take"),
        ({"dense": np.zeros((2, 2))}, "input 'dense' datatype: found FP64, expected FP32"),
        ({"dense": np.zeros((2, 2), np.int32)}, "input 'dense' datatype: found INT32, expected FP32"),
        ({"keys": np.arange(5)}, "input 'keys' datatype: found INT64, expected UINT64"),
        ({"lengths": np.ones((2, 3), np.int64)}, "input 'lengths' datatype: found INT64, expected INT32"),
        ({"dense": np.zeros((2, 3), np.float32)}, r"input 'dense' shape: found \[2, 3\], expected \[-1, 2\]"),
        ({"dense": np.zeros(4, np.float32)}, r"input 'dense' shape: found \[4\]"),
        ({"lengths": np.ones((2, 4), np.int32)}, r"found \[2, 4\], expected \[-1, 3\]: the model has 3 slots"),
        ({"lengths": np.ones(6, np.int32)}, r"input 'lengths' shape: found \[6\]"),
        ({"lengths": np.array([[1, 2, 0], [3, -2, 1]], np.int32)}, "input 'lengths': found a length of -2"),
        (
            {"keys": np.arange(4, dtype=np.uint64)},
            r"input 'keys' shape: found \[4\], expected \[5\]: the sum of 'lengths'",
        ),
        ({"keys": np.zeros((1, 5), np.uint64)}, r"input 'keys' shape: found \[1, 5\]"),
        ({"dense": np.zeros((3, 2), np.float32)}, "samples: found 3 in 'dense', 2 in 'lengths'"),
        ({"dense": nan}, r"input 'dense'\[1, 1\]: found nan, expected a finite number"),
        ({"dense": inf}, r"input 'dense'\[0, 0\]: found inf"),
        (
            {"dense": nan[:0], "lengths": np.ones((0, 3), np.int32), "keys": np.zeros(0, np.uint64)},
            "request: found 0 samples, expected 1 to 100",
        ),
        (
            {
                "dense": np.zeros((101, 2), np.float32),
                "lengths": np.zeros((101, 3), np.int32),
                "keys": np.zeros(0, np.uint64),
            },
            "request: found 101 samples, expected 1 to 100",
        ),
    ],
)
def test_a_wrong_request_is_refused_by_name(changes, message):
    with pytest.raises(BadRequest, match=message):
        READ.run(request(**changes), CALL)


def test_too_many_keys_are_refused_before_any_is_looked_at():
    many = np.zeros(1001, np.uint64)
    with pytest.raises(BadRequest, match="request: found 1001 keys, expected at most 1000"):
        READ.run(
            request(dense=np.zeros((1, 2), np.float32), keys=many, lengths=np.array([[1001, 0, 0]], np.int32)), CALL
        )


def test_a_lookup_may_have_a_single_slot():
    one = Lookup(keys="k", text="t", lengths="n", slots=[Slot("A", 1)], table="t", pooling="sum", feed="f")
    read = Read([], [one], max_samples=9, max_keys=9, finite=True)
    made = read.run({"k": np.zeros(3, np.uint64), "n": np.array([[1], [2]], np.int32)}, CALL)
    assert made[SAMPLES] == 2


def test_a_dense_program_may_take_infinities():
    read = Read([Tensor("x", "FP32", [-1])], [], max_samples=9, max_keys=0, finite=False)
    assert read.run({"x": inf[0]}, CALL)[SAMPLES] == 2


def test_texts_are_signed_with_the_number_of_their_slot():
    vectors = {(c["slot"], c["text"]): c["key"] for c in json.loads((GOLDEN / "signs.json").read_text())["signs"]}
    cases = [(1, "68fd1e64"), (26, "9727dd16"), (7, "0123456789abcdef0123456789abcdef"), (1, ""), (1, "68fd1e64")]
    lengths = np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0]], np.int32)
    given_texts = texts([text.encode() for _, text in cases])
    values = READ.run(request(dense=np.zeros((3, 2), np.float32), keys=None, text=given_texts, lengths=lengths), CALL)
    made = Sign(LOOKUP).run(values, CALL)
    assert made[signed(LOOKUP)].tolist() == [vectors[case] for case in cases]


def test_keys_pass_through_signing():
    values = READ.run(request(), CALL)
    assert Sign(LOOKUP).run(values, CALL)[signed(LOOKUP)].tolist() == [0, 1, 2, 3, 4]


bags = st.lists(st.lists(st.integers(-3, 3), max_size=4), min_size=1, max_size=8)


@given(bags, st.sampled_from(["mean", "sum"]), st.integers(1, 5))
def test_pooling_agrees_with_torch_to_the_bit(bags, mode, dim):
    rng = np.random.default_rng(0)
    count = sum(map(len, bags))
    rows = rng.standard_normal((count, dim), dtype=np.float32)
    offsets = np.concatenate([[0], np.cumsum([len(b) for b in bags])]).astype(np.int64)
    each = torch.arange(count)
    want = torch.nn.functional.embedding_bag(
        each, torch.from_numpy(rows), torch.from_numpy(offsets), mode=mode, include_last_offset=True
    )
    assert pool(rows, offsets, mode == "mean").tobytes() == want.numpy().tobytes()


class OneShard:
    """A cube that remembers what it was asked."""

    def __init__(self):
        self.asked = []

    async def lookup(self, asks, timeout_s, *, partial=False):
        self.asked += [(table, version, timeout_s) for table, _, version in asks]
        return Answer([Rows(np.ones((keys.size, 2), np.float32), keys != 0, version) for _, keys, version in asks], {})


def test_gather_pins_the_version_and_passes_the_time_left():
    cube = OneShard()
    gather = Gather([LOOKUP], {"t": Version(7, 2)}, cube, timeout_s=0.5)
    made = asyncio.run(gather.run({signed(LOOKUP): np.array([0, 3], np.uint64)}, CALL))
    assert cube.asked == [("t", Version(7, 2), 0.5)]
    assert made[rows_of(LOOKUP)].shape == (2, 2)
    assert made[found_of(LOOKUP)].tolist() == [False, True]


def test_gather_asks_nobody_after_the_deadline():
    cube = OneShard()
    with pytest.raises(DeadlineExceeded):
        asyncio.run(
            Gather([LOOKUP], {"t": Version(1)}, cube, 0.5).run(
                {signed(LOOKUP): np.zeros(1, np.uint64)}, Call("/x", {}, 0.0)
            )
        )
    assert not cube.asked


class Step:
    """An op for ordering."""

    def __init__(self, takes, makes, compute=False):
        self.takes, self.makes, self.compute = tuple(takes.split()), tuple(makes.split()), compute


def test_ops_run_after_those_that_make_what_they_take():
    read, a, b, net = Step("", "x"), Step("x", "a"), Step("a", "b", compute=True), Step("a b", "y", compute=True)
    (first, second) = stages([net, b, a, read], ["y"])
    assert first.ops == (read, a)
    assert second.ops == (b, net)
    assert second.compute


@pytest.mark.parametrize(
    ("ops", "wanted", "message"),
    [
        ([Step("", "x"), Step("", "x")], "x", "value 'x': found step and step, which both make it"),
        ([Step("", "x"), Step("z", "y")], "y", "value 'z', which step takes: found no op that makes it"),
        ([Step("", "x")], "y", "value 'y', which the reply takes: found no op that makes it"),
        ([Step("b", "a"), Step("a", "b")], "a", "workflow: found a cycle among step, step"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(ops, wanted, message):
    with pytest.raises(BadConfig, match=message):
        stages(ops, [wanted])
