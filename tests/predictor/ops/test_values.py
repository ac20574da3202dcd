"""Ops that pass on, name, join and choose values."""

import asyncio
import itertools
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lone_op import bags, plain, ragged, run

from cube.errors import BadConfig, BadRequest
from predictor.executor import Executor
from predictor.ops.op import Op, Port, Ragged, port_of
from predictor.ops.values import Average, Cast, Choose, Concat, PassOn, Select
from predictor.tensors import texts
from predictor.workflow import Dependency, Node, plan

PROB = np.array([[0.1, 0.9], [0.7, 0.3]], np.float32)
FIXED = {"prob": Port("FP32", (-1, 2))}


def test_what_comes_is_passed_on():
    values = {"x": PROB, "words": ragged([[b"a"], []], bytes)}
    assert run(PassOn(), values, 2) == values


# ---- select ----


def test_values_are_selected_and_renamed():
    made = run(Select(["score=prob", "id"]), {"prob": PROB, "id": np.arange(2), "other": PROB}, 2)
    assert list(made) == ["score", "id"]
    assert made["score"] is PROB


@pytest.mark.parametrize(
    ("columns", "flat", "expected"),
    [
        ([1], False, [[0.9], [0.3]]),
        ([1], True, [0.9, 0.3]),
        ([-2], True, [0.1, 0.7]),
        ([1, 0, 1], False, [[0.9, 0.1, 0.9], [0.3, 0.7, 0.3]]),
    ],
)
def test_columns_are_taken_from_the_last_dimension(columns, flat, expected):
    made = run(Select(["prob"], columns=columns, flat=flat), {"prob": PROB}, 2, FIXED)
    assert np.array_equal(made["prob"], np.array(expected, np.float32))


def test_columns_of_texts_and_of_ragged_rows():
    words = texts([b"a", b"bb", b"", b"dd"], (2, 2))
    assert plain(run(Select(["w"], columns=[1]), {"w": words}, 2, {"w": Port("BYTES", (-1, 2))})["w"]) == [
        [b"bb"],
        [b"dd"],
    ]
    rows = Ragged(np.arange(6).reshape(3, 2), np.array([0, 1, 3]))
    made = run(Select(["r"], columns=[0], flat=True), {"r": rows}, 2, {"r": Port("INT64", (-1, 2), ragged=True)})
    assert plain(made["r"]) == [[0], [2, 4]]


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        ([], {}, "names: found none, expected at least one"),
        (["=x"], {}, "names: found '=x', expected NAME or NEW=NAME"),
        (["y="], {}, "names: found 'y='"),
        (["x", "x=y"], {}, "names: found 'x' twice"),
        (["x"], {"flat": True}, "flat: found 0 columns"),
        (["x"], {"columns": [2]}, "columns of 'x': found 2, expected -2 to 1"),
        (["open"], {"columns": [0]}, r"columns of 'open': found FP32 \[-1, -1\]"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(names, arguments, message):
    with pytest.raises(BadConfig, match=message):
        Select(names, **arguments).bind({"x": FIXED["prob"], "y": Port("FP32"), "open": Port("FP32", (-1, -1))})


# ---- concat ----


def test_arrays_are_joined_along_an_axis():
    left, right = np.arange(12).reshape(2, 2, 3), np.arange(4).reshape(2, 2, 1)
    ports = {"a": Port("INT64", (-1, 2, 3)), "b": Port("INT64", (-1, 2, 1))}
    op = Concat(["b", "a"], output="both")
    assert op.bind(ports) == {"both": Port("INT64", (-1, 2, 4))}
    assert np.array_equal(
        run(Concat(["b", "a"]), {"a": left, "b": right}, 2, ports)["joined"], np.concatenate([right, left], 2)
    )
    words = texts([b"a", b"b", b"c", b"d"], (2, 2)), texts([b"", b"ee"], (2, 1))
    ports = {"a": Port("BYTES", (-1, 2)), "b": Port("BYTES", (-1, 1))}
    made = run(Concat(axis=1), dict(zip("ab", words, strict=True)), 2, ports)
    assert plain(made["joined"]) == [[b"a", b"b", b""], [b"c", b"d", b"ee"]]


@given(st.integers(0, 4).flatmap(lambda n: st.lists(bags(st.integers(0, 9), n), min_size=1, max_size=4)), st.booleans())
def test_bags_are_joined_row_by_row(several, as_texts):
    if as_texts:
        several = [[[b"x" * n for n in bag] for bag in each] for each in several]
    values = {f"v{i}": ragged(each, bytes if as_texts else np.int32) for i, each in enumerate(several)}
    made = run(Concat(), values, len(several[0]))
    assert plain(made["joined"]) == [list(itertools.chain(*row)) for row in zip(*several, strict=True)]


def test_bags_of_vectors_are_joined():
    one = Ragged(np.arange(6).reshape(3, 2), np.array([0, 2, 3]))
    made = run(Concat(["x", "y"]), {"x": one, "y": one}, 2)["joined"]
    assert plain(made) == [[[0, 1], [2, 3], [0, 1], [2, 3]], [[4, 5], [4, 5]]]
    pairs = Ragged(texts([b"a", b"b", b"c", b"d"], (2, 2)), np.array([0, 2, 2]))
    made = run(Concat(["x", "y"]), {"x": pairs, "y": pairs}, 2)["joined"]
    assert plain(made) == [[[b"a", b"b"], [b"c", b"d"], [b"a", b"b"], [b"c", b"d"]], []]


@pytest.mark.parametrize(
    ("ports", "axis", "message"),
    [
        (
            {"a": Port("FP32", (-1, 2)), "b": Port("INT64", (-1, 2))},
            1,
            r"input 'b': found INT64 \[-1, 2\], expected FP32",
        ),
        ({"a": Port("FP32", (-1, 2)), "b": Port("FP32", (-1, 2, 1))}, 1, r"input 'b': found FP32 \[-1, 2, 1\]"),
        ({"a": Port("FP32", (-1, 2, 3)), "b": Port("FP32", (-1, 4, 3))}, 2, r"input 'b': found FP32 \[-1, 4, 3\]"),
        ({"a": Port("FP32", (-1, 2)), "b": Port("FP32", (-1, 2))}, 0, r"axis: found 0 of FP32 \[-1, 2\]"),
        ({"a": Port("FP32", (-1, 2)), "b": Port("FP32", (-1, 2))}, 2, "axis: found 2"),
        ({"a": Port("FP32"), "b": Port("FP32", ragged=True)}, 1, "input 'b': found ragged FP32"),
    ],
)
def test_values_that_do_not_go_together_are_refused(ports, axis, message):
    with pytest.raises(BadConfig, match=message):
        Concat(axis=axis).bind(ports)


def test_sizes_that_only_a_request_shows_are_its_senders_fault():
    values = {"a": np.ones((2, 3, 1), np.float32), "b": np.ones((2, 4, 1), np.float32)}
    with pytest.raises(BadRequest, match=r"sizes of value 'b': found \[2, 4\], expected \[2, 3\], as of 'a'"):
        run(Concat(), values, 2, dict.fromkeys("ab", Port("FP32", (-1, -1, -1))))


# ---- cast ----


@pytest.mark.parametrize(
    ("value", "to", "expected"),
    [
        (np.array([1.9, -1.9], np.float32), "INT64", [1, -1]),
        (np.array([0, 3], np.int64), "BOOL", [False, True]),
        (np.array([True, False]), "FP32", [1.0, 0.0]),
        (np.array([2**63], np.uint64), "FP64", [2.0**63]),
        (np.array([np.inf, np.nan, 1.5]), "FP32", [np.inf, np.nan, 1.5]),
        (np.array([-0.9, 255.9], np.float32), "UINT8", [0, 255]),
        (np.array([-(2.0**63)]), "INT64", [-(2**63)]),
        (np.zeros(0), "INT8", []),
    ],
)
def test_numbers_are_cast(value, to, expected):
    made = run(Cast(to), {"x": value}, value.size)["x"]
    assert np.array_equal(made, expected, equal_nan=to.startswith("F"))


@pytest.mark.parametrize(
    ("value", "to"),
    [
        (np.array([300]), "UINT8"),
        (np.array([-1.0]), "UINT8"),
        (np.array([-1]), "UINT64"),
        (np.array([2**63], np.uint64), "INT64"),
        (np.array([2.0**63]), "INT64"),
        (np.array([np.nan], np.float32), "INT32"),
        (np.array([1, np.inf]), "INT32"),
        (np.array([1e39]), "FP32"),
        (np.array([70000]), "FP16"),
    ],
)
def test_what_a_datatype_cannot_hold_is_refused(value, to):
    with pytest.raises(BadRequest, match=f"value 'x': found numbers from .* expected what {to} can hold"):
        run(Cast(to), {"x": value}, value.size)


def test_casting_is_of_numbers():
    assert plain(run(Cast("FP32", ["r"]), {"r": ragged([[1], [2, 3]]), "x": PROB}, 2)["r"]) == [[1.0], [2.0, 3.0]]
    with pytest.raises(BadConfig, match="to: found 'float', expected one of BOOL, UINT8"):
        Cast("float")
    with pytest.raises(BadConfig, match=r"input 'w': found BYTES \[-1\], expected numbers"):
        Cast("FP32").bind({"w": Port("BYTES")})


# ---- choose ----

rows_of_two = st.integers(0, 5).flatmap(
    lambda n: st.tuples(st.lists(st.booleans(), min_size=n, max_size=n), *2 * [bags(st.integers(0, 9), n)])
)


@given(rows_of_two, st.sampled_from(["ragged", "texts", "ragged texts", "array"]))
def test_each_row_comes_from_the_side_its_condition_names(case, kind):
    marks, yes, no = case
    if "texts" in kind:
        yes, no = ([[b"x" * n for n in bag] for bag in side] for side in (yes, no))
    if kind == "array":
        sides = [np.array([sum(bag) for bag in side], np.int64) for side in (yes, no)]
    elif kind == "texts":
        sides = [texts([b"".join(bag) for bag in side]) for side in (yes, no)]
    else:
        sides = [ragged(side, bytes if "texts" in kind else np.int64) for side in (yes, no)]
    made = run(Choose(), {"condition": np.array(marks, np.bool_), "yes": sides[0], "no": sides[1]}, len(marks))
    expected = [plain(sides[0])[i] if mark else plain(sides[1])[i] for i, mark in enumerate(marks)]
    assert plain(made["chosen"]) == expected


def test_rows_with_several_bags_are_chosen_whole():
    yes, no = ragged([[1], [2], [3], [4]]), ragged([[5], [], [7, 7], [8]])
    ports = dict.fromkeys(("yes", "no"), Port("INT64", ragged=True, per_row=2))
    made = run(Choose("out"), {"condition": np.array([False, True]), "yes": yes, "no": no}, 2, ports)
    assert plain(made["out"]) == [[5], [], [3], [4]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": Port("BOOL", (-1, 1))}, r"input 'condition': found BOOL \[-1, 1\]"),
        ({"condition": Port("INT64")}, "input 'condition': found INT64"),
        ({"no": Port("FP32", (-1, 3))}, r"input 'no': found FP32 \[-1, 3\], expected FP32 \[-1, 2\], as input 'yes'"),
        (
            {"yes": Port("FP32", (4,)), "no": Port("FP32", (4,))},
            "input 'yes': found FP32 .4., expected values that go by rows",
        ),
    ],
)
def test_sides_that_differ_are_refused(changes, message):
    with pytest.raises(BadConfig, match=message):
        Choose().bind({"condition": Port("BOOL"), "yes": FIXED["prob"], "no": FIXED["prob"]} | changes)


@pytest.mark.parametrize("marks", [[True, False, True], [False] * 3, [True] * 3])
@pytest.mark.parametrize("bags_of_words", [[[b"a"], [], [b"b", b"c"]], [[], [], []]])
def test_branches_that_ran_for_some_rows_come_together(marks, bags_of_words):
    nodes = [
        Node("upper", Upper(), when="request.mark"),
        Node("as_is", PassOn(), inputs={"words": "request.words"}, when="!request.mark"),
        Node(
            "choose",
            Choose("words"),
            (Dependency("upper"), Dependency("as_is")),
            inputs={"condition": "request.mark", "yes": "upper.words", "no": "as_is.words"},
        ),
    ]
    request = {"mark": Port("BOOL"), "words": Port("BYTES", ragged=True)}
    values = {"mark": np.array(marks), "words": ragged(bags_of_words, bytes)}
    with ThreadPoolExecutor(1) as threads:
        executor = Executor(plan("w", nodes, request), threads)
        done = asyncio.run(_ended(executor, values))
    expected = [[word.upper() for word in bag] if mark else bag for mark, bag in zip(marks, bags_of_words, strict=True)]
    assert plain(done.values[executor.plan.outputs["words"].place]) == expected


async def _ended(executor, values):
    run = executor.start(values, 3, 1, None)
    return await run if isinstance(run, Awaitable) else run


class Upper(Op):
    inputs: ClassVar = {"words": Port("BYTES", ragged=True)}
    outputs: ClassVar = {"words": Port("BYTES", ragged=True)}

    def run(self, batch):
        words = batch["words"]
        data = np.frombuffer(words.values.data.tobytes().upper(), np.uint8)
        return {"words": Ragged(words.values._replace(data=data), words.offsets)}


# ---- average ----


@pytest.mark.parametrize("weights", [(), (1, 3), (0.0, 2.0)])
def test_scores_are_averaged(weights):
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 3, 2), np.float32)
    op = Average(["a", "b"], weights=weights, output="score")
    expected = np.average([a, b], axis=0, weights=weights or None)
    made = run(op, {"a": a, "b": b}, 3)["score"]
    assert made.dtype == np.float32
    assert np.allclose(made, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0]}, "weights: found 1 for 2 inputs"),
        ({"weights": [1.0, -1.0]}, "weights: found .1.0, -1.0., expected numbers of at least 0"),
        ({"weights": [0.0, 0.0]}, "weights"),
        ({}, "input 'b': found INT64"),
    ],
)
def test_an_average_that_cannot_be_is_refused(arguments, message):
    ports = {"a": port_of(PROB), "b": port_of(np.zeros(2, np.int64))}
    with pytest.raises(BadConfig, match=message):
        Average(["a", "b"], **arguments).bind(ports)
