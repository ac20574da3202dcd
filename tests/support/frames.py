"""HTTP/2 by hand: frames made and read byte by byte, and a peer that speaks them to a Connection without a socket.

Nothing here comes from the code under test: the codes are h2's, the header blocks hpack's (or literal bytes).
"""

import gc
import sys
from collections.abc import Callable, Iterable
from enum import IntEnum
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

from h2.errors import ErrorCodes as Code
from hpack import Decoder, Encoder
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from cube.rpc.headers import encode
from cube.rpc.http2 import (
    Connection,
    ConnectionFailed,
    DataReceived,
    HeadersReceived,
    RequestReceived,
    ResponseReceived,
    Stream,
    StreamReset,
    TrailersReceived,
)
from cube.rpc.limits import Limits

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 1, 1, 4, 8, 32
MAX_WINDOW = 2**31 - 1


class Kind(IntEnum):
    """Frame types (RFC 9113 §6)."""

    DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)


class Set(IntEnum):
    """Settings (RFC 9113 §6.5.2)."""

    HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_HEADER_LIST = range(1, 7)


def frame(kind: int, stream: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    """Any frame, right or wrong."""
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def data(stream: int, payload: bytes = b"", ended: bool = False, pad: int | None = None) -> bytes:
    body, flag = _padded(payload, pad)
    return frame(Kind.DATA, stream, body, flag | ended)


def headers(
    stream: int, block: bytes, ended: bool = False, done: bool = True, pad: int | None = None, priority: bytes = b""
) -> bytes:
    body, flag = _padded(priority + block, pad)
    flags = flag | ended | (END_HEADERS if done else 0) | (PRIORITY if priority else 0)
    return frame(Kind.HEADERS, stream, body, flags)


def continuation(stream: int, block: bytes, done: bool = True) -> bytes:
    return frame(Kind.CONTINUATION, stream, block, END_HEADERS if done else 0)


def priority_fields(depends: int = 0, weight: int = 16, exclusive: bool = False) -> bytes:
    return (depends | exclusive << 31).to_bytes(4) + bytes((weight - 1,))


def priority(stream: int, depends: int = 0, weight: int = 16, exclusive: bool = False) -> bytes:
    return frame(Kind.PRIORITY, stream, priority_fields(depends, weight, exclusive))


def rst_stream(stream: int, code: int = Code.CANCEL) -> bytes:
    return frame(Kind.RST_STREAM, stream, code.to_bytes(4))


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(Kind.SETTINGS, 0, b"".join(name.to_bytes(2) + value.to_bytes(4) for name, value in pairs))


SETTINGS_ACK = frame(Kind.SETTINGS, flags=ACK)


def push_promise(stream: int, promised: int, block: bytes) -> bytes:
    return frame(Kind.PUSH_PROMISE, stream, promised.to_bytes(4) + block, END_HEADERS)


def ping(payload: bytes = b"12345678", ack: bool = False) -> bytes:
    return frame(Kind.PING, 0, payload, ACK if ack else 0)


def goaway(last: int = 0, code: int = Code.NO_ERROR, text: bytes = b"") -> bytes:
    return frame(Kind.GOAWAY, 0, last.to_bytes(4) + code.to_bytes(4) + text)


def window_update(stream: int, increment: int) -> bytes:
    return frame(Kind.WINDOW_UPDATE, stream, increment.to_bytes(4))


def _padded(payload: bytes, pad: int | None) -> tuple[bytes, int]:
    return (payload, 0) if pad is None else (bytes((pad,)) + payload + bytes(pad), PADDED)


class Frame(NamedTuple):
    """A frame that was read."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def ended(self) -> bool:
        return self.kind in (Kind.DATA, Kind.HEADERS) and bool(self.flags & END_STREAM)

    @property
    def code(self) -> int:
        """Of RST_STREAM and GOAWAY."""
        return int.from_bytes(self.payload[-4:] if self.kind == Kind.RST_STREAM else self.payload[4:8])

    @property
    def pairs(self) -> dict[int, int]:
        """Of SETTINGS."""
        return {
            int.from_bytes(self.payload[at : at + 2]): int.from_bytes(self.payload[at + 2 : at + 6])
            for at in range(0, len(self.payload), 6)
        }


def read_frames(raw: bytes) -> list[Frame]:
    """All frames of some bytes, which end with the last one."""
    frames, at = [], 0
    while at < len(raw):
        assert len(raw) - at >= 9, "half a frame header"
        size = int.from_bytes(raw[at : at + 3])
        assert len(raw) - at >= 9 + size, "half a frame"
        stream = int.from_bytes(raw[at + 5 : at + 9])
        frames.append(Frame(raw[at + 3], raw[at + 4], stream, bytes(raw[at + 9 : at + 9 + size])))
        at += 9 + size
    return frames


# Header blocks

Fields = Iterable[tuple[str | bytes, str | bytes]]
GET = ((":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "localhost"))
POST = ((":method", "POST"), *GET[1:])
OK = ((":status", "200"), ("content-type", "text/plain"))
_HUFFMAN = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)


def block(fields: Fields, huffman: bool = True) -> bytes:
    """A block from an encoder of its own. Several may follow each other: each refers to what it added itself."""
    return Encoder().encode(list(fields), huffman=huffman)


def integer(first: int, prefix: int, number: int) -> bytes:
    """RFC 7541 §5.1: a number behind the bits of `first`."""
    most = (1 << prefix) - 1
    if number < most:
        return bytes((first | number,))
    out, number = [first | most], number - most
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def string(text: bytes, huffman: bool = False) -> bytes:
    """RFC 7541 §5.2."""
    coded = _HUFFMAN.encode(text) if huffman else text
    return integer(0x80 if huffman else 0, 7, len(coded)) + coded


WITHOUT_INDEXING, NEVER_INDEXED, INDEXING = (0x00, 4), (0x10, 4), (0x40, 6)


def literal(name: bytes | int, value: bytes, form: tuple[int, int] = WITHOUT_INDEXING, huffman: bool = False) -> bytes:
    """RFC 7541 §6.2: a literal field; a name that is a number is an index."""
    if isinstance(name, int):
        return integer(*form, name) + string(value, huffman)
    return bytes(form[:1]) + string(name, huffman) + string(value, huffman)


def indexed(index: int) -> bytes:
    """RFC 7541 §6.1."""
    return integer(0x80, 7, index)


def table_size(size: int) -> bytes:
    """RFC 7541 §6.3."""
    return integer(0x20, 5, size)


# A peer

App = Callable[[Connection, Any], None]


def apart(events: Iterable[Any]) -> list[Any]:
    """The events, whole requests and responses as the frames they came in."""
    found: list[Any] = []
    for event in events:
        if isinstance(event, RequestReceived):
            stream, head, body = event
            found += HeadersReceived(stream, head, False), DataReceived(stream, body, True)
        elif isinstance(event, ResponseReceived):
            stream, head, body, trailers = event
            found += HeadersReceived(stream, head, False), DataReceived(stream, body, False)
            found.append(TrailersReceived(stream, trailers.fields, trailers))
        else:
            found.append(event)
    return found


class Peer:
    """The far end of a Connection under test: sends frames, reads what comes back, remembers events and frames.

    `app` is the application on the Connection's side: it is shown every event as a server's or client's would be.
    """

    def __init__(
        self,
        is_client: bool = False,
        limits: Limits | None = None,
        app: App | None = None,
        greeting: tuple[tuple[int, int], ...] | None = (),
    ):
        """is_client: whether the Connection is; greeting: the settings of our preface, None to send none."""
        self.connection = Connection(is_client=is_client, limits=limits or Limits())
        self.is_client, self.app = is_client, app
        self.events: list[Any] = []
        self.frames: list[Frame] = []
        self.sent_preface = b""
        self._decoder = Decoder(1 << 20)
        self.heard()
        if greeting is not None:
            self.send((b"" if is_client else PREFACE) + settings(*greeting), SETTINGS_ACK)

    def send(self, *pieces: bytes) -> list[Any]:
        """Each piece is received on its own, then the application sees the events; returns them all."""
        news = []
        for piece in pieces:
            events = apart(self.connection.receive(piece))
            for event in events:
                if self.app:
                    self.app(self.connection, event)
            news += events
            self.heard()
        self.events += news
        return news

    def heard(self) -> list[Frame]:
        """What the Connection has sent since the last time; kept in `frames` too."""
        raw = b"".join(bytes(part) for part in self.connection.take())
        if self.is_client and not self.sent_preface and raw:
            self.sent_preface = raw[: len(PREFACE)]
            raw = raw[len(PREFACE) :]
        news = read_frames(raw)
        self.frames += news
        return news

    def open(self, fields: Fields = POST, ended: bool = False) -> Stream:
        """The Connection, a client, opens a stream."""
        stream = self.connection.open_stream(encode([(_b(n), _b(v)) for n, v in fields]), ended)
        self.heard()
        return stream

    def all(self, kind: type) -> list[Any]:
        """The events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def streams(self) -> list[Stream]:
        """Those that were announced by a head, in order."""
        return [event.stream for event in self.all(HeadersReceived)]

    def of(self, kind: Kind, stream: int | None = None) -> list[Frame]:
        """The frames of a kind that were heard."""
        return [f for f in self.frames if f.kind == kind and stream in (None, f.stream)]

    @property
    def failure(self) -> int | None:
        """The code of the connection error that this peer was told of."""
        codes = [f.code for f in self.of(Kind.GOAWAY) if f.code]
        assert len(codes) <= 1
        return codes[0] if codes else None

    def resets(self, stream: int) -> list[int]:
        """The codes of the RST_STREAM frames for a stream."""
        return [f.code for f in self.of(Kind.RST_STREAM, stream)]

    def reply(self, stream: int) -> tuple[list[dict[bytes, bytes]], bytes, bool]:
        """Header lists, data and whether END_STREAM was seen, of one stream."""
        heads, body, ended, parts = [], b"", False, b""
        for f in self.frames:
            if f.stream != stream:
                continue
            ended = ended or f.ended
            if f.kind == Kind.DATA:
                body += f.payload
            elif f.kind in (Kind.HEADERS, Kind.CONTINUATION):
                parts += f.payload
                if f.flags & END_HEADERS:
                    heads.append(dict(self._decoder.decode(parts, raw=True)))
                    parts = b""
        return heads, body, ended

    def answers_pings(self) -> bool:
        """Whether the connection is alive: it answers, and nothing has failed."""
        payload = b"isalive?"
        self.send(ping(payload))
        return self.frames[-1:] == [Frame(Kind.PING, ACK, 0, payload)] and not self.connection.closed


def _b(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


BODY = b"The answer to everything"


def answer(connection: Connection, event: Any) -> None:
    """An application that reads a request to its end, and then answers with BODY."""
    consume(connection, event)
    ended = isinstance(event, TrailersReceived) or getattr(event, "ended", False)
    if ended:
        connection.send_headers(event.stream, encode([(b":status", b"200"), (b"content-type", b"text/plain")]))
        connection.send_data(event.stream, [BODY], ended=True)


class Windows:
    """What a Connection allows its peer to send, worked out from the frames that the peer has heard."""

    def __init__(self, peer: Peer):
        self._peer, self._read = peer, 0
        self.connection, self.initial = 65_535, 65_535
        self._streams: dict[int, int] = {}
        self._look()

    def _look(self) -> None:
        news = self._peer.frames[self._read :]
        self._read += len(news)
        for f in news:
            if f.kind == Kind.WINDOW_UPDATE:
                more = int.from_bytes(f.payload)
                assert 0 < more <= MAX_WINDOW
                if f.stream == 0:
                    self.connection += more
                else:
                    self._streams[f.stream] = self._streams.get(f.stream, 0) + more
                assert max(self.connection, self.initial + self._streams.get(f.stream, 0)) <= MAX_WINDOW
            elif f.kind == Kind.SETTINGS:
                self.initial = f.pairs.get(Set.INITIAL_WINDOW, self.initial)

    def room(self, stream: int = 0) -> int:
        """Bytes that may be sent on a stream now; of the connection alone for stream 0."""
        self._look()
        return min(self.connection, self.initial + self._streams.get(stream, 0)) if stream else self.connection

    def send(self, stream: int, payload: bytes, ended: bool = False, pad: int | None = None) -> list[Any]:
        """A DATA frame that is allowed."""
        raw = data(stream, payload, ended, pad)
        size = len(raw) - 9
        assert size <= self.room(stream), "stalled"
        self.connection -= size
        self._streams[stream] = self._streams.get(stream, 0) - size
        return self._peer.send(raw)


def consume(connection: Connection, event: Any) -> None:
    """An application that takes what comes."""
    if isinstance(event, DataReceived):
        connection.consumed(event.stream, len(event.data))


def told(events: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Events as plain values. DATA frames may arrive in any portions: those of a stream in a row are one."""
    out: list[tuple[Any, ...]] = []
    for event in apart(events):
        if isinstance(event, HeadersReceived):
            out.append(("head", event.stream.id, event.head.fields, event.ended))
        elif isinstance(event, DataReceived):
            before = b""
            if out and out[-1][:2] == ("data", event.stream.id) and not out[-1][3]:
                before = out.pop()[2]
            out.append(("data", event.stream.id, before + bytes(event.data), event.ended))
        elif isinstance(event, TrailersReceived):
            out.append(("trailers", event.stream.id, tuple(event.fields)))
        elif isinstance(event, StreamReset):
            out.append(("reset", event.stream.id, int(event.code), event.by_peer))
        elif isinstance(event, ConnectionFailed):
            out.append(("failed", int(event.code)))
        else:
            out.append((type(event).__name__, *(getattr(part, "id", part) for part in event)))
    return out


def weight(*things: Any) -> int:
    """Bytes of everything that some objects keep alive, code apart: what a Connection or a Decoder costs now."""
    seen: set[int] = set()
    total, left = 0, list(things)
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | FunctionType | BuiltinFunctionType):
            continue
        seen.add(id(thing))
        total += sys.getsizeof(thing)
        left += gc.get_referents(thing)
    return total
