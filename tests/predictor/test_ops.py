"""The ops that turn a request's keys into what a program takes."""

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_shard import OneShard

from cube.errors import BadConfig, BadRequest, DeadlineExceeded, Internal
from cube.version import Version
from predictor.ops.gather import Gather, found_of, rows_of
from predictor.ops.infer import Infer
from predictor.ops.op import Batch, Port, Ragged
from predictor.ops.pool import Pool, pool
from trainer_tools.manifest import Lookup, Slot, Tensor

LOOKUP = Lookup(
    keys="keys",
    text="text",
    lengths="lengths",
    slots=[Slot("A", 1), Slot("B", 26), Slot("C", 7)],
    table="t",
    pooling="mean",
    feed="pooled",
)
SAID = {"text": "t", "slots": [Slot("A", 1)], "table": "t", "pooling": "none", "feed": "f"}


def batch(rows, deadline=None, **values):
    made = Batch(values)
    made.rows, made.deadline = rows, deadline
    return made


def ragged(values, *lengths):
    return Ragged(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


bags = st.lists(st.lists(st.integers(-3, 3), max_size=4), min_size=1, max_size=8)


@given(bags, st.sampled_from(["mean", "sum", "max"]), st.integers(1, 5))
def test_pooling_agrees_with_torch_to_the_bit(bags, mode, dim):
    rng = np.random.default_rng(0)
    count = sum(map(len, bags))
    rows = rng.standard_normal((count, dim), dtype=np.float32)
    offsets = np.concatenate([[0], np.cumsum([len(b) for b in bags])]).astype(np.int64)
    each = torch.arange(count)
    want = torch.nn.functional.embedding_bag(
        each, torch.from_numpy(rows), torch.from_numpy(offsets), mode=mode, include_last_offset=True
    )
    assert pool(rows, offsets, mode).tobytes() == want.numpy().tobytes()


def test_pooling_takes_the_largest_and_nan_wins():
    rows = np.array([[1, np.nan], [3, 2], [-5, -6]], np.float32)
    made = pool(rows, np.array([0, 2, 2, 3]), "max")
    np.testing.assert_array_equal(made, np.array([[3, np.nan], [0, 0], [-5, -6]], np.float32))


def test_pooling_by_the_square_root_of_the_length():
    rows = np.array([[2, 4], [4, 0], [3, 3]], np.float32)
    made = pool(rows, np.array([0, 2, 2, 3]), "sqrtn")
    np.testing.assert_allclose(made, [[6 / 2**0.5, 4 / 2**0.5], [0, 0], [3, 3]], rtol=1e-6)
    sums = Lookup(**SAID | {"pooling": "sum"}, keys="k", lengths="n")
    op = Pool([sums], {"t": 2}, mode="sqrtn")
    np.testing.assert_array_equal(op.run(batch(3, **{"f rows": ragged(rows, 2, 0, 1)}))["f"], made)


def test_padding_reads_zeros_whatever_the_table_holds():
    rows = np.ones((4, 2), np.float32)
    keys = np.array([1, 9, 9, 2], np.uint64)
    in_bags = Lookup(**SAID, keys="k", lengths="n", feed_shape=[-1, 2, 2], padding=9)
    as_they_are = Lookup(**SAID, keys="k", lengths=None, feed_shape=[-1, 2, 2], padding=9)
    given = {"f rows": ragged(rows, 2, 2), "k": ragged(keys, 2, 2)}
    flat = {"f rows": rows.reshape(2, 2, 2), "k": keys.reshape(2, 2)}
    for lookup, values in ((in_bags, given), (as_they_are, flat)):
        made = Pool([lookup], {"t": 2}).run(batch(2, **values))["f"]
        np.testing.assert_array_equal(made[..., 0], [[1, 0], [0, 1]])


def test_a_missing_row_may_be_a_failure():
    gather = Gather([LOOKUP], {"t": (Version(1), 2)}, OneShard(is_here=True), 0.5, "fail")
    with pytest.raises(BadRequest, match="input 'keys' keys: found 1 without a row, such as 0, expected keys"):
        gather.run(batch(1, **KEYS))


def test_weights_multiply_rows_before_they_are_added():
    rng = np.random.default_rng(1)
    rows, weights = rng.standard_normal((6, 3), np.float32), rng.standard_normal(6, np.float32)
    offsets = np.array([0, 2, 2, 6])
    want = torch.nn.functional.embedding_bag(
        torch.arange(6), torch.from_numpy(rows), torch.from_numpy(offsets), mode="sum", include_last_offset=True,
        per_sample_weights=torch.from_numpy(weights),
    )  # fmt: skip
    np.testing.assert_allclose(pool(rows, offsets, "sum", weights), want, rtol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_padding_is_as_if_it_were_not_there(mode):
    lookup = Lookup(keys="k", text="t", lengths="n", slots=[Slot("A", 1)], table="t", pooling=mode, feed="f", padding=9)
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    keys = np.array([9, 1, 9, 2, 9], np.uint64)
    values = {"f rows": ragged(rows, 2, 2, 1), "k": ragged(keys, 2, 2, 1)}
    made = Pool([lookup], {"t": 2}).run(batch(3, **values))["f"]
    np.testing.assert_array_equal(made, [[2, 3], [6, 7], [0, 0]])


@pytest.mark.parametrize("datatype", ["FP32", "FP16"])
def test_rows_that_the_program_pools_itself_keep_their_shape(datatype):
    in_bags = Lookup(**SAID, keys="k", lengths="n", feed_shape=[-1, 2, 2])
    as_they_are = Lookup(**SAID, keys="k", lengths=None, feed_shape=[-1, 2, 2])
    rows = np.arange(8, dtype=np.float32)
    for lookup, made_rows in ((in_bags, ragged(rows.reshape(4, 2), 2, 2)), (as_they_are, rows.reshape(2, 2, 2))):
        op = Pool([lookup], {"t": 2}, {"f": datatype})
        made = op.run(batch(2, **{"f rows": made_rows}))["f"]
        np.testing.assert_array_equal(made, rows.reshape(2, 2, 2))
        assert op.bind({})["f"].misfit(made, 2) == ""


def test_keys_in_a_shape_get_rows_and_marks_in_that_shape():
    lookup = Lookup(**SAID, keys="k", lengths=None, feed_shape=[-1, 3, 2])
    gather = Gather([lookup], {"t": (Version(1), 2)}, OneShard(is_here=True), 0.5)
    made = gather.run(batch(2, k=np.array([[0, 1, 2], [3, 0, 0]], np.uint64)))
    assert made[found_of(lookup)].tolist() == [[False, True, True], [True, False, False]]
    assert {name: port.misfit(made[name], 2) for name, port in gather.bind({}).items()} == dict.fromkeys(made, "")


def test_sequences_of_rows_stay_sequences():
    lookup = Lookup(
        keys="k", text="t", lengths="n", slots=[Slot("A", 1)], table="t", pooling="none", feed="f", lod_level=1
    )
    op = Pool([lookup], {"t": 2})
    made = op.run(batch(2, **{"f rows": ragged(np.zeros((3, 2), np.float32), 1, 2)}))["f"]
    assert made.offsets.tolist() == [0, 1, 3]
    assert op.bind({})["f"].misfit(made, 2) == ""


KEYS = {"keys": ragged(np.array([0, 3], np.uint64), 1, 0, 1)}


def test_gather_pins_the_version_and_passes_the_time_left():
    cube = OneShard()
    gather = Gather([LOOKUP], {"t": (Version(7, 2), 2)}, cube, timeout_s=0.5)
    made = asyncio.run(gather.run(batch(1, **KEYS)))
    assert cube.asked == [("t", Version(7, 2), 0.5)]
    assert made[rows_of(LOOKUP)].values.shape == (2, 2)
    assert made[found_of(LOOKUP)].values.tolist() == [False, True]
    assert {name: port.misfit(made[name], 1) for name, port in gather.bind({}).items()} == dict.fromkeys(made, "")


def test_gather_waits_for_nothing_where_rows_are_here():
    cube = OneShard(is_here=True)
    made = Gather([LOOKUP], {"t": (Version(1), 2)}, cube, 0.5).run(batch(1, **KEYS))
    assert made[found_of(LOOKUP)].values.tolist() == [False, True]
    assert not cube.asked


def test_gather_asks_nobody_after_the_deadline():
    cube = OneShard()
    with pytest.raises(DeadlineExceeded):
        asyncio.run(Gather([LOOKUP], {"t": (Version(1), 2)}, cube, 0.5).run(batch(1, 0.0, **KEYS)))
    assert not cube.asked


class Doubler:
    """An engine: y is twice x."""

    platform, lod_levels = "test", {}
    inputs, outputs = [Tensor("x", "FP32", [-1, 2])], [Tensor("y", "FP32", [-1, 2])]

    def __init__(self):
        self.sizes = []

    def run(self, feeds):
        self.sizes.append(len(feeds[0]))
        return [2 * feeds[0]]

    def close(self):
        pass


def test_a_large_batch_is_run_as_parts_by_threads():
    engine = Doubler()
    op = Infer(engine, threads=2, part_rows=3)
    op.bind({"x": Port("FP32", (-1, 2))})
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    np.testing.assert_array_equal(op.run(batch(7, x=x))["y"], 2 * x)
    assert sorted(engine.sizes) == [1, 3, 3]
    op.close()


@pytest.mark.parametrize(
    ("policy", "expected"), [("pass", [np.nan, 4, np.inf]), ("replace", [0, 4, 0]), ("fail", None)]
)
def test_what_becomes_of_outputs_that_are_no_numbers(policy, expected):
    op = Infer(Doubler(), nan=policy)
    op.bind({"x": Port("FP32", (-1, 2))})
    given = batch(3, x=np.array([[np.nan, 0], [2, 0], [np.inf, 0]], np.float32))
    if expected is None:
        with pytest.raises(Internal, match=r"output 'y'\[0, 0\]: found nan, expected a number"):
            op.run(given)
    else:
        np.testing.assert_array_equal(op.run(given)["y"][:, 0], np.array(expected, np.float32))


class Marks(Doubler):
    """A tagger of one sentence: a mark for each of its words."""

    inputs, outputs = [Tensor("x", "FP32", [1, -1])], [Tensor("y", "FP32", [-1])]

    def run(self, feeds):
        return [2 * feeds[0][0]]


def test_what_a_fixed_number_of_rows_makes_may_have_any_size():
    op = Infer(Marks())
    (port,) = op.bind({"x": Port("FP32", (1, -1))}).values()
    made = op.run(batch(1, x=np.ones((1, 5), np.float32)))["y"]
    assert (made.shape, port.misfit(made, 1), port.goes_by_rows, str(port)) == ((5,), "", False, "FP32 [-1]")
    assert port.misfit(made[:, None], 1) == "shape [5, 1]"
    assert Infer(Doubler()).bind({"x": Port("FP32", (-1, 2))})["y"].misfit(np.ones((5, 2), np.float32), 1) != ""


@pytest.mark.parametrize(
    ("port", "message"),
    [
        (Port("FP64", (-1, 2)), "input 'x': found FP64"),
        (Port("FP32", (-1, 3)), r"found FP32 \[-1, 3\], expected FP32 \[-1, 2\]"),
        (Port("FP32", (-1, 2), ragged=True), "found ragged FP32"),
    ],
)
def test_a_net_refuses_what_it_does_not_take(port, message):
    with pytest.raises(BadConfig, match=message):
        Infer(Doubler()).bind({"x": port})
