"""An HTTP/2 connection (RFC 9113) as a state machine: bytes in, events out, bytes to write in `out`.

No socket, no clock, no task and no gRPC in here; `calls` gives it meaning, `listener` and `channel` move its bytes.
Both ends are the same class: `is_client` says which. Server push does not exist (a client of ours refuses it).

How it is organised:

* `receive` cuts the input into frames. A DATA frame is passed on as far as it has arrived, so that a frame of 1 MiB
  needs no buffer here; all other frames are small, are waited for, and go to the method `_KINDS` names.
* What a frame does to a stream is a table (`_RECEIVED`, `_SENT`): state × step → state, or the error.
* `_ConnectionError` and `_StreamError` are raised where a rule of the RFC is broken, and handled in one place each.
* Outgoing data waits in its stream's queue for the peer's windows; `_pump` takes turns, a frame at a time.
* A peer's patience with us is the RFC's; ours with a peer is `Limits.useless_frames`: frames that carry no work cost,
  work earns (`_waste`, `_earn`), and who runs out is told ENHANCE_YOUR_CALM. Every flood ends there.
"""

import enum
from collections import deque
from collections.abc import Sequence
from struct import Struct
from typing import Any, NamedTuple

from cube.rpc.headers import CompressionError, Decoder, Field, Head, TooLarge
from cube.rpc.limits import Limits

Buffer = bytes | bytearray | memoryview

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW = (1 << 31) - 1
MAX_STREAM_ID = (1 << 31) - 1
DEFAULT_WINDOW = 65_535
DEFAULT_FRAME = 16_384
REMEMBERED = 2_048  # streams that were reset, whose late frames are no fault of the peer's
WORK = 256  # bytes in a DATA frame that make up for a useless frame; fewer could be sent for that alone


class ErrorCode(enum.IntEnum):
    """RFC 9113 §7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class State(enum.IntEnum):
    """RFC 9113 §5.1, without the reserved states: there is no push."""

    IDLE = 0
    OPEN = 1
    HALF_CLOSED_LOCAL = 2
    HALF_CLOSED_REMOTE = 3
    CLOSED = 4


DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
(
    HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE,
) = range(1, 7)  # fmt: skip

_I, _O, _L, _R, _C = State  # idle, open, half-closed (local), half-closed (remote), closed
_PLAIN_HEADERS = END_HEADERS | END_STREAM  # flags of HEADERS that are whole, without padding and priority
# Steps: a HEADERS or DATA frame that does not end the stream, one that does.
_GOES_ON, _ENDS = 0, 1
# [state][step] → the next state; None: STREAM_CLOSED. An idle stream is opened before its first step, and a closed one
# is not in the table of streams: see _unknown.
_RECEIVED: tuple[tuple[State | None, State | None], ...] = (
    (None, None),
    (_O, _R),
    (_L, _C),
    (None, None),
    (None, None),
)
_SENT: tuple[tuple[State | None, State | None], ...] = (
    (None, None),
    (_O, _L),
    (None, None),
    (_R, _C),
    (None, None),
)

_FRAME = Struct(">BHBBI")  # length (24 bits), type, flags, stream
_U32 = Struct(">I")
_SETTING = Struct(">HI")


class Stream:
    """One stream. `call` belongs to the layer above.

    What is the same for nearly every stream is the class's: one is made for every call.
    """

    call: Any = None
    pending = 0  # bytes in the queue
    queue: deque[memoryview] | None = None  # data that waits for a window
    trailers: bytes | None = None  # what follows the queue: a block, or b"" for a bare END_STREAM
    credit = 0  # received and consumed, not yet given back to the peer
    expected: int | None = None  # bytes still to come by content-length
    got_head = False
    announced = False  # whether an event told of it
    is_plain = False  # DATA may come, and needs none of the checks of _begin_body

    def __init__(self, number: int, state: State, window: int, room: int):
        self.id, self.state = number, state
        self.window = window  # bytes we may send; negative after the peer has shrunk its initial window
        self.room = room  # bytes the peer may send


class Template:
    """The frames around a body that are the same in every reply, but for the stream and the body's size."""

    def __init__(self, head_block: bytes, trailers_block: bytes):
        self.head_block, self.trailers_block = head_block, trailers_block
        self._head = Struct(f">BHBBI{len(head_block)}sBHBBI")
        self._tail = Struct(f">BHBBI{len(trailers_block)}s")

    def head(self, number: int, size: int) -> bytes:
        """HEADERS, and the frame head of DATA of `size` bytes."""
        block = self.head_block
        return self._head.pack(
            0, len(block), HEADERS, END_HEADERS, number, block, size >> 16, size & 0xFFFF, DATA, 0, number
        )

    def tail(self, number: int) -> bytes:
        """The HEADERS that end the stream."""
        block = self.trailers_block
        return self._tail.pack(0, len(block), HEADERS, END_HEADERS | END_STREAM, number, block)


class HeadersReceived(NamedTuple):
    """A request's (or a response's) head."""

    stream: Stream
    head: Head
    ended: bool


class DataReceived(NamedTuple):
    """Part of a body. `data` is a slice of what `receive` was given; give it back with `consumed`."""

    stream: Stream
    data: Buffer
    ended: bool


class TrailersReceived(NamedTuple):
    """The fields after a body. They end the stream."""

    stream: Stream
    fields: tuple[Field, ...]
    head: Head  # the same, decoded


class RequestReceived(NamedTuple):
    """HeadersReceived and DataReceived in one: the whole of a request that came in one piece."""

    stream: Stream
    head: Head
    data: Buffer


class ResponseReceived(NamedTuple):
    """HeadersReceived, DataReceived and TrailersReceived in one: the whole of a response that came in one piece."""

    stream: Stream
    head: Head
    data: Buffer
    trailers: Head


class StreamReset(NamedTuple):
    """The stream is over before its end. `code` may be one that ErrorCode does not know."""

    stream: Stream
    code: int
    by_peer: bool


class StreamWritable(NamedTuple):
    """All data queued for the stream has moved to `out`."""

    stream: Stream


class GoAwayReceived(NamedTuple):
    """The peer takes no new streams. Ours above `last_stream_id` were reset with REFUSED_STREAM, in events before."""

    last_stream_id: int
    code: int
    text: bytes


class PingAcked(NamedTuple):
    """The answer to a ping of ours."""

    payload: bytes


class SettingsReceived(NamedTuple):
    """The peer's settings have changed."""


class ConnectionFailed(NamedTuple):
    """The peer broke a rule that ends the connection; GOAWAY is in `out`. Always the last event."""

    code: ErrorCode
    reason: str


Event = (
    HeadersReceived | DataReceived | TrailersReceived | RequestReceived | ResponseReceived | StreamReset
    | StreamWritable | GoAwayReceived | PingAcked | SettingsReceived | ConnectionFailed
)  # fmt: skip


class Refused(Exception):
    """No new stream can be opened on this connection now; nothing was sent."""


class _ConnectionError(Exception):
    def __init__(self, code: ErrorCode, reason: str):
        super().__init__(code, reason)
        self.code, self.reason = code, reason


class _StreamError(Exception):
    def __init__(self, number: int, code: ErrorCode, reason: str):
        super().__init__(number, code, reason)
        self.number, self.code, self.reason = number, code, reason


class Connection:
    """One end of a connection. Not thread-safe."""

    def __init__(self, is_client: bool, limits: Limits):
        self.out: list[Buffer] = []  # bytes to write, in order
        self.closed = False  # nothing more is processed: write `out`, then close the transport
        self.is_going_away = False  # no stream will be opened any more: an end said so, or the ids are used up
        self.streams: dict[int, Stream] = {}  # those that are not closed
        self.pending = 0  # bytes queued in streams
        self.moved = 0  # bytes of bodies that have come in, and that windows have let out
        self.peer_max_streams = MAX_STREAM_ID
        self.failure = ""  # why the connection failed, for logs

        self._is_client, self._limits = is_client, limits
        self._decoder = Decoder(is_request=not is_client, max_list_bytes=limits.header_bytes)
        self._known_blocks = self._decoder.lasting
        self._events: list[Event] = []

        # reading
        self._tail: Buffer = b""  # an incomplete frame, or preface
        self._preface = b"" if is_client else PREFACE  # what is still to come of it
        self._settled = False  # whether the peer's first SETTINGS have come
        # Of the DATA frame in hand: stream, bytes and padding still to come, whether it ends the stream.
        self._data: tuple[Stream | None, int, int, bool] | None = None
        # Of the header block in hand: stream, whether it ends that, bytes so far, whether the stream depends on itself.
        self._block: tuple[int, bool, bytearray, bool] | None = None
        self._strict = True  # see _check_order
        self._last_peer_id = 0
        self._reset: dict[int, bool] = {}  # streams that were reset, oldest first: was it us?
        self._forgotten = 0  # the highest id that has been dropped from there
        self._skipped: deque[range] = deque(maxlen=100)  # ids that the peer has passed over
        self._room = DEFAULT_WINDOW  # bytes the peer may send
        self._credit = 0
        self._patience = self._most_patience = limits.useless_frames
        self._half_window = max(limits.window_bytes, DEFAULT_WINDOW) >> 1
        self._worth = 1 if is_client else WORK  # bytes of a DATA frame of the peer that count as work

        # writing
        self._next_id = 1
        self._corked = False
        self._window = DEFAULT_WINDOW  # bytes we may send
        self._initial_window = DEFAULT_WINDOW
        self._max_frame = DEFAULT_FRAME
        self._waiting: dict[int, Stream] = {}  # streams with a queue, in turn
        self._block_prefix = b""  # a table size update that the next block must begin with
        self._last_accepted: int | None = None  # of the GOAWAY we sent

        hello = [
            _SETTING.pack(INITIAL_WINDOW_SIZE, limits.window_bytes),
            _SETTING.pack(MAX_FRAME_SIZE, limits.frame_bytes),
            _SETTING.pack(MAX_HEADER_LIST_SIZE, limits.header_bytes),
        ]
        hello.append(
            _SETTING.pack(ENABLE_PUSH, 0) if is_client else _SETTING.pack(MAX_CONCURRENT_STREAMS, limits.streams)
        )
        if is_client:
            self.out.append(PREFACE)
        self._send(SETTINGS, 0, 0, b"".join(hello))
        if limits.window_bytes > DEFAULT_WINDOW:
            self._send(WINDOW_UPDATE, 0, 0, _U32.pack(limits.window_bytes - DEFAULT_WINDOW))
            self._room = limits.window_bytes

    # ---- what a driver and the layer above use ----

    def take(self) -> list[Buffer]:
        """What to write now, in order; forgotten here."""
        out, self.out = self.out, []
        return out

    def receive(self, data: Buffer) -> list[Event]:
        """Process bytes from the peer, in any pieces. Never raises; after ConnectionFailed it does nothing."""
        if self.closed:
            return []
        events = self._events = []
        try:
            self._receive(data)
        except _ConnectionError as error:
            self._fail(error.code, error.reason)
        return events

    @property
    def can_open(self) -> bool:
        """Whether `open_stream` would be allowed now."""
        return not self.is_going_away and len(self.streams) < self.peer_max_streams

    def open_stream(self, block: bytes, ended: bool) -> Stream:
        """Start a request of a client with the encoded `block`. Raises Refused."""
        if not self.can_open:
            raise Refused
        number = self._next_id
        self._next_id = number + 2
        if number + 2 > MAX_STREAM_ID:
            self.is_going_away = True
        stream = Stream(number, _L if ended else _O, self._initial_window, self._limits.window_bytes)
        stream.announced = True
        self.streams[number] = stream
        self._send_block(number, block, END_STREAM if ended else 0)
        return stream

    def request(self, block: bytes, body: Sequence[Buffer], size: int) -> Stream:
        """A whole request: head and body (`size` bytes in all). Raises Refused."""
        stream = self.open_stream(block, ended=False)
        if size <= self._max_frame and size <= self._window and size <= stream.window and size and not self._corked:
            self._window -= size  # the short way for one that may go at once: the same as send_data
            stream.window -= size
            stream.state = _L
            out = self.out
            out.append(_FRAME.pack(size >> 16, size & 0xFFFF, DATA, END_STREAM, stream.id))
            out.extend(body)
            if self._patience < self._most_patience:
                self._patience += 2
        else:
            self.send_data(stream, body, ended=True)
        return stream

    def send_headers(self, stream: Stream, block: bytes, ended: bool = False) -> None:
        """Send an encoded head. Nothing happens on a stream that is closed meanwhile."""
        if self._step(stream, ended):
            self._send_block(stream.id, block, END_STREAM if ended else 0)

    def send_data(self, stream: Stream, buffers: Sequence[Buffer], ended: bool = False) -> None:
        """Send a body, or the next part of it: bytes-like objects of one-byte items; queued beyond the windows.

        The buffers are not copied: they must not change until they are written.
        """
        if stream.state is not _R and stream.state is not _O:
            return
        size = 0
        for buffer in buffers:
            size += len(buffer)
        if not size and not ended:
            return
        if (
            stream.queue is None
            and size <= self._max_frame
            and size <= self._window
            and size <= stream.window
            and not (self._corked and size)
        ):
            self._window -= size
            stream.window -= size
            out = self.out
            out.append(_FRAME.pack(size >> 16, size & 0xFFFF, DATA, END_STREAM if ended else 0, stream.id))
            out.extend(buffers)
            if size and self._patience < self._most_patience:  # a peer may answer it with two WINDOW_UPDATEs
                self._patience += 2
            if ended:
                self._step(stream, True)
            return
        if stream.queue is None:
            stream.queue = deque()
            self._waiting[stream.id] = stream
        stream.queue.extend([memoryview(buffer) for buffer in buffers if len(buffer)])
        stream.pending += size
        self.pending += size
        if ended:
            stream.trailers = b""
        self._pump_one(stream)

    def send_trailers(self, stream: Stream, block: bytes) -> None:
        """End the stream with an encoded block, after all its data."""
        if stream.queue is not None:
            stream.trailers = block
        elif self._step(stream, True):
            self._send_block(stream.id, block, END_STREAM)

    def respond(self, stream: Stream, template: "Template", body: list[Buffer], size: int) -> None:
        """A whole reply: head, body (`size` bytes in all) and trailers. The short way for one that may go at once."""
        if (
            stream.state is _R
            and size <= self._max_frame
            and size <= self._window
            and size <= stream.window
            and size
            and not self._block_prefix
            and not self._corked
        ):
            self._window -= size
            number, out = stream.id, self.out
            out.append(template.head(number, size))
            out.extend(body)
            out.append(template.tail(number))
            stream.state = _C
            del self.streams[number]
            if self._patience < self._most_patience:
                self._patience += 3
        else:
            self.send_headers(stream, template.head_block)
            self.send_data(stream, body)
            self.send_trailers(stream, template.trailers_block)

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """Give the stream up. Nothing happens on one that is closed."""
        if stream.state is not _C:
            self._send(RST_STREAM, 0, stream.id, _U32.pack(code))
            self._remember(stream.id, by_us=True)
            self._close(stream)

    def consumed(self, stream: Stream, count: int) -> None:
        """Let the peer send `count` more bytes on the stream, as many as have been received and are done with.

        The connection's own window is given back as data comes in: who is slow to take one stream's data must not hold
        up the others. What is kept in memory is for the layer above to bound.
        """
        if stream.state is _O or stream.state is _L:  # more may come
            stream.credit += count
            if stream.credit >= self._half_window:
                self._send(WINDOW_UPDATE, 0, stream.id, _U32.pack(stream.credit))
                stream.room += stream.credit
                stream.credit = 0

    def ping(self, payload: bytes) -> None:
        """Ask for an answer; 8 bytes that come back in PingAcked."""
        if not self.closed:
            self._send(PING, 0, 0, payload)

    def goaway(
        self, code: ErrorCode = ErrorCode.NO_ERROR, text: bytes = b"", last_stream_id: int | None = None
    ) -> None:
        """Announce the end: streams of the peer above `last_stream_id` (default: the last one seen) are ignored.

        A server that drains sends one with MAX_STREAM_ID first, so that what is on its way is still served, and the
        real one a round trip later (RFC 9113 §6.8).
        """
        if self.closed:
            return
        self.is_going_away = True
        last = self._last_peer_id if last_stream_id is None else last_stream_id
        self._last_accepted = last if self._last_accepted is None else min(last, self._last_accepted)
        self._send(GOAWAY, 0, 0, _U32.pack(self._last_accepted) + _U32.pack(code) + text[:1_000])

    def cork(self) -> None:
        """The transport is full: data waits here, where a reset can still drop it."""
        self._corked = True

    def uncork(self) -> None:
        """The transport has room again."""
        self._corked = False
        self._pump()

    def renew(self) -> None:
        """Forget the peer's useless frames. The driver's clock calls it."""
        self._patience = self._limits.useless_frames

    def abandon(self) -> None:
        """The transport is gone: nothing can be said or heard any more."""
        self.closed = self.is_going_away = True
        for stream in list(self.streams.values()):
            self._close(stream)
        self.out = []

    # ---- reading ----

    def _receive(self, data: Buffer) -> None:
        if self._tail:
            data = b"".join((self._tail, data))
            self._tail = b""
        at, end = 0, len(data)
        if self._preface:
            at = self._greet(data)
        streams, unpack, most = self.streams, _FRAME.unpack_from, self._limits.frame_bytes
        whole = self._whole_response if self._is_client else self._whole_request
        while True:
            if self._data is not None:
                at = self._body(data, at, end)
                if self._data is not None:
                    return
            body = at + 9
            if body > end:
                break
            high, low, kind, flags, number = unpack(data, at)
            size = high << 16 | low
            after = body + size
            if size > most:
                raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            if kind == HEADERS and after <= end and flags | END_STREAM == _PLAIN_HEADERS and not self._strict:
                if after + 9 < end and flags == END_HEADERS and (stop := whole(data, body, after, end, number)):
                    at = stop
                    continue
                try:  # the short way of nearly all of them
                    self._on_block(number & MAX_STREAM_ID, flags != END_HEADERS, bytes(data[body:after]))
                except _StreamError as error:
                    self._refuse(error)
                at = after
                continue
            if kind == DATA and after <= end and flags <= END_STREAM and not self._strict:  # the same for whole data
                stream = streams.get(number)
                if (
                    stream is not None
                    and stream.is_plain
                    and 0 < size <= stream.room
                    and size <= self._room - self._credit
                ):
                    self._arrived(size)
                    stream.room -= size
                    if flags:
                        self._end(stream)
                    self._events.append(DataReceived(stream, data[body:after], flags != 0))
                    at = after
                    continue
            number &= MAX_STREAM_ID
            if self._strict:
                self._check_order(kind, flags, number)
            if kind == DATA:
                if flags & PADDED and size and body == end:
                    break
                at = self._begin_body(data, body, size, flags, number)
                continue
            if size > self._limits.header_bytes and size > DEFAULT_FRAME:  # it would have to be kept until it is whole
                raise _ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, f"a frame of type {kind} with {size} bytes")
            if after > end:
                break
            handle = _KINDS[kind] if kind < len(_KINDS) else Connection._on_unknown
            try:
                handle(self, bytes(data[body:after]), flags, number)
            except _StreamError as error:
                self._refuse(error)
            at = after
        if at < end:
            self._tail = bytes(data[at:])

    def _whole_request(self, data: Buffer, start: int, stop: int, end: int, number: int) -> int:
        """The shortest way, of a request whose head has been seen before and whose body is one frame that is here.

        data[start:stop] is the block of the head. Returns where the request ends, or 0, having done nothing, for one
        that must go frame by frame. A new stream's window is as large as the connection's, which is looked at.
        """
        head = self._known_blocks.get(bytes(data[start:stop]))
        high, low, kind, flags, same = _FRAME.unpack_from(data, stop)
        size, limits = high << 16 | low, self._limits
        after: int = stop + 9 + size
        if (
            head is None
            or kind != DATA
            or flags != END_STREAM
            or same != number
            or number != self._last_peer_id + 2
            or after > end
            or not head.is_plain
            or not 0 < size <= self._room - self._credit
            or size > limits.frame_bytes
            or len(self.streams) >= limits.streams
            or self._last_accepted is not None
            or not self._last_peer_id
        ):
            return 0
        self._last_peer_id = number
        stream = self.streams[number] = Stream(number, _R, self._initial_window, 0)
        stream.got_head = stream.announced = True
        self._arrived(size)
        self._events.append(RequestReceived(stream, head, data[stop + 9 : after]))
        return after

    def _whole_response(self, data: Buffer, start: int, stop: int, end: int, number: int) -> int:
        """The same of a response: its head and trailers have been seen before, its body is one frame between them."""
        high, low, kind, flags, same = _FRAME.unpack_from(data, stop)
        size = high << 16 | low
        after = stop + 9 + size
        if kind != DATA or flags or same != number or after + 9 > end:
            return 0
        high, low, kind, flags, same = _FRAME.unpack_from(data, after)
        begin = after + 9
        close: int = begin + (high << 16 | low)
        head = self._known_blocks.get(bytes(data[start:stop]))
        trailers = self._known_blocks.get(bytes(data[begin:close]))
        stream = self.streams.get(number)
        if (
            head is None
            or trailers is None
            or stream is None
            or kind != HEADERS
            or flags != _PLAIN_HEADERS
            or same != number
            or close > end
            or not head.is_plain
            or trailers.bad
            or trailers.shape.bad_trailers
            or stream.state is not _L
            or stream.got_head
            or not 0 < size <= self._room - self._credit
            or size > self._limits.frame_bytes
        ):
            return 0
        stream.state = _C
        del self.streams[number]
        self._arrived(size)
        if self._patience < self._most_patience:
            self._patience += 1
        self._events.append(ResponseReceived(stream, head, data[stop + 9 : after], trailers))
        return close

    def _arrived(self, size: int) -> None:
        """A whole DATA frame has come, within the windows."""
        self._credit += size
        if self._credit >= self._half_window:
            self._give_back(0)
        self.moved += size
        if size >= self._worth and self._patience < self._most_patience:
            self._patience += 1

    def _check_order(self, kind: int, flags: int, number: int) -> None:
        """Where only one kind of frame may come: SETTINGS at first, CONTINUATION within a header block."""
        if not self._settled and (kind != SETTINGS or flags & ACK):
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._block is not None and (kind != CONTINUATION or number != self._block[0]):
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "another frame inside a header block")

    def _greet(self, data: Buffer) -> int:
        """Take the client's preface, or the part of it that is here. Returns bytes used."""
        expected = self._preface
        found = bytes(data[: len(expected)])
        if not expected.startswith(found):
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "no HTTP/2 preface")
        self._preface = expected[len(found) :]
        return len(found)

    def _begin_body(self, data: Buffer, at: int, size: int, flags: int, number: int) -> int:
        """The start of a DATA frame. Its payload begins at `at`. Returns where the body begins."""
        if number == 0:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "DATA on stream 0")
        padding = 0
        if flags & PADDED:
            if not size:
                raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "padded DATA without a pad length")
            padding = data[at]
            if padding >= size:
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "padding longer than its frame")
        if size > self._room - self._credit:
            raise _ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        self._give_back(size)
        self.moved += size
        ends = flags & END_STREAM != 0
        useful = size - padding - (flags & PADDED != 0)
        if useful >= self._worth and self._patience < self._most_patience:
            self._patience += 1
        if not useful and not ends:
            self._waste(1, "empty DATA frames")
        stream: Stream | None = self.streams.get(number)
        try:
            if stream is None:
                self._unknown(number, "DATA")
            else:
                self._check_body(stream, size, useful, ends)
        except _StreamError as error:
            self._refuse(error)
            stream = None
        if useful < size and stream is not None:  # padding is nobody's data
            stream.credit += size - useful
        if flags & PADDED:
            at += 1
        self._data = (stream, useful, padding, ends)
        return at

    def _check_body(self, stream: Stream, size: int, useful: int, ends: bool) -> None:
        number = stream.id
        if _RECEIVED[stream.state][_GOES_ON] is None:
            raise _StreamError(number, ErrorCode.STREAM_CLOSED, "DATA after the end of the stream")
        if not stream.got_head:
            raise _StreamError(number, ErrorCode.PROTOCOL_ERROR, "DATA before the head")
        if size > stream.room:
            raise _StreamError(number, ErrorCode.FLOW_CONTROL_ERROR, "more data than the stream's window")
        stream.room -= size
        if stream.expected is not None:
            stream.expected -= useful
            if stream.expected < 0 or (ends and stream.expected):
                raise _StreamError(number, ErrorCode.PROTOCOL_ERROR, "a body that is not as long as content-length")

    def _body(self, data: Buffer, at: int, end: int) -> int:
        """Pass on what is here of the DATA frame in hand. Returns how far it is read."""
        assert self._data is not None
        stream, left, padding, ends = self._data
        here = end - at
        if here > left:
            here = left
        if stream is not None and stream.state is _C:  # reset in the meantime
            stream = None
        left -= here
        if left or end - at - here < padding:
            done = False
            skipped = min(padding, end - at - here) if not left else 0
            self._data = (stream, left, padding - skipped, ends)
        else:
            done, skipped = True, padding
            self._data = None
        if stream is not None and (here or (done and ends)):
            ended = done and ends
            if ended:
                self._end(stream)
            self._events.append(DataReceived(stream, data[at : at + here], ended))
        return at + here + skipped

    def _give_back(self, count: int) -> None:
        """Credit for the connection: a WINDOW_UPDATE only when half a window has come together.

        `_room` is the window as the peer was last told, `_credit` what it has used of that.
        """
        self._credit += count
        if self._credit >= self._half_window:
            self._send(WINDOW_UPDATE, 0, 0, _U32.pack(self._credit))
            self._credit = 0

    def _on_headers(self, payload: bytes, flags: int, number: int) -> None:
        if number == 0:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "HEADERS on stream 0")
        start, stop = 0, len(payload)
        if flags & PADDED:
            if not payload:
                raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "padded HEADERS without a pad length")
            start, stop = 1, stop - payload[0]
        depends = None
        if flags & HAS_PRIORITY:
            if len(payload) < start + 5:
                raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for their priority")
            depends = _U32.unpack_from(payload, start)[0] & MAX_STREAM_ID
            start += 5
        if start > stop:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "padding longer than its frame")
        block = payload[start:stop] if start or stop != len(payload) else payload
        broken = depends == number
        if not flags & END_HEADERS:
            self._block = (number, flags & END_STREAM != 0, bytearray(block), broken)
            self._strict = True
            self._waste(1, "header blocks in pieces")
            return
        self._on_block(number, flags & END_STREAM != 0, block, broken)

    def _on_continuation(self, payload: bytes, flags: int, number: int) -> None:
        if self._block is None:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        _, ends, block, broken = self._block
        block += payload
        if len(block) > self._limits.header_bytes:
            raise _ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, "a header block over the limit")
        self._waste(1, "header blocks in pieces")
        if flags & END_HEADERS:
            self._block, self._strict = None, False
            self._on_block(number, ends, bytes(block), broken)

    def _decode(self, block: bytes) -> Head:
        try:
            return self._decoder.decode(block)
        except CompressionError as error:
            raise _ConnectionError(ErrorCode.COMPRESSION_ERROR, str(error)) from error
        except TooLarge as error:
            raise _ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, str(error)) from error

    def _on_block(self, number: int, ends: bool, block: bytes, broken: bool = False) -> None:
        """A whole header block: a request, a response, or trailers."""
        head = self._known_blocks.get(block) or self._decode(block)
        if broken or not number:
            what = "a stream that depends on itself" if number else "HEADERS on stream 0"
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, what)
        stream = self.streams.get(number)
        if stream is None:
            stream = self._opened(number)
            if stream is None:
                return
        elif _RECEIVED[stream.state][ends] is None:
            raise _StreamError(number, ErrorCode.STREAM_CLOSED, "HEADERS after the end of the stream")
        if stream.got_head:
            self._on_trailers(stream, head, ends)
            return
        if head.bad or head.shape.bad_head:
            raise _StreamError(number, ErrorCode.PROTOCOL_ERROR, head.bad or head.shape.bad_head)
        status = head.shape.status
        if status is not None and status[0] == 0x31:  # 1xx: another head follows
            if ends or status == b"101":
                raise _StreamError(number, ErrorCode.PROTOCOL_ERROR, "an informational response that ends its stream")
            self._waste(1, "informational responses")
            return
        stream.got_head = True
        if ends:
            if head.content_length and status not in (b"204", b"304"):
                raise _StreamError(number, ErrorCode.PROTOCOL_ERROR, "a body that is not as long as content-length")
            self._end(stream)
        elif head.content_length is not None:
            stream.expected = head.content_length
        else:
            stream.is_plain = True
        stream.announced = True
        self._events.append(HeadersReceived(stream, head, ends))

    def _on_trailers(self, stream: Stream, head: Head, ends: bool) -> None:
        bad = head.bad or head.shape.bad_trailers
        if not ends:
            bad = "a second head that does not end the stream"
        elif stream.expected:
            bad = "a body that is not as long as content-length"
        if bad:
            raise _StreamError(stream.id, ErrorCode.PROTOCOL_ERROR, bad)
        self._end(stream)
        self._events.append(TrailersReceived(stream, head.fields, head))

    def _opened(self, number: int) -> Stream | None:
        """The stream that HEADERS of an unknown id open; None if they are to be ignored."""
        if self._is_client or number % 2 == 0 or number <= self._last_peer_id:
            if any(number in skipped for skipped in self._skipped):
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"stream {number} after {self._last_peer_id}")
            self._unknown(number, "HEADERS")
            return None
        expected = self._last_peer_id + 2 if self._last_peer_id else 1
        if number != expected:
            self._skipped.append(range(expected, number, 2))
        self._last_peer_id = number
        if self._last_accepted is not None and number > self._last_accepted:
            self._remember(number, by_us=True)  # RFC 9113 §6.8: ignored, the peer knows
            self._waste(1, "requests after GOAWAY")
            return None
        stream = Stream(number, _O, self._initial_window, self._limits.window_bytes)
        if len(self.streams) >= self._limits.streams:
            raise _StreamError(number, ErrorCode.REFUSED_STREAM, f"more than {self._limits.streams} streams")
        self.streams[number] = stream
        return stream

    def _unknown(self, number: int, what: str) -> None:
        """A frame for a stream that is idle or closed. Returns if the frame is to be ignored."""
        if self._is_idle(number):
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"{what} on idle stream {number}")
        by_us = self._reset.get(number)
        if by_us is None and number > self._forgotten:
            raise _ConnectionError(ErrorCode.STREAM_CLOSED, f"{what} on stream {number}, which has ended")
        if by_us is False:
            raise _StreamError(number, ErrorCode.STREAM_CLOSED, f"{what} on a stream that was reset")

    def _is_idle(self, number: int) -> bool:
        if number % 2 == 1:
            return number >= self._next_id if self._is_client else number > self._last_peer_id
        return True  # even ids are pushes, and there are none

    def _end(self, stream: Stream) -> None:
        """The peer's side of the stream is over."""
        after = _RECEIVED[stream.state][_ENDS]
        assert after is not None
        if after is _C:
            self._completed(stream)
        else:
            stream.state = after
            stream.is_plain = False

    def _on_priority(self, payload: bytes, flags: int, number: int) -> None:
        if number == 0:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise _StreamError(number, ErrorCode.FRAME_SIZE_ERROR, f"PRIORITY of {len(payload)} bytes")
        if _U32.unpack_from(payload)[0] & MAX_STREAM_ID == number:
            raise _StreamError(number, ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")
        self._waste(1, "PRIORITY frames")

    def _on_reset(self, payload: bytes, flags: int, number: int) -> None:
        if number == 0:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "RST_STREAM on stream 0")
        if len(payload) != 4:
            raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, f"RST_STREAM of {len(payload)} bytes")
        stream = self.streams.get(number)
        if stream is None:
            if self._is_idle(number):
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM on idle stream {number}")
            self._waste(1, "resets of closed streams")
            return
        self._close(stream)
        self._remember(number, by_us=False)
        self._events.append(StreamReset(stream, _U32.unpack(payload)[0], True))
        self._waste(2, "resets")  # more than the data of such a stream has earned

    def _on_settings(self, payload: bytes, flags: int, number: int) -> None:
        if number:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"SETTINGS on stream {number}")
        if flags & ACK:
            if payload:
                raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "a SETTINGS acknowledgement with settings")
            self._waste(1, "SETTINGS acknowledgements")
            return
        if len(payload) % 6:
            raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
        self._settled, self._strict = True, False
        self._waste(1 + len(payload) // 60, "SETTINGS")
        settings = list(_SETTING.iter_unpack(payload))
        for setting, value in settings:
            if setting == INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
                raise _ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, f"an initial window of {value}")
            if setting == MAX_FRAME_SIZE and not DEFAULT_FRAME <= value < 1 << 24:
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"a largest frame of {value}")
            if setting == HEADER_TABLE_SIZE and value < 4_096:
                # We use no table, but a peer that shrinks its own wants to hear that we know (RFC 7541 §4.2).
                self._block_prefix = b"\x20"
            if setting == ENABLE_PUSH and value > (0 if self._is_client else 1):
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"push set to {value}")
        for setting, value in dict(settings).items():  # of repeated ones only the last has an effect
            self._set(setting, value)
        self._send(SETTINGS, ACK, 0)
        self._pump()
        self._events.append(SettingsReceived())

    def _set(self, setting: int, value: int) -> None:
        if setting == INITIAL_WINDOW_SIZE:
            change, self._initial_window = value - self._initial_window, value
            for stream in self.streams.values():
                stream.window += change
                if stream.window > MAX_WINDOW:
                    raise _ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "a window over 2^31-1")
        elif setting == MAX_FRAME_SIZE:
            self._max_frame = value
        elif setting == MAX_CONCURRENT_STREAMS:
            self.peer_max_streams = value

    def _on_push(self, payload: bytes, flags: int, number: int) -> None:
        raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE, where push is not enabled")

    def _on_ping(self, payload: bytes, flags: int, number: int) -> None:
        if number:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"PING on stream {number}")
        if len(payload) != 8:
            raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
        self._waste(1, "PINGs")
        if flags & ACK:
            self._events.append(PingAcked(payload))
        else:
            self._send(PING, ACK, 0, payload)

    def _on_goaway(self, payload: bytes, flags: int, number: int) -> None:
        if number:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"GOAWAY on stream {number}")
        if len(payload) < 8:
            raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, f"GOAWAY of {len(payload)} bytes")
        self._waste(1, "GOAWAYs")
        last, code = _U32.unpack_from(payload)[0] & MAX_STREAM_ID, _U32.unpack_from(payload, 4)[0]
        self.is_going_away = True
        if self._is_client:
            for stream in [stream for number, stream in self.streams.items() if number > last]:
                self._close(stream)
                self._events.append(StreamReset(stream, ErrorCode.REFUSED_STREAM, True))
        self._events.append(GoAwayReceived(last, code, payload[8:]))

    def _on_window_update(self, payload: bytes, flags: int, number: int) -> None:
        if len(payload) != 4:
            raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, f"WINDOW_UPDATE of {len(payload)} bytes")
        more = _U32.unpack(payload)[0] & MAX_WINDOW
        self._waste(1, "WINDOW_UPDATEs")
        if number == 0:
            if more == 0 or self._window + more > MAX_WINDOW:
                code = ErrorCode.FLOW_CONTROL_ERROR if more else ErrorCode.PROTOCOL_ERROR
                raise _ConnectionError(code, f"a window enlarged by {more}")
            had_room = self._window > 0  # then nobody waits for this window
            self._window += more
            if not had_room:
                self._pump()
            return
        stream = self.streams.get(number)
        if stream is None:
            if self._is_idle(number):
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"WINDOW_UPDATE on idle stream {number}")
            return  # it may have been on its way when the stream ended
        if more == 0 or stream.window + more > MAX_WINDOW:
            code = ErrorCode.FLOW_CONTROL_ERROR if more else ErrorCode.PROTOCOL_ERROR
            raise _StreamError(number, code, f"a window enlarged by {more}")
        stream.window += more
        self._pump_one(stream)

    def _on_unknown(self, payload: bytes, flags: int, number: int) -> None:
        self._waste(1, "frames of unknown types")  # RFC 9113 §5.5: ignored

    # ---- errors and patience ----

    def _waste(self, cost: int, what: str) -> None:
        self._patience -= cost
        if self._patience < 0:
            raise _ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, f"too many {what}")

    def _refuse(self, error: _StreamError) -> None:
        """A stream error: tell the peer and the layer above, and go on with the rest."""
        if self._is_idle(error.number):  # RST_STREAM may not be sent on an idle stream
            raise _ConnectionError(error.code, error.reason)
        self._send(RST_STREAM, 0, error.number, _U32.pack(error.code))
        stream = self.streams.get(error.number)
        if stream is not None:
            self._close(stream)
            if stream.announced:
                self._events.append(StreamReset(stream, error.code, False))
        if self._reset.get(error.number) is not False:
            self._remember(error.number, by_us=True)
        self._waste(2, f"stream errors, the last one: {error.reason}")

    def _fail(self, code: ErrorCode, reason: str) -> None:
        """A connection error: GOAWAY, and nothing after it."""
        self.failure = reason
        self.goaway(code, reason.encode())
        self.closed = True
        self._tail, self._block, self._data = b"", None, None
        for stream in list(self.streams.values()):
            self._close(stream)
            if stream.announced:
                self._events.append(StreamReset(stream, code, False))
        self._events.append(ConnectionFailed(code, reason))

    def _remember(self, number: int, by_us: bool) -> None:
        self._reset[number] = by_us
        if len(self._reset) > REMEMBERED:
            oldest = next(iter(self._reset))
            del self._reset[oldest]
            self._forgotten = max(self._forgotten, oldest)

    # ---- writing ----

    def _send(self, kind: int, flags: int, number: int, payload: bytes = b"") -> None:
        size = len(payload)
        self.out.append(_FRAME.pack(size >> 16, size & 0xFFFF, kind, flags, number) + payload)

    def _send_block(self, number: int, block: bytes, flags: int) -> None:
        """HEADERS, and CONTINUATION where the peer's frames are too small."""
        if self._block_prefix:
            block, self._block_prefix = self._block_prefix + block, b""
        if len(block) <= self._max_frame:
            self._send(HEADERS, flags | END_HEADERS, number, block)
            return
        kind, most = HEADERS, self._max_frame
        for at in range(0, len(block), most):
            last = at + most >= len(block)
            self._send(kind, flags | (END_HEADERS if last else 0), number, block[at : at + most])
            kind, flags = CONTINUATION, 0

    def _step(self, stream: Stream, ended: bool) -> bool:
        """Our side goes on, or ends. False if the stream is closed for us."""
        after = _SENT[stream.state][ended]
        if after is None:
            return False
        if after is _C:
            self._completed(stream)
        else:
            stream.state = after
        return True

    def _completed(self, stream: Stream) -> None:
        self._close(stream)
        if self._patience < self._most_patience:
            self._patience += 1

    def _close(self, stream: Stream) -> None:
        stream.state = _C
        stream.is_plain = False
        self.streams.pop(stream.id, None)
        if stream.queue is not None:
            self._waiting.pop(stream.id, None)
            self.pending -= stream.pending
            stream.pending, stream.queue = 0, None

    def _pump(self) -> None:
        """Send what waits and may go: a frame of each stream in turn, until the windows or the queues are empty."""
        turn = deque(self._waiting.values())
        while turn:
            stream = turn.popleft()
            if self._may_send(stream):
                self._send_queued(stream)
                turn.append(stream)

    def _pump_one(self, stream: Stream) -> None:
        """The same where only this stream's window has changed: the others still wait for theirs."""
        while self._may_send(stream):
            self._send_queued(stream)

    def _may_send(self, stream: Stream) -> bool:
        if stream.queue is None:
            return False
        return not stream.pending or (stream.window > 0 and self._window > 0 and not self._corked)

    def _send_queued(self, stream: Stream) -> None:
        """One DATA frame of a stream's queue, and what ends the stream if that was all."""
        queue = stream.queue
        assert queue is not None
        size = max(0, min(stream.pending, self._max_frame, self._window, stream.window))  # windows may be negative
        over = size == stream.pending
        ends = over and stream.trailers == b""
        if size or ends:
            self.out.append(_FRAME.pack(size >> 16, size & 0xFFFF, DATA, END_STREAM if ends else 0, stream.id))
            left = size
            while left:
                part = queue[0]
                if len(part) <= left:
                    self.out.append(queue.popleft())
                    left -= len(part)
                else:
                    self.out.append(part[:left])
                    queue[0] = part[left:]
                    left = 0
            self._window -= size
            stream.window -= size
            stream.pending -= size
            self.pending -= size
            self.moved += size
            if size >= WORK and self._patience < self._most_patience:
                self._patience += 2
        if over:
            stream.queue = None
            del self._waiting[stream.id]
            trailers, stream.trailers = stream.trailers, None
            if ends:
                self._step(stream, True)
            elif trailers is not None:
                self.send_trailers(stream, trailers)
            self._events.append(StreamWritable(stream))


# By frame type (RFC 9113 §6); DATA is handled where frames are cut.
_KINDS = (
    Connection._on_unknown, Connection._on_headers, Connection._on_priority, Connection._on_reset,
    Connection._on_settings, Connection._on_push, Connection._on_ping, Connection._on_goaway,
    Connection._on_window_update, Connection._on_continuation,
)  # fmt: skip
