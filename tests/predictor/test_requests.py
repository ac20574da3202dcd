"""What a request may hold, and what it becomes."""

import json

import numpy as np
import pytest
from places import GOLDEN

from cube.errors import BadRequest
from predictor.ops.op import Port
from predictor.requests import Form
from predictor.tensors import texts
from trainer_tools.manifest import Lookup, Slot

LOOKUP = Lookup(
    keys="keys",
    text="text",
    lengths="lengths",
    slots=[Slot("A", 1), Slot("B", 26), Slot("C", 7)],
    table="t",
    pooling="mean",
    feed="pooled",
)
FORM = Form({"dense": Port("FP32", (-1, 2))}, [LOOKUP], max_samples=100, max_keys=1000, finite=True)


def request(**changes):
    """Two samples of 2 dense numbers and 3 slots with 1, 2, 0 and 1, 0, 1 keys."""
    values = {
        "dense": np.zeros((2, 2), np.float32),
        "keys": np.arange(5, dtype=np.uint64),
        "lengths": np.array([[1, 2, 0], [1, 0, 1]], np.int32),
    }
    return {name: value for name, value in (values | changes).items() if value is not None}


def test_a_good_request_becomes_offsets_and_a_count():
    made = FORM.read(request())
    assert (made.rows, made.keys) == (2, 5)
    keys = made.values["keys"]
    assert keys.values.tolist() == [0, 1, 2, 3, 4]
    assert keys.offsets.tolist() == [0, 1, 3, 3, 4, 4, 5]
    assert made.values["keys"].offsets.size == made.rows * FORM.ports["keys"].per_row + 1


def test_work_goes_by_samples_keys_and_bytes_of_texts():
    def work_of(form, **values):
        return form.read(values).work

    assert work_of(FORM, **request()) == 2
    many = {"keys": np.arange(1_000, dtype=np.uint64), "lengths": np.array([[700, 0, 0], [300, 0, 0]], np.int32)}
    assert work_of(FORM, **request(**many)) == 2 + 10
    plain = Form({"text": Port("BYTES")}, [], max_samples=100, max_keys=1000, finite=True)
    assert work_of(plain, text=texts([b"short"] * 3)) == 3
    assert work_of(plain, text=texts([b"x" * 160_000])) == 1 + 160
    port = Port("BYTES", (-1,), ragged=True)
    bags = Form({"text": port}, [], max_samples=100, max_keys=1000, finite=True, lengths={"text": "text.lengths"})
    given = {"text": texts([b"x" * 2_000] * 3), "text.lengths": np.array([1, 2], np.int32)}
    assert work_of(bags, **given) == 2 + 6


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
        FORM.read(request(**changes))


def test_too_many_keys_are_refused_before_any_is_looked_at():
    many = np.zeros(1001, np.uint64)
    with pytest.raises(BadRequest, match="request: found 1001 keys, expected at most 1000"):
        FORM.read(request(dense=np.zeros((1, 2), np.float32), keys=many, lengths=np.array([[1001, 0, 0]], np.int32)))


def test_a_lookup_may_have_a_single_slot():
    one = Lookup(keys="k", text="t", lengths="n", slots=[Slot("A", 1)], table="t", pooling="sum", feed="f")
    form = Form({}, [one], max_samples=9, max_keys=9, finite=True)
    assert form.read({"k": np.zeros(3, np.uint64), "n": np.array([[1], [2]], np.int32)}).rows == 2


def test_a_dense_program_may_take_infinities():
    form = Form({"x": Port("FP32", (-1,))}, [], max_samples=9, max_keys=0, finite=False)
    assert form.read({"x": inf[0]}).rows == 2


def test_texts_are_signed_with_the_number_of_their_slot():
    vectors = {(c["slot"], c["text"]): c["key"] for c in json.loads((GOLDEN / "signs.json").read_text())["signs"]}
    cases = [(1, "68fd1e64"), (26, "9727dd16"), (7, "0123456789abcdef0123456789abcdef"), (1, ""), (1, "68fd1e64")]
    lengths = np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0]], np.int32)
    given_texts = texts([text.encode() for _, text in cases])
    made = FORM.read(request(dense=np.zeros((3, 2), np.float32), keys=None, text=given_texts, lengths=lengths))
    assert made.values["keys"].values.tolist() == [vectors[case] for case in cases]


DENSE_IDS = Lookup(
    keys="ids", text="ids text", lengths=None, slots=[Slot("ids", 0)], table="t", pooling="none", feed="f",
    feed_shape=[-1, 3, 8],
)  # fmt: skip
WEIGHTED = Lookup(
    keys="k", text="t", lengths="n", slots=[Slot("A", 1)], table="t", pooling="sum", feed="f", weights="w"
)


def test_keys_without_lengths_come_in_the_shape_of_their_rows():
    form = Form({}, [DENSE_IDS], max_samples=9, max_keys=99, finite=True)
    made = form.read({"ids": np.arange(6, dtype=np.uint64).reshape(2, 3)})
    assert made.rows == 2
    assert made.values["ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert made.keys == 6
    signed = form.read({"ids text": texts([b"a", b"b", b"c"], (1, 3))})
    assert signed.values["ids"].shape == (1, 3)
    with pytest.raises(BadRequest, match=r"input 'ids' shape: found \[2, 4\], expected \[-1, 3\]"):
        form.read({"ids": np.zeros((2, 4), np.uint64)})
    with pytest.raises(BadRequest, match="'n': found a name the model does not take"):
        form.read({"ids": np.zeros((2, 3), np.uint64), "n": np.ones((2, 1), np.int32)})


@pytest.mark.parametrize("feed_shape", [[-1, 2, 8], [-1, -1, 8]])
@pytest.mark.parametrize(("lengths", "is_right"), [([2, 2], True), ([3, 1], False), ([4, 0], False), ([0, 4], False)])
def test_no_sample_has_its_neighbours_keys(feed_shape, lengths, is_right):
    lookup = Lookup(
        keys="k", text="t", lengths="n", slots=[Slot("k", 0)], table="t", pooling="none", feed="f",
        feed_shape=feed_shape,
    )  # fmt: skip
    form = Form({}, [lookup], max_samples=9, max_keys=99, finite=True)
    given = {"k": np.arange(4, dtype=np.uint64), "n": np.array(lengths, np.int32)[:, None]}
    if is_right:
        assert form.read(given).rows == 2
    else:
        with pytest.raises(BadRequest, match=r"input 'n': found \d keys in sample [01], expected \d in every sample"):
            form.read(given)


def test_weights_come_with_a_key_each():
    form = Form({}, [WEIGHTED], max_samples=9, max_keys=99, finite=True)
    good = {"k": np.zeros(3, np.uint64), "n": np.array([[1], [2]], np.int32), "w": np.ones(3, np.float32)}
    assert form.read(good).values["w"].offsets.tolist() == [0, 1, 3]
    with pytest.raises(BadRequest, match=r"input 'w' shape: found \[2\], expected \[3\]: one for each key"):
        form.read(good | {"w": np.ones(2, np.float32)})
    with pytest.raises(BadRequest, match=r"input 'w'\[1\]: found nan"):
        form.read(good | {"w": np.array([1, np.nan, 1], np.float32)})


def test_sequences_of_different_lengths():
    port = Port("INT64", (-1,), ragged=True)
    form = Form({"words": port}, [], max_samples=9, max_keys=9, finite=False, lengths={"words": "words.lengths"})
    made = form.read({"words": np.arange(5), "words.lengths": np.array([2, 0, 3], np.int32)})
    assert made.rows == 3
    assert made.values["words"].offsets.tolist() == [0, 2, 2, 5]
    for lengths, message in (([2, 1], "the sum of"), ([6, -1], "a length of -1"), ([[1, 4]], "the model has 1 slots")):
        with pytest.raises(BadRequest, match=message):
            form.read({"words": np.arange(5), "words.lengths": np.array(lengths, np.int32)})


def test_sequences_that_a_program_joins_are_as_long_in_each_input():
    names = ("words", "marks")
    ports = {name: Port("INT64", (-1,), ragged=True) for name in names}
    lengths = {name: f"{name}.lengths" for name in names}
    form = Form(ports, [], max_samples=9, max_keys=99, finite=False, lengths=lengths, alike=[list(lengths.values())])
    request = {name: np.arange(5) for name in names} | {"words.lengths": np.array([[2], [0], [3]], np.int32)}
    assert form.read(request | {"marks.lengths": np.array([2, 0, 3], np.int32)}).rows == 3
    wrong = "inputs 'words.lengths' and 'marks.lengths': found 0 and 1 in sample 1, expected as many in both"
    with pytest.raises(BadRequest, match=wrong):
        form.read(request | {"marks.lengths": np.array([2, 1, 2], np.int32)})
    assert all(form.read(example).rows == 2 for example in form.examples(2))


@pytest.mark.parametrize("lookup", [LOOKUP, DENSE_IDS, WEIGHTED])
def test_examples_are_requests(lookup):
    form = Form({"dense": Port("FP32", (-1, 2))}, [lookup], max_samples=9, max_keys=99, finite=True)
    examples = form.examples(2)
    assert len(examples) == 2
    for example in examples:
        assert form.read(example).rows == 2
        names = {tensor.name for tensor in form.tensors()}
        assert {lookup.keys, *example} - {lookup.text} == names | {lookup.keys}
