"""The largest scores of each row, against sorting all of them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lone_op import bags, plain, ragged, run

from cube.errors import BadConfig
from predictor.ops.op import Port
from predictor.ops.rank import TopK, largest

scores = st.one_of(st.integers(-2, 2).map(float), st.just(math.nan), st.just(-math.inf))


def slow_twin(bag, k):
    """Places of the k largest: by falling score, nan last, equal ones as they come."""
    return sorted(range(len(bag)), key=lambda at: (math.isnan(bag[at]), -bag[at] if bag[at] == bag[at] else 0, at))[:k]


@given(st.integers(0, 4).flatmap(lambda n: bags(scores, n, most=12)), st.integers(1, 6))
def test_the_largest_are_those_that_sorting_gives(given_bags, k):
    made = run(TopK(k), {"scores": ragged(given_bags, np.float32)}, len(given_bags))
    expected = [slow_twin(bag, k) for bag in given_bags]
    assert plain(made["indices"]) == expected
    best = [[bag[at] for at in places] for bag, places in zip(given_bags, expected, strict=True)]
    assert str(plain(made["values"])) == str(best)  # nan is not equal to nan


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_rows_of_an_array(dtype):
    rng = np.random.default_rng(2)
    given_scores = rng.integers(0, 200, (50, 300)).astype(dtype)
    made = run(TopK(7, input="x"), {"x": given_scores}, 50, {"x": Port(TopK_DATATYPES[dtype], (-1, 300))})
    expected = np.argsort(-given_scores.astype(np.float64), axis=1, kind="stable")[:, :7]
    assert np.array_equal(made["indices"], expected)
    assert np.array_equal(made["values"], np.take_along_axis(given_scores, expected, 1))


TopK_DATATYPES = {np.float32: "FP32", np.float64: "FP64", np.int64: "INT64", np.uint8: "UINT8"}


def test_every_order_of_a_row_gives_the_same_values():
    rising = np.arange(1000, dtype=np.float32)
    for row in (rising, rising[::-1].copy()):
        best, _, _ = largest(row, np.array([0, 1000]), 1000)
        assert np.array_equal(best, rising[::-1])


def test_the_largest_have_labels(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\nbird\n")
    op = TopK(2, labels=tmp_path / "labels.txt")
    made = run(
        op, {"scores": np.array([[0.1, 0.2, 0.7], [0.6, 0.4, 0]], np.float32)}, 2, {"scores": Port("FP32", (-1, 3))}
    )
    assert plain(made["labels"]) == [[b"bird", b"dog"], [b"cat", b"dog"]]
    with pytest.raises(BadConfig, match="found 3 lines, expected 4, one for each column of 'scores'"):
        op.bind({"scores": Port("FP32", (-1, 4))})


@pytest.mark.parametrize(
    ("port", "message"),
    [
        (Port("FP32", (-1, 1)), r"input 'scores': found FP32 \[-1, 1\], expected \[-1, n\], n known and at least k, 2"),
        (Port("FP32", (-1, -1)), r"found FP32 \[-1, -1\]"),
        (Port("FP32"), r"found FP32 \[-1\]"),
        (Port("BYTES", (-1, 3)), r"found BYTES"),
        (Port("FP32", (-1, 3), ragged=True), r"found ragged FP32"),
    ],
)
def test_scores_of_another_kind_are_refused(port, message):
    with pytest.raises(BadConfig, match=message):
        TopK(2).bind({"scores": port})


@pytest.mark.parametrize("k", [0, 1001])
def test_k_has_bounds(k):
    with pytest.raises(BadConfig, match=f"k: found {k}, expected 1 to 1000"):
        TopK(k)
