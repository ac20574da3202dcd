"""One table on one shard: the versions of it that this process has open."""

import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadData, BadRequest, DataCorrupt, NotServed
from cube.keys import ShardRule
from cube.storage.engines import ENGINES, open_store
from cube.storage.store import Store
from cube.version import Version

log = logging.getLogger(__name__)

_Report = Callable[[Store, DataCorrupt | None], object]

_SHARDS_IN_NAME = re.compile(rf"\d+-of-(\d+)({'|'.join(re.escape(engine.suffix) for engine in ENGINES.values())})")


class Table:
    """Open stores by version. Owned by the event loop: only its thread calls this."""

    def __init__(self, name: str, stores: dict[Version, Store]):
        """The newest of `stores` is current until `switch` says otherwise."""
        self.name = name
        self.current = max(stores)  # what lookups read that name no version
        self._stores = stores
        self._readers: Counter[Store] = Counter()  # lookups in threads
        self._removed: set[Store] = set()  # closed by their last reader
        self._tally: list[int] | memoryview[int] = [0, 0]

    @property
    def newest(self) -> Version:
        """Of the open versions."""
        return max(self._stores)

    @property
    def stores(self) -> list[Store]:
        """Of all versions, newest first."""
        return [self._stores[version] for version in self.versions]

    @property
    def versions(self) -> list[Version]:
        """Newest first."""
        return sorted(self._stores, reverse=True)

    def store(self, version: Version | None) -> Store:
        """The rows of a version, None for the current one; raises NotServed."""
        found = self._stores.get(version or self.current)
        if found is None:
            raise NotServed(f"table {self.name!r} version {version}", [str(v) for v in self.versions])
        return found

    def add(self, store: Store) -> None:
        """Serve one more version, in place of none: lookups that name no version do not notice."""
        version = store.about.version
        if version in self._stores:
            raise ValueError(f"table {self.name!r} version {version}: found it open, expected a new one")
        self._stores[version] = store

    def switch(self, version: Version) -> None:
        """Make an open version the current one; raises NotServed."""
        self.current = self.store(version).about.version

    def remove(self, version: Version) -> None:
        """Serve a version no more, and close it when no lookup reads it; raises NotServed, ValueError for the current
        one."""
        if version == self.current:
            raise ValueError(f"table {self.name!r} version {version}: found the current one, expected another")
        store = self.store(version)
        del self._stores[version]
        if self._readers[store]:
            self._removed.add(store)
        else:
            del self._readers[store]
            store.close()

    def hold(self, store: Store) -> None:
        """A lookup in a thread reads the store: it is not closed before `release`."""
        self._readers[store] += 1

    def release(self, store: Store) -> None:
        """That lookup is over."""
        self._readers[store] -= 1
        if store in self._removed and not self._readers[store]:
            self._removed.discard(store)
            del self._readers[store]
            store.close()

    @property
    def keys_found(self) -> int:
        """Keys asked for that had a row, in this process."""
        return self._tally[0]

    @property
    def keys_absent(self) -> int:
        """Keys asked for that had none, in this process."""
        return self._tally[1]

    def count(self, keys: int, absent: int) -> None:
        """Take a lookup into account."""
        tally = self._tally
        tally[0] += keys - absent
        tally[1] += absent

    def count_in(self, tally: "list[int] | memoryview[int]") -> None:
        """Count in these two numbers from now on, found and absent: others may read them."""
        self._tally = tally


def open_tables(
    data: Path, shard: int, shards: int, keep_versions: int = 2, rule: ShardRule | None = None
) -> dict[str, Table]:
    """Open the newest versions of every table under `data` for one shard.

    Layout: FORMAT.md, "Files". rule: which keys are this shard's; None: as the files say, which must all agree. Raises
    BadConfig where there is nothing to serve or the rule is another one, DataCorrupt for a bad file.
    """
    if not data.is_dir():
        raise BadConfig(str(data), "no such directory", "the output of cube-build")
    tables = {}
    for directory in sorted(p for p in data.iterdir() if p.is_dir() and not p.name.startswith(".")):
        built = sorted((v for v in map(_version_of, directory.iterdir()) if v), reverse=True)
        versions = [v for v in built if _is_for(directory / str(v), shards)][:keep_versions]
        for version in built[: len(built) - len(versions)]:
            if not _is_for(directory / str(version), shards):
                log.warning("%s/%s is not built for %d shards: passed over", directory, version, shards)
        versions = versions or built[:1]  # whose error says what is there
        if versions:
            stores = {}
            for version in versions:
                stores[version] = _open(directory / str(version), directory.name, version, shard, shards, rule)
                rule = stores[version].about.shard_rule
            tables[directory.name] = Table(directory.name, stores)
    if not tables:
        raise BadConfig(str(data), "no tables", "directories <table>/<base>@<delta>, as cube-build writes them")
    return tables


def open_version(data: Path, table: str, version: Version, shard: int, shards: int, rule: ShardRule) -> Store:
    """Open one version of a table for one shard, as `open_tables` does; raises NotServed where `data` has no such
    version, BadConfig where it is not built for so many shards, DataCorrupt."""
    directory = data / table / str(version)
    if not directory.is_dir():
        parent = data / table
        built = sorted(filter(None, map(_version_of, parent.iterdir()))) if parent.is_dir() else []
        raise NotServed(f"table {table!r} version {version} under {data}", list(map(str, built)))
    return _open(directory, table, version, shard, shards, rule)


def shards_in(data: Path) -> int:
    """How many shards the newest version under `data` was built for, read off file names; 1 if there is none."""
    found = [
        (version, int(name[1]))
        for directory in data.glob("[!.]*")
        if directory.is_dir()
        for version in map(_version_of, directory.iterdir())
        if version
        for name in (_SHARDS_IN_NAME.fullmatch(path.name) for path in (directory / str(version)).iterdir())
        if name
    ]
    return max(found, default=(None, 1))[1]


def _version_of(path: Path) -> Version | None:
    """The version a directory's name says; None for names that are none, and for other spellings (7 for 7@0)."""
    try:
        version = Version.parse(path.name)
    except BadData:
        return None
    return version if str(version) == path.name and path.is_dir() else None


def _is_for(directory: Path, shards: int) -> bool:
    """Whether a version was built for so many shards, this one's file there or not."""
    names = (_SHARDS_IN_NAME.fullmatch(path.name) for path in directory.glob("*-of-*"))
    return any(name and int(name[1]) == shards for name in names)


def _open(
    directory: Path, table: str, version: Version, shard: int, shards: int, rule: ShardRule | None = None
) -> Store:
    paths = [path for path in directory.glob(f"{shard}-of-{shards}.*") if _SHARDS_IN_NAME.fullmatch(path.name)]
    if len(paths) != 1:
        there = ", ".join(sorted(p.name for p in directory.glob("*-of-*"))) or "no segments"
        raise BadConfig(str(directory), there, f"{shard}-of-{shards}.seg, or one with another engine's suffix")
    store = open_store(paths[0])
    about = store.about
    found, expected = (about.shard, about.shards, about.version, about.table), (shard, shards, version, table)
    if found != expected:
        raise BadConfig(
            str(paths[0]), "the rows of shard {} of {}, version {}, table {!r}".format(*found), paths[0].name
        )
    if rule is not None and about.shard_rule is not rule:  # keys would be looked for where they are not
        wanted = f"{rule.text}, as in the files beside it, or as shard_rule of the configuration says"
        raise BadConfig(str(paths[0]), f"shard rule {about.shard_rule.text}", wanted)
    return store


def touch(stores: Iterable[Store]) -> None:
    """One lookup straight at each store, which counts nowhere: no request waits for a compiler or a first connection.
    Keys are read-only as on the wire."""
    for store in stores:
        row = np.empty((1, store.about.dim), np.float32)
        store.lookup(np.frombuffer(bytes(8), np.uint64), row, np.empty(1, np.bool_))


class Verification:
    """Compares the checksums of stores in a thread of its own, while they are served."""

    def __init__(self, stores: Iterable[Store], report: _Report = lambda store, error: None):
        """Stores whose engine cannot verify are passed over. report: told, in that thread, of each that it is done
        with, and whether it is corrupt; what came of it otherwise is in its `checked`."""
        self._stores = deque(store for store in stores if store.capabilities.verify)
        self._dropped: set[Store] = set()
        self._report = report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)

    def start(self) -> None:
        """Begin; a second call does nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """Returns once no store is being read, within milliseconds."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def drop(self, store: Store) -> None:
        """Be done with a store that is wanted no more, within milliseconds if it is its turn; it is reported then."""
        self._dropped.add(store)

    def _run(self) -> None:
        while self._stores:
            store = self._stores.popleft()  # which is kept no longer than it is read
            about, begin, corrupt = store.about, time.monotonic(), None

            def go_on(bytes_read: int, store: Store = store) -> None:
                if self._stop.is_set() or store in self._dropped:
                    raise _StopVerifying

            try:
                go_on(0)
                store.verify(go_on)
            except _StopVerifying:
                if self._stop.is_set():
                    return
            except DataCorrupt as error:
                corrupt = error.with_traceback(None)  # it is kept, and its frames would keep what they read
                log.error("table %s %s is corrupt and no longer served: %s", about.table, about.version, error)
            except Exception:
                log.exception("table %s %s could not be verified", about.table, about.version)
            else:
                seconds = time.monotonic() - begin
                log.info("table %s %s verified in %.1f s", about.table, about.version, seconds)
            self._report(store, corrupt)


class _StopVerifying(Exception):
    pass


def check_keys(place: str, keys: bytes, limit: int) -> NDArray[np.uint64]:
    """Keys as they come over the wire, packed little-endian uint64; raises BadRequest naming `place`."""
    if len(keys) % 8:
        raise BadRequest(place, f"{len(keys)} bytes", "a multiple of 8: packed little-endian uint64")
    if len(keys) // 8 > limit:
        raise BadRequest(place, f"{len(keys) // 8} keys", f"at most {limit} in one call")
    return np.frombuffer(keys, "<u8")
