"""Feature → key → shard, against xxhash, CPython 2's formula and the golden vectors."""

import json

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDEN

from cube.errors import BadData
from cube.keys import legacy_ids, legacy_signs, shards_of, signs, signs_of

VECTORS = json.loads((GOLDEN / "signs.json").read_text())
features = st.lists(st.tuples(st.integers(0, 2**31), st.binary(max_size=80)), max_size=30)


def cpython2_hash(text: bytes) -> int:
    """The formula as the reference states it, in Python integers."""
    if not text:
        return 0
    x = text[0] << 7
    for byte in text:
        x = ((1000003 * x) & (2**64 - 1)) ^ byte
    x ^= len(text)
    x -= (x >> 63) << 64
    return -2 if x == -1 else x


def columns(texts):
    sizes = np.array([len(t) for t in texts], np.int64)
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum(sizes) - sizes, sizes


def test_signs_match_the_golden_vectors():
    cases = VECTORS["signs"]
    found = signs_of([c["slot"] for c in cases], [c["text"].encode() for c in cases])
    assert found.tolist() == [c["key"] for c in cases]


def test_legacy_signs_and_ids_match_the_golden_vectors():
    cases = VECTORS["legacy"]
    found = legacy_signs(np.array([c["column"] for c in cases]), *columns([c["text"].encode() for c in cases]))
    assert found.tolist() == [c["sign"] for c in cases]
    assert legacy_ids(found).tolist() == [c["id"] for c in cases]


def test_legacy_vectors_of_the_reference_are_among_the_golden_ones():
    known = {(c["column"], c["text"]): (c["sign"], c["id"]) for c in VECTORS["legacy"]}
    assert known[13, "68fd1e64"] == (2390065652180683942, 421825)
    assert known[14, "68fd1e64"] == (4488047523783751093, 715353)
    assert known[14, ""] == (6272037681056613, 25204)
    assert known[39, "49d68486"] == (7895035380913553999, 68113)


@given(features)
def test_signs_agree_with_the_xxhash_library(cases):
    slots, texts = [s for s, _ in cases], [t for _, t in cases]
    assert signs_of(slots, texts).tolist() == [xxhash.xxh64_intdigest(t, seed=s) for s, t in cases]


@given(features)
def test_legacy_signs_agree_with_the_formula(cases):
    slots, texts = np.array([s for s, _ in cases], np.int64), [t for _, t in cases]
    found = legacy_signs(slots, *columns(texts))
    assert found.tolist() == [cpython2_hash(str(s).encode() + t) for s, t in cases]


def test_a_negative_column_number_is_refused():
    with pytest.raises(BadData, match="found -1, expected no negative column number"):
        legacy_signs(np.array([-1]), *columns([b"x"]))


@pytest.mark.parametrize(("starts", "sizes"), [([0], [4]), ([3], [1]), ([-1], [1]), ([0], [-1])])
def test_a_text_outside_its_buffer_is_refused(starts, sizes):
    with pytest.raises(BadData, match="a text outside its buffer"):
        signs(np.array([1]), np.zeros(3, np.uint8), np.array(starts), np.array(sizes))


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(BadData, match="1 slots, 2 starts, 2 sizes"):
        signs(np.array([1]), np.zeros(3, np.uint8), np.array([0, 1]), np.array([1, 1]))


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.integers(1, 70000))
def test_every_key_has_a_shard(keys, shards):
    found = shards_of(np.array(keys, np.uint64), shards)
    assert ((found >= 0) & (found < shards)).all()


def test_shards_are_even_for_consecutive_keys_too():
    for shards in (2, 3, 7, 16):
        counts = np.bincount(shards_of(np.arange(100_000, dtype=np.uint64), shards), minlength=shards)
        assert counts.max() < 1.05 * counts.min()


def test_kernels_work_where_their_machine_code_cannot_be_kept(monkeypatch):
    from cube import kernels

    def no_place(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(kernels, "njit", no_place)
    assert kernels.kernel(lambda x: x + 1)(2) == 3
