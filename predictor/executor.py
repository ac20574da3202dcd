"""Runs one request through a workflow: compute stages in threads, the rest on the event loop."""

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor as Threads
from typing import Any

from cube.rpc.calls import Call
from predictor.ops.op import Values
from predictor.workflow import Stage


class Executor:
    """A workflow ready to run. Keeps nothing of a request."""

    def __init__(self, stages: Sequence[Stage], threads: Threads):
        self._stages, self._threads = stages, threads

    async def run(self, inputs: Mapping[str, Any], call: Call) -> Values:
        """All values that the ops make of a request's inputs, by name."""
        values: Values = dict(inputs)
        loop = asyncio.get_running_loop()
        for stage in self._stages:
            if stage.compute:
                values = await loop.run_in_executor(self._threads, _compute, stage, values, call)
                continue
            for op in stage.ops:
                made = op.run(values, call)
                values |= await made if inspect.isawaitable(made) else made
        return values


def _compute(stage: Stage, values: Values, call: Call) -> Values:
    for op in stage.ops:
        made = op.run(values, call)
        assert isinstance(made, dict), f"{type(op).__name__}.run is a coroutine but says compute"
        values |= made
    return values
