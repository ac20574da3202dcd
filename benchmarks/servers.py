"""Servers that are measured: a process on one core, its CPU time with all its children, and load from another core."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BIN = Path(sys.executable).parent
SERVER_CORE, CLIENT_CORE = {0}, {min(1, (os.cpu_count() or 1) - 1)}
OUR_READY = r"listening on ([^ ,]+),"


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """This process, and what it starts meanwhile, runs there only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server:
    """A running server, and the CPU it has used with all its children."""

    def __init__(self, command: list[Any], ready: str, **more: Any):
        """ready: a pattern in what it prints once it answers; its first group is the address."""
        with on_cores(SERVER_CORE):
            self._process = subprocess.Popen(
                [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, **more,
            )  # fmt: skip
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if found := re.search(ready, line):
                self.address = found[1] if found.groups() else ""
                break
        else:
            self.end()
            raise RuntimeError(f"{command[0]}: {''.join(lines)[-4000:]}")
        # a server that logs each request would stop at a full pipe
        threading.Thread(target=self._process.stdout.read, daemon=True).start()

    def cpu_s(self) -> float:
        """Of all processes of its session so far, in steps of a clock tick."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextlib.contextmanager
def served(*flags: Any) -> Iterator[Server]:
    """A predictor-server with one thread for nets, which says what to serve in its flags."""
    server = Server(
        [BIN / "predictor-server", "--listen", "127.0.0.1:0", "--compute-threads", "1", *flags],
        OUR_READY,
    )
    try:
        yield server
    finally:
        server.end()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Load(NamedTuple):
    """What wrk saw: requests answered, requests a second, and the 99th percentile of their time as it prints it."""

    requests: int
    rate: float
    tail: str


def wrk(url: str, body: Path | None, headers: dict[str, str], connections: int, seconds: float) -> Load:
    """Post a file's bytes again and again; GET where there is none. Every answer must be of status 2xx."""
    script = Path(__file__).parent / "peers" / "send.lua"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(int(seconds), 1)}s", "--latency"]
    command += [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    command += ["-s", str(script), url, "--", str(body)] if body else [url]
    with on_cores(CLIENT_CORE):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    said = done.stdout + done.stderr
    requests, rate = re.search(r"(\d+) requests in", said), re.search(r"Requests/sec:\s+([\d.]+)", said)
    tail = re.search(r"^ +99% +(\S+)", said, re.MULTILINE)
    assert requests and rate and tail and not re.search(r"Non-2xx|Socket errors", said), said  # noqa: PT018
    return Load(int(requests[1]), float(rate[1]), tail[1])
