"""Ops that run apart from the rest of their workflow: in threads of their own, or on batches of their own.

    OwnThreads(op, 2)                       two batches at once, in threads
    OwnProcesses("module:Class", {}, 2)     the same in processes: see `predictor.processes`
    Gathered(op, Limits(max_rows=32))       batches of several runs are merged up to 32 rows, and larger ones split

All are ops themselves, with the inputs and outputs of the one within.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

from cube.errors import BadConfig, DeadlineExceeded, Internal, Overloaded, Unavailable
from predictor.batching import Batcher, Limits, Share
from predictor.ops.op import Batch, Op, Outputs, Port, names_of
from predictor.rows import join_rows, slice_rows


@runtime_checkable
class Queued(Protocol):
    """An op that lets batches wait."""

    def queue_sizes(self) -> dict[str, int]:
        """What waits and what runs, by a name for each: for metrics."""


class OwnThreads(Op):
    """An op whose batches run in threads of its own, one in each."""

    waits: ClassVar[bool] = True

    def __init__(self, op: Op, concurrency: int, queue_size: int = 1_024, *, place: str = "node"):
        """queue_size: batches that may wait for a thread; more are refused. place: for messages. Raises BadConfig."""
        if concurrency < 1 or queue_size < 1:
            raise BadConfig(f"{place} concurrency and queue_size", f"{concurrency} and {queue_size}", "at least 1")
        if op.is_waiting:
            raise BadConfig(f"{place} concurrency", "an op that waits rather than computes", "no threads for it")
        self.concurrency = concurrency
        self._op, self._place, self._queue_size = op, place, queue_size
        self._threads = ThreadPoolExecutor(concurrency, place)
        self._lock = threading.Lock()
        self._there = 0  # batches that wait for a thread or are in one; under the lock

    @property
    def within(self) -> Op:
        """See Op."""
        return self._op.within

    def wanted(self) -> Mapping[str, Port] | None:
        """See Op."""
        return self._op.wanted()

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        return self._op.bind(inputs)

    def open(self) -> None:
        """See Op."""
        self._op.open()

    def queue_sizes(self) -> dict[str, int]:
        """How many batches wait, and how many run."""
        return {"waiting": max(self._there - self.concurrency, 0), "busy": min(self._there, self.concurrency)}

    def run(self, batch: Batch) -> Awaitable[Outputs]:
        """See Op. Raises Overloaded, Unavailable; the answer, what the op raises, and DeadlineExceeded."""
        with self._lock:
            waiting = self._there - self.concurrency
            if waiting >= self._queue_size:
                raise Overloaded(f"{self._place}: {waiting} batches are waiting, at most {self._queue_size} may")
            self._there += 1
        try:
            answer = self._threads.submit(self._compute, batch)
        except RuntimeError as error:
            self._ended(error)
            raise Unavailable(f"{self._place}: closed") from error
        answer.add_done_callback(self._ended)  # not the one below: that one is cancelled while the op still runs
        return asyncio.wrap_future(answer)

    def close(self) -> None:
        """See Op. Waits for what runs."""
        self._threads.shutdown(cancel_futures=True)
        self._op.close()

    def _compute(self, batch: Batch) -> Outputs:
        if batch.deadline is not None and batch.deadline <= time.monotonic():
            raise DeadlineExceeded(f"{self._place}: the deadline passed while it was waiting")
        try:
            return cast(Outputs, self._op.run(batch))
        except StopIteration as error:  # no future can hold it
            raise RuntimeError("the op raised StopIteration") from error

    def _ended(self, _: object) -> None:
        with self._lock:
            self._there -= 1


class _Made(NamedTuple):
    """What an op has made of a batch, checked."""

    outputs: Outputs
    rows: int


class Gathered(Op):
    """An op that is run on batches of its own: those of several runs merged, or parts of one. Owned by the event loop.

    As many run at once as the op has threads or processes. An op that computes, and has none, gets one thread for each
    of `limits.max_in_flight`.
    """

    waits: ClassVar[bool] = True

    def __init__(self, op: Op, limits: Limits, *, place: str = "node"):
        """limits: max_rows are those of a mini-batch. place: for messages. Raises BadConfig."""
        self._op = op if op.is_waiting else OwnThreads(op, limits.max_in_flight, place=place)
        at_once = max(limits.max_in_flight, getattr(self._op, "concurrency", 1))
        self._place, self._limits = place, replace(limits, max_in_flight=at_once).checked(f"{place} batch")
        self._inputs: Mapping[str, Port] = {}
        self._outputs: Mapping[str, Port] = {}
        self._batcher: Batcher[_Made] | None = None

    @property
    def within(self) -> Op:
        """See Op."""
        return self._op.within

    def wanted(self) -> Mapping[str, Port] | None:
        """See Op."""
        return self._op.wanted()

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op. Raises BadConfig too for values that cannot be merged or split."""
        self._inputs, self._outputs = inputs, self._op.bind(inputs)
        for what, ports in (("input", self._inputs), ("output", self._outputs)):
            for name, port in ports.items():
                if not port.goes_by_rows or -1 in port.shape[1:]:
                    expected = "values that go by rows, and whose other dimensions do not vary"
                    raise BadConfig(f"{what} {name!r} of a node that batches", str(port), expected)
        self._batcher = Batcher(self._place, self._start, inputs, self._limits)
        return self._outputs

    def open(self) -> None:
        """See Op."""
        self._op.open()

    def queue_sizes(self) -> dict[str, int]:
        """Rows that wait for company or for their turn, and what the op within says of itself."""
        waiting = 0 if self._batcher is None else self._batcher.counters.waiting_rows
        return {"waiting_rows": waiting, **(self._op.queue_sizes() if isinstance(self._op, Queued) else {})}

    def run(self, batch: Batch) -> Outputs | Awaitable[Outputs]:
        """See Op. Raises Overloaded, DeadlineExceeded, and what the op raises."""
        assert self._batcher is not None, "not bound"
        return self._batcher.submit(batch, batch.rows, batch.rows, batch.deadline, then=self._put_together)

    def close(self) -> None:
        """See Op."""
        self._op.close()

    def _start(self, values: Mapping[str, Any], rows: int, _: int, deadline: float | None) -> _Made | Awaitable[_Made]:
        batch = Batch(values)
        batch.rows, batch.deadline = rows, deadline
        outputs = self._op.run(batch)
        return self._checked_later(outputs, rows) if isinstance(outputs, Awaitable) else self._checked(outputs, rows)

    async def _checked_later(self, outputs: Awaitable[Outputs], rows: int) -> _Made:
        return self._checked(await outputs, rows)

    def _checked(self, outputs: Outputs, rows: int) -> _Made:
        """Parts of what is not as long as the batch would be somebody else's."""
        if not isinstance(outputs, Mapping) or outputs.keys() != self._outputs.keys():
            expected = ", ".join(self._outputs)
            raise Internal(f"{self._place} outputs: found {names_of(outputs)}, expected {expected}")
        for name, port in self._outputs.items():
            if misfit := port.misfit(outputs[name], rows):
                raise Internal(f"{self._place} output {name!r}: found {misfit}, expected {port}")
        return _Made(outputs, rows)

    def _put_together(self, shares: Sequence[Share[_Made]]) -> Outputs:
        """A run's own rows of what the op has made."""
        first = shares[0]
        if len(shares) == 1 and (first.start, first.stop) == (0, first.run.rows):
            return first.run.outputs
        return {
            name: join_rows([slice_rows(s.run.outputs[name], port, s.start, s.stop) for s in shares], port)
            for name, port in self._outputs.items()
        }
