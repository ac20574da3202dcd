"""A channel against servers that come and go, refuse, say nothing, or do not read. Everything in one event loop."""

import asyncio
import contextlib
import gc
import ssl

import frames
import pytest
import uvloop
from certificates import Authority

from cube.errors import BadConfig, BadRequest, DeadlineExceeded, Unavailable
from cube.rpc import channel as channel_module
from cube.rpc.channel import Channel, backoff_s, tls_context
from cube.rpc.headers import encode
from cube.rpc.http2 import MAX_CONCURRENT_STREAMS, Connection, ErrorCode, HeadersReceived
from cube.rpc.limits import Limits
from cube.rpc.listener import Listener, Tls

ECHO, SLOW = "/t.T/Echo", "/t.T/Slow"
LOOPS = {"uvloop": uvloop.run, "asyncio": asyncio.run}


@pytest.fixture(params=LOOPS)
def run(request):
    """Run a coroutine function in a new loop, whose exception handler must hear nothing."""

    def run(work):
        complaints = []

        async def main():
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
            async with asyncio.timeout(120):
                await work()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left

        LOOPS[request.param](main())
        gc.collect(1)
        assert not complaints

    return run


async def until(what, seconds=60):
    """Wait for something that has no event."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.001)


async def turns(count=5):
    """Let what is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


class Server:
    """A Listener with a method that answers, and one that does so when `gate` opens."""

    def __init__(self, limits=None, tls=None):
        self.gate, self.begun, self.most, self.running = asyncio.Event(), 0, 0, 0
        handlers = {ECHO: lambda message, call: message, SLOW: self._slow}
        self.listener = Listener(handlers, None, limits or Limits(), tls)
        self.address = ""

    async def _slow(self, message, call):
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        return message


@contextlib.asynccontextmanager
async def serving(listen="127.0.0.1:0", limits=None, tls=None):
    server = Server(limits, tls)
    server.address = await server.listener.start(listen)
    try:
        yield server
    finally:
        await server.listener.drain(0)


@contextlib.asynccontextmanager
async def misbehaving(connected):
    """A server whose connections are what connected(reader, writer) makes of them; gives its address."""
    tasks = set()

    async def connect(reader, writer):
        task = asyncio.current_task()
        tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await connected(reader, writer)
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        waiting = list(tasks)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await server.wait_closed()
        await turns()


# ---- coming and going ----


def test_reconnects_after_a_loss(run):
    async def work():
        async with serving() as server, Channel(server.address) as channel:
            assert await channel.call(ECHO, b"a", 60) == b"a"
            for connection in list(server.listener._connections):
                connection.abort()
            await until(lambda: channel._link is None)
            assert await channel.call(ECHO, b"b", 60) == b"b"
            assert server.listener.accepted == 2

    run(work)


def test_calls_in_flight_learn_of_a_loss(run):
    async def work():
        async with serving() as server, Channel(server.address) as channel:
            calls = [asyncio.create_task(channel.call(SLOW, b"", None)) for _ in range(3)]
            await until(lambda: server.begun == 3)
            for connection in list(server.listener._connections):
                connection.abort()
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(error, Unavailable)
                assert not error.never_processed

    run(work)


def test_a_server_that_is_not_there(run, reserve):
    async def work():
        async with Channel(reserve()) as channel:
            with pytest.raises(Unavailable, match="cannot connect"):
                await channel.call(ECHO, b"", 60)
            with pytest.raises(Unavailable, match="cannot connect"):  # without an attempt: it is too soon
                await channel.call(ECHO, b"", None)
            with pytest.raises(DeadlineExceeded, match="cannot connect"):
                await channel.call(ECHO, b"", 0.05, wait_for_ready=True)

    run(work)


def test_wait_for_ready_and_a_restart(run, reserve):
    async def work():
        address = reserve()
        async with Channel(address) as channel:
            early = [asyncio.create_task(channel.call(ECHO, b"%d" % n, 60, wait_for_ready=True)) for n in range(10)]
            await turns()
            async with serving(address):
                assert await asyncio.gather(*early) == [b"%d" % n for n in range(10)]
            await until(lambda: channel._link is None)
            late = asyncio.create_task(channel.call(ECHO, b"x", 60, wait_for_ready=True))
            await turns()
            async with serving(address):
                assert await late == b"x"
                assert await channel.call(ECHO, b"y", 60) == b"y"

    run(work)


@pytest.mark.parametrize("greets", [False, True])
def test_backs_off_from_a_server_that_closes_at_once(run, greets):
    async def work():
        connections = 0

        async def connected(reader, writer):
            nonlocal connections
            connections += 1
            if greets:  # and leaves in the same breath
                writer.write(frames.settings() + frames.goaway(0))
                await reader.read(1)

        async with misbehaving(connected) as address, Channel(address) as channel:
            with pytest.raises(DeadlineExceeded, match="cannot connect"):
                await channel.call(ECHO, b"", 3, wait_for_ready=True)
            assert 3 <= connections <= 9
            with pytest.raises(Unavailable):
                await channel.call(ECHO, b"", 60)

    run(work)


def test_backoff_grows_and_is_bounded():
    assert backoff_s(0) == 0
    for failures, middle in [(1, 0.05), (2, 0.1), (5, 0.8), (6, 1.0), (10_000, 1.0)]:
        assert middle * 0.8 <= backoff_s(failures) <= middle * 1.2


def test_a_server_that_drains_fails_no_call(run, reserve):
    async def work():
        address = reserve()
        stop, counts = asyncio.Event(), {"calls": 0}
        async with Channel(address) as channel:

            async def caller():
                while not stop.is_set():
                    assert await channel.call(ECHO, b"abc", 60, wait_for_ready=True) == b"abc"
                    counts["calls"] += 1

            async with asyncio.TaskGroup() as group:
                for _ in range(20):
                    group.create_task(caller())
                for _ in range(3):
                    server = Server()
                    await server.listener.start(address)
                    had = counts["calls"]
                    slow = group.create_task(channel.call(SLOW, b"slow", 60, wait_for_ready=True))
                    await until(lambda s=server, n=had: s.begun and counts["calls"] > n + 100)
                    drained = group.create_task(server.listener.drain(60))
                    await turns()
                    server.gate.set()
                    assert await slow == b"slow"  # what had begun is finished
                    await drained
                async with serving(address):
                    had = counts["calls"]
                    await until(lambda: counts["calls"] > had + 100)
                    stop.set()
                    await until(lambda: counts["calls"] > had + 100)
                    await asyncio.sleep(0.01)

    run(work)


def test_goaway_moves_new_calls_to_a_new_connection(run):
    async def work():
        """The first connection goes away without a look at its second call, and while its first is in flight."""
        peers = []

        async def connected(reader, writer):
            server = Connection(is_client=False, limits=Limits())
            first = not peers
            peers.append(server)
            seen = []
            while data := await reader.read(65_536):
                for event in frames.apart(server.receive(data)):
                    if isinstance(event, HeadersReceived):
                        seen.append(event.stream)
                        if not first:
                            answer(server, event.stream, b"second")
                if first and len(seen) == 2:
                    server.goaway(last_stream_id=1)
                    answer(server, seen[0], b"first")
                writer.write(b"".join(map(bytes, server.take())))

        async with misbehaving(connected) as address, Channel(address) as channel:
            calls = [asyncio.create_task(channel.call(ECHO, b"", 60)) for _ in range(2)]
            assert await asyncio.gather(*calls) == [b"first", b"second"]
            assert len(peers) == 2

    run(work)


def answer(server, stream, message):
    """A whole reply."""
    server.send_headers(stream, encode([(b":status", b"200"), (b"content-type", b"application/grpc")]))
    server.send_data(stream, [b"\0" + len(message).to_bytes(4), message])
    server.send_trailers(stream, encode([(b"grpc-status", b"0")]))


@pytest.mark.parametrize("refusals", [1, 10_000])
def test_a_refused_call_is_sent_once_more(run, refusals):
    async def work():
        asked = 0

        async def connected(reader, writer):
            nonlocal asked
            server = Connection(is_client=False, limits=Limits())
            while data := await reader.read(65_536):
                for event in frames.apart(server.receive(data)):
                    if isinstance(event, HeadersReceived):
                        asked += 1
                        if asked <= refusals:
                            server.reset(event.stream, ErrorCode.REFUSED_STREAM)
                        else:
                            answer(server, event.stream, b"yes")
                writer.write(b"".join(map(bytes, server.take())))

        async with misbehaving(connected) as address, Channel(address) as channel:
            if refusals == 1:
                assert await channel.call(ECHO, b"", 60) == b"yes"
            else:
                with pytest.raises(Unavailable, match="REFUSED_STREAM") as caught:
                    await channel.call(ECHO, b"", 60)
                assert caught.value.never_processed
            assert asked == 2

    run(work)


# ---- the server's limit on streams ----


def test_many_calls_in_line_for_one_stream(run):
    async def work():
        async with serving(limits=Limits(streams=1)) as server, Channel(server.address) as channel:
            first = asyncio.create_task(channel.call(SLOW, b"", None))
            await until(lambda: server.begun == 1)
            order = []

            async def caller(n):
                assert await channel.call(ECHO, b"%d" % n, 60) == b"%d" % n
                order.append(n)

            tasks = [asyncio.create_task(caller(n)) for n in range(100)]
            late = [asyncio.create_task(channel.call(ECHO, b"", 0.02)) for _ in range(10)]
            bad = [asyncio.create_task(channel.call(ECHO, "text", 60)) for _ in range(3)]
            await turns()
            for task in tasks[::3]:
                task.cancel()
            for outcome in await asyncio.gather(*late, return_exceptions=True):
                assert isinstance(outcome, DeadlineExceeded)
            server.gate.set()
            await first
            await asyncio.gather(*tasks, return_exceptions=True)
            assert order == [n for n in range(100) if n % 3]  # in line, and nobody forgotten
            for outcome in await asyncio.gather(*bad, return_exceptions=True):
                assert isinstance(outcome, TypeError)
            link = channel._link
            assert (link.queued, len(link.waiters), link.calls.calls) == (0, 0, 0)

    run(work)


def test_a_call_that_was_woken_and_cancelled_passes_its_place_on(run):
    async def work():
        async with serving(limits=Limits(streams=1)) as server, Channel(server.address) as channel:
            first = asyncio.create_task(channel.call(SLOW, b"", None))
            await until(lambda: server.begun == 1)
            second, third = (asyncio.create_task(channel.call(ECHO, b"3", None)) for _ in range(2))
            await until(lambda: channel._link.queued == 2)
            link, wake = channel._link, channel._link.wake

            def woken():
                had = len(link.waiters)
                wake()
                if had == 2 and len(link.waiters) == 1:
                    second.cancel()

            link.wake = woken
            server.gate.set()
            await first
            assert await asyncio.wait_for(third, 60) == b"3"
            assert second.cancelled()
            assert link.queued == 0

    run(work)


def test_who_comes_late_does_not_pass_the_line(run):
    async def work():
        async with serving(limits=Limits(streams=1)) as server, Channel(server.address) as channel:
            first = asyncio.create_task(channel.call(SLOW, b"", None))
            await until(lambda: server.begun == 1)
            second = asyncio.create_task(channel.call(ECHO, b"", None))
            await until(lambda: channel._link.queued == 1)
            server.gate.set()
            await first  # its place is free, and this task runs before `second`
            for _ in range(3):
                await channel.call(ECHO, b"", None)
                assert second.done()

    run(work)


def test_a_raised_limit_wakes_who_waits(run):
    async def work():
        raised = asyncio.Event()

        async def connected(reader, writer):
            server = Connection(is_client=False, limits=Limits(streams=0))

            async def later():
                await raised.wait()
                server._limits = Limits(streams=2)
                writer.write(frames.settings((MAX_CONCURRENT_STREAMS, 2)))

            task = asyncio.create_task(later())
            while data := await reader.read(65_536):
                for event in frames.apart(server.receive(data)):
                    if isinstance(event, HeadersReceived):
                        answer(server, event.stream, b"yes")
                writer.write(b"".join(map(bytes, server.take())))
            await task

        async with misbehaving(connected) as address, Channel(address) as channel:
            calls = [asyncio.create_task(channel.call(ECHO, b"", 60)) for _ in range(5)]
            await until(lambda: channel._link and channel._link.queued == 5)
            raised.set()
            assert await asyncio.gather(*calls) == [b"yes"] * 5

    run(work)


# ---- transports ----


def test_tls_and_mtls(run, tmp_path):
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    certificate, key = ours.issue("server")
    mine, stranger = ours.issue("client"), theirs.issue("client")

    async def work():
        async with serving(tls=Tls(str(certificate), str(key))) as server:
            async with Channel(server.address, tls=tls_context(ours.roots)) as channel:
                assert await channel.call(ECHO, bytes(1 << 20), 60) == bytes(1 << 20)
            async with Channel(server.address, tls=tls_context(ours.roots), authority="localhost") as channel:
                assert await channel.call(ECHO, b"a", 60) == b"a"
            for wrong in (
                Channel(server.address, tls=tls_context(theirs.roots)),
                Channel(server.address, tls=tls_context(ours.roots), authority="elsewhere.example"),
            ):
                async with wrong as channel:
                    with pytest.raises(Unavailable, match="cannot connect"):
                        await channel.call(ECHO, b"", 60)
        async with serving(tls=Tls(str(certificate), str(key), str(ours.roots))) as server:
            async with Channel(server.address, tls=tls_context(ours.roots, *mine)) as channel:
                assert await channel.call(ECHO, b"a", 60) == b"a"
            for context in (tls_context(ours.roots), tls_context(ours.roots, *stranger)):
                async with Channel(server.address, tls=context) as channel:
                    with pytest.raises(Unavailable):
                        await channel.call(ECHO, b"", 60)
        assert tls_context().verify_mode is ssl.CERT_REQUIRED

    run(work)


def test_unix_socket(run, tmp_path):
    async def work():
        async with serving(f"unix:{tmp_path}/s") as server, Channel(server.address) as channel:
            assert await channel.call(ECHO, b"a", 60) == b"a"
        async with Channel(f"unix:{tmp_path}/s") as channel:
            with pytest.raises(Unavailable):
                await channel.call(ECHO, b"a", 60)

    run(work)


@pytest.mark.parametrize("target", ["", "host", "host:0", "host:65536", ":80", "a..b:80", f"{'a' * 64}.b:80", "unix:"])
def test_bad_targets(target):
    with pytest.raises(BadConfig):
        Channel(target)


# ---- close ----


def test_close_with_calls_in_flight(run):
    async def work():
        async with serving(limits=Limits(streams=3)) as server:
            channel = Channel(server.address)
            calls = [asyncio.create_task(channel.call(SLOW, b"", None)) for _ in range(5)]  # two of them in line
            await until(lambda: server.begun == 3)
            await channel.close()
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(error, Unavailable)
                assert "closed" in str(error)
            await until(lambda: server.running == 0)
            with pytest.raises(Unavailable, match="is closed"):
                await channel.call(ECHO, b"", 60)
            await channel.close()

    run(work)


def test_close_while_calls_wait_for_a_connection(run, reserve):
    async def work():
        async def connected(reader, writer):  # accepts, and says nothing
            await reader.read(-1)

        async with misbehaving(connected) as address:
            silent = Channel(address)
            calls = [asyncio.create_task(silent.call(ECHO, b"", None, wait)) for wait in (False, True)]
            await until(lambda: silent._links)
            absent = Channel(reserve())
            calls += [asyncio.create_task(absent.call(ECHO, b"", None, True)) for _ in range(2)]
            await until(lambda: absent._failures)
            at_once = Channel(address)
            calls += [asyncio.create_task(at_once.stream(ECHO, b""))]
            await asyncio.sleep(0)
            for channel in (silent, absent, at_once):
                await channel.close()
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(error, Unavailable), repr(error)
                assert "closed" in str(error)

    run(work)


@contextlib.asynccontextmanager
async def deaf():
    """A server that greets and then does not read; gives its address."""

    async def connected(reader, writer):
        writer.write(frames.settings((frames.Set.INITIAL_WINDOW, 1 << 30)) + frames.window_update(0, 1 << 30))
        writer.transport.pause_reading()
        await asyncio.Event().wait()

    async with misbehaving(connected) as address:
        yield address


def test_close_against_a_server_that_does_not_read(run, monkeypatch):
    monkeypatch.setattr(channel_module, "LINGER_S", 0.1)

    async def work():
        async with deaf() as address:
            channel = Channel(address)
            call = asyncio.create_task(channel.call(ECHO, bytes(32 << 20), None))
            await until(lambda: channel._link and channel._link.paused)
            async with asyncio.timeout(60):
                await channel.close()
            with pytest.raises(Unavailable, match="closed"):
                await call

    run(work)


# ---- servers that are dead ----


def test_a_probe_notices_a_dead_server(run, monkeypatch):
    async def work():
        monkeypatch.setattr(channel_module, "PROBE_S", 0.1)
        async with deaf() as address, Channel(address) as channel:
            other = asyncio.create_task(channel.call(ECHO, b"", None))
            with pytest.raises(DeadlineExceeded):
                await channel.call(ECHO, b"", 0.05)
            async with asyncio.timeout(60):
                with pytest.raises(Unavailable, match="does not answer"):
                    await other
            assert channel._link is None
        monkeypatch.setattr(channel_module, "PROBE_S", 2)
        async with serving() as server, Channel(server.address) as channel:  # one that is only slow is kept
            other = asyncio.create_task(channel.call(SLOW, b"kept", None))
            with pytest.raises(DeadlineExceeded):
                await channel.call(SLOW, b"", 0.05)
            await until(lambda: not channel._link._timers)
            server.gate.set()
            assert await other == b"kept"

    run(work)


def test_keep_alive_notices_a_dead_server(run):
    async def work():
        async with deaf() as address, Channel(address, keepalive_s=0.05) as channel:
            async with asyncio.timeout(60):
                with pytest.raises(Unavailable, match="does not answer"):
                    await channel.call(ECHO, b"", None)
            assert channel._link is None
        async with serving() as server, Channel(server.address, keepalive_s=1) as channel:
            call = asyncio.create_task(channel.call(SLOW, b"kept", None))
            await until(lambda: channel._link and channel._link.calls.pongs >= 2)
            server.gate.set()
            assert await call == b"kept"
            assert server.listener.accepted == 1

    run(work)


# ---- calls that go wrong ----


def test_cancelled_calls_do_not_hurt_their_connection(run):
    async def work():
        async with serving() as server, Channel(server.address) as channel:
            kept = asyncio.create_task(channel.call(SLOW, b"kept", None))
            calls = [asyncio.create_task(channel.call(SLOW, b"", None)) for _ in range(50)]
            await until(lambda: server.begun == 51)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert all(call.cancelled() for call in calls)
            await until(lambda: server.running == 1)
            server.gate.set()
            assert await kept == b"kept"
            assert server.listener.accepted == 1
            assert channel._link.calls.calls == 0

    run(work)


def test_misuse_leaves_nothing_behind(run):
    huge = [bytes(1 << 30)] * 4  # zeros that no memory is used for

    async def work():
        async with serving() as server, Channel(server.address) as channel:
            await channel.call(ECHO, b"", 60)
            link = channel._link
            for path, message, kind, more in [
                (ECHO, "text", TypeError, {}),
                (ECHO, [b"a", None], TypeError, {}),
                (ECHO, memoryview(b"abcd")[::2], TypeError, {}),
                (ECHO, "text", TypeError, {"compression": "gzip"}),
                (ECHO, huge, ValueError, {}),
                (ECHO, b"", ValueError, {"compression": "br"}),
                (ECHO, b"", BadRequest, {"metadata": [("Bad Name", "x")]}),
                ("/t.T/\n", b"", ValueError, {}),
                ("/t.T/\u20ac", b"", ValueError, {}),
            ]:
                with pytest.raises(kind):
                    await channel.call(path, message, 60, **more)
                with pytest.raises(kind):
                    await channel.stream(path, message, 60, **more)
                assert (link.calls.calls, len(link.calls.http2.streams), len(link.streams)) == (0, 0, 0)
            with pytest.raises(TypeError):
                await channel.call(ECHO, None, 60)
            link.pause_writing()
            link.resume_writing()
            assert await channel.call(ECHO, b"still", float("inf")) == b"still"
            assert channel._link is link
            async with await channel.stream(ECHO, timeout_s=5) as stream:
                with pytest.raises(TypeError):
                    await stream.send("text")
                await stream.send(b"good")
                await stream.end()
                assert await stream.result() == b"good"

    run(work)


def test_a_reply_that_is_nothing_but_a_status_has_no_initial_metadata(run):
    async def work():
        async with serving() as server, Channel(server.address) as channel:
            stream = await channel.stream("/t.T/None", b"")
            assert await stream.initial() == ()
            with pytest.raises(Exception, match="None") as caught:
                await stream.result()
            assert caught.value.status.code == "UNIMPLEMENTED"
            stream = await channel.stream(ECHO, b"a")
            assert await stream.initial() == ()
            assert await stream.result() == b"a"

    run(work)
