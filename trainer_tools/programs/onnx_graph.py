"""Surgery on an ONNX graph: what an op reads and writes, and what outputs depend on.

Values are names. An op's body (of a loop or a branch) may read values of the graph around it; no value inside has the
name of one outside.
"""

from collections.abc import Mapping, Sequence

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer as Repeated
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from cube.errors import BadData
from trainer_tools.programs.onnx_file import inner_graphs

DATATYPES: dict[int, str] = {
    TensorProto.BOOL: "BOOL", TensorProto.UINT8: "UINT8", TensorProto.UINT16: "UINT16", TensorProto.UINT32: "UINT32",
    TensorProto.UINT64: "UINT64", TensorProto.INT8: "INT8", TensorProto.INT16: "INT16", TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64", TensorProto.FLOAT16: "FP16", TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT: "FP32",
    TensorProto.DOUBLE: "FP64", TensorProto.STRING: "BYTES",
}  # fmt: skip
_INITIALIZERS_ARE_INPUTS_BEFORE = 4  # ir_version: until then every initializer had to be among the inputs too


def type_name(kind: int) -> str:
    """FP32, INT64, ...; ONNX's own word for what KServe has none for."""
    if kind in DATATYPES:
        return DATATYPES[kind]
    return TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else f"type {kind}"


def dims_of(value: ValueInfoProto) -> list[int | str]:
    """A size, or the name of one that varies; "" if it has none."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]


def writes(node: NodeProto) -> list[str]:
    """The values an op writes."""
    return [name for name in node.output if name]


def reads(node: NodeProto) -> list[str]:
    """The values an op reads, those that its bodies read among them."""
    return [name for name in node.input if name] + [n for inner in inner_graphs(node) for n in _captured(inner)]


def initializers(graph: GraphProto) -> list[str]:
    """The values that a graph stores."""
    return [tensor.name for tensor in graph.initializer] + [s.values.name for s in graph.sparse_initializer]


def inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """What has to be given. An initializer that is listed as input too counts as what it is, a parameter."""
    stored = set(initializers(graph))
    return [value for value in graph.input if value.name not in stored]


def walked_back(
    model: ModelProto, targets: Sequence[ValueInfoProto], given: Mapping[str, ValueInfoProto]
) -> ModelProto:
    """What the targets depend on if the values in `given` are inputs: as few ops, initializers and inputs as will do.

    Inputs keep their order; given ones that were none before come last, in theirs.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph, needed = result.graph, {target.name for target in targets}
    for at in reversed(range(len(graph.node))):
        node = graph.node[at]
        if needed.isdisjoint(writes(node)) or not given.keys().isdisjoint(writes(node)):
            del graph.node[at]
        else:
            needed.update(reads(node))
    stored = set(initializers(graph)) & needed
    for at in reversed(range(len(graph.initializer))):
        if graph.initializer[at].name not in stored:
            del graph.initializer[at]
    for at in reversed(range(len(graph.sparse_initializer))):
        if graph.sparse_initializer[at].values.name not in stored:
            del graph.sparse_initializer[at]
    are_inputs_too = model.ir_version < _INITIALIZERS_ARE_INPUTS_BEFORE
    old, before = set(initializers(model.graph)), {value.name for value in model.graph.input}
    wanted = [v for v in model.graph.input if v.name in needed and (v.name not in old or are_inputs_too)]
    wanted += [value for name, value in given.items() if name in needed and name not in before]
    _replace(graph.input, wanted)
    _replace(graph.output, targets)
    outside = {value.name for value in (*graph.input, *graph.output)}
    there = {name for node in graph.node for name in writes(node)} | stored
    _replace(graph.value_info, [v for v in model.graph.value_info if v.name in there and v.name not in outside])
    for at in reversed(range(len(graph.quantization_annotation))):
        if graph.quantization_annotation[at].tensor_name not in there | outside:
            del graph.quantization_annotation[at]
    return result


def check_names(graph: GraphProto, place: str) -> None:
    """Raise BadData unless every value is written once, and before it is read."""
    known = {value.name for value in graph.input} | set(initializers(graph))
    for number, node in enumerate(graph.node):
        where = f"{place} op {number} ({node.op_type})"
        for name in reads(node):
            if name not in known:
                raise BadData(where, f"input {name!r}, which nothing before it writes", "values in the order of use")
        for name in writes(node):
            if name in known:
                raise BadData(where, f"output {name!r}, which is written before", "a value is written once")
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise BadData(f"{place} outputs", repr(value.name), "a value that the program computes")


def _captured(graph: GraphProto) -> list[str]:
    """The values of the graph around it that a body reads."""
    inside = {value.name for value in graph.input} | set(initializers(graph))
    found: dict[str, None] = {}
    for node in graph.node:
        found.update(dict.fromkeys(name for name in reads(node) if name not in inside))
        inside.update(writes(node))
    found.update(dict.fromkeys(value.name for value in graph.output if value.name not in inside))
    return list(found)


def _replace(target: "Repeated[ValueInfoProto]", values: Sequence[ValueInfoProto]) -> None:
    kept = [ValueInfoProto.FromString(value.SerializeToString()) for value in values]
    del target[:]
    target.extend(kept)
