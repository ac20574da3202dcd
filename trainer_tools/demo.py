"""The product doing its main job, on real processes: `make demo`.

Criteo lines → train → prune-program → cube-build → two cube-servers and a predictor-server → ctr-client; then the
same once more with the local cube. Served scores must equal those of the trained program itself. Anything else is a
failure, and no process outlives this one.
"""

import argparse
import contextlib
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cube.errors import BadData, ServingError
from trainer_tools import criteo, synthetic
from trainer_tools.criteo import CriteoRows

SHARDS, TEST_SHARE, SEED = 2, 0.2, 7
MAX_SCORE_DIFFERENCE, MAX_AUC_DIFFERENCE = 1e-5, 1e-4
READY_S = 600  # the first start after installation compiles kernels, on a busy machine for minutes
MARKER = ".made-by-demo"
_ENDING = (signal.SIGINT, signal.SIGTERM)
_LISTENING = re.compile(r"listening on (\S+),")


class Failed(Exception):
    """A step did not do what it must."""


class Places(NamedTuple):
    """Where the demo leaves things, all under one directory: the repository's root unless told otherwise."""

    model: Path
    pruned: Path
    cube: Path
    data: Path

    @classmethod
    def under(cls, root: Path) -> "Places":
        return cls(root / "model", root / "model.pruned", root / "cube-data", root / "demo-data")


class Prepared(NamedTuple):
    """Lines, split in time order as a trainer would."""

    train: CriteoRows
    test: CriteoRows
    test_lines: Path
    best_auc: float | None  # of the test lines, where the truth is known


def demo(places: Places, given: Path | None, lines: int) -> None:
    """Run everything; raises Failed, ServingError."""
    for directory in (places.model, places.cube):
        check_own(directory)
    prepared = prepare(places.data, given, lines)
    offline = _trained(places.model, prepared)
    offline_auc = criteo.auc(prepared.test.labels, offline)
    best = f", best possible {prepared.best_auc:.4f}" if prepared.best_auc is not None else ""
    say(f"offline AUC on {len(offline):,} test lines: {offline_auc:.4f}{best}")

    say("prune-program")
    run_tool("prune-program", places.model, "--out", places.pruned, "--lines", prepared.test_lines)
    version = f"{json.loads((places.pruned / 'manifest.json').read_text())['version']}@0"

    say("cube-build")
    fresh(places.cube)
    rows = places.pruned / "rows" / "embedding"
    run_tool("cube-build", rows, "--table", "embedding", "--version", version, "--shards", SHARDS, "--out", places.cube)

    for title, remote in (
        (f"{SHARDS} cube-servers and a predictor-server", True),
        ("one predictor-server, local cube", False),
    ):
        say(f"serving: {title}")
        with contextlib.ExitStack() as processes:
            shards = [
                processes.enter_context(
                    started("cube-server", "--shard", shard, "--shards", SHARDS, "--data", places.cube)
                )
                for shard in range(SHARDS if remote else 0)
            ]
            cube = ["--cube", ",".join(shards), "--cube-timeout-ms", 9_000] if remote else []  # machines may be busy
            predictor = processes.enter_context(started("predictor-server", "--model", places.pruned, *cube))
            _score_and_compare(predictor, prepared, offline, offline_auc)
            if remote:
                run_tool("cube-ctl", "status", "--cube", ",".join(shards))
                run_tool("cube-ctl", "tables", "--cube", ",".join(shards))
    say("done: every served score equals the trained program's")


def prepare(directory: Path, given: Path | None, lines: int) -> Prepared:
    """Read the given file, or write (once) and read generated lines. Test lines are the last fifth."""
    directory.mkdir(parents=True, exist_ok=True)
    path, truth = given or directory / f"generated-{lines}-{SEED}.tsv", None
    if given is None:
        truth_file = path.with_suffix(".truth.npy")
        if not truth_file.exists():  # renamed last: it is there only if lines and truth are whole
            with bar(f"generate {path.name}", lines) as progress:
                np.save(directory / "draft.npy", synthetic.write(path, lines, SEED, progress))
            (directory / "draft.npy").rename(truth_file)
        truth = np.load(truth_file, allow_pickle=False)
    with bar(f"read {path}", None) as progress:
        rows = criteo.read(path, lines, progress)
    if len(rows.labels) == lines and given is not None:
        say(f"using the first {lines:,} lines of {path}; LINES=n for another number")
    at = max(1, min(len(rows.labels) - 1, round(len(rows.labels) * (1 - TEST_SHARE))))
    if len(rows.labels) < 2:
        raise BadData(str(path), "1 line", "at least 2: one to train on, one to test on")
    train, test = rows.split(at)
    test_lines = directory / "test.tsv"
    _copy_lines(path, at, len(test.labels), test_lines)
    best = criteo.auc(test.labels, truth[at : len(rows.labels)]) if truth is not None else None
    say(
        f"{len(train.labels):,} lines to train on, {len(test.labels):,} to test on, {np.unique(train.keys).size:,} keys"
    )
    return Prepared(train, test, test_lines, best)


def _trained(directory: Path, prepared: Prepared) -> NDArray[np.float32]:
    """Train, save, and score the test lines with the saved program itself."""
    from trainer_tools import train_ctr  # here, so that a bad data file is reported before torch is loaded

    say("train")
    begin = time.perf_counter()
    trained = train_ctr.train(prepared.train, SEED)
    say(f"trained in {time.perf_counter() - begin:.0f} s")
    fresh(directory)
    train_ctr.save(trained, "ctr", int(time.time()), directory)
    return train_ctr.score(directory, prepared.test)


def _score_and_compare(target: str, prepared: Prepared, offline: NDArray[np.float32], offline_auc: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "scores.npy")
        run_tool("ctr-client", prepared.test_lines, "--target", target, "--scores", file)
        served = np.load(file, allow_pickle=False)
    if served.shape != offline.shape:
        raise Failed(f"{served.size} served scores, {offline.size} offline ones")
    difference = float(np.abs(served - offline).max())
    served_auc = criteo.auc(prepared.test.labels, served)
    say(f"served against offline: largest difference {difference:.3g}, AUC {served_auc:.6f} against {offline_auc:.6f}")
    if not difference <= MAX_SCORE_DIFFERENCE:
        raise Failed(f"served scores differ from offline ones by {difference:g}, allowed {MAX_SCORE_DIFFERENCE:g}")
    if not (abs(served_auc - offline_auc) <= MAX_AUC_DIFFERENCE or np.isnan(offline_auc)):
        raise Failed(
            f"served AUC {served_auc:.6f}, offline {offline_auc:.6f}, allowed difference {MAX_AUC_DIFFERENCE:g}"
        )


def _copy_lines(source: Path, skip: int, count: int, target: Path) -> None:
    """Data lines skip .. skip + count of a file, with its header if it has one, as plain text."""
    with gzip.open(source, "rb") if source.suffix == ".gz" else source.open("rb") as file, target.open("wb") as out:
        lines: Iterator[bytes] = iter(file)
        first = next(lines)
        if criteo.is_header(first):
            out.write(first)
        else:
            lines = itertools.chain([first], lines)
        out.writelines(itertools.islice(lines, skip, skip + count))


def check_own(directory: Path) -> None:
    """Raise Failed for a directory that holds anything, unless an earlier run of the demo made it."""
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).exists():
        raise Failed(f"{directory} is not of the demo's making: move it away, or run in another place with --root DIR")


def fresh(directory: Path) -> None:
    """Make a directory of the demo's own empty."""
    check_own(directory)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARKER).write_text("Made by the demo, which removes this directory when it runs again.\n")


def say(line: str) -> None:
    """A step of the demo."""
    print(f"demo: {line}", flush=True)


@contextlib.contextmanager
def bar(title: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """A progress bar over lines."""
    with tqdm(total=total, desc=title, unit="line", unit_scale=True, disable=None) as progress:
        yield progress.update


def run_tool(tool: str, *args: Any) -> None:
    """Run one of our commands as a user would; raises Failed."""
    with _process(tool, *args) as process:
        code = process.wait()
    if code:
        raise Failed(f"{tool} exited with {code}")


@contextlib.contextmanager
def started(tool: str, *args: Any) -> Iterator[str]:
    """A server on a free loopback port, by its address once it serves; stopped when the block ends."""
    with _process(tool, *args, "--listen", "127.0.0.1:0", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        late = threading.Timer(READY_S, process.kill)
        late.daemon = True
        late.start()
        try:
            line = process.stdout.readline()  # servers say where they listen once they serve, or end
        finally:
            late.cancel()
        print(line, end="", flush=True)
        found = _LISTENING.search(line)
        if not found:
            raise Failed(f"{tool} did not start: exit code {process.wait()}")
        yield found[1]
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        if code:
            raise Failed(f"{tool} exited with {code} after SIGTERM")


@contextlib.contextmanager
def _process(tool: str, *args: Any, stdout: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """A child that does not outlive the block, whatever happens in it."""
    command = [str(Path(sys.executable).with_name(tool)), *map(str, args)]
    process = None
    try:
        with _uninterrupted():
            process = subprocess.Popen(command, stdout=stdout, text=True, stdin=subprocess.DEVNULL)
        yield process
    finally:
        if process and process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process and process.stdout:
            process.stdout.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that end the demo are heard after the block: a child that has just been started must be known first."""
    if threading.current_thread() is not threading.main_thread():  # which is where signals are heard
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in came:
        signal.raise_signal(late)


def main(argv: Sequence[str] | None = None) -> int:
    """python -m trainer_tools.demo"""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FILE", help="Criteo lines, plain or .gz (default: generated ones)")
    parser.add_argument(
        "--lines", type=int, default=500_000, metavar="N", help="lines to generate, or to use of FILE at most"
    )
    parser.add_argument(
        "--root", default=".", metavar="DIR", help="where to leave model/, model.pruned/, cube-data/, demo-data/"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run the finally blocks: children must go
    try:
        if args.lines < 2:
            raise BadData("--lines", args.lines, "at least 2")
        demo(Places.under(Path(args.root)), Path(args.data) if args.data else None, args.lines)
    except (Failed, ServingError, OSError) as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; all processes stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
