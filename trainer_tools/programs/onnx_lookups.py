"""Which lookups an ONNX program has, what makes their rows and ids, and what stands against cutting one."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from trainer_tools.programs import onnx_file, onnx_graph, onnx_rows
from trainer_tools.programs.onnx_file import inner_graphs
from trainer_tools.programs.onnx_graph import dims_of, initializers, reads, writes
from trainer_tools.programs.onnx_rows import Step, Table
from trainer_tools.programs.program import Lookup

_OTHER_LOOKUPS = {  # which of its inputs is the table, and why it stays
    "ATen": (0, "it is an op of PyTorch's own"),
    "EmbedLayerNormalization": (2, "lookup and layer norm are one op"),
    "EmbeddingBag": (0, "lookup and pooling are one op"),
    "GatherBlockQuantized": (0, "its rows are quantised in a way of the program's own"),
    "GatherElements": (0, "it finds elements, not rows"),
    "GatherND": (0, "it finds elements by several numbers each, not rows by ids"),
    "QEmbedLayerNormalization": (2, "lookup and layer norm are one op"),
}
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
_SMALL_INTEGERS = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16}  # exact as float32
_IDS_AT_ONCE = 1 << 20


class Found(NamedTuple):
    """A lookup, and what its rows are made of."""

    lookup: Lookup
    table: Table | None = None  # None: there is an obstacle
    cast_back: int = 0  # the type of its output, if that is of small integers, which are fed as floats; else 0


class Finder:
    """Finds the lookups of a program's main graph, and names those inside loops and branches."""

    def __init__(self, model: ModelProto, values: Mapping[str, ValueInfoProto]):
        """values: type and shape of each value of the main graph, as far as they are known."""
        self._model, self._values = model, values
        self._inputs = {value.name for value in onnx_graph.inputs(model.graph)}
        self._outputs = {value.name for value in model.graph.output}

    def lookups(self) -> list[Found]:
        """Every lookup, in the order of the graph."""
        found = []
        for node in self._model.graph.node:
            found += self._lookup_of(node)
            found += self._lookups_inside(node)
        return _one_kind_of_rows_each(found)

    @cached_property
    def stored(self) -> dict[str, TensorProto]:
        """What the main graph stores: initializers and constants."""
        found = {tensor.name: tensor for tensor in self._model.graph.initializer}
        for node in self._model.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                found[node.output[0]] = node.attribute[0].t
        return found

    def origins(self, ids: str, rows: int) -> tuple[list[str], str]:
        """The program's inputs that the ids of a table are arranged from, or why they are no ids of a request."""
        found: list[str] = []
        todo, seen = [ids], set[str]()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self._constants:
                return [], f"its ids are constants, {name}"
            if name in self._inputs:
                found.append(name)
                continue
            node = self._writers[name]
            if node.op_type in _REARRANGE and (node.op_type != "Gather" or node.input[1] in self._constants):
                todo += reversed(node.input if node.op_type == "Concat" else node.input[:1])
            elif (base := self._unchanged(name, rows)) is not None:
                todo.append(base)
            else:
                return [], f"its ids are computed by op {node.op_type} ({name})"
        return found, ""

    def _lookup_of(self, node: NodeProto) -> list[Found]:
        """The lookup that an op does: one or none."""
        if node.op_type in _OTHER_LOOKUPS:
            at, obstacle = _OTHER_LOOKUPS[node.op_type]
            name = node.input[at] if len(node.input) > at else ""
            return [_refused(node, name, self._table_before(name)[2], obstacle)] if self._is_table(name) else []
        if node.op_type != "Gather" or not self._is_table(node.input[0]):
            return []
        table, source, shape, obstacle = self._table_before(node.input[0])
        ids, out = node.input[1], node.output[0]
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if len(shape) != 2 or shape[1] < 1:
            obstacle = f"its table has shape {shape}, not [rows, elements]"
        elif axis not in (0, -2):
            obstacle = f"it gathers along axis {axis}, not rows"
        obstacle = obstacle or self.origins(ids, shape[0])[1] or self._unknown_ids(ids)
        if obstacle or table is None:
            return [_refused(node, source, shape, obstacle)]
        op, first = node.op_type, out
        while table.kind not in onnx_rows.FLOATS and (further := self._step_after(out, table, shape)):
            table, out = further
            op = f"{op}+{self._writers[out].op_type}"
        if table.kind in onnx_rows.FLOATS:
            return [Found(Lookup(out, op, source, shape[0], shape[1], ids, out), table)]
        fed = table.then(Step("Cast", to=TensorProto.FLOAT), self.stored)
        if fed is None or out != first or table.kind not in _SMALL_INTEGERS:
            return [
                _refused(node, source, shape, f"its rows are {onnx_graph.type_name(table.kind)}; a cube's are float32")
            ]
        feed = f"{out}_float"
        while feed in self._inputs or feed in self._constants or feed in self._writers:
            feed += "_rows"
        return [Found(Lookup(out, op, source, shape[0], shape[1], ids, feed), fed, table.kind)]

    def _lookups_inside(self, node: NodeProto) -> Iterator[Found]:
        """The lookups that ops in the bodies of an op do."""
        bodies = [graph for body in inner_graphs(node) for graph in onnx_file.graphs(body)]
        stored = {tensor.name: list(tensor.dims) for body in bodies for tensor in body.initializer}
        for inner in (inner for body in bodies for inner in body.node):
            at, _ = _OTHER_LOOKUPS.get(inner.op_type, (0 if inner.op_type == "Gather" else -1, ""))
            name = inner.input[at] if 0 <= at < len(inner.input) else ""
            shape = stored.get(name) or (self._table_before(name)[2] if self._is_table(name) else [])
            if len(shape) >= 2:
                obstacle = f"it is inside a loop or a branch, op {node.op_type} ({node.output[0]})"
                yield _refused(inner, name, shape, obstacle)

    @cached_property
    def _constants(self) -> set[str]:
        """Values of the main graph that are the same in every run."""
        found = set(initializers(self._model.graph))
        for node in self._model.graph.node:
            if node.op_type == "Constant" or (reads(node) and found.issuperset(reads(node))):
                found.update(writes(node))
        return found

    @cached_property
    def _writers(self) -> dict[str, NodeProto]:
        return {name: node for node in self._model.graph.node for name in writes(node)}

    @cached_property
    def _readers(self) -> dict[str, list[NodeProto]]:
        """The ops that read each value, themselves or in their bodies."""
        found: dict[str, list[NodeProto]] = {}
        for node in self._model.graph.node:
            for name in dict.fromkeys(reads(node)):
                found.setdefault(name, []).append(node)
        return found

    def _is_table(self, name: str) -> bool:
        """Whether a value is a constant of several rows."""
        return name in self._constants and len(self._table_before(name)[2]) >= 2

    def _table_before(self, name: str) -> tuple[Table | None, str, list[int], str]:
        """What makes a constant: the stored tensor with the steps from it, its name and shape, and what is wrong."""
        path: list[tuple[NodeProto, int]] = []
        while name not in self.stored:
            node = self._writers.get(name)
            if node is None or not any(node.input):
                return None, name, [], "its table is no stored tensor"
            sizes = [prod(self._shape(n)) if n in self._constants else -1 for n in node.input]
            path.append((node, sizes.index(max(sizes))))
            name = node.input[path[-1][1]]
        shape = list(self.stored[name].dims)
        table: Table | None = Table(name, (), self.stored[name].data_type)
        for node, at in reversed(path):
            step = onnx_rows.step_of(node, at, len(shape)) if len(shape) == 2 else None
            if table is not None and step is not None and onnx_rows.fits(step, self.stored, shape, each_row=True):
                table = table.then(step, self.stored)
            else:
                table = None
            if table is None:
                return None, name, shape, f"its table is computed by op {node.op_type}"
        return table, name, shape, ""

    def _step_after(self, name: str, table: Table, shape: Sequence[int]) -> tuple[Table, str] | None:
        """What the one op that reads rows makes of them: the table with that step, and the name of the result."""
        readers = self._readers.get(name, [])
        if len(readers) != 1 or name in self._outputs or name not in self._values:
            return None
        (node,) = readers
        if node.input[0] != name:  # a body may read it without being given it
            return None
        step = onnx_rows.step_of(node, 0, len(dims_of(self._values[name])))
        if step is None or step.op not in ("Identity", "Cast", "DequantizeLinear"):
            return None
        if name in step.constants or not onnx_rows.fits(step, self.stored, shape, each_row=False):
            return None
        further = table.then(step, self.stored)
        return None if further is None else (further, node.output[0])

    def _shape(self, name: str) -> list[int]:
        """The shape of a constant; [0] if nobody knows it."""
        if name in self.stored:
            return list(self.stored[name].dims)
        dims = dims_of(self._values[name]) if name in self._values else [""]
        sizes = [dim for dim in dims if isinstance(dim, int)]
        return sizes if len(sizes) == len(dims) else [0]

    def _unchanged(self, name: str, rows: int) -> str | None:
        """The value that arithmetic, number by number, makes `name` of, if it leaves 0 to rows - 1 as they are."""
        given: dict[str, None] = {}
        todo, seen = [name], set[str]()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            node = self._writers.get(value)
            if value in self._constants:
                if prod(self._shape(value)) != 1:
                    return None
            elif node is not None and node.op_type in _ELEMENTWISE:
                todo += reads(node)
            else:
                given[value] = None
        if len(given) != 1 or name in given:
            return None
        (base,) = given
        return base if self._leaves_ids(name, base, rows) else None

    def _leaves_ids(self, name: str, base: str, rows: int) -> bool:
        """Whether `name` is what `base` is for every id of a table, asked of onnx's own interpreter in numpy."""
        from onnx.reference import ReferenceEvaluator

        if base not in self._values or name not in self._values:
            return False
        kind = self._values[base].type.tensor_type.elem_type
        dtype = onnx_file.DTYPES[kind][0] if kind in onnx_file.DTYPES else np.dtype("O")
        part = onnx_graph.walked_back(self._model, [self._values[name]], {base: self._values[base]})
        if dtype.kind not in "if" or [value.name for value in part.graph.input] != [base]:
            return False
        try:
            run = ReferenceEvaluator(part)
            for start in range(0, rows, _IDS_AT_ONCE):
                ids = np.arange(start, min(start + _IDS_AT_ONCE, rows))
                (made,) = run.run([name], {base: ids.astype(dtype)})
                if not np.array_equal(np.asarray(made), ids):
                    return False
        except Exception:  # it raises whatever numpy and its parts raise; then nobody knows
            return False
        return True

    def _unknown_ids(self, ids: str) -> str:
        """Why nobody can say what a request would have to hold as ids; empty if it is known."""
        if ids in self._values and self._values[ids].type.tensor_type.HasField("shape"):
            return ""
        return f"how many dimensions its ids have is not known ({ids})"


def _one_kind_of_rows_each(found: Sequence[Found]) -> list[Found]:
    """Rows are computed once, so lookups that compute other rows of one tensor cannot share them."""
    first: dict[str, Table] = {}
    result = []
    for each in found:
        table = each.table
        if table is not None and _computing(first.setdefault(table.name, table)) != _computing(table):
            reason = "its rows are computed otherwise than those of another lookup of its table"
            result.append(Found(each.lookup._replace(obstacle=reason)))
        else:
            result.append(each)
    return result


def _computing(table: Table) -> list[Step]:
    return [step for step in table.steps if step.op != "Identity"]


def _refused(node: NodeProto, table: str, shape: Sequence[int], obstacle: str) -> Found:
    rows, dim = (shape[0], shape[-1]) if shape else (None, 0)
    ids = node.input[1] if len(node.input) > 1 else ""
    out = next(iter(writes(node)), node.op_type)
    return Found(Lookup(out, node.op_type, table, rows, dim, ids, out, obstacle))
