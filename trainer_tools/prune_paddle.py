"""prune-program for Paddle programs. Without Paddle, but for the proof."""

import importlib.util
import os
import sys
from pathlib import Path

from cube.client import LocalCube
from cube.keys import SIGN_RULE
from cube.publish import publishing
from cube.version import Version
from trainer_tools import accuracy, manifest, paddle_proof
from trainer_tools.export_rows import CUBE_DIRECTORY
from trainer_tools.paddle_proof import Cut
from trainer_tools.programs import paddle
from trainer_tools.programs.program import Candidate, Lookup, chosen, decide
from trainer_tools.pruning import Difference, Options, Report, drawn
from trainer_tools.tables import export, tables_of

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
    cut = Cut(program, program.cut(lookups), lookups, tables_of(lookups, options.vocabularies))
    python, unproven = _prover(options, cut)
    with publishing(out, replace=True) as draft:
        place = draft / PROGRAM_DIRECTORY
        place.mkdir()
        cut.pruned.write(place)
        paddings = {lookup.table: program.ids(lookup).padding for lookup in lookups}
        version = Version(int(trained.path.stat().st_mtime))
        exported = export(program, cut.tables, paddings, draft, version, options.drop_zero_rows)
        result = _manifest(cut, exported, place, options)
        manifest.write(result, draft / manifest.MANIFEST_FILE)
        difference = Difference()
        if python and not unproven:
            original = program if options.fetch else trained  # what names no outputs cannot be run as it stands
            cube = LocalCube(draft / CUBE_DIRECTORY)
            difference = paddle_proof.compare(python, original, cut, place, cube, options.verify_samples)
        difference.check(out)
        run = paddle_proof.runs(python, cut.pruned, place) if python and options.wanted.data else None
        measured = accuracy.settle(draft, out, result, options.wanted, run)
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
        compared=0 if unproven else options.verify_samples,
        largest_difference=difference.largest,
        largest_ulps=difference.ulps,
        unproven=unproven,
        row_format=options.wanted.row_format.text,
        accuracy=measured,
        picture=drawn(options, program, cut.pruned, candidates),
    )


def _noted(candidate: Candidate, cut: Cut) -> Candidate:
    """With what was found out by cutting."""
    reason = candidate.reason
    if candidate.is_cut and (inputs := cut.program.ids(candidate.lookup).inputs) != [candidate.lookup.ids]:
        reason += f"; ids arranged from {', '.join(inputs)}"
    if candidate.is_cut and candidate.lookup.table in cut.pruned.parameters:
        reason += "; the table stays too, for other ops read it"
    return candidate._replace(reason=reason)


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


def _lookups(cut: Cut) -> list[manifest.Lookup]:
    shapes = {tensor.name: tensor.shape for tensor in cut.pruned.inputs()}
    numbers = {ids: number for number, ids in enumerate(dict.fromkeys(lookup.ids for lookup in cut.lookups))}
    return [
        manifest.Lookup(
            keys=f"{lookup.ids}.keys" if lookup.ids in shapes else lookup.ids,  # ids that are read otherwise too
            text=f"{lookup.ids}.text",
            lengths=f"{lookup.ids}.lengths",
            slots=[manifest.Slot(lookup.ids, numbers[lookup.ids])],
            table=cut.tables[lookup.table].name if lookup.table in cut.tables else lookup.table,
            pooling="none",
            feed=lookup.feed,
            feed_shape=shapes[lookup.feed],
            lod_level=cut.pruned.lod_level(lookup.feed),
            arranged_from=[name for name in cut.program.ids(lookup).inputs if name != lookup.ids],
            padding=_padding(cut, lookup),
        )
        for lookup in cut.lookups
    ]


def _padding(cut: Cut, lookup: Lookup) -> int | None:
    """The key that stands for no key."""
    row, table = cut.program.ids(lookup).padding, cut.tables.get(lookup.table)
    return row if row is None or table is None or row >= table.keys.size else int(table.keys[row])


def _prover(options: Options, cut: Cut) -> tuple[str | None, str]:
    """The Python that has Paddle, if there is one; and why nothing is compared, empty if it is."""
    python = options.paddle_python or os.environ.get("PADDLE_PYTHON")
    if not python and importlib.util.find_spec("paddle"):
        python = sys.executable
    remote = sorted({lookup.table for lookup in cut.lookups} - set(cut.tables))
    if not options.verify_samples:
        return python, "--verify 0"
    if remote:
        return python, f"rows of {', '.join(remote)} are on a parameter server"
    return python, "" if python else "no Paddle here: --paddle PYTHON, one that has it"
