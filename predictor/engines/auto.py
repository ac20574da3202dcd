"""Which of several engines for one program: the fastest that agrees with the first.

They are timed when they are opened, on requests that are made up; or, where requests were recorded, when these have
gone through the workflow, on what then reached the net (`Undecided`).
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData, ServingError
from predictor.engines.engine import Engine, Feed
from predictor.engines.pairing import Unlike, listed, named_as

log = logging.getLogger(__name__)

# How far two engines may be apart: kernels that add in another order differ by a few parts in 10^7 per op of float32.
# ATOL is a share of an output's largest number: probabilities of rare things are small, as is what is wrong with them.
RTOL, ATOL = 1e-4, 1e-5
# An engine is chosen over one that is named before it only if it saves this share of the time: below, the choice would
# be another one at every start.
LEAST_GAIN = 0.05
_RUNS, _AT_MOST_S = 15, 0.5  # of each engine on each of the requests
_MOST_RECORDED = 16  # runs that engines are timed on


class Candidate(NamedTuple):
    """An engine that may run the program. open: raises ServingError where it cannot be had here, BadData for a file
    that is broken."""

    name: str
    open: Callable[[], Engine]


def fastest(
    candidates: Sequence[Candidate],
    requests: Callable[[Engine], Sequence[Sequence[Feed]]],
    clock: Callable[[], float] = time.perf_counter,
) -> Engine:
    """The candidate that needs the least time for all requests together; the others are closed.

    requests: what to run, for an engine of this program; not asked where there is nothing to choose. The first
    candidate that opens is what the others are held to: one that answers otherwise, beyond RTOL and ATOL, is dropped
    with a warning. Whichever is chosen, its inputs and outputs are called as the first one calls them. Raises what the
    first candidate raised if none opens.
    """
    opened = _opened(candidates)
    return _fastest(opened, requests(opened[0][1]) if len(opened) > 1 else [], clock)


class Undecided:
    """The first of several engines, until `decide` has timed all of them on what it was given meanwhile."""

    def __init__(self, candidates: Sequence[Candidate], clock: Callable[[], float] = time.perf_counter):
        """Raises what the first candidate raised if none opens."""
        self._opened, self._clock = _opened(candidates), clock
        self._feeds: list[Sequence[Feed]] = []
        self._take(self._opened[0][1])
        self.run: Callable[[Sequence[Feed]], list[Any]] = self._noting

    def decide(self) -> None:
        """Be the fastest from now on; the others are closed. Without a run before it, the first. No run may be under
        way."""
        best = _fastest(self._opened, self._feeds, self._clock)
        self._opened, self._feeds = [("", best)], []
        self._take(best)
        self.run = best.run

    def close(self) -> None:
        """See Engine."""
        for _, engine in self._opened:
            engine.close()

    def _take(self, engine: Engine) -> None:
        self.platform, self.inputs, self.outputs = engine.platform, engine.inputs, engine.outputs
        self.lod_levels = engine.lod_levels

    def _noting(self, feeds: Sequence[Feed]) -> list[Any]:
        made = self._opened[0][1].run(feeds)
        if len(self._feeds) < _MOST_RECORDED:
            self._feeds.append(feeds)
        return made


def _fastest(
    opened: Sequence[tuple[str, Engine]], feeds: Sequence[Sequence[Feed]], clock: Callable[[], float]
) -> Engine:
    """feeds: of runs; with none of them it is the first engine."""
    first_name, first = opened[0]
    if len(opened) == 1:
        return first
    try:
        wanted = [first.run(each) for each in feeds]
    except ServingError as error:
        log.warning("engine %s is used untimed: %s", first_name, error)
        _close_all_but(first, opened)
        return first
    seconds: dict[str, list[float]] = {}
    best, best_name, best_s = first, first_name, math.inf
    for name, engine in opened:
        if engine is not first and (why := _disagreement(engine, feeds, wanted)):
            log.warning("engine %s is not used: %s", name, why)
            continue
        seconds[name] = [_median_s(engine, each, clock) for each in feeds]
        if sum(seconds[name]) < best_s * (1 - LEAST_GAIN):
            best, best_name, best_s = engine, name, sum(seconds[name])
    rows = ", ".join(str(_rows_of(each)) for each in feeds)
    table = "; ".join(f"{name} {' + '.join(f'{1e6 * s:.0f}' for s in each)} µs" for name, each in seconds.items())
    log.info("engine %s chosen, by runs of %s rows: %s", best_name, rows or "no", table)
    _close_all_but(best, opened)
    return best


def _rows_of(feeds: Sequence[Feed]) -> int:
    """Rows of a run's first input, 1 where there is none."""
    if not feeds:
        return 1
    first = feeds[0]
    return first[1].size - 1 if isinstance(first, tuple) else first.shape[0] if first.ndim else 1


def _close_all_but(kept: Engine, opened: Sequence[tuple[str, Engine]]) -> None:
    for _, engine in opened:
        if engine is not kept:
            engine.close()


def _opened(candidates: Sequence[Candidate]) -> list[tuple[str, Engine]]:
    """Those that can be had here, and take and make what the first of them does, under its names; at least one."""
    opened: list[tuple[str, Engine]] = []
    failures: list[ServingError] = []
    for name, open_candidate in candidates:
        try:
            engine = open_candidate()
        except ServingError as error:
            # A broken file is a fault; that settings or packages leave an engine out is what AUTO is for.
            level = logging.WARNING if isinstance(error, BadData) and len(candidates) > 1 else logging.INFO
            log.log(level, "engine %s is not used: %s", name, error)
            failures.append(error)
            continue
        try:
            opened.append((name, _under_names_of(opened[0], name, engine) if opened else engine))
        except Unlike as error:
            log.warning("engine %s is not used beside %s: %s", name, opened[0][0], error)
            engine.close()
    if not opened:
        raise failures[0]
    return opened


def _under_names_of(first: tuple[str, Engine], name: str, engine: Engine) -> Engine:
    """The engine, callers of which need not know which one they have. Raises Unlike."""
    first_name, known = first
    renamed = named_as(known, engine)
    if renamed is not engine:
        text = "engine %s: its inputs (%s) and outputs (%s) go by the names that %s has for them (%s; %s)"
        theirs, ours = (engine.inputs, engine.outputs), (known.inputs, known.outputs)
        log.info(text, name, *map(listed, theirs), first_name, *map(listed, ours))
    return renamed


def _disagreement(engine: Engine, requests: Sequence[Sequence[Feed]], wanted: Sequence[Sequence[NDArray[Any]]]) -> str:
    """How an engine's answers differ from those wanted; empty if they do not."""
    largest = [max(map(_largest, arrays)) for arrays in zip(*wanted, strict=True)]
    for number, (feeds, arrays) in enumerate(zip(requests, wanted, strict=True)):
        try:
            made = engine.run(feeds)
        except Exception as error:  # whatever it is, the first candidate did not raise it
            return f"request {number} fails ({error})"
        for tensor, one, other, most in zip(engine.outputs, arrays, made, largest, strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                return f"output {tensor.name!r} is {other.dtype} {other.shape}, not {one.dtype} {one.shape}"
            if not np.allclose(one, other, RTOL, ATOL * most, equal_nan=True):
                apart = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
                return f"output {tensor.name!r} of request {number} differs by {apart:.3g}"
    return ""


def _largest(numbers: NDArray[Any]) -> float:
    """The largest finite number, without its sign."""
    return float(np.max(np.abs(numbers), initial=0, where=np.isfinite(numbers)))


def _median_s(engine: Engine, feeds: Sequence[Feed], clock: Callable[[], float]) -> float:
    """Seconds of a run: the median of up to _RUNS within _AT_MOST_S. The first was done before."""
    taken: list[float] = []
    while len(taken) < _RUNS and sum(taken) < _AT_MOST_S:
        begin = clock()
        engine.run(feeds)
        taken.append(clock() - begin)
    return statistics.median(taken)
