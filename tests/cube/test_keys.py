"""Feature → key → shard, against xxhash, CPython 2's formula and the golden vectors."""

import json

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDEN

from cube.errors import BadConfig, BadData
from cube.keys import ShardRule, legacy_ids, legacy_signs, shards_of, signs, signs_of

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


def mixed(key):
    """MurmurHash3's finaliser, in Python integers."""
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        key = (key ^ key >> shift) * factor % 2**64
    return key ^ key >> 33


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.integers(1, 65535))
def test_shards_agree_with_the_rules_in_the_format(keys, shards):
    given_keys = np.array(keys, np.uint64)
    assert shards_of(given_keys, shards, ShardRule.MODULO).tolist() == [key % shards for key in keys]
    expected = [mixed(key ^ 0x5851F42D4C957F2D) * shards >> 64 for key in keys]
    assert shards_of(given_keys, shards, ShardRule.MIX).tolist() == expected
    assert shards_of(given_keys, shards).tolist() == expected


def test_negative_ids_are_large_unsigned_keys_to_the_modulo_rule():
    """As the ancestor's client reinterprets them (not as C's or Python's % of a negative number)."""
    keys = np.array([-1, -(2**63)], np.int64).view(np.uint64)
    assert shards_of(keys, 7, ShardRule.MODULO).tolist() == [(2**64 - 1) % 7, 2**63 % 7]


def test_shard_rules_have_the_names_and_numbers_they_always_had():
    assert {rule.text: int(rule) for rule in ShardRule} == {"mix": 1, "modulo": 2}
    assert [ShardRule.parse(rule.text) for rule in ShardRule] == list(ShardRule)
    for wrong in ("MIX", "", "1", "hash"):
        with pytest.raises(BadConfig, match=f"shard_rule: found '{wrong}', expected mix or modulo"):
            ShardRule.parse(wrong)


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
