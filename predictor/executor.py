"""Runs batches through a plan: short steps here on the event loop, long ones in threads, those that wait as they come.

A run begins within the call that starts it. Only where something must be waited for (a cube's answer, a thread, a
process) does `start` return a coroutine for the rest, so that a small net costs no task.
"""

import asyncio
import logging
import math
import resource
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor as Threads
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from cube.errors import DeadlineExceeded, Internal, OutOfMemory, ServingError
from predictor.ops.op import Batch, Outputs, names_of
from predictor.rows import blank, copied, frozen, is_frozen, put_rows, take_rows
from predictor.thread_clock import ThreadClock, own_clock
from predictor.workflow import Kind, Plan, Step

log = logging.getLogger(__name__)

# Handing a run to a thread and back costs 0.1 to 0.4 ms of CPU for two futex wake-ups, and several times that where the
# two threads then fight for the GIL between the net's ops (measured on 2 shared cores: a 1.5 ms net cost 4 ms). A run
# expected to be shorter than this stays on the loop, which answers nothing else meanwhile.
SHORT_S = 0.004
WORTH_A_THREAD_S = 0.001  # of each of two steps of one stage, to run at once
_NEWEST_WEIGHT = 0.2
_UNTIMED = 8  # of so many short runs one is timed
_CAUGHT = 2  # runs that waited instead of computing, after which a step has a thread
_FORGIVEN = 256  # runs that did not wait, after which one that did is forgotten
TIMES = 4  # of each step of a run


class RunTimes:
    """CPU seconds of runs by size class: a moving average per power of two of work. Unknown is long.

    CPU time, not wall time: a run in a thread that waits for the GIL would look long, and stay in a thread for ever.
    Steps that wait (for a file, another server, a lock) take no CPU, and would stop the event loop: they are long once
    they have been caught twice, until many runs have not waited. Of short runs on the event loop only some are timed:
    asking for the CPU time is a system call, and two of them cost as much as a small op.
    """

    def __init__(self) -> None:
        self._seconds = [math.inf] * 64
        self._caught = 0
        self._unhindered = 0  # timed runs in a row that did not wait, while some have been caught
        self._untimed = _UNTIMED  # short runs in a row

    def is_due(self, work: int) -> bool:
        """Whether a run on the event loop is to be timed."""
        self._untimed += 1
        if self._untimed < _UNTIMED and self._seconds[work.bit_length()] < SHORT_S / 4:
            return False
        self._untimed = 0
        return True

    def look_again(self) -> None:
        """A run took longer than was expected: the next one is timed."""
        self._untimed = _UNTIMED

    def expected(self, work: int) -> float:
        """Of a run of so much work; infinite before there was one."""
        return self._seconds[work.bit_length()] if self._caught < _CAUGHT else math.inf

    def learn(self, work: int, seconds: float, has_waited: bool = False) -> None:
        """Take one run into account."""
        if has_waited:
            self._caught, self._unhindered, self._untimed = min(self._caught + 1, 2 * _CAUGHT), 0, _UNTIMED
        elif self._caught:
            self._unhindered += 1
            if self._unhindered >= _FORGIVEN:
                self._caught, self._unhindered = self._caught - 1, 0
        known = self._seconds[work.bit_length()]
        fresh = seconds if known == math.inf else known + _NEWEST_WEIGHT * (seconds - known)
        self._seconds[work.bit_length()] = fresh


class Run:
    """One batch on its way. `values` by place, `times` in nanoseconds of the monotonic clock.

    Each step has four times: it begins, its op does, its op has ended, it has. Zeros where it did not run; the last
    two are zeros where it failed.
    """

    __slots__ = ("began", "deadline", "ended", "in_threads", "rows", "times", "values", "work")

    def __init__(self, values: list[Any], rows: int, work: int, deadline: float | None, steps: int):
        self.values, self.rows, self.work, self.deadline = values, rows, work, deadline
        self.times = [0] * (TIMES * steps)
        self.in_threads: frozenset[int] = frozenset()  # numbers of the steps that did not run on the event loop
        self.began = self.ended = 0


class Rest:
    """What is left of a run that waits for something: await it for the run. Which one that is can be seen before."""

    __slots__ = ("_whole", "run")

    def __init__(self, run: Run, whole: Awaitable[Run]):
        self.run, self._whole = run, whole

    def __await__(self) -> Generator[Any, Any, Run]:
        return self._whole.__await__()


class Segment(NamedTuple):
    """Steps that run in one place. One step that waits, or several at once, or one after the other."""

    steps: tuple[Step, ...]
    times: tuple[RunTimes, ...]  # of all of them, or of each if they run at once
    waits: bool
    at_once: bool


class Executor:
    """A plan ready to run. Keeps nothing of a run but how long it took. Owned by the event loop."""

    def __init__(
        self, plan: Plan, threads: Threads, observe: Callable[[Run, BaseException | None], None] | None = None
    ):
        """observe: told of every run that has ended, and by what error, if by one: CancelledError where nobody waited
        for it any more."""
        self.plan = plan
        self.observe = observe
        self._threads = threads
        self._segments = segments(plan)
        self._places = {name: place for place, name in enumerate(plan.request)}

    @property
    def can_wait(self) -> bool:
        """Whether a run may wait for something that is not computed here."""
        return any(segment.waits for segment in self._segments)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Runs in this block have no deadlines of nodes: the first ones load and compile, which no caller waits for."""
        timed = self._segments
        self._segments = [segment._replace(steps=tuple(map(_untimed, segment.steps))) for segment in timed]
        try:
            yield
        finally:
            self._segments = timed

    def start(self, values: Mapping[str, Any], rows: int, work: int, deadline: float | None) -> Run | Rest:
        """Begin a run, or do all of it.

        values: of the plan's request, as its ports say. work: what the time of a run goes by.
        """
        run = Run([None] * self.plan.size, rows, work, deadline, len(self.plan.steps))
        for name, place in self._places.items():
            run.values[place] = frozen(values[name])  # nobody writes to the caller's bytes, whoever passes them on
        run.began = time.monotonic_ns()
        try:
            rest = self._go(run, 0)
        except Exception as error:
            self._ended(run, error)
            raise
        return self._ended(run) if rest is None else Rest(run, self._finish(run, rest))

    async def _finish(self, run: Run, rest: Awaitable[None]) -> Run:
        try:
            await rest
        except (Exception, asyncio.CancelledError) as error:
            self._ended(run, error)
            raise
        return self._ended(run)

    def _ended(self, run: Run, error: BaseException | None = None) -> Run:
        run.ended = time.monotonic_ns()
        if self.observe is not None:
            self.observe(run, error)
        return run

    def _go(self, run: Run, at: int) -> Awaitable[None] | None:
        """Run segments from number `at`; what to await for the rest, None if nothing is left."""
        while at < len(self._segments):
            segment = self._segments[at]
            if segment.at_once:
                waiting = self._at_once(run, segment)
            elif segment.waits:
                waiting = self._one(run, segment.steps[0])
            elif segment.times[0].expected(run.work) < SHORT_S:
                self._here(run, segment.steps, segment.times[0])
                waiting = None
            else:
                waiting = self._in_thread(run, segment.steps, segment.times[0])
            at += 1
            if waiting is not None:
                return self._then(waiting, run, at)
        return None

    async def _then(self, waiting: Awaitable[None], run: Run, at: int) -> None:
        await waiting
        rest = self._go(run, at)
        if rest is not None:
            await rest

    def _here(self, run: Run, steps: Sequence[Step], times: RunTimes) -> None:
        """On the event loop."""
        began = time.monotonic()
        if times.is_due(run.work):
            times.learn(run.work, *self._timed(run, steps))
        else:
            self._compute(run, steps)
            if time.monotonic() - began > SHORT_S:
                times.look_again()

    def _timed(self, run: Run, steps: Sequence[Step], loop: ThreadClock | None = None) -> tuple[float, bool]:
        """The same; CPU seconds it took, and whether it has waited. loop: the clock of the event loop's thread, where
        this is another one.

        Having lost the core to another process is not waiting. Waiting for the interpreter looks like it, so the time
        in which the event loop, which then has the interpreter, was busy does not count; what is caught for another
        thread's sake is forgiven later.
        """
        clock, slept = own_clock(), _sleeps()
        began, begin, cpu_s = time.monotonic(), clock.busy_s() + (loop.busy_s() if loop else 0), clock.cpu_s()
        self._compute(run, steps)
        seconds = clock.cpu_s() - cpu_s
        busy_s = clock.busy_s() + (loop.busy_s() if loop else 0) - begin
        idle_s = time.monotonic() - began - busy_s
        return seconds, idle_s > 3 * seconds + SHORT_S and _sleeps() > slept

    def _compute(self, run: Run, steps: Sequence[Step]) -> None:
        """Run steps that do not wait."""
        for step in steps:
            _check_deadline(self.plan.name, step, run)
            batch = _begin(step, run)
            if batch is not None:
                _end(self.plan.name, step, run, batch, _called(self.plan.name, step, batch))

    async def _in_thread(self, run: Run, steps: Sequence[Step], times: RunTimes) -> None:
        loop = asyncio.get_running_loop()
        run.in_threads |= {step.number for step in steps}
        times.learn(run.work, *await loop.run_in_executor(self._threads, self._timed, run, steps, own_clock()))

    def _one(self, run: Run, step: Step) -> Awaitable[None] | None:
        """Run a step that may wait."""
        _check_deadline(self.plan.name, step, run)
        batch = _begin(step, run)
        if batch is None:
            return None
        made = _called(self.plan.name, step, batch)
        if not isinstance(made, Mapping):
            return self._awaited(run, step, batch, made)
        _end(self.plan.name, step, run, batch, made)
        return None

    async def _awaited(self, run: Run, step: Step, batch: Batch, made: Awaitable[Outputs]) -> None:
        left_s = None
        if step.node.deadline_s is not None or batch.deadline is not None:
            left_s = min(step.node.deadline_s or math.inf, (batch.deadline or math.inf) - time.monotonic())
        until = asyncio.timeout(left_s)
        try:
            if left_s is None:
                outputs = await made
            else:
                async with until:
                    outputs = await made
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, GeneratorExit) or (
                isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling()
            ):
                raise
            if isinstance(error, TimeoutError) and until.expired():  # else it is the op's own
                late = f"{_place(self.plan.name, step)}: not done within {left_s or 0:.3f} s"
                raise DeadlineExceeded(late) from error
            raise _reported(self.plan.name, step, error) from error
        _end(self.plan.name, step, run, batch, outputs)

    def _at_once(self, run: Run, segment: Segment) -> Awaitable[None] | None:
        """Run the steps of a stage: long ones in threads, short ones here, and those that wait beside them."""
        waiting: list[Awaitable[None]] = []
        here: list[tuple[Step, RunTimes]] = []
        timed = list(zip(segment.steps, segment.times, strict=True))
        expected = [0.0 if _waits(step) else times.expected(run.work) for step, times in timed]
        least_s = WORTH_A_THREAD_S if sum(s >= WORTH_A_THREAD_S for s in expected) > 1 else SHORT_S
        try:
            for (step, times), seconds in zip(timed, expected, strict=True):
                if _waits(step):
                    rest = self._one(run, step)
                    if rest is not None:
                        waiting.append(asyncio.ensure_future(rest))
                elif seconds >= least_s:
                    waiting.append(asyncio.ensure_future(self._in_thread(run, (step,), times)))
                else:
                    here.append((step, times))
            for step, times in here:
                self._here(run, (step,), times)
        except BaseException:
            for task in waiting:
                task.cancel()  # type: ignore[attr-defined]  # they are all tasks
            raise
        return _all(waiting) if waiting else None


def segments(plan: Plan) -> list[Segment]:
    """A plan's steps, grouped by where and how they run."""
    groups = [(step,) for step in plan.steps] if plan.kind is Kind.SEQUENCE else list(plan.stages)
    made: list[Segment] = []
    for steps in groups:
        if len(steps) > 1:
            made.append(Segment(steps, tuple(RunTimes() for _ in steps), any(map(_waits, steps)), at_once=True))
        elif _waits(steps[0]):
            made.append(Segment(steps, (), waits=True, at_once=False))
        elif made and not made[-1].waits and not made[-1].at_once:
            made[-1] = made[-1]._replace(steps=(*made[-1].steps, *steps))
        else:
            made.append(Segment(steps, (RunTimes(),), waits=False, at_once=False))
    return made


def _sleeps() -> int:
    """How often this thread has given up its core by itself."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _untimed(step: Step) -> Step:
    return step._replace(node=step.node._replace(deadline_s=None))


def _waits(step: Step) -> bool:
    """Whether a step's `run` belongs on the event loop and may return an awaitable."""
    return step.node.is_apart or step.node.op.is_waiting


async def _all(waiting: Sequence[Awaitable[None]]) -> None:
    try:
        await asyncio.gather(*waiting)
    except BaseException:
        for task in waiting:
            task.cancel()  # type: ignore[attr-defined]  # they are all tasks
        raise


# ---- one step ----


def _begin(step: Step, run: Run) -> Batch | None:
    """What a step's op is given; None if it runs for no row, and what it makes is there then."""
    at, times, values = TIMES * step.number, run.times, run.values
    times[at] = time.monotonic_ns()
    batch = Batch()
    batch.rows, batch.deadline = run.rows, run.deadline
    if (own_s := step.node.deadline_s) is not None:
        mine = times[at] / 1e9 + own_s
        batch.deadline = mine if run.deadline is None else min(mine, run.deadline)
    if step.guard is None:
        for name, place, is_copied, _, changes in step.takes:
            value = values[place]
            # What a node has passed on as it was given it is not its own, so it cannot be handed over.
            batch[name] = copied(value) if is_copied or (changes and is_frozen(value)) else value
        times[at + 1] = time.monotonic_ns()
        return batch
    chosen = _chosen(step, run)
    batch.rows = int(np.count_nonzero(chosen))
    if not batch.rows:
        for make in step.makes:
            values[make.place] = frozen(blank(make.port, run.rows))
        times[at] = 0
        return None
    for name, place, is_copied, port, changes in step.takes:
        part = values[place] if not port.goes_by_rows else take_rows(values[place], port, chosen)
        is_own = part is not values[place]
        batch[name] = copied(part) if not is_own and (is_copied or (changes and is_frozen(part))) else part
    times[at + 1] = time.monotonic_ns()
    return batch


def _chosen(step: Step, run: Run) -> Any:
    """bool[rows]: for which rows a step runs."""
    assert step.guard is not None
    marks = run.values[step.guard]
    return marks if step.guard_value else ~marks


def _called(workflow: str, step: Step, batch: Batch) -> Any:
    try:
        return step.node.op.run(batch)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an op does not end the server, nor does a panic of the Rust code that it calls
        raise _reported(workflow, step, error) from error


def _end(workflow: str, step: Step, run: Run, batch: Batch, made: Any) -> None:
    """Check what an op has made, and store it."""
    at = TIMES * step.number
    run.times[at + 2] = time.monotonic_ns()
    if (own_s := step.node.deadline_s) is not None and run.times[at + 2] - run.times[at] > own_s * 1e9:
        took_s = (run.times[at + 2] - run.times[at]) / 1e9
        raise DeadlineExceeded(f"{_place(workflow, step)}: took {took_s:.3f} s, at most {own_s:.3f} s are allowed")
    if not isinstance(made, Mapping) or len(made) != len(step.makes):
        raise _wrong_names(workflow, step, made)
    for name, place, port, freeze in step.makes:
        if name not in made:
            raise _wrong_names(workflow, step, made)
        value = made[name]
        if misfit := port.misfit(value, batch.rows):
            raise Internal(f"{_place(workflow, step)} output {name!r}: found {misfit}, expected {port}")
        if step.guard is not None and batch.rows < run.rows:
            value = put_rows(value, port, _chosen(step, run), run.rows)
        run.values[place] = frozen(value) if freeze else value
    run.times[at + 3] = time.monotonic_ns()


def _wrong_names(workflow: str, step: Step, made: Any) -> Internal:
    expected = ", ".join(make.name for make in step.makes)
    return Internal(f"{_place(workflow, step)} outputs: found {names_of(made)}, expected {expected}")


def _reported(workflow: str, step: Step, error: BaseException) -> Exception:
    """The error that a caller is told of; the log has a fault's trace."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory(f"{_place(workflow, step)}: out of memory")
    log.error("%s failed", _place(workflow, step), exc_info=error)
    return Internal(f"{_place(workflow, step)}: failed; the server's log has it")


def _check_deadline(workflow: str, step: Step, run: Run) -> None:
    """Nothing is computed for callers who have gone."""
    if run.deadline is not None and run.deadline <= time.monotonic():
        raise DeadlineExceeded(f"{_place(workflow, step)}: the deadline has passed")


def _place(workflow: str, step: Step) -> str:
    return f"workflow {workflow!r} node {step.node.name!r}"
