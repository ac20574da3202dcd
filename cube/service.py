"""Answers lookups: the same behind every door."""

import asyncio
from collections.abc import Awaitable

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadRequest, NotServed
from cube.pb import cube_pb2 as pb
from cube.rpc.calls import Buffer, Call, Method, Reply, parse
from cube.rpc.messages import Large, Spliced
from cube.storage.store import Store
from cube.table import Table, check_keys
from cube.version import Version

LOOKUP, STATUS = "/cube_serving.cube.Cube/Lookup", "/cube_serving.cube.Cube/Status"
LOOKUP_REPLY = Spliced(pb.LookupReply, "tables.rows", "tables.found")
REQUEST_BYTES = 1 << 20  # of a request, beside its keys: names of tables
DEFAULT_MAX_KEYS = 4 << 20
KEYS_ON_LOOP = 20_000  # about 2 ms of lookups


class CubeService:
    """The tables of one shard. Owned by the event loop."""

    def __init__(self, tables: dict[str, Table], shard: int, shards: int, max_keys: int = DEFAULT_MAX_KEYS):
        self.tables, self.shard, self.shards = tables, shard, shards
        self._max_keys = max_keys
        self._lookups = 0

    def handlers(self) -> dict[str, Method]:
        """By gRPC path."""
        return {
            LOOKUP: Method(self.lookup, max_request_bytes=8 * self._max_keys + REQUEST_BYTES),
            STATUS: Method(self.status, max_request_bytes=REQUEST_BYTES),
        }

    def lookup(self, message: Buffer, call: Call) -> Reply | Awaitable[Reply]:
        """LookupRequest → LookupReply; raises BadRequest, NotServed, DeadlineExceeded.

        Many keys are looked up in a thread, so that the loop answers others meanwhile.
        """
        asked = [self._asked(table) for table in parse(pb.LookupRequest, message).tables]
        keys = sum(one.keys.size for one in asked)
        if keys > self._max_keys:
            raise BadRequest("keys", f"{keys} in one call", f"at most {self._max_keys}")
        if not all(is_short(one.store, keys) for one in asked):
            return self._lookup_in_thread(asked, call)
        for one in asked:
            call.remaining_s(at_most=1.0)  # nobody waits for an answer after the deadline
            one.look_up()
        return self._reply(asked)

    async def _lookup_in_thread(self, asked: "list[_Asked]", call: Call) -> Reply:
        for one in asked:
            call.remaining_s(at_most=1.0)
            await asyncio.to_thread(one.look_up)
        return self._reply(asked)

    def _asked(self, asked: pb.TableKeys) -> "_Asked":
        table = self.tables.get(asked.table)
        if table is None:
            raise NotServed(f"table {asked.table!r}", sorted(self.tables))
        version = Version(asked.version.base, asked.version.delta) if asked.HasField("version") else table.newest
        keys = check_keys(f"table {asked.table!r} keys", asked.keys, self._max_keys)
        return _Asked(table, version, table.store(version), keys)

    def _reply(self, asked: "list[_Asked]") -> Reply:
        reply, large = pb.LookupReply(), Large()
        for one in asked:
            one.table.count(one.keys.size, one.absent)
            reply.tables.add(
                version=pb.Version(base=one.version.base, delta=one.version.delta),
                dim=one.store.about.dim,
                rows=large.put(one.rows),
                found=large.put(one.found),
                absent=one.absent,
            )
        self._lookups += 1
        return LOOKUP_REPLY.encode(reply, large)

    def status(self, message: Buffer, call: Call) -> bytes:
        """StatusRequest → StatusReply."""
        parse(pb.StatusRequest, message)
        reply = pb.StatusReply(shard=self.shard, shards=self.shards, lookups=self._lookups)
        for table in self.tables.values():
            status = reply.tables.add(table=table.name, keys_found=table.keys_found, keys_absent=table.keys_absent)
            for store in table.stores:
                about = store.about
                status.versions.add(
                    version=pb.Version(base=about.version.base, delta=about.version.delta),
                    dim=about.dim,
                    keys=len(store),
                    file_bytes=store.file_bytes,
                    row_format=about.row_format.text,
                    engine=type(store).__name__,
                    verified=store.checked,
                    default_row=bool(about.default_row),
                )
        return reply.SerializeToString()


class _Asked:
    """The keys of one table in a request, and what is found for them."""

    __slots__ = ("absent", "found", "keys", "rows", "store", "table", "version")

    def __init__(self, table: Table, version: Version, store: Store, keys: NDArray[np.uint64]):
        self.table, self.version, self.store, self.keys = table, version, store, keys
        self.absent = 0

    def look_up(self) -> None:
        """Set rows, found and absent."""
        self.rows = np.empty((self.keys.size, self.store.about.dim), np.float32)
        self.found = np.empty(self.keys.size, np.bool_)
        self.absent = self.store.lookup(self.keys, self.rows, self.found)


def is_short(store: Store, keys: int) -> bool:
    """Whether a lookup of so many keys takes no longer than handing it to a thread, and may run on the event loop."""
    return store.capabilities.fused and keys <= KEYS_ON_LOOP
