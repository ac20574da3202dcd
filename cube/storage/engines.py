"""Which storage engines there are, and what those over key-value packages share.

An engine's module, and the package it needs, is imported when the first store of it is opened or written: a server
needs only the packages of the engines it serves from.
"""

import importlib
from collections.abc import Iterable
from itertools import repeat
from operator import is_not
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadData, DataCorrupt, Unimplemented
from cube.storage.store import About, Engine, Store, Writer


def open_store(path: Path, writable: bool = False) -> Store:
    """Open the store at `path` with the engine that its suffix names.

    Raises BadData for a suffix that no engine has, BadConfig where the engine's package is not installed, Unimplemented
    where `writable` stores are not the engine's business, DataCorrupt for what is not a complete store of it,
    Unavailable where its server does not answer.
    """
    for engine in ENGINES.values():
        if path.suffix == engine.suffix:
            return engine.open(path, writable)
    raise BadData(str(path), f"suffix {path.suffix!r}", " or ".join(engine.suffix for engine in ENGINES.values()))


def key_bytes(keys: NDArray[np.uint64]) -> list[bytes]:
    """Keys (uint64[n]) as 8 bytes each, whose order is that of the numbers."""
    parts: list[bytes] = keys.astype(">u8").view("V8").tolist()
    return parts


def keys_of(parts: Iterable[bytes]) -> NDArray[np.uint64]:
    """uint64[n] of what `key_bytes` made."""
    return np.frombuffer(b"".join(parts), ">u8").astype(np.uint64)


def row_bytes(rows: NDArray[np.uint8]) -> list[bytes]:
    """Rows (uint8[n, row_bytes], C order) as bytes each."""
    parts: list[bytes] = rows.view(f"V{rows.shape[1]}").ravel().tolist()
    return parts


def rows_of(place: str, about: About, values: list[bytes]) -> NDArray[np.uint8]:
    """uint8[n, row_bytes] of stored values; raises DataCorrupt naming `place` where one has another width."""
    if wrong := set(map(len, values)) - {about.row_bytes}:
        raise DataCorrupt(place, f"a row of {min(wrong)} bytes", f"the {about.row_bytes} of its row format")
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, about.row_bytes)


def put_values(
    place: str, about: About, values: list[bytes | None], rows: NDArray[np.uint8], found: NDArray[np.bool_]
) -> int:
    """What `Store.read` does with the values of its keys, None where absent; the same results and errors."""
    if None not in values:
        rows[:] = rows_of(place, about, values)  # type: ignore[arg-type]  # no None is left
        found[:] = True
        return 0
    found[:] = np.fromiter(map(is_not, values, repeat(None)), np.bool_, len(values))
    rows[found] = rows_of(place, about, [value for value in values if value is not None])
    rows[~found] = np.frombuffer(about.default_row, np.uint8) if about.default_row else 0
    return len(values) - int(np.count_nonzero(found))


def _module(name: str) -> Any:
    """The module of an engine; raises BadConfig where a package that it needs is missing."""
    try:
        return importlib.import_module(f"cube.storage.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "cube").partition(".")[0] == "cube":  # a fault of ours
            raise
        wanted = f"it installed: pip install 'cube-serving[{name}]'"
        raise BadConfig(f"storage engine {name}", f"no package {error.name!r}", wanted) from error


def _open_segment(path: Path, writable: bool) -> Store:
    """Changes of a writable one are laid over the file in memory: they are gone when it is closed."""
    store: Store = _module("segment").Segment(path)
    if writable:
        store = _module("overlay").OverlaidSegment(store)
    return store


def _write_segment(path: Path, about: About, partitions: int, url: str) -> Writer:
    writer: Writer = _module("segment").SegmentWriter(path, about, partitions)
    return writer


def _open_rocksdb(path: Path, writable: bool) -> Store:
    store: Store = _module("rocksdb").RocksdbStore(path, writable)
    return store


def _write_rocksdb(path: Path, about: About, partitions: int, url: str) -> Writer:
    writer: Writer = _module("rocksdb").RocksdbWriter(path, about)
    return writer


def _open_lmdb(path: Path, writable: bool) -> Store:
    if writable:
        raise Unimplemented(f"{path}: LMDB stores cannot be written to once they are built")
    store: Store = _module("lmdb").LmdbStore(path)
    return store


def _write_lmdb(path: Path, about: About, partitions: int, url: str) -> Writer:
    writer: Writer = _module("lmdb").LmdbWriter(path, about)
    return writer


def _open_redis(path: Path, writable: bool) -> Store:
    store: Store = _module("redis").RedisStore(path, writable)
    return store


def _write_redis(path: Path, about: About, partitions: int, url: str) -> Writer:
    writer: Writer = _module("redis").RedisWriter(path, about, url)
    return writer


ENGINES: dict[str, Engine] = {
    "segment": Engine(".seg", _open_segment, _write_segment),
    "rocksdb": Engine(".rocksdb", _open_rocksdb, _write_rocksdb),
    "lmdb": Engine(".lmdb", _open_lmdb, _write_lmdb),
    "redis": Engine(".redis", _open_redis, _write_redis),
}
