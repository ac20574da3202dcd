"""predictor-server beside a bare loop over the same nets, with batching and without.

A bare loop does what the predictor does to a request between its bytes and its reply. Server and bare loop have one
core, the client the other one. The CTR-DNN takes part where `make demo` has left it.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim

from benchmarks.results import RESULTS, keep
from benchmarks.servers import CLIENT_CORE, SERVER_CORE, on_cores, served
from cube.client import LocalCube
from predictor.client.inference import AsyncClient
from predictor.engines.torch_engine import TorchEngine
from predictor.ops.pool import pool
from trainer_tools import criteo

CTR, LINES = Path("model.pruned"), Path("demo-data/test.tsv")
BATCHES, WORDS, VOCABULARY = (1, 10, 50, 200), 100, 30_000
CALLERS = (1, 8, 64)
IN_FLIGHT = 2  # so that the next request waits when one is done
Bare = Callable[[dict[str, np.ndarray]], np.ndarray]


# ---- nets: the sizes of the ancestor's study of text classification ----


class Text(torch.nn.Module):
    """Word ids [n, WORDS] → probabilities of two classes."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.words = torch.nn.Embedding(VOCABULARY, 128)
        if kind == "CNN":
            self.middle: torch.nn.Module = torch.nn.Conv1d(128, 128, 3)
        elif kind == "LSTM":
            self.middle = torch.nn.LSTM(128, 128, batch_first=True)
        self.head = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.Tanh(), torch.nn.Linear(96, 2))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.words(ids)
        if self.kind == "BOW":
            x = x.sum(1)
        elif self.kind == "CNN":
            x = torch.relu(self.middle(x.transpose(1, 2))).amax(2)
        else:
            x = self.middle(x)[0].amax(1)
        return {"y": self.head(x).softmax(1)}


class Mlp(torch.nn.Module):
    """[n, 16] → [n, 1]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.net(x)}


class Nothing(torch.nn.Module):
    """[n, 16] → the same."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * 1}


NETS = {"no-op": Nothing, "MLP": Mlp, **{kind: lambda kind=kind: Text(kind) for kind in ("BOW", "CNN", "LSTM")}}


def inputs_of(net: str, samples: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if net in ("no-op", "MLP"):
        return {"x": rng.random((samples, 16), np.float32)}
    return {"ids": rng.integers(0, VOCABULARY, (samples, WORDS))}


def exported(folder: Path, net: str) -> Path:
    directory = folder / net
    directory.mkdir()
    example = tuple(map(torch.from_numpy, inputs_of(net, 3, 0).values()))
    program = torch.export.export(NETS[net]().eval(), example, dynamic_shapes=({0: Dim("rows", min=1)},))
    torch.export.save(program, directory / "model.pt2")
    return directory


def bare_net(directory: Path) -> Bare:
    engine = TorchEngine(directory / "model.pt2")
    return lambda inputs: engine.run(list(inputs.values()))[0]


def bare_ctr() -> Bare:
    engine, cube = TorchEngine(CTR / "program.pt2"), LocalCube(CTR / "cube")

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        offsets = np.concatenate([[0], np.cumsum(inputs["lengths"])])
        rows = cube.rows("embedding", None, inputs["keys"]).rows
        return engine.run([inputs["dense"], pool(rows, offsets, "mean")])[0]

    return run


# ---- asking ----


async def asked(
    address: str, model: str, requests: list[dict[str, np.ndarray]], seconds: float, callers: int
) -> tuple[int, float]:
    """Requests answered, and seconds."""
    async with AsyncClient(address) as client:
        end = time.perf_counter() + seconds

        async def caller(number: int) -> int:
            done = 0
            while time.perf_counter() < end:
                await client.infer(model, requests[(number + done * callers) % len(requests)], timeout_s=60)
                done += 1
            return done

        begin = time.perf_counter()
        done = sum(await asyncio.gather(*map(caller, range(callers))))
        return done, time.perf_counter() - begin


async def first_answer(address: str, model: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    async with AsyncClient(address) as client:
        answer: np.ndarray = next(iter((await client.infer(model, inputs, timeout_s=60)).outputs.values()))
        return answer


# ---- served against bare ----


def against_bare(
    name: str, model: str, directory: Path, bare: Bare, requests_of: Callable[[int], list[Any]], options: Any
) -> list[dict[str, Any]]:
    rows = []
    with served("--model", directory) as server:
        for batch in BATCHES:
            requests = requests_of(batch)
            with on_cores(SERVER_CORE):
                expected = bare(requests[0])
            found = asyncio.run(first_answer(server.address, model, requests[0]))
            assert np.abs(found - expected).max() <= 1e-6
            bare_s = served_s = cpu_s = float("inf")
            for _ in range(options.rounds):
                with on_cores(SERVER_CORE):
                    begin, done = time.perf_counter(), 0
                    while time.perf_counter() - begin < options.seconds:
                        bare(requests[done % len(requests)])
                        done += 1
                    bare_s = min(bare_s, (time.perf_counter() - begin) / done)
                before = server.cpu_s()
                with on_cores(CLIENT_CORE):
                    done, took = asyncio.run(asked(server.address, model, requests, options.seconds, IN_FLIGHT))
                served_s, cpu_s = min(served_s, took / done), min(cpu_s, (server.cpu_s() - before) / done)
            rows.append(
                {
                    "net": name,
                    "samples a request": batch,
                    "bare ms": f"{bare_s * 1e3:.3f}",
                    "served ms": f"{served_s * 1e3:.3f}",
                    "served ÷ bare": f"{bare_s / served_s:.2f}",
                    "server CPU ms": f"{cpu_s * 1e3:.3f}",
                    "samples/s": f"{batch / served_s:,.0f}",
                }
            )
            print(rows[-1], flush=True)
    return rows


def ctr_requests(batch: int) -> list[dict[str, np.ndarray]]:
    rows = criteo.read(LINES, max(batch * 40, 400))
    return [{"dense": b.dense, "keys": b.keys, "lengths": b.lengths} for b in rows.batches(batch)][:40]


# ---- batching on and off ----


def batching(name: str, model: str, directory: Path, requests: list[Any], options: Any) -> list[dict[str, Any]]:
    best: dict[tuple[str, int], float] = {}
    cpu: dict[tuple[str, int], float] = {}
    with served("--model", directory) as on, served("--model", directory, "--batching", "off") as off:
        for _ in range(options.rounds):
            for callers in CALLERS:
                for kind, server in (("on", on), ("off", off)):
                    before = server.cpu_s()
                    with on_cores(CLIENT_CORE):
                        done, took = asyncio.run(asked(server.address, model, requests, options.seconds, callers))
                    key = kind, callers
                    best[key] = max(best.get(key, 0.0), done / took)
                    cpu[key] = min(cpu.get(key, float("inf")), (server.cpu_s() - before) / done)
    rows = []
    for callers in CALLERS:
        on_rate, off_rate = best["on", callers], best["off", callers]
        rows.append(
            {
                "net": name,
                "clients of one sample": callers,
                "batching, requests/s": f"{on_rate:,.0f}",
                "without": f"{off_rate:,.0f}",
                "ratio": f"{on_rate / off_rate:.2f}",
                "server CPU µs": f"{cpu['on', callers] * 1e6:,.0f}",
                "CPU without": f"{cpu['off', callers] * 1e6:,.0f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def plot(alone: list[dict[str, Any]], merged: list[dict[str, Any]]) -> None:
    """Both tables as benchmarks/results/serving.svg; a net has one colour."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    def number(row: dict[str, Any], name: str) -> float:
        return float(str(row[name]).replace(",", ""))

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for place, net in enumerate(dict.fromkeys(row["net"] for row in alone)):
        colour = f"C{place}"
        points = [row for row in alone if row["net"] == net]
        sizes = [row["samples a request"] for row in points]
        left.plot(sizes, [number(row, "served ÷ bare") for row in points], color=colour, marker="o", label=net)
        points = [row for row in merged if row["net"] == net]
        callers = [row["clients of one sample"] for row in points]
        right.plot(
            callers, [number(row, "batching, requests/s") for row in points], color=colour, marker="o", label=net
        )
        right.plot(callers, [number(row, "without") for row in points], color=colour, marker="x", linestyle="--")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xscale="log", ylim=(0, None), xlabel="samples a request", ylabel="served ÷ bare, one core each")
    right.set(xscale="log", yscale="log", xlabel="clients of one sample each", ylabel="requests a second")
    right.set_title("batching on (dots) and off (crosses)", fontsize=10)
    for axes, ticks in ((left, BATCHES), (right, CALLERS)):
        axes.set_xticks(ticks, map(str, ticks))
        axes.xaxis.minorticks_off()
        axes.legend(fontsize=8)
    figure.savefig(RESULTS / "serving.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    quick = parser.parse_args().quick
    options = argparse.Namespace(rounds=1 if quick else 3, seconds=1.0 if quick else 2.0)
    torch.set_num_threads(1)
    alone: list[dict[str, Any]] = []
    merged: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for net in NETS:
            directory = exported(folder, net)

            def requests_of(batch: int, net: str = net) -> list[dict[str, np.ndarray]]:
                return [inputs_of(net, batch, seed) for seed in range(20)]

            alone += against_bare(net, net, directory, bare_net(directory), requests_of, options)
            merged += batching(net, net, directory, requests_of(1), options)
        if (CTR / "manifest.json").exists() and LINES.exists():
            alone += against_bare("CTR-DNN", "ctr", CTR, bare_ctr(), ctr_requests, options)
            merged += batching("CTR-DNN", "ctr", CTR, ctr_requests(1), options)
        keep("serving", alone)
        keep("serving-batching", merged)
        plot(alone, merged)


if __name__ == "__main__":
    main()
