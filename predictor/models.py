"""A directory → a model: manifest, engine, cube. What its workflow is, if no configuration says otherwise."""

import asyncio
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor as Threads
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from cube.client import Cube, LocalCube
from cube.errors import BadConfig
from cube.keys import SIGN_RULE, signs_of
from cube.version import Version
from predictor.engines.engine import Engine
from predictor.engines.open import open_engine
from predictor.ops.gather import Absent, Gather
from predictor.ops.infer import Infer, NanPolicy
from predictor.ops.op import Port
from predictor.ops.pool import Mode, Pool
from predictor.requests import Form
from predictor.tensors import shape_text
from predictor.workflow import Dependency, Node
from trainer_tools import manifest
from trainer_tools.manifest import Lookup, Manifest, Tensor

T = TypeVar("T")

Format = Literal["torch.export", "paddle", "onnx"]


class Opener(Protocol):
    """`open_engine`, all but the program settled."""

    def __call__(
        self, program: Path, format: Format, *, also: Sequence[tuple[Path, Format]] = (), undecided: bool = False
    ) -> Engine:
        """See open_engine."""


RECORDING = "warm_up.npz"  # in a model's directory: requests to run before the first caller comes
# What a directory without a manifest may hold: a program, or the same one in several formats. The first is the one that
# the others are held to.
PROGRAMS: Mapping[str, Format] = {
    "*.pt2": "torch.export", "*.onnx": "onnx", "*.pdmodel": "paddle", "__model__": "paddle", "model": "paddle"
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all models of a process share. cube: None for the local cube that a model's manifest names."""

    cube: Cube | None
    max_samples: int
    max_keys: int
    cube_timeout_s: float
    cube_wait_s: float
    # Where programs are read, which takes seconds, so that the event loop hears signals. None: a thread of asyncio's.
    threads: Threads | None = None


@dataclass(frozen=True)
class Model:
    """One version of one model: its net, and the rows it reads."""

    name: str
    version: str
    engine: Engine
    inputs: Mapping[str, Port]  # dense ones: straight from request to program
    tables: dict[str, str] = field(default_factory=dict)  # version of each table it reads
    source: str = ""  # where rows come from, for people; empty without tables
    lookups: tuple[Lookup, ...] = ()
    lengths: Mapping[str, str] = field(default_factory=dict)  # of ragged dense inputs: the input with their lengths
    alike: Sequence[Sequence[str]] = ()  # groups of inputs with lengths that have to be equal
    table_versions: Mapping[str, tuple[Version, int]] = field(default_factory=dict)  # and dims
    cube: Cube | None = None
    owns_cube: bool = False
    recording: Path | None = None  # requests to warm up with

    def nodes(self, settings: Settings, nan: NanPolicy = "pass") -> list[Node]:
        """The workflow that serves it: gather → pool → infer, or infer alone."""
        if not self.lookups:
            return [Node("infer", Infer(self.engine, nan=nan))]
        return [
            Node("gather", self.gather(settings)),
            Node("pool", self.pool(), (Dependency("gather"),)),
            Node("infer", Infer(self.engine, nan=nan), (Dependency("pool"),)),
        ]

    def gather(self, settings: Settings, absent: Absent = "zeros") -> Gather:
        """The op that fetches its rows. Raises BadConfig for a model without tables."""
        return Gather(self.lookups, self.table_versions, self._asked_cube(), settings.cube_timeout_s, absent)

    def pool(self, mode: Mode = "as trained") -> Pool:
        """The op that makes its program's inputs of rows."""
        dims = {name: dim for name, (_, dim) in self.table_versions.items()}
        return Pool(self.lookups, dims, {t.name: t.datatype for t in self.engine.inputs}, mode)

    def form(self, settings: Settings) -> Form:
        """What a request for it must hold."""
        return Form(
            self.inputs,
            self.lookups,
            max_samples=settings.max_samples,
            max_keys=settings.max_keys,
            finite=bool(self.lookups),
            lengths=self.lengths,
            alike=self.alike,
        )

    async def close(self) -> None:
        """Release the engine and the model's own cube; a shared one belongs to the process."""
        self.engine.close()
        if self.cube is not None and self.owns_cube:
            await self.cube.close()

    def _asked_cube(self) -> Cube:
        if self.cube is None:
            raise BadConfig(f"model {self.name!r}", "no tables", "a model that prune-program wrote")
        return self.cube


async def load(directory: Path, settings: Settings, opener: Opener = open_engine) -> Model:
    """A model, its cube checked. Raises BadConfig, BadData, DataCorrupt, ShardUnavailable."""
    recording = directory / RECORDING if (directory / RECORDING).is_file() else None
    if recording is not None:
        opener = partial(opener, undecided=True)
    is_pruned = (directory / manifest.MANIFEST_FILE).is_file()
    return replace(await (_pruned if is_pruned else _plain)(directory, settings, opener), recording=recording)


async def _pruned(directory: Path, settings: Settings, opener: Opener) -> Model:
    """What prune-program wrote."""
    path = directory / manifest.MANIFEST_FILE
    said = manifest.read(Manifest, path)
    if said.sign not in (SIGN_RULE, "none"):
        raise BadConfig(f"{path} sign", repr(said.sign), f"{SIGN_RULE!r}, or 'none' where keys are ids")
    _check_signs(said, path)
    program = manifest.inside(directory, said.program.file, f"{path} program.file")
    for lookup in said.lookups:
        if lookup.table not in said.tables:
            tables = ", ".join(said.tables) or "none"
            raise BadConfig(f"{path} lookup {lookup.feed!r}", f"table {lookup.table!r}", f"one of {tables}")
        if lookup.lengths is None and len(lookup.slots) != 1:
            raise BadConfig(f"{path} lookup {lookup.feed!r}", "several slots without lengths", "one")
        _check_added(lookup, f"{path} lookup {lookup.feed!r} added")
    await _in_thread(settings, _check_hash, program, said.program.sha256, path)
    engine = await _in_thread(settings, opener, program, said.program.format)
    feeds = {lookup.feed for lookup in said.lookups}
    dense = [t for t in engine.inputs if t.name not in feeds]
    if dense != said.inputs or engine.outputs != said.outputs:
        expected = "the manifest written with this program"
        raise BadConfig(str(path), "inputs or outputs that are not the program's", expected)
    cube = settings.cube if settings.cube or not said.tables else _local(directory, said, path)
    if cube and said.tables:
        await cube.open(said.table_versions(), settings.cube_wait_s)
    ragged = said.ragged_lengths()
    return Model(
        name=said.name,
        version=str(said.version),
        engine=engine,
        inputs={t.name: Port(t.datatype, tuple(t.shape), ragged=t.name in ragged) for t in said.inputs},
        tables={name: table.version for name, table in said.tables.items()},
        source=str(cube) if cube and said.tables else "",
        lookups=tuple(said.lookups),
        lengths=ragged,
        alike=said.alike,
        table_versions=said.table_versions(),
        cube=cube,
        owns_cube=cube is not settings.cube,
    )


async def _plain(directory: Path, settings: Settings, opener: Opener) -> Model:
    """A directory with a program and no manifest: a dense model, named after the directory."""
    programs = [(path, form) for pattern, form in PROGRAMS.items() for path in _files(directory, pattern)]
    formats = [form for _, form in programs]
    if not programs or len(set(formats)) < len(formats):
        found = ", ".join(p.name for p, _ in programs) or ("no such directory" if not directory.is_dir() else "neither")
        expected = f"{manifest.MANIFEST_FILE} (written by prune-program) or one program, {' or '.join(PROGRAMS)}"
        raise BadConfig(str(directory), found, expected)
    if (directory / manifest.SIGNATURE_FILE).exists():
        raise BadConfig(str(directory), "a trained program with its tables", f"a pruned one: prune-program {directory}")
    engine = await _in_thread(settings, partial(opener, *programs[0], also=programs[1:]))
    ragged = [name for tensor in engine.inputs if engine.lod_levels.get(name := tensor.name)]
    return Model(
        name=directory.resolve().name,
        version="1",
        engine=engine,
        inputs={t.name: Port(t.datatype, tuple(t.shape), ragged=t.name in ragged) for t in engine.inputs},
        lengths={name: f"{name}.lengths" for name in ragged},
    )


async def _in_thread(settings: Settings, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(settings.threads, work, *arguments)


def _files(directory: Path, pattern: str) -> list[Path]:
    return sorted(path for path in directory.glob(pattern) if path.is_file())


def _local(directory: Path, said: Manifest, path: Path) -> LocalCube:
    if said.cube is None:
        raise BadConfig(f"{path} cube", "no local cube", "the address of a cube: --cube")
    return LocalCube(manifest.inside(directory, said.cube, f"{path} cube"))


def _check_added(lookup: Lookup, place: str) -> None:
    """Raise BadConfig unless a lookup adds as many numbers as its samples have keys, or one, or none."""
    count, width = len(lookup.added), math.prod((lookup.feed_shape or [-1, -1, -1])[1:-1])
    if lookup.pooling != "none":
        fits, expected = count % len(lookup.slots) == 0, f"one, or a multiple of the {len(lookup.slots)} slots"
    elif width > 0 and not lookup.lod_level:
        fits, expected = count == width, f"one, or {width}, as a sample has keys"
    else:
        fits, expected = False, "one, for samples have any number of keys"
    if count > 1 and not fits:
        raise BadConfig(place, f"{count} numbers", expected)


def _check_signs(said: Manifest, path: Path) -> None:
    """Raise BadConfig if the tool that wrote a manifest signs features otherwise than this process does."""
    keys = signs_of([vector.slot for vector in said.sign_vectors], [v.text.encode() for v in said.sign_vectors])
    for vector, key in zip(said.sign_vectors, keys, strict=True):
        if vector.key != f"{key:016x}":
            feature = f"{vector.text[:40]!r} in slot {vector.slot}"
            expected = f"{key:016x}, as this build signs it: the rows are kept under other keys than callers ask for"
            raise BadConfig(f"{path} sign_vectors, {feature}", vector.key, expected)


def _check_hash(program: Path, expected: str, path: Path) -> None:
    try:
        with program.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadConfig(str(program), error.strerror, f"the program that {path} names") from error
    if found != expected:
        raise BadConfig(str(program), f"sha256 {found}", f"{expected}, as {path} says: they were not written together")


def describe(model: Model, takes: list[Tensor]) -> str:
    """One model on one line, for people."""
    tables = ", ".join(f"{name} {version}" for name, version in model.tables.items())
    rows = f"{tables} from {model.source}" if tables else "no tables"
    inputs = ", ".join(f"{t.name} {t.datatype} {shape_text(t.shape)}" for t in takes)
    return f"{model.name} {model.version} ({rows}; takes {inputs})"
