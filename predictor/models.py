"""A directory → a model: manifest, engine, cube. What its workflow is, if no configuration says otherwise."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cube.client import Cube, LocalCube
from cube.errors import BadConfig
from cube.keys import SIGN_RULE
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

Format = Literal["torch.export", "paddle", "onnx"]
Opener = Callable[[Path, Format], Engine]

PROGRAMS = ("*.pt2", "*.onnx")  # what a directory without a manifest may hold one of


@dataclass(frozen=True)
class Settings:
    """What all models of a process share. cube: None for the local cube that a model's manifest names."""

    cube: Cube | None
    max_samples: int
    max_keys: int
    cube_timeout_s: float
    cube_wait_s: float


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
    table_versions: Mapping[str, tuple[Version, int]] = field(default_factory=dict)  # and dims
    cube: Cube | None = None
    owns_cube: bool = False

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
    if (directory / manifest.MANIFEST_FILE).is_file():
        return await _pruned(directory, settings, opener)
    return _plain(directory, opener)


async def _pruned(directory: Path, settings: Settings, opener: Opener) -> Model:
    """What prune-program wrote."""
    path = directory / manifest.MANIFEST_FILE
    said = manifest.read(Manifest, path)
    if said.sign not in (SIGN_RULE, "none"):
        raise BadConfig(f"{path} sign", repr(said.sign), f"{SIGN_RULE!r}, or 'none' where keys are ids")
    program = manifest.inside(directory, said.program.file, f"{path} program.file")
    _check_hash(program, said.program.sha256, path)
    for lookup in said.lookups:
        if lookup.table not in said.tables:
            tables = ", ".join(said.tables) or "none"
            raise BadConfig(f"{path} lookup {lookup.feed!r}", f"table {lookup.table!r}", f"one of {tables}")
        if lookup.lengths is None and len(lookup.slots) != 1:
            raise BadConfig(f"{path} lookup {lookup.feed!r}", "several slots without lengths", "one")
    engine = opener(program, said.program.format)
    feeds = {lookup.feed for lookup in said.lookups}
    dense = [t for t in engine.inputs if t.name not in feeds]
    if dense != said.inputs or engine.outputs != said.outputs:
        expected = "the manifest written with this program"
        raise BadConfig(str(path), "inputs or outputs that are not the program's", expected)
    cube = settings.cube if settings.cube or not said.tables else _local(directory, said, path)
    if cube and said.tables:
        await cube.open(said.table_versions(), settings.cube_wait_s)
    ragged = {name for name, level in said.lod_levels.items() if level}
    return Model(
        name=said.name,
        version=str(said.version),
        engine=engine,
        inputs={t.name: Port(t.datatype, tuple(t.shape), ragged=t.name in ragged) for t in said.inputs},
        tables={name: table.version for name, table in said.tables.items()},
        source=str(cube) if cube and said.tables else "",
        lookups=tuple(said.lookups),
        lengths={name: f"{name}.lengths" for name in ragged},
        table_versions=said.table_versions(),
        cube=cube,
        owns_cube=cube is not settings.cube,
    )


def _plain(directory: Path, opener: Opener) -> Model:
    """A directory with one program and no manifest: a dense model, named after the directory."""
    programs = sorted(path for pattern in PROGRAMS for path in directory.glob(pattern))
    if len(programs) != 1:
        found = ", ".join(p.name for p in programs) or ("no such directory" if not directory.is_dir() else "neither")
        expected = f"{manifest.MANIFEST_FILE} (written by prune-program) or one program, {' or '.join(PROGRAMS)}"
        raise BadConfig(str(directory), found, expected)
    if (directory / manifest.SIGNATURE_FILE).exists():
        raise BadConfig(str(directory), "a trained program with its tables", f"a pruned one: prune-program {directory}")
    engine = opener(programs[0], "onnx" if programs[0].suffix == ".onnx" else "torch.export")
    return Model(
        name=directory.resolve().name,
        version="1",
        engine=engine,
        inputs={t.name: Port(t.datatype, tuple(t.shape)) for t in engine.inputs},
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


def describe(model: Model, takes: list[Tensor]) -> str:
    """One model on one line, for people."""
    tables = ", ".join(f"{name} {version}" for name, version in model.tables.items())
    rows = f"{tables} from {model.source}" if tables else "no tables"
    inputs = ", ".join(f"{t.name} {t.datatype} {shape_text(t.shape)}" for t in takes)
    return f"{model.name} {model.version} ({rows}; takes {inputs})"
