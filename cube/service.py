"""Answers lookups: the same behind every door."""

import asyncio

import numpy as np

from cube.errors import NotServed
from cube.pb import cube_pb2 as pb
from cube.rpc.calls import Call, Handler, parse
from cube.storage.store import Store
from cube.table import Table, check_keys
from cube.version import Version

LOOKUP, STATUS = "/cube_serving.cube.Cube/Lookup", "/cube_serving.cube.Cube/Status"
DEFAULT_MAX_KEYS = 4 << 20
KEYS_ON_LOOP = 20_000  # about 2 ms of lookups


class CubeService:
    """The tables of one shard. Owned by the event loop."""

    def __init__(self, tables: dict[str, Table], shard: int, shards: int, max_keys: int = DEFAULT_MAX_KEYS):
        self.tables, self.shard, self.shards = tables, shard, shards
        self._max_keys = max_keys
        self._lookups = 0

    def handlers(self) -> dict[str, Handler]:
        """By gRPC path."""
        return {LOOKUP: self.lookup, STATUS: self.status}

    async def lookup(self, message: bytes, call: Call) -> bytes:
        """LookupRequest → LookupReply; raises BadRequest, NotServed, DeadlineExceeded.

        Many keys are looked up in a thread, so that the loop answers others meanwhile.
        """
        request, reply = parse(pb.LookupRequest, message), pb.LookupReply()
        for asked in request.tables:
            call.remaining_s(at_most=1.0)  # nobody waits for an answer after the deadline
            table = self.tables.get(asked.table)
            if table is None:
                raise NotServed(f"table {asked.table!r}", sorted(self.tables))
            version = Version(asked.version.base, asked.version.delta) if asked.HasField("version") else table.newest
            keys = check_keys(f"table {asked.table!r} keys", asked.keys, self._max_keys)
            store = table.store(version)
            dim = store.about.dim
            rows, found = np.empty((keys.size, dim), np.float32), np.empty(keys.size, np.bool_)
            if is_short(store, keys.size):
                absent = store.lookup(keys, rows, found)
            else:
                absent = await asyncio.to_thread(store.lookup, keys, rows, found)
            table.count(keys.size, absent)
            reply.tables.add(
                version=pb.Version(base=version.base, delta=version.delta),
                dim=dim,
                rows=rows.tobytes(),
                found=found.tobytes(),
                absent=absent,
            )
        self._lookups += 1
        return reply.SerializeToString()

    def status(self, message: bytes, call: Call) -> bytes:
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


def is_short(store: Store, keys: int) -> bool:
    """Whether a lookup of so many keys takes no longer than handing it to a thread, and may run on the event loop."""
    return store.capabilities.fused and keys <= KEYS_ON_LOOP
