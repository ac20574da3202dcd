"""HTTP/1.1 (RFC 9110, RFC 9112) for a listener: bytes in, bytes out. HTTP/1.0 is answered in its own terms.

    receive ──▶ HEAD ──▶ BODY ──▶ WAIT ──▶ HEAD …        one request at a time
                  │        │        │
                  └────────┴────────┴───▶ DEAF           nothing more is read

* HEAD: a head is looked for. A head seen before is one dict look-up (`Router.memory`), route included: a client repeats
  itself. A new one passes `_HEAD`, a grammar as narrow as RFC 9112 writes it, and then `httptools`: what either refuses
  is refused. Of llhttp's leniencies these end here: several spaces and HTTP/0.9 in the request line, empty lines before
  it, fragments, missing or repeated Host, transfer codings before `chunked`, Connection options it does not see.
* BODY: the body is cut out here and not by the parser, which cannot say where in its input a message ended, nor stop
  there. So what one message is is decided in one place, and pipelined requests wait as bytes.
* WAIT: the handler has the request. Pipelined requests are answered one after the other: the second may depend on what
  the first did, and whoever pipelines without reading costs no more than the bytes sent.
* DEAF: the connection closes after what is queued. So it does where the answer is known before the body is all here,
  since what is on its way would have to be read. The listener lets that in and throws it away, lest the answer be lost.

A malformed request is answered with 400, `connection: close`, and nothing after it is looked at: what looks malformed
is often two requests to someone else. Upgrades are not made (RFC 9110 §7.8 lets a server ignore the wish), CONNECT and
TRACE are not known.

All methods are called on a running event loop; none but `take` gives anything back, and none raises.
"""

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools

from cube.errors import Overloaded
from cube.rpc.calls import Buffer
from cube.rpc.limits import Budget, Limits
from cube.rpc.router import (
    METHODS,
    Headers,
    HttpError,
    Inflater,
    Made,
    Request,
    Response,
    Route,
    Router,
    buffers,
    internal,
    is_streamed,
    refusal,
    too_large,
)

log = logging.getLogger(__name__)

HEAD, WAIT, BODY, DEAF = range(4)  # up to WAIT no byte of the current request is missing

# Heads remembered by a router. None is before it comes a second time, and until then only its hash is kept: many carry
# something that is never seen again. Long ones, counting 32 for each field, are never.
MEMORY_HEADS, MEMORY_HASHES, MEMORY_HEAD_BYTES = 512, 8192, 4096
TURNS = 64  # pipelined requests answered before other connections have their turn
AHEAD = 64 << 10  # bytes: who is further ahead waits: a peer (`full`), or a handler that makes pieces
ENOUGH = 1 << 20  # bytes of answers to pipelined requests: they are written before the next is begun
JOINED = 16 << 10  # bytes: a shorter reply is joined to its head, one copy being cheaper than a second buffer to write
SMALL = 4 << 10  # bytes: shorter pieces of a body are collected, as an object each would cost more than they hold
SKIPPED = 64 << 10  # bytes: a shorter body is read for the connection's sake even where the answer needs none
CHUNK_LINE = 256  # bytes of a line with a chunk's size and extensions

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_FIELD = rb"%b++:[\t -~\x80-\xff]*+" % _TOKEN
_HEAD = re.compile(rb"(%b++) ([!\"$-~]++) HTTP/([0-9])\.([0-9])\r\n(?:%b\r\n)*+\r\n" % (_TOKEN, _FIELD))
_FIELD_LINE = re.compile(_FIELD)
_START_LINE = re.compile(rb"%b++ [!\"$-~]++ HTTP/[0-9]\.[0-9]" % _TOKEN)
# What no head may hold, so that it need not be waited for to its end: a line end or control character out of place.
_FOREIGN = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ABSOLUTE = re.compile(r"(?i)https?://([^/?@]+)(?:(/[^?]*)?(?:\?(.*))?)")
_AUTHORITY = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+,;=%:\[\]]*")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(;[\t -~\x80-\xff]*)?")
_LOOKED_AT = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"content-encoding")
)
_OURS = frozenset(("connection", "content-length", "date", "keep-alive", "transfer-encoding", "upgrade"))
_BODILESS = frozenset((204, 304))
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_REPLY_NAME = re.compile(_TOKEN.decode() + "+")
_REPLY_VALUE = re.compile(r"[\t -~\x80-\xff]*")


class _Head:
    """A request's head, read. Never changed: the next request with the same bytes has it too."""

    __slots__ = (
        "args", "as_usual", "chunked", "encoding", "expects", "headers", "is_11", "keep_alive", "length", "method",
        "path", "query", "route", "simple", "size",
    )  # fmt: skip

    def __init__(self) -> None:
        self.method, self.path, self.query = "GET", "/", ""
        self.headers: Mapping[str, str] = {}
        self.is_11 = True
        self.keep_alive = False
        self.length: int | None = None  # None: no Content-Length
        self.chunked = False
        self.encoding = ""  # Content-Encoding, where it is not identity
        self.expects = ""  # Expect
        self.size = 0  # as Limits.header_bytes counts
        self.route: Route
        self.args: Mapping[str, str]
        self.simple = False  # has no body, or one that is handed over as it came
        self.as_usual = True  # HTTP/1.1 and not HEAD

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)


_NO_HEAD = _Head()  # what is answered when there was none


class _Fields:
    """What httptools calls while it parses a head."""

    __slots__ = ("fields", "target")

    def __init__(self) -> None:
        self.target = b""
        self.fields: list[tuple[bytes, bytes]] = []

    def on_url(self, target: bytes) -> None:
        self.target = target

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))


def _read_head(raw: bytes, router: Router) -> _Head:
    """Read a head, empty line included. Raises HttpError."""
    match = _HEAD.fullmatch(raw)
    if match is None:
        raise HttpError(400, _why_malformed(raw))
    major, minor = match.group(3, 4)
    if major != b"1" or minor not in b"01":
        raise HttpError(505, f"request: found HTTP/{major.decode()}.{minor.decode()}, expected HTTP/1.1 or HTTP/1.0")
    head = _Head()
    head.method = match[1].decode()
    if head.method not in METHODS:
        raise HttpError(501, f"request: found method {head.method[:40]}, expected one of {', '.join(METHODS)}")
    parsed = _Fields()
    try:
        httptools.HttpRequestParser(parsed).feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # thrown where a client would like to upgrade: it is answered as if it had not said so
    except httptools.HttpParserError as error:
        raise HttpError(400, f"request: found a head that does not parse ({error})") from None
    head.is_11 = minor == b"1"
    head.as_usual = head.is_11 and head.method != "HEAD"
    head.size = len(raw) + 32 * len(parsed.fields)
    head.headers = Headers(parsed.fields)
    _read_target(head, parsed.target.decode("ascii"))
    _read_fields(head, parsed.fields)
    head.route, head.args = router.match(head.method, head.path)
    head.simple = (
        not (head.chunked or head.encoding or head.expects or head.route.stream) and head.route.max_body_bytes is None
    )
    return head


def _read_target(head: _Head, target: str) -> None:
    if target.startswith("/"):
        head.path, _, head.query = target.partition("?")
    elif target == "*" and head.method == "OPTIONS":
        head.path = target
    elif (absolute := _ABSOLUTE.fullmatch(target)) and _AUTHORITY.fullmatch(absolute[1].encode()):
        head.path = absolute[2] or ("*" if head.method == "OPTIONS" and absolute[3] is None else "/")
        head.query = absolute[3] or ""
    else:
        raise HttpError(400, f"request: found target {target[:200]!r}, expected a path or an http address")


def _read_fields(head: _Head, fields: list[tuple[bytes, bytes]]) -> None:
    """What a message consists of, and what else the transport must know. Strict: RFC 9112 §6.3, §11.2."""
    names = [name.lower() for name, _ in fields]
    values = {}
    for name in _LOOKED_AT.intersection(names):
        if names.count(name) == 1:
            value = fields[names.index(name)][1]
        else:  # what may not be repeated has no grammar that lets ", " pass
            value = b", ".join([fields[at][1] for at, other in enumerate(names) if other == name])
        values[name] = value.strip(b" \t")
    host = values.get(b"host")
    if (host is None and head.is_11) or (host and not _AUTHORITY.fullmatch(host)):
        raise HttpError(400, f"host: found {host and host[:200]!r}, expected one name or address, with or without port")
    length, coding = values.get(b"content-length"), values.get(b"transfer-encoding")
    if length is not None:
        if not length.isdigit() or len(length) > 18:
            raise HttpError(400, f"content-length: found {length[:200]!r}, expected one number")
        head.length = int(length)
    if coding is not None:
        if coding.lower() != b"chunked" or not head.is_11 or length is not None:
            raise HttpError(400, "transfer-encoding: expected chunked, once, in HTTP/1.1, without content-length")
        head.chunked = True
    options = {option.strip(b" \t") for option in values.get(b"connection", b"").lower().split(b",")}
    head.keep_alive = b"close" not in options and (head.is_11 or b"keep-alive" in options)
    if head.is_11:  # RFC 9110 §10.1.1: to be ignored in HTTP/1.0
        head.expects = values.get(b"expect", b"").decode("latin-1").lower()
    encoding = values.get(b"content-encoding", b"").decode("latin-1")
    head.encoding = "" if encoding.lower() == "identity" else encoding


def _why_malformed(raw: bytes) -> str:
    """The first line of a head that is not as it must be."""
    lines = raw.split(b"\r\n")
    for number, line in enumerate(lines[:-2]):
        if not (_FIELD_LINE if number else _START_LINE).fullmatch(line):
            expected = "name: value" if number else "METHOD target HTTP/1.1"
            return f"request, line {number + 1}: found {line[:100]!r}, expected {expected!r}"
    return "request: found an empty one"


class _Fixed:
    """A body of known length."""

    __slots__ = ("done", "left")

    def __init__(self, length: int):
        self.left, self.done = length, not length

    def feed(self, data: bytes, at: int, sink: Callable[[bytes], None]) -> int:
        """Give what `data` holds of the body from `at` on to `sink`; returns where the body, or data, ends."""
        piece = data[at : at + self.left]
        self.left -= len(piece)
        self.done = not self.left
        if piece:
            sink(piece)
        return at + len(piece)


class _Chunked:
    """A body in chunks (RFC 9112 §7.1). Extensions and trailers are bounded and ignored."""

    __slots__ = ("_in_trailers", "_limit", "_spare", "_total", "_within", "done", "left")

    def __init__(self, limit: int, spare: int):
        """limit: bytes of the body. spare: bytes of extensions and trailers."""
        self.left = 0  # of the current chunk
        self._within = False  # the line end after the current chunk is still to come
        self._in_trailers = False
        self._limit, self._spare, self._total = limit, spare, 0
        self.done = False

    def feed(self, data: bytes, at: int, sink: Callable[[bytes], None]) -> int:
        """As _Fixed.feed; what it leaves is the beginning of a line. Raises HttpError 400 and 413."""
        while not self.done:
            if self.left:
                piece = data[at : at + self.left]
                if not piece:
                    return at
                self.left -= len(piece)
                at += len(piece)
                sink(piece)
                continue
            end = data.find(b"\r\n", at)
            if self._within:
                if end != at:
                    if data[at:] in (b"", b"\r"):
                        return at
                    raise HttpError(400, "body: found more than a chunk's size says, expected a line end")
                self._within = False
                at = end + 2
                continue
            most = self._spare if self._in_trailers else CHUNK_LINE
            if (len(data) if end < 0 else end) - at > most:
                raise HttpError(400, f"body: found a line between chunks of more than {most} bytes")
            if end < 0:
                if _FOREIGN.search(data, at):
                    raise HttpError(400, "body: found a control character in a line between chunks")
                return at
            self._read_line(data[at:end])
            at = end + 2
        return at

    def _read_line(self, line: bytes) -> None:
        if self._in_trailers:
            self._spare -= len(line)
            if not line:
                self.done = True
            elif not _FIELD_LINE.fullmatch(line):
                raise HttpError(400, f"trailers: found {line[:100]!r}, expected 'name: value'")
            return
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise HttpError(400, f"body: found {line[:100]!r}, expected a chunk's size")
        self._spare -= len(match[2] or b"")
        if self._spare < 0:
            raise HttpError(400, "body: found more bytes of chunk extensions than a head may have")
        self.left = int(match[1], 16)
        self._total += self.left
        if self._total > self._limit:
            raise too_large(self._limit)
        self._within = bool(self.left)
        self._in_trailers = not self.left


class _Pieces:
    """Bytes in the order they came; small ones together."""

    __slots__ = ("_pieces", "size")

    def __init__(self) -> None:
        self._pieces: deque[bytes | bytearray] = deque()
        self.size = 0

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        if len(piece) >= SMALL:
            self._pieces.append(piece)
        elif self._pieces and isinstance(last := self._pieces[-1], bytearray) and len(last) < AHEAD:
            last += piece
        else:
            self._pieces.append(bytearray(piece))

    def pop(self) -> bytes:
        piece = self._pieces.popleft()
        self.size -= len(piece)
        return bytes(piece)

    def joined(self) -> bytes:
        return b"".join(self._pieces)


class _Stream:
    """The body of a request whose handler reads it as it arrives."""

    __slots__ = ("_consumed", "_ended", "_error", "_inflater", "_inflating", "_pieces", "_waiter")

    def __init__(self, inflater: Inflater | None, consumed: Callable[[], None]):
        """consumed: called after the handler has taken bytes."""
        self._pieces = _Pieces()
        self._inflater, self._inflating = inflater, False
        self._consumed: Callable[[], None] | None = consumed
        self._ended = False
        self._error: HttpError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def size(self) -> int:
        """Bytes that wait for the handler."""
        return self._pieces.size

    def put(self, piece: bytes) -> None:
        self._pieces.add(piece)
        self._notify()

    def end(self) -> None:
        self._ended = True
        self._notify()

    def fail(self, error: HttpError) -> None:
        """The rest will not come: the handler gets `error` after what is there."""
        if self._error is None:
            self._error = error
            self._notify()

    def abandon(self) -> None:
        """Nobody is to read on."""
        self._pieces, self._consumed = _Pieces(), None
        self.fail(HttpError(400, "body: read after the answer"))

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> "_Stream":
        return self

    async def __anext__(self) -> bytes:
        while True:
            if piece := self._next():
                return piece
            if self._error is not None:
                raise self._error
            if self._ended and not self._pieces.size and not self._inflating:
                if self._inflater is not None:
                    self._inflater.finish()
                raise StopAsyncIteration
            if not self._pieces.size and not self._inflating:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter

    def _next(self) -> bytes:
        """What there is to give now; may be empty."""
        piece = b""
        if not self._inflating and self._pieces.size:
            piece = self._pieces.pop()
            if self._consumed is not None:
                self._consumed()
        if self._inflater is not None and (piece or self._inflating):
            piece = self._inflater.inflate(piece, AHEAD)
            self._inflating = len(piece) == AHEAD
        return piece


class _Starts:
    """The beginnings of replies' heads, made once a second for each status and type: status line, date, type."""

    __slots__ = ("_date", "_known", "_second")

    def __init__(self) -> None:
        self._second, self._date = 0, b""
        self._known: dict[tuple[int, str], bytes] = {}

    def of(self, status: int, content_type: str) -> bytes:
        """Raises ValueError for what cannot be sent."""
        second = int(time.time())
        if second != self._second:
            self._second, self._date = second, formatdate(second, usegmt=True).encode()
            self._known.clear()
        start = self._known.get((status, content_type))
        if start is None:
            if not 200 <= status <= 599 or not _REPLY_VALUE.fullmatch(content_type):
                raise ValueError(f"response: found status {status} and type {content_type!r}, expected ones to send")
            start = b"HTTP/1.1 %d %b\r\ndate: %b\r\n" % (status, _REASONS.get(status, b""), self._date)
            if status not in _BODILESS:
                start += b"content-type: %b\r\n" % content_type.encode("latin-1")
            if len(self._known) < 256:
                self._known[status, content_type] = start
        return start


_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
_start_of = _Starts().of
_seen_once: set[int] = set()


class Http1:
    """One connection. `full`: the peer is ahead of us; a listener that stops reading until `wake` spares memory."""

    __slots__ = (
        "_at", "_blank", "_body", "_born", "_budget", "_count", "_draining", "_head", "_held", "_inflater", "_keep",
        "_kept", "_limits", "_moved", "_out", "_partial_count", "_partial_since", "_paused", "_peer", "_queued",
        "_reader", "_rest", "_resumed", "_router", "_scanned", "_scheduled", "_state", "_stream", "_task", "_wake",
        "closing", "full", "last_progress",
    )  # fmt: skip

    def __init__(self, router: Router, limits: Limits, budget: Budget, peer: str, wake: Callable[[], None]):
        self._router, self._limits, self._budget, self._peer, self._wake = router, limits, budget, peer, wake
        self.closing = False  # after what take() gives has been written: close the transport
        self.full = False
        self.last_progress = 0.0
        # Input: what is unread begins at _rest[_at]; before _scanned there is no end of a head.
        self._state = HEAD
        self._rest, self._at, self._scanned = b"", 0, 0
        self._blank = False  # the empty line that may come before a request has come
        # The current request.
        self._head: _Head | None = None
        self._reader: _Fixed | _Chunked | None = None
        self._inflater: Inflater | None = None
        self._body: _Pieces | None = None  # of a handler that gets it whole
        self._stream: _Stream | None = None
        self._task: asyncio.Future[Any] | None = None  # owes the answer, or is sending it
        self._kept = 0  # bytes of its body that are here
        self._keep = False  # there may be another request after it
        # Output.
        self._out: list[Buffer] = []
        self._queued = 0  # bytes in _out
        self._paused = False
        self._resumed: asyncio.Future[None] | None = None  # what a stream of pieces waits for
        # Conduct.
        self._scheduled = False  # the pipelined requests that wait are for the loop's next round
        self._draining = False
        self._held = 0  # bytes, as the budget knows
        self._moved = True  # bytes have, since the last tick
        self._born: float | None = None
        self._count = 0  # heads read
        self._partial_count, self._partial_since = -1, 0.0  # which head is not all there, and when that was first seen

    # For the listener.

    @property
    def idle(self) -> bool:
        """No request in flight, nothing to write."""
        return self._state == HEAD and not self._rest and not self._out

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer, in any split."""
        self._moved = True
        if self._state == DEAF:
            return
        if self._rest:
            self._scanned = max(self._scanned - self._at, 0)
            self._rest = self._rest[self._at :] + data
            self._at = 0
            if len(self._rest) > self._limits.connection_bytes:  # `full` has been ignored
                self._rest, self._scanned = b"", 0
                self.drain()
        else:
            self._rest = data
        self._advance()
        self._account()

    def take(self) -> list[Buffer]:
        """What to write now, in order."""
        out = self._out
        if not out:
            return []
        self._moved = True
        self._out, self._queued = [], 0
        if self._resumed is not None and not self._paused:
            self._let_go_on()
        self._account()
        return out

    def pause(self) -> None:
        """The transport has enough to write: no request is begun, and no stream goes on."""
        self._paused = True

    def resume(self) -> None:
        """The transport has room again."""
        self._paused = False
        self._moved = True
        self._let_go_on()
        self._continue()

    def drain(self) -> None:
        """Answer the request that is being received or answered, and close."""
        self._draining = True
        if self._state == HEAD and (not self._rest or self._paused or self._scheduled):
            self._end()
        self._account()

    def tick(self, now: float) -> None:
        """About once a second: end what takes too long."""
        if self._moved:
            self.last_progress, self._moved = now, False
        if self._born is None:
            self._born = now
        quiet = now - self.last_progress
        if self._paused or self._scheduled:
            pass  # the next move is not the peer's; whether it reads, the listener knows
        elif self._state == HEAD:
            self._tick_between_bodies(now, now - self._born, quiet)
        elif self._state == BODY and not self.full and quiet >= self._limits.stall_s:
            self._refuse(HttpError(408, f"body: found nothing of it for {quiet:.0f} s"))
        self._account()

    def _tick_between_bodies(self, now: float, age: float, quiet: float) -> None:
        late = not self._count and age >= self._limits.handshake_s
        if self._rest:
            # The clock of a head does not start anew with each byte of it.
            if self._partial_count != self._count:
                self._partial_count, self._partial_since = self._count, now
            if late or now - self._partial_since >= self._limits.stall_s:
                self._refuse(HttpError(408, "request: its head took too long"))
        elif late or 0 < self._limits.idle_s <= quiet:
            self._end()

    def lost(self) -> None:
        """The transport is gone."""
        self._wake = _nobody
        self._end()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        self._on_answered()
        self._out, self._queued = [], 0
        self._account()

    # Input.

    def _advance(self) -> None:
        """Read and answer as far as the input goes."""
        turns = 0
        try:
            while True:
                if self._state == HEAD:
                    if self._at == len(self._rest) or self._paused or self._scheduled:
                        break
                    if turns == TURNS or self._queued > ENOUGH:
                        self._scheduled = True
                        asyncio.get_running_loop().call_soon(self._continue)
                        break
                    turns += 1
                    if not self._read_request():
                        break
                elif self._state != BODY or not self._read_body():
                    break
        except HttpError as error:
            self._refuse(error)
        if self._at:
            if self._at == len(self._rest):
                self._rest, self._at, self._scanned = b"", 0, 0
            elif self._at > len(self._rest) >> 1:  # not each time: there may be many small requests in it
                self._scanned = max(self._scanned - self._at, 0)
                self._rest, self._at = self._rest[self._at :], 0

    def _continue(self) -> None:
        """Go on with what had to wait, and tell the listener what came of it."""
        was_full = self.full
        self._scheduled = False
        if not self._paused:  # else resume comes here again
            self._advance()
        self._account()
        if self.closing or was_full != self.full or (self._out and not self._paused):
            self._wake()

    def _read_request(self) -> bool:
        """Read a head, and answer at once if nothing more is needed. False: the head is not all there."""
        rest, at = self._rest, self._at
        end = rest.find(b"\r\n\r\n", self._scanned) + 4
        if end < 4:
            return self._wait_for_head()
        raw = rest[at:end]
        head: _Head | None = self._router.memory.get(raw)
        if head is None:
            if self._skip_blank():
                return True
            head = self._learn(raw)
        if head.size > self._limits.header_bytes:
            raise self._too_long(raw)
        self._blank = False
        self._count += 1
        length = head.length or 0
        if (
            not head.simple
            or len(rest) - end < length
            or length > self._limits.body_bytes
            or self._budget.exceeded
        ):  # fmt: skip
            self._at = self._scanned = end
            self._head = head
            self._begin(head)
        else:
            self._at = self._scanned = end + length
            self._call(head, None if head.length is None else rest[end : end + length])
        return True

    def _wait_for_head(self) -> bool:
        if self._skip_blank():
            return True
        rest, at = self._rest, self._at
        if len(rest) - at > self._limits.header_bytes:
            raise self._too_long(rest[at:])
        if _FOREIGN.search(rest, self._scanned):
            raise HttpError(400, _why_malformed(rest[at:] + b"\r\n\r\n"))
        self._scanned = max(at, len(rest) - 3)
        return False

    def _skip_blank(self) -> bool:
        """One empty line before a request is overlooked, for clients that end bodies with it (RFC 9112 §2.2)."""
        if self._blank or not self._rest.startswith(b"\r\n", self._at):
            return False
        self._blank = True
        self._at += 2
        self._scanned = self._at
        return self._at < len(self._rest)

    def _too_long(self, raw: bytes) -> HttpError:
        most = self._limits.header_bytes
        if raw.find(b"\r\n", 0, most) < 0:
            return HttpError(414, f"request: found a first line of more than {most} bytes")
        return HttpError(431, f"request: found a head of more than {most} bytes, counting 32 for each field")

    def _learn(self, raw: bytes) -> _Head:
        if len(raw) > self._limits.header_bytes:
            raise self._too_long(raw)
        head = _read_head(raw, self._router)
        if head.size <= MEMORY_HEAD_BYTES:
            if (hashed := hash(raw)) in _seen_once:
                memory = self._router.memory
                if len(memory) >= MEMORY_HEADS:
                    memory.clear()  # cheaper than to know which of them are in use
                memory[raw] = head
            else:
                if len(_seen_once) >= MEMORY_HASHES:
                    _seen_once.clear()
                _seen_once.add(hashed)
        return head

    def _begin(self, head: _Head) -> None:
        """A request whose body is still to come, or to be looked at. Raises HttpError."""
        route, limits = head.route, self._limits
        limit = limits.body_bytes if route.max_body_bytes is None else route.max_body_bytes
        if not route.stream:
            limit = min(limit, limits.connection_bytes)
        if self._budget.exceeded:
            raise HttpError(Overloaded.wire.http, "too many bytes in flight in this process")
        if head.expects not in ("", "100-continue"):
            raise HttpError(417, f"expect: found {head.expects[:100]!r}, expected 100-continue")
        if not route.reads_body and (head.chunked or head.expects or (head.length or 0) > SKIPPED):
            self._ignore_input()
            self._call(head, None)
            return
        if (head.length or 0) > limit:
            raise too_large(limit)
        inflater = Inflater(head.encoding, limit) if head.encoding and head.has_body else None
        self._reader = _Chunked(limit, limits.header_bytes) if head.chunked else _Fixed(head.length or 0)
        self._state = BODY
        if head.expects and head.has_body and self._at == len(self._rest):
            self._put(_CONTINUE)
        if route.stream:
            self._stream = _Stream(inflater, self._on_consumed)
            self._read_body()  # what is here already: a handler that does not wait for more has seen all of it
            self._call(head, self._stream)
        else:
            self._body, self._inflater = _Pieces(), inflater

    def _read_body(self) -> bool:
        """Read what there is of a body, and answer if that was all. False: more is to come."""
        head, reader, stream = self._head, self._reader, self._stream
        assert head is not None
        assert reader is not None
        if not reader.done:
            self._at = self._scanned = reader.feed(self._rest, self._at, stream.put if stream else self._collect)
        if stream is not None:
            self._kept = stream.size
        if not reader.done:
            return False
        self._state = WAIT
        if stream is not None:
            stream.end()
            return True
        if self._inflater is not None:
            self._inflater.finish()
        assert self._body is not None
        body, self._body = self._body.joined(), None
        self._kept = len(body)
        self._call(head, body if head.chunked or head.length is not None else None)
        return True

    def _collect(self, piece: bytes) -> None:
        if self._inflater is not None:
            piece = self._inflater.inflate(piece)
        assert self._body is not None
        self._body.add(piece)
        self._kept = self._body.size

    def _on_consumed(self) -> None:
        if self._stream is not None:
            self._kept = self._stream.size
            was_full = self.full
            self._account()
            if was_full and not self.full:
                self._wake()

    # Answers.

    def _call(self, head: _Head, body: bytes | _Stream | None) -> None:
        request = Request(head.method, head.path, head.query, head.headers, body, self._peer, head.args)
        answer = head.route.begin(request)
        if isinstance(answer, Response):
            self._respond(head, answer)
            return
        if isinstance(answer, asyncio.Future):
            self._owe(head, answer)
            answer.add_done_callback(partial(self._on_kept, request))
        else:
            self._start(head, answer).add_done_callback(self._on_response)
        if isinstance(body, bytes):
            self._kept = len(body)

    def _start(self, head: _Head, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._owe(head, task)
        return task

    def _owe(self, head: _Head, answer: "asyncio.Future[Any]") -> None:
        self._head = head
        if self._state == HEAD:
            self._state = WAIT
        self._task = answer

    def _on_kept(self, request: Request, promise: "asyncio.Future[Made]") -> None:
        head = self._head
        if promise is not self._task or head is None:
            return  # the connection was lost meanwhile
        self._task = None
        answer = head.route.kept(promise, request)
        if isinstance(answer, Response):
            self._respond(head, answer)
            self._continue()
        else:
            self._start(head, answer).add_done_callback(self._on_response)

    def _on_response(self, task: asyncio.Task[Response]) -> None:
        head = self._head
        if task is not self._task or head is None:
            return  # the connection was lost meanwhile
        self._task = None
        if task.cancelled():  # by a stranger: nobody else holds this task
            self._respond(head, internal())
        else:
            self._respond(head, task.result())
        self._continue()

    def _respond(self, head: _Head, response: Response) -> None:
        if is_streamed(response):
            self._start(head, self._send_pieces(head, response))
            return
        self._send(head, response)
        if self._state == HEAD and self._keep:  # a plain handler's answer: the connection is as it was
            return
        self._on_answered()

    def _on_answered(self) -> None:
        """The answer to the current request is queued, all of it."""
        self._head = self._reader = self._inflater = self._body = None
        self._kept = 0
        if self._stream is not None:
            self._stream.abandon()
            self._stream = None
        if self._state <= WAIT and self._keep and not self._draining:
            self._state = HEAD
        else:
            self._end()

    def _send(self, head: _Head, response: Response) -> None:
        """Queue a response that is all there."""
        keep = self._keep = head.keep_alive and self._state <= WAIT and not self._draining
        body, status = response.body, response.status
        try:
            plain = [body] if type(body) is bytes else buffers(body)  # type: ignore[arg-type]    # see _respond
            length = sum(map(len, plain))
            if keep and head.as_usual and not response.headers and status not in _BODILESS:
                start = b"%bcontent-length: %d\r\n\r\n" % (_start_of(status, response.content_type), length)
            else:
                start = self._head_of(head, response, b"content-length: %d\r\n" % length)
        except Exception as error:
            log.error("%s %s: its response cannot be sent", head.method, head.path, exc_info=error)
            self._send(head, internal())
            return
        if head.method == "HEAD" or status in _BODILESS:
            self._put(start)
        elif length <= JOINED:
            self._put(b"".join((start, *plain)))
        else:
            self._put(start, *filter(len, plain))

    def _head_of(self, head: _Head, response: Response, framing: bytes) -> bytes:
        """The head of a response. Raises ValueError for what must not be in one."""
        lines = [_start_of(response.status, response.content_type)]
        for name, value in response.headers:
            if name.lower() in _OURS or not _REPLY_NAME.fullmatch(name) or not _REPLY_VALUE.fullmatch(value):
                raise ValueError(f"response: found field {name!r}: {value!r}, expected one that a handler may set")
            lines.append(f"{name}: {value}\r\n".encode("latin-1"))
        if response.status not in _BODILESS:
            lines.append(framing)
        if not self._keep:
            lines.append(b"connection: close\r\n")
        elif not head.is_11:
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    async def _send_pieces(self, head: _Head, response: Response) -> None:
        """Send a body as it is made. Its head waits for the first piece: until then an error has its own status."""
        pieces: Any = response.body
        bare = head.method == "HEAD" or response.status in _BODILESS
        begun = False
        try:
            try:
                if not bare:
                    async for piece in pieces:
                        plain = buffers(piece)
                        if self._task is not asyncio.current_task():
                            raise asyncio.CancelledError  # once more, to who took no notice
                        if not begun:
                            self._begin_pieces(head, response)
                            begun = True
                        if size := sum(map(len, plain)):
                            self._put_piece(head, plain, size)
                            await self._let_out()
                if not begun:
                    self._begin_pieces(head, response)
                    begun = True
                if head.is_11 and not bare:
                    self._put(b"0\r\n\r\n")
            finally:
                if hasattr(pieces, "aclose"):
                    await pieces.aclose()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task is not self._task or task.cancelling():
                raise
            self._fail_pieces(head, begun, RuntimeError(f"cancelled from within: {error!r}"))
        except Exception as error:
            self._fail_pieces(head, begun, error)
        if self._task is asyncio.current_task():  # else the connection was lost meanwhile
            self._task = None
            self._on_answered()
            self._continue()

    def _begin_pieces(self, head: _Head, response: Response) -> None:
        # To HTTP/1.0 the end of such a body is the end of the connection. A request whose body is still being received
        # closes nothing yet: it may be complete by then.
        self._keep = head.keep_alive and head.is_11 and self._state <= BODY and not self._draining
        self._put(self._head_of(head, response, b"transfer-encoding: chunked\r\n" if head.is_11 else b""))

    def _put_piece(self, head: _Head, plain: list[Buffer], size: int) -> None:
        if head.is_11:
            plain = [b"%x\r\n" % size, *plain, b"\r\n"]
        if size <= JOINED:
            self._put(b"".join(plain))
        else:
            self._put(*filter(len, plain))

    def _fail_pieces(self, head: _Head, begun: bool, error: Exception) -> None:
        if not begun:
            self._send(head, refusal(error, head.method, head.path))
            return
        # The status is gone: only a body that breaks off can still say that something went wrong.
        log.error("%s %s failed while its answer was sent", head.method, head.path, exc_info=error)
        self._keep = False
        self._state = DEAF

    async def _let_out(self) -> None:
        """Hand what is queued to the listener, and wait while the transport has enough."""
        self._account()
        self._wake()
        await asyncio.sleep(0)  # what makes pieces without waiting for anything shares the loop all the same
        while self._paused or self._queued > AHEAD:
            self._resumed = asyncio.get_running_loop().create_future()
            await self._resumed
            self._resumed = None

    def _let_go_on(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)

    # Ends.

    def _refuse(self, error: HttpError) -> None:
        """Answer with an error, and read nothing more."""
        head = self._head or _NO_HEAD
        self._ignore_input()
        if self._task is not None:
            assert self._stream is not None
            self._stream.fail(error)  # its handler owes the answer
            return
        self._send(head, refusal(error, head.method, head.path))
        self._on_answered()

    def _ignore_input(self) -> None:
        self._state = DEAF
        self._rest, self._at, self._scanned = b"", 0, 0

    def _end(self) -> None:
        """Close, after what is queued."""
        self._ignore_input()
        self.closing = True

    def _put(self, *data: Buffer) -> None:
        self._out.extend(data)
        self._queued += sum(map(len, data))

    def _account(self) -> None:
        """Tell the budget what is held now, and the listener whether that is enough."""
        unread = len(self._rest) - self._at
        held = unread + self._kept + self._queued
        if held > self._held:
            self._budget.take(held - self._held)
        elif held < self._held:
            self._budget.give(self._held - held)
        self._held = held
        # While a head or body is read, there is no more unread than a part of a line.
        ahead = unread if self._state == WAIT or self._paused or self._scheduled else 0
        if self._stream is not None:
            ahead += self._stream.size
        self.full = ahead > AHEAD


def _nobody() -> None:
    """To wake, after the listener has gone."""
