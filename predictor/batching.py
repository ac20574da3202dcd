"""Merges requests that wait for the same workflow (or node) into one run, and hands out the parts.

Nobody waits for company unless told to: a batch is what has come while the one before it ran, or was read from the
sockets in the same turn of the event loop. A caller that is alone is served at once, within its call.
"""

import asyncio
import time
from bisect import insort
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, cast

from cube.errors import BadConfig, BadRequest, DeadlineExceeded, OutOfMemory, Overloaded, ShardUnavailable
from predictor.ops.op import Port
from predictor.rows import join_rows, slice_rows

R = TypeVar("R")  # what a run comes to
T = TypeVar("T")  # what a request makes of its parts of runs
Start = Callable[[Mapping[str, Any], int, int, float | None], R | Awaitable[R]]  # values, rows, work, deadline

_ALONE_AFTER = 16  # batches of one request in a row, until requests are run as they come again
_TURN_S = 0.004  # after which batches that run on the event loop leave a turn to others
_SWEEP_S = 0.05  # a full queue is not looked through more often for those who have gone
MOST_PRIORITY = 1_000
_YIELDS = 1_000  # to so many that came later a request yields, for each level that they are above it; then it leaves


@dataclass(frozen=True)
class Limits:
    """How requests become batches."""

    max_rows: int = 4_096  # of a batch; a larger request is split
    max_delay_s: float = 0.0  # longest wait for company; 0: none is waited for
    preferred_rows: tuple[int, ...] = ()  # a batch that has reached one of these does not wait
    allowed_rows: tuple[int, ...] = ()  # batches are filled up to the next of these with copies of a row
    max_waiting_rows: int = 65_536  # more are refused
    max_in_flight: int = 1  # runs at once
    is_on: bool = True  # False: every request is a run of its own; the bounds on what waits and runs stay

    def checked(self, place: str) -> "Limits":
        """These limits; raises BadConfig for what contradicts itself."""
        if self.max_waiting_rows < self.max_rows:
            found = f"{self.max_waiting_rows}, fewer than a batch has"
            raise BadConfig(f"{place} max_waiting_rows", found, f"at least max_rows, {self.max_rows}")
        if self.max_rows < 1 or self.max_in_flight < 1 or self.max_waiting_rows < 1:
            raise BadConfig(place, "a limit below 1", "at least 1")
        if not 0 <= self.max_delay_s <= 60:
            raise BadConfig(f"{place} max_delay", f"{self.max_delay_s} s", "0 to 60 s")
        for name, sizes in (("preferred_rows", self.preferred_rows), ("allowed_rows", self.allowed_rows)):
            if list(sizes) != sorted(set(sizes)) or any(not 1 <= size <= self.max_rows for size in sizes):
                raise BadConfig(f"{place} {name}", list(sizes), f"rising numbers from 1 to max_rows, {self.max_rows}")
        if self.allowed_rows and self.allowed_rows[-1] != self.max_rows:
            raise BadConfig(f"{place} allowed_rows", list(self.allowed_rows), f"{self.max_rows}, max_rows, as the last")
        return self


def decide(limits: Limits, waiting: Sequence[int], waited_s: float) -> tuple[int, float]:
    """How many of the waiting requests leave now as one batch, and if none, for how many seconds to wait.

    waiting: rows of each, in the order they leave, at least one, none above max_rows. waited_s: by the one that has
    waited longest.
    """
    fits = rows = 0
    for size in waiting:
        if rows + size > limits.max_rows:
            break
        rows += size
        fits += 1
    is_full = fits < len(waiting) or rows == limits.max_rows
    target = max((size for size in limits.preferred_rows if size <= rows), default=0)
    if not is_full and not target and waited_s < limits.max_delay_s:
        return 0, limits.max_delay_s - waited_s
    if target:
        taken = count = 0
        for size in waiting[:fits]:
            if taken + size > target:
                break
            taken += size
            count += 1
        return max(count, 1), 0.0
    return fits, 0.0


class Share(NamedTuple, Generic[R]):
    """A request's part of a run: rows `start` to `stop`."""

    run: R
    start: int
    stop: int
    waited_s: float = 0.0  # from the request's arrival until the run began


class _Asked(Generic[R]):
    """A request, or a part of one that is larger than a batch."""

    __slots__ = ("answer", "arrived", "deadline", "is_suspect", "order", "priority", "rows", "then", "values", "work")

    answer: "asyncio.Future[Any]"  # of one in company
    order: int  # those of a lower one leave the queue first

    def __init__(
        self,
        values: Mapping[str, Any],
        rows: int,
        work: int,
        deadline: float | None,
        priority: int,
        then: Callable[[list[Share[R]]], Any],
    ):
        self.values, self.rows, self.work, self.deadline, self.priority = values, rows, work, deadline, priority
        self.then, self.arrived = then, time.monotonic()
        self.is_suspect = False  # a batch with it has failed, so it runs alone


@dataclass
class Counters:
    """Since start."""

    requests: int = 0
    batches: int = 0  # runs
    rows: int = 0  # of these runs
    expired: int = 0  # requests that left before a run because nobody waited any more
    refused: int = 0  # because too many were waiting
    alone: int = 0  # runs of one request after a batch had failed
    waiting_rows: int = 0  # now
    in_flight: int = 0  # now
    sizes: dict[int, int] = field(default_factory=dict)  # of batches, by the power of two above their rows


class Batcher(Generic[R]):
    """The door of a workflow. Owned by the event loop."""

    def __init__(self, place: str, start: Start[R], ports: Mapping[str, Port], limits: Limits):
        """place: for messages. start: begins a run. ports: of the values; all go by rows unless `limits` says off."""
        self._place, self._start, self._ports, self.limits = place, start, ports, limits.checked(place)
        self.counters = Counters()
        self.remembers = False  # whether the next is kept
        self.under_way: dict[asyncio.Future[Any], Awaitable[R]] = {}  # what promises to requests in company wait for
        self._queue: list[_Asked[R]] = []  # in the order they leave
        self._number = 0
        self._swept_at = 0.0  # time.monotonic() when the queue was looked through last
        self._is_alone = True  # requests come one at a time
        self._ran_this_turn = False  # of the event loop
        self._singles = 0  # batches of one in a row
        self._dispatching: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(
        self,
        values: Mapping[str, Any],
        rows: int,
        work: int,
        deadline: float | None,
        priority: int = 0,
        *,
        then: Callable[[list[Share[R]]], T],
    ) -> T | Awaitable[T]:
        """Run a request, alone or with others; what `then` makes of its shares, in the order of its rows.

        values: as the ports say, checked. priority: 1 leaves first, 0 is the last. What a request waits for in company
        is a future. Raises BadRequest, Overloaded, DeadlineExceeded, and what the run and `then` raise.
        """
        if not 0 <= priority <= MOST_PRIORITY:
            raise BadRequest(f"{self._place} priority", priority, f"0 to {MOST_PRIORITY}")
        self.counters.requests += 1
        one: _Asked[R] = _Asked(values, rows, work, deadline, priority, then)
        limits = self.limits
        if limits.is_on and rows > limits.max_rows:
            return self._in_parts(one)
        waits = limits.is_on and (limits.max_delay_s or limits.allowed_rows)
        if (self._is_alone or not limits.is_on) and not waits and not self._queue:
            if not self._ran_this_turn and self.counters.in_flight < limits.max_in_flight:
                self._ran_this_turn = True
                asyncio.get_running_loop().call_soon(self._turn_over)
                return self._alone(one)  # type: ignore[no-any-return]  # what its `then` makes
            self._is_alone, self._singles = False, 0
        self._admit(rows)
        return self._queued(one)

    # ---- without company ----

    def _turn_over(self) -> None:
        self._ran_this_turn = False

    def _alone(self, one: _Asked[R]) -> Any:
        self._count(one.rows)
        run = self._start(one.values, one.rows, one.work, one.deadline)
        if hasattr(run, "__await__"):
            return self._alone_later(one, cast("Awaitable[R]", run))
        return one.then([Share(run, 0, one.rows)])

    async def _alone_later(self, one: _Asked[R], run: Awaitable[R]) -> Any:
        self.counters.in_flight += 1
        try:
            return one.then([Share(await run, 0, one.rows)])
        finally:
            self._landed()

    # ---- with company ----

    async def _in_parts(self, whole: _Asked[R]) -> Any:
        """A request that is larger than a batch."""
        most = self.limits.max_rows
        answers: list[asyncio.Future[Any]] = []
        self._admit(1)  # whole or not at all: its own size is bounded by who has read it
        for start in range(0, whole.rows, most):
            rows = min(most, whole.rows - start)
            values = {
                name: slice_rows(value, self._ports[name], start, start + rows) for name, value in whole.values.items()
            }
            work = whole.work * rows // whole.rows
            answers.append(self._queued(_Asked(values, rows, work, whole.deadline, whole.priority, _only)))
        try:
            return whole.then([await answer for answer in answers])
        finally:
            for answer in answers:
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()  # of no interest where another part's was raised

    def _admit(self, rows: int) -> None:
        most, now = self.limits.max_waiting_rows, time.monotonic()
        if self.counters.waiting_rows + rows > most and now >= self._swept_at + _SWEEP_S:
            self._swept_at = now
            self._queue = [one for one in self._queue if self._is_wanted(one, now)]
        if self.counters.waiting_rows + rows > most:
            self.counters.refused += 1
            raise Overloaded(f"{self._place}: {self.counters.waiting_rows} rows are waiting, at most {most} may")

    def _queued(self, one: _Asked[R]) -> "asyncio.Future[Any]":
        self._number += 1
        one.order = self._number + _YIELDS * (one.priority or MOST_PRIORITY)
        one.answer = asyncio.get_running_loop().create_future()
        self._enqueue(one)
        return one.answer

    def _enqueue(self, one: _Asked[R]) -> None:
        queue = self._queue
        if not queue or queue[-1].order < one.order:
            queue.append(one)  # what nearly every request does
        else:
            insort(queue, one, key=_order)
        self.counters.waiting_rows += one.rows
        self._dispatch_soon()

    def _dispatch_soon(self, delay_s: float = 0.0) -> None:
        if self._dispatching is not None:
            if delay_s or not isinstance(self._dispatching, asyncio.TimerHandle):
                return
            self._dispatching.cancel()
        loop = asyncio.get_running_loop()
        # In the next turn of the loop: what else is there to be read is read first.
        self._dispatching = loop.call_later(delay_s, self._dispatch) if delay_s else loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching, until = None, time.monotonic() + _TURN_S
        while self.counters.in_flight < self.limits.max_in_flight and (first := self._first()):
            if first[0].is_suspect and self.counters.in_flight:
                return  # alone means alone
            count, wait_s = 1, 0.0
            if self.limits.is_on and not first[0].is_suspect:
                waited_s = time.monotonic() - min(one.arrived for one in first)
                count, wait_s = decide(self.limits, [one.rows for one in first], waited_s)
            if not count:
                self._dispatch_soon(wait_s)
                return
            leaving, self._queue[:count] = first[:count], []
            self.counters.waiting_rows -= sum(one.rows for one in leaving)
            self._singles = self._singles + 1 if count == 1 else 0
            self._is_alone = self._singles >= _ALONE_AFTER
            self._begin(leaving)
            if self._queue and time.monotonic() > until:
                self._dispatch_soon()
                return

    def _first(self) -> list[_Asked[R]]:
        """Those at the head of the queue of whom the next batch is made; who is not wanted there any more is dropped.

        As many as fill it and one more, or a single one where that runs alone.
        """
        most = self.limits.max_rows if self.limits.is_on else 0
        first: list[_Asked[R]] = []
        seen, rows, now = 0, 0, time.monotonic()
        for one in self._queue:
            if first and (rows > most or one.is_suspect or first[0].is_suspect):
                break
            seen += 1
            if self._is_wanted(one, now):
                first.append(one)
                rows += one.rows
        if len(first) < seen:
            self._queue[:seen] = first
        return first

    def _is_wanted(self, one: _Asked[R], now: float) -> bool:
        """Whether anybody waits for a request that waits here; if not, it counts as one that has left."""
        if not one.answer.done():  # else its caller has gone
            if one.deadline is None or one.deadline > now:
                return True
            one.answer.set_exception(DeadlineExceeded(f"{self._place}: the deadline passed while it was waiting"))
        self.counters.expired += 1
        self.counters.waiting_rows -= one.rows
        return False

    def _begin(self, batch: list[_Asked[R]]) -> None:
        rows = sum(one.rows for one in batch)
        self._count(rows)
        began = time.monotonic()
        deadlines = [one.deadline for one in batch]
        deadline = None if None in deadlines else max(d for d in deadlines if d is not None)
        try:
            values, padded = self._merged(batch, rows)
            run = self._start(values, padded, sum(one.work for one in batch), deadline)
        except Exception as error:
            self._failed(batch, error)
            return
        if not hasattr(run, "__await__"):
            _hand_out(batch, run, began)
            return
        self.counters.in_flight += 1
        task = asyncio.get_running_loop().create_task(self._carried(batch, cast("Awaitable[R]", run), began))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        if self.remembers:
            self.under_way.update(dict.fromkeys((one.answer for one in batch), cast("Awaitable[R]", run)))
        wanted = len(batch)

        def gone(_: object) -> None:
            nonlocal wanted
            wanted -= 1
            if not wanted:
                task.cancel()  # nobody waits for it any more

        for one in batch:
            one.answer.add_done_callback(gone)

    async def _carried(self, batch: list[_Asked[R]], run: Awaitable[R], began: float) -> None:
        try:
            _hand_out(batch, await run, began)
        except asyncio.CancelledError:
            for one in batch:
                one.answer.cancel()
            raise
        except Exception as error:
            self._failed(batch, error)
        finally:
            if self.under_way:
                for one in batch:
                    self.under_way.pop(one.answer, None)
            self._landed()

    def _landed(self) -> None:
        self.counters.in_flight -= 1
        if self._queue:
            self._dispatch_soon()

    def _failed(self, batch: list[_Asked[R]], error: Exception) -> None:
        """Nobody's request fails for another's: each is run again alone, unless that could not help."""
        is_everybodys = isinstance(error, DeadlineExceeded | ShardUnavailable)
        is_everybodys |= isinstance(error, Overloaded) and not isinstance(error, OutOfMemory)
        if len(batch) == 1 or is_everybodys:
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        self.counters.alone += len(batch)
        for one in batch:
            one.is_suspect = True
            self._enqueue(one)

    def _merged(self, batch: list[_Asked[R]], rows: int) -> tuple[Mapping[str, Any], int]:
        """One request's values for all of a batch, and how many rows they have, with those that fill it up."""
        size = next((size for size in self.limits.allowed_rows if size >= rows), rows)
        if size == rows and len(batch) == 1:
            return batch[0].values, rows
        parts = [one.values for one in batch]
        if size > rows:  # with the last row, which an op that looks at values has no reason to refuse
            last, at = batch[-1].values, batch[-1].rows
            more = {name: slice_rows(value, self._ports[name], at - 1, at) for name, value in last.items()}
            parts += [more] * (size - rows)
        return {name: join_rows([part[name] for part in parts], self._ports[name]) for name in parts[0]}, size

    def _count(self, rows: int) -> None:
        self.counters.batches += 1
        self.counters.rows += rows
        size = 1 << max(rows - 1, 0).bit_length()
        self.counters.sizes[size] = self.counters.sizes.get(size, 0) + 1


def _only(shares: list[Share[R]]) -> Share[R]:
    return shares[0]


def _order(one: _Asked[Any]) -> int:
    return one.order


def _hand_out(batch: Sequence[_Asked[R]], run: R, began: float) -> None:
    start = 0
    for one in batch:
        if not one.answer.done():
            try:
                one.answer.set_result(one.then([Share(run, start, start + one.rows, began - one.arrived)]))
            except Exception as error:  # this request's own
                one.answer.set_exception(error)
        start += one.rows
