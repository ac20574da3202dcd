"""prune-program: cut the lookups out of a trained program, and prove that what is left plus the rows is the same.

model/signature.json, program.pt2, vocabulary.npy
    → model.pruned/program.pt2      the dense program; each lookup's output is an input now
      model.pruned/rows/TABLE/      keys.npy and rows.npy, for cube-build
      model.pruned/cube/            the same rows as a one-shard cube, for a predictor without cube-servers
      model.pruned/manifest.json    what ties them together
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram
from tqdm import tqdm

from cube import build
from cube.client import LocalCube
from cube.errors import BadData, DataCorrupt, ServingError
from cube.keys import SIGN_RULE
from cube.publish import publishing
from cube.sources import open_source
from cube.version import Version
from trainer_tools import criteo, manifest
from trainer_tools.export_rows import read_vocabulary, rows_of
from trainer_tools.programs import torch_export
from trainer_tools.programs.torch_export import Bag

PROGRAM_FILE, ROWS_DIRECTORY, CUBE_DIRECTORY = "program.pt2", "rows", "cube"
TOLERANCE = 1e-6  # float32 rounding of a score; lookups are exact, so anything above is a wrong row or a wrong cut


class Cut(NamedTuple):
    """A lookup and what the trainer said of it."""

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


class Report(NamedTuple):
    """What was done and found."""

    out: Path
    name: str
    version: int
    lookups: list[str]
    ops: tuple[int, int]
    program_bytes: tuple[int, int]
    rows: int
    compared: int  # samples
    largest_difference: float

    def __str__(self) -> str:
        (ops_before, ops_after), (bytes_before, bytes_after) = self.ops, self.program_bytes
        return "\n".join(
            [
                f"prune-program: {self.name} {self.version} → {self.out}",
                *(f"  cut    {lookup}" for lookup in self.lookups),
                f"  ops    {ops_before} → {ops_after}",
                f"  bytes  {bytes_before:,} → {bytes_after:,}, {self.rows:,} rows exported",
                f"  proof  original against pruned + rows on {self.compared:,} samples:"
                f" largest difference {self.largest_difference:g}"
                if self.compared
                else "  proof  none: nothing was compared (--verify 0)",
            ]
        )


def prune(
    directory: Path, out: Path, verify_samples: int = 256, verify_lines: Path | None = None, show_progress: bool = False
) -> Report:
    """Prune the program in `directory` into `out`, which appears complete or not at all.

    An `out` that prune-program wrote before is replaced; any other existing directory is refused. Raises BadData for
    what cannot be pruned, DataCorrupt if the result does not compute what the original does.
    """
    _check_out(out)
    signature = manifest.read(manifest.Signature, directory / manifest.SIGNATURE_FILE)
    if signature.sign != SIGN_RULE:
        raise BadData(f"{directory / manifest.SIGNATURE_FILE} sign", repr(signature.sign), repr(SIGN_RULE))
    source = manifest.inside(directory, signature.program, f"{directory / manifest.SIGNATURE_FILE} program")
    program = torch_export.load(source)
    cuts = _cuts(program, signature, directory)
    pruned = torch_export.cut(program, {cut.bag.node: cut.feed for cut in cuts})
    version = Version(signature.version)
    with publishing(out, replace=True) as draft:
        torch_export.save(pruned, draft / PROGRAM_FILE)
        tables = {}
        for table, cut in {cut.trained.table: cut for cut in cuts}.items():
            weight = torch_export.weight(program, cut.bag.weight)
            rows = rows_of(table, weight, cut.vocabulary)
            rows.write(draft / ROWS_DIRECTORY / table)
            source_of_rows = open_source([str(draft / ROWS_DIRECTORY / table)])
            build.build(source_of_rows, draft / CUBE_DIRECTORY, table, version)
            tables[table] = manifest.Table(
                version=str(version), dim=weight.shape[1], rows=cut.vocabulary.size, absent="zeros"
            )
        feeds = {cut.feed for cut in cuts}
        result = manifest.Manifest(
            schema=1,
            name=signature.name,
            version=signature.version,
            program=manifest.Program(PROGRAM_FILE, "torch.export", _sha256(draft / PROGRAM_FILE)),
            sign=signature.sign,
            inputs=[tensor for tensor in torch_export.inputs_of(pruned) if tensor.name not in feeds],
            lookups=[_lookup(cut, several=len(cuts) > 1) for cut in cuts],
            tables=tables,
            outputs=torch_export.outputs_of(pruned),
            cube=CUBE_DIRECTORY,
            source_sha256=_sha256(source),
            tool=f"cube-serving {importlib.metadata.version('cube-serving')}",
        )
        manifest.write(result, draft / manifest.MANIFEST_FILE)
        # the proof reads back what was written, not what is in memory
        compared, difference = _verify(source, draft, cuts, verify_samples, verify_lines, show_progress)
        if not difference <= TOLERANCE:
            raise DataCorrupt(
                f"{out} proof", f"scores that differ by {difference:g}", f"at most {TOLERANCE:g}: nothing was written"
            )
    return Report(
        out,
        signature.name,
        signature.version,
        [
            f"{c.bag.node} over {c.bag.weight} ({c.bag.pooling}, {len(c.trained.slots)} slots) → input {c.feed}"
            for c in cuts
        ],
        (_ops(program), _ops(pruned)),
        (source.stat().st_size, (out / PROGRAM_FILE).stat().st_size),
        sum(table.rows for table in tables.values()),
        compared,
        difference,
    )


def _check_out(out: Path) -> None:
    """Raise BadData for an existing path that is not, name by name, what prune-program writes."""
    if not out.exists():
        return
    ours = {PROGRAM_FILE, ROWS_DIRECTORY, CUBE_DIRECTORY, manifest.MANIFEST_FILE}
    try:
        is_ours = {path.name for path in out.iterdir()} <= ours
        manifest.read(manifest.Manifest, out / manifest.MANIFEST_FILE)
    except (OSError, BadData):
        is_ours = False
    if not is_ours:
        raise BadData(str(out), "an existing path that prune-program did not write", "a new name: --out")


def _cuts(program: ExportedProgram, signature: manifest.Signature, directory: Path) -> list[Cut]:
    """Match the program's bags with what the signature says of its inputs."""
    bags, place = torch_export.find_bags(program), str(directory / manifest.SIGNATURE_FILE)
    if not bags:
        raise BadData(
            str(directory / signature.program), "no embedding_bag", "a lookup to cut; serve a dense program as it is"
        )
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
    return [
        Cut(
            bag,
            lookup,
            read_vocabulary(manifest.inside(directory, lookup.vocabulary, f"{place} vocabulary")),
            f"{bag.node}_pooled",
        )
        for bag in bags
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


def _verify(
    source: Path, draft: Path, cuts: list[Cut], samples: int, lines: Path | None, show_progress: bool
) -> tuple[int, float]:
    """Largest difference of any output between the original and pruned + rows, and on how many samples."""
    original, pruned = torch_export.load(source), torch_export.load(draft / PROGRAM_FILE)
    runs = torch_export.runnable(original), torch_export.runnable(pruned)
    names = [t.name for t in torch_export.inputs_of(original)], [t.name for t in torch_export.inputs_of(pruned)]
    dense = [t for t in torch_export.inputs_of(pruned) if t.name not in {cut.feed for cut in cuts}]
    cube = LocalCube(draft / CUBE_DIRECTORY)
    batches = itertools.chain(
        [_random_samples(cuts, dense, samples, np.random.default_rng(0))] if samples else [],
        _criteo_samples(cuts, dense, lines) if lines else [],
    )
    compared, largest = 0, 0.0
    with torch.inference_mode(), tqdm(unit="sample", unit_scale=True, desc="compare", disable=not show_progress) as bar:
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


def _ops(program: ExportedProgram) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """prune-program."""
    parser = argparse.ArgumentParser(
        prog="prune-program",
        description="Cut the embedding lookups out of a trained program: writes the dense program, the tables as rows "
        "and as a local cube, and a manifest that ties them together, after proving that the result computes what the "
        "original does.",
    )
    parser.add_argument("directory", metavar="DIR", help="trained model: signature.json and the files it names")
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: DIR.pruned); what prune-program wrote there is replaced"
    )
    parser.add_argument(
        "--verify", type=int, default=256, metavar="N", help="compare on N random samples (default: 256)"
    )
    parser.add_argument("--lines", metavar="FILE", help="compare on these Criteo lines too")
    args = parser.parse_args(argv)
    directory = Path(args.directory)
    out = Path(args.out) if args.out else directory.parent / f"{directory.resolve().name}.pruned"
    try:
        if args.verify < 0:
            raise BadData("--verify", args.verify, "0 or more")
        report = prune(
            directory, out, args.verify, Path(args.lines) if args.lines else None, show_progress=sys.stderr.isatty()
        )
    except (ServingError, OSError) as error:
        print(f"prune-program: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prune-program: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(report)
    return 0
