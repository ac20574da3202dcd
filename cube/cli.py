"""cube-server, cube-build, cube-ctl: parsing and printing only."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cube import build as builder
from cube import server as cube_server
from cube.client import RemoteCube
from cube.config import read, settle
from cube.errors import BadConfig, DataCorrupt, ServingError
from cube.pb.cube_config_pb2 import CubeConfig
from cube.rows import RowFormat
from cube.rpc.process import DOORS
from cube.sources import open_source
from cube.storage.engines import ENGINES, open_store
from cube.version import Version

DEFAULT_CONF = Path("conf/cube.prototxt")


def guarded(program: str, work: Callable[[], int]) -> int:
    """Run a command: 0 done, 1 could not (one line on standard error), 130 interrupted."""
    try:
        return work()
    except (ServingError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def positive(text: str) -> int:
    """A flag's number, at least 1: 0 would read as a field that is not set, so as the default."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def log_to_stderr(program: str) -> None:
    """One line per life-cycle event."""
    logging.basicConfig(
        format=f"%(asctime)s {program} %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr
    )


def conf_file(given: str | None, default: Path) -> Path | None:
    """The configuration file to read: the one named, else the default one if it is there."""
    return Path(given) if given else (default if default.exists() else None)


def server(argv: Sequence[str] | None = None) -> int:
    """cube-server."""
    parser = argparse.ArgumentParser(
        prog="cube-server",
        description="Serve one shard of a cube: rows of embedding tables by 64-bit key, over gRPC. Once it answers it "
        "prints one line: where it listens, what it serves, which versions. Ctrl-C stops it.",
        epilog="Settings come from flags, then CUBE_<FIELD> in the environment, then the file; its fields are "
        "described in conf/cube.prototxt. Without a file: "
        "cube-server --shard 0 --shards 2 --data cube-data --listen 127.0.0.1:0",
    )
    parser.add_argument("--shard", type=int, required=True, metavar="N", help="which shard to serve, from 0")
    parser.add_argument("--conf", metavar="FILE", help=f"configuration (default: {DEFAULT_CONF} if it exists)")
    parser.add_argument("--data", metavar="DIR", help="where cube-build put the segments (default: cube-data)")
    parser.add_argument("--shards", type=int, metavar="N", help="number of shards, where no configuration lists them")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="address to listen on; port 0 takes a free one (default: the shard's)"
    )
    parser.add_argument(
        "--keep-versions", type=positive, metavar="N", help="newest versions of each table kept open (default: 2)"
    )
    parser.add_argument(
        "--max-keys", type=positive, metavar="N", help="largest number of keys in one call (default: 4194304)"
    )
    parser.add_argument(
        "--verify",
        choices=cube_server.VERIFY,
        help="compare the checksums of all rows: in the background while they are served (default), first, or off",
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        default=None,
        help="copy rows to memory, in huge pages, instead of mapping "
        "the files: faster lookups, slower start, nothing shared between processes",
    )
    parser.add_argument(
        "--grpc",
        choices=DOORS,
        help="what carries gRPC: lean, one port for gRPC and HTTP (default), or grpcio, its twin: gRPC only, dearer",
    )
    parser.add_argument("--check", action="store_true", help="check settings and files, serve nothing")
    args = parser.parse_args(argv)

    def work() -> int:
        config = settle(
            CubeConfig(), conf_file(args.conf, DEFAULT_CONF), "CUBE", os.environ, vars(args) | {"shard": None}
        )
        if args.shards is not None:
            if args.shards < 1:
                raise BadConfig("--shards", args.shards, "at least 1")
            del config.shard[args.shards :]
            config.shard.extend(CubeConfig().shard.add() for _ in range(args.shards - len(config.shard)))
        config = cube_server.checked(config, args.shard)
        tables = cube_server.open_shard(config, args.shard)
        if args.check:
            where = f"shard {args.shard} of {len(config.shard)}"
            print(f"cube-server: {where} would serve {', '.join(tables)} on {config.listen}")
            return 0
        cube_server.serve(config, args.shard, tables)
        return 0

    log_to_stderr("cube-server")
    return guarded("cube-server", work)


def build(argv: Sequence[str] | None = None) -> int:
    """cube-build."""
    parser = argparse.ArgumentParser(
        prog="cube-build",
        description="Build what cube-server serves: the rows of one version of one table, in one store per shard, "
        "published together as OUT/TABLE/VERSION/<shard>-of-<shards>.seg. Memory stays within --memory whatever the "
        "table's size; a build that was interrupted goes on where it was when it is asked for again.",
        epilog="ROWS are fsspec paths (local, s3://, gs://, hdfs://, memory:// ...), globs or directories of: keys.npy "
        "+ rows.npy (as prune-program writes them), Parquet, Arrow IPC, safetensors, or sequence files of Paddle's "
        "cube builder. Of rows with the same key the last wins.",
    )
    parser.add_argument("rows", nargs="+", metavar="ROWS", help="where the rows are, in this order")
    parser.add_argument("--table", required=True, metavar="NAME", help="name of the table")
    parser.add_argument(
        "--version", required=True, metavar="BASE@DELTA", help="version of these rows, such as 1763766000@0"
    )
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of shards (default: 1)")
    parser.add_argument(
        "--out", default="cube-data", metavar="DIR", help="where the cube's files are (default: cube-data)"
    )
    parser.add_argument(
        "--format", default="f32", choices=[f.text for f in RowFormat],
        help="how rows are stored: f32 (default), f16, bf16, or i8 with a scale and a bias per row",
    )  # fmt: skip
    parser.add_argument(
        "--key-column", default="key", metavar="NAME", help="Parquet, Arrow, safetensors (default: key)"
    )
    parser.add_argument(
        "--row-column", default="row", metavar="NAME", help="Parquet, Arrow, safetensors (default: row)"
    )
    parser.add_argument(
        "--default-row",
        metavar="X,X,...",
        help="what absent keys read: one number for every element, or for all of them",
    )
    parser.add_argument(
        "--reject-nan", action="store_true", help="refuse rows with a NaN or an infinity (default: keep and count them)"
    )
    parser.add_argument(
        "--memory", type=mebibytes, default=builder.DEFAULT_MEMORY, metavar="SIZE",
        help="memory for rows, such as 800M or 4G; engines other than segment take some beside it "
        f"(default: {builder.DEFAULT_MEMORY >> 30}G)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count(), metavar="N", help="threads (default: all cores)"
    )
    parser.add_argument(
        "--engine", default="segment", choices=list(ENGINES), help="what holds the rows (default: segment, the fastest)"
    )
    parser.add_argument(
        "--url", default="", help="of the server, for --engine redis: redis://host:port, redis+cluster://..."
    )
    parser.add_argument("--restart", action="store_true", help="begin anew where an interrupted build would go on")
    args = parser.parse_args(argv)

    def work() -> int:
        version = Version.parse(args.version, "--version")
        source = open_source(args.rows, args.key_column, args.row_column)
        options = builder.Options(
            args.shards, RowFormat.parse(args.format), args.engine, args.url,
            _default_row(args.default_row, source.dim), args.reject_nan, args.memory, args.workers, args.restart,
        )  # fmt: skip
        with _Bars(args.table) as bars:
            built = builder.build(source, Path(args.out), args.table, version, options, bars)
        counts = ", ".join(f"{n:,}" for n in built.keys_by_shard)
        print(f"cube-build: {built.directory}: {counts} rows by shard, {built.duplicates:,} duplicate keys replaced")
        if built.not_finite:
            print(f"cube-build: {built.not_finite:,} rows hold a NaN or an infinity (--reject-nan refuses them)")
        return 0

    return guarded("cube-build", work)


class _Bars:
    """A progress bar for each stage of a build."""

    def __init__(self, table: str):
        self._table, self._bars, self._stack = table, dict[str, Any](), contextlib.ExitStack()

    def __call__(self, stage: str, rows: int, of: int) -> None:
        if stage not in self._bars:
            bar = tqdm(total=of, unit="row", unit_scale=True, desc=f"{self._table} {stage}", disable=None)
            self._bars[stage] = self._stack.enter_context(bar)
        self._bars[stage].update(rows)

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def mebibytes(text: str) -> int:
    """A flag's size: a number with M or G after it, in bytes."""
    number, unit = text[:-1], {"M": 20, "G": 30}.get(text[-1:].upper())
    if unit is None or not (number.isascii() and number.isdigit()):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 800M or 4G")
    return int(number) << unit


def _default_row(text: str | None, dim: int) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BadConfig("--default-row", repr(text), "numbers separated by commas") from error
    return numbers * dim if len(numbers) == 1 else numbers


def ctl(argv: Sequence[str] | None = None) -> int:
    """cube-ctl."""
    parser = argparse.ArgumentParser(prog="cube-ctl", description="Ask a running cube, or check its files.")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    status = verbs.add_parser("status", help="shards, tables, versions and counters of a running cube")
    lookup = verbs.add_parser("lookup", help="the rows of some keys of a running cube")
    for verb in (status, lookup):
        verb.add_argument("--cube", metavar="CUBE", help="cube.prototxt, or host:port of each shard, comma separated")
    lookup.add_argument("table", help="name of the table")
    lookup.add_argument("keys", nargs="+", type=int, metavar="KEY", help="unsigned 64-bit keys")
    verify = verbs.add_parser("verify", help="read segment files and compare every checksum")
    verify.add_argument("paths", nargs="+", metavar="PATH", help="stores, or directories to search for them")
    args = parser.parse_args(argv)
    work = {"status": _status, "lookup": _lookup, "verify": _verify}[args.verb]
    return guarded("cube-ctl", lambda: work(args))


def endpoints(cube: str) -> list[str]:
    """Addresses of a cube's shards, from a cube.prototxt or a comma-separated list; raises BadConfig."""
    if cube.endswith(".prototxt"):
        addresses = [shard.address for shard in read(Path(cube), CubeConfig()).shard]
    else:
        addresses = cube.split(",")
    if not addresses or not all(a.rpartition(":")[0] and a.rpartition(":")[2].isdigit() for a in addresses):
        raise BadConfig("cube", repr(cube), "a .prototxt file that lists shards, or host:port,host:port,...")
    return addresses


def _status(args: argparse.Namespace) -> int:
    rows = [
        {
            "shard": status.shard,
            "table": table.table,
            "version": str(Version(v.version.base, v.version.delta)),
            "rows": v.keys,
            "dim": v.dim,
            "format": v.row_format,
            "engine": v.engine,
            "file_bytes": v.file_bytes,
            "verified": v.verified,
            "keys_found": table.keys_found,
            "keys_absent": table.keys_absent,
            "lookups": status.lookups,
        }
        for status in asyncio.run(_statuses(args.cube or str(DEFAULT_CONF)))
        for table in status.tables
        for v in table.versions
    ]
    _show(rows, args.json)
    return 0


async def _statuses(cube: str) -> list[Any]:
    client = RemoteCube(endpoints(cube))
    try:
        return await asyncio.gather(*(client.status(shard, wait_s=2.0) for shard in range(client.shards)))
    finally:
        await client.close()


def _lookup(args: argparse.Namespace) -> int:
    async def ask() -> tuple[Version, Any]:
        client = RemoteCube(endpoints(args.cube or str(DEFAULT_CONF)))
        try:
            status = await client.status(0, wait_s=2.0)
            newest = {t.table: t.versions[0] for t in status.tables}
            if args.table not in newest:
                raise BadConfig("table", repr(args.table), f"one of {', '.join(newest)}")
            v = newest[args.table]
            version = Version(v.version.base, v.version.delta)
            await client.open({args.table: (version, v.dim)}, wait_s=2.0, absent_zeros=False)
            return version, await client.gather(args.table, version, np.array(args.keys, np.uint64), timeout_s=2.0)
        finally:
            await client.close()

    if any(not 0 <= key < 1 << 64 for key in args.keys):
        raise BadConfig("keys", args.keys, "numbers from 0 to 2**64 - 1")
    version, rows = asyncio.run(ask())
    _show(
        [
            {"key": key, "version": str(version), "found": bool(found), "row": [round(float(x), 6) for x in row]}
            for key, found, row in zip(args.keys, rows.found, rows.rows, strict=True)
        ],
        args.json,
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    suffixes = {engine.suffix for engine in ENGINES.values()}
    stores = [
        store
        for path in map(Path, args.paths)
        for store in ([path] if path.suffix in suffixes else sorted(p for p in path.rglob("*") if p.suffix in suffixes))
        if not any(part.startswith(".") for part in store.relative_to(path).parts)  # builds under way
    ]
    if not stores:
        raise BadConfig(", ".join(args.paths), "no stores", "files of cube-build, or directories with some")
    shown = []
    with tqdm(unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        for path in stores:
            facts: dict[str, Any] = {"file": str(path), "ok": False, "found": ""}
            try:
                store = open_store(path)
                about = store.about
                facts |= {"table": about.table, "version": str(about.version), "rows": len(store)}
                facts |= {"format": about.row_format.text}
                if store.capabilities.verify:
                    store.verify(bar.update)
                    facts["ok"] = True
                else:
                    facts["found"] = "no checksums to compare"
            except DataCorrupt as error:
                facts["found"] = str(error)
                print(f"cube-ctl: {error}", file=sys.stderr)
            shown.append(facts)
    columns = ("file", "table", "version", "rows", "format", "ok", "found")
    _show([{name: facts.get(name, "") for name in columns} for facts in shown], args.json)
    return 0 if all(facts["ok"] or facts["found"] == "no checksums to compare" for facts in shown) else 1


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        return
    cells = [
        list(rows[0]),
        *([f"{v:,}" if type(v) is int and k != "key" else str(v) for k, v in row.items()] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
