"""Upserts and deletes over a segment, looked up in the same pass at nearly the same speed.

Changed rows lie in an *arena*, places like a segment's, in order of arrival, never overwritten. A hash table leads to
them: a tag byte per slot, which stays in cache and for nearly all other keys says at once that nothing changed, and a
32-bit number of a place in the arena, whose highest bit says that the key was deleted. Tags and numbers are copied
for every batch of changes (5 bytes a slot) and the new state is swapped in, so lookups take no lock, see all of a
batch or nothing, and a `snapshot` costs nothing and stays as it is.
"""

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from cube.kernels import U, inlined, kernel, load, mix, store_key
from cube.rows import RAW, flat, put_row
from cube.storage.index import DELETED, SEED, Overlay, tag_of
from cube.storage.segment import Segment
from cube.storage.store import Capabilities, Store, checked_rows

_SLOTS_PER_KEY = 2  # at most half of the slots are taken: probes stay short
_FIRST_SLOTS, _MOST_ROWS = 1024, int(DELETED) - 1


@inlined
def _set_tag(tags, s, mask, tag):  # type: ignore[no-untyped-def]
    """Lookups read eight tags at once: those at the end go on with the first ones."""
    tags[s] = tag
    if s < U(7):
        tags[mask + U(1) + s] = tag


@kernel
def _apply(keys, raw, deleted, stride, row_bytes, first, tags, slots, arena):  # type: ignore[no-untyped-def]
    """Lay changes out from place `first` of the arena on, point the hash table at them; returns how many are new."""
    mask, new = U(slots.size - 1), 0
    arena_at, source = U(arena.ctypes.data), U(raw.ctypes.data)
    for i in range(keys.size):
        number, h = first + U(i), mix(keys[i] ^ SEED)
        place = arena_at + number * stride
        store_key(place, keys[i])
        if not deleted:
            put_row(RAW, False, place + U(8), source + U(i) * row_bytes, row_bytes)
        s = h & mask
        while tags[s] != 0 and not (  # ends: half of the slots are free
            tags[s] == tag_of(h) and load(8, arena_at + (U(slots[s]) & (DELETED - U(1))) * stride) == keys[i]
        ):
            s = (s + U(1)) & mask
        new += tags[s] == 0
        _set_tag(tags, s, mask, tag_of(h))
        slots[s] = number | DELETED if deleted else number
    return new


@kernel
def _move(old_tags, old_slots, old_arena, stride, tags, slots, arena):  # type: ignore[no-untyped-def]
    """Fill a larger hash table and arena with what an old one leads to; returns how many places are taken then."""
    mask, taken = U(slots.size - 1), U(0)
    source, to = U(old_arena.ctypes.data), U(arena.ctypes.data)
    for old in range(old_slots.size):
        if old_tags[old] != 0:
            place = source + (U(old_slots[old]) & (DELETED - U(1))) * stride
            put_row(RAW, False, to + taken * stride, place, stride)
            h = mix(load(8, place) ^ SEED)
            s = h & mask
            while tags[s] != 0:  # ends: half of the slots are free
                s = (s + U(1)) & mask
            _set_tag(tags, s, mask, old_tags[old])
            slots[s] = taken | (U(old_slots[old]) & DELETED)
            taken += U(1)
    return taken


@kernel
def _changed(keys, stride, tags, slots, arena, out):  # type: ignore[no-untyped-def]
    mask, arena_at = U(slots.size - 1), U(arena.ctypes.data)
    for i in range(keys.size):
        h = mix(keys[i] ^ SEED)
        s, out[i] = h & mask, False
        while tags[s] != 0 and not out[i]:  # ends: half of the slots are free
            number = U(slots[s]) & (DELETED - U(1))
            out[i] = tags[s] == tag_of(h) and load(8, arena_at + number * stride) == keys[i]
            s = (s + U(1)) & mask


class _Arena:
    """Places for changed rows, shared by an overlay and its snapshots: each takes its own."""

    def __init__(self, capacity: int, stride: int, taken: int = 0):
        self.capacity, self._taken = capacity, taken  # _taken: guarded by _lock
        self.data = np.empty(capacity * stride, np.uint8)
        self._lock = threading.Lock()

    def take(self, count: int) -> int | None:
        """The number of the first of so many free places, None if there are not enough."""
        with self._lock:
            if self._taken + count > self.capacity:
                return None
            self._taken += count
            return self._taken - count


class _State(NamedTuple):
    """All that a lookup needs; never changed once it can be seen."""

    hashed: Overlay
    arena: _Arena
    changed: int  # keys that the hash table leads to, deleted ones included
    keys: int  # of segment and changes together


class OverlaidSegment(Store):
    """A segment and the changes laid over it. Lookups see a batch of changes wholly or not at all."""

    capabilities = Capabilities(writable=True, scan=True, verify=True, fused=True)

    def __init__(self, base: Segment):
        self._base, self.about, self.file_bytes = base, base.about, base.file_bytes
        self._stride = base.header.stride
        self._state = _empty(base)  # swapped as a whole, by one writer at a time
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return self._state.keys

    @property
    def changed(self) -> int:
        """How many keys have another row than in the segment, or none."""
        return self._state.changed

    @property
    def overlay_bytes(self) -> int:
        """Memory held by the changes."""
        return sum(array.nbytes for array in self._state.hashed)

    def snapshot(self) -> "OverlaidSegment":
        """The same rows, never to see later changes of this one, nor this one its."""
        copy = OverlaidSegment(self._base)
        copy._state, copy.checked = self._state, self.checked
        return copy

    def read(self, keys: NDArray[np.uint64], rows: NDArray[np.uint8], found: NDArray[np.bool_]) -> int:
        return self._base.read(keys, rows, found, self._state.hashed)

    def lookup(self, keys: NDArray[np.uint64], out: NDArray[np.float32], found: NDArray[np.bool_]) -> int:
        return self._base.lookup(keys, out, found, self._state.hashed)

    def pooled(
        self, keys: NDArray[np.uint64], offsets: NDArray[np.int64], mean: bool, out: NDArray[np.float32],
        found: NDArray[np.bool_],
    ) -> int:  # fmt: skip
        return self._base.pooled(keys, offsets, mean, out, found, self._state.hashed)

    def upsert(self, keys: NDArray[np.uint64], rows: NDArray[np.float32]) -> None:
        self._change(keys, checked_rows(self.about, keys, rows))

    def delete(self, keys: NDArray[np.uint64]) -> None:
        self._change(keys, None)

    def scan(self, batch: int = 65536) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
        """The segment's rows that did not change, then the changed ones."""
        hashed = self._state.hashed
        for keys, rows in self._base.scan(batch):
            kept = np.empty(keys.size, np.bool_)
            _changed(keys, U(self._stride), *hashed, kept)
            yield keys[~kept], rows[~kept]
        live = hashed.slots[(hashed.tags[: hashed.slots.size] != 0) & (hashed.slots < DELETED)]
        places = hashed.arena.reshape(-1, self._stride)
        for start in range(0, live.size, batch):
            block = places[live[start : start + batch]]
            yield block[:, :8].copy().view(np.uint64).reshape(-1), block[:, 8 : 8 + self.about.row_bytes]

    def verify(self, progress: Callable[[int], object] = lambda bytes_read: None) -> None:
        try:
            self._base.verify(progress)
        finally:
            self.checked = self._base.checked

    def load(self) -> None:
        self._base.load()

    def _change(self, keys: NDArray[np.uint64], raw: NDArray[np.uint8] | None) -> None:
        """Set (raw: uint8[n, row_bytes]) or delete (None) the rows of keys."""
        with self._writing:
            _, last = np.unique(keys[::-1], return_index=True)
            last = keys.size - 1 - last
            keys, raw = np.ascontiguousarray(keys[last], np.uint64), None if raw is None else raw[last]
            found = np.empty(keys.size, np.bool_)
            absent = self.read(keys, np.empty((keys.size, self.about.row_bytes), np.uint8), found)
            state = self._with_room_for(keys.size)
            first = state.arena.take(keys.size)
            if first is None:  # a snapshot has taken what there was since
                state = self._moved(state, keys.size)
                first = state.arena.take(keys.size)
            assert first is not None  # nobody else has the new arena yet
            hashed, bytes_ = state.hashed, np.empty(0, np.uint8) if raw is None else flat(raw)
            new = _apply(keys, bytes_, raw is None, U(self._stride), U(self.about.row_bytes), U(first), *hashed)
            gained = -(keys.size - absent) if raw is None else absent
            self._state = state._replace(changed=state.changed + new, keys=state.keys + gained)

    def _with_room_for(self, count: int) -> _State:
        """A copy of the state whose hash table has room for so many more keys."""
        state = self._state
        if (state.changed + count) * _SLOTS_PER_KEY > state.hashed.slots.size:
            return self._moved(state, count)
        hashed = state.hashed
        return state._replace(hashed=Overlay(hashed.tags.copy(), hashed.slots.copy(), hashed.arena))

    def _moved(self, state: _State, count: int) -> _State:
        """A copy of the state with room for so many more keys, without places that nothing leads to any more."""
        need = state.changed + count
        if need > _MOST_ROWS:
            raise BadData(
                f"table {self.about.table!r}", f"{need} changed keys", f"at most {_MOST_ROWS}: build a new base"
            )
        slots = _FIRST_SLOTS
        while slots < need * _SLOTS_PER_KEY:
            slots *= 2
        arena = _Arena(need + max(need // 2, _FIRST_SLOTS // 2), self._stride, state.changed)
        hashed = Overlay(np.zeros(slots + 7, np.uint8), np.zeros(slots, np.uint32), arena.data)
        _move(*state.hashed, U(self._stride), *hashed)
        return state._replace(hashed=hashed, arena=arena)


def _empty(base: Segment) -> _State:
    stride = base.header.stride
    arena = _Arena(_FIRST_SLOTS // 2, stride)
    hashed = Overlay(np.zeros(_FIRST_SLOTS + 7, np.uint8), np.zeros(_FIRST_SLOTS, np.uint32), arena.data)
    return _State(hashed, arena, 0, len(base))
