"""The client end for threads: the same state machine, driven by whichever thread waits for a reply.

There is no thread of its own. One lock guards the connection. Of the threads that wait, one reads the socket (the
leader) and hands the others their news; when its own call is over it passes the lead on. A thread that is alone, the
usual case, does one `send` and one `recv` per call and no more.
"""

import contextlib
import math
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from cube.errors import ServingError, from_wire
from cube.rpc.calls import Buffer, Field, Reply
from cube.rpc.channel import CONNECT_S, QUEUED_BYTES, Answer, Endpoint, backoff_s
from cube.rpc.client_calls import ClientCall, ClientCalls
from cube.rpc.limits import Limits

_RECEIVED = 256 << 10  # bytes taken from the socket at a time
_STALE_S = 0.25  # after so long without reading, a connection is looked at before it is used again
_POLL_S = 3_600.0
_JOINED = 16_384  # less than that is joined into one buffer: cheaper than to have the kernel gather it


class BlockingChannel:
    """Calls to one endpoint, from any number of threads."""

    def __init__(
        self,
        target: str,
        *,
        tls: ssl.SSLContext | None = None,
        authority: str | None = None,
        limits: Limits | None = None,
    ):
        """As `channel.Channel`."""
        self.target = target
        self._endpoint = Endpoint.parse(target)
        self._authority = authority or self._endpoint.authority
        self._tls, self._limits = tls, limits or Limits()
        self._lock = threading.Lock()  # guards what follows, and every state machine
        self._link: _Link | None = None
        self._failures, self._not_before, self._why = 0, 0.0, ""
        self._closed = False
        self._methods: dict[tuple[str, str | None], bytes] = {}

    def call(
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
        """As `Channel.call`."""
        return self._unary(path, message, timeout_s, wait_for_ready, metadata, compression, max_reply_bytes).messages[0]

    def unary(
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
        """As `Channel.unary`."""
        call = self._unary(path, message, timeout_s, wait_for_ready, metadata, compression, max_reply_bytes)
        return Answer(call.messages[0], call.initial or (), call.trailing)

    def stream(
        self,
        path: str,
        message: Reply | None = None,
        timeout_s: float | None = None,
        wait_for_ready: bool = False,
        *,
        metadata: Sequence[Field] = (),
        compression: str | None = None,
        max_reply_bytes: int | None = None,
    ) -> "BlockingStream":
        """As `Channel.stream`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            link = self._ready(deadline, wait_for_ready)
            stream = BlockingStream(self, link, deadline, path)
            stream.call = link.calls.start(
                self._method(link, path, compression),
                message,
                timeout_s=None if deadline is None else max(deadline - time.monotonic(), 0),
                on_event=stream.on_event,
                metadata=metadata,
                compression=compression,
                max_reply_bytes=max_reply_bytes,
                unary=False,
            )
            link.send()
        return stream

    def close(self) -> None:
        """Give up calls in flight and disconnect."""
        with self._lock:
            self._closed = True
            if self._link is not None:
                self._link.close("the channel was closed", goodbye=True)
                self._link = None

    def __enter__(self) -> "BlockingChannel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- calls ----

    def _unary(
        self,
        path: str,
        message: Reply,
        timeout_s: float | None,
        wait_for_ready: bool,
        metadata: Sequence[Field],
        compression: str | None,
        max_reply_bytes: int | None,
    ) -> ClientCall:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            waiter = _Waiter()
            with self._lock:
                link = self._ready(deadline, wait_for_ready)
                call = link.calls.start(
                    self._methods.get((path, compression)) or self._method(link, path, compression),
                    message,
                    timeout_s=timeout_s,
                    on_event=waiter.on_event,
                    metadata=metadata,
                    compression=compression,
                    max_reply_bytes=max_reply_bytes,
                )
                link.send()
            try:
                if not self.wait(link, waiter, call.is_over, deadline):
                    self.give_up(
                        link, call, from_wire("DEADLINE_EXCEEDED", f"{path}: the deadline passed [{self.target}]")
                    )
            except BaseException:  # Ctrl-C, most of all
                self.give_up(link, call, None)
                raise
            if call.error is None:
                return call
            if not call.error.never_processed:
                raise call.error
            if deadline is not None:
                timeout_s = max(deadline - time.monotonic(), 0)

    def _method(self, link: "_Link", path: str, compression: str | None) -> bytes:
        block = self._methods.get((path, compression))
        if block is None:
            block = self._methods[path, compression] = link.calls.method(path, compression)
        return block

    def give_up(self, link: "_Link", call: ClientCall, why: ServingError | None) -> None:
        """Cancel a call."""
        with self._lock:
            call.cancel(why)
            link.send()
            if link.leader is None and not link.is_closed:
                link.look()  # a server that waits for us to read does not hear of the end

    # ---- waiting: leader and followers ----

    def wait(self, link: "_Link", waiter: "_Waiter", is_over: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `is_over`, reading the socket or leaving that to another. False: the deadline came first."""
        while True:
            with self._lock:
                if is_over():
                    return True
                leads = link.leader is None
                if leads:
                    link.leader = waiter
                else:
                    link.followers[waiter] = None
                    waiter.sleep()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self._step_down(link, waiter)
                return is_over()
            if not leads:
                if link.backlog:  # the leader may be deep in a read: see to it that what is to be answered is sent
                    link.await_socket(left, to_read=False)
                    with self._lock:
                        link.send()
                else:
                    waiter.doze(left)
                self._step_down(link, waiter)
                continue
            try:
                while True:
                    data = link.read(left)
                    with self._lock:
                        link.process(data)
                        if is_over():
                            return True
                    if deadline is not None:
                        left = deadline - time.monotonic()
                        if left <= 0:
                            return False
            finally:
                self._step_down(link, waiter)

    def _step_down(self, link: "_Link", waiter: "_Waiter") -> None:
        """Stop waiting; a leader wakes a follower to take its place."""
        with self._lock:
            link.followers.pop(waiter, None)
            for other in link.in_line:
                other.wake()
            if link.leader is waiter:
                link.leader = None
            if link.leader is None:  # also after a follower: it may have been woken to lead, and be done
                if link.followers:
                    next(iter(link.followers)).wake()
                elif link.is_closed or (link.calls.http2.is_going_away and not link.calls.calls):
                    link.close("the server is going away")

    # ---- connections; all under the lock ----

    def _ready(self, deadline: float | None, wait: bool) -> "_Link":
        """A connection on which a call can start. Raises Unavailable, DeadlineExceeded."""
        link = self._link
        if link is not None:
            if link.leader is None and time.monotonic() - link.read_at > _STALE_S:
                link.look()  # it may have been closed, or told of its end, while nobody read
            if link.calls.can_start and not link.is_closed:
                return link
        while True:
            link = self._link
            if self._closed:
                raise from_wire("UNAVAILABLE", f"the channel to {self.target} is closed")
            if link is not None and not link.is_closed:
                if link.calls.can_start:
                    return link
                if link.calls.full:
                    self._wait_for_room(link, deadline)
                    continue
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise from_wire(
                    "DEADLINE_EXCEEDED", f"no connection within the deadline: {self._why or 'none yet'} [{self.target}]"
                )
            pause = self._not_before - now
            if pause > 0:
                if not wait:
                    raise from_wire("UNAVAILABLE", f"{self._why} [{self.target}]")
                self._unlocked_sleep(pause if deadline is None else min(pause, deadline - now))
                continue
            try:
                self._link = _Link(self._open(deadline), self._limits, self._authority, self._tls, self.target)
                self._failures = 0
            except OSError as error:
                self._failures += 1
                self._not_before = time.monotonic() + backoff_s(self._failures)
                self._why = f"cannot connect: {error or type(error).__name__}"
                if not wait:
                    raise from_wire("UNAVAILABLE", f"{self._why} [{self.target}]") from error

    def _wait_for_room(self, link: "_Link", deadline: float | None) -> None:
        """The server takes no more calls at once: wait until one ends."""
        waiter = _Waiter()
        link.in_line.add(waiter)
        self._lock.release()
        try:
            there = self.wait(link, waiter, lambda: not link.calls.full or link.is_closed, deadline)
        finally:
            self._lock.acquire()
            link.in_line.discard(waiter)
        if not there:
            raise from_wire("DEADLINE_EXCEEDED", f"too many calls in flight until the deadline passed [{self.target}]")

    def _unlocked_sleep(self, seconds: float) -> None:
        self._lock.release()
        try:
            time.sleep(seconds)
        finally:
            self._lock.acquire()

    def _open(self, deadline: float | None) -> socket.socket:
        left = CONNECT_S if deadline is None else min(max(deadline - time.monotonic(), 0.001), CONNECT_S)
        endpoint = self._endpoint
        if endpoint.path:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(left)
            connection.connect(endpoint.path)
        else:
            connection = socket.create_connection((endpoint.host, endpoint.port), left)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            name = Endpoint.parse(self._authority if ":" in self._authority else f"{self._authority}:1").host
            connection = self._tls.wrap_socket(connection, server_hostname=name)
        return connection


class BlockingStream:
    """As `channel.Stream`, for one thread at a time on each side."""

    def __init__(self, channel: BlockingChannel, link: "_Link", deadline: float | None, path: str):
        self.call: ClientCall
        self._channel, self._link = channel, link
        self._deadline, self._path = deadline, path
        self._waiters: set[_Waiter] = set()

    def on_event(self, call: ClientCall) -> None:
        """News of the call, under the channel's lock: whoever waits looks again."""
        for waiter in self._waiters:
            waiter.wake()

    def send(self, message: Reply) -> None:
        """Send one message; waits while much of what was sent before waits for the server. Raises a ServingError."""
        self._wait(lambda: self.call.over or self.call.pending <= QUEUED_BYTES)
        if self.call.over:
            raise self.call.error or from_wire("UNAVAILABLE", "the call is over")
        with self._channel._lock:
            self.call.send(message)
            self._link.send()
        self._wait(lambda: self.call.over or not self._link.backlog)

    def end(self) -> None:
        """No more messages will be sent."""
        with self._channel._lock:
            if not self.call.over:
                self.call.end()
                self._link.send()
        self._wait(lambda: self.call.over or not self._link.backlog)

    def initial(self) -> tuple[Field, ...]:
        """The server's metadata, once it has begun to answer."""
        self._wait(lambda: self.call.over or self.call.initial is not None)
        return self.call.initial or ()

    @property
    def trailing(self) -> tuple[Field, ...]:
        """The metadata of its end."""
        return self.call.trailing

    def cancel(self) -> None:
        """Give the call up."""
        self._channel.give_up(self._link, self.call, None)

    def __iter__(self) -> Iterator[Buffer]:
        while True:
            self._wait(lambda: self.call.over or bool(self.call.messages))
            if not self.call.messages:
                if self.call.error is not None:
                    raise self.call.error
                return
            with self._channel._lock:
                message = self.call.take_message()
                self._link.send()
            yield message

    def result(self) -> Buffer:
        """The one reply of a client-streaming call. Raises a ServingError."""
        messages = list(self)
        if len(messages) != 1:
            raise from_wire("INTERNAL", f"{len(messages)} replies to a call that has one")
        return messages[0]

    def __enter__(self) -> "BlockingStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _wait(self, is_over: Callable[[], bool]) -> None:
        waiter = _Waiter()  # one of its own: another thread may wait on the other side
        with self._channel._lock:
            self._waiters.add(waiter)
        try:
            there = self._channel.wait(self._link, waiter, is_over, self._deadline)
        finally:
            with self._channel._lock:
                self._waiters.discard(waiter)
        if not there:
            late = from_wire("DEADLINE_EXCEEDED", f"{self._path}: the deadline passed [{self._channel.target}]")
            self._channel.give_up(self._link, self.call, late)


class _Waiter:
    """A thread that waits. Its event is a lock: cheaper than threading.Event by a factor of ten."""

    __slots__ = ("_asleep", "_event")

    def __init__(self) -> None:
        self._event: threading.Lock | None = None  # made when the thread first has to sleep: most never do
        self._asleep = False

    def sleep(self) -> None:
        """From now on `wake` ends the next `doze`. Under the channel's lock, as all but `doze`."""
        if self._event is None:
            self._event = threading.Lock()
        self._event.acquire(blocking=False)  # a wake may have come after the last doze had timed out
        self._asleep = True

    def doze(self, seconds: float | None) -> None:
        """Until woken, or so many seconds."""
        assert self._event is not None
        self._event.acquire(timeout=-1 if seconds is None else min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """End a doze, or the one that is about to begin."""
        if self._asleep and self._event is not None:
            self._asleep = False
            self._event.release()

    def on_event(self, call: ClientCall) -> None:
        """News of the thread's call."""
        self.wake()


class _Link:
    """One connection: a socket, its state machine, and who reads it."""

    def __init__(
        self, connection: socket.socket, limits: Limits, authority: str, tls: ssl.SSLContext | None, target: str
    ):
        self.calls = ClientCalls(limits, authority, "http" if tls is None else "https")
        self.leader: _Waiter | None = None
        self.followers: dict[_Waiter, None] = {}
        self.in_line: set[_Waiter] = set()  # who waits for the server's limit on calls
        self.read_at = time.monotonic()
        self.is_closed = False
        self.backlog: deque[Buffer] = deque()  # what the socket has not taken yet
        self._socket, self._target, self._is_tls = connection, target, tls is not None
        self._buffer = bytearray(_RECEIVED)  # only ever read into by one thread at a time
        self._view = memoryview(self._buffer)
        self._timeout = -1.0  # that the socket has
        # A TLS object may not be read and written by two threads at once, so there a reader only waits for the socket.
        connection.setblocking(tls is None)
        self.send()

    def send(self) -> None:
        """Write what the state machine has made, as far as the socket takes it. Under the lock; it never waits.

        What is left is the backlog: who waits for a reply, waits for the socket to take that, too. A lost connection
        ends its calls.
        """
        out = self.calls.take()
        if out and not self.is_closed:
            if len(out) > 1 and (self._is_tls or sum(map(len, out)) <= _JOINED):
                out = [b"".join(out)]
            self.backlog.extend(out)
        try:
            while self.backlog:
                part = self.backlog[0]
                sent = self._socket.send(part, 0 if self._is_tls else socket.MSG_DONTWAIT)
                if sent == len(part):
                    self.backlog.popleft()
                else:
                    self.backlog[0] = memoryview(part)[sent:]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            self.close(f"the connection was lost: {error}")
        if self.calls.closed:
            self.close(f"the connection failed: {self.calls.http2.failure}")

    def await_socket(self, seconds: float | None, to_read: bool) -> None:
        """Until the socket takes more, or (`to_read`) has something, or so many seconds. Not under the lock."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLOUT | (select.POLLIN if to_read else 0))
        waiting.poll(None if seconds is None else math.ceil(seconds * 1e3))

    def _take_in(self) -> None:
        """Read what is there, without waiting and without sending."""
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            while not self.calls.closed:
                count = self._socket.recv_into(self._buffer, 0, 0 if self._is_tls else socket.MSG_DONTWAIT)
                if not count:
                    raise OSError("the server closed the connection")
                self.calls.receive(bytes(self._view[:count]))

    def look(self) -> None:
        """Take in what has come while nobody read. Under the lock."""
        self.read_at = time.monotonic()
        try:
            self._take_in()
        except OSError as error:
            self.close(str(error))
            return
        self.send()

    def read(self, seconds: float | None) -> bytes | None:
        """The leader's: wait for bytes, b"" at the end of the stream, None if none came in time. Not under the lock."""
        try:
            if self.backlog:
                self.await_socket(seconds, to_read=True)
                return None if self._is_tls else self._read_now()
            if self._is_tls:
                return self._wait_tls(seconds)
            timeout = _POLL_S if seconds is None else max(seconds, 0.001)
            if not timeout <= self._timeout <= timeout * 1.01 + 0.001:  # near enough to save a system call
                self._timeout = timeout
                whole = int(timeout)
                self._socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@qq", whole, int((timeout - whole) * 1e6))
                )
            return bytes(self._view[: self._socket.recv_into(self._buffer)])
        except BlockingIOError:
            return None
        except (OSError, ValueError):  # ValueError: closed meanwhile
            return b""

    def _read_now(self) -> bytes:
        return bytes(self._view[: self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)])

    def _wait_tls(self, seconds: float | None) -> bytes | None:
        if not self._socket.pending():  # type: ignore[attr-defined]
            waiting = select.poll()
            waiting.register(self._socket, select.POLLIN)
            if not waiting.poll(None if seconds is None else math.ceil(seconds * 1e3)):
                return None
        return None if self.is_closed else b"tls"

    def process(self, data: bytes | None) -> None:
        """Under the lock: what `read` has given."""
        self.read_at = time.monotonic()
        if self._is_tls and data != b"":
            self.look()
            return
        if data is None:
            if self.backlog:
                self.send()
            return
        if not data:
            self.close(self.calls.going_away or "the connection was closed")
            return
        self.calls.receive(data)
        if self.calls.http2.out or self.backlog or self.calls.closed:
            self.send()

    def close(self, why: str, goodbye: bool = False) -> None:
        """Under the lock. The socket itself goes when nobody reads it any more."""
        if self.is_closed:
            if self.leader is None:
                self._socket.close()
            return
        self.is_closed = True
        if goodbye:
            self.calls.close()
            with contextlib.suppress(OSError):
                self._socket.send(
                    b"".join([*self.backlog, *self.calls.take()]), 0 if self._is_tls else socket.MSG_DONTWAIT
                )
        self.backlog.clear()
        self.calls.lost(f"{why} [{self._target}]")
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a reader in another thread
        if self.leader is None:
            self._socket.close()
        for waiter in list(self.followers):
            waiter.wake()
