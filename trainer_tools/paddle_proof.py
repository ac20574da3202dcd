"""For the proof of a pruned Paddle program: what the original and the pruned one compute, by Paddle itself.

Paddle runs in a process of its own, under whatever Python has it. The original also puts out what its lookups read, so
that ids which it arranges from several inputs, and their LoD, need no second implementation here.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from trainer_tools import paddle_runner
from trainer_tools.feeding import Run, Sequences, offsets_of
from trainer_tools.manifest import Manifest
from trainer_tools.programs.paddle import PaddleProgram, padded
from trainer_tools.programs.program import Lookup
from trainer_tools.proof import Expected, request_of
from trainer_tools.prune_files import Cut, reads_of
from trainer_tools.scratch import scratch

_DTYPES = {
    "BOOL": "?", "UINT8": "u1", "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8", "FP16": "f2", "FP32": "f4",
    "FP64": "f8",
}  # fmt: skip
_TIMEOUT_S = 600
_MOST_IN_SEQUENCE = 3
_FIXED_RUNS = 4  # of a program of a fixed number of samples: each starts a Python
_UNKNOWN_SIZE = 4  # of dimensions, beyond the first, that the program leaves open


def expected(
    python: str, original: PaddleProgram, cut: Cut[PaddleProgram], said: Manifest, samples: int
) -> list[Expected]:
    """What a program, as it was trained, computes of random samples, in one run.

    One that takes so many samples every time is run a few times. original: as its file stands, if that names outputs.
    Raises BadData where Paddle cannot run it.
    """
    if not said.has_fixed_samples():
        return [_expected(python, original, cut, said, samples, 0)]
    size = next(tensor.shape[0] for tensor in original.inputs() if tensor.shape)
    return [_expected(python, original, cut, said, size, seed) for seed in range(_FIXED_RUNS)]


def _expected(
    python: str, original: PaddleProgram, cut: Cut[PaddleProgram], said: Manifest, samples: int, seed: int
) -> Expected:
    serving = cut.program
    given = _random_inputs(original, serving, samples, seed, joined=False)
    try:
        seen = _observed(python, serving, cut.lookups, given)
    except BadData:
        if not any(isinstance(value, Sequences) for value in given.values()):
            raise
        # some ops need sequences that go together in ways which the program does not show
        given = _random_inputs(original, serving, samples, seed, joined=True)
        seen = _observed(python, serving, cut.lookups, given)
    made = seen if original is serving else _run(python, original, original.path.parent, given)
    request = request_of(said, reads_of(cut), given | seen, samples, np.random.default_rng(1))
    return Expected(samples, request, [made[tensor.name] for tensor in serving.outputs()])


def runs(python: str, pruned: PaddleProgram, directory: Path) -> Run:
    """A pruned program, written in a directory, as a function of arrays by name, and Sequences of ragged ones.

    They become what its inputs are. Raises BadData where Paddle cannot run it.
    """
    dtypes = {tensor.name: _DTYPES[tensor.datatype] for tensor in pruned.inputs()}

    def run(given: Mapping[str, Any]) -> list[Any]:
        feeds = {name: _of_type(given[name], dtype) for name, dtype in dtypes.items()}
        return list(_run(python, pruned, directory, feeds).values())

    return run


def _observed(
    python: str, serving: PaddleProgram, lookups: Sequence[Lookup], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The outputs of a program, and what its lookups read."""
    outputs = [tensor.name for tensor in serving.outputs()]
    ids = dict.fromkeys(lookup.ids for lookup in lookups if lookup.ids not in outputs)
    program = serving.fetching(list(ids))
    with scratch() as directory:
        program.write(directory)
        return _run(python, program, directory, {t.name: given[t.name] for t in program.inputs()})


def _of_type(value: Any, dtype: str) -> Any:
    if isinstance(value, Sequences):
        return Sequences(value.values.astype(dtype), value.offsets)
    return value.astype(dtype)


def _random_inputs(
    program: PaddleProgram, serving: PaddleProgram, samples: int, seed: int, joined: bool
) -> dict[str, Any]:
    """Ids within the tables, repeats and padding among them; sequences of 0 to 3 (of 1 to 3 where Paddle needs it), as
    long in inputs that are joined; floats from 0 to 1.

    joined: sequences are 1 to 3 long, and as long in one input as in any other.
    """
    rng = np.random.default_rng(seed)
    bound: dict[str, int] = {}
    padding: dict[str, int] = {}
    lookups = serving.lookups()
    # whatever reaches a lookup by ways we do not follow must be within its table too
    least = min([lookup.rows for lookup in lookups if lookup.obstacle and lookup.rows], default=1 << 31)
    for lookup in lookups:
        for name in [] if lookup.obstacle else serving.ids(lookup).inputs:
            bound[name] = min(bound.get(name, least), lookup.rows or 1)
            padding[name] = serving.ids(lookup).padding or 0
    least_long = int(joined or not program.takes_empty())
    groups = {name: group[0] for group in program.alike() for name in group}
    offsets: dict[str, NDArray[np.int64]] = {}
    given: dict[str, Any] = {}
    for tensor in program.inputs():
        if tensor.datatype not in _DTYPES:
            raise BadData(f"proof, input {tensor.name}", tensor.datatype, f"{', '.join(_DTYPES)}; or --verify 0")
        shape = [size if size > 0 else _UNKNOWN_SIZE for size in tensor.shape]
        group = ""
        if program.lod_level(tensor.name):
            group = "all" if joined else groups.get(tensor.name, tensor.name)
            if group not in offsets:
                offsets[group] = offsets_of(rng.integers(least_long, _MOST_IN_SEQUENCE + 1, samples))
            shape[0] = int(offsets[group][-1])
        elif tensor.shape[:1] == [-1]:
            shape[0] = samples
        if tensor.datatype.startswith("FP"):
            values: NDArray[Any] = rng.random(shape)
        else:
            most = bound.get(tensor.name, 2)
            values = rng.integers(0, most, shape)
            values[rng.random(shape) < 0.1] = min(padding.get(tensor.name, 0), most - 1)
        made = values.astype(_DTYPES[tensor.datatype])
        given[tensor.name] = Sequences(made, offsets[group]) if group else made
    return given


def _run(python: str, program: PaddleProgram, place: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of one run by Paddle, given arrays, and Sequences of ragged ones, which it answers in too."""
    names = [tensor.name for tensor in program.outputs()]
    with scratch() as directory:
        lods = {name: [value.offsets.tolist()] for name, value in given.items() if isinstance(value, Sequences)}
        job = {
            "program": str(place / program.path.name if program.combined else place),
            "parameters": str(place / program.combined) if program.combined else None,
            "inputs": [{"name": name, "lod": lods.get(name, [])} for name in given],
            "outputs": names,
        }
        (directory / "job.json").write_text(json.dumps(job))
        for number, value in enumerate(given.values()):
            np.save(directory / f"in-{number}.npy", padded(*value) if isinstance(value, Sequences) else value)
        line = [python, paddle_runner.__file__, str(directory)]
        try:
            done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BadData(f"proof, {python}", error, "a Python with Paddle: --paddle PYTHON; or --verify 0") from error
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or [""]
            found = f"Paddle could not run {program.path.name} (exit {done.returncode}: {said[-1][:200]})"
            raise BadData("proof", found, "a program it runs; --verify 0 writes without proof")
        levels = json.loads((directory / "lods.json").read_text())
        arrays = [np.load(directory / f"out-{number}.npy") for number in range(len(names))]
        return {n: _made(array, lod) for n, array, lod in zip(names, arrays, levels, strict=True)}


def _made(array: NDArray[Any], lod: list[list[int]]) -> Any:
    """An output, without what it has for rows that no sequence owns. lod: offsets, level by level."""
    if not lod:
        return array
    offsets = np.array(lod[-1], np.int64)
    return Sequences(array[: offsets[-1]], offsets)
