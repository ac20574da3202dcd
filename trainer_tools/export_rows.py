"""Embedding parameters → rows for cube-build."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube import build
from cube.errors import BadData
from cube.rows import RowFormat
from cube.sources import KEYS_FILE, ROWS_FILE, open_source
from cube.version import Version

ROWS_DIRECTORY, CUBE_DIRECTORY = "rows", "cube"  # in what prune-program writes

_PIECE = 8 << 20  # bytes of rows held at once
_RECODED = "cube.recoded"  # where a second cube is until it takes the place of the first


class Rows(NamedTuple):
    """The rows of a table as cube-build takes them. keys: uint64[n]; rows: float32 or float16 [n, dim], also mapped."""

    keys: NDArray[np.uint64]
    rows: NDArray[Any]
    padding: int | None = None  # the row that counts as zeros, whatever it holds

    def write(self, directory: Path, drop_zero_rows: bool = False) -> int:
        """Write an npy pair, a piece at a time; how many rows. A row of zeros reads the same when it is absent."""
        directory.mkdir(parents=True, exist_ok=True)
        kept = np.ones(self.keys.size, np.bool_)
        if drop_zero_rows:
            kept = np.concatenate([piece.any(axis=1) for piece in self._pieces()])
        keys = np.ascontiguousarray(self.keys[kept], "<u8")
        with (directory / KEYS_FILE).open("wb") as file:  # numpy's own writing does not say that a disk is full
            _write_header(file, "<u8", keys.shape)
            file.write(keys.data)
        with (directory / ROWS_FILE).open("wb") as file:
            _write_header(file, "<f4", (keys.size, self.rows.shape[1]))
            at = 0
            for piece in self._pieces():
                file.write(piece[kept[at : at + len(piece)]].data)
                at += len(piece)
        return keys.size

    def _pieces(self) -> Iterator[NDArray[np.float32]]:
        step = max(1, _PIECE // max(1, 4 * self.rows.shape[1]))
        for start in range(0, len(self.rows), step):
            piece = np.array(self.rows[start : start + step], "<f4", order="C")
            if self.padding is not None and start <= self.padding < start + len(piece):
                piece[self.padding - start] = 0
            yield piece


def _write_header(file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> None:
    """The start of an npy file."""
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


def build_cube(
    out: Path, table: str, version: Version, row_format: RowFormat = RowFormat.F32, directory: str = CUBE_DIRECTORY
) -> None:
    """The rows of a table written below `out`, as a cube of one shard beside them, in no more memory than they take.

    Raises BadData for a number that the format cannot hold.
    """
    source = open_source([str(out / ROWS_DIRECTORY / table)])
    memory = max(build.MIN_MEMORY, min(build.DEFAULT_MEMORY, sum(file.size for file in source.files)))
    try:
        build.build(source, out / directory, table, version, build.Options(row_format=row_format, memory=memory))
    except BadData as error:
        raise BadData(f"table {table!r} {error.place}", error.found, error.expected) from error


def recode_cube(out: Path, versions: Mapping[str, Version], row_format: RowFormat) -> Path:
    """A second cube of the same tables, in another format, beside the first. versions: of each table."""
    for table, version in versions.items():
        build_cube(out, table, version, row_format, _RECODED)
    return out / _RECODED


def replace_cube(out: Path) -> None:
    """Let the recoded cube be the cube."""
    shutil.rmtree(out / CUBE_DIRECTORY)
    (out / _RECODED).rename(out / CUBE_DIRECTORY)


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


def rows_of(table: str, weight: NDArray[Any], keys: NDArray[np.uint64], padding: int | None = None) -> Rows:
    """The rows to serve: row i under keys[i]; row `padding` as zeros.

    weight: float32 or float16 [rows, dim]; keys: uint64[v], v <= rows. Rows from v on are what the program reads for
    an absent key. A cube answers zeros there, so they must be zeros; raises BadData.
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
    return Rows(keys, weight[: keys.size], padding)
