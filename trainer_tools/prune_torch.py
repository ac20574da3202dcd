"""prune-program for torch.export programs. Their trainer may say in signature.json what their inputs mean."""

import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cube.client import LocalCube
from cube.errors import BadData
from cube.keys import SIGN_RULE
from cube.publish import publishing
from cube.version import Version
from trainer_tools import accuracy, criteo, feeding, manifest, proof, torch_proof
from trainer_tools.export_rows import CUBE_DIRECTORY
from trainer_tools.feeding import Run
from trainer_tools.manifest import Manifest
from trainer_tools.programs import servable, torch_export
from trainer_tools.programs.program import Candidate, chosen, decide, readers
from trainer_tools.programs.torch_export import PROGRAM_FILE, TorchProgram
from trainer_tools.proof import Expected
from trainer_tools.pruning import Difference, Options, Report, drawn
from trainer_tools.tables import are_row_numbers, build_cubes, sign_vectors, write_rows
from trainer_tools.torch_cuts import UNSIGNED, Cut, Trained, cuts_of, read, said_of
from trainer_tools.torch_proof import Inputs, Keyed, Original

_COLLECTED = 64 << 20  # bytes of a program that are worth the second that looking for it takes


def survey(directory: Path, options: Options) -> list[Candidate]:
    """Which lookups would go, and why."""
    return _decided(_read(directory, options), options)


def prune(directory: Path, out: Path, options: Options) -> Report:
    """Prune the program in `directory` into `out`; see prune_program.prune."""
    with publishing(out, replace=True) as draft:
        half = _halve(directory, out, draft, options)
        if half.report.program_bytes[0] > _COLLECTED:
            gc.collect()  # the trained program is a circle of references; its tables go before the cube comes
        build_cubes(draft, half.manifest.tables)
        # the proof reads back what was written, not what is in memory
        run = torch_proof.runs(torch_export.load(draft / PROGRAM_FILE))
        compared, worst = _compare(half, run, LocalCube(draft / CUBE_DIRECTORY), options)
        if not worst.is_rounding:
            _check_steady(directory, half.manifest, options)
        worst.check(out)
        measured = accuracy.settle(draft, out, half.manifest, options.wanted, run, torch_proof.pool)
    return replace(
        half.report,
        compared=compared,
        largest_difference=worst.largest,
        largest_ulps=worst.ulps,
        row_format=options.wanted.row_format.text,
        accuracy=measured,
    )


def _read(directory: Path, options: Options) -> Trained:
    trained = read(directory)
    return trained._replace(program=trained.program.serving(options.fetch)) if options.fetch else trained


class _Half(NamedTuple):
    """All that is asked of a trained program."""

    report: Report  # without what is found by comparing
    manifest: Manifest
    random: list[Expected]
    lines: list[list[NDArray[Any]]]  # outputs, batch by batch


def _halve(directory: Path, out: Path, draft: Path, options: Options) -> _Half:
    """Write what is left of the program, its rows and the manifest, and run the original."""
    trained = _read(directory, options)
    candidates = _decided(trained, options)
    lookups = chosen(candidates, str(trained.source))
    cuts = cuts_of(trained, lookups, options.vocabularies)
    pruned = trained.program.cut(lookups)
    _check_inputs(trained.program, pruned, candidates)
    proof.check_random_ops(str(trained.source), pruned.random_ops())
    if torch_export.is_stateful(pruned.program):
        found = "a program that changes its own parameters (max_norm), buffers or inputs in every run"
        raise BadData(
            str(trained.source), found, "one whose answer depends on its inputs only: no predictor serves others"
        )
    file = draft / pruned.write(draft)
    parameters = {cut.found.table: cut.table for cut in cuts}
    tables = write_rows(trained.program, parameters, {}, draft, Version(trained.version), options.drop_zero_rows)
    result = _manifest(trained, cuts, pruned, tables, manifest.sha256(file))
    manifest.write(result, draft / manifest.MANIFEST_FILE)
    report = Report(
        out=out,
        name=trained.name,
        version=trained.version,
        format=trained.program.format,
        candidates=[_noted(candidate, cuts, pruned) for candidate in candidates],
        ops=(trained.program.ops(), pruned.ops()),
        program_bytes=(trained.source.stat().st_size, file.stat().st_size),
        rows=sum(table.rows for table in tables.values()),
        compared=0,
        largest_difference=0,
        picture=drawn(options, trained.program, pruned, candidates),
    )
    original = Original(trained.program)
    keyed = [Keyed(cut.found, cut.table.keys) for cut in cuts]
    samples, lines = options.verify_samples, options.verify_lines
    return _Half(
        report,
        result,
        torch_proof.expected(original, result, keyed, samples) if samples else [],
        [original.run(inputs) for inputs in _criteo_inputs(original, keyed, result, lines)] if lines else [],
    )


def _check_inputs(program: TorchProgram, pruned: TorchProgram, candidates: Sequence[Candidate]) -> None:
    """Raise BadData where an input that is left cannot be parted by samples."""
    left = {tensor.name for tensor in pruned.inputs()}
    found = {found.name: found for found in program.found}
    stay = readers(candidates, lambda k: [*found[k.name].inputs, *found[k.name].of_bags()])
    for tensor in program.inputs():
        if tensor.name in left:
            servable.check_input(tensor.name, program.shape(tensor.name), program.samples, stay.get(tensor.name, ()))


def _decided(trained: Trained, options: Options) -> list[Candidate]:
    rules = options.rules
    if trained.signature is None:
        return decide(trained.program, rules)
    if options.vocabularies:
        raise BadData("--vocabulary", trained.place, "one of them: the signature names vocabularies")
    if rules.min_rows is None:
        rules = rules._replace(min_rows=0)  # the trainer named the lookups
    said = said_of(trained) if trained.program.found else {}
    return [
        candidate._replace(is_cut=False, reason="signature.json does not name it")
        if candidate.is_cut and candidate.lookup.name not in said
        else candidate
        for candidate in decide(trained.program, rules)
    ]


def _noted(candidate: Candidate, cuts: Sequence[Cut], pruned: TorchProgram) -> Candidate:
    """With what was found out by cutting."""
    reason, lookup = candidate.reason, candidate.lookup
    if candidate.is_cut:
        found = next(cut.found for cut in cuts if cut.found.name == lookup.name)
        if found.inputs != [found.called]:
            reason += f"; ids arranged from {', '.join(found.inputs)}"
        if found.added not in ((), (0,)):
            reason += f"; {', '.join(map(str, found.added))} added to ids"
        if found.pooling == "none":
            reason += servable.fixed_note(next(t.shape for t in pruned.inputs() if t.name == lookup.feed))
        if lookup.table in pruned.program.state_dict:
            reason += "; the table stays too, for other ops read it"
    return candidate._replace(reason=reason)


def _manifest(
    trained: Trained, cuts: Sequence[Cut], pruned: TorchProgram, tables: dict[str, manifest.Table], sha256: str
) -> Manifest:
    feeds = {cut.feed for cut in cuts}
    if trained.signature is None:
        lookups = _lookups(cuts, pruned)
        sign = SIGN_RULE if any(not are_row_numbers(cut.table.keys) for cut in cuts) else UNSIGNED
    else:
        lookups = [_said_lookup(cut, pruned, several=len(cuts) > 1) for cut in cuts]
        sign = trained.signature.sign
    result = Manifest(
        schema=1,
        name=trained.name,
        version=trained.version,
        program=manifest.Program(PROGRAM_FILE, "torch.export", sha256),
        sign=sign,
        inputs=[tensor for tensor in pruned.inputs() if tensor.name not in feeds],
        lookups=lookups,
        tables=tables,
        outputs=pruned.outputs(),
        cube=CUBE_DIRECTORY,
        source_sha256=manifest.sha256(trained.source),
        tool=manifest.tool(),
        signature=trained.signature.signature if trained.signature else manifest.DEFAULT_SIGNATURE,
        sign_vectors=sign_vectors(sign),
    )
    manifest.check_names(result)
    return result


def _lookups(cuts: Sequence[Cut], pruned: TorchProgram) -> list[manifest.Lookup]:
    """What nobody but the program says: requests name keys as it names ids."""
    numbers = itertools.count()
    slots: dict[str, list[manifest.Slot]] = {}
    taken: dict[str, object] = {tensor.name: tensor for tensor in pruned.inputs()}  # and what the names mean
    made = []
    for cut in cuts:
        found = cut.found
        keys = _free_name(
            taken, (found.called, f"{found.called}.keys", f"{found.name}.keys"), (found.ids, found.offsets)
        )
        if keys not in slots:
            count = found.slots or 1
            names = [keys] if count == 1 else [f"{keys}.{slot}" for slot in range(count)]
            slots[keys] = [manifest.Slot(name, next(numbers)) for name in names]
        weights = _free_name(taken, (found.weights, f"{keys}.weights"), found.weights) if found.weights else ""
        made.append(_entry(cut, pruned, slots[keys], keys, f"{keys}.text", f"{keys}.lengths", weights))
    return made


def _free_name(taken: dict[str, object], names: Sequence[str], meaning: object) -> str:
    """The first name that means nothing else, taken for this. An input that the program still reads has its name."""
    name = next((name for name in names if taken.get(name, meaning) == meaning), names[-1])
    taken[name] = meaning
    return name


def _said_lookup(cut: Cut, pruned: TorchProgram, several: bool) -> manifest.Lookup:
    """What a trainer says: requests name keys after ids, and plainly where there is one lookup."""
    assert cut.said is not None, "of a trainer's"
    prefix = f"{cut.said.ids}_" if several else ""
    return _entry(cut, pruned, cut.said.slots, *(prefix + name for name in ("keys", "text", "lengths", "weights")))


def _entry(
    cut: Cut, pruned: TorchProgram, slots: list[manifest.Slot], keys: str, text: str, lengths: str, weights: str
) -> manifest.Lookup:
    found, is_bag = cut.found, cut.found.pooling != "none"
    (feed,) = (tensor for tensor in pruned.inputs() if tensor.name == cut.feed)
    has_key = found.padding is not None and found.padding < cut.table.keys.size
    return manifest.Lookup(
        keys=keys,
        text=text,
        lengths=lengths if is_bag else None,
        slots=slots,
        table=cut.table.name,
        pooling=found.pooling,
        weights=weights if found.weights else None,
        feed=cut.feed,
        feed_shape=None if is_bag else feed.shape,
        arranged_from=[] if found.inputs == [found.called] else found.inputs,
        padding=int(cut.table.keys[found.padding]) if has_key else None,
        added=_added(cut, len(slots)),
    )


def _added(cut: Cut, slots: int) -> list[int]:
    """What makes keys of the ids of a request; where a vocabulary says the keys of rows, a request has these."""
    added = list(cut.found.added)
    if added in ([], [0]) or not are_row_numbers(cut.table.keys):
        return []
    return added * slots if cut.found.pooling != "none" and len(added) > 1 else added


def _compare(half: _Half, run: Run, cube: LocalCube, options: Options) -> tuple[int, Difference]:
    """On how many samples the original and pruned + rows were compared, and how far they are apart."""
    cases: Iterator[Expected] = iter(half.random)
    if options.verify_lines:
        rows = accuracy.criteo_rows(options.verify_lines)
        lines = (
            Expected(len(r.labels), accuracy.criteo_request(half.manifest, r), o)
            for r, o in zip(rows, half.lines, strict=True)
        )
        cases = itertools.chain(cases, lines)
    compared, worst = 0, Difference()
    with tqdm(unit="sample", unit_scale=True, desc="compare", disable=not options.show_progress) as bar:
        for case in cases:
            found = proof.compare(case, run, half.manifest, feeding.rows_in(cube), torch_proof.pool)
            worst = worst.or_larger(found)
            compared += case.samples
            bar.update(case.samples)
    return compared, worst


def _check_steady(directory: Path, result: Manifest, options: Options) -> None:
    """Raise BadData for a program that computes something else of the same samples each time."""
    trained = _read(directory, options)
    cuts = cuts_of(trained, chosen(_decided(trained, options), str(trained.source)), options.vocabularies)
    original, keyed = Original(trained.program), [Keyed(cut.found, cut.table.keys) for cut in cuts]
    again = partial(torch_proof.expected, original, result, keyed, max(1, options.verify_samples))
    proof.check_steady(str(trained.source), again)


def _criteo_inputs(original: Original, cuts: Sequence[Keyed], result: Manifest, lines: Path) -> Iterator[Inputs]:
    """The samples of a file of Criteo lines, for a program that takes such."""
    found = cuts[0].found
    if not accuracy.takes_criteo(result) or found.inputs != [found.ids] or found.is_even:
        dense, slots = [tensor.shape for tensor in result.inputs], [len(lookup.slots) for lookup in result.lookups]
        takes = f"a program with dense inputs {dense} and lookups of {slots} slots"
        raise BadData(f"--lines {lines}", takes, f"one dense input of {criteo.INTEGERS}, one lookup of {criteo.SLOTS}")
    keys, offsets = cuts[0].keys, str(found.offsets)
    order = np.argsort(keys)
    for rows in accuracy.criteo_rows(lines):
        at = np.minimum(np.searchsorted(keys, rows.keys, sorter=order), keys.size - 1)
        ids = np.where(keys[order[at]] == rows.keys, order[at], keys.size)
        ends = rows.offsets if found.has_end else rows.offsets[:-1]
        inputs = {result.inputs[0].name: rows.dense, found.ids: ids, offsets: ends}
        yield {name: torch.from_numpy(array) for name, array in inputs.items()}
