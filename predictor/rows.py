"""Parts and unions of values along the rows of a batch: what merging, splitting and conditions are made of.

A value of a port that goes by rows has `per_row` entries (or bags, where it is ragged) for each row, in their order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor.ops.op import Port, Ragged, offsets_of
from predictor.tensors import DTYPES, Texts

Bools = NDArray[np.bool_]


def frozen(value: Any) -> Any:
    """The same value, read-only. The array it was made of stays as it is."""
    if type(value) is np.ndarray:
        if not value.flags.writeable:
            return value
        value = value.view()
        value.setflags(write=False)
        return value
    if isinstance(value, Ragged):
        return Ragged(frozen(value.values), frozen(value.offsets))
    return Texts(value.shape, *(frozen(part) for part in value[1:]))


def is_frozen(value: Any) -> bool:
    """Whether a part of a value cannot be written to."""
    if type(value) is np.ndarray:
        return not value.flags.writeable
    if isinstance(value, Ragged):
        return is_frozen(value.values) or is_frozen(value.offsets)
    return any(is_frozen(part) for part in value[1:])


def copied(value: Any) -> Any:
    """A value that may be changed without changing this one."""
    if type(value) is np.ndarray:
        return value.copy()
    if isinstance(value, Ragged):
        return Ragged(copied(value.values), value.offsets.copy())
    return Texts(value.shape, *(part.copy() for part in value[1:]))


def blank(port: Port, rows: int) -> Any:
    """The value of rows that have none: zeros, empty texts, empty bags."""
    if port.ragged:
        values = blank(Port(port.datatype, (0, *port.shape[1:])), 0)
        return Ragged(values, np.zeros(rows * port.per_row + 1, np.int64))
    shape = tuple(rows * port.per_row if at == 0 and size < 0 else max(size, 0) for at, size in enumerate(port.shape))
    if port.datatype == "BYTES":
        count = int(np.prod(shape))
        return Texts(shape, np.empty(0, np.uint8), np.zeros(count, np.int64), np.zeros(count, np.int64))
    return np.zeros(shape, DTYPES[port.datatype])


# ---- ranges: one request of a batch, one part of a request ----


def slice_rows(value: Any, port: Port, start: int, stop: int) -> Any:
    """The value of rows `start` to `stop`. Arrays are views; a value that does not go by rows is everybody's."""
    if not port.goes_by_rows:
        return value
    return _slice(value, start * port.per_row, stop * port.per_row)


def _slice(value: Any, start: int, stop: int) -> Any:
    if type(value) is np.ndarray:
        return value[start:stop]
    if isinstance(value, Ragged):
        offsets = value.offsets[start : stop + 1]
        first = offsets[0]
        return Ragged(_slice(value.values, first, offsets[-1]), offsets - first if first else offsets)
    width = value.starts.size // value.shape[0] if value.shape[0] else 0
    part = slice(start * width, stop * width)
    return Texts((stop - start, *value.shape[1:]), value.data, value.starts[part], value.sizes[part])


def join_rows(values: Sequence[Any], port: Port) -> Any:
    """One value of the rows of all of `values`, in their order: the inverse of slicing. values: at least one."""
    return values[0] if len(values) == 1 or not port.goes_by_rows else _join(values)


def _join(values: Sequence[Any]) -> Any:
    first = values[0]
    if type(first) is np.ndarray:
        return np.concatenate(values)
    if isinstance(first, Ragged):
        ends = np.cumsum([value.offsets[-1] for value in values])
        offsets = [first.offsets, *(v.offsets[1:] + end for v, end in zip(values[1:], ends[:-1], strict=True))]
        return Ragged(_join([value.values for value in values]), np.concatenate(offsets))
    data = np.concatenate([value.data for value in values])
    before = np.cumsum([value.data.size for value in values]) - [value.data.size for value in values]
    starts = np.concatenate([value.starts + at for value, at in zip(values, before, strict=True)])
    rows = sum(value.shape[0] for value in values)
    return Texts((rows, *first.shape[1:]), data, starts, np.concatenate([value.sizes for value in values]))


# ---- chosen rows: conditions ----


def take_rows(value: Any, port: Port, chosen: Bools) -> Any:
    """The value of the chosen rows. chosen: bool[rows]."""
    return value if chosen.all() else _take(value, _per_entry(chosen, port))


def put_rows(value: Any, port: Port, chosen: Bools, rows: int) -> Any:
    """A value of all `rows`, given that of the chosen ones; the others' is blank."""
    marks = _per_entry(chosen, port)
    if type(value) is np.ndarray:
        made = np.zeros((marks.size, *value.shape[1:]), value.dtype)
        made[marks] = value
        return made
    if isinstance(value, Ragged):
        lengths = np.zeros(marks.size, np.int64)
        lengths[marks] = np.diff(value.offsets)
        return Ragged(value.values, offsets_of(lengths))
    width = value.starts.size // (value.shape[0] or 1)
    each = np.repeat(marks, width)
    starts, sizes = np.zeros(each.size, np.int64), np.zeros(each.size, np.int64)
    starts[each], sizes[each] = value.starts, value.sizes
    return Texts((marks.size, *value.shape[1:]), value.data, starts, sizes)


def _per_entry(chosen: Bools, port: Port) -> Bools:
    return chosen if port.per_row == 1 else np.repeat(chosen, port.per_row)


def _take(value: Any, marks: Bools) -> Any:
    if type(value) is np.ndarray:
        return value[marks]
    if isinstance(value, Ragged):
        lengths = np.diff(value.offsets)
        return Ragged(_take(value.values, np.repeat(marks, lengths)), offsets_of(lengths[marks]))
    width = value.starts.size // (value.shape[0] or 1)
    each = np.repeat(marks, width)
    shape = (int(np.count_nonzero(marks)), *value.shape[1:])
    return Texts(shape, value.data, value.starts[each], value.sizes[each])
