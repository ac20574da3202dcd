"""Which of several engines for one program: the fastest that agrees with the first."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import ServingError
from predictor.engines.engine import Engine, Feed

log = logging.getLogger(__name__)

# How far two engines may be apart: kernels that add in another order differ by a few parts in 10^7 per op of float32.
RTOL, ATOL = 1e-4, 1e-5
# An engine is chosen over one that is named before it only if it saves this share of the time: below, the choice would
# be another one at every start.
LEAST_GAIN = 0.05
_RUNS, _AT_MOST_S = 15, 0.5  # of each engine on each of the requests


class Candidate(NamedTuple):
    """An engine that may run the program. open: raises ServingError where it cannot be had here."""

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
    with a warning. Raises what the first candidate raised if none opens.
    """
    opened, failures = _opened(candidates)
    if not opened:
        raise failures[0]
    first = opened[0][1]
    if len(opened) == 1:
        return first
    feeds = requests(first)
    try:
        wanted = [first.run(each) for each in feeds]
    except ServingError as error:
        log.warning("engine %s is used untimed: %s", opened[0][0], error)
        _close_all_but(first, opened)
        return first
    seconds: dict[str, list[float]] = {}
    best, best_name, best_s = first, "", math.inf
    for name, engine in opened:
        if engine is not first and (why := _disagreement(engine, feeds, wanted)):
            log.warning("engine %s is not used: %s", name, why)
            continue
        seconds[name] = [_median_s(engine, each, clock) for each in feeds]
        if sum(seconds[name]) < best_s * (1 - LEAST_GAIN):
            best, best_name, best_s = engine, name, sum(seconds[name])
    table = "; ".join(f"{name} {' + '.join(f'{1e6 * s:.0f}' for s in each)} µs" for name, each in seconds.items())
    log.info("engine %s chosen: %s", best_name, table)
    _close_all_but(best, opened)
    return best


def _close_all_but(kept: Engine, opened: Sequence[tuple[str, Engine]]) -> None:
    for _, engine in opened:
        if engine is not kept:
            engine.close()


def _opened(candidates: Sequence[Candidate]) -> tuple[list[tuple[str, Engine]], list[ServingError]]:
    opened: list[tuple[str, Engine]] = []
    failures: list[ServingError] = []
    for name, open_candidate in candidates:
        try:
            opened.append((name, open_candidate()))
        except ServingError as error:
            log.info("engine %s is not used: %s", name, error)
            failures.append(error)
    return opened, failures


def _disagreement(engine: Engine, requests: Sequence[Sequence[Feed]], wanted: Sequence[Sequence[NDArray[Any]]]) -> str:
    """How an engine's answers differ from those wanted; empty if they do not."""
    for number, (feeds, arrays) in enumerate(zip(requests, wanted, strict=True)):
        try:
            made = engine.run(feeds)
        except Exception as error:  # whatever it is, the first candidate did not raise it
            return f"request {number} fails ({error})"
        for tensor, one, other in zip(engine.outputs, arrays, made, strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                return f"output {tensor.name!r} is {other.dtype} {other.shape}, not {one.dtype} {one.shape}"
            if not np.allclose(one, other, RTOL, ATOL, equal_nan=True):
                apart = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
                return f"output {tensor.name!r} of request {number} differs by {apart:.3g}"
    return ""


def _median_s(engine: Engine, feeds: Sequence[Feed], clock: Callable[[], float]) -> float:
    """Seconds of a run: the median of up to _RUNS within _AT_MOST_S. The first was done before."""
    taken: list[float] = []
    while len(taken) < _RUNS and sum(taken) < _AT_MOST_S:
        begin = clock()
        engine.run(feeds)
        taken.append(clock() - begin)
    return statistics.median(taken)
