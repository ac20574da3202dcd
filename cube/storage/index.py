"""The perfect-hash index of a segment: which place holds a key. Formulas and their source: FORMAT.md, "Index".

The pilots are 0.44 byte a key and stay in cache, so a lookup costs about the one memory access that fetches key and
row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cube.kernels import U, inlined, kernel, mix, prefetch, scaled

KEYS_PER_BUCKET = 4.5
LOAD = 0.97  # places are keys / LOAD: fuller tables need far longer searches for a pilot
_SEEDS = tuple(0x9E3779B97F4A7C15 * n % (1 << 64) for n in range(1, 9))
_DENSE_HASHES = U(int(0.6 * 2**32))
_BLOCK = 32  # keys in flight: prefetched together before any of them is read


@inlined
def _bucket_of(h, dense, sparse):  # type: ignore[no-untyped-def]
    return scaled(h, dense) if (h & U(0xFFFFFFFF)) < _DENSE_HASHES else dense + scaled(h, sparse)


@inlined
def _place_of(h, pilot, places):  # type: ignore[no-untyped-def]
    return scaled(mix(h ^ (U(pilot) * U(0x9E3779B97F4A7C15))), places)


@kernel
def _find_pilots(keys, places, seed, pilots):  # type: ignore[no-untyped-def]
    """Fill pilots so that all keys get places of their own; False if some bucket finds no pilot. Keys are distinct."""
    buckets = pilots.size
    dense = U(buckets * 3 // 10)
    sparse = U(buckets) - dense
    starts, bucket = np.zeros(buckets + 1, np.int64), np.empty(keys.size, np.int64)
    for i in range(keys.size):
        bucket[i] = np.int64(_bucket_of(mix(keys[i] ^ seed), dense, sparse))
        starts[bucket[i] + 1] += 1
    largest = starts.max()
    starts = np.cumsum(starts)
    fill, members = starts.copy(), np.empty(keys.size, np.uint64)
    for i in range(keys.size):
        members[fill[bucket[i]]] = mix(keys[i] ^ seed)
        fill[bucket[i]] += 1
    taken, tried = np.zeros((places + 63) // 64, np.uint64), np.empty(largest + 1, np.uint64)
    for b in np.argsort(
        starts[:-1] - starts[1:], kind="mergesort"
    ):  # largest first, while there is room; stable: files reproduce
        first, size, fits = starts[b], starts[b + 1] - starts[b], False
        for pilot in range(65536):
            fits = True
            for j in range(size):
                x = _place_of(members[first + j], pilot, U(places))
                if (taken[x >> U(6)] >> (x & U(63))) & U(1):
                    fits = False
                for k in range(j):
                    fits = fits and tried[k] != x
                if not fits:
                    break
                tried[j] = x
            if fits:
                break
        if not fits:
            return False
        pilots[b] = pilot
        for j in range(size):
            taken[tried[j] >> U(6)] |= U(1) << (tried[j] & U(63))
    return True


@kernel
def _store(keys, rows, seed, pilots, table):  # type: ignore[no-untyped-def]
    """table: uint32[places, 2 + words]: key low, key high, row. Free places get a key that lives elsewhere."""
    dense, places = U(pilots.size * 3 // 10), U(table.shape[0])
    sparse = U(pilots.size) - dense
    for x in range(table.shape[0]):
        table[x, 0], table[x, 1] = keys[0] & U(0xFFFFFFFF), keys[0] >> U(32)
    for i in range(keys.size):
        h = mix(keys[i] ^ seed)
        x = _place_of(h, pilots[np.int64(_bucket_of(h, dense, sparse))], places)
        table[x, 0], table[x, 1] = keys[i] & U(0xFFFFFFFF), keys[i] >> U(32)
        for j in range(rows.shape[1]):
            table[x, 2 + j] = rows[i, j]


@kernel
def _lookup(keys, table, pilots, seed, out, found):  # type: ignore[no-untyped-def]
    """out: uint32[n, words], found: bool[n]; absent keys get zero rows. Returns how many are absent."""
    places, stride, words = U(table.shape[0]), table.shape[1], table.shape[1] - 2
    dense = U(pilots.size * 3 // 10)
    sparse = U(pilots.size) - dense
    flat, absent = table.reshape(-1), 0
    h, bucket, at = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    for start in range(0, keys.size, _BLOCK):
        n = min(_BLOCK, keys.size - start)
        for i in range(n):
            h[i] = mix(keys[start + i] ^ seed)
            bucket[i] = np.int64(_bucket_of(h[i], dense, sparse))
            prefetch(pilots, bucket[i])
        for i in range(n):
            at[i] = np.int64(_place_of(h[i], pilots[bucket[i]], places)) * stride
            prefetch(flat, at[i])
            prefetch(flat, at[i] + stride - 1)
        for i in range(n):
            here = (U(flat[at[i]]) | (U(flat[at[i] + 1]) << U(32))) == keys[start + i]
            found[start + i] = here
            if here:
                for j in range(words):
                    out[start + i, j] = flat[at[i] + 2 + j]
            else:
                absent += 1
                for j in range(words):
                    out[start + i, j] = U(0)
    return absent


KERNELS: list[Any] = [_lookup]


def build(keys: NDArray[np.uint64], rows: NDArray[np.uint32]) -> tuple[int, NDArray[np.uint16], NDArray[np.uint32]]:
    """Seed, pilots and places of distinct keys.

    keys: uint64[n], distinct; rows: uint32[n, words], the bytes of the rows. Returns seed, pilots uint16[buckets] and
    places uint32[places, 2 + words].
    """
    buckets = max(2, int(keys.size / KEYS_PER_BUCKET))
    places = int(keys.size / LOAD) + 1
    pilots = np.zeros(buckets, np.uint16)
    table = np.zeros((places, 2 + rows.shape[1]), np.uint32)
    for seed in _SEEDS:
        if _find_pilots(keys, places, U(seed), pilots):
            break
    else:
        raise AssertionError(f"no seed gives {keys.size} distinct keys places of their own")
    if keys.size:
        _store(keys, rows, U(seed), pilots, table)
    return seed, pilots, table


def lookup(
    keys: NDArray[np.uint64],
    table: NDArray[np.uint32],
    pilots: NDArray[np.uint16],
    seed: int,
    out: NDArray[np.uint32],
    found: NDArray[np.bool_],
) -> int:
    """Fill out (uint32[n, words]) and found (bool[n]) for keys (uint64[n]); returns the number of absent keys."""
    return int(_lookup(keys, table, pilots, U(seed), out, found))
