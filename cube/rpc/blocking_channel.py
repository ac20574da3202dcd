"""The client end for threads: the same state machine, driven by whichever thread waits for a reply.

There is no thread of its own. One lock guards the connection. Of the threads that wait, one reads the socket (the
leader) and hands the others their news; when its own call is over it passes the lead on. A thread that is alone, the
usual case, does one `send` and one `recv` per call and no more.

What the socket does not take at once is the backlog. A leader that sees one waits for the socket both ways; where it is
already in a read, one of the others becomes the writer. A thread that waits in a poll can be woken by its bell (an
eventfd), one that dozes by its lock; a leader in a plain `recv` can not, so only one whose call ends by what it reads
itself (or by the loss of the connection) does that.
"""

import contextlib
import math
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import TracebackType

from cube.errors import ServingError, from_wire
from cube.rpc.calls import Buffer, Field, Reply
from cube.rpc.channel import CONNECT_S, PROBE_S, QUEUED_BYTES, Answer, Endpoint, backoff_s
from cube.rpc.client_calls import ClientCall, ClientCalls
from cube.rpc.limits import Limits

_RECEIVED = 256 << 10  # bytes taken from the socket at a time
_STALE_S = 0.25  # after so long without reading, a connection is looked at before it is used again
_POLL_S = 3_600.0
_TURN_BYTES = 4 << 20  # read in one go under the lock: others wait for it
_DRAIN_BYTES = 32 << 20  # the same after a call was given up: its server may be stuck until we read
_PING = b"keepaliv"
_NO_SIZE, _AT_ONCE = (0,), (socket.MSG_DONTWAIT,)  # the further arguments of recv_into, for map
_INTERRUPTED = "a thread was interrupted in the middle of reading or writing"
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
        self._changed = threading.Condition(self._lock)  # a connection was made, or not; the channel was closed
        self._link: _Link | None = None
        self._links: set[_Link] = set()  # those that still have calls, too
        self._connecting = False  # one thread does, outside the lock
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
        begun = time.monotonic()
        deadline = None if timeout_s is None else begun + timeout_s
        with self._lock:
            link = self._current() or self._ready(deadline, wait_for_ready)
            stream = BlockingStream(self, link, begun, deadline, path)
            try:
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
            except Exception:
                raise
            except BaseException:
                link.close(_INTERRUPTED)
                raise
            link.send()
        return stream

    def close(self) -> None:
        """Give up calls in flight and disconnect."""
        with self._lock:
            self._closed = True
            for link in list(self._links):
                link.close("the channel was closed", goodbye=True)
            self._link = None
            self._changed.notify_all()

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
        begun = time.monotonic()
        deadline = None if timeout_s is None else begun + timeout_s
        is_second = False
        while True:
            waiter, call = _Waiter(), None
            try:
                with self._lock:
                    link = self._current()
                    if link is None:
                        link = self._ready(deadline, wait_for_ready)
                        if deadline is not None:
                            timeout_s = max(deadline - time.monotonic(), 0)
                    try:
                        call = link.calls.start(
                            self._methods.get((path, compression)) or self._method(link, path, compression),
                            message,
                            timeout_s=timeout_s,
                            on_event=waiter.on_event,
                            metadata=metadata,
                            compression=compression,
                            max_reply_bytes=max_reply_bytes,
                        )
                    except Exception:
                        raise
                    except BaseException:  # nobody would know of the call, nor what has become of the link's state
                        link.close(_INTERRUPTED)
                        raise
                    link.send()
                if not self.wait(link, waiter, call.is_over, deadline):
                    late = from_wire("DEADLINE_EXCEEDED", f"{path}: the deadline passed [{self.target}]")
                    self.give_up(link, call, late, begun)
            except BaseException:  # Ctrl-C, most of all
                if call is not None and link is not None:
                    self.give_up(link, call, None)
                raise
            if call.error is None:
                return call
            if is_second or not call.error.never_processed:
                raise call.error
            is_second = True
            if deadline is not None:
                timeout_s = max(deadline - time.monotonic(), 0)

    def _method(self, link: "_Link", path: str, compression: str | None) -> bytes:
        block = self._methods.get((path, compression))
        if block is None:
            block = self._methods[path, compression] = link.calls.method(path, compression)
        return block

    def give_up(self, link: "_Link", call: ClientCall, why: ServingError | None, since: float = 0.0) -> None:
        """Cancel a call. A server from which nothing has come `since` is asked whether it is there at all."""
        with self._lock:
            call.cancel(why)
            link.send()
            if link.leader is None and not link.is_closed:
                link.look(_DRAIN_BYTES)  # a server that waits for us to read does not hear of the end
            if link.heard_at < since:
                link.probe()
            link.settle()

    # ---- waiting: leader and followers ----

    def wait(self, link: "_Link", waiter: "_Waiter", is_over: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `is_over`, reading the socket or leaving that to another. False: the deadline came first."""
        while True:
            try:  # from before it is registered: an interrupted thread must not be taken for one that waits
                with self._lock:
                    if is_over():
                        return True
                    leads = link.enter(waiter)
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return is_over()
                while leads:
                    data = link.read(left, waiter.bell)
                    with self._lock:
                        waiter.rise()
                        link.process(data)
                        if is_over():
                            return True
                        if waiter.polls:
                            waiter.sleep(link.bell(0))
                    if deadline is not None:
                        left = deadline - time.monotonic()
                        if left <= 0:
                            return False
                if waiter.bell < 0:
                    waiter.doze(left)
                else:
                    link.await_socket(left, select.POLLOUT, waiter.bell)
                    with self._lock:
                        link.send()
            finally:
                try:  # right here, not in a function of its own: a signal may come where one begins
                    with self._lock:
                        link.leave(waiter)
                except BaseException:  # a leader that never leaves would be waited for by everybody
                    with self._lock:
                        link.leave(waiter)
                    raise

    # ---- connections; all under the lock ----

    def _current(self) -> "_Link | None":
        """The connection, if a call can start on it right now."""
        link = self._link
        if link is None:
            return None
        if link.leader is None and time.monotonic() - link.read_at > _STALE_S:
            link.look()  # it may have been closed, or told of its end, while nobody read
            link.settle()
        if link.probed_at > link.heard_at:
            link.check()
        return link if link.calls.can_start and not link.is_closed else None

    def _ready(self, deadline: float | None, wait: bool) -> "_Link":
        """A connection on which a call can start. Raises Unavailable, DeadlineExceeded."""
        while True:
            if self._closed:
                raise from_wire("UNAVAILABLE", f"the channel to {self.target} is closed")
            link = self._link
            if link is not None and not link.is_closed:
                if link.calls.can_start:
                    return link
                if link.calls.full:
                    self._wait_for_room(link, deadline)
                    continue
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise self._late()
            left = _POLL_S if deadline is None else min(deadline - now, _POLL_S)
            if self._connecting:
                self._changed.wait(left)
                continue
            pause = self._not_before - now
            if pause > 0:
                if not wait:
                    raise from_wire("UNAVAILABLE", f"{self._why} [{self.target}]")
                self._changed.wait(min(pause, left))
                continue
            try:
                self._connect(deadline)
            except (OSError, UnicodeError) as error:  # UnicodeError: a name that is none
                if deadline is not None and time.monotonic() >= deadline:
                    raise self._late() from error  # says nothing about the server: not a failure
                self.failed(f"cannot connect: {error or type(error).__name__}")
                if not wait:
                    raise from_wire("UNAVAILABLE", f"{self._why} [{self.target}]") from error

    def _late(self) -> ServingError:
        return from_wire(
            "DEADLINE_EXCEEDED", f"no connection within the deadline: {self._why or 'none yet'} [{self.target}]"
        )

    def failed(self, why: str) -> None:
        """An attempt to connect has failed: the next one waits a little longer."""
        self._failures += 1
        self._not_before = time.monotonic() + backoff_s(self._failures)
        self._why = why

    def greeted(self) -> None:
        """The server has said something: only that makes a connection a success."""
        self._failures, self._not_before = 0, 0.0

    def forget(self, link: "_Link") -> None:
        """A connection has ended."""
        self._links.discard(link)
        if self._link is link:
            self._link = None

    def _connect(self, deadline: float | None) -> None:
        """Raises OSError. Others wait for the outcome, each no longer than its own deadline: not under the lock."""
        self._connecting = True
        connection: socket.socket | None = None
        try:
            self._lock.release()
            try:
                connection = self._open(deadline)
            finally:
                self._lock.acquire()
            if self._closed:
                connection.close()
                return
            self._link = _Link(self, connection, self._limits, self._authority, self._tls)
            self._links.add(self._link)
            self._link.send()
        finally:
            self._connecting = False
            self._changed.notify_all()

    def _wait_for_room(self, link: "_Link", deadline: float | None) -> None:
        """The server takes no more calls at once: wait until one ends."""
        waiter = _Waiter(polls=True)
        link.in_line[waiter] = None
        self._lock.release()
        try:
            there = self.wait(link, waiter, lambda: not link.calls.full or link.is_closed, deadline)
        finally:
            self._lock.acquire()
            link.in_line.pop(waiter, None)
        if not there:
            link.settle()  # it may have been told of room that it does not use
            raise from_wire("DEADLINE_EXCEEDED", f"too many calls in flight until the deadline passed [{self.target}]")

    def _open(self, deadline: float | None) -> socket.socket:
        """A connected socket, TLS handshake and all: no later than the deadline, nor than CONNECT_S from now."""
        end = time.monotonic() + CONNECT_S
        end = end if deadline is None else min(end, deadline)
        endpoint = self._endpoint
        if endpoint.path:
            return self._open_one(socket.AF_UNIX, endpoint.path, end)
        error: OSError | None = None
        for family, _, _, _, address in socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM):
            try:
                return self._open_one(family, address, end)
            except OSError as failure:
                error = failure
        raise error or OSError(f"{endpoint.host} has no address")

    def _open_one(self, family: int, address: object, end: float) -> socket.socket:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(end - time.monotonic(), 0.001))
            connection.connect(address)  # type: ignore[arg-type]  # what getaddrinfo gave, or a path
            if family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                name = Endpoint.parse(self._authority if ":" in self._authority else f"{self._authority}:1").host
                connection = self._tls.wrap_socket(connection, server_hostname=name, do_handshake_on_connect=False)
                connection.settimeout(max(end - time.monotonic(), 0.001))
                connection.do_handshake()  # the time-out is for all of it
        except BaseException:
            connection.close()
            raise
        return connection


class BlockingStream:
    """As `channel.Stream`, for one thread at a time on each side."""

    def __init__(self, channel: BlockingChannel, link: "_Link", begun: float, deadline: float | None, path: str):
        self.call: ClientCall
        self._channel, self._link = channel, link
        self._begun, self._deadline, self._path = begun, deadline, path
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
        self._wait(lambda: self.call.over or not self._link.backlog, writes=True)

    def end(self) -> None:
        """No more messages will be sent."""
        with self._channel._lock:
            if not self.call.over:
                self.call.end()
                self._link.send()
        self._wait(lambda: self.call.over or not self._link.backlog, writes=True)

    def initial(self) -> tuple[Field, ...]:
        """The server's metadata, once it has begun to answer. Raises a ServingError if it never does."""
        self._wait(lambda: self.call.over or self.call.initial is not None)
        if self.call.initial is None and self.call.error is not None:
            raise self.call.error
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

    def _wait(self, is_over: Callable[[], bool], writes: bool = False) -> None:
        if is_over():
            return
        waiter = _Waiter(
            polls=True, writes=writes
        )  # one of its own: another thread may wait on the other side, or cancel
        with self._channel._lock:
            self._waiters.add(waiter)
        try:
            there = self._channel.wait(self._link, waiter, is_over, self._deadline)
        finally:
            with self._channel._lock:
                self._waiters.discard(waiter)
        if not there:
            late = from_wire("DEADLINE_EXCEEDED", f"{self._path}: the deadline passed [{self._channel.target}]")
            self._channel.give_up(self._link, self.call, late, self._begun)


class _Waiter:
    """A thread that waits. Its event is a lock: cheaper than threading.Event by a factor of ten.

    polls: another thread may end its wait, so even as the leader it has to be within reach of `wake`.
    writes: it waits for the backlog to be gone.
    """

    __slots__ = ("_asleep", "_event", "bell", "polls", "writes")

    def __init__(self, polls: bool = False, writes: bool = False) -> None:
        self.polls, self.writes = polls, writes
        self.bell = -1  # the eventfd that wakes it, if it waits in a poll
        self._event: threading.Lock | None = None  # made when the thread first has to sleep: most never do
        self._asleep = False

    def sleep(self, bell: int) -> None:
        """From now on `wake` ends the next `doze`, or rings the bell. Under the channel's lock, as all but `doze`."""
        self.bell = bell
        if bell < 0:
            if self._event is None:
                self._event = threading.Lock()
            self._event.acquire(blocking=False)  # a wake may have come after the last doze had timed out
        self._asleep = True

    def doze(self, seconds: float | None) -> None:
        """Until woken, or so many seconds."""
        assert self._event is not None
        self._event.acquire(timeout=-1 if seconds is None else min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """End a doze or a poll, or the one that is about to begin."""
        if self._asleep:
            self._asleep = False
            if self.bell >= 0:
                os.eventfd_write(self.bell, 1)
            elif self._event is not None:
                self._event.release()

    def rise(self) -> None:
        """It waits no more; its bell is silent for the next one."""
        if self.bell >= 0:
            if not self._asleep:  # so it was rung, once
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.bell)
            self.bell = -1
        self._asleep = False

    def on_event(self, call: ClientCall) -> None:
        """News of the thread's call."""
        self.wake()


class _Link:
    """One connection: a socket, its state machine, and who reads it."""

    def __init__(
        self,
        channel: BlockingChannel,
        connection: socket.socket,
        limits: Limits,
        authority: str,
        tls: ssl.SSLContext | None,
    ):
        self.calls = ClientCalls(limits, authority, "http" if tls is None else "https")
        self.leader: _Waiter | None = None
        self.writer: _Waiter | None = None  # the follower that waits for the socket to take the backlog
        self.followers: dict[_Waiter, None] = {}
        self.in_line: dict[_Waiter, None] = {}  # who waits for the server's limit on calls
        self.read_at = time.monotonic()
        self.heard_at = 0.0  # never yet
        self.probed_at = 0.0  # when it was last asked whether it is there
        self.is_closed = False
        self.backlog: deque[Buffer] = deque()  # what the socket has not taken yet
        self._channel, self._socket, self._target, self._is_tls = channel, connection, channel.target, tls is not None
        self._greeted = False  # the server has said something
        self._bells = [-1, -1]  # the leader's and the writer's, once they are needed
        self._buffer = bytearray(_RECEIVED)  # only ever read into by one thread at a time
        self._view = memoryview(self._buffer)
        self._into = (self._buffer,)
        self._unprocessed: list[int] = []  # how much the leader has read, until that is dealt with
        self._timeout = -1.0  # that the socket has
        self._more = self._is_tls  # more is there than was read; it may hide in the TLS object, where no poll sees it
        # A TLS object may not be read and written by two threads at once, so there a reader only waits for the socket.
        connection.setblocking(tls is None)

    # ---- who waits; all under the lock ----

    def enter(self, waiter: _Waiter) -> bool:
        """A thread begins to wait; whether it leads. With a bell it is to poll, else to doze (or to read)."""
        if self.leader is None:
            self.leader = waiter
            if waiter.polls:
                waiter.sleep(self.bell(0))
            return True
        self.followers[waiter] = None
        if self.backlog and self.writer is None:  # the leader may be deep in a read: what is to be answered must go
            self.writer = waiter
            waiter.sleep(self.bell(1))
        else:
            waiter.sleep(-1)
        return False

    def leave(self, waiter: _Waiter) -> None:
        """It has stopped; whoever is needed in its place is woken. Nothing happens to one that had not entered."""
        waiter.rise()
        self.followers.pop(waiter, None)
        if self.writer is waiter:
            self.writer = None
        if self.leader is waiter:
            self.leader = None
            if self._unprocessed:  # interrupted with bytes in its hands: the stream of them has a hole
                self._unprocessed.clear()
                self.close(_INTERRUPTED)
        if self.followers and (self.leader is None or (self.backlog and self.writer is None)):
            next(iter(self.followers)).wake()  # also after a follower: it may have been woken to lead, and be done
        self.settle()

    def settle(self) -> None:
        """A call may have ended: another may start, or the connection may not be needed any more."""
        if self.in_line:
            http2 = self.calls.http2
            room = (
                len(self.in_line)
                if self.is_closed or http2.is_going_away
                else (http2.peer_max_streams - len(http2.streams))
            )
            for waiter in islice(self.in_line, max(room, 0)):
                waiter.wake()
        if self.leader is None:
            if self.is_closed:
                self._release()
            elif not self.calls.calls and self.calls.http2.is_going_away:
                self.close("the server is going away")

    def bell(self, which: int) -> int:
        """The leader's (0) or the writer's (1)."""
        if self._bells[which] < 0:
            self._bells[which] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._bells[which]

    # ---- is it there? under the lock ----

    def probe(self) -> None:
        """A deadline passed in silence: if nothing comes for a ping either, the server is not there any more."""
        if self.probed_at <= self.heard_at and not self.is_closed:
            self.probed_at = time.monotonic()
            self.calls.ping(_PING)
            self.send()
        else:
            self.check()

    def check(self) -> None:
        """Give up a server that has not answered the ping in time."""
        if self.heard_at < self.probed_at < time.monotonic() - PROBE_S:
            self.close("the server does not answer")

    # ---- bytes ----

    def send(self) -> None:
        """Write what the state machine has made, as far as the socket takes it. Under the lock; it never waits.

        What is left is the backlog: who waits for a reply, waits for the socket to take that, too. A lost connection
        ends its calls.
        """
        try:
            was_behind = bool(self.backlog)
            out = self.calls.take()
            if self.is_closed:
                return
            if out:
                if len(out) > 1 and (self._is_tls or sum(map(len, out)) <= _JOINED):
                    out = [b"".join(out)]
                self.backlog.extend(out)
            while self.backlog:
                part = self.backlog[0]
                sent = self._socket.send(part, 0 if self._is_tls else socket.MSG_DONTWAIT)
                if sent == len(part):
                    self.backlog.popleft()
                else:
                    self.backlog[0] = memoryview(part)[sent:]
            if was_behind:
                for waiter in (*self.followers, *(() if self.leader is None else (self.leader,))):
                    if waiter.writes:
                        waiter.wake()
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            self.close(f"the connection was lost: {error}")
        except BaseException:  # nobody knows how much was sent
            self.close(_INTERRUPTED)
            raise
        if self.calls.closed:
            self.close(f"the connection failed: {self.calls.http2.failure}")

    def await_socket(self, seconds: float | None, events: int, bell: int) -> None:
        """Until the socket is ready, or the bell rings, or so many seconds. Not under the lock."""
        waiting = select.poll()
        if bell >= 0:
            waiting.register(bell, select.POLLIN)
        with contextlib.suppress(ValueError):  # closed meanwhile
            waiting.register(self._socket, events)
            waiting.poll(None if seconds is None else math.ceil(min(seconds, _POLL_S) * 1e3))

    def look(self, most: int = _TURN_BYTES) -> None:
        """Take in what has come, without waiting. Under the lock; in plain text only while there is no leader."""
        self.read_at = now = time.monotonic()
        self._more = True
        try:
            while most > 0 and not self.calls.closed:
                count = self._socket.recv_into(self._buffer, 0, 0 if self._is_tls else socket.MSG_DONTWAIT)
                if not count:
                    raise OSError("the server closed the connection")
                most -= count
                self._hear(now)
                self.calls.receive(bytes(self._view[:count]))
        except (BlockingIOError, ssl.SSLWantReadError):
            self._more = False
        except OSError as error:
            self.close(self.calls.going_away or str(error))
            return
        except BaseException:
            self.close(_INTERRUPTED)
            raise
        if self.calls.http2.out or self.backlog or self.calls.closed:
            self.send()

    def read(self, seconds: float | None, bell: int) -> bytes | None:
        """The leader's: wait for bytes, b"" at the end of the stream, None if none came in time. Not under the lock."""
        if self.probed_at > self.heard_at:  # silence has an end now
            left = max(self.probed_at + PROBE_S - time.monotonic(), 0) + 0.001
            seconds = left if seconds is None else min(seconds, left)
        try:
            if self.backlog or self._is_tls or bell >= 0:
                if not (self._is_tls and self._more):
                    events = select.POLLIN | select.POLLOUT if self.backlog else select.POLLIN
                    self.await_socket(seconds, events, bell)
                if self._is_tls:
                    return None
                self._unprocessed.extend(map(self._socket.recv_into, self._into, _NO_SIZE, _AT_ONCE))
            else:
                timeout = _POLL_S if seconds is None else max(seconds, 0.001)
                if not timeout <= self._timeout <= timeout * 1.01 + 0.001:  # near enough to save a system call
                    self._timeout = timeout
                    whole = int(timeout)
                    self._socket.setsockopt(
                        socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@qq", whole, int((timeout - whole) * 1e6))
                    )
                # One step for the interpreter: no signal comes between reading and taking note of it.
                self._unprocessed.extend(map(self._socket.recv_into, self._into))
            return bytes(self._view[: self._unprocessed[0]])
        except BlockingIOError:
            return None
        except (OSError, ValueError):  # ValueError: closed meanwhile
            return b""

    def process(self, data: bytes | None) -> None:
        """Under the lock: what `read` has given."""
        if self._is_tls:
            if not self.is_closed:
                self.look()
        elif data:
            self.read_at = now = time.monotonic()
            self._hear(now)
            self.calls.receive(data)
            if self.calls.http2.out or self.backlog or self.calls.closed:
                self.send()
        elif data is not None:
            self.close(self.calls.going_away or "the server closed the connection")
        else:
            self.read_at = time.monotonic()
            if self.backlog:
                self.send()
        self._unprocessed.clear()
        if self.probed_at > self.heard_at:
            self.check()
        if self.in_line:
            self.settle()

    def _hear(self, now: float) -> None:
        self.heard_at = now
        if not self._greeted:
            self._greeted = True
            self._channel.greeted()

    def close(self, why: str, goodbye: bool = False) -> None:
        """Under the lock. The socket itself goes when nobody reads or writes it any more."""
        if not self.is_closed:
            self.is_closed = True
            self._channel.forget(self)
            if goodbye:
                self.calls.close()
                with contextlib.suppress(OSError):
                    self._socket.send(
                        b"".join([*self.backlog, *self.calls.take()]), 0 if self._is_tls else socket.MSG_DONTWAIT
                    )
            elif not self._greeted:
                self._channel.failed(why)
            self.backlog.clear()
            self.calls.lost(f"{why} [{self._target}]")
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a reader in another thread
            for waiter in list(self.followers):
                waiter.wake()
        self._release()

    def _release(self) -> None:
        """Close the files, unless a thread is in a read or a poll of them: it will, when it leaves."""
        if self.leader is None and self.writer is None:
            self._socket.close()
            for which, bell in enumerate(self._bells):
                if bell >= 0:
                    self._bells[which] = -1
                    os.close(bell)
