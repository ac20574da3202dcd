"""The proof of a pruned ONNX program: original against pruned + rows, both run by onnxruntime.

Both are run as their files stand: no rewriting of their graphs, one thread. Ids that the original arranges from several
inputs are taken from itself, cut off at them.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.client import LocalCube
from cube.errors import BadData
from trainer_tools.feeding import Run
from trainer_tools.manifest import Tensor
from trainer_tools.programs.onnx_program import OnnxProgram
from trainer_tools.programs.program import Lookup
from trainer_tools.pruning import Difference, difference
from trainer_tools.tables import Table

_DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "INT8": "i1", "INT16": "i2",
    "INT32": "i4", "INT64": "i8", "FP16": "f2", "FP32": "f4", "FP64": "f8", "BYTES": "O",
}  # fmt: skip
_LARGE = 64 << 20  # bytes of a program's file from which on its tables are mapped
_UNKNOWN_SIZE = 4  # of dimensions, beyond the first, that the program leaves open


class Cut(NamedTuple):
    """A program cut in two."""

    program: OnnxProgram  # with its lookups
    pruned: OnnxProgram  # without
    lookups: Sequence[Lookup]  # that went
    tables: Mapping[str, Table]  # their tables, by parameter


def compare(original: OnnxProgram, cut: Cut, file: Path, cube: Path, samples: int) -> Difference:
    """Largest difference of any output on random samples, between a program as it was trained and what is left of it.

    original: as its file stands, if that has the outputs to compare. file: the pruned program, as it was written; cube:
    directory with its tables. A program whose inputs have a fixed number of samples runs as often as it takes. Raises
    BadData where onnxruntime cannot run one of them.
    """
    names = [tensor.name for tensor in cut.program.outputs()]
    has_all = {value.name for value in original.model.graph.output}.issuperset(names)
    given = list(_batches(original, cut.program, samples))
    # one after the other: the first maps or holds every table, and so does the cube
    before = _outputs(_original(original) if has_all else _written(cut.program), given, names)
    if arranged := sorted({lookup.ids for lookup in cut.lookups} - {tensor.name for tensor in cut.program.inputs()}):
        seen = _outputs(_written(cut.program.serving(arranged)), given, arranged)
        given = [batch | found for batch, found in zip(given, seen, strict=True)]
    rows, feeds = LocalCube(cube), {lookup.feed for lookup in cut.lookups}
    inputs = [tensor.name for tensor in cut.pruned.inputs() if tensor.name not in feeds]
    fed = [
        {name: batch[name] for name in inputs} | {k.feed: _rows(k, batch[k.ids], cut, rows) for k in cut.lookups}
        for batch in given
    ]
    worst = Difference()
    for one, other in zip(before, _outputs(_Session(file), fed, names), strict=True):
        for name in names:
            worst = worst.or_larger(difference(one[name], other[name]))
    return worst


def runs(program: OnnxProgram, file: Path) -> Run:
    """A pruned program, written to a file, as a function of arrays by name, which become what its inputs are."""
    session, inputs, names = _Session(file), program.inputs(), [tensor.name for tensor in program.outputs()]

    def run(given: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        feeds = {tensor.name: given[tensor.name].astype(_DTYPES[tensor.datatype]) for tensor in inputs}
        return list(session.run(feeds, names).values())

    return run


class _Session:
    """A program that onnxruntime runs as it stands."""

    def __init__(self, file: Path, without_tables: bytes | None = None):
        """without_tables: the same program, whose tables are references into the file, where they are mapped."""
        import onnxruntime  # an extra, for the proof only

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        self._place = f"proof, {file.name}"
        try:
            self._session: Any = onnxruntime.InferenceSession(
                without_tables or file, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors have no base of their own
            raise self._refused(error) from error
        self._inputs = {value.name for value in self._session.get_inputs()}

    def run(self, given: Mapping[str, NDArray[Any]], names: list[str]) -> dict[str, NDArray[Any]]:
        """The values of some outputs."""
        try:
            found = self._session.run(names, {name: array for name, array in given.items() if name in self._inputs})
        except Exception as error:
            raise self._refused(error) from error
        return dict(zip(names, map(np.asarray, found), strict=True))

    def _refused(self, error: Exception) -> BadData:
        found = f"onnxruntime could not run it ({next(iter(str(error).splitlines()), '')[:200]})"
        return BadData(self._place, found, "a program it runs; --verify 0 writes without proof")


def _outputs(
    session: _Session, batches: Sequence[Mapping[str, NDArray[Any]]], names: list[str]
) -> list[dict[str, NDArray[Any]]]:
    """Of each batch, some values."""
    return [session.run(batch, names) for batch in batches]


def _original(program: OnnxProgram) -> _Session:
    """A program as its file stands; if that is large, onnxruntime would hold it twice to begin with."""
    if program.path.stat().st_size < _LARGE:
        return _Session(program.path)
    return _Session(program.path, program.model.SerializeToString())


def _written(program: OnnxProgram) -> _Session:
    """A program that is in no file as it stands."""
    with tempfile.TemporaryDirectory(prefix="prune-program.") as scratch:
        return _Session(Path(scratch) / program.write(Path(scratch)))


def _rows(lookup: Lookup, ids: NDArray[Any], cut: Cut, cube: LocalCube) -> NDArray[Any]:
    """What a lookup answers, from the cube."""
    table = cut.tables[lookup.table]
    (feed,) = (tensor for tensor in cut.pruned.inputs() if tensor.name == lookup.feed)
    flat = ids.astype(np.int64).ravel()
    rows = cube.rows(table.name, None, table.keys[flat.clip(max=table.keys.size - 1)]).rows
    rows = np.where((flat < table.keys.size)[:, None], rows, 0)
    return rows.reshape(*ids.shape, lookup.dim).astype(_DTYPES[feed.datatype])


def _batches(program: OnnxProgram, serving: OnnxProgram, samples: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Random inputs, of as many batches as make the samples.

    Ids within the tables, repeats, the first and the last among them; other integers 0 or 1; floats from 0 to 1.
    Dimensions of one name have one size: `samples` if it is the first of an input, else a few.
    """
    lookups, tensors, rng = serving.lookups(), program.inputs(), np.random.default_rng(0)
    # whatever reaches a lookup by ways we do not follow must be within its table too
    least = min([lookup.rows for lookup in lookups if lookup.obstacle and lookup.rows], default=1 << 31)
    bound: dict[str, int] = {}
    for lookup in lookups:
        for name in [] if lookup.obstacle else serving.ids(lookup).inputs:
            bound[name] = min(bound.get(name, least), lookup.rows or 1)
    sizes = {dim: samples for tensor in tensors for dim in program.dims(tensor.name)[:1] if isinstance(dim, str)}
    shapes = {}
    for tensor in tensors:
        shape = []
        for at, dim in enumerate(program.dims(tensor.name)):
            varies = sizes.get(str(dim), _UNKNOWN_SIZE) if at == 0 or dim else _UNKNOWN_SIZE
            shape.append(dim if isinstance(dim, int) else varies)
        shapes[tensor.name] = shape
    at_once = min((shapes[name][0] for name in bound if shapes[name]), default=1)
    for _ in range(0, samples, max(1, at_once)):
        yield {t.name: _random_array(t, shapes[t.name], bound.get(t.name), rng) for t in tensors}


def _random_array(tensor: Tensor, shape: list[int], bound: int | None, rng: np.random.Generator) -> NDArray[Any]:
    if tensor.datatype not in _DTYPES:
        raise BadData(f"proof, input {tensor.name}", tensor.datatype, f"{', '.join(_DTYPES)}; or --verify 0")
    dtype = np.dtype(_DTYPES[tensor.datatype])
    if tensor.datatype == "BYTES":
        return rng.integers(0, 10, shape).astype(str).astype(object)
    if bound is None and dtype.kind == "f":
        return rng.random(shape).astype(dtype)
    most = bound or 2
    if dtype.kind in "iu":
        most = min(most, np.iinfo(dtype).max)
    values = rng.integers(0, most, shape)
    values[rng.random(shape) < 0.1] = 0
    values[rng.random(shape) < 0.1] = most - 1
    return values.astype(dtype)
