"""Rows → segments: one per shard, published together as one version of one table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from cube.keys import shards_of
from cube.publish import publishing
from cube.storage import segment
from cube.version import Version

KEYS_FILE, ROWS_FILE = "keys.npy", "rows.npy"
MAX_KEYS = 1 << 31  # per shard: the index counts places in 32 bits


class Rows(NamedTuple):
    """The rows of a table before they are built. keys: uint64[n]; rows: float32[n, dim]."""

    keys: NDArray[np.uint64]
    rows: NDArray[np.float32]


class Built(NamedTuple):
    """What a build wrote."""

    directory: Path
    keys_by_shard: list[int]
    duplicates: int  # rows that a later row of the same key replaced


def read_rows(directory: Path) -> Rows:
    """Map `keys.npy` (uint64[n]) and `rows.npy` (float32[n, dim]); raises BadData naming the file."""
    keys, rows = _array(directory / KEYS_FILE, np.uint64, 1), _array(directory / ROWS_FILE, np.float32, 2)
    if len(keys) != len(rows):
        raise BadData(str(directory), f"{len(keys)} keys and {len(rows)} rows", "as many rows as keys")
    if rows.shape[1] == 0:
        raise BadData(str(directory / ROWS_FILE), "rows of 0 elements", "at least 1")
    return Rows(keys, rows)


def write_rows(directory: Path, rows: Rows) -> None:
    """Write what `read_rows` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / KEYS_FILE, np.ascontiguousarray(rows.keys, "<u8"))
    np.save(directory / ROWS_FILE, np.ascontiguousarray(rows.rows, "<f4"))


def build(
    rows: Rows,
    data: Path,
    table: str,
    version: Version,
    shards: int,
    progress: Callable[[int], object] = lambda keys: None,
) -> Built:
    """Write `<data>/<table>/<version>/<shard>-of-<shards>.seg` for every shard, and publish them together.

    Of rows with the same key the last wins. `progress` is told how many keys each finished shard holds. Raises
    BadData for an existing version or a bad name.
    """
    check_table_name(table)
    if not 1 <= shards <= 65535:
        raise BadData("shards", shards, "1 to 65535")
    last = _last_of_each(rows.keys)
    shard_of = shards_of(np.asarray(rows.keys)[last], shards)
    counts = np.bincount(shard_of, minlength=shards)
    if counts.max(initial=0) > MAX_KEYS:
        raise BadData(f"table {table!r}", f"{counts.max()} keys in one shard", f"at most {MAX_KEYS}: use more shards")
    with publishing(data / table / str(version)) as draft:
        for shard in range(shards):
            mine = last[shard_of == shard]
            path = draft / segment.file_name(shard, shards)
            segment.write(path, table, version, shard, shards, rows.keys[mine], rows.rows[mine])
            progress(mine.size)
    return Built(data / table / str(version), counts.tolist(), len(rows.keys) - last.size)


def check_table_name(table: str) -> None:
    """Raise BadData for a name that cannot be a directory of its own."""
    if not table or table.startswith(".") or {"/", "\0"} & set(table) or len(table.encode()) > segment.TABLE_NAME_BYTES:
        raise BadData("table name", repr(table), f"1 to {segment.TABLE_NAME_BYTES} bytes, no '/', no dot first")


def _last_of_each(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The position of the last occurrence of each distinct key, in order of position. keys: uint64[n]."""
    _, first_in_reverse = np.unique(np.asarray(keys)[::-1], return_index=True)
    return np.sort(len(keys) - 1 - first_in_reverse)


def _array(path: Path, dtype: type, ndim: int) -> Any:
    expected = f"a .npy array of {np.dtype(dtype).name} with {ndim} dimension{'s'[: ndim - 1]}"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise BadData(str(path), "no such file", expected) from error
    except (OSError, ValueError, EOFError) as error:
        raise BadData(str(path), error, expected) from error
    if array.dtype != dtype or array.ndim != ndim:
        raise BadData(str(path), f"{array.dtype} with shape {array.shape}", expected)
    return array
