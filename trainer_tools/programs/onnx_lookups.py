"""Which lookups an ONNX program has, what makes their rows and ids, and what stands against cutting one."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from trainer_tools.programs import onnx_file, onnx_graph, onnx_rows
from trainer_tools.programs.onnx_file import inner_graphs
from trainer_tools.programs.onnx_graph import dims_of, initializers, reads, writes
from trainer_tools.programs.onnx_ids import IdsFinder, Origin
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
_SMALL_INTEGERS = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16}  # exact as float32


class Found(NamedTuple):
    """A lookup, and what its rows are made of."""

    lookup: Lookup
    reads: str = ""  # the value that holds its ids, with what is added to them
    is_sum: bool = False  # see Ids
    origin: Origin | None = None  # None: there is an obstacle
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
        return _one_kind_of_rows_each(_one_sum_each(found))

    def check_inputs(self, names: Sequence[str], readers: Mapping[str, Sequence[str]]) -> None:
        """Raise BadData for an input in which samples do not come first; one without them is everybody's."""
        self._ids.check_inputs(names, readers)

    @cached_property
    def stored(self) -> dict[str, TensorProto]:
        """What the main graph stores: initializers and constants."""
        found = {tensor.name: tensor for tensor in self._model.graph.initializer}
        for node in self._model.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                found[node.output[0]] = node.attribute[0].t
        return found

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
        if obstacle or table is None:
            return [_refused(node, source, shape, obstacle)]
        origin = self._ids.origin(ids, shape[0])
        if origin.obstacle:
            return [_refused(node, source, shape, origin.obstacle)]
        read = ids if origin.added else origin.base
        op, first = node.op_type, out
        while table.kind not in onnx_rows.FLOATS and (further := self._step_after(out, table, shape)):
            table, out = further
            op = f"{op}+{self._writers[out].op_type}"
        if table.kind in onnx_rows.FLOATS:
            lookup = Lookup(out, op, source, shape[0], shape[1], origin.base, out)
            return [Found(lookup, read, False, origin, table)]
        fed = table.then(Step("Cast", to=TensorProto.FLOAT), self.stored)
        if fed is None or out != first or table.kind not in _SMALL_INTEGERS:
            return [
                _refused(node, source, shape, f"its rows are {onnx_graph.type_name(table.kind)}; a cube's are float32")
            ]
        feed = f"{out}_float"
        while feed in self._inputs or feed in self._constants or feed in self._writers:
            feed += "_rows"
        lookup = Lookup(out, op, source, shape[0], shape[1], origin.base, feed)
        return [Found(lookup, read, False, origin, fed, table.kind)]

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
    def _ids(self) -> IdsFinder:
        sizes = {name: prod(self._shape(name)) for name in self._constants}
        return IdsFinder(self._model, self._values, sizes, self._writers)

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


def _one_sum_each(found: Sequence[Found]) -> list[Found]:
    """A request names ids as the program does, so it names those to which something else is added as what comes out."""
    first: dict[str, tuple[int, ...]] = {}
    result = []
    for each in found:
        origin = each.origin
        if origin is not None and first.setdefault(origin.base, origin.added) != origin.added:
            each = each._replace(lookup=each.lookup._replace(ids=each.reads), is_sum=True)
        result.append(each)
    return result


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
