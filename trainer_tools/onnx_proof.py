"""For the proof of a pruned ONNX program: what the original and the pruned one compute, by onnxruntime.

Both are run as their files stand: no rewriting of their graphs, one thread. Ids that the original arranges from several
inputs are taken from itself, cut off at them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from trainer_tools.feeding import Run
from trainer_tools.manifest import Manifest, Tensor
from trainer_tools.programs.onnx_ids import IDS_BEYOND
from trainer_tools.programs.onnx_program import OnnxProgram
from trainer_tools.programs.program import Outside
from trainer_tools.proof import Expected, request_of
from trainer_tools.prune_files import Cut, reads_of
from trainer_tools.scratch import scratch

_DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "INT8": "i1", "INT16": "i2",
    "INT32": "i4", "INT64": "i8", "FP16": "f2", "FP32": "f4", "FP64": "f8", "BYTES": "O",
}  # fmt: skip
_LARGE = 64 << 20  # bytes of a program's file from which on its tables are mapped
_UNKNOWN_SIZE = 4  # of dimensions, beyond the first, that the program leaves open


def expected(cut: Cut[OnnxProgram], said: Manifest, samples: int) -> list[Expected]:
    """What the original, as its file stands if that has all the outputs, computes of random samples.

    A program whose inputs have a fixed number of samples runs as often as it takes. Raises BadData where onnxruntime
    cannot run it.
    """
    return _computed(cut, said, *_batches(cut.trained, cut.program, samples))


def outside(cut: Cut[OnnxProgram], said: Manifest, samples: int) -> list[Expected]:
    """The same, where half of the ids are outside the tables, of lookups whose ops that go gave these a row."""
    found = [(lookup, cut.program.ids(lookup)) for lookup in cut.lookups]
    gave = {lookup: ids.outside for lookup, ids in found if ids.outside and ids.outside.read_zeros}
    kept = {name for lookup, ids in found if lookup not in gave for name in ids.inputs}
    strays = [(name, lookup) for lookup, ids in found for name in ids.inputs if name not in kept]
    if not strays:
        return []
    size, given = _batches(cut.trained, cut.program, samples)
    rng = np.random.default_rng(2)
    for name, lookup in strays:
        for batch in given:
            batch[name] = _strayed(batch[name], lookup.rows or 1, gave[lookup], rng)
    try:
        return _computed(cut, said, size, given)
    except BadData:  # what else reads these inputs does not take such ids
        return []


def _computed(cut: Cut[OnnxProgram], said: Manifest, size: int, given: list[dict[str, NDArray[Any]]]) -> list[Expected]:
    """What the original computes of these inputs, each of so many samples, and the requests for the same."""
    names = [tensor.name for tensor in cut.program.outputs()]
    has_all = {value.name for value in cut.trained.model.graph.output}.issuperset(names)
    original = _original(cut.trained) if has_all else _written(cut.program)
    try:
        outputs = _outputs(original, given, names)
    except BadData as error:
        if size > 1:
            _refuse_if_for_one(original, cut, names, error)
        raise
    reads = reads_of(cut)
    if arranged := sorted({name for name, _ in reads} - {tensor.name for tensor in cut.program.inputs()}):
        seen = _outputs(_written(cut.program.serving(arranged)), given, arranged)
        given = [batch | found for batch, found in zip(given, seen, strict=True)]
    rng = np.random.default_rng(1)
    return [
        Expected(size, request_of(said, reads, batch, size, rng), list(made.values()))
        for batch, made in zip(given, outputs, strict=True)
    ]


def runs(program: OnnxProgram, directory: Path) -> Run:
    """A pruned program, written in a directory, as a function of arrays by name, which become what its inputs are.

    Raises BadData where onnxruntime cannot run it.
    """
    session = _Session(directory / program.path.name)
    inputs, names = program.inputs(), [tensor.name for tensor in program.outputs()]

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
        return BadData(self._place, found, "a program it runs, on any number of samples; or --verify 0")


def _outputs(
    session: _Session, batches: Sequence[Mapping[str, NDArray[Any]]], names: list[str]
) -> list[dict[str, NDArray[Any]]]:
    """Of each batch, some values."""
    return [session.run(batch, names) for batch in batches]


def _refuse_if_for_one(original: _Session, cut: Cut[OnnxProgram], names: list[str], error: BadData) -> None:
    """Raise BadData if a program that cannot be run on several samples can be on one: exporters fix sizes unasked."""
    try:
        _outputs(original, _batches(cut.trained, cut.program, 1)[1], names)
    except BadData:
        return
    dims = {dim for tensor in cut.trained.inputs() for dim in cut.trained.dims(tensor.name)[:1] if isinstance(dim, str)}
    said = [f"--dim_param {dim} --dim_value 1" for dim in sorted(dims) if dim] or ["--input_name INPUT ..."]
    tool = "python -m onnxruntime.tools.make_dynamic_shape_fixed"  # which takes one name at a time
    recipe = " && ".join(f"{tool} {what} {'OUT' if at else 'IN'}.onnx OUT.onnx" for at, what in enumerate(said))
    found = f"a program that runs on one sample only, though its inputs say any number: {error.found}"
    raise BadData(error.place, found, f"one for any number, or whose inputs say 1: {recipe}") from error


def _original(program: OnnxProgram) -> _Session:
    """A program as its file stands; if that is large, onnxruntime would hold it twice to begin with."""
    if program.path.stat().st_size < _LARGE:
        return _Session(program.path)
    return _Session(program.path, program.model.SerializeToString())


def _written(program: OnnxProgram) -> _Session:
    """A program that is in no file as it stands."""
    with scratch() as directory:
        return _Session(directory / program.write(directory))


def _batches(program: OnnxProgram, serving: OnnxProgram, samples: int) -> tuple[int, list[dict[str, NDArray[Any]]]]:
    """How many samples a run is of, and random inputs for as many runs as make the samples.

    Ids within the tables, repeats, the first and the last among them; other integers 0 or 1; floats from 0 to 1.
    Dimensions of one name have one size: `samples` if it is the first of an input, else a few.
    """
    lookups, tensors, rng = serving.lookups(), program.inputs(), np.random.default_rng(0)
    # whatever reaches a lookup by ways we do not follow must be within its table too
    least = min([lookup.rows for lookup in lookups if lookup.obstacle and lookup.rows], default=1 << 31)
    sizes = {dim: samples for tensor in tensors for dim in program.dims(tensor.name)[:1] if isinstance(dim, str)}
    shapes = {}
    for tensor in tensors:
        shape = []
        for at, dim in enumerate(program.dims(tensor.name)):
            varies = sizes.get(str(dim), _UNKNOWN_SIZE) if at == 0 or dim else _UNKNOWN_SIZE
            shape.append(dim if isinstance(dim, int) else varies)
        shapes[tensor.name] = shape
    bounds: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    for lookup in lookups:
        ids = None if lookup.obstacle else serving.ids(lookup)
        for name in ids.inputs if ids else []:
            low, high = _bounds(lookup.rows or 1, ids.added if ids else (), shapes[name][1:])
            lowest, highest = bounds.get(name, (np.int64(0), np.int64(least)))
            bounds[name] = np.maximum(low, lowest), np.minimum(high, highest)
    size = max(1, min((shapes[name][0] for name in bounds if shapes[name]), default=1))
    return size, [
        {t.name: _random_array(t, shapes[t.name], bounds.get(t.name), rng) for t in tensors}
        for _ in range(0, samples, size)
    ]


def _strayed(ids: NDArray[Any], rows: int, outside: Outside, rng: np.random.Generator) -> NDArray[Any]:
    """The same ids, half of them below 0 or beyond a table of so many rows, as the program takes these."""
    below = -rng.integers(1, min(rows, IDS_BEYOND) + 1, ids.shape)
    beyond = rows + rng.integers(0, IDS_BEYOND, ids.shape)
    is_below = (rng.random(ids.shape) < 0.5) & outside.has_below if outside.has_beyond else np.ones(ids.shape, np.bool_)
    made = np.where(rng.random(ids.shape) < 0.5, ids, np.where(is_below, below, beyond))
    return np.minimum(made, np.iinfo(ids.dtype).max if ids.dtype.kind == "i" else 1 << 53).astype(ids.dtype)


def _bounds(rows: int, added: tuple[int, ...], inner: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first id and the end of those that are within a table once something is added, for each id of a sample."""
    more = np.array(added or (0,), np.int64)
    if more.size == np.prod(inner, dtype=np.int64):
        more = more.reshape(inner)
    elif more.size > 1:
        return np.maximum(0, -more.min()), rows - more.max()
    return np.maximum(0, -more), rows - more


def _random_array(
    tensor: Tensor,
    shape: list[int],
    bounds: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    rng: np.random.Generator,
) -> NDArray[Any]:
    if tensor.datatype not in _DTYPES:
        raise BadData(f"proof, input {tensor.name}", tensor.datatype, f"{', '.join(_DTYPES)}; or --verify 0")
    dtype = np.dtype(_DTYPES[tensor.datatype])
    if tensor.datatype == "BYTES":
        return rng.integers(0, 10, shape).astype(str).astype(object)
    if bounds is None and dtype.kind == "f":
        return rng.random(shape).astype(dtype)
    low, high = bounds or (np.int64(0), np.int64(2))
    if dtype.kind in "iu" and np.iinfo(dtype).max < np.iinfo(np.int64).max:
        high = np.minimum(high, np.iinfo(dtype).max)
    values = rng.integers(low, high, shape)
    for edge in (low, high - 1):
        values = np.where(rng.random(shape) < 0.1, edge, values)
    return values.astype(dtype)
