"""predictor-server beside a bare loop over the same nets, with batching and without, and beside other servers.

A bare loop does what the predictor does to a request between its bytes and its reply. Server and bare loop have one
core, the client the other one. The CTR-DNN takes part where `make demo` has left it. Peers take part where
MOSEC_PYTHON and TRITON_VENV name environments that have them (benchmarks/peers/), and wrk is installed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim

from benchmarks.results import keep
from cube.client import LocalCube
from predictor.client.inference import AsyncClient
from predictor.engines.torch_engine import TorchEngine
from predictor.ops.pool import pool
from trainer_tools import criteo

BIN = Path(sys.executable).parent
SERVER_CORE, CLIENT_CORE = {0}, {(os.cpu_count() and min(1, (os.cpu_count() or 1) - 1)) or 0}
CTR, LINES = Path("model.pruned"), Path("demo-data/test.tsv")
BATCHES, WORDS, VOCABULARY = (1, 10, 50, 200), 100, 30_000
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


# ---- servers ----


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server:
    """A running server, and the CPU it has used with all its children."""

    def __init__(self, command: list[Any], ready: str, **more: Any):
        with on_cores(SERVER_CORE):
            self._process = subprocess.Popen(
                [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, **more,
            )  # fmt: skip
        lines = []
        for line in self._process.stdout or ():
            lines.append(line)
            if found := re.search(ready, line):
                self.address = found[1] if found.groups() else ""
                return
        raise RuntimeError(f"{command[0]}: {''.join(lines)[-2000:]}")

    def cpu_s(self) -> float:
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid:  # its session
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextlib.contextmanager
def served(*directories: Path, flags: tuple[str, ...] = ()) -> Iterator[Server]:
    models = [part for directory in directories for part in ("--model", directory)]
    server = Server(
        [BIN / "predictor-server", *models, "--listen", "127.0.0.1:0", "--compute-threads", "1", *flags],
        r"listening on ([^ ,]+),",
    )
    try:
        yield server
    finally:
        server.end()


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
    with served(directory) as server:
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
    with served(directory) as on, served(directory, flags=("--batching", "off")) as off:
        for _ in range(options.rounds):
            for callers in (1, 8, 64):
                for kind, server in (("on", on), ("off", off)):
                    before = server.cpu_s()
                    with on_cores(CLIENT_CORE):
                        done, took = asyncio.run(asked(server.address, model, requests, options.seconds, callers))
                    key = kind, callers
                    best[key] = max(best.get(key, 0.0), done / took)
                    cpu[key] = min(cpu.get(key, float("inf")), (server.cpu_s() - before) / done)
    rows = []
    for callers in (1, 8, 64):
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


# ---- peers over HTTP JSON ----


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wrk(url: str, body: str, seconds: float) -> tuple[float, str]:
    """Requests a second, and the 99th percentile."""
    script = Path(__file__).parent / "peers" / "post.lua"
    command = ["wrk", "-t1", "-c16", f"-d{max(int(seconds), 1)}s", "--latency", "-s", str(script), url, "--", body]
    with on_cores(CLIENT_CORE):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    assert "Non-2xx" not in done.stdout, done.stdout
    rate, tail = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout), re.search(r"99%\s+(\S+)", done.stdout)
    assert rate is not None, done.stdout + done.stderr
    assert tail is not None, done.stdout
    return float(rate[1]), tail[1]


def peers(folder: Path, directory: Path, options: Any) -> list[dict[str, Any]]:
    """The MLP over HTTP JSON, 16 connections."""
    import httpx

    servers: dict[str, tuple[Server, str]] = {}
    v2 = "/v2/models/MLP/infer"
    ours = Server(
        [BIN / "predictor-server", "--model", directory, "--listen", "127.0.0.1:0", "--compute-threads", "1"],
        r"listening on ([^ ,]+),",
    )
    servers["cube serving"] = ours, f"http://{ours.address}{v2}"
    if python := os.environ.get("MOSEC_PYTHON"):
        for batch in (1, 16):
            port = free_port()
            environment = os.environ | {"MLP": str(directory / "model.pt2"), "MOSEC_BATCH": str(batch)}
            command = [python, Path(__file__).parent / "peers" / "mosec_mlp.py", "--address", "127.0.0.1", "--port"]
            server = Server([*command, port], "starting the server|is starting|http service", env=environment)
            servers[f"mosec, batches of {batch}"] = server, f"http://127.0.0.1:{port}/inference"
    if venv := os.environ.get("TRITON_VENV"):
        servers["tritonserver"] = triton(folder, directory, Path(venv))
    rows: dict[str, dict[str, Any]] = {}
    try:
        for size in (1, 64):
            x = inputs_of("MLP", size, 3)["x"]
            expected = bare_net(directory)({"x": x})
            best: dict[str, tuple[float, str, float]] = {}
            for _ in range(options.rounds):
                for name, (server, url) in servers.items():
                    body = mosec_body(x) if name.startswith("mosec") else v2_body(x)
                    answer = ready_answer(httpx, url, body)
                    found = answer["y"] if name.startswith("mosec") else answer["outputs"][0]["data"]
                    assert np.abs(np.array(found, np.float32).reshape(-1, 1) - expected).max() <= 1e-5, name
                    before = server.cpu_s()
                    rate, tail = wrk(url, body, options.seconds)
                    cpu_s = (server.cpu_s() - before) / (rate * max(int(options.seconds), 1))
                    if name not in best or rate > best[name][0]:
                        best[name] = rate, tail, min(cpu_s, best[name][2] if name in best else cpu_s)
            for name, (rate, tail, cpu_s) in best.items():
                row = rows.setdefault(name, {"server": name})
                row[f"{size} rows: requests/s"] = f"{rate:,.0f}"
                row[f"{size} rows: p99"] = tail
                row[f"{size} rows: server CPU µs"] = f"{cpu_s * 1e6:,.0f}"
    finally:
        for server, _ in servers.values():
            server.end()
    print(*rows.values(), sep="\n", flush=True)
    return list(rows.values())


def ready_answer(httpx: Any, url: str, body: str) -> Any:
    for _ in range(300):
        with contextlib.suppress(httpx.TransportError):
            reply = httpx.post(url, content=body, headers={"content-type": "application/json"})
            if reply.status_code == 200:
                return reply.json()
        time.sleep(0.1)
    raise RuntimeError(f"no answer from {url}")


def v2_body(x: np.ndarray) -> str:
    return json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}]}
    )


def mosec_body(x: np.ndarray) -> str:
    return json.dumps({"x": x.tolist()})


def triton(folder: Path, directory: Path, venv: Path) -> tuple[Server, str]:
    site = next(venv.glob("lib/python*/site-packages"))
    model = folder / "repository" / "MLP"
    (model / "1").mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "peers" / "triton_mlp.py", model / "1" / "model.py")
    layers = [layer for layer in Mlp().net if isinstance(layer, torch.nn.Linear)]
    arrays = {f"w{i}": layer.weight.detach().numpy().T for i, layer in enumerate(layers)}
    np.savez(model / "mlp.npz", **arrays, **{f"b{i}": layer.bias.detach().numpy() for i, layer in enumerate(layers)})
    (model / "config.pbtxt").write_text(
        'backend: "python" max_batch_size: 1024 dynamic_batching { max_queue_delay_microseconds: 500 }\n'
        'input { name: "x" data_type: TYPE_FP32 dims: 16 } output { name: "y" data_type: TYPE_FP32 dims: 1 }\n'
    )
    home = site / "pytriton" / "tritonserver"
    port = free_port()
    environment = os.environ | {
        "TRITON_SITE_PACKAGES": str(site),
        "LD_LIBRARY_PATH": ":".join(map(str, (home / "external_libs", home / "lib", *site.glob("*.libs")))),
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
    }
    command = [home / "bin" / "tritonserver", "--model-repository", folder / "repository", "--http-port", port]
    command += ["--backend-directory", home / "backends", "--allow-grpc=false", "--allow-metrics=false"]
    server = Server([*command, "--http-address=127.0.0.1"], "Started HTTPService", env=environment)
    return server, f"http://127.0.0.1:{port}/v2/models/MLP/infer"


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
        if shutil.which("wrk"):
            keep("serving-http", peers(folder, folder / "MLP", options))


if __name__ == "__main__":
    main()
