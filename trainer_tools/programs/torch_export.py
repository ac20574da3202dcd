"""torch.export programs (.pt2): read safely, describe, cut lookups out (torch_lookups finds them), write.

A .pt2 is a zip archive. torch's own loader unpickles parts of it when it finds them, so `load` looks first and
refuses every archive that holds a pickle beyond what torch.load(weights_only=True) accepts.
"""

import ast
import io
import json
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from numpy.typing import NDArray
from torch import fx
from torch.export import Dim, ExportedProgram

from cube.errors import BadData
from trainer_tools.graph_picture import Graph, Operation
from trainer_tools.manifest import Tensor
from trainer_tools.programs import servable, torch_lookups
from trainer_tools.programs.program import Lookup
from trainer_tools.programs.torch_lookups import TorchLookup, arguments, op_of

DATATYPES = {
    torch.bool: "BOOL", torch.uint8: "UINT8", torch.int8: "INT8", torch.int16: "INT16", torch.int32: "INT32",
    torch.int64: "INT64", torch.float16: "FP16", torch.float32: "FP32", torch.float64: "FP64",
}  # fmt: skip
_KNOWN_PARTS = (
    "archive_format", "archive_version", "byteorder", ".data/*", "extra/*", "models/*.json", "data/sample_inputs/*.pt",
    "data/weights/weight_*", "data/weights/*_config.json", "data/constants/tensor_*", "data/constants/*_config.json",
)  # fmt: skip
_ARITHMETIC = (
    ast.Expression, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.operator, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*")
_RECIPE = "a torch.export archive: torch.export.save(torch.export.export(model, example_inputs), 'program.pt2')"


PROGRAM_FILE = "program.pt2"


@dataclass(frozen=True)
class TorchProgram:
    """A program as prune-program sees it. See TrainedProgram."""

    program: ExportedProgram
    format: str = "torch.export"

    def inputs(self) -> list[Tensor]:
        """See TrainedProgram."""
        return inputs_of(self.program)

    def outputs(self) -> list[Tensor]:
        """See TrainedProgram."""
        return outputs_of(self.program)

    def ops(self) -> int:
        """See TrainedProgram."""
        return sum(node.op == "call_function" for node in self.program.graph.nodes)

    @cached_property
    def found(self) -> list[TorchLookup]:
        """The same lookups as below, with what torch says of them."""
        inputs = [node for node in self._module.graph.nodes if node.op == "placeholder"]
        examples, _ = _examples(inputs, self.program)
        zeros = {node.name: example for node, example in zip(inputs, examples, strict=True)}
        return [self._by_samples(found) for found in torch_lookups.find(self.program, self._module, zeros)]

    @cached_property
    def samples(self) -> str | None:
        """The size that counts samples, as `shape` names it; None: their number is fixed."""
        outputs = [_shape(node.meta["val"]) for node in self._outputs]
        return servable.counted_by([self.shape(tensor.name) for tensor in self.inputs()], outputs)

    def shape(self, name: str) -> servable.Shape:
        """Of a node's tensor, with what torch calls the sizes that vary."""
        return _shape(self.nodes[name].meta["val"])

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The nodes of the program's graph, to look at."""
        return {node.name: node for node in self._module.graph.nodes}

    def random_ops(self) -> list[str]:
        """See TrainedProgram. Those in branches and loops too."""
        parts = [part for part in self._module.modules() if isinstance(part, fx.GraphModule)]
        return [f"{op_of(node)} ({node.name})" for part in parts for node in part.graph.nodes if _is_random(node)]

    def graph(self) -> Graph:
        """See TrainedProgram. Values are named as the nodes that compute them."""
        nodes = list(self.nodes.values())
        operations = [
            Operation(op_of(node), [read.name for read in node.all_input_nodes], [node.name])
            for node in nodes
            if node.op == "call_function" and node.users  # a bag has results that nobody reads
        ]
        outputs = [read.name for node in nodes if node.op == "output" for read in node.all_input_nodes]
        return Graph([node.name for node in nodes if node.op == "placeholder"], outputs, operations)

    def lookups(self) -> list[Lookup]:
        """See TrainedProgram."""
        return [self._lookup(found) for found in self.found]

    def table(self, name: str) -> NDArray[Any]:
        """See TrainedProgram. bfloat16 becomes float32, which holds all of its numbers."""
        tensor = parameter(self.program, name).detach()
        array: NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
        return array

    def cut(self, lookups: Sequence[Lookup]) -> "TorchProgram":
        """See TrainedProgram."""
        outputs = {found.name: found.output for found in self.found}
        return TorchProgram(cut(self.program, {outputs[lookup.name]: lookup.feed for lookup in lookups}))

    def serving(self, fetch: Sequence[str]) -> "TorchProgram":
        """Only what some of the outputs depend on, traced anew. Raises BadData for an output that is not there."""
        names = [tensor.name for tensor in self.outputs()]
        for name in fetch:
            if name not in names:
                raise BadData("--fetch", repr(name), f"an output of the program: {', '.join(names)}")
        return TorchProgram(cut(self.program, {}, fetch))

    def write(self, directory: Path) -> str:
        """See TrainedProgram."""
        save(self.program, directory / PROGRAM_FILE)
        return PROGRAM_FILE

    @cached_property
    def _module(self) -> Any:
        return graph_module(self.program)

    @property
    def _outputs(self) -> list[fx.Node]:
        values: Any = self.nodes["output"].args[0]
        return list(values)

    def _by_samples(self, found: TorchLookup) -> TorchLookup:
        """With how many bags a sample has, or with an obstacle, where a predictor cannot tell samples apart."""
        if found.obstacle:
            return found
        for tensor, node in zip(self.outputs(), self._outputs, strict=True):
            if wrong := servable.output_obstacle(tensor.name, _shape(node.meta["val"]), self.samples):
                return found._replace(obstacle=wrong)
        recipe = f"export with dynamic_shapes={{{found.inputs[0]!r}: {{0: torch.export.Dim('samples')}}, ...}}"
        if found.pooling == "none":
            return found._replace(obstacle=servable.obstacle("its ids", self.shape(found.ids), self.samples, recipe))
        made = self.nodes[found.output].meta["val"]
        bags = made if isinstance(made, torch.Tensor) else made[0]  # of several results
        slots = torch_lookups.times(bags.shape[0], self.samples) if self.samples else None
        wrong = "" if slots else servable.obstacle("its bags", _shape(bags)[:1], self.samples or "samples", recipe)
        return found._replace(slots=slots, obstacle=wrong)

    def _lookup(self, found: TorchLookup) -> Lookup:
        feed = found.name if found.pooling == "none" else f"{found.name}_pooled"
        while feed in self.program.graph_signature.user_inputs:
            feed += "_rows"
        if not found.table:
            return Lookup(found.name, found.op, "", None, 0, found.called, feed, found.obstacle)
        rows, dim = (*parameter(self.program, found.table).shape, 0)[:2]
        return Lookup(found.name, found.op, found.table, rows, dim, found.called, feed, found.obstacle)


def load(path: Path) -> ExportedProgram:
    """Read a program without unpickling anything of it; raises BadData."""
    _refuse_unsafe(path)
    try:
        with path.open("rb") as file:  # opened by its name, it would be mapped as a whole beside what is read of it
            return torch.export.load(file)
    except Exception as error:  # torch raises whatever its parts raise
        raise BadData(
            str(path), f"an archive torch cannot read ({str(error).splitlines()[0][:200]})", _RECIPE
        ) from error


def save(program: ExportedProgram, path: Path) -> None:
    """Write a program, without the example inputs it was traced with; raises OSError."""
    program._example_inputs = None
    with _Archive(path, "wb") as archive:
        torch.export.save(program, archive)
        if archive.failed:
            raise archive.failed


class _Archive(io.FileIO):
    """A file for torch's archive writer, which ends the process where a write raises: the first error is kept."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while left and not self.failed:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                self.failed = error
        return len(data)


def is_stateful(program: ExportedProgram) -> bool:
    """Whether a run changes the program's parameters, buffers or inputs, so that the next run's answer depends on it.

    Of parameters only what max_norm does to them: it scales rows in place, and two runs at once scale them twice.
    """
    if any("embedding_renorm_" in str(node.target) for node in program.graph.nodes):
        return True
    if any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in program.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's of torch
            program = program.run_decompositions({})  # only without ops in place does a signature say what changes
    signature = program.graph_signature
    return bool(signature.buffers_to_mutate or signature.user_inputs_to_mutate)


def _is_random(node: fx.Node) -> bool:
    """Whether a node computes something else in every run, as dropout does unless it is off."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    return bool(given.get("train", given.get("training", True))) and given.get("dropout_p", 1) != 0


def inputs_of(program: ExportedProgram) -> list[Tensor]:
    """Name, datatype and shape of each input, in order. Raises BadData for an input that is no tensor."""
    names = program.graph_signature.user_inputs
    for name in names:
        if not isinstance(name, str):
            raise BadData("program inputs", f"the constant {name!r}", "tensors only")
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [_described(str(name), nodes[str(name)].meta.get("val"), f"input {name}") for name in names]


def outputs_of(program: ExportedProgram) -> list[Tensor]:
    """The same of each output; names are the keys of the dict the model returns, else output_0, output_1, ..."""
    (values,) = next(node for node in program.graph.nodes if node.op == "output").args
    values = values[-len(program.graph_signature.user_outputs) :]
    for value in values:
        if not isinstance(value, fx.Node):
            raise BadData("program outputs", f"the constant {value!r}", "tensors only")
    spec = program.call_spec.out_spec
    flat = (
        spec is not None and issubclass(spec.type or tuple, dict) and all(child.is_leaf() for child in spec.children())
    )
    names = list(spec.context) if spec is not None and flat else [f"output_{i}" for i in range(len(values))]
    return [_described(str(n), v.meta.get("val"), f"output {n}") for n, v in zip(names, values, strict=True)]


def runnable(program: ExportedProgram) -> torch.nn.Module:
    """The program as a module that takes its inputs by position and returns a tuple, with no per-call checks.

    Callers check shapes and datatypes; the checks torch would add cost more than a small net.
    """
    module = graph_module(program)
    module.recompile()
    return module  # type: ignore[no-any-return]


def graph_module(program: ExportedProgram) -> Any:
    """The program as a graph of its own, in which parameters are get_attr nodes; plain arguments, no checks."""
    module: Any = program.module(check_guards=False)
    module.graph.set_codegen(fx.graph.CodeGen())
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, name in zip(inputs, program.graph_signature.user_inputs, strict=True):
        if isinstance(name, str):
            node.name = node.target = name  # which torch changes where Python has a function of that name: `input`
    module._forward_pre_hooks.clear()  # the exporter's own check of every input's size
    return module


def cut(program: ExportedProgram, feeds: Mapping[str, str], fetch: Collection[str] = ()) -> ExportedProgram:
    """The program without some lookups and their tables.

    feeds: name of the node of each lookup's rows → name of the input that takes its place. fetch: names of the outputs
    that stay; all if empty. Inputs nobody reads any more go, the others keep their order, the new ones come last. The
    result is traced anew by torch.export, so torch itself has checked it. Raises BadData where torch does not trace it.
    """
    outputs = [tensor.name for tensor in outputs_of(program)]
    module = graph_module(program)
    graph: fx.Graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [n for n in graph.nodes if n.name in feeds]:
        rows = node.meta["val"]
        with graph.inserting_after(last):
            last = instead = graph.placeholder(feeds[node.name])
        last.meta["val"] = rows
        if rows.dtype is torch.bfloat16:  # numpy has none; float32 holds the same numbers
            last.meta["val"] = rows.float()
            with graph.inserting_before(node):
                instead = graph.call_function(torch.ops.aten.to.dtype, (last, torch.bfloat16))
        node.replace_all_uses_with(instead)
        _measure(graph, last)
    for node in [n for n in graph.nodes if op_of(n) == "_assert_tensor_metadata"]:
        graph.erase_node(node)  # it would keep what it looks at; tracing makes those that are needed anew
    output = next(node for node in graph.nodes if node.op == "output")
    values: Any = output.args[0]
    output.args = ({name: v for name, v in zip(outputs, values, strict=True) if not fetch or name in fetch},)
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
        graph.erase_node(node)
    module.delete_all_unused_submodules()
    whole = fx.GraphModule(module, graph)  # takes over only the parameters that the graph still names
    whole.eval()
    kept = [node for node in graph.nodes if node.op == "placeholder"]
    examples, dims = _examples(kept, program)
    try:
        return torch.export.export(whole, examples, dynamic_shapes=dims)
    except Exception as error:  # torch raises whatever its parts raise
        found = f"what torch does not trace ({next(iter(str(error).splitlines()), '')[:200]})"
        what = f"without {', '.join(feeds)}" if feeds else f"of {', '.join(fetch)}"
        raise BadData(f"the program {what}", found, "other lookups: --keep, --only; other outputs: --fetch") from error


def _measure(graph: fx.Graph, feed: fx.Node) -> None:
    """Take sizes that a feed has from it, so that ids are not needed to count samples."""
    axes = {str(size): axis for axis, size in enumerate(feed.meta["val"].shape) if not isinstance(size, int)}
    for node in [n for n in graph.nodes if op_of(n) == "sym_size" and str(n.meta["val"]) in axes]:
        with graph.inserting_before(node):
            size = graph.call_function(torch.ops.aten.sym_size.int, (feed, axes[str(node.meta["val"])]))
        size.meta["val"] = node.meta["val"]  # the next feed is measured too
        node.replace_all_uses_with(size)


def _examples(
    nodes: Sequence[fx.Node], program: ExportedProgram
) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace with, and which of their dimensions vary how: as the first export said."""
    symbols: dict[str, Any] = {}
    sizes: dict[Any, int] = {}

    def dim_of(size: Any) -> tuple[int, Any]:
        """An example of a size, and its Dim if it varies."""
        if isinstance(size, int):
            return size, None
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if str(symbol) not in symbols:
                bounds = program.range_constraints.get(symbol)
                lower, upper = limits(bounds)
                symbols[str(symbol)] = Dim(f"d{len(symbols)}", min=lower, max=upper)
                sizes[symbol] = min(max(lower, 3 + 2 * len(sizes)), upper or sys.maxsize)
        example = int(expression.subs(sizes))
        if expression.is_symbol:
            return example, symbols[str(expression)]
        if len(expression.free_symbols) == 1:
            (symbol,) = expression.free_symbols
            slope, start = expression.coeff(symbol), expression.subs({symbol: 0})
            if expression == slope * symbol + start and slope > 0:  # the only relation torch.export takes
                relation = symbols[str(symbol)] if slope == 1 else int(slope) * symbols[str(symbol)]
                return example, relation + int(start) if start else relation
        return example, Dim.AUTO

    examples, dims = [], []
    for node in nodes:
        value = node.meta["val"]
        pairs = [dim_of(size) for size in value.shape]
        examples.append(torch.zeros([size for size, _ in pairs], dtype=value.dtype))
        dims.append({axis: dim for axis, (_, dim) in enumerate(pairs) if dim is not None})
    return tuple(examples), tuple(dims)


def limits(bounds: Any) -> tuple[int, int | None]:
    """Smallest and largest value of a size, from torch's range for it or None; no largest: None."""
    if bounds is None:
        return 0, None
    return int(bounds.lower), int(bounds.upper) if bounds.upper.is_Integer else None


def parameter(program: ExportedProgram, name: str) -> torch.Tensor:
    """A parameter, buffer or constant."""
    tensors: dict[str, Any] = {**program.constants, **program.state_dict}
    tensor: torch.Tensor = tensors[name]
    return tensor


def _shape(value: torch.Tensor) -> servable.Shape:
    return tuple(size if isinstance(size, int) else _size_text(size) for size in value.shape)


def _size_text(size: torch.SymInt) -> str:
    """The name of a size, or how it is computed of others."""
    expression = size.node.expr
    names = sorted(map(str, expression.free_symbols))
    return next((name for name in names if torch_lookups.times(size, name) == 1), str(expression))


def _described(name: str, value: Any, place: str) -> Tensor:
    if not isinstance(value, torch.Tensor) or value.dtype not in DATATYPES:
        raise BadData(
            place, getattr(value, "dtype", type(value).__name__), f"a tensor of {', '.join(DATATYPES.values())}"
        )
    return Tensor(name, DATATYPES[value.dtype], [size if isinstance(size, int) else -1 for size in value.shape])


def _refuse_unsafe(path: Path) -> None:
    """Raise BadData unless the archive is one that torch.export.load reads without unpickling objects or running code.

    torch unpickles where an archive says so, and hands the expressions of sizes to sympy, which evaluates Python.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            roots = {PurePosixPath(name).parts[0] for name in names}
            if len(roots) != 1 or archive.read(f"{min(roots)}/archive_format") != b"pt2":
                raise BadData(str(path), "a zip archive of another kind (TorchScript, torch.save?)", _RECIPE)
            if len(set(names)) != len(names):
                raise BadData(str(path), "two parts of one name", "every name once: readers differ in which they take")
            for name in names:
                _refuse_unsafe_part(PurePosixPath(name).relative_to(min(roots)), archive, name, str(path))
    except FileNotFoundError as error:
        raise BadData(str(path), "no such file", _RECIPE) from error
    except KeyError as error:
        raise BadData(str(path), "a zip archive of another kind (TorchScript, torch.save?)", _RECIPE) from error
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, IndexError, NotImplementedError) as error:
        raise BadData(str(path), f"a file that is no zip archive ({error})", _RECIPE) from error


def _refuse_unsafe_part(part: PurePosixPath, archive: zipfile.ZipFile, name: str, path: str) -> None:
    place = f"{path} {part}"
    if part.match("data/weights/*.pt") or part.match("data/constants/*.pt"):
        raise BadData(place, "a pickle", "raw weights: save the program again with this torch")
    if not any(part.match(known) for known in _KNOWN_PARTS):
        raise BadData(place, "a part of another kind", f"one of {', '.join(_KNOWN_PARTS)}")
    if part.match("data/*/*_config.json"):
        for weight, entry in json.loads(archive.read(name)).get("config", {}).items():
            if entry.get("use_pickle") or not entry.get("path_name", "").startswith(("weight_", "tensor_")):
                raise BadData(f"{place} {weight}", "a pickle", "raw bytes of a contiguous CPU tensor")
    elif part.match("models/*.json"):
        model = json.loads(archive.read(name))
        for text in (*_expressions(model), *model.get("range_constraints", {})):
            if not _is_arithmetic(text):
                raise BadData(f"{place} expression", repr(text)[:100], "arithmetic of symbols and numbers")
    elif part.match("data/sample_inputs/*") and (raw := archive.read(name)):
        try:
            torch.load(io.BytesIO(raw), weights_only=True)
        except Exception as error:
            raise BadData(place, f"a pickle of objects ({type(error).__name__})", "tensors only") from error


def _expressions(node: Any) -> Iterator[str]:
    """Every size expression of a program's JSON."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr_str":
                yield str(value)
            else:
                yield from _expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _expressions(value)


def _is_arithmetic(text: str) -> bool:
    """Whether an expression only builds sympy terms: calls of capitalised names, numbers, plain names, operators."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in nodes:
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id[0].isupper()):
            return False
        if isinstance(node, ast.Name) and "__" in node.id:
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not _PLAIN_NAME.fullmatch(node.value):
            return False  # sympy would evaluate a string again
        if not isinstance(node, _ARITHMETIC):
            return False
    return True
