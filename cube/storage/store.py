"""What every storage engine is: the rows of one shard of one version of one table, by key.

A new engine is one file beside this one: a `Store` with `read` (and `scan`, `upsert`, `delete`, `verify` where it can),
a `Writer`, and a line in `engines.py`. The contract suite, tests/cube/test_store.py, then says whether it is one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData, DataCorrupt, Unimplemented
from cube.keys import ShardRule
from cube.rows import FLOAT32, RowFormat, check_offsets, decode, pool
from cube.version import Version


class About(NamedTuple):
    """What a store says of itself, whatever the engine."""

    table: str
    version: Version
    shard: int
    shards: int
    dim: int
    row_format: RowFormat
    default_row: bytes = b""  # in the row format; what absent keys read. Empty: zeros
    shard_rule: ShardRule = ShardRule.MIX  # stores that do not say follow it: there was no other

    @property
    def row_bytes(self) -> int:
        return self.row_format.row_bytes(self.dim)

    def encode(self) -> bytes:
        """JSON, for engines that keep facts as one value."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, raw: bytes, place: str) -> "About":
        """Read what `encode` wrote; raises DataCorrupt naming `place`."""
        try:
            about = msgspec.json.decode(raw, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataCorrupt(place, error, "the facts of a table, as cube-build writes them") from error
        if about.dim < 1 or not 0 <= about.shard < about.shards or len(about.default_row) not in (0, about.row_bytes):
            raise DataCorrupt(place, about, "dim at least 1, shard below shards, a default row of the row format")
        return about


class Capabilities(NamedTuple):
    """What an engine can do. What it cannot, it refuses with Unimplemented."""

    writable: bool = False  # upsert and delete, seen by later lookups
    scan: bool = False  # walk over all rows
    verify: bool = False  # compare every stored byte with a checksum
    shared: bool = False  # several processes may have it open at once
    fused: bool = False  # rows are decoded and pooled while they are copied, in one pass


class Store(ABC):
    """Rows by key. Lookups may come from several threads at once; writes from one at a time."""

    capabilities: Capabilities
    about: About
    file_bytes = 0  # of the files that hold the rows; 0 where they are elsewhere
    checked = "no"  # what verify came to: "no", "running", "yes" or "corrupt"; set by the thread that verifies

    _corrupt: DataCorrupt | None = None  # set once, by whichever thread verifies

    def set_corrupt(self, error: DataCorrupt) -> None:
        """From now on lookups raise what verify found."""
        self._corrupt, self.checked = error, "corrupt"

    def _refuse_if_corrupt(self) -> None:
        if self._corrupt is not None:  # anew each time: a raised one keeps what its callers held
            raise DataCorrupt(self._corrupt.place, self._corrupt.found, self._corrupt.expected)

    @abstractmethod
    def read(self, keys: NDArray[np.uint64], rows: NDArray[np.uint8], found: NDArray[np.bool_]) -> int:
        """Write the rows of keys (uint64[n], any order, repeats allowed) as they are stored.

        rows: uint8[n, row_bytes], C order; found: bool[n]. Absent keys get the default row, else zero bytes. Returns
        how many are absent. Raises DataCorrupt for a stored row of another width.
        """

    @abstractmethod
    def __len__(self) -> int:
        """How many keys have a row."""

    def lookup(self, keys: NDArray[np.uint64], out: NDArray[np.float32], found: NDArray[np.bool_]) -> int:
        """`read`, decoded: out is float32[n, dim], C order."""
        about = self.about
        check_buffer(out, (keys.size, about.dim), FLOAT32)
        if about.row_format is RowFormat.F32:
            return self.read(keys, out.view(np.uint8), found)
        raw = np.empty((keys.size, about.row_bytes), np.uint8)
        absent = self.read(keys, raw, found)
        decode(about.row_format, raw, out)
        return absent

    def pooled(
        self,
        keys: NDArray[np.uint64],
        offsets: NDArray[np.int64],
        mean: bool,
        out: NDArray[np.float32],
        found: NDArray[np.bool_],
    ) -> int:
        """The sum or mean of the rows of each bag; bag b owns keys[offsets[b] : offsets[b + 1]].

        offsets: int64[bags + 1], from 0 to n, never falling; out: float32[bags, dim], C order; found: bool[n]. Sums
        run in float32 from left to right, a mean divides by the bag's size, absent keys included; an empty bag is
        zeros. Returns how many keys are absent.
        """
        check_offsets("offsets", offsets, keys.size)
        check_buffer(out, (offsets.size - 1, self.about.dim), FLOAT32)
        raw = np.empty((keys.size, self.about.row_bytes), np.uint8)
        absent = self.read(keys, raw, found)
        pool(self.about.row_format, raw, offsets, mean, out)
        return absent

    def scan(self, batch: int = 65536) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
        """All rows as (uint64[k], uint8[k, row_bytes]), k up to `batch`, in an order of the engine's own."""
        raise self._cannot("scan")

    def upsert(self, keys: NDArray[np.uint64], rows: NDArray[np.float32]) -> None:
        """Set the rows (float32[n, dim]) of keys (uint64[n]); of a repeated key the last wins."""
        raise self._cannot("upsert")

    def delete(self, keys: NDArray[np.uint64]) -> None:
        """Make keys (uint64[n]) absent; those that are already stay so."""
        raise self._cannot("delete")

    def verify(self, progress: Callable[[int], object] = lambda bytes_read: None) -> None:
        """Read everything and compare checksums; raises DataCorrupt naming the place. Stops if `progress` raises."""
        raise self._cannot("verify")

    def load(self) -> None:  # noqa: B027 - most engines cannot
        """Copy all rows to memory of this process alone, where that makes lookups faster; else do nothing."""

    def close(self) -> None:  # noqa: B027 - most engines need nothing
        """Release files or connections. No lookup may be running."""

    def _cannot(self, what: str) -> Unimplemented:
        return Unimplemented(f"{type(self).__name__} cannot {what}")


class Writer(ABC):
    """Fills a new store. `prepare` may run in several threads; `add` and `finish` in one, in order."""

    @abstractmethod
    def prepare(self, keys: NDArray[np.uint64], rows: NDArray[np.uint8]) -> Any:
        """The heavy part of adding one partition: keys uint64[n], distinct; rows uint8[n, row_bytes], encoded."""

    @abstractmethod
    def add(self, prepared: Any) -> None:
        """Write what `prepare` made of the next partition."""

    @abstractmethod
    def finish(self) -> None:
        """Complete the store; nothing is readable before, all is on disk (or with the server) after."""

    def close(self) -> None:  # noqa: B027 - most engines need nothing
        """Let go of files and connections, finished or not."""


class Engine(NamedTuple):
    """How stores of one kind are made and opened."""

    suffix: str  # what their names end with in a version's directory
    open: Callable[[Path, bool], Store]  # where it is; whether it will be written to. Raises Unimplemented, DataCorrupt
    write: Callable[[Path, About, int, str], Writer]  # place, facts, number of partitions, URL of a server or ""


def check_buffer(buffer: NDArray[Any], shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    """Raise ValueError for a buffer that is not as a lookup will fill it: kernels write to addresses."""
    if buffer.shape != shape or buffer.dtype != dtype or not buffer.flags.c_contiguous:
        found = f"{buffer.dtype} with shape {buffer.shape}"
        raise ValueError(f"a buffer: found {found}, expected {dtype.name} with shape {shape} in C order")


def checked_rows(about: About, keys: NDArray[np.uint64], rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows of an upsert, encoded; raises BadData where their shape is not that of the table."""
    if rows.shape != (keys.size, about.dim):
        raise BadData(f"table {about.table!r}", f"rows of shape {rows.shape}", f"({keys.size}, {about.dim})")
    return about.row_format.encode(rows)
