"""Rows that were asked for before, kept on the client's side of the network. Owned by one event loop, or one thread.

What is hidden here: the memory, and which rows are worth it. A row is kept under table, version and key, so nobody is
ever answered with another version's. What is kept is exactly what a shard answered, absent keys included; a row of one
version of a table never changes, so an answer is the same with the cache and without.

Memory is an arena for each width of rows. An arena is buckets of eight ways; a row can only be in its key's bucket:

    bucket    8 keys | 8 facts | 128 counters of 4 bits          uint64[24]: three cache lines
    fact      asked 4 bits | last asked 47 bits | absent 1 bit | table and version 12 bits          0: a free way
    rows      float32[8, dim], elsewhere

*Who stays* (TinyLFU; Einziger, Friedman and Manes 2017): a way counts how often it is asked for; the counters are a
count-min sketch that does so for keys that are not here. A newcomer takes the way that was asked for least, and only
if it was asked for more often itself: keys that come by once push nobody out. All counts are halved, bucket by bucket,
once for every ten accesses a way, so that what was hot is forgotten. Facts are laid out so that the least fact is the
way to take: a free one, then the least asked for, then the one asked for longest ago.

Arenas share the memory so that each has as many buckets. When a width joins, the rows of all arenas are dropped; widths
that no table has any more then leave, too. That is when a table of a new width is asked for, for the first time.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig
from cube.kernels import U, inlined, kernel, load, mix, prefetch, scaled
from cube.rows import F32, FLOAT32, put_row
from cube.storage.store import check_buffer
from cube.version import Version

MIN_BYTES = 64 << 10  # some hundred rows: less does not repay looking

_WAYS, _WORDS, _LINE = 8, 24, 64
_FACTS, _COUNTERS = U(8), U(16)  # words of a bucket before its facts, its counters
_MOST_VERSIONS = 4095  # 12 bits, without 0
_VERSION, _ABSENT, _LAST, _LAST_AT, _ASKED_AT = U(0xFFF), U(1 << 12), U((1 << 47) - 1), U(13), U(60)
_MOST_ASKED, _NOT_ASKED = U(15), U((1 << 60) - 1)
_SAMPLE = U(10 * _WAYS)  # accesses for each bucket whose counts are halved
_VERSION_SPREAD = U(0x9E3779B97F4A7C15)
_FIXED = 3 * 8 + _LINE  # bytes of an arena without buckets: its clock, and what brings it onto a cache line

# Two steps per key, as in storage/index.py: a bucket's lines are asked for, then looked at; the row's are, then copied.
_RING, _TO_BUCKET, _TO_ROW = 64, U(16), U(12)
_MISSING = U(1 << 63)  # a mark in the ring instead of a row's number

_HITS, _NEGATIVE_HITS, _MISSES, _ADMITTED, _REJECTED, _EVICTED = range(6)


class CacheStats(NamedTuple):
    """Since the cache was made. hits + negative_hits + misses is how many keys were looked up."""

    hits: int
    negative_hits: int  # keys known to be absent
    misses: int
    admitted: int  # rows that were put and are, or were, kept
    rejected: int  # rows that were put and asked for too seldom, or absent keys where they are not remembered
    evicted: int  # rows that are kept no longer: for another one, or with their version or arena
    bytes: int  # of all arrays
    most_bytes: int
    entries: int  # rows that are kept: admitted - evicted


@inlined
def _hash(key, of):  # type: ignore[no-untyped-def]
    """Of a key in version number `of`: no two keys of one version share it."""
    return mix(key ^ (of * _VERSION_SPREAD))


@inlined
def _way_of(words, at, key, of):  # type: ignore[no-untyped-def]
    """The way that holds a key in the bucket at word `at`; 8 if none does."""
    way = U(_WAYS)
    for w in range(_WAYS):
        if words[at + U(w)] == key and (words[at + _FACTS + U(w)] & _VERSION) == of:
            way = U(w)
    return way


@inlined
def _counter(h, row):  # type: ignore[no-untyped-def]
    """Where a hash has its counter among the 32 of a row of the sketch: word after `at`, bits to shift."""
    x = (h >> U(5 * row)) & U(31)
    return _COUNTERS + U(2 * row) + (x >> U(4)), (x & U(15)) << U(2)


@inlined
def _asked(words, at, h):  # type: ignore[no-untyped-def]
    """How often a key that is not here was asked for, at least: the least of its four counters."""
    least = _MOST_ASKED
    for row in range(4):
        word, shift = _counter(h, row)
        least = min(least, (words[at + word] >> shift) & _MOST_ASKED)
    return least


@inlined
def _raise_to(words, at, h, asked):  # type: ignore[no-untyped-def]
    """Let no counter of a key say less; those that say more count other keys, too (conservative update)."""
    for row in range(4):
        word, shift = _counter(h, row)
        if (words[at + word] >> shift) & _MOST_ASKED < asked:
            words[at + word] = (words[at + word] & ~(_MOST_ASKED << shift)) | (asked << shift)


@inlined
def _halve(words, at):  # type: ignore[no-untyped-def]
    for w in range(_WAYS):
        fact = words[at + _FACTS + U(w)]
        words[at + _FACTS + U(w)] = (fact & _NOT_ASKED) | ((fact >> _ASKED_AT >> U(1)) << _ASKED_AT)
        words[at + _COUNTERS + U(w)] = (words[at + _COUNTERS + U(w)] >> U(1)) & U(0x7777777777777777)


@kernel
def _look_up(keys, of, words, rows, buckets, clock, out, found, missing, counts):  # type: ignore[no-untyped-def]
    """Copy what is here, count what is asked for. Returns how many keys are missing.

    clock: uint64[3]: lookups so far, accesses that no bucket was halved for yet, the bucket to halve next.
    """
    n, dim, misses, negative = U(found.size), U(out.shape[1]), 0, 0
    row_bytes = U(4) * dim
    keys_at, words_at, rows_at = U(keys.ctypes.data), U(words.ctypes.data), U(rows.ctypes.data)
    to = U(out.ctypes.data)
    bucket_at, ring = np.empty(_RING, np.uint64), np.empty(_RING, np.uint64)
    clock[0] += U(1)
    now = (clock[0] & _LAST) << _LAST_AT
    t = U(0)
    while t < n + _TO_BUCKET + _TO_ROW:
        if t < n:
            at = scaled(_hash(load(8, keys_at + (t << U(3))), of), buckets) * U(_WORDS)
            bucket_at[t & U(_RING - 1)] = at
            prefetch(words_at + (at << U(3)))
            prefetch(words_at + ((at + _FACTS) << U(3)))
        i = t - _TO_BUCKET  # wraps around below zero, and is then not below n
        if i < n:
            at = bucket_at[i & U(_RING - 1)]
            way = _way_of(words, at, load(8, keys_at + (i << U(3))), of)
            if way < U(_WAYS):
                fact = words[at + _FACTS + way]
                asked = min((fact >> _ASKED_AT) + U(1), _MOST_ASKED)
                words[at + _FACTS + way] = (asked << _ASKED_AT) | now | (fact & (_ABSENT | _VERSION))
                found[i] = (fact & _ABSENT) == U(0)
                row = rows_at + (at // U(_WORDS) * U(_WAYS) + way) * row_bytes
                ring[i & U(_RING - 1)] = row
                line = U(0)
                while line < row_bytes:
                    prefetch(row + line)
                    line += U(_LINE)
                prefetch(row + row_bytes - U(1))
            else:
                ring[i & U(_RING - 1)] = _MISSING
                prefetch(words_at + ((at + _COUNTERS) << U(3)))
        i = t - _TO_BUCKET - _TO_ROW
        if i < n:
            row = ring[i & U(_RING - 1)]
            if row != _MISSING:
                put_row(F32, False, to + i * row_bytes, row, dim)
                negative += not found[i]
            else:
                at, h = bucket_at[i & U(_RING - 1)], _hash(load(8, keys_at + (i << U(3))), of)
                _raise_to(words, at, h, min(_asked(words, at, h) + U(1), _MOST_ASKED))
                missing[misses] = i
                misses += 1
        t += U(1)
    clock[1] += n
    while clock[1] >= _SAMPLE:
        clock[1] -= _SAMPLE
        _halve(words, clock[2] * U(_WORDS))
        clock[2] = clock[2] + U(1) if clock[2] + U(1) < buckets else U(0)
    counts[_HITS] += found.size - misses - negative
    counts[_NEGATIVE_HITS] += negative
    counts[_MISSES] += misses
    return misses


@kernel
def _put(keys, of, words, rows, buckets, clock, dim, offered, found, negative, counts):  # type: ignore[no-untyped-def]
    n, row_bytes = U(found.size), U(4) * dim
    keys_at, words_at, rows_at = U(keys.ctypes.data), U(words.ctypes.data), U(rows.ctypes.data)
    source = U(offered.ctypes.data)
    now = (clock[0] & _LAST) << _LAST_AT
    t = U(0)
    while t < n + _TO_BUCKET:
        if t < n:
            at = scaled(_hash(load(8, keys_at + (t << U(3))), of), buckets) * U(_WORDS)
            for line in range(3):
                prefetch(words_at + ((at + U(8 * line)) << U(3)))
        i = t - _TO_BUCKET
        if i < n:
            key, kept = load(8, keys_at + (i << U(3))), negative or found[i] != 0
            h = _hash(key, of)
            at = scaled(h, buckets) * U(_WORDS)
            way = _way_of(words, at, key, of)
            if way < U(_WAYS):  # two callers have asked for it at once
                fact = words[at + _FACTS + way]
                words[at + _FACTS + way] = fact & ~_ABSENT if kept else U(0)
                counts[_EVICTED] += not kept
            elif kept:
                way = U(0)
                for w in range(1, _WAYS):
                    if words[at + _FACTS + U(w)] < words[at + _FACTS + way]:
                        way = U(w)
                asked, fact = _asked(words, at, h), words[at + _FACTS + way]
                kept = fact == U(0) or asked > fact >> _ASKED_AT
                if kept:
                    if fact != U(0):
                        _raise_to(words, at, _hash(words[at + way], fact & _VERSION), fact >> _ASKED_AT)
                        counts[_EVICTED] += 1
                    words[at + way], words[at + _FACTS + way] = key, (asked << _ASKED_AT) | now | of
                    counts[_ADMITTED] += 1
                else:
                    counts[_REJECTED] += 1
            else:
                counts[_REJECTED] += 1
            if kept:
                words[at + _FACTS + way] |= _ABSENT if found[i] == 0 else U(0)
                to = rows_at + (at // U(_WORDS) * U(_WAYS) + way) * row_bytes
                put_row(F32, False, to, source + i * row_bytes, dim)
        t += U(1)


@kernel
def _drop(words, of, counts):  # type: ignore[no-untyped-def]
    """Free the ways of one version."""
    for bucket in range(words.size // _WORDS):
        for w in range(_WAYS):
            fact = U(bucket * _WORDS + w) + _FACTS
            if (words[fact] & _VERSION) == of:
                words[fact] = U(0)
                counts[_EVICTED] += 1


KERNELS: list[Any] = [_look_up, _put, _drop]


class _Arena(NamedTuple):
    """The rows of one width."""

    words: NDArray[np.uint64]  # uint64[buckets * 24], on a cache line
    rows: NDArray[np.float32]  # float32[buckets * 8 * dim], on a cache line
    buckets: np.uint64
    clock: NDArray[np.uint64]  # uint64[3], see _look_up


class RowCache:
    """Rows of any number of tables, of up to 4095 versions at once, in a fixed amount of memory."""

    def __init__(self, most_bytes: int, *, negative: bool = True):
        """most_bytes: of all arrays; negative: whether to remember that a key is absent. Raises BadConfig."""
        if most_bytes < MIN_BYTES:
            raise BadConfig("row cache", f"{most_bytes} bytes", f"at least {MIN_BYTES}")
        self._most_bytes, self._negative = most_bytes, negative
        self._arenas: dict[int, _Arena] = {}  # by dim
        self._numbers: dict[tuple[str, Version, int], np.uint64] = {}  # of table, version, dim; the oldest first
        self._free = list(range(_MOST_VERSIONS, 0, -1))
        self._counts = np.zeros(6, np.int64)

    def look_up(
        self,
        table: str,
        version: Version,
        keys: NDArray[np.uint64],
        rows: NDArray[np.float32],
        found: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """Fill in what is known of distinct keys; returns the positions of the others, rising: int64[m].

        keys: uint64[n]; rows: float32[n, dim], C order; found: bool[n]. Of a key that is known to be absent, found is
        False and the row what was answered for it. Where a key is not known neither is touched.
        """
        _check(keys, rows, found)
        missing = np.empty(keys.size, np.int64)
        of, arena = self._at(table, version, rows.shape[1])
        if not arena.buckets:
            self._counts[_MISSES] += keys.size
            return np.arange(keys.size)
        misses = _look_up(_bytes(keys), of, *arena, rows, found, missing, self._counts)
        return missing[:misses]

    def put(
        self,
        table: str,
        version: Version,
        keys: NDArray[np.uint64],
        rows: NDArray[np.float32],
        found: NDArray[np.bool_],
    ) -> None:
        """Offer what a shard answered. keys: uint64[m]; rows: float32[m, dim], C order; found: bool[m]."""
        _check(keys, rows, found)
        of, arena = self._at(table, version, rows.shape[1])
        if not arena.buckets:
            self._counts[_REJECTED] += keys.size
            return
        offered = _bytes(keys), of, *arena, U(rows.shape[1]), _bytes(rows), _bytes(found)
        _put(*offered, self._negative, self._counts)

    def retire(self, table: str, version: Version) -> None:
        """A version is no longer read: its rows are dropped. Asked for again, it starts anew.

        Walks over all rows of that width: some 2 ms for each 64 MiB.
        """
        for known in [k for k in self._numbers if k[:2] == (table, version)]:
            self._forget(known)

    def forget(self, table: str) -> None:
        """`retire` all versions of a table."""
        for known in [k for k in self._numbers if k[0] == table]:
            self._forget(known)

    def stats(self) -> CacheStats:
        """What it came to so far."""
        hits, negative_hits, misses, admitted, rejected, evicted = self._counts.tolist()
        held = sum(_FIXED + arena.words.nbytes + arena.rows.nbytes for arena in self._arenas.values())
        return CacheStats(
            hits, negative_hits, misses, admitted, rejected, evicted, held + self._counts.nbytes, self._most_bytes,
            admitted - evicted,
        )  # fmt: skip

    def _at(self, table: str, version: Version, dim: int) -> tuple[np.uint64, _Arena]:
        """The number of a version, and where its rows are."""
        known = (table, version, dim)
        of = self._numbers.get(known)
        if of is None:
            if not self._free:
                self._forget(next(iter(self._numbers)))
            of = self._numbers[known] = U(self._free.pop())
            if dim not in self._arenas:
                self._share_out()
        return of, self._arenas[dim]

    def _forget(self, known: tuple[str, Version, int]) -> None:
        of = self._numbers.pop(known)
        _drop(self._arenas[known[2]].words, of, self._counts)
        self._free.append(int(of))

    def _share_out(self) -> None:
        """Give every width that a table has an arena, all of them empty, with as many buckets as there is room for."""
        self._counts[_EVICTED] = self._counts[_ADMITTED]
        self._arenas = {}
        dims = {dim for _, _, dim in self._numbers}
        left = self._most_bytes - self._counts.nbytes - len(dims) * _FIXED
        buckets = max(0, left // sum(8 * _WORDS + 4 * _WAYS * dim for dim in dims))
        self._arenas = {dim: _arena(buckets, dim) for dim in dims}


def _arena(buckets: int, dim: int) -> _Arena:
    """An empty one. The system gives it memory when it is first written to."""
    of_words = buckets * _WORDS * 8
    room = np.zeros(_LINE + of_words + buckets * _WAYS * dim * 4, np.uint8)
    first = -room.ctypes.data % _LINE
    words, rows = room[first : first + of_words], room[first + of_words : room.size - _LINE + first]
    return _Arena(words.view(np.uint64), rows.view(np.float32), U(buckets), np.zeros(3, np.uint64))


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """An array as its bytes, read-only.

    Keys and rows are often pieces of a message: a kernel would be compiled anew for those that are read-only, and for
    those at an odd address.
    """
    return np.frombuffer(array.data.toreadonly(), np.uint8)


def _check(keys: NDArray[np.uint64], rows: NDArray[np.float32], found: NDArray[np.bool_]) -> None:
    """Raise ValueError for arrays that are not as the kernels read and fill them."""
    check_buffer(rows, (keys.size, rows.shape[-1]), FLOAT32)
    contiguous = keys.flags.c_contiguous and found.flags.c_contiguous
    if not contiguous or keys.dtype != np.uint64 or found.dtype != np.bool_ or found.shape != keys.shape:
        given = f"{keys.dtype} keys of shape {keys.shape}, {found.dtype} marks of shape {found.shape}"
        raise ValueError(f"buffers: found {given}, expected uint64 and bool of one shape, in C order")
