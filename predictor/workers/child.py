"""A process that runs one op: the worker's end of `messages`.

It ends when the socket is closed; where its parent is gone while it computes, the kernel ends it.
"""

import asyncio
import fcntl
import gc
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Mapping
from typing import Any

from cube.errors import BadConfig, Internal, OutOfMemory, ServingError, to_wire
from predictor.named import imported
from predictor.ops.op import Batch, Op, Outputs
from predictor.workers.messages import (
    MAX_MESSAGE_BYTES,
    Bind,
    Bound,
    Done,
    Failed,
    FromParent,
    Logged,
    Made,
    Make,
    Message,
    Opened,
    Work,
    encoded,
    from_parent,
)
from predictor.workers.slabs import KEPT_BYTES, Slab, lay_out, read

KEPT_SLABS = 4  # that hold one result after the other
_MOST = (1 << 63) - 1
_MAX_TEXT = 8 << 10  # characters of a log line or a trace


def main() -> None:
    """A worker's whole life. Arguments: descriptors of the socket, and of a pipe that the parent holds open."""
    for number in (signal.SIGINT, signal.SIGTERM):  # blocked since before we were: the parent says when it is over
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    link, life = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    link.set_inheritable(False)  # a process that the op starts must not hold them open
    os.set_inheritable(life, False)
    _end_with(life)
    logging.basicConfig(level=logging.INFO, handlers=[_LogToParent(link)], format="%(message)s")
    worker = _Worker(link)
    try:
        while worker.serve_one():
            pass
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent has gone
    finally:
        worker.close()


def _end_with(pipe: int) -> None:
    """Have the kernel end this process when the other end of a pipe is closed, whatever the op is doing then."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)  # SIGIO, which ends a process
    poll = select.poll()
    poll.register(pipe, select.POLLHUP)
    if poll.poll(0):  # it was closed before
        os._exit(1)


class _LogToParent(logging.Handler):
    """Lines go to the parent's log, which has a form and a place."""

    def __init__(self, link: socket.socket):
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)[:_MAX_TEXT]
            self._link.sendall(encoded(Logged(record.name, record.levelno, text)))
        except OSError:
            pass  # the parent has gone
        except Exception:
            self.handleError(record)


class _Worker:
    """An op, and the memory that its values lie in."""

    def __init__(self, link: socket.socket):
        self._link = link
        self._op: Op | None = None
        self._place = ""
        self._batches: Slab | None = None
        self._results = _Results()
        self._loop: asyncio.Runner | None = None  # for ops that wait

    def serve_one(self) -> bool:
        """Answer one message; False when there are no more."""
        data, descriptors, _, _ = socket.recv_fds(self._link, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        sent: list[int] = []  # a descriptor
        try:
            answer = encoded(self._answer(from_parent.decode(data), descriptors, sent))
        except Exception as error:
            answer = encoded(self._failed(error))
        try:
            socket.send_fds(self._link, [answer], sent)
        finally:
            for descriptor in (*sent, *descriptors):
                os.close(descriptor)
        return True

    def close(self) -> None:
        """End the op, if there is one."""
        if self._op is not None:
            self._op.close()
        if self._loop is not None:
            self._loop.close()

    def _answer(self, message: FromParent, descriptors: list[int], sent: list[int]) -> Message:
        if isinstance(message, Make):
            self._place = message.place
            self._op = op_of(message.type, message.config)
            wanted = self._op.wanted()
            return Made(None if wanted is None else dict(wanted))
        assert self._op is not None
        if isinstance(message, Work):
            if message.slab_size:
                self._batches = Slab(descriptors[0], message.slab_size)
            try:
                return self._work(self._op, message, sent)
            finally:
                if self._batches is not None and self._batches.size > KEPT_BYTES:
                    self._batches = None
        if isinstance(message, Bind):
            return Bound(dict(self._op.bind(message.inputs)))
        self._op.open()
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk it, neither between batches nor at the end
        return Opened()

    def _work(self, op: Op, work: Work, sent: list[int]) -> Done:
        assert self._batches is not None
        self._results.free(work.freed)
        batch = Batch(read(work.pieces, self._batches.memory(self._batches.size)))
        batch.rows, batch.deadline = work.rows, work.deadline
        if op.is_waiting:
            self._loop = self._loop or asyncio.Runner()
            outputs: Any = self._loop.run(_awaited(op, batch))
        else:
            outputs = op.run(batch)
        if not isinstance(outputs, Mapping):
            found = type(outputs).__name__
            raise Internal(f"{self._place} outputs: found a {found}, expected a mapping of names to values")
        layout = lay_out(outputs, f"{self._place} output")
        # Once a slab is taken nothing may fail, or it would never be free again: not the message's length either.
        encoded(Done(layout.pieces, layout.size, _MOST, _MOST, _MOST))
        number, slab, descriptor, dropped = self._results.take(layout.size)
        if descriptor is not None:
            sent.append(descriptor)
        layout.write(slab.memory(slab.size))
        return Done(layout.pieces, layout.size, number, slab.size if descriptor is not None else 0, dropped)

    def _failed(self, error: Exception) -> Failed:
        if isinstance(error, BadConfig):
            return Failed(error.wire.grpc, str(error), "", (error.place, error.found, error.expected))
        if isinstance(error, MemoryError):
            error = OutOfMemory(f"{self._place}: out of memory")
        if isinstance(error, ServingError):
            status = to_wire(error)
            return Failed(status.code, status.message, "", None)
        trace = "".join(traceback.format_exception(error))
        return Failed("INTERNAL", "", trace[-_MAX_TEXT:], None)


async def _awaited(op: Op, batch: Batch) -> Outputs:
    outputs = op.run(batch)
    return await outputs if isinstance(outputs, Awaitable) else outputs


class _Results:
    """Slabs for what the op makes: some that go back and forth, and where these are taken one for a single result."""

    def __init__(self) -> None:
        self._kept: dict[int, Slab] = {}
        self._free: set[int] = set()
        self._last = 0

    def free(self, numbers: tuple[int, ...]) -> None:
        """The parent does not read these any more."""
        self._free.update(number for number in numbers if number in self._kept)

    def take(self, size: int) -> tuple[int, Slab, int | None, int]:
        """Number and slab for so many bytes; if it is new, its descriptor; the number of one dropped for it, or 0."""
        fitting = [number for number in self._free if self._kept[number].size >= size]
        if fitting:
            number = min(fitting, key=lambda each: self._kept[each].size)
            self._free.discard(number)
            return number, self._kept[number], None, 0
        slab, descriptor = Slab.create(size)
        if slab.size > KEPT_BYTES or (len(self._kept) >= KEPT_SLABS and not self._free):
            return 0, slab, descriptor, 0
        dropped = self._free.pop() if len(self._kept) >= KEPT_SLABS else 0
        self._kept.pop(dropped, None)
        self._last += 1
        self._kept[self._last] = slab
        return self._last, slab, descriptor, dropped


def op_of(kind: str, config: Mapping[str, Any]) -> Op:
    """An op of a type module:Class, or module:function for one that returns an op. Raises BadConfig."""
    place = f"op type {kind!r}"
    make = imported(kind, place, "class")
    if not callable(make):
        raise BadConfig(place, f"{kind}, which is not to be called", "an Op, or a function that makes one")
    try:
        op = make(**config)
    except TypeError as error:
        raise BadConfig(f"{place} config", error, "what it takes") from error
    if not isinstance(op, Op):
        raise BadConfig(place, f"what makes a {type(op).__name__}", "an Op, or a function that makes one")
    return op
