"""prune-program for torch.export programs, whose trainer says in signature.json what their inputs mean."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cube import build
from cube.client import LocalCube
from cube.errors import BadData, DataCorrupt
from cube.keys import SIGN_RULE
from cube.publish import publishing
from cube.version import Version
from trainer_tools import criteo, manifest
from trainer_tools.export_rows import CUBE_DIRECTORY, ROWS_DIRECTORY, build_cube, read_vocabulary, rows_of
from trainer_tools.programs import torch_export
from trainer_tools.programs.program import Candidate, Lookup, chosen, decide
from trainer_tools.programs.torch_export import PROGRAM_FILE, Bag, TorchProgram
from trainer_tools.pruning import TOLERANCE, Options, Report


class Cut(NamedTuple):
    """A lookup that goes, and what the trainer said of it."""

    bag: Bag
    trained: manifest.TrainedLookup
    vocabulary: NDArray[np.uint64]
    feed: str


class Sparse(NamedTuple):
    """Keys of one lookup. keys: uint64[k]; lengths: int64[n * slots], keys of each slot of each sample."""

    keys: NDArray[np.uint64]
    lengths: NDArray[np.int64]


class Samples(NamedTuple):
    """Inputs of n samples to compare on: the dense tensors and, lookup by lookup, the sparse ones."""

    size: int
    dense: list[torch.Tensor]
    sparse: list[Sparse]


def survey(directory: Path, options: Options) -> list[Candidate]:
    """Which lookups would go, and why."""
    _, _, program = _read(directory)
    return _decided(program, options)


def prune(directory: Path, out: Path, options: Options) -> Report:
    """Prune the program in `directory` into `out`; see prune_program.prune."""
    signature, source, program = _read(directory)
    candidates = _decided(program, options)
    lookups = chosen(candidates, str(source))
    cuts = _cuts(program, lookups, signature, directory)
    pruned = program.cut(lookups)
    version = Version(signature.version)
    with publishing(out, replace=True) as draft:
        file = pruned.write(draft)
        tables = {}
        for table, cut in {cut.trained.table: cut for cut in cuts}.items():
            weight = program.table(cut.bag.weight)
            rows = rows_of(table, weight, cut.vocabulary)
            count = rows.write(draft / ROWS_DIRECTORY / table, options.drop_zero_rows)
            build_cube(draft, table, version)
            tables[table] = manifest.Table(version=str(version), dim=weight.shape[1], rows=count, absent="zeros")
        feeds = {cut.feed for cut in cuts}
        result = manifest.Manifest(
            schema=1,
            name=signature.name,
            version=signature.version,
            program=manifest.Program(file, "torch.export", manifest.sha256(draft / file)),
            sign=signature.sign,
            inputs=[tensor for tensor in pruned.inputs() if tensor.name not in feeds],
            lookups=[_lookup(cut, several=len(cuts) > 1) for cut in cuts],
            tables=tables,
            outputs=pruned.outputs(),
            cube=CUBE_DIRECTORY,
            source_sha256=manifest.sha256(source),
            tool=manifest.tool(),
        )
        manifest.write(result, draft / manifest.MANIFEST_FILE)
        # the proof reads back what was written, not what is in memory
        compared, difference = _verify(source, draft, cuts, options)
        if not difference <= TOLERANCE:
            raise DataCorrupt(
                f"{out} proof", f"scores that differ by {difference:g}", f"at most {TOLERANCE:g}: nothing was written"
            )
    return Report(
        out=out,
        name=signature.name,
        version=signature.version,
        format=program.format,
        candidates=candidates,
        ops=(program.ops(), pruned.ops()),
        program_bytes=(source.stat().st_size, (out / file).stat().st_size),
        rows=sum(table.rows for table in tables.values()),
        compared=compared,
        largest_difference=difference,
    )


def _read(directory: Path) -> tuple[manifest.Signature, Path, TorchProgram]:
    """What the trainer said, the program's file and the program."""
    signature = manifest.read(manifest.Signature, directory / manifest.SIGNATURE_FILE)
    if signature.sign != SIGN_RULE:
        raise BadData(f"{directory / manifest.SIGNATURE_FILE} sign", repr(signature.sign), repr(SIGN_RULE))
    source = manifest.inside(directory, signature.program, f"{directory / manifest.SIGNATURE_FILE} program")
    return signature, source, TorchProgram(torch_export.load(source))


def _decided(program: TorchProgram, options: Options) -> list[Candidate]:
    rules = options.rules
    return decide(program, rules._replace(min_rows=0) if rules.min_rows is None else rules)  # the trainer named them


def _cuts(
    program: TorchProgram, lookups: Sequence[Lookup], signature: manifest.Signature, directory: Path
) -> list[Cut]:
    """Match the program's bags with what the signature says of its inputs."""
    bags, place = program.bags, str(directory / manifest.SIGNATURE_FILE)
    said = {(lookup.ids, lookup.offsets): lookup for lookup in signature.lookups}
    known = {(bag.ids, bag.offsets) for bag in bags}
    if set(said) != known or len(said) != len(signature.lookups):
        raise BadData(
            f"{place} lookups", f"ids and offsets {sorted(said)}", f"those of the program's bags, {sorted(known)}"
        )
    owner: dict[str, str] = {}
    for bag in bags:
        table = said[bag.ids, bag.offsets].table
        build.check_table_name(table)
        if owner.setdefault(table, bag.weight) != bag.weight:
            raise BadData(f"{place} table {table!r}", f"parameters {owner[table]} and {bag.weight}", "one parameter")
    feeds = {lookup.name: lookup.feed for lookup in lookups}
    return [
        Cut(
            bag,
            lookup,
            read_vocabulary(manifest.inside(directory, lookup.vocabulary, f"{place} vocabulary")),
            feeds[bag.node],
        )
        for bag in bags
        if bag.node in feeds
        for lookup in [said[bag.ids, bag.offsets]]
    ]


def _lookup(cut: Cut, several: bool) -> manifest.Lookup:
    prefix = f"{cut.bag.ids}_" if several else ""  # one lookup: plain names
    return manifest.Lookup(
        keys=f"{prefix}keys",
        text=f"{prefix}text",
        lengths=f"{prefix}lengths",
        slots=cut.trained.slots,
        table=cut.trained.table,
        pooling=cut.bag.pooling,  # type: ignore[arg-type]  # one of the two that find_bags lets pass
        feed=cut.feed,
    )


def _verify(source: Path, draft: Path, cuts: list[Cut], options: Options) -> tuple[int, float]:
    """Largest difference of any output between the original and pruned + rows, and on how many samples."""
    original, pruned = torch_export.load(source), torch_export.load(draft / PROGRAM_FILE)
    runs = torch_export.runnable(original), torch_export.runnable(pruned)
    names = [t.name for t in torch_export.inputs_of(original)], [t.name for t in torch_export.inputs_of(pruned)]
    dense = [t for t in torch_export.inputs_of(pruned) if t.name not in {cut.feed for cut in cuts}]
    cube = LocalCube(draft / CUBE_DIRECTORY)
    samples, lines = options.verify_samples, options.verify_lines
    batches = itertools.chain(
        [_random_samples(cuts, dense, samples, np.random.default_rng(0))] if samples else [],
        _criteo_samples(cuts, dense, lines) if lines else [],
    )
    compared, largest = 0, 0.0
    bar = tqdm(unit="sample", unit_scale=True, desc="compare", disable=not options.show_progress)
    with torch.inference_mode(), bar:
        for batch in batches:
            feeds = dict(zip((t.name for t in dense), batch.dense, strict=True))
            for cut, sparse in zip(cuts, batch.sparse, strict=True):
                feeds |= _both_ways(cut, sparse, cube)
            try:
                want, got = (run(*(feeds[name] for name in ours)) for run, ours in zip(runs, names, strict=True))
            except RuntimeError as error:
                found = f"inputs the program does not run on ({str(error).splitlines()[0][:200]})"
                raise BadData("proof", found, "as many slots in signature.json as the program reads") from error
            largest = max(largest, *(_difference(a, b) for a, b in zip(want, got, strict=True)))
            compared += batch.size
            bar.update(batch.size)
    return compared, largest


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference; infinite between nan and anything, 0 between equal infinities."""
    if torch.equal(one, other):
        return 0.0
    apart = torch.where(one == other, 0.0, (one.double() - other.double()).abs()).max().item()
    return apart if apart == apart else float("inf")


def _both_ways(cut: Cut, sparse: Sparse, cube: LocalCube) -> dict[str, torch.Tensor]:
    """A bag's inputs of the original (ids, offsets) and of the pruned program (the cube's rows, pooled by torch)."""
    order = np.argsort(cut.vocabulary)
    at = np.minimum(np.searchsorted(cut.vocabulary, sparse.keys, sorter=order), cut.vocabulary.size - 1)
    ids = np.where(cut.vocabulary[order[at]] == sparse.keys, order[at], cut.vocabulary.size)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sparse.lengths)]))
    rows = torch.from_numpy(cube.rows(cut.trained.table, None, sparse.keys).rows)
    each = torch.arange(len(sparse.keys))
    pooled = torch.nn.functional.embedding_bag(each, rows, offsets, mode=cut.bag.pooling, include_last_offset=True)
    return {cut.bag.ids: torch.from_numpy(ids), cut.bag.offsets: offsets, cut.feed: pooled}


def _random_samples(cuts: list[Cut], dense: list[manifest.Tensor], n: int, rng: np.random.Generator) -> Samples:
    """Slots of 0 to 3 keys, repeats among them, one key in ten unknown to the program."""
    for tensor in dense:
        if tensor.datatype != "FP32" or tensor.shape[:1] != [-1] or -1 in tensor.shape[1:]:
            found = f"{tensor.datatype} {tensor.shape}"
            raise BadData(
                f"input {tensor.name}", found, "FP32 [-1, ...] with fixed width, or no comparison: --verify 0"
            )
    sparse = []
    for cut in cuts:
        lengths = rng.integers(0, 4, n * len(cut.trained.slots))
        keys = rng.choice(cut.vocabulary, lengths.sum())
        unknown = rng.random(keys.size) < 0.1
        keys[unknown] = rng.integers(0, 2**64, unknown.sum(), dtype=np.uint64)
        sparse.append(Sparse(keys, lengths))
    return Samples(n, [torch.from_numpy(rng.random((n, *t.shape[1:]), dtype=np.float32)) for t in dense], sparse)


def _criteo_samples(cuts: list[Cut], dense: list[manifest.Tensor], lines: Path) -> Iterator[Samples]:
    """The samples of a file of Criteo lines, for a program that takes such."""
    slots, shapes = [len(cut.trained.slots) for cut in cuts], [tensor.shape for tensor in dense]
    if (slots, shapes) != ([criteo.SLOTS], [[-1, criteo.INTEGERS]]):
        found = f"a program with dense inputs {shapes} and lookups of {slots} slots"
        raise BadData(f"--lines {lines}", found, f"one dense input of {criteo.INTEGERS}, one lookup of {criteo.SLOTS}")
    for chunk in criteo.chunks(lines):
        for rows in chunk.batches(4096):
            sparse = Sparse(rows.keys, rows.lengths.astype(np.int64).ravel())
            yield Samples(len(rows.labels), [torch.from_numpy(rows.dense)], [sparse])
