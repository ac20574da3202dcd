"""What an ONNX lookup reads: whether it is ids of a request, from which inputs, and with what added to them.

    ids ──▶ Cast ──▶ Add ──▶ Gather          moved about, and constants added: ids of a request
                      ▲
            [0, 20, 50]

What arithmetic does to ids, and what shape they have, is asked of onnx's own interpreter in numpy.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from trainer_tools.programs import onnx_file, onnx_graph, servable
from trainer_tools.programs.onnx_graph import dims_of, reads
from trainer_tools.programs.program import Outside

# Ops that only move ids about: what comes out is ids that a request can hold as they are. All but Concat have them in
# their first input, and in the others where they go.
_REARRANGE = {
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
}  # fmt: skip
# Arithmetic that may leave every id of a table as it is: Keras and JAX count negative ones from the end this way.
_ELEMENTWISE = {
    "Abs", "Add", "And", "Cast", "Clip", "Div", "Equal", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual",
    "Max", "Min", "Mod", "Mul", "Not", "Or", "Sub", "Where",
}  # fmt: skip
_WHOLE = {TensorProto.INT32, TensorProto.INT64}
_IDS_AT_ONCE = 1 << 20
IDS_BEYOND = 1_000  # ids that no row has, which are tried too
_TRIED, _OTHER_SIZE = (11, 17), 3  # samples of a trial; of dimensions that count none
_UNKNOWN = "?"  # a size that nobody names
_MADE_UP = re.compile(r"unk__\d+")  # tf2onnx's: another for every size, where they are the same too
_RECIPE = "export with a name for the first dimension, dynamic_axes={INPUT: {0: 'samples'}, ...}"


class Origin(NamedTuple):
    """What a lookup reads."""

    inputs: list[str]  # of the program
    base: str = ""  # the value to which constants are added, if any are; else what is read, before what leaves it as is
    added: tuple[int, ...] = ()  # one number for all, or one for each id of a sample; to what the inputs hold
    obstacle: str = ""  # why it is no ids of a request; empty if it is
    outside: Outside | None = None  # None: nothing was done to them


class _Same(NamedTuple):
    """What arithmetic is done to that leaves the ids of a table as they are; and see Origin."""

    base: str
    outside: Outside | None


class IdsFinder:
    """Finds out what lookups of a program's main graph read."""

    def __init__(
        self,
        model: ModelProto,
        values: Mapping[str, ValueInfoProto],
        constants: Mapping[str, int],
        writers: Mapping[str, NodeProto],
    ):
        """values: type and shape of each value, as far as they are known. constants: how many elements each has."""
        self._model, self._values, self._constants, self._writers = model, values, constants, writers
        self._inputs = {value.name: value for value in onnx_graph.inputs(model.graph)}
        self._same: dict[tuple[str, int], _Same | None] = {}  # found out by trying all ids of a table
        dims = {dim for value in self._inputs.values() for dim in dims_of(value) if isinstance(dim, str)}
        self._named = {dim for dim in dims if dim and not _MADE_UP.fullmatch(dim)}
        inputs = [self._dims(name) for name in self._inputs]
        outputs = [self._dims(value.name) for value in model.graph.output]
        firsts = {dims[0] for dims in inputs if dims}
        is_fixed = bool(firsts) and all(isinstance(first, int) for first in firsts)
        self._samples = None if is_fixed else servable.counted_by(inputs, outputs) or "samples"
        self._first: int | str = firsts.pop() if len(firsts) == 1 else _UNKNOWN  # of all inputs

    def origin(self, ids: str, rows: int) -> Origin:
        """What ids of a table of so many rows are made of."""
        inputs, is_shifted, outside, obstacle = self._followed(ids, rows)
        if not obstacle and not (ids in self._values and self._values[ids].type.tensor_type.HasField("shape")):
            obstacle = f"how many dimensions its ids have is not known ({ids})"
        obstacle = obstacle or self._not_by_samples(ids)
        if obstacle:
            return Origin(inputs, ids, (), obstacle)
        if outside is not None:  # unless the request holds ids as they are before that
            outside = Outside(f"{outside.told}, as whoever arranges the ids has to do", False, False)
        if not is_shifted:
            same = self._before_same(ids, rows)
            if same.outside is not None:
                outside = same.outside._replace(told=f"{same.outside.told}: they read zeros now")
            return Origin(inputs, same.base, outside=outside)
        added = self._added(ids)
        if added is None:
            return Origin(inputs, ids, (), "to its ids constants are added that are not the same in every sample")
        return Origin(inputs, self._base(ids), added, outside=outside)

    def check_inputs(self, names: Sequence[str], readers: Mapping[str, Sequence[str]]) -> None:
        """Raise BadData for an input in which samples do not come first; one without them is everybody's.

        readers: of an input, the lookups that stay and read it, for people.
        """
        for name in names:
            servable.check_input(name, self._by_samples(self._dims(name)), self._samples, readers.get(name, ()))

    def _followed(self, ids: str, rows: int) -> tuple[list[str], bool, Outside | None, str]:
        """The program's inputs that ids are made of; whether constants are added; or why they are no ids.

        Before the last: what is done to ids outside the table on the way.
        """
        found: list[str] = []
        outside: Outside | None = None
        todo, seen, is_shifted = [ids], set[str](), False
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self._constants:
                return [], False, None, f"its ids are constants, {name}"
            if name in self._inputs:
                found.append(name)
                continue
            node = self._writers[name]
            if node.op_type in _REARRANGE and (node.op_type != "Gather" or node.input[1] in self._constants):
                todo += reversed(node.input if node.op_type == "Concat" else node.input[:1])
            elif (same := self._unchanged(name, rows)) is not None:
                todo.append(same.base)
                outside = outside or same.outside
            elif (base := self._shifted(node)) is not None:
                todo.append(base)
                is_shifted = True
            else:
                return [], False, None, f"its ids are computed by op {node.op_type} ({name})"
        return found, is_shifted, outside, ""

    def _shifted(self, node: NodeProto) -> str | None:
        """Of whole numbers plus or minus constants: those numbers. None if an op does anything else."""
        if node.op_type not in ("Add", "Sub"):
            return None
        first, second = node.input
        if node.op_type == "Add" and first in self._constants:
            first, second = second, first
        if first in self._constants or second not in self._constants or first not in self._values:
            return None
        return first if self._values[first].type.tensor_type.elem_type in _WHOLE else None

    def _base(self, name: str) -> str:
        """What the last ops before a lookup add constants to, if it has the same shape; else the value itself."""
        at = name
        while (node := self._writers.get(at)) is not None and (before := self._shifted(node)) is not None:
            at = before
        shapes = [[array.shape for array in self._trial(value)] for value in (at, name)]
        return at if shapes[0] == shapes[1] else name

    def _added(self, name: str) -> tuple[int, ...] | None:
        """What is added to ids; None if it is not the same in every sample."""
        trials = [*self._trial(name)[:1], *self._trial(name, _OTHER_SIZE + 1)[:1]]
        if len(trials) < 2:
            return None
        made, later = trials
        if (made == made.flat[0]).all() and (later == made.flat[0]).all():
            return (int(made.flat[0]),)
        is_fixed = made.shape == later.shape and made.ndim > 1
        each = made.reshape(len(made), -1)
        return tuple(map(int, each[0])) if is_fixed and (each == each[0]).all() else None

    def _not_by_samples(self, ids: str) -> str:
        """Why a predictor cannot tell the ids of samples apart, or outputs."""
        for value in self._model.graph.output:
            if wrong := servable.output_obstacle(value.name, self._by_samples(self._dims(value.name)), self._samples):
                return wrong
        dims = self._by_samples(self._dims(ids))
        if ids not in self._inputs and len(made := self._trial(ids)) == len(_TRIED):
            dims = [
                sizes[0] if len(set(sizes)) == 1 else self._samples or _UNKNOWN if sizes == _TRIED else _UNKNOWN
                for sizes in zip(*(array.shape for array in made), strict=True)
            ]
            if dims[:1] == [_UNKNOWN]:
                return f"its ids are as many as {made[0].shape[0]} for {_TRIED[0]} samples, and not one after another"
            if self._samples is None and dims:  # as many samples every time
                other = self._trial(ids, _OTHER_SIZE + 1)
                if other and other[0].shape[:1] != made[0].shape[:1]:
                    return (
                        f"its ids, {ids}, begin with a size that varies where the program takes as many samples every "
                        "time: export it with the lookup before ids are squeezed, flattened or transposed"
                    )
        # A later size may have the name of samples.
        samples = "samples" if self._samples and dims and isinstance(dims[0], int) else self._samples
        return servable.obstacle("its ids", dims, samples, _RECIPE)

    def _trial(self, name: str, other: int = _OTHER_SIZE) -> list[NDArray[Any]]:
        """A value for several numbers of samples, whose inputs are zeros; none where nobody can tell.

        other: the size of dimensions that vary and count something else.
        """
        if name in self._inputs:
            return [self._zeros(self._inputs[name], samples, other) for samples in _TRIED]
        part = onnx_graph.walked_back(self._model, [self._values[name]], {})
        made = []
        for samples in _TRIED:
            given = {value.name: self._zeros(value, samples, other) for value in part.graph.input}
            found = _interpreted(part, name, given)
            made += [] if found is None else [found]
        return made

    def _zeros(self, value: ValueInfoProto, samples: int, other: int) -> NDArray[Any]:
        dims = self._by_samples(self._dims(value.name))
        sizes = [dim if isinstance(dim, int) else samples if dim == self._samples else other for dim in dims]
        return np.zeros(sizes, onnx_file.DTYPES.get(value.type.tensor_type.elem_type, (np.dtype("O"), 0))[0])

    def _dims(self, name: str) -> list[int | str]:
        """The dims of a value. Names that no input has count as unknown: whoever infers shapes makes names up."""
        dims = dims_of(self._values[name]) if name in self._values else []
        return [dim if isinstance(dim, int) or dim in self._named else _UNKNOWN for dim in dims]

    def _by_samples(self, dims: list[int | str]) -> list[int | str]:
        """The same, where the first, if it is unknown, is taken to be samples."""
        return [self._samples or self._first, *dims[1:]] if dims[:1] == [_UNKNOWN] else dims

    def _before_same(self, name: str, rows: int) -> _Same:
        """What a lookup reads, before the arithmetic that leaves it as it is, in the same shape."""
        node = self._writers.get(name)
        is_moved = node is None or node.op_type in _REARRANGE - _ELEMENTWISE
        same = None if is_moved else self._unchanged(name, rows)
        if same is None or [a.shape for a in self._trial(same.base)] != [a.shape for a in self._trial(name)]:
            return _Same(name, None)
        return same

    def _unchanged(self, name: str, rows: int) -> _Same | None:
        """The value that arithmetic, number by number, makes `name` of, if it leaves 0 to rows - 1 as they are."""
        if (name, rows) not in self._same:
            self._same[name, rows] = self._tried_same(name, rows)
        return self._same[name, rows]

    def _tried_same(self, name: str, rows: int) -> _Same | None:
        given: dict[str, None] = {}
        ops: dict[str, None] = {}
        todo, seen = [name], set[str]()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            node = self._writers.get(value)
            if value in self._constants:
                if self._constants[value] != 1:
                    return None
            elif node is not None and node.op_type in _ELEMENTWISE:
                todo += reads(node)
                ops[node.op_type] = None
            else:
                given[value] = None
        if len(given) != 1 or name in given:
            return None
        (base,) = given
        gave = self._gave(name, base, rows)
        if gave is None:
            return None
        arithmetic = sorted(set(ops) - {"Cast", "Identity"})
        what = f"op{'s' if len(arithmetic) > 1 else ''} {', '.join(arithmetic)}"
        told = f"{what} gave {' and '.join(filter(None, gave))}"
        return _Same(base, Outside(told, *map(bool, gave)) if any(gave) else None)

    def _gave(self, name: str, base: str, rows: int) -> tuple[str, str] | None:
        """Which rows `name` gives ids of `base` below 0 and beyond the table, for people; empty if none.

        None if it is not `base` for every id of the table, or spreads other ids over its rows. What gives all other
        ids one row (a clip, one for unknown words) is let pass: absent keys read alike too.
        """
        if base not in self._values or name not in self._values:
            return None
        kind = self._values[base].type.tensor_type.elem_type
        dtype = onnx_file.DTYPES[kind][0] if kind in onnx_file.DTYPES else np.dtype("O")
        part = onnx_graph.walked_back(self._model, [self._values[name]], {base: self._values[base]})
        if dtype.kind not in "if" or [value.name for value in part.graph.input] != [base]:
            return None
        for start in range(0, rows, _IDS_AT_ONCE):
            ids = np.arange(start, min(start + _IDS_AT_ONCE, rows))
            made = _interpreted(part, name, {base: ids.astype(dtype)})
            if made is None or not np.array_equal(made, ids):
                return None
        most = np.iinfo(dtype).max if dtype.kind == "i" else 1 << 53
        beyond = np.arange(rows, min(rows + IDS_BEYOND, most))
        made = _interpreted(part, name, {base: beyond.astype(dtype)})
        if made is None or made.shape != beyond.shape:
            return None
        given = np.unique(made[(made >= 0) & (made < rows)])
        if given.size > 1:
            return None  # ids % rows: who hashes means each of them
        of_beyond = f"ids from {rows:,} row {int(given[0]):,}" if given.size else ""
        below = np.arange(-min(rows, IDS_BEYOND), 0)
        made = _interpreted(part, name, {base: below.astype(dtype)})
        if made is None or np.array_equal(made, below):
            return "", of_beyond  # which count from the end, as they do without these ops
        given = np.unique(made[(made >= 0) & (made < rows)])
        row = f"row {int(given[0]):,}" if given.size == 1 else "rows from the end"
        return f"ids below 0 {row}" if given.size else "", of_beyond


def _interpreted(part: ModelProto, name: str, given: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """A value of a program; None where the interpreter does not know."""
    from onnx.reference import ReferenceEvaluator

    try:
        (made,) = ReferenceEvaluator(part).run([name], dict(given))
    except Exception:  # it raises whatever numpy and its parts raise
        return None
    return np.asarray(made)
