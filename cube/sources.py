"""Rows for `cube-build`, streamed from any place that fsspec reads.

    npy pair       a directory with keys.npy, uint64[n], and rows.npy, float[n, dim]: what `prune-program` writes
    Parquet        a key column, and a column of float lists or else every other float column (needs pyarrow)
    Arrow IPC      the same columns; the file format ("Feather 2") and the stream format (needs pyarrow)
    safetensors    tensors `keys` U64[n] and `rows` float[n, dim]; or one matrix, whose row numbers are the keys
    sequence file  what Paddle's cube builder takes, and Hadoop's own SequenceFile of BytesWritable

What a file is shows in its first bytes; names matter only to the npy pair. Keys may be int64 everywhere, read as the
same 64 bits. Elements may be float16, float32 or float64, and bfloat16 in safetensors; they become float32, and a
float64 beyond float32's range is refused. Memory is bounded by the batch asked for; only Arrow IPC has to hold a whole
record batch of its file, of the columns needed.
"""

import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from math import prod
from typing import Annotated, Any, NamedTuple

import fsspec.core
import msgspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from cube.errors import BadConfig, BadData, ServingError
from cube.kernels import inlined, kernel

KEYS_FILE, ROWS_FILE = "keys.npy", "rows.npy"
_READ = 8 << 20  # bytes asked for at once where a format leaves it to us
_FORMATS = "a Parquet, Arrow IPC, safetensors or sequence file, or a directory with keys.npy and rows.npy"
_KEYS, _FLOATS = ("uint64", "int64"), ("float16", "float32", "float64")


class Cursor(NamedTuple):
    """A place between two rows: a file, and a row of it, or a byte of a sequence file. (0, 0) is the beginning."""

    file: int
    at: int


class Batch(NamedTuple):
    """Rows in the order in which they are stored. Both arrays are C-contiguous, writable and the receiver's own."""

    keys: NDArray[np.uint64]  # uint64[n]
    rows: NDArray[np.float32]  # float32[n, dim]
    cursor: Cursor  # where the next batch starts


class SourceFile(NamedTuple):
    """What was read, so that a later run can tell whether it is still the same. An npy pair is one, its directory."""

    url: str
    size: int  # bytes
    version: str  # the file system's word for this content: an ETag, a checksum or a time; "" where it has none


class Source(ABC):
    """Rows in order: of a repeated key the later wins."""

    files: list[SourceFile]  # as they are read; Cursor.file counts them
    dim: int  # elements of a row; 0 where no file has a row or says how wide one would be
    read_as: str = ""  # what else decides which rows come out: the columns asked for
    most_rows: int  # there are no more rows than this: from headers and sizes, without reading the rows

    @abstractmethod
    def batches(self, start: Cursor, most: int) -> Iterator[Batch]:
        """All rows from `start`, which is (0, 0) or the cursor of an earlier batch, at most `most` ≥ 1 at a time.

        Raises BadData, naming the file and the row or byte, for whatever is not as its format says.
        """


def open_source(
    paths: Sequence[str],
    key_column: str = "key",
    row_column: str = "row",
    storage_options: Mapping[str, Any] | None = None,
) -> Source:
    """Find the files, tell their formats, and read their headers.

    paths: local paths or fsspec URLs of files, globs or directories. They are read in the order given; within a glob
    or a directory, subdirectories included, in the natural order of names (part-2 before part-10). Names that begin
    with "." or "_" are passed over there, as Hadoop's writers mean it, and so is whatever lies beside an npy pair.
    key_column, row_column: names of columns, or of tensors. storage_options: for fsspec's file system.

    Raises BadData for files that are absent, unreadable, of no known format, or of different widths; BadConfig where
    a library is not installed that a format or a file system needs.
    """
    tables: list[_Table] = []
    for url in paths:
        for files in _find(url, storage_options or {}):
            table = _Arrays.of_pair(*files) if len(files) == 2 else _open(files[0], key_column, row_column)
            known = next((t for t in tables if t.dim), table)
            if table.dim and table.dim != known.dim:
                raise BadData(table.url, f"rows of {table.dim} elements", f"{known.dim}, as in {known.url}")
            tables.append(table)
    if not tables:
        raise BadData("paths", "none", "at least one file of rows")
    return _Tables(tables, f"{key_column}, {row_column}")


# What file systems call the version of a file's content, the surest first.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "modified", "created")


class _File(NamedTuple):
    """A file that exists."""

    fs: Any
    path: str
    url: str  # for people
    size: int
    version: str

    @classmethod
    def of(cls, fs: Any, info: Mapping[str, Any]) -> "_File":
        url = _url(fs, info["name"])
        if info["type"] != "file":
            raise BadData(url, f"something of type {info['type']!r}", "a regular file")
        if info["size"] is None:
            raise BadData(url, "a file of unknown size", "a file system that tells it")
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        return cls(fs, info["name"], url, info["size"], version)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The file, to read; whatever goes wrong in it or in a decoder of it is BadData."""
        with _reading(self.url, f"readable, all {self.size} bytes"), self.fs.open(self.path, "rb") as file:
            yield file


@contextmanager
def _reading(place: str, expected: str) -> Iterator[None]:
    """Foreign code runs within: file systems and decoders, whose errors have no common base (botocore's, aiohttp's)."""
    try:
        yield
    except ServingError:
        raise
    except FileNotFoundError as error:
        raise BadData(place, "no such file", expected) from error
    except ImportError as error:
        raise BadConfig(place, error, "the library installed") from error
    except Exception as error:
        raise BadData(place, " ".join(str(error).split()) or type(error).__name__, expected) from error


def _fill(file: Any, out: NDArray[Any], place: str) -> None:
    """Read as many bytes as `out` has. out: C-contiguous."""
    view = out.reshape(-1).view(np.uint8).data
    while view:
        if not (got := file.readinto(view)):
            raise BadData(place, f"the end, {len(view)} bytes early", f"{out.nbytes} bytes more")
        view = view[got:]


# Finding files


def _find(url: str, options: Mapping[str, Any]) -> Iterator[tuple[_File, ...]]:
    """What a path of `open_source` means: files, and pairs of keys.npy and rows.npy."""
    with _reading(url, _FORMATS):
        fs, path = fsspec.core.url_to_fs(url, **options)
        try:
            infos = [fs.info(path)]
        except FileNotFoundError:
            infos = _visible(fs.glob(path, detail=True).values())
        found = list(_walk(fs, infos))
    if not found and [info["type"] for info in infos] == ["directory"]:
        raise BadData(f"{_url(fs, path)}/{KEYS_FILE}", "no such file", f"{_FORMATS}; the directory is empty")
    if not found:
        raise BadData(url, "no such file", _FORMATS)
    yield from found


def _walk(fs: Any, infos: Iterable[Mapping[str, Any]]) -> Iterator[tuple[_File, ...]]:
    def parent(info: Mapping[str, Any]) -> str:
        return str(info["name"].rpartition("/")[0])

    infos = sorted(infos, key=lambda info: _natural(info["name"]))
    pairs = {parent(info) for info in infos if info["name"].endswith((f"/{KEYS_FILE}", f"/{ROWS_FILE}"))}
    for place, info in {parent(info) if parent(info) in pairs else info["name"]: info for info in infos}.items():
        if place in pairs:
            names = (f"{place}/{KEYS_FILE}", f"{place}/{ROWS_FILE}")
            yield tuple(_File.of(fs, _info(fs, name)) for name in names)
            continue
        if info["type"] not in ("file", "directory"):
            info = _info(fs, info["name"])  # a listing does not follow symbolic links
        if info["type"] == "directory":
            yield from _walk(
                fs, _visible(i for i in fs.ls(place, detail=True) if i["name"].rstrip("/") != place.rstrip("/"))
            )
        else:
            yield (_File.of(fs, info),)


def _info(fs: Any, path: str) -> Mapping[str, Any]:
    with _reading(_url(fs, path), _FORMATS):
        info: Mapping[str, Any] = fs.info(path)
        return info


def _visible(infos: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [info for info in infos if not info["name"].rstrip("/").rpartition("/")[2].startswith((".", "_"))]


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers within names by value. Text and numbers alternate, so that like meets like."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))], name


def _url(fs: Any, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


# What every format gives


class _Table(ABC):
    """The rows of one file, or of one pair."""

    url: str
    parts: Sequence[_File]
    dim: int
    most_rows: int

    @abstractmethod
    def batches(self, at: int, most: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.float32], int]]:
        """Keys and rows from a place, and the place behind them."""


class _Tables(Source):
    def __init__(self, tables: list[_Table], read_as: str):
        self.read_as = read_as
        self._tables = tables
        self.files = [
            SourceFile(t.url, sum(f.size for f in t.parts), " ".join(f.version for f in t.parts)) for t in tables
        ]
        self.dim = next((t.dim for t in tables if t.dim), 0)
        self.most_rows = sum(t.most_rows for t in tables)

    def batches(self, start: Cursor, most: int) -> Iterator[Batch]:
        for number, table in enumerate(self._tables[start.file :], start.file):
            for keys, rows, at in table.batches(start.at if number == start.file else 0, most):
                yield Batch(keys, rows, Cursor(number, at))


def _open(file: _File, key_column: str, row_column: str) -> _Table:
    with file.open() as content:
        first = content.read(12)
        content.seek(0)
        if first.startswith(b"PAR1"):
            return _Parquet(file, content, key_column, row_column)
        if first.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")):
            return _Arrow(file, content, key_column, row_column)
        if first.startswith(b"SEQ"):
            return _Sequence(file, content)
        if file.path.endswith(".safetensors") or first[8:9] == b"{":
            return _Arrays.of_safetensors(file, content, key_column, row_column)
    if first.startswith(b"\x93NUMPY"):
        raise BadData(file.url, "a .npy file by itself", f"{KEYS_FILE} and {ROWS_FILE} in a directory")
    packed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\x03\x04")
    if first.startswith(packed):
        raise BadData(file.url, "a compressed container", f"{_FORMATS}, unpacked")
    raise BadData(file.url, f"a file that starts with {first!r}" if first else "an empty file", _FORMATS)


def _float32(values: NDArray[Any], place: str, first: int) -> NDArray[np.float32]:
    """values: float[n, dim] or float[n], or uint16 that hold bfloat16; `first` is the number of the first row."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32, copy=False)
    if values.dtype == np.float64:
        lost = np.isinf(narrow) & np.isfinite(values)
        if lost.any():
            at = tuple(np.argwhere(lost)[0])
            raise BadData(f"{place} row {first + at[0]}", values[at], "numbers within the range of float32")
    return narrow


# npy and safetensors: arrays that lie in files as they lie in memory


class _Array(NamedTuple):
    """shape[0] entries, one after the other from byte `offset`. dtype uint16 means bfloat16."""

    file: _File
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def read(self, content: Any, at: int, n: int) -> NDArray[Any]:
        """Entries `at` to `at + n`."""
        out = np.empty((n, *self.shape[1:]), self.dtype)
        content.seek(self.offset + at * self.dtype.itemsize * prod(self.shape[1:]))
        _fill(content, out, f"{self.file.url} row {at}")
        return out


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]  # from the header's end


_MOST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_TENSOR_TYPES = {"U64": "<u8", "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


class _Arrays(_Table):
    """Keys and rows as arrays. Places are numbers of rows."""

    def __init__(self, url: str, parts: Sequence[_File], keys: _Array | None, rows: _Array):
        """keys: None where the keys are the row numbers."""
        if keys and keys.shape[0] != rows.shape[0]:
            raise BadData(url, f"{keys.shape[0]} keys and {rows.shape[0]} rows", "as many rows as keys")
        if rows.shape[1] == 0:
            raise BadData(rows.file.url, "rows of 0 elements", "at least 1")
        self.url, self.parts, self._keys, self._rows = url, parts, keys, rows
        self.most_rows, self.dim = rows.shape

    @classmethod
    def of_pair(cls, keys: _File, rows: _File) -> "_Arrays":
        arrays = _npy(keys, _KEYS, 1), _npy(rows, _FLOATS, 2)
        return cls(keys.url.rpartition("/")[0], (keys, rows), *arrays)

    @classmethod
    def of_safetensors(cls, file: _File, content: Any, key_column: str, row_column: str) -> "_Arrays":
        """Format: https://github.com/huggingface/safetensors#format."""
        data, tensors = _safetensors_header(file, content)

        def array(name: str, types: tuple[str, ...], ndim: int) -> _Array:
            tensor, (begin, end) = tensors[name], tensors[name].data_offsets
            found, expected = f"{tensor.dtype} of shape {tensor.shape}", f"{', '.join(types)}, {ndim}-dimensional"
            if tensor.dtype not in types or len(tensor.shape) != ndim:
                raise BadData(f"{file.url} tensor {name!r}", found, expected)
            dtype = np.dtype(_TENSOR_TYPES[tensor.dtype])
            if end - begin != dtype.itemsize * prod(tensor.shape):
                raise BadData(
                    f"{file.url} tensor {name!r}", f"{found} in {end - begin} bytes", "bytes as its shape says"
                )
            return _Array(file, data + begin, dtype, tuple(tensor.shape))

        floats = ("F32", "F16", "BF16", "F64")
        keys = next((name for name in (key_column, f"{key_column}s", "keys") if name in tensors), None)
        matrices = [name for name, t in tensors.items() if t.dtype in floats and len(t.shape) == 2]
        named = [name for name in (row_column, "rows") if name in tensors]
        if not named and (keys or len(matrices) != 1):
            found = f"tensors {', '.join(sorted(tensors)) or 'none'}"
            raise BadData(file.url, found, f"one named 'rows' or {row_column!r}, or no keys and a single float matrix")
        rows = array((named or matrices)[0], floats, 2)
        return cls(file.url, (file,), array(keys, ("U64", "I64"), 1) if keys else None, rows)

    def batches(self, at: int, most: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.float32], int]]:
        with ExitStack() as files:  # two, even of one file: each is read forwards
            rows_file = files.enter_context(self._rows.file.open())
            keys_file = files.enter_context(self._keys.file.open()) if self._keys else None
            for first in range(at, self.most_rows, most):
                end = min(first + most, self.most_rows)
                if self._keys:
                    keys = self._keys.read(keys_file, first, end - first).view(np.uint64)
                else:
                    keys = np.arange(first, end, dtype=np.uint64)
                rows = self._rows.read(rows_file, first, end - first)
                yield keys, _float32(rows, self._rows.file.url, first), end


def _npy(file: _File, types: tuple[str, ...], ndim: int) -> _Array:
    """Format: numpy.lib.format."""
    expected = f"a .npy array of {' or '.join(types)} with {ndim} dimension{'s'[: ndim - 1]}"
    with file.open() as content, _reading(file.url, expected):
        version = np.lib.format.read_magic(content)
        if version not in ((1, 0), (2, 0)):  # 3.0 is for structures with names that are not Latin-1
            raise BadData(file.url, f".npy version {version[0]}.{version[1]}", "version 1.0 or 2.0")
        v1, v2 = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = (v1 if version == (1, 0) else v2)(content)
        offset = content.tell()
    if dtype not in map(np.dtype, types) or len(shape) != ndim or any(n < 0 for n in shape):
        raise BadData(file.url, f"{dtype} with shape {shape}", expected)  # of objects, too: nothing is unpickled
    if fortran_order:
        raise BadData(file.url, "columns stored one after the other (Fortran order)", "rows (C order)")
    if file.size != offset + dtype.itemsize * prod(shape):
        found = f"{file.size - offset} bytes behind the header"
        raise BadData(file.url, found, f"{dtype.itemsize * prod(shape)}, for {dtype} with shape {shape}")
    return _Array(file, offset, dtype, shape)


def _safetensors_header(file: _File, content: Any) -> tuple[int, dict[str, _Tensor]]:
    """Where the data begins, and the tensors, which fill it without gaps or overlaps."""
    length = int.from_bytes(content.read(8), "little")
    if file.size < 8 or length > min(file.size - 8, _MOST_HEADER):
        found = f"{length} bytes of header" if file.size >= 8 else f"{file.size} bytes"
        raise BadData(file.url, found, f"a header within the file's {file.size} bytes, of at most {_MOST_HEADER}")
    raw = np.empty(length, np.uint8)
    _fill(content, raw, file.url)
    try:
        members = msgspec.json.decode(raw.data, type=dict[str, msgspec.Raw])
        msgspec.json.decode(members.pop("__metadata__", b"{}"), type=dict[str, str])
        tensors = {name: msgspec.json.decode(member, type=_Tensor) for name, member in members.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadData(f"{file.url} header", error, "JSON of tensors: dtype, shape, data_offsets") from error
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        if tensor.data_offsets[0] != end or tensor.data_offsets[1] < end:
            found = f"data_offsets {list(tensor.data_offsets)}"
            raise BadData(f"{file.url} tensor {name!r}", found, f"{end} first: tensors without gaps or overlaps")
        end = tensor.data_offsets[1]
    if end != file.size - 8 - length:
        raise BadData(file.url, f"{file.size - 8 - length} bytes behind the header", f"{end}, as the header says")
    return 8 + length, tensors


# Parquet and Arrow IPC: columns


class _Columns(_Table):
    """A key column, and a column of lists or several of floats. Places are numbers of rows."""

    def __init__(self, file: _File, schema: Any, starts: Sequence[int], key_column: str, row_column: str):
        """starts: the number of the first row of each group of rows, and behind the last the count of all."""
        self.url, self.parts, self._file, self._starts = file.url, (file,), file, starts
        self.most_rows = starts[-1]
        self._pa = _pyarrow(file.url)
        if key_column not in schema.names:
            raise BadData(file.url, f"columns {', '.join(schema.names) or 'none'}", f"a key column {key_column!r}")
        self._key, self._lists = key_column, row_column in schema.names
        floats = [f.name for f in schema if self._is_float(f.type) and f.name != key_column]
        self._names = [row_column] if self._lists else floats
        if not self._names:
            found = f"columns {', '.join(schema.names)}"
            raise BadData(file.url, found, f"a column {row_column!r} of float lists, or columns of floats")
        for name in (key_column, *self._names):
            if schema.names.count(name) > 1:
                raise BadData(f"{file.url} column {name!r}", f"{schema.names.count(name)} of this name", "one")
        if str(schema.field(key_column).type) not in _KEYS:
            raise BadData(f"{file.url} column {key_column!r}", schema.field(key_column).type, " or ".join(_KEYS))
        self.dim = self._width(schema.field(row_column).type) if self._lists else len(floats)

    def _is_float(self, kind: Any) -> bool:
        return bool(self._pa.types.is_floating(kind))

    def _width(self, kind: Any) -> int:
        """Elements of the lists of the row column; where each list has its own length, of the first."""
        place, types = f"{self.url} column {self._names[0]!r}", self._pa.types
        fixed = types.is_fixed_size_list(kind)
        if not (fixed or types.is_list(kind) or types.is_large_list(kind)) or not self._is_float(kind.value_type):
            raise BadData(place, kind, f"lists of {' or '.join(_FLOATS)}")
        if fixed and kind.list_size == 0:
            raise BadData(place, "rows of 0 elements", "at least 1")
        if fixed:
            return int(kind.list_size)
        first = next(self._record_batches(0, 1), None)
        if first is None:
            return 0
        if not (length := first.column(self._names[0])[0].as_py()):
            raise BadData(f"{self.url} row 0", "null" if length is None else "a row of 0 elements", "at least 1")
        return len(length)

    @abstractmethod
    def _record_batches(self, at: int, most: int) -> Iterator[Any]:
        """pyarrow record batches of 1 to `most` rows from row `at`, with at least the columns needed."""

    def batches(self, at: int, most: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.float32], int]]:
        for batch in self._record_batches(at, most):
            keys, rows = self._values(batch.column(self._key), at, "uint64").view(np.uint64), self._matrix(batch, at)
            at += batch.num_rows
            yield np.require(keys, requirements=["C", "W"]), np.require(rows, requirements=["C", "W"]), at
        if at != self.most_rows:
            raise BadData(self.url, f"{at} rows", f"{self.most_rows}, as its metadata say")

    def _matrix(self, batch: Any, first: int) -> NDArray[np.float32]:
        if not self._lists:
            rows = np.empty((batch.num_rows, self.dim), np.float32)
            for j, name in enumerate(self._names):
                rows[:, j] = _float32(self._values(batch.column(name), first, "a float"), self.url, first)
            return rows
        column = batch.column(self._names[0])
        self._refuse_nulls(column, first, 1, f"a row of {self.dim} elements")
        if not self._pa.types.is_fixed_size_list(column.type):
            lengths = np.diff(column.offsets.to_numpy())
            if (other := np.flatnonzero(lengths != self.dim)).size:
                found = f"a row of {lengths[other[0]]} elements"
                raise BadData(f"{self.url} row {first + other[0]}", found, f"{self.dim}, as in the first row")
        values = column.flatten()
        self._refuse_nulls(values, first, self.dim, "a float")
        return _float32(values.to_numpy().reshape(batch.num_rows, self.dim), self.url, first)

    def _values(self, column: Any, first: int, expected: str) -> NDArray[Any]:
        self._refuse_nulls(column, first, 1, expected)
        values: NDArray[Any] = column.to_numpy()
        return values

    def _refuse_nulls(self, column: Any, first: int, per_row: int, expected: str) -> None:
        if column.null_count:
            at = int(column.is_null().to_numpy(zero_copy_only=False).argmax())
            raise BadData(f"{self.url} row {first + at // per_row}", "null", expected)


class _Parquet(_Columns):
    def __init__(self, file: _File, content: Any, key_column: str, row_column: str):
        about = _pyarrow(file.url).parquet.ParquetFile(content, pre_buffer=False)
        counts = (about.metadata.row_group(i).num_rows for i in range(about.num_row_groups))
        super().__init__(file, about.schema_arrow, list(accumulate(counts, initial=0)), key_column, row_column)

    def _record_batches(self, at: int, most: int) -> Iterator[Any]:
        group = int(np.searchsorted(self._starts, at, side="right")) - 1
        skip, columns = at - self._starts[group], [self._key, *self._names]
        # One buffer for each column, refilled as pages are decoded: of a row group only that much is in memory.
        buffer = max(1 << 16, min(_READ, 64 * _READ // len(columns)))
        with self._file.open() as content:
            reader = self._pa.parquet.ParquetFile(content, pre_buffer=False, buffer_size=buffer)
            groups = range(group, len(self._starts) - 1)
            for batch in reader.iter_batches(most, row_groups=groups, columns=columns):
                passed = min(skip, batch.num_rows)
                skip -= passed
                if passed < batch.num_rows:
                    yield batch.slice(passed)


class _Arrow(_Columns):
    """Both IPC formats. The file format is the stream format between a magic and a footer."""

    def __init__(self, file: _File, content: Any, key_column: str, row_column: str):
        self._framed = content.read(6) == b"ARROW1"
        content.seek(0)
        counts = [count for count in _arrow_messages(file, content, 8 if self._framed else 0) if count is not None]
        content.seek(0)
        self._schema = self._reader(_pyarrow(file.url), content, None).schema
        super().__init__(file, self._schema, list(accumulate(counts, initial=0)), key_column, row_column)

    def _reader(self, pa: Any, content: Any, fields: list[int] | None) -> Any:
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        return (pa.ipc.open_file if self._framed else pa.ipc.open_stream)(content, options=options)

    def _record_batches(self, at: int, most: int) -> Iterator[Any]:
        group = int(np.searchsorted(self._starts, at, side="right")) - 1
        with self._file.open() as content:
            fields = [self._schema.get_field_index(name) for name in (self._key, *self._names)]
            reader = self._reader(self._pa, content, fields)
            for number in range(len(self._starts) - 1):
                if self._framed and number < group:
                    continue
                batch = reader.get_batch(number) if self._framed else reader.read_next_batch()
                if number < group:
                    continue  # a stream has no index: what was read before is read again
                begin, end = self._starts[number : number + 2]
                if batch.num_rows != end - begin:
                    raise BadData(f"{self.url} row {begin}", f"a record batch of {batch.num_rows} rows", end - begin)
                batch.validate(full=True)  # offsets are the file's word, and would be followed anywhere
                for first in range(max(at - begin, 0), batch.num_rows, most):
                    yield batch.slice(first, most)


def _pyarrow(url: str) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
        import pyarrow.types
    except ImportError as error:
        raise BadConfig(url, "columns to read, and no pyarrow", "pip install 'cube-serving[parquet]'") from error
    return pyarrow


def _arrow_messages(file: _File, content: Any, at: int) -> Iterator[int | None]:
    """The number of rows of each record batch, None of other messages. Reads no bodies.

    Format: https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format: 0xFFFFFFFF, an int32 length,
    so many bytes of a flatbuffer of Message.fbs, its body. Length 0 ends a stream; one without that mark is cut off.
    """
    while True:
        content.seek(at)
        prefix = content.read(8)
        place, mark, length = f"{file.url} byte {at}", prefix[:4], int.from_bytes(prefix[4:], "little")
        if len(prefix) < 8 or mark != b"\xff\xff\xff\xff" or length > file.size - at - 8:
            raise BadData(place, f"{prefix.hex(' ') or 'the end'}", "a message, or the mark of the stream's end")
        if length == 0:
            return
        raw = content.read(length)
        message = _u32(raw, 0)
        body = _flatbuffer_field(raw, message, 3, "<q")
        kind, header = _flatbuffer_field(raw, message, 1, "<B"), _flatbuffer_field(raw, message, 2, None)
        count = _flatbuffer_field(raw, header + _u32(raw, header), 0, "<q") if kind == 3 else None  # 3: RecordBatch
        at += 8 + length + body
        if body < 0 or at > file.size or (count is not None and count < 0):
            raise BadData(place, f"a message of {body} bytes and {count} rows", f"one within {file.size} bytes")
        yield count


def _u32(raw: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", raw, at)[0])


def _flatbuffer_field(raw: bytes, table: int, number: int, layout: str | None) -> int:
    """A number in a table of a flatbuffer, 0 where it is left out; without a layout, where the field lies."""
    vtable = table - struct.unpack_from("<i", raw, table)[0]
    size = struct.unpack_from("<H", raw, vtable)[0]
    entry = 4 + 2 * number
    offset = struct.unpack_from("<H", raw, vtable + entry)[0] if entry < size else 0
    if layout is None or offset == 0:
        return int(table + offset if offset else 0)
    return int(struct.unpack_from(layout, raw, table + offset)[0])


# Sequence files: records

_CLASS = b"\x22org.apache.hadoop.io.BytesWritable"
_SEQUENCE = b"SEQ\x06" + _CLASS + _CLASS  # then: compressed? blocks compressed? uint32 metadata pairs, sync mark
_SYNC_AT = len(_SEQUENCE) + 6
_SYNC = 16  # bytes of a sync mark
_ESCAPE = 0xFFFFFFFF  # in the place of a record's length: a sync mark follows


class _Sequence(_Table):
    """Places are bytes. A record, its lengths big-endian uint32:

        length of key and value | length of the key | key | value

    Paddle's builder takes the bare 8 bytes of a key and the bare value; Hadoop's BytesWritable puts before each its
    length once more. Which of the two a file holds shows in its first record. The key is a little-endian uint64, the
    value little-endian float32s. Before a record 0xFFFFFFFF and the sync mark may stand.
    """

    def __init__(self, file: _File, content: Any):
        self.url, self.parts, self._file = file.url, (file,), file
        head = content.read(_SYNC_AT + _SYNC)
        if not _SEQUENCE.startswith(head[: len(_SEQUENCE)]):
            raise BadData(file.url, head[: len(_SEQUENCE)], f"{_SEQUENCE!r} first")
        if len(head) < _SYNC_AT + _SYNC:
            raise BadData(f"{file.url} byte {len(head)}", "the end", f"{_SYNC_AT + _SYNC} bytes of header")
        if any(head[len(_SEQUENCE) :][:2]):
            raise BadData(file.url, "a compressed sequence file", "an uncompressed one")
        if any(head[_SYNC_AT - 4 : _SYNC_AT]):
            raise BadData(file.url, "a sequence file with metadata", "one without")
        self._sync = np.frombuffer(head, np.uint8, _SYNC, _SYNC_AT)
        self._start = len(head)
        self._key, self._record = self._first_record(content)
        self.dim = (self._record - 8 - self._key - (self._key - 8)) // 4
        self.most_rows = (file.size - self._start) // self._record if self.dim else 0

    def _first_record(self, content: Any) -> tuple[int, int]:
        """Bytes of its key, inner length included, and of all of it; those of an empty one if there is none."""
        at, raw = self._start, content.read(8)
        while raw[:4] == b"\xff\xff\xff\xff":
            mark = raw[4:] + content.read(4 + _SYNC - len(raw))
            if mark != self._sync.tobytes():
                raise self._wrong(raw[:4] + mark, at)
            at += 4 + _SYNC
            raw = content.read(8)
        if not raw:
            return 8, 16
        length, key = struct.unpack(">II", raw) if len(raw) == 8 else (0, 8)
        value = length - key - (key - 8)
        if len(raw) == 8 and (key not in (8, 12) or value < 4 or value % 4):
            found = f"a record of {length} bytes with a key of {key}"
            raise BadData(f"{self.url} byte {at}", found, "a key of 8 (Hadoop: 12), and float32s")
        if len(raw) < 8 or at + 8 + length > self._file.size:
            raise self._cut_off(at)
        return key, 8 + length

    def batches(self, at: int, most: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.float32], int]]:
        at = max(at, self._start)
        unread = self._file.size - at
        buffer = np.empty(min(unread, max(_READ, 2 * self._record)) if self.dim else 0, np.uint8)
        begin = end = 0  # buffer[begin:end] is read and not yet parsed; its first byte is byte `at` of the file
        with self._file.open() as content:
            content.seek(at)
            while self.dim and at < self._file.size:
                room = min(most, (self._file.size - at) // self._record)
                keys, rows = np.empty(room, np.uint64), np.empty((room, self.dim), np.float32)
                n = 0
                while True:
                    raw = buffer[begin:end]
                    done, used, wrong = _records(
                        raw, self._sync, self._key, self._record, keys[n:], rows[n:].view(np.uint8)
                    )
                    n, begin, at = n + done, begin + used, at + used
                    if wrong:
                        raise self._wrong(raw[used:][: self._record].tobytes(), at)
                    if n == room > 0 or not unread:
                        break
                    buffer[: end - begin] = buffer[begin:end]
                    begin, end = 0, end - begin
                    more = min(unread, buffer.size - end)
                    _fill(content, buffer[end : end + more], f"{self.url} byte {at}")
                    end, unread = end + more, unread - more
                if n:
                    yield keys[:n], rows[:n], at
                elif begin < end:
                    raise self._cut_off(at)

    def _cut_off(self, at: int) -> BadData:
        return BadData(f"{self.url} byte {at}", f"the end, {self._file.size - at} bytes on", "a whole record")

    def _wrong(self, raw: bytes, at: int) -> BadData:
        """What `_records` saw at byte `at`."""
        if raw.startswith(b"\xff\xff\xff\xff"):
            return BadData(f"{self.url} byte {at}", f"sync mark {raw[4:20].hex()}", self._sync.tobytes().hex())
        length, key = struct.unpack_from(">II", raw)
        found, expected = (
            f"key of {key} bytes, value of {length - key}",
            f"{self._key} and {self._record - 8 - self._key}",
        )
        if (length, key) == (self._record - 8, self._key):  # then it is the lengths within
            found, expected = raw[8:24].hex(" "), f"the lengths 8 and {4 * self.dim} before key and value"
        return BadData(f"{self.url} byte {at}", found, f"{expected}, as in the first record")


@inlined
def _big_endian(raw, at):  # type: ignore[no-untyped-def]
    """The uint32 at a byte of raw, as an int64."""
    return np.int64(raw[at]) << 24 | np.int64(raw[at + 1]) << 16 | np.int64(raw[at + 2]) << 8 | np.int64(raw[at + 3])


@kernel
def _records(raw, sync, key_bytes, record, keys, rows):  # type: ignore[no-untyped-def]
    """Parse records until `keys` is full, `raw` ends within one, or one is not like the others.

    raw, sync: uint8[any]; key_bytes, record: lengths, as `_Sequence` has them; keys: uint64[n] and rows:
    uint8[n, 4 dim] are filled. → records parsed, bytes parsed, whether the next is wrong.
    """
    inner = key_bytes - 8  # bytes of a repeated length: 0 or 4
    n = at = 0
    while raw.size - at >= 4:  # ends: each turn moves `at` or leaves
        length = _big_endian(raw, at)
        if length == _ESCAPE:
            if raw.size - at < 4 + _SYNC:
                break
            for j in range(_SYNC):
                if raw[at + 4 + j] != sync[j]:
                    return n, at, True
            at += 4 + _SYNC
            continue
        if raw.size - at < 8:
            break
        if length != record - 8 or _big_endian(raw, at + 4) != key_bytes:
            return n, at, True
        if raw.size - at < record or n == keys.size:
            break
        key, value = at + 8 + inner, at + 16 + 2 * inner
        if inner and (_big_endian(raw, key - 4) != 8 or _big_endian(raw, value - 4) != rows.shape[1]):
            return n, at, True
        bits = np.uint64(0)
        for j in range(8):
            bits |= np.uint64(raw[key + j]) << np.uint64(8 * j)
        keys[n] = bits
        for j in range(rows.shape[1]):
            rows[n, j] = raw[value + j]
        n += 1
        at += record
    return n, at, False
