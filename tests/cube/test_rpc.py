"""The door and the channel: what a handler raises is what a caller gets, and nobody hurts a neighbour."""

import asyncio
import time

import pytest

from cube.errors import (
    BadConfig,
    BadRequest,
    DataCorrupt,
    DeadlineExceeded,
    Internal,
    NotServed,
    Overloaded,
    ServingError,
    ShardUnavailable,
    Unavailable,
    Unimplemented,
    from_wire,
)
from cube.rpc.calls import Call
from cube.rpc.channel import Channel
from cube.rpc.grpcio_door import GrpcioDoor

RAISED = [
    BadRequest("here", "this", "that"),
    NotServed("it", ["other"]),
    Overloaded("full"),
    Unavailable("gone"),
    DeadlineExceeded("late"),
    DataCorrupt("there", "x", "y"),
    Unimplemented("no"),
    Internal("ours"),
]


def with_door(handlers, work):
    async def run():
        door = GrpcioDoor(handlers)
        async with Channel(await door.start("127.0.0.1:0")) as channel:
            try:
                return await work(channel, door)
            finally:
                await door.drain(0.1)

    return asyncio.run(run())


def raising(error):
    def handler(message, call):
        raise error

    return handler


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
def test_an_error_keeps_its_type_and_text_over_the_wire(error):
    with pytest.raises(type(error)) as raised:
        with_door({"/s/m": raising(error)}, lambda channel, door: channel.call("/s/m", b"", 5))
    assert str(raised.value).startswith(str(error))


def test_a_shard_that_is_unavailable_arrives_as_unavailable():
    with pytest.raises(Unavailable, match="cube shard 3: no answer from x:1"):
        with_door(
            {"/s/m": raising(ShardUnavailable(3, "x:1", "why"))}, lambda channel, door: channel.call("/s/m", b"", 5)
        )


def test_a_bug_in_a_handler_is_internal_and_its_details_stay_here(caplog):
    with pytest.raises(Internal, match="internal error; the server's log has it") as raised:
        with_door({"/s/m": raising(ZeroDivisionError("secret"))}, lambda channel, door: channel.call("/s/m", b"", 5))
    assert "secret" not in str(raised.value)
    assert "secret" in caplog.text


def test_plain_and_coroutine_handlers_both_answer():
    async def later(message, call):
        await asyncio.sleep(0)
        return message[::-1]

    async def ask(channel, door):
        return await channel.call("/s/now", b"abc", 5), await channel.call("/s/later", b"abc", 5)

    assert with_door({"/s/now": lambda message, call: message, "/s/later": later}, ask) == (b"abc", b"cba")


def test_a_handler_sees_path_metadata_and_deadline():
    seen = []

    def handler(message, call):
        seen.append(call)
        return b""

    with_door({"/s/m": handler}, lambda channel, door: channel.call("/s/m", b"", 3))
    (call,) = seen
    assert call.path == "/s/m"
    assert "user-agent" in call.metadata
    assert 0 < call.deadline - time.monotonic() < 3


def test_an_unknown_method_is_unimplemented():
    with pytest.raises(Unimplemented):
        with_door({}, lambda channel, door: channel.call("/s/m", b"", 5))


def test_a_call_that_takes_too_long_ends_at_its_deadline():
    async def slow(message, call):
        await asyncio.sleep(30)

    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        with_door({"/s/m": slow}, lambda channel, door: channel.call("/s/m", b"", 0.2))
    assert time.monotonic() - begin < 5


def test_draining_answers_what_is_in_flight_and_refuses_what_comes_after():
    started, release = asyncio.Event(), asyncio.Event()

    async def slow(message, call):
        started.set()
        await release.wait()
        return b"done"

    async def work(channel, door):
        inflight = asyncio.ensure_future(channel.call("/s/m", b"", 5))
        await started.wait()
        draining = asyncio.ensure_future(door.drain(5))
        release.set()
        await draining
        with pytest.raises(Unavailable):
            await channel.call("/s/m", b"", 1)
        return await inflight

    assert with_door({"/s/m": slow}, work) == b"done"


def test_a_port_that_is_taken_is_refused_and_named():
    async def work(channel, door):
        with pytest.raises(BadConfig, match=f"listen: found {channel.target}, which cannot be bound"):
            await GrpcioDoor({}).start(channel.target)

    with_door({}, work)


@pytest.mark.parametrize("listen", ["", "8500", ":x", "host", "127.0.0.1:99999", "127.0.0.1:-1"])
def test_an_address_that_is_none_is_refused(listen):
    async def start():
        await GrpcioDoor({}).start(listen)

    with pytest.raises(BadConfig, match=r"listen: found .*, expected host:port"):
        asyncio.run(start())


def test_no_time_left_is_an_error_and_time_left_is_capped():
    with pytest.raises(DeadlineExceeded, match="/s/m: the deadline passed"):
        Call("/s/m", {}, time.monotonic() - 1).remaining_s(5)
    assert Call("/s/m", {}, None).remaining_s(5) == 5
    assert Call("/s/m", {}, time.monotonic() + 60).remaining_s(5) == 5


def all_errors(kind=ServingError):
    yield kind
    for child in kind.__subclasses__():
        yield from all_errors(child)


def test_every_error_has_a_grpc_status_that_exists_and_an_http_one():
    import grpc

    for kind in all_errors():
        assert kind.wire.grpc in grpc.StatusCode.__members__
        assert 400 <= kind.wire.http < 600


def test_a_status_nobody_maps_is_internal():
    assert type(from_wire("ABORTED", "x")) is Internal
