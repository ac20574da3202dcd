"""The client end of a connection: an asyncio channel over `client_calls`.

One channel is one endpoint and one connection; any number of calls share it. It connects on first use and again after a
loss, with a growing pause after failures. What endpoints there are and which of them is asked is no business of a
channel's: that comes on top, and keeps a channel for each. `blocking_channel` is the same for threads.

A connection counts as one when the server's first SETTINGS are here: something that only accepts is no server, and a
loss before that is a failed attempt. A call that the server is known not to have looked at (REFUSED_STREAM, or a stream
above the last one of a GOAWAY) is sent a second time, once. One that finds the server's limit on streams reached waits
in line.
"""

import asyncio
import contextlib
import math
import random
import ssl
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cube.errors import BadConfig, ServingError, from_wire
from cube.rpc.calls import Buffer, Field, Reply
from cube.rpc.client_calls import ClientCall, ClientCalls
from cube.rpc.limits import Limits

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
CONNECT_S = 10.0
PROBE_S = 5.0  # for a server that has let a deadline pass without a sign of life, to answer a ping
LINGER_S = 1.0  # for what is written to leave before a connection is cut: a server need not read
QUEUED_BYTES = 1 << 20  # a stream's sender waits while so much waits for the server
_PING = b"keepaliv"


class Answer(NamedTuple):
    """A reply with its metadata."""

    message: Buffer
    initial: tuple[Field, ...]
    trailing: tuple[Field, ...]


class Endpoint(NamedTuple):
    """Where a server listens."""

    text: str
    host: str  # empty for a unix socket
    port: int
    path: str  # of the unix socket

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """host:port, [IPv6]:port or unix:/path. Raises BadConfig."""
        if text.startswith("unix:") and len(text) > 5:
            return cls(text, "", 0, text[5:])
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
        if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
            raise BadConfig("endpoint", repr(text), "host:port, [IPv6]:port or unix:/path")
        try:
            host.encode("idna")  # as the resolver will: labels may be empty, or too long
        except UnicodeError as error:
            raise BadConfig("endpoint", repr(text), "the name of a host") from error
        return cls(text, host, int(port), "")

    @property
    def authority(self) -> str:
        """For the server's eyes: RFC 3986's host and port."""
        return "localhost" if self.path else self.text


def tls_context(
    ca: str | Path | None = None, certificate: str | Path | None = None, key: str | Path | None = None
) -> ssl.SSLContext:
    """For `tls=`: trusts `ca` (default: what the system trusts), shows `certificate` to servers that ask (mTLS)."""
    context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate is not None:
        context.load_cert_chain(str(certificate), None if key is None else str(key))
    context.set_alpn_protocols(["h2"])
    return context


def backoff_s(failures: int) -> float:
    """How long to wait after so many failed attempts in a row: doubling, with jitter so that clients do not march."""
    if not failures:
        return 0.0
    return min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 30), MAX_BACKOFF_S) * random.uniform(0.8, 1.2)  # noqa: S311


class Channel:
    """Calls to one endpoint, from one event loop."""

    def __init__(
        self,
        target: str,
        *,
        tls: ssl.SSLContext | None = None,
        authority: str | None = None,
        limits: Limits | None = None,
        keepalive_s: float | None = None,
    ):
        """target: host:port, [IPv6]:port or unix:/path; raises BadConfig for anything else.

        authority: what the server is called, if that is not the target (it is what a certificate is checked against).
        keepalive_s: ping a connection that has been silent so long, and give it up if nothing comes back in the same
        time again; servers of other makes may object to pings that are more frequent than every five minutes.
        """
        self.target = target
        self._endpoint = Endpoint.parse(target)
        self._authority = authority or self._endpoint.authority
        self._tls, self._limits, self._keepalive_s = tls, limits or Limits(), keepalive_s
        self._link: _Link | None = None
        self._links: set[_Link] = set()  # those that still have calls, too
        self._connecting: asyncio.Task[bool] | None = None
        self._failures = 0  # to connect, in a row
        self._not_before = 0.0  # loop time of the next attempt
        self._why = ""
        self._closed = False
        self._methods: dict[tuple[str, str | None], bytes] = {}

    async def call(
        self,
        path: str,
        message: Reply,
        timeout_s: float | None,
        wait_for_ready: bool = False,
        *,
        metadata: Sequence[Field] = (),
        compression: str | None = None,
        max_reply_bytes: int | None = None,
    ) -> Buffer:
        """Send one message, return the reply: bytes, or a memoryview of a large one.

        path: /package.Service/Method. message: any buffer, or a list of them. timeout_s: None for no deadline.
        wait_for_ready: wait for a server that is not there yet. compression: "gzip" or "deflate".
        Raises a ServingError, whose `status` and `trailing` are what the server said.
        """
        call = await self._unary(path, message, timeout_s, wait_for_ready, metadata, compression, max_reply_bytes)
        return call.messages[0]

    async def unary(
        self,
        path: str,
        message: Reply,
        timeout_s: float | None,
        wait_for_ready: bool = False,
        *,
        metadata: Sequence[Field] = (),
        compression: str | None = None,
        max_reply_bytes: int | None = None,
    ) -> Answer:
        """The same, with the server's metadata."""
        call = await self._unary(path, message, timeout_s, wait_for_ready, metadata, compression, max_reply_bytes)
        return Answer(call.messages[0], call.initial or (), call.trailing)

    async def stream(
        self,
        path: str,
        message: Reply | None = None,
        timeout_s: float | None = None,
        wait_for_ready: bool = False,
        *,
        metadata: Sequence[Field] = (),
        compression: str | None = None,
        max_reply_bytes: int | None = None,
    ) -> "Stream":
        """Start a call of streams. message: the only request of a server-streaming call; None if `send` follows."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None or timeout_s == math.inf else loop.time() + timeout_s
        link = self._link
        if link is None or link.queued or not link.calls.can_start:
            link = await self._ready(deadline, wait_for_ready)
        stream = Stream(link)
        try:
            stream.call = link.calls.start(
                self._method(link, path, compression),
                message,
                timeout_s=None if deadline is None else max(deadline - loop.time(), 0),
                on_event=stream.on_event,
                metadata=metadata,
                compression=compression,
                max_reply_bytes=max_reply_bytes,
                unary=False,
            )
        except Exception:
            link.wake()  # the next in line may have our place
            raise
        link.streams.add(stream)
        link.flush()
        if deadline is not None:
            stream.timer = loop.call_at(deadline, self._expire, link, stream.call, path)
        return stream

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._link is not None

    async def close(self) -> None:
        """Give up calls in flight, and those that wait for a connection, and disconnect. All get UNAVAILABLE."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        for link in list(self._links):
            link.close()
        for link in list(self._links):
            await link.gone.wait()

    async def __aenter__(self) -> "Channel":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ---- calls ----

    async def _unary(
        self,
        path: str,
        message: Reply,
        timeout_s: float | None,
        wait_for_ready: bool,
        metadata: Sequence[Field],
        compression: str | None,
        max_reply_bytes: int | None,
    ) -> ClientCall:
        loop = asyncio.get_running_loop()
        if message is None:
            raise TypeError("a call without a message: only a stream's may follow later")
        if timeout_s == math.inf:
            timeout_s = None
        deadline = None if timeout_s is None else loop.time() + timeout_s
        again = True
        while True:
            link = self._link
            if link is None or link.queued or not link.calls.can_start:
                link = await self._ready(deadline, wait_for_ready)
                if deadline is not None:
                    timeout_s = max(deadline - loop.time(), 0)
            done: asyncio.Future[ClientCall] = loop.create_future()
            try:
                call = link.calls.start(
                    self._methods.get((path, compression)) or self._method(link, path, compression),
                    message,
                    timeout_s=timeout_s,
                    on_event=partial(_settle, done),
                    metadata=metadata,
                    compression=compression,
                    max_reply_bytes=max_reply_bytes,
                )
            except Exception:
                link.wake()  # the next in line may have our place
                raise
            link.flush()
            timer = None if deadline is None else loop.call_at(deadline, self._expire, link, call, path)
            try:
                await done
            except asyncio.CancelledError:
                call.on_event = _ignore
                call.cancel()
                link.flush()
                raise
            finally:
                if timer is not None:
                    timer.cancel()
                if link.waiters or link.is_leaving:
                    link.after_call()
            if call.error is None:
                return call
            if not (call.error.never_processed and again):
                raise call.error
            # The server is known to have done nothing, as when it is going away: once more, there or on the next
            # connection. Only once: a server that refuses every call must not be asked as fast as it can answer.
            again = False
            if deadline is not None:
                timeout_s = max(deadline - loop.time(), 0)

    def _method(self, link: "_Link", path: str, compression: str | None) -> bytes:
        block = self._methods.get((path, compression))
        if block is None:
            block = self._methods[path, compression] = link.calls.method(path, compression)
        return block

    def _expire(self, link: "_Link", call: ClientCall, path: str) -> None:
        """A deadline has passed."""
        call.cancel(from_wire("DEADLINE_EXCEEDED", f"{path}: the deadline passed [{self.target}]"))
        link.flush()
        link.probe()

    # ---- connections ----

    async def _ready(self, deadline: float | None, wait: bool) -> "_Link":
        """A connection on which a call can start, if it does so at once. Raises Unavailable, DeadlineExceeded.

        Both as never processed: nothing has been sent.
        """
        loop = asyncio.get_running_loop()
        while True:
            if self._closed:
                raise self._is_closed()
            left = None if deadline is None else deadline - loop.time()
            if left is not None and left <= 0:
                why = f"no connection within the deadline: {self._why or 'none yet'} [{self.target}]"
                raise from_wire("DEADLINE_EXCEEDED", why, never_processed=True)
            link = self._link
            if link is not None and not link.calls.http2.is_going_away:
                if link.calls.can_start and not link.queued:
                    return link
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await link.room()
                        if link.calls.can_start:
                            return link
                continue
            if self._connecting is None:
                pause = self._not_before - loop.time()
                if pause > 0 and not wait:
                    raise from_wire("UNAVAILABLE", f"{self._why} [{self.target}]", never_processed=True)
                self._connecting = loop.create_task(self._connect(max(pause, 0)))
            attempt = self._connecting
            # Not awaited itself: it is everybody's, and its end (by close(), too) must not cancel who waits for it.
            await asyncio.wait((attempt,), timeout=left)
            if attempt.done() and not self._closed and not wait and (attempt.cancelled() or not attempt.result()):
                raise from_wire("UNAVAILABLE", f"{self._why} [{self.target}]", never_processed=True)

    def _is_closed(self) -> ServingError:
        return from_wire("UNAVAILABLE", f"the channel to {self.target} is closed", never_processed=True)

    async def _connect(self, pause: float) -> bool:
        """Try to make a connection; whether there is one."""
        loop = asyncio.get_running_loop()
        try:
            if pause:
                await asyncio.sleep(pause)
            async with asyncio.timeout(CONNECT_S):
                link = await self._open()
                try:
                    await link.greeted.wait()
                finally:
                    if not link.calls.greeted:
                        link.give_up("no HTTP/2 settings from the server in time")
            if link.is_leaving:  # before anything could be asked of it
                raise ConnectionError(link.why or "the server is going away")
        except (OSError, ValueError) as error:  # TimeoutError, ssl.SSLError; names that are none
            self._failures += 1
            self._not_before = loop.time() + backoff_s(self._failures)
            why = "no connection in time" if isinstance(error, TimeoutError) else str(error)
            self._why = f"cannot connect: {why or type(error).__name__}"
            return False
        finally:
            self._connecting = None
        self._failures, self._link = 0, link
        return True

    async def _open(self) -> "_Link":
        loop, endpoint = asyncio.get_running_loop(), self._endpoint
        server_hostname = None
        if self._tls is not None:
            server_hostname = (
                Endpoint.parse(f"{self._authority}:1").host
                if ":" not in self._authority
                else (self._authority.rpartition(":")[0].strip("[]"))
            )

        def make() -> _Link:
            scheme = "http" if self._tls is None else "https"
            calls = ClientCalls(self._limits, self._authority, scheme)
            return _Link(calls, self.target, self._keepalive_s, self._forget)

        if endpoint.path:
            _, link = await loop.create_unix_connection(
                make, endpoint.path, ssl=self._tls, server_hostname=server_hostname
            )
        else:
            _, link = await loop.create_connection(
                make, endpoint.host, endpoint.port, ssl=self._tls, server_hostname=server_hostname
            )
        if not link.gone.is_set():
            self._links.add(link)
        return link

    def _forget(self, link: "_Link", why: str) -> None:
        """A connection has ended; `gone` tells whether its socket has, too."""
        if link.gone.is_set():
            self._links.discard(link)
        if self._link is link:
            self._link, self._why = None, why


class Stream:
    """A call of streams: send with `send` and `end`, receive by iterating."""

    def __init__(self, link: "_Link"):
        self.call: ClientCall
        self.timer: asyncio.TimerHandle | None = None
        self._link = link
        self._news: asyncio.Future[None] | None = None

    async def send(self, message: Reply) -> None:
        """Send one message; waits while much of what was sent before waits for the server. Raises a ServingError.

        A large buffer is not copied: it must not change until the call is over, even if `send` has returned.
        """
        while self.call.pending > QUEUED_BYTES or self._link.paused:
            if self.call.over:
                break
            await self._wait()
        if self.call.over:
            raise self.call.error or from_wire("UNAVAILABLE", "the call is over")
        self.call.send(message)
        self._link.flush()

    async def end(self) -> None:
        """No more messages will be sent."""
        if not self.call.over:
            self.call.end()
            self._link.flush()

    async def initial(self) -> tuple[Field, ...]:
        """The server's metadata, once it has begun to answer. Raises a ServingError if the call fails before that."""
        while self.call.initial is None and not self.call.over:
            await self._wait()
        if self.call.initial is None and self.call.error is not None:
            raise self.call.error
        return self.call.initial or ()

    @property
    def trailing(self) -> tuple[Field, ...]:
        """The metadata of its end."""
        return self.call.trailing

    def cancel(self) -> None:
        """Give the call up."""
        self.call.cancel()
        self._link.flush()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Buffer:
        while not self.call.messages:
            if self.call.over:
                if self.call.error is not None:
                    raise self.call.error
                raise StopAsyncIteration
            await self._wait()
        message = self.call.take_message()
        self._link.flush()
        return message

    async def result(self) -> Buffer:
        """The one reply of a client-streaming call. Raises a ServingError."""
        messages = [message async for message in self]
        if len(messages) != 1:
            raise from_wire("INTERNAL", f"{len(messages)} replies to a call that has one")
        return messages[0]

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def on_event(self, call: ClientCall) -> None:
        """News of the call: whoever waits looks again."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
        if call.over:
            if self.timer is not None:
                self.timer.cancel()
            self._link.streams.discard(self)
            self._link.after_call()

    async def _wait(self) -> None:
        if self._news is None or self._news.done():
            self._news = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._news)


class _Link(asyncio.Protocol):
    """One connection: moves bytes between a transport and ClientCalls.

    Calls beyond the server's limit on streams stand in line (`room`). `wake` lets as many go as there are places, and
    is called wherever a place may have come free; who was woken starts its call in the same step, or calls it again.
    """

    def __init__(
        self, calls: ClientCalls, target: str, keepalive_s: float | None, forget: "Callable[[_Link, str], None]"
    ):
        self.calls = calls
        self.waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()  # calls in line that were not woken yet
        self.queued = 0  # calls in line, woken or not: others go behind them
        self.streams: set[Stream] = set()
        self.is_leaving = False
        self.is_over = False
        self.why = ""  # it is over
        self.paused = False  # the transport is full
        self.greeted = asyncio.Event()  # the server's first settings are here, or it is over
        self.gone = asyncio.Event()  # and so is its socket
        self._target, self._keepalive_s, self._forget = target, keepalive_s, forget
        self._transport: asyncio.Transport
        self._heard = 0  # how often bytes have come
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.flush()
        if self._keepalive_s is not None:
            self._keep_alive(self._keepalive_s, -1, pinged=False)

    def data_received(self, data: bytes) -> None:
        self._heard += 1
        calls = self.calls
        calls.receive(data)
        if calls.http2.out:
            self.flush()
        if calls.greeted and not self.greeted.is_set():
            self.greeted.set()
        if self.waiters:  # the server may have raised its limit
            self.wake()
        if calls.http2.is_going_away or calls.closed:
            self.is_leaving = True
            self.after_call()
            if calls.closed:
                self._end(f"the connection failed: {calls.http2.failure}")

    def flush(self) -> None:
        """Write what the state machine has made."""
        out = self.calls.take()
        if not out:
            return
        if len(out) == 1:
            self._transport.write(out[0])
        elif sum(map(len, out)) <= 16_384:
            self._transport.write(b"".join(out))
        else:
            self._transport.writelines(out)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        for stream in list(self.streams):
            stream.on_event(stream.call)

    def eof_received(self) -> None:
        # It can answer nothing any more. What waits to be written might wait for ever.
        self.give_up("the server closed the connection")

    def connection_lost(self, error: Exception | None) -> None:
        self._over(f"the connection was lost: {error}" if error else "the connection was closed")
        self.gone.set()
        self._forget(self, self.why)

    def close(self) -> None:
        """Say goodbye and close; what is in flight is cancelled."""
        self.why = self.why or "the channel was closed"
        self.calls.close()
        self.flush()
        self._end(self.why)

    def give_up(self, why: str) -> None:
        """Nothing more can be expected of the server."""
        self._over(why)
        self._transport.abort()

    def after_call(self) -> None:
        """A call has ended: another may start, or a connection that is going away is no longer needed."""
        self.wake()
        if self.calls.http2.is_going_away:
            self.is_leaving = True
            if not self.calls.calls:
                self._end("the server is going away")

    async def room(self) -> None:
        """Wait in line until a call may start, or the connection is of no use any more."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters[waiter] = None
        self.queued += 1
        self.wake()
        try:
            await waiter
        except asyncio.CancelledError:
            self.waiters.pop(waiter, None)
            self.queued -= 1
            self.wake()  # it may have been woken, too
            raise
        self.queued -= 1

    def wake(self) -> None:
        """Let go on who stands in line: as many as may start, or all where nobody ever will."""
        http2, waiters = self.calls.http2, self.waiters
        while waiters:
            woken = self.queued - len(waiters)
            if not http2.is_going_away and woken >= http2.peer_max_streams - len(http2.streams):
                return
            waiter, _ = waiters.popitem(last=False)
            if not waiter.done():  # else it was cancelled, and leaves by itself
                waiter.set_result(None)

    def probe(self) -> None:
        """A deadline passed: if not a byte comes for a ping either, the server is not there any more."""
        if "probe" not in self._timers and not self.is_over and not self.calls.closed:
            self._ping()
            self._later("probe", PROBE_S, partial(self._probed, self._heard))

    def _probed(self, heard: int) -> None:
        del self._timers["probe"]
        if heard == self._heard:
            self.give_up("the server does not answer")

    def _keep_alive(self, interval: float, heard: int, pinged: bool) -> None:
        """Every so often. heard: `_heard` at the last time; pinged: what then was a ping."""
        silent = heard == self._heard
        if silent and pinged:
            self.give_up("the server does not answer")
            return
        if silent:
            self._ping()
        self._later("keep-alive", interval, partial(self._keep_alive, interval, self._heard, silent))

    def _ping(self) -> None:
        self.calls.ping(_PING)
        self.flush()

    def _later(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, act)

    def _end(self, why: str) -> None:
        """Close when everything is written, or cannot be."""
        self.why = self.why or why
        if not self.is_over and not self._transport.is_closing():
            self._transport.close()
            self._later("end", LINGER_S, self._transport.abort)

    def _over(self, why: str) -> None:
        """Nothing is heard or said any more."""
        if self.is_over:
            return
        self.is_over, self.is_leaving, self.why = True, True, self.why or why
        for timer in self._timers.values():
            timer.cancel()
        self._forget(self, self.why)
        self.calls.lost(f"{self.why} [{self._target}]")
        self.wake()
        self.greeted.set()


def _settle(done: "asyncio.Future[ClientCall]", call: ClientCall) -> None:
    """A unary call is over. Its task may have been cancelled, and `done` with it, before it could give the call up."""
    if not done.done():
        done.set_result(call)


def _ignore(call: ClientCall) -> None:
    """Nobody waits for this call any more."""
