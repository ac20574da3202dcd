"""A directory → a model that answers: manifest, engine, cube, workflow."""

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import Executor as Threads
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cube.client import Cube, LocalCube
from cube.errors import BadConfig
from cube.keys import SIGN_RULE
from cube.rpc.calls import Call
from predictor.engines.engine import Engine
from predictor.engines.torch_engine import TorchEngine
from predictor.executor import Executor
from predictor.ops.dense import Dense
from predictor.ops.gather import Gather, found_of
from predictor.ops.op import Op, Values
from predictor.ops.pool import Pool
from predictor.ops.read import Read
from predictor.ops.sign import Sign, signed
from predictor.tensors import DTYPES, shape_text, texts
from predictor.workflow import stages
from trainer_tools import manifest
from trainer_tools.manifest import Lookup, Manifest, Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What all models of a process share. cube: None for the local cube that a model's manifest names."""

    threads: Threads
    cube: Cube | None
    max_samples: int
    max_keys: int
    cube_timeout_s: float
    cube_wait_s: float


@dataclass(frozen=True)
class Model:
    """One version of one model, ready to answer."""

    name: str
    version: str
    platform: str
    inputs: list[Tensor]  # of a request; a lookup's raw texts may stand in for its keys
    outputs: list[Tensor]
    tables: dict[str, str]  # version of each table it reads
    source: str  # where rows come from, for people; empty without tables
    _lookups: list[Lookup]
    _executor: Executor
    _local_cube: Cube | None

    async def run(self, inputs: Mapping[str, Any], call: Call) -> tuple[Values, dict[str, int | str]]:
        """Outputs by name, and facts of the run: keys looked up, keys absent, version of each table."""
        values = await self._executor.run(inputs, call)
        facts: dict[str, int | str] = {}
        if self._lookups:
            facts["keys"] = sum(values[signed(lookup)].size for lookup in self._lookups)
            facts["keys_absent"] = sum(int(np.count_nonzero(~values[found_of(lookup)])) for lookup in self._lookups)
        facts |= {f"table.{name}": version for name, version in self.tables.items()}
        return {tensor.name: values[tensor.name] for tensor in self.outputs}, facts

    async def close(self) -> None:
        """Release the model's own cube; a shared one belongs to the process."""
        if self._local_cube:
            await self._local_cube.close()


async def load(directory: Path, settings: Settings) -> Model:
    """A model ready to answer, warmed up; raises BadConfig, BadData, DataCorrupt, ShardUnavailable."""
    if (directory / manifest.MANIFEST_FILE).is_file():
        model = await _pruned(directory, settings)
    else:
        model = _plain(directory, settings)
    for request in _warm_up(model):
        try:
            await model.run(request, Call("warm-up"))
        except Exception as error:
            if model.tables:
                raise
            # zeros of size 2 may not suit a program that we know nothing of; its callers will tell
            log.warning("model %s: warm-up failed (%s), so its first request will be slow", model.name, error)
    return model


async def _pruned(directory: Path, settings: Settings) -> Model:
    """What prune-program wrote."""
    path = directory / manifest.MANIFEST_FILE
    said = manifest.read(Manifest, path)
    if said.sign != SIGN_RULE:
        raise BadConfig(f"{path} sign", repr(said.sign), repr(SIGN_RULE))
    program = manifest.inside(directory, said.program.file, f"{path} program.file")
    _check_hash(program, said.program.sha256, path)
    engine = TorchEngine(program)
    feeds = [t for t in engine.inputs if t.name in {lookup.feed for lookup in said.lookups}]
    if [t for t in engine.inputs if t not in feeds] != said.inputs or engine.outputs != said.outputs:
        raise BadConfig(
            str(path), "inputs or outputs that are not the program's", "the manifest written with this program"
        )
    cube = settings.cube if settings.cube or not said.tables else _local(directory, said, path)
    if cube and said.tables:
        await cube.open(said.table_versions(), settings.cube_wait_s)
    ops: list[Op] = [
        Read(said.inputs, said.lookups, settings.max_samples, settings.max_keys, finite=True),
        Dense(engine),
    ]
    for lookup in said.lookups:
        if lookup.table not in said.tables:
            raise BadConfig(
                f"{path} lookup {lookup.feed!r}",
                f"table {lookup.table!r}",
                f"one of {', '.join(said.tables) or 'none'}",
            )
        ops += [Sign(lookup), Pool(lookup)]
    if said.lookups:
        assert cube is not None  # there are tables, so one was opened or refused
        versions = {name: version for name, (version, _) in said.table_versions().items()}
        ops.append(Gather(said.lookups, versions, cube, settings.cube_timeout_s))
    sparse = [
        tensor
        for lookup in said.lookups
        for tensor in (Tensor(lookup.keys, "UINT64", [-1]), Tensor(lookup.lengths, "INT32", [-1, len(lookup.slots)]))
    ]
    return Model(
        name=said.name,
        version=str(said.version),
        platform=engine.platform,
        inputs=[*said.inputs, *sparse],
        outputs=engine.outputs,
        tables={name: table.version for name, table in said.tables.items()},
        source=str(cube) if cube and said.tables else "",
        _lookups=said.lookups,
        _executor=Executor(stages(ops, [t.name for t in engine.outputs]), settings.threads),
        _local_cube=cube if cube is not settings.cube else None,
    )


def _plain(directory: Path, settings: Settings) -> Model:
    """A directory with one torch.export program and no manifest: a dense model, named after the directory."""
    programs = sorted(directory.glob("*.pt2"))
    if len(programs) != 1:
        found = ", ".join(p.name for p in programs) or ("no such directory" if not directory.is_dir() else "neither")
        raise BadConfig(
            str(directory), found, f"{manifest.MANIFEST_FILE} (written by prune-program) or one *.pt2 program"
        )
    if (directory / manifest.SIGNATURE_FILE).exists():
        raise BadConfig(str(directory), "a trained program with its tables", f"a pruned one: prune-program {directory}")
    engine: Engine = TorchEngine(programs[0])
    ops: list[Op] = [Read(engine.inputs, [], settings.max_samples, 0, finite=False), Dense(engine)]
    return Model(
        name=directory.resolve().name,
        version="1",
        platform=engine.platform,
        inputs=engine.inputs,
        outputs=engine.outputs,
        tables={},
        source="",
        _lookups=[],
        _executor=Executor(stages(ops, [t.name for t in engine.outputs]), settings.threads),
        _local_cube=None,
    )


def _local(directory: Path, said: Manifest, path: Path) -> LocalCube:
    if said.cube is None:
        raise BadConfig(f"{path} cube", "no local cube", "the address of a cube: --cube")
    return LocalCube(manifest.inside(directory, said.cube, f"{path} cube"))


def _check_hash(program: Path, expected: str, path: Path) -> None:
    try:
        with program.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadConfig(str(program), error.strerror, f"the program that {path} names") from error
    if found != expected:
        raise BadConfig(str(program), f"sha256 {found}", f"{expected}, as {path} says: they were not written together")


def _warm_up(model: Model) -> list[Values]:
    """Requests of two samples of zeros, so that every op and kernel has run: with keys, and with texts instead.

    Arrays are read-only, as those over a request's bytes are: numba compiles kernels for them apart.
    """
    with_keys: Values = {
        t.name: np.zeros([2 if size == -1 else size for size in t.shape], DTYPES[t.datatype]) for t in model.inputs
    }
    for lookup in model._lookups:
        with_keys[lookup.lengths] = np.ones((2, len(lookup.slots)), np.int32)
        with_keys[lookup.keys] = np.zeros(2 * len(lookup.slots), np.uint64)
    for array in with_keys.values():
        array.flags.writeable = False
    if not model._lookups:
        return [with_keys]
    with_texts = dict(with_keys)
    for lookup in model._lookups:
        with_texts[lookup.text] = texts([b""] * with_texts.pop(lookup.keys).size)
    return [with_keys, with_texts]


def describe(model: Model) -> str:
    """One model on one line, for people."""
    tables = ", ".join(f"{name} {version}" for name, version in model.tables.items())
    rows = f"{tables} from {model.source}" if tables else "no tables"
    takes = ", ".join(f"{t.name} {t.datatype} {shape_text(t.shape)}" for t in model.inputs)
    return f"{model.name} {model.version} ({rows}; takes {takes})"
