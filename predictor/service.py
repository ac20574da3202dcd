"""predict: check a request, run the service's workflows, answer. The same behind every door; knows no transport."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from cube.errors import BadConfig, BadRequest, DeadlineExceeded, Internal, NotServed
from cube.rpc.calls import Call
from predictor.batching import Batcher, Limits, Share
from predictor.executor import TIMES, Executor, Rest, Run
from predictor.ops.gather import Gather
from predictor.ops.op import Port, Ragged
from predictor.profile.counts import Ended, RequestCounts, RunCounts
from predictor.requests import Form, Request
from predictor.rows import join_rows, slice_rows
from predictor.tensors import Texts, encode
from predictor.workflow import Make
from trainer_tools.manifest import Tensor

log = logging.getLogger(__name__)

# Rows that are answered together and alone, to see whether they mix: recorded ones, and made-up ones in several trials,
# as whole numbers (the tags of a sentence) often come out the same whoever is beside them.
_COMPANY, _MADE_UP, _TRIALS = 3, 16, 4
_EARLY_S = 0.002  # by which a timer of the event loop may go off before its time
_TRIALS_S = 2.0  # for all trials of a workflow; three rows are looked at in any case
_BELOW = (1_000, 2, 1)  # what made-up integers are below: the first that the service does not refuse

Facts = dict[str, int | str]
T = TypeVar("T")  # what a door makes of an answer


class Answer(NamedTuple):
    """Outputs in the order asked for, and what they were made from."""

    service: "Service"
    outputs: dict[str, Any]
    facts: Facts

    def tensors(self) -> dict[str, Any]:
        """The outputs as protocols carry them: of a ragged one its values, and its bags' sizes as NAME.lengths."""
        if not any(isinstance(value, Ragged) for value in self.outputs.values()):
            return self.outputs
        made: dict[str, Any] = {}
        for name, value in self.outputs.items():
            if isinstance(value, Ragged):
                per_row = self.service.outputs[name].per_row
                lengths = np.diff(value.offsets).astype(np.int32)
                made |= {
                    name: value.values,
                    f"{name}.lengths": lengths if per_row == 1 else lengths.reshape(-1, per_row),
                }
            else:
                made[name] = value
        return made


class Lane:
    """One workflow of a service: its executor behind its batcher."""

    def __init__(self, executor: Executor, limits: Limits):
        plan = executor.plan
        self.executor, self.plan, self.counts = executor, plan, RunCounts(plan)
        executor.observe = self.counts.ran
        self.batcher: Batcher[Run] = Batcher(f"workflow {plan.name!r}", executor.start, plan.request, limits)
        if limits.is_on and not plan.can_batch:
            self._run_one_by_one("its values do not all go by rows")
        # What counts keys that were not found, and the tables they were looked for in.
        self._found = [
            make
            for step in plan.steps
            if isinstance(step.node.op.within, Gather)
            for make in step.makes
            if make.port.datatype == "BOOL"
        ]

    async def check_company(self, request: Request, until: float = math.inf) -> None:
        """See that rows are answered in company as they are alone; if not, requests are not merged from now on.

        request: at least two rows. until: time.monotonic() when rows beyond the third are left. Rounding may differ by
        batch size, so numbers are compared loosely.
        """
        if not self.batcher.limits.is_on:
            return
        whole = await self._outputs(request.values, request.rows)
        for row in range(request.rows):
            if row >= _COMPANY and time.monotonic() > until:
                return
            ports = self.plan.request
            alone = {name: slice_rows(value, ports[name], row, row + 1) for name, value in request.values.items()}
            for name, value in (await self._outputs(alone, 1)).items():
                port = self.plan.outputs[name].port
                if not _is_close(slice_rows(whole[name], port, row, row + 1), value):
                    self._run_one_by_one(f"output {name!r} of a row depends on the rows beside it")
                    return

    async def _outputs(self, values: Mapping[str, Any], rows: int) -> dict[str, Any]:
        run: Run = await _whole(self.executor.start(values, rows, rows, None))
        return {name: run.values[make.place] for name, make in self.plan.outputs.items()}

    def _run_one_by_one(self, why: str) -> None:
        log.warning("workflow %s: requests are not merged into batches: %s", self.plan.name, why)
        limits = replace(self.batcher.limits, is_on=False)
        self.batcher = Batcher(f"workflow {self.plan.name!r}", self.executor.start, self.plan.request, limits)

    def explain(self) -> None:
        """Have the errors of requests that come to nothing say where the time went, in a note."""
        self.counts.tells = self.batcher.remembers = True

    def left(self, promise: "asyncio.Future[Any]", error: asyncio.CancelledError) -> None:
        """The caller of a request in company has gone: have the error say what its run has done until now."""
        rest = self.batcher.under_way.get(promise)
        if isinstance(rest, Rest):
            error.add_note(self.counts.note(rest.run))

    def absent(self, shares: Sequence[Share[Run]]) -> int:
        """Keys of a request that no table has."""
        return sum(_absent(share, make) for share in shares for make in self._found)


def _absent(share: Share[Run], make: Make) -> int:
    found = slice_rows(share.run.values[make.place], make.port, share.start, share.stop)
    marks: Any = found.values if isinstance(found, Ragged) else found
    return int(marks.size - np.count_nonzero(marks))


def _is_close(one: Any, other: Any) -> bool:
    """Whether two answers are the same but for rounding, which is judged by their largest number.

    Whole numbers are to be the same: that those of two nearly equal scores change places is rare, and costs speed only.
    """
    if isinstance(one, Ragged):
        return np.array_equal(one.offsets, other.offsets) and _is_close(one.values, other.values)
    if isinstance(one, Texts):
        return one.shape == other.shape and encode(one) == encode(other)
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    largest = float(np.nanmax(np.abs(other), initial=0.0, where=np.isfinite(other)))
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-3, atol=1e-5 * largest, equal_nan=True)


class Service:
    """A request's way through one or several workflows. Owned by the event loop."""

    def __init__(
        self,
        name: str,
        version: str,
        platform: str,
        form: Form,
        lanes: Sequence[Lane],
        *,
        tables: Mapping[str, str] | None = None,
        at_once: bool = False,
    ):
        """lanes: workflows, whose replies are put together. tables: version of each that they read. at_once: lanes run
        at the same time, else one after the other. Raises BadConfig for two that make an output of one name."""
        self.name, self.version, self.platform, self.form, self.lanes = name, version, platform, form, lanes
        self.tables, self._at_once, self.counts = dict(tables or {}), at_once, RequestCounts()
        self.recorders: list[Callable[[Mapping[str, Any]], None]] = []  # told what each answered request held
        self.reply_heads: dict[Any, bytes] = {}  # what a door remembers of replies
        self.outputs: dict[str, Port] = {}
        for lane in lanes:
            for output, make in lane.plan.outputs.items():
                if output in self.outputs:
                    what = f"workflow {lane.plan.name!r} output {output!r}"
                    raise BadConfig(f"service {name!r} {what}", "another workflow makes it too", "one")
                self.outputs[output] = make.port
        self.inputs: list[Tensor] = form.tensors()
        self._facts: Facts = {f"table.{table}": version for table, version in self.tables.items()}

    def output_tensors(self) -> list[Tensor]:
        """The outputs as metadata lists them; see Answer.tensors."""
        made: list[Tensor] = []
        for name, port in self.outputs.items():
            made.append(Tensor(name, port.datatype, list(port.shape)))
            if port.ragged:
                made.append(Tensor(f"{name}.lengths", "INT32", [-1] if port.per_row == 1 else [-1, port.per_row]))
        return made

    def infer(
        self,
        inputs: Mapping[str, Any],
        wanted: Sequence[str],
        call: Call,
        priority: int = 0,
        *,
        then: Callable[[Answer], T],
    ) -> T | Awaitable[T]:
        """Run a request; what `then` makes of its answer, whose time counts as the request's.

        inputs: numpy arrays and Texts by name; wanted: names of outputs, all if empty. Raises BadRequest, Overloaded,
        DeadlineExceeded, and what the workflows and `then` raise.
        """
        if self.recorders:
            then = self._recorded(inputs, then)
        began, rows = time.monotonic_ns(), 0
        try:
            for output in wanted:
                if output not in self.outputs:
                    known = ", ".join(self.outputs)
                    raise BadRequest(f"output {output!r}", "a name the model does not make", f"one of {known}")
            request = self.form.read(inputs)
            rows = request.rows

            def answered(*each: list[Share[Run]]) -> T:
                made = then(self._answer(request, each, wanted))
                self._ended(call, began, rows, each)
                return made

            if len(self.lanes) == 1:
                made = self._submit(self.lanes[0], request, call, priority, answered)
            else:
                made = self._several(request, call, priority, answered)
        except Exception as error:
            self._ended(call, began, rows, (), error)
            raise
        if isinstance(made, asyncio.Future):
            self.counts.in_flight += 1
            made.add_done_callback(partial(self._landed, call, began, rows))
            return made
        return self._later(call, began, rows, cast("Awaitable[T]", made)) if hasattr(made, "__await__") else made

    async def debug(self, inputs: Mapping[str, Any], call: Call) -> dict[str, dict[str, Any]]:
        """Run a request alone; of each workflow and node: what it made, and its microseconds. No batching."""
        request = self.form.read(inputs)
        told: dict[str, dict[str, Any]] = {}
        for lane in self.lanes:
            started = lane.executor.start(self._values(lane, request), request.rows, request.work, call.deadline)
            run = await started if isinstance(started, Awaitable) else started
            told[lane.plan.name] = {
                step.node.name: {
                    "outputs": {make.name: run.values[make.place] for make in step.makes},
                    "began_us": max(run.times[TIMES * step.number] - run.began, 0) / 1e3,
                    "took_us": (run.times[TIMES * step.number + 3] - run.times[TIMES * step.number]) / 1e3,
                }
                for step in lane.plan.steps
            }
        return told

    async def warm_up(self, requests: Sequence[Mapping[str, Any]] = ()) -> None:
        """Run requests, so that every op and kernel has run, and see whether their rows mix. Raises what that raises.

        requests: as callers send them. Default: two samples of zeros.
        """
        with self._uncounted():
            for request in requests or self.form.examples(2):
                await _whole(self.infer(request, (), Call("warm-up"), then=_itself))
            if requests:
                read = [self.form.read(request) for request in requests]
                for lane in self.lanes:
                    if lane.batcher.limits.is_on:
                        await lane.check_company(_company(lane.plan.request, read))

    async def try_company(self) -> None:
        """See whether made-up rows mix. Raises what the workflows raise where they take none of them."""
        with self._uncounted():
            for lane in self.lanes:
                with ExitStack() as stack:
                    for step in lane.plan.steps:
                        if isinstance(step.node.op.within, Gather):
                            stack.enter_context(step.node.op.within.with_made_up_rows())
                    await self._try_company(lane)

    async def _try_company(self, lane: Lane) -> None:
        until, below, trial = time.monotonic() + _TRIALS_S, list(_BELOW), 0
        while lane.batcher.limits.is_on and trial < _TRIALS and (not trial or time.monotonic() < until):
            try:
                made_up = self.form.sample(_MADE_UP, trial, below[0])
                values = {name: made_up.values[name] for name in lane.plan.request}
                await lane.check_company(made_up._replace(values=values), until)
                trial += 1
            except (BadRequest, Internal):
                if len(below) == 1:
                    raise
                del below[0]

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Nobody has asked for what runs in this block."""
        try:
            yield
        finally:
            self.counts.clear()
            for lane in self.lanes:
                lane.counts.clear()

    def _recorded(self, inputs: Mapping[str, Any], then: Callable[[Answer], T]) -> Callable[[Answer], T]:
        """The same, and what the request held is told to those who record."""

        def noted(answer: Answer) -> T:
            made = then(answer)
            for record in self.recorders:
                record(inputs)
            return made

        return noted

    # ---- a request's way ----

    def _values(self, lane: Lane, request: Request) -> Mapping[str, Any]:
        if len(self.lanes) == 1:
            return request.values
        return {name: request.values[name] for name in lane.plan.request}

    def _submit(
        self, lane: Lane, request: Request, call: Call, priority: int, then: Callable[[list[Share[Run]]], T]
    ) -> T | Awaitable[T]:
        values = self._values(lane, request)
        return lane.batcher.submit(values, request.rows, request.work, call.deadline, priority, then=then)

    async def _several(self, request: Request, call: Call, priority: int, then: Callable[..., T]) -> T:
        """Run all lanes."""
        if not self._at_once:
            return then(*[await self._shares(lane, request, call, priority) for lane in self.lanes])
        try:
            async with asyncio.TaskGroup() as group:  # one that fails ends the others
                tasks = [group.create_task(self._shares(lane, request, call, priority)) for lane in self.lanes]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return then(*[task.result() for task in tasks])

    async def _shares(self, lane: Lane, request: Request, call: Call, priority: int) -> list[Share[Run]]:
        made = self._submit(lane, request, call, priority, _itself)
        try:
            return cast("list[Share[Run]]", await _whole(made))
        except asyncio.CancelledError as gone:
            if isinstance(made, asyncio.Future):
                lane.left(made, gone)
            raise

    def _landed(self, call: Call, began: int, rows: int, future: "asyncio.Future[Any]") -> None:
        """A request that was in company has its answer, which `infer` has counted, or has none."""
        self.counts.in_flight -= 1
        if future.cancelled():
            gone = asyncio.CancelledError()
            self.lanes[0].left(future, gone)  # there is one: several are waited for by a coroutine
            self._ended(call, began, rows, (), _late(call, gone))
        elif (error := future.exception()) is not None:
            self._ended(call, began, rows, (), error)

    async def _later(self, call: Call, began: int, rows: int, made: Awaitable[T]) -> T:
        self.counts.in_flight += 1
        try:
            return await made
        except asyncio.CancelledError as error:
            self._ended(call, began, rows, (), _late(call, error))
            raise
        except BaseException as error:
            self._ended(call, began, rows, (), error)
            raise
        finally:
            self.counts.in_flight -= 1

    def _ended(
        self,
        call: Call,
        began: int,
        rows: int,
        each: Sequence[list[Share[Run]]],
        error: BaseException | None = None,
    ) -> None:
        """Count a request, and tell those who watch."""
        ended, counts, code = time.monotonic_ns(), self.counts, "OK"
        if error is None:
            counts.answered(ended - began, rows)
            for lane, shares in zip(self.lanes, each, strict=True):
                for share in shares:
                    lane.counts.waited(share.waited_s)
        else:
            code = counts.failed(error)
        if counts.watchers:
            plans = [lane.plan for lane in self.lanes]
            notes = getattr(error, "__notes__", ())
            request = Ended(self.name, self.version, call, began, ended, rows, plans, each, code, notes)
            for watch in counts.watchers:
                watch(request)

    def _answer(self, request: Request, each: Sequence[list[Share[Run]]], wanted: Sequence[str]) -> Answer:
        outputs: dict[str, Any] = {}
        for lane, shares in zip(self.lanes, each, strict=True):
            for name, make in lane.plan.outputs.items():
                if not wanted or name in wanted:
                    outputs[name] = _put_together(shares, make)
        facts = self._facts
        if self.tables:
            absent = sum(lane.absent(shares) for lane, shares in zip(self.lanes, each, strict=True))
            facts = {"keys": request.keys, "keys_absent": absent, **facts}
            self.counts.looked_up(request.keys, absent)
        return Answer(self, {name: outputs[name] for name in wanted} if wanted else outputs, facts)


def _put_together(shares: Sequence[Share[Run]], make: Make) -> Any:
    """A request's part of an output."""
    first = shares[0]
    if len(shares) == 1:
        value, rows = first.run.values[make.place], first.run.rows
        return value if first.stop - first.start == rows else slice_rows(value, make.port, first.start, first.stop)
    parts = [slice_rows(share.run.values[make.place], make.port, share.start, share.stop) for share in shares]
    return join_rows(parts, make.port)


def _itself(answer: T) -> T:
    return answer


def _late(call: Call, gone: asyncio.CancelledError) -> BaseException:
    """What a request that nobody waits for any more has ended by: its deadline, or its caller has left."""
    if call.deadline is None or time.monotonic() < call.deadline - _EARLY_S:
        return gone
    late = DeadlineExceeded(f"{call.path}: no answer in time")
    for note in getattr(gone, "__notes__", ()):
        late.add_note(note)
    return late


async def _whole(answer: Any) -> Any:
    return await answer if isinstance(answer, Awaitable) else answer


def _company(ports: Mapping[str, Port], requests: Sequence[Request]) -> Request:
    """A request of the first rows of others, again and again where they are few."""
    parts, rows = [], 0
    for request in itertools.cycle(requests):
        if rows == _COMPANY:
            break
        taken = min(request.rows, _COMPANY - rows)
        parts.append({name: slice_rows(request.values[name], port, 0, taken) for name, port in ports.items()})
        rows += taken
    values = {name: join_rows([part[name] for part in parts], port) for name, port in ports.items()}
    return Request(values, rows, rows, requests[0].keys)


class InferenceService:
    """The services of a process. Owned by the event loop."""

    def __init__(self, services: Sequence[Service]):
        self.services = {service.name: service for service in services}
        self.not_served = 0  # requests, since start

    def service(self, name: str, version: str = "") -> Service:
        """A service by name and version, any version if empty; raises NotServed."""
        service = self.services.get(name)
        if service is None:
            self.not_served += 1
            raise NotServed(f"model {name!r}", sorted(self.services))
        if version not in ("", service.version):
            self.not_served += 1
            raise NotServed(f"model {name!r} version {version!r}", [service.version])
        return service
