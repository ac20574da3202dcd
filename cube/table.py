"""One table on one shard: the versions of it that this process has open."""

import logging
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadData, BadRequest, NotServed
from cube.storage.segment import Segment, file_name
from cube.version import Version

log = logging.getLogger(__name__)

_SHARDS_IN_NAME = re.compile(r"\d+-of-(\d+)\.seg")


class Table:
    """Open segments by version. Filled before the server starts, read by one thread."""

    def __init__(self, name: str, segments: dict[Version, Segment]):
        self.name = name
        self._segments = segments
        self.newest = max(segments)
        self.keys_found = self.keys_absent = 0  # owned by the event loop

    @property
    def versions(self) -> list[Version]:
        """Newest first."""
        return sorted(self._segments, reverse=True)

    def segment(self, version: Version | None) -> Segment:
        """The segment of a version, None for the newest; raises NotServed."""
        found = self._segments.get(version or self.newest)
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
            segments = {v: _open(directory / str(v), directory.name, v, shard, shards) for v in versions}
            tables[directory.name] = Table(directory.name, segments)
    if not tables:
        raise BadConfig(str(data), "no tables", "directories <table>/<base>@<delta>, as cube-build writes them")
    return tables


def shards_in(data: Path) -> int:
    """How many shards the tables under `data` were built for, read off file names; 1 if there are none."""
    names = (_SHARDS_IN_NAME.fullmatch(path.name) for path in sorted(data.glob("*/*@*/*.seg")))
    return next((int(name[1]) for name in names if name), 1)


def _version_of(path: Path) -> Version | None:
    """The version a directory's name says; None for names that are none, and for other spellings (7 for 7@0)."""
    try:
        version = Version.parse(path.name)
    except BadData:
        return None
    return version if str(version) == path.name and path.is_dir() else None


def _is_for(directory: Path, shards: int) -> bool:
    """Whether a version was built for so many shards, this one's file there or not."""
    return any(directory.glob(f"*-of-{shards}.seg"))


def _open(directory: Path, table: str, version: Version, shard: int, shards: int) -> Segment:
    path = directory / file_name(shard, shards)
    if not path.exists():
        there = ", ".join(sorted(p.name for p in directory.glob("*.seg"))) or "no segments"
        raise BadConfig(str(directory), there, path.name)
    segment = Segment(path)
    found, expected = segment.header[6:9] + segment.header[-1:], (shard, shards, version, table)
    if found != expected:
        raise BadConfig(str(path), "the segment of shard {} of {}, version {}, table {!r}".format(*found), path.name)
    return segment


def check_keys(place: str, keys: bytes, limit: int) -> NDArray[np.uint64]:
    """Keys as they come over the wire, packed little-endian uint64; raises BadRequest naming `place`."""
    if len(keys) % 8:
        raise BadRequest(place, f"{len(keys)} bytes", "a multiple of 8: packed little-endian uint64")
    if len(keys) // 8 > limit:
        raise BadRequest(place, f"{len(keys) // 8} keys", f"at most {limit} in one call")
    return np.frombuffer(keys, "<u8")
