"""One table on one shard: the versions of it that this process has open."""

import logging
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadData, BadRequest, DataCorrupt, NotServed
from cube.storage.engines import ENGINES, open_store
from cube.storage.store import Store
from cube.version import Version

log = logging.getLogger(__name__)

_SHARDS_IN_NAME = re.compile(rf"\d+-of-(\d+)({'|'.join(re.escape(engine.suffix) for engine in ENGINES.values())})")


class Table:
    """Open stores by version. Filled before the server starts, read by one thread."""

    def __init__(self, name: str, stores: dict[Version, Store]):
        self.name = name
        self._stores = stores
        self.newest = max(stores)
        self.keys_found = self.keys_absent = 0  # owned by the event loop

    @property
    def stores(self) -> list[Store]:
        """Of all versions, newest first."""
        return [self._stores[version] for version in self.versions]

    @property
    def versions(self) -> list[Version]:
        """Newest first."""
        return sorted(self._stores, reverse=True)

    def store(self, version: Version | None) -> Store:
        """The rows of a version, None for the newest; raises NotServed."""
        found = self._stores.get(version or self.newest)
        if found is None:
            raise NotServed(f"table {self.name!r} version {version}", [str(v) for v in self.versions])
        return found

    def count(self, keys: int, absent: int) -> None:
        """Take a lookup into account."""
        self.keys_found += keys - absent
        self.keys_absent += absent


def open_tables(data: Path, shard: int, shards: int, keep_versions: int = 2) -> dict[str, Table]:
    """Open the newest versions of every table under `data` for one shard.

    Layout: FORMAT.md, "Files". Raises BadConfig where there is nothing to serve, DataCorrupt for a bad file.
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
            stores = {v: _open(directory / str(v), directory.name, v, shard, shards) for v in versions}
            tables[directory.name] = Table(directory.name, stores)
    if not tables:
        raise BadConfig(str(data), "no tables", "directories <table>/<base>@<delta>, as cube-build writes them")
    return tables


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


def _open(directory: Path, table: str, version: Version, shard: int, shards: int) -> Store:
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
    return store


class Verification:
    """Compares the checksums of stores in a thread of its own, while they are served."""

    def __init__(self, stores: Iterable[Store]):
        """Stores whose engine cannot verify are passed over."""
        self._stores = [store for store in stores if store.capabilities.verify]
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

    def _run(self) -> None:
        for store in self._stores:
            about, begin = store.about, time.monotonic()
            try:
                store.verify(self._go_on)
            except _StopVerifying:
                return
            except DataCorrupt as error:
                log.error("table %s %s is corrupt and no longer served: %s", about.table, about.version, error)
            except Exception:
                log.exception("table %s %s could not be verified", about.table, about.version)
            else:
                seconds = time.monotonic() - begin
                log.info("table %s %s verified in %.1f s", about.table, about.version, seconds)

    def _go_on(self, bytes_read: int) -> None:
        if self._stop.is_set():
            raise _StopVerifying


class _StopVerifying(Exception):
    pass


def check_keys(place: str, keys: bytes, limit: int) -> NDArray[np.uint64]:
    """Keys as they come over the wire, packed little-endian uint64; raises BadRequest naming `place`."""
    if len(keys) % 8:
        raise BadRequest(place, f"{len(keys)} bytes", "a multiple of 8: packed little-endian uint64")
    if len(keys) // 8 > limit:
        raise BadRequest(place, f"{len(keys) // 8} keys", f"at most {limit} in one call")
    return np.frombuffer(keys, "<u8")
