"""Asks a cube: unique keys, split by shard, asked in parallel, put back in order.

`RemoteCube` asks cube-servers; `LocalCube` opens the same files in this process. Both answer alike.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadRequest, DataCorrupt, DeadlineExceeded, ShardUnavailable, Unavailable
from cube.kernels import U, kernel, mix
from cube.keys import shards_of
from cube.pb import cube_pb2 as pb
from cube.rpc.calls import Buffer, parse
from cube.rpc.channel import Channel
from cube.service import KEYS_ON_LOOP, LOOKUP, LOOKUP_REPLY, STATUS, is_short
from cube.storage.index import KERNELS as INDEX_KERNELS
from cube.storage.store import Store
from cube.table import Table, Verification, open_tables, shards_in
from cube.version import Version


class Rows(NamedTuple):
    """Rows in the order of the keys asked for."""

    rows: NDArray[np.float32]  # float32[n, dim], zeros where absent
    found: NDArray[np.bool_]  # bool[n]


class Cube(Protocol):
    """What a predictor needs of a cube."""

    async def open(self, tables: Mapping[str, tuple[Version, int]], wait_s: float, absent_zeros: bool = True) -> None:
        """Check that every shard has these versions (and dims) of these tables, waiting up to `wait_s` for shards.

        Raises BadConfig for a table, version or dim that is not there, and where absent keys do not read zeros unless
        `absent_zeros` is False; ShardUnavailable for a shard that is not there.
        """

    async def gather(self, table: str, version: Version, keys: NDArray[np.uint64], timeout_s: float) -> Rows:
        """Rows of keys (uint64[n], any order, repeats allowed) of one version of one table that `open` was told of."""

    async def close(self) -> None:
        """Release files or connections."""

    def __str__(self) -> str:
        """Where the rows come from, for people."""


class LocalCube:
    """The files of all shards under one directory, opened in this process."""

    def __init__(self, data: Path):
        """Open the newest versions under `data`; raises BadConfig, DataCorrupt."""
        self._data, self._shards = data, shards_in(data)
        self._tables: list[dict[str, Table]] = [open_tables(data, shard, self._shards) for shard in range(self._shards)]
        self._verification = Verification(self._stores())  # started by open

    def __str__(self) -> str:
        return f"local cube {self._data}"

    async def open(self, tables: Mapping[str, tuple[Version, int]], wait_s: float, absent_zeros: bool = True) -> None:
        for shard, there in enumerate(self._tables):
            _check(tables, _described(there), f"local cube {self._data} shard {shard}", absent_zeros)
        self._verification.start()

    async def gather(self, table: str, version: Version, keys: NDArray[np.uint64], timeout_s: float) -> Rows:
        if is_short(self._tables[0][table].store(version), keys.size):
            return self.rows(table, version, keys)
        return await asyncio.to_thread(self.rows, table, version, keys)

    def rows(self, table: str, version: Version | None, keys: NDArray[np.uint64]) -> Rows:
        """`gather` without an event loop; version None: the newest."""
        if self._shards == 1:
            return _looked_up(self._tables[0][table], version, keys)
        asked = split(keys, self._shards)
        parts = [_looked_up(self._tables[s][table], version, part) for s, part in enumerate(asked.by_shard)]
        return asked.joined(parts)

    async def close(self) -> None:
        self._verification.stop()
        for store in self._stores():
            store.close()
        self._tables = []

    def _stores(self) -> list[Store]:
        return [store for tables in self._tables for table in tables.values() for store in table.stores]


class RemoteCube:
    """One cube-server per shard. Owned by one event loop."""

    def __init__(self, endpoints: Sequence[str]):
        """endpoints: host:port of each shard's server, in order of shard."""
        self._channels = [Channel(endpoint) for endpoint in endpoints]
        self._dims: dict[str, int] = {}  # set by open

    def __str__(self) -> str:
        return f"{self.shards} cube shards"

    @property
    def shards(self) -> int:
        return len(self._channels)

    async def open(self, tables: Mapping[str, tuple[Version, int]], wait_s: float, absent_zeros: bool = True) -> None:
        statuses = await asyncio.gather(*(self.status(shard, wait_s) for shard in range(len(self._channels))))
        for shard, (status, channel) in enumerate(zip(statuses, self._channels, strict=True)):
            found, expected = f"shard {status.shard} of {status.shards}", f"shard {shard} of {len(self._channels)}"
            if found != expected:
                raise BadConfig(f"cube endpoint {channel.target}", found, expected)
            there = {
                t.table: {Version(v.version.base, v.version.delta): (v.dim, v.default_row) for v in t.versions}
                for t in status.tables
            }
            _check(tables, there, f"cube shard {shard} at {channel.target}", absent_zeros)
        self._dims |= {name: dim for name, (_, dim) in tables.items()}

    async def status(self, shard: int, wait_s: float) -> pb.StatusReply:
        """What a shard's server says of itself, waiting up to `wait_s` for it to be there."""
        reply = await self._ask(shard, STATUS, pb.StatusRequest().SerializeToString(), wait_s, wait_for_ready=True)
        return parse(pb.StatusReply, reply)

    async def gather(self, table: str, version: Version, keys: NDArray[np.uint64], timeout_s: float) -> Rows:
        many = keys.size > KEYS_ON_LOOP
        asked = await asyncio.to_thread(split, keys, self.shards) if many else split(keys, self.shards)
        parts = await asyncio.gather(
            *(self._rows(shard, table, version, part, timeout_s) for shard, part in enumerate(asked.by_shard))
        )
        return asked.joined(parts)

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _rows(self, shard: int, table: str, version: Version, keys: NDArray[np.uint64], timeout_s: float) -> Rows:
        if keys.size == 0:  # a shard without keys is not asked
            return Rows(np.empty((0, self._dims[table]), np.float32), np.empty(0, np.bool_))
        asked = pb.TableKeys(
            table=table, version=pb.Version(base=version.base, delta=version.delta), keys=keys.tobytes()
        )
        message = pb.LookupRequest(tables=[asked]).SerializeToString()
        place, dim = f"cube shard {shard} at {self._channels[shard].target} reply", self._dims[table]
        received = await self._ask(shard, LOOKUP, message, timeout_s)
        try:
            reply, of = LOOKUP_REPLY.decode(received)
            (answer,) = reply.tables
        except (BadRequest, ValueError) as error:
            raise DataCorrupt(place, "bytes that are no reply to one table", "a LookupReply of one table") from error
        rows, marks = of(answer.rows), np.frombuffer(of(answer.found), np.uint8)
        shape = (Version(answer.version.base, answer.version.delta), marks.size, answer.dim, len(rows))
        if shape != (version, keys.size, dim, 4 * dim * keys.size) or (marks > 1).any():
            found = "version {}, {} marks, rows of {} elements in {} bytes".format(*shape)
            raise DataCorrupt(place, found, f"version {version}, {keys.size} marks of 0 or 1, rows of {dim} elements")
        return Rows(np.frombuffer(rows, "<f4").reshape(keys.size, dim), marks.view(np.bool_))

    async def _ask(
        self, shard: int, path: str, message: bytes, timeout_s: float, wait_for_ready: bool = False
    ) -> Buffer:
        channel = self._channels[shard]
        try:
            return await channel.call(path, message, timeout_s, wait_for_ready)
        except (Unavailable, DeadlineExceeded) as error:
            raise ShardUnavailable(shard, channel.target, error) from error


class Split(NamedTuple):
    """The distinct keys of a request, by shard, and the way back."""

    by_shard: list[NDArray[np.uint64]]
    place: NDArray[np.int64]  # int64[n]: where key i's row stands when the shards' rows are laid end to end

    def joined(self, parts: Sequence[Rows]) -> Rows:
        """The shards' answers, in order of shard, as rows in the order of the keys asked for."""
        rows, found = np.concatenate([p.rows for p in parts]), np.concatenate([p.found for p in parts])
        return Rows(rows[self.place], found[self.place])


@kernel
def _unique(keys, slots, first, place):  # type: ignore[no-untyped-def]
    """first: position of each distinct key's first occurrence; place: number of key i's distinct key. Returns how many.

    slots: int64[power of two > keys.size], all -1. Linear probing ends: there is always a free slot.
    """
    mask, count = U(slots.size - 1), 0
    for i in range(keys.size):
        s = mix(keys[i]) & mask
        while slots[s] >= 0 and keys[first[slots[s]]] != keys[i]:
            s = (s + U(1)) & mask
        if slots[s] < 0:
            slots[s], first[count] = count, i
            count += 1
        place[i] = slots[s]
    return count


KERNELS = [_unique, *INDEX_KERNELS]


def split(keys: NDArray[np.uint64], shards: int) -> Split:
    """Distinct keys grouped by shard, in order of first appearance within each. keys: uint64[n]."""
    keys = np.ascontiguousarray(keys, np.uint64)
    slots = np.full(2 << keys.size.bit_length(), -1, np.int64)
    first, place = np.empty(keys.size, np.int64), np.empty(keys.size, np.int64)
    distinct = keys[first[: _unique(keys, slots, first, place)]]
    if shards == 1:
        return Split([distinct], place)
    shard_of = shards_of(distinct, shards)
    order = np.argsort(shard_of, kind="stable")
    position = np.empty(order.size, np.int64)
    position[order] = np.arange(order.size)
    ends = np.cumsum(np.bincount(shard_of, minlength=shards))
    return Split(np.split(distinct[order], ends[:-1]), position[place])


def _looked_up(table: Table, version: Version | None, keys: NDArray[np.uint64]) -> Rows:
    store = table.store(version)
    rows, found = np.empty((keys.size, store.about.dim), np.float32), np.empty(keys.size, np.bool_)
    store.lookup(keys, rows, found)
    return Rows(rows, found)


def _described(tables: Mapping[str, Table]) -> dict[str, dict[Version, tuple[int, bool]]]:
    """Of each version: elements of a row, and whether absent keys read another row than zeros."""
    return {
        name: {s.about.version: (s.about.dim, bool(s.about.default_row)) for s in table.stores}
        for name, table in tables.items()
    }


def _check(
    wanted: Mapping[str, tuple[Version, int]],
    there: Mapping[str, Mapping[Version, tuple[int, bool]]],
    place: str,
    absent_zeros: bool,
) -> None:
    """Raise BadConfig unless every wanted table is there in the wanted version and dim."""
    for name, (version, dim) in wanted.items():
        if name not in there:
            raise BadConfig(
                place, f"tables {', '.join(sorted(there)) or 'none'}", f"table {name!r}, which the model reads"
            )
        if version not in there[name]:
            versions = ", ".join(str(v) for v in there[name])
            raise BadConfig(
                f"{place} table {name!r}", f"versions {versions}", f"{version}, which the model was trained with"
            )
        found, has_default_row = there[name][version]
        if found != dim:
            raise BadConfig(f"{place} table {name!r}", f"rows of {found} elements", f"{dim}, as the model reads")
        if has_default_row and absent_zeros:  # or scores would not be those of the program
            raise BadConfig(f"{place} table {name!r}", "a default row for absent keys", "zeros, as the model reads")
