"""A worker process as its parent sees it: starting it, what it is asked and answers, how it ended."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from cube.errors import BadConfig, Internal, ServingError, Unavailable, from_wire
from predictor.ops.op import Batch
from predictor.workers.messages import (
    MAX_MESSAGE_BYTES,
    Bound,
    Done,
    Failed,
    FromWorker,
    Logged,
    Made,
    Make,
    Message,
    Opened,
    Work,
    encoded,
    from_worker,
)
from predictor.workers.slabs import KEPT_BYTES, Slab, lay_out, read

log = logging.getLogger(__name__)

A = TypeVar("A", Made, Bound, Opened)

# -c and not -m: what is imported is looked for where the parent looks, wherever it was started.
_START = "import sys; sys.path[:] = sys.argv[3:]; from predictor.workers.child import main; main()"
# Each worker is one core's work: libraries that would start a thread per core in each of them are told so.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_COPIED_BYTES = 64 << 10  # results up to this are copied out: that takes less than to keep track of who reads them


class Worker:
    """A worker process as its parent sees it."""

    def __init__(self, place: str, make: Make):
        """Start it, and tell it which op to make. Raises OSError."""
        self._place = place
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        life, self._life = os.pipe()  # that this end of it is open is what keeps the worker alive
        with theirs:
            arguments = [sys.executable, "-c", _START, str(theirs.fileno()), str(life), *sys.path]
            # Blocked in the worker from its first instruction on: Ctrl-C reaches all processes of a terminal.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            try:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), life),
                    env={**_ONE_THREAD, **os.environ},
                )
            except OSError:
                self.link.close()
                os.close(self._life)
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                os.close(life)
        self.pid = self._process.pid
        self.is_ready = False
        self._batches: Slab | None = None
        self._results: dict[int, Slab] = {}
        self._freed: deque[int] = deque()  # slabs of results that are not read any more
        self.tell(make)

    def tell(self, message: Message) -> None:
        """Ask for something; where the worker has gone, waiting for the answer tells."""
        with contextlib.suppress(ConnectionError):
            self.link.sendall(encoded(message))

    def receive(self) -> tuple[FromWorker | None, list[int]]:
        """A message, None if there will be no more, and descriptors to close. Raises OSError, MsgspecError."""
        data, descriptors, _, _ = socket.recv_fds(self.link, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            return from_worker.decode(data) if data else None, descriptors
        except msgspec.MsgspecError:
            close_all(descriptors)
            raise

    def wait_for(self, kind: type[A], until: float) -> A:
        """The answer to what was asked last; blocks. until: by time.monotonic(). Raises ServingError."""
        while True:
            self.link.settimeout(max(until - time.monotonic(), 0.001))
            try:
                message, _ = self.receive()
            except TimeoutError as error:
                raise Unavailable(f"{self._place}: its process {self.pid} has not started in time") from error
            except ConnectionError:
                message = None
            if message is None:
                raise Internal(f"{self._place}: its process {self.pid} {self.ended()} while it started")
            if isinstance(message, Failed):
                raise self.error_of(message)
            if isinstance(message, Logged):
                self.log(message)
            elif isinstance(message, kind):
                return message

    def begin(self, batch: Batch) -> None:
        """Have it run a batch. Raises ServingError where the batch is at fault, OSError where the worker has gone."""
        layout = lay_out(batch, f"{self._place} input")
        slab, descriptor = self._batches, None
        if slab is None or slab.size < layout.size:
            slab, descriptor = Slab.create(layout.size)
        try:
            layout.write(slab.memory(slab.size))
            freed, sent = tuple(self._freed), [] if descriptor is None else [descriptor]
            work = Work(layout.pieces, batch.rows, batch.deadline, slab.size if sent else 0, freed)
            socket.send_fds(self.link, [encoded(work)], sent)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        for _ in freed:
            self._freed.popleft()
        self._batches = slab if slab.size <= KEPT_BYTES else None

    def results(self, done: Done, descriptors: list[int]) -> dict[str, Any]:
        """What an op has made. Raises OSError, LookupError, ValueError, TypeError for what cannot be."""
        slab = Slab(descriptors[0], done.slab_size) if done.slab_size else self._results[done.slab]
        if done.slab:
            self._results.pop(done.dropped, None)
            self._results[done.slab] = slab
        memory = slab.memory(done.used)
        if done.used <= _COPIED_BYTES:
            memory = memory.copy()
            if done.slab:
                self._freed.append(done.slab)
        elif done.slab:
            # All arrays over it refer to `memory`, so that its end is theirs.
            weakref.finalize(memory, self._freed.append, done.slab).atexit = False
        return read(done.pieces, memory)

    def error_of(self, failed: Failed) -> ServingError:
        """What the worker says went wrong; a fault's trace goes to the log."""
        if failed.unexpected is not None:
            return BadConfig(*failed.unexpected)
        if not failed.trace:
            return from_wire(failed.code, failed.text)
        log.error("%s failed in process %d\n%s", self._place, self.pid, failed.trace.rstrip())
        return Internal(f"{self._place}: failed; the server's log has it")

    def log(self, line: Logged) -> None:
        """Put down what the worker has to say."""
        logging.getLogger(line.logger).log(line.level, "%s process %d: %s", self._place, self.pid, line.text)

    def kill(self) -> None:
        """End it at once; its socket says when it has."""
        self._process.kill()

    def ended(self, within_s: float = 1.0) -> str:
        """Wait until it has ended, by force if that takes longer; how it has."""
        self.link.close()
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._life >= 0:
            os.close(self._life)
            self._life = -1
        code = self._process.returncode
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    @property
    def was_stopped(self) -> bool:
        """Whether, once it has ended, that was somebody's will (or the kernel's, for want of memory), not a crash."""
        return self._process.returncode in (-signal.SIGKILL, -signal.SIGTERM)


def close_all(descriptors: Iterable[int]) -> None:
    """Of what came with a message."""
    for descriptor in descriptors:
        os.close(descriptor)
