"""Rows looked up per second and core: ours in every row format, beside the machine's own limits and other stores.

Everything runs in one process group, in interleaved rounds, on one core, 4,096 keys a call; every contender's answer is
compared with the truth before it is timed. `gather` is the limit: rows whose numbers are known, prefetched, nothing to
hash or compare. Rivals in environments of their own (benchmarks/peers/) take part where FBGEMM_PYTHON and TFRA_PYTHON
say where those are; redis takes part where redis-server is installed.

    make bench WHAT=lookup            every table, distribution and rival: about ten minutes
    make bench WHAT='lookup --quick'  8 M keys x 16 only, without rivals
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import RESULTS, best_of, keep
from cube import build
from cube.kernels import U, kernel, prefetch
from cube.rows import RowFormat, flat, put_row
from cube.sources import open_source
from cube.storage.engines import open_store
from cube.storage.overlay import OverlaidSegment
from cube.version import Version

CALL, ASKED, ROUNDS = 4096, 1 << 20, 7
CASES = [(8_000_000, 16), (1_000_000, 16), (8_000_000, 10), (1_000_000, 10), (8_000_000, 64), (1_000_000, 64)]
OPENED = [(1_000_000, 16), (8_000_000, 64), (18_000_000, 128)]
Runs = dict[str, Callable[[], object]]


@kernel
def _gather(numbers, rows, row_bytes, out):  # type: ignore[no-untyped-def]
    """out[i] = rows[numbers[i]], 24 rows ahead: all that memory allows."""
    source, to = U(rows.ctypes.data), U(out.ctypes.data)
    for i in range(numbers.size):
        if i + 24 < numbers.size:
            ahead = source + U(numbers[i + 24]) * row_bytes
            line = U(0)
            while line < row_bytes:
                prefetch(ahead + line)
                line += U(64)
            prefetch(ahead + row_bytes - U(1))
        put_row(0, False, to + U(i) * row_bytes, source + U(numbers[i]) * row_bytes, row_bytes)


def on_lines(rows: np.ndarray) -> np.ndarray:
    """The same rows, each beginning at a cache line where its size allows."""
    raw = np.empty(rows.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + rows.nbytes].view(np.float32).reshape(rows.shape)
    copy[:] = rows
    return copy


def asked_for(count: int, how: str, rng: np.random.Generator) -> np.ndarray:
    """Row numbers: uniform, or Zipf with exponent 1.05, as feature frequencies are, the frequent ones spread out."""
    if how == "uniform":
        return rng.integers(0, count, ASKED)
    numbers = (rng.zipf(1.05, ASKED * 2) - 1) % (1 << 62)
    numbers = numbers[numbers < count][:ASKED]
    return rng.permutation(count)[np.resize(numbers, ASKED)]


def calls(array: np.ndarray) -> list[np.ndarray]:
    return [array[start : start + CALL] for start in range(0, len(array), CALL)]


class Table:
    """The rows of one case, and what is asked of it."""

    def __init__(self, count: int, dim: int, place: Path):
        rng = np.random.default_rng(count + dim)
        self.place, self.dim = place, dim
        self.keys = np.unique(rng.integers(0, 2**64, count, dtype=np.uint64))
        rng.shuffle(self.keys)
        self.rows = rng.standard_normal((self.keys.size, dim), dtype=np.float32)
        place.mkdir(parents=True)
        np.save(place / "keys.npy", self.keys)
        np.save(place / "rows.npy", self.rows)

    def built(self, **options: Any) -> tuple[Any, float]:
        """A store of the rows, and the seconds it took to build, by every core."""
        name = "-".join(str(option) for option in options.values())
        begin = time.perf_counter()
        source = open_source([str(self.place)])
        done = build.build(source, self.place / name, "t", Version(1), build.Options(**options, memory=8 << 30))
        seconds = time.perf_counter() - begin
        return open_store(next(done.directory.iterdir())), seconds


def store_run(store: Any, keys: np.ndarray, rows: np.ndarray, truth: np.ndarray, within: float) -> Callable[[], object]:
    """Look all keys up, call by call, into one buffer, as a server would; checked first."""
    out, found = np.empty((CALL, rows.shape[1]), np.float32), np.empty(CALL, np.bool_)
    parts = calls(keys)
    for start, part in enumerate(parts):
        store.lookup(part, out[: part.size], found[: part.size])
        here = truth[start * CALL : start * CALL + part.size]
        assert np.array_equal(found[: part.size], here >= 0)
        want = np.where((here >= 0)[:, None], rows[here], 0)
        assert np.abs(out[: part.size] - want).max() <= within, (store, np.abs(out[: part.size] - want).max())

    def run() -> None:
        for part in parts:
            store.lookup(part, out[: part.size], found[: part.size])

    return run


def memory_runs(table: Table, numbers: np.ndarray) -> Runs:
    """What knows the row numbers already: the machine's limit, and the usual ways to gather."""
    parts, rows, lined = calls(numbers), table.rows, on_lines(table.rows)
    out, tensor, tensors = np.empty((CALL, table.dim), np.float32), torch.from_numpy(rows), []
    tensors = [torch.from_numpy(part) for part in parts]
    out_tensor, bags = torch.from_numpy(out), torch.arange(CALL)
    row_bytes = U(4 * table.dim)

    def gather(where: np.ndarray) -> Callable[[], None]:
        bytes_ = flat(where)

        def run() -> None:
            for part in parts:
                _gather(part, bytes_, row_bytes, flat(out))

        return run

    def take() -> None:
        for part in parts:
            np.take(rows, part, axis=0, out=out[: part.size], mode="clip")  # the other modes copy twice

    def take_by_default() -> None:
        for part in parts:
            np.take(rows, part, axis=0)

    def index_select() -> None:
        for part in tensors:
            torch.index_select(tensor, 0, part, out=out_tensor[: part.numel()])

    def embedding_bag() -> None:
        for part in tensors:
            torch.nn.functional.embedding_bag(part, tensor, bags[: part.numel()], mode="sum")

    runs: Runs = {
        "gather": gather(rows),
        "gather, rows on cache lines": gather(lined),
        "numpy.take": take_by_default,
        "numpy.take, out=, mode='clip'": take,
        "torch.index_select": index_select,
        "torch embedding_bag": embedding_bag,
    }
    for name in ("gather", "gather, rows on cache lines", "numpy.take, out=, mode='clip'", "torch.index_select"):
        runs[name]()
        assert np.array_equal(out[: parts[-1].size], rows[parts[-1]]), name
    return runs


def pooled_runs(table: Table, store: Any, numbers: np.ndarray) -> Runs:
    """Sums over bags of 16: looked up and pooled in one pass, beside torch on known row numbers."""
    keys, offsets = calls(table.keys[numbers]), np.arange(0, CALL + 1, 16)
    sums, found = np.empty((CALL // 16, table.dim), np.float32), np.empty(CALL, np.bool_)
    tensor, bags = torch.from_numpy(table.rows), torch.from_numpy(offsets[:-1])
    parts = [torch.from_numpy(part) for part in calls(numbers)]

    def ours() -> None:
        for part in keys:
            store.pooled(part, offsets, False, sums, found)

    def theirs() -> None:
        for part in parts:
            torch.nn.functional.embedding_bag(part, tensor, bags, mode="sum")

    ours()
    assert np.allclose(sums, table.rows[numbers[-CALL:]].reshape(-1, 16, table.dim).sum(axis=1), atol=1e-5)
    return {"pooled, bags of 16: ours f32": ours, "pooled, bags of 16: torch embedding_bag": theirs}


@contextlib.contextmanager
def peer(module: str, variable: str, place: Path) -> Iterator[dict[str, tuple[Callable[[], float], float]]]:
    """A rival's ways to run and the seconds each took to load; none where its interpreter is not there."""
    interpreter = os.environ.get(variable)
    if not interpreter:
        print(f"{module}: {variable} is not set, left out", file=sys.stderr)
        yield {}
        return
    line = [interpreter, str(Path(__file__).parent / "peers" / f"{module}.py"), str(place), str(CALL)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdin
        assert it.stdout

        def run(name: str) -> float:
            print(json.dumps({"run": name}), file=it.stdin, flush=True)
            return float(json.loads(it.stdout.readline())["seconds"])

        ready = json.loads(it.stdout.readline())["ready"]
        yield {name: (lambda name=name: run(name), seconds) for name, seconds in ready.items()}
        it.stdin.close()


@contextlib.contextmanager
def redis_url(place: Path) -> Iterator[str]:
    """A redis-server of our own on a unix socket; "" where there is none."""
    if not shutil.which("redis-server"):
        yield ""
        return
    socket = place / "redis.sock"
    line = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        str(socket),
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(place),
    ]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        try:
            while not socket.exists():
                time.sleep(0.05)
            yield f"unix://{socket}"
        finally:
            process.terminate()


def timed_peers(runs: Runs, remote: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Least seconds of each: ours are timed here, rivals time themselves; rounds are interleaved."""
    best = dict.fromkeys([*runs, *remote], float("inf"))
    for turn in range(ROUNDS):  # the slow ones, seconds each, in the first three
        some = {name: run for name, run in runs.items() if turn < 3 or best[name] < 20 * min(best.values())}
        best |= {name: min(best[name], seconds) for name, seconds in best_of(some, 1).items()}
        best |= {name: min(best[name], run()) for name, run in remote.items()}
    return best


def index_bytes(store: Any) -> float:
    header = store.header
    return float((2 * header.buckets + 32 * header.partitions) / header.keys)


def measure(quick: bool, place: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    cases = CASES[:1] if quick else CASES
    for count, dim in cases:
        table = Table(count, dim, place / f"{count}-{dim}")
        stores, built = {}, {}
        for row_format in RowFormat:
            store, seconds = table.built(row_format=row_format)
            stores[row_format], built[row_format] = store, seconds
            store.verify()  # brings it into memory, too
        for how, absent in (("uniform", 0), ("uniform", 10), ("zipf", 0), ("zipf", 10)):
            results += case(
                table, stores, built, how, absent, rivals=not quick and (dim, how, absent) == (16, "uniform", 0)
            )
            print(f"{count:,} x {dim}, {how}, {absent} % absent: done", file=sys.stderr)
        shutil.rmtree(table.place)
    return results


def case(table: Table, stores: Any, built: Any, how: str, absent: int, rivals: bool) -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    numbers = asked_for(table.keys.size, how, rng)
    keys, truth = table.keys[numbers], numbers.copy()
    strangers = rng.random(ASKED) < absent / 100
    keys[strangers] = rng.integers(0, 2**64, int(strangers.sum()), dtype=np.uint64)
    truth[strangers] = -1
    within = {RowFormat.F32: 0.0, RowFormat.F16: 0.005, RowFormat.BF16: 0.03, RowFormat.I8: 0.03}
    runs: Runs = {
        f"ours {row_format.text}": store_run(store, keys, table.rows, truth, within[row_format])
        for row_format, store in stores.items()
    }
    in_memory = open_store(stores[RowFormat.F32].path)
    in_memory.load()
    runs["ours f32, in huge pages"] = store_run(in_memory, keys, table.rows, truth, 0.0)
    for share, name in ((100, "a hundredth"), (10, "a tenth")):
        changed = OverlaidSegment(stores[RowFormat.F32])
        some = rng.permutation(table.keys.size)[: table.keys.size // share]
        changed.upsert(table.keys[some], table.rows[some])
        runs[f"ours f32, {name} of the rows overlaid"] = store_run(changed, keys, table.rows, truth, 0.0)
    if not absent:
        runs |= memory_runs(table, numbers)
        runs |= pooled_runs(table, stores[RowFormat.F32], numbers)
    sizes = {f"ours {f.text}": stores[f].file_bytes / len(stores[f]) for f in stores}
    builds = {f"ours {f.text}": built[f] for f in stores}
    with contextlib.ExitStack() as stack:
        remote: dict[str, Callable[[], float]] = {}
        if rivals:
            np.save(table.place / "asked.npy", numbers)
            for engine in ("rocksdb", "lmdb"):
                store, seconds = table.built(engine=engine)
                runs[engine] = store_run(store, keys, table.rows, truth, 0.0)
                builds[engine], sizes[engine] = seconds, store.file_bytes / table.keys.size
            if table.keys.size <= 1_000_000 and (url := stack.enter_context(redis_url(table.place))):
                store, builds["redis MGET (hiredis, unix socket)"] = table.built(engine="redis", url=url)
                runs["redis MGET (hiredis, unix socket)"] = store_run(store, keys, table.rows, truth, 0.0)
            for module, variable in (("fbgemm", "FBGEMM_PYTHON"), ("tfra", "TFRA_PYTHON")):
                for name, (run, seconds) in stack.enter_context(peer(module, variable, table.place)).items():
                    remote[f"{module} {name}"], builds[f"{module} {name}"] = run, seconds
        best = timed_peers(runs, remote)
    bound = best.get("gather")
    return [
        {
            "keys": f"{table.keys.size / 1e6:.0f} M x {table.dim}",
            "asked": f"{how}, {absent} % absent",
            "who": who,
            "M keys/s": f"{ASKED / seconds / 1e6:.2f}",
            "÷ gather": f"{bound / seconds:.2f}" if bound else "",
            "bytes a row": f"{sizes[who]:.1f}" if who in sizes else "",
            "index bytes a key": f"{index_bytes(stores[RowFormat.F32]):.2f}" if who == "ours f32" else "",
            "M rows/s built, all cores": f"{table.keys.size / builds[who] / 1e6:.2f}" if who in builds else "",
        }
        for who, seconds in best.items()
    ]


def opening(place: Path) -> list[dict[str, Any]]:
    """Seconds to open a segment and answer a first key, by size, with the file's pages in memory and dropped."""
    results = []
    for count, dim in OPENED:
        rows_place = place / f"open-{count}"
        rows_place.mkdir()
        np.save(rows_place / "keys.npy", np.arange(count, dtype=np.uint64))
        rows = np.lib.format.open_memmap(rows_place / "rows.npy", "w+", np.float32, (count, dim))
        rows[::997] = 1
        del rows
        done = build.build(open_source([str(rows_place)]), rows_place, "t", Version(1), build.Options(memory=8 << 30))
        path = next(done.directory.iterdir())
        (rows_place / "rows.npy").unlink()
        out, found = np.empty((1, dim), np.float32), np.empty(1, np.bool_)
        times = {}
        for state in ("warm", "cold"):
            if state == "cold":
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            open_store(path).lookup(np.array([count // 2], np.uint64), out, found)
            times[state] = time.perf_counter() - begin
            assert found[0]
        results.append(
            {"file": f"{path.stat().st_size / 1e9:.2f} GB", **{f"{s} ms": f"{t * 1e3:.1f}" for s, t in times.items()}}
        )
        shutil.rmtree(rows_place)
    return results


def plot(rows: list[dict[str, Any]]) -> None:
    """Bars of the largest case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["keys"] == "8 M x 16" and row["asked"] == "uniform, 0 % absent"]
    shown.sort(key=lambda row: float(row["M keys/s"]))
    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(shown) + 1), layout="constrained")
    colours = ["#d08030" if row["who"].startswith(("ours", "pooled, bags of 16: ours")) else "#8090a8" for row in shown]
    bars = axes.barh([row["who"] for row in shown], [float(row["M keys/s"]) for row in shown], color=colours)
    axes.bar_label(bars, [row["M keys/s"] for row in shown], padding=3, fontsize=8)
    axes.set_xlabel("million rows a second, one core: 8 M rows of 16, random keys, 4,096 a call")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "lookup.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 M x 16 only, without rivals; nothing is written")
    parser.add_argument("--place", help="where tables are built (default: a directory under /tmp)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.place) as directory:
        rows = measure(args.quick, Path(directory))
        if args.quick:
            for row in rows:
                print(json.dumps(row))
            return
        keep("open", opening(Path(directory)))
        keep("lookup", rows)
        plot(rows)


if __name__ == "__main__":
    main()
