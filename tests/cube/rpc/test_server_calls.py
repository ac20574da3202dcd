"""The server's end of a connection without a socket: what it holds, counts and gives up, driven by a client's end."""

import asyncio
import contextlib
import logging

import pytest

from cube.rpc import framing
from cube.rpc.calls import Kind, Method
from cube.rpc.client_calls import ClientCalls
from cube.rpc.headers import encode
from cube.rpc.http2 import State
from cube.rpc.limits import Budget, Limits
from cube.rpc.router import Response, Router
from cube.rpc.server_calls import Routes, ServerCalls

MIB = 1 << 20


class Pair:
    """A client's and a server's end, joined by function calls."""

    def __init__(self, handlers, limits=None, router=None, client_limits=None):
        self.limits = limits or Limits()
        self.budget = Budget(self.limits.total_bytes)
        self.server = ServerCalls(Routes(handlers, self.limits), router, self.limits, self.budget, "peer", lambda: None)
        self.client = ClientCalls(client_limits or self.limits, "here")
        self.pump()

    def pump(self):
        while True:
            up, down = self.client.take(), self.server.take()
            if not up and not down:
                return
            self.server.receive(b"".join(up))
            self.client.receive(b"".join(down))

    def start(self, path, request=None, timeout_s=None, compression=None):
        call = self.client.start(
            self.client.method(path, compression),
            request,
            timeout_s=timeout_s,
            on_event=lambda call: None,
            compression=compression,
            unary=False,
        )
        self.pump()
        return call

    async def until(self, is_so):
        async with asyncio.timeout(60):
            while not is_so():
                await asyncio.sleep(0)
                self.pump()

    def assert_nothing_is_left(self):
        assert not self.server.http2.streams
        assert not self.server._tasks
        assert self.budget.used == 0
        assert self.server.idle


async def each(requests, call):
    async for message in requests:
        yield message


async def sleeping(message, call):
    await asyncio.Event().wait()


def test_a_streaming_call_with_a_message_over_the_limit_leaves_no_task_behind():
    async def run():
        pair = Pair({"/s/Each": Method(each, Kind.BIDI, max_request_bytes=100)})
        for _ in range(50):
            call = pair.start("/s/Each")
            pair.client.http2.send_data(call._stream, [framing.PREFIX.pack(0, 101)])
            pair.pump()
            assert call.error.status.code == "RESOURCE_EXHAUSTED"
        await pair.until(lambda: not pair.server._tasks)
        pair.assert_nothing_is_left()

    asyncio.run(run())


def test_messages_that_are_not_whole_are_counted():
    async def run():
        pair = Pair({"/s/Each": Method(each, Kind.BIDI)})
        call = pair.start("/s/Each")
        await asyncio.sleep(0)
        pair.client.http2.send_data(call._stream, [framing.PREFIX.pack(0, 100 * MIB), bytes(9 * MIB)])
        pair.pump()
        assert pair.budget.used == 9 * MIB
        call.cancel()
        pair.pump()
        await pair.until(lambda: not pair.server._tasks)
        pair.assert_nothing_is_left()

    asyncio.run(run())


@pytest.mark.parametrize("kind", [Kind.UNARY, Kind.BIDI])
def test_compressed_messages_are_counted_as_large_as_they_are(kind):
    async def never(requests, call):
        await asyncio.Event().wait()
        yield b""

    async def run():
        handler = sleeping if kind is Kind.UNARY else Method(never, kind)
        pair = Pair({"/s/M": handler}, Limits(connection_bytes=20 * MIB))
        small, _ = framing.compressed(bytes(8 * MIB), "gzip")
        calls = []
        for _ in range(3):
            calls.append(pair.start("/s/M", compression="gzip"))
            pair.client.http2.send_data(calls[-1]._stream, small, ended=True)
            pair.pump()
        assert [call.error.status.code if call.error else None for call in calls] == [None, None, "RESOURCE_EXHAUSTED"]
        assert pair.budget.used == 16 * MIB
        pair.server.lost()
        await pair.until(lambda: not pair.server._tasks)
        pair.assert_nothing_is_left()

    asyncio.run(run())


def test_many_small_bombs_in_one_frame_are_refused_before_they_are_all_expanded():
    async def run():
        pair = Pair({"/s/Each": Method(sleeping, Kind.CLIENT_STREAM)}, Limits(connection_bytes=20 * MIB))
        call = pair.start("/s/Each", compression="gzip")
        small, _ = framing.compressed(bytes(8 * MIB), "gzip")
        pair.client.http2.send_data(call._stream, small * 100)
        pair.pump()
        assert call.error.status.code == "RESOURCE_EXHAUSTED"
        await pair.until(lambda: not pair.server._tasks)
        pair.assert_nothing_is_left()

    asyncio.run(run())


def test_a_generator_that_never_waits_does_not_pile_up_replies():
    made = []

    async def eager(message, call):
        for _ in range(1_000):
            made.append(1)
            yield bytes(MIB)

    async def run():
        pair = Pair({"/s/Eager": Method(eager, Kind.SERVER_STREAM)}, client_limits=Limits(window_bytes=(1 << 31) - 1))
        call = pair.start("/s/Eager", b"")
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(made) <= 2
        call.cancel()
        pair.pump()
        await pair.until(lambda: not pair.server._tasks)
        pair.assert_nothing_is_left()

    asyncio.run(run())


def test_a_handler_that_swallows_its_cancellation_says_nothing_more():
    async def stubborn(message, call):
        for _ in range(1_000):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            yield b"x"

    async def run():
        pair = Pair({"/s/Stubborn": Method(stubborn, Kind.SERVER_STREAM)})
        call = pair.start("/s/Stubborn", b"")
        await pair.until(lambda: call.messages)
        call.cancel()
        pair.pump()
        await pair.until(lambda: not pair.server._tasks)
        pair.assert_nothing_is_left()

    asyncio.run(run())


def test_a_reply_before_the_end_of_the_requests_ends_the_call():
    async def early(requests, call):
        return b"enough"

    async def run():
        pair = Pair({"/s/Early": Method(early, Kind.CLIENT_STREAM)})
        call = pair.start("/s/Early")
        await pair.until(lambda: call.over)
        assert call.error is None
        assert bytes(call.take_message()) == b"enough"
        await pair.until(lambda: not pair.server._tasks)
        pair.assert_nothing_is_left()

    asyncio.run(run())


def test_a_deadline_that_passes_while_replies_wait_ends_the_call():
    async def run():
        pair = Pair({"/s/Large": Method(sleeping_after_a_large_one, Kind.SERVER_STREAM)})
        call = pair.start("/s/Large", b"", timeout_s=0.05)
        await pair.until(lambda: call.over)
        assert call.error.status.code in ("CANCELLED", "DEADLINE_EXCEEDED")
        await pair.until(lambda: not pair.server._tasks)
        pair.assert_nothing_is_left()

    async def sleeping_after_a_large_one(message, call):
        yield bytes(20 * MIB)
        await asyncio.Event().wait()

    asyncio.run(run())


def test_pings_and_a_byte_now_and_then_do_not_keep_a_stalled_call_alive():
    async def run():
        pair = Pair({"/s/Large": lambda message, call: bytes(20 * MIB)}, Limits(stall_s=10))
        pair.client.start(pair.client.method("/s/Large"), b"", timeout_s=None, on_event=lambda call: None)
        closed_at = None  # the client hears nothing, so its windows hold most of the reply back
        for second in range(60):
            pair.client.ping(b"12345678")
            pair.server.receive(b"".join(pair.client.take()))
            pair.server.tick(float(second))
            pair.server.take()
            if pair.server.closing:
                closed_at = second
                break
        assert closed_at is not None
        assert closed_at <= 12
        pair.server.lost()
        pair.assert_nothing_is_left()

    asyncio.run(run())


def get(path):
    return encode([(b":method", b"GET"), (b":scheme", b"http"), (b":path", path), (b":authority", b"here")])


@pytest.mark.parametrize("field", [("x-a", "\u20ac"), ("x-a", "a\r\nset-cookie: b"), ("x a", "b")])
def test_a_response_that_http_cannot_carry_is_that_requests_error(field, caplog):
    async def run():
        router = Router()
        router.add("GET", "/bad", lambda request: Response(200, b"ok", "text/plain", [field]))
        router.add("GET", "/good", lambda request: Response(200, b"ok", "text/plain"))
        pair = Pair({}, router=router)
        statuses = []
        for path in (b"/bad", b"/good"):
            stream = pair.client.http2.open_stream(get(path), True)
            pair.server.receive(b"".join(pair.client.take()))
            events = pair.client.http2.receive(b"".join(pair.server.take()))
            statuses.append(events[0].head.status)
            assert stream.state is State.CLOSED
        assert statuses == [b"500", b"200"]
        pair.assert_nothing_is_left()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert "GET /bad failed" in caplog.text
