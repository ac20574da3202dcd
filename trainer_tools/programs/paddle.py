"""Paddle programs (`__model__`, `NAME.pdmodel`, and their parameters): read, describe, find lookups, cut, write.

Paddle itself is not needed.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from trainer_tools.graph_picture import Graph, Operation
from trainer_tools.manifest import Tensor
from trainer_tools.pb.paddle_framework_pb2 import OpDesc, ProgramDesc, VarDesc, VarType
from trainer_tools.programs import paddle_desc, paddle_parameters, servable
from trainer_tools.programs.paddle_desc import arguments, reads, variables, writes
from trainer_tools.programs.paddle_parameters import Shape, Stored, type_name
from trainer_tools.programs.program import Ids, Lookup

MODEL_FILES = ("__model__", "model")  # names where it is not NAME.pdmodel
_COMBINED = ("__params__", "params", "__model__.pdiparams")  # names of combined parameters beside a __model__
_DATATYPES: dict[int, str] = {
    VarType.BOOL: "BOOL", VarType.UINT8: "UINT8", VarType.INT8: "INT8", VarType.INT16: "INT16", VarType.INT32: "INT32",
    VarType.INT64: "INT64", VarType.FP16: "FP16", VarType.BF16: "BF16", VarType.FP32: "FP32", VarType.FP64: "FP64",
}  # fmt: skip
_SAMPLES = "samples"  # Paddle names no dimensions
_RECIPE = "save it with -1 (None) for the first dimension"
_LOOKUPS = ("lookup_table", "lookup_table_v2", "distributed_lookup_table")
_OTHER_LOOKUPS = {
    "c_embedding": "its table is a part of one that is split over trainers",
    "fused_embedding_eltwise_layernorm": "lookup and layer norm are one op",
    "fused_embedding_seq_pool": "lookup and pooling are one op",
    "lookup_table_dequant": "its rows are quantised in a way of the program's own",
    "pull_box_sparse": "it names no table",
    "pull_gpups_sparse": "it names no table",
    "pull_sparse": "it names no table",
    "pull_sparse_v2": "it names no table",
}
# Ops that compute with memory of nobody's where a sequence is empty, which spoils the others' answers too.
_NO_EMPTY = {
    "attention_lstm", "fused_embedding_fc_lstm", "fusion_gru", "fusion_lstm", "gru", "lstm", "lstmp", "multi_gru",
}  # fmt: skip
_RANDOM = {
    "bernoulli", "gaussian_random", "gaussian_random_batch_size_like", "multinomial", "randint", "randperm",
    "sampling_id", "truncated_gaussian_random", "uniform_random", "uniform_random_batch_size_like",
}  # fmt: skip
# Ops that only move ids about: what comes out is ids that a request can hold as they are.
_REARRANGE = {
    "assign", "cast", "concat", "flatten", "flatten2", "flatten_contiguous_range", "reshape", "reshape2", "slice",
    "split", "squeeze", "squeeze2", "stack", "strided_slice", "transpose", "transpose2", "unsqueeze", "unsqueeze2",
}  # fmt: skip


@dataclass(frozen=True)
class PaddleProgram:
    """A program, and where its parameters lie. See TrainedProgram."""

    desc: ProgramDesc
    path: Path  # of the file it was read from
    combined: str | None  # name of the parameters' file; None: a file each
    parameters: Mapping[str, Stored]
    format: Literal["paddle"] = "paddle"

    def inputs(self) -> list[Tensor]:
        """See TrainedProgram. The first dimension of a ragged input counts ids, not samples."""
        return [self._tensor(name) for name in paddle_desc.fed(self.desc)]

    def outputs(self) -> list[Tensor]:
        """See TrainedProgram."""
        return [self._tensor(name) for name in paddle_desc.fetched(self.desc)]

    def ops(self) -> int:
        """See TrainedProgram. Without feed and fetch ops."""
        return sum(op.type not in ("feed", "fetch") for block in self.desc.blocks for op in block.ops)

    def random_ops(self) -> list[str]:
        """See TrainedProgram. Those of all blocks."""
        ops = (op for block in self.desc.blocks for op in block.ops)
        return [f"{op.type} ({', '.join(writes(op)[:1])})" for op in ops if _is_random(op)]

    def graph(self) -> Graph:
        """See TrainedProgram."""
        ops = [op for op in self.desc.blocks[0].ops if op.type not in ("feed", "fetch")]
        operations = [Operation(op.type, reads(op), writes(op)) for op in ops]
        return Graph(paddle_desc.fed(self.desc), paddle_desc.fetched(self.desc), operations)

    def lookups(self) -> list[Lookup]:
        """See TrainedProgram."""
        found: list[Lookup] = []
        for block in self.desc.blocks:
            for op in block.ops:
                if op.type in _LOOKUPS:
                    found += [self._lookup(op, ids, out, block.idx) for ids, out in _pairs(op)]
                elif op.type in _OTHER_LOOKUPS:
                    out = next(iter(writes(op)), op.type)
                    table = next(iter(arguments(op.inputs, "W")), "")
                    found.append(Lookup(out, op.type, table, None, 0, "", out, _OTHER_LOOKUPS[op.type]))
        return self._one_padding_each(found)

    def ids(self, lookup: Lookup) -> Ids:
        """What a lookup without obstacle reads."""
        inputs, _ = self._origins(lookup.ids)
        padding = next((a.l for a in self._op(lookup).attrs if a.name == "padding_idx"), -1)
        return Ids(lookup.ids, inputs, padding if padding >= 0 else None, has_lengths=True)

    def lod_level(self, name: str) -> int:
        """Levels of raggedness of a variable; 0: none."""
        return self._known[name].type.dense_tensor.lod_level

    def alike(self) -> list[list[str]]:
        """Groups of ragged inputs of which a sample has to have as much in each as in any other."""
        return paddle_desc.alike(self.desc)

    def takes_empty(self) -> bool:
        """Whether a sequence may be empty; see _NO_EMPTY."""
        return all(op.type not in _NO_EMPTY for block in self.desc.blocks for op in block.ops)

    def check_inputs(self, names: Sequence[str], readers: Mapping[str, Sequence[str]]) -> None:
        """See FileProgram."""
        for name in names:
            servable.check_input(name, self._shape(name), self._samples, readers.get(name, ()))
            if self.lod_level(name) > 1:
                place, found = f"{self.path} variable {name!r}", "sequences of sequences (LoD level 2 or more)"
                raise BadData(place, found, "sequences (LoD level 1) at most, which is what is served")

    def holds(self, table: str) -> bool:
        """Whether the program stores a table."""
        return table in self.parameters

    def stored_bytes(self) -> int:
        """Of the program's file and its parameters."""
        return self.path.stat().st_size + sum(stored.end - stored.start for stored in self.parameters.values())

    def table(self, name: str) -> NDArray[Any]:
        """See TrainedProgram."""
        return self.parameters[name].array()

    def cut(self, lookups: Sequence[Lookup]) -> "PaddleProgram":
        """See TrainedProgram."""
        desc, names = ProgramDesc(), {lookup.name for lookup in lookups}
        desc.CopyFrom(self.desc)
        known = variables(desc)
        for lookup in lookups:
            ids, var = known[lookup.ids].type.dense_tensor, known[lookup.name]
            dims = ids.tensor.dims[:-1] if _drops_last_dimension(self._op(lookup)) else ids.tensor.dims
            var.need_check_feed, var.stop_gradient, var.persistable = True, True, False
            var.type.type = VarType.DENSE_TENSOR
            var.type.dense_tensor.lod_level = ids.lod_level
            var.type.dense_tensor.tensor.data_type = self._table_shape(lookup.table, lookup.name).dtype
            var.type.dense_tensor.tensor.dims[:] = [*dims, lookup.dim]
        for at in reversed(range(len(desc.blocks[0].ops))):
            op = desc.blocks[0].ops[at]
            if op.type in _LOOKUPS and not names.isdisjoint(writes(op)) and not _keep_pairs(op, names):
                del desc.blocks[0].ops[at]
        return self._with(paddle_desc.walked_back(desc, paddle_desc.fetched(desc), str(self.path)))

    def serving(self, fetch: Sequence[str] = ()) -> "PaddleProgram":
        """What the outputs depend on: the program's own outputs, or instead the variables in `fetch`.

        Raises BadData for an output that is not there, and for a parameter that is missing.
        """
        targets = list(fetch) or paddle_desc.fetched(self.desc)
        result = self._with(paddle_desc.walked_back(self.desc, targets, str(self.path)))
        for name, shape in _declared(result.desc).items():
            if name not in self.parameters and name not in _remote_tables(self.desc):
                expected = f"the file of parameter {name!r}, {shape}"
                raise BadData(f"{self.path.parent}/{name}", "no such file", expected)
        return result

    def fetching(self, names: Sequence[str]) -> "PaddleProgram":
        """The same program with further outputs after its own."""
        targets = [*paddle_desc.fetched(self.desc), *names]
        return self._with(paddle_desc.walked_back(self.desc, targets, str(self.path)))

    def write(self, directory: Path) -> str:
        """See TrainedProgram. Files have the names they had."""
        (directory / self.path.name).write_bytes(self.desc.SerializeToString())
        if self.combined:
            ordered = [self.parameters[name] for name in sorted(self.parameters)]
            paddle_parameters.write_combined(ordered, directory / self.combined)
        else:
            paddle_parameters.write_separate(self.parameters, directory)
        return self.path.name

    def _with(self, desc: ProgramDesc) -> "PaddleProgram":
        paddle_desc.check(desc, str(self.path))
        kept = {name: self.parameters[name] for name in _declared(desc) if name in self.parameters}
        return replace(self, desc=desc, parameters=kept)

    def _tensor(self, name: str) -> Tensor:
        tensor = self._known[name].type.dense_tensor.tensor
        if tensor.data_type not in _DATATYPES:
            found = type_name(tensor.data_type)
            raise BadData(f"{self.path} variable {name!r}", found, f"one of {', '.join(_DATATYPES.values())}")
        return Tensor(name, _DATATYPES[tensor.data_type], list(tensor.dims))

    @cached_property
    def _known(self) -> dict[str, VarDesc]:
        return variables(self.desc)

    @cached_property
    def _writers(self) -> dict[str, list[OpDesc]]:
        """The ops that write each variable, in any block."""
        found: dict[str, list[OpDesc]] = {}
        for op in (op for block in self.desc.blocks for op in block.ops):
            for name in writes(op):
                found.setdefault(name, []).append(op)
        return found

    def _op(self, lookup: Lookup) -> OpDesc:
        return self._writers[lookup.name][0]

    def _lookup(self, op: OpDesc, ids: str, out: str, block: int) -> Lookup:
        table = next(iter(arguments(op.inputs, "W")), "")
        shape = self._table_shape(table, out)
        rows = shape.dims[0] if table in self.parameters and shape.dims else None
        if block:
            obstacle = f"it is inside a loop or a branch, block {block}"
        elif len(self._writers[out]) > 1:
            obstacle = f"{len(self._writers[out])} ops write its output"
        else:
            obstacle = self._obstacle(table, shape, ids)
        return Lookup(out, op.type, table, rows, shape.dims[-1] if shape.dims else 0, ids, out, obstacle)

    def _table_shape(self, table: str, out: str) -> Shape:
        """Of the rows as stored; if they are not here, what the program says of them."""
        if table in self.parameters:
            return self.parameters[table].shape
        declared = self._known.get(out)
        tensor = declared.type.dense_tensor.tensor if declared else VarType.TensorDesc()
        return Shape(tensor.data_type, (-1, *list(tensor.dims)[-1:]))

    def _obstacle(self, table: str, shape: Shape, ids: str) -> str:
        """Why a lookup of block 0 cannot be cut."""
        var = self._known.get(table)
        writers = [op.type for op in self._writers.get(table, []) if op.type != "feed"]
        if writers:
            return f"its table is computed by op {writers[0]}"
        if var is None or not var.persistable:
            return "its table is no parameter"
        if len(shape.dims) != 2 or shape.dims[1] < 1:
            return f"its table has shape {list(shape.dims)}, not [rows, elements]"
        if shape.dtype not in (VarType.FP32, VarType.FP16):
            return f"its rows are {type_name(shape.dtype)}; a cube's are float32"
        return self._origins(ids)[1] or self._not_by_samples(ids)

    def _not_by_samples(self, ids: str) -> str:
        """Why a predictor cannot tell the ids of samples apart, or outputs."""
        for name in [*paddle_desc.fetched(self.desc), ids]:
            if self.lod_level(name) > 1:
                return f"{name} holds sequences of sequences (LoD level 2 or more)"
        for name in paddle_desc.fetched(self.desc):
            if wrong := servable.output_obstacle(name, self._shape(name), self._samples):
                return wrong
        return servable.obstacle("its ids", self._shape(ids), self._samples, _RECIPE)

    @property
    def _samples(self) -> str | None:
        """What counts samples; None: their number is fixed."""
        ends = [tensor.name for tensor in self.inputs()], paddle_desc.fetched(self.desc)
        return servable.counted_by(*([self._shape(name) for name in names] for names in ends))

    def _shape(self, name: str) -> servable.Shape:
        """Of a variable, whose first dimension counts samples if it varies."""
        dims = self._known[name].type.dense_tensor.tensor.dims
        return [dim if dim >= 0 else "?" if at else _SAMPLES for at, dim in enumerate(dims)]

    def _origins(self, ids: str) -> tuple[list[str], str]:
        """The program's inputs that ids are arranged from, or why they are no ids of a request."""
        inputs: list[str] = []
        todo, seen = [ids], set[str]()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            writers = self._writers.get(name, [])
            if not writers:
                return [], f"its ids are constants, {name}"
            if len(writers) > 1 or writers[0].type not in _REARRANGE | {"feed"}:
                return [], f"its ids are computed by op {writers[-1].type} ({name})"
            if writers[0].type == "feed":
                inputs.append(name)
            elif mixed := self._mixes_samples(writers[0], name):
                return [], mixed
            else:
                todo += reversed(reads(writers[0]))
        return inputs, ""

    def _mixes_samples(self, op: OpDesc, made: str) -> str:
        """Why samples do not come one after another in what an op that moves ids about has made; empty if they do."""
        attributes = {attr.name: attr for attr in op.attrs}
        if op.type.startswith("transpose") and list(attributes["axis"].ints)[:1] not in ([], [0]):
            return f"its ids are transposed, so that samples do not come first ({made})"
        if op.type in ("concat", "stack", "split") and (axis := attributes.get("axis")) is not None and axis.i == 0:
            return f"its ids are put together by {op.type} along samples ({made})"
        if op.type in ("reshape", "reshape2", "flatten", "flatten2", "flatten_contiguous_range"):
            given = next(iter(arguments(op.inputs, "X")), made)
            if not self.lod_level(given) and self._each(given) != self._each(made):
                return f"its ids are flattened by {op.type}: {self._each(given)} of a sample become {self._each(made)}"
        return ""

    def _each(self, name: str) -> int:
        """Elements for each entry of a variable's first dimension; negative if that varies."""
        return math.prod(list(self._known[name].type.dense_tensor.tensor.dims)[1:])

    def _one_padding_each(self, lookups: list[Lookup]) -> list[Lookup]:
        """Padding is zeros in the rows, so lookups that disagree about a table's padding cannot share its rows."""
        first: dict[str, int | None] = {}
        result = []
        for lookup in lookups:
            if not lookup.obstacle:
                padding = self.ids(lookup).padding
                if first.setdefault(lookup.table, padding) != padding:
                    reason = f"its padding id is {padding}, that of another lookup of its table {first[lookup.table]}"
                    lookup = lookup._replace(obstacle=reason)
            result.append(lookup)
        return result


def load(directory: Path) -> PaddleProgram:
    """The program in a directory, or in the file that is named, as it stands, with its parameters.

    Some of these may be missing if each has a file. Raises BadData for whatever is not as the format says.
    """
    path = find_program(directory)
    desc = paddle_desc.parse(path.read_bytes(), str(path))
    for op in (op for block in desc.blocks for op in block.ops if op.type in _LOOKUPS):
        ids, outs = arguments(op.inputs, "Ids"), _outs(op)
        if not ids or len(ids) != len(outs):
            raise BadData(f"{path} op {op.type}", f"ids {ids} and outputs {outs}", "as many of the one as of the other")
    declared, remote = _declared(desc), _remote_tables(desc)
    combined = _combined_file(path, set(declared) - remote)
    if combined:
        every = {name: shape for name, shape in declared.items() if shape.dims or name not in remote}
        stored = paddle_parameters.find_combined(combined, every)
    else:
        stored = paddle_parameters.find_separate(path.parent, declared)
    return PaddleProgram(desc, path, combined.name if combined else None, stored)


def padded(values: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[Any]:
    """As many values as there are sequences, at least one, with rows of zeros at the end that no sequence owns.

    Paddle refuses to pool fewer, and divides by their number. An empty sequence is an empty sequence all the same.
    """
    missing = max(offsets.size - 1, 1) - len(values)
    if missing <= 0:
        return values
    return np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])


def find_program(directory: Path) -> Path:
    """The one program file in a directory, or the file that is named; raises BadData."""
    if directory.is_file():
        return directory
    found = [directory / name for name in MODEL_FILES if (directory / name).is_file()]
    found += sorted(directory.glob("*.pdmodel"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise BadData(str(directory), names, f"one Paddle program: {', '.join(MODEL_FILES)} or NAME.pdmodel")
    return found[0]


def _combined_file(program: Path, needed: Collection[str]) -> Path | None:
    """Where the parameters lie together; None if each has a file of its own."""
    usual = _COMBINED if program.name in MODEL_FILES else (f"{program.stem}.pdiparams",)
    files = {path.name: path for path in program.parent.iterdir() if path.is_file() and path != program}
    for name in usual:
        if name in files and name not in needed:
            return files[name]
    if not needed or any(name in files or "/" in name for name in needed):
        return None
    if len(files) == 1:
        return next(iter(files.values()))
    expected = f"the parameters: {usual[0]}, or a file each: {', '.join(sorted(needed))}"
    raise BadData(str(program.parent), ", ".join(sorted(files)) or "no other file", expected)


def _declared(desc: ProgramDesc) -> dict[str, Shape]:
    """The parameters a program names."""
    return {
        var.name: Shape(var.type.dense_tensor.tensor.data_type, tuple(var.type.dense_tensor.tensor.dims))
        for var in desc.blocks[0].vars
        if var.persistable and var.type.type == VarType.DENSE_TENSOR
    }


def _remote_tables(desc: ProgramDesc) -> set[str]:
    """Tables that may be on a parameter server and not among the program's files."""
    return {
        name
        for op in (op for block in desc.blocks for op in block.ops if op.type in _LOOKUPS)
        for name in arguments(op.inputs, "W")
        if op.type == "distributed_lookup_table" or any(a.name == "is_distributed" and a.b for a in op.attrs)
    } & set(_declared(desc))


def _is_random(op: OpDesc) -> bool:
    """Whether an op computes something else in every run, as dropout does in training."""
    if op.type == "dropout":
        return not any(attr.name == "is_test" and attr.b for attr in op.attrs)
    return op.type in _RANDOM


def _outs(op: OpDesc) -> list[str]:
    return arguments(op.outputs, "Outputs" if op.type == "distributed_lookup_table" else "Out")


def _pairs(op: OpDesc) -> list[tuple[str, str]]:
    """Ids and output of each lookup that an op does."""
    return list(zip(arguments(op.inputs, "Ids"), _outs(op), strict=True))


def _keep_pairs(op: OpDesc, gone: set[str]) -> bool:
    """Take lookups out of an op that does several; whether any is left."""
    left = [(ids, out) for ids, out in _pairs(op) if out not in gone]
    for slot in (*op.inputs, *op.outputs):
        if slot.parameter in ("Ids", "Out", "Outputs"):
            slot.arguments[:] = [pair[slot.parameter != "Ids"] for pair in left]
    return bool(left)


def _drops_last_dimension(op: OpDesc) -> bool:
    """Whether ids [..., 1] become rows [..., dim] and not [..., 1, dim]."""
    if op.type == "distributed_lookup_table":
        return all(attr.s != b"lookup_table_v2" for attr in op.attrs if attr.name == "lookup_table_version")
    return op.type == "lookup_table"
