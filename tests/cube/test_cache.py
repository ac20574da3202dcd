"""The row cache: what it says was put for exactly that version, it stays in its memory, and keeps what is asked for."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cube import cache as module
from cube.cache import MIN_BYTES, CacheStats, RowCache
from cube.errors import BadConfig
from cube.version import Version

V7, V8 = Version(7, 0), Version(8, 3)
DIMS = {"ads": 2, "users": 2, "words": 64, "wide": 1}
UNTOUCHED = -1.5


def keys_from(start, count):
    """Distinct keys on both ends of what a key can be."""
    half = np.arange(start, start + count, dtype=np.uint64)
    return np.where(half % np.uint64(2) == 0, half, ~half)


def looked_up(cache, table, version, keys, dim=None):
    rows = np.full((keys.size, dim or DIMS[table]), UNTOUCHED, np.float32)
    found = np.zeros(keys.size, np.bool_)
    missing = cache.look_up(table, version, keys, rows, found)
    return rows, found, missing


def put(cache, table, version, keys, value=1.0, found=True, dim=None):
    rows = np.full((keys.size, dim or DIMS[table]), value, np.float32)
    cache.put(table, version, keys, rows, np.full(keys.size, found))


def asked(cache, keys, table="ads", version=V7):
    """Look keys up, and put those that are missing, as a client does. Returns how many were here."""
    missing = looked_up(cache, table, version, keys)[2]
    put(cache, table, version, keys[missing])
    return keys.size - missing.size


def array_bytes(cache):
    """Of all arrays that a cache holds, whatever they are called."""
    arrays = [a for arena in cache._arenas.values() for a in arena if isinstance(a, np.ndarray)]
    arrays += [a for a in vars(cache).values() if isinstance(a, np.ndarray)]
    roots = {}
    for array in arrays:
        while isinstance(array.base, np.ndarray):
            array = array.base
        roots[id(array)] = array.nbytes
    return sum(roots.values())


class AgainstDict(RuleBasedStateMachine):
    """Answers, offers and retirements in any order: a cache may forget, and may not err."""

    @initialize(most_bytes=st.sampled_from([MIN_BYTES, 200_000]), negative=st.booleans())
    def made(self, most_bytes, negative):
        self.cache = RowCache(most_bytes, negative=negative)
        self.negative = negative
        self.truth = {}  # (table, version) → key → (value, found)
        self.asked = self.offers = self.value = 0

    tables = st.sampled_from(sorted(DIMS))
    versions = st.sampled_from([V7, V8, Version(7, 1)])
    keys = st.builds(keys_from, st.integers(0, 900), st.integers(0, 300))

    @rule(table=tables, version=versions, keys=keys, times=st.integers(1, 3))
    def look_up(self, table, version, keys, times):
        for _ in range(times):
            rows, found, missing = looked_up(self.cache, table, version, keys)
            self.asked += keys.size
        assert (np.diff(missing) > 0).all()
        known = np.setdiff1d(np.arange(keys.size), missing)
        assert (rows[missing] == UNTOUCHED).all()
        truth = self.truth.get((table, version), {})
        want = [truth[key] for key in keys[known].tolist()]
        assert found[known].tolist() == [is_there for _, is_there in want]
        assert (rows[known] == np.array([value for value, _ in want], np.float32)[:, None]).all()

    @rule(table=tables, version=versions, keys=keys, absent_every=st.integers(1, 5))
    def put(self, table, version, keys, absent_every):
        self.value += 1
        values = self.value + np.arange(keys.size, dtype=np.float32) / 1024
        found = np.arange(keys.size) % absent_every != 0
        rows = np.repeat(values[:, None], DIMS[table], axis=1)
        self.cache.put(table, version, keys, rows, found)
        for key, value, is_there in zip(keys.tolist(), values.tolist(), found.tolist(), strict=True):
            truth = self.truth.setdefault((table, version), {})
            if is_there or self.negative:
                truth[key] = value, is_there
            else:
                truth.pop(key, None)
        self.offers += keys.size

    @rule(table=tables, version=versions)
    def retire(self, table, version):
        self.cache.retire(table, version)
        self.truth.pop((table, version), None)

    @rule(table=tables)
    def forget(self, table):
        self.cache.forget(table)
        self.truth = {known: rows for known, rows in self.truth.items() if known[0] != table}

    @invariant()
    def adds_up(self):
        stats = self.cache.stats()
        assert stats.hits + stats.negative_hits + stats.misses == self.asked
        assert stats.admitted + stats.rejected <= self.offers
        assert 0 <= stats.entries == stats.admitted - stats.evicted <= sum(map(len, self.truth.values()))
        assert self.negative or stats.negative_hits == 0
        assert array_bytes(self.cache) == stats.bytes <= stats.most_bytes


TestAgainstDict = AgainstDict.TestCase
TestAgainstDict.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_fresh_cache_has_room_for_all_at_once():
    cache = RowCache(1 << 20)
    keys = np.array([0, 1, 2**64 - 1, 2**63], np.uint64)
    assert looked_up(cache, "ads", V7, keys)[2].tolist() == [0, 1, 2, 3]
    cache.put("ads", V7, keys, np.arange(8, dtype=np.float32).reshape(4, 2), np.array([True, True, False, True]))
    rows, found, missing = looked_up(cache, "ads", V7, keys[::-1].copy())
    assert rows.tolist() == [[6, 7], [4, 5], [2, 3], [0, 1]]  # of an absent key what was answered: a default row
    assert found.tolist() == [True, False, True, True]
    assert missing.size == 0
    held = cache.stats().bytes
    assert held > 0.99 * (1 << 20)
    assert cache.stats() == CacheStats(3, 1, 4, 4, 0, 0, held, 1 << 20, 4)


def test_absent_keys_are_not_remembered_where_that_is_not_wanted():
    cache, keys = RowCache(1 << 20, negative=False), keys_from(0, 10)
    put(cache, "ads", V7, keys, 0.0, found=False)
    assert looked_up(cache, "ads", V7, keys)[2].size == 10
    put(cache, "ads", V7, keys)
    put(cache, "ads", V7, keys[:5], 0.0, found=False)  # and one that was known as present is known no more
    assert looked_up(cache, "ads", V7, keys)[2].tolist() == [0, 1, 2, 3, 4]
    assert (cache.stats().admitted, cache.stats().rejected, cache.stats().evicted) == (10, 10, 5)


def test_a_version_never_sees_the_rows_of_another():
    cache, keys = RowCache(1 << 20), keys_from(0, 1000)
    put(cache, "ads", V7, keys, 7.0)
    put(cache, "users", V7, keys, 70.0)  # the same width and version: the same arena
    assert looked_up(cache, "ads", V8, keys)[2].size == 1000
    put(cache, "ads", V8, keys, 8.0)
    cache.retire("ads", V7)
    assert looked_up(cache, "ads", V7, keys)[2].size == 1000
    assert (looked_up(cache, "ads", V8, keys)[0] == 8).all()
    assert (looked_up(cache, "users", V7, keys)[0] == 70).all()
    cache.forget("ads")
    assert looked_up(cache, "ads", V8, keys)[2].size == 1000
    assert cache.stats().entries == 1000


def test_space_of_a_retired_version_is_free_at_once():
    cache = RowCache(MIN_BYTES)
    hot = keys_from(0, 3000)  # more than there is room for
    for _ in range(3):
        asked(cache, hot)
    full = cache.stats()
    assert full.rejected > 0
    cache.retire("ads", V7)
    assert cache.stats().entries == 0
    asked(cache, hot, version=V8)  # asked for once each, which would not move the rows that were there
    assert cache.stats().entries > 0.99 * full.entries


def test_a_scan_of_cold_keys_does_not_flush_the_hot():
    cache = RowCache(1 << 20)  # 32 k rows
    hot, kept = keys_from(0, 16_000), []
    for _ in range(5):
        asked(cache, hot)
    for turn in range(40):  # cold keys come by four times as often as hot ones
        kept.append(asked(cache, hot[turn % 4 :: 4].copy()) / 4000)
        asked(cache, keys_from(10**6 + turn * 16_000, 16_000))
    assert cache.stats().evicted > 0
    assert min(kept) >= 0.9
    assert np.mean(kept) >= 0.95


def test_what_was_hot_is_forgotten():
    cache = RowCache(MIN_BYTES)
    for _ in range(20):
        asked(cache, keys_from(0, 1500))
    new, last = keys_from(10**6, 1500), 0
    for _ in range(80):  # 80 accesses a row: all counts are halved eight times
        last = asked(cache, new)
    assert last >= 0.9 * 1500


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.2])
def test_hits_of_a_skewed_trace_are_not_fewer_than_lru_has(exponent):
    rng = np.random.default_rng(11)
    chances = 1 / np.arange(1, 100_001) ** exponent
    numbers = rng.choice(chances.size, size=200_000, p=chances / chances.sum())
    keys = rng.permutation(10**7)[numbers].astype(np.uint64)
    cache, lru, lru_hits = RowCache(256 << 10), OrderedDict(), 0
    for request in map(np.unique, np.split(keys, 1000)):
        asked(cache, request)
        room = int(cache._arenas[2].buckets) * 8
        for key in request.tolist():
            lru_hits += key in lru
            lru[key] = True
            lru.move_to_end(key)
            if len(lru) > room:
                lru.popitem(last=False)
    assert cache.stats().hits >= lru_hits


def test_widths_share_the_memory_in_rows():
    cache = RowCache(1 << 20)
    put(cache, "ads", V7, keys_from(0, 1000))
    assert cache.stats().entries == 1000
    put(cache, "words", V7, keys_from(0, 10))  # a width joins: all start anew
    assert (cache.stats().entries, cache.stats().evicted) == (10, 1000)
    put(cache, "users", V7, keys_from(0, 1000))  # as wide as ads
    assert len({arena.buckets for arena in cache._arenas.values()}) == 1
    cache.forget("words")
    assert set(cache._arenas) == {2, 64}
    put(cache, "wide", V7, keys_from(0, 10))  # words have gone, and leave their share to others
    assert set(cache._arenas) == {1, 2}
    assert array_bytes(cache) == cache.stats().bytes <= 1 << 20


def test_rows_too_wide_for_the_memory_are_not_kept():
    cache = RowCache(MIN_BYTES)
    keys = keys_from(0, 3)
    assert looked_up(cache, "huge", V7, keys, dim=3000)[2].tolist() == [0, 1, 2]
    put(cache, "huge", V7, keys, dim=3000)
    assert looked_up(cache, "huge", V7, keys, dim=3000)[2].size == 3
    assert cache.stats()[:5] == (0, 0, 6, 0, 3)
    assert cache.stats().bytes == array_bytes(cache) <= MIN_BYTES


def test_more_versions_than_numbers_for_them():
    cache, key = RowCache(MIN_BYTES), keys_from(5, 1)
    for base in range(5000):
        put(cache, "ads", Version(base), key, float(base))
    known = {}
    for base in reversed(range(5000)):
        rows, _, missing = looked_up(cache, "ads", Version(base), key)
        if not missing.size:
            known[base] = rows[0, 0]
    assert known
    assert min(known) >= 5000 - module._MOST_VERSIONS
    assert all(value == base for base, value in known.items())


def test_pieces_of_a_message_are_taken_as_they_are():
    """Read-only, at odd addresses: nothing is copied, and no kernel is compiled for them alone."""
    cache, keys = RowCache(1 << 20), keys_from(0, 20)
    put(cache, "ads", V7, keys)
    looked_up(cache, "ads", V7, keys)
    before = [len(kernel.signatures) for kernel in module.KERNELS]
    rows, marks = np.arange(40, dtype="<f4").reshape(20, 2), np.arange(20) % 3 > 0
    message = b"x" + keys.tobytes() + rows.tobytes() + marks.tobytes()
    keys_in = np.frombuffer(message, "<u8", 20, 1)
    rows_in = np.frombuffer(message, "<f4", 40, 161).reshape(20, 2)
    cache.put("ads", V8, keys_in, rows_in, np.frombuffer(message, np.bool_, 20, 321))
    got, found, missing = looked_up(cache, "ads", V8, keys_in)
    assert missing.size == 0
    assert got.tolist() == rows.tolist()
    assert found.tolist() == marks.tolist()
    assert [len(kernel.signatures) for kernel in module.KERNELS] == before


def test_a_memory_that_is_too_small_is_refused():
    with pytest.raises(BadConfig, match=f"row cache: found {MIN_BYTES - 1} bytes, expected at least {MIN_BYTES}"):
        RowCache(MIN_BYTES - 1)


@pytest.mark.parametrize(
    ("keys", "rows", "found"),
    [
        (np.zeros(3, np.int64), np.zeros((3, 2), np.float32), np.zeros(3, np.bool_)),
        (np.zeros(6, np.uint64)[::2], np.zeros((3, 2), np.float32), np.zeros(3, np.bool_)),
        (np.zeros(3, np.uint64), np.zeros((2, 2), np.float32), np.zeros(3, np.bool_)),
        (np.zeros(3, np.uint64), np.zeros((2, 3), np.float32).T, np.zeros(3, np.bool_)),
        (np.zeros(3, np.uint64), np.zeros(3, np.float32), np.zeros(3, np.bool_)),
        (np.zeros(3, np.uint64), np.zeros((3, 2)), np.zeros(3, np.bool_)),
        (np.zeros(3, np.uint64), np.zeros((3, 2), np.float32), np.zeros(2, np.bool_)),
        (np.zeros(3, np.uint64), np.zeros((3, 2), np.float32), np.zeros(3, np.uint8)),
    ],
)
def test_arrays_that_the_kernels_could_not_trust_are_refused(keys, rows, found):
    cache = RowCache(MIN_BYTES)
    with pytest.raises(ValueError, match="shape"):
        cache.look_up("ads", V7, keys, rows, found)
    with pytest.raises(ValueError, match="shape"):
        cache.put("ads", V7, keys, rows, found)
