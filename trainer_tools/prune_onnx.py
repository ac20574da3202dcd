"""prune-program for ONNX programs."""

import importlib.util
from pathlib import Path

from cube.keys import SIGN_RULE
from cube.publish import publishing
from cube.version import Version
from trainer_tools import accuracy, manifest, onnx_proof
from trainer_tools.export_rows import CUBE_DIRECTORY
from trainer_tools.onnx_proof import Cut
from trainer_tools.programs import onnx_file, onnx_program
from trainer_tools.programs.onnx_program import SUFFIX
from trainer_tools.programs.program import Candidate, chosen, decide
from trainer_tools.pruning import Difference, Options, Report, drawn
from trainer_tools.tables import export, tables_of

PROGRAM_DIRECTORY = "program"  # in what prune-program writes, as the elements of its tensors may lie beside it


def survey(place: Path, options: Options) -> list[Candidate]:
    """Which lookups would go, and why."""
    return decide(onnx_program.load(place).serving(options.fetch), options.rules)


def prune(place: Path, out: Path, options: Options) -> Report:
    """Prune the program in a directory, or in a file, into `out`; see prune_program.prune.

    Keys are the program's ids, or what --vocabulary gives for them. The version is when the program was saved, in Unix
    seconds.
    """
    trained = onnx_program.load(place)
    program = trained.serving(options.fetch)
    candidates = decide(program, options.rules)
    lookups = chosen(candidates, str(trained.path))
    cut = Cut(program, program.cut(lookups), lookups, tables_of(lookups, options.vocabularies))
    unproven = _unproven(options)
    with publishing(out, replace=True) as draft:
        directory = draft / PROGRAM_DIRECTORY
        directory.mkdir()
        file = directory / cut.pruned.write(directory)
        version = int(trained.path.stat().st_mtime)
        exported = export(program, cut.tables, {}, draft, Version(version), options.drop_zero_rows)
        result = manifest.Manifest(
            schema=1,
            name=_name(place, trained.path),
            version=version,
            program=_program(file),
            sign=SIGN_RULE if options.vocabularies else "none",
            inputs=[tensor for tensor in cut.pruned.inputs() if tensor.name not in {k.feed for k in lookups}],
            lookups=_lookups(cut),
            tables=exported,
            outputs=cut.pruned.outputs(),
            cube=CUBE_DIRECTORY,
            source_sha256=manifest.sha256(trained.path),
            tool=manifest.tool(),
        )
        manifest.write(result, draft / manifest.MANIFEST_FILE)
        difference = Difference()
        if not unproven:
            difference = onnx_proof.compare(trained, cut, file, draft / CUBE_DIRECTORY, options.verify_samples)
        difference.check(out)
        run = onnx_proof.runs(cut.pruned, file) if options.wanted.data and _has_onnxruntime() else None
        measured = accuracy.settle(draft, out, result, options.wanted, run)
    return Report(
        out=out,
        name=result.name,
        version=result.version,
        format=program.format,
        candidates=[_noted(candidate, cut) for candidate in candidates],
        ops=(trained.ops(), cut.pruned.ops()),
        program_bytes=(
            onnx_file.stored_bytes(trained.model, trained.path),
            sum(path.stat().st_size for path in (out / PROGRAM_DIRECTORY).iterdir()),
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


def _name(place: Path, file: Path) -> str:
    """Of the model: the directory's, or that of the file that was named."""
    return place.resolve().name if place != file else file.name.removesuffix(SUFFIX)


def _program(file: Path) -> manifest.Program:
    beside = [path.name for path in file.parent.iterdir() if path != file]
    return manifest.Program(
        f"{PROGRAM_DIRECTORY}/{file.name}",
        "onnx",
        manifest.sha256(file),
        parameters=f"{PROGRAM_DIRECTORY}/{beside[0]}" if beside else None,
    )


def _lookups(cut: Cut) -> list[manifest.Lookup]:
    shapes = {tensor.name: tensor.shape for tensor in cut.pruned.inputs()}
    numbers = {ids: number for number, ids in enumerate(dict.fromkeys(lookup.ids for lookup in cut.lookups))}
    return [
        manifest.Lookup(
            keys=f"{lookup.ids}.keys" if lookup.ids in shapes else lookup.ids,  # ids that are read otherwise too
            text=f"{lookup.ids}.text",
            lengths=None,
            slots=[manifest.Slot(lookup.ids, numbers[lookup.ids])],
            table=cut.tables[lookup.table].name,
            pooling="none",
            feed=lookup.feed,
            feed_shape=shapes[lookup.feed],
            arranged_from=[name for name in cut.program.ids(lookup).inputs if name != lookup.ids],
        )
        for lookup in cut.lookups
    ]


def _noted(candidate: Candidate, cut: Cut) -> Candidate:
    """With what was found out by cutting."""
    reason, lookup = candidate.reason, candidate.lookup
    if candidate.is_cut and (inputs := cut.program.ids(lookup).inputs) != [lookup.ids]:
        reason += f"; ids arranged from {', '.join(inputs)}"
    if candidate.is_cut and cut.pruned.holds(lookup.table):
        reason += "; the table stays too, for other ops read it"
    return candidate._replace(reason=reason)


def _unproven(options: Options) -> str:
    """Why nothing is compared; empty if it is."""
    if not options.verify_samples:
        return "--verify 0"
    return "" if _has_onnxruntime() else "no onnxruntime here: pip install 'cube-serving[onnx]'"


def _has_onnxruntime() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None
