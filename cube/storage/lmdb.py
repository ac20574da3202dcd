"""Rows in LMDB (package lmdb): one mapped file, written once, shared by any number of processes through the page cache.

A row lies under its key's 8 bytes, big-endian, so that key order is number order. One longer key, after all of those,
holds the facts. LMDB has no checksums and trusts its file: keep copies where a damaged one would be noticed.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from cube.errors import DataCorrupt
from cube.storage.engines import key_bytes, keys_of, put_values, row_bytes, rows_of
from cube.storage.store import About, Capabilities, Store, Writer

_AFTER_KEYS = b"\xff" * 8 + b"\0"  # above all keys, below what is not a row
_ABOUT = b"\xff" * 8 + b"about"
_FIRST_MAP_BYTES = 1 << 26


class LmdbStore(Store):
    """A mapped LMDB file, read-only.

    4096 rows of 64 bytes out of a million: 700 k keys/s. Cursor.getmulti 450 k, Cursor.get 570 k, buffers instead of
    bytes 440 k; sorting the keys first gains a tenth, and loses it again where the rows are put back in order.
    """

    capabilities = Capabilities(scan=True, shared=True)

    def __init__(self, path: Path):
        """Open the file; raises DataCorrupt where it is none of LMDB's, none of ours, or cut."""
        self._path = path
        self._env = _leased(path)
        try:
            with self._checked(), self._env.begin() as reading:
                raw, size = reading.get(_ABOUT), self._env.stat()["entries"]
            if raw is None:
                raise DataCorrupt(str(path), "no facts", "the facts of a table, which complete a store")
            self.about = About.decode(bytes(raw), str(path))
        except DataCorrupt:
            _returned(self._env)
            raise
        self._size = size - 1  # the facts are no row
        self.file_bytes = path.stat().st_size

    def __len__(self) -> int:
        return self._size

    def read(self, keys: NDArray[np.uint64], rows: NDArray[np.uint8], found: NDArray[np.bool_]) -> int:
        with self._checked(), self._env.begin() as reading:
            values = list(map(reading.get, key_bytes(keys)))
        return put_values(str(self._path), self.about, values, rows, found)

    def scan(self, batch: int = 65536) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
        """All rows, by rising key."""
        with self._env.begin() as reading, reading.cursor() as cursor:
            items, left = iter(cursor), self._size
            while left:
                with self._checked():
                    keys, values = zip(*islice(items, min(batch, left)), strict=True)
                yield keys_of(keys), rows_of(str(self._path), self.about, list(values))
                left -= len(keys)

    def close(self) -> None:
        """Release the file."""
        _returned(self._env)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise DataCorrupt(str(self._path), error, "an LMDB file that cube-build wrote, whole") from error


class _Lease(NamedTuple):
    """An environment of this process, and how many stores use it."""

    env: lmdb.Environment
    file: tuple[int, int]  # device and inode
    users: int


# LMDB can have a file open once per process, but a table may be opened anew before its old store is closed.
_leases: dict[tuple[int, int], _Lease] = {}
_lock = threading.Lock()  # guards _leases


def _leased(path: Path) -> lmdb.Environment:
    """The environment of a file; raises DataCorrupt. To be `_returned`."""
    with _lock:
        try:
            facts = path.stat()
            file = (facts.st_dev, facts.st_ino)
            if not (lease := _leases.get(file)):
                # map_size 0: as much as the file says it needs. No lock: nobody writes to what is published
                env = lmdb.open(str(path), map_size=0, subdir=False, readonly=True, lock=False, readahead=False)
                lease = _Lease(env, file, 0)
                needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
                if facts.st_size < needed:  # a lookup beyond the end would kill the process
                    env.close()
                    raise DataCorrupt(str(path), f"{facts.st_size} bytes", f"at least {needed}, as its header says")
        except OSError as error:
            raise DataCorrupt(str(path), error.strerror or error, "a readable LMDB file") from error
        except lmdb.Error as error:
            raise DataCorrupt(str(path), error, "a complete LMDB file that cube-build wrote") from error
        _leases[file] = lease._replace(users=lease.users + 1)
        return lease.env


def _returned(env: lmdb.Environment) -> None:
    """A store needs its environment no longer; the last one closes it."""
    with _lock:
        for lease in list(_leases.values()):
            if lease.env is env:
                _leases[lease.file] = lease._replace(users=lease.users - 1)
                if lease.users == 1:
                    del _leases[lease.file]
                    env.close()


class LmdbWriter(Writer):
    """Fills a new file, each partition by rising key. Not atomic: see publish."""

    def __init__(self, path: Path, about: About):
        """path: where nothing is yet."""
        self._about = about
        self._map_bytes = _FIRST_MAP_BYTES
        # without sync: `finish` does that once. A kill before leaves a file without facts
        self._env = lmdb.open(str(path), map_size=self._map_bytes, subdir=False, lock=False, sync=False)
        self._last = b""  # the greatest key so far

    def prepare(self, keys: NDArray[np.uint64], rows: NDArray[np.uint8]) -> tuple[list[bytes], list[bytes]]:
        order = np.argsort(keys)
        return key_bytes(keys[order]), row_bytes(rows[order])

    def add(self, prepared: tuple[list[bytes], list[bytes]]) -> None:
        keys, values = prepared
        if keys:
            self._put(keys, values, append=keys[0] > self._last)
            self._last = max(self._last, keys[-1])

    def finish(self) -> None:
        self._env.sync(True)
        self._put([_ABOUT], [self._about.encode()], append=True)
        self._env.sync(True)
        self._env.close()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._env.close()

    def _put(self, keys: list[bytes], values: list[bytes], append: bool) -> None:
        """Add in one transaction. append: all keys are above those there; pages are then filled to the brim."""
        while True:
            try:
                with self._env.begin(write=True) as writing, writing.cursor() as cursor:
                    cursor.putmulti(zip(keys, values, strict=True), append=append)
                return
            except lmdb.MapFullError:  # ends: the map doubles until it holds them, or mapping that much fails
                self._map_bytes *= 2
                self._env.set_mapsize(self._map_bytes)
