"""The proof of a pruned Paddle program: original against pruned + rows, both run by Paddle itself.

Paddle runs in a process of its own, under whatever Python has it. The original also puts out what its lookups read, so
that ids which it arranges from several inputs, and their LoD, need no second implementation here.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.client import LocalCube
from cube.errors import BadData
from trainer_tools import feeding, paddle_runner
from trainer_tools.programs.paddle import PaddleProgram
from trainer_tools.programs.program import Lookup
from trainer_tools.pruning import ENDLESS, Difference, difference
from trainer_tools.tables import Table

_DTYPES = {
    "BOOL": "?", "UINT8": "u1", "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8", "FP16": "f2", "FP32": "f4",
    "FP64": "f8",
}  # fmt: skip
_TIMEOUT_S = 600
_MOST_IN_SEQUENCE = 3
_UNKNOWN_SIZE = 4  # of dimensions, beyond the first, that the program leaves open


class Given(NamedTuple):
    """A value of a variable. lod: offsets of the sequences, level by level; empty for a plain tensor."""

    array: NDArray[Any]
    lod: list[list[int]]


class Cut(NamedTuple):
    """A program cut in two."""

    program: PaddleProgram  # with its lookups
    pruned: PaddleProgram  # without
    lookups: Sequence[Lookup]  # that went
    tables: Mapping[str, Table]  # their tables, by parameter


def compare(python: str, original: PaddleProgram, cut: Cut, place: Path, cube: LocalCube, samples: int) -> Difference:
    """Largest difference of any output on random samples, between a program as it was trained and what is left of it.

    place: the directory in which the pruned program was written. Raises BadData where Paddle cannot run one of them.
    """
    serving, lookups = cut.program, cut.lookups
    given = _random_inputs(original, serving, samples, joined=False)
    try:
        seen = _observed(python, serving, lookups, given)
    except BadData:
        if not any(value.lod for value in given.values()):
            raise
        # most programs that join sequences refuse to join those of different lengths
        given = _random_inputs(original, serving, samples, joined=True)
        seen = _observed(python, serving, lookups, given)
    before = seen if original is serving else _run(python, original, original.path.parent, given)
    outputs = [tensor.name for tensor in serving.outputs()]
    feeds = {name: given[name] for name in (t.name for t in cut.pruned.inputs()) if name in given}
    for lookup in lookups:
        feeds[lookup.feed] = _rows(lookup, seen[lookup.ids], cut.tables[lookup.table], cube, cut.pruned)
    after = _run(python, cut.pruned, place, feeds)
    worst = Difference()
    for name in outputs:
        is_alike = before[name].lod == after[name].lod
        worst = worst.or_larger(difference(before[name].array, after[name].array) if is_alike else ENDLESS)
    return worst


def runs(python: str, pruned: PaddleProgram, place: Path) -> feeding.Run:
    """A pruned program, in its directory, as a function of arrays by name. Raises BadData for one of ragged inputs."""
    ragged = [tensor.name for tensor in pruned.inputs() if pruned.lod_level(tensor.name)]
    if ragged:
        raise BadData(f"--check, inputs {', '.join(ragged)}", "sequences of different lengths (LoD)", "plain tensors")
    dtypes = {tensor.name: _DTYPES[tensor.datatype] for tensor in pruned.inputs()}

    def run(given: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        feeds = {name: Given(given[name].astype(dtype), []) for name, dtype in dtypes.items()}
        return [value.array for value in _run(python, pruned, place, feeds).values()]

    return run


def _observed(
    python: str, serving: PaddleProgram, lookups: Sequence[Lookup], given: Mapping[str, Given]
) -> dict[str, Given]:
    """The outputs of a program, and what its lookups read."""
    outputs = [tensor.name for tensor in serving.outputs()]
    ids = dict.fromkeys(lookup.ids for lookup in lookups if lookup.ids not in outputs)
    program = serving.fetching(list(ids))
    with tempfile.TemporaryDirectory(prefix="prune-program.") as scratch:
        program.write(Path(scratch))
        return _run(python, program, Path(scratch), {t.name: given[t.name] for t in program.inputs()})


def _rows(lookup: Lookup, ids: Given, table: Table, cube: LocalCube, pruned: PaddleProgram) -> Given:
    """What a lookup answers, from the cube."""
    (tensor,) = (t for t in pruned.inputs() if t.name == lookup.feed)
    flat = ids.array.astype(np.int64).ravel()
    rows = cube.rows(table.name, None, table.keys[flat.clip(max=table.keys.size - 1)]).rows
    rows = np.where((flat < table.keys.size)[:, None], rows, 0)
    shape = ids.array.shape if len(tensor.shape) > ids.array.ndim else ids.array.shape[:-1]
    return Given(rows.reshape(*shape, lookup.dim).astype(_DTYPES[tensor.datatype]), ids.lod)


def _random_inputs(program: PaddleProgram, serving: PaddleProgram, samples: int, joined: bool) -> dict[str, Given]:
    """Ids within the tables, repeats and padding among them; sequences of 0 to 3; floats from 0 to 1.

    joined: sequences are 1 to 3 long, and as long in one input as in any other of its level.
    """
    rng = np.random.default_rng(0)
    bound: dict[str, int] = {}
    padding: dict[str, int] = {}
    lookups = serving.lookups()
    # whatever reaches a lookup by ways we do not follow must be within its table too
    least = min([lookup.rows for lookup in lookups if lookup.obstacle and lookup.rows], default=1 << 31)
    for lookup in lookups:
        for name in [] if lookup.obstacle else serving.ids(lookup).inputs:
            bound[name] = min(bound.get(name, least), lookup.rows or 1)
            padding[name] = serving.ids(lookup).padding or 0
    lods: dict[int, list[list[int]]] = {0: []}
    given = {}
    for tensor in program.inputs():
        if tensor.datatype not in _DTYPES:
            raise BadData(f"proof, input {tensor.name}", tensor.datatype, f"{', '.join(_DTYPES)}; or --verify 0")
        level = program.lod_level(tensor.name)
        if level not in lods or not joined:
            lods[level] = _random_lod(level, samples, int(joined), rng)
        first = lods[level][-1][-1] if level else samples
        shape = [size if size > 0 else _UNKNOWN_SIZE for size in tensor.shape]
        if tensor.shape[:1] and (tensor.shape[0] == -1 or level):
            shape[0] = first
        if tensor.datatype.startswith("FP"):
            values: NDArray[Any] = rng.random(shape)
        else:
            most = bound.get(tensor.name, 2)
            values = rng.integers(0, most, shape)
            values[rng.random(shape) < 0.1] = min(padding.get(tensor.name, 0), most - 1)
        given[tensor.name] = Given(values.astype(_DTYPES[tensor.datatype]), lods[level])
    return given


def _random_lod(levels: int, samples: int, least: int, rng: np.random.Generator) -> list[list[int]]:
    lod: list[list[int]] = []
    count = samples
    for _ in range(levels):
        offsets = np.concatenate([[0], np.cumsum(rng.integers(least, _MOST_IN_SEQUENCE + 1, count))])
        lod.append([int(offset) for offset in offsets])
        count = lod[-1][-1]
    return lod


def _run(python: str, program: PaddleProgram, place: Path, given: Mapping[str, Given]) -> dict[str, Given]:
    """The outputs of one run by Paddle."""
    names = [tensor.name for tensor in program.outputs()]
    with tempfile.TemporaryDirectory(prefix="prune-program.") as scratch:
        job = {
            "program": str(place / program.path.name if program.combined else place),
            "parameters": str(place / program.combined) if program.combined else None,
            "inputs": [{"name": name, "lod": value.lod} for name, value in given.items()],
            "outputs": names,
        }
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        for number, value in enumerate(given.values()):
            np.save(Path(scratch) / f"in-{number}.npy", value.array)
        line = [python, paddle_runner.__file__, scratch]
        try:
            done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BadData(f"proof, {python}", error, "a Python with Paddle: --paddle PYTHON; or --verify 0") from error
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or [""]
            found = f"Paddle could not run {program.path.name} (exit {done.returncode}: {said[-1][:200]})"
            raise BadData("proof", found, "a program it runs; --verify 0 writes without proof")
        lods = json.loads((Path(scratch) / "lods.json").read_text())
        arrays = [np.load(Path(scratch) / f"out-{number}.npy") for number in range(len(names))]
        return {n: Given(array, lod) for n, array, lod in zip(names, arrays, lods, strict=True)}
