"""Rows → stores, one per shard, published together as one version of one table. Bounded memory, resumable.

Two passes. *Reading*: rows are encoded, grouped by bin - a partition of a shard - and written to run files, each as
large as memory allows. *Building*: a bin is read back from all runs, of repeated keys the last is kept, and the
engine's writer lays it out; several bins at a time, written in order. So memory holds a few runs, then a few bins,
never a table.

All of it happens in `<data>/<table>/.<version>.build/`. A build that was killed goes on from its finished runs and
shards if it is asked for again with the same input and options; readers see nothing of it before the whole version is
renamed to its place.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadData
from cube.kernels import U, kernel, mix, prefetch
from cube.keys import ShardRule, shards_of
from cube.publish import exists_already, publish
from cube.rows import RowFormat, flat, not_finite, scatter
from cube.sources import Batch, Cursor, Source
from cube.storage import segment
from cube.storage.engines import ENGINES
from cube.storage.index import partitions_of
from cube.storage.store import About, Writer
from cube.version import Version

T = TypeVar("T")

DEFAULT_MEMORY = 2 << 30
MIN_MEMORY = 512 << 20
_PROCESS = 350 << 20  # Python, numpy, a compiler's leavings, file readers: what a build takes before it holds a row
_PARTITION_KEYS = 1 << 20  # its bitmap of taken places, 128 KB, fits a core's cache
_AHEAD = 16  # keys between asking for a slot and looking at it
_PLAN, _OUT, _LOCK = "plan.json", "out", "lock"


class Options(NamedTuple):
    """How a table is to be built."""

    shards: int = 1
    row_format: RowFormat = RowFormat.F32
    engine: str = "segment"
    url: str = ""  # of the server that takes the rows, for engines that have one
    default_row: tuple[float, ...] = ()  # what absent keys read; empty: zeros
    reject_not_finite: bool = False
    memory: int = DEFAULT_MEMORY  # bytes, about
    workers: int = os.cpu_count() or 1
    restart: bool = False  # throw away what a killed build has left
    shard_rule: ShardRule = ShardRule.MIX


class Built(NamedTuple):
    """What a build wrote."""

    directory: Path
    keys_by_shard: list[int]
    duplicates: int  # rows that a later row of the same key replaced
    not_finite: int  # rows that hold a NaN or an infinity, and were kept


class Progress(Protocol):
    """Told of work as it is done."""

    def __call__(self, stage: str, rows: int, of: int) -> object:
        """`rows` more of about `of` rows have been through a stage, "reading" or "building"."""


class _Plan(msgspec.Struct, frozen=True):
    """What makes two builds the same. Written when a build starts, compared when it is resumed."""

    table: str
    version: str
    shards: int
    shard_rule: str
    partitions: int  # of each shard
    dim: int
    row_format: str
    engine: str
    url: str  # its digest: there may be a password in it
    default_row: tuple[float, ...]
    reject_not_finite: bool
    read_as: str
    files: list[tuple[str, int, str]]  # url, bytes, what changes when the content does
    boot: str  # runs are not forced to disk: after a crash of the machine they may not be what they seem


class _Run(msgspec.Struct, frozen=True):
    """What is in front of a run's rows: JSON, after its length in 8 bytes; after it counts, keys, rows."""

    then: Cursor  # where the next run starts
    read: int  # rows that were read for it
    duplicates: int


class _RunFile(NamedTuple):
    path: Path
    run: _Run
    starts: NDArray[np.int64]  # int64[bins + 1]: bin b is rows starts[b] to starts[b + 1]
    keys_at: int
    rows_at: int


class _Shard(msgspec.Struct, frozen=True):
    """What is known of a finished shard."""

    keys: int
    duplicates: int
    not_finite: int


def build(
    source: Source,
    data: Path,
    table: str,
    version: Version,
    options: Options = Options(),  # noqa: B008 - immutable
    progress: Progress = lambda stage, rows, of: None,
) -> Built:
    """Write `<data>/<table>/<version>/<shard>-of-<shards><suffix>` for every shard, and publish them together.

    Of rows with the same key the last wins. Raises BadData for rows that cannot be stored, an existing version, a bad
    name; OSError where the disk fails: what was done is kept, and a second call goes on from there.
    """
    plan = _planned(source, table, version, options)
    place = data / table / str(version)
    work = place.parent / f".{version}.build"
    with _locked(work, place):
        if place.exists():
            _clear(work)
            raise exists_already(place)
        try:
            plan = _settle(work, plan, options.restart)
            runs = _read(source, work, plan, options, progress)
            built = _build(runs, work, plan, options, progress)
        except _SourceFailed:  # a file or a network: what was read of it stays
            raise
        except BadData:  # the same rows and options would fail again
            _clear(work)
            raise
        publish(work / _OUT, place)
        _clear(work)
    return Built(
        place,
        [shard.keys for shard in built],
        sum(run.run.duplicates for run in runs) + sum(shard.duplicates for shard in built),
        sum(shard.not_finite for shard in built),
    )


def check_table_name(table: str) -> None:
    """Raise BadData for a name that cannot be a directory of its own."""
    if not table or table.startswith(".") or {"/", "\0"} & set(table) or len(table.encode()) > segment.TABLE_NAME_BYTES:
        raise BadData("table name", repr(table), f"1 to {segment.TABLE_NAME_BYTES} bytes, no '/', no dot first")


def _planned(source: Source, table: str, version: Version, options: Options) -> _Plan:
    check_table_name(table)
    if not 1 <= options.shards <= 65535:
        raise BadData("shards", options.shards, "1 to 65535")
    if source.dim < 1:
        raise BadData("rows", "rows of 0 elements", "at least 1")
    if options.engine not in ENGINES:
        raise BadConfig("engine", repr(options.engine), " or ".join(ENGINES))
    if options.memory < MIN_MEMORY:
        raise BadConfig("memory", f"{options.memory >> 20} MiB", f"at least {MIN_MEMORY >> 20} MiB")
    if len(options.default_row) not in (0, source.dim):
        raise BadData("default row", f"{len(options.default_row)} elements", f"{source.dim}, as the rows have")
    if bool(options.url) != (options.engine == "redis"):
        wanted = "one of the server" if options.engine == "redis" else f"none: {options.engine} has no server"
        raise BadConfig("url", "one" if options.url else "none", wanted)
    _encoded_default(options)  # or it would fail once all rows are read
    keys = min(_PARTITION_KEYS, _rows_in_memory(options, _building_bytes(source.dim, options.row_format), spare=2))
    partitions = max(1, -(-source.most_rows // (options.shards * keys)))
    boot = Path("/proc/sys/kernel/random/boot_id")
    return _Plan(
        table, str(version), options.shards, options.shard_rule.text, partitions, source.dim,
        options.row_format.text, options.engine,
        hashlib.sha256(options.url.encode()).hexdigest(), options.default_row, options.reject_not_finite,
        source.read_as,
        [(file.url, file.size, file.version) for file in source.files],
        boot.read_text().strip() if boot.exists() else "",
    )  # fmt: skip


def _rows_in_memory(options: Options, row_bytes: int, spare: int) -> int:
    """How many rows each of the workers, and `spare` more holders of rows, may have in memory at once."""
    return max(1024, int((options.memory - _PROCESS) * 0.8) // (row_bytes * (options.workers + spare)))


def _reading_bytes(dim: int, row_format: RowFormat) -> int:
    """Memory for each row of a run: as read (and about to be), sorted, and the sorting."""
    return 2 * (8 + 4 * dim) + (16 + row_format.row_bytes(dim)) + 48


def _building_bytes(dim: int, row_format: RowFormat) -> int:
    """Memory for each row of a bin: as read, without duplicates, laid out, and finding pilots."""
    return 3 * (16 + row_format.row_bytes(dim)) + 56


@contextlib.contextmanager
def _locked(work: Path, place: Path) -> Iterator[None]:
    """Hold the work directory; raises BadData if another build does."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadData(str(place), "another build of it under way", "one at a time") from error
        if not (work / _LOCK).exists() or (work / _LOCK).stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise BadData(str(place), "another build of it that has just ended", "one at a time")
        yield


def _settle(work: Path, plan: _Plan, restart: bool) -> _Plan:
    """Make the work directory one of this plan; raises BadConfig if it holds another build's work.

    Returns the plan to go on with: partitions, which follow from memory, stay those of the build that was killed.
    """
    path = work / _PLAN
    if path.exists() and not restart:
        try:
            there = msgspec.json.decode(path.read_bytes(), type=_Plan)
        except msgspec.MsgspecError:
            there = None
        if there is not None and there == msgspec.structs.replace(plan, partitions=there.partitions):
            return there
        if there is not None and there.boot == plan.boot:
            differs = ", ".join(f for f in _Plan.__struct_fields__ if getattr(there, f) != getattr(plan, f))
            raise BadConfig(
                str(work),
                f"what another build of this version left (other {differs})",
                "the same input and options, or --restart",
            )
    path.unlink(missing_ok=True)
    for old in work.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name != _LOCK:
            old.unlink()
    _note(path, plan)
    return plan


def _clear(work: Path) -> None:
    """Remove a work directory, the plan first: what a kill leaves of it is not gone on from."""
    (work / _PLAN).unlink(missing_ok=True)
    shutil.rmtree(work)


def _encoded_default(options: Options) -> bytes:
    row = np.array([options.default_row], np.float32)
    return options.row_format.encode(row).tobytes() if options.default_row else b""


def _note(path: Path, facts: msgspec.Struct) -> None:
    """Write a small file that is there whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_bytes(msgspec.json.encode(facts))
    draft.rename(path)


# --- reading: source → runs


def _read(source: Source, work: Path, plan: _Plan, options: Options, progress: Progress) -> list[_RunFile]:
    """All rows of the source as runs, beginning with those that a killed build has finished."""
    bins = plan.shards * plan.partitions
    runs: list[_RunFile] = []
    while (path := _run_path(work, len(runs))).exists():
        runs.append(_opened(path, bins))
        progress("reading", runs[-1].run.read, source.most_rows)
    for orphan in work.glob("run-*"):  # finished out of turn, or never
        if orphan not in {run.path for run in runs}:
            orphan.unlink()
    cursor = runs[-1].run.then if runs else Cursor(0, 0)
    most = _rows_in_memory(options, _reading_bytes(plan.dim, options.row_format), spare=1)
    with _Ordered[_RunFile](options.workers) as pool:
        groups = _grouped(_from(source.batches(cursor, min(most, 1 << 18))), most)
        for number, batches in enumerate(groups, len(runs)):
            for run in pool.put(_spill, batches, _run_path(work, number), plan, options):
                runs.append(run)
                progress("reading", run.run.read, source.most_rows)
        for run in pool.rest():
            runs.append(run)
            progress("reading", run.run.read, source.most_rows)
    return runs


def _run_path(work: Path, number: int) -> Path:
    return work / f"run-{number:06d}"


class _SourceFailed(BadData):
    """A file of the source could not be read on, or holds something it must not."""


def _from(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except BadData as error:
        raise _SourceFailed(error.place, error.found, error.expected) from error


def _grouped(batches: Iterator[Batch], most: int) -> Iterator[list[Batch]]:
    """Batches until they hold about `most` rows."""
    group: list[Batch] = []
    held = 0
    for batch in batches:
        if group and held + batch.keys.size > most:
            yield group
            group, held = [], 0
        group.append(batch)
        held += batch.keys.size
    if group:
        yield group


def _spill(batches: list[Batch], path: Path, plan: _Plan, options: Options) -> _RunFile:
    """Write one run: rows grouped by bin, in each bin in their order, of repeated keys the last."""
    keys = np.concatenate([batch.keys for batch in batches])
    then = batches[-1].cursor
    shards = shards_of(keys, plan.shards, options.shard_rule)
    bins = shards.astype(np.int64) * plan.partitions + partitions_of(keys, plan.partitions)
    keep = _last_of_each(keys)
    starts = np.zeros(plan.shards * plan.partitions + 1, np.int64)
    np.cumsum(np.bincount(bins[keep], minlength=starts.size - 1), out=starts[1:])
    sorted_keys, places = np.empty(starts[-1], np.uint64), np.empty(keys.size, np.int64)
    _group(keys, bins, keep, starts[:-1].copy(), sorted_keys, places)
    sorted_raw, at = np.empty((sorted_keys.size, options.row_format.row_bytes(plan.dim)), np.uint8), 0
    for batch in batches:
        if options.reject_not_finite:
            _reject(batch)
        scatter(_encoded(batch, options.row_format), places[at : at + batch.keys.size], sorted_raw)
        at += batch.keys.size
    batches.clear()
    run = _Run(then, keys.size, keys.size - sorted_keys.size)
    head = msgspec.json.encode(run)
    draft = path.with_suffix(".draft")
    with draft.open("wb", buffering=0) as file:
        for part in (len(head).to_bytes(8, "little"), head, starts, sorted_keys, sorted_raw):
            view = flat(part).data if isinstance(part, np.ndarray) else memoryview(part)
            while view:  # ends: a full disk is an error
                view = view[file.write(view) :]
    draft.rename(path)
    return _opened(path, starts.size - 1)


def _encoded(batch: Batch, row_format: RowFormat) -> NDArray[np.uint8]:
    try:
        return row_format.encode(batch.rows)
    except BadData as error:
        row = int(error.place.split()[1])
        raise BadData(f"key {batch.keys[row]}", error.found, error.expected) from error


def _reject(batch: Batch) -> None:
    finite = np.isfinite(batch.rows).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise BadData(
            f"key {batch.keys[row]}", batch.rows[row].tolist()[:8], "finite elements: --reject-nan was asked for"
        )


def _opened(path: Path, bins: int) -> _RunFile:
    with path.open("rb") as file:
        head = file.read(int.from_bytes(file.read(8), "little"))
        starts = np.frombuffer(file.read(8 * (bins + 1)), np.int64)
        keys_at = file.tell()
    return _RunFile(path, msgspec.json.decode(head, type=_Run), starts, keys_at, keys_at + 8 * int(starts[-1]))


# --- building: runs → stores


def _build(runs: list[_RunFile], work: Path, plan: _Plan, options: Options, progress: Progress) -> list[_Shard]:
    """Every shard's store in work/out, beginning with those that a killed build has finished."""
    out = work / _OUT
    out.mkdir(exist_ok=True)
    total = sum(int(run.starts[-1]) for run in runs)
    built = []
    for shard in range(plan.shards):
        done, engine = work / f"shard-{shard}.json", ENGINES[plan.engine]
        if not (done.exists() and (out / segment.file_name(shard, plan.shards, engine.suffix)).exists()):
            facts = _build_shard(runs, shard, work, plan, options, lambda rows: progress("building", rows, total))
            _note(done, facts)
        else:
            facts = msgspec.json.decode(done.read_bytes(), type=_Shard)
            progress("building", facts.keys + facts.duplicates, total)
        built.append(facts)
    return built


def _build_shard(
    runs: list[_RunFile], shard: int, work: Path, plan: _Plan, options: Options, progress: Callable[[int], object]
) -> _Shard:
    engine = ENGINES[options.engine]
    draft, final = work / f"shard{engine.suffix}", work / _OUT / segment.file_name(shard, plan.shards, engine.suffix)
    if draft.exists():
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
    about = About(
        plan.table, Version.parse(plan.version), shard, plan.shards, plan.dim, options.row_format,
        _encoded_default(options), options.shard_rule,
    )  # fmt: skip
    keys = duplicates = odd = 0
    with contextlib.closing(engine.write(draft, about, plan.partitions, options.url)) as writer:

        def add(bin_: _Bin) -> None:
            nonlocal keys, duplicates, odd
            writer.add(bin_.prepared)
            keys, duplicates, odd = keys + bin_.keys, duplicates + bin_.duplicates, odd + bin_.not_finite
            progress(bin_.keys + bin_.duplicates)

        with _Ordered[_Bin](options.workers) as pool:
            for partition in range(plan.partitions):
                for ready in pool.put(_prepare, runs, shard * plan.partitions + partition, about, writer):
                    add(ready)
            for ready in pool.rest():
                add(ready)
        writer.finish()
    if final.exists():  # a kill came between this rename and the note of it
        shutil.rmtree(final) if final.is_dir() else final.unlink()
    draft.rename(final)
    return _Shard(keys, duplicates, odd)


class _Bin(NamedTuple):
    prepared: Any
    keys: int
    duplicates: int
    not_finite: int


def _prepare(runs: list[_RunFile], number: int, about: About, writer: Writer) -> _Bin:
    """Read a bin from all runs, keep the last of each key, let the writer lay it out."""
    sizes = [int(run.starts[number + 1] - run.starts[number]) for run in runs]
    keys, raw = np.empty(sum(sizes), np.uint64), np.empty((sum(sizes), about.row_bytes), np.uint8)
    at = 0
    for run, size in zip(runs, sizes, strict=True):
        with run.path.open("rb", buffering=0) as file:
            first = int(run.starts[number])
            _fill_from(file.fileno(), keys[at : at + size], run.keys_at + 8 * first)
            _fill_from(file.fileno(), raw[at : at + size], run.rows_at + about.row_bytes * first)
        at += size
    keep = _last_of_each(keys) if len(runs) > 1 else np.ones(keys.size, np.bool_)  # within a run they are distinct
    duplicates = keys.size - int(np.count_nonzero(keep))
    if duplicates:
        keys, raw = keys[keep], raw[keep]
    return _Bin(writer.prepare(keys, raw), keys.size, duplicates, not_finite(about.row_format, raw, about.dim))


def _fill_from(handle: int, array: NDArray[Any], offset: int) -> None:
    """Fill an array with the bytes of a file at an offset."""
    view = flat(array).data
    while view:
        got = os.preadv(handle, [view], offset)
        if not got:
            raise OSError(f"a run file of this build ends at byte {offset}, before its rows do")
        view, offset = view[got:], offset + got


# --- what both passes use


class _Ordered(Generic[T]):
    """Runs calls in threads and gives their results back in the order they were asked for, few at a time."""

    def __init__(self, workers: int):
        self._pool, self._workers = ThreadPoolExecutor(workers), workers
        self._waiting: deque[Future[T]] = deque()

    def put(self, function: Callable[..., T], *args: Any) -> Iterator[T]:
        """Start a call; yields what has to be taken before more than one call a worker, and one, are under way."""
        self._waiting.append(self._pool.submit(function, *args))
        while len(self._waiting) > self._workers:
            yield self._waiting.popleft().result()

    def rest(self) -> Iterator[T]:
        """The results of all calls that are left."""
        while self._waiting:
            yield self._waiting.popleft().result()

    def __enter__(self) -> "_Ordered[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@kernel
def _mark_last(keys, slots, keep):  # type: ignore[no-untyped-def]
    """Mark the last of each key. slots: int32[power of two > keys.size], all -1: linear probing ends at a free one."""
    mask, slots_at = U(slots.size - 1), U(slots.ctypes.data)
    for i in range(keys.size - 1, -1, -1):
        if i >= _AHEAD:
            prefetch(slots_at + ((mix(keys[i - _AHEAD]) & mask) << U(2)))
        s = mix(keys[i]) & mask
        while slots[s] >= 0 and keys[slots[s]] != keys[i]:
            s = (s + U(1)) & mask
        keep[i] = slots[s] < 0
        if slots[s] < 0:
            slots[s] = i


@kernel
def _group(keys, bins, keep, fill, sorted_keys, places):  # type: ignore[no-untyped-def]
    """Bring the keys that are kept into order of bins; places: where each went, or -1; fill: where each bin begins."""
    for i in range(keys.size):
        places[i] = -1
        if keep[i]:
            places[i] = fill[bins[i]]
            sorted_keys[places[i]] = keys[i]
            fill[bins[i]] += 1


def _last_of_each(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of keys (uint64[n], n < 2**31) are the last of their value."""
    keep = np.empty(keys.size, np.bool_)
    _mark_last(keys, np.full(2 << keys.size.bit_length(), -1, np.int32), keep)
    return keep
