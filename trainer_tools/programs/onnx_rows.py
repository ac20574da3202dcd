"""The rows of an ONNX lookup whose table is stored otherwise than the lookup answers: quantised, scaled, or cast.

What happens to every row alike, before the lookup (to the whole table) or after it (to the rows found), is a list of
steps. They are done here once, piece by piece, with the arithmetic of the ops, so that rows are float32 as others are.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from trainer_tools.programs.onnx_file import DTYPES
from trainer_tools.scratch import scratch

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)  # what a cube's rows can be made of, exactly
_CASTS = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16, TensorProto.INT8,
    TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32, TensorProto.INT64,
}  # fmt: skip
_QUANTISED = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32}
_ARITHMETIC: dict[str, Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide,
}  # fmt: skip
_PIECE = 8 << 20  # bytes of rows held at once


class Step(NamedTuple):
    """What an op does to every row."""

    op: str
    at: int = 0  # which of its inputs the rows are
    constants: tuple[str, ...] = ()  # its other inputs, in order
    axis: int = 1  # DequantizeLinear: to what the scales belong, 0 to rows, 1 to elements
    to: int = 0  # Cast: the type of the result


class Table(NamedTuple):
    """A stored tensor, and what makes rows of it. kind: type of an element of these rows."""

    name: str
    steps: tuple[Step, ...]
    kind: int

    def then(self, step: Step, constants: Mapping[str, TensorProto]) -> "Table | None":
        """With one more step; None if that is not arithmetic we do."""
        kind = _kind_after(self.kind, step, constants)
        if step.op == "DequantizeLinear" and list(constants[step.constants[0]].dims) in ([], [1]):
            step = step._replace(axis=1)  # one scale for all: it belongs to no axis
        return None if kind is None else Table(self.name, (*self.steps, step), kind)


def step_of(node: NodeProto, at: int, axes: int) -> Step | None:
    """What an op does to its input number `at`, whose last dimension of `axes` holds a row; None if not row by row."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    constants = tuple(name for number, name in enumerate(node.input) if number != at and name)
    if node.domain not in ("", "ai.onnx") or len(node.output) != 1:
        return None
    if node.op_type == "Identity":
        return Step("Identity")
    if node.op_type == "Cast" and attributes["to"].i in _CASTS:
        return Step("Cast", to=attributes["to"].i)
    if node.op_type in _ARITHMETIC and axes == 2 and len(constants) == 1:
        return Step(node.op_type, at, constants)
    if node.op_type == "DequantizeLinear" and at == 0 and not {"block_size", "output_dtype"} & attributes.keys():
        axis = attributes["axis"].i if "axis" in attributes else 1
        axis += axes if axis < 0 else 0
        return Step("DequantizeLinear", 0, constants, {axes - 2: 0, axes - 1: 1}.get(axis, 2))
    return None


def fits(step: Step, constants: Mapping[str, TensorProto], shape: Sequence[int], each_row: bool) -> bool:
    """Whether the constants of a step are stored and go with rows of this shape [rows, dim], which they leave so.

    each_row: whether a constant may differ from row to row.
    """
    for name in step.constants:
        if name not in constants:
            return False
        dims = _dims(step, list(constants[name].dims))
        most = (shape[0] if each_row else 1, shape[1])
        if dims is None or any(size not in (1, whole) for size, whole in zip(dims, most, strict=True)):
            return False
    return True


def computed(
    stored: NDArray[Any], kind: int, steps: Sequence[Step], constants: Mapping[str, NDArray[Any]]
) -> NDArray[Any]:
    """The rows that steps make of a stored table [rows, dim], float32 or float16.

    As they are where nothing happens to them, else in a temporary file without a name, mapped. Raises BadData where
    there is no room for it.
    """
    if all(step.op == "Identity" for step in steps) and kind in FLOATS:
        return stored
    count, dtype = max(1, _PIECE // max(1, 4 * stored.shape[1])), np.dtype("<f4")
    with scratch() as directory, (directory / "rows").open("w+b") as file:
        for start in range(0, len(stored), count):
            piece = stored[start : start + count]
            if kind == TensorProto.BFLOAT16:
                piece = (piece.astype("<u4") << 16).view("<f4")
            for step in steps:
                given = [_operand(step, constants[name], start, len(piece)) for name in step.constants]
                piece = _done(step, piece, given)
            dtype = piece.dtype
            file.write(np.ascontiguousarray(piece).data)
        file.flush()
        if not stored.size:
            return np.zeros(stored.shape, dtype)
        made: NDArray[Any] = np.memmap(file, dtype, "r", 0, stored.shape)
        return made


def _kind_after(kind: int, step: Step, constants: Mapping[str, TensorProto]) -> int | None:
    """The type of an element after a step on elements of a type; None if that is not arithmetic we do."""
    if step.op == "Identity":
        return kind
    if step.op == "Cast":
        return step.to if kind in _CASTS and step.to != TensorProto.BFLOAT16 else None
    kinds = [constants[name].data_type for name in step.constants]
    if step.op == "DequantizeLinear":
        fine = kind in _QUANTISED and kinds[:1] == [TensorProto.FLOAT] and all(other == kind for other in kinds[1:])
        return TensorProto.FLOAT if fine else None
    return kind if kind in (*FLOATS, TensorProto.DOUBLE) and kinds == [kind] else None


def _done(step: Step, rows: NDArray[Any], given: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if step.op == "Cast":
        return rows.astype(DTYPES[step.to][0])
    if step.op == "DequantizeLinear":
        less = rows.astype(np.int32) - (given[1].astype(np.int32) if len(given) > 1 else 0)
        scaled: NDArray[np.float32] = less.astype(np.float32) * given[0]
        return scaled
    if step.op in _ARITHMETIC:
        pair = (given[0], rows) if step.at else (rows, given[0])
        return _ARITHMETIC[step.op](*pair)
    return rows


def _operand(step: Step, constant: NDArray[Any], start: int, count: int) -> NDArray[Any]:
    """The part of a constant that goes with some rows, [1 or count, 1 or dim]."""
    dims = _dims(step, list(constant.shape))
    assert dims is not None, "fits() was asked"
    whole: NDArray[Any] = constant.reshape(dims)
    return whole[start : start + count] if dims[0] > 1 else whole


def _dims(step: Step, dims: Collection[int]) -> list[int] | None:
    """A constant's dims as those of rows [rows, dim]; None if it has more."""
    sizes = list(dims)
    if step.op == "DequantizeLinear":
        if sizes in ([], [1]):
            return [1, 1]
        return {0: [*sizes, 1], 1: [1, *sizes]}.get(step.axis) if len(sizes) == 1 else None
    return [*([1] * (2 - len(sizes))), *sizes] if len(sizes) <= 2 else None
