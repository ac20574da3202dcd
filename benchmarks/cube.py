"""cube-server beside Redis, Valkey, a Redis Cluster and memcached: the same million rows of 64 bytes, the same keys.

Every server is a process of its own; its CPU time is read from /proc. Clients are processes too: "raw" ones send
requests that were encoded beforehand and read as many bytes as the answer has, so that what is seen is the server;
"redis-py" and "RemoteCube" are what a predictor would use, numpy in and numpy out. Answers are compared before anything
is timed. Closed loop: IN_FLIGHT calls at a time on one connection. Open loop: calls at random moments (Poisson) at half
of what the closed loop reached, timed from the moment they were due, so that no call's delay hides another's.

    make bench WHAT=cube            about fifteen minutes
    make bench WHAT='cube --quick'  one short round of the small and the large call

A second table (results/cube-hedging) has two replicas of a shard, one of which sleeps 50 ms in 3 % of its calls, so
that 1.5 % of all calls meet a sleeper: what that does to the slowest calls, with hedged reads and without.

valkey takes part where valkey-server is on PATH or VALKEY_SERVER says where it is, memcached where it is installed.
"""

import argparse
import asyncio
import bisect
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, keep
from cube import build
from cube.pb import cube_pb2 as pb
from cube.service import LOOKUP
from cube.sources import open_source
from cube.version import Version

FIRST_SLOTS = (5461, 10923)  # of the second and third of three nodes, as redis-cli shares them out
COUNT, DIM, CALLS, IN_FLIGHT = 1_000_000, 16, 64, 4
SIZES = (26, 520, 4096, 13312)
TABLE, VERSION = "t", Version(1)
Call = Callable[[int], Awaitable[bytes]]


def all_keys() -> np.ndarray:
    """Distinct, and different every 2^64 / golden ratio: no server can profit from their order."""
    return np.arange(1, COUNT + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def row_of(keys: np.ndarray) -> np.ndarray:
    """The row of each key: float32[n, DIM]."""
    words = (keys[:, None] >> np.arange(0, 64, 4, dtype=np.uint64)) & np.uint64(0xFFFF)
    return words.astype(np.float32)


def asked(size: int) -> list[np.ndarray]:
    """The keys of CALLS calls."""
    rng, keys = np.random.default_rng(size), all_keys()
    return [keys[rng.integers(0, COUNT, size)] for _ in range(CALLS)]


# ---- what goes over the wire ----


def redis_mget(keys: np.ndarray) -> bytes:
    raw = keys.tobytes()
    parts = [b"*%d\r\n$4\r\nMGET\r\n" % (len(keys) + 1)]
    parts += [b"$8\r\n%b\r\n" % raw[at : at + 8] for at in range(0, len(raw), 8)]
    return b"".join(parts)


def redis_reply(keys: np.ndarray) -> bytes:
    return b"*%d\r\n" % len(keys) + b"".join(b"$%d\r\n%b\r\n" % (4 * DIM, row.tobytes()) for row in row_of(keys))


def memcached_get(keys: np.ndarray) -> bytes:
    return b"get " + b" ".join(b"%016x" % key for key in keys.tolist()) + b"\r\n"


def memcached_reply(keys: np.ndarray) -> bytes:
    rows = zip(keys.tolist(), row_of(keys), strict=True)
    return b"".join(b"VALUE %016x 0 %d\r\n%b\r\n" % (key, 4 * DIM, row.tobytes()) for key, row in rows) + b"END\r\n"


def http_post(keys: np.ndarray) -> bytes:
    head = f"POST /v1/tables/{TABLE}:lookup HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n%b" % (8 * len(keys), keys.tobytes())


def lookup_request(keys: np.ndarray) -> bytes:
    return pb.LookupRequest(tables=[pb.TableKeys(table=TABLE, keys=keys.tobytes())]).SerializeToString()


def lookup_rows(reply: bytes) -> bytes:
    return pb.LookupReply.FromString(bytes(reply)).tables[0].rows


# ---- clients: python -m benchmarks.cube --ask KIND ----


class Pipe:
    """Raw requests on one connection; answers come in order."""

    def __init__(self, requests: list[bytes], sizes: list[int] | None):
        self.requests, self.sizes = requests, sizes  # bytes of each answer; None: found out by the first

    async def connect(self, address: str) -> None:
        if address.startswith("unix:"):
            self.reader, self.writer = await asyncio.open_unix_connection(address[5:], limit=1 << 24)
        else:
            host, port = address.rsplit(":", 1)
            self.reader, self.writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.turn.set_result(None)

    async def __call__(self, number: int) -> bytes:
        self.writer.write(self.requests[number])
        before, self.turn = self.turn, asyncio.get_running_loop().create_future()
        mine = self.turn
        await before
        try:
            if self.sizes is None:
                head = await self.reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.sizes = [len(head) + length] * len(self.requests)
                return head + await self.reader.readexactly(length)
            return await self.reader.readexactly(self.sizes[number])
        finally:
            mine.set_result(None)


async def ask(kind: str, addresses: list[str], size: int, seconds: float, rate: float) -> dict[str, Any]:
    calls = asked(size)
    expected = row_of(calls[0]).tobytes()
    async with contextlib.AsyncExitStack() as stack:
        call: Call
        if kind in ("redis", "memcached", "http"):
            encode = {"redis": redis_mget, "memcached": memcached_get, "http": http_post}[kind]
            answer = {"redis": redis_reply, "memcached": memcached_reply, "http": None}[kind]
            pipe = Pipe([encode(keys) for keys in calls], None if answer is None else len(answer(calls[0])))
            await pipe.connect(addresses[0])
            first = await pipe(0)
            assert (first == answer(calls[0])) if answer else expected in first
            call = pipe
        elif kind == "cluster":  # each key's slot is worked out beforehand; MGET across slots is refused, GETs are not
            call = await cluster_call(addresses, calls, expected)
        elif kind == "redis-py":
            import redis.asyncio

            port = int(addresses[0].rsplit(":", 1)[1])
            pool = redis.asyncio.BlockingConnectionPool(host="127.0.0.1", port=port, max_connections=16)
            client = redis.asyncio.Redis(connection_pool=pool)
            stack.push_async_callback(client.aclose)

            async def call(number: int) -> bytes:
                raw = calls[number].tobytes()
                values = await client.mget([raw[at : at + 8] for at in range(0, len(raw), 8)])
                return np.frombuffer(b"".join(values), np.float32).data

            assert bytes(await call(0)) == expected
        elif kind == "RemoteCube":
            from cube.client import Ask, RemoteCube

            cube = await stack.enter_async_context(RemoteCube(addresses))

            async def call(number: int) -> bytes:
                return (await cube.lookup([Ask(TABLE, calls[number])], 10)).tables[0].rows.data

            assert bytes(await call(0)) == expected
        elif kind == "grpcio":
            from grpc import aio

            options = [("grpc.max_receive_message_length", -1)]
            channel = await stack.enter_async_context(aio.insecure_channel(addresses[0], options))
            method, messages = channel.unary_unary(LOOKUP), [lookup_request(keys) for keys in calls]

            async def call(number: int) -> bytes:
                return await method(messages[number])

            assert lookup_rows(await call(0)) == expected
        else:
            from cube.rpc.channel import Channel

            own = await stack.enter_async_context(Channel(addresses[0]))
            sent = [lookup_request(keys) for keys in calls]

            async def call(number: int) -> bytes:
                return await own.call(LOOKUP, sent[number], 10)

            assert lookup_rows(await call(0)) == expected
        return await (open_loop(call, seconds, rate) if rate else closed_loop(call, seconds))


async def cluster_call(addresses: list[str], calls: list[np.ndarray], expected: bytes) -> Call:
    from redis.crc import key_slot

    pipes, places = [], []
    for number, address in enumerate(addresses):
        requests, mine = [], []
        for keys in calls:
            raw = keys.tobytes()
            each = [raw[at : at + 8] for at in range(0, len(raw), 8)]
            here = [i for i, key in enumerate(each) if bisect.bisect_right(FIRST_SLOTS, key_slot(key)) == number]
            requests.append(b"".join(b"*2\r\n$3\r\nGET\r\n$8\r\n%b\r\n" % each[i] for i in here))
            mine.append(here)
        sizes = [len(here) * (4 * DIM + 7) for here in mine]
        pipe = Pipe(requests, sizes)
        await pipe.connect(address)
        pipes.append(pipe)
        places.append(mine)

    async def call(number: int) -> bytes:
        return b"".join(await asyncio.gather(*(pipe(number) for pipe in pipes)))

    answer = await call(0)
    order = [place for mine in places for place in mine[0]]
    rows = [answer[at + 5 : at + 5 + 4 * DIM] for at in range(0, len(answer), 4 * DIM + 7)]
    found = b"".join(row for _, row in sorted(zip(order, rows, strict=True)))
    assert found == expected
    return call


async def closed_loop(call: Call, seconds: float) -> dict[str, Any]:
    latencies: list[float] = []
    end, cpu = time.perf_counter() + seconds, time.process_time()

    async def caller(first: int) -> None:
        number, begin = first, time.perf_counter()
        while begin < end:
            await call(number % CALLS)
            now = time.perf_counter()
            latencies.append(now - begin)
            number, begin = number + IN_FLIGHT, now

    begin = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(IN_FLIGHT)))
    return told(latencies, time.perf_counter() - begin, time.process_time() - cpu)


async def open_loop(call: Call, seconds: float, rate: float) -> dict[str, Any]:
    latencies: list[float] = []
    waits, cpu = np.random.default_rng(0).exponential(1 / rate, int(rate * seconds * 2) + 10), time.process_time()

    async def one(number: int, due: float) -> None:
        await call(number % CALLS)
        latencies.append(time.perf_counter() - due)

    begin = due = time.perf_counter()
    tasks, number = set(), 0
    while due < begin + seconds:
        due += waits[number]
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(one(number, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    await asyncio.gather(*tasks)
    return told(latencies, time.perf_counter() - begin, time.process_time() - cpu)


def told(latencies: list[float], seconds: float, cpu_s: float) -> dict[str, Any]:
    shares = [float(np.percentile(latencies, share)) * 1e3 for share in (50, 99, 99.9)]
    return {"calls": len(latencies), "seconds": seconds, "cpu_s": cpu_s, "ms": shares}


# ---- hedged reads ----


async def stall(folder: str, share: float) -> None:
    """A cube-server that sleeps 50 ms in a share of its calls."""
    import random

    from cube.rpc.listener import Listener
    from cube.service import CubeService
    from cube.table import open_tables

    service = CubeService(open_tables(Path(folder), 0, 1), 0, 1)
    dice = random.Random(0)

    async def sleepy(message: Any, call: Any) -> Any:
        await asyncio.sleep(0.05)
        return service.lookup(message, call)

    def lookup(message: Any, call: Any) -> Any:
        return sleepy(message, call) if dice.random() < share else service.lookup(message, call)

    listener = Listener({**service.handlers(), LOOKUP: lookup}, None)
    print("listening on", await listener.start("127.0.0.1:0"), flush=True)
    await asyncio.Event().wait()


async def hedged(addresses: list[str], seconds: float, **options: Any) -> dict[str, Any]:
    """Lookups of 26 keys over two replicas, in a closed loop."""
    from cube.client import Ask, RemoteCube
    from cube.rpc.routing import Options

    calls = asked(26)
    async with RemoteCube(["list://" + ",".join(addresses)], options=Options(**options)) as cube:

        async def call(number: int) -> bytes:
            return (await cube.lookup([Ask(TABLE, calls[number])], 10)).tables[0].rows.data

        assert bytes(await call(0)) == row_of(calls[0]).tobytes()
        await closed_loop(call, 0.5)
        before = dataclasses.replace(cube.balancers[0].counters)
        found = await closed_loop(call, seconds)
        after = cube.balancers[0].counters
    return found | {"hedges": after.hedges - before.hedges, "asked": after.calls - before.calls}


def hedging(folder: Path, address: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """The second table."""
    import uvloop

    from cube.rpc.routing import Policy

    me = [sys.executable, "-m", "benchmarks.cube", "--stall", str(folder / "data")]
    ways = {
        "round robin": {"policy": Policy.ROUND_ROBIN},
        "round robin, hedged": {"policy": Policy.ROUND_ROBIN, "hedge": 0.95},
        "least loaded (default)": {},
        "least loaded, hedged": {"hedge": 0.95},
    }
    best: dict[str, dict[str, Any]] = {}
    with process(me) as (sleepy, _):
        for _ in range(rounds):
            for name, options in ways.items():
                found = uvloop.run(hedged([address, sleepy], seconds, **options))
                if name not in best or found["ms"][1] < best[name]["ms"][1]:
                    best[name] = found
    return [
        {
            "policy": name,
            "calls/s": f"{found['calls'] / found['seconds']:,.0f}",
            "p50, p99, p99.9 ms": ", ".join(f"{ms:.2f}" for ms in found["ms"]),
            "extra calls": f"{found['hedges'] / found['asked']:.1%}",
        }
        for name, found in best.items()
    ]


# ---- servers ----


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def process(command: list[str], address: str = "", **options: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server: its address, said by itself after "listening on " if none is given, and its process."""
    spoken = subprocess.PIPE if not address else subprocess.DEVNULL
    running = subprocess.Popen(command, stdout=spoken, stderr=subprocess.DEVNULL, text=True, **options)
    try:
        if not address:
            assert running.stdout is not None
            address = running.stdout.readline().split("listening on ")[1].split(",")[0].strip()
        else:
            until_open(address)
        yield address, running
    finally:
        running.kill()
        running.wait()


def until_open(address: str) -> None:
    host, port = address.rsplit(":", 1)
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return
        time.sleep(0.05)
    raise TimeoutError(address)


def fill_redis(address: str) -> None:
    """All rows, in MSETs of a thousand."""
    keys = all_keys()
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port))) as sock, sock.makefile("rb") as replies:
        for at in range(0, COUNT, 1000):
            part = keys[at : at + 1000]
            pairs = zip(part, row_of(part), strict=True)
            body = b"".join(b"$8\r\n%b\r\n$%d\r\n%b\r\n" % (k.tobytes(), 4 * DIM, row.tobytes()) for k, row in pairs)
            sock.sendall(b"*%d\r\n$4\r\nMSET\r\n" % (2 * len(part) + 1) + body)
            assert replies.readline() == b"+OK\r\n"


def fill_cluster(addresses: list[str]) -> None:
    import redis

    client = redis.RedisCluster(host="127.0.0.1", port=int(addresses[0].rsplit(":", 1)[1]))
    keys = all_keys()
    for at in range(0, COUNT, 20_000):
        part = keys[at : at + 20_000]
        pipe = client.pipeline()
        for key, row in zip(part, row_of(part), strict=True):
            pipe.set(key.tobytes(), row.tobytes())
        pipe.execute()


def fill_memcached(address: str) -> None:
    keys = all_keys()
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port))) as sock:
        for at in range(0, COUNT, 1000):
            part = keys[at : at + 1000]
            sock.sendall(
                b"".join(
                    b"set %016x 0 0 %d noreply\r\n%b\r\n" % (key, 4 * DIM, row.tobytes())
                    for key, row in zip(part.tolist(), row_of(part), strict=True)
                )
            )
        sock.sendall(b"version\r\n")
        assert sock.recv(100).startswith(b"VERSION")


def valkey() -> str | None:
    return os.environ.get("VALKEY_SERVER") or shutil.which("valkey-server")


def servers(stack: contextlib.ExitStack, folder: Path) -> dict[str, tuple[list[str], list[int]]]:
    """Running, filled servers by name: addresses and process ids."""
    np.save(folder / "keys.npy", all_keys())
    np.save(folder / "rows.npy", row_of(all_keys()))
    build.build(open_source([str(folder)]), folder / "data", TABLE, VERSION, build.Options(shards=1))
    build.build(open_source([str(folder)]), folder / "two", TABLE, VERSION, build.Options(shards=2))
    own = [str(Path(sys.executable).parent / "cube-server"), "--verify", "off"]
    one = [*own, "--data", str(folder / "data"), "--shards", "1", "--shard", "0", "--listen"]
    found: dict[str, tuple[list[str], list[int]]] = {}

    def start(name: str, command: list[str], address: str = "", **options: Any) -> str:
        at, running = stack.enter_context(process(command, address, **options))
        addresses, pids = found.setdefault(name, ([], []))
        addresses.append(at)
        pids.append(running.pid)
        return at

    start("cube-server", [*one, "127.0.0.1:0"])
    start("cube-server, unix socket", [*one, f"unix:{folder}/socket"])
    start("cube-server --grpc grpcio", [*one, "127.0.0.1:0", "--grpc", "grpcio"])
    for shard in range(2):
        start(
            "2 cube-servers",
            [*own, "--data", str(folder / "two"), "--shards", "2", "--shard", str(shard), "--listen", "127.0.0.1:0"],
        )
    for name, program, *more in (
        ("redis 7", "redis-server"),
        ("redis 7, 4 I/O threads", "redis-server", "--io-threads", "4", "--io-threads-do-reads", "yes"),
        ("valkey 8", valkey() or ""),
    ):
        if program and shutil.which(program):
            port = free_port()
            options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *more]
            fill_redis(start(name, [program, *options], f"127.0.0.1:{port}", cwd=folder))
    if shutil.which("redis-server") and shutil.which("redis-cli"):
        ports = []
        for number in range(3):
            ports.append(port := free_port())
            home = folder / f"node{number}"
            home.mkdir()
            options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
            options += ["--cluster-enabled", "yes", "--dir", str(home)]
            start("redis 7, cluster of 3", ["redis-server", *options], f"127.0.0.1:{port}")
        line = ["redis-cli", "--cluster", "create", *(f"127.0.0.1:{port}" for port in ports)]
        subprocess.run([*line, "--cluster-replicas", "0", "--cluster-yes"], check=True, capture_output=True, timeout=60)
        time.sleep(3)
        fill_cluster(found["redis 7, cluster of 3"][0])
    if shutil.which("memcached"):
        port = free_port()
        command = ["memcached", "-l", "127.0.0.1", "-p", str(port), "-m", "1024", "-t", "1", "-u", "nobody"]
        fill_memcached(start("memcached", command, f"127.0.0.1:{port}"))
    return found


CONTENDERS = [  # client, server
    ("own", "cube-server"), ("RemoteCube", "cube-server"), ("own", "cube-server, unix socket"),
    ("grpcio", "cube-server"), ("own", "cube-server --grpc grpcio"), ("grpcio", "cube-server --grpc grpcio"),
    ("http", "cube-server"), ("RemoteCube", "2 cube-servers"), ("redis", "redis 7"), ("redis-py", "redis 7"),
    ("redis", "redis 7, 4 I/O threads"), ("redis", "valkey 8"), ("redis-py", "valkey 8"),
    ("cluster", "redis 7, cluster of 3"), ("memcached", "memcached"),
]  # fmt: skip


# ---- measuring ----


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Contender:
    """A client against a server, with calls of one size."""

    def __init__(self, client: str, server: str, where: tuple[list[str], list[int]], size: int):
        self.client, self.server, (self.addresses, self.pids), self.size = client, server, where, size
        self.rate, self.server_us, self.client_us = 0.0, float("inf"), float("inf")
        self.closed_ms = self.open_ms = [float("inf")] * 3

    def run(self, seconds: float) -> None:
        """A closed loop, then an open one at half its rate; the best of all rounds counts."""
        before = cpu_s(self.pids)
        found = self._ask(seconds, 0)
        self.server_us = min(self.server_us, (cpu_s(self.pids) - before) / found["calls"] * 1e6)
        self.client_us = min(self.client_us, found["cpu_s"] / found["calls"] * 1e6)
        self.rate = max(self.rate, found["calls"] / found["seconds"])
        self.closed_ms = list(map(min, self.closed_ms, found["ms"]))
        self.open_ms = list(map(min, self.open_ms, self._ask(seconds, self.rate / 2)["ms"]))

    def _ask(self, seconds: float, rate: float) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "benchmarks.cube",
            "--ask",
            self.client,
            "--addresses",
            ",".join(self.addresses),
        ]
        command += ["--size", str(self.size), "--seconds", str(seconds), "--rate", str(rate)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
        if done.returncode:
            raise RuntimeError(f"{self.client} → {self.server}, {self.size} keys: {done.stderr[-2000:]}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def row(self) -> dict[str, Any]:
        """Of the table of results."""
        return {
            "keys a call": self.size,
            "server": self.server,
            "client": {"redis": "raw", "memcached": "raw", "http": "raw HTTP/1.1", "cluster": "raw, 3 sockets"}.get(
                self.client, self.client
            ),
            "calls/s": f"{self.rate:,.0f}",
            "server CPU µs": f"{self.server_us:,.0f}",
            "keys / server CPU-s": f"{self.size / self.server_us * 1e6:,.0f}",
            "client CPU µs": f"{self.client_us:,.0f}",
            "p50, p99, p99.9 ms": ", ".join(f"{ms:.2f}" for ms in self.closed_ms),
            "at half the rate": ", ".join(f"{ms:.2f}" for ms in self.open_ms),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    for name, kind, default in (
        ("ask", str, ""),
        ("stall", str, ""),
        ("addresses", str, ""),
        ("size", int, 26),
        ("seconds", float, 2.0),
        ("rate", float, 0.0),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stall:
        asyncio.run(stall(given.stall, 0.03))
        return
    if given.ask:
        import uvloop

        work = ask(given.ask, given.addresses.split(","), given.size, given.seconds, given.rate)
        print(json.dumps(uvloop.run(work)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-cube.") as folder, contextlib.ExitStack() as stack:
        there = servers(stack, Path(folder))
        sizes = (26, 4096) if given.quick else SIZES
        contenders = [Contender(c, s, there[s], size) for size in sizes for c, s in CONTENDERS if s in there]
        for turn in range(rounds := 1 if given.quick else 2):
            for contender in contenders:
                contender.run(0.8)
            print(f"round {turn + 1} of {rounds}", file=sys.stderr)
        slow = hedging(Path(folder), there["cube-server"][0][0], rounds, 1.0 if given.quick else 2.0)
    keep("cube", [contender.row() for contender in contenders])
    keep("cube-hedging", slow)
    plot(contenders)


def plot(contenders: list[Contender]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for client, server in CONTENDERS:
        points = [(c.size, c.size / c.server_us) for c in contenders if (c.client, c.server) == (client, server)]
        if points:
            ours = server.startswith(("cube", "2"))
            axes.plot(
                *zip(*points, strict=True), label=f"{server} ← {client}", linestyle="-" if ours else "--", marker="o"
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("keys a call")
    axes.set_ylabel("million keys a second of server CPU")
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "cube.svg")


if __name__ == "__main__":
    main()
