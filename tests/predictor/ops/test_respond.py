"""What a workflow answers."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lone_op import bags, plain, ragged, run

from cube.errors import BadConfig
from predictor.ops.op import Port
from predictor.ops.respond import Respond
from predictor.tensors import texts

PROB = np.array([[0.25, 0.75], [1, 0]], np.float32)


def rows_of(made):
    return [json.loads(row) for row in plain(made["json"])]


def test_values_are_named_and_dropped():
    made = run(Respond(["score=prob"]), {"prob": PROB, "id": np.arange(2)}, 2)
    assert list(made) == ["score"]
    assert made["score"] is PROB
    assert list(run(Respond(), {"prob": PROB, "id": np.arange(2)}, 2)) == ["prob", "id"]


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.tuples(bags(st.integers(-9, 9), n), st.lists(st.text(), min_size=n, max_size=n))
    )
)
def test_each_row_is_an_object_of_its_values(case):
    numbers, words = case
    values = {"a.b c": ragged(numbers), "w": texts([word.encode() for word in words]), "x": np.arange(len(words)) / 4}
    expected = [
        {"a.b c": bag, "word": word, "x": at / 4} for at, (bag, word) in enumerate(zip(numbers, words, strict=True))
    ]
    assert rows_of(run(Respond(["a.b c", "word=w", "x"], json=True), values, len(words))) == expected


def test_what_json_lacks_is_null_or_replaced():
    values = {"x": np.array([np.nan, np.inf], np.float32), "w": texts([b"\xff", b'"\n'])}
    assert rows_of(run(Respond(json=True), values, 2)) == [{"x": None, "w": "\ufffd"}, {"x": None, "w": '"\n'}]


def test_a_row_may_have_several_entries():
    ports = {"keys": Port("INT64", ragged=True, per_row=2), "x": Port("FP32", (-1, 2), per_row=2)}
    values = {"keys": ragged([[1], [], [2, 3], [4]]), "x": np.arange(8, dtype=np.float32).reshape(4, 2)}
    assert rows_of(run(Respond(json=True), values, 2, ports)) == [
        {"keys": [[1], []], "x": [[0, 1], [2, 3]]},
        {"keys": [[2, 3], [4]], "x": [[4, 5], [6, 7]]},
    ]


def test_a_value_that_is_of_no_row_is_no_part_of_one():
    with pytest.raises(BadConfig, match=r"input 'w': found FP32 \[3\], expected a value that goes by rows"):
        Respond(json=True).bind({"w": Port("FP32", (3,))})
