"""HTTP/1.1 over bytes: what is answered, in which order, what is refused, and that nothing is left behind.

Conversations are driven directly, without a socket. `Peer` is the other end; `replies` reads what it was sent, on its
own and strictly. At the end, real clients (curl, wrk) talk to a real listener.
"""

import asyncio
import contextlib
import gc
import gzip
import itertools
import json
import random
import re
import shutil
import subprocess
import tracemalloc
import weakref
import zlib
from typing import NamedTuple

import h11
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cube.errors import NotServed
from cube.rpc import http1
from cube.rpc.http1 import Http1
from cube.rpc.limits import Budget, Limits
from cube.rpc.listener import Listener
from cube.rpc.router import HttpError, Request, Response, Route, Router

TEXT = b"a text that is worth its compression " * 100


# ---- a server with something of everything ----


def echo(request):
    return Response(200, request.body or b"", "application/octet-stream")


async def slow_echo(request):
    for _ in range(3):
        await asyncio.sleep(0)
    return echo(request)


def promised_echo(request):
    promise = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(promise.set_result, echo(request))
    return promise


def facts(request):
    told = [request.method, request.path, request.query, dict(request.headers), dict(request.args), request.peer]
    return Response(200, json.dumps([*told, None if request.body is None else len(request.body)]).encode())


def pieces(*parts, error=None):
    async def made():
        for part in parts:
            await asyncio.sleep(0)
            yield part
        if error is not None:
            raise error

    return made()


def fail(request):
    raise ZeroDivisionError("secret")


async def count(request):
    sizes = [len(piece) async for piece in request.body]
    return Response(200, json.dumps([sum(sizes), len(sizes)]).encode())


async def total(request):
    return Response(200, b"%d" % sum([len(piece) async for piece in request.body]))


async def echoed(request):
    async for piece in request.body:
        yield piece


def server():
    router = Router()
    for path, handler in {
        "/echo": echo,
        "/slow": slow_echo,
        "/promised": promised_echo,
        "/facts": facts,
        "/fail": fail,
        "/refuse": lambda request: (_ for _ in ()).throw(NotServed("it", [])),
        "/pieces": lambda request: Response(200, pieces(b"one", b"", [b"two", b"three"], bytes(20_000))),
        "/nothing": lambda request: Response(204),
        "/text": lambda request: Response(200, TEXT, "text/plain", compress=True),
        "/large": lambda request: Response(200, bytes(3 << 20)),
        "/array": lambda request: Response(200, [np.arange(6, dtype=np.int16).reshape(2, 3), b"", b"end"]),
        "/v1/tables/{name}:lookup": facts,
    }.items():
        router.add("GET", path, handler)
        router.add("POST", path, handler)
    router.add("POST", "/small", echo, max_body_bytes=100)
    router.add("POST", "/count", count, stream=True)
    router.add("POST", "/sum", total, stream=True)
    router.add("POST", "/count_small", count, stream=True, max_body_bytes=100)
    router.add("POST", "/through", lambda request: Response(200, echoed(request)), stream=True)
    router.add("POST", "/early", lambda request: Response(200, b"seen enough"), stream=True)
    return router


ROUTER = server()


# ---- the other end ----


class Reply(NamedTuple):
    status: int
    headers: dict
    body: bytes


HEAD = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) ([ -~]*)\r\n((?:[a-z-]+: [^\r\n]*\r\n)*)\r\n")


def replies(data, methods=(), closed=False):
    """The responses in `data`, to requests with these methods (GET where there are more responses)."""
    found, at, methods = [], 0, iter(methods)
    while at < len(data):
        head = HEAD.match(data, at)
        assert head, data[at : at + 200]
        status, at = int(head[1]), head.end()
        fields = [line.split(": ", 1) for line in head[3].decode().split("\r\n")[:-1]]
        headers = dict(fields)
        assert len(headers) == len(fields)
        if status >= 200:
            assert headers.pop("date").endswith(" GMT")
        method = next(methods, "GET") if status >= 200 else None
        if status < 200 or status in (204, 304):
            body = b""
            assert "content-length" not in headers
        elif method == "HEAD":
            assert "content-length" in headers or "transfer-encoding" in headers
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in headers
            body, length = b"", -1
            while length:
                end = data.index(b"\r\n", at)
                length, at = int(data[at:end], 16), end + 2
                body += data[at : at + length]
                assert data[at + length : at + length + 2] == b"\r\n"
                at += length + 2
        elif "content-length" in headers:
            body, at = data[at : at + int(headers["content-length"])], at + int(headers["content-length"])
            assert at <= len(data)
        else:
            assert closed
            body, at = data[at:], len(data)
        found.append(Reply(status, headers, body))
    return found


class Peer:
    """A conversation and who talks to it. Use it as a context: at the end nothing may be in flight."""

    def __init__(self, router=ROUTER, **limits):
        self.limits = Limits(**limits)
        self.budget = Budget(self.limits.total_bytes)
        self.wakes = 0
        self.got = b""
        self.most = 0  # bytes that were ever accounted
        self.talk = Http1(router, self.limits, self.budget, "peer:1", self.woken)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error == (None, None, None):
            self.take()
            self.talk.lost()
            assert self.talk.take() == []
            assert self.budget.used == 0

    def woken(self):
        self.wakes += 1
        self.take()

    def take(self):
        self.most = max(self.most, self.budget.used)
        self.got += b"".join(self.talk.take())

    def send(self, *data):
        for piece in data:
            self.talk.receive(piece)
            self.most = max(self.most, self.budget.used)
            self.take()
        return self

    def said(self, *methods):
        return replies(self.got, methods, self.talk.closing)

    def tick(self, now):
        self.talk.tick(now)
        self.take()
        return self

    async def until(self, done, most=10_000):
        for _ in range(most):
            if done():
                return
            await asyncio.sleep(0)
        raise AssertionError("it did not happen")

    async def answered(self, number):
        await self.until(lambda: len(self.whole()) >= number)
        return self.whole()

    def whole(self):
        try:
            return self.said()
        except (AssertionError, ValueError):
            return []


def run(coroutine, timeout_s=200):
    async def within():
        return await asyncio.wait_for(coroutine, timeout_s)

    return asyncio.run(within())


def request(method="GET", path="/echo", body=None, *fields, version="1.1", host=True):
    lines = [f"{method} {path} HTTP/{version}", *(["Host: here"] if host else []), *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunked(path, *parts, fields=(), trailers=b"", extension=b""):
    head = request("POST", path, None, "Transfer-Encoding: chunked", *fields)
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    return head + body + b"0%b\r\n%b\r\n" % (extension, trailers)


def exchange(data, *methods, **limits):
    with Peer(**limits) as peer:
        return peer.send(data).said(*methods)


# ---- requests and answers ----


def test_a_small_post_is_answered_at_once():
    with Peer() as peer:
        peer.send(request("POST", "/echo", b"hello"))
        assert peer.said() == [
            Reply(200, {"content-type": "application/octet-stream", "content-length": "5"}, b"hello")
        ]
        assert not peer.talk.closing
        assert peer.talk.idle
        assert peer.wakes == 0


def test_the_handler_is_told_what_was_asked():
    sent = request("POST", "/v1/tables/a%20b:lookup?x=1&y=?", b"abc", "X-One: 1", "x-one:2\t", "Empty:")
    assert json.loads(exchange(sent)[0].body) == [
        "POST", "/v1/tables/a%20b:lookup", "x=1&y=?",
        {"host": "here", "x-one": "1, 2", "empty": "", "content-length": "3"}, {"name": "a b"}, "peer:1", 3,
    ]  # fmt: skip


def test_no_body_and_an_empty_body_are_told_apart():
    assert [json.loads(r.body)[-1] for r in exchange(request(path="/facts") + request("POST", "/facts", b""))] == [
        None,
        0,
    ]
    assert json.loads(exchange(chunked("/facts"))[0].body)[-1] == 0


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/facts", "/facts", ""),
        ("/facts?", "/facts", ""),
        ("/facts?a?b", "/facts", "a?b"),
        ("http://elsewhere/facts?q", "/facts", "q"),
        ("HTTPS://[::1]:80/facts", "/facts", ""),
    ],
)
def test_targets_are_paths_or_addresses(target, path, query):
    told = json.loads(exchange(request("GET", target))[0].body)
    assert told[1:3] == [path, query]


@pytest.mark.parametrize("target", ["http://elsewhere", "http://elsewhere?q", "http://elsewhere/"])
def test_an_address_without_path_is_the_root(target):
    assert exchange(request("GET", target))[0].body == b'{"error": "/: no such path here"}'
    assert exchange(request("OPTIONS", target))[0].status == (204 if target == "http://elsewhere" else 404)


def test_head_has_the_lengths_of_get_and_no_body():
    answers = exchange(request("HEAD", "/text") + request("GET", "/text"), "HEAD", "GET")
    assert answers[0].headers == answers[1].headers
    assert (answers[0].body, answers[1].body) == (b"", TEXT)


def test_statuses_without_body_have_no_length():
    assert exchange(request(path="/nothing") + request("OPTIONS", "/echo")) == [
        Reply(204, {}, b""),
        Reply(204, {"allow": "GET, HEAD, OPTIONS, POST"}, b""),
    ]


def test_buffers_are_sent_in_their_order_and_large_ones_uncopied():
    whole = np.arange(6, dtype=np.int16).tobytes() + b"end"
    assert exchange(request(path="/array"))[0].body == whole
    kept = bytearray(1 << 20)
    router = Router()
    router.add("GET", "/", lambda request: Response(200, kept))
    with Peer(router) as peer:
        peer.talk.receive(request(path="/"))
        out = peer.talk.take()
        kept[0] = 7
        assert (len(out), out[1][0]) == (2, 7)


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/refuse", 404, "it: not served here, which serves none"),
        ("/fail", 500, "internal error; the server's log has it"),
        ("/nowhere", 404, "/nowhere: no such path here"),
    ],
)
def test_errors_of_handlers_are_answers_and_the_connection_goes_on(path, status, text, caplog):
    answers = exchange(request(path=path) + request("POST", "/echo", b"on"))
    assert answers[0].status == status
    assert json.loads(answers[0].body) == {"error": text}
    assert answers[1].body == b"on"
    assert ("secret" in caplog.text) == (status == 500)


@pytest.mark.parametrize(
    "response",
    [
        Response(99),
        Response(600),
        Response(200, "text"),
        Response(200, b"", "text/plain\r\nx: y"),
        Response(200, headers=[("x", "a\r\nb: c")]),
        Response(200, headers=[("x y", "z")]),
        Response(200, headers=[("x", "\u2713")]),
        Response(200, headers=[("Content-Length", "1")]),
        Response(200, headers=[("transfer-encoding", "chunked")]),
    ],
    ids=[
        "status-99",
        "status-600",
        "text-body",
        "type-two-lines",
        "value-two-lines",
        "name-space",
        "value-not-latin",
        "length",
        "chunked",
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_that_cannot_be_sent_is_an_internal_error(response, streamed, caplog):
    def handler(request):
        body = pieces(response.body) if streamed else response.body
        return Response(response.status, body, response.content_type, response.headers)

    async def talk():
        router = Router()
        router.add("GET", "/", handler)
        with Peer(router) as peer:
            peer.send(request(path="/"), request(path="/"))
            assert [r.status for r in await peer.answered(2)] == [500, 500]

    run(talk())
    assert "found" in caplog.text or "memoryview" in caplog.text


def test_the_same_head_again_is_the_same_request_again():
    with Peer(server()) as peer:
        for number in range(5):
            peer.send(request("POST", "/facts?q", b"%d" % number, "X-A: b"))
        bodies = [json.loads(r.body) for r in peer.said()]
        assert bodies == [bodies[0]] * 5


def test_heads_are_remembered_without_growing_without_bound():
    router = server()
    for number in range(3 * http1.MEMORY_HEADS):
        for _ in range(2):
            with Peer(router) as peer:
                peer.send(request("GET", "/echo", None, f"X-Number: {number}"))
                assert peer.said()[0].status == 200
    assert 0 < len(router.memory) <= http1.MEMORY_HEADS
    router.memory.clear()
    with Peer(router) as peer:
        for _ in range(3):
            peer.send(request("GET", "/echo", None, "X-Long: " + "x" * http1.MEMORY_HEAD_BYTES))
    assert not router.memory


# ---- connections ----


@pytest.mark.parametrize(
    ("version", "connection", "stays"),
    [
        ("1.1", None, True), ("1.1", "close", False), ("1.1", "keep-alive", True), ("1.1", "Close", False),
        ("1.1", "x, close", False), ("1.1", "keep-alive , close", False), ("1.1", "closed", True),
        ("1.1", "keep-alive\r\nConnection: close", False), ("1.0", None, False), ("1.0", "keep-alive", True),
        ("1.0", "x,Keep-Alive", True), ("1.0", "close", False), ("1.0", "keep-alive, close", False),
    ],
)  # fmt: skip
def test_a_connection_stays_or_closes_as_version_and_connection_say(version, connection, stays):
    fields = [f"Connection: {connection}"] if connection else []
    for path in ("/echo", "/echo", "/echo"):  # new, seen once, remembered
        with Peer() as peer:
            peer.send(request("POST", path, b"x", *fields, version=version), request())
            assert peer.talk.closing is not stays
            first, *more = peer.said()
            said = {True: {"1.1": None, "1.0": "keep-alive"}[version], False: "close"}[stays]
            assert first.headers.get("connection") == said
            assert len(more) == stays


def test_after_a_close_nothing_is_read():
    with Peer() as peer:
        peer.send(request("GET", "/echo", None, "Connection: close") + request(), request())
        assert len(peer.said()) == 1
        assert peer.talk.closing


def test_upgrades_are_not_made():
    upgrade = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"]
    answers = exchange(request("POST", "/echo", b"old", *upgrade) * 3)
    assert [(r.status, r.body) for r in answers] == [(200, b"old")] * 3


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "PROPFIND", "get", "BREW"])
def test_methods_that_are_not_known_are_refused(method):
    with Peer() as peer:
        peer.send(request(method, "here:80" if method == "CONNECT" else "/echo") + request())
        assert [r.status for r in peer.said()] == [501]
        assert peer.talk.closing


@pytest.mark.parametrize("version", ["0.9", "1.2", "2.0", "3.0"])
def test_versions_that_are_not_spoken_are_refused(version):
    with Peer() as peer:
        peer.send(request(version=version))
        assert [r.status for r in peer.said()] == [505]
        assert peer.talk.closing


def test_one_empty_line_before_a_request_is_overlooked():
    for data in (b"\r\n" + request(), request("POST", "/echo", b"x") + b"\r\n" + request()):
        answers = exchange(data)
        assert {r.status for r in answers} == {200}
    with Peer() as peer:
        peer.send(request(), b"\r", b"\n")
        assert peer.talk.idle
        peer.send(request())
        assert len(peer.said()) == 2


# ---- pipelining ----


def test_pipelined_requests_are_answered_in_order_though_the_first_is_slow():
    async def talk():
        with Peer() as peer:
            paths = ["/slow", "/echo", "/promised", "/slow", "/slow", "/promised", "/echo", "/echo", "/promised"]
            peer.send(b"".join(request("POST", path, b"%d" % n) for n, path in enumerate(paths)))
            assert peer.said() == []
            assert [r.body for r in await peer.answered(9)] == [b"%d" % n for n in range(9)]
            assert peer.talk.idle

    run(talk())


def test_a_request_is_begun_only_after_the_one_before_it_was_answered():
    begun, gate = [], {}

    async def wait(request):
        begun.append(request.query)
        gate[request.query] = asyncio.Event()
        await gate[request.query].wait()
        return Response(200, request.query.encode())

    async def talk():
        router = Router()
        router.add("GET", "/", wait)
        with Peer(router) as peer:
            peer.send(request(path="/?a") + request(path="/?b"))
            await peer.until(lambda: begun)
            peer.send(request(path="/?c"))
            assert begun == ["a"]
            for name in "abc":
                await peer.until(lambda name=name: name in gate)
                gate[name].set()
            assert [r.body for r in await peer.answered(3)] == [b"a", b"b", b"c"]

    run(talk())


def test_many_pipelined_requests_leave_other_connections_their_turn():
    async def talk():
        with Peer() as peer:
            number = 10 * http1.TURNS
            peer.send(b"".join(request("POST", "/echo", b"%d" % n) for n in range(number)))
            assert len(peer.said()) == http1.TURNS
            peer.send(request("POST", "/echo", b"last"))
            bodies = [r.body for r in await peer.answered(number + 1)]
            assert bodies == [*(b"%d" % n for n in range(number)), b"last"]

    run(talk())


def test_requests_ahead_of_us_wait_as_bytes_and_the_listener_is_told_to_stop():
    async def talk():
        with Peer() as peer:
            body = bytes(10_000)
            peer.send(request("POST", "/slow", body))
            assert not peer.talk.full
            for _ in range(10):
                peer.send(request("POST", "/slow", body))
            assert peer.talk.full
            assert 100_000 < peer.budget.used < 130_000
            before = peer.wakes
            assert [len(r.body) for r in await peer.answered(11)] == [10_000] * 11
            assert not peer.talk.full
            assert peer.wakes > before

    run(talk())


def test_a_listener_that_reads_on_all_the_same_loses_the_connection_and_no_memory():
    async def talk():
        with Peer(connection_bytes=200_000, body_bytes=1_000_000) as peer:
            for _ in range(1_000):
                peer.send(request("POST", "/slow", bytes(10_000)))
            assert peer.most < 300_000
            assert len(await peer.answered(1)) == 1
            await peer.until(lambda: peer.talk.closing)

    run(talk())


def test_a_paused_transport_is_given_no_new_answers_until_it_has_room():
    async def talk():
        with Peer() as peer:
            peer.talk.pause()
            peer.send(request() + request(), request())
            assert peer.said() == []
            assert not peer.talk.idle
            peer.talk.resume()
            assert len(peer.said()) == 3

    run(talk())


def test_answers_to_pipelined_requests_wait_until_those_before_are_written():
    async def talk():
        with Peer() as peer:
            peer.talk.receive(request(path="/large") * 20)
            assert peer.budget.used < 10 << 20
            peer.take()
            answers = await peer.answered(20)
            assert {len(r.body) for r in answers} == {3 << 20}

    run(talk())


# ---- bodies ----


def test_a_body_arrives_in_any_pieces():
    body = random.Random(1).randbytes(50_000)
    sent = request("POST", "/echo", body)
    for size in (1, 7, 1000, 4096, 49_999):
        with Peer() as peer:
            peer.send(*(sent[at : at + size] for at in range(0, len(sent), size)))
            assert peer.said()[0].body == body
            assert peer.most < 150_000


def test_chunks_are_put_together():
    parts = [b"one", bytes(10_000), b"x" * 70_000, b"\r\n0\r\n\r\n"]
    sent = chunked("/echo", *parts, extension=b';name=value;q="x y"', trailers=b"X-Sum: 1\r\nContent-Length: 7\r\n")
    for size in (len(sent), 1, 100):
        with Peer() as peer:
            peer.send(*(sent[at : at + size] for at in range(0, len(sent), size)))
            assert peer.said()[0].body == b"".join(parts)
            assert peer.talk.idle


def test_large_bodies_of_known_length_are_not_copied_piece_by_piece():
    gc.collect()
    tracemalloc.start()
    try:
        router = Router()
        router.add("POST", "/", lambda request: Response(200, b"%d" % len(request.body)))
        with Peer(router) as peer:
            peer.send(request("POST", "/", bytes(8 << 20))[:100])
            rest = bytes(1 << 20)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            sent = len(request("POST", "/", bytes(8 << 20))) - 100
            for _ in range(sent // len(rest)):
                peer.send(rest)
            assert tracemalloc.get_traced_memory()[1] - before < 28 << 20
            peer.send(rest[: sent % len(rest)])
            assert peer.said()[0].body == b"%d" % (8 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "x-gzip", "GZIP", "identity"])
@pytest.mark.parametrize("path", ["/echo", "/slow", "/through"])
def test_compressed_bodies_are_decompressed(encoding, path):
    press = zlib.compressobj(6, zlib.DEFLATED, 31 if "zip" in encoding.lower() else 15)
    body = TEXT if encoding == "identity" else press.compress(TEXT) + press.flush()

    async def talk():
        for sent in (
            request("POST", path, body, f"Content-Encoding: {encoding}"),
            chunked(path, body[:10], body[10:], fields=[f"Content-Encoding: {encoding}"]),
        ):
            with Peer() as peer:
                peer.send(*(sent[at : at + 50] for at in range(0, len(sent), 50)))
                assert (await peer.answered(1))[0].body == TEXT

    run(talk())


@pytest.mark.parametrize("path", ["/small", "/count_small"])
@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (gzip.compress(bytes(101)), "gzip", 413),
        (gzip.compress(bytes(50 << 20))[:99], "gzip", 413),
        (b"not compressed", "gzip", 400),
        (gzip.compress(b"x") + b"y", "gzip", 400),
        (gzip.compress(b"x" * 50)[:-5], "gzip", 400),
        (b"x", "br", 415),
        (b"x", "gzip, gzip", 415),
        (bytes(101), "identity", 413),
    ],
    ids=["a little too much", "a bomb", "garbage", "more after the end", "cut off", "br", "twice", "too long"],
)
def test_bodies_that_do_not_decompress_or_are_too_large_are_refused(path, body, encoding, status):
    async def talk():
        for sent in (
            request("POST", path, body, f"Content-Encoding: {encoding}"),
            chunked(path, body, fields=[f"Content-Encoding: {encoding}"]),
        ):
            with Peer() as peer:
                peer.send(sent)
                answers = await peer.answered(1)
                assert [r.status for r in answers] == [status]
                assert peer.most < 3_000

    run(talk())


def test_a_body_over_the_limit_is_refused_before_it_comes():
    with Peer(body_bytes=1000) as peer:
        peer.send(request("POST", "/echo", bytes(1001))[:-1001])
        assert [r.status for r in peer.said()] == [413]
        assert peer.said()[0].headers["connection"] == "close"
        assert peer.talk.closing
        assert peer.send(bytes(1001)).budget.used == 0
    with Peer(body_bytes=1000) as peer:
        peer.send(chunked("/echo", bytes(600), bytes(401))[:-300])
        assert [r.status for r in peer.said()] == [413]
    with Peer(body_bytes=1000) as peer:
        peer.send(request("POST", "/echo", None, "Transfer-Encoding: chunked") + b"FFFFFFFFFFFFFFFF\r\n")
        assert [r.status for r in peer.said()] == [413]
    assert [r.status for r in exchange(request("POST", "/echo", bytes(1000)), body_bytes=1000)] == [200]
    assert [r.status for r in exchange(chunked("/echo", bytes(400), bytes(600)), body_bytes=1000)] == [200]


def test_a_route_has_its_own_limit():
    assert exchange(request("POST", "/small", bytes(100)))[0].status == 200
    assert exchange(request("POST", "/small", bytes(101)))[0].status == 413


def test_a_body_that_nobody_asked_for_is_refused_where_it_is_large_and_skipped_where_it_is_small():
    with Peer() as peer:
        peer.send(request("POST", "/nowhere", bytes(1000)), request("PUT", "/echo", bytes(1000))[:-10], bytes(10))
        peer.send(request())
        assert [r.status for r in peer.said()] == [404, 405, 200]
    for sent in (request("POST", "/nowhere", bytes(1 << 20))[:1000], chunked("/nowhere", bytes(1000))[:500]):
        with Peer() as peer:
            peer.send(sent)
            assert [r.status for r in peer.said()] == [404]
            assert peer.talk.closing


# ---- Expect ----


def test_who_waits_for_100_continue_gets_it():
    body = b"x" * 100
    sent = request("POST", "/echo", body, "Expect: 100-Continue")
    with Peer() as peer:
        peer.send(sent[:-100])
        assert peer.got == b"HTTP/1.1 100 Continue\r\n\r\n"
        peer.send(sent[-100:])
        assert [r.status for r in peer.said()] == [100, 200]
        peer.send(sent)  # who does not wait is told nothing
        assert [r.status for r in peer.said()] == [100, 200, 200]
        peer.send(request("GET", "/echo", None, "Expect: 100-continue"))
        assert [r.status for r in peer.said()] == [100, 200, 200, 200]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("POST", "/echo", b"x", "Expect: 200-ok"), 417),
        (request("POST", "/echo", b"x", "Expect: 100-continue", "Expect: more"), 417),
        (request("POST", "/small", bytes(101), "Expect: 100-continue"), 413),
        (request("POST", "/nowhere", b"x", "Expect: 100-continue"), 404),
        (request("POST", "/echo", b"x", "Expect: 100-continue", "Content-Encoding: br"), 415),
    ],
)
def test_who_expects_what_will_not_be_is_refused_before_sending_the_body(sent, status):
    head = sent[: sent.index(b"\r\n\r\n") + 4]
    with Peer() as peer:
        peer.send(head)
        assert [r.status for r in peer.said()] == [status]
        assert peer.talk.closing


def test_http_1_0_expects_nothing():
    with Peer() as peer:
        peer.send(request("POST", "/echo", b"x", "Expect: 100-continue", version="1.0")[:-1])
        assert peer.got == b""
        peer.send(b"x")
        assert [r.status for r in peer.said()] == [200]


# ---- bodies and replies in pieces ----


def test_a_reply_in_pieces_is_chunked_and_the_connection_goes_on():
    async def talk():
        with Peer() as peer:
            peer.send(request(path="/pieces") + request())
            answers = await peer.answered(2)
            assert answers[0].headers["transfer-encoding"] == "chunked"
            assert answers[0].body == b"onetwothree" + bytes(20_000)
            assert answers[1].status == 200

    run(talk())


def test_a_reply_in_pieces_to_http_1_0_ends_with_the_connection():
    async def talk():
        with Peer() as peer:
            peer.send(request(path="/pieces", version="1.0"))
            await peer.until(lambda: peer.talk.closing)
            (answer,) = peer.said()
            assert answer.body == b"onetwothree" + bytes(20_000)
            assert "transfer-encoding" not in answer.headers
            assert answer.headers["connection"] == "close"

    run(talk())


def test_head_of_a_reply_in_pieces_has_no_body():
    async def talk():
        with Peer() as peer:
            peer.send(request("HEAD", "/pieces") + request())
            await peer.until(lambda: peer.got.count(b"HTTP/1.1") == 2)
            assert [r.body for r in peer.said("HEAD")] == [b"", b""]

    run(talk())


def test_an_error_before_the_first_piece_is_a_status_and_a_later_one_breaks_off():
    async def talk():
        router = Router()
        router.add("GET", "/before", lambda request: Response(200, pieces(error=HttpError(418, "teapot"))))
        router.add("GET", "/after", lambda request: Response(200, pieces(b"part", error=ZeroDivisionError("late"))))
        with Peer(router) as peer:
            peer.send(request(path="/before") + request(path="/after") + request(path="/before"))
            await peer.until(lambda: peer.talk.closing)
            assert peer.got.count(b"HTTP/1.1") == 2
            assert peer.got.startswith(b"HTTP/1.1 418 ")
            assert peer.got.endswith(b"4\r\npart\r\n"), "no last chunk: the client sees that something is missing"

    run(talk())


def test_pieces_are_not_made_faster_than_they_are_written():
    made = []

    async def endless():
        for number in itertools.count():
            made.append(number)
            yield bytes(10_000)

    async def talk():
        router = Router()
        router.add("GET", "/", lambda request: Response(200, endless()))
        with Peer(router) as peer:
            peer.talk.receive(request(path="/"))
            await peer.until(lambda: made)
            peer.talk.pause()
            for _ in range(100):
                await asyncio.sleep(0)
            stopped = len(made)
            assert stopped < 20
            peer.talk.resume()
            await peer.until(lambda: len(made) > stopped + 5)
        peer = Peer(router)
        peer.talk._wake = lambda: None  # a listener that takes its time
        made.clear()
        peer.talk.receive(request(path="/"))
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(made) < 20
        assert peer.budget.used < 200_000
        peer.talk.lost()
        assert peer.budget.used == 0

    run(talk())


def test_a_handler_may_read_the_body_as_it_arrives():
    async def talk():
        for sent in (request("POST", "/count", bytes(100_000)), chunked("/count", *[bytes(1000)] * 100)):
            with Peer() as peer:
                for at in range(0, len(sent), 10_000):
                    peer.send(sent[at : at + 10_000])
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                (answer,) = await peer.answered(1)
                total, parts = json.loads(answer.body)
                assert total == 100_000
                assert parts > 2
                assert peer.talk.idle
                assert peer.most < 40_000

    run(talk())


def test_a_handler_may_answer_while_it_reads():
    async def talk():
        with Peer() as peer:
            body = random.Random(2).randbytes(30_000)
            sent = chunked("/through", body[:10_000], body[10_000:])
            peer.send(sent[:10_100])
            await peer.until(lambda: body[:5_000] in peer.got)
            peer.send(sent[10_100:] + request())
            answers = await peer.answered(2)
            assert [r.body for r in answers] == [body, b""]

    run(talk())


def test_a_peer_that_sends_faster_than_the_handler_reads_is_told_to_wait():
    gate = None

    async def read(request):
        await gate.wait()
        return await count(request)

    async def talk():
        nonlocal gate
        gate = asyncio.Event()
        router = Router()
        router.add("POST", "/", read, stream=True)
        with Peer(router) as peer:
            sent = request("POST", "/", bytes(1 << 20))
            at = 0
            while not peer.talk.full:
                peer.send(sent[at : at + 10_000])
                at += 10_000
            assert 50_000 < at < 100_000
            assert peer.tick(0).tick(10_000).said() == [], "it is not the peer that stalls"
            gate.set()
            await peer.until(lambda: not peer.talk.full)
            assert peer.wakes
            while at < len(sent):
                peer.send(sent[at : at + 10_000])
                at += 10_000
                await peer.until(lambda: not peer.talk.full)
            assert json.loads((await peer.answered(1))[0].body)[0] == 1 << 20
            assert peer.most < 120_000

    run(talk())


def test_a_compressed_body_is_unpacked_as_it_is_read():
    gate, seen = None, []

    async def read(request):
        async for piece in request.body:
            seen.append(len(piece))
            await gate.wait()
        return Response(200, b"%d" % sum(seen))

    async def talk():
        nonlocal gate
        gate = asyncio.Event()
        router = Router()
        router.add("POST", "/", read, stream=True)
        with Peer(router) as peer:
            peer.send(request("POST", "/", gzip.compress(bytes(20 << 20)), "Content-Encoding: gzip"))
            await peer.until(lambda: seen)
            assert seen == [http1.AHEAD]
            gate.set()
            assert (await peer.answered(1))[0].body == b"%d" % (20 << 20)
            assert max(seen) == http1.AHEAD

    run(talk())


def test_an_answer_before_the_body_is_there_closes_the_connection():
    with Peer() as peer:
        peer.send(request("POST", "/early", bytes(1000))[:-1])
        assert [(r.body, r.headers["connection"]) for r in peer.said()] == [(b"seen enough", "close")]
        assert peer.talk.closing
    with Peer() as peer:
        peer.send(request("POST", "/early", bytes(1000)), request("POST", "/early", b""))
        assert [r.body for r in peer.said()] == [b"seen enough"] * 2
        assert not peer.talk.closing


def test_a_body_that_turns_out_malformed_is_told_to_the_handler_that_reads_it():
    async def talk():
        for path in ("/count", "/through"):
            sent = chunked(path, b"abc")
            with Peer() as peer:
                peer.send(sent[:-7])
                for _ in range(5):
                    await asyncio.sleep(0)
                peer.send(b"zz\r\n")
                await peer.until(lambda peer=peer: peer.talk.closing)
                if path == "/count":
                    assert [(r.status, r.headers["connection"]) for r in peer.said()] == [(400, "close")]
                else:
                    assert peer.got.endswith(b"3\r\nabc\r\n")

    run(talk())


def test_reading_after_the_answer_gives_nothing():
    kept = []

    def keep(request):
        kept.append(request.body)
        return Response()

    async def talk():
        router = Router()
        router.add("POST", "/", keep, stream=True)
        with Peer(router) as peer:
            peer.send(request("POST", "/", b"x"))
        with pytest.raises(HttpError, match="after the answer"):
            await anext(kept[0])

    run(talk())


# ---- compression of replies ----


def test_replies_are_compressed_for_who_reads_that():
    answers = exchange(request(path="/text") + request("GET", "/text", None, "Accept-Encoding: gzip"))
    assert answers[0].body == TEXT
    assert "content-encoding" not in answers[0].headers
    assert gzip.decompress(answers[1].body) == TEXT
    assert answers[1].headers["content-encoding"] == "gzip"
    assert {r.headers["vary"] for r in answers} == {"accept-encoding"}


# ---- limits ----


def test_long_heads_are_refused_as_soon_as_they_are_too_long():
    long = "x" * 2_000
    for data, status in (
        (request(path="/" + long), 414),
        (request(path="/" + long)[:1_100], 414),
        (b"G" * 1_100, 414),
        (request("GET", "/echo", None, f"X: {long}"), 431),
        (request("GET", "/echo", None, f"X: {long}")[:1_100], 431),
        (request("GET", "/echo", None, *["A: b"] * 30), 431),
    ):
        for pieces_of in ([data], [data[at : at + 1] for at in range(len(data))]):
            with Peer(header_bytes=1_000) as peer:
                peer.send(*pieces_of)
                assert [r.status for r in peer.said()] == [status]
                assert peer.talk.closing
                assert peer.most < 3_000


def test_a_head_that_is_remembered_is_measured_again():
    router, sent = server(), request("GET", "/echo", None, "X: " + "y" * 500)
    for limit, status in ((1_000, 200), (1_000, 200), (300, 431)):
        with Peer(router, header_bytes=limit) as peer:
            assert peer.send(sent).said()[0].status == status


def test_extensions_and_trailers_are_bounded():
    for data in (
        chunked("/echo", *[b"x"] * 10, extension=b";" + b"e" * 200),
        chunked("/echo", b"x", extension=b";" + b"e" * 300),
        chunked("/echo", b"x", trailers=b"X: " + b"y" * 2_000 + b"\r\n"),
        chunked("/echo", b"x", trailers=b"X: y\r\n" * 500),
        chunked("/echo", b"x", trailers=b"X: " + b"y" * 2_000 + b"\r\n")[:-100],
        chunked("/echo", b"x", extension=b";" + b"e" * 300)[:-320],
    ):
        for size in (len(data), 1):
            with Peer(header_bytes=1_000) as peer:
                peer.send(*(data[at : at + size] for at in range(0, len(data), size)))
                assert [r.status for r in peer.said()] == [400]
                assert peer.talk.closing


def test_while_the_process_holds_too_much_new_requests_are_refused():
    with Peer(total_bytes=1_000) as peer:
        peer.budget.take(2_000)
        peer.send(request())
        assert [r.status for r in peer.said()] == [429]
        assert peer.talk.closing
        peer.budget.give(2_000)


# ---- the clock ----


def test_a_peer_that_never_asks_is_let_go():
    with Peer(handshake_s=10) as peer:
        assert not peer.tick(100).tick(109).talk.closing
        assert peer.tick(110).talk.closing
        assert peer.got == b""
    with Peer(handshake_s=10) as peer:
        peer.tick(100).send(b"GET").tick(105).send(b" / ").tick(109)
        assert peer.tick(110).talk.closing
        assert [r.status for r in peer.said()] == [408]


def test_an_idle_connection_is_let_go_after_a_while():
    with Peer(idle_s=100) as peer:
        peer.tick(0).send(request()).tick(50)
        assert peer.talk.last_progress == 50
        assert not peer.tick(149).talk.closing
        assert peer.tick(150).talk.closing
        assert len(peer.said()) == 1
    with Peer(idle_s=0) as peer:
        assert not peer.tick(0).send(request()).tick(1).tick(1e9).talk.closing


def test_a_head_that_trickles_is_not_waited_for():
    with Peer(stall_s=60) as peer:
        peer.tick(0).send(request())
        now = 1.0
        for byte in request()[:-1]:
            peer.send(bytes([byte])).tick(now)
            now += 5
            if peer.talk.closing:
                break
        assert [r.status for r in peer.said()] == [200, 408]
        assert 60 <= now < 80


def test_a_body_that_stalls_is_not_waited_for():
    for path in ("/echo", "/count"):

        async def talk(path=path):
            with Peer(stall_s=60) as peer:
                peer.tick(0).send(request("POST", path, bytes(100))[:-50]).tick(1)
                peer.tick(50).send(bytes(1)).tick(51)
                assert not peer.tick(110).talk.closing
                peer.tick(111)
                assert [r.status for r in await peer.answered(1)] == [408]
                assert peer.talk.closing

        run(talk())


def test_a_slow_handler_is_not_a_stalled_peer():
    async def talk():
        with Peer(stall_s=60, idle_s=100) as peer:
            peer.tick(0).send(request("POST", "/slow", b"x")).tick(1).tick(10_000)
            assert (await peer.answered(1))[0].body == b"x"
            assert not peer.talk.closing

    run(talk())


# ---- ends ----


def test_drain_closes_who_is_between_requests_and_answers_who_is_not():
    async def talk():
        with Peer() as peer:
            peer.talk.drain()
            assert peer.talk.closing
        for sent, rest in (
            (request("POST", "/slow", b"x") + request(), b""),
            (request("POST", "/echo", b"x")[:5], request("POST", "/echo", b"x")[5:]),
            (request("POST", "/echo", b"x")[:-1], b"x"),
            (request("POST", "/count", b"x")[:-1], b"x"),
            (request("POST", "/through", b"x")[:-1], b"x"),
        ):
            with Peer() as peer:
                peer.send(request(), sent)
                peer.talk.drain()
                peer.take()
                assert not peer.talk.closing
                peer.send(rest)
                await peer.until(lambda peer=peer: peer.talk.closing)
                answers = peer.said()
                assert [r.status for r in answers] == [200, 200]
                assert answers[1].headers["connection"] == "close"
                assert peer.send(request()).said() == answers

    run(talk())


def test_drain_leaves_pipelined_requests_that_have_not_begun():
    async def talk():
        with Peer() as peer:
            peer.send(request() * 1_000)
            answered = len(peer.said())
            peer.talk.drain()
            assert peer.talk.closing
            for _ in range(5):
                await asyncio.sleep(0)
            assert len(peer.said()) == answered

    run(talk())


def test_a_lost_connection_cancels_what_runs_and_leaves_nothing():
    seen = []

    async def wait(request):
        seen.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("ended")

    async def read(request):
        seen.append("begun")
        try:
            async for _ in request.body:
                pass
            await asyncio.Event().wait()
        finally:
            seen.append("ended")

    async def made():
        seen.append("begun")
        try:
            while True:
                yield bytes(1000)
        finally:
            seen.append("ended")

    async def talk():
        router = Router()
        router.add("POST", "/wait", wait)
        router.add("POST", "/read", read, stream=True)
        router.add("POST", "/made", lambda request: Response(200, made()))
        for path in ("/wait", "/read", "/made"):
            for steps in range(6):
                seen.clear()
                peer = Peer(router)
                talk = weakref.ref(Held(peer.talk))
                peer.send(request("POST", path, b"body") + request("POST", path, bytes(1000))[:-5])
                for _ in range(steps):
                    await asyncio.sleep(0)
                wakes = peer.wakes
                peer.talk.lost()
                assert peer.budget.used == 0
                for _ in range(5):
                    await asyncio.sleep(0)
                assert seen in ([], ["begun", "ended"])
                assert (steps == 0) == (not seen) or path == "/made"
                peer.talk.receive(request())
                peer.talk.tick(1)
                peer.talk.pause()
                peer.talk.resume()
                peer.talk.drain()
                assert peer.talk.take() == []
                assert (peer.wakes, peer.budget.used, peer.talk.closing) == (wakes, 0, True)
                assert talk() is None
        assert len(asyncio.all_tasks()) <= 2

    run(talk())


class Held:
    """Something that can be referred to weakly."""

    def __init__(self, thing):
        self.thing = thing


def test_a_handler_that_takes_no_notice_of_being_cancelled_hurts_nobody():
    async def stubborn(request):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return Response(200, b"all the same")

    async def endless():
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                for _ in range(10):
                    yield b"all the same"
                return

    async def talk():
        router = Router()
        router.add("GET", "/", stubborn)
        router.add("GET", "/endless", lambda request: Response(200, endless()))
        for path in ("/", "/endless"):
            peer = Peer(router).send(request(path=path))
            for _ in range(3):
                await asyncio.sleep(0)
            peer.talk.lost()
            for _ in range(5):
                await asyncio.sleep(0)
            assert (peer.got, peer.budget.used) == (b"", 0)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) <= 2

    run(talk())


def test_a_promise_is_answered_when_it_is_kept_and_dropped_where_nobody_waits():
    def made(keep):
        def handler(request):
            promises.append(asyncio.get_running_loop().create_future())
            asyncio.get_running_loop().call_soon(keep, promises[-1])
            return promises[-1]

        return handler

    promises = []
    kept = {
        "/takes_long": (lambda p: p.set_result(lambda: echo(Request("GET", "/", body=b"late"))), 200, b"late"),
        "/takes_long_and_fails": (lambda p: p.set_result(lambda: fail(None)), 500, b"log has it"),
        "/refuses": (lambda p: p.set_exception(NotServed("it", [])), 404, b"not served here"),
        "/fails": (lambda p: p.set_exception(ZeroDivisionError("secret")), 500, b"log has it"),
        "/is_no_response": (lambda p: p.set_result("text"), 500, b"log has it"),
        "/is_cancelled": (lambda p: p.cancel(), 500, b"log has it"),
    }

    async def talk():
        router = Router()
        router.add("GET", "/never", made(lambda promise: None))
        for path, (keep, _, _) in kept.items():
            router.add("GET", path, made(keep))
        with Peer(router) as peer:
            for path, (_, status, text) in kept.items():
                before = len(peer.whole())
                peer.send(request(path=path))
                while len(peer.whole()) == before:
                    await asyncio.sleep(0.001)
                answer = peer.whole()[-1]
                assert answer.status == status
                assert text in answer.body
            peer.send(request(path="/never"))
            peer.talk.lost()
            assert promises[-1].cancelled()

    run(talk())


def test_a_task_that_a_stranger_cancels_is_answered_all_the_same():
    async def wait(request):
        await asyncio.Event().wait()

    async def talk():
        router = Router()
        router.add("GET", "/", wait)
        with Peer(router) as peer:
            peer.send(request(path="/"))
            await asyncio.sleep(0)
            peer.talk._task.cancel()
            assert [r.status for r in await peer.answered(1)] == [500]

    run(talk())


# ---- malformed requests: each of these has been two different requests to two different servers ----

P = "POST /echo HTTP/1.1\r\nHost: here\r\n"
TE = "Transfer-Encoding: chunked\r\n"
MALFORMED = {
    "length and chunks": P + "Content-Length: 4\r\n" + TE + "\r\n0\r\n\r\n",
    "chunks and length": P + TE + "Content-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": P + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
    "the same length twice": P + "Content-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    "the same length in other letters": P + "Content-Length: 1\r\ncontent-length: 1\r\n\r\nx",
    "a list of lengths": P + "Content-Length: 1, 1\r\n\r\nx",
    "a signed length": P + "Content-Length: +1\r\n\r\nx",
    "a negative length": P + "Content-Length: -1\r\n\r\nx",
    "an empty length": P + "Content-Length: \r\n\r\n",
    "a length with a space in it": P + "Content-Length: 1 1\r\n\r\nx",
    "a hexadecimal length": P + "Content-Length: 0x1\r\n\r\nx",
    "a length with an underscore": P + "Content-Length: 1_0\r\n\r\n0123456789",
    "a length with other digits": P + "Content-Length: \xb2\r\n\r\nxx",
    "a length beyond all bounds": P + "Content-Length: 99999999999999999999\r\n\r\n",
    "a length that is no number": P + "Content-Length: one\r\n\r\nx",
    "a space before the colon": P + "Content-Length : 1\r\n\r\nx",
    "a tab before the colon": P + "Content-Length\t: 1\r\n\r\nx",
    "a space before the name": P + "X: y\r\n Content-Length: 1\r\n\r\nx",
    "a space before the first name": "GET /echo HTTP/1.1\r\n Host: here\r\n\r\n",
    "a folded line": P + "X: y\r\n z\r\n\r\n",
    "a folded line with a tab": P + "Transfer-Encoding:\r\n\tchunked\r\n\r\n0\r\n\r\n",
    "no colon": P + "Content-Length 1\r\n\r\nx",
    "an empty name": P + ": 1\r\n\r\n",
    "a name with other characters": P + "Content\x80Length: 1\r\n\r\nx",
    "chunked twice": P + TE + TE + "\r\n0\r\n\r\n",
    "chunked twice in a line": P + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "gzip, chunked": P + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked, identity": P + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "identity": P + "Transfer-Encoding: identity\r\nContent-Length: 1\r\n\r\nx",
    "an empty coding": P + "Transfer-Encoding:\r\n\r\n0\r\n\r\n",
    "a coding that looks like chunked": P + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding with a vertical tab": P + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a coding with a NUL": P + "Transfer-Encoding: chunked\0\r\n\r\n0\r\n\r\n",
    "a coding in quotes": P + 'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "a coding with a parameter": P + "Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": "POST /echo HTTP/1.0\r\n" + TE + "\r\n0\r\n\r\n",
    "bare LF everywhere": "GET /echo HTTP/1.1\nHost: here\n\n",
    "bare LF after the request line": "GET /echo HTTP/1.1\nHost: here\r\n\r\n",
    "bare LF after a field": P + "X: y\nContent-Length: 1\r\n\r\nx",
    "bare LF at the end": "GET /echo HTTP/1.1\r\nHost: here\r\n\n",
    "bare CR in a value": P + "X: y\rContent-Length: 1\r\n\r\nx",
    "bare CR after a field": P + "X: y\r\r\n\r\n",
    "NUL in a value": P + "X: a\0b\r\n\r\n",
    "a control character in a value": P + "X: a\x01b\r\n\r\n",
    "DEL in a value": P + "X: a\x7fb\r\n\r\n",
    "NUL in a name": P + "X\0: b\r\n\r\n",
    "NUL in the target": "GET /echo\0 HTTP/1.1\r\nHost: here\r\n\r\n",
    "no host": "GET /echo HTTP/1.1\r\n\r\n",
    "two hosts": "GET /echo HTTP/1.1\r\nHost: here\r\nHost: there\r\n\r\n",
    "the same host twice": "GET /echo HTTP/1.1\r\nHost: here\r\nHOST: here\r\n\r\n",
    "two hosts in HTTP/1.0": "GET /echo HTTP/1.0\r\nHost: here\r\nHost: there\r\n\r\n",
    "a list of hosts": "GET /echo HTTP/1.1\r\nHost: here, there\r\n\r\n",
    "a host with a path": "GET /echo HTTP/1.1\r\nHost: here/there\r\n\r\n",
    "a host with a user": "GET /echo HTTP/1.1\r\nHost: me@here\r\n\r\n",
    "an address with a user": "GET http://me@here/echo HTTP/1.1\r\nHost: here\r\n\r\n",
    "an address without host": "GET http:///echo HTTP/1.1\r\nHost: here\r\n\r\n",
    "an address of another kind": "GET ftp://here/echo HTTP/1.1\r\nHost: here\r\n\r\n",
    "a target that is no path": "GET echo HTTP/1.1\r\nHost: here\r\n\r\n",
    "a star for GET": "GET * HTTP/1.1\r\nHost: here\r\n\r\n",
    "a fragment": "GET /echo#x HTTP/1.1\r\nHost: here\r\n\r\n",
    "a target with other characters": "GET /\xff HTTP/1.1\r\nHost: here\r\n\r\n",
    "two spaces": "GET  /echo HTTP/1.1\r\nHost: here\r\n\r\n",
    "two spaces before the version": "GET /echo  HTTP/1.1\r\nHost: here\r\n\r\n",
    "a tab": "GET\t/echo HTTP/1.1\r\nHost: here\r\n\r\n",
    "a space at the end of the line": "GET /echo HTTP/1.1 \r\nHost: here\r\n\r\n",
    "a space before the method": " GET /echo HTTP/1.1\r\nHost: here\r\n\r\n",
    "a space in the target": "GET /echo HTTP/1.1 HTTP/1.1\r\nHost: here\r\n\r\n",
    "no target": "GET HTTP/1.1\r\nHost: here\r\n\r\n",
    "no version": "GET /echo\r\n\r\n",
    "a version in small letters": "GET /echo http/1.1\r\nHost: here\r\n\r\n",
    "a version with more digits": "GET /echo HTTP/1.10\r\nHost: here\r\n\r\n",
    "a version that is not HTTP": "GET /echo ICY/1.1\r\nHost: here\r\n\r\n",
    "a method that is no token": "G@T /echo HTTP/1.1\r\nHost: here\r\n\r\n",
    "two empty lines": "\r\n\r\nGET /echo HTTP/1.1\r\nHost: here\r\n\r\n",
    "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no chunk size": P + TE + "\r\n\r\n",
    "a chunk size that is no number": P + TE + "\r\nx\r\n",
    "a signed chunk size": P + TE + "\r\n+1\r\nx\r\n0\r\n\r\n",
    "a negative chunk size": P + TE + "\r\n-1\r\nx\r\n0\r\n\r\n",
    "a chunk size with 0x": P + TE + "\r\n0x1\r\nx\r\n0\r\n\r\n",
    "a chunk size with an underscore": P + TE + "\r\n1_0\r\nx\r\n0\r\n\r\n",
    "a space before a chunk size": P + TE + "\r\n 1\r\nx\r\n0\r\n\r\n",
    "a space after a chunk size": P + TE + "\r\n1 \r\nx\r\n0\r\n\r\n",
    "a chunk size with too many digits": P + TE + "\r\n00000000000000001\r\nx\r\n0\r\n\r\n",
    "bare LF after a chunk size": P + TE + "\r\n1\nx\r\n0\r\n\r\n",
    "bare CR after a chunk size": P + TE + "\r\n1\rx\r\n0\r\n\r\n",
    "bare LF in a chunk extension": P + TE + "\r\n1;a\nx\r\n0\r\n\r\n",
    "NUL in a chunk extension": P + TE + "\r\n1;a\0\r\nx\r\n0\r\n\r\n",
    "bare LF after a chunk": P + TE + "\r\n1\r\nx\n0\r\n\r\n",
    "a chunk longer than its size": P + TE + "\r\n1\r\nxy\r\n0\r\n\r\n",
    "a chunk shorter than its size": P + TE + "\r\n3\r\nx\r\n0\r\n\r\n",
    "bare LF at the end of the chunks": P + TE + "\r\n0\n\n",
    "a trailer without colon": P + TE + "\r\n0\r\nX\r\n\r\n",
    "a space before a trailer": P + TE + "\r\n0\r\n X: y\r\n\r\n",
    "bare LF in a trailer": P + TE + "\r\n0\r\nX: y\nZ: z\r\n\r\n",
    "NUL in a trailer": P + TE + "\r\n0\r\nX: \0\r\n\r\n",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_answered_400_and_nothing_after_it_is_read(case):
    data = MALFORMED[case].encode("latin-1")
    smuggled = data + request("GET", "/facts", None, "X-Smuggled: yes") * 2
    for size in (len(smuggled), 1, 3):
        with Peer() as peer:
            peer.send(request())
            peer.send(*(smuggled[at : at + size] for at in range(0, len(smuggled), size)))
            first, bad, *more = peer.said()
            assert (first.status, bad.status, more) == (200, 400, [])
            assert bad.headers["connection"] == "close"
            assert json.loads(bad.body).keys() == {"error"}
            assert peer.talk.closing


VALID = {
    "spaces around a length": request("POST", "/echo", None, "Content-Length: \t 1 \t") + b"x",
    "zeros before a length": request("POST", "/echo", None, "Content-Length: 01") + b"x",
    "another case of chunked": request("POST", "/echo", None, "transfer-encoding:  Chunked ") + b"1\r\nx\r\n0\r\n\r\n",
    "zeros before a chunk size": request("POST", "/echo", None, "Transfer-Encoding: chunked")
    + b"0001\r\nx\r\n00\r\n\r\n",
    "a value of other characters": request("POST", "/echo", b"x", 'X: \xe9\t;,"\\'),
    "an empty host": request("POST", "/echo", b"x", "Host:", host=False),
    "a host with brackets": request("POST", "/echo", b"x", "Host: [::1]:80", host=False),
    "HTTP/1.0 without host": request("POST", "/echo", b"x", version="1.0", host=False),
    "a name of other characters": request("POST", "/echo", b"x", "!#$%&'*+-.^_`|~09azAZ: y"),
}


@pytest.mark.parametrize("case", VALID)
def test_what_is_unusual_but_right_is_answered(case):
    assert [(r.status, r.body) for r in exchange(VALID[case])] == [(200, b"x")]


# ---- properties ----

FIELDS = st.lists(
    st.sampled_from(["X-A: b", "x-a:c", "Accept: */*", "Connection: keep-alive", "User-Agent: some client/1.0"]),
    max_size=3,
)
BODIES = st.one_of(st.binary(max_size=40), st.integers(1, 300).map(lambda times: b"\r\n0\r\n\r\n" * times))
PATHS = st.sampled_from(["/echo", "/slow", "/facts", "/pieces", "/through", "/sum", "/nowhere", "/refuse", "/nothing"])


@st.composite
def valid_request(draw):
    path, fields = draw(PATHS), draw(FIELDS)
    method = "POST" if path in ("/through", "/sum") else draw(st.sampled_from(["GET", "POST", "HEAD"]))
    kind = draw(st.sampled_from(["none", "length", "chunks", "gzip"]))
    if kind == "none":
        return method, request(method, path, None, *fields)
    body = draw(BODIES)
    if kind == "length":
        return method, request(method, path, body, *fields)
    if kind == "gzip":
        return method, request(method, path, gzip.compress(body, mtime=0), *fields, "Content-Encoding: gzip")
    if path == "/nowhere":  # what it does not read in chunks, it refuses
        path = "/echo"
    parts = draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4))
    extension, trailers = draw(st.sampled_from([b"", b";a=b"])), draw(st.sampled_from([b"", b"X-T: 1\r\n"]))
    return "POST", chunked(path, *parts, fields=fields, extension=extension, trailers=trailers)


def whole_conversation(pieces_of, methods):
    async def talk():
        with Peer() as peer:
            for piece in pieces_of:
                peer.send(piece)
                await asyncio.sleep(0)
            await peer.until(lambda: peer.talk.idle)
            answers = peer.said(*methods)
            assert not peer.talk.closing
            return answers

    return run(talk())


@settings(max_examples=60, deadline=None)
@given(st.lists(valid_request(), min_size=1, max_size=5), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_a_conversation_is_the_same_in_any_split(requests, cuts):
    data, methods = b"".join(sent for _, sent in requests), [method for method, _ in requests]
    expected = whole_conversation([data], methods)
    assert len(expected) == len(requests)
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    assert whole_conversation([data[a:b] for a, b in itertools.pairwise(bounds)], methods) == expected
    if len(data) < 1_500:
        assert whole_conversation([bytes([byte]) for byte in data], methods) == expected


SEEDS = [
    request("POST", "/echo", b"hello", "Connection: keep-alive"),
    chunked("/echo", b"one", b"two", trailers=b"X: y\r\n", extension=b";a"),
    request("POST", "/count", gzip.compress(TEXT), "Content-Encoding: gzip", "Expect: 100-continue"),
    chunked("/through", b"part", b"and part"),
    request("GET", "/pieces", None, "Accept-Encoding: gzip"),
    request("HEAD", "http://here/text", None, "Upgrade: h2c"),
    request("POST", "/slow", b"x" * 300),
    request("POST", "/small", b"x" * 300),
    request(version="2.0"),
]
WORDS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n",
    b"HTTP/1.0", b"HTTP/2.0", b"CONNECT", b"Connection: close\r\n", b"ffffffffffffffff\r\n", b"\xff" * 50,
    b"Expect: 100-continue\r\n", b"Content-Encoding: gzip\r\n",
]  # fmt: skip


def mutated(rng):
    seeds = rng.choices(SEEDS, k=rng.randint(1, 4))
    if rng.random() < 0.5:
        seeds.append(rng.choice([case.encode("latin-1") for case in MALFORMED.values()]))
    data = bytearray(b"".join(seeds))
    for _ in range(rng.choice([0, 1, 1, 2, 5, 20])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at:at] = rng.choice(WORDS)
            case 1:
                del data[at : at + rng.randint(1, 20)]
            case 2:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.randint(1, 100)]
    return bytes(data)


def fuzz(rng, data):
    """One conversation with everything that can happen to it. Its bytes and objects are gone afterwards."""

    async def talk():
        peer = Peer(header_bytes=2_000, body_bytes=10_000, connection_bytes=100_000)
        now = 0.0
        at = 0
        while at < len(data):
            size = rng.choice([1, 2, 10, 100, 1_000, len(data)])
            peer.send(data[at : at + size])
            at += size
            match rng.randrange(12):
                case 0:
                    peer.tick(now := now + rng.choice([0.5, 30, 300]))
                case 1:
                    peer.talk.pause()
                case 2 | 3:
                    peer.talk.resume()
                case 4 | 5 | 6:
                    await asyncio.sleep(0)
                case 7:
                    if rng.random() < 0.05:
                        peer.talk.drain()
                        peer.take()
            assert peer.budget.used < 200_000
        peer.talk.resume()
        for _ in range(rng.choice([0, 1, 20])):
            await asyncio.sleep(0)
        peer.take()
        answers = re.findall(rb"HTTP/1\.1 ([0-9]{3}) [A-Z]", peer.got)
        peer.talk.lost()
        assert peer.budget.used == 0
        return answers

    return talk()


def test_random_bytes_and_mutations_never_raise_and_never_keep_anything(caplog):
    caplog.set_level("CRITICAL")
    statuses = set()

    async def many():
        for seed in range(3_000):
            rng = random.Random(seed)
            data = rng.randbytes(rng.randint(1, 3_000)) if seed % 10 == 0 else mutated(rng)
            statuses.update(await fuzz(rng, data))
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) <= 2

    run(many(), 100)
    assert {b"200", b"400", b"404", b"408", b"413", b"501", b"505"} <= statuses


def read_here(data):
    """The requests that a server of ours sees in `data`: method, target, body."""
    seen = []

    class Everywhere(Router):
        def match(self, method, path):
            return Route(tell), {}

    def tell(request):
        seen.append((request.method, request.path + (request.query and f"?{request.query}"), request.body or b""))
        return Response()

    with Peer(Everywhere()) as peer:
        peer.send(data)
    return seen


def read_by_h11(data):
    """The same as h11 sees them."""
    connection, seen = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20), []
    connection.receive_data(data)
    with contextlib.suppress(h11.ProtocolError):
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                target = re.sub(r"(?i)^https?://[^/?]+", "", event.target.decode()) or "/"
                method, body = event.method.decode(), b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                seen.append((method, target, body))
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                connection.start_next_cycle()
            else:
                break
    return seen


def test_where_requests_begin_and_end_another_parser_says_the_same():
    both = 0
    for seed in range(4_000):
        data = mutated(random.Random(seed)).replace(b"gzip", b"identity")
        ours, theirs = read_here(data), read_by_h11(data)
        # Either may be the stricter one, and stop.
        agreed = min(len(ours), len(theirs))
        assert ours[:agreed] == theirs[:agreed], data
        both += agreed
    assert both > 3_000


def test_memory_stays_flat_over_many_conversations(caplog):
    caplog.set_level("CRITICAL")

    async def many(seeds):
        for seed in seeds:
            rng = random.Random(seed)
            await fuzz(rng, mutated(rng))

    run(many(range(300)))
    gc.collect()
    tracemalloc.start()
    try:
        run(many(range(300)))
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(3):
            run(many(range(300)))
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 200_000
    finally:
        tracemalloc.stop()


def test_an_idle_connection_costs_little_and_keeps_nothing_of_what_it_received():
    router, limits, budget = server(), Limits(), Budget(1 << 30)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        talks = []
        for _ in range(200):
            talk = Http1(router, limits, budget, "", lambda: None)
            talk.receive(request("POST", "/echo", bytes(100_000)))
            talk.take()
            talks.append(talk)
        assert (tracemalloc.get_traced_memory()[0] - before) / len(talks) < 2_000
    finally:
        tracemalloc.stop()


# ---- real clients ----

needs = lambda tool: pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool}")  # noqa: E731


@contextlib.asynccontextmanager
async def listening(**limits):
    listener = Listener({}, server(), Limits(**limits))
    try:
        yield await listener.start("127.0.0.1:0"), listener
    finally:
        await listener.drain(1)
        assert listener.budget.used == 0


async def ran(*command, stdin=b""):
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin), 150)
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode, out, err.decode()


def with_curl(*arguments, stdin=b"", **limits):
    """Run curl against a server of ours; {} in its arguments stands for the address."""

    async def talk():
        async with listening(**limits) as (address, _):
            place = f"http://{address}"
            return await ran("curl", "-sSv", "-m", "100", *(a.replace("{}", place) for a in arguments), stdin=stdin)

    return run(talk())


@needs("curl")
def test_curl_keeps_its_connection():
    code, out, err = with_curl("-d", "one", "{}/echo", "--next", "-d", "two", "{}/slow", "--next", "{}/pieces")
    assert (code, out) == (0, b"onetwoonetwothree" + bytes(20_000))
    assert err.count("Re-using existing connection") == 2


@needs("curl")
def test_curl_speaks_http_1_0():
    code, out, _ = with_curl("--http1.0", "-d", "one", "{}/echo", "{}/pieces")
    assert (code, out) == (0, b"oneonetwothree" + bytes(20_000))


@needs("curl")
def test_curl_uploads_in_chunks():
    body = random.Random(3).randbytes(1_000_000)
    for path in ("/echo", "/slow", "/through"):
        arguments = ("-H", "Transfer-Encoding: chunked", "--data-binary", "@-", "{}" + path)
        code, out, err = with_curl(*arguments, stdin=body)
        assert (code, out == body) == (0, True), err


@needs("curl")
def test_curl_waits_for_100_continue_with_a_large_body():
    body = random.Random(4).randbytes(3_000_000)
    arguments = ("-H", "Expect: 100-continue", "--expect100-timeout", "20", "--data-binary", "@-")
    code, out, err = with_curl(*arguments, "{}/echo", stdin=body)
    assert (code, out == body) == (0, True), err
    assert "HTTP/1.1 100 Continue" in err
    code, out, err = with_curl(*arguments, "{}/small", stdin=body)
    assert (code, json.loads(out).keys()) == (0, {"error"}), err
    assert "HTTP/1.1 413" in err
    assert "100 Continue" not in err


@needs("curl")
def test_curl_reads_the_refusal_of_a_body_it_has_begun_to_send():
    code, out, err = with_curl("-H", "Expect:", "--data-binary", "@-", "{}/small", stdin=bytes(3_000_000))
    assert "HTTP/1.1 413" in err
    assert (code, json.loads(out).keys()) == (0, {"error"}), err


@needs("curl")
def test_curl_decompresses_and_asks_for_heads():
    code, out, err = with_curl("--compressed", "{}/text")
    assert (code, out) == (0, TEXT)
    assert "content-encoding: gzip" in err
    code, out, err = with_curl("-I", "{}/text", "{}/pieces")
    assert code == 0
    assert out.count(b"HTTP/1.1 200 OK") == 2
    assert f"content-length: {len(TEXT)}" in err


@needs("curl")
def test_curl_that_would_like_to_upgrade_is_answered_as_it_is():
    code, out, err = with_curl("--http2", "{}/echo", "-d", "old")
    assert (code, out) == (0, b"old"), err
    assert "101" not in err


@needs("wrk")
def test_wrk_gets_an_answer_to_every_request():
    async def talk():
        async with listening() as (address, listener):
            code, out, err = await ran("wrk", "-t1", "-c20", "-d1s", "--timeout", "60s", f"http://{address}/echo")
            assert code == 0, err
            assert "Non-2xx" not in out.decode()
            assert "Socket errors" not in out.decode()
            assert int(re.search(rb"(\d+) requests in", out)[1]) > 0
            assert listener.budget.used == 0

    run(talk())


def test_a_request_object_is_what_http_2_makes_too():
    answer = ROUTER.answer(Request("POST", "/echo", body=b"abc"))
    assert answer.body == b"abc"
