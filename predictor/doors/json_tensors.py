"""Tensors as JSON: a flat or nested list as the Open Inference Protocol has it, or an object for each sample."""

import struct
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cube.errors import BadRequest, FailedPrecondition
from cube.rpc.calls import Buffer
from predictor.doors import json_numbers
from predictor.ops.op import Port, Ragged
from predictor.requests import Form
from predictor.rows import frozen
from predictor.tensors import DTYPES, MAX_DIMENSIONS, Texts, Value, count_of, shape_text, texts

_AT_ONCE = 16_384  # elements that are written in one go: about 2 ms
_LONG_BYTES = 1_000  # from where on calling a kernel pays
_KINDS = {"b": bool, "i": int, "u": int, "f": float}
_CODES = {  # of struct, which refuses what does not fit
    "BOOL": "?",
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q",
    "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
_WORDS = {bool: "true and false", int: "integers", float: "numbers", str: "strings"}


# ---- JSON → values ----


def value_of(datatype: str, shape: Sequence[int], data: Buffer, place: str) -> Value:
    """A tensor from its list, flat in row-major order or nested; read-only. Raises BadRequest naming `place`."""
    count = count_of(shape, place)
    if len(data) >= _LONG_BYTES and (fast := json_numbers.read(datatype, shape, data)) is not None:
        return frozen(fast)  # type: ignore[no-any-return]
    kind = _kind(datatype, place)
    depth = _depth(data)
    if not 1 <= depth <= MAX_DIMENSIONS:
        raise BadRequest(place, "no data" if not data else f"data {depth} lists deep", "a list, flat or nested")
    try:
        nested = _decoder(depth, kind).decode(data)
    except msgspec.MsgspecError as error:
        raise BadRequest(place, error, f"{_WORDS[kind]}, as {datatype} has") from error
    value = _few(nested, datatype) if depth == 1 and len(data) < _LONG_BYTES else None
    if value is None:
        value = _array(nested, datatype, place)
    size = value.starts.size if isinstance(value, Texts) else value.size
    if size != count or (depth > 1 and tuple(shape) != value.shape):
        raise BadRequest(f"{place} data", f"{size} elements of shape {shape_text(value.shape)}", shape_text(shape))
    return value._replace(shape=tuple(shape)) if isinstance(value, Texts) else value.reshape(tuple(shape))


def of_instances(form: Form, instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs of a request from an object for each sample, whose values are those of this sample.

    Of a lookup with several slots the value is a list for each slot: {"keys": [[1], [2, 3], []]}, or "text" with
    strings. Of an input of different lengths it is a list. Raises BadRequest.
    """
    if not instances:
        raise BadRequest("instances", "none", "an object for each sample")
    names = instances[0].keys()
    for number, instance in enumerate(instances):
        if instance.keys() != names:
            found = f"{', '.join(instance) or 'nothing'}"
            raise BadRequest(f"instances[{number}]", found, f"{', '.join(names)}, as in the first one")
    columns = {name: [instance[name] for instance in instances] for name in names}
    values: dict[str, Any] = {}
    for name, port in form.dense.items():
        if name in columns:
            values |= _dense(name, port, columns.pop(name), form.lengths.get(name, ""))
    for lookup in form.lookups:
        for name, datatype in ((lookup.keys, "UINT64"), (lookup.text, "BYTES"), (lookup.weights or "", "FP32")):
            if name not in columns:
                continue
            column = columns.pop(name)
            if lookup.lengths is None:
                values[name] = _typed(column, datatype, f"input {name!r}")
                continue
            values[name], lengths = _bags(name, column, datatype, len(lookup.slots))
            values.setdefault(lookup.lengths, lengths)
    # What is left is no input; the form says so.
    return values | columns


def _dense(name: str, port: Port, column: list[Any], lengths_name: str) -> dict[str, Any]:
    place = f"input {name!r}"
    if port.ragged:
        value, lengths = _bags(name, column, port.datatype, port.per_row)
        return {name: value, lengths_name: lengths}
    if not port.goes_by_rows:
        if any(each != column[0] for each in column):
            raise BadRequest(place, "different values", "the same in all instances: it is not of one sample")
        return {name: _typed(column[0], port.datatype, place)}
    return {name: _typed(column, port.datatype, place)}


def _bags(name: str, column: list[Any], datatype: str, per_row: int) -> tuple[Value, NDArray[np.int32]]:
    """The values of all bags in their order, and int32[samples, per_row]: how many each has."""
    place = f"input {name!r}"
    expected = "a list" if per_row == 1 else f"a list of {per_row} lists"
    if per_row > 1:
        for number, sample in enumerate(column):
            if type(sample) is not list or len(sample) != per_row:
                raise BadRequest(f"instances[{number}] {name!r}", f"{str(sample)[:100]}", expected)
        bags = list(chain.from_iterable(column))
    else:
        bags = column
    if any(type(bag) is not list for bag in bags):
        raise BadRequest(place, "a value that is no list", expected)
    lengths = np.fromiter(map(len, bags), np.int32, len(bags)).reshape(-1, per_row)
    flat = list(chain.from_iterable(bags))
    return _typed(flat, datatype, place), frozen(lengths)


def _typed(nested: Any, datatype: str, place: str) -> Value:
    """The same for what JSON holds, whatever it is: nothing is taken for a number that is none."""
    kind = _kind(datatype, place)
    depth, first = 0, nested
    while isinstance(first, list):
        depth, first = depth + 1, first[0] if first else None
    if not 1 <= depth <= MAX_DIMENSIONS:
        raise BadRequest(place, "no list", "a list")
    try:
        return _array(msgspec.convert(nested, _lists(depth, kind)), datatype, place)
    except msgspec.ValidationError as error:
        raise BadRequest(place, error, f"{_WORDS[kind]}, as {datatype} has") from error


def _few(flat: list[Any], datatype: str) -> Value | None:
    """Some numbers as an array [n], read-only: in a third of the time that numpy takes. None: `_array` has a look."""
    code = _CODES.get(datatype)
    if code is None:
        return None
    try:
        return np.frombuffer(struct.pack(f"<{len(flat)}{code}", *flat), DTYPES[datatype])
    except (struct.error, OverflowError):
        return None


def _array(nested: Any, datatype: str, place: str) -> Value:
    """Lists of one depth, or lists within lists, as a value of that shape; read-only."""
    kind = _kind(datatype, place)
    try:
        if kind is str:
            boxed = np.array(nested, object)
            return frozen(texts([*map(str.encode, boxed.ravel().tolist())], boxed.shape))  # type: ignore[no-any-return]
        if kind is float:
            wide = np.array(nested, np.float64)
            with np.errstate(over="raise"):
                return frozen(wide.astype(DTYPES[datatype]))  # type: ignore[no-any-return]
        made = np.array(nested, DTYPES[datatype])
    except (ValueError, TypeError, OverflowError, FloatingPointError, UnicodeEncodeError) as error:
        raise BadRequest(place, error, f"{_WORDS[kind]} that fit {datatype}, as many in every list") from error
    return frozen(made)  # type: ignore[no-any-return]


def _kind(datatype: str, place: str) -> type:
    if datatype == "BYTES":
        return str
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise BadRequest(f"{place} datatype", repr(datatype), f"one of {', '.join(DTYPES)}, BYTES")
    return _KINDS[dtype.kind]


def _depth(data: Buffer) -> int:
    """How many lists a text opens at its beginning."""
    begin = bytes(data[:64]).translate(None, b" \t\r\n")
    return len(begin) - len(begin.lstrip(b"["))


@cache
def _decoder(depth: int, kind: type) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(_lists(depth, kind))


@cache
def _lists(depth: int, kind: type) -> Any:
    nested: Any = kind
    for _ in range(depth):
        nested = list[nested]
    return nested


# ---- values → JSON ----


def elements(value: Value, name: str) -> list[Buffer]:
    """A tensor as a flat list, in pieces. Raises FailedPrecondition for texts that JSON cannot hold."""
    if isinstance(value, Texts):
        return [msgspec.json.encode(_strings(value, name))]
    flat = value.ravel()
    pieces: list[Buffer] = [b"["]
    for at in range(0, flat.size, _AT_ONCE):
        pieces += [b"," if at else b"", msgspec.json.encode(flat[at : at + _AT_ONCE].tolist())[1:-1]]
    return [*pieces, b"]"]


def numbers(value: Value) -> int:
    """How many elements a tensor has."""
    return value.starts.size if isinstance(value, Texts) else value.size


def first_of(value: Value, most: int, name: str) -> list[Any]:
    """The first elements of a tensor, flat."""
    if isinstance(value, Texts):
        return _strings(value._replace(starts=value.starts[:most], sizes=value.sizes[:most]), name)
    return value.ravel()[:most].tolist()  # type: ignore[no-any-return]


def rows_of(value: Any, per_row: int, name: str) -> Any:
    """A value as nested lists; of one that has several entries for each sample, these in a list."""
    if isinstance(value, Ragged):
        flat = rows_of(value.values, 1, name)
        cuts = value.offsets.tolist()
        nested = [flat[start:stop] for start, stop in pairwise(cuts)]
        return nested if per_row == 1 else [nested[at : at + per_row] for at in range(0, len(nested), per_row)]
    shape = value.shape if per_row == 1 else (-1, per_row, *value.shape[1:])
    if isinstance(value, Texts):
        boxed = np.empty(value.starts.size, object)
        boxed[:] = _strings(value, name)
        return boxed.reshape(shape).tolist()
    return value.reshape(shape).tolist()


def _strings(value: Texts, name: str) -> list[str]:
    data = value.data.tobytes()
    ends = value.starts + value.sizes
    try:
        return [data[start:end].decode() for start, end in zip(value.starts.tolist(), ends.tolist(), strict=True)]
    except UnicodeDecodeError as error:
        text = f"output {name!r}: found bytes that are no UTF-8 ({error.reason}); ask for them raw: binary_data"
        raise FailedPrecondition(text) from error
