"""Asks a cube: unique keys, split by shard, asked in parallel, put back in order.

`RemoteCube` asks cube-servers, `LocalCube` opens the same files in this process, and both answer alike; `BlockingCube`
is either for threads. `cluster.open_cube` makes the one that a text or a file names.
"""

import asyncio
import logging
import math
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cube.cache import KERNELS as CACHE_KERNELS
from cube.cache import MIN_BYTES, CacheStats, RowCache
from cube.errors import BadConfig, BadRequest, DataCorrupt, DeadlineExceeded, NotServed, ShardUnavailable, Unavailable
from cube.kernels import U, kernel, mix, warm
from cube.keys import ShardRule, shards_of
from cube.pb import cube_pb2 as pb
from cube.rpc.balancer import Balancer
from cube.rpc.calls import Buffer, Field, parse
from cube.rpc.routing import Options, Policy
from cube.service import BYTES_ON_LOOP, KEYS_ON_LOOP, LOOKUP, LOOKUP_REPLY, STATUS, version_of, wire_of
from cube.storage.index import KERNELS as INDEX_KERNELS
from cube.storage.store import Store
from cube.table import Table, Verification, open_tables, shards_in, touch
from cube.version import Version

log = logging.getLogger(__name__)

T = TypeVar("T")
REFRESH_S = 5.0  # how old what is known of the servers' current versions may become


class Ask(NamedTuple):
    """Keys of one table."""

    table: str
    keys: NDArray[np.uint64]  # uint64[n], any order, repeats allowed
    version: Version | None = None  # None: the current one


class Rows(NamedTuple):
    """Rows in the order of the keys asked for."""

    rows: NDArray[np.float32]  # float32[n, dim]; where absent the table's default row or zeros; zeros where unavailable
    found: NDArray[np.bool_]  # bool[n]
    version: Version = Version(0)  # that was read, of every shard
    unavailable: NDArray[np.bool_] | None = None  # bool[n]: keys of shards that did not answer; None: there are none


class Answer(NamedTuple):
    """What a lookup of several tables came to."""

    tables: list[Rows]  # one for each Ask
    unavailable: dict[int, ShardUnavailable]  # by shard: why it did not answer


class Cube(ABC):
    """What a predictor needs of a cube."""

    @abstractmethod
    async def open(self, tables: Mapping[str, tuple[Version, int]], wait_s: float, absent_zeros: bool = True) -> None:
        """Check that every shard has these versions (and dims) of these tables, waiting up to `wait_s` for shards.

        Raises BadConfig for a table, version or dim that is not there, and where absent keys do not read zeros unless
        `absent_zeros` is False; ShardUnavailable for a shard that is not there.
        """

    @abstractmethod
    async def lookup(self, asks: Sequence[Ask], timeout_s: float, *, partial: bool = False) -> Answer:
        """Rows of several tables, of each in one version on all shards.

        partial: a shard that does not answer is reported in the Answer, and its keys are marked; else it is raised, as
        ShardUnavailable. Raises NotServed for a table or version that is not there.
        """

    def lookup_now(self, asks: Sequence[Ask]) -> Answer | None:
        """The same where it takes neither waiting nor long; None where it does."""
        return None

    @abstractmethod
    async def close(self) -> None:
        """Release files or connections."""

    async def gather(
        self, table: str, version: Version | None, keys: NDArray[np.uint64], timeout_s: float, *, partial: bool = False
    ) -> Rows:
        """`lookup` of one table."""
        return (await self.lookup([Ask(table, keys, version)], timeout_s, partial=partial)).tables[0]

    async def __aenter__(self) -> "Cube":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class LocalCube(Cube):
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
        await asyncio.to_thread(warm, INDEX_KERNELS, partial(touch, self._stores()), log.info)
        self._verification.start()

    def lookup_now(self, asks: Sequence[Ask]) -> Answer | None:
        keys = sum(ask.keys.size for ask in asks)
        if not all(_is_short(self._table(0, ask.table).store(ask.version), keys) for ask in asks):
            return None
        return Answer([self.rows(ask.table, ask.version, ask.keys) for ask in asks], {})

    async def lookup(self, asks: Sequence[Ask], timeout_s: float, *, partial: bool = False) -> Answer:
        if (answer := self.lookup_now(asks)) is not None:
            return answer
        return Answer([await asyncio.to_thread(self.rows, ask.table, ask.version, ask.keys) for ask in asks], {})

    def rows(self, table: str, version: Version | None, keys: NDArray[np.uint64]) -> Rows:
        """`gather` without an event loop; version None: the newest."""
        version = version or self._table(0, table).store(None).about.version
        if self._shards == 1:
            return _looked_up(self._table(0, table), version, keys)
        about = self._table(0, table).store(version).about
        made = _blank(keys.size, about.dim, version)
        for shard, at in enumerate(split(keys, self._shards, about.shard_rule)):
            part = _looked_up(self._table(shard, table), version, keys[at])
            made.rows[at], made.found[at] = part.rows, part.found
        return made

    async def close(self) -> None:
        self._verification.stop()
        for store in self._stores():
            store.close()
        self._tables = []

    def _table(self, shard: int, name: str) -> Table:
        table = self._tables[shard].get(name)
        if table is None:
            raise NotServed(f"table {name!r}", sorted(self._tables[shard]))
        return table

    def _stores(self) -> list[Store]:
        return [store for tables in self._tables for table in tables.values() for store in table.stores]


class _Known(NamedTuple):
    """What the shards that answered agree on."""

    dims: dict[str, dict[Version, int]]  # of tables and versions that each of them has
    current: dict[str, Version]
    at: float  # loop time at which the servers were asked


class RemoteCube(Cube):
    """The servers of every shard. Owned by one event loop."""

    def __init__(
        self,
        shards: Sequence[str],
        *,
        shard_rule: ShardRule = ShardRule.MIX,
        options: Options | None = None,
        cache_bytes: int = 0,
        metadata: Sequence[Field] = (),
        tls: ssl.SSLContext | None = None,
        most_timeout_s: float = math.inf,
    ):
        """shards: where the replicas of each shard are, in order of shard; see cube.rpc.naming for the forms.

        shard_rule: which shard has which key, as the servers' files say. cache_bytes: memory for rows that are asked
        for often; 0 for no cache. metadata: sent with every call, such as a token. most_timeout_s: of one call to a
        shard, whatever time a lookup has.
        """
        self._targets = list(shards)
        self._balancers = [Balancer(target, options, tls=tls) for target in shards]
        self._rule = shard_rule
        self._metadata, self._most_timeout_s = tuple(metadata), most_timeout_s
        self._hashes = options is not None and options.policy is Policy.CONSISTENT_HASH
        self._cache = RowCache(cache_bytes) if cache_bytes else None
        self._known: _Known | None = None
        self._learning: asyncio.Task[_Known] | None = None

    def __str__(self) -> str:
        return f"{self.shards} cube shards"

    @property
    def shards(self) -> int:
        return len(self._balancers)

    @property
    def balancers(self) -> Sequence[Balancer]:
        """Of each shard: what is known of its replicas, and counters."""
        return self._balancers

    @property
    def cache_stats(self) -> CacheStats | None:
        """Of the cache of rows; None without one."""
        return None if self._cache is None else self._cache.stats()

    async def open(self, tables: Mapping[str, tuple[Version, int]], wait_s: float, absent_zeros: bool = True) -> None:
        at = asyncio.get_running_loop().time()
        statuses = await self._statuses(wait_s)
        for shard, status in enumerate(statuses):
            there = {
                t.table: {version_of(v.version): (v.dim, v.default_row) for v in t.versions} for t in status.tables
            }
            _check(tables, there, f"cube shard {shard} at {self._targets[shard]}", absent_zeros)
        await asyncio.to_thread(warm, KERNELS, _touch, log.info)
        self._learn(statuses, at)

    async def status(self, shard: int, wait_s: float) -> pb.StatusReply:
        """What a shard's server says of itself, waiting up to `wait_s` for it to be there."""
        return parse(pb.StatusReply, await self._call(shard, STATUS, b"", wait_s, wait_for_ready=True))

    async def lookup(self, asks: Sequence[Ask], timeout_s: float, *, partial: bool = False) -> Answer:
        loop = asyncio.get_running_loop()
        began, known = loop.time(), self._known
        deadline = began + timeout_s
        if known is None:
            known = await self._learnt(timeout_s)
        elif began - known.at > REFRESH_S and any(ask.version is None for ask in asks):
            self._begin_learning(timeout_s)
        try:
            return await self._lookup(asks, known, deadline, partial)
        except NotServed:
            if known.at >= began:
                raise
        # It may be that the servers have loaded, switched or unloaded a version since we asked them.
        failed_at = loop.time()
        known = await self._learnt(deadline - failed_at)
        if known.at < failed_at:  # they were being asked already, perhaps too early
            known = await self._learnt(deadline - loop.time())
        return await self._lookup(asks, known, deadline, partial)

    async def _lookup(self, asks: Sequence[Ask], known: _Known, deadline: float, partial: bool) -> Answer:
        many = sum(ask.keys.size for ask in asks) > KEYS_ON_LOOP
        parts = [_Part(ask, *_resolved(ask, known)) for ask in asks]
        for part in parts:
            await _aside(many, part.find_distinct)
            if self._cache is not None:
                part.ask_cache(self._cache)
            await _aside(many, part.split, self.shards, self._rule)
        busy = [shard for shard in range(self.shards) if any(part.shards[shard].size for part in parts)]
        left_s = deadline - asyncio.get_running_loop().time()
        failed = await self._ask_all(busy, parts, left_s, partial)
        for part in parts:
            if self._cache is not None:
                part.tell_cache(self._cache, failed)
        return Answer([await _aside(many, part.rows, failed) for part in parts], failed)

    async def close(self) -> None:
        if self._learning is not None:
            self._learning.cancel()
        await asyncio.gather(*(balancer.close() for balancer in self._balancers))

    # ---- what the servers have ----

    async def _statuses(self, wait_s: float) -> list[pb.StatusReply]:
        """Of every shard."""
        statuses = await asyncio.gather(*(self.status(shard, wait_s) for shard in range(self.shards)))
        for shard, status in enumerate(statuses):
            self._check_place(shard, status)
        return statuses

    def _check_place(self, shard: int, status: pb.StatusReply) -> None:
        """Raise BadConfig for a server that is not what the list of shards says."""
        place = f"cube endpoint {self._targets[shard]}"
        found, expected = f"shard {status.shard} of {status.shards}", f"shard {shard} of {self.shards}"
        if found != expected:
            raise BadConfig(place, found, expected)
        if status.shard_rule != self._rule.text:
            raise BadConfig(place, f"shard rule {status.shard_rule!r}", f"{self._rule.text!r}")

    def _learn(self, statuses: Sequence[pb.StatusReply], at: float) -> _Known:
        """What they have in common; at: when they were asked."""
        dims: dict[str, dict[Version, int]] = {}
        current: dict[str, Version] = {}
        for table in statuses[0].tables:
            there = [{t.table: t for t in status.tables}.get(table.table) for status in statuses]
            of = [t for t in there if t is not None]
            if len(of) < len(statuses):
                continue
            common = set.intersection(*({version_of(v.version) for v in t.versions} for t in of))
            dims[table.table] = {
                version_of(v.version): v.dim for v in table.versions if version_of(v.version) in common
            }
            # In the middle of a switch the shards differ: the oldest of what they read is what all of them still have.
            if wanted := {version_of(t.current) for t in of} & common:
                current[table.table] = min(wanted)
        if self._cache is not None and self._known is not None:
            for name, versions in self._known.dims.items():
                for version in versions.keys() - dims.get(name, {}).keys():
                    self._cache.retire(name, version)
        self._known = _Known(dims, current, at)
        return self._known

    def _begin_learning(self, timeout_s: float) -> "asyncio.Task[_Known]":
        """Ask the servers what they have, unless that is being done."""
        if self._learning is None or self._learning.done():
            self._learning = asyncio.get_running_loop().create_task(self._learn_anew(timeout_s))
            self._learning.add_done_callback(_look)
        return self._learning

    async def _learnt(self, timeout_s: float) -> _Known:
        """What they have now; raises DeadlineExceeded, ShardUnavailable if none of them answers, Unavailable."""
        learning = self._begin_learning(timeout_s)
        await asyncio.wait((learning,), timeout=max(timeout_s, 0))  # it is everybody's: others may have more time
        if not learning.done():
            raise DeadlineExceeded(f"{self}: no answer in time to what they serve")
        if learning.cancelled():
            raise Unavailable("the cube is closed")
        return learning.result()

    async def _learn_anew(self, timeout_s: float) -> _Known:
        """From those that answer: who asks for keys of the others will be told."""
        at = asyncio.get_running_loop().time()
        asked = [self._call(shard, STATUS, b"", timeout_s) for shard in range(self.shards)]
        statuses: list[pb.StatusReply] = []
        errors: list[BaseException] = []
        for shard, answer in enumerate(await asyncio.gather(*asked, return_exceptions=True)):
            if isinstance(answer, BaseException):
                errors.append(answer)
                continue
            statuses.append(parse(pb.StatusReply, answer))
            self._check_place(shard, statuses[-1])
        faults = [error for error in errors if not isinstance(error, ShardUnavailable)]
        if faults or not statuses:
            raise (faults or errors)[0]
        return self._learn(statuses, at)

    # ---- asking ----

    async def _ask_all(
        self, busy: Sequence[int], parts: "Sequence[_Part]", timeout_s: float, partial: bool
    ) -> dict[int, ShardUnavailable]:
        """Ask the shards; which of them did not answer. Raises the first error that is not `partial`."""
        if not busy:
            return {}
        # The first one is asked by the caller's own task, which saves one; the others are asked once it waits.
        tasks = [asyncio.ensure_future(self._ask(shard, parts, timeout_s)) for shard in busy[1:]]
        for task in tasks:
            task.add_done_callback(_look)
        failed: dict[int, ShardUnavailable] = {}
        try:
            for shard, answer in zip(busy, (self._ask(busy[0], parts, timeout_s), *tasks), strict=True):
                try:
                    await answer
                except ShardUnavailable as error:
                    if not partial:
                        raise
                    failed[shard] = error
        finally:
            for task in tasks:
                task.cancel()
        return failed

    async def _ask(self, shard: int, parts: "Sequence[_Part]", timeout_s: float) -> None:
        asked = [part for part in parts if part.shards[shard].size]
        request = pb.LookupRequest(
            shard=shard,
            shards=self.shards,
            shard_rule=int(self._rule),
            tables=[
                pb.TableKeys(
                    table=part.ask.table,
                    version=wire_of(part.version),
                    keys=part.keys_of(shard).tobytes(),
                )
                for part in asked
            ],
        )
        key = None
        if self._hashes:  # the same keys, the same replica
            key = int(np.bitwise_xor.reduce(asked[0].keys_of(shard)))
        received = await self._call(shard, LOOKUP, request.SerializeToString(), timeout_s, key=key)
        place = f"cube shard {shard} of {self._targets[shard]} reply"
        try:
            reply, of = LOOKUP_REPLY.decode(received)
        except BadRequest as error:
            raise DataCorrupt(place, "bytes that do not parse", "a LookupReply") from error
        if len(reply.tables) != len(asked):
            raise DataCorrupt(place, f"{len(reply.tables)} tables", len(asked))
        for part, table in zip(asked, reply.tables, strict=True):
            part.take(shard, table, of(table.rows), of(table.found), place)

    async def _call(
        self,
        shard: int,
        path: str,
        message: bytes,
        timeout_s: float,
        wait_for_ready: bool = False,
        *,
        key: int | None = None,
    ) -> Buffer:
        if not wait_for_ready:
            timeout_s = min(timeout_s, self._most_timeout_s)
        try:
            return await self._balancers[shard].call(
                path, message, timeout_s, wait_for_ready, metadata=self._metadata, key=key
            )
        except (Unavailable, DeadlineExceeded) as error:
            raise ShardUnavailable(shard, self._targets[shard], error) from error


def _resolved(ask: Ask, known: _Known) -> tuple[Version, int]:
    """The version that is read, and its dim. Raises NotServed."""
    dims = known.dims.get(ask.table)
    if dims is None:
        raise NotServed(f"table {ask.table!r}", sorted(known.dims))
    version = ask.version or known.current.get(ask.table)
    if version is None or version not in dims:
        what = f"table {ask.table!r} version {version or 'current'}"
        raise NotServed(what, [str(v) for v in sorted(dims, reverse=True)])
    return version, dims[version]


class _Part:
    """One Ask on its way: distinct keys, which of them each shard is asked for, and the rows that have come."""

    def __init__(self, ask: Ask, version: Version, dim: int):
        self.ask, self.version, self.dim = ask, version, dim
        self.shards: list[NDArray[np.int64]] = []  # of each shard: which distinct keys it is asked for
        self._missing: NDArray[np.int64] | None = None  # which distinct keys the cache did not know; None: all

    def find_distinct(self) -> None:
        self.distinct, self._place = unique(self.ask.keys)
        self._made = _blank(self.distinct.size, self.dim, self.version)

    def ask_cache(self, cache: RowCache) -> None:
        self._missing = cache.look_up(self.ask.table, self.version, self.distinct, self._made.rows, self._made.found)

    def split(self, shards: int, rule: ShardRule) -> None:
        wanted = self.distinct if self._missing is None else self.distinct[self._missing]
        self.shards = split(wanted, shards, rule)
        if self._missing is not None:
            self.shards = [self._missing[at] for at in self.shards]

    def keys_of(self, shard: int) -> NDArray[np.uint64]:
        return self.distinct[self.shards[shard]]

    def take(self, shard: int, told: pb.TableRows, rows: Buffer, found: Buffer, place: str) -> None:
        """A shard's answer. Raises DataCorrupt for one to another question."""
        at, marks = self.shards[shard], np.frombuffer(found, np.uint8)
        shape = (version_of(told.version), marks.size, told.dim, len(rows))
        if shape != (self.version, at.size, self.dim, 4 * self.dim * at.size) or (marks > 1).any():
            what = "version {}, {} marks, rows of {} elements in {} bytes".format(*shape)
            expected = f"version {self.version}, {at.size} marks of 0 or 1, rows of {self.dim} elements"
            raise DataCorrupt(place, what, expected)
        self._made.rows[at] = np.frombuffer(rows, "<f4").reshape(at.size, self.dim)
        self._made.found[at] = marks.view(np.bool_)

    def tell_cache(self, cache: RowCache, failed: Mapping[int, ShardUnavailable]) -> None:
        """Offer what was answered."""
        answered = [at for shard, at in enumerate(self.shards) if at.size and shard not in failed]
        if answered:
            at = np.concatenate(answered)
            rows, found = self._made.rows[at], self._made.found[at]
            cache.put(self.ask.table, self.version, self.distinct[at], rows, found)

    def rows(self, failed: Mapping[int, ShardUnavailable]) -> Rows:
        """In the order of the keys asked for."""
        made, unavailable = self._made, None
        if lost := [self.shards[shard] for shard in failed if self.shards[shard].size]:
            at, marks = np.concatenate(lost), np.zeros(self.distinct.size, np.bool_)
            marks[at] = True
            made.rows[at], made.found[at] = 0, False
            unavailable = marks[self._place]
        if self.distinct.size == self.ask.keys.size:  # then nothing has changed its place
            return Rows(made.rows, made.found, made.version, unavailable)
        return Rows(made.rows[self._place], made.found[self._place], made.version, unavailable)


class BlockingCube:
    """A cube for threads: its event loop runs in a thread of its own."""

    def __init__(self, make: Callable[[], Cube]):
        """make: called on that loop. Raises what it raises."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cube", daemon=True)
        self._thread.start()
        try:
            self._cube = self._run(_made_by(make))
        except BaseException:
            self._stop()
            raise

    def open(self, tables: Mapping[str, tuple[Version, int]], wait_s: float, absent_zeros: bool = True) -> None:
        """See Cube.open."""
        self._run(self._cube.open(tables, wait_s, absent_zeros))

    def lookup(self, asks: Sequence[Ask], timeout_s: float, *, partial: bool = False) -> Answer:
        """See Cube.lookup."""
        return self._run(self._cube.lookup(asks, timeout_s, partial=partial))

    def gather(
        self, table: str, version: Version | None, keys: NDArray[np.uint64], timeout_s: float, *, partial: bool = False
    ) -> Rows:
        """See Cube.gather."""
        return self._run(self._cube.gather(table, version, keys, timeout_s, partial=partial))

    def close(self) -> None:
        """Release files or connections. A second call does nothing."""
        if self._thread.is_alive():
            self._run(self._cube.close())
            self._stop()

    def __enter__(self) -> "BlockingCube":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive():
            work.close()
            raise Unavailable("the cube is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _made_by(make: Callable[[], Cube]) -> Cube:
    return make()


async def _aside(many: bool, work: Callable[..., T], *args: Any) -> T:
    """Run work on arrays: in a thread where there is much of it."""
    return await asyncio.to_thread(work, *args) if many else work(*args)


def _look(task: "asyncio.Task[Any]") -> None:
    """Nobody may be waiting for it any more: then its error is of no interest."""
    if not task.cancelled():
        task.exception()


# ---- keys and shards ----


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


@kernel
def _by_shard(shard_of, ends, order):  # type: ignore[no-untyped-def]
    """order: positions of shard_of, shard by shard; ends: where each shard's end there. ends: int64[shards], zeros."""
    for i in range(shard_of.size):
        ends[shard_of[i]] += 1
    total = 0
    for shard in range(ends.size):
        total += ends[shard]
        ends[shard] = total - ends[shard]
    for i in range(shard_of.size):
        shard = shard_of[i]
        order[ends[shard]] = i
        ends[shard] += 1


KERNELS = [_unique, _by_shard, *CACHE_KERNELS]


def _touch() -> None:
    """Call each of KERNELS, with arrays as lookups have them."""
    cache, version = RowCache(MIN_BYTES), Version(0)
    for keys in (np.zeros(1, np.uint64), np.frombuffer(bytes(8), np.uint64)):
        distinct, _ = unique(keys)
        for rule in ShardRule:
            split(distinct, 2, rule)
        made = _blank(1, 1, version)
        cache.look_up("", version, distinct, made.rows, made.found)
        cache.put("", version, distinct, made.rows, made.found)
    cache.retire("", version)


def unique(keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Distinct keys in order of first appearance, and int64[n]: which of them key i is. keys: uint64[n]."""
    keys = np.ascontiguousarray(keys, np.uint64)
    slots = np.full(2 << keys.size.bit_length(), -1, np.int64)
    first, place = np.empty(keys.size, np.int64), np.empty(keys.size, np.int64)
    count = _unique(keys, slots, first, place)
    return (keys if count == keys.size else keys[first[:count]]), place


def split(keys: NDArray[np.uint64], shards: int, rule: ShardRule) -> list[NDArray[np.int64]]:
    """Of each shard: the positions of its keys, ascending. keys: uint64[n]."""
    if shards == 1:
        return [np.arange(keys.size)]
    ends, order = np.zeros(shards, np.int64), np.empty(keys.size, np.int64)
    _by_shard(shards_of(keys, shards, rule), ends, order)
    starts = [0, *ends[:-1].tolist()]
    return [order[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]


def _blank(count: int, dim: int, version: Version) -> Rows:
    return Rows(np.empty((count, dim), np.float32), np.empty(count, np.bool_), version)


def _looked_up(table: Table, version: Version | None, keys: NDArray[np.uint64]) -> Rows:
    store = table.store(version)
    made = _blank(keys.size, store.about.dim, store.about.version)
    store.lookup(keys, made.rows, made.found)
    return made


def _is_short(store: Store, keys: int) -> bool:
    """Whether a lookup of so many keys takes no longer than handing it to a thread, and may run on the event loop."""
    return store.capabilities.fused and keys <= KEYS_ON_LOOP and 4 * store.about.dim * keys <= BYTES_ON_LOOP


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
