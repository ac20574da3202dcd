"""Real Redis servers for tests, on free loopback ports, gone when the test is over."""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

_READY_S = 60.0
_TRIES = 3


def needs_redis() -> None:
    """Skip the test where no redis-server is installed."""
    if not shutil.which("redis-server") or not shutil.which("redis-cli"):
        pytest.skip("redis-server and redis-cli are not on PATH (Debian: apt-get install redis-server redis-tools)")


def cli(port: int, *words: str, password: str = "") -> str:
    """What redis-cli prints for a command."""
    secret = ("-a", password, "--no-auth-warning") if password else ()
    line = ["redis-cli", "-h", "127.0.0.1", "-p", str(port), *secret, *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=_READY_S).stdout


@contextmanager
def redis_process(*options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A redis-server without persistence: its port and the process, ready to answer."""
    needs_redis()
    with tempfile.TemporaryDirectory(prefix="redis.") as home:
        for _ in range(_TRIES):  # somebody else may have taken the port meanwhile
            port, process = _started(home, options)
            try:
                if process.poll() is None:
                    yield port, process
                    return
            finally:
                process.kill()  # wakes and ends a stopped one, too
                process.wait()
        raise AssertionError(f"redis-server ended with {process.returncode}")


def _started(home: str, options: tuple[str, ...]) -> tuple[int, subprocess.Popen[bytes]]:
    """A redis-server that answers, or has ended; and the port that it was told to take."""
    port = _free_port()
    fixed = ["--port", str(port), "--bind", "127.0.0.1", "--dir", home, "--save", "", "--appendonly", "no"]
    # where util-linux is new enough, the server goes even if the tests are killed
    tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    process = subprocess.Popen([*tied, "redis-server", *fixed, *options], stdout=subprocess.DEVNULL)
    _until(lambda: process.poll() is not None or "+" in _ping(port) or "-NOAUTH" in _ping(port), "redis-server")
    return port, process


@contextmanager
def redis_cluster() -> Iterator[list[int]]:
    """A Cluster of three nodes without replicas: their ports."""
    with ExitStack() as nodes:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "20000")
        ports = [nodes.enter_context(redis_process(*options))[0] for _ in range(3)]
        line = ["redis-cli", "--cluster", "create", *(f"127.0.0.1:{port}" for port in ports)]
        line += ["--cluster-replicas", "0", "--cluster-yes"]
        subprocess.run(line, check=True, capture_output=True, timeout=_READY_S)
        for port in ports:
            _until(lambda port=port: "cluster_state:ok" in cli(port, "cluster", "info"), "the Cluster")
        yield ports


def _free_port() -> int:
    """A port that is free now, and whose Cluster bus (10000 above) exists and is free, too."""
    while True:
        with socket.socket() as one, socket.socket() as bus:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                bus.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            return port


def _ping(port: int) -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(100).decode()
    except OSError:
        return ""


def _until(ready, what: str) -> None:
    end = time.monotonic() + _READY_S
    while not ready():
        assert time.monotonic() < end, f"{what} is not ready after {_READY_S} s"
        time.sleep(0.02)
