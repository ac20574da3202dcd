"""ONNX programs (`NAME.onnx`, with or without files beside it): read, describe, cut, write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, defs, helper, inliner, shape_inference

from cube.errors import BadData
from trainer_tools.graph_picture import Graph, Operation
from trainer_tools.manifest import Tensor
from trainer_tools.programs import onnx_file, onnx_graph, onnx_rows
from trainer_tools.programs.onnx_graph import DATATYPES, dims_of, reads, type_name, writes
from trainer_tools.programs.onnx_lookups import Finder, Found
from trainer_tools.programs.program import Ids, Lookup

SUFFIX = ".onnx"
_RANDOM = {
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"
}  # fmt: skip


@dataclass(frozen=True)
class OnnxProgram:
    """A program, in which large tensors are references to where they lie. See TrainedProgram."""

    model: ModelProto
    path: Path  # of the file it was read from
    format: Literal["onnx"] = "onnx"

    def inputs(self) -> list[Tensor]:
        """See TrainedProgram."""
        return [self._tensor(value) for value in onnx_graph.inputs(self.model.graph)]

    def outputs(self) -> list[Tensor]:
        """See TrainedProgram. One whose number of dimensions nobody knows counts as [-1]."""
        return [self._tensor(self._values.get(value.name, value)) for value in self.model.graph.output]

    def ops(self) -> int:
        """See TrainedProgram. Those inside loops and branches count too."""
        return sum(len(graph.node) for graph in onnx_file.graphs(self.model.graph))

    def random_ops(self) -> list[str]:
        """See TrainedProgram. Those inside loops and branches too."""
        nodes = (node for graph in onnx_file.graphs(self.model.graph) for node in graph.node)
        return [f"{node.op_type} ({', '.join(writes(node))})" for node in nodes if self._is_random(node)]

    def graph(self) -> Graph:
        """See TrainedProgram."""
        graph = self.model.graph
        computing = [node for node in graph.node if node.op_type != "Constant"]
        operations = [Operation(node.op_type, reads(node), writes(node)) for node in computing]
        inputs = [value.name for value in onnx_graph.inputs(graph)]
        return Graph(inputs, [value.name for value in graph.output], operations)

    def lookups(self) -> list[Lookup]:
        """See TrainedProgram."""
        return [found.lookup for found in self._found]

    def ids(self, lookup: Lookup) -> Ids:
        """What a lookup without obstacle reads."""
        found = next(found for found in self._found if found.lookup.name == lookup.name)
        assert found.origin is not None, "a lookup with an obstacle"
        origin = found.origin
        return Ids(found.reads, origin.inputs, added=origin.added, is_sum=found.is_sum, outside=origin.outside)

    def check_inputs(self, names: Sequence[str], readers: Mapping[str, Sequence[str]]) -> None:
        """See FileProgram."""
        self._finder.check_inputs(names, readers)

    def dims(self, name: str) -> list[int | str]:
        """The dims of an input as the program names them: programs give equal sizes equal names."""
        return dims_of(self._values[name])

    def lod_level(self, name: str) -> int:
        """Levels of raggedness of an input or output: 0, none."""
        return 0

    def alike(self) -> list[list[str]]:
        """Groups of ragged inputs that go together: none."""
        return []

    def holds(self, table: str) -> bool:
        """Whether the program stores a table."""
        return table in self._finder.stored

    def stored_bytes(self) -> int:
        """Of the program's file, and of its tensors that lie in others."""
        return onnx_file.stored_bytes(self.model, self.path)

    def table(self, name: str) -> NDArray[Any]:
        """See TrainedProgram. One that is stored otherwise is computed into a temporary file."""
        table = next(found.table for found in self._found if found.table and found.table.name == name)
        stored = self._finder.stored
        constants = {c: onnx_file.elements(stored[c], self.path) for step in table.steps for c in step.constants}
        rows = onnx_file.elements(stored[name], self.path)
        return onnx_rows.computed(rows, stored[name].data_type, table.steps, constants)

    def cut(self, lookups: Sequence[Lookup]) -> "OnnxProgram":
        """See TrainedProgram."""
        found = {each.lookup.name: each for each in self._found}
        named = {dim for value in self.model.graph.input for dim in dims_of(value)}  # others are the inference's
        model, feeds = ModelProto(), {}
        model.CopyFrom(self.model)
        for lookup in lookups:
            table, cast_back = found[lookup.name].table, found[lookup.name].cast_back
            assert table is not None, "a lookup with an obstacle is not cut"
            dims = [
                dim if isinstance(dim, int) or dim in named else None for dim in self.dims(found[lookup.name].reads)
            ]
            feeds[lookup.feed] = helper.make_tensor_value_info(lookup.feed, table.kind, [*dims, lookup.dim])
            if cast_back:
                at = next(at for at, node in enumerate(model.graph.node) if lookup.name in writes(node))
                model.graph.node[at].CopyFrom(helper.make_node("Cast", [lookup.feed], [lookup.name], to=cast_back))
        return self._with(onnx_graph.walked_back(model, model.graph.output, feeds))

    def serving(self, fetch: Sequence[str] = ()) -> "OnnxProgram":
        """What the outputs depend on: the program's own outputs, or instead the values in `fetch`.

        Raises BadData for an output that is not there.
        """
        targets = [self._value(name) for name in fetch] or list(self.model.graph.output)
        return self._with(onnx_graph.walked_back(self.model, targets, {}))

    def write(self, directory: Path) -> str:
        """See TrainedProgram. The file has the name it had."""
        onnx_file.write(self.model, self.path, directory / self.path.name)
        return self.path.name

    def _with(self, model: ModelProto) -> "OnnxProgram":
        _check(model, str(self.path))
        return replace(self, model=model)

    def _is_random(self, node: NodeProto) -> bool:
        """Whether an op computes something else in every run; dropout does in training, which its third input says."""
        if node.op_type != "Dropout":
            return node.op_type in _RANDOM
        mode = self._finder.stored.get(node.input[2]) if len(node.input) > 2 else None
        return mode is not None and bool(onnx_file.elements(mode, self.path).any())

    def _tensor(self, value: ValueInfoProto) -> Tensor:
        kind, place = value.type.WhichOneof("value") or "no type", f"{self.path} value {value.name!r}"
        if kind != "tensor_type":
            raise BadData(place, kind.removesuffix("_type"), f"a tensor of {', '.join(DATATYPES.values())}")
        element = value.type.tensor_type.elem_type
        if element not in DATATYPES:
            raise BadData(place, type_name(element), f"a tensor of {', '.join(DATATYPES.values())}")
        if not value.type.tensor_type.HasField("shape"):
            return Tensor(value.name, DATATYPES[element], [-1])
        return Tensor(value.name, DATATYPES[element], [dim if isinstance(dim, int) else -1 for dim in dims_of(value)])

    def _value(self, name: str) -> ValueInfoProto:
        """An output that --fetch names."""
        if name not in self._values or not self._values[name].type.tensor_type.elem_type:
            known = ", ".join(value.name for value in self.model.graph.output)
            raise BadData(f"{self.path} --fetch", repr(name), f"a value whose type is known, as the outputs: {known}")
        return self._values[name]

    @cached_property
    def _values(self) -> dict[str, ValueInfoProto]:
        """Type and shape of each value of the main graph, as far as they are known."""
        try:
            graph = shape_inference.infer_shapes(self.model, data_prop=True).graph
        except Exception:  # it raises whatever its parts raise; what the program itself says is enough then
            graph = self.model.graph
        return {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}

    @cached_property
    def _finder(self) -> Finder:
        return Finder(self.model, self._values)

    @cached_property
    def _found(self) -> list[Found]:
        return self._finder.lookups()


def load(place: Path) -> OnnxProgram:
    """The program in a file, or the only one in a directory. Raises BadData for whatever is not as the format says."""
    path = find_program(place)
    model = onnx_file.read(path)
    known = defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and not 1 <= opset.version <= known:
            expected = f"1 to {known}; a newer onnx package knows newer ones"
            raise BadData(f"{path} opset_import", f"opset {opset.version}", expected)
    if model.functions:
        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:  # it raises whatever its parts raise
            raise BadData(f"{path} functions", _first_line(error), "functions that can be inlined") from error
    _check(model, str(path))
    return OnnxProgram(model, path)


def find_program(place: Path) -> Path:
    """The one program file in a directory, or the file that is named; raises BadData."""
    if place.is_file():
        return place
    found = sorted(place.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise BadData(str(place), names, f"one ONNX program, *{SUFFIX}; of several, name the file")
    return found[0]


def _check(model: ModelProto, place: str) -> None:
    """Raise BadData for a model that is not valid ONNX."""
    try:
        onnx.checker.check_model(onnx_file.to_check(model))
    except Exception as error:  # ValidationError, and whatever the checker's parts raise
        raise BadData(place, f"no valid ONNX program ({_first_line(error)})", onnx_file.RECIPE) from error
    onnx_graph.check_names(model.graph, place)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
