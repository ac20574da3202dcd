"""Who waited for what, when: requests, runs and nodes of a few seconds, as a picture that opens in ui.perfetto.dev.

The format is the JSON object of the Trace Event Format, with events of the phases X (a slice) and M (a name):
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. A process of the picture is a service.
Its rows ("threads") hold requests and runs, each in the first row that is free: slices within a row never overlap, but
those of a request or a run lie within it. Nodes that run beside others of their run have rows of their own.
"""

import asyncio
import contextlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec

from predictor.executor import TIMES, Run
from predictor.profile.counts import Ended, code_of, where
from predictor.service import Service
from predictor.workflow import Plan

MOST_RECORDS = 100_000  # requests and runs of one picture; a run of six nodes takes about a kilobyte

Event = dict[str, Any]


class Slice(NamedTuple):
    """A span of time and the ones within it. Nanoseconds of the monotonic clock."""

    name: str
    category: str
    began: int
    ended: int
    args: dict[str, Any]
    within: tuple["Slice", ...] = ()  # one after the other


class Timeline:
    """What services do while it watches."""

    def __init__(self, most: int = MOST_RECORDS):
        """most: requests and runs that are kept; those that come after are counted."""
        self._most, self._left_out = most, 0
        self._rows: dict[tuple[str, str], list[Slice]] = {}  # by service and kind of row
        self._kept = 0

    @contextlib.contextmanager
    def watching(self, services: Iterable[Service]) -> Iterator[None]:
        """Keep what ends within this block."""
        watched: list[tuple[list[Any], Any]] = []
        for service in services:
            watched.append((service.counts.watchers, self.request))
            name = f"{service.name} {service.version}"
            watched += [(lane.counts.watchers, partial(self.run, name, lane.plan)) for lane in service.lanes]
        for watchers, watch in watched:
            watchers.append(watch)
        try:
            yield
        finally:
            for watchers, watch in watched:
                watchers.remove(watch)

    def request(self, request: Ended) -> None:
        """A request has ended."""
        if self._has_room():
            self._row(f"{request.service} {request.version}", "requests").append(_request(request))

    def run(self, service: str, plan: Plan, run: Run, error: BaseException | None) -> None:
        """A run of a service's workflow has ended."""
        if not self._has_room():
            return
        whole, beside = _run(plan, run, "OK" if error is None else code_of(error))
        self._row(service, f"runs of {plan.name}").append(whole)
        if beside:
            self._row(service, f"beside, in {plan.name}").extend(beside)

    def chrome_trace(self) -> dict[str, Any]:
        """The JSON object of the Trace Event Format. Its slices are in the order of their beginning."""
        services = sorted({service for service, _ in self._rows})
        start = min((slice.began for rows in self._rows.values() for slice in rows), default=0)
        names: list[Event] = []
        slices: list[Event] = []
        for pid, service in enumerate(services, 1):
            names.append(_name("process_name", pid, 0, f"service {service}"))
            tid = 0
            for (_, kind), found in sorted(item for item in self._rows.items() if item[0][0] == service):
                for number, row in enumerate(rows_of(found), 1):
                    tid += 1
                    names.append(_name("thread_name", pid, tid, f"{kind} {number}"))
                    for slice in row:
                        slices += _events(slice, pid, tid, start)
        slices.sort(key=lambda event: (event["ts"], -event["dur"]))
        return {
            "traceEvents": names + slices,
            "displayTimeUnit": "ms",
            "otherData": {"left_out": self._left_out},
        }

    def _has_room(self) -> bool:
        self._kept += 1
        self._left_out += self._kept > self._most
        return self._kept <= self._most

    def _row(self, service: str, kind: str) -> list[Slice]:
        return self._rows.setdefault((service, kind), [])


async def record(services: Iterable[Service], seconds: float) -> bytes:
    """Watch for so long; the picture, as JSON."""
    timeline = Timeline()
    with timeline.watching(services):
        await asyncio.sleep(seconds)
    return await asyncio.to_thread(lambda: msgspec.json.encode(timeline.chrome_trace()))


def rows_of(slices: Iterable[Slice]) -> list[list[Slice]]:
    """The slices in as few rows as can be, none of a row beginning before the one to its left has ended."""
    rows: list[list[Slice]] = []
    busy: list[tuple[int, int]] = []  # until when, and which row
    free: list[int] = []
    for slice in sorted(slices, key=lambda each: each.began):
        while busy and busy[0][0] <= slice.began:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            free.append(len(rows))
            rows.append([])
        row = heapq.heappop(free)
        rows[row].append(slice)
        heapq.heappush(busy, (slice.ended, row))
    return rows


def _request(request: Ended) -> Slice:
    within = []
    shares = [share for each in request.shares for share in each]
    if shares:
        began = max(min(share.run.began for share in shares), request.began)
        ended = min(max(share.run.ended for share in shares), request.ended)
        waited = int(max(share.waited_s for share in shares) * 1e9)
        if waited:
            within.append(Slice("wait", "wait", max(began - waited, request.began), began, {}))
        within.append(Slice("run", "run", began, ended, {"batch_rows": [share.run.rows for share in shares]}))
    args = {"rows": request.rows, "code": request.code, "peer": request.call.peer}
    return Slice(f"request {request.service}", "request", request.began, request.ended, args, tuple(within))


def _run(plan: Plan, run: Run, code: str) -> tuple[Slice, list[Slice]]:
    """A run with those of its nodes that ran one after the other, and those that ran beside them."""
    nodes = sorted(_nodes(plan, run), key=lambda each: each.began)
    within: list[Slice] = []
    beside: list[Slice] = []
    for node in nodes:
        (within if not within or within[-1].ended <= node.began else beside).append(node)
    args = {"rows": run.rows, "code": code}
    return Slice(f"run {plan.name}", "run", run.began, run.ended, args, tuple(within)), beside


def _nodes(plan: Plan, run: Run) -> Iterator[Slice]:
    for step in plan.steps:
        began, op_began, op_ended, ended = run.times[TIMES * step.number : TIMES * (step.number + 1)]
        if not began:
            continue
        args: dict[str, Any] = {"where": where(step, run), "rows": run.rows}
        if ended:
            args |= {"prep_us": (op_began - began) / 1e3, "post_us": (ended - op_ended) / 1e3}
        else:
            args["failed"] = True
        yield Slice(step.node.name, "node", began, ended or run.ended, args)


def _events(slice: Slice, pid: int, tid: int, start: int) -> Sequence[Event]:
    event = {
        "name": slice.name,
        "cat": slice.category,
        "ph": "X",
        "ts": (slice.began - start) / 1e3,
        "dur": (slice.ended - slice.began) / 1e3,
        "pid": pid,
        "tid": tid,
        "args": slice.args,
    }
    return [event, *(inner for each in slice.within for inner in _events(each, pid, tid, start))]


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
