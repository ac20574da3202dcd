"""gRPC's client end of one HTTP/2 connection, without socket, clock or thread: `channel` drives it.

A call's head is constant but for its time-out and metadata: `method` makes it once. Replies reach the caller through
`ClientCall`; `on_event` is called from within `receive`, `lost` or `cancel`.
"""

import re
import struct
from collections import deque
from collections.abc import Callable, Sequence

from cube.errors import ServingError, from_wire
from cube.rpc import framing
from cube.rpc.calls import Buffer, Field, Reply
from cube.rpc.headers import Head, encode
from cube.rpc.http2 import (
    Connection,
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    HeadersReceived,
    PingAcked,
    ResponseReceived,
    SettingsReceived,
    State,
    Stream,
    StreamReset,
    StreamWritable,
    TrailersReceived,
)  # fmt: skip
from cube.rpc.limits import Limits

_PATH = re.compile(r"[!-~]+")
_COMPRESSIONS = (None, *(name for name in framing.ENCODINGS if name != "identity"))
_TIMEOUT = b"\x00\x0cgrpc-timeout"  # a literal that is not indexed: RFC 7541 §6.2.2

# gRPC's meaning of HTTP/2's error codes, and of HTTP's where the answer is not from a gRPC server.
_BY_RESET = {
    ErrorCode.REFUSED_STREAM: "UNAVAILABLE", ErrorCode.CANCEL: "CANCELLED",
    ErrorCode.ENHANCE_YOUR_CALM: "RESOURCE_EXHAUSTED", ErrorCode.INADEQUATE_SECURITY: "PERMISSION_DENIED",
}  # fmt: skip
_BY_HTTP = {
    b"400": "INTERNAL", b"401": "UNAUTHENTICATED", b"403": "PERMISSION_DENIED", b"404": "UNIMPLEMENTED",
    b"429": "UNAVAILABLE", b"502": "UNAVAILABLE", b"503": "UNAVAILABLE", b"504": "UNAVAILABLE",
}  # fmt: skip


class _ReplyHead:
    """What a reply's first fields mean; kept on their Shape."""

    __slots__ = ("encoding", "error", "is_good")

    def __init__(self, head: Head):
        fields = dict(head.fields)
        self.error: tuple[str, str] | None = None
        self.encoding = "identity"
        status, kind = head.status or b"", fields.get(b"content-type", b"")
        if status != b"200":
            what = f"the answer is HTTP status {status.decode('latin-1')}, not gRPC"
            self.error = _BY_HTTP.get(status, "UNKNOWN"), what
        elif not kind.startswith(b"application/grpc"):
            self.error = "UNKNOWN", f"the answer's content-type is {kind.decode('latin-1')[:100]!r}, not gRPC's"
        else:
            try:
                self.encoding = framing.encoding_of(fields.get(b"grpc-encoding", b"identity"))
            except ServingError as error:
                self.error = "INTERNAL", str(error)
        self.is_good = self.error is None


class _ReplyEnd:
    """What a reply's last fields mean; kept on their Shape where nothing in them changes from call to call."""

    __slots__ = ("_bad", "_status", "is_good", "trailing")

    def __init__(self, head: Head):
        self._status, self._bad = framing.decode_status(head.fields), ""
        self.trailing: tuple[Field, ...] = ()
        try:
            self.trailing = framing.decode_metadata(head.fields)
        except ServingError as error:
            self._bad = str(error)
        self.is_good = self._status is not None and self._status[0] == "OK" and not self._bad

    def error(self) -> ServingError | None:
        """A new error for every call; None if the status is OK."""
        if self._status is None:
            return from_wire("UNKNOWN", "the reply ends without a status")
        code, message, details = self._status
        if code != "OK":
            return from_wire(code, message, details, self.trailing)
        return from_wire("INTERNAL", self._bad) if self._bad else None


class ClientCall:
    """One call in flight. `on_event` tells of news: once, at its end, for a unary one."""

    over = False
    error: ServingError | None = None  # why it failed; None at the end of one that did not
    initial: tuple[Field, ...] | None = None  # the server's metadata, once its head has come
    trailing: tuple[Field, ...] = ()
    _encoding = "identity"
    _messages: framing.Messages | None = None  # takes replies apart that did not come whole
    _owed = 0

    def __init__(
        self,
        owner: "ClientCalls",
        stream: Stream,
        on_event: "Callable[[ClientCall], None]",
        unary: bool,
        most: int,
        compression: str | None,
    ):
        self.on_event = on_event
        self.messages: deque[Buffer] = deque()  # received, not yet taken
        self._owner, self._stream, self._unary = owner, stream, unary
        self._most, self._compression = most, compression

    def is_over(self) -> bool:
        """`over`, for who wants a function."""
        return self.over

    @property
    def pending(self) -> int:
        """Bytes that wait for the server's windows."""
        return self._stream.pending

    def take_message(self) -> Buffer:
        """The oldest message; IndexError if there is none. Lets the server send more."""
        message = self.messages.popleft()
        if not self.messages:
            self._owner.settle(self)
        return message

    def send(self, message: Reply) -> None:
        """Send one more request. Nothing happens on a call that is over. Raises TypeError, ValueError: see _framed.

        Large buffers are not copied: they must not change until the call is over.
        """
        self._owner.http2.send_data(self._stream, _framed(message, self._compression)[0])

    def end(self) -> None:
        """All requests are sent."""
        self._owner.http2.send_data(self._stream, (), ended=True)

    def cancel(self, reason: ServingError | None = None) -> None:
        """Give the call up: it ends with `reason`, or CANCELLED. Nothing happens on one that is over."""
        if not self.over:
            self._owner.http2.reset(self._stream, ErrorCode.CANCEL)
            self._owner.finish(self, reason or from_wire("CANCELLED", "the caller gave up"))


class ClientCalls:
    """The calls of one connection. Not thread-safe: `channel` keeps it to one thread at a time."""

    def __init__(self, limits: Limits, authority: str, scheme: str = "http", user_agent: str = "cube-serving"):
        self.http2 = Connection(is_client=True, limits=limits)
        self.calls = 0  # in flight
        self.pongs = 0  # answers to our pings
        self.greeted = False  # the server's first settings have come: it is there, and speaks HTTP/2
        self.going_away = ""  # what the server said when it announced its end
        self._limits = limits
        self._common = [
            (b":method", b"POST"), (b":scheme", scheme.encode()), (b":authority", authority.encode()),
            (b"te", b"trailers"), (b"content-type", b"application/grpc"), (b"user-agent", user_agent.encode()),
            (b"grpc-accept-encoding", framing.ACCEPTED),
        ]  # fmt: skip

    @property
    def can_start(self) -> bool:
        """Whether a call can be started on this connection now."""
        return self.http2.can_open

    @property
    def full(self) -> bool:
        """Whether only the server's limit on calls in flight stands against another one."""
        return not self.http2.is_going_away and not self.http2.can_open

    @property
    def closed(self) -> bool:
        """Write what take() gives, then close the transport."""
        return self.http2.closed

    def method(self, path: str, compression: str | None = None) -> bytes:
        """The constant part of a head, for `start`. compression: "gzip" or "deflate", of the requests.

        Raises ValueError for what cannot be sent.
        """
        if not _PATH.fullmatch(path):
            raise ValueError(f"path {path!r}: expected printable ASCII without spaces, /package.Service/Method")
        _check_compression(compression)
        fields = [self._common[0], self._common[1], (b":path", path.encode("ascii")), *self._common[2:]]
        if compression is not None:
            fields.append((b"grpc-encoding", compression.encode()))
        return encode(fields)

    def start(
        self,
        method: bytes,
        request: Reply | None,
        *,
        timeout_s: float | None,
        on_event: Callable[[ClientCall], None],
        metadata: Sequence[Field] = (),
        compression: str | None = None,
        max_reply_bytes: int | None = None,
        unary: bool = True,
    ) -> ClientCall:
        """Start a call. `request` is its only one; None if `send` and `end` will follow.

        Raises http2.Refused unless can_start, BadRequest for metadata that cannot be sent, and TypeError or ValueError
        for a message or a compression that is none. Then nothing has happened: all that can fail comes before the
        stream is opened.
        """
        block = method
        if timeout_s is not None:
            value = framing.encode_timeout(timeout_s)
            block = b"%b%b%c%b" % (block, _TIMEOUT, len(value), value)
        if metadata:
            block += encode(framing.encode_metadata(metadata))
        if compression is not None:
            _check_compression(compression)
        if request is None:
            stream = self.http2.open_stream(block, ended=False)
        else:
            stream = self.http2.request(block, *_framed(request, compression))
        most = self._limits.message_bytes if max_reply_bytes is None else max_reply_bytes
        call = stream.call = ClientCall(self, stream, on_event, unary, most, compression)
        self.calls += 1
        return call

    def receive(self, data: Buffer) -> None:
        """Process bytes of the server. Never raises."""
        for event in self.http2.receive(data):
            if type(event) is ResponseReceived:
                self._on_response(event)
            elif isinstance(event, DataReceived):
                self._on_data(event)
            elif isinstance(event, HeadersReceived):
                self._on_headers(event)
            elif isinstance(event, TrailersReceived):
                self._on_status(event.stream.call, event.head)
            elif isinstance(event, StreamReset):
                self._on_reset(event)
            elif isinstance(event, StreamWritable):
                if event.stream.call is not None and not event.stream.call._unary:
                    event.stream.call.on_event(event.stream.call)
            elif isinstance(event, PingAcked):
                self.pongs += 1
            elif isinstance(event, SettingsReceived):
                self.greeted = True
            elif isinstance(event, ConnectionFailed):
                self.going_away = event.reason

    def take(self) -> list[Buffer]:
        """What to write now."""
        return self.http2.take()

    def ping(self, payload: bytes) -> None:
        """8 bytes that the server is to send back; see `pongs`."""
        self.http2.ping(payload)

    def lost(self, reason: str) -> None:
        """The transport is gone: calls in flight end with UNAVAILABLE."""
        streams = list(self.http2.streams.values())
        self.http2.abandon()
        for stream in streams:
            if stream.call is not None:
                self.finish(stream.call, from_wire("UNAVAILABLE", reason))

    def close(self) -> None:
        """Cancel what is in flight and say goodbye."""
        for stream in list(self.http2.streams.values()):
            if stream.call is not None:
                stream.call.cancel(from_wire("UNAVAILABLE", "the channel was closed"))
        self.http2.goaway()

    def settle(self, call: ClientCall) -> None:
        """Give back the credit for replies that were taken."""
        owed, call._owed = call._owed, 0
        if owed:
            self.http2.consumed(call._stream, owed)

    def finish(self, call: ClientCall, error: ServingError | None) -> None:
        """A call is over."""
        if call.over:
            return
        call.over, call.error = True, error
        call._stream.call = None
        self.calls -= 1
        call.on_event(call)

    def _on_response(self, event: ResponseReceived) -> None:
        """A whole reply at once."""
        stream, head, data, trailers = event
        call: ClientCall | None = stream.call
        if call is None:
            return
        note, end, size = head.shape.note, trailers.shape.note, len(data) - 5
        if (  # the usual case: one message that is not compressed, an OK, no metadata
            call._unary
            and type(note) is _ReplyHead
            and note.is_good
            and len(head.fields) <= 2  # :status and content-type: no metadata
            and type(end) is _ReplyEnd
            and end.is_good
            and not trailers.volatile
            and not end.trailing
            and 0 <= size <= call._most
            and framing.PREFIX.unpack_from(data) == (0, size)
        ):
            call.initial = ()
            call.messages.append(framing.piece(data, 5, size + 5))
            self.finish(call, None)
            return
        self._on_headers(HeadersReceived(stream, head, False))
        self._on_data(DataReceived(stream, data, False))
        self._on_status(stream.call, trailers)

    def _on_headers(self, event: HeadersReceived) -> None:
        stream, head, ended = event
        call: ClientCall | None = stream.call
        if call is None:
            return
        note = head.shape.note
        if type(note) is not _ReplyHead:
            note = head.shape.note = _ReplyHead(head)
        if note.error is not None and framing.decode_status(head.fields) is None:
            self._refuse(call, from_wire(*note.error))
            return
        if ended:  # a reply that is nothing but a status: no metadata came before it
            call.initial = ()
            self._on_status(call, head)
            return
        call._encoding = note.encoding
        if call._unary and len(head.fields) <= 2:  # :status and content-type: no metadata
            call.initial = ()
            return
        try:
            call.initial = framing.decode_metadata(head.fields)
        except ServingError as error:
            self._refuse(call, error)
            return
        if not call._unary:
            call.on_event(call)

    def _on_data(self, event: DataReceived) -> None:
        stream, data, ended = event
        call: ClientCall | None = stream.call
        if call is None:
            self.http2.consumed(stream, len(data))
            return
        had, size = len(call.messages), len(data) - 5
        if (  # the usual case: the one reply, whole and not compressed
            call._unary
            and call._messages is None
            and not had
            and not ended
            and 0 <= size <= call._most
            and framing.PREFIX.unpack_from(data) == (0, size)
        ):
            call.messages.append(framing.piece(data, 5, size + 5))
            return
        if call._messages is None:
            call._messages = framing.Messages(call._most, call._encoding)
        try:
            for message in call._messages.feed(data):
                if call._unary and call.messages:
                    raise from_wire("INTERNAL", "several replies to a call that has one")
                call.messages.append(message)
        except ServingError as error:
            self.http2.consumed(stream, len(data))
            self._refuse(call, error)
            return
        if call._unary or not call.messages:
            self.http2.consumed(stream, len(data))
        else:
            call._owed += len(data)
        if ended:
            self._refuse(call, from_wire("UNKNOWN", "the reply ends without a status"))
        elif not call._unary and len(call.messages) > had:
            call.on_event(call)

    def _on_status(self, call: ClientCall | None, head: Head) -> None:
        """The end of a reply."""
        if call is None:
            return
        note = head.shape.note if not head.volatile else None
        if type(note) is not _ReplyEnd:
            note = _ReplyEnd(head)
            if not head.volatile:
                head.shape.note = note
        call.trailing = note.trailing
        error = note.error()
        if error is None:
            if call._messages is not None and not call._messages.is_between:
                error = from_wire("INTERNAL", "the reply ends within a message")
            elif call._unary and len(call.messages) != 1:
                error = from_wire("INTERNAL", f"{len(call.messages)} replies to a call that has one")
        if call._stream.state is not State.CLOSED:  # the server wants no more requests
            self.http2.reset(call._stream, ErrorCode.NO_ERROR)
        self.finish(call, error)

    def _on_reset(self, event: StreamReset) -> None:
        call: ClientCall | None = event.stream.call
        if call is None:
            return
        try:
            name = ErrorCode(event.code).name
        except ValueError:
            name = f"code {event.code}"
        status = _BY_RESET.get(event.code, "INTERNAL")  # type: ignore[call-overload]
        who = "the server" if event.by_peer else "this end"
        refused = event.by_peer and event.code == ErrorCode.REFUSED_STREAM
        if self.http2.closed:
            status, text = "UNAVAILABLE", f"the connection failed: {self.http2.failure}"
        else:
            text = f"{who} reset the call: {name}"
        self.finish(call, from_wire(status, text, never_processed=refused))

    def _refuse(self, call: ClientCall, error: ServingError) -> None:
        """A reply that cannot be used."""
        self.http2.reset(call._stream, ErrorCode.CANCEL)
        self.finish(call, error)


def _check_compression(compression: str | None) -> None:
    if compression not in _COMPRESSIONS:
        raise ValueError(
            f"compression {compression!r}: expected None or one of {', '.join(map(str, _COMPRESSIONS[1:]))}"
        )


def _framed(message: Reply, compression: str | None) -> tuple[list[Buffer], int]:
    """A request as DATA, and its size. Raises TypeError, ValueError for what is no message."""
    try:
        buffers, size = framing.frame(message) if compression is None else framing.compressed(message, compression)
    except (TypeError, BufferError) as error:
        raise _no_message(message, str(error)) from error
    except struct.error as error:
        raise ValueError("a message of 4 GiB or more, which gRPC cannot carry") from error
    if type(message) is not bytes:
        for buffer in buffers:
            if type(buffer) is memoryview and not buffer.c_contiguous:  # no transport could write it
                raise _no_message(message, "it has gaps")
    return buffers, size


def _no_message(message: object, why: str) -> TypeError:
    kind = type(message).__name__
    return TypeError(f"a message that is {kind}: expected a C-contiguous buffer or a list of them ({why})")
