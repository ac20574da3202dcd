"""Runs one request through a workflow: long compute stages in threads, everything else on the event loop."""

import asyncio
import inspect
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor as Threads
from typing import Any

from cube.rpc.calls import Call
from predictor.ops.op import Values
from predictor.ops.read import WORK
from predictor.workflow import Stage

# Handing a run to a thread and back costs 0.1 to 0.4 ms of CPU for two futex wake-ups, and several times that where the
# two threads then fight for the GIL between the net's ops (measured on 2 shared cores: a 1.5 ms net cost 4 ms). A run
# expected to be shorter than this stays on the loop, which answers nothing else meanwhile.
SHORT_S = 0.004
_NEWEST_WEIGHT = 0.2


class RunTimes:
    """CPU seconds of a stage's runs by size class: a moving average per power of two of work. Unknown is long.

    CPU time, not wall time: a run in a thread that waits for the GIL would look long, and stay in a thread for ever.
    """

    def __init__(self) -> None:
        self._seconds = [math.inf] * 64

    def is_short(self, work: int) -> bool:
        """Whether a run of so much work is expected to be too short for a thread."""
        return self._seconds[work.bit_length()] < SHORT_S

    def learn(self, work: int, seconds: float) -> None:
        """Take one run into account."""
        known = self._seconds[work.bit_length()]
        fresh = seconds if known == math.inf else known + _NEWEST_WEIGHT * (seconds - known)
        self._seconds[work.bit_length()] = fresh


class Executor:
    """A workflow ready to run. Keeps nothing of a request but how long it took. Owned by the event loop."""

    def __init__(self, stages: Sequence[Stage], threads: Threads):
        self._stages = [(stage, RunTimes()) for stage in stages]
        self._threads = threads

    async def run(self, inputs: Mapping[str, Any], call: Call) -> Values:
        """All values that the ops make of a request's inputs, by name."""
        values: Values = dict(inputs)
        for stage, times in self._stages:
            if not stage.compute:
                for op in stage.ops:
                    made = op.run(values, call)
                    values |= await made if inspect.isawaitable(made) else made
                continue
            if times.is_short(values[WORK]):
                seconds = _compute(stage, values, call)
            else:
                loop = asyncio.get_running_loop()
                seconds = await loop.run_in_executor(self._threads, _compute, stage, values, call)
            times.learn(values[WORK], seconds)
        return values


def _compute(stage: Stage, values: Values, call: Call) -> float:
    """Run a stage's ops, adding what they make to `values`; returns the CPU seconds it took."""
    begin = time.thread_time()
    for op in stage.ops:
        made = op.run(values, call)
        assert isinstance(made, dict), f"{type(op).__name__}.run is a coroutine but says compute"
        values |= made
    return time.thread_time() - begin
