"""The perfect-hash index of a segment: which place holds a key. Formulas and their source: FORMAT.md, "Index".

Pilots are 0.44 byte a key and stay in cache, so a lookup costs about the one memory access that fetches key and row.
Keys are split into partitions by hash, each with pilots and places of its own: one partition is built in memory (its
bitmap of taken places fits a core's cache), so any number of keys is built in bounded memory, on several cores.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.kernels import U, clear, inlined, kernel, load, mix, prefetch, store_key
from cube.rows import RAW, UINT64, RowFormat, divide, flat, put_row

KEYS_PER_BUCKET = 4.5
LOAD = 0.97  # places are keys / LOAD: fuller partitions need far longer searches for a pilot
SEED = U(0x9E3779B97F4A7C15)
_MULTIPLIERS = tuple(0xC4CEB9FE1A85EC53 * 3**n % (1 << 64) for n in range(2))  # odd: one for each try
_PILOT_SPREAD = U(0x9E3779B97F4A7C15)
_DENSE_HASHES = U(2576980377)  # 0.6 * 2**32
_LOW, _HIGH = U(0xFFFFFFFF), U(32)

# A lookup is three steps per key, run at distances from each other so that every memory access was asked for long
# before it is needed: hash and ask for the pilot; find the place and ask for its lines; compare the key and copy the
# row.
_RING, _TO_PLACE, _TO_ROW = 64, U(16), U(24)  # keys in flight: a power of two above the sum of the distances
_OVERLAID = U(1 << 63)  # a mark in the ring: not an address, but a slot of the overlay
_EACH_BYTE = U(0x0101010101010101)
DELETED = U(1 << 31)  # a mark in a slot of an overlay: the key was deleted

# columns of a partition as the kernels see it
_PLACES_START, _PILOTS_START, _PLACES, _DENSE, _DENSE_SCALE, _SPARSE_SCALE, _MULTIPLIER = map(U, range(7))


@inlined
def _partition_of(h, partitions):  # type: ignore[no-untyped-def]
    return ((h & _LOW) * partitions) >> _HIGH


@inlined
def _bucket_of(h, dense, dense_scale, sparse_scale):  # type: ignore[no-untyped-def]
    top = h >> _HIGH
    if top < _DENSE_HASHES:
        return (top * dense_scale) >> _HIGH
    return dense + (((top - _DENSE_HASHES) * sparse_scale) >> _HIGH)


@inlined
def _place_of(h, pilot, multiplier, places):  # type: ignore[no-untyped-def]
    return ((((h ^ (pilot * _PILOT_SPREAD)) * multiplier) >> _HIGH) * places) >> _HIGH


@kernel
def _partitions(keys, partitions, out):  # type: ignore[no-untyped-def]
    for i in range(keys.size):
        out[i] = _partition_of(mix(keys[i] ^ SEED), partitions)


@kernel
def _find_pilots(keys, places, dense, dense_scale, sparse_scale, multiplier, pilots):  # type: ignore[no-untyped-def]
    """Fill pilots so that all keys get places of their own; False if some bucket finds no pilot. Keys are distinct."""
    n, buckets = keys.size, pilots.size
    starts, bucket = np.zeros(buckets + 1, np.int64), np.empty(n, np.int32)
    for i in range(n):
        bucket[i] = np.int32(_bucket_of(mix(keys[i] ^ SEED), dense, dense_scale, sparse_scale))
        starts[bucket[i] + 1] += 1
    largest = starts.max()
    by_size = np.zeros(
        largest + 2, np.int64
    )  # counting sort, largest first, while there is room; stable: files reproduce
    for b in range(buckets):
        by_size[largest - starts[b + 1] + 1] += 1
    by_size = np.cumsum(by_size)
    order = np.empty(buckets, np.int32)
    for b in range(buckets):
        order[by_size[largest - starts[b + 1]]] = b
        by_size[largest - starts[b + 1]] += 1
    starts = np.cumsum(starts)
    fill, members = starts.copy(), np.empty(n, np.uint64)
    for i in range(n):
        members[fill[bucket[i]]] = mix(keys[i] ^ SEED)
        fill[bucket[i]] += 1
    taken, tried = np.zeros((places + 63) // 64, np.uint64), np.empty(largest + 1, np.uint64)
    for b in order:
        first, size, fits = starts[b], starts[b + 1] - starts[b], False
        for pilot in range(65536):
            fits = True
            for j in range(size):
                x = _place_of(members[first + j], U(pilot), multiplier, U(places))
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
def _find_strangers(multiplier, strangers):  # type: ignore[no-untyped-def]
    """For each of two places under pilot 0 the least key that is sent to the other one."""
    for place in range(2):
        key = U(0)
        while _place_of(mix(key ^ SEED), U(0), multiplier, U(2)) == U(place):  # ends: half of all keys are
            key += U(1)
        strangers[place] = key


@kernel
def _fill(keys, rows, stride, facts, pilots, block):  # type: ignore[no-untyped-def]
    """Lay keys and rows out in places; free ones get the first key, which lives elsewhere."""
    to, source, row_bytes = U(block.ctypes.data), U(rows.ctypes.data), U(rows.size // keys.size)
    for x in range(U(block.size) // stride):
        store_key(to + U(x) * stride, keys[0])
    ahead, ring = 16, np.empty(16, np.uint64)
    for t in range(keys.size + ahead):
        i = t - ahead
        if i >= 0:
            place = ring[i % ahead]
            store_key(place, keys[i])
            put_row(RAW, False, place + U(8), source + U(i) * row_bytes, row_bytes)
        if t < keys.size:
            h = mix(keys[t] ^ SEED)
            bucket = _bucket_of(h, facts[_DENSE], facts[_DENSE_SCALE], facts[_SPARSE_SCALE])
            place = to + _place_of(h, U(pilots[bucket]), facts[_MULTIPLIER], facts[_PLACES]) * stride
            ring[t % ahead] = place
            prefetch(place)
            prefetch(place + stride - U(1))


@inlined
def _fact(partitions_at, p, column):  # type: ignore[no-untyped-def]
    """A fact of partition p, of which each has a cache line."""
    return load(8, partitions_at + (p << U(6)) + (column << U(3)))


@inlined
def _pilot_at(h, partitions_at, partitions, pilots_at):  # type: ignore[no-untyped-def]
    """The address of the pilot of a key with hash h."""
    p = _partition_of(h, partitions)
    bucket = _bucket_of(
        h,
        _fact(partitions_at, p, _DENSE),
        _fact(partitions_at, p, _DENSE_SCALE),
        _fact(partitions_at, p, _SPARSE_SCALE),
    )
    return pilots_at + ((_fact(partitions_at, p, _PILOTS_START) + bucket) << U(1))


@inlined
def _place_at(h, pilot, partitions_at, partitions, places_at, stride):  # type: ignore[no-untyped-def]
    """The address of the one place where a key with hash h can be."""
    p = _partition_of(h, partitions)
    place = _place_of(h, pilot, _fact(partitions_at, p, _MULTIPLIER), _fact(partitions_at, p, _PLACES))
    return places_at + (_fact(partitions_at, p, _PLACES_START) + place) * stride


@inlined
def tag_of(h):  # type: ignore[no-untyped-def]
    """What a slot of an overlay remembers of a hash, in one byte; 0 is for free slots."""
    return max(h >> U(56), U(1))


@inlined
def _zero_bytes(word):  # type: ignore[no-untyped-def]
    """The highest bit of every byte that is 0; above the lowest of them there may be more (Mycroft 1987)."""
    return (word - _EACH_BYTE) & ~word & (_EACH_BYTE << U(7))


@inlined
def _lowest(bits):  # type: ignore[no-untyped-def]
    return bits & (U(0) - bits)


@kernel
def _lookup(  # type: ignore[no-untyped-def]
    keys, data, places_offset, stride, partitions, pilots_offset, default_at, tags, slots, arena, kind, size, offsets,
    out, out_stride, found,
):  # fmt: skip
    """Put the row of keys[i] to out + i * out_stride; with offsets, add it to its bag's. Returns how many are absent.

    tags, slots, arena: an overlay, see overlay.py. Overlay and offsets are None where there are none: numba compiles a
    kernel of its own for each kind of call, without the branches that it does not need. default_at: offset in data of
    what absent keys read, or 0.
    """
    n, absent = U(keys.size), U(0)
    start, to = U(data.ctypes.data), U(out.ctypes.data)
    places_at, pilots_at = start + places_offset, start + pilots_offset
    partitions_at, count = U(partitions.ctypes.data), U(partitions.shape[0])
    if tags is not None:
        tags_at, slots_at, arena_at = U(tags.ctypes.data), U(slots.ctypes.data), U(arena.ctypes.data)
        slot_mask = U(slots.size - 1)
    distance, bag = _TO_PLACE + _TO_ROW, 0
    ring, pilot_at = np.empty(_RING, np.uint64), np.empty(_RING, np.uint64)
    t = U(0)
    while t < n + distance:
        if t < n:
            s = t & U(_RING - 1)
            h = mix(keys[t] ^ SEED)
            ring[s] = h
            pilot_at[s] = _pilot_at(h, partitions_at, count, pilots_at)
            prefetch(pilot_at[s])
            if tags is not None:
                prefetch(tags_at + (h & slot_mask))
        i = t - _TO_PLACE  # wraps around below zero, and is then not below n
        if i < n:
            s = i & U(_RING - 1)
            h, changed = ring[s], False
            if tags is not None:
                # eight slots at once: no key is here whose tag is not met before the first free slot
                slot = h & slot_mask
                eight = load(8, tags_at + slot)
                free, alike = _zero_bytes(eight), _zero_bytes(eight ^ (tag_of(h) * _EACH_BYTE))
                changed = free == U(0) or (alike != U(0) and _lowest(alike) < _lowest(free))
                if changed:
                    alike = _lowest(alike) >> U(8)
                    while alike != U(0):  # ends: it gets shorter
                        slot, alike = slot + U(1), alike >> U(8)
                    slot &= slot_mask
                    ring[s] = slot | _OVERLAID
                    prefetch(slots_at + (slot << U(2)))
            if not changed:
                at = _place_at(h, load(2, pilot_at[s]), partitions_at, count, places_at, stride)
                ring[s] = at
                prefetch(at)
                prefetch(at + stride - U(1))
                line = U(64)
                while line + U(64) < stride:
                    prefetch(at + line)
                    line += U(64)
        if tags is not None:
            i = t - _TO_PLACE - _TO_ROW // U(2)
            if i < n and ring[i & U(_RING - 1)] >= _OVERLAID:
                slot = ring[i & U(_RING - 1)] ^ _OVERLAID
                at = arena_at + (load(4, slots_at + (slot << U(2))) & (DELETED - U(1))) * stride
                prefetch(at)
                prefetch(at + stride - U(1))
        i = t - distance
        if i < n:
            at, deleted = ring[i & U(_RING - 1)], False
            if tags is not None and at >= _OVERLAID:  # a tag agrees: nearly always the key does, too
                slot, at, h = at ^ _OVERLAID, U(0), mix(keys[i] ^ SEED)
                while at == U(0):  # ends: an overlay always has free slots
                    seen = load(1, tags_at + slot)
                    if seen == U(0):
                        pilot = load(2, _pilot_at(h, partitions_at, count, pilots_at))
                        at = _place_at(h, pilot, partitions_at, count, places_at, stride)
                    elif seen == tag_of(h):
                        entry = load(4, slots_at + (slot << U(2)))
                        here = arena_at + (entry & (DELETED - U(1))) * stride
                        if load(8, here) == keys[i]:
                            at, deleted = here, entry >= DELETED
                    slot = (slot + U(1)) & slot_mask
            row_to = to + i * out_stride
            if offsets is not None:
                while i >= U(offsets[bag + 1]):  # ends: the last offset is n
                    bag += 1
                row_to = to + U(bag) * out_stride
            is_here = not deleted and load(8, at) == keys[i]
            found[i] = is_here
            if is_here:
                put_row(kind, offsets is not None, row_to, at + U(8), size)
            else:
                absent += U(1)
                if default_at != U(0):
                    put_row(kind, offsets is not None, row_to, start + default_at, size)
                elif offsets is None:
                    clear(row_to, out_stride)
        t += U(1)
    return absent


@kernel
def _homes(keys, data, partitions, pilots_offset, out):  # type: ignore[no-untyped-def]
    pilots_at, partitions_at = U(data.ctypes.data) + pilots_offset, U(partitions.ctypes.data)
    count = U(partitions.shape[0])
    for i in range(keys.size):
        h = mix(keys[i] ^ SEED)
        out[i] = _place_at(h, load(2, _pilot_at(h, partitions_at, count, pilots_at)), partitions_at, count, U(0), U(1))


@kernel
def _means(offsets, sums):  # type: ignore[no-untyped-def]
    divide(offsets, sums)


KERNELS: list[Any] = [_lookup]


class Partition(NamedTuple):
    """One partition, built. See FORMAT.md, "Index"."""

    keys: int
    places: int
    multiplier: int
    pilots: NDArray[np.uint16]  # uint16[buckets]
    block: NDArray[np.uint8]  # uint8[places * stride]


class Overlay(NamedTuple):
    """The arrays of an overlay as the lookup reads them; see overlay.py."""

    tags: NDArray[np.uint8]  # uint8[slots + 7], slots a power of two; the first seven again at the end
    slots: NDArray[np.uint32]
    arena: NDArray[np.uint8]


_unsigned = lru_cache(1_024)(U)  # of sizes, which are few


class Places(NamedTuple):
    """Where a lookup finds things in the bytes of a segment. Offsets are bytes, of the type that kernels take."""

    data: NDArray[np.uint8]  # uint8[file_bytes]
    places_offset: np.uint64
    stride: np.uint64
    partitions: NDArray[np.uint64]  # uint64[partitions, 8], see `described`
    pilots_offset: np.uint64
    default_row_offset: np.uint64  # 0: absent keys read zeros


def partitions_of(keys: NDArray[np.uint64], partitions: int) -> NDArray[np.int32]:
    """The partition of each key (uint64[n]) of a segment with so many: int32[n]."""
    out = np.empty(keys.size, np.int32)
    _partitions(keys, U(partitions), out)
    return out


def build(keys: NDArray[np.uint64], rows: NDArray[np.uint8], stride: int) -> Partition:
    """Lay one partition out. keys: uint64[n], distinct; rows: uint8[n, row_bytes]; stride: bytes of a place."""
    if keys.size == 0:
        return _empty(stride)
    # few buckets are uneven: one of them may get more keys than any pilot sends apart
    buckets, places = max(min(keys.size, 16), int(keys.size / KEYS_PER_BUCKET)), int(keys.size / LOAD) + 1
    block = np.zeros(places * stride, np.uint8)
    while buckets < 1 << 31:  # ends: with more and more buckets they come to hold a key each
        for multiplier in _MULTIPLIERS:
            pilots = np.zeros(buckets, np.uint16)
            facts = described(np.array([[0, 0, places, buckets, multiplier]], np.uint64))[0]
            if _find_pilots(keys, places, facts[3], facts[4], facts[5], facts[6], pilots):
                _fill(keys, flat(rows), U(stride), facts, pilots, block)
                return Partition(keys.size, places, multiplier, pilots, block)
        buckets *= 2
    raise AssertionError(f"no pilots give {keys.size} distinct keys places of their own")


def _empty(stride: int) -> Partition:
    """No keys: two places, each with a key that would be sent to the other, so that whoever comes sees a stranger."""
    block, strangers = np.zeros((2, stride), np.uint8), np.empty(2, np.uint64)
    _find_strangers(U(_MULTIPLIERS[0]), strangers)
    block[:, :8] = strangers.view(np.uint8).reshape(2, 8)
    return Partition(0, 2, _MULTIPLIERS[0], np.zeros(1, np.uint16), block.reshape(-1))


def described(facts: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Partitions as the kernels read them, a cache line each.

    facts: uint64[n, 5]: places_start, pilots_start, places, buckets, multiplier. Returns uint64[n, 8]: places_start,
    pilots_start, places, dense, dense_scale, sparse_scale, multiplier, 0.
    """
    room = np.zeros(len(facts) * 8 + 7, np.uint64)
    first = -room.ctypes.data % 64 // 8
    out = room[first : first + len(facts) * 8].reshape(-1, 8)
    buckets = facts[:, 3]
    dense = buckets * U(3) // U(10)
    out[:, :3], out[:, 3], out[:, 6] = facts[:, :3], dense, facts[:, 4]
    out[:, 4], out[:, 5] = dense * U(5) // U(3), (buckets - dense) * U(5) // U(2)
    return out


def homes(places: Places, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The number of the one place where each key (uint64[n]) can be: int64[n]."""
    out = np.empty(keys.size, np.int64)
    _homes(keys, places.data, places.partitions, places.pilots_offset, out)
    return out


def read(
    places: Places, overlay: Overlay | None, row_bytes: int, keys: NDArray[np.uint64], out: NDArray[np.uint8],
    found: NDArray[np.bool_],
) -> int:  # fmt: skip
    """Rows as stored: out uint8[n, row_bytes]. Returns how many keys are absent."""
    return _run(places, overlay, RAW, row_bytes, None, keys, out, row_bytes, found)


def lookup(
    places: Places, overlay: Overlay | None, row_format: RowFormat, keys: NDArray[np.uint64], out: NDArray[np.float32],
    found: NDArray[np.bool_],
) -> int:  # fmt: skip
    """Rows decoded: out float32[n, dim]. Returns how many keys are absent."""
    dim = out.shape[1]
    return _run(places, overlay, int(row_format), dim, None, keys, out, 4 * dim, found)


def pooled(
    places: Places, overlay: Overlay | None, row_format: RowFormat, keys: NDArray[np.uint64],
    offsets: NDArray[np.int64], mean: bool, out: NDArray[np.float32], found: NDArray[np.bool_],
) -> int:  # fmt: skip
    """Rows decoded and added up by bag: out float32[bags, dim]; offsets are checked. Returns how many are absent."""
    dim = out.shape[1]
    out[:] = 0
    absent = _run(places, overlay, int(row_format), dim, offsets, keys, out, 4 * dim, found)
    if mean:
        _means(offsets, out)
    return absent


def _run(
    places: Places, overlay: Overlay | None, kind: int, size: int, offsets: NDArray[np.int64] | None,
    keys: NDArray[np.uint64], out: NDArray[Any], out_stride: int, found: NDArray[np.bool_],
) -> int:  # fmt: skip
    data, places_offset, stride, partitions, pilots_offset, default_at = places
    bags = keys.size if offsets is None else offsets.size - 1
    if not keys.flags.c_contiguous:  # a kernel is compiled anew for every other layout
        keys = np.ascontiguousarray(keys)
    tags, slots, arena = overlay or (None, None, None)
    if (
        keys.dtype != UINT64
        or found.shape != keys.shape
        or out.nbytes != bags * out_stride
        or not found.flags.c_contiguous
    ):
        raise ValueError(f"buffers of {out.nbytes} bytes, {found.size} marks for {keys.size} {keys.dtype} keys")
    absent = _lookup(
        keys, data, places_offset, stride, partitions, pilots_offset, default_at, tags, slots, arena, kind,
        _unsigned(size), offsets, flat(out), _unsigned(out_stride), found,
    )  # fmt: skip
    return int(absent)
