"""CTR-DNN served over gRPC against the same work in a bare loop in one process; needs what `make demo` leaves.

The bare loop does what the predictor does to a request between its bytes and its reply: rows out of the local cube,
pooling, the net.
"""

import asyncio
import os
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.results import keep
from cube.client import LocalCube
from predictor.client.ctr import score
from predictor.client.inference import AsyncClient
from predictor.engines.torch_engine import TorchEngine
from predictor.ops.pool import pool
from trainer_tools import criteo
from trainer_tools.demo import started

MODEL, LINES, SAMPLES, ROUNDS = Path("model.pruned"), Path("demo-data/test.tsv"), 20_000, 3


def bare(batches, engine, cube):
    scores = []
    for batch in batches:
        rows = cube.rows("embedding", None, batch.keys).rows
        (prob,) = engine.run([batch.dense, pool(rows, batch.offsets, mean=True)])
        scores.append(prob[:, 1])
    return np.concatenate(scores)


def server_cpu_s():
    """CPU seconds of the child of ours that is a predictor-server."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and b"predictor-server" in (path / "cmdline").read_bytes():
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    raise ProcessLookupError("predictor-server")


async def served(address, batches, concurrency):
    async with AsyncClient(address) as client:
        return await score(client, "ctr", iter(batches), concurrency, 30)


def main() -> None:
    torch.set_num_threads(1)
    rows = criteo.read(LINES, SAMPLES)
    engine, cube = TorchEngine(MODEL / "program.pt2"), LocalCube(MODEL / "cube")
    table = []
    with started("predictor-server", "--model", MODEL) as address:
        for size in (1, 10, 50, 200):
            batches = list(rows.split(min(SAMPLES, size * 400))[0].batches(size))
            samples = sum(len(b.labels) for b in batches)
            assert np.abs(asyncio.run(served(address, batches, 2)).scores - bare(batches, engine, cube)).max() <= 1e-6
            best = {"bare": float("inf"), "served": float("inf"), "cpu": float("inf")}
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                bare(batches, engine, cube)
                best["bare"] = min(best["bare"], time.perf_counter() - begin)
                before = server_cpu_s()
                best["served"] = min(best["served"], asyncio.run(served(address, batches, 2)).seconds)
                best["cpu"] = min(best["cpu"], server_cpu_s() - before)
            table.append(
                {
                    "batch": size,
                    "bare samples/s": f"{samples / best['bare']:,.0f}",
                    "served samples/s": f"{samples / best['served']:,.0f}",
                    "served ÷ bare": f"{best['bare'] / best['served']:.2f}",
                    "bare ms a batch": f"{best['bare'] / len(batches) * 1e3:.2f}",
                    "server CPU ms a call": f"{best['cpu'] / len(batches) * 1e3:.2f}",
                }
            )
    keep("serving", table)


if __name__ == "__main__":
    main()
