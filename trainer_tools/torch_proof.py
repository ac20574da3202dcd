"""The proof of a pruned torch program: original against pruned + rows, both run by torch.

Inputs are made up so that lookups read what they may: ids within the table, repeated ones, padding, ids without a key,
empty bags. Which element of which input is read by which lookup is found by sending the elements' numbers through the
ops that arrange ids.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.export import ExportedProgram

from cube.errors import BadData
from trainer_tools import feeding
from trainer_tools.feeding import Bags, Pooling, Request
from trainer_tools.manifest import Manifest
from trainer_tools.programs import torch_export
from trainer_tools.programs.torch_export import TorchProgram
from trainer_tools.programs.torch_lookups import TorchLookup
from trainer_tools.proof import Expected, keys_of

Inputs = Mapping[str, torch.Tensor]  # of a program, by name

_IDS_PER_BAG = 1.5
_OTHER_SIZE = 5  # of dimensions that vary and count neither samples nor ids of bags
_SHARE = 0.1  # of ids that are repeated on purpose, of padding, of those without a key
_MOST_RUNS = 1000


class Keyed(NamedTuple):
    """A lookup that goes, and its name for each id: row i is kept under keys[i]. Ids beyond have no key."""

    found: TorchLookup
    keys: NDArray[np.uint64]


class Read(NamedTuple):
    """What a lookup reads in one run: whole numbers, or what stands for them."""

    ids: NDArray[Any]
    offsets: NDArray[Any] | None = None  # of bags
    weights: NDArray[Any] | None = None  # of bags that have some


class Original:
    """A trained program, run as it is, and what its lookups read."""

    def __init__(self, program: TorchProgram):
        self.program = program
        self.lookups = [found for found in program.found if not found.obstacle]
        self._run = torch_export.runnable(program.program)
        self._names = [tensor.name for tensor in program.inputs()]
        self._arranged = _arrangement(program.program, self.lookups)

    def run(self, inputs: Inputs) -> list[NDArray[Any]]:
        """The outputs. Raises BadData where the program does not take these inputs."""
        return self._computed(self._run, inputs)

    def arranged(self, inputs: Inputs) -> dict[str, Read]:
        """What the program arranges for each lookup, as it is. Raises BadData as `run` does."""
        values = iter(self._computed(self._arranged, inputs))
        return {
            found.name: Read(
                next(values), next(values) if found.offsets else None, next(values) if found.weights else None
            )
            for found in self.lookups
        }

    def _computed(self, module: torch.nn.Module, inputs: Inputs) -> list[NDArray[Any]]:
        try:
            with torch.inference_mode():
                return [output.numpy() for output in module(*(inputs[name] for name in self._names))]
        except Exception as error:  # torch raises whatever its ops raise
            found = f"inputs the program does not run on ({next(iter(str(error).splitlines()), '')[:200]})"
            raise BadData("proof", found, "a program that runs on ids within its tables; --verify 0") from error

    def reads(self, inputs: Inputs) -> dict[str, Read]:
        """What each lookup reads: of bags, flat, with the end of the last among the offsets."""
        reads = self.arranged(inputs)
        for found in self.lookups:
            ids, offsets, weights = reads[found.name]
            if offsets is not None:
                offsets = offsets if found.has_end else np.append(offsets, ids.size)
                kept = slice(0, int(offsets[-1]))
                reads[found.name] = Read(ids.ravel()[kept], offsets, None if weights is None else weights.ravel()[kept])
        return reads


def expected(original: Original, manifest: Manifest, cut: Sequence[Keyed], samples: int) -> list[Expected]:
    """What the original computes of about as many samples, random ones."""
    rng = np.random.default_rng(1)
    return [
        Expected(size, requested(original, manifest, cut, inputs, rng), original.run(inputs))
        for size, inputs in random_inputs(original, cut, samples)
    ]


def requested(
    original: Original, manifest: Manifest, cut: Sequence[Keyed], inputs: Inputs, rng: np.random.Generator
) -> Request:
    """The request that means what a program's inputs mean."""
    request: dict[str, NDArray[Any]] = {tensor.name: inputs[tensor.name].numpy() for tensor in manifest.inputs}
    reads = original.reads(inputs)
    for keyed, lookup in zip(cut, manifest.lookups, strict=True):
        read = reads[keyed.found.name]
        if lookup.keys not in request:  # lookups that share ids share keys, those that stand for none too
            request[lookup.keys] = lookup.asked(keys_of(read.ids, keyed.keys, rng))
        if lookup.lengths is not None and read.offsets is not None:
            request[lookup.lengths] = np.diff(read.offsets).reshape(-1, len(lookup.slots)).astype(np.int32)
        if lookup.weights is not None and read.weights is not None:
            request[lookup.weights] = read.weights
    return request


def runs(program: ExportedProgram) -> feeding.Run:
    """A pruned program as a function of arrays by name, which become what its inputs are.

    It raises BadData for arrays that the program does not take.
    """
    module, inputs = torch_export.runnable(program), torch_export.inputs_of(program)
    dtypes = {name: dtype for dtype, name in torch_export.DATATYPES.items()}

    def run(given: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        tensors = [torch.tensor(given[tensor.name]).to(dtypes[tensor.datatype]) for tensor in inputs]
        try:
            with torch.inference_mode():
                return [output.numpy() for output in module(*tensors)]
        except Exception as error:  # torch raises whatever its ops raise
            found = f"inputs that it does not run on ({next(iter(str(error).splitlines()), '')[:200]})"
            raise BadData("the pruned program", found, "such as the trained one takes") from error

    return run


def pool(bags: Bags, pooling: Pooling) -> NDArray[np.float32]:
    """By torch, over rows that are a table for the occasion."""
    pooled: NDArray[np.float32] = torch.nn.functional.embedding_bag(
        torch.arange(len(bags.rows)),
        torch.from_numpy(bags.rows),
        torch.from_numpy(bags.offsets),
        mode=pooling,
        include_last_offset=True,
        per_sample_weights=None if bags.weights is None else torch.from_numpy(bags.weights),
    ).numpy()
    return pooled


def random_inputs(original: Original, cut: Sequence[Keyed], samples: int) -> Iterator[tuple[int, Inputs]]:
    """Inputs of about as many samples in all, in several runs where the program takes a fixed number at once."""
    sizes = _sizes(original.program, samples)
    shapes = {
        tensor.name: [_evaluated(size, sizes) for size in original.program.nodes[tensor.name].meta["val"].shape]
        for tensor in original.program.inputs()
    }
    fixed = original.program.nodes[cut[0].found.ids].meta["val"].shape[0]
    each = next((size for symbol, size in sizes.items() if str(symbol) == original.program.samples), fixed)
    rng = np.random.default_rng(0)
    for _ in range(min(_MOST_RUNS, -(-samples // each))):
        yield each, _filled(original, {keyed.found.name: keyed.keys.size for keyed in cut}, shapes, rng)


def _sizes(program: TorchProgram, samples: int) -> dict[Any, int]:
    """A size for each symbol in the shapes of a program's inputs."""
    shapes = {tensor.name: program.nodes[tensor.name].meta["val"].shape for tensor in program.inputs()}
    bounds = program.program.range_constraints
    sizes: dict[Any, int] = {}

    def choose(symbol: Any, size: int) -> None:
        lower, upper = torch_export.limits(bounds.get(symbol))
        sizes[symbol] = min(max(size, lower, 1), upper or size)

    for shape in shapes.values():
        for size in shape:
            for symbol in [] if isinstance(size, int) else size.node.expr.free_symbols:
                choose(symbol, _OTHER_SIZE)
    counted = next((symbol for symbol in sizes if str(symbol) == program.samples), None)  # None: they are fixed
    if counted is not None:
        choose(counted, samples)
    for found in program.found:
        if found.offsets and not found.is_even and not found.obstacle:
            bags = _evaluated(program.nodes[found.offsets].meta["val"].shape[0], sizes)
            for symbol in (_symbol(shapes[name][-1]) for name in found.inputs):
                if symbol is not None and symbol != counted:
                    choose(symbol, round(_IDS_PER_BAG * bags))
    return sizes


def _symbol(size: Any) -> Any:
    """The symbol that a size is, if it is nothing else."""
    return None if isinstance(size, int) or not size.node.expr.is_symbol else size.node.expr


def _evaluated(size: Any, sizes: Mapping[Any, int]) -> int:
    return size if isinstance(size, int) else int(size.node.expr.subs(sizes))


def _arrangement(program: ExportedProgram, lookups: Sequence[TorchLookup]) -> Any:
    """What of a program arranges ids, offsets and weights, as a program of the same inputs that puts them out."""
    module = torch_export.graph_module(program)
    graph: fx.Graph = module.graph
    nodes = {node.name: node for node in graph.nodes}
    names = [name for found in lookups for name in (found.ids, found.offsets, found.weights) if name]
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(nodes[name] for name in names),)
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)  # ops that check or change something, too: elements' numbers are no elements
    module.recompile()
    return module


def _filled(
    original: Original, keys: Mapping[str, int], shapes: Mapping[str, list[int]], rng: np.random.Generator
) -> Inputs:
    """Values for every input. keys: how many ids of each lookup that goes have one."""
    inputs = original.program.inputs()
    counts = [int(np.prod(shapes[tensor.name], dtype=np.int64)) for tensor in inputs]
    starts = [0, *itertools.accumulate(counts)]
    whole = np.concatenate(
        [
            rng.random(count) if tensor.datatype.startswith("FP") else rng.integers(0, 2, count).astype(np.float64)
            for tensor, count in zip(inputs, counts, strict=True)
        ]
    )  # all elements of all inputs: ids are below 2**53
    elements = original.arranged(
        {
            tensor.name: torch.arange(start, start + count).reshape(shapes[tensor.name])
            for tensor, start, count in zip(inputs, starts, counts, strict=False)
        }
    )
    zeros = {tensor.name: torch.zeros(shapes[tensor.name], dtype=torch.int64) for tensor in inputs}
    _fill_ids(original, elements, original.arranged(zeros), keys, whole, rng)
    _fill_offsets(original, elements, whole, rng)
    dtypes = {name: dtype for dtype, name in torch_export.DATATYPES.items()}
    return {
        tensor.name: torch.from_numpy(whole[start : start + count])
        .reshape(shapes[tensor.name])
        .to(dtypes[tensor.datatype])
        for tensor, start, count in zip(inputs, starts, counts, strict=False)
    }


def _fill_ids(
    original: Original,
    elements: Mapping[str, Read],
    added: Mapping[str, Read],
    keys: Mapping[str, int],
    whole: NDArray[np.float64],
    rng: np.random.Generator,
) -> None:
    """Ids within every table they are read from: any, and a share each of the first, padding, those without a key.

    elements, added: what lookups read of the elements' numbers, and of zeros, which is what is added to ids.
    """
    least, most = np.zeros(whole.size, np.int64), np.full(whole.size, np.iinfo(np.int64).max)
    rows = {
        found.name: len(torch_export.parameter(original.program.program, found.table)) for found in original.lookups
    }
    reads = {}
    for found in original.lookups:
        more = added[found.name].ids.ravel()
        reads[found.name] = read, more = elements[found.name].ids.ravel() - more, more
        least[read] = np.maximum(least[read], -more)
        most[read] = np.minimum(most[read], rows[found.name] - more)
    least = np.minimum(least, most - 1)
    bounded = np.flatnonzero(most < np.iinfo(np.int64).max)
    whole[bounded] = rng.integers(least[bounded], most[bounded])
    for found in original.lookups:
        read, more = reads[found.name]
        ranges = [(0, 3), (keys.get(found.name, rows[found.name]), rows[found.name])]
        ranges += [] if found.padding is None else [(found.padding, found.padding + 1)]
        for low, high in ranges:
            is_some = rng.random(read.size) < _SHARE
            some = read[is_some]
            if low < high:
                ids = rng.integers(low, high, some.size) - more[is_some]
                whole[some] = np.clip(ids, least[some], most[some] - 1)


def _fill_offsets(
    original: Original, elements: Mapping[str, Read], whole: NDArray[np.float64], rng: np.random.Generator
) -> None:
    """Bags of any number of ids, none among them."""
    for found in original.lookups:
        ids, offsets, _ = elements[found.name]
        if offsets is not None and not found.is_even:
            bags = offsets.size - found.has_end
            sizes = np.bincount(rng.integers(0, bags, ids.size), minlength=bags)
            whole[offsets.ravel()] = np.concatenate([[0], np.cumsum(sizes)])[: offsets.size]
