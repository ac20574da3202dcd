"""Answers lookups: the same behind every door.

A lookup is three steps: `ask` checks one table's part of a request and finds its store, `look_up` runs the parts, here
or in a thread, and whoever asked makes a reply of what the parts then hold. gRPC's is made here: rows go from the
kernel's buffer into the reply without a copy.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadRequest, FailedPrecondition, NotServed
from cube.keys import ShardRule
from cube.pb import cube_pb2 as pb
from cube.rows import check_offsets
from cube.rpc.calls import Buffer, Call, Kind, Method, Reply, parse
from cube.rpc.messages import Large, Spliced
from cube.storage.store import Store
from cube.table import Table, check_keys
from cube.version import Version

T = TypeVar("T")

SERVICE = "cube_serving.cube.Cube"
LOOKUP, STATUS, SCAN = f"/{SERVICE}/Lookup", f"/{SERVICE}/Status", f"/{SERVICE}/Scan"
LOOKUP_REPLY = Spliced(pb.LookupReply, "tables.rows", "tables.found")
SCAN_REPLY = Spliced(pb.ScanReply, "keys", "rows")
REQUEST_BYTES = 1 << 20  # of a request, beside its keys: names of tables
DEFAULT_MAX_KEYS = 4 << 20
MOST_TABLES = 1_024  # of a call: each costs as much as a hundred keys
MOST_REPLY_BYTES = 256 << 20  # of rows: what clients take by default
KEYS_ON_LOOP, BYTES_ON_LOOP = 20_000, 2 << 20  # about 2 ms of lookups
PROGRAM = f"cube-server {metadata.version('cube-serving')}"
SCAN_ROWS, MOST_SCAN_ROWS, SCAN_BYTES = 16_384, 65_536, 4 << 20  # of one message


class Ask:
    """The part of a request that is about one table, and what is found for it."""

    __slots__ = ("absent", "found", "keys", "mean", "offsets", "rows", "store", "stored", "table")

    rows: NDArray[np.float32] | NDArray[np.uint8]  # float32[n or bags, dim], or uint8[n, row_bytes] as stored
    found: NDArray[np.bool_]  # bool[n]
    absent: int  # keys without a row

    def __init__(
        self,
        table: Table,
        store: Store,
        keys: NDArray[np.uint64],
        stored: bool,
        offsets: NDArray[np.int64] | None,
        mean: bool,
    ):
        self.table, self.store, self.keys = table, store, keys
        self.stored, self.offsets, self.mean = stored, offsets, mean

    @property
    def version(self) -> Version:
        """The one that is read."""
        return self.store.about.version

    def run(self) -> None:
        """Set rows, found and absent."""
        store, keys, about = self.store, self.keys, self.store.about
        self.found = np.empty(keys.size, np.bool_)
        if self.offsets is not None:
            self.rows = np.empty((self.offsets.size - 1, about.dim), np.float32)
            self.absent = store.pooled(keys, self.offsets, self.mean, self.rows, self.found)
        elif self.stored:
            self.rows = np.empty((keys.size, about.row_bytes), np.uint8)
            self.absent = store.read(keys, self.rows, self.found)
        else:
            self.rows = np.empty((keys.size, about.dim), np.float32)
            self.absent = store.lookup(keys, self.rows, self.found)


class CubeService:
    """The tables of one shard. Owned by the event loop."""

    def __init__(
        self,
        tables: dict[str, Table],
        shard: int,
        shards: int,
        max_keys: int = DEFAULT_MAX_KEYS,
        *,
        shard_rule: str = "mix",
        workers: int = 1,
        meter: Callable[[int, float], None] = lambda keys, seconds: None,
        totals: Callable[[], tuple[int, Mapping[str, tuple[int, int]]]] | None = None,
    ):
        """meter: told of every lookup that was answered, its keys and its seconds. totals: what all workers have
        answered together, lookups, and keys found and absent by table; None where there are no others."""
        self.tables, self.shard, self.shards = tables, shard, shards
        self.lookups = 0  # answered since start
        self._max_keys, self._shard_rule, self._workers, self._meter = max_keys, shard_rule, workers, meter
        self._totals = totals
        self._began = time.monotonic()
        self._place = shard, shards, int(ShardRule.parse(shard_rule))
        self._threads = ThreadPoolExecutor(thread_name_prefix="lookup")

    def handlers(self) -> dict[str, Method]:
        """By gRPC path."""
        return {
            LOOKUP: Method(self.lookup, max_request_bytes=8 * self._max_keys + REQUEST_BYTES),
            STATUS: Method(self.status, max_request_bytes=REQUEST_BYTES),
            SCAN: Method(self.scan, Kind.SERVER_STREAM, REQUEST_BYTES),
        }

    # ---- lookups ----

    def ask(
        self,
        table: str,
        version: Version | None,
        keys: NDArray[np.uint64],
        *,
        stored: bool = False,
        offsets: NDArray[np.int64] | None = None,
        mean: bool = False,
    ) -> Ask:
        """What `look_up` takes; raises NotServed, BadRequest.

        version: None for the current one. stored: rows as they are stored, else float32. offsets: int64[bags + 1], to
        have the rows of each bag summed, or averaged.
        """
        there = self._table(table)
        if offsets is not None:
            if stored:
                raise BadRequest(f"table {table!r} format", "STORED, with pooling", "FLOATS: pooled rows are float32")
            check_offsets(f"table {table!r} offsets", offsets, keys.size)
        return Ask(there, there.store(version), keys, stored, offsets, mean)

    def look_up(self, asks: Sequence[Ask], call: Call) -> Callable[[], Awaitable[None]] | None:
        """Run `asks`. Returns None where that is done already, else what to call and await for it.

        Many keys, or bags, or bytes of rows are looked up in a thread, so that the loop answers others meanwhile.
        Raises BadRequest, DeadlineExceeded, DataCorrupt.
        """
        keys = rows = size = 0
        is_quick = True
        for ask in asks:
            count = ask.keys.size if ask.offsets is None else max(ask.keys.size, ask.offsets.size)
            keys += ask.keys.size
            rows += count
            size += count * (ask.store.about.row_bytes if ask.stored else 4 * ask.store.about.dim)
            is_quick = is_quick and ask.store.capabilities.fused
        if rows > self._max_keys:
            raise BadRequest("keys", f"{rows} keys or bags in one call", f"at most {self._max_keys}")
        if size > MOST_REPLY_BYTES:
            raise BadRequest("keys", f"{size:,} bytes of rows in one call", f"at most {MOST_REPLY_BYTES:,}")
        began = time.perf_counter()
        if not is_quick or rows > KEYS_ON_LOOP or size > BYTES_ON_LOOP:
            return partial(self._in_thread, asks, keys, call, began)
        for ask in asks:
            if call.deadline is not None:
                call.remaining_s(at_most=1.0)  # nobody waits for an answer after the deadline
            ask.run()
        self._count(asks, keys, began)
        return None

    async def _in_thread(self, asks: Sequence[Ask], keys: int, call: Call, began: float) -> None:
        for ask in asks:  # all of them: a version may be unloaded while another one is read
            ask.table.hold(ask.store)
        try:
            for ask in asks:
                call.remaining_s(at_most=1.0)
                await self._read(ask.table, ask.store, ask.run)
        finally:
            for ask in asks:
                ask.table.release(ask.store)
        self._count(asks, keys, began)

    async def _read(self, table: Table, store: Store, work: Callable[[], T]) -> T:
        """Run work on a store in a thread. Nobody can stop it: the store is held until it is over, not only awaited."""
        loop = asyncio.get_running_loop()
        table.hold(store)
        running = self._threads.submit(work)
        running.add_done_callback(lambda _: _tell(loop, table.release, store))
        return await asyncio.wrap_future(running)

    def _count(self, asks: Sequence[Ask], keys: int, began: float) -> None:
        for ask in asks:
            ask.table.count(ask.keys.size, ask.absent)
        self.lookups += 1
        self._meter(keys, time.perf_counter() - began)

    def _table(self, name: str) -> Table:
        table = self.tables.get(name)
        if table is None:
            raise NotServed(f"table {name!r}", sorted(self.tables))
        return table

    # ---- gRPC ----

    def lookup(self, message: Buffer, call: Call) -> Reply | Awaitable[Reply]:
        """LookupRequest → LookupReply; raises BadRequest, NotServed, DeadlineExceeded."""
        request = parse(pb.LookupRequest, message)
        if request.shards and (request.shard, request.shards, request.shard_rule or self._place[2]) != self._place:
            found = f"a lookup for shard {request.shard} of {request.shards}, rule {request.shard_rule}"
            raise FailedPrecondition(
                f"shard: found {found}, expected one for {self.shard} of {self.shards}, rule {self._place[2]}"
            )
        if len(request.tables) > MOST_TABLES:
            raise BadRequest("tables", f"{len(request.tables)} in one call", f"at most {MOST_TABLES}")
        asks = [self._asked(table) for table in request.tables]
        finish = self.look_up(asks, call)
        return _reply(asks) if finish is None else _reply_after(finish, asks)

    def _asked(self, asked: pb.TableKeys) -> Ask:
        name = asked.table
        keys = check_keys(f"table {name!r} keys", asked.keys, self._max_keys)
        version = version_of(asked.version) if asked.HasField("version") else None
        if not (asked.format or asked.pooling or asked.offsets):
            table = self._table(name)
            return Ask(table, table.store(version), keys, False, None, False)
        if asked.format not in (pb.FLOATS, pb.STORED):
            raise BadRequest(f"table {name!r} format", asked.format, "FLOATS (0) or STORED (1)")
        if asked.pooling not in (pb.NONE, pb.SUM, pb.MEAN):
            raise BadRequest(f"table {name!r} pooling", asked.pooling, "NONE (0), SUM (1) or MEAN (2)")
        offsets = None
        if asked.pooling:
            offsets = check_keys(f"table {name!r} offsets", asked.offsets, self._max_keys).astype(np.int64)
        elif asked.offsets:
            raise BadRequest(f"table {name!r} offsets", f"{len(asked.offsets)} bytes", "none without pooling")
        mean = asked.pooling == pb.MEAN
        return self.ask(name, version, keys, stored=asked.format == pb.STORED, offsets=offsets, mean=mean)

    async def scan(self, message: Buffer, call: Call) -> AsyncIterator[Reply]:
        """ScanRequest → stream of ScanReply; raises NotServed, BadRequest, Unimplemented."""
        asked = parse(pb.ScanRequest, message)
        table = self._table(asked.table)
        store = table.store(version_of(asked.version) if asked.HasField("version") else None)
        if asked.batch_rows > MOST_SCAN_ROWS:
            raise BadRequest("batch_rows", asked.batch_rows, f"at most {MOST_SCAN_ROWS}")
        about = store.about
        batches = store.scan(min(asked.batch_rows or SCAN_ROWS, max(SCAN_BYTES // about.row_bytes, 1)))
        head = pb.ScanReply(
            version=wire_of(about.version),
            dim=about.dim,
            row_format=about.row_format.text,
            row_bytes=about.row_bytes,
            total=len(store),
        )
        table.hold(store)
        try:
            yield head.SerializeToString()
            while (batch := await self._read(table, store, lambda: next(batches, None))) is not None:
                large = Large()
                yield SCAN_REPLY.encode(pb.ScanReply(keys=large.put(batch[0]), rows=large.put(batch[1])), large)
        finally:
            table.release(store)

    def status(self, message: Buffer, call: Call) -> bytes:
        """StatusRequest → StatusReply."""
        parse(pb.StatusRequest, message)
        return self.facts().SerializeToString()

    def facts(self) -> pb.StatusReply:
        """What is served."""
        keys: Mapping[str, tuple[int, int]]
        lookups, keys = self.lookups, {t.name: (t.keys_found, t.keys_absent) for t in self.tables.values()}
        if self._totals is not None:
            lookups, keys = self._totals()
        reply = pb.StatusReply(
            shard=self.shard,
            shards=self.shards,
            lookups=lookups,
            shard_rule=self._shard_rule,
            workers=self._workers,
            uptime_s=time.monotonic() - self._began,
            program=PROGRAM,
        )
        for table in self.tables.values():
            status = reply.tables.add(
                table=table.name,
                keys_found=keys[table.name][0],
                keys_absent=keys[table.name][1],
                current=wire_of(table.store(None).about.version),
            )
            for store in table.stores:
                about = store.about
                status.versions.add(
                    version=wire_of(about.version),
                    dim=about.dim,
                    keys=len(store),
                    file_bytes=store.file_bytes,
                    row_format=about.row_format.text,
                    engine=type(store).__name__,
                    verified=store.checked,
                    default_row=bool(about.default_row),
                )
        return reply


def _reply(asks: Sequence[Ask]) -> Reply:
    reply, large = pb.LookupReply(), Large()
    for ask in asks:
        about = ask.store.about
        reply.tables.add(
            version=wire_of(about.version),
            dim=about.dim,
            rows=large.put(ask.rows),
            found=large.put(ask.found),
            absent=ask.absent,
            row_format=about.row_format.text if ask.stored else "f32",
            row_bytes=about.row_bytes if ask.stored else 4 * about.dim,
        )
    return LOOKUP_REPLY.encode(reply, large)


async def _reply_after(finish: Callable[[], Awaitable[None]], asks: Sequence[Ask]) -> Reply:
    await finish()
    return _reply(asks)


def version_of(told: pb.Version) -> Version:
    """As it came over the wire."""
    return Version(told.base, told.delta)


def wire_of(version: Version) -> pb.Version:
    """As it goes over the wire."""
    return pb.Version(base=version.base, delta=version.delta)


def _tell(loop: asyncio.AbstractEventLoop, act: Callable[[Store], None], store: Store) -> None:
    """Have the loop do something, if it still runs."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(act, store)
