"""One immutable file of rows of one shard.

Written once, front to back; mapped by its readers. The bytes are specified in FORMAT.md.
"""

import contextlib
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import DataCorrupt, NotServed
from cube.kernels import U
from cube.keys import ShardRule
from cube.rows import FLOAT32, UINT8, RowFormat, check_offsets
from cube.storage import index
from cube.storage.store import About, Capabilities, Store, Writer, check_buffer
from cube.version import Version

MAGIC, FORMAT_VERSION, INDEX_RULE = b"CUBESEG\n", 2, 2
PAGE, BLOCK_BYTES = 4096, 1 << 20
SUFFIX = ".seg"
_HEADER = struct.Struct("<8sHHIQQQQIIIIQQQIIQQQQQII128s")
_HEADER_CRC_AT = PAGE - 4
_PARTITION = np.dtype(
    [("places_start", "<u8"), ("pilots_start", "<u8"), ("places", "<u4"), ("buckets", "<u4"), ("multiplier", "<u8")]
)
TABLE_NAME_BYTES = 128


class Header(NamedTuple):
    """What a segment says of itself. Field meanings: FORMAT.md."""

    about: About  # its default row is read apart: it lies in a section of its own
    keys: int
    places: int
    buckets: int
    partitions: int
    stride: int
    default_row_offset: int
    pilots_offset: int
    partitions_offset: int
    checksums_offset: int
    file_bytes: int
    partitions_crc: int
    checksums_crc: int

    @property
    def blocks(self) -> int:
        return -(-(self.checksums_offset - PAGE) // BLOCK_BYTES)

    def encode(self) -> bytes:
        """The 4096 bytes at the start of the file."""
        about = self.about
        head = _HEADER.pack(
            MAGIC, FORMAT_VERSION, about.row_format, about.dim, self.keys, self.places, self.buckets, int(index.SEED),
            about.shard, about.shards, about.shard_rule, INDEX_RULE, *about.version, self.partitions,
            self.stride, BLOCK_BYTES, self.default_row_offset, self.pilots_offset, self.partitions_offset,
            self.checksums_offset, self.file_bytes, self.partitions_crc, self.checksums_crc, about.table.encode(),
        )  # fmt: skip
        head = head.ljust(_HEADER_CRC_AT, b"\0")
        return head + struct.pack("<I", zlib.crc32(head))

    @classmethod
    def decode(cls, raw: bytes, where: str) -> "Header":
        """Check and read a header; `where` names the file in errors (DataCorrupt)."""
        if raw[: len(MAGIC)] != MAGIC:
            raise DataCorrupt(where, f"{raw[: len(MAGIC)]!r} at the start", f"a cube segment ({MAGIC!r})")
        if len(raw) < PAGE:
            raise DataCorrupt(where, f"{len(raw)} bytes", f"at least the {PAGE} of a header")
        (_, version, row_format, dim, keys, places, buckets, seed, shard, shards, shard_rule, index_rule, base, delta,
         partitions, stride, block_bytes, default_row_offset, pilots_offset, partitions_offset,
         checksums_offset, file_bytes, partitions_crc, checksums_crc, table,
        ) = _HEADER.unpack_from(raw)  # fmt: skip
        if version != FORMAT_VERSION:
            expected = f"{FORMAT_VERSION}, which this build reads; build the table again with cube-build"
            raise DataCorrupt(where, f"format version {version}", expected)
        (crc,) = struct.unpack_from("<I", raw, _HEADER_CRC_AT)
        if crc != zlib.crc32(raw[:_HEADER_CRC_AT]):
            raise DataCorrupt(where, f"header checksum {crc:08x}", f"{zlib.crc32(raw[:_HEADER_CRC_AT]):08x}")
        if row_format not in RowFormat.__members__.values():
            known = ", ".join(f"{f:d}" for f in RowFormat)
            raise DataCorrupt(where, f"row format {row_format}", f"one that this build reads ({known})")
        if shard_rule not in ShardRule.__members__.values():
            known = ", ".join(f"{rule:d}" for rule in ShardRule)
            raise DataCorrupt(where, f"shard rule {shard_rule}", f"one that this build reads ({known})")
        rules = (index_rule, block_bytes, seed)
        if rules != (INDEX_RULE, BLOCK_BYTES, int(index.SEED)):
            found = "index rule {}, blocks of {}, seed {:x}".format(*rules)
            raise DataCorrupt(where, found, f"{INDEX_RULE}, {BLOCK_BYTES}, {int(index.SEED):x}")
        try:
            name = table.rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise DataCorrupt(where, f"a table name that is not UTF-8 ({error})", "UTF-8") from error
        about = About(
            name, Version(base, delta), shard, shards, dim, RowFormat(row_format), shard_rule=ShardRule(shard_rule)
        )
        header = cls(
            about, keys, places, buckets, partitions, stride, default_row_offset, pilots_offset, partitions_offset,
            checksums_offset, file_bytes, partitions_crc, checksums_crc,
        )  # fmt: skip
        if not (dim >= 1 and keys <= places and partitions >= 1 and shard < shards):
            counts = f"dim {dim}, {keys} keys in {places} places, {partitions} partitions, shard {shard} of {shards}"
            raise DataCorrupt(where, counts, "the ranges of FORMAT.md")
        if header != _laid_out(header, bool(default_row_offset)):
            raise DataCorrupt(where, "a header whose offsets do not fit its counts", "the layout of FORMAT.md")
        return header


def file_name(shard: int, shards: int, suffix: str = SUFFIX) -> str:
    """Name of a shard's store within its version directory."""
    return f"{shard}-of-{shards}{suffix}"


def stride_of(row_bytes: int) -> int:
    """Bytes of a place: key and row, up to the next multiple of 8."""
    return 8 + -(-row_bytes // 8) * 8


class SegmentWriter(Writer):
    """Writes a new segment front to back, one partition after the other. Not atomic: see publish."""

    def __init__(self, path: Path, about: About, partitions: int):
        """partitions: how many `add` will be told of, in order; keys go where `index.partitions_of` says."""
        self.about, self._partitions = about, partitions
        self._stride = stride_of(about.row_bytes)
        self._facts: list[tuple[int, int, int, int, int]] = []
        self._pilots: list[NDArray[np.uint16]] = []
        self._keys = self._places = self._buckets = 0
        self._crcs: list[int] = []
        self._crc = self._filled = 0
        self._file = path.open("xb", buffering=0)
        self._file.seek(PAGE)  # a hole until the header is written, last: what is not finished has no magic

    def prepare(self, keys: NDArray[np.uint64], rows: NDArray[np.uint8]) -> index.Partition:
        return index.build(keys, rows, self._stride)

    def add(self, prepared: index.Partition) -> None:
        self._facts.append((self._places, self._buckets, prepared.places, prepared.pilots.size, prepared.multiplier))
        self._keys += prepared.keys
        self._places += prepared.places
        self._buckets += prepared.pilots.size
        self._pilots.append(prepared.pilots)
        self._section(prepared.block.data)

    def finish(self) -> None:
        if len(self._facts) != self._partitions:
            raise ValueError(f"{len(self._facts)} partitions written, {self._partitions} announced")
        self._pad()
        if self.about.default_row:
            self._section(self.about.default_row)
            self._pad()
        for pilots in self._pilots:
            self._section(pilots.data.cast("B"))
        self._pad()
        facts = np.array(self._facts, _PARTITION).tobytes()
        self._section(facts)
        self._pad()
        crcs = np.array(self._crcs + [self._crc] * (self._filled > 0), "<u4").tobytes()
        self._write_all(crcs)
        header = _laid_out(
            Header(
                self.about, self._keys, self._places, self._buckets, self._partitions, self._stride,
                0, 0, 0, 0, 0, zlib.crc32(facts), zlib.crc32(crcs),
            ),
            bool(self.about.default_row),
        )  # fmt: skip
        self._file.seek(0)
        self._write_all(header.encode())

    def close(self) -> None:
        self._file.close()

    def _section(self, data: bytes | memoryview) -> None:
        """Write bytes that the block checksums cover."""
        view, at = memoryview(data), 0
        self._write_all(view)
        while at < len(view):
            take = min(BLOCK_BYTES - self._filled, len(view) - at)
            self._crc = zlib.crc32(view[at : at + take], self._crc)
            self._filled, at = self._filled + take, at + take
            if self._filled == BLOCK_BYTES:
                self._crcs.append(self._crc)
                self._crc = self._filled = 0

    def _pad(self) -> None:
        self._section(bytes(-self._file.tell() % PAGE))

    def _write_all(self, data: bytes | memoryview) -> None:
        """A raw file may take less than it is given: at 2 GiB, or before the disk is full."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


class Segment(Store):
    """A mapped segment, shared freely between threads: `load`, `verify` and `close` swap what they set in one
    assignment, and what a lookup has begun to read stays until it has ended."""

    capabilities = Capabilities(scan=True, verify=True, shared=True, fused=True)

    def __init__(self, path: Path):
        """Open and check the header; raises DataCorrupt. The rows are mapped, not read."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.header = Header.decode(file.read(PAGE), str(path))
                size = os.fstat(file.fileno()).st_size
                if size != self.header.file_bytes:
                    raise DataCorrupt(
                        str(path), f"{size} bytes", f"{self.header.file_bytes}, as its header says (a truncated copy?)"
                    )
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise DataCorrupt(str(path), error.strerror or str(error), "a readable segment file") from error
        mapped.madvise(mmap.MADV_RANDOM)  # a cold lookup reads the page it needs, not its neighbours
        header, data = self.header, np.frombuffer(mapped, np.uint8)
        self.about, self.file_bytes = header.about, header.file_bytes
        if at := header.default_row_offset:
            self.about = self.about._replace(default_row=mapped[at : at + self.about.row_bytes])
        self._places: index.Places | None = index.Places(  # None: closed
            data, U(PAGE), U(header.stride), _partitions(header, data, str(path)), U(header.pilots_offset), U(at)
        )
        self._map: mmap.mmap | None = mapped  # None: not, or no more

    def __len__(self) -> int:
        return self.header.keys

    def read(
        self, keys: NDArray[np.uint64], rows: NDArray[np.uint8], found: NDArray[np.bool_],
        over: index.Overlay | None = None,
    ) -> int:  # fmt: skip
        places = self._readable()
        check_buffer(rows, (keys.size, self.about.row_bytes), UINT8)
        return index.read(places, over, self.about.row_bytes, keys, rows, found)

    def lookup(
        self, keys: NDArray[np.uint64], out: NDArray[np.float32], found: NDArray[np.bool_],
        over: index.Overlay | None = None,
    ) -> int:  # fmt: skip
        places = self._readable()
        check_buffer(out, (keys.size, self.about.dim), FLOAT32)
        return index.lookup(places, over, self.about.row_format, keys, out, found)

    def pooled(
        self, keys: NDArray[np.uint64], offsets: NDArray[np.int64], mean: bool, out: NDArray[np.float32],
        found: NDArray[np.bool_], over: index.Overlay | None = None,
    ) -> int:  # fmt: skip
        places = self._readable()
        check_offsets("offsets", offsets, keys.size)  # the kernel trusts them
        check_buffer(out, (offsets.size - 1, self.about.dim), FLOAT32)
        return index.pooled(places, over, self.about.row_format, keys, offsets, mean, out, found)

    def scan(self, batch: int = 65536) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
        """In order of place."""
        places = self._readable()
        stride, row_bytes = self.header.stride, self.about.row_bytes
        blocks = places.data[PAGE : PAGE + self.header.places * stride].reshape(-1, stride)
        for start in range(0, self.header.places, batch):
            block = blocks[start : start + batch]
            keys = np.ascontiguousarray(block[:, :8]).view("<u8").reshape(-1)
            live = index.homes(places, keys) == np.arange(start, start + len(block))  # others are fillers
            yield keys[live], block[live, 8 : 8 + row_bytes]

    def load(self) -> None:
        """Copy the file to huge pages: a lookup then seldom misses the processor's table of pages, too."""
        places, mapped, size = self._opened(), self._map, self.header.file_bytes
        if mapped is None:
            return
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        data = np.frombuffer(memory, np.uint8)
        data[:] = places.data
        self._places, self._map = places._replace(data=data), None

    def verify(self, progress: Callable[[int], object] = lambda bytes_read: None) -> None:
        """Read every block and compare checksums; raises DataCorrupt naming the block, and lookups do from then on.

        `progress` is told the bytes of each block, and may raise to stop.
        """
        header, view, mapped, before = self.header, self._opened().data.data, self._map, self.checked
        self.checked = "running"
        try:
            crcs = view[header.checksums_offset :]
            if zlib.crc32(crcs) != header.checksums_crc:
                found = f"checksum {zlib.crc32(crcs):08x}"
                raise DataCorrupt(f"{self.path} checksums section", found, f"{header.checksums_crc:08x}")
            want = np.frombuffer(crcs, "<u4")
            for block, expected in enumerate(want.tolist()):
                start = PAGE + block * BLOCK_BYTES
                end = min(start + BLOCK_BYTES, header.checksums_offset)
                if mapped is not None and block % 16 == 0:  # it is advised against reading ahead
                    mapped.madvise(mmap.MADV_WILLNEED, start, min(32 * BLOCK_BYTES, header.file_bytes - start))
                if (found_crc := zlib.crc32(view[start:end])) != expected:
                    place = f"{self.path} block {block} (byte {start})"
                    raise DataCorrupt(place, f"checksum {found_crc:08x}", f"{expected:08x}")
                progress(end - start)
            self.checked = "yes"
        except DataCorrupt as error:
            # A twin without a traceback, whose frames would hold the mapping after `close`.
            self.set_corrupt(DataCorrupt(error.place, error.found, error.expected))
            raise
        finally:
            if self.checked == "running":  # progress wanted it stopped
                self.checked = before

    def close(self) -> None:
        """Let go of the file: it is unmapped when the last lookup that reads it ends; later ones raise NotServed."""
        self._places = self._map = None

    def _readable(self) -> index.Places:
        """What a lookup keeps while it reads. Raises DataCorrupt, and NotServed after `close`."""
        self._refuse_if_corrupt()
        return self._opened()

    def _opened(self) -> index.Places:
        places = self._places
        if places is None:
            raise NotServed(f"table {self.about.table!r} version {self.about.version}, which is closed", [])
        return places


def _partitions(header: Header, data: NDArray[np.uint8], where: str) -> NDArray[np.uint64]:
    """The partitions section, checked: the kernels go where it says."""
    raw = data[header.partitions_offset : header.partitions_offset + header.partitions * _PARTITION.itemsize]
    if zlib.crc32(raw.data) != header.partitions_crc:
        raise DataCorrupt(f"{where} partitions", f"checksum {zlib.crc32(raw.data):08x}", f"{header.partitions_crc:08x}")
    facts = raw.view(_PARTITION)
    places, buckets = facts["places"].astype(np.int64), facts["buckets"].astype(np.int64)
    starts_fit = (facts["places_start"] == np.cumsum(places) - places).all()
    pilots_fit = (facts["pilots_start"] == np.cumsum(buckets) - buckets).all()
    totals = (int(places.sum()), int(buckets.sum()))
    if not (
        starts_fit
        and pilots_fit
        and totals == (header.places, header.buckets)
        and (buckets >= 1).all()
        and (places >= 1).all()
    ):
        raise DataCorrupt(f"{where} partitions", "sections that do not follow each other", "the layout of FORMAT.md")
    columns = ("places_start", "pilots_start", "places", "buckets", "multiplier")
    return index.described(np.stack([facts[name].astype(np.uint64) for name in columns], axis=1))


def _laid_out(header: Header, has_default_row: bool) -> Header:
    """The same header with the stride, the offsets and the length that its counts imply."""
    stride = stride_of(header.about.row_bytes)
    end = PAGE + _up(header.places * stride)
    default_row_offset = end if has_default_row else 0
    pilots_offset = end + (_up(header.about.row_bytes) if has_default_row else 0)
    partitions_offset = pilots_offset + _up(2 * header.buckets)
    checksums_offset = partitions_offset + _up(_PARTITION.itemsize * header.partitions)
    laid_out = header._replace(
        stride=stride,
        default_row_offset=default_row_offset,
        pilots_offset=pilots_offset,
        partitions_offset=partitions_offset,
        checksums_offset=checksums_offset,
    )
    return laid_out._replace(file_bytes=checksums_offset + 4 * laid_out.blocks)


def _up(size: int) -> int:
    return -(-size // PAGE) * PAGE
