"""The client end of a connection: an asyncio channel over `client_calls`.

One channel is one endpoint and one connection; any number of calls share it. It connects on first use and again after a
loss, with a growing pause after failures. What endpoints there are is `naming`'s business, which of them is asked
`routing`'s: a caller with several keeps a channel for each. `blocking_channel` is the same for threads.
"""

import asyncio
import random
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cube.errors import BadConfig, Unavailable, from_wire
from cube.rpc.calls import Buffer, Field, Reply
from cube.rpc.client_calls import ClientCall, ClientCalls
from cube.rpc.limits import Limits

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
CONNECT_S = 10.0
PROBE_S = 5.0  # for a server that has let a deadline pass without a sign of life, to answer a ping
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
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise BadConfig("endpoint", repr(text), "host:port, [IPv6]:port or unix:/path")
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
        self._connecting: asyncio.Task[_Link] | None = None
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
        deadline = None if timeout_s is None else loop.time() + timeout_s
        link = self._link
        if link is None or not link.calls.can_start:
            link = await self._ready(deadline, wait_for_ready)
        stream = Stream(link)
        link.streams.add(stream)
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
        link.flush()
        if deadline is not None:
            stream.timer = loop.call_at(deadline, self._expire, link, stream.call, path)
        return stream

    async def close(self) -> None:
        """Give up calls in flight and disconnect."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
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
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while True:
            link = self._link
            if link is None or not link.calls.can_start:
                link = await self._ready(deadline, wait_for_ready)
                if deadline is not None:
                    timeout_s = max(deadline - loop.time(), 0)
            done: asyncio.Future[ClientCall] = loop.create_future()
            call = link.calls.start(
                self._methods.get((path, compression)) or self._method(link, path, compression),
                message,
                timeout_s=timeout_s,
                on_event=partial(_settle, done),
                metadata=metadata,
                compression=compression,
                max_reply_bytes=max_reply_bytes,
            )
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
            if not call.error.never_processed:
                raise call.error
            # The server is known to have done nothing (it was going away): the next connection gets the call.

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
        """A connection on which a call can start. Raises Unavailable, DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        while True:
            if self._closed:
                raise from_wire("UNAVAILABLE", f"the channel to {self.target} is closed")
            left = None if deadline is None else deadline - loop.time()
            if left is not None and left <= 0:
                raise from_wire(
                    "DEADLINE_EXCEEDED", f"no connection within the deadline: {self._why or 'none yet'} [{self.target}]"
                )
            link = self._link
            try:
                if link is not None and link.calls.can_start:
                    return link
                if link is not None and link.calls.full:
                    await asyncio.wait_for(link.room(), left)
                    continue
                if self._connecting is None:
                    pause = self._not_before - loop.time()
                    if pause > 0 and not wait:
                        raise from_wire("UNAVAILABLE", f"{self._why} [{self.target}]")
                    self._connecting = loop.create_task(self._connect(max(pause, 0)))
                await asyncio.wait_for(asyncio.shield(self._connecting), left)
            except TimeoutError:
                continue  # the deadline: said above
            except Unavailable:
                if not wait or self._closed:
                    raise

    async def _connect(self, pause: float) -> "_Link":
        loop = asyncio.get_running_loop()
        try:
            if pause:
                await asyncio.sleep(pause)
            link = await asyncio.wait_for(self._open(), CONNECT_S)
        except (TimeoutError, OSError, ssl.SSLError, ssl.CertificateError) as error:
            self._failures += 1
            self._not_before = loop.time() + backoff_s(self._failures)
            why = "no connection in time" if isinstance(error, asyncio.TimeoutError) else str(error)
            self._why = f"cannot connect: {why or type(error).__name__}"
            raise from_wire("UNAVAILABLE", f"{self._why} [{self.target}]") from error
        finally:
            self._connecting = None
        self._failures, self._link = 0, link
        return link

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
        self._links.add(link)
        if self._closed:
            link.close()
        return link

    def _forget(self, link: "_Link", why: str) -> None:
        """A connection has ended."""
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
        """Send one message; waits while much of what was sent before waits for the server. Raises a ServingError."""
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
        """The server's metadata, once it has begun to answer."""
        while self.call.initial is None and not self.call.over:
            await self._wait()
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
    """One connection: moves bytes between a transport and ClientCalls."""

    def __init__(
        self, calls: ClientCalls, target: str, keepalive_s: float | None, forget: "Callable[[_Link, str], None]"
    ):
        self.calls = calls
        self.waiters: deque[asyncio.Future[None]] = deque()  # calls that wait for the server's limit on streams
        self.streams: set[Stream] = set()
        self.is_leaving = False
        self.paused = False  # the transport is full
        self.gone = asyncio.Event()
        self._target, self._keepalive_s, self._forget = target, keepalive_s, forget
        self._transport: asyncio.Transport
        self._heard = False  # bytes have come since the timer last looked
        self._timer: asyncio.TimerHandle | None = None
        self._why = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.flush()
        if self._keepalive_s is not None:
            self._timer = asyncio.get_running_loop().call_later(self._keepalive_s, self._look, self._keepalive_s, 0)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        calls = self.calls
        calls.receive(data)
        if calls.http2.out:
            self.flush()
        if calls.http2.is_going_away or calls.closed:
            self.is_leaving = True
            self.after_call()
            if calls.closed:
                self._why = f"the connection failed: {calls.http2.failure}"
                self._transport.close()

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
        self._why = self._why or "the server closed the connection"

    def connection_lost(self, error: Exception | None) -> None:
        why = self._why or (f"the connection was lost: {error}" if error else "the connection was closed")
        if self._timer is not None:
            self._timer.cancel()
        self._forget(self, why)
        self.calls.lost(f"{why} [{self._target}]")
        self._release(len(self.waiters))
        self.gone.set()

    def close(self) -> None:
        """Say goodbye and close; what is in flight is cancelled."""
        self._why = "the channel was closed"
        self.calls.close()
        self.flush()
        self._transport.close()

    def after_call(self) -> None:
        """A call has ended: another may start, or a connection that is going away is no longer needed."""
        self._release(1)
        if self.calls.http2.is_going_away:
            self.is_leaving = True
            self._release(len(self.waiters))
            if not self.calls.calls and not self._transport.is_closing():
                self._why = "the server is going away"
                self._transport.close()

    async def room(self) -> None:
        """Wait until a call may start, or the connection is of no use any more."""
        waiter = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter.cancelled():
                self.waiters = deque(other for other in self.waiters if other is not waiter)

    def probe(self) -> None:
        """A deadline passed: if not a byte comes for a ping either, the server is not there any more."""
        if self._timer is None and not self.calls.closed:
            self._heard = False
            self.calls.ping(_PING)
            self.flush()
            self._timer = asyncio.get_running_loop().call_later(PROBE_S, self._look, 0.0, 1)

    def _look(self, interval: float, silent: int) -> None:
        """The timer of keep-alive and of probes: `silent` is how many times in a row nothing had come."""
        self._timer = None
        if self._heard:
            silent = 0
        elif silent:
            self._why = "the server does not answer"
            self._transport.abort()
            return
        else:
            silent = 1
            self.calls.ping(_PING)
            self.flush()
        self._heard = False
        if interval:
            self._timer = asyncio.get_running_loop().call_later(interval, self._look, interval, silent)

    def _release(self, count: int) -> None:
        while count and self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1


def _settle(done: "asyncio.Future[ClientCall]", call: ClientCall) -> None:
    """A unary call is over. Its task may have been cancelled, and `done` with it, before it could give the call up."""
    if not done.done():
        done.set_result(call)


def _ignore(call: ClientCall) -> None:
    """Nobody waits for this call any more."""
