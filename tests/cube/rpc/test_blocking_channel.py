"""The client end for threads, over real sockets: who reads, who writes, and what becomes of the others."""

import asyncio
import contextlib
import gc
import signal
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from certificates import Authority
from frames import apart

from cube.errors import DeadlineExceeded, ServingError, Unavailable
from cube.rpc import blocking_channel, framing
from cube.rpc.blocking_channel import BlockingChannel
from cube.rpc.calls import Kind, Method
from cube.rpc.headers import encode
from cube.rpc.http2 import Connection, HeadersReceived
from cube.rpc.limits import Limits
from cube.rpc.listener import Listener
from cube.rpc.tls import Tls

ECHO, HELD, EACH, GATHER = "/t.T/Echo", "/t.T/Held", "/t.T/Each", "/t.T/Gather"
HEAD = encode([(b":status", b"200"), (b"content-type", b"application/grpc")])
TAIL = encode([(b"grpc-status", b"0")])
LARGE = bytes(range(256)) * (4 << 12)  # 4 MiB
SECONDS = 60.0  # for what ought to take none


class Interrupted(BaseException):
    """What a signal's handler raises, as Ctrl-C does."""


class Server:
    """A listener on an event loop in a thread of its own."""

    def __init__(self, listen="127.0.0.1:0", limits=None, tls=None):
        self.held = threading.Semaphore(0)  # released once for every held call that has come
        self.counted = self.most = 0
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._release = asyncio.Event()
        handlers = {
            ECHO: self._echo,
            HELD: self._hold,
            EACH: Method(self._each, Kind.BIDI),
            GATHER: Method(self._gather, Kind.CLIENT_STREAM),
        }
        self.listener = Listener(handlers, None, limits, tls)
        self.address = self.run(self.listener.start(listen))

    def run(self, what):
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(SECONDS)

    def release(self):
        """Answer the calls that are held, and those to come."""
        self.loop.call_soon_threadsafe(self._release.set)

    def close(self, grace_s=0.0):
        self.run(self.listener.drain(grace_s))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SECONDS)
        self.loop.close()

    def _echo(self, request, call):
        return bytes(request)

    async def _hold(self, request, call):
        self.counted += 1
        self.most = max(self.most, self.counted)
        self.held.release()
        try:
            await self._release.wait()
        finally:
            self.counted -= 1
        return bytes(request)

    async def _each(self, requests, call):
        async for request in requests:
            yield bytes(request)

    async def _gather(self, requests, call):
        return b"%d" % sum([len(request) async for request in requests])


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def threads():
    with ThreadPoolExecutor(40) as pool:
        yield pool


@pytest.fixture
def closing():
    with contextlib.ExitStack() as stack:
        yield stack


@contextlib.contextmanager
def interrupting(seconds):
    """The main thread is interrupted after so long."""

    def stop(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def listening():
    """A socket that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener, f"127.0.0.1:{listener.getsockname()[1]}"


def until(what, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.002)


class ByHand:
    """A server's side of one connection, driven by the test."""

    def __init__(self, listener, **limits):
        self.socket, _ = listener.accept()
        self.socket.settimeout(SECONDS)
        self.http2 = Connection(is_client=False, limits=Limits(**limits))
        self.streams = []
        self.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def flush(self):
        self.socket.sendall(b"".join(map(bytes, self.http2.take())))

    def await_calls(self, count):
        while len(self.streams) < count:
            for event in apart(self.http2.receive(self.socket.recv(65536))):
                if isinstance(event, HeadersReceived):
                    self.streams.append(event.stream)
            self.flush()

    def reply(self, stream, size):
        self.http2.send_headers(stream, HEAD)
        self.http2.send_data(stream, [framing.PREFIX.pack(0, size), bytes(size)])
        self.http2.send_trailers(stream, TAIL)
        self.flush()


# ---- who reads and who writes ----


def test_many_threads_share_one_connection(server, threads):
    with BlockingChannel(server.address) as channel:

        def work(number):
            for turn in range(30):
                message = b"%d %d" % (number, turn)
                assert channel.call(ECHO, message, SECONDS) == message

        list(threads.map(work, range(8)))
        assert server.listener.open == 1


def test_large_messages_both_ways_from_many_threads(server, threads):
    with BlockingChannel(server.address) as channel:

        def work(number):
            message = LARGE if number % 2 else b"small %d" % number
            for _ in range(3):
                assert channel.call(ECHO, message, SECONDS) == message

        list(threads.map(work, range(8)))


def test_streams_both_ways(server, threads):
    with BlockingChannel(server.address) as channel:

        def work(number):
            with channel.stream(EACH, timeout_s=SECONDS) as stream:
                for turn in range(5):
                    message = LARGE[: number << 18] + b"%d" % turn
                    stream.send(message)
                    assert next(iter(stream)) == message
                stream.end()
                assert list(stream) == []
            with channel.stream(GATHER, timeout_s=SECONDS) as stream:
                for _ in range(4):
                    stream.send(LARGE)
                stream.end()
                assert stream.result() == b"%d" % (4 * len(LARGE))

        list(threads.map(work, range(4)))


def test_somebody_reads_while_others_wait_to_write(threads, closing):
    """A server that writes before it reads on: the leader's call ends while another's request fills the socket."""
    with listening() as (listener, target), BlockingChannel(target) as channel:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        leader = threads.submit(channel.call, "/t.T/Leader", b"x", SECONDS)
        hand = closing.enter_context(ByHand(listener, window_bytes=64 << 20))
        hand.await_calls(1)
        until(lambda: channel._link.leader is not None)
        stream = channel.stream("/t.T/Stream", b"x", SECONDS)
        hand.await_calls(2)
        http2 = channel._link.calls.http2  # without room for it the next one waits for that, not for the socket
        until(lambda: min(http2._window, http2._initial_window) > 40 << 20)
        large = threads.submit(channel.call, "/t.T/Large", bytes(40 << 20), SECONDS)
        hand.await_calls(3)
        until(lambda: channel._link.writer is not None)
        taking = threads.submit(lambda: sum(map(len, stream)))
        until(lambda: len(channel._link.followers) == 2)
        hand.reply(hand.streams[0], 10)
        assert len(leader.result(SECONDS)) == 10
        hand.reply(hand.streams[1], 10 << 20)  # returns only if somebody reads
        assert taking.result(SECONDS) == 10 << 20
        channel.close()
        with pytest.raises(Unavailable):
            large.result(SECONDS)


# ---- interrupted ----


def test_an_interrupted_follower_is_forgotten(server, threads):
    with BlockingChannel(server.address) as channel:
        leader = threads.submit(channel.call, HELD, b"leader", SECONDS)
        assert server.held.acquire(timeout=SECONDS)
        until(lambda: channel._link.leader is not None)
        with pytest.raises(Interrupted), interrupting(0.2):
            channel.call(HELD, b"main", SECONDS)
        assert not channel._link.followers
        follower = threads.submit(channel.call, HELD, b"follower", SECONDS)
        server.release()
        assert leader.result(SECONDS) == b"leader"
        assert follower.result(SECONDS) == b"follower"


def test_an_interrupted_leader_hands_the_lead_on(server, threads):
    with BlockingChannel(server.address) as channel:

        def follow():
            until(lambda: channel._link is not None and channel._link.leader is not None)
            return channel.call(HELD, b"follower", SECONDS)

        def interrupt():
            until(lambda: channel._link is not None and channel._link.followers)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

        follower, interrupter = threads.submit(follow), threads.submit(interrupt)
        with pytest.raises(Interrupted), interrupting(SECONDS):
            channel.call(HELD, b"main", SECONDS)
        interrupter.result(SECONDS)
        until(lambda: channel._link.leader is not None)
        server.release()
        assert follower.result(SECONDS) == b"follower"
        assert server.listener.open == 1


# Between a socket's making and its first name there is a moment at which nobody can close it but the collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_at_any_moment_the_channel_still_works(server):
    with BlockingChannel(server.address) as channel:
        for turn in range(60):
            with contextlib.suppress(Interrupted), interrupting(0.0005 + turn * 0.00005):
                while True:
                    channel.call(ECHO, b"x" * 1000, SECONDS)
            assert channel.call(ECHO, b"after", SECONDS, wait_for_ready=True) == b"after"
    gc.collect()


# ---- connecting ----


def test_a_server_that_closes_after_accepting_is_not_hammered():
    accepted = []
    with listening() as (listener, target), BlockingChannel(target) as channel:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept())
                    accepted[-1][0].close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            with pytest.raises((Unavailable, DeadlineExceeded)):
                channel.call(ECHO, b"", end - time.monotonic() + 0.01, wait_for_ready=True)
        assert 1 < len(accepted) < 12
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)


def test_waiting_for_a_server_that_is_not_there_yet(tmp_path, threads):
    target = f"unix:{tmp_path / 'socket'}"
    with BlockingChannel(target) as channel:
        with pytest.raises(Unavailable, match="cannot connect"):
            channel.call(ECHO, b"", SECONDS)
        with pytest.raises(DeadlineExceeded):
            channel.call(ECHO, b"", 0.1, wait_for_ready=True)
        waiting = [threads.submit(channel.call, ECHO, b"x", SECONDS, wait_for_ready=True) for _ in range(5)]
        server = Server(target)
        assert [call.result(SECONDS) for call in waiting] == [b"x"] * 5
        assert server.listener.open == 1
        server.close()


def test_a_server_may_restart(threads, reserve):
    server = Server(reserve())
    with BlockingChannel(server.address) as channel:
        assert channel.call(ECHO, b"x", SECONDS) == b"x"
        server.close()
        with pytest.raises(Unavailable):
            channel.call(ECHO, b"x", SECONDS)
        waiting = threads.submit(channel.call, ECHO, b"again", SECONDS, wait_for_ready=True)
        server = Server(server.address)
        assert waiting.result(SECONDS) == b"again"
    server.close()


@pytest.mark.alone  # tenths of a second decide
def test_each_caller_has_its_own_deadline_while_one_connects(threads):
    context = ssl.create_default_context()
    with listening() as (_, target), BlockingChannel(target, tls=context) as channel:  # it never shakes hands
        first = threads.submit(channel.call, ECHO, b"", 3)
        until(lambda: channel._connecting)
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            channel.call(ECHO, b"", 0.1)
        assert time.monotonic() - begun < 2
        with pytest.raises(DeadlineExceeded):
            first.result(SECONDS)
        assert channel._failures == 0  # impatience is no fault of the server's


# ---- a connection's end ----


def test_calls_go_on_elsewhere_while_a_server_drains(threads, reserve):
    old = Server(reserve())
    with BlockingChannel(old.address) as channel:
        held = threads.submit(channel.call, HELD, b"held", SECONDS)
        assert old.held.acquire(timeout=SECONDS)
        before = channel._link
        draining = threads.submit(old.run, old.listener.drain(SECONDS))
        until(lambda: before.calls.http2.is_going_away)
        new = Server(old.address)
        assert channel.call(ECHO, b"x", SECONDS, wait_for_ready=True) == b"x"
        assert channel._links == {before, channel._link}
        old.release()
        assert held.result(SECONDS) == b"held"
        draining.result(SECONDS)
        assert channel._links == {channel._link}
        new.close()
    old.close()


def test_a_connection_whose_last_call_is_given_up_while_it_goes_away_is_closed(closing):
    with listening() as (listener, target), BlockingChannel(target) as channel:
        stream = channel.stream(EACH, timeout_s=SECONDS)
        hand = closing.enter_context(ByHand(listener))
        hand.await_calls(1)
        hand.http2.goaway(last_stream_id=1)
        hand.flush()
        link = channel._link
        with channel._lock:
            until(lambda: link.look() or link.calls.http2.is_going_away)
        assert not link.is_closed
        stream.cancel()
        assert link.is_closed
        assert link not in channel._links


def test_close_ends_what_is_in_flight(server, threads):
    channel = BlockingChannel(server.address)
    calls = [threads.submit(channel.call, HELD, b"", None) for _ in range(5)]
    for _ in calls:
        assert server.held.acquire(timeout=SECONDS)
    stream = channel.stream(EACH)
    calls.append(threads.submit(list, stream))
    until(lambda: len(channel._link.followers) == 5)
    channel.close()
    for call in calls:
        with pytest.raises(ServingError, match="channel was closed"):
            call.result(SECONDS)
    with pytest.raises(Unavailable, match="closed"):
        channel.call(ECHO, b"", SECONDS)


def test_a_dead_peer_is_given_up(monkeypatch):
    monkeypatch.setattr(blocking_channel, "PROBE_S", 0.2)
    with listening() as (_, target), BlockingChannel(target) as channel:
        with pytest.raises(DeadlineExceeded):
            channel.call(ECHO, b"", 0.05)
        link = channel._link
        begun = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer"):
            channel.call(ECHO, b"", SECONDS)
        assert time.monotonic() - begun < SECONDS / 2
        assert link.is_closed


def test_a_slow_but_living_peer_is_kept(server, monkeypatch):
    monkeypatch.setattr(blocking_channel, "PROBE_S", 1)
    with BlockingChannel(server.address) as channel:
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                channel.call(HELD, b"", 0.6)
        assert channel.call(ECHO, b"x", SECONDS) == b"x"
        assert server.listener.open == 1


# ---- limits, cancelling ----


def test_a_limit_of_one_call_at_a_time_is_shared_by_many_threads(threads):
    server = Server(limits=Limits(streams=1))
    with BlockingChannel(server.address) as channel:
        assert channel.call(ECHO, b"", SECONDS) == b""  # its settings are known
        calls = [threads.submit(channel.call, HELD, b"%d" % number, SECONDS) for number in range(20)]
        assert server.held.acquire(timeout=SECONDS)
        with pytest.raises(DeadlineExceeded, match="too many calls"):
            channel.call(ECHO, b"", 0.1)
        server.release()
        assert [call.result(SECONDS) for call in calls] == [b"%d" % number for number in range(20)]
        assert server.most == 1
    server.close()


def test_room_from_a_call_given_up_is_used_at_once(threads):
    server = Server(limits=Limits(streams=1))
    with BlockingChannel(server.address) as channel:
        assert channel.call(ECHO, b"", SECONDS) == b""
        stream = channel.stream(EACH, timeout_s=SECONDS)
        waiting = threads.submit(channel.call, ECHO, b"x", SECONDS)
        until(lambda: channel._link.leader is not None)  # it leads: nobody else waits
        stream.cancel()
        assert waiting.result(SECONDS / 2) == b"x"
    server.close()


def test_a_stream_is_cancelled_from_another_thread(server, threads):
    with BlockingChannel(server.address) as channel:
        stream = channel.stream(EACH, timeout_s=SECONDS)
        reading = threads.submit(list, stream)
        until(lambda: channel._link.leader is not None)
        stream.cancel()
        with pytest.raises(ServingError, match="gave up"):
            reading.result(SECONDS / 2)


def test_a_reply_that_is_nothing_but_a_status_has_no_initial_metadata(server):
    with BlockingChannel(server.address) as channel, channel.stream("/t.T/None", b"", SECONDS) as stream:
        assert stream.initial() == ()
        with pytest.raises(ServingError) as told:
            stream.result()
        assert told.value.status.code == "UNIMPLEMENTED"


# ---- TLS ----


def test_tls(tmp_path, threads):
    authority = Authority(tmp_path)
    server = Server(tls=Tls(*authority.issue("server")))
    with BlockingChannel(server.address, tls=authority.client(alpn=["h2"])) as channel:

        def work(number):
            message = LARGE if number % 2 else b"small %d" % number
            for _ in range(3):
                assert channel.call(ECHO, message, SECONDS) == message
            with channel.stream(EACH, timeout_s=SECONDS) as stream:
                stream.send(message)
                stream.end()
                assert list(stream) == [message]

        list(threads.map(work, range(6)))
        assert server.listener.open == 1
    stranger = BlockingChannel(server.address, tls=ssl.create_default_context())
    with stranger, pytest.raises(Unavailable, match="cannot connect"):
        stranger.call(ECHO, b"", SECONDS)
    server.close()
