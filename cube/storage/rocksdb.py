"""Rows in RocksDB (package rocksdict): an engine on local disk whose rows can be changed while they are served.

A store is a directory. A row lies under its key's 8 bytes, big-endian, so that key order is number order. Two longer
keys, after all of those, hold the facts and the number of rows.
"""

import itertools
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DataBlockIndexType,
    DbClosedError,
    DBCompressionType,
    IngestExternalFileOptions,
    Options,
    Rdict,
    ReadOptions,
    SstFileWriter,
    WriteBatch,
    WriteOptions,
)

from cube.errors import DataCorrupt
from cube.storage.engines import key_bytes, keys_of, put_values, row_bytes, rows_of
from cube.storage.store import About, Capabilities, Store, Writer, checked_rows

_AFTER_KEYS = b"\xff" * 8 + b"\0"  # above all keys, below what is not a row
_ABOUT, _COUNT = b"\xff" * 8 + b"about", b"\xff" * 8 + b"count"
_BATCH = 65536


class RocksdbStore(Store):
    """A RocksDB. Opened for writing, it belongs to one process; otherwise any number may have it open.

    An upsert or a delete is on disk when it returns, whole or not at all. Who has the store open read-only sees the
    rows as they were when it was opened. Even then the directory must be writable: the package rewrites a small file of
    its own there, which nothing reads.

    4096 rows of 64 bytes out of a million: 300 k keys/s. With a block cache instead of mapped files 190 k, with one
    `get` a key 250 k, without sorting the keys 250 k.
    """

    def __init__(self, path: Path, writable: bool = False):
        """Open the RocksDB at `path`; raises DataCorrupt where none is, or one that is not ours or not complete."""
        self._path = path
        self.capabilities = Capabilities(writable=writable, scan=True, verify=True, shared=not writable)
        if not (path / "CURRENT").is_file():  # opened for writing, RocksDB would create one
            raise DataCorrupt(str(path), "no RocksDB", "a table's rows, as cube-build writes them")
        self._db = self._opened(writable)
        try:
            about, count = self._values([_ABOUT, _COUNT])
            if about is None or count is None or len(count) != 8:
                raise DataCorrupt(str(path), "no facts", "the facts of a table, which complete a store")
            self.about = About.decode(about, str(path))
        except DataCorrupt:
            self._db.close()
            raise
        self.file_bytes = sum(file.stat().st_size for file in path.glob("*.sst"))
        self._count = int.from_bytes(count, "big")  # changed by whoever writes, of whom there is one at a time

    def __len__(self) -> int:
        return self._count

    def read(self, keys: NDArray[np.uint64], rows: NDArray[np.uint8], found: NDArray[np.bool_]) -> int:
        self._refuse_if_corrupt()
        if not keys.size:
            return 0
        order = np.argsort(keys)
        values = self._values(key_bytes(keys[order]))
        in_order, found_in_order = np.empty_like(rows), np.empty_like(found)
        absent = put_values(str(self._path), self.about, values, in_order, found_in_order)
        rows[order], found[order] = in_order, found_in_order
        return absent

    def scan(self, batch: int = _BATCH) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
        """All rows, by rising key, as they were when the scan began."""
        yield from self._scan(self._db, batch)

    def upsert(self, keys: NDArray[np.uint64], rows: NDArray[np.float32]) -> None:
        values = row_bytes(checked_rows(self.about, keys, rows)) if self.capabilities.writable else []
        self._write("upsert", keys, lambda batch, parts: deque(map(batch.put, parts, values), 0), len)

    def delete(self, keys: NDArray[np.uint64]) -> None:
        self._write("delete", keys, lambda batch, parts: deque(map(batch.delete, parts), 0), lambda parts: 0)

    def verify(self, progress: Callable[[int], object] = lambda bytes_read: None) -> None:
        """Read everything anew from disk, where each block has a checksum; `progress` is told each batch's size.

        A damaged Bloom filter stays unnoticed: RocksDB does without it, and no answer is wrong, only some slower.
        """
        before, self.checked = self.checked, "running"
        try:
            with closing(self._opened(writable=False)) as db:  # the open one need not compare again what it has read
                for keys, rows in self._scan(db, _BATCH):
                    progress(keys.nbytes + rows.nbytes)
            self.checked = "yes"
        except DataCorrupt as error:
            self.set_corrupt(error)
            raise
        finally:
            if self.checked == "running":  # progress wanted it stopped
                self.checked = before

    def close(self) -> None:
        """Release the files, and the lock of whoever writes."""
        self._db.close()

    def _opened(self, writable: bool) -> Rdict:
        access = AccessType.read_write() if writable else AccessType.read_only(False)
        with self._checked():
            return Rdict(str(self._path), _options(), access_type=access)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """What RocksDB says of its files, as an error of ours: the package raises nothing but Exception itself."""
        try:
            yield
        except Exception as error:
            wanted = "a RocksDB that cube-build wrote, whole, in a writable directory, open for writing nowhere else"
            raise DataCorrupt(str(self._path), error, wanted) from error

    def _values(self, parts: list[bytes]) -> list[bytes | None]:
        with self._checked():
            values: Any = self._db.get(parts)  # type: ignore[arg-type]  # list is invariant: all of them are bytes
        return list(values)

    def _scan(self, db: Rdict, batch: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
        options = ReadOptions()
        options.set_iterate_upper_bound(_AFTER_KEYS)
        items, left = db.items(read_opt=options), self._count
        while True:
            with self._checked():
                some = list(itertools.islice(items, batch))
            left -= len(some)
            if not some:
                if left:  # the iterator ends at a bad block as if it were the last
                    raise DataCorrupt(str(self._path), f"{self._count - left} rows", f"the {self._count} it counts")
                return
            keys, values = zip(*some, strict=True)
            yield keys_of(keys), rows_of(str(self._path), self.about, list(values))

    def _write(
        self,
        what: str,
        keys: NDArray[np.uint64],
        fill: Callable[[WriteBatch, list[bytes]], object],
        left: Callable[[list[bytes]], int],
    ) -> None:
        """Change rows and count in one batch, forced to disk. left: how many of distinct keys have a row afterwards."""
        if not self.capabilities.writable:
            raise self._cannot(what)
        parts = key_bytes(keys)
        distinct = list(set(parts))
        batch, options = WriteBatch(raw_mode=True), WriteOptions()
        options.sync = True
        fill(batch, parts)
        had = sum(value is not None for value in self._values(distinct))
        count = self._count + left(distinct) - had
        batch.put(_COUNT, count.to_bytes(8, "big"))
        with self._checked():
            self._db.write(batch, options)
        self._count = count


class _Part(NamedTuple):
    """A file of sorted rows, ready to become part of a store."""

    path: Path
    keys: int


class RocksdbWriter(Writer):
    """Writes each partition as a sorted file of its own, which RocksDB then takes in; merged at the end.

    Half the time of filling it batch by batch, and without a log.
    """

    def __init__(self, path: Path, about: About):
        """path: where nothing is yet."""
        self._about, self._count = about, 0
        self._db = Rdict(str(path), _options())
        self._parts = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))  # RocksDB removes strangers
        self._numbers = itertools.count()

    def prepare(self, keys: NDArray[np.uint64], rows: NDArray[np.uint8]) -> _Part:
        order, path = np.argsort(keys), self._parts / str(next(self._numbers))
        if keys.size:  # RocksDB refuses to finish a file of nothing
            writer = SstFileWriter(_options())
            writer.open(str(path))
            deque(map(writer.__setitem__, key_bytes(keys[order]), row_bytes(rows[order])), 0)
            writer.finish()
        return _Part(path, keys.size)

    def add(self, prepared: _Part) -> None:
        if prepared.keys:
            options = IngestExternalFileOptions()
            options.set_move_files(True)
            self._db.ingest_external_file([str(prepared.path)], options)
        self._count += prepared.keys

    def finish(self) -> None:
        self._db.compact_range(None, None)  # one run of files, so that a lookup searches one
        batch, options = WriteBatch(raw_mode=True), WriteOptions()
        options.sync = True
        batch.put(_COUNT, self._count.to_bytes(8, "big"))
        batch.put(_ABOUT, self._about.encode())
        self._db.write(batch, options)
        self._db.flush()
        self._db.close()

    def close(self) -> None:
        """Let go of the files; those of partitions never added are removed."""
        with suppress(DbClosedError):  # it is finished
            self._db.close()
        shutil.rmtree(self._parts, ignore_errors=True)


def _options() -> Options:
    """Nothing but bytes (other modes of the package would unpickle), mapped and not compressed: rows hardly shrink."""
    blocks = BlockBasedOptions()
    blocks.set_bloom_filter(10, False)
    blocks.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
    blocks.set_block_cache(Cache(1 << 20))  # mapped blocks are not kept here
    options = Options(raw_mode=True)
    options.set_block_based_table_factory(blocks)
    options.set_compression_type(DBCompressionType.none())
    options.set_allow_mmap_reads(True)
    options.set_keep_log_file_num(1)
    return options
