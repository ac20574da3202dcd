"""The steps of pruning that Paddle and ONNX programs share: from the lookups that go to the manifest and the report.

Keys are the program's ids, or what --vocabulary gives for them. A model's version is when its program was saved, in
Unix seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import msgspec

from cube.client import LocalCube
from cube.keys import SIGN_RULE
from cube.publish import publishing
from cube.version import Version
from trainer_tools import accuracy, manifest, proof
from trainer_tools.export_rows import CUBE_DIRECTORY
from trainer_tools.feeding import RowsOf, Run, rows_in
from trainer_tools.manifest import Manifest
from trainer_tools.programs import servable
from trainer_tools.programs.program import Candidate, Ids, Lookup, TrainedProgram, chosen, decide, readers
from trainer_tools.proof import Expected, Read
from trainer_tools.pruning import Difference, Options, Report, drawn
from trainer_tools.tables import Table, are_row_numbers, export, sign_vectors, tables_of

PROGRAM_DIRECTORY = "program"  # in what prune-program writes, as a program's parameters may be files of any name


class FileProgram(TrainedProgram, Protocol):
    """A program in a file of its framework's, with its parameters in that file or beside it."""

    @property
    def format(self) -> Literal["paddle", "onnx"]:
        """As in a manifest."""

    @property
    def path(self) -> Path:
        """Of the file it was read from."""

    def serving(self, fetch: Sequence[str] = ()) -> Self:
        """What the outputs depend on: the program's own outputs, or instead those named. Raises BadData."""

    def ids(self, lookup: Lookup) -> Ids:
        """What a lookup without obstacle reads."""

    def lod_level(self, name: str) -> int:
        """Levels of raggedness of an input or output; 0: none."""

    def alike(self) -> list[list[str]]:
        """Groups of ragged inputs of which a sample has to have as much in each as in any other."""

    def check_inputs(self, names: Sequence[str], readers: Mapping[str, Sequence[str]]) -> None:
        """Raise BadData for inputs of which a predictor could not tell samples apart.

        readers: of an input, the lookups that stay and read it, for people.
        """

    def holds(self, table: str) -> bool:
        """Whether the program stores a table."""

    def stored_bytes(self) -> int:
        """Of the file it was read from, and of its parameters elsewhere."""


P = TypeVar("P", bound=FileProgram)


class Cut(NamedTuple, Generic[P]):
    """A program cut in two."""

    name: str  # of the model
    trained: P  # as its file stands
    program: P  # what its outputs depend on, with its lookups
    pruned: P  # without
    candidates: list[Candidate]
    lookups: list[Lookup]  # that went
    tables: Mapping[str, Table]  # their tables, by parameter


class Prover(NamedTuple):
    """What runs a program, if it is here."""

    missing: str  # why nothing is compared; empty if something is
    expected: Callable[[Manifest, int], list[Expected]]  # of so many random samples, by the original
    runs: Callable[[Path], Run] | None  # the pruned program, in its directory; None: nothing here runs it
    # the same as expected, of ids outside the tables, of lookups that gave these a row; none where no lookup did
    outside: Callable[[Manifest, int], list[Expected]] = lambda said, samples: []


def cut_of(place: Path, trained: P, options: Options) -> Cut[P]:
    """Decide which lookups go, and cut them. place: the directory or file that was named. Raises BadData."""
    program = trained.serving(options.fetch)
    candidates = decide(program, options.rules)
    lookups = chosen(candidates, str(trained.path))
    tables = tables_of(lookups, options.vocabularies)
    name = place.resolve().name if place.is_dir() else trained.path.stem
    return Cut(name, trained, program, program.cut(lookups), candidates, lookups, tables)


def prune(cut: Cut[P], out: Path, options: Options, prover: Prover) -> Report:
    """Write what is left of a program, its rows and its manifest into `out`; see prune_program.prune."""
    program, pruned = cut.program, cut.pruned
    version = int(cut.trained.path.stat().st_mtime)
    with publishing(out, replace=True) as draft:
        directory = draft / PROGRAM_DIRECTORY
        directory.mkdir()
        file = directory / pruned.write(directory)
        paddings = {lookup.table: program.ids(lookup).padding for lookup in cut.lookups}
        tables = export(program, cut.tables, paddings, draft, Version(version), options.drop_zero_rows)
        said = _manifest(cut, version, tables, file, options)
        manifest.write(said, draft / manifest.MANIFEST_FILE)
        compared, difference, outside = _compare(said, directory, draft, options, prover)
        if not difference.is_rounding:
            again = partial(prover.expected, said, options.verify_samples)
            proof.check_steady(str(cut.trained.path), again)
        difference.check(out)
        run = prover.runs(directory) if prover.runs and options.wanted.data else None
        measured = accuracy.settle(draft, out, said, options.wanted, run)
    return Report(
        out=out,
        name=said.name,
        version=said.version,
        format=program.format,
        candidates=[_noted(candidate, cut) for candidate in cut.candidates],
        ops=(cut.trained.ops(), pruned.ops()),
        program_bytes=(
            cut.trained.stored_bytes(),
            sum(path.stat().st_size for path in (out / PROGRAM_DIRECTORY).rglob("*") if path.is_file()),
        ),
        rows=sum(table.rows for table in tables.values()),
        compared=compared,
        largest_difference=difference.largest,
        largest_ulps=difference.ulps,
        largest_outside=outside and outside.largest,
        unproven=prover.missing,
        row_format=options.wanted.row_format.text,
        accuracy=measured,
        picture=drawn(options, program, pruned, cut.candidates),
    )


def reads_of(cut: Cut[P]) -> list[Read]:
    """What each lookup that went reads."""
    return [Read(cut.program.ids(lookup).reads, cut.tables[lookup.table].keys) for lookup in cut.lookups]


def _compare(
    said: Manifest, directory: Path, draft: Path, options: Options, prover: Prover
) -> tuple[int, Difference, Difference | None]:
    """On how many samples the original and pruned + rows were compared, and how far they are apart.

    Last: how far on ids outside the tables, where ops that went gave these a row.
    """
    if prover.missing or prover.runs is None:
        return 0, Difference(), None
    cases = prover.expected(said, options.verify_samples)
    outside = prover.outside(said, options.verify_samples)
    # only then: the original maps or holds every table, and so does the cube
    run, rows = prover.runs(directory), rows_in(LocalCube(draft / CUBE_DIRECTORY))
    worst, strays = (_worst(some, run, said, rows) for some in (cases, outside))
    return sum(case.samples for case in cases), worst, strays if outside else None


def _worst(cases: Sequence[Expected], run: Run, said: Manifest, rows: RowsOf) -> Difference:
    worst = Difference()
    for case in cases:
        worst = worst.or_larger(proof.compare(case, run, said, rows))
    return worst


def _manifest(cut: Cut[P], version: int, tables: dict[str, manifest.Table], file: Path, options: Options) -> Manifest:
    pruned, feeds = cut.pruned, {lookup.feed for lookup in cut.lookups}
    inputs = [tensor for tensor in pruned.inputs() if tensor.name not in feeds]
    cut.program.check_inputs(
        [tensor.name for tensor in inputs],
        readers(cut.candidates, lambda k: [k.ids] if k.obstacle else cut.program.ids(k).inputs),
    )
    sign = SIGN_RULE if options.vocabularies else "none"
    said = Manifest(
        schema=1,
        name=cut.name,
        version=version,
        program=manifest.Program(
            f"{PROGRAM_DIRECTORY}/{file.name}", pruned.format, manifest.sha256(file), parameters=_beside(file)
        ),
        sign=sign,
        inputs=inputs,
        lookups=_lookups(cut),
        tables=tables,
        outputs=pruned.outputs(),
        cube=CUBE_DIRECTORY if tables else None,
        source_sha256=manifest.sha256(cut.trained.path),
        tool=manifest.tool(),
        lod_levels={t.name: level for t in inputs if (level := pruned.lod_level(t.name))},
        sign_vectors=sign_vectors(sign),
    )
    manifest.check_names(said)
    return msgspec.structs.replace(said, alike=_alike(pruned.alike(), said))


def _alike(groups: list[list[str]], said: Manifest) -> list[list[str]]:
    """Groups of a program's inputs as groups of the request inputs that hold their lengths."""
    lengths = said.ragged_lengths() | {k.feed: k.lengths for k in said.lookups if k.lengths}
    named = (list(dict.fromkeys(lengths[name] for name in group)) for group in groups)
    return [group for group in named if len(group) > 1]


def _beside(file: Path) -> str | None:
    """The file, or the directory of several, that holds what a program's own file does not."""
    others = [path for path in file.parent.rglob("*") if path.is_file() and path != file]
    if len(others) > 1:
        return PROGRAM_DIRECTORY
    return f"{PROGRAM_DIRECTORY}/{others[0].relative_to(file.parent).as_posix()}" if others else None


def _lookups(cut: Cut[P]) -> list[manifest.Lookup]:
    shapes = {tensor.name: tensor.shape for tensor in cut.pruned.inputs()}
    numbers = {ids: number for number, ids in enumerate(dict.fromkeys(lookup.ids for lookup in cut.lookups))}
    made = []
    for lookup in cut.lookups:
        ids, table = cut.program.ids(lookup), cut.tables.get(lookup.table)
        made.append(
            manifest.Lookup(
                keys=f"{lookup.ids}.keys" if lookup.ids in shapes else lookup.ids,  # ids that are read otherwise too
                text=f"{lookup.ids}.text",
                lengths=f"{lookup.ids}.lengths" if ids.has_lengths else None,
                slots=[manifest.Slot(lookup.ids, numbers[lookup.ids])],
                table=table.name if table else lookup.table,
                pooling="none",
                feed=lookup.feed,
                feed_shape=shapes[lookup.feed],
                lod_level=cut.pruned.lod_level(lookup.feed),
                arranged_from=[name for name in ids.inputs if name != lookup.ids],
                padding=_padding(ids, table),
                added=_added(ids, table),
            )
        )
    return made


def _padding(ids: Ids, table: Table | None) -> int | None:
    """The key that stands for no key."""
    row = ids.padding
    return row if row is None or table is None or row >= table.keys.size else int(table.keys[row])


def _added(ids: Ids, table: Table | None) -> list[int]:
    """What makes keys of the ids of a request; where a vocabulary says the keys of rows, a request has these."""
    is_nothing = ids.is_sum or ids.added == (0,) or table is None or not are_row_numbers(table.keys)
    return [] if is_nothing else list(ids.added)


def _noted(candidate: Candidate, cut: Cut[P]) -> Candidate:
    """With what was found out by cutting."""
    reason, lookup = candidate.reason, candidate.lookup
    if candidate.is_cut:
        ids = cut.program.ids(lookup)
        reason += f"; ids arranged from {', '.join(ids.inputs)}" if ids.inputs != [lookup.ids] else ""
        reason += f"; {', '.join(map(str, ids.added))} added to ids" if ids.added not in ((), (0,)) else ""
        reason += f"; {ids.outside.told}" if ids.outside else ""
        reason += servable.fixed_note(next(t.shape for t in cut.pruned.inputs() if t.name == lookup.feed))
    if candidate.is_cut and cut.pruned.holds(lookup.table):
        reason += "; the table stays too, for other ops read it"
    return candidate._replace(reason=reason)
