"""Requests per second of one workflow, with its slow part in the same node as the rest, and in processes of its own.

    python -m examples.ocr_like [--requests 100] [--rounds 5] [--concurrency 2]

Both are open at the same time and take turns; the best round of each counts, since a machine may be shared. Pages are
made beforehand and passed within this process, so that no client competes for the cores. Answers are compared.
"""

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import uvloop

from examples.ocr_like.pages import PAGE, SIDE, PrepareAndRecognise, Recognise
from predictor.executor import Executor, Run
from predictor.processes import OwnProcesses
from predictor.workflow import Dependency, Node, plan

AT_ONCE = 16  # requests in flight


def workflows(concurrency: int) -> dict[str, list[Node]]:
    """The nodes of both workflows. concurrency: processes of the second one's slow node."""
    prepare = OwnProcesses("examples.ocr_like.pages:Prepare", {}, concurrency, place="node 'prepare'")
    return {
        "one node": [Node("both", PrepareAndRecognise())],
        f"split, {concurrency} processes": [
            Node("prepare", prepare, is_apart=True),
            Node("recognise", Recognise(), (Dependency("prepare"),)),
        ],
    }


async def answered(executor: Executor, pages: np.ndarray) -> tuple[np.ndarray, float]:
    """Letters of each page, asked for one by one with AT_ONCE requests in flight; requests per second."""
    letters = executor.plan.outputs["letters"].place
    found = [np.empty(0)] * len(pages)
    numbers = iter(range(len(pages)))

    async def ask() -> None:
        for number in numbers:
            run = executor.start({"page": pages[number : number + 1]}, 1, 1, None)
            done: Run = await run if isinstance(run, Awaitable) else run
            found[number] = done.values[letters]

    began = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    return np.concatenate(found), len(pages) / (time.perf_counter() - began)


async def compare(requests: int, rounds: int, concurrency: int) -> None:
    """Print the best round of both, their ratio, and that their answers are the same."""
    pages = np.random.default_rng(0).integers(0, 256, (requests, SIDE, SIDE), np.uint8)
    made = workflows(concurrency)
    best = dict.fromkeys(made, 0.0)
    letters: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))
        executors = {name: Executor(plan("ocr", nodes, {"page": PAGE}), threads) for name, nodes in made.items()}
        for node in (node for nodes in made.values() for node in nodes):
            node.op.open()
            stack.callback(node.op.close)
        for executor in executors.values():
            await answered(executor, pages[: 2 * AT_ONCE])  # warm-up
        for _ in range(rounds):
            for name, executor in executors.items():
                letters[name], per_s = await answered(executor, pages)
                best[name] = max(best[name], per_s)
    for name, per_s in best.items():
        print(f"{name}: {per_s:.0f} requests/s")
    one, split = best.values()
    print(f"ratio: {split / one:.2f}, with {len(os.sched_getaffinity(0))} cores")
    if not np.allclose(*letters.values(), rtol=1e-5, atol=1e-6):
        raise SystemExit("the answers differ")
    print(f"the same answers to {requests} requests", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100, help="of one page each, a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=2, help="processes")
    said = parser.parse_args()
    uvloop.run(compare(said.requests, said.rounds, said.concurrency))
