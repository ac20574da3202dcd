"""prune-program: cut the lookups out of a trained program, and prove that what is left plus the rows is the same.

model/ with a torch.export program, signature.json and vocabularies, or with a Paddle or an ONNX program
    → model.pruned/program.pt2      the dense program; each lookup's output is an input now. Paddle, ONNX: program/
      model.pruned/rows/TABLE/      keys.npy and rows.npy, for cube-build
      model.pruned/cube/            the same rows as a one-shard cube, for a predictor without cube-servers
      model.pruned/manifest.json    what ties them together
"""

import argparse
import errno
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from cube.errors import BadData, ServingError
from cube.rows import RowFormat
from trainer_tools import manifest, prune_files, prune_paddle
from trainer_tools.accuracy import Wanted
from trainer_tools.export_rows import CUBE_DIRECTORY, ROWS_DIRECTORY
from trainer_tools.programs.detect import format_of
from trainer_tools.programs.program import MIN_ROWS, Candidate, Rules
from trainer_tools.pruning import Options, Report, described, facts

_REMEDIES = {
    errno.ENOSPC: "a disk with more room", errno.EDQUOT: "a disk with more room", errno.EFBIG: "room for larger files",
    errno.EACCES: "a place that you may write to", errno.EPERM: "a place that you may write to",
    errno.EROFS: "a place that can be written to", errno.ENOTDIR: "a path whose parents are directories",
}  # fmt: skip
_NAMES = {"paddle": "a Paddle", "onnx": "an ONNX"}
_WRITTEN = {"program.pt2", prune_files.PROGRAM_DIRECTORY, ROWS_DIRECTORY, CUBE_DIRECTORY, manifest.MANIFEST_FILE}


def prune(directory: Path, out: Path, options: Options = Options()) -> Report:  # noqa: B008 - immutable
    """Prune the program in `directory` into `out`, which appears complete or not at all.

    An `out` that prune-program wrote before is replaced; any other existing directory is refused. Raises BadData for
    what cannot be pruned, DataCorrupt if the result does not compute what the original does.
    """
    steps = _steps(directory, options)
    _check_out(directory, out)
    options.wanted.check()
    return steps.prune(directory, out, options)


def survey(directory: Path, options: Options = Options()) -> list[Candidate]:  # noqa: B008 - immutable
    """What `prune` would do with each lookup of the program in `directory`, and why. Raises BadData."""
    return _steps(directory, options).survey(directory, options)


class _Steps(Protocol):
    """What the module for one format has."""

    def prune(self, directory: Path, out: Path, options: Options) -> Report: ...

    def survey(self, directory: Path, options: Options) -> list[Candidate]: ...


def _steps(directory: Path, options: Options) -> _Steps:
    """The module for a program's format. What the other formats need is not loaded."""
    form = format_of(directory)
    if form == "torch.export":
        from trainer_tools import prune_torch

        return prune_torch
    if options.verify_lines:
        raise BadData("--lines", f"{_NAMES[form]} program", "a torch.export program")
    if form == "paddle":
        return prune_paddle
    if not importlib.util.find_spec("onnx"):
        raise BadData(str(directory), "an ONNX program, and no onnx here", "pip install 'cube-serving[onnx]'")
    from trainer_tools import prune_onnx

    return prune_onnx


def _check_out(directory: Path, out: Path) -> None:
    """Raise BadData for a path that would change the input, and for an existing one that prune-program did not write.

    directory: of the trained model, or its program's file, beside which there may be anything.
    """
    place, source = out.resolve(), directory.resolve()
    if directory.is_dir() and place.is_relative_to(source):
        raise BadData(str(out), "a path inside the trained model", "another: --out")
    files = list(directory.iterdir()) if directory.is_dir() else [directory]  # that may be links
    found = [source, *(path.parent.resolve() / path.name for path in files), *(path.resolve() for path in files)]
    if any(path.is_relative_to(place) for path in found):
        raise BadData(str(out), "a path that holds the trained model", "another: --out")
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
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that drafts go away
    directory = Path(args.directory)
    out = Path(args.out) if args.out else _beside(directory)
    try:
        if args.svg:
            _check_picture(Path(args.svg))
        candidates = survey(directory, _options(args)) if args.dry_run else []
        report = None if args.dry_run else prune(directory, out, _options(args))
    except ServingError as error:
        print(f"prune-program: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"prune-program: {_not_written(error, out, '--out')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prune-program: interrupted, nothing was written", file=sys.stderr)
        return 130
    if report is None:
        return _dry_run(candidates, args.json)
    if args.json:
        print(report.json())
    print(report, file=sys.stderr if args.json else sys.stdout)
    if args.svg:
        try:
            Path(args.svg).write_text(report.picture, encoding="utf-8")
        except OSError as error:
            print(f"prune-program: {_not_written(error, Path(args.svg), '--svg')}", file=sys.stderr)
            return 1
    return 0


def _beside(place: Path) -> Path:
    """Where the result goes if nobody says: beside the model's directory, also where a file in it was named.

    With that file's name then, for it is named where it is one of several.
    """
    if place.is_file():
        place = Path(os.path.abspath(place))  # of a link, where it lies: not where it leads
        return place.parent.parent / f"{place.parent.name}.{place.stem}.pruned"
    place = place if place.name not in ("", "..") else place.resolve()
    return place.parent / f"{place.name}.pruned"


def _check_picture(file: Path) -> None:
    """Raise BadData where no picture can be written, before the work is done."""
    if file.is_dir() or not file.parent.is_dir():
        found = "a directory" if file.is_dir() else f"no directory {file.parent}"
        raise BadData(f"--svg {file}", found, "a file in a directory that exists")


def _not_written(error: OSError, place: Path, flag: str) -> BadData:
    """An error of the operating system, with what to do about it."""
    at = str(error.filename or place)
    return BadData(at, error.strerror or error, f"{_REMEDIES.get(error.errno or 0, 'a place to write to')}: {flag}")


def _dry_run(candidates: Sequence[Candidate], as_json: bool) -> int:
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
        help="trained model: a torch.export program (*.pt2), which signature.json may explain, a Paddle program "
        "(__model__ or *.pdmodel) with its parameters, or an ONNX program (*.onnx); or the program's file itself",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where to write (default: DIR.pruned, and DIR.NAME.pruned for the file DIR/NAME.onnx, beside DIR); what "
        "prune-program wrote there is replaced",
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
        help="an output to serve, instead of all of the program's; what it does not depend on goes",
    )
    parser.add_argument(
        "--vocabulary",
        action="append",
        default=[],
        metavar="TABLE=FILE",
        help="a .npy array uint64[rows], the key of each row of a table (default: keys are ids)",
    )
    _add_rows_flags(parser)
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
        "--dry-run", action="store_true", help="say which lookups would go and why, write nothing; exit 1 if none would"
    )
    parser.add_argument(
        "--svg", metavar="FILE", help="write a picture of the program before and after the cut, as SVG, to this file"
    )
    parser.add_argument(
        "--json", action="store_true", help="report as JSON on standard output, as text on standard error"
    )
    return parser


def _add_rows_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("row format of the local cube, and what it does to scores")
    group.add_argument(
        "--format",
        default=RowFormat.F32.text,
        choices=[row_format.text for row_format in RowFormat],
        help="f32 (default: exact), f16, bf16, or i8 with a scale and a bias per row; what is in rows/ is exact always",
    )
    group.add_argument(
        "--check",
        metavar="DATA",
        help="score this data with rows as trained and in the format, and report how scores and AUC change: Criteo "
        "lines, or an .npz with an array for each input of a request, as the manifest names them, and perhaps `label`",
    )
    group.add_argument(
        "--max-auc-loss", type=float, metavar="X", help="write nothing if --check finds that the AUC falls by more"
    )


def _options(args: argparse.Namespace) -> Options:
    for flag, value in (
        ("--verify", args.verify),
        ("--min-rows", args.min_rows),
        ("--max-auc-loss", args.max_auc_loss),
    ):
        if value is not None and not value >= 0:
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
        wanted=Wanted(RowFormat.parse(args.format), Path(args.check) if args.check else None, args.max_auc_loss),
        verify_samples=args.verify,
        verify_lines=Path(args.lines) if args.lines else None,
        paddle_python=args.paddle,
        draw=bool(args.svg),
        show_progress=sys.stderr.isatty(),
    )
