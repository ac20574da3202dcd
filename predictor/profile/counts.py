"""What is counted of every request and every run, whether somebody looks or not. Owned by the event loop.

Counting a run is to keep its times; several hundred are added up at once, by numpy. Seconds are counted in nanoseconds,
in buckets: the number of a value's bucket is its number of bits, so bucket b holds 2**(b - 1) to 2**b - 1. Latencies of
requests have 16 buckets for each of these, which is what percentiles are read from.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import to_wire
from cube.rpc.calls import Call
from predictor.batching import Share
from predictor.executor import TIMES, Run
from predictor.workflow import Plan, Step

BITS = 64  # buckets of a histogram
_FINE = 4  # bits that latencies are told apart by, below the highest one
_RUNS_AT_ONCE = 512
_ABOUT = 3  # numbers of a run beside its times: begin, end, rows

Counts = NDArray[np.int64]


class RunTotals(NamedTuple):
    """Of one workflow since start. Nodes are in the order of its plan."""

    runs: int  # that ended well
    rows: int  # of these
    run_ns: int
    runs_by_ns: Counts  # int64[BITS]
    runs_by_rows: Counts  # int64[BITS], by the bits of rows - 1: bucket b ends at 2**b
    waits_by_ns: Counts  # int64[BITS]: of requests, from their arrival until their run began
    wait_ns: int
    node_runs: Counts  # int64[nodes]
    node_ns: Counts  # int64[nodes]: from begin to end
    nodes_by_ns: Counts  # int64[nodes, BITS], the same
    phases_ns: Counts  # int64[nodes, 5]: PHASES
    failures: Mapping[tuple[str, str], int]  # runs that failed, by node (empty: none had begun) and status code


# What a run spends on a node: from when the values it takes were there until it began, preparing them, its op, checking
# and storing what that made, and until somebody took it: the first of the nodes that depend on it, or the run's end.
PHASES = ("in", "prep", "run", "post", "out")


class RunCounts:
    """Of one workflow."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.tells = False  # whether a failed run leaves a note with its error, of where its time went
        self.watchers: list[Callable[[Run, BaseException | None], None]] = []
        self._names = [step.node.name for step in plan.steps]
        number = {name: at for at, name in enumerate(self._names)}
        self._edges = [(step.number, number[d.node]) for step in plan.steps for d in step.node.dependencies]
        self._width = _ABOUT + TIMES * len(plan.steps)
        self.clear()

    def clear(self) -> None:
        """Begin at zero."""
        nodes = len(self._names)
        self._unsettled: list[int] = []
        self._runs = self._rows = self._run_ns = self._wait_ns = 0
        self._waits = [0] * BITS
        self._runs_by_ns, self._runs_by_rows = np.zeros(BITS, np.int64), np.zeros(BITS, np.int64)
        self._node_runs, self._node_ns = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
        self._nodes_by_ns, self._phases_ns = np.zeros((nodes, BITS), np.int64), np.zeros((nodes, 5), np.int64)
        self._failures: dict[tuple[str, str], int] = {}

    def ran(self, run: Run, error: BaseException | None) -> None:
        """A run has ended."""
        if error is None:
            unsettled = self._unsettled
            unsettled += (run.began, run.ended, run.rows)
            unsettled += run.times
            if len(unsettled) >= _RUNS_AT_ONCE * self._width:
                self._settle()
        else:
            self._failed(run, error)
        if self.watchers:
            for watch in self.watchers:
                watch(run, error)

    def waited(self, seconds: float) -> None:
        """A request, or a part of one, waited so long for its run to begin."""
        ns = int(seconds * 1e9)
        self._waits[ns.bit_length()] += 1
        self._wait_ns += ns

    def totals(self) -> RunTotals:
        """All of it so far."""
        self._settle()
        return RunTotals(
            runs=self._runs,
            rows=self._rows,
            run_ns=self._run_ns,
            runs_by_ns=self._runs_by_ns.copy(),
            runs_by_rows=self._runs_by_rows.copy(),
            waits_by_ns=np.array(self._waits, np.int64),
            wait_ns=self._wait_ns,
            node_runs=self._node_runs.copy(),
            node_ns=self._node_ns.copy(),
            nodes_by_ns=self._nodes_by_ns.copy(),
            phases_ns=self._phases_ns.copy(),
            failures=dict(self._failures),
        )

    def note(self, run: Run) -> str:
        """Where the time of a run went, until now if it goes on."""
        return f"workflow {self.plan.name}: {told(self.plan, run)}"

    def _failed(self, run: Run, error: BaseException) -> None:
        begun = [at for at in range(len(self._names)) if run.times[TIMES * at] and not run.times[TIMES * at + 3]]
        # Of several that ran at once, those that went on when one failed look the same: the last one to begin is named.
        name = self._names[max(begun, key=lambda at: run.times[TIMES * at])] if begun else ""
        key = name, code_of(error)
        self._failures[key] = self._failures.get(key, 0) + 1
        if self.tells:
            # Goes where the error goes; in the place of an older one, for an op may raise the same object every time.
            error.__notes__ = [self.note(run)]

    def _settle(self) -> None:
        """Add up the runs that were kept."""
        unsettled, self._unsettled = self._unsettled, []
        kept = np.fromiter(unsettled, np.int64, len(unsettled)).reshape(-1, self._width)
        began, ended, rows = kept[:, 0], kept[:, 1], kept[:, 2]
        self._runs += len(kept)
        self._rows += int(rows.sum())
        self._run_ns += int((ended - began).sum())
        self._runs_by_ns += _by_bits(ended - began)
        self._runs_by_rows += _by_bits(rows - 1)
        times = kept[:, _ABOUT:].reshape(len(kept), len(self._names), TIMES)
        begins, ends = times[:, :, 0], times[:, :, TIMES - 1]
        # Of each node and run: when the node might have begun, its own times, when somebody took what it made.
        borders = np.empty((len(kept), len(self._names), TIMES + 2), np.int64)
        borders[:, :, 0], borders[:, :, 1:-1], borders[:, :, -1] = began[:, None], times, ended[:, None]
        ready, taken = borders[:, :, 0], borders[:, :, -1]
        soonest = np.where(begins > 0, begins, np.iinfo(np.int64).max)  # a node that did not run takes nothing
        for at, other in self._edges:  # `at` takes from `other`
            np.maximum(ready[:, at], ends[:, other], out=ready[:, at])
            np.minimum(taken[:, other], soonest[:, at], out=taken[:, other])
        did_run = begins > 0
        self._node_runs += did_run.sum(axis=0)
        self._phases_ns += (np.diff(borders, axis=2) * did_run[:, :, None]).sum(axis=0)
        took = ends - begins
        self._node_ns += took.sum(axis=0)
        places = np.arange(len(self._names)) * BITS + _bits(took)
        self._nodes_by_ns += np.bincount(places[did_run], minlength=self._nodes_by_ns.size).reshape(-1, BITS)


def _bits(values: Counts) -> Counts:
    """The number of bits of each value, none below 0."""
    return np.frexp(values.astype(np.float64))[1]


def _by_bits(values: Counts) -> Counts:
    """int64[BITS]: how many of the values, none below 0, have so many bits."""
    return np.bincount(_bits(values), minlength=BITS)


def code_of(error: BaseException) -> str:
    """The gRPC status of what a request or a run ended by; nobody waits any more for one that is cancelled."""
    return to_wire(error).code if isinstance(error, Exception) else "CANCELLED"


def told(plan: Plan, run: Run) -> str:
    """Where the time of a run went, in milliseconds. rest: waiting for a thread, and for the event loop after it."""
    took: dict[str, str] = {}
    whole_end = run.ended or time.monotonic_ns()
    left = whole_end - run.began
    for step in plan.steps:
        began, _, _, ended = run.times[TIMES * step.number : TIMES * (step.number + 1)]
        ns = (ended or whole_end) - began if began else 0
        left -= ns
        took[step.node.name] = f"{ns / 1e6:.1f}" + (" unfinished" if began and not ended else "")
    took["rest"] = f"{max(left, 0) / 1e6:.1f}"
    nodes = ", ".join(f"{name} {ms}" for name, ms in took.items())
    so_far = "" if run.ended else " so far"
    return f"run {(whole_end - run.began) / 1e6:.1f} ms{so_far} ({run.rows} rows: {nodes})"


def where(step: Step, run: Run) -> str:
    """What a step of a run ran on."""
    if step.node.is_apart:
        return "threads or processes of its own"
    return "thread" if step.number in run.in_threads else "event loop"


class Ended(NamedTuple):
    """A request that has ended, for those who watch. Nanoseconds of the monotonic clock."""

    service: str
    version: str
    call: Call
    began: int
    ended: int
    rows: int  # 0: it was refused before that was known
    plans: Sequence[Plan]  # the service's workflows
    shares: Sequence[Sequence[Share[Run]]]  # of each; empty where it failed
    code: str  # gRPC status
    notes: Sequence[str] = ()  # that its runs left, where it failed


class RequestTotals(NamedTuple):
    """Of one service since start."""

    by_code: Mapping[str, int]  # requests by gRPC status code
    rows: int  # of those that ended well, and so on
    keys: int  # that were asked for
    keys_absent: int  # of these, in no table
    ns: int
    by_ns: Counts  # int64[BITS << 4], finely: see `percentile` and `by_bits`


class _Reading:
    """A block in which a door reads a request: what is raised there is counted as a request that failed."""

    def __init__(self, counts: "RequestCounts"):
        self._counts = counts

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._counts.failed(error)


class RequestCounts:
    """Of one service."""

    def __init__(self) -> None:
        self.reading = _Reading(self)
        self.watchers: list[Callable[[Ended], None]] = []
        self.in_flight = 0  # that wait for something
        self.clear()

    def clear(self) -> None:
        """Begin at zero."""
        self._by_code = {"OK": 0}
        self._rows = self._keys = self._keys_absent = self._ns = 0
        self._by_ns = [0] * (BITS << _FINE)

    def answered(self, ns: int, rows: int) -> None:
        """A request was answered in so many nanoseconds."""
        self._by_code["OK"] += 1
        self._rows += rows
        self._ns += ns
        ns |= 1 << _FINE  # which no request is faster than
        bits = ns.bit_length()
        self._by_ns[(bits << _FINE) + (ns >> (bits - 1 - _FINE)) - (1 << _FINE)] += 1

    def looked_up(self, keys: int, absent: int) -> None:
        """An answered request had so many keys, of which so many are in no table."""
        self._keys += keys
        self._keys_absent += absent

    def failed(self, error: BaseException) -> str:
        """A request was refused, or failed, or its caller has gone; its status code."""
        code = code_of(error)
        self._by_code[code] = self._by_code.get(code, 0) + 1
        return code

    def totals(self) -> RequestTotals:
        """All of it so far."""
        by_ns = np.array(self._by_ns, np.int64)
        return RequestTotals(dict(self._by_code), self._rows, self._keys, self._keys_absent, self._ns, by_ns)


def percentile(by_ns: Counts, share: float) -> float:
    """Nanoseconds that so large a share of requests did not exceed, to within 4 %; 0 for no requests.

    by_ns: int64[BITS << 4], as RequestTotals has it. share: above 0, at most 1.
    """
    below = np.cumsum(by_ns)
    if not below[-1]:
        return 0.0
    at = int(np.searchsorted(below, np.ceil(share * below[-1])))
    bits, part = at >> _FINE, at & ((1 << _FINE) - 1)
    return ((1 << _FINE) + part + 0.5) * 2.0 ** (bits - 1 - _FINE)


def by_bits(by_ns: Counts) -> Counts:
    """int64[BITS]: the same requests, coarsely."""
    coarse: Counts = by_ns.reshape(BITS, -1).sum(axis=1)
    return coarse
