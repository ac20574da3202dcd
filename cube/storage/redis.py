"""Rows in a Redis server or Cluster (package redis): tables that many servers share and change while they are served.

A store's file says in JSON where the server is, under which prefix the rows lie there, and the facts. A row is a string
under `{<prefix>/<bucket>}` and its key's 8 bytes, big-endian. The part in braces is what a Cluster hashes: all rows of
a bucket live together, so one command can ask for many. Shorter names hold each bucket's number of rows and the facts.

Rows stay with the server when the file is removed: `redis-cli --scan --pattern '{<prefix>/*'` lists them.
"""

import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.exceptions import AskError, RedisClusterException, RedisError, ResponseError, TryAgainError
from redis.retry import Retry

from cube.errors import BadConfig, DataCorrupt, Unavailable
from cube.storage.engines import keys_of, put_values, row_bytes
from cube.storage.store import About, Capabilities, Store, Writer, checked_rows

BUCKETS = 64  # in the names of rows: never change. Enough that the nodes of a Cluster get about equal shares
_CHUNK = 1024  # keys of a command: others wait while the server runs one
_TIMEOUT_S = 2.0  # to connect, and for each answer; socket_timeout= in the URL changes it
_PLAIN, _CLUSTER = ("redis", "rediss", "unix"), ("redis+cluster", "rediss+cluster")

# Rows and their number change together, whoever else writes: KEYS are the number's name and the rows' names.
_SET = b"""local new = 0
for i = 2, #KEYS do
  new = new + 1 - redis.call('EXISTS', KEYS[i])
  redis.call('SET', KEYS[i], ARGV[i - 1])
end
return redis.call('INCRBY', KEYS[1], new)"""
_UNLINK = b"""local gone = 0
for i = 2, #KEYS do gone = gone + redis.call('UNLINK', KEYS[i]) end
return redis.call('DECRBY', KEYS[1], gone)"""

_Command = tuple[int, list[bytes]]  # the bucket it is about, and its words


class Place(msgspec.Struct, forbid_unknown_fields=True):
    """A store's file."""

    url: str  # with user and password, if the server wants them
    prefix: str
    about: msgspec.Raw


class RedisStore(Store):
    """Rows in Redis. Opened for writing or not, any number of processes may have it open.

    Every method raises Unavailable, naming the server's address, when it does not answer in time or refuses a command.
    Nothing is asked twice here: callers know better whether there is time for that.

    4096 rows of 64 bytes, server and client on the same two cores: 470 k keys/s; with redis-py's own mget 360 k.
    """

    def __init__(self, path: Path, writable: bool = False):
        """Read the file and ask the server for its facts.

        Raises DataCorrupt where they differ or miss, BadConfig for a URL that is none, Unavailable.
        """
        self.capabilities = Capabilities(writable=writable, scan=True, shared=True)
        self._path = path
        try:
            place = msgspec.json.decode(path.read_bytes(), type=Place)
        except OSError as error:
            raise DataCorrupt(str(path), error.strerror or error, "a readable file") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataCorrupt(str(path), error, "where rows are in Redis, as cube-build writes it") from error
        self.about = About.decode(bytes(place.about), str(path))
        self._names = _Names(place.prefix)
        self._servers = _Servers(place.url, self._names, str(path))
        try:
            (there,) = self._servers.ask([(0, [b"GET", self._names.about])], _follow)
            if there is None:
                raise DataCorrupt(str(path), f"no facts in {self._servers}", "the facts of a table, which complete it")
            if About.decode(there, str(path)) != self.about:
                raise DataCorrupt(str(path), f"facts of another table in {self._servers}", str(self.about))
        except Exception:
            self._servers.close()
            raise

    def __len__(self) -> int:
        asked = [(bucket, [b"GET", name]) for bucket, name in enumerate(self._names.counts)]
        return sum(int(count or 0) for count in self._servers.ask(asked, _follow))

    def read(self, keys: NDArray[np.uint64], rows: NDArray[np.uint8], found: NDArray[np.bool_]) -> int:
        # a single server answers one command for keys of many buckets, a Cluster refuses that
        groups = _buckets(keys) if self._servers.cluster else np.zeros(keys.size, np.int64)
        order = np.argsort(groups, kind="stable")
        keys, groups = keys[order], groups[order]
        asked = [(bucket, [b"MGET", *self._names.of(keys[at])]) for bucket, at in _runs(groups)]
        values = list(chain.from_iterable(self._servers.ask(asked, _one_by_one)))
        in_order, found_in_order = np.empty_like(rows), np.empty_like(found)
        absent = put_values(f"{self._path} in {self._servers}", self.about, values, in_order, found_in_order)
        rows[order], found[order] = in_order, found_in_order
        return absent

    def scan(self, batch: int = 65536) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
        """All rows, by rising key. Of rows written or deleted meanwhile, some are seen.

        The keys are held in memory, 8 bytes each: Redis may name one twice while it walks.
        """
        keys = self._servers.scan()
        for start in range(0, keys.size, batch):
            some = keys[start : start + batch]
            rows, found = np.empty((some.size, self.about.row_bytes), np.uint8), np.empty(some.size, np.bool_)
            self.read(some, rows, found)
            yield some[found], rows[found]

    def upsert(self, keys: NDArray[np.uint64], rows: NDArray[np.float32]) -> None:
        """As in `Store`. A failure may leave some of the keys with their new rows, and the others with the old ones."""
        if not self.capabilities.writable:
            raise self._cannot("upsert")
        coded = checked_rows(self.about, keys, rows)
        distinct, last = np.unique(keys[::-1], return_index=True)
        self._change(_SET, distinct, coded[::-1][last])

    def delete(self, keys: NDArray[np.uint64]) -> None:
        """As in `Store`. A failure may leave some of the keys present."""
        if not self.capabilities.writable:
            raise self._cannot("delete")
        distinct = np.unique(keys)
        self._change(_UNLINK, distinct, np.empty((distinct.size, 0), np.uint8))

    def close(self) -> None:
        """Close the connections."""
        self._servers.close()

    def _change(self, script: bytes, keys: NDArray[np.uint64], rows: NDArray[np.uint8]) -> None:
        """Run a script on distinct keys and their rows, if it has any."""
        buckets = _buckets(keys)
        order = np.argsort(buckets, kind="stable")
        keys, rows = keys[order], rows[order]
        self._servers.do(
            (bucket, [b"EVAL", script, b"%d" % (1 + len(names)), self._names.counts[bucket], *names, *values])
            for bucket, at in _runs(buckets[order])
            for names, values in [(self._names.of(keys[at]), row_bytes(rows[at]) if rows.shape[1] else [])]
        )


class RedisWriter(Writer):
    """Fills a server with the rows of a new store. Without `finish`, `close` removes them again."""

    def __init__(self, path: Path, about: About, url: str):
        """path: of the file, which `finish` writes. Raises BadConfig for a URL that is none of Redis's, Unavailable."""
        self._path, self._about, self._url = path, about, url
        build = f"{about.shard}-of-{about.shards}/{secrets.token_hex(8)}"
        # quoted: a brace would end the hash tag
        self._prefix = f"{quote(about.table, safe='')}/{about.version}/{build}"
        self._names = _Names(self._prefix)
        self._servers = _Servers(url, self._names, f"redis for {path.name}")
        self._servers.ask([(0, [b"GET", self._names.about])], _follow)  # does it answer?
        self._counts = np.zeros(BUCKETS, np.int64)
        self._finished = False

    def prepare(
        self, keys: NDArray[np.uint64], rows: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint8]]:
        buckets = _buckets(keys)
        order = np.argsort(buckets, kind="stable")
        return buckets[order], keys[order], rows[order]

    def add(self, prepared: tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint8]]) -> None:
        buckets, keys, rows = prepared
        self._servers.do(
            (bucket, [b"MSET", *chain.from_iterable(zip(self._names.of(keys[at]), row_bytes(rows[at]), strict=True))])
            for bucket, at in _runs(buckets)
        )
        self._counts += np.bincount(buckets, minlength=BUCKETS)

    def finish(self) -> None:
        counts = zip(self._names.counts, self._counts, strict=True)
        facts = [(bucket, [b"SET", name, b"%d" % count]) for bucket, (name, count) in enumerate(counts)]
        self._servers.ask([*facts, (0, [b"SET", self._names.about, self._about.encode()])], _follow)
        place = Place(self._url, self._prefix, msgspec.Raw(self._about.encode()))
        self._path.touch(mode=0o600, exist_ok=False)  # the URL may hold a password
        with self._path.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(place)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._finished = True

    def close(self) -> None:
        """Close the connections; raises Unavailable where rows had to be removed and could not be."""
        try:
            if not self._finished:
                keys = self._servers.scan()
                buckets = _buckets(keys)
                order = np.argsort(buckets, kind="stable")
                facts = [(bucket, [b"UNLINK", name]) for bucket, name in enumerate(self._names.counts)]
                self._servers.ask([*facts, (0, [b"UNLINK", self._names.about])], _follow)
                self._servers.do(
                    (bucket, [b"UNLINK", *self._names.of(keys[order[at]])]) for bucket, at in _runs(buckets[order])
                )
        finally:
            self._servers.close()


class _Names:
    """What the rows and facts of one store are called in Redis."""

    def __init__(self, prefix: str):
        tags = [f"{{{prefix}/{bucket:02d}}}".encode() for bucket in range(BUCKETS)]
        self.counts = [tag + b"rows" for tag in tags]
        self.about = tags[0] + b"about"
        self.pattern = f"{{{prefix}/??}}".encode() + b"?" * 8  # of rows; ? stands for any byte
        self._tags = np.frombuffer(b"".join(tags), np.uint8).reshape(BUCKETS, -1)

    def of(self, keys: NDArray[np.uint64]) -> list[bytes]:
        """The names of the rows of keys (uint64[n])."""
        width = self._tags.shape[1]
        names = np.empty((keys.size, width + 8), np.uint8)
        names[:, :width] = self._tags[_buckets(keys)]
        names[:, width:] = keys.astype(">u8").view(np.uint8).reshape(-1, 8)
        return row_bytes(names)

    def keys(self, names: list[bytes]) -> NDArray[np.uint64]:
        """The keys (uint64[n]) of such names."""
        return keys_of(name[-8:] for name in names)


class _Servers:
    """The server, or the nodes of a Cluster, that a URL names. All raises Unavailable where one does not answer."""

    def __init__(self, url: str, names: _Names, place: str):
        """Raises BadConfig naming `place`, never quoting the URL: there may be a password in it."""
        scheme, _, rest = url.partition("://")
        host, behind = rest[: (cut := _authority(rest))], rest[cut:]
        if scheme not in _PLAIN + _CLUSTER or not rest or "@" in behind:  # there, it ends a password not encoded
            schemes = ", ".join(f"{known}://" for known in _PLAIN + _CLUSTER)
            raise BadConfig(place, "no such URL", f"one of {schemes}, with user and password percent-encoded")
        self._address = f"{scheme}://{host.rpartition('@')[2]}{behind.partition('?')[0]}"
        self._names = names
        self.cluster = scheme in _CLUSTER
        self._stale = False  # a node failed: another may have its slots by now. Any thread may set it
        kind: Any = redis.RedisCluster if self.cluster else redis.Redis
        with self._checked():
            try:
                self._client = kind.from_url(
                    url.replace("+cluster", "", 1),
                    socket_timeout=_TIMEOUT_S,
                    socket_connect_timeout=_TIMEOUT_S,
                    retry=Retry(NoBackoff(), 0),
                    protocol=2,
                )
            except (ValueError, TypeError):
                raise BadConfig(place, f"no such {scheme} URL", "host, port and options of redis-py") from None

    def __str__(self) -> str:
        return f"redis at {self._address}"

    def ask(self, commands: list[_Command], redirected: Callable[[Any, list[bytes]], Any]) -> list[Any]:
        """The answers to commands, in order. All are sent before the first answer is awaited.

        redirected: asks one again through redis-py's client, which knows the ways of a Cluster whose slots move.
        """
        answers: list[Any] = [None] * len(commands)
        with self._checked():
            if self._stale:
                self._stale = False
                self._client.nodes_manager.initialize()
            self._exchange(commands, answers)
            for at, answer in enumerate(answers):
                if self.cluster and isinstance(answer, (AskError, TryAgainError)):  # MOVED is a kind of ASK
                    answers[at] = redirected(self._client, commands[at][1])
                elif isinstance(answer, ResponseError):
                    raise answer
        return answers

    def do(self, commands: Iterable[_Command]) -> None:
        """Run commands whose answers say nothing, some at a time."""
        rest = iter(commands)
        while some := list(islice(rest, BUCKETS)):
            self.ask(some, _follow)

    def scan(self) -> NDArray[np.uint64]:
        """The keys of all rows, rising: uint64[n]."""
        found = [np.empty(0, np.uint64)]
        with self._checked():
            nodes = [node.redis_connection for node in self._client.get_primaries()] if self.cluster else [self._client]
            for node in nodes:
                cursor = -1
                while cursor:
                    cursor, names = node.scan(max(cursor, 0), self._names.pattern, 10_000)
                    found.append(self._names.keys(names))
        return np.unique(np.concatenate(found))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _exchange(self, commands: list[_Command], answers: list[Any]) -> None:
        """Fill in the answers, errors of the server included."""
        parts = defaultdict(list)
        for at, (bucket, _) in enumerate(commands):
            parts[self._pool(bucket)].append(at)
        used = []
        try:
            for pool, part in parts.items():
                connection = pool.get_connection()
                used.append((pool, connection, part))
                connection.send_packed_command(connection.pack_commands([commands[at][1] for at in part]))
            for _, connection, part in used:
                for at in part:
                    try:
                        answers[at] = connection.read_response(disable_decoding=True)
                    except ResponseError as error:
                        answers[at] = error
        except BaseException:
            for _, connection, _ in used:
                connection.disconnect()  # answers still under way are not those of the next question
            raise
        finally:
            for pool, connection, _ in used:
                pool.release(connection)

    def _pool(self, bucket: int) -> Any:
        """Connections to who holds a bucket."""
        if not self.cluster:
            return self._client.connection_pool
        return self._client.get_node_from_key(self._names.counts[bucket]).redis_connection.connection_pool

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, RedisClusterException) as error:
            self._stale = self.cluster
            raise Unavailable(f"{self}: {error}") from error


def _authority(rest: str) -> int:
    """Where user, password, host and port of a URL end."""
    return min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))


def _follow(client: Any, words: list[bytes]) -> Any:
    return client.execute_command(words[0].decode(), *words[1:])


def _one_by_one(client: Any, words: list[bytes]) -> Any:
    """An MGET whose keys are on the move: some here, some there, which no single command may ask for."""
    return [client.execute_command("GET", name) for name in words[1:]]


def _buckets(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The bucket of each key: the upper bits of a product (Fibonacci hashing). In the names of rows: never change."""
    return ((keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(58)).astype(np.int64)


def _runs(buckets: NDArray[np.int64]) -> Iterator[tuple[int, slice]]:
    """Slices of one bucket each, no longer than a command may be; buckets (int64[n]) never fall."""
    edges = np.searchsorted(buckets, np.arange(BUCKETS + 1)).tolist()
    for bucket in np.unique(buckets).tolist():
        for start in range(edges[bucket], edges[bucket + 1], _CHUNK):
            yield bucket, slice(start, min(start + _CHUNK, edges[bucket + 1]))
