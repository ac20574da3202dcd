"""prune-program: cut the lookups out of a trained program, and prove that what is left plus the rows is the same.

model/ with a torch.export program, signature.json and vocabularies, or with a Paddle program and its parameters
    → model.pruned/program.pt2      the dense program; each lookup's output is an input now. Paddle: program/
      model.pruned/rows/TABLE/      keys.npy and rows.npy, for cube-build
      model.pruned/cube/            the same rows as a one-shard cube, for a predictor without cube-servers
      model.pruned/manifest.json    what ties them together
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cube.errors import BadData, ServingError
from trainer_tools import manifest, prune_paddle
from trainer_tools.export_rows import CUBE_DIRECTORY, ROWS_DIRECTORY
from trainer_tools.programs.detect import format_of
from trainer_tools.programs.program import MIN_ROWS, Candidate, Rules
from trainer_tools.pruning import Options, Report, described, facts

_WRITTEN = {"program.pt2", prune_paddle.PROGRAM_DIRECTORY, ROWS_DIRECTORY, CUBE_DIRECTORY, manifest.MANIFEST_FILE}


def prune(directory: Path, out: Path, options: Options = Options()) -> Report:  # noqa: B008 - immutable
    """Prune the program in `directory` into `out`, which appears complete or not at all.

    An `out` that prune-program wrote before is replaced; any other existing directory is refused. Raises BadData for
    what cannot be pruned, DataCorrupt if the result does not compute what the original does.
    """
    _check_out(directory, out)
    if format_of(directory) == "paddle":
        if options.verify_lines:
            raise BadData("--lines", "a Paddle program", "a torch.export program")
        return prune_paddle.prune(directory, out, options)
    from trainer_tools import prune_torch  # torch is not needed for the other formats

    _check_torch(options)
    return prune_torch.prune(directory, out, options)


def survey(directory: Path, options: Options = Options()) -> list[Candidate]:  # noqa: B008 - immutable
    """What `prune` would do with each lookup of the program in `directory`, and why. Raises BadData."""
    if format_of(directory) == "paddle":
        return prune_paddle.survey(directory, options)
    from trainer_tools import prune_torch

    _check_torch(options)
    return prune_torch.survey(directory, options)


def _check_torch(options: Options) -> None:
    if options.fetch or options.vocabularies:
        flag = "--fetch" if options.fetch else "--vocabulary"
        raise BadData(flag, "a torch.export program", "a Paddle program; signature.json says it of the other")


def _check_out(directory: Path, out: Path) -> None:
    """Raise BadData for a path inside the input, and for an existing one that is not what prune-program writes."""
    if out.resolve().is_relative_to(directory.resolve()):
        raise BadData(str(out), "a path inside the trained model", "another: --out")
    if not out.exists():
        return
    try:
        is_ours = {path.name for path in out.iterdir()} <= _WRITTEN
        manifest.read(manifest.Manifest, out / manifest.MANIFEST_FILE)
    except (OSError, BadData):
        is_ours = False
    if not is_ours:
        raise BadData(str(out), "an existing path that prune-program did not write", "a new name: --out")


def main(argv: Sequence[str] | None = None) -> int:
    """prune-program."""
    args = _parser().parse_args(argv)
    directory = Path(args.directory)
    beside = directory if directory.name not in ("", "..") else directory.resolve()
    out = Path(args.out) if args.out else beside.parent / f"{beside.name}.pruned"
    try:
        if args.check:
            return _check(survey(directory, _options(args)), args.json)
        report = prune(directory, out, _options(args))
    except (ServingError, OSError) as error:
        print(f"prune-program: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prune-program: interrupted, nothing was written", file=sys.stderr)
        return 130
    if args.json:
        print(report.json())
    print(report, file=sys.stderr if args.json else sys.stdout)
    return 0


def _check(candidates: Sequence[Candidate], as_json: bool) -> int:
    """Print what would be done; 0 if a lookup would go."""
    if as_json:
        said = msgspec.json.encode([facts(candidate) for candidate in candidates])
        print(msgspec.json.format(said, indent=2).decode())
    else:
        print("\n".join(described(candidate) for candidate in candidates) or "  no lookups")
    return 0 if any(candidate.is_cut for candidate in candidates) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prune-program",
        description="Cut the embedding lookups out of a trained program: writes the dense program, the tables as rows "
        "and as a local cube, and a manifest that ties them together, after proving that the result computes what the "
        "original does.",
    )
    parser.add_argument(
        "directory",
        metavar="DIR",
        help="trained model: signature.json and the torch.export program it names, or a Paddle program (__model__ or "
        "*.pdmodel) with its parameters",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: DIR.pruned); what prune-program wrote there is replaced"
    )
    which = parser.add_argument_group("which lookups go (NAME: of a lookup or a table; may be repeated)")
    which.add_argument(
        "--min-rows",
        type=int,
        metavar="N",
        help=f"lookups in smaller tables stay (default: {MIN_ROWS}, or 0 where signature.json names the lookups)",
    )
    which.add_argument("--keep", action="append", default=[], metavar="NAME", help="this one stays")
    which.add_argument("--only", action="append", default=[], metavar="NAME", help="all others stay")
    parser.add_argument(
        "--fetch",
        action="append",
        default=[],
        metavar="NAME",
        help="Paddle: an output to serve, instead of those that the program fetches; what it does not depend on goes",
    )
    parser.add_argument(
        "--vocabulary",
        action="append",
        default=[],
        metavar="TABLE=FILE",
        help="Paddle: a .npy array uint64[rows], the key of each row of a table (default: keys are ids)",
    )
    parser.add_argument("--drop-zero-rows", action="store_true", help="rows of zeros are not exported: absent is zeros")
    parser.add_argument(
        "--verify", type=int, default=256, metavar="N", help="compare on N random samples (default: 256)"
    )
    parser.add_argument("--lines", metavar="FILE", help="compare on these Criteo lines too")
    parser.add_argument(
        "--paddle",
        metavar="PYTHON",
        help="Python that has Paddle, to compare Paddle programs with (default: $PADDLE_PYTHON, else this one)",
    )
    parser.add_argument(
        "--check", action="store_true", help="say which lookups would go and why, write nothing; exit 1 if none would"
    )
    parser.add_argument(
        "--json", action="store_true", help="report as JSON on standard output, as text on standard error"
    )
    return parser


def _options(args: argparse.Namespace) -> Options:
    for flag, value in (("--verify", args.verify), ("--min-rows", args.min_rows)):
        if value is not None and value < 0:
            raise BadData(flag, value, "0 or more")
    vocabularies = {}
    for text in args.vocabulary:
        table, equals, path = text.rpartition("=")
        if not (table and equals and path):
            raise BadData("--vocabulary", repr(text), "TABLE=FILE")
        vocabularies[table] = Path(path)
    return Options(
        rules=Rules(args.min_rows, args.keep, args.only),
        fetch=args.fetch,
        vocabularies=vocabularies,
        drop_zero_rows=args.drop_zero_rows,
        verify_samples=args.verify,
        verify_lines=Path(args.lines) if args.lines else None,
        paddle_python=args.paddle,
        show_progress=sys.stderr.isatty(),
    )
