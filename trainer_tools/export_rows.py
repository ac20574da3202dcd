"""Embedding parameters → rows for cube-build."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from cube.sources import KEYS_FILE, ROWS_FILE


class Rows(NamedTuple):
    """The rows of a table as cube-build takes them. keys: uint64[n]; rows: float32[n, dim]."""

    keys: NDArray[np.uint64]
    rows: NDArray[np.float32]

    def write(self, directory: Path) -> None:
        """Write an npy pair."""
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / KEYS_FILE, np.ascontiguousarray(self.keys, "<u8"))
        np.save(directory / ROWS_FILE, np.ascontiguousarray(self.rows, "<f4"))


def read_vocabulary(path: Path) -> NDArray[np.uint64]:
    """The key of each row of a table: uint64[v], distinct; raises BadData."""
    expected = "a .npy array uint64[v] of distinct keys, at least one"
    try:
        keys: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadData(str(path), getattr(error, "strerror", None) or error, expected) from error
    if keys.dtype != np.uint64 or keys.ndim != 1 or not keys.size:
        raise BadData(str(path), f"{keys.dtype} with shape {keys.shape}", expected)
    if np.unique(keys).size != keys.size:
        raise BadData(str(path), f"{keys.size - np.unique(keys).size} repeated keys", expected)
    return keys


def rows_of(table: str, weight: NDArray[np.float32], keys: NDArray[np.uint64]) -> Rows:
    """The rows to serve: row i under keys[i].

    weight: float32[rows, dim]; keys: uint64[v], v <= rows. Rows from v on are what the program reads for an absent
    key. A cube answers zeros there, so they must be zeros; raises BadData.
    """
    if keys.size > len(weight):
        raise BadData(
            f"table {table!r} vocabulary", f"{keys.size} keys", f"at most the {len(weight)} rows of the table"
        )
    if weight[keys.size :].any():
        raise BadData(
            f"table {table!r} rows {keys.size} to {len(weight) - 1}",
            "numbers other than 0",
            "zeros: what an absent key reads",
        )
    return Rows(keys, weight[: keys.size])
