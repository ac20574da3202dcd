"""What every door promises every client: one suite, run against each door with each client over real sockets.

A case that a combination cannot keep is a defect of it, not of the case.
"""

import asyncio
import functools
import itertools
import random
import time
from urllib.parse import quote

import numpy as np
import pytest
from grpc import aio
from rpc_doors import CLIENTS, DOORS, DRAINS_LATE, REFUSALS, Tap, ask, fields_of, with_door

from cube.errors import (
    FAULT,
    MAX_MESSAGE_BYTES,
    BadConfig,
    BadRequest,
    DataCorrupt,
    DeadlineExceeded,
    Internal,
    NotServed,
    Overloaded,
    ServingError,
    ShardUnavailable,
    Status,
    Unavailable,
    Unimplemented,
    from_wire,
    to_wire,
)
from cube.rpc.calls import GRPC_CODES, Call, Kind, Method, StatusError
from cube.rpc.limits import Limits

M = "/package.Service/Method"
KINDS = list(Kind)
CODES = [code for code in GRPC_CODES if code != "OK"]
RAISED = [
    BadRequest("here", "this", "that"),
    NotServed("it", ["other"]),
    Overloaded("full"),
    ShardUnavailable(3, "x:1", "why"),
    Unavailable("gone"),
    DeadlineExceeded("late"),
    DataCorrupt("there", "x", "y"),
    Unimplemented("no"),
    Internal("ours"),
]
EVERY_BYTE = bytes(range(256))
SOON_S = 60  # what is to happen at once has happened by then, on the slowest machine

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(params=list(itertools.product(DOORS, CLIENTS)), ids=" ".join)
def wire(request):
    """wire(handlers, work): run `work(Wire)` with a door that serves the handlers and a client of it."""
    return functools.partial(with_door, *request.param)


@pytest.fixture(params=DOORS)
def door(request):
    """The same for promises that do not depend on the client."""
    return functools.partial(with_door, request.param, "grpcio-aio")


def of_kind(kind, act, path=M, **options):
    """A method of any kind from act(message, call), a coroutine function that gives one reply.

    It acts when the first message is here, and sends the reply twice where it may send several.
    """

    async def one(message, call):
        return await act(message, call)

    async def several(message, call):
        reply = await act(message, call)
        yield reply
        yield reply

    async def first_of(messages, call):
        return await act(await anext(messages), call)

    async def several_for_first_of(messages, call):
        reply = await act(await anext(messages), call)
        yield reply
        yield reply

    handler = {
        Kind.UNARY: one,
        Kind.SERVER_STREAM: several,
        Kind.CLIENT_STREAM: first_of,
        Kind.BIDI: several_for_first_of,
    }[kind]
    return {path: Method(handler, kind, **options)}


def raising(error, kind=Kind.UNARY, path=M):
    async def fail(message, call):
        raise error

    return of_kind(kind, fail, path)


def asked(wire, handlers, *requests, limits=None, **options):
    """The answer to one call of M."""
    return wire(handlers, lambda w: w.ask(M, *requests, **options), limits)


async def error_of(w, *requests, path=M, **options):
    with pytest.raises(ServingError) as raised:
        await w.ask(path, *requests, **options)
    return raised.value


def refused(wire, handlers, *requests, limits=None, **options):
    """The error that one call of M ends with."""
    return wire(handlers, lambda w: error_of(w, *requests, **options), limits)


def each_refused(wire, kind, raised):
    """The errors that calls end with, each of a handler that raises its own: pairs of what was raised and what came."""

    async def work(w):
        return [(error, await error_of(w, b"", path=f"/s/{i}", kind=kind)) for i, error in enumerate(raised)]

    handlers = {}
    for i, error in enumerate(raised):
        handlers |= raising(error, kind, f"/s/{i}")
    return wire(handlers, work)


async def reversed_(message, call):
    return bytes(message)[::-1]


# ---------------------------------------------------------------------------------------------------------- messages


@each_kind
def test_a_call_of_each_kind_is_answered(wire, kind):
    answer = asked(wire, of_kind(kind, reversed_), b"abc", kind=kind)
    assert answer.messages == ([b"cba", b"cba"] if kind.gives_stream else [b"cba"])


def test_plain_and_coroutine_handlers_both_answer(wire):
    handlers = {"/s/now": lambda message, call: message, "/s/later": reversed_}

    async def work(w):
        return (await w.ask("/s/now", b"abc")).message, (await w.ask("/s/later", b"abc")).message

    assert wire(handlers, work) == (b"abc", b"cba")


def test_handlers_that_promise_an_answer_are_answered_for(wire):
    """A future instead of a coroutine: kept, broken, called off by the handler, by the deadline, and by the caller."""
    promised = []

    def later(message, call):
        loop = asyncio.get_running_loop()
        promise = loop.create_future()
        promised.append((bytes(message), promise, call))
        if message == b"kept":
            loop.call_later(0.01, promise.set_result, b"answer")
        elif message == b"there":
            promise.set_result(b"answer")
        elif message == b"broken":
            loop.call_later(0.01, promise.set_exception, BadRequest("here", "this", "that"))
        elif message == b"called off":
            loop.call_later(0.01, promise.cancel)
        return promise

    async def work(w):
        for message in (b"kept", b"there"):
            assert (await w.ask(M, message)).message == b"answer"
        assert type(await error_of(w, b"broken")) is BadRequest
        assert (await error_of(w, b"called off")).status.code == "INTERNAL"
        assert type(await error_of(w, b"never", timeout_s=0.1)) is DeadlineExceeded
        call = await w.client.start(M, Kind.UNARY, b"cancelled")
        while promised[-1][0] != b"cancelled":
            await asyncio.sleep(0.001)
        call.cancel()
        begin = time.monotonic()
        while not all(promise.done() for _, promise, _ in promised):
            await asyncio.sleep(0.001)
            assert time.monotonic() - begin < SOON_S
        assert [said for said, promise, _ in promised if promise.cancelled()] == [b"called off", b"never", b"cancelled"]
        assert promised[-1][2].cancelled
        assert (await w.ask(M, b"kept")).message == b"answer"

    wire({M: later}, work)


def test_a_stream_of_requests_arrives_in_order_and_ends(wire):
    async def join(requests, call):
        return b",".join([bytes(request) async for request in requests])

    sent = [str(i).encode() for i in range(300)]
    assert asked(wire, {M: Method(join, Kind.CLIENT_STREAM)}, *sent, kind=Kind.CLIENT_STREAM).message == b",".join(sent)


def test_a_stream_of_replies_arrives_in_order_and_ends(wire):
    async def count(request, call):
        for i in range(int(bytes(request))):
            yield str(i).encode()

    answer = asked(wire, {M: Method(count, Kind.SERVER_STREAM)}, b"300", kind=Kind.SERVER_STREAM)
    assert answer.messages == [str(i).encode() for i in range(300)]


def test_both_sides_of_a_bidi_call_may_wait_for_each_other(wire):
    async def echo(requests, call):
        async for request in requests:
            yield bytes(request)[::-1]

    async def ping_pong(w):
        call = await w.client.start(M, Kind.BIDI, None)
        for i in range(20):
            await call.send(b"%d!" % i)
            assert bytes(await call.receive()) == (b"%d!" % i)[::-1]
        await call.end()
        assert await call.receive() is None

    wire({M: Method(echo, Kind.BIDI)}, ping_pong)


def test_a_bidi_handler_may_answer_before_and_after_it_is_asked(wire):
    async def handler(requests, call):
        yield b"hello"
        asked = [bytes(request) async for request in requests]
        yield b"%d" % len(asked)

    async def work(w):
        call = await w.client.start(M, Kind.BIDI, None)
        assert bytes(await call.receive()) == b"hello"
        await call.send(b"")
        await call.send(b"")
        await call.end()
        assert bytes(await call.receive()) == b"2"
        assert await call.receive() is None

    wire({M: Method(handler, Kind.BIDI)}, work)


def test_streams_may_be_empty(wire):
    async def nothing(requests, call):
        async for _ in requests:
            raise AssertionError("a request that nobody sent")
        for reply in ():
            yield reply

    assert asked(wire, {M: Method(nothing, Kind.BIDI)}, kind=Kind.BIDI).messages == []


def test_a_handler_may_answer_without_reading_what_it_is_sent(wire):
    async def first(requests, call):
        return bytes(await anext(requests))

    async def work(w):
        call = await w.client.start(M, Kind.CLIENT_STREAM, None)
        await call.send(b"one")
        assert bytes(await call.receive()) == b"one"

    wire({M: Method(first, Kind.CLIENT_STREAM)}, work)


ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
REPLIES = {
    "bytes": b"abc",
    "bytearray": bytearray(b"abc"),
    "memoryview": memoryview(b"xabcx")[1:-1],
    "numbers": memoryview(ROWS),
    "array": ROWS,
    "list": [b"head", memoryview(b"body"), ROWS, b"", bytearray(b"tail")],
    "tuple": (b"a", b"b"),
    "one array": [ROWS],
    "empty": b"",
    "empty list": [],
    "empty array": np.empty((0, 4), np.float32),
    "many": [b"%d," % i for i in range(3000)],
}


@each_kind
def test_a_reply_is_any_buffer_or_a_list_of_them(wire, kind):
    async def give(message, call):
        call.compression = call.metadata.get("x-back")
        return REPLIES[bytes(message).decode()]

    async def work(w):
        for name, reply in REPLIES.items():
            expected = b"".join(bytes(part) for part in (reply if isinstance(reply, list | tuple) else [reply]))
            for metadata in ((), [("x-back", "gzip")]):
                answer = await w.ask(M, name.encode(), kind=kind, metadata=metadata)
                assert {name: set(answer.messages)} == {name: {expected}}

    wire(of_kind(kind, give), work)


SIZES = [0, 1, 5, 16_379, 16_384, 65_535, 65_536, 1 << 20, 20_000_000]


def test_a_message_of_any_size_passes_both_ways(wire):
    async def work(w):
        for size in SIZES:
            message = random.Random(size).randbytes(size)
            assert (await w.ask(M, message, timeout_s=30)).message == message[::-1]

    wire(of_kind(Kind.UNARY, reversed_), work)


def test_streams_of_messages_of_any_size_pass_both_ways(wire):
    async def echo(requests, call):
        async for request in requests:
            yield bytes(request)[::-1]

    messages = [random.Random(size).randbytes(size) for size in [*SIZES[:-1], *SIZES[-2::-1], 5_000_000]]
    answer = asked(wire, {M: Method(echo, Kind.BIDI)}, *messages, kind=Kind.BIDI, timeout_s=30)
    assert answer.messages == [message[::-1] for message in messages]


def test_concurrent_calls_do_not_mix(wire):
    """Calls of all kinds, each with data of its own, answered in another order than they were made."""
    gate = asyncio.Event()
    arrived = []

    async def answer(message, call):
        arrived.append(call)
        if len(arrived) == 200:
            gate.set()
        await gate.wait()  # all are in flight at once
        for _ in range(random.Random(bytes(message)).randrange(20)):
            await asyncio.sleep(0)
        call.trailing_metadata.append(("x-back", call.metadata["x-name"]))
        return message + str(call.metadata["x-name"]).encode()

    handlers = {f"/s/{kind.name}": of_kind(kind, answer)[M] for kind in KINDS}

    async def one(w, i):
        kind, name = KINDS[i % 4], f"name {i}"
        message = random.Random(i).randbytes(i * 37)
        got = await w.ask(f"/s/{kind.name}", message, kind=kind, metadata=[("x-name", name)], timeout_s=30)
        assert set(got.messages) == {message + name.encode()}
        assert got.trailing == (("x-back", name),)

    async def work(w):
        await asyncio.gather(*(one(w, i) for i in range(200)))

    wire(handlers, work)


# ------------------------------------------------------------------------------------------------------------ errors


@each_kind
def test_every_error_keeps_its_type_and_text(wire, kind):
    for error, got in each_refused(wire, kind, RAISED):
        assert type(got) is (Unavailable if isinstance(error, ShardUnavailable) else type(error))
        assert got.status == Status(error.wire.grpc, str(error))
        assert str(got).startswith(str(error))


@each_kind
def test_a_handler_may_answer_any_status_with_details_and_metadata(wire, kind):
    async def fail(message, call):
        call.trailing_metadata.append(("x-why", "so"))
        call.trailing_metadata.append(("x-why-bin", EVERY_BYTE))
        raise StatusError(bytes(message).decode(), "it was so", b"details" + EVERY_BYTE)

    async def work(w):
        for code in CODES:
            got = await error_of(w, code.encode(), kind=kind)
            assert got.status == Status(code, "it was so", b"details" + EVERY_BYTE)
            assert fields_of(got.trailing) == (("x-why", "so"), ("x-why-bin", EVERY_BYTE))
            assert type(got) is type(from_wire(code, ""))

    wire(of_kind(kind, fail), work)


TEXTS = [
    "",
    "größer als ∞, 面倒, 😈",
    "100% of %41 %zz %",
    "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n",
    "  two at both ends  ",
    "".join(map(chr, range(32))) + "\x7f",
    "a 'b' \"c\" \\d, {e}: f=g; <h>",
]


@each_kind
def test_an_error_text_arrives_as_it_was_written(wire, kind):
    for error, got in each_refused(wire, kind, [StatusError("ABORTED", text) for text in TEXTS]):
        assert got.status == error.status


def test_an_error_text_that_is_no_unicode_arrives_with_question_marks(wire):
    assert refused(wire, raising(StatusError("ABORTED", "a\ud800b")), b"").status == Status("ABORTED", "a?b")


def test_an_error_text_that_is_too_long_for_a_header_arrives_cut(wire):
    for error, got in each_refused(wire, Kind.UNARY, [StatusError("ABORTED", c * 100_000) for c in "x面"]):
        assert got.status.code == "ABORTED"
        assert got.status.message.endswith("…")
        assert len(got.status.message) > 400
        assert str(error).startswith(got.status.message[:-1])


@pytest.mark.parametrize("kind", [Kind.SERVER_STREAM, Kind.BIDI], ids=lambda kind: kind.name)
def test_an_error_after_some_replies_arrives_after_them(wire, kind):
    async def some(given, call):
        call.initial_metadata.append(("x-first", "1"))
        yield b"one"
        call.trailing_metadata.append(("x-last", "2"))
        yield b"two"
        raise StatusError("DATA_LOSS", "three is gone", b"d")

    async def work(w):
        call = await w.client.start(M, kind, b"" if kind is Kind.SERVER_STREAM else None)
        if kind.takes_stream:
            await call.end()
        assert [bytes(await call.receive()), bytes(await call.receive())] == [b"one", b"two"]
        with pytest.raises(DataCorrupt, match="three is gone") as raised:
            await call.receive()
        assert raised.value.status.details == b"d"
        assert fields_of(await call.initial()) == (("x-first", "1"),)
        assert fields_of(raised.value.trailing) == (("x-last", "2"),)

    wire({M: Method(some, kind)}, work)


@each_kind
def test_a_bug_in_a_handler_is_internal_and_its_details_stay_here(wire, kind, caplog):
    got = refused(wire, raising(ZeroDivisionError("secret"), kind), b"", kind=kind)
    assert got.status == FAULT
    assert type(got) is Internal
    assert f"{M} failed" in caplog.text
    assert "secret" in caplog.text


@each_kind
def test_a_handler_that_cancels_itself_is_a_bug_and_leaves_nobody_waiting(wire, kind, caplog):
    got = refused(wire, raising(asyncio.CancelledError("secret"), kind), b"", kind=kind)
    assert got.status == FAULT
    assert f"{M} failed" in caplog.text


@each_kind
def test_a_reply_that_is_no_bytes_is_a_bug(wire, kind, caplog):
    replies = [None, "text", 5, [b"a", "b"]]

    async def give(message, call):
        return replies[int(bytes(message))]

    async def work(w):
        for i in range(len(replies)):
            caplog.clear()
            assert (await error_of(w, b"%d" % i, kind=kind)).status == FAULT
            assert f"{M} failed" in caplog.text

    wire(of_kind(kind, give), work)


def test_details_of_an_upstreams_error_pass_where_they_say_what_the_status_says(wire):
    trailing = (("x-upstream", "1"),)
    got = refused(wire, raising(from_wire("RESOURCE_EXHAUSTED", "shard full", b"of RESOURCE_EXHAUSTED", trailing)), b"")
    assert got.status == Status("RESOURCE_EXHAUSTED", "shard full", b"of RESOURCE_EXHAUSTED")
    assert fields_of(got.trailing) == ()  # the upstream's metadata is not ours
    got = refused(wire, raising(from_wire("ABORTED", "try again", b"of ABORTED")), b"")
    assert got.status == Status("INTERNAL", "try again")


@each_kind
def test_an_unknown_service_or_method_is_unimplemented(wire, kind):
    async def work(w):
        for path in ("/package.Service/Other", "/other.Service/Method", "/nothing"):
            error = await error_of(w, b"x" * 100_000, path=path, kind=kind)
            assert type(error) is Unimplemented
            assert path in error.status.message
        return await w.ask(M, b"abc", kind=kind)  # and the connection is none the worse

    assert wire(of_kind(kind, reversed_), work).messages[0] == b"cba"


# ---------------------------------------------------------------------------------------------------------- metadata

METADATA = [
    ("x-text", "one"),
    ("x-all-bin", EVERY_BYTE),
    ("x-again", "first"),  # side by side: grpcio's asyncio client sends repeated names so
    ("x-again", "second"),
    ("x-none", ""),
    ("x-none-bin", b""),
    ("x-short-bin", b"\x00"),
    ("x-again-bin", b"\xff\xfe"),
    ("x-again-bin", b"\x01\x02\x03"),
    ("x-printed", "".join(map(chr, range(33, 127)))),
    ("x-spaced", "a b  c, d"),
    ("x-long", "y" * 3000),
]


@each_kind
def test_a_handler_sees_all_metadata_in_order(wire, kind):
    calls = []

    async def see(message, call):
        calls.append(call)
        return b""

    asked(wire, of_kind(kind, see), b"", kind=kind, metadata=METADATA)
    (call,) = calls
    assert fields_of(call.fields) == tuple(METADATA)
    assert {name: value for name, value in call.metadata.items() if name.startswith("x-")} == dict(METADATA)


@each_kind
def test_a_caller_gets_initial_and_trailing_metadata(wire, kind):
    async def give(message, call):
        call.initial_metadata.extend(METADATA)
        call.trailing_metadata.extend(METADATA[::-1])
        return b"abc"

    answer = asked(wire, of_kind(kind, give), b"", kind=kind)
    assert answer.initial == tuple(METADATA)
    assert answer.trailing == tuple(METADATA[::-1])


def test_spaces_around_a_value_are_lost_and_text_may_be_given_for_bytes(wire):
    """HTTP/2 has no spaces there; a peer that finds some refuses the call."""
    sent = [("x-text", "  a b  "), ("x-text-bin", "ü")]

    async def give(message, call):
        assert call.metadata["x-text"] == "a b"
        call.initial_metadata.extend(sent)
        call.trailing_metadata.extend(sent)
        return b""

    answer = asked(wire, of_kind(Kind.UNARY, give), b"", metadata=[("x-text", "a b")])
    assert answer.initial == answer.trailing == (("x-text", "a b"), ("x-text-bin", "ü".encode()))


def test_metadata_of_an_error_arrives_in_its_two_places(wire):
    async def fail(request, call):
        call.initial_metadata.append(("x-first", "1"))
        call.trailing_metadata.append(("x-last", "2"))
        for reply in ():
            yield reply
        raise NotServed("it", [])

    async def work(w):
        call = await w.client.start(M, Kind.SERVER_STREAM, b"")
        with pytest.raises(NotServed) as raised:
            await call.receive()
        first, last = fields_of(await call.initial()), fields_of(raised.value.trailing)
        assert (first, last) in [
            ((("x-first", "1"),), (("x-last", "2"),)),
            ((), (("x-first", "1"), ("x-last", "2"))),
        ]

    wire({M: Method(fail, Kind.SERVER_STREAM)}, work)


BAD_METADATA = [
    ("X-Upper", "v"),
    ("x space", "v"),
    ("", "v"),
    (":x", "v"),
    ("x-line", "a\nb"),
    ("x-unicode", "ü"),
    ("x-bytes", b"\xff"),
    ("grpc-status", "0"),
    ("x-number", 5),
]


@each_kind
@pytest.mark.parametrize("place", ["initial_metadata", "trailing_metadata"])
def test_metadata_that_cannot_be_sent_is_a_bug_of_the_handler(door, kind, place, caplog):
    async def give(message, call):
        getattr(call, place).append(BAD_METADATA[int(bytes(message))])
        return b""

    async def work(w):
        for i in range(len(BAD_METADATA)):
            caplog.clear()
            assert (BAD_METADATA[i], (await error_of(w, b"%d" % i, kind=kind)).status) == (BAD_METADATA[i], FAULT)
            assert f"{M} failed" in caplog.text

    door(of_kind(kind, give), work)


def test_a_handler_sees_path_peer_and_deadline(wire):
    calls = []

    def see(message, call):
        calls.append((call, call.deadline and call.deadline - time.monotonic()))
        return b""

    async def work(w):
        await w.ask(M, b"", timeout_s=60)
        await w.ask(M, b"", timeout_s=None)

    wire({M: see}, work)
    (with_deadline, left), (without, none) = calls
    assert with_deadline.path == M
    assert "user-agent" in with_deadline.metadata
    host, _, port = with_deadline.peer.rpartition(":")
    assert (host, port.isdigit()) == ("127.0.0.1", True)
    assert 30 < left <= 62  # grpcio rounds what it sends up
    assert with_deadline.remaining_s(5) == 5
    assert (without.deadline, none) == (None, None)
    assert not without.cancelled


# --------------------------------------------------------------------------------------------- deadlines, cancelling


class Watched:
    """A handler's act that waits for ever, and tells how it was ended."""

    def __init__(self):
        self.started, self.ended = asyncio.Event(), asyncio.Event()
        self.saw = []

    async def act(self, message, call):
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.saw.append(call.cancelled)
            raise
        finally:
            self.ended.set()

    async def has(self, event):
        await asyncio.wait_for(event.wait(), SOON_S)


@each_kind
def test_a_call_that_takes_too_long_ends_at_its_deadline_at_both_ends(wire, kind):
    watched = Watched()

    async def work(w):
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded) as raised:
            await w.ask(M, b"", kind=kind, timeout_s=1)
        assert raised.value.status.code == "DEADLINE_EXCEEDED"
        assert 0.95 < time.monotonic() - begin < SOON_S
        await watched.has(watched.ended)

    wire(of_kind(kind, watched.act), work)
    assert watched.saw == [True]


def test_calls_of_one_connection_end_each_at_its_own_deadline(wire):
    """Whatever the order they come in: sooner and later than those before, with none, and answered meanwhile."""
    begun, seconds = {}, [1.5, 0.6, None, 2.4, 0.6, 1.05]

    async def work(w):
        async def one(at):
            begin = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await w.ask(M, b"%d" % at, timeout_s=seconds[at])
            return time.monotonic() - begin

        lasting = asyncio.create_task(w.ask(M, b"2", timeout_s=None))
        took = await asyncio.gather(*(one(at) for at, s in enumerate(seconds) if s is not None))
        for at, lasted_s in zip([0, 1, 3, 4, 5], took, strict=True):
            assert seconds[at] - 0.05 < lasted_s < seconds[at] + SOON_S
        begin = time.monotonic()
        while len(ended) < 5 and time.monotonic() - begin < SOON_S:  # the caller's clock may be the faster one
            await asyncio.sleep(0.001)
        assert sorted(ended) == [0, 1, 3, 4, 5]
        begun[2].set()
        return (await lasting).message

    ended = []

    async def wait(message, call):
        at = int(bytes(message))
        begun[at] = asyncio.Event()
        try:
            await begun[at].wait()
        except asyncio.CancelledError:
            ended.append(at)
            raise
        return b"answer"

    assert wire({M: wait}, work) == b"answer"


@each_kind
def test_a_call_whose_deadline_has_passed_is_not_answered(wire, kind):
    async def work(w):
        for timeout_s in (-1, -1000):
            with pytest.raises(DeadlineExceeded):
                await w.ask(M, b"", kind=kind, timeout_s=timeout_s)
        return await w.ask(M, b"abc", kind=kind)

    assert wire(of_kind(kind, reversed_), work).messages[0] == b"cba"


def test_a_handler_that_runs_out_of_time_says_so(wire):
    async def slow(message, call):
        call.deadline = time.monotonic() - 1
        call.remaining_s(5)

    got = refused(wire, of_kind(Kind.UNARY, slow), b"")
    assert type(got) is DeadlineExceeded
    assert f"{M}: the deadline passed" in str(got)


@each_kind
def test_a_handler_is_cancelled_when_its_caller_cancels(wire, kind):
    watched = Watched()

    async def work(w):
        call = await w.client.start(M, kind, None if kind.takes_stream else b"")
        if kind.takes_stream:
            await call.send(b"")
        await watched.has(watched.started)
        call.cancel()
        with pytest.raises(ServingError) as raised:
            await call.receive()
        assert raised.value.status.code == "CANCELLED"
        await watched.has(watched.ended)
        with pytest.raises(Unimplemented):
            await w.ask("/s/other", b"")  # the connection lives

    wire(of_kind(kind, watched.act), work)
    assert watched.saw == [True]


@each_kind
def test_a_handler_is_cancelled_when_the_connection_is_lost(wire, kind):
    watched = Watched()

    async def work(w):
        async with Tap(w.target) as tap:
            client = w.connect(tap.target)
            try:
                call = await client.start(M, kind, None if kind.takes_stream else b"")
                if kind.takes_stream:
                    await call.send(b"")
                await watched.has(watched.started)
                tap.cut()
                with pytest.raises(Unavailable):
                    await call.receive()
                await watched.has(watched.ended)
            finally:
                await client.close()

    wire(of_kind(kind, watched.act), work)
    assert watched.saw == [True]


@pytest.mark.parametrize("kind", [Kind.CLIENT_STREAM, Kind.BIDI], ids=lambda kind: kind.name)
def test_a_handler_that_waits_for_a_request_is_cancelled_and_not_told_that_there_are_no_more(wire, kind):
    seen, started, ended = [], asyncio.Event(), asyncio.Event()

    async def read(requests):
        try:
            async for request in requests:
                seen.append(bytes(request))
                started.set()
            seen.append("end")
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            ended.set()

    async def one(requests, call):
        await read(requests)
        return b""

    async def several(requests, call):
        await read(requests)
        yield b""

    async def work(w):
        call = await w.client.start(M, kind, None)
        await call.send(b"first")
        await asyncio.wait_for(started.wait(), SOON_S)
        call.cancel()
        await asyncio.wait_for(ended.wait(), SOON_S)

    wire({M: Method(one if kind is Kind.CLIENT_STREAM else several, kind)}, work)
    assert seen == [b"first", "cancelled"]


async def endless(given, call):
    while True:
        yield bytes(1 << 20)


@pytest.mark.parametrize("kind", [Kind.SERVER_STREAM, Kind.BIDI], ids=lambda kind: kind.name)
def test_a_handler_whose_replies_nobody_reads_waits_and_is_closed_when_its_caller_goes(wire, kind):
    sent, ended = [], asyncio.Event()

    async def counted(given, call):
        try:
            async for reply in endless(given, call):
                sent.append(1)
                yield reply
        finally:
            ended.set()

    async def work(w):
        call = await w.client.start(M, kind, None if kind.takes_stream else b"", timeout_s=None)
        assert len(await call.receive()) == 1 << 20
        other, before = w.connect(w.target), None
        while before != len(sent):  # until it waits
            before = len(sent)
            for _ in range(20):
                await ask(other, "/s/other", b"")
        await other.close()
        assert len(sent) < 200
        call.cancel()
        await asyncio.wait_for(ended.wait(), SOON_S)

    wire({M: Method(counted, kind), "/s/other": reversed_}, work)


def test_a_stream_of_replies_that_nobody_reads_does_not_stop_other_calls_of_its_connection(wire):
    async def work(w):
        unread = [await w.client.start(M, Kind.SERVER_STREAM, b"", timeout_s=None) for _ in range(3)]
        for one in unread:
            await one.receive()
        for size in (0, 100_000, 1 << 20):
            for _ in range(10):
                assert len((await w.ask("/s/other", bytes(size), timeout_s=5)).message) == size
        for one in unread:
            one.cancel()

    wire({M: Method(endless, Kind.SERVER_STREAM), "/s/other": reversed_}, work)


def test_a_stream_of_requests_that_nobody_reads_does_not_stop_other_calls_of_its_connection(wire):
    release = asyncio.Event()

    async def unread(requests, call):
        await release.wait()
        return b"%d" % sum([len(request) async for request in requests])

    async def work(w):
        calls = [w.later(w.ask(M, *[bytes(1 << 20)] * 40, kind=Kind.CLIENT_STREAM, timeout_s=None)) for _ in range(3)]
        for size in (0, 100_000, 1 << 20):
            for _ in range(10):
                assert len((await w.ask("/s/other", bytes(size), timeout_s=5)).message) == size
        release.set()
        assert [(await call).message for call in calls] == [b"41943040"] * 3

    wire({M: Method(unread, Kind.CLIENT_STREAM), "/s/other": reversed_}, work)


def test_a_handler_that_gives_no_more_is_closed_when_its_reply_is_out(wire):
    closed = []

    async def handler(requests, call):
        try:
            yield b"only"
        finally:
            closed.append(True)

    assert asked(wire, {M: Method(handler, Kind.BIDI)}, kind=Kind.BIDI).messages == [b"only"]
    assert closed == [True]


def test_a_cancelled_call_does_not_hurt_its_neighbours(wire):
    gate = asyncio.Event()

    async def wait(message, call):
        await gate.wait()
        return bytes(message)

    async def work(w):
        calls = [await w.client.start(M, Kind.UNARY, b"%d" % i) for i in range(20)]
        for call in calls[::2]:
            call.cancel()
        gate.set()
        assert [bytes(await call.receive()) for call in calls[1::2]] == [b"%d" % i for i in range(1, 20, 2)]

    wire(of_kind(Kind.UNARY, wait), work)


# --------------------------------------------------------------------------------------------- compression, limits

CODINGS = [None, "gzip", "deflate"]
DULL = b"the same again, " * 65_536  # 1 MB


@each_kind
def test_messages_may_be_compressed_either_way(wire, kind):
    async def echo(message, call):
        call.compression = call.metadata["x-back"]
        return bytes(message)

    async def work(w):
        async with Tap(w.target) as tap:
            client = w.connect(tap.target)
            try:
                for there, back in itertools.product(CODINGS, CODINGS):
                    tap.up = tap.down = 0
                    metadata = [("x-back", back or "identity")]
                    answer = await ask(client, M, DULL, kind=kind, compression=there, metadata=metadata)
                    assert set(answer.messages) == {DULL}
                    assert (there, tap.up < 100_000) == (there, there is not None)
                    assert (back, tap.down < 100_000) == (back, back is not None)
            finally:
                await client.close()

    wire(of_kind(kind, echo), work)


def test_empty_and_short_messages_may_be_compressed(wire):
    async def echo(requests, call):
        call.compression = "gzip"
        async for request in requests:
            yield bytes(request)

    messages = [b"", b"a", b"", DULL, b"b"]
    for coding in CODINGS:
        answer = asked(wire, {M: Method(echo, Kind.BIDI)}, *messages, kind=Kind.BIDI, compression=coding)
        assert answer.messages == messages


def test_replies_are_not_compressed_for_a_caller_that_cannot_read_that():
    """grpcio's server cannot be told whether its caller can."""

    async def give(message, call):
        call.compression = "gzip"
        return DULL

    async def work(w):
        only_identity = [("grpc.compression_enabled_algorithms_bitset", 1)]
        async with aio.insecure_channel(w.target, options=only_identity) as channel:
            return await channel.unary_unary(M)(b"", timeout=10)

    assert with_door("lean", "ours", of_kind(Kind.UNARY, give), work) == DULL


LIMITS = Limits(message_bytes=50_000)


@each_kind
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_message_over_the_limit_is_refused_and_one_at_the_limit_is_not(wire, kind, compression):
    async def size(message, call):
        return str(len(message)).encode()

    handlers = {}
    for own in (None, 1_000, 200_000):
        handlers |= of_kind(kind, size, f"/s/{own or LIMITS.message_bytes}", max_request_bytes=own)

    async def work(w):
        for path in handlers:
            most = int(path.removeprefix("/s/"))
            at_limit = random.Random(0).randbytes(most)
            for message in (at_limit + b"x", bytes(most + 1), bytes(most * 20)):
                error = await error_of(w, message, path=path, kind=kind, compression=compression)
                assert (type(error), error.status.code) == (Overloaded, "RESOURCE_EXHAUSTED")
            answer = await w.ask(path, at_limit, kind=kind, compression=compression)
            assert answer.messages[0] == str(most).encode()

    wire(handlers, work, LIMITS)


@pytest.mark.parametrize("kind", [Kind.CLIENT_STREAM, Kind.BIDI], ids=lambda kind: kind.name)
def test_every_message_of_a_stream_is_held_to_the_limit(wire, kind):
    async def one(requests, call):
        return b"".join([bytes(request) async for request in requests])

    async def several(requests, call):
        async for request in requests:
            yield bytes(request)

    method = Method(one if kind is Kind.CLIENT_STREAM else several, kind, max_request_bytes=10)
    got = refused(wire, {M: method}, b"short", b"x" * 11, b"short", kind=kind)
    assert (type(got), got.status.code) == (Overloaded, "RESOURCE_EXHAUSTED")


def test_limits_of_one_method_are_not_those_of_another(wire):
    handlers = {
        "/s/small": Method(reversed_, max_request_bytes=10),
        "/s/large": Method(reversed_, max_request_bytes=100_000),
        "/s/plain": reversed_,
    }

    async def work(w):
        for path, most in (("/s/small", 10), ("/s/large", 100_000), ("/s/plain", 50_000)):
            assert len((await w.ask(path, bytes(most))).message) == most
            with pytest.raises(Overloaded):
                await w.ask(path, bytes(most + 1))

    wire(handlers, work, LIMITS)


def test_a_reply_may_be_larger_than_a_request(wire):
    async def large(message, call):
        return bytes(200_000)

    assert len(asked(wire, of_kind(Kind.UNARY, large), b"", limits=LIMITS).message) == 200_000


# --------------------------------------------------------------------------------------------------- door: open, drain


async def until_refused(w, kind):
    """Call until a call ends. That the door drains takes a moment to be known: a call before that is in flight, too."""
    while True:
        late = w.later(w.ask(M, b"", kind=kind))
        await asyncio.wait({late}, timeout=0.2)
        if late.done():
            await late


@each_kind
def test_draining_finishes_what_is_in_flight_and_refuses_what_comes_after(wire, kind):
    started, release = asyncio.Event(), asyncio.Event()

    async def slow(message, call):
        started.set()
        await release.wait()
        return b"done"

    async def work(w):
        inflight = w.later(w.ask(M, b"", kind=kind))
        await asyncio.wait_for(started.wait(), SOON_S)
        draining = w.later(w.door.drain(SOON_S))
        with pytest.raises(ServingError) as refused:
            await until_refused(w, kind)
        assert refused.value.status.code in REFUSALS[w.names[0]]
        assert not draining.done()
        assert not inflight.done()
        release.set()
        answer = await inflight
        await asyncio.wait_for(draining, SOON_S)
        with pytest.raises(Unavailable):
            await w.ask(M, b"", kind=kind, timeout_s=2)
        return answer

    assert wire(of_kind(kind, slow), work).messages[0] == b"done"


@each_kind
def test_what_is_not_done_when_draining_ends_is_cancelled(wire, kind):
    watched = Watched()

    async def work(w):
        inflight = w.later(w.ask(M, b"", kind=kind))
        await watched.has(watched.started)
        begin = time.monotonic()
        await w.door.drain(0.2)
        assert time.monotonic() - begin < SOON_S
        with pytest.raises(Unavailable):
            await inflight
        await watched.has(watched.ended)

    wire(of_kind(kind, watched.act), work)
    assert watched.saw == [True]


def test_a_door_drains_at_once_when_nothing_is_in_flight_and_more_than_once(wire):
    async def work(w):
        await w.ask(M, b"")
        begin = time.monotonic()
        patience = 1 if w.names in DRAINS_LATE else 2 * SOON_S
        await w.door.drain(patience)
        await w.door.drain(patience)
        assert time.monotonic() - begin < SOON_S

    wire(of_kind(Kind.UNARY, reversed_), work)


def test_a_port_that_is_taken_is_refused_and_named(door):
    async def work(w):
        with pytest.raises(BadConfig, match=f"listen: found {w.target}, which cannot be bound"):
            await DOORS[w.names[0]]({}).start(w.target)

    door({}, work)


@pytest.mark.parametrize("make", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("listen", ["", "8500", ":x", "host", "127.0.0.1:99999", "127.0.0.1:-1"])
def test_an_address_that_is_none_is_refused(make, listen):
    async def start():
        await make({}).start(listen)

    with pytest.raises(BadConfig, match=r"listen: found .*, expected .*host:port"):
        asyncio.run(start())


# ------------------------------------------------------------------------------------------------------ calls, errors


def test_no_time_left_is_an_error_and_time_left_is_capped():
    with pytest.raises(DeadlineExceeded, match="/s/m: the deadline passed"):
        Call("/s/m", deadline=time.monotonic() - 1).remaining_s(5)
    assert Call("/s/m").remaining_s(5) == 5
    assert Call("/s/m", deadline=time.monotonic() + 60).remaining_s(5) == 5


def all_errors(kind=ServingError):
    yield kind
    for child in kind.__subclasses__():
        yield from all_errors(child)


def test_every_error_has_a_grpc_status_that_exists_and_an_http_one():
    for kind in all_errors():
        assert kind.wire.grpc in GRPC_CODES
        assert 400 <= kind.wire.http < 600


def test_statuses_are_grpcs_own():
    import grpc

    assert {status.name: status.value[0] for status in grpc.StatusCode} == GRPC_CODES


def test_a_status_nobody_maps_is_internal_and_remembers_what_it_was():
    error = from_wire("ABORTED", "x", b"d", (("x-a", "1"),), never_processed=True)
    assert type(error) is Internal
    assert error.status == Status("ABORTED", "x", b"d")
    assert (error.trailing, error.never_processed) == ((("x-a", "1"),), True)


@pytest.mark.parametrize("character", ["x", "%", "ü", "面", "😈"])
def test_an_error_text_is_cut_only_if_it_is_too_long_when_encoded(character):
    most = MAX_MESSAGE_BYTES // len(quote(character, safe="x"))
    fits, over = character * most, character * (most + 1)
    assert to_wire(Overloaded(fits)).message == fits
    cut = to_wire(Overloaded(over)).message
    assert cut == character * (len(cut) - 1) + "…"
    assert MAX_MESSAGE_BYTES - 12 < len(quote(cut, safe="x")) <= MAX_MESSAGE_BYTES


def test_an_error_of_this_process_has_no_status():
    error = BadRequest("a", "b", "c")
    assert (error.status, error.trailing, error.never_processed) == (None, (), False)
