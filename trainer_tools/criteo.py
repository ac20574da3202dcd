"""Criteo lines → arrays: the one reader of trainer, prune-program and ctr-client, so that they cannot differ.

A line is a label (0 or 1), 13 integers and 26 hexadecimal categories; blanks allowed in all but the label. Either tab
separated without a header, in that order, or CSV with a header that names label, I1..I13, C1..C26 (and Id, ignored)
in any case and order. Files may be gzipped.

Category Ci is slot i. A blank category is a slot without keys. Integers are normalised as the ancestor's Criteo demo
does: (x - min) / range, a blank is 0.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from cube.kernels import kernel
from cube.keys import signs

INTEGERS, SLOTS = 13, 26
COLUMNS = 1 + INTEGERS + SLOTS
DENSE_MIN = np.array([0, -3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], np.float64)
DENSE_RANGE = np.array([20, 603, 100, 50, 64000, 500, 100, 50, 500, 10, 10, 10, 50], np.float64)
NAMES = ("label", *(f"i{i}" for i in range(1, INTEGERS + 1)), *(f"c{i}" for i in range(1, SLOTS + 1)))

_CHUNK_BYTES, _LONGEST_LINE_BYTES = 32 << 20, 1 << 20
_IGNORED = -1
_OK, _WRONG_COUNT, _NOT_LABEL, _NOT_INTEGER, _NOT_HEX = range(5)
_EXPECTED = {
    _NOT_LABEL: "0 or 1",
    _NOT_INTEGER: "an integer of at most 18 digits or a blank",
    _NOT_HEX: "hexadecimal digits or a blank",
}


class CriteoRows(NamedTuple):
    """Samples as the model takes them; n samples with K keys in all."""

    labels: NDArray[np.int8]  # int8[n], 0 or 1
    dense: NDArray[np.float32]  # float32[n, 13], normalised
    keys: NDArray[np.uint64]  # uint64[K], sample after sample, slot after slot
    lengths: NDArray[np.int32]  # int32[n, 26]: keys of each slot of each sample

    @property
    def offsets(self) -> NDArray[np.int64]:
        """int64[n * 26 + 1]: the keys of sample i, slot s are keys[offsets[26 i + s] : offsets[26 i + s + 1]]."""
        offsets = np.zeros(self.lengths.size + 1, np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets

    def batches(self, size: int) -> Iterator["CriteoRows"]:
        """Views of `size` samples each, the last one shorter."""
        first_key = self.offsets[::SLOTS]
        for start in range(0, len(self.labels), size):
            stop = min(start + size, len(self.labels))
            keys = self.keys[first_key[start] : first_key[stop]]
            yield CriteoRows(self.labels[start:stop], self.dense[start:stop], keys, self.lengths[start:stop])

    def split(self, at: int) -> tuple["CriteoRows", "CriteoRows"]:
        """The first `at` samples and the rest."""
        key = self.offsets[at * SLOTS]
        return (
            CriteoRows(self.labels[:at], self.dense[:at], self.keys[:key], self.lengths[:at]),
            CriteoRows(self.labels[at:], self.dense[at:], self.keys[key:], self.lengths[at:]),
        )


@kernel
def _parse(data, separator, roles, low, width, labels, dense, starts, sizes, slots, lengths):  # type: ignore[no-untyped-def]
    """Read whole lines. roles: what file column c is: -1 ignored, 0 label, 1..13 integers, 14..39 categories.

    Returns rows, values, error, and of the error the column, its first byte and its end.
    """
    at, row, values = 0, 0, 0
    while at < data.size:  # ends: every turn passes one line end
        column, more = 0, True
        first_byte, first_value = at, values
        while more:  # ends: every turn passes one separator or line end
            start = at
            while at < data.size and data[at] != separator and data[at] != 10:
                at += 1
            end, more = at, at < data.size and data[at] == separator
            at += 1
            if not more and end > start and data[end - 1] == 13:
                end -= 1  # \r\n
            if column >= roles.size:
                column += 1
                continue
            role = roles[column]
            if role == 0:
                if end - start != 1 or not (data[start] == 48 or data[start] == 49):
                    return row, values, _NOT_LABEL, column, start, end
                labels[row] = data[start] - 48
            elif 1 <= role <= INTEGERS and end > start:
                digit = start + 1 if data[start] == 45 else start
                last = end
                if end - digit > 2 and data[end - 1] == 48 and data[end - 2] == 46:
                    last = end - 2  # 260.0, as some exports write 260
                if last == digit or last - digit > 18:
                    return row, values, _NOT_INTEGER, column, start, end
                x = np.int64(0)
                for i in range(digit, last):
                    if data[i] < 48 or data[i] > 57:
                        return row, values, _NOT_INTEGER, column, start, end
                    x = x * 10 + (data[i] - 48)
                if digit > start:
                    x = -x
                dense[row, role - 1] = np.float32((x - low[role - 1]) / width[role - 1])
            elif 1 <= role <= INTEGERS:
                dense[row, role - 1] = 0
            elif role > INTEGERS:
                for i in range(start, end):
                    c = data[i]
                    if not (48 <= c <= 57 or 97 <= c <= 102 or 65 <= c <= 70):
                        return row, values, _NOT_HEX, column, start, end
                slot = role - INTEGERS
                lengths[row, slot - 1] = end > start
                if end > start:
                    starts[values], sizes[values], slots[values] = start, end - start, slot
                    values += 1
            column += 1
        if column != roles.size:
            return row, values, _WRONG_COUNT, 0, first_byte, at
        for i in range(first_value + 1, values):  # a header may list the slots in any order; keys go by slot
            j = i
            while j > first_value and slots[j - 1] > slots[j]:
                slots[j - 1], slots[j] = slots[j], slots[j - 1]
                starts[j - 1], starts[j] = starts[j], starts[j - 1]
                sizes[j - 1], sizes[j] = sizes[j], sizes[j - 1]
                j -= 1
        row += 1
    return row, values, _OK, 0, 0, 0


def read(path: Path, limit: int | None = None, progress: Callable[[int], object] = lambda rows: None) -> CriteoRows:
    """All samples of a file, or the first `limit`.

    Raises BadData naming file, line and column. `progress` is told of rows read.
    """
    parts, count = [], 0
    for part in chunks(path):
        parts.append(part)
        count += len(part.labels)
        progress(len(part.labels))
        if limit is not None and count >= limit:
            break
    if not count:
        raise BadData(str(path), "no lines", "Criteo lines: label, 13 integers, 26 hexadecimal categories")
    rows = parts[0] if len(parts) == 1 else CriteoRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return rows if limit is None or count <= limit else rows.split(limit)[0]


def chunks(path: Path) -> Iterator[CriteoRows]:
    """The samples of a file in bounded memory, some hundred thousand at a time; raises BadData."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from _chunks(cast(BinaryIO, file), str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise BadData(
            str(path), getattr(error, "strerror", None) or error, "a readable file of Criteo lines"
        ) from error


def parse(data: bytes, place: str = "lines") -> CriteoRows:
    """Samples in memory, with or without a header line; raises BadData."""
    body, separator, roles, line = _header(data, place)
    return _parsed(body, separator, roles, place, line)


def auc(labels: NDArray[np.int8], scores: NDArray[np.float32]) -> float:
    """Area under the ROC curve: the chance that a click scores above a non-click, ties counting half; nan without both.

    From the rank sum (Mann and Whitney 1947). labels: [n], 0 or 1; scores: [n].
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each distinct score
    rank_sum = middle[inverse][labels == 1].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def _chunks(file: BinaryIO, place: str) -> Iterator[CriteoRows]:
    layout: tuple[int, NDArray[np.int64]] | None = None
    rest, line = b"", 1
    while block := file.read(_CHUNK_BYTES):
        if len(rest) > _LONGEST_LINE_BYTES:
            raise BadData(f"{place} line {line}", f"{len(rest)} bytes without an end", f"at most {_LONGEST_LINE_BYTES}")
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            body = whole + newline
            if layout is None:
                body, separator, roles, line = _header(body, place)
                layout = separator, roles
            rows = _parsed(body, *layout, place, line)
            line += len(rows.labels)
            yield rows
    if rest:
        if layout is None:
            rest, separator, roles, line = _header(rest, place)
            layout = separator, roles
        yield _parsed(rest, *layout, place, line)


def is_header(line: bytes) -> bool:
    """Whether a file's first line names columns."""
    return "label" in _names(line)


def _names(line: bytes) -> list[str]:
    return [name.strip().strip('"').lower() for name in line.decode("latin-1").split(",")]


def _header(data: bytes, place: str) -> tuple[bytes, int, NDArray[np.int64], int]:
    """What follows a header line if there is one, the separator, each column's role, the number of the first line."""
    first, _, body = data.partition(b"\n")
    names = _names(first)
    if not is_header(first):
        return data, ord("\t"), np.arange(COLUMNS), 1
    missing = [name for name in NAMES if names.count(name) != 1]
    unknown = [name for name in names if name not in (*NAMES, "id")]
    if missing or unknown:
        found = f"{'no or repeated ' + ', '.join(missing) if missing else 'unknown ' + ', '.join(unknown)}"
        raise BadData(f"{place} line 1", found, "a header of Id (optional), Label, I1..I13, C1..C26")
    roles = np.array([NAMES.index(name) if name in NAMES else _IGNORED for name in names])
    return body, ord(","), roles, 2


def _parsed(body: bytes, separator: int, roles: NDArray[np.int64], place: str, line: int) -> CriteoRows:
    data = np.frombuffer(body, np.uint8)
    n = len(body) // roles.size + 2  # a line has a label, separators and an end: as many bytes as columns, at least
    labels, dense = np.empty(n, np.int8), np.empty((n, INTEGERS), np.float32)
    starts, sizes, slots = (np.empty(n * SLOTS, np.int64) for _ in range(3))
    lengths = np.empty((n, SLOTS), np.int32)
    rows, values, error, column, start, end = _parse(
        data, separator, roles, DENSE_MIN, DENSE_RANGE, labels, dense, starts, sizes, slots, lengths
    )
    where = f"{place} line {line + rows}"
    if error != _OK:
        wrong = body[body.rfind(b"\n", 0, start) + 1 :].partition(b"\n")[0]
        columns = wrong.count(separator) + 1
        if columns != roles.size:
            between = "tabs" if separator == ord("\t") else "commas"
            raise BadData(where, f"{columns} columns", f"{roles.size}, separated by {between}")
        name = NAMES[roles[column]]
        raise BadData(
            f"{where} column {column + 1} ({name.upper()})",
            repr(body[start:end].decode("latin-1")[:40]),
            _EXPECTED[error],
        )
    keys = signs(slots[:values], data, starts[:values], sizes[:values])
    return CriteoRows(labels[:rows], dense[:rows], keys, lengths[:rows])
