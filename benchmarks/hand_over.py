"""What it costs to run an op apart: wall time and this process's CPU for one batch there and back.

The op makes what it is given. `here` calls it; `thread` is OwnThreads, `process` OwnProcesses, `multiprocessing` what
one would write without them: concurrent.futures.ProcessPoolExecutor, which pickles.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import uvloop

from benchmarks.results import keep
from predictor.apart import OwnThreads
from predictor.ops.op import Batch, Op, Outputs, Port
from predictor.processes import OwnProcesses

ROUNDS = {1 << 10: 3_000, 10 << 20: 100}  # by bytes of a batch
PORTS = {"x": Port("FP32")}


class Echo(Op):
    """Makes what it is given."""

    inputs = outputs = PORTS

    def run(self, batch: Batch) -> Outputs:
        return dict(batch)


def echoed(value: Any) -> Any:
    """For the pool of processes."""
    return value


async def measured(ask: Callable[[Batch], Any], size: int) -> dict[str, str]:
    """Median wall and mean CPU microseconds."""
    batch = Batch(x=np.zeros(size // 4, np.float32))
    batch.rows, batch.deadline = size // 4, None
    walls: list[float] = []
    for number in range(ROUNDS[size] + 20):
        if number == 20:  # warm
            cpu = time.process_time()
        began = time.perf_counter()
        answer = ask(batch)
        if isinstance(answer, Awaitable):
            await answer
        walls.append(time.perf_counter() - began)
    cpu = time.process_time() - cpu
    return {"µs": f"{statistics.median(walls[20:]) * 1e6:.0f}", "CPU µs here": f"{cpu / ROUNDS[size] * 1e6:.0f}"}


async def main() -> None:
    loop = asyncio.get_running_loop()
    here, thread, process = Echo(), OwnThreads(Echo(), 1), OwnProcesses("benchmarks.hand_over:Echo", {}, 1)
    process.bind(PORTS)
    process.open()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        asked: dict[str, Callable[[Batch], Any]] = {
            "here": here.run,
            "thread": thread.run,
            "process": process.run,
            "multiprocessing": lambda batch: loop.run_in_executor(pool, echoed, dict(batch)),
        }
        rows = [
            {"bytes each way": f"{size:,}", "who": name, **await measured(ask, size)}
            for size in ROUNDS
            for name, ask in asked.items()
        ]
    thread.close()
    process.close()
    keep("hand_over", rows)


if __name__ == "__main__":
    uvloop.run(main())
