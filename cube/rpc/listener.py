"""Ports and the connections through them: TCP, unix sockets, TLS; HTTP/2 and HTTP/1.1 told apart by their first bytes.

    socket ──▶ [Session: TLS] ──▶ Sniffer ──▶ Conversation: ServerCalls (HTTP/2) or Http1
                                                  │ receive(bytes), take() → buffers to write

What is said is the conversation's business; whether it may go on is decided here:

* A connection is closed at the limit of connections, when it has not said which protocol it speaks within
  `Limits.handshake_s` (TLS included), and when nothing it was sent has left for `Limits.stall_s`.
* A connection is not read from while more than `HIGH_WATER` bytes wait to be written to it, or its conversation is
  `full`. So a peer that does not read costs that much, and what one read can ask for; it counts in the budget.
* While the budget is exceeded, a connection with calls in flight is read once per tick of the clock: the calls may end
  and free memory, and what is half received goes on, slowly. Connections without calls are read as always:
  conversations refuse new calls by themselves, and a peer that is told so is better off than one that waits.

A peer that closes its side is taken to be gone: what is in flight for it is cancelled, and what has been written still
goes out. Clients of gRPC and HTTP close only when they are no longer interested.

We close in two steps, unless nothing can be on its way: we end our side and throw away what still comes, until the peer
closes or `LINGER_S` is over. A socket closed with unread bytes in it resets the connection, and the peer may lose the
last reply.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

from cube.rpc.calls import Handlers
from cube.rpc.http1 import Http1
from cube.rpc.http2 import PREFACE, Buffer
from cube.rpc.limits import Budget, Limits
from cube.rpc.router import Router
from cube.rpc.server_calls import Routes, ServerCalls
from cube.rpc.sockets import Bound, bound_sockets, cannot_be_bound
from cube.rpc.tls import Session, Tls

__all__ = ["Conversation", "Listener", "Tls"]

log = logging.getLogger(__name__)

HIGH_WATER = 256 << 10  # bytes that wait to be written to a connection before it is no longer read from
JOINED = 8 << 10  # bytes: less is copied into one buffer, which costs less than handing over several
LINGER_S = 2.0
ROUND = 256  # connections that one step of the clock looks at: calls must not wait for thousands of them
DRAIN_TICK_S = 0.1
BACKLOG = 16 << 10  # connections not yet accepted; the kernel caps it at net.core.somaxconn


class Conversation(Protocol):
    """One connection's protocol, without its socket. Its methods never raise.

    What `take` gives is written after every `receive`, `tick` and `drain`, and in answer to `wake`, a function it is
    given for news at other times.
    """

    full: bool  # it should not be given more to receive now
    closing: bool  # close the connection once what take() gave is written

    @property
    def idle(self) -> bool:
        """Nothing is in flight, and there is nothing to write."""

    def receive(self, data: bytes) -> None:
        """Bytes from the peer, in any split."""

    def take(self) -> list[Buffer]:
        """What to write now, in order."""

    def pause(self) -> None:
        """What was taken is not written yet: replies that come in pieces wait."""

    def resume(self) -> None:
        """There is room again."""

    def drain(self) -> None:
        """Take no new calls; be `closing` when those in flight have ended."""

    def tick(self, now: float) -> None:
        """The clock, about once a second."""

    def lost(self) -> None:
        """The connection is gone: cancel what is in flight, free everything."""


class _Silence:
    """The conversation of a connection that is over: nothing is heard, nothing is said."""

    __slots__ = ()
    closing, idle, full = False, True, False

    def receive(self, data: bytes) -> None:
        pass

    def take(self) -> list[Buffer]:
        return []

    def pause(self) -> None:
        pass

    resume = drain = lost = pause

    def tick(self, now: float) -> None:
        pass


_SILENCE = _Silence()


class _Sniffer(_Silence):
    """The conversation of a connection that has not said yet what it speaks."""

    __slots__ = ("_begin", "_heard", "closing")

    def __init__(self, begin: Callable[[bool], Conversation]):
        """begin: is_http2 → what takes our place."""
        self._begin, self._heard = begin, b""
        self.closing = False

    def receive(self, data: bytes) -> None:
        self._heard += data
        is_http2 = self._heard.startswith(PREFACE)
        if is_http2 or not PREFACE.startswith(self._heard):
            self._begin(is_http2).receive(self._heard)

    def drain(self) -> None:
        self.closing = True


class _Connection(asyncio.Protocol):
    """One connection. The way of a call: `data_received`, `_reply`, `_send`.

    Data comes as bytes of its own, which conversations may keep parts of. A buffer that all connections share was
    measured: no gain at 200 bytes and at 12 MB, and at 262 KB it gains what `process` does by keeping freed memory.
    """

    __slots__ = (
        "_backlog", "_backlog_since", "_choked", "_conversation", "_counted", "_deadline", "_listener", "_transport",
        "_unread", "is_woken",
    )  # fmt: skip

    _transport: asyncio.Transport

    def __init__(self, listener: "Listener"):
        self._listener = listener
        self._conversation: Conversation = _SILENCE
        self._deadline = 0.0  # of the handshake, or of a peer that should close; then it is closed
        self._backlog, self._backlog_since = 0, 0.0  # bytes that wait to be written, and since when it is that many
        self._counted = 0  # bytes, in the budget
        self._choked = False  # more than HIGH_WATER of them
        self._unread = False  # we do not read
        self.is_woken = False  # the listener has been told that there is something to write

    # ---- the transport's calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        listener = self._listener
        if not listener.admit(self):
            self._transport.abort()
            return
        self._deadline = time.monotonic() + listener.limits.handshake_s
        self._transport.set_write_buffer_limits(HIGH_WATER)
        self._conversation = _Sniffer(self._begin)

    def data_received(self, data: bytes) -> None:
        listener = self._listener
        listener.bytes_in += len(data)
        self._conversation.receive(data)
        self._reply()
        if listener.budget.used > listener.limits.total_bytes or self._conversation.full:
            self._regulate()

    def eof_received(self) -> None:
        self._end_conversation()  # the transport writes what it has, and closes

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_conversation()
        self._listener.budget.give(self._counted)
        self._counted = 0
        self._listener.dismiss(self)

    def pause_writing(self) -> None:
        self._choked = True
        self._count(self._transport.get_write_buffer_size())
        self._conversation.pause()
        self._regulate()

    def resume_writing(self) -> None:
        self._choked = False
        self._count(0)
        self._conversation.resume()
        self._regulate()

    # ---- the listener's calls ----

    def wake(self) -> None:
        """What the conversation calls when it has something to say."""
        if not self.is_woken:
            self.is_woken = True
            self._listener.wake(self)

    def speak(self) -> None:
        """Write what the conversation has, after it has called `wake`."""
        self.is_woken = False
        self._reply()
        if self._unread or self._conversation.full:
            self._regulate()

    def drain(self) -> None:
        """Accept no new calls; close when those in flight have ended."""
        self._conversation.drain()
        self._reply(lingers=False)

    def tick(self, now: float) -> None:
        """Close what takes too long."""
        waiting = self._transport.get_write_buffer_size()
        if waiting != self._backlog:
            self._backlog, self._backlog_since = waiting, now
        elif waiting and now - self._backlog_since >= self._listener.limits.stall_s:
            self._transport.abort()
            return
        if waiting and self._conversation is _SILENCE:
            self._deadline = now + LINGER_S  # from when all is written
        if now >= self._deadline:
            self._give_up()
            return
        if self._choked:
            self._count(waiting)
        elif self._unread and not self._conversation.full:
            self._unread = False
            self._transport.resume_reading()
        self._conversation.tick(now)
        self._reply(lingers=False)

    def abort(self) -> None:
        """Close now, whatever is in flight."""
        self._transport.abort()

    # ---- inside ----

    def _begin(self, is_http2: bool) -> Conversation:
        """The peer has said what it speaks."""
        self._deadline = float("inf")
        self._conversation = self._listener.conversation(is_http2, _peer(self._transport), self.wake)
        if self._choked:
            self._conversation.pause()
        return self._conversation

    def _reply(self, lingers: bool = True) -> None:
        """Write what the conversation has to say, and close if that was all."""
        conversation = self._conversation
        out = conversation.take()
        if out:
            self._send(out)
        if conversation.closing:
            self._end_conversation()
            self._close(lingers)

    def _send(self, out: Sequence[Buffer]) -> None:
        if len(out) == 1:
            self._write(out[0])
        elif (size := sum(map(len, out))) <= JOINED:
            self._write(b"".join(out))
        else:
            self._listener.bytes_out += size
            self._transport.writelines(out)

    def _write(self, data: Buffer) -> None:
        self._listener.bytes_out += len(data)
        self._transport.write(data)

    def _end_conversation(self) -> None:
        conversation, self._conversation = self._conversation, _SILENCE
        conversation.lost()

    def _close(self, lingers: bool) -> None:
        """Close when everything is written, and the peer has stopped talking if it may be in the middle of it."""
        if lingers:
            self._deadline = time.monotonic() + LINGER_S
            with contextlib.suppress(OSError):  # it has gone already
                self._transport.write_eof()
        else:
            self._transport.close()

    def _give_up(self) -> None:
        """The deadline has passed."""
        if self._conversation is not _SILENCE:
            self._listener.failed_handshakes += 1
        self._transport.abort()

    def _regulate(self) -> None:
        """Read, or do not."""
        conversation = self._conversation
        self._unread = self._choked or conversation.full or (self._listener.budget.exceeded and not conversation.idle)
        if self._unread:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _count(self, waiting: int) -> None:
        """Bytes that wait to be written, in the budget."""
        self._listener.budget.take(waiting - self._counted)
        self._counted = waiting


class _TlsConnection(_Connection):
    """The same through TLS."""

    __slots__ = ("_heard", "_session")

    def __init__(self, listener: "Listener", session: Session):
        super().__init__(listener)
        self._session = session
        self._heard = False

    def data_received(self, data: bytes) -> None:
        listener, session = self._listener, self._session
        listener.bytes_in += len(data)
        if self._conversation is _SILENCE:
            return
        was_open = session.is_open
        self._heard = True
        pieces = session.receive(data)
        if session.pending:
            self._write(session.take())
        if not was_open and session.is_open and session.protocol is not None:
            self._begin(session.protocol == "h2")
        for piece in pieces:
            self._conversation.receive(piece)
        self._reply()
        if session.failure or session.is_closed:
            self._end()
        elif listener.budget.used > listener.limits.total_bytes or self._conversation.full:
            self._regulate()

    def eof_received(self) -> None:
        if self._heard and not self._session.is_open and self._conversation is not _SILENCE:
            self._listener.failed_handshakes += 1
        super().eof_received()

    def _send(self, out: Sequence[Buffer]) -> None:
        super()._send(self._session.send(out))

    def _close(self, lingers: bool) -> None:
        if farewell := self._session.close():
            self._write(farewell)
        super()._close(lingers)

    def _end(self) -> None:
        """The peer has closed its side, or sent what is no TLS, or not such as we accept."""
        failure = self._session.failure
        if failure is not None:
            log.debug("%s: TLS: %s", _peer(self._transport), failure)
            if not self._session.is_open:
                self._listener.failed_handshakes += 1
        self._end_conversation()
        self._close(lingers=failure is not None)


class Listener:
    """Any number of ports for the same handlers. Owned by an event loop, uvloop's or asyncio's."""

    def __init__(self, handlers: Handlers, router: Router | None, limits: Limits | None = None, tls: Tls | None = None):
        """handlers: gRPC's, by full path. router: plain HTTP's, over HTTP/1.1 and HTTP/2. tls: for every port."""
        self.limits = limits or Limits()
        self.budget = Budget(self.limits.total_bytes)
        self._routes, self._router, self._tls = Routes(handlers, self.limits), router, tls
        self._plain = router or Router()
        self._connections: set[_Connection] = set()
        self._woken: list[_Connection] = []
        self._servers: list[asyncio.AbstractServer] = []
        self._bound: list[Bound] = []
        self._clock: asyncio.Handle | None = None
        self._draining = False
        self._emptied: asyncio.Event = asyncio.Event()  # no connection is left; looked at while draining
        # Counted since the start.
        self.accepted = 0  # connections, without those refused
        self.refused = 0  # connections over the limit
        self.failed_handshakes = 0  # TLS that failed, and peers that did not say in time what they speak
        self.bytes_in = self.bytes_out = 0  # as on the wire

    @property
    def open(self) -> int:
        """Connections now."""
        return len(self._connections)

    def conversation(self, is_http2: bool, peer: str, wake: Callable[[], None]) -> Conversation:
        """What a new connection is to talk to."""
        if is_http2:
            return ServerCalls(self._routes, self._router, self.limits, self.budget, peer, wake)
        return Http1(self._plain, self.limits, self.budget, peer, wake)

    async def start(self, listen: str, reuse_port: bool = False) -> str:
        """Open a port; returns the address bound. Raises BadConfig.

        listen: host:port, with port 0 for a free one, an IPv6 host in brackets ([::] takes IPv4 too); or unix:/path,
        for a socket file that only our own user may use (UNIX_MODE). One that a dead server left is replaced.
        reuse_port: with others that say the same (SO_REUSEPORT); the kernel spreads connections over them.
        """
        loop = asyncio.get_running_loop()
        bound = await bound_sockets(listen, reuse_port)
        self._bound.append(bound)
        make = self._new_connection if self._tls is None else self._new_tls_connection
        try:
            for one in bound.sockets:
                self._servers.append(await loop.create_server(make, sock=one, backlog=BACKLOG))
        except OSError as error:  # another server was faster
            for one in bound.sockets:
                one.close()
            raise cannot_be_bound(listen) from error
        if self._clock is None:
            self._next_round()
        return bound.address

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more, wait for what is in flight up to `grace_s` seconds, close.

        Afterwards no connection and no timer of ours is left, nor any task but those of handlers that hold out against
        being cancelled. A second call with less patience ends the first.
        """
        self._draining = True
        for server in self._servers:
            server.close()
        for bound in self._bound:
            bound.remove_file()
        servers, self._servers, self._bound = self._servers, [], []
        for connection in list(self._connections):
            _unhurt(connection, connection.drain)
        self._next_round()  # faster from now on
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty(), grace_s)
        for connection in list(self._connections):
            connection.abort()
        await self._empty()
        for server in servers:
            await server.wait_closed()
        for _ in range(3):  # handlers' tasks are told, unwind, and are gone
            await asyncio.sleep(0)
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    # ---- for connections ----

    def admit(self, connection: _Connection) -> bool:
        """Whether a new connection is welcome."""
        if self._draining or len(self._connections) >= self.limits.connections:
            self.refused += 1
            return False
        self.accepted += 1
        self._connections.add(connection)
        return True

    def dismiss(self, connection: _Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._emptied.set()

    def wake(self, connection: _Connection) -> None:
        """A connection has something to write: in the loop's next turn, so that handlers which end together, as those
        of a batch do, are answered together."""
        self._woken.append(connection)
        if len(self._woken) == 1:
            asyncio.get_running_loop().call_soon(self._speak)

    # ---- inside ----

    def _speak(self) -> None:
        woken, self._woken = self._woken, []
        for connection in woken:
            _unhurt(connection, connection.speak)

    def _new_connection(self) -> _Connection:
        return _Connection(self)

    def _new_tls_connection(self) -> _Connection:
        assert self._tls is not None
        return _TlsConnection(self, self._tls.session())

    async def _empty(self) -> None:
        while self._connections:
            self._emptied.clear()
            await self._emptied.wait()

    def _next_round(self) -> None:
        """Tick every connection, and again after a second or a quarter of the least time-out."""
        if self._clock is not None:
            self._clock.cancel()
        if self._tls is not None:
            self._tls.refresh()
        self._step(list(self._connections))

    def _step(self, left: list[_Connection]) -> None:
        loop, now = asyncio.get_running_loop(), time.monotonic()
        for connection in left[-ROUND:]:
            _unhurt(connection, partial(connection.tick, now))
        del left[-ROUND:]
        if left:
            self._clock = loop.call_soon(self._step, left)
        else:
            self._clock = loop.call_later(self._interval(), self._next_round)

    def _interval(self) -> float:
        if self._draining:
            return DRAIN_TICK_S
        limits = self.limits
        return min(1.0, *(s / 4 for s in (limits.handshake_s, limits.stall_s, limits.idle_s) if s))


def _unhurt(connection: _Connection, act: Callable[[], None]) -> None:
    """A fault that one connection provokes is not to be its neighbours'."""
    try:
        act()
    except Exception:
        log.exception("a connection failed")
        connection.abort()


def _peer(transport: asyncio.BaseTransport) -> str:
    name = transport.get_extra_info("peername")
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return "" if name is None else "unix"
