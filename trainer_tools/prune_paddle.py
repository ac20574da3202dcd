"""prune-program for Paddle programs. Without Paddle, but for the proof."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cube.build import check_table_name
from cube.client import LocalCube
from cube.errors import BadData, DataCorrupt
from cube.keys import SIGN_RULE
from cube.publish import publishing
from cube.version import Version
from trainer_tools import manifest, paddle_proof
from trainer_tools.export_rows import CUBE_DIRECTORY, ROWS_DIRECTORY, build_cube, read_vocabulary, rows_of
from trainer_tools.paddle_proof import Cut, Table
from trainer_tools.programs import paddle
from trainer_tools.programs.paddle import PaddleProgram
from trainer_tools.programs.program import Candidate, Lookup, chosen, decide
from trainer_tools.pruning import TOLERANCE, Options, Report

PROGRAM_DIRECTORY = "program"  # in what prune-program writes: parameters may be files of any name


def survey(directory: Path, options: Options) -> list[Candidate]:
    """Which lookups would go, and why."""
    return decide(paddle.load(directory).serving(options.fetch), options.rules)


def prune(directory: Path, out: Path, options: Options) -> Report:
    """Prune the program in `directory` into `out`; see prune_program.prune.

    Keys are the program's ids, or what --vocabulary gives for them. The version is when the program was saved, in Unix
    seconds.
    """
    trained = paddle.load(directory)
    program = trained.serving(options.fetch)
    candidates = decide(program, options.rules)
    lookups = chosen(candidates, str(trained.path))
    cut = Cut(program, program.cut(lookups), lookups, _tables(program, lookups, options.vocabularies))
    python, unproven = _prover(options, cut)
    with publishing(out, replace=True) as draft:
        place = draft / PROGRAM_DIRECTORY
        place.mkdir()
        cut.pruned.write(place)
        exported = _export(cut, draft, Version(int(trained.path.stat().st_mtime)), options.drop_zero_rows)
        result = _manifest(cut, exported, place, options)
        manifest.write(result, draft / manifest.MANIFEST_FILE)
        difference = 0.0
        if python:
            original = program if options.fetch else trained  # what names no outputs cannot be run as it stands
            cube = LocalCube(draft / CUBE_DIRECTORY)
            difference = paddle_proof.compare(python, original, cut, place, cube, options.verify_samples)
        if not difference <= TOLERANCE:
            found = f"outputs that differ by {difference:g}"
            raise DataCorrupt(f"{out} proof", found, f"at most {TOLERANCE:g}: nothing was written")
    return Report(
        out=out,
        name=result.name,
        version=result.version,
        format=program.format,
        candidates=[_noted(candidate, cut) for candidate in candidates],
        ops=(trained.ops(), cut.pruned.ops()),
        program_bytes=(
            trained.path.stat().st_size + sum(stored.end - stored.start for stored in trained.parameters.values()),
            sum(path.stat().st_size for path in (out / PROGRAM_DIRECTORY).rglob("*") if path.is_file()),
        ),
        rows=sum(table.rows for table in exported.values()),
        compared=options.verify_samples if python else 0,
        largest_difference=difference,
        unproven=unproven,
    )


def _noted(candidate: Candidate, cut: Cut) -> Candidate:
    """With what was found out by cutting."""
    reason = candidate.reason
    if candidate.is_cut and (inputs := cut.program.ids(candidate.lookup).inputs) != [candidate.lookup.ids]:
        reason += f"; ids arranged from {', '.join(inputs)}"
    if candidate.is_cut and candidate.lookup.table in cut.pruned.parameters:
        reason += "; the table stays too, for other ops read it"
    return candidate._replace(reason=reason)


def _export(cut: Cut, draft: Path, version: Version, drop_zero_rows: bool) -> dict[str, manifest.Table]:
    """Write the tables: rows for cube-build, and the same as a cube."""
    exported = {}
    for parameter, table in cut.tables.items():
        first = next(lookup for lookup in cut.lookups if lookup.table == parameter)
        rows = rows_of(table.name, cut.program.table(parameter), table.keys, cut.program.ids(first).padding)
        count = rows.write(draft / ROWS_DIRECTORY / table.name, drop_zero_rows)
        del rows  # and with it the pages of the mapped parameter, before the cube is built
        build_cube(draft, table.name, version)
        exported[table.name] = manifest.Table(version=str(version), dim=first.dim, rows=count, absent="zeros")
    return exported


def _manifest(cut: Cut, exported: dict[str, manifest.Table], place: Path, options: Options) -> manifest.Manifest:
    source, pruned = cut.program.path, cut.pruned
    feeds = {lookup.feed for lookup in cut.lookups}
    inputs = [tensor for tensor in pruned.inputs() if tensor.name not in feeds]
    return manifest.Manifest(
        schema=1,
        name=source.parent.resolve().name,
        version=int(source.stat().st_mtime),
        program=manifest.Program(
            f"{PROGRAM_DIRECTORY}/{source.name}",
            "paddle",
            manifest.sha256(place / source.name),
            parameters=f"{PROGRAM_DIRECTORY}/{pruned.combined}" if pruned.combined else PROGRAM_DIRECTORY,
        ),
        sign=SIGN_RULE if options.vocabularies else "none",
        inputs=inputs,
        lookups=_lookups(cut),
        tables=exported,
        outputs=pruned.outputs(),
        cube=CUBE_DIRECTORY if exported else None,
        source_sha256=manifest.sha256(source),
        tool=manifest.tool(),
        lod_levels={t.name: pruned.lod_level(t.name) for t in inputs if pruned.lod_level(t.name)},
    )


def _tables(program: PaddleProgram, lookups: Sequence[Lookup], vocabularies: Mapping[str, Path]) -> dict[str, Table]:
    """The tables whose rows are in the program's files, by parameter."""
    rows = {lookup.table: lookup.rows for lookup in lookups if lookup.rows is not None}
    if vocabularies and set(vocabularies) != set(rows):
        found = ", ".join(sorted(vocabularies))
        raise BadData("--vocabulary", found, f"one for each table that goes, or none: {', '.join(sorted(rows))}")
    tables: dict[str, Table] = {}
    for parameter, count in rows.items():
        name = parameter.replace("/", "_").lstrip(".")
        check_table_name(name)
        if name in (table.name for table in tables.values()):
            raise BadData(f"table {parameter!r}", f"a second {name!r}", "parameters whose names differ without '/'")
        keys = np.arange(count, dtype=np.uint64)
        tables[parameter] = Table(name, read_vocabulary(vocabularies[parameter]) if vocabularies else keys)
    return tables


def _lookups(cut: Cut) -> list[manifest.Lookup]:
    shapes = {tensor.name: tensor.shape for tensor in cut.pruned.inputs()}
    numbers = {ids: number for number, ids in enumerate(dict.fromkeys(lookup.ids for lookup in cut.lookups))}
    return [
        manifest.Lookup(
            keys=lookup.ids,
            text=f"{lookup.ids}.text",
            lengths=f"{lookup.ids}.lengths",
            slots=[manifest.Slot(lookup.ids, numbers[lookup.ids])],
            table=cut.tables[lookup.table].name if lookup.table in cut.tables else lookup.table,
            pooling="none",
            feed=lookup.feed,
            feed_shape=shapes[lookup.feed],
            lod_level=cut.pruned.lod_level(lookup.feed),
            arranged_from=[name for name in cut.program.ids(lookup).inputs if name != lookup.ids],
            padding=cut.program.ids(lookup).padding,
        )
        for lookup in cut.lookups
    ]


def _prover(options: Options, cut: Cut) -> tuple[str | None, str]:
    """The Python that runs the proof, or None and why there is none."""
    if not options.verify_samples:
        return None, "--verify 0"
    remote = sorted({lookup.table for lookup in cut.lookups} - set(cut.tables))
    if remote:
        return None, f"rows of {', '.join(remote)} are on a parameter server"
    python = options.paddle_python or os.environ.get("PADDLE_PYTHON")
    if not python and importlib.util.find_spec("paddle"):
        python = sys.executable
    return python, "no Paddle here: --paddle PYTHON, one that has it"
