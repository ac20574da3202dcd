"""ONNX files: the program without the elements of its large tensors, and where those lie.

A .onnx file is one protobuf message (onnx.proto3 of github.com/onnx/onnx) that may hold tables of any size. `read` goes
through its bytes by hand and takes out the elements of every large tensor of the main graph; in their place stands what
the format has for elements in another file: location, offset and length, the location being the .onnx file itself. So
tables are mapped, never read, whether they lie in the program's file or beside it.
"""

import mmap
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from cube.errors import BadData
from trainer_tools.manifest import inside

RECIPE = "an ONNX program (*.onnx), as torch.onnx.export or tf2onnx write it"
DATA_SUFFIX = ".data"  # of the file beside a program that holds the elements of its large tensors

# numpy's dtype of an element, and its bits; types that numpy lacks as their bits
DTYPES: dict[int, tuple[np.dtype[Any], int]] = {
    TensorProto.FLOAT: (np.dtype("<f4"), 32), TensorProto.UINT8: (np.dtype("u1"), 8),
    TensorProto.INT8: (np.dtype("i1"), 8), TensorProto.UINT16: (np.dtype("<u2"), 16),
    TensorProto.INT16: (np.dtype("<i2"), 16), TensorProto.INT32: (np.dtype("<i4"), 32),
    TensorProto.INT64: (np.dtype("<i8"), 64), TensorProto.BOOL: (np.dtype("?"), 8),
    TensorProto.FLOAT16: (np.dtype("<f2"), 16), TensorProto.DOUBLE: (np.dtype("<f8"), 64),
    TensorProto.UINT32: (np.dtype("<u4"), 32), TensorProto.UINT64: (np.dtype("<u8"), 64),
    TensorProto.COMPLEX64: (np.dtype("<c8"), 64), TensorProto.COMPLEX128: (np.dtype("<c16"), 128),
    TensorProto.BFLOAT16: (np.dtype("<u2"), 16), TensorProto.FLOAT8E4M3FN: (np.dtype("u1"), 8),
    TensorProto.FLOAT8E4M3FNUZ: (np.dtype("u1"), 8), TensorProto.FLOAT8E5M2: (np.dtype("u1"), 8),
    TensorProto.FLOAT8E5M2FNUZ: (np.dtype("u1"), 8), TensorProto.UINT4: (np.dtype("u1"), 4),
    TensorProto.INT4: (np.dtype("u1"), 4), TensorProto.FLOAT4E2M1: (np.dtype("u1"), 4),
}  # fmt: skip
_LARGE = 64 << 10  # bytes of a tensor's elements from which on they stay where they are
_MOST_EMBEDDED = 256 << 20  # bytes of elements that are written into a program's own file; the format ends at 2 GiB
_ALIGNMENT = 4096  # of elements in a file of their own, so that whoever maps it need not copy
_PIECE = 8 << 20

# Numbers of fields in onnx.proto3
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_DATA_TYPE, _TENSOR_FLOAT_DATA, _TENSOR_RAW_DATA = 2, 4, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf


class Place(NamedTuple):
    """Where the elements of a tensor lie."""

    path: Path
    start: int  # bytes
    size: int


class _Field(NamedTuple):
    """One field of a message. start to end: with its tag; data to end: what it holds, without a length."""

    number: int
    wire: int
    start: int
    data: int
    end: int


def read(path: Path) -> ModelProto:
    """The program in a file, in which the elements of large tensors are references to where they lie.

    Small tensors hold their elements, wherever they lay. Raises BadData for bytes that are no ONNX program, and for
    elements in a file that is missing, too short, or outside the program's directory.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise BadData(str(path), "0 bytes", RECIPE)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                short = _without_elements(raw, path)
        model = ModelProto.FromString(short)
    except OSError as error:
        raise BadData(str(path), error.strerror, RECIPE) from error
    except (DecodeError, UnicodeDecodeError) as error:
        raise BadData(str(path), f"{size:,} bytes that are no ONNX program ({error})", RECIPE) from error
    if not model.HasField("graph") or not model.graph.node:
        raise BadData(str(path), f"{size:,} bytes, an ONNX program without an op", RECIPE)
    for tensor in tensors(model.graph):
        if is_reference(tensor):
            place = place_of(tensor, path)
            if place.size < _LARGE:
                tensor.raw_data = _bytes(place)
                _forget_place(tensor)
    return model


def is_reference(tensor: TensorProto) -> bool:
    """Whether the elements of a tensor are not in it."""
    return tensor.data_location == TensorProto.EXTERNAL


def place_of(tensor: TensorProto, program: Path) -> Place:
    """Where the elements of a reference lie; raises BadData unless they are all there."""
    place = f"{program} tensor {tensor.name!r}"
    said = {entry.key: entry.value for entry in tensor.external_data}
    if tensor.data_type not in DTYPES or any(dim < 0 for dim in tensor.dims):
        raise BadData(place, f"type {tensor.data_type} {list(tensor.dims)}", "a type and dims of a stored tensor")
    path = inside(program.parent, said.get("location", ""), f"{place} location")
    if not path.resolve().is_relative_to(program.parent.resolve()):
        raise BadData(f"{place} location", f"{path}, a link", "a file inside the directory of the program")
    size = (prod(tensor.dims) * DTYPES[tensor.data_type][1] + 7) // 8
    try:
        start, length = int(said.get("offset") or 0), int(said.get("length") or size)
    except ValueError as error:
        raise BadData(f"{place} offset and length", error, "numbers of bytes") from error
    if start < 0 or length != size:
        raise BadData(place, f"{length} bytes from byte {start}", f"{size} bytes: {list(tensor.dims)}")
    try:
        there = path.stat().st_size
    except OSError as error:
        raise BadData(f"{place}, {path}", error.strerror, "the file that holds its elements") from error
    if start + size > there:
        raise BadData(f"{place}, {path}", f"{there} bytes", f"at least {start + size}")
    return Place(path, start, size)


def elements(tensor: TensorProto, program: Path) -> NDArray[Any]:
    """The elements of a tensor in its shape, mapped read-only if they are a reference; types numpy lacks as their bits.

    Raises BadData for a type whose elements share bytes.
    """
    dtype, bits = DTYPES.get(tensor.data_type, (np.dtype("?"), 0))
    if bits != 8 * dtype.itemsize:
        found = f"elements of {TensorProto.DataType.Name(tensor.data_type)}"
        raise BadData(f"{program} tensor {tensor.name!r}", found, "elements of one byte or more")
    if is_reference(tensor):
        place = place_of(tensor, program)
        if not place.size:
            return np.zeros(tuple(tensor.dims), dtype)  # an empty range cannot be mapped
        return np.memmap(place.path, dtype, "r", place.start, tuple(tensor.dims))
    array: NDArray[Any]
    if tensor.HasField("raw_data"):
        array = np.frombuffer(tensor.raw_data, np.uint8)
    elif tensor.data_type == TensorProto.FLOAT:
        array = np.array(tensor.float_data, dtype)
    elif tensor.data_type == TensorProto.DOUBLE:
        array = np.array(tensor.double_data, dtype)
    elif tensor.data_type == TensorProto.INT64:
        array = np.array(tensor.int64_data, dtype)
    elif tensor.data_type in (TensorProto.UINT32, TensorProto.UINT64):
        array = np.array(tensor.uint64_data, np.uint64).astype(dtype)
    else:  # bits of 16-bit floats among them
        array = np.array(tensor.int32_data, np.int32).astype(f"<u{dtype.itemsize}" if dtype.kind == "f" else dtype)
    size = prod(tensor.dims) * dtype.itemsize
    if array.nbytes != size or min(tensor.dims, default=0) < 0:
        found = f"{array.nbytes} bytes of elements"
        raise BadData(f"{program} tensor {tensor.name!r}", found, f"{size} bytes: {list(tensor.dims)}")
    return array.view(dtype).reshape(tuple(tensor.dims))


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those inside its ops: bodies of loops and branches."""
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from graphs(inner)


def inner_graphs(node: NodeProto) -> list[GraphProto]:
    """The bodies of a loop or a branch."""
    found = [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]
    return found + [graph for attribute in node.attribute for graph in attribute.graphs]


def tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor that a program stores."""
    for each in graphs(graph):
        yield from each.initializer
        for sparse in each.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in each.node for attribute in node.attribute):
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors


def to_check(model: ModelProto) -> ModelProto:
    """A copy for onnx's checker, which is stricter than runtimes are.

    It wants every element there: references have become empty tensors. And it wants every output's shape.
    """
    result = ModelProto()
    result.CopyFrom(model)
    for tensor in tensors(result.graph):
        if is_reference(tensor):
            _forget_place(tensor)
            tensor.dims[:] = [0]
    for value in (value for graph in graphs(result.graph) for value in graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    return result


def stored_bytes(model: ModelProto, program: Path) -> int:
    """Bytes of a program's file and of the elements that lie in others."""
    places = [place_of(tensor, program) for tensor in tensors(model.graph) if is_reference(tensor)]
    return program.stat().st_size + sum(place.size for place in places if place.path != program)


def write(model: ModelProto, source: Path, target: Path) -> Path | None:
    """Write a program that was read from `source`, with copies of the elements it refers to.

    They are in the program's own file, or in one beside it, which is returned: if some lay outside the source, or if
    they are more than 256 MiB.
    """
    result = ModelProto()
    result.CopyFrom(model)
    large = [(tensor, place_of(tensor, source)) for tensor in tensors(result.graph) if is_reference(tensor)]
    total = sum(place.size for _, place in large)
    beside = None
    if total > _MOST_EMBEDDED or any(place.path != source for _, place in large):
        beside = target.with_name(target.name + DATA_SUFFIX)
        with beside.open("xb") as file:
            for tensor, place in large:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                _refer(tensor, beside.name, file.tell(), place.size)
                for piece in _pieces(place):
                    file.write(piece)
    else:
        for tensor, place in large:
            _forget_place(tensor)
            tensor.raw_data = _bytes(place)
    target.write_bytes(result.SerializeToString())
    return beside


def _pieces(place: Place) -> Iterator[bytes]:
    with place.path.open("rb") as file:
        file.seek(place.start)
        left = place.size
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise BadData(str(place.path), "an end that moved", "a file that nobody writes meanwhile")
            left -= len(piece)
            yield piece


def _bytes(place: Place) -> bytes:
    return b"".join(_pieces(place))


def _forget_place(tensor: TensorProto) -> None:
    tensor.ClearField("data_location")
    del tensor.external_data[:]


def _refer(tensor: TensorProto, location: str, start: int, size: int) -> None:
    _forget_place(tensor)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", start), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))


def _without_elements(raw: mmap.mmap, path: Path) -> bytes:
    """The bytes of a model, in which large initializers are references."""
    model = bytearray()
    for field in _fields(raw, 0, len(raw), path):
        if (field.number, field.wire) != (_MODEL_GRAPH, _BYTES):
            model += raw[field.start : field.end]
            continue
        graph = bytearray()
        for inner in _fields(raw, field.data, field.end, path):
            if (inner.number, inner.wire) == (_GRAPH_INITIALIZER, _BYTES) and inner.end - inner.data >= _LARGE:
                tensor = _tensor_without_elements(raw, inner, path)
                graph += _tag(_GRAPH_INITIALIZER) + _varint(len(tensor)) + tensor
            else:
                graph += raw[inner.start : inner.end]
        model += _tag(_MODEL_GRAPH) + _varint(len(graph)) + graph
    return bytes(model)


def _tensor_without_elements(raw: mmap.mmap, tensor: _Field, path: Path) -> bytes:
    """A tensor whose one large field of elements, if they lie there as in memory, is a reference."""
    fields = list(_fields(raw, tensor.data, tensor.end, path))
    kinds = [_number(raw, field.data, field.end, path)[0] for field in fields if field.number == _TENSOR_DATA_TYPE]
    as_in_memory = {_TENSOR_RAW_DATA} | ({_TENSOR_FLOAT_DATA} if kinds == [TensorProto.FLOAT] else set())
    large = [f for f in fields if f.number in as_in_memory and f.wire == _BYTES and f.end - f.data >= _LARGE]
    if len(large) != 1:
        return raw[tensor.data : tensor.end]
    reference = TensorProto()
    _refer(reference, path.name, large[0].data, large[0].end - large[0].data)
    return b"".join(raw[f.start : f.end] for f in fields if f is not large[0]) + reference.SerializeToString()


def _fields(raw: mmap.mmap, start: int, end: int, path: Path) -> Iterator[_Field]:
    """The fields of a message, whose bytes go from start to end. Raises BadData where they go on beyond it."""
    at = start
    while at < end:
        tag, data = _number(raw, at, end, path)
        wire = tag & 7
        if wire == _VARINT:
            after = _number(raw, data, end, path)[1]
        elif wire == _BYTES:
            length, data = _number(raw, data, end, path)
            after = data + length
        elif wire in (_FIXED32, _FIXED64):
            after = data + (4 if wire == _FIXED32 else 8)
        else:
            raise BadData(f"{path} byte {at}", f"bytes that are no ONNX program (wire type {wire})", RECIPE)
        if after > end:
            found = f"a field that ends {after - end:,} bytes after the end of its message"
            raise BadData(f"{path} byte {at}", found, f"{RECIPE}; was the file cut off?")
        yield _Field(tag >> 3, wire, at, data, after)
        at = after


def _number(raw: mmap.mmap, at: int, end: int, path: Path) -> tuple[int, int]:
    """A varint of at most 64 bits, and the byte after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at + shift // 7 >= end:
            break
        byte = raw[at + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + shift // 7 + 1
    raise BadData(f"{path} byte {at}", "bytes that are no ONNX program (a number without an end)", RECIPE)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _BYTES)
