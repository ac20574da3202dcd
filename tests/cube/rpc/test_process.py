"""A process that serves: what it says, how signals end it, and how several share a port."""

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from small_server import SLEEPS, small_server

from cube.errors import ServingError
from cube.rpc.process import Prepared, _Parent, _Stop

pytestmark = pytest.mark.slow

INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL


@contextlib.contextmanager
def calling(address):
    """call(method, message) → reply, on a connection of its own."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield lambda method, message=b"": channel.unary_unary(f"/t.T/{method}")(
            message, timeout=100, wait_for_ready=True
        )


@contextlib.contextmanager
def sleeping(server, seconds):
    """A future of the reply of a call that has begun to sleep."""
    with calling(server.address) as call, ThreadPoolExecutor() as threads:
        reply = threads.submit(call, "Sleep", b"%f" % seconds)
        server.wait_for(SLEEPS)
        yield reply


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def pids(address, count):
    """Of the processes that answer at an address."""
    found = set()
    end = time.monotonic() + 60
    while len(found) < count and time.monotonic() < end:
        with calling(address) as call:
            found.add(int(call("Pid")))
    return found


# ---- one process ----


@pytest.mark.parametrize("door", ["lean", "grpcio"])
@pytest.mark.parametrize("number", [INT, TERM])
def test_one_line_says_where_it_serves_and_a_signal_ends_it(door, number):
    with small_server("--door", door) as server:
        assert re.fullmatch(r"127\.0\.0\.1:\d+", server.address)
        with calling(server.address) as call:
            assert call("Echo", b"abc") == b"abc"
            assert int(call("Pid")) == server.pid
        server.process.send_signal(number)
        code, out, err = server.end()
        assert (code, out) == (0, "")
        assert err.index(f"{number.name}: draining") < err.index("main ends")


@pytest.mark.parametrize("door", ["lean", "grpcio"])
def test_what_is_in_flight_is_answered_after_a_signal(door):
    with small_server("--door", door) as server, sleeping(server, 0.5) as reply:
        server.process.send_signal(TERM)
        assert reply.result(60) == b"slept"
        assert server.end()[0] == 0


@pytest.mark.parametrize("door", ["lean", "grpcio"])
def test_a_second_signal_ends_it_at_once(door):
    with small_server("--door", door) as server, sleeping(server, 30) as reply:
        server.process.send_signal(TERM)
        server.wait_for(": draining")
        begin = time.monotonic()
        server.process.send_signal(INT)
        assert isinstance(reply.exception(60), grpc.RpcError)
        code, out, err = server.end()
        assert (code, out) == (0, "")
        assert "main ends" in err
        assert time.monotonic() - begin < 9  # SIGTERM's own patience is ten


def test_after_ctrl_c_nobody_waits_long():
    with small_server() as server, sleeping(server, 30) as reply:
        begin = time.monotonic()
        server.process.send_signal(INT)
        assert server.end()[0] == 0
        assert time.monotonic() - begin < 9
        assert isinstance(reply.exception(60), grpc.RpcError)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_before_it_serves_ends_it_too(workers):
    with ThreadPoolExecutor() as threads:

        def run():
            with small_server("--wait-s", 30, "--workers", workers) as server:  # waits for a line, or the end
                return server.address, *server.end()

        before = children()
        running = threads.submit(run)
        wait_until(lambda: children() - before)
        (pid,) = children() - before
        wait_until(lambda: catches_signals(pid) and len(children(pid)) == (workers if workers > 1 else 0))
        wait_until(lambda: all(map(catches_signals, children(pid))))
        os.kill(pid, TERM)
        address, code, out, _ = running.result(100)
    assert (address, code, out) == ("", 0, "")


def children(pid="self"):
    """Of a process, or of this one."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found |= set(map(int, file.read().split()))
    return found


def catches_signals(pid):
    """Whether it has handlers for both, and does not block them."""
    with open(f"/proc/{pid}/status") as file:
        masks = dict(re.findall(r"^(Sig\w+):\s*(\w+)$", file.read(), re.M))
    wanted = 1 << (INT - 1) | 1 << (TERM - 1)
    return int(masks["SigCgt"], 16) & wanted == wanted and not int(masks["SigBlk"], 16) & wanted


def test_the_soft_limit_of_descriptors_is_no_limit_of_connections():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        with small_server("--limit", "connections=1500") as server:
            assert server.address
            assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (min(2500, hard), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--door", "thin"], "door: found 'thin', expected lean or grpcio"),
        (["--door", "grpcio", "--workers", "2"], "door: found grpcio with workers"),
        (["--listen", "nowhere"], "listen: found 'nowhere', expected host:port"),
        (["--listen", "nowhere", "--workers", "3"], "listen: found 'nowhere', expected host:port"),
        (["--listen", "unix:/tmp/no-such-socket", "--workers", "2"], "for several workers"),
        (["--tls", "no.pem", "no.key", "--workers", "2"], "TLS files no.pem"),
    ],
)
def test_what_cannot_be_served_is_one_line(flags, complaint):
    with small_server(*flags) as server:
        code, out, err = server.end()
    assert (server.address, code, out) == ("", 1, "")
    assert complaint in err
    assert len([line for line in err.splitlines() if not line.startswith("INFO")]) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_ours_is_not_hidden(workers):
    with small_server("--wreck", "--workers", workers) as server:
        code, out, err = server.end()
    assert (code, out) == (1, "")
    assert "ZeroDivisionError: wrecked" in err


# ---- workers ----


@pytest.fixture
def pair():
    with small_server("--workers", 2) as server:
        yield server


def test_workers_share_one_port_and_one_line_and_end_together(pair):
    workers = pids(pair.address, 2)
    assert len(workers) == 2
    assert workers == children(pair.pid)
    pair.process.send_signal(TERM)
    code, out, _ = pair.end()
    assert (code, out) == (0, "")
    assert all(map(gone, workers))


def test_a_port_that_workers_share_is_not_shared_with_a_second_server(pair):
    with small_server("--workers", 2, "--listen", pair.address) as second:
        code, out, err = second.end()
    assert (second.address, code, out) == ("", 1, "")
    assert f"listen: found {pair.address}, which cannot be bound" in err


def test_what_is_in_flight_in_a_worker_is_answered_after_a_signal_to_everyone():
    # As a terminal and service managers do it: each worker gets one signal from them and one from its parent.
    with small_server("--workers", 2, new_group=True) as server, sleeping(server, 1) as reply:
        os.killpg(server.pid, TERM)
        assert reply.result(60) == b"slept"
        assert server.end()[0] == 0


def test_a_second_signal_ends_workers_at_once(pair):
    with sleeping(pair, 30) as reply:
        pair.process.send_signal(TERM)
        pair.wait_for(": draining")
        begin = time.monotonic()
        pair.process.send_signal(TERM)
        assert isinstance(reply.exception(60), grpc.RpcError)
        assert pair.end()[0] == 0
        assert time.monotonic() - begin < 9


def test_when_a_worker_dies_the_others_stop_and_it_shows(reserve):
    address = reserve()
    with small_server("--workers", 2, "--listen", address) as server:
        first, second = pids(address, 2)
        os.kill(first, KILL)
        code, _, err = server.end()
    assert code == 1
    assert f"(process {first}) was ended by SIGKILL; stopping" in err
    assert gone(second)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address.rsplit(":", 1), 60)


def test_a_worker_that_is_stopped_alone_takes_the_others_with_it(pair):
    first, second = pids(pair.address, 2)
    os.kill(first, TERM)
    code, _, err = pair.end()
    assert code == 1
    assert f"(process {first}) exited with 0; stopping" in err
    assert gone(second)


def test_workers_do_not_outlive_their_parent(pair):
    workers = pids(pair.address, 2)
    with sleeping(pair, 0.5) as reply:
        pair.process.kill()
        assert reply.result(60) == b"slept"
    wait_until(lambda: all(map(gone, workers)))


def test_a_worker_that_is_stopped_and_does_not_hear_that_it_should_end_is_killed(pair):
    first, second = pids(pair.address, 2)
    os.kill(first, signal.SIGSTOP)
    pair.process.send_signal(INT)
    code, _, err = pair.end()
    assert code == 1
    assert f"(process {first}) was ended by SIGKILL" in err
    assert gone(second)


@contextlib.asynccontextmanager
async def worker_end():
    """A worker's end of the conversation, with reader and writer of the parent's; what it has heard; how it is asked to
    stop."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    stop, heard = _Stop(), []
    parent = await _Parent.connect(theirs, stop)

    async def prepare(command):
        heard.append(command)
        return Prepared(lambda: heard.append("committed"))

    parent.orders.obey(prepare, heard.append)
    try:
        yield parent, stop, reader, writer, heard
    finally:
        await parent.close()
        writer.close()


def test_a_worker_hears_lines_of_any_length_that_a_request_may_have():
    async def converse():
        async with worker_end() as (_, stop, reader, writer, heard):
            long = {"text": "\x01" * 100_000}
            for message in ({"news": long}, {"ping": True}, {"prepare": long}, {"stop": "SIGINT", "times": 1}):
                writer.write(json.dumps(message).encode() + b"\n")
            assert await asyncio.wait_for(stop.first, 60) == INT
            for said in ({"here": True}, {"here": True}, {"done": None}):
                assert json.loads(await asyncio.wait_for(reader.readline(), 60)) == said
            assert heard == [long, long]

    asyncio.run(converse())


@pytest.mark.parametrize("end", [b"no JSON\n", b'{"stop": "SIGNOTHING", "times": 1}\n', b" " * (2 << 20), b""])
def test_a_worker_that_can_hear_no_more_stops_and_fails_who_waits(end):
    async def converse():
        async with worker_end() as (parent, stop, reader, writer, _):
            told = asyncio.ensure_future(parent.tell({"do": "it"}))
            await asyncio.wait_for(reader.readline(), 60)
            writer.write(end)
            writer.write_eof()
            assert await asyncio.wait_for(stop.first, 60) == TERM
            with pytest.raises(ServingError, match="the server is stopping"):
                await asyncio.wait_for(told, 60)

    asyncio.run(converse())
