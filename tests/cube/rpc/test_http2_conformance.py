"""Every case that h2spec checks, with raw frames against a Connection; then what RFC 9113 says beyond it.

A row is: number, promise, what the peer sends (each piece is received on its own), what must come of it. Numbers are
h2spec's; its leniency is kept (a stream error may be a connection error of the same code), except where the RFC leaves
no choice. Rows numbered "rfc9113/…" are ours.
"""

from typing import Any, NamedTuple

import pytest
from frames import (
    ACK,
    BODY,
    END_HEADERS,
    END_STREAM,
    GET,
    INDEXING,
    MAX_WINDOW,
    NEVER_INDEXED,
    OK,
    PADDED,
    POST,
    PREFACE,
    PRIORITY,
    SETTINGS_ACK,
    WITHOUT_INDEXING,
    App,
    Code,
    Kind,
    Peer,
    Set,
    answer,
    block,
    consume,
    continuation,
    data,
    frame,
    goaway,
    headers,
    indexed,
    integer,
    literal,
    ping,
    priority,
    priority_fields,
    push_promise,
    read_frames,
    rst_stream,
    settings,
    table_size,
    told,
    window_update,
)

from cube.rpc.http2 import (
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    GoAwayReceived,
    HeadersReceived,
    SettingsReceived,
    StreamReset,
    TrailersReceived,
)
from cube.rpc.limits import Limits

GET_BLOCK, POST_BLOCK, OK_BLOCK, MORE = block(GET), block(POST), block(OK), block([("x-dummy1", "one")])


class ConnectionFails(NamedTuple):
    """GOAWAY with one of the codes, and no more."""

    codes: tuple[int, ...]

    def check(self, peer: Peer) -> None:
        assert peer.failure in self.codes
        assert peer.frames[-1].kind == Kind.GOAWAY
        assert peer.connection.closed
        assert isinstance(peer.events[-1], ConnectionFailed)
        assert peer.events[-1].code == peer.failure
        assert peer.events[-1].reason


class StreamFails(NamedTuple):
    """RST_STREAM with one of the codes and a connection that goes on, or a connection error of the code."""

    stream: int
    codes: tuple[int, ...]

    def check(self, peer: Peer) -> None:
        if peer.failure is not None:
            ConnectionFails(self.codes).check(peer)
        else:
            assert [code for code in peer.resets(self.stream) if code in self.codes], peer.frames
            assert len(peer.resets(self.stream)) == 1
            assert peer.answers_pings()


class Answered(NamedTuple):
    """The stream has had its whole answer, and the connection goes on."""

    stream: int = 1

    def check(self, peer: Peer) -> None:
        (head, *_), body, ended = peer.reply(self.stream)
        assert head[b":status"] == b"200"
        assert (body, ended) == (BODY, True)
        assert not peer.resets(self.stream)
        assert peer.answers_pings()


class Alive(NamedTuple):
    """Nothing was wrong with it."""

    def check(self, peer: Peer) -> None:
        assert not peer.of(Kind.RST_STREAM)
        assert peer.answers_pings()


def fails(*codes: int) -> ConnectionFails:
    return ConnectionFails(codes)


def resets(stream: int, *codes: int) -> StreamFails:
    return StreamFails(stream, codes)


PROTOCOL, FLOW, CLOSED = Code.PROTOCOL_ERROR, Code.FLOW_CONTROL_ERROR, Code.STREAM_CLOSED
SIZE, COMPRESSION = Code.FRAME_SIZE_ERROR, Code.COMPRESSION_ERROR


class Case(NamedTuple):
    number: str
    promise: str
    sends: tuple[bytes, ...]
    expected: Any
    app: App | None = answer


def without(name: str, fields: Any = GET) -> list[tuple[str, str]]:
    return [field for field in fields if field[0] != name]


def request(*more: tuple[str, str], fields: Any = GET, ended: bool = True) -> bytes:
    return headers(1, block([*fields, *more]), ended)


def with_length(length: str, *bodies: bytes) -> tuple[bytes, ...]:
    """A POST with a content-length, and its DATA frames."""
    frames = [data(1, body, last == len(bodies)) for last, body in enumerate(bodies, 1)]
    return request(("content-length", length), fields=POST, ended=not bodies), *frames


GET_1, POST_1 = headers(1, GET_BLOCK, ended=True), headers(1, POST_BLOCK)

H2SPEC = [
    # generic: a plain client's life
    Case("generic/1/1", "a client's preface is answered by SETTINGS", (), Alive()),
    Case("generic/2/1", "PRIORITY may come on an idle stream", (priority(1, weight=256),), Alive()),
    Case("generic/2/2", "WINDOW_UPDATE may come on a half-closed (remote) stream",
        (settings((Set.INITIAL_WINDOW, 0)), GET_1, window_update(1, len(BODY))), Answered()),
    Case("generic/2/3", "PRIORITY may come on a half-closed (remote) stream",
        (settings((Set.INITIAL_WINDOW, 0)), GET_1, priority(1, weight=256), window_update(1, len(BODY))), Answered()),
    Case("generic/2/4", "RST_STREAM may come on a half-closed (remote) stream", (GET_1, rst_stream(1)), Alive(), None),
    Case("generic/2/5", "PRIORITY may come on a closed stream", (GET_1, priority(1, weight=256)), Answered()),
    Case("generic/3.1/1", "a DATA frame", (POST_1, data(1, b"test", True)), Answered()),
    Case("generic/3.1/2", "several DATA frames", (POST_1, data(1, b"test"), data(1, b"test", True)), Answered()),
    Case("generic/3.1/3", "a DATA frame with padding", (POST_1, data(1, b"test", True, pad=4)), Answered()),
    Case("generic/3.2/1", "a HEADERS frame", (GET_1,), Answered()),
    Case("generic/3.2/2", "a HEADERS frame with padding", (headers(1, GET_BLOCK, True, pad=8),), Answered()),
    Case("generic/3.2/3", "a HEADERS frame with priority",
        (headers(1, GET_BLOCK, True, priority=priority_fields(0, 256)),), Answered()),
    Case("generic/3.3/1", "PRIORITY of weight 1", (priority(1, weight=1), GET_1), Answered()),
    Case("generic/3.3/2", "PRIORITY of weight 256", (priority(1, weight=256), GET_1), Answered()),
    Case("generic/3.3/3", "PRIORITY with a dependency", (priority(3, depends=1, weight=1), GET_1), Answered()),
    Case("generic/3.3/4", "PRIORITY that is exclusive", (priority(1, exclusive=True, weight=1), GET_1), Answered()),
    Case("generic/3.3/5", "PRIORITY for an idle stream, then a lower stream", (priority(3), GET_1), Answered()),
    Case("generic/3.4/1", "RST_STREAM", (POST_1, rst_stream(1)), Alive()),
    Case("generic/3.5/1", "SETTINGS", (settings((Set.MAX_STREAMS, 100)),), Alive()),
    Case("generic/3.7/1", "PING", (), Alive()),
    Case("generic/3.9/1", "WINDOW_UPDATE with stream 0", (window_update(0, 1),), Alive()),
    Case("generic/3.9/2", "WINDOW_UPDATE with stream 1", (POST_1, window_update(1, 1), data(1, b"", True)), Answered()),
    Case("generic/3.10/1", "a CONTINUATION frame",
        (headers(1, GET_BLOCK[:3], True, False), continuation(1, GET_BLOCK[3:])), Answered()),
    Case("generic/3.10/2", "several CONTINUATION frames",
        (headers(1, GET_BLOCK[:3], True, False), continuation(1, GET_BLOCK[3:], False), continuation(1, MORE)),
        Answered()),
    Case("generic/4/1", "a GET request", (GET_1,), Answered()),
    Case("generic/4/2", "a HEAD request", (request(fields=((":method", "HEAD"), *GET[1:])),), Answered()),
    Case("generic/4/3", "a POST request", (POST_1, data(1, b"test", True)), Answered()),
    Case("generic/4/4", "a POST request with trailers",
        (request(("trailer", "x-test"), fields=POST, ended=False), data(1, b"test"), headers(1, MORE, True)),
        Answered()),
    Case("generic/5/1", "an indexed field", (headers(1, GET_BLOCK + indexed(58), True),), Answered()),
    *(
        Case(f"generic/5/{number}", f"a literal field {words}{', Huffman coded' * huffman}",
            (headers(1, GET_BLOCK + literal(name, b"h2spec", form, huffman), True),), Answered())
        for number, words, name, form, huffman in (
            (2, "with indexing, indexed name", 58, INDEXING, False),
            (3, "with indexing, indexed name", 58, INDEXING, True),
            (4, "with indexing, new name", b"x-test", INDEXING, False),
            (5, "with indexing, new name", b"x-test", INDEXING, True),
            (6, "without indexing, indexed name", 58, WITHOUT_INDEXING, False),
            (7, "without indexing, indexed name", 58, WITHOUT_INDEXING, True),
            (8, "without indexing, new name", b"x-test", WITHOUT_INDEXING, False),
            (9, "without indexing, new name", b"x-test", WITHOUT_INDEXING, True),
            (10, "never indexed, indexed name", 58, NEVER_INDEXED, False),
            (11, "never indexed, indexed name", 58, NEVER_INDEXED, True),
            (12, "never indexed, new name", b"x-test", NEVER_INDEXED, False),
            (13, "never indexed, new name", b"x-test", NEVER_INDEXED, True),
        )
    ),
    Case("generic/5/14", "a table size update", (headers(1, table_size(0) + block(GET[:3]), True),), Answered()),
    Case("generic/5/15", "several table size updates",
        (headers(1, table_size(0) + table_size(4096) + GET_BLOCK, True),), Answered()),
    # http2
    Case("http2/4.1/1", "a frame of an unknown type is ignored", (frame(0x16, 0, bytes(8)),), Alive()),
    Case("http2/4.1/2", "an undefined flag is ignored", (frame(Kind.PING, 0, bytes(8), 0x16),), Alive()),
    Case("http2/4.1/3", "the reserved bit is ignored", (frame(Kind.PING, 1 << 31, bytes(8)),), Alive()),
    Case("http2/4.2/1", "DATA of 2^14 octets is taken", (POST_1, data(1, bytes(1 << 14), True)), Answered()),
    Case("http2/4.2/2", "DATA over SETTINGS_MAX_FRAME_SIZE is FRAME_SIZE_ERROR",
        (POST_1, data(1, bytes(Limits.frame_bytes + 1), True)), resets(1, SIZE)),
    Case("http2/4.2/3", "HEADERS over SETTINGS_MAX_FRAME_SIZE is a connection error FRAME_SIZE_ERROR",
        (headers(1, GET_BLOCK + literal(b"x", bytes(Limits.frame_bytes)), True),), fails(SIZE)),
    Case("http2/4.3/1", "a block that cannot be decoded is COMPRESSION_ERROR",
        (headers(1, b"\x40", True),), fails(COMPRESSION)),
    Case("http2/4.3/2", "PRIORITY within a header block is PROTOCOL_ERROR",
        (headers(1, GET_BLOCK, done=False), priority(1), continuation(1, MORE)), fails(PROTOCOL)),
    Case("http2/4.3/3", "HEADERS of another stream within a header block is PROTOCOL_ERROR",
        (headers(1, GET_BLOCK, done=False), headers(3, GET_BLOCK, True), continuation(1, MORE)), fails(PROTOCOL)),
    Case("http2/5.1/1", "idle: DATA is PROTOCOL_ERROR", (data(1, b"test", True),), fails(PROTOCOL)),
    Case("http2/5.1/2", "idle: RST_STREAM is PROTOCOL_ERROR", (rst_stream(1),), fails(PROTOCOL)),
    Case("http2/5.1/3", "idle: WINDOW_UPDATE is PROTOCOL_ERROR", (window_update(1, 100),), fails(PROTOCOL)),
    Case("http2/5.1/4", "idle: CONTINUATION is PROTOCOL_ERROR", (continuation(1, GET_BLOCK),), fails(PROTOCOL)),
    Case("http2/5.1/5", "half-closed (remote): DATA is STREAM_CLOSED",
        (GET_1, data(1, b"test", True)), resets(1, CLOSED), None),
    Case("http2/5.1/6", "half-closed (remote): HEADERS is STREAM_CLOSED", (GET_1, GET_1), resets(1, CLOSED), None),
    Case("http2/5.1/7", "half-closed (remote): CONTINUATION is refused",
        (GET_1, continuation(1, MORE)), resets(1, CLOSED, PROTOCOL), None),
    Case("http2/5.1/8", "closed by RST_STREAM: DATA is STREAM_CLOSED",
        (POST_1, rst_stream(1), data(1, b"test", True)), resets(1, CLOSED)),
    Case("http2/5.1/9", "closed by RST_STREAM: HEADERS is STREAM_CLOSED",
        (POST_1, rst_stream(1), GET_1), resets(1, CLOSED)),
    Case("http2/5.1/10", "closed by RST_STREAM: CONTINUATION is refused",
        (POST_1, rst_stream(1), continuation(1, MORE)), resets(1, CLOSED, PROTOCOL)),
    Case("http2/5.1/11", "closed: DATA is a connection error STREAM_CLOSED",
        (GET_1, data(1, b"test", True)), fails(CLOSED)),
    Case("http2/5.1/12", "closed: HEADERS is a connection error STREAM_CLOSED", (GET_1, GET_1), fails(CLOSED)),
    Case("http2/5.1/13", "closed: CONTINUATION is a connection error",
        (GET_1, continuation(1, MORE)), fails(CLOSED, PROTOCOL)),
    Case("http2/5.1.1/1", "a client's even stream is PROTOCOL_ERROR", (headers(2, GET_BLOCK, True),), fails(PROTOCOL)),
    Case("http2/5.1.1/2", "a stream below the highest is PROTOCOL_ERROR",
        (headers(5, GET_BLOCK, True), headers(3, GET_BLOCK, True)), fails(PROTOCOL)),
    Case("http2/5.1.1/3", "a second HEADERS on a half-closed stream is STREAM_CLOSED",
        (headers(5, GET_BLOCK, True), headers(5, GET_BLOCK, True)), resets(5, CLOSED), None),
    Case("http2/5.3.1/1", "HEADERS that depends on itself is PROTOCOL_ERROR",
        (headers(1, GET_BLOCK, True, priority=priority_fields(1, 256)),), resets(1, PROTOCOL)),
    Case("http2/5.3.1/2", "PRIORITY that depends on itself is PROTOCOL_ERROR",
        (priority(1, depends=1, weight=256),), resets(1, PROTOCOL)),
    Case("http2/5.4.1/1", "a connection error closes the connection",
        (frame(Kind.PING, 3, bytes(8)),), fails(PROTOCOL)),
    Case("http2/5.4.1/2", "a connection error is told by GOAWAY",
        (GET_1, frame(Kind.PING, 3, bytes(8))), fails(PROTOCOL)),
    Case("http2/5.5/1", "an extension frame is ignored", (frame(0x16, 0, bytes(8)), frame(0x16, 1, b"x")), Alive()),
    Case("http2/5.5/2", "an extension frame within a header block is PROTOCOL_ERROR",
        (headers(1, GET_BLOCK, True, done=False), frame(0x16, 0, bytes(8))), fails(PROTOCOL)),
    Case("http2/6.1/1", "DATA on stream 0 is PROTOCOL_ERROR", (data(0, b"test", True),), fails(PROTOCOL)),
    Case("http2/6.1/2", "DATA on a stream that is not open is STREAM_CLOSED",
        (headers(1, POST_BLOCK, True), data(1, b"test", True)), resets(1, CLOSED), None),
    Case("http2/6.1/3", "DATA with more padding than payload is PROTOCOL_ERROR",
        (request(("content-length", "4"), fields=POST, ended=False), frame(Kind.DATA, 1, b"\x06test", PADDED | 1)),
        fails(PROTOCOL)),
    Case("http2/6.2/1", "HEADERS without END_HEADERS, then PRIORITY, is PROTOCOL_ERROR",
        (headers(1, GET_BLOCK, done=False), priority(1)), fails(PROTOCOL)),
    Case("http2/6.2/2", "HEADERS without END_HEADERS, then HEADERS of another stream, is PROTOCOL_ERROR",
        (headers(1, GET_BLOCK, done=False), headers(3, GET_BLOCK, True)), fails(PROTOCOL)),
    Case("http2/6.2/3", "HEADERS on stream 0 is PROTOCOL_ERROR", (headers(0, GET_BLOCK, True),), fails(PROTOCOL)),
    Case("http2/6.2/4", "HEADERS with more padding than payload is PROTOCOL_ERROR",
        (frame(Kind.HEADERS, 1, bytes((len(GET_BLOCK) + 1,)) + GET_BLOCK, PADDED | END_STREAM | END_HEADERS),),
        resets(1, PROTOCOL)),
    Case("http2/6.3/1", "PRIORITY on stream 0 is PROTOCOL_ERROR", (priority(0),), fails(PROTOCOL)),
    Case("http2/6.3/2", "PRIORITY of 4 octets is FRAME_SIZE_ERROR",
        (GET_1, frame(Kind.PRIORITY, 1, bytes(4))), resets(1, SIZE), None),
    Case("http2/6.4/1", "RST_STREAM on stream 0 is PROTOCOL_ERROR", (rst_stream(0),), fails(PROTOCOL)),
    Case("http2/6.4/2", "RST_STREAM on an idle stream is PROTOCOL_ERROR", (rst_stream(1),), fails(PROTOCOL)),
    Case("http2/6.4/3", "RST_STREAM of 3 octets is a connection error FRAME_SIZE_ERROR",
        (POST_1, frame(Kind.RST_STREAM, 1, bytes(3))), fails(SIZE)),
    Case("http2/6.5/1", "SETTINGS with ACK and a payload is FRAME_SIZE_ERROR",
        (frame(Kind.SETTINGS, 0, bytes(1), ACK),), fails(SIZE)),
    Case("http2/6.5/2", "SETTINGS on a stream is PROTOCOL_ERROR",
        (frame(Kind.SETTINGS, 1, b"\0\3\0\0\0\x64"),), fails(PROTOCOL)),
    Case("http2/6.5/3", "SETTINGS not of a multiple of 6 octets is FRAME_SIZE_ERROR",
        (frame(Kind.SETTINGS, 0, b"\0\3\0"),), fails(SIZE)),
    Case("http2/6.5.2/1", "SETTINGS_ENABLE_PUSH of 2 is PROTOCOL_ERROR",
        (settings((Set.ENABLE_PUSH, 2)),), fails(PROTOCOL)),
    Case("http2/6.5.2/2", "SETTINGS_INITIAL_WINDOW_SIZE above 2^31-1 is FLOW_CONTROL_ERROR",
        (settings((Set.INITIAL_WINDOW, 1 << 31)),), fails(FLOW)),
    Case("http2/6.5.2/3", "SETTINGS_MAX_FRAME_SIZE below 2^14 is PROTOCOL_ERROR",
        (settings((Set.MAX_FRAME, (1 << 14) - 1)),), fails(PROTOCOL)),
    Case("http2/6.5.2/4", "SETTINGS_MAX_FRAME_SIZE above 2^24-1 is PROTOCOL_ERROR",
        (settings((Set.MAX_FRAME, 1 << 24)),), fails(PROTOCOL)),
    Case("http2/6.5.2/5", "an unknown setting is ignored", (settings((0xFF, 1)),), Alive()),
    Case("http2/6.7/2", "PING with ACK is not answered", (ping(b"unwanted", ack=True),), Alive()),
    Case("http2/6.7/3", "PING on a stream is PROTOCOL_ERROR", (frame(Kind.PING, 1, bytes(8)),), fails(PROTOCOL)),
    Case("http2/6.7/4", "PING of 6 octets is FRAME_SIZE_ERROR", (frame(Kind.PING, 0, bytes(6)),), fails(SIZE)),
    Case("http2/6.8/1", "GOAWAY on a stream is PROTOCOL_ERROR", (frame(Kind.GOAWAY, 1, bytes(8)),), fails(PROTOCOL)),
    Case("http2/6.9/1", "WINDOW_UPDATE by 0 is PROTOCOL_ERROR", (POST_1, window_update(0, 0)), fails(PROTOCOL)),
    Case("http2/6.9/2", "WINDOW_UPDATE by 0 on a stream is PROTOCOL_ERROR",
        (POST_1, window_update(1, 0)), resets(1, PROTOCOL)),
    Case("http2/6.9/3", "WINDOW_UPDATE of 3 octets is FRAME_SIZE_ERROR",
        (frame(Kind.WINDOW_UPDATE, 0, b"\0\0\1"),), fails(SIZE)),
    Case("http2/6.9.1/2", "a connection window above 2^31-1 is FLOW_CONTROL_ERROR",
        (window_update(0, MAX_WINDOW), window_update(0, MAX_WINDOW)), fails(FLOW)),
    Case("http2/6.9.2/3", "SETTINGS_INITIAL_WINDOW_SIZE of 2^31 is FLOW_CONTROL_ERROR",
        (frame(Kind.SETTINGS, 0, b"\0\4\x80\0\0\0"),), fails(FLOW)),
    Case("http2/6.10/1", "CONTINUATION frames may follow HEADERS",
        (headers(1, GET_BLOCK, True, False), continuation(1, MORE, False), continuation(1, MORE)), Answered()),
    Case("http2/6.10/2", "CONTINUATION, then another frame, is PROTOCOL_ERROR",
        (headers(1, POST_BLOCK, done=False), continuation(1, MORE, False), data(1, b"test", True)), fails(PROTOCOL)),
    Case("http2/6.10/3", "CONTINUATION on stream 0 is PROTOCOL_ERROR",
        (headers(1, GET_BLOCK, True, False), continuation(0, MORE)), fails(PROTOCOL)),
    Case("http2/6.10/4", "CONTINUATION after END_HEADERS is PROTOCOL_ERROR",
        (GET_1, continuation(1, MORE)), fails(PROTOCOL)),
    Case("http2/6.10/5", "CONTINUATION after a CONTINUATION with END_HEADERS is PROTOCOL_ERROR",
        (headers(1, GET_BLOCK, True, False), continuation(1, MORE), continuation(1, MORE)), fails(PROTOCOL)),
    Case("http2/6.10/6", "CONTINUATION after DATA is PROTOCOL_ERROR",
        (headers(1, POST_BLOCK, done=False), data(1, b"test", True), continuation(1, MORE, False)), fails(PROTOCOL)),
    Case("http2/7/2", "RST_STREAM with an unknown code is as good as any", (POST_1, rst_stream(1, 0xFF)), Alive()),
    Case("http2/8.1/1", "a second HEADERS without END_STREAM is malformed",
        (POST_1, data(1, b"test"), headers(1, MORE)), resets(1, PROTOCOL)),
    Case("http2/8.1.2/1", "an upper-case name is malformed", (request(("X-TEST", "ok")),), resets(1, PROTOCOL)),
    Case("http2/8.1.2.1/1", "an unknown pseudo-field is malformed", (request((":test", "ok")),), resets(1, PROTOCOL)),
    Case("http2/8.1.2.1/2", "a pseudo-field of responses is malformed",
        (request((":status", "200")),), resets(1, PROTOCOL)),
    Case("http2/8.1.2.1/3", "a pseudo-field in trailers is malformed",
        (POST_1, data(1, b"test"), headers(1, block([(":method", "POST")]), True)), resets(1, PROTOCOL)),
    Case("http2/8.1.2.1/4", "a pseudo-field after a regular one is malformed",
        (request(fields=[("x-test", "ok"), *GET]),), resets(1, PROTOCOL)),
    Case("http2/8.1.2.2/1", "a connection-specific field is malformed",
        (request(("connection", "keep-alive")),), resets(1, PROTOCOL)),
    Case("http2/8.1.2.2/2", "TE other than trailers is malformed",
        (request(("te", "trailers, deflate;q=0.5")),), resets(1, PROTOCOL)),
    Case("http2/8.1.2.3/1", "an empty :path is malformed",
        (request((":path", ""), fields=without(":path")),), resets(1, PROTOCOL)),
    *(
        Case(f"http2/8.1.2.3/{number}", f"a request without {name} is malformed",
            (request(fields=without(name)),), resets(1, PROTOCOL))
        for number, name in ((2, ":method"), (3, ":scheme"), (4, ":path"))
    ),
    *(
        Case(f"http2/8.1.2.3/{number}", f"a second {name} is malformed",
            (request(fields=[(name, dict(GET)[name]), *GET]),), resets(1, PROTOCOL))
        for number, name in ((5, ":method"), (6, ":scheme"), (7, ":path"))
    ),
    Case("http2/8.1.2.6/1", "a content-length that is not that of the DATA is malformed",
        with_length("1", b"test"), resets(1, PROTOCOL)),
    Case("http2/8.1.2.6/2", "a content-length that is not the sum of the DATA is malformed",
        with_length("1", b"test", b"test"), resets(1, PROTOCOL)),
    Case("http2/8.2/1", "a client's push is PROTOCOL_ERROR", (push_promise(1, 3, GET_BLOCK),), fails(PROTOCOL)),
    # hpack
    Case("hpack/2.3.3/1", "a field with an index beyond the tables is COMPRESSION_ERROR",
        (headers(1, GET_BLOCK + indexed(126), True),), fails(COMPRESSION)),
    Case("hpack/2.3.3/2", "a literal with a name beyond the tables is COMPRESSION_ERROR",
        (headers(1, GET_BLOCK + literal(126, b"empty"), True),), fails(COMPRESSION)),
    Case("hpack/4.2/1", "a table size update at the end of a block is COMPRESSION_ERROR",
        (headers(1, GET_BLOCK + table_size(1), True),), fails(COMPRESSION)),
    Case("hpack/5.2/1", "Huffman padding longer than 7 bits is COMPRESSION_ERROR",
        (headers(1, GET_BLOCK + b"\x00\x85\xf2\xb2\x4a\x84\xff\x84\x49\x50\x9f\xff", True),), fails(COMPRESSION)),
    Case("hpack/5.2/2", "Huffman padding of zeros is COMPRESSION_ERROR",
        (headers(1, GET_BLOCK + b"\x00\x85\xf2\xb2\x4a\x84\xff\x83\x49\x50\x90", True),), fails(COMPRESSION)),
    Case("hpack/5.2/3", "the Huffman code of EOS is COMPRESSION_ERROR",
        (headers(1, GET_BLOCK + b"\x00\x85\xf2\xb2\x4a\x87\xff\xff\xff\xfd\x25\x42\x7f", True),), fails(COMPRESSION)),
    Case("hpack/6.1/1", "index 0 is COMPRESSION_ERROR",
        (headers(1, GET_BLOCK + indexed(0), True),), fails(COMPRESSION)),
    Case("hpack/6.3/1", "a table size above SETTINGS_HEADER_TABLE_SIZE is COMPRESSION_ERROR",
        (headers(1, table_size(4097) + GET_BLOCK, True),), fails(COMPRESSION)),
]  # fmt: skip

BEYOND_H2SPEC = [
    Case("rfc9113/5.1", "DATA on an idle stream above open ones", (POST_1, data(3, b"x")), fails(PROTOCOL)),
    Case("rfc9113/5.1.1", "DATA on an even stream", (data(2, b"x"),), fails(PROTOCOL)),
    Case("rfc9113/5.1.1", "RST_STREAM on an even stream", (rst_stream(2),), fails(PROTOCOL)),
    Case("rfc9113/5.1.1", "WINDOW_UPDATE on an even stream", (window_update(2, 1),), fails(PROTOCOL)),
    Case("rfc9113/5.1.1", "stream numbers may be skipped", (headers(101, GET_BLOCK, True),), Answered(101)),
    Case("rfc9113/5.1.1", "the last stream number", (headers(MAX_WINDOW, GET_BLOCK, True),), Answered(MAX_WINDOW)),
    Case("rfc9113/5.1", "streams below the highest are closed, not idle: DATA is refused",
        (headers(5, GET_BLOCK, True), data(3, b"x")), resets(3, CLOSED, PROTOCOL)),
    Case("rfc9113/5.1", "WINDOW_UPDATE may come late", (GET_1, window_update(1, 9)), Answered()),
    Case("rfc9113/5.1", "RST_STREAM may come late", (GET_1, rst_stream(1, Code.NO_ERROR)), Answered()),
    Case("rfc9113/6.1", "DATA may be all padding", (POST_1, data(1, b"", True, pad=255)), Answered()),
    Case("rfc9113/6.1", "padding of no octets", (POST_1, data(1, b"test", True, pad=0)), Answered()),
    Case("rfc9113/6.1", "DATA with a pad length and nothing else",
        (POST_1, frame(Kind.DATA, 1, b"\0", PADDED | END_STREAM)), Answered()),
    Case("rfc9113/6.1", "DATA with as much padding as there is payload is PROTOCOL_ERROR",
        (POST_1, frame(Kind.DATA, 1, b"\x05test", PADDED)), fails(PROTOCOL)),
    Case("rfc9113/6.1", "padded DATA without a pad length",
        (POST_1, frame(Kind.DATA, 1, b"", PADDED)), fails(PROTOCOL, SIZE)),
    Case("rfc9113/6.2", "padded HEADERS without a pad length",
        (frame(Kind.HEADERS, 1, b"", PADDED | END_HEADERS),), fails(PROTOCOL, SIZE)),
    Case("rfc9113/6.2", "HEADERS too short for their priority",
        (frame(Kind.HEADERS, 1, b"\0\0\0", PRIORITY | END_HEADERS),), fails(PROTOCOL, SIZE)),
    Case("rfc9113/6.2", "padding that eats into the priority",
        (frame(Kind.HEADERS, 1, b"\x03" + bytes(7), PRIORITY | PADDED | END_HEADERS),), fails(PROTOCOL, SIZE)),
    Case("rfc9113/6.2", "padding, priority and a block in pieces",
        (headers(1, GET_BLOCK[:5], True, False, pad=7, priority=priority_fields(3, 200, True)),
         continuation(1, GET_BLOCK[5:9], False), continuation(1, b"", False), continuation(1, GET_BLOCK[9:])),
        Answered()),
    Case("rfc9113/5.3", "what follows HEADERS that depend on themselves is not on an idle stream",
        (headers(1, POST_BLOCK, priority=priority_fields(1)), data(1, b"late"), window_update(1, 1)),
        resets(1, PROTOCOL)),
    Case("rfc9113/5.3", "HEADERS that depend on themselves may come in pieces",
        (headers(1, GET_BLOCK[:7], True, False, priority=priority_fields(1)), continuation(1, GET_BLOCK[7:])),
        resets(1, PROTOCOL)),
    Case("rfc9113/6.3", "PRIORITY of 6 octets", (POST_1, frame(Kind.PRIORITY, 1, bytes(6))), resets(1, SIZE)),
    Case("rfc9113/6.4", "RST_STREAM of 5 octets", (POST_1, frame(Kind.RST_STREAM, 1, bytes(5))), fails(SIZE)),
    Case("rfc9113/6.5", "SETTINGS of nothing", (settings(),), Alive()),
    Case("rfc9113/6.5", "SETTINGS with ACK on a stream", (frame(Kind.SETTINGS, 1, b"", ACK),), fails(PROTOCOL)),
    Case("rfc9113/6.5.2", "SETTINGS_MAX_FRAME_SIZE at its bounds",
        (settings((5, 1 << 14), (5, (1 << 24) - 1)),), Alive()),
    Case("rfc9113/6.5.2", "the largest window and table", (settings((4, MAX_WINDOW), (1, 2**32 - 1)),), Alive()),
    Case("rfc9113/6.5.3", "all settings of a frame count, also one before a bad one",
        (settings((Set.MAX_STREAMS, 1), (Set.ENABLE_PUSH, 7)),), fails(PROTOCOL)),
    Case("rfc9113/6.7", "PING of 9 octets", (frame(Kind.PING, 0, bytes(9)),), fails(SIZE)),
    Case("rfc9113/6.8", "GOAWAY of 7 octets", (frame(Kind.GOAWAY, 0, bytes(7)),), fails(SIZE)),
    Case("rfc9113/6.9", "WINDOW_UPDATE of 5 octets", (frame(Kind.WINDOW_UPDATE, 0, bytes(5)),), fails(SIZE)),
    Case("rfc9113/6.9", "the reserved bit of WINDOW_UPDATE is ignored",
        (frame(Kind.WINDOW_UPDATE, 0, b"\x80\0\0\1"),), Alive()),
    Case("rfc9113/6.9.2", "a new initial window that makes a stream's window too large is FLOW_CONTROL_ERROR",
        (POST_1, window_update(1, MAX_WINDOW - 65_535), settings((Set.INITIAL_WINDOW, 65_536))), fails(FLOW)),
    Case("rfc9113/6.9.1", "windows may be exactly 2^31-1",
        (POST_1, window_update(0, MAX_WINDOW - 65_535), window_update(1, MAX_WINDOW - 65_535), data(1, b"", True)),
        Answered()),
    Case("rfc9113/8.1", "trailers may follow a head at once", (POST_1, headers(1, MORE, True)), Answered()),
    Case("rfc9113/8.1", "DATA after trailers is STREAM_CLOSED",
        (POST_1, headers(1, MORE, True), data(1, b"x")), resets(1, CLOSED), None),
    Case("rfc9113/8.1.1", "content-length and no DATA", with_length("5"), resets(1, PROTOCOL)),
    Case("rfc9113/8.1.1", "more DATA than content-length", with_length("5", b"1234", b"56"), resets(1, PROTOCOL)),
    Case("rfc9113/8.1.1", "less DATA than content-length", with_length("5", b"1234"), resets(1, PROTOCOL)),
    Case("rfc9113/8.1.1", "as much DATA as content-length", with_length("5", b"1234", b"5"), Answered()),
    Case("rfc9113/8.1.1", "content-length 0 and no DATA", with_length("0"), Answered()),
    Case("rfc9113/8.1.1", "content-length 0 and DATA of nothing", with_length("0", b""), Answered()),
    Case("rfc9113/8.1.1", "padding is not content",
        (with_length("5", b"")[0], data(1, b"1234", pad=100), data(1, b"5", True, pad=1)), Answered()),
    Case("rfc9113/8.1.1", "less DATA than content-length before trailers",
        (with_length("5", b"")[0], data(1, b"1234"), headers(1, MORE, True)), resets(1, PROTOCOL)),
    *(
        Case("rfc9113/8.1.1", f"content-length {wrong!r} is malformed", with_length(wrong, b"1"), resets(1, PROTOCOL))
        for wrong in ("", "-1", "+1", "1a", "0x1", "1 1", "1,2", "1.0", "\u0661")
    ),
    *(
        Case("rfc9113/8.1.1", f"content-length {first} and {second} are malformed",
            (request(("content-length", first), ("content-length", second), fields=POST, ended=False),
             data(1, b"test", True)), resets(1, PROTOCOL))
        for first, second in (("4", "5"), ("5", "4"), ("4", "x"), ("x", "4"))
    ),
    *(
        Case("rfc9113/8.3", f"a pseudo-field after {name} is malformed",
            (request(fields=[*GET[:at], (name, "0"), *GET[at:]]),), resets(1, PROTOCOL))
        for name in ("grpc-timeout", "content-length", "date", "x-request-id", "user-agent") for at in (0, 2, 3)
    ),
    *(
        Case("rfc9113/8.2.1", f"a name like {name!r} is malformed", (request((name, "x")),), resets(1, PROTOCOL))
        for name in (
            "", "a b", " a", "a ", "a\r", "a\nb", "a\0", "a:b", "a\x7f", "a\x80", "caf\u00e9", 'a"b', "a(b)", "a,b",
        )
    ),
    *(
        Case("rfc9113/8.2.1", f"a value like {value!r} is malformed", (request(("a", value)),), resets(1, PROTOCOL))
        for value in ("a\0b", "a\rb", "a\nb", "\r\n", " a", "a ", "\ta", "a\t")
    ),
    *(
        Case("rfc9113/8.2.1", f"a value like {value!r} is fine", (request(("a", value)),), Answered())
        for value in ("", "a b\tc", "\u00e9", "\x80\xff", '"(),:;<=>?@[]{}', "x" * 5000)
    ),
    *(
        Case("rfc9113/8.2.2", f"{name} is malformed", (request((name, value)),), resets(1, PROTOCOL))
        for name, value in (
            ("connection", "close"), ("keep-alive", "timeout=5"), ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"), ("upgrade", "h2c"), ("te", "gzip"), ("te", ""),
        )
    ),
    Case("rfc9113/8.2.2", "TE of trailers is fine", (request(("te", "trailers")),), Answered()),
    Case("rfc9113/8.2.3", "cookies may come in crumbs", (request(("cookie", "a=b"), ("cookie", "c=d")),), Answered()),
    Case("rfc9113/8.2.2", "a connection-specific field in trailers is malformed",
        (POST_1, headers(1, block([("transfer-encoding", "chunked")]), True)), resets(1, PROTOCOL)),
    Case("rfc9113/8.2", "an upper-case name in trailers is malformed",
        (POST_1, headers(1, block([("X", "1")]), True)), resets(1, PROTOCOL)),
    Case("rfc9113/8.3", "a second :authority is malformed", (request(fields=[GET[3], *GET]),), resets(1, PROTOCOL)),
    Case("rfc9113/8.3", "an empty block is malformed", (headers(1, b"", True),), resets(1, PROTOCOL)),
    Case("rfc9113/8.3", "a pseudo-field between regular ones is malformed",
        (request(("x", "y"), (":authority", "localhost"), fields=GET[:3]),), resets(1, PROTOCOL)),
    Case("rfc9113/8.3.1", "a request without :authority but host",
        (request(("host", "a"), fields=GET[:3]),), Answered()),
    Case("rfc9113/8.3.1", "host that is not :authority is malformed",
        (request(("host", "elsewhere")),), resets(1, PROTOCOL)),
    Case("rfc9113/8.3.1", "host that is :authority", (request(("host", "localhost")),), Answered()),
    Case("rfc9113/8.5", "CONNECT with :path and :scheme is malformed",
        (request(fields=((":method", "CONNECT"), *GET[1:])),), resets(1, PROTOCOL)),
    Case("rfc9113/8.6", "an empty :method is malformed",
        (request((":method", ""), fields=GET[1:]),), resets(1, PROTOCOL)),
    Case("rfc7541/5.1", "an index of many octets", (headers(1, GET_BLOCK + b"\xff" * 6, True),), fails(COMPRESSION)),
    Case("rfc7541/5.1", "an endless integer",
        (headers(1, GET_BLOCK + b"\xff" + b"\x80" * 100 + b"\0", True),), fails(COMPRESSION)),
    Case("rfc7541/5.2", "a string longer than its block",
        (headers(1, GET_BLOCK + b"\x00\x01a" + integer(0, 7, 1 << 20) + b"abc", True),), fails(COMPRESSION)),
    Case("rfc7541/5.2", "a name without a value", (headers(1, GET_BLOCK + b"\x00\x01a", True),), fails(COMPRESSION)),
    Case("rfc7541/6.1", "a cut index", (headers(1, GET_BLOCK + b"\xff", True),), fails(COMPRESSION)),
    Case("rfc7541/4.2", "a table size update between fields",
        (headers(1, table_size(4096) + indexed(2) + table_size(0) + GET_BLOCK, True),), fails(COMPRESSION)),
    Case("rfc7541/4.4", "an entry larger than the table empties it",
        (headers(1, GET_BLOCK + literal(b"big", b"x" * 5000, INDEXING), True),
         headers(3, GET_BLOCK + indexed(62 + 4), True)), fails(COMPRESSION)),
]  # fmt: skip


@pytest.mark.parametrize("case", H2SPEC + BEYOND_H2SPEC, ids=lambda case: f"{case.number} {case.promise}")
def test_a_server_keeps_the_promise_of(case):
    peer = Peer(app=case.app)
    peer.send(*case.sends)
    case.expected.check(peer)


# h2spec's cases that ask for more than an error or an answer


def test_generic_1_1_the_first_frame_of_a_server_is_settings():
    peer = Peer(greeting=None)
    first = peer.frames[0]
    assert (first.kind, first.flags, first.stream) == (Kind.SETTINGS, 0, 0)
    assert first.pairs[Set.MAX_FRAME] == Limits.frame_bytes
    assert first.pairs[Set.MAX_STREAMS] == Limits.streams
    assert first.pairs[Set.MAX_HEADER_LIST] == Limits.header_bytes
    assert first.pairs.get(Set.ENABLE_PUSH, 0) == 0


def test_generic_3_8_1_goaway_is_no_error_of_the_connection():
    peer = Peer(app=answer)
    peer.send(goaway(0, Code.NO_ERROR, b"bye"))
    assert peer.all(GoAwayReceived) == [GoAwayReceived(0, Code.NO_ERROR, b"bye")]
    assert peer.failure is None


@pytest.mark.parametrize("split", [1, 3, 8, 23, 24, 30])
def test_http2_3_5_1_a_preface_in_any_pieces_is_answered_by_an_ack(split):
    peer = Peer(greeting=None)
    hello = PREFACE + settings((Set.ENABLE_PUSH, 0))
    peer.send(*(hello[at : at + split] for at in range(0, len(hello), split)))
    assert peer.of(Kind.SETTINGS)[1:] == read_frames(SETTINGS_ACK)
    assert peer.all(SettingsReceived) == [SettingsReceived()]


@pytest.mark.parametrize(
    "junk",
    [b"INVALID CONNECTION PREFACE\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", PREFACE[:-1] + b"x", b"\x16\x03\x01\x02", b"Q"],
)
def test_http2_3_5_2_an_invalid_preface_closes_the_connection(junk):
    peer = Peer(greeting=None)
    peer.send(*(junk[at : at + 1] for at in range(len(junk))))
    assert peer.connection.closed
    assert peer.failure in (None, PROTOCOL)
    assert told(peer.events) == [("failed", PROTOCOL)]


@pytest.mark.parametrize(
    "first",
    [ping(), goaway(), GET_1, SETTINGS_ACK, window_update(0, 1), frame(0x42), priority(1), data(1)],
    ids=["ping", "goaway", "headers", "settings ack", "window update", "unknown", "priority", "data"],
)
def test_rfc9113_3_4_a_client_whose_first_frame_is_not_settings_is_refused(first):
    peer = Peer(greeting=None)
    peer.send(PREFACE + first)
    ConnectionFails((PROTOCOL,)).check(peer)
    assert not peer.all(HeadersReceived)


def test_http2_5_1_2_a_stream_over_the_limit_is_refused_and_the_others_go_on():
    peer = Peer(limits=Limits(streams=3))
    peer.send(*(headers(number, POST_BLOCK) for number in (1, 3, 5, 7)))
    assert [f.stream for f in peer.of(Kind.RST_STREAM)] == [7]
    assert peer.resets(7)[0] in (PROTOCOL, Code.REFUSED_STREAM)
    assert [event.stream.id for event in peer.all(HeadersReceived)] == [1, 3, 5]
    peer.app = answer
    peer.send(data(3, b"x", True))
    Answered(3).check(peer)
    peer.send(headers(9, GET_BLOCK, True))
    Answered(9).check(peer)


@pytest.mark.parametrize(
    "pairs", [((4, 1),), ((4, 100), (4, 1)), ((4, 0),)], ids=["6.9.1/1 window of 1", "6.5.3/1 the last counts", "zero"]
)
def test_http2_6_9_1_no_more_data_is_sent_than_the_initial_window_allows(pairs):
    peer = Peer(app=answer)
    peer.send(settings(*pairs), GET_1)
    window = pairs[-1][1]
    assert [len(f.payload) for f in peer.of(Kind.DATA)] == [window] * bool(window)
    assert peer.answers_pings()


def test_http2_6_5_3_2_settings_are_acknowledged_at_once_and_in_order():
    peer = Peer()
    peer.send(settings((Set.ENABLE_PUSH, 0)) + ping() + settings())
    assert [(f.kind, f.flags) for f in peer.frames[-3:]] == [
        (Kind.SETTINGS, ACK),
        (Kind.PING, ACK),
        (Kind.SETTINGS, ACK),
    ]


def test_http2_6_7_1_a_ping_is_answered_with_its_payload():
    peer = Peer()
    peer.send(ping(b"h2spec\0\0"))
    assert peer.frames[-1] == (Kind.PING, ACK, 0, b"h2spec\0\0")


def test_http2_6_9_1_3_a_stream_window_above_its_maximum_ends_the_stream_only():
    peer = Peer(app=answer)
    peer.send(POST_1, window_update(1, MAX_WINDOW), window_update(1, MAX_WINDOW))
    assert peer.resets(1) == [FLOW]
    peer.send(headers(3, GET_BLOCK, True))
    Answered(3).check(peer)


def test_http2_6_9_2_1_a_new_initial_window_changes_open_streams():
    peer = Peer(app=answer)
    peer.send(settings((Set.INITIAL_WINDOW, 0)), GET_1)
    assert not peer.of(Kind.DATA)
    peer.send(settings((Set.INITIAL_WINDOW, 1)))
    assert [f.payload for f in peer.of(Kind.DATA)] == [BODY[:1]]


def test_http2_6_9_2_2_a_window_may_become_negative():
    peer = Peer(app=answer)
    peer.send(settings((Set.INITIAL_WINDOW, 3)), GET_1)
    assert [f.payload for f in peer.of(Kind.DATA)] == [BODY[:3]]
    peer.send(settings((Set.INITIAL_WINDOW, 2)))  # the window is -1 now
    peer.send(window_update(1, 1))
    assert len(peer.of(Kind.DATA)) == 1
    peer.send(window_update(1, 1))
    assert [f.payload for f in peer.of(Kind.DATA)] == [BODY[:3], BODY[3:4]]


def test_http2_7_1_goaway_with_an_unknown_code_does_nothing_special():
    peer = Peer(app=answer)
    peer.send(goaway(0, 0xFF))
    assert peer.all(GoAwayReceived) == [GoAwayReceived(0, 0xFF, b"")]
    assert peer.connection.closed or peer.answers_pings()


@pytest.mark.parametrize(
    "wrong", [priority(9, depends=9), frame(Kind.PRIORITY, 9, bytes(4))], ids=["depends on itself", "4 octets"]
)
def test_rfc9113_6_4_rst_stream_is_never_sent_on_an_idle_stream(wrong):
    peer = Peer(app=answer)
    peer.send(GET_1, wrong)
    assert not peer.resets(9)
    assert peer.failure is None or peer.failure in (PROTOCOL, SIZE)


def test_the_names_of_errors_are_those_of_the_rfc():
    assert {code.name: code.value for code in ErrorCode} == {code.name: code.value for code in Code}


def test_what_is_wrong_with_a_request_is_told_to_its_stream_alone():
    peer = Peer(app=answer)
    peer.send(POST_1, headers(3, block([*GET, ("connection", "close")]), True), data(1, b"x", True))
    assert (peer.resets(3), peer.failure) == ([PROTOCOL], None)
    assert [event.stream.id for event in peer.all(HeadersReceived)] == [1]
    assert not peer.all(StreamReset)
    Answered(1).check(peer)


def test_a_request_that_turns_out_malformed_is_taken_back():
    peer = Peer(app=answer)
    peer.send(*with_length("5", b"1234", b"56"))
    assert peer.resets(1) == [PROTOCOL]
    assert told(peer.events)[-1] == ("reset", 1, PROTOCOL, False)
    assert 1 not in peer.connection.streams


def test_a_malformed_request_leaves_the_compression_state_in_step():
    peer = Peer(app=answer)
    peer.send(headers(1, block([*GET, ("upgrade", "h2c")]), True))  # :authority and upgrade are in the table now
    peer.send(headers(3, bytes((0x82, 0x86, 0x84)) + indexed(63), True))
    assert peer.resets(1) == [PROTOCOL]
    assert peer.all(HeadersReceived)[0].head.authority == b"localhost"
    Answered(3).check(peer)


def test_a_refused_stream_leaves_the_compression_state_in_step():
    peer = Peer(limits=Limits(streams=1))
    peer.send(POST_1, headers(3, block([*GET, ("x-a", "b")]), True), rst_stream(1))
    peer.send(headers(5, bytes((0x82, 0x86, 0x84)) + indexed(63) + indexed(62), True))
    assert dict(peer.all(HeadersReceived)[-1].head.fields)[b"x-a"] == b"b"


def test_headers_for_a_closed_stream_leave_the_compression_state_in_step():
    peer = Peer()
    peer.send(POST_1)
    peer.connection.reset(peer.all(HeadersReceived)[0].stream, ErrorCode.CANCEL)
    peer.send(headers(1, block([("x-a", "b")]), True), headers(3, bytes((0x82, 0x86, 0x84)) + indexed(62), True))
    assert dict(peer.all(HeadersReceived)[-1].head.fields)[b"x-a"] == b"b"


def test_goaway_of_a_connection_error_names_the_last_stream():
    peer = Peer(app=answer)
    peer.send(headers(7, GET_BLOCK, True), data(0, b"x"))
    assert int.from_bytes(peer.frames[-1].payload[:4]) == 7


def test_after_a_connection_error_nothing_is_received():
    peer = Peer(app=answer)
    peer.send(data(0, b"x"))
    assert peer.send(GET_1, ping(), data(0, b"x")) == []
    assert peer.frames[-1].kind == Kind.GOAWAY


def test_what_follows_an_error_in_the_same_bytes_is_not_received():
    peer = Peer(app=answer)
    peer.send(GET_1 + data(0, b"x") + headers(3, GET_BLOCK, True))
    assert [event.stream.id for event in peer.all(HeadersReceived)] == [1]
    assert isinstance(peer.events[-1], ConnectionFailed)


def test_a_head_tells_what_was_asked():
    peer = Peer()
    peer.send(request(("x", "1"), ("x", "2"), fields=POST))
    head = peer.all(HeadersReceived)[0].head
    assert (head.method, head.scheme, head.path, head.authority) == (b"POST", b"http", b"/", b"localhost")
    assert head.status is None
    assert head.fields[-2:] == ((b"x", b"1"), (b"x", b"2"))
    assert head.fields[:4] == tuple((n.encode(), v.encode()) for n, v in POST)


# What the RFC demands of a client. `sends` is what the server does after stream 1 was opened and half-closed.


class Received(NamedTuple):
    """Stream 1 has brought these events, and the connection goes on."""

    events: list[tuple[Any, ...]]

    def check(self, peer: Peer) -> None:
        stream = [event for event in told(peer.events) if len(event) > 1 and event[1] == 1]
        assert stream == self.events
        assert not peer.of(Kind.RST_STREAM)
        assert peer.answers_pings()


def response(*fields: tuple[str, str], ended: bool = False) -> bytes:
    return headers(1, block(fields), ended)


def head(*fields: tuple[str, str], ended: bool = False) -> tuple[Any, ...]:
    return ("head", 1, tuple((n.encode(), v.encode()) for n, v in fields), ended)


OK_1, TRAILERS = response(*OK), headers(1, block([("grpc-status", "0")]), True)

CLIENT = [
    Case("client/4.1/1", "a frame of an unknown type is ignored", (frame(0x16, 0, bytes(8)),), Alive()),
    Case("client/4.1/2", "an undefined flag is ignored", (frame(Kind.PING, 0, bytes(8), 0x16),), Alive()),
    Case("client/4.1/3", "the reserved bit is ignored", (frame(Kind.PING, 1 << 31, bytes(8)),), Alive()),
    Case("client/4.2/1", "DATA of 2^14 octets is taken",
        (OK_1, data(1, bytes(1 << 14), True)), Received([head(*OK), ("data", 1, bytes(1 << 14), True)])),
    Case("client/4.2/2", "DATA over SETTINGS_MAX_FRAME_SIZE is FRAME_SIZE_ERROR",
        (OK_1, data(1, bytes(Limits.frame_bytes + 1))), resets(1, SIZE)),
    Case("client/4.2/3", "HEADERS over SETTINGS_MAX_FRAME_SIZE is FRAME_SIZE_ERROR",
        (headers(1, OK_BLOCK + literal(b"x", bytes(Limits.frame_bytes)), True),), fails(SIZE)),
    Case("client/4.3/1", "a block that cannot be decoded", (headers(1, b"\x40"),), fails(COMPRESSION)),
    Case("client/4.3/2", "PRIORITY within a header block",
        (headers(1, OK_BLOCK, done=False), priority(1), continuation(1, MORE)), fails(PROTOCOL)),
    Case("client/4.3/3", "HEADERS of another stream within a header block",
        (headers(1, OK_BLOCK, done=False), headers(3, OK_BLOCK), continuation(1, MORE)), fails(PROTOCOL)),
    Case("client/5.1/1", "idle: DATA", (data(2, b"test", True),), fails(PROTOCOL)),
    Case("client/5.1/2", "idle: RST_STREAM", (rst_stream(2),), fails(PROTOCOL)),
    Case("client/5.1/3", "idle: WINDOW_UPDATE", (window_update(2, 100),), fails(PROTOCOL)),
    Case("client/5.1/4", "idle: CONTINUATION", (continuation(2, OK_BLOCK),), fails(PROTOCOL)),
    Case("client/5.1/5", "closed by RST_STREAM: DATA is STREAM_CLOSED",
        (OK_1, rst_stream(1), data(1, b"test", True)), resets(1, CLOSED)),
    Case("client/5.1/6", "closed by RST_STREAM: HEADERS is STREAM_CLOSED",
        (OK_1, rst_stream(1), TRAILERS), resets(1, CLOSED)),
    Case("client/5.1/7", "closed by RST_STREAM: CONTINUATION is refused",
        (OK_1, rst_stream(1), continuation(1, MORE)), resets(1, CLOSED, PROTOCOL)),
    Case("client/5.1/8", "closed: DATA is STREAM_CLOSED",
        (response(*OK, ended=True), data(1, b"test", True)), fails(CLOSED)),
    Case("client/5.1/9", "closed: HEADERS is STREAM_CLOSED",
        (response(*OK, ended=True), response(*OK, ended=True)), fails(CLOSED)),
    Case("client/5.1/10", "closed: CONTINUATION is refused",
        (response(*OK, ended=True), continuation(1, MORE)), fails(CLOSED, PROTOCOL)),
    Case("client/5.1.1/1", "HEADERS of a stream never opened", (headers(101, OK_BLOCK, True),), fails(PROTOCOL)),
    Case("rfc9113/5.1.1", "HEADERS of a server's stream", (headers(2, OK_BLOCK, True),), fails(PROTOCOL)),
    Case("rfc9113/5.1.1", "DATA of a stream never opened", (data(3, b"x"),), fails(PROTOCOL)),
    Case("rfc9113/5.1.1", "RST_STREAM of a stream never opened", (rst_stream(3),), fails(PROTOCOL)),
    Case("rfc9113/5.1.1", "WINDOW_UPDATE of a stream never opened", (window_update(3, 1),), fails(PROTOCOL)),
    Case("client/5.4.1/1", "a connection error closes", (frame(Kind.PING, 3, bytes(8)),), fails(PROTOCOL)),
    Case("client/5.5/1", "an extension frame is ignored", (frame(0x16, 1, bytes(8)),), Alive()),
    Case("client/5.5/2", "an extension frame within a header block",
        (headers(1, OK_BLOCK, done=False), frame(0x16)), fails(PROTOCOL)),
    Case("client/6.1/1", "DATA on stream 0", (data(0, b"test", True),), fails(PROTOCOL)),
    Case("client/6.1/3", "DATA with more padding than payload",
        (OK_1, frame(Kind.DATA, 1, b"\x06test", PADDED)), fails(PROTOCOL)),
    Case("client/6.2/3", "HEADERS on stream 0", (headers(0, OK_BLOCK, True),), fails(PROTOCOL)),
    Case("client/6.2/4", "HEADERS with more padding than payload",
        (frame(Kind.HEADERS, 1, bytes((len(OK_BLOCK) + 1,)) + OK_BLOCK, PADDED | END_HEADERS),), resets(1, PROTOCOL)),
    Case("client/6.3/1", "PRIORITY on stream 0", (priority(0),), fails(PROTOCOL)),
    Case("client/6.3/2", "PRIORITY of 4 octets", (OK_1, frame(Kind.PRIORITY, 1, bytes(4))), resets(1, SIZE)),
    Case("client/6.4/1", "RST_STREAM on stream 0", (rst_stream(0),), fails(PROTOCOL)),
    Case("client/6.4/3", "RST_STREAM of 3 octets", (frame(Kind.RST_STREAM, 1, bytes(3)),), fails(SIZE)),
    Case("client/6.5/1", "SETTINGS with ACK and a payload", (frame(4, 0, bytes(6), ACK),), fails(SIZE)),
    Case("client/6.5/2", "SETTINGS on a stream", (frame(4, 1, b"\0\3\0\0\0\x64"),), fails(PROTOCOL)),
    Case("client/6.5/3", "SETTINGS of 3 octets", (frame(4, 0, b"\0\3\0"),), fails(SIZE)),
    Case("client/6.5.2/2", "too large an initial window", (settings((4, 1 << 31)),), fails(FLOW)),
    Case("client/6.5.2/3", "too small a frame size", (settings((5, (1 << 14) - 1)),), fails(PROTOCOL)),
    Case("client/6.5.2/4", "too large a frame size", (settings((5, 1 << 24)),), fails(PROTOCOL)),
    Case("client/6.5.2/5", "an unknown setting is ignored", (settings((0xFF, 1)),), Alive()),
    Case("rfc9113/6.5.2", "a server's ENABLE_PUSH of 1 is PROTOCOL_ERROR", (settings((2, 1)),), fails(PROTOCOL)),
    Case("rfc9113/6.5.2", "a server's ENABLE_PUSH of 0 is fine", (settings((2, 0)),), Alive()),
    Case("rfc9113/8.4", "PUSH_PROMISE is PROTOCOL_ERROR", (push_promise(1, 2, GET_BLOCK),), fails(PROTOCOL)),
    Case("client/6.7/2", "PING with ACK is not answered", (ping(b"unwanted", ack=True),), Alive()),
    Case("client/6.7/3", "PING on a stream", (frame(Kind.PING, 1, bytes(8)),), fails(PROTOCOL)),
    Case("client/6.7/4", "PING of 6 octets", (frame(Kind.PING, 0, bytes(6)),), fails(SIZE)),
    Case("client/6.8/1", "GOAWAY on a stream", (frame(Kind.GOAWAY, 1, bytes(8)),), fails(PROTOCOL)),
    Case("client/6.9/1", "WINDOW_UPDATE by 0", (window_update(0, 0),), fails(PROTOCOL)),
    Case("client/6.9/2", "WINDOW_UPDATE by 0 on a stream", (window_update(1, 0),), resets(1, PROTOCOL)),
    Case("client/6.9/3", "WINDOW_UPDATE of 3 octets", (frame(8, 0, b"\0\0\1"),), fails(SIZE)),
    Case("client/6.9.1/1", "too large a connection window",
        (window_update(0, MAX_WINDOW), window_update(0, MAX_WINDOW)), fails(FLOW)),
    Case("client/6.9.1/2", "too large a stream window",
        (window_update(1, MAX_WINDOW), window_update(1, MAX_WINDOW)), resets(1, FLOW)),
    Case("client/6.10/1", "CONTINUATION frames may follow HEADERS",
        (headers(1, OK_BLOCK[:2], done=False), continuation(1, OK_BLOCK[2:], False), continuation(1, b"")),
        Received([head(*OK)])),
    Case("client/6.10/2", "CONTINUATION, then another frame",
        (headers(1, OK_BLOCK, done=False), continuation(1, MORE, False), data(1, b"test", True)), fails(PROTOCOL)),
    Case("client/6.10/3", "CONTINUATION on stream 0", (continuation(0, MORE),), fails(PROTOCOL)),
    Case("client/6.10/4", "CONTINUATION after END_HEADERS", (OK_1, continuation(1, MORE)), fails(PROTOCOL)),
    # responses
    Case("rfc9113/8.1", "head, data and trailers",
        (OK_1, data(1, b"ab"), data(1, b"cd"), TRAILERS),
        Received([head(*OK), ("data", 1, b"abcd", False), ("trailers", 1, ((b"grpc-status", b"0"),))])),
    Case("rfc9113/8.1", "a head that is all", (response(*OK, ended=True),), Received([head(*OK, ended=True)])),
    Case("rfc9113/8.1", "interim responses are swallowed",
        (response((":status", "100")), response((":status", "103"), ("link", "</a>")), OK_1, TRAILERS),
        Received([head(*OK), ("trailers", 1, ((b"grpc-status", b"0"),))])),
    Case("rfc9113/8.1", "an interim response that ends",
        (response((":status", "100"), ended=True),), resets(1, PROTOCOL)),
    Case("rfc9113/8.1", "an interim response after the final one",
        (OK_1, response((":status", "100"))), resets(1, PROTOCOL)),
    Case("rfc9113/8.1", "DATA after an interim response",
        (response((":status", "100")), data(1, b"x")), resets(1, PROTOCOL)),
    Case("rfc9113/8.6", "status 101 does not exist", (response((":status", "101")),), resets(1, PROTOCOL)),
    Case("rfc9113/8.1", "DATA before the head", (data(1, b"x"),), resets(1, PROTOCOL)),
    Case("rfc9113/8.1", "an end before the head", (data(1, b"", True),), resets(1, PROTOCOL)),
    Case("rfc9113/8.1", "trailers without END_STREAM", (OK_1, data(1, b"x"), headers(1, MORE)), resets(1, PROTOCOL)),
    Case("rfc9113/8.1", "a second head", (OK_1, OK_1), resets(1, PROTOCOL)),
    *(
        Case("rfc9113/8.2.1", f"a grpc-message with {wrong!r} is malformed like any field",
            (OK_1, headers(1, block([("grpc-status", "0"), ("grpc-message", f"a{wrong}b")]), True)),
            resets(1, PROTOCOL))
        for wrong in "\0\r\n"
    ),
    Case("rfc9113/8.3", "a pseudo-field in trailers", (OK_1, headers(1, OK_BLOCK, True)), resets(1, PROTOCOL)),
    Case("rfc9113/8.3.2", "no :status", (response(("a", "b")),), resets(1, PROTOCOL)),
    Case("rfc9113/8.3.2", "two :status", (response((":status", "200"), (":status", "200")),), resets(1, PROTOCOL)),
    *(
        Case("rfc9113/8.3.2", f"a :status of {wrong!r}", (response((":status", wrong)),), resets(1, PROTOCOL))
        for wrong in ("", "abc", "20", "2000", "+20", "2.0")
    ),
    Case("rfc9113/8.3", "a request's pseudo-field", (response(*OK, (":path", "/")),), resets(1, PROTOCOL)),
    Case("rfc9113/8.3", ":status after a regular field", (response(("a", "b"), *OK),), resets(1, PROTOCOL)),
    Case("rfc9113/8.2", "an upper-case name", (response(*OK, ("A", "b")),), resets(1, PROTOCOL)),
    Case("rfc9113/8.2.2", "a connection-specific field",
        (response(*OK, ("connection", "close")),), resets(1, PROTOCOL)),
    Case("rfc9113/8.1.1", "less DATA than content-length",
        (response(*OK, ("content-length", "5")), data(1, b"1234", True)), resets(1, PROTOCOL)),
    Case("rfc9113/8.1.1", "more DATA than content-length",
        (response(*OK, ("content-length", "3")), data(1, b"1234")), resets(1, PROTOCOL)),
    Case("rfc9113/8.1.1", "content-length and no DATA",
        (response(*OK, ("content-length", "5"), ended=True),), resets(1, PROTOCOL)),
    Case("rfc9113/8.1.1", "less DATA than content-length before trailers",
        (response(*OK, ("content-length", "5")), data(1, b"1234"), TRAILERS), resets(1, PROTOCOL)),
    Case("rfc9113/8.1.1", "304 has a content-length and no content",
        (response((":status", "304"), ("content-length", "5"), ended=True),),
        Received([head((":status", "304"), ("content-length", "5"), ended=True)])),
    Case("rfc9113/8.1", "RST_STREAM with NO_ERROR after the response",
        (response(*OK, ended=True), rst_stream(1, Code.NO_ERROR)), Received([head(*OK, ended=True)])),
    Case("rfc9113/5.1", "WINDOW_UPDATE may come late", (response(*OK, ended=True), window_update(1, 9)), Alive()),
]  # fmt: skip


@pytest.mark.parametrize("case", CLIENT, ids=lambda case: f"{case.number} {case.promise}")
def test_a_client_keeps_the_promise_of(case):
    peer = Peer(is_client=True, app=consume)
    peer.open(GET, ended=True)
    peer.send(*case.sends)
    case.expected.check(peer)


def test_the_first_bytes_of_a_client_are_the_preface_and_settings_that_refuse_pushes():
    peer = Peer(is_client=True, greeting=None)
    assert peer.sent_preface == PREFACE
    first = peer.frames[0]
    assert (first.kind, first.flags, first.stream) == (Kind.SETTINGS, 0, 0)
    assert first.pairs[Set.ENABLE_PUSH] == 0
    assert first.pairs[Set.MAX_FRAME] == Limits.frame_bytes
    assert first.pairs[Set.MAX_HEADER_LIST] == Limits.header_bytes


@pytest.mark.parametrize(
    "junk",
    [ping(), goaway(), headers(1, OK_BLOCK), SETTINGS_ACK, b"HTTP/1.1 400 Bad Request\r\n\r\n", window_update(0, 1)],
    ids=["ping", "goaway", "headers", "settings ack", "HTTP/1.1", "window update"],
)
def test_a_server_whose_first_frame_is_not_settings_is_refused(junk):
    peer = Peer(is_client=True, greeting=None)
    peer.send(junk)
    assert peer.connection.closed
    assert peer.failure in (PROTOCOL, SIZE)


@pytest.mark.parametrize("kind", [data(1, b"x"), OK_1, response(*OK, ended=True)], ids=["DATA", "HEADERS", "the end"])
def test_frames_for_a_stream_that_a_client_has_reset_are_ignored(kind):
    peer = Peer(is_client=True, app=consume)
    stream = peer.open(GET, ended=True)
    peer.connection.reset(stream, ErrorCode.CANCEL)
    peer.send(kind)
    assert peer.resets(1) == [Code.CANCEL]
    assert not peer.all(HeadersReceived)
    assert not peer.all(DataReceived)
    assert peer.answers_pings()


def test_a_server_that_ends_its_half_first_leaves_the_client_its_own():
    peer = Peer(is_client=True, app=consume)
    stream = peer.open(POST)
    peer.send(response(*OK, ended=True))
    peer.connection.send_data(stream, [b"still sending"], ended=True)
    peer.heard()
    assert peer.of(Kind.DATA, 1) == [(Kind.DATA, END_STREAM, 1, b"still sending")]
    assert 1 not in peer.connection.streams


def test_a_server_may_end_a_call_early_and_ask_for_no_more():
    peer = Peer(is_client=True, app=consume)
    stream = peer.open(POST)
    peer.send(response(*OK, ended=True), rst_stream(1, Code.NO_ERROR))
    assert told(peer.events)[-1] == ("reset", 1, Code.NO_ERROR, True)
    assert stream.id not in peer.connection.streams
    assert peer.answers_pings()


def test_data_after_the_end_of_a_response_to_an_unfinished_request_is_stream_closed():
    peer = Peer(is_client=True, app=consume)
    peer.open(POST)
    peer.send(response(*OK, ended=True), data(1, b"x"))
    StreamFails(1, (CLOSED,)).check(peer)


def test_trailers_of_a_request_are_told():
    peer = Peer()
    peer.send(POST_1, data(1, b"x"), headers(1, MORE, True))
    assert peer.all(TrailersReceived)[0].fields == ((b"x-dummy1", b"one"),)
