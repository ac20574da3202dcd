"""What a call costs: our ends of the wire and grpcio's, in every combination, over real sockets.

Every contender is a process of its own, server and client; the CPU time of both is read from /proc, in interleaved
rounds, the least of each counting. The handler is the same everywhere: keys in, rows of 64 bytes out of an array (no
cube: this is about the wire). h2load is a client that is nobody's; wrk the one for HTTP/1.1. Answers are compared
before anything is timed. "Bare sockets" move as many bytes and do nothing with them: what is left for us to save is
the distance to them. One call at a time sends both processes to sleep and wakes them for each call, which on a virtual
machine costs more than the call.

    make bench WHAT=rpc              about six minutes
    make bench WHAT='rpc --quick'    one round of a second each
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, keep

ROW_BYTES, IN_FLIGHT, ECHO_BYTES = 64, 8, 12_580_000
ROWS = np.arange(1 << 18, dtype=np.uint64).repeat(ROW_BYTES // 8).reshape(-1, ROW_BYTES // 8)
LOOKUP, ECHO, HEALTH = "/bench.Rows/Lookup", "/bench.Rows/Echo", "/lookup"
METADATA = (("x-request-id", "0123456789abcdef"), ("x-tenant", "ads"))


def lookup(message, call):
    """uint64 keys → their rows, 64 bytes each."""
    keys = np.frombuffer(message, "<u8")
    return ROWS.take(keys & np.uint64(len(ROWS) - 1), axis=0)


def keys_of(count: int) -> bytes:
    return np.random.default_rng(count).integers(0, 1 << 62, count, dtype=np.uint64).tobytes()


# ---- servers: python -m benchmarks.rpc --serve KIND ----


async def serve(kind: str, listen: str, certificate: str) -> None:
    handlers = {LOOKUP: lookup, ECHO: lambda message, call: message}
    if kind == "bare":
        port = await asyncio.get_running_loop().create_server(_Bare, "127.0.0.1", 0)
        print("127.0.0.1", port.sockets[0].getsockname()[1], sep=":", flush=True)
        await asyncio.Event().wait()
    if kind == "grpcio":
        from cube.rpc.grpcio_door import GrpcioDoor

        door: Any = GrpcioDoor(handlers)
    else:
        from cube.rpc.listener import Listener
        from cube.rpc.router import Response, Router
        from cube.rpc.tls import Tls

        router = Router()
        router.add(
            "POST", HEALTH, lambda request: Response(200, lookup(request.body, None), "application/octet-stream")
        )
        tls = Tls(certificate, certificate) if kind == "tls" else None
        door = Listener(handlers, router, tls=tls)
    print(await door.start(listen), flush=True)
    await asyncio.Event().wait()


class _Bare(asyncio.Protocol):
    """As many bytes as rows for the keys would be."""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(bytes(len(data) // 8 * ROW_BYTES))


@contextlib.contextmanager
def server(kind: str, listen: str = "127.0.0.1:0", certificate: str = "") -> Iterator[tuple[int, str]]:
    """Process id and address of a server on core 0."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.rpc",
        "--serve",
        kind,
        "--listen",
        listen,
        "--certificate",
        certificate,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(process.pid, {0})
    try:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


# ---- clients: python -m benchmarks.rpc --ask KIND; they print {"calls", "seconds", "cpu_s"} ----


async def ask_async(channel_call, seconds: float) -> tuple[int, float]:
    """IN_FLIGHT calls at a time on one connection."""
    calls, end = 0, time.perf_counter() + seconds
    begin = time.process_time()

    async def caller() -> None:
        nonlocal calls
        while time.perf_counter() < end:
            await channel_call()
            calls += 1

    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    return calls, time.process_time() - begin


def ask_blocking(call, seconds: float, threads: int = 1) -> tuple[int, float]:
    """Threads that make one call at a time each."""
    end = time.perf_counter() + seconds
    begin = time.process_time()

    def caller(_: int) -> int:
        calls = 0
        while time.perf_counter() < end:
            call()
            calls += 1
        return calls

    with ThreadPoolExecutor(threads) as pool:
        calls = sum(pool.map(caller, range(threads)))
    return calls, time.process_time() - begin


async def ask_bare(address: str, message: bytes, seconds: float) -> tuple[int, float]:
    """IN_FLIGHT messages at a time on one connection, without protocol."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    begin, end, calls, part, size = time.process_time(), time.perf_counter() + seconds, 0, 0, len(message) // 8
    writer.write(message * IN_FLIGHT)
    while time.perf_counter() < end:
        part += len(await reader.read(1 << 18))
        whole, part = divmod(part, size * ROW_BYTES)
        writer.write(message * whole)
        calls += whole
    return calls, time.process_time() - begin


def ask_bare_blocking(address: str, message: bytes, seconds: float) -> tuple[int, float]:
    """One message at a time."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as bare:
        bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reply = bytearray(len(message) // 8 * ROW_BYTES)

        def call() -> None:
            bare.sendall(message)
            left = memoryview(reply)
            while len(left):
                left = left[bare.recv_into(left) :]

        return ask_blocking(call, seconds)


def ask(kind: str, address: str, path: str, size: int, seconds: float, certificate: str, extras: bool) -> None:
    message = keys_of(size) if path == LOOKUP else bytes(ECHO_BYTES)
    timeout, metadata = (5.0, METADATA) if extras else (None, ())
    expected = lookup(message, None).tobytes() if path == LOOKUP else message

    async def own() -> tuple[int, float]:
        from cube.rpc.channel import Channel, tls_context

        tls = tls_context(certificate) if certificate else None
        async with Channel(address, tls=tls, authority="localhost" if tls else None) as channel:
            assert bytes(await channel.call(path, message, 10)) == expected
            return await ask_async(lambda: channel.call(path, message, timeout, metadata=metadata), seconds)

    async def grpcio() -> tuple[int, float]:
        from grpc import aio

        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        async with aio.insecure_channel(address, options) as channel:
            method = channel.unary_unary(path)
            assert await method(message) == expected
            return await ask_async(lambda: method(message, timeout=timeout, metadata=metadata or None), seconds)

    if kind == "bare sockets":
        import uvloop

        calls, cpu = uvloop.run(ask_bare(address, message, seconds))
    elif kind == "bare sockets blocking":
        calls, cpu = ask_bare_blocking(address, message, seconds)
    elif kind.startswith("own blocking"):
        from cube.rpc.blocking_channel import BlockingChannel

        with BlockingChannel(address) as channel:
            assert bytes(channel.call(path, message, 10)) == expected
            threads = IN_FLIGHT if kind.endswith("threads") else 1
            calls, cpu = ask_blocking(lambda: channel.call(path, message, timeout, metadata=metadata), seconds, threads)
    elif kind == "grpcio blocking":
        import grpc

        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(address, options) as channel:
            method = channel.unary_unary(path)
            assert method(message) == expected
            calls, cpu = ask_blocking(lambda: method(message, timeout=timeout, metadata=metadata or None), seconds)
    else:
        import uvloop

        calls, cpu = uvloop.run(own() if kind == "own" else grpcio())
    print(json.dumps({"calls": calls, "seconds": seconds, "cpu_s": cpu}))


# ---- measuring ----


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Contender:
    """A client against a server; keeps the least CPU and the most calls of all rounds."""

    def __init__(self, client: str, at: str, where: tuple[int, str], path: str, size: int, certificate: str = ""):
        self.client, self.at, (self.pid, self.address) = client, at, where
        self.path, self.size, self.certificate = path, size, certificate
        self.server_us = self.client_us = float("inf")
        self.rate = 0.0

    def run(self, seconds: float) -> None:
        before = cpu_s(self.pid)
        calls, rate, client_cpu = self._ask(seconds)
        if not calls:
            raise AssertionError(f"{self.client} made no call to {self.at}")
        self.server_us = min(self.server_us, (cpu_s(self.pid) - before) / calls * 1e6)
        self.client_us = min(self.client_us, client_cpu / calls * 1e6)
        self.rate = max(self.rate, rate)

    def _ask(self, seconds: float) -> tuple[int, float, float]:
        name, _, extras = self.client.partition(" + ")
        if name == "h2load":
            return self._h2load(seconds)
        if name == "wrk":
            return self._wrk(seconds)
        command = [sys.executable, "-m", "benchmarks.rpc", "--ask", name, "--listen", self.address, "--path", self.path]
        command += ["--size", str(self.size), "--seconds", str(seconds), "--certificate", self.certificate]
        command += ["--extras"] if extras else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        return told["calls"], told["calls"] / told["seconds"], told["cpu_s"]

    def _h2load(self, seconds: float) -> tuple[int, float, float]:
        message = keys_of(self.size)
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"\0" + len(message).to_bytes(4, "big") + message)
            file.flush()
            command = [
                "h2load", "-D", str(int(max(seconds, 1))), "-c", "4", "-m", "4", "-t", "1", "-d", file.name,
                "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{self.address}{self.path}",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True)
        found = re.search(r"requests: (\d+) total.* (\d+) succeeded, (\d+) failed", done.stdout)
        assert found, done.stdout
        assert int(found[3]) == 0, done.stdout
        rate = re.search(r"([\d.]+) req/s", done.stdout)
        assert rate, done.stdout
        return int(found[2]), float(rate[1]), float("inf")

    def _wrk(self, seconds: float) -> tuple[int, float, float]:
        with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
            body = "".join(f"\\{byte:03d}" for byte in keys_of(self.size))
            script.write(f'wrk.method = "POST"\nwrk.body = "{body}"\n')
            script.flush()
            command = ["wrk", "-t", "1", "-c", "8", "-d", f"{int(max(seconds, 1))}s", "-s", script.name]
            command.append(f"http://{self.address}{self.path}")
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True)
        found = re.search(r"(\d+) requests in", done.stdout)
        assert found, done.stdout
        assert "Non-2xx" not in done.stdout, done.stdout
        rate = re.search(r"Requests/sec: *([\d.]+)", done.stdout)
        assert rate, done.stdout
        return int(found[1]), float(rate[1]), float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--listen", default="127.0.0.1:0", help=argparse.SUPPRESS)
    parser.add_argument("--path", default=LOOKUP, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=26, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--certificate", default="", help=argparse.SUPPRESS)
    parser.add_argument("--extras", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.serve:
        from cube.rpc.process import run

        run(lambda process: serve(told.serve, told.listen, told.certificate))  # as the programs are run
    elif told.ask:
        ask(told.ask, told.listen, told.path, told.size, told.seconds, told.certificate, told.extras)
    else:
        measure(rounds=1 if told.quick else 3, seconds=1 if told.quick else 2)


def measure(rounds: int, seconds: float) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        certificate, authority = certificates(folder)
        lean, twin = stack.enter_context(server("lean")), stack.enter_context(server("grpcio"))
        unix = stack.enter_context(server("lean", f"unix:{folder}/socket"))
        tls = stack.enter_context(server("tls", certificate=certificate))
        bare = stack.enter_context(server("bare"))
        contenders = []
        for size in (26, 4096):
            contenders += [
                Contender("own", "own", lean, LOOKUP, size),
                Contender("own blocking", "own", lean, LOOKUP, size),
                Contender(f"own blocking, {IN_FLIGHT} threads", "own", lean, LOOKUP, size),
                Contender("own + deadline, metadata", "own", lean, LOOKUP, size),
                Contender("own", "own, unix socket", unix, LOOKUP, size),
                Contender("own", "own, TLS", tls, LOOKUP, size, authority),
                Contender("grpcio", "own", lean, LOOKUP, size),
                Contender("grpcio + deadline, metadata", "own", lean, LOOKUP, size),
                Contender("own", "grpcio", twin, LOOKUP, size),
                Contender("grpcio", "grpcio", twin, LOOKUP, size),
                Contender("grpcio blocking", "grpcio", twin, LOOKUP, size),
                Contender("grpcio + deadline, metadata", "grpcio", twin, LOOKUP, size),
            ]
            if size == 26:
                contenders += [
                    Contender("bare sockets", "bare sockets", bare, LOOKUP, size),
                    Contender("bare sockets blocking", "bare sockets", bare, LOOKUP, size),
                ]
            if shutil.which("h2load"):
                contenders += [
                    Contender("h2load", "own", lean, LOOKUP, size), Contender("h2load", "grpcio", twin, LOOKUP, size)
                ]  # fmt: skip
            if shutil.which("wrk"):
                contenders.append(Contender("wrk", "own, HTTP/1.1", lean, HEALTH, size))
        contenders += [
            Contender(client, name, where, ECHO, 0)
            for name, where in (("own", lean), ("grpcio", twin))
            for client in ("own blocking", "grpcio blocking")
        ]
        for turn in range(rounds):
            for contender in contenders:
                contender.run(seconds)
            print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    rows = [
        {
            "work": "echo of 12.58 MB" if c.path == ECHO else f"{c.size} keys → {c.size * ROW_BYTES / 1e3:.1f} KB",
            "client": c.client,
            "server": c.at,
            "calls/s": f"{c.rate:,.0f}",
            "server CPU µs": f"{c.server_us:,.0f}",
            "client CPU µs": "" if c.client_us == float("inf") else f"{c.client_us:,.0f}",
            "ms a call": f"{1e3 / c.rate:,.1f}" if c.path == ECHO else "",
        }
        for c in contenders
    ]
    keep("rpc", rows)
    plot(contenders)


def certificates(folder: Path) -> tuple[str, str]:
    """Files of a server's certificate with its key, and of who vouches for it."""
    import trustme

    authority = trustme.CA()
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    return str(folder / "server.pem"), str(folder / "authority.pem")


def plot(contenders: list[Contender]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    shown = [c for c in contenders if c.path != ECHO and c.size == 26]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    labels = [f"{c.client} → {c.at}" for c in shown]
    axes.barh(labels, [c.server_us for c in shown], color="#4878a8", label="server")
    known = [c.client_us if c.client_us < float("inf") else 0 for c in shown]
    axes.barh(labels, known, left=[c.server_us for c in shown], color="#c8d8e8", label="client")
    axes.invert_yaxis()
    axes.set_xlabel("CPU µs per call, 26 keys → 1.7 KB")
    axes.legend()
    figure.savefig(RESULTS / "rpc.svg")


if __name__ == "__main__":
    main()
