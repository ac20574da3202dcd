"""One immutable file of rows of one shard.

Written once, mapped by its readers. The bytes are specified in FORMAT.md.
"""

import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import DataCorrupt
from cube.keys import SHARD_RULE_MIX
from cube.rows import RowFormat
from cube.storage import index
from cube.version import Version

MAGIC, FORMAT_VERSION, INDEX_RULE = b"CUBESEG\n", 1, 1
PAGE, BLOCK_BYTES = 4096, 1 << 20
_HEADER = struct.Struct("<8sHHIQQQQIIIIQQQQQII128s")
_HEADER_CRC_AT = PAGE - 4
TABLE_NAME_BYTES = 128


class Header(NamedTuple):
    """What a segment says of itself. Field meanings: FORMAT.md."""

    row_format: RowFormat
    dim: int
    keys: int
    places: int
    buckets: int
    seed: int
    shard: int
    shards: int
    version: Version
    pilots_offset: int
    places_offset: int
    file_bytes: int
    table: str

    @property
    def place_bytes(self) -> int:
        return 8 + self.row_format.row_bytes(self.dim)

    @property
    def blocks(self) -> int:
        return -(-(self.file_bytes - self.pilots_offset) // BLOCK_BYTES)

    def encode(self) -> bytes:
        """The 4096 bytes at the start of the file."""
        head = _HEADER.pack(
            MAGIC, FORMAT_VERSION, self.row_format, self.dim, self.keys, self.places, self.buckets, self.seed,
            self.shard, self.shards, SHARD_RULE_MIX, INDEX_RULE, *self.version, self.pilots_offset, self.places_offset,
            self.file_bytes, self.place_bytes, BLOCK_BYTES, self.table.encode(),
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
         pilots_offset, places_offset, file_bytes, place_bytes, block_bytes, table,
        ) = _HEADER.unpack_from(raw)  # fmt: skip
        if version != FORMAT_VERSION:
            raise DataCorrupt(where, f"format version {version}", f"{FORMAT_VERSION}, which this build reads")
        (crc,) = struct.unpack_from("<I", raw, _HEADER_CRC_AT)
        if crc != zlib.crc32(raw[:_HEADER_CRC_AT]):
            raise DataCorrupt(where, f"header checksum {crc:08x}", f"{zlib.crc32(raw[:_HEADER_CRC_AT]):08x}")
        if row_format not in RowFormat.__members__.values():
            raise DataCorrupt(where, f"row format {row_format}", "one that this build reads (1)")
        if (shard_rule, index_rule, block_bytes) != (SHARD_RULE_MIX, INDEX_RULE, BLOCK_BYTES):
            raise DataCorrupt(
                where,
                f"shard rule {shard_rule}, index rule {index_rule}, blocks of {block_bytes}",
                f"1, 1, {BLOCK_BYTES}",
            )
        header = cls(
            RowFormat(row_format), dim, keys, places, buckets, seed, shard, shards, Version(base, delta),
            pilots_offset, places_offset, file_bytes, table.rstrip(b"\0").decode(),
        )  # fmt: skip
        if not (dim >= 1 and keys <= places and 1 <= places < 1 << 32 and buckets >= 2 and shard < shards):
            counts = f"dim {dim}, {keys} keys in {places} places, {buckets} buckets, shard {shard} of {shards}"
            raise DataCorrupt(where, counts, "the ranges of FORMAT.md")  # a kernel would read outside the file
        if header != _laid_out(header) or place_bytes != header.place_bytes:
            raise DataCorrupt(where, "a header whose offsets do not fit its counts", "the layout of FORMAT.md")
        return header


def file_name(shard: int, shards: int) -> str:
    """Name of a shard's segment within its version directory."""
    return f"{shard}-of-{shards}.seg"


def write(
    path: Path,
    table: str,
    version: Version,
    shard: int,
    shards: int,
    keys: NDArray[np.uint64],
    rows: NDArray[np.float32],
) -> Header:
    """Write a new segment. keys: uint64[n], distinct; rows: float32[n, dim]. Not atomic: see publish."""
    keys = np.ascontiguousarray(keys, np.uint64)
    words = np.ascontiguousarray(rows, "<f4").view(np.uint32)
    seed, pilots, places = index.build(keys, words)
    header = _laid_out(
        Header(
            RowFormat.F32,
            rows.shape[1],
            keys.size,
            len(places),
            pilots.size,
            seed,
            shard,
            shards,
            version,
            0,
            0,
            0,
            table,
        )
    )
    body = bytearray(header.places_offset - header.pilots_offset)
    body[: pilots.nbytes] = pilots.astype("<u2").tobytes()
    body_bytes = places.astype("<u4", copy=False).data.cast("B")
    with path.open("xb") as file:
        file.write(header.encode())
        file.write(np.array(list(_crcs([body, body_bytes])), "<u4").tobytes().ljust(header.pilots_offset - PAGE, b"\0"))
        file.write(body)
        file.write(body_bytes)
    return header


class Segment:
    """A mapped segment. Set once at construction, immutable afterwards, shared freely between threads."""

    def __init__(self, path: Path):
        """Open and check the header; raises DataCorrupt. The rows are mapped, not read."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.header = header = Header.decode(file.read(PAGE), str(path))
                size = os.fstat(file.fileno()).st_size
                if size != header.file_bytes:
                    raise DataCorrupt(
                        str(path), f"{size} bytes", f"{header.file_bytes}, as its header says (truncated copy?)"
                    )
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise DataCorrupt(str(path), error.strerror or str(error), "a readable segment file") from error
        words = header.place_bytes // 4
        self._pilots = np.frombuffer(self._map, "<u2", header.buckets, header.pilots_offset)
        self._places = np.frombuffer(self._map, "<u4", header.places * words, header.places_offset).reshape(-1, words)

    def lookup(self, keys: NDArray[np.uint64], out: NDArray[np.float32], found: NDArray[np.bool_]) -> int:
        """Write the rows of keys (uint64[n]) to out (float32[n, dim], C order) and found (bool[n]).

        Absent keys get zero rows. Returns how many are absent.
        """
        if self.header.keys == 0:
            out[:], found[:] = 0, False
            return keys.size
        return index.lookup(keys, self._places, self._pilots, self.header.seed, out.view(np.uint32), found)

    def verify(self) -> None:
        """Read every block and compare checksums; raises DataCorrupt naming the block."""
        header, view = self.header, memoryview(self._map)
        want = np.frombuffer(self._map, "<u4", header.blocks, PAGE)
        for block, (found, expected) in enumerate(zip(_crcs([view[header.pilots_offset :]]), want, strict=True)):
            if found != expected:
                start = header.pilots_offset + block * BLOCK_BYTES
                raise DataCorrupt(
                    f"{self.path} block {block} (byte {start})", f"checksum {found:08x}", f"{int(expected):08x}"
                )


def _laid_out(header: Header) -> Header:
    """The same header with the offsets and the length that its counts imply."""
    pilots_bytes = _up(2 * header.buckets)
    places_bytes = header.places * header.place_bytes
    blocks = -(-(pilots_bytes + places_bytes) // BLOCK_BYTES)
    pilots_offset = PAGE + _up(4 * blocks)
    places_offset = pilots_offset + pilots_bytes
    return header._replace(
        pilots_offset=pilots_offset, places_offset=places_offset, file_bytes=places_offset + places_bytes
    )


def _up(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _crcs(parts: list[bytearray | memoryview]) -> list[int]:
    """CRC-32 of each block of the parts laid end to end."""
    crcs, crc, filled = [], 0, 0
    for part in [memoryview(whole) for whole in parts]:
        at = 0
        while at < len(part):
            take = min(BLOCK_BYTES - filled, len(part) - at)
            crc, filled, at = zlib.crc32(part[at : at + take], crc), filled + take, at + take
            if filled == BLOCK_BYTES:
                crcs.append(crc)
                crc, filled = 0, 0
    return [*crcs, crc] if filled else crcs
