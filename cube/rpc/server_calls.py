"""gRPC's server end of one HTTP/2 connection: events in, handlers called, replies out. No socket, no clock of its own.

`ServerCalls` is the connection: it gives each stream a call by its head, passes what arrives to that call, and keeps
the accounts. A `GrpcCall` is one call; what is not gRPC by its content type is a `plain_calls.PlainCall`, answered by
the router as over HTTP/1.1.

The hot path is GrpcCall.on_data → _answer → _reply: a unary call whose message came in one piece, answered by a plain
function, runs with no task, no queue and no timer. Coroutines, streams, compression, metadata and deadlines branch off.
"""

import asyncio
import inspect
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, cast

from cube.errors import FAULT, BadRequest, Internal, Overloaded, ServingError, Unimplemented, to_wire
from cube.rpc import framing
from cube.rpc.calls import Buffer, Call, Field, Handlers, Kind, Method, Reply, StatusError, as_method
from cube.rpc.headers import Head, encode
from cube.rpc.http2 import (
    MAX_STREAM_ID,
    Connection,
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    HeadersReceived,
    PingAcked,
    RequestReceived,
    SettingsReceived,
    State,
    Stream,
    StreamReset,
    StreamWritable,
    Template,
    TrailersReceived,
)
from cube.rpc.limits import Budget, Limits
from cube.rpc.plain_calls import PlainCall
from cube.rpc.router import Router

log = logging.getLogger(__name__)

_HEAD = [(b":status", b"200"), (b"content-type", b"application/grpc")]
_PLAIN_HEAD = encode(_HEAD)
_REPLY = Template(_PLAIN_HEAD, encode([(b"grpc-status", b"0")]))
_ACCEPTS = (b"grpc-accept-encoding", framing.ACCEPTED)
_QUEUED_BYTES = 1 << 20  # a streaming handler waits while so much of its replies waits for the peer
_PROGRESS_BYTES = 1_024  # that must move within stall_s where something waits for the peer
_DRAIN_PING = b"draining"
_DRAIN_S = 1.0  # how long a peer without calls may take to say that it knows of the end


class Routes:
    """The methods of a server, made once for all its connections."""

    def __init__(self, handlers: Handlers, limits: Limits):
        self.methods = {path.encode(): _Route(path, as_method(handler), limits) for path, handler in handlers.items()}
        self.services = {path.rpartition(b"/")[0] for path in self.methods}


class _Route:
    __slots__ = ("handler", "is_unary", "kind", "most", "path")

    def __init__(self, path: str, method: Method, limits: Limits):
        self.path, self.handler, self.kind = path, method.handler, method.kind
        self.is_unary = method.kind is Kind.UNARY
        self.most = limits.message_bytes if method.max_request_bytes is None else method.max_request_bytes


class _Note:
    """What a request's stable fields mean; kept on their Shape, so that it is worked out once."""

    __slots__ = ("accepts", "encoding", "error", "is_grpc", "is_unary", "route")

    def __init__(self, head: Head, routes: Routes):
        fields = dict(head.fields)
        kind = fields.get(b"content-type", b"")
        self.is_grpc = kind == b"application/grpc" or kind.startswith((b"application/grpc+", b"application/grpc;"))
        self.route = routes.methods.get(head.path or b"")
        self.error: ServingError | None = None
        self.encoding, self.accepts = "identity", frozenset[str]()
        self.is_unary = False  # and nothing is wrong with it
        if not self.is_grpc:
            return
        accepted = fields.get(b"grpc-accept-encoding", b"").decode("latin-1").split(",")
        self.accepts = frozenset(name.strip() for name in accepted)
        path = (head.path or b"").decode("latin-1")
        if head.method != b"POST":
            self.error = Unimplemented(f"{path[:200]}: gRPC calls are POST requests")
        elif self.route is None:
            known = path.rpartition("/")[0].encode("latin-1") in routes.services
            self.error = Unimplemented(f"unknown {'method' if known else 'service'} {path[:200]}")
        else:
            try:
                self.encoding = framing.encoding_of(fields.get(b"grpc-encoding", b"identity"))
                self.is_unary = self.route.is_unary
            except Unimplemented as error:
                self.error = error


class StreamCall(Protocol):
    """What a connection needs of the call on one of its streams."""

    task: asyncio.Future[Any] | None
    deadline: float | None
    held: int  # bytes counted as in flight

    def on_data(self, data: Buffer, ended: bool) -> None:
        """Part of the request's body."""

    def on_end(self) -> None:
        """The end of it, without data."""

    def may_send(self) -> None:
        """What waited for the peer has gone."""

    def gone(self) -> None:
        """The caller has: nothing more can be said."""

    @property
    def is_receiving(self) -> bool:
        """Whether the next move is the peer's."""


class GrpcCall(Call):
    """One gRPC call on a stream."""

    held = 0
    task: asyncio.Future[Any] | None = None  # of the handler that has not answered at once
    _messages: framing.Messages | None = None  # takes the body apart, where a message did not come whole
    _inbox: "_Inbox | None" = None  # of a call whose requests stream
    _request: Buffer | None = None  # the one request of any other, when the end comes after it
    _responding = False  # the head of the reply is sent
    _awaited: Awaitable[Reply] | None = None  # what a handler has returned, until its task begins
    _woken: asyncio.Future[None] | None = None  # for a handler that waits until it may send more

    def __init__(self, owner: "ServerCalls", note: _Note, route: _Route, stream: Stream, head: Head):
        # Not super().__init__: one of these is made for every call.
        self.path, self.deadline, self.peer, self._fields = route.path, None, owner.peer, None
        self._owner, self._note, self._route, self._stream, self._head = owner, note, route, stream, head

    def _decoded(self) -> tuple[Field, ...]:
        return framing.decode_metadata(self._head.fields)

    # ---- what arrives ----

    def on_head(self) -> None:
        """The call begins."""
        for name, value in self._head.volatile:
            if name == b"grpc-timeout":
                try:
                    self.deadline = time.monotonic() + framing.decode_timeout(value)
                except BadRequest as error:
                    self.fail(error)
                    return
        if not self._route.is_unary and self._route.kind.takes_stream:
            self._messages = framing.Messages(self._route.most, self._note.encoding)
            self._inbox = _Inbox(self)
            self._start(self._inbox)

    def on_data(self, data: Buffer, ended: bool) -> None:
        """Part of the request's body."""
        size = len(data) - 5
        if (  # the usual case: one message that is not compressed, and the end
            ended
            and self._messages is None
            and 0 <= size <= self._route.most
            and framing.PREFIX.unpack_from(data) == (0, size)
        ):
            self._answer(framing.piece(data, 5, size + 5))
        else:
            self._on_piece(data, ended)

    def _on_piece(self, data: Buffer, ended: bool) -> None:
        """Part of a message, several, or a compressed one."""
        owner, inbox = self._owner, self._inbox
        if self._messages is None:
            self._messages = framing.Messages(self._route.most, self._note.encoding)
        try:
            for message in self._messages.feed(data):
                if inbox is not None:
                    inbox.put(message)
                elif self._request is None:
                    self._request = message
                else:
                    raise Internal("several requests in a call that has one")
                self._count()
            self._count()
        except ServingError as error:
            self.fail(error)
            return
        if inbox is None or not inbox.messages:  # nothing that a handler could take: the rest must be able to come
            owner.http2.consumed(self._stream, len(data))
        else:
            inbox.owed += len(data)
        if ended:
            self.on_end()

    def _count(self) -> None:
        """Count what is held of the requests, expanded. Raises Overloaded where that is too much."""
        held = 0 if self._messages is None else self._messages.held
        if self._inbox is not None:
            held += self._inbox.held
        elif self._request is not None:
            held += len(self._request)
        self._owner.hold(self, held)
        if self._owner.is_over_limits:
            raise Overloaded("too many bytes in flight")

    def on_end(self) -> None:
        """The caller has sent all it will send."""
        cut = self._messages is not None and not self._messages.is_between
        if self._inbox is not None:
            self._inbox.news(ended=True, error=Internal("the requests end within a message") if cut else None)
        elif self._request is None or cut:
            self.fail(Internal("no request, or a part of one, in a call that has one"))
        else:
            self._answer(self._request)

    def taken(self) -> None:
        """The handler has taken a message from its inbox: the caller may send more when it has taken all."""
        inbox = self._inbox
        if inbox is None or self._messages is None or self._stream.call is not self:  # nobody counts any more
            return
        self._owner.hold(self, inbox.held + self._messages.held)
        if inbox.owed and not inbox.messages:
            owed, inbox.owed = inbox.owed, 0
            self._owner.http2.consumed(self._stream, owed)
            self._owner.flush()

    @property
    def is_receiving(self) -> bool:
        """Whether the next move is the peer's: a request has begun and is not whole."""
        if self._inbox is not None:
            return self._messages is not None and not self._messages.is_between
        return self.task is None and self._stream.state is State.OPEN

    # ---- the handler ----

    def _answer(self, message: Buffer) -> None:
        """Call the handler of one request."""
        route = self._route
        if not route.is_unary:
            self._start(message)
            return
        try:
            reply = route.handler(message, self)
        except Exception as error:
            self.fail(error)
            return
        if isinstance(reply, _READY) or not hasattr(reply, "__await__"):
            self._reply(cast(Reply, reply))
            return
        self._owner.hold(self, len(message))
        if isinstance(reply, asyncio.Future) and not isinstance(reply, asyncio.Task):  # nothing is left to run for it
            self.task = reply
            self._owner.watch(self, reply)
            reply.add_done_callback(self._arrived)
        else:
            self._awaited = cast(Awaitable[Reply], reply)
            self._run(self._unary())

    def _arrived(self, future: asyncio.Future[Reply]) -> None:
        """What a handler has promised is there."""
        self.task = None
        self._owner.finished(future)
        if future.cancelled():
            self.fail(_Fault(asyncio.CancelledError()))  # not by us; the caller still waits
        elif (error := future.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else _Fault(error))
        else:
            self._reply(future.result())

    def _start(self, requests: Any) -> None:
        """Call a handler of streams."""
        try:
            result = self._route.handler(requests, self)
        except Exception as error:
            self.fail(error)
            return
        if self._route.kind.gives_stream:
            self._run(self._replies(cast(AsyncIterator[Reply], result)))
        else:
            self._awaited = cast(Awaitable[Reply], result)
            self._run(self._unary())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self.task = task = asyncio.get_running_loop().create_task(work)
        self._owner.watch(self, task)
        task.add_done_callback(self._owner.finished)

    async def _unary(self) -> None:
        assert self._awaited is not None
        reply, self._awaited = self._awaited, None
        try:
            result = await reply
        except asyncio.CancelledError as error:
            if self.cancelled:
                raise
            self.fail(_Fault(error))  # it cancelled itself; the caller still waits
        except Exception as error:
            self.fail(error)
        else:
            self._reply(result)

    async def _replies(self, replies: AsyncIterator[Reply]) -> None:
        try:
            async for reply in replies:
                self._send(reply)
                self._owner.flush()
                while self._owner.made > _QUEUED_BYTES:  # have it written first: a handler may never wait by itself
                    await asyncio.sleep(0)
                if self.cancelled:  # and it paid no attention
                    return
                while self._stream.pending > _QUEUED_BYTES or self._owner.paused:
                    self._woken = asyncio.get_running_loop().create_future()
                    await self._woken
            self._end("OK", "", b"")
            self._over()
        except asyncio.CancelledError as error:
            if self.cancelled:
                raise
            self.fail(_Fault(error))
        except Exception as error:
            self.fail(error)
        finally:
            close = getattr(replies, "aclose", None)
            if close is not None:
                await close()

    def may_send(self) -> None:
        """What waited for the peer has gone: let a streaming handler look again."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    # ---- what is sent ----

    def _reply(self, reply: Reply) -> None:
        """The one reply of a call, and its end."""
        if self.cancelled:
            return
        http2, stream = self._owner.http2, self._stream
        try:
            if self.compression is None and self._initial is None and self._trailing is None:
                buffers, size = framing.frame(reply)
                http2.respond(stream, _REPLY, buffers, size)
                self._owner.made += size
                if stream.state is State.CLOSED and self._owner.inside and not self.held:
                    stream.call = None  # the usual case: nothing is left to settle
                    return
            else:
                self._send(reply)
                self._end("OK", "", b"")
        except Exception as error:  # no reply at all, or metadata that cannot be sent
            self.fail(_Fault(error))
            return
        self._over()

    def _send(self, reply: Reply) -> None:
        """One reply message, and the head before the first."""
        encoding = self.compression if self.compression in self._note.accepts else None
        if encoding == "identity":
            encoding = None
        buffers, size = framing.frame(reply) if encoding is None else framing.compressed(reply, encoding)
        if not self._responding:
            extra = [] if encoding is None else [(b"grpc-encoding", encoding.encode()), _ACCEPTS]
            extra += framing.encode_metadata(self._initial or ())
            self._owner.http2.send_headers(self._stream, encode([*_HEAD, *extra]) if extra else _PLAIN_HEAD)
            self._responding = True
        self._owner.http2.send_data(self._stream, buffers)
        self._owner.made += size

    def _end(self, code: str, message: str, details: bytes) -> None:
        """The status that ends a call: trailers, or a head that is all of the reply."""
        http2, stream = self._owner.http2, self._stream
        fields = framing.encode_status(code, message, details) + framing.encode_metadata(self._trailing or ())
        if self._responding:
            http2.send_trailers(stream, encode(fields))
        else:
            fields = framing.encode_metadata(self._initial or ()) + fields
            http2.send_headers(stream, encode([*_HEAD, *fields]), ended=True)

    def fail(self, error: Exception) -> None:
        """Answer with an error, and stop the handler if it still runs."""
        if self.cancelled:
            return
        if not isinstance(error, ServingError):
            log.error("%s failed", self.path, exc_info=error)
        try:
            self._end(*to_wire(error))
        except Exception:  # metadata that cannot be sent: the handler's fault
            self._trailing = self._initial = None
            log.exception("%s failed", self.path)
            self._end(*FAULT)
        self._over()
        if self.task is not None and self.task is not asyncio.current_task():
            self.gone()

    def expire(self) -> None:
        """The deadline has passed: the caller is told, the handler is cancelled."""
        if self._stream.queue is not None:  # replies that wait: the status would wait behind them
            self._owner.http2.reset(self._stream, ErrorCode.CANCEL)
            self._over()
            self.gone()
        else:
            self.fail(StatusError("DEADLINE_EXCEEDED", f"{self.path}: the deadline has passed"))

    def _over(self) -> None:
        """The reply is complete."""
        self._stream.call = None
        self._owner.dismiss(self._stream)
        self._owner.hold(self, 0)
        self._owner.flush()

    def gone(self) -> None:
        """The caller has gone: the handler is cancelled."""
        self.cancelled = True
        self._stream.call = None
        self._owner.hold(self, 0)
        if self.task is not None:
            self.task.cancel()
        if inspect.iscoroutine(self._awaited):
            self._awaited.close()  # its task never began


class _Fault(Exception):
    """A handler's fault, whatever it is made of: the caller is told no more."""

    def __init__(self, cause: BaseException):
        super().__init__(str(cause))
        self.__cause__ = cause


_READY = (bytes, list, memoryview, tuple, bytearray)


class _Inbox:
    """The requests of a streaming call, as its handler iterates over them."""

    def __init__(self, call: GrpcCall):
        self.messages: deque[Buffer] = deque()
        self.held = 0  # bytes of them
        self.owed = 0  # flow-control credit that goes back when the handler has taken what is here
        self._call = call
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, message: Buffer) -> None:
        """A message has come."""
        self.messages.append(message)
        self.held += len(message)
        self.news()

    def news(self, ended: bool = False, error: Exception | None = None) -> None:
        """Messages have come, or the end, or what stands in its place."""
        self._ended = self._ended or ended
        self._error = self._error or error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[Buffer]:
        return self

    async def __anext__(self) -> Buffer:
        while not self.messages:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        message = self.messages.popleft()
        self.held -= len(message)
        self._call.taken()
        return message


class ServerCalls:
    """The calls of one connection. A Conversation: see listener. Owned by the event loop."""

    full = False  # it never needs the peer to be quiet: what is too much is refused

    def __init__(
        self,
        routes: Routes,
        router: Router | None,
        limits: Limits,
        budget: Budget,
        peer: str,
        wake: Callable[[], None],
    ):
        self.closing = False
        self.http2 = Connection(is_client=False, limits=limits)
        self.router, self.limits, self.peer = router, limits, peer
        self.made = 0  # bytes of replies since the last take()
        self.paused = False  # the transport is full
        self._routes, self._budget, self._wake = routes, budget, wake
        self._tasks: set[asyncio.Future[Any]] = set()
        self._alarm: asyncio.TimerHandle | None = None  # at the earliest deadline of calls whose handlers run
        self._alarm_at = math.inf
        self._held = 0  # bytes of requests that are being received or worked on
        self._queued = 0  # bytes of replies that wait for the peer's windows, as counted in the budget
        self.inside = False  # in receive(): what is written meanwhile needs no wake
        self._mark = 0  # http2.moved when there was progress last
        self._idle_since = 0.0
        self._greeted = False
        self._began: float | None = None
        self._progress = 0.0
        self._draining = False
        self._drained_at: float | None = None
        self._refusing = False  # the drain's round trip is over

    # ---- Conversation ----

    @property
    def idle(self) -> bool:
        """No call in flight, nothing to write."""
        return not (self.http2.streams or self._tasks or self.http2.out)

    def receive(self, data: Buffer) -> None:
        """Process bytes of the peer. Never raises."""
        self.inside = True
        for event in self.http2.receive(data):
            try:
                if type(event) is RequestReceived:
                    self._on_request(*event)
                elif type(event) is DataReceived:
                    stream, body, ended = event
                    if stream.call is not None:
                        stream.call.on_data(body, ended)
                    else:
                        self.http2.consumed(stream, len(body))
                elif type(event) is HeadersReceived:
                    self._on_headers(event.stream, event.head, event.ended)
                else:
                    self._on_other(event)
            except Exception:  # a fault of ours is that call's end, not its neighbours'
                log.exception("%s: a call failed", self.peer)
                self._drop(getattr(event, "stream", None))
        self.inside = False
        self._account()

    def take(self) -> list[Buffer]:
        """What to write now."""
        self.made = 0
        return self.http2.take()

    def pause(self) -> None:
        """The transport is full: streaming handlers wait."""
        self.paused = True
        self.http2.cork()

    def resume(self) -> None:
        """The transport has room again."""
        self.paused = False
        self.http2.uncork()
        self.flush()
        for stream in list(self.http2.streams.values()):
            if stream.call is not None:
                stream.call.may_send()

    def drain(self) -> None:
        """Take no new calls; `closing` becomes true when those in flight have ended."""
        if not self._draining:
            self._draining = True
            self.http2.goaway(last_stream_id=MAX_STREAM_ID)
            self.http2.ping(_DRAIN_PING)  # its answer comes after all that the peer sent before it knew

    def tick(self, now: float) -> None:
        """The listener's clock: patience is renewed, stalls and idleness are noticed."""
        http2, limits = self.http2, self.limits
        http2.renew()
        if self._began is None:
            self._began = self._progress = self._idle_since = now
        waits = http2.pending > 0 or any(map(_is_receiving, http2.streams.values()))
        if not waits or http2.moved - self._mark >= _PROGRESS_BYTES:
            self._mark, self._progress = http2.moved, now
        if self._draining:
            if self._drained_at is None:
                self._drained_at = now
            if now - self._drained_at >= _DRAIN_S:
                self._accept_no_more()
        still = now - self._progress
        if not self._greeted:
            if now - self._began >= limits.handshake_s:
                self._give_up("no SETTINGS in time")
        elif still >= limits.stall_s:  # PINGs, and a byte now and then, are no progress
            self._give_up(f"nothing moved for {still:.0f} s in the middle of a call")
        if not self.idle:
            self._idle_since = now
        elif limits.idle_s and now - self._idle_since >= limits.idle_s:
            self._give_up("idle")

    def lost(self) -> None:
        """The transport is gone: handlers are cancelled, everything is freed."""
        self.closing = True
        for stream in list(self.http2.streams.values()):
            if stream.call is not None:
                stream.call.gone()
        for task in self._tasks:
            task.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
        self.http2.abandon()
        self._account()

    # ---- events ----

    def _on_request(self, stream: Stream, head: Head, body: Buffer) -> None:
        """A whole request at once."""
        note = head.shape.note
        if note is None or not note.is_unary or self.is_over_limits:
            self._on_headers(stream, head, False)
            call = stream.call
        else:
            call = stream.call = GrpcCall(self, note, note.route, stream, head)
            if head.volatile:
                call.on_head()
                call = stream.call
        if call is not None:
            call.on_data(body, True)

    def _on_headers(self, stream: Stream, head: Head, ended: bool) -> None:
        note = head.shape.note
        if note is None:
            note = head.shape.note = _Note(head, self._routes)
        if not note.is_grpc:
            stream.call = plain = PlainCall(self, stream, head)
            plain.on_head(ended)
            return
        error = note.error
        if error is None and self.is_over_limits:
            error = Overloaded("too many bytes in flight")
        if error is not None:
            fields = framing.encode_status(*to_wire(error))
            extra = [_ACCEPTS] if isinstance(error, Unimplemented) else []
            self.http2.send_headers(stream, encode([*_HEAD, *fields, *extra]), ended=True)
            if not ended:
                self.http2.reset(stream, ErrorCode.NO_ERROR)
            return
        call = stream.call = GrpcCall(self, note, note.route, stream, head)
        if head.volatile or not note.route.is_unary:
            call.on_head()
        if ended and stream.call is call:
            call.on_end()

    def _on_other(self, event: Any) -> None:
        if isinstance(event, (TrailersReceived, StreamReset, StreamWritable)):
            call: StreamCall | None = event.stream.call
            if call is None:
                self.dismiss(event.stream)
            elif isinstance(event, TrailersReceived):  # gRPC's callers send none; the end is what counts
                call.on_end()
            elif isinstance(event, StreamReset):
                call.gone()
            else:
                call.may_send()
        elif isinstance(event, SettingsReceived):
            self._greeted = True
        elif isinstance(event, PingAcked):
            if self._draining and event.payload == _DRAIN_PING:
                self._accept_no_more()
        elif isinstance(event, ConnectionFailed):
            log.info("%s: connection failed: %s: %s", self.peer, event.code.name, event.reason)
            self.closing = True

    # ---- for the calls ----

    @property
    def is_over_limits(self) -> bool:
        """Whether so many bytes are in flight that no more can be taken on."""
        return self._held + self.http2.pending + self.made > self.limits.connection_bytes or self._budget.exceeded

    def hold(self, call: StreamCall, count: int) -> None:
        """So many bytes of a call's request are in flight now."""
        change = count - call.held
        if change:
            call.held = count
            self._held += change
            self._budget.take(change)

    def dismiss(self, stream: Stream) -> None:
        """A reply is complete: where the request is not, its caller need not send the rest."""
        if stream.state is State.HALF_CLOSED_LOCAL:
            self.http2.reset(stream, ErrorCode.NO_ERROR)

    def watch(self, call: StreamCall, task: asyncio.Future[Any]) -> None:
        """A call goes on in `task`, which `lost`, `gone` and the call's deadline cancel; `finished` is to be told."""
        self._tasks.add(task)
        if call.deadline is not None and call.deadline < self._alarm_at:
            self._set_alarm(call.deadline)

    def finished(self, task: asyncio.Future[Any]) -> None:
        """What a call went on in has ended."""
        self._tasks.discard(task)
        if isinstance(task, asyncio.Task) and not task.cancelled() and task.exception() is not None:
            # A fault in here: what handlers raise is answered.
            log.error("%s: a call failed", self.peer, exc_info=task.exception())
        if self._refusing:
            self._account()
            self._wake()

    def flush(self) -> None:
        """Have the listener write what was made outside of receive()."""
        if not self.inside:
            self._account()
            self._wake()

    # ---- deadlines ----

    def _set_alarm(self, at: float) -> None:
        """One timer for all calls: most are answered long before their deadlines, and a timer each would cost more."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = asyncio.get_running_loop().call_later(max(at - time.monotonic(), 0), self._ring)

    def _ring(self) -> None:
        self._alarm, self._alarm_at, now = None, math.inf, time.monotonic()
        running = [call for s in self.http2.streams.values() if (call := s.call) is not None and call.task is not None]
        for call in running:
            if call.deadline is not None and call.deadline <= now:
                call.expire()
        later = (call.deadline for call in running if call.deadline is not None and call.deadline > now)
        if (at := min(later, default=math.inf)) < self._alarm_at:
            self._set_alarm(at)

    # ---- accounts and the end ----

    def _drop(self, stream: Stream | None) -> None:
        if stream is not None:
            self.http2.reset(stream, ErrorCode.INTERNAL_ERROR)
            if stream.call is not None:
                stream.call.gone()

    def _account(self) -> None:
        """Replies that wait for windows count as bytes in flight."""
        pending = self.http2.pending
        if pending != self._queued:
            self._budget.take(pending - self._queued)
            self._queued = pending
        if self._refusing and not self.http2.streams and not self._tasks:
            self.closing = True

    def _accept_no_more(self) -> None:
        """The second half of a drain: the peer knows, and what it sends from now on is ignored."""
        if not self._refusing:
            self._refusing = True
            self.http2.goaway()
            self._account()

    def _give_up(self, why: str) -> None:
        log.info("%s: closed: %s", self.peer, why)
        self.http2.goaway(text=why.encode())
        self.closing = True


def _is_receiving(stream: Stream) -> bool:
    call: StreamCall | None = stream.call
    return call is not None and call.is_receiving
