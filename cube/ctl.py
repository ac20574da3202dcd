"""cube-ctl: look at a cube from outside, and tell its servers what to do."""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cube.cli import DEFAULT_CONF, guarded, positive
from cube.client import Ask, Cube, LocalCube
from cube.cluster import Access, Cluster, clusters_at, open_cube
from cube.errors import BadConfig, DataCorrupt, ServingError
from cube.pb import cube_pb2 as pb
from cube.rpc.calls import parse
from cube.rpc.channel import Channel
from cube.rpc.naming import Naming
from cube.service import SCAN, STATUS, version_of, wire_of
from cube.storage.engines import ENGINES, open_store
from cube.version import Version

CONTROL = "/cube_serving.cube.CubeControl/"
ASK_S, LOAD_S = 5.0, 600.0  # a server may take long to open a version, and to verify it first
SAMPLED_KEYS = 1 << 20  # that `bench` asks for


def ctl(argv: Sequence[str] | None = None) -> int:
    """cube-ctl."""
    args = _parser().parse_args(argv)
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "status": _status, "tables": _tables, "lookup": _lookup, "verify": _verify, "load": _control,
        "switch": _control, "unload": _control, "drain": _drain, "bench": _bench,
    }  # fmt: skip
    return guarded("cube-ctl", lambda: verbs[args.verb](args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cube-ctl",
        description="Look at a running cube, tell its servers what to do, or check its files. Tables are printed for "
        "people, JSON with --json. Exit status 0: all is well; 1: something is not, and standard error says what.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs (before the verb)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        where = made.add_mutually_exclusive_group()
        where.add_argument(
            "--cube", metavar="CUBE",
            help="the whole cube: cube.prototxt, cube.conf of the ancestor, or its shards, separated by commas, "
            f"replicas of a shard by | (default: {DEFAULT_CONF})",
        )  # fmt: skip
        where.add_argument("--server", metavar="HOST:PORT", help="one server instead")
        made.add_argument("--token-file", default="", metavar="FILE", help="what the servers demand to see")
        made.add_argument("--tls-ca", default="", metavar="FILE", help="whom to trust, PEM, or system; turns TLS on")
        made.add_argument("--tls-cert", default="", metavar="FILE", help="certificate to show to servers that ask, PEM")
        made.add_argument("--tls-key", default="", metavar="FILE", help="its key, PEM")
        return made

    verb("status", "the servers: which shard, since when, how much they were asked")
    verb("tables", "tables and versions, over all servers")
    lookup = verb("lookup", "the rows of some keys")
    lookup.add_argument("table", help="name of the table")
    lookup.add_argument("keys", nargs="+", type=int, metavar="KEY", help="unsigned 64-bit keys")
    lookup.add_argument("--version", metavar="BASE@DELTA", help="version to read (default: the current one)")
    for name, text in (
        ("load", "open a version beside the others; lookups do not notice"),
        ("switch", "make a loaded version what lookups read that name none"),
        ("unload", "close a version that is not the current one"),
    ):
        made = verb(name, text)
        made.add_argument("table", help="name of the table")
        made.add_argument("version", metavar="BASE@DELTA", help="version of it, such as 1763766000@0")
    verb("drain", "have a server end: calls in flight finish, new ones are refused").add_argument(
        "--all", action="store_true", help="every server of the cube"
    )
    bench = verb("bench", "ask for random keys of a table, and time the answers")
    bench.add_argument("table", help="name of the table")
    bench.add_argument("--keys", type=positive, default=520, metavar="N", help="keys in a call (default: 520)")
    bench.add_argument("--in-flight", type=positive, default=8, metavar="N", help="calls at a time (default: 8)")
    bench.add_argument("--seconds", type=positive, default=5, metavar="S", help="how long (default: 5)")
    bench.add_argument(
        "--rate", type=positive, metavar="N",
        help="calls a second, at random moments whatever the answers do (default: as fast as they come)",
    )  # fmt: skip
    verify = verbs.add_parser("verify", help="read segment files and compare every checksum")
    verify.add_argument("paths", nargs="+", metavar="PATH", help="stores, or directories to search for them")
    return parser


class _Server(NamedTuple):
    shard: int | None  # as the cube's configuration says; None for a server that was named by itself
    target: str


class _Told(NamedTuple):
    server: _Server
    status: pb.StatusReply | None
    problem: str


def _access(args: argparse.Namespace) -> Access:
    return Access.of(args.token_file, args.tls_ca, args.tls_cert, args.tls_key)


def _clusters(args: argparse.Namespace) -> dict[str | None, Cluster]:
    return clusters_at(args.cube or str(DEFAULT_CONF))


async def _servers(args: argparse.Namespace) -> list[_Server]:
    if args.server:
        return [_Server(None, args.server)]
    servers: dict[_Server, None] = {}  # tables may be on the same ones
    for cluster in _clusters(args).values():
        places = await asyncio.gather(*(Naming.parse(target).first() for target in cluster.shards))
        servers |= {_Server(shard, place.target): None for shard, found in enumerate(places) for place in found}
    return list(servers)


async def _tell(
    args: argparse.Namespace, servers: Sequence[_Server], path: str, message: bytes, timeout_s: float
) -> list[_Told]:
    """Ask every server the same at the same time. Their replies are StatusReplies, or nothing."""
    access = _access(args)

    async def one(server: _Server) -> _Told:
        async with Channel(server.target, tls=access.tls) as channel:
            try:
                reply = await channel.call(path, message, timeout_s, metadata=access.metadata)
                return _Told(server, parse(pb.StatusReply, reply), "")
            except ServingError as error:
                return _Told(server, None, str(error))

    return await asyncio.gather(*(one(server) for server in servers))


async def _statuses(args: argparse.Namespace) -> list[_Told]:
    return await _tell(args, await _servers(args), STATUS, b"", ASK_S)


def _status(args: argparse.Namespace) -> int:
    told = asyncio.run(_statuses(args))
    rows = []
    for server, status, problem in told:
        row: dict[str, Any] = {"server": server.target, "shard": "" if server.shard is None else server.shard}
        row |= {"state": "up" if status else "down", "shards": "", "workers": "", "up_s": "", "lookups": "", "keys": ""}
        row |= {"absent": "", "tables": "", "problem": problem}
        if status:
            keys = sum(t.keys_found + t.keys_absent for t in status.tables)
            row |= {"shard": status.shard, "shards": status.shards, "workers": status.workers}
            row |= {"up_s": round(status.uptime_s), "lookups": status.lookups, "keys": keys}
            row |= {"absent": sum(t.keys_absent for t in status.tables), "tables": len(status.tables)}
            if server.shard not in (None, status.shard):
                row["problem"] = f"it serves shard {status.shard}, where shard {server.shard} was expected"
        rows.append(row)
    _show(rows, args.json)
    return 1 if any(row["problem"] for row in rows) else 0


def _tables(args: argparse.Namespace) -> int:
    told = asyncio.run(_statuses(args))
    statuses = [t.status for t in told if t.status]
    for one in told:
        if one.problem:
            print(f"cube-ctl: {one.server.target}: {one.problem}", file=sys.stderr)
    found: dict[tuple[str, Version], list[tuple[pb.StatusReply, pb.TableStatus, pb.TableVersion]]] = {}
    for status in statuses:
        for table in status.tables:
            for version in table.versions:
                found.setdefault((table.table, version_of(version.version)), []).append((status, table, version))
    rows = []
    for (name, number), there in sorted(found.items(), key=lambda item: (item[0][0], *(-x for x in item[0][1]))):
        by_shard = {status.shard: v for status, _, v in there}
        current = sum(version_of(table.current) == number for _, table, _ in there)
        first = there[0][2]
        rows.append(
            {
                "table": name,
                "version": str(number),
                "current": "yes" if current == len(statuses) else f"on {current} of {len(statuses)}" if current else "",
                "servers": f"{len(there)} of {len(statuses)}",
                "rows": sum(v.keys for v in by_shard.values()),
                "dim": first.dim,
                "format": "/".join(sorted({v.row_format for v in by_shard.values()})),
                "engine": "/".join(sorted({v.engine for v in by_shard.values()})),
                "bytes": sum(v.file_bytes for v in by_shard.values()),
                "verified": "/".join(sorted({v.verified for _, _, v in there})),
            }
        )
    _show(rows, args.json)
    return 0 if rows and not any(one.problem for one in told) else 1


def _cube(args: argparse.Namespace) -> Cube:
    if args.server:
        raise BadConfig("--server", args.server, "--cube: keys are spread over the shards of a whole cube")
    return open_cube(args.cube or str(DEFAULT_CONF), _access(args))


def _lookup(args: argparse.Namespace) -> int:
    if any(not 0 <= key < 1 << 64 for key in args.keys):
        raise BadConfig("keys", args.keys, "numbers from 0 to 2**64 - 1")
    version = Version.parse(args.version, "--version") if args.version else None

    async def ask() -> Any:
        async with _cube(args) as cube:
            return await cube.gather(args.table, version, np.array(args.keys, np.uint64), ASK_S)

    found = asyncio.run(ask())
    rows = [
        {"key": key, "version": str(found.version), "found": bool(here), "row": [round(float(x), 6) for x in row]}
        for key, here, row in zip(args.keys, found.found, found.rows, strict=True)
    ]
    _show(rows, args.json)
    return 0


def _control(args: argparse.Namespace) -> int:
    version = Version.parse(args.version, "version")
    message = pb.VersionRequest(table=args.table, version=wire_of(version))

    async def work() -> list[_Told]:
        servers = await _servers(args)
        if args.verb == "switch":  # all or none: nobody switches unless everybody can
            for one in await _tell(args, servers, STATUS, b"", ASK_S):
                loaded = one.status is not None and any(
                    table.table == args.table and version in map(version_of, (v.version for v in table.versions))
                    for table in one.status.tables
                )
                if not loaded:
                    what = one.problem or f"no version {version} of table {args.table!r}"
                    raise BadConfig(one.server.target, what, "a server that has it loaded; nothing was switched")
        path = CONTROL + args.verb.capitalize()
        return await _tell(args, servers, path, message.SerializeToString(), LOAD_S)

    told = asyncio.run(work())
    _show(
        [
            {
                "server": one.server.target,
                "shard": one.status.shard if one.status else "",
                args.verb: "done" if one.status else "failed",
                "problem": one.problem,
            }
            for one in told
        ],
        args.json,
    )
    return 0 if all(one.status for one in told) else 1


def _drain(args: argparse.Namespace) -> int:
    if not (args.server or args.all):
        raise BadConfig("drain", "no server", "--server HOST:PORT, or --all for every server of the cube")

    async def work() -> list[_Told]:
        return await _tell(args, await _servers(args), CONTROL + "Drain", b"", ASK_S)

    told = asyncio.run(work())
    rows = [
        {"server": one.server.target, "drain": "failed" if one.problem else "begun", "problem": one.problem}
        for one in told
    ]
    _show(rows, args.json)
    return 1 if any(one.problem for one in told) else 0


# ---- bench ----


def _bench(args: argparse.Namespace) -> int:
    async def work() -> dict[str, Any]:
        async with _cube(args) as cube:
            keys = await _some_keys(args, cube)
            return await _timed(args, cube, keys)

    row = asyncio.run(work())
    _show([row], args.json)
    return 1 if row["failed"] else 0


async def _some_keys(args: argparse.Namespace, cube: Cube) -> NDArray[np.uint64]:
    """Keys that the table has: from the beginning of each shard's scan."""
    if isinstance(cube, LocalCube):
        raise BadConfig("--cube", args.cube, "servers: there is nothing to time in files")
    clusters = _clusters(args)
    cluster = clusters.get(None) or clusters.get(args.table)
    if cluster is None:
        raise BadConfig("table", repr(args.table), f"one of {', '.join(map(str, clusters))}")
    access, parts = _access(args), []
    for target in cluster.shards:
        place = (await Naming.parse(target).first())[0]
        async with Channel(place.target, tls=access.tls) as channel:
            stream = await channel.stream(
                SCAN, pb.ScanRequest(table=args.table).SerializeToString(), ASK_S, metadata=access.metadata
            )
            left = SAMPLED_KEYS // len(cluster.shards)
            async for message in stream:
                part = np.frombuffer(parse(pb.ScanReply, message).keys, "<u8")
                parts.append(part)
                left -= part.size
                if left <= 0:
                    break
            stream.cancel()
    keys = np.concatenate(parts)
    if not keys.size:
        raise BadConfig(f"table {args.table!r}", "no rows", "some to ask for")
    return keys


async def _timed(args: argparse.Namespace, cube: Cube, keys: NDArray[np.uint64]) -> dict[str, Any]:
    """Calls until the time is over: one after the other in each of `in_flight` places, or at random moments."""
    rng = np.random.default_rng(0)
    latencies: list[float] = []
    failures: dict[str, int] = {}

    async def call() -> None:
        asked = keys[rng.integers(0, keys.size, args.keys)]
        begin = time.perf_counter()
        try:
            await cube.lookup([Ask(args.table, asked)], ASK_S)
        except ServingError as error:
            failures[type(error).__name__] = failures.get(type(error).__name__, 0) + 1
        else:
            latencies.append(time.perf_counter() - begin)

    await call()
    latencies.clear()
    begin = time.perf_counter()
    end = begin + args.seconds

    async def caller() -> None:
        while time.perf_counter() < end:
            await call()

    if args.rate is None:
        await asyncio.gather(*(caller() for _ in range(args.in_flight)))
    else:
        tasks, at = [], begin
        while at < end:
            at += rng.exponential(1 / args.rate)
            await asyncio.sleep(max(at - time.perf_counter(), 0))
            tasks.append(asyncio.ensure_future(call()))
        await asyncio.gather(*tasks)
    seconds = time.perf_counter() - begin
    calls = len(latencies)
    row: dict[str, Any] = {"calls/s": round(calls / seconds), "keys/s": round(calls * args.keys / seconds)}
    for share in (50, 99, 99.9):
        row[f"p{share:g} ms"] = round(float(np.percentile(latencies, share)) * 1e3, 3) if latencies else None
    return row | {"failed": sum(failures.values()), "as": ", ".join(failures)}


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
