"""What serving itself costs: server CPU of a call that does nothing, and time of runs whose nodes do nothing.

A configured service with one op that passes on 16 float32 and no net is asked by our client, by grpcio and over
HTTP/1.1 (as KServe's raw tensors and as JSON, by wrk); beside each stands the same client's call of something that
does not reach a service at all, ServerLive or /healthz: that is the wire. Server and client have a core each; gRPC
clients have one connection. The least CPU of interleaved rounds counts. Answers are compared first.

    make bench WHAT=overhead              about two minutes
    make bench WHAT='overhead --quick'    one round of a second each
"""

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import uvloop

from benchmarks.results import keep
from benchmarks.servers import CLIENT_CORE, on_cores, served, wrk
from cube.rpc.channel import Channel
from predictor.client.inference import SERVICE, AsyncClient
from predictor.executor import Executor
from predictor.ops.op import Batch, Op, Outputs, Port
from predictor.pb import kserve_pb2 as pb
from predictor.tensors import encode
from predictor.workflow import Dependency, Kind, Node, plan

IN_FLIGHT = (1, 8, 64)
TARGETS = {"our client, gRPC": "≤ 80", "grpcio": "≤ 120", "wrk, HTTP/1.1, raw tensors": "≤ 100"}  # µs of server CPU
SERVICE_FILE = 'services { name: "Same" workflows: "same" }\n'
WORKFLOW_FILE = """workflows {
  name: "same"
  workflow_type: "Sequence"
  inputs { name: "x" datatype: "FP32" shape: [-1, 16] }
  nodes { name: "echo" type: "CommonEchoOp" }
}
"""
X = np.arange(16, dtype=np.float32).reshape(1, 16)
PORT = Port("FP32", (-1, 16))
INFER, LIVE = f"{SERVICE}ModelInfer", f"{SERVICE}ServerLive"
RAW_LENGTH = "inference-header-content-length"


# ---- calls ----


def grpc_request() -> bytes:
    request = pb.ModelInferRequest(model_name="Same", raw_input_contents=[encode(X)])
    request.inputs.add(name="x", datatype="FP32", shape=X.shape)
    return bytes(request.SerializeToString())


def json_body() -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": X.shape, "data": X.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def raw_body() -> tuple[bytes, dict[str, str]]:
    """JSON that describes the tensor, then its bytes; and the header that says where those begin."""
    tensor = {"name": "x", "datatype": "FP32", "shape": X.shape, "parameters": {"binary_data_size": X.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + encode(X), {RAW_LENGTH: str(len(head)), "content-type": "application/octet-stream"}


async def repeated(call: Callable[[], Awaitable[object]], in_flight: int, seconds: float) -> int:
    """Calls made, with so many under way at any time."""
    end = time.perf_counter() + seconds

    async def caller() -> int:
        done = 0
        while time.perf_counter() < end:
            await call()
            done += 1
        return done

    return sum(await asyncio.gather(*(caller() for _ in range(in_flight))))


Asked = Callable[[str, int, float], int]  # address, in flight, seconds → calls


def own_client(address: str, in_flight: int, seconds: float) -> int:
    async def ask() -> int:
        async with AsyncClient(address) as client:
            assert np.array_equal((await client.infer("Same", {"x": X})).outputs["x"], X)
            return await repeated(lambda: client.infer("Same", {"x": X}), in_flight, seconds)

    return uvloop.run(ask())


def own_client_live(address: str, in_flight: int, seconds: float) -> int:
    async def ask() -> int:
        async with Channel(address) as channel:
            return await repeated(lambda: channel.call(LIVE, b"", 10), in_flight, seconds)

    return uvloop.run(ask())


def grpcio_client(path: str, message: bytes) -> Asked:
    async def ask(address: str, in_flight: int, seconds: float) -> int:
        async with grpc.aio.insecure_channel(address) as channel:
            method = channel.unary_unary(path)
            reply = await method(message)
            assert path == LIVE or pb.ModelInferResponse.FromString(reply).raw_output_contents[0] == encode(X)
            return await repeated(lambda: method(message), in_flight, seconds)

    return lambda *said: asyncio.run(ask(*said))


def http_client(path: str, body: bytes | None, headers: dict[str, str]) -> Asked:
    def ask(address: str, in_flight: int, seconds: float) -> int:
        url = f"http://{address}{path}"
        if body is None:
            return wrk(url, None, headers, in_flight, seconds).requests
        reply = httpx.post(url, content=body, headers=headers).raise_for_status()
        if RAW_LENGTH in headers:
            assert reply.content[int(reply.headers[RAW_LENGTH]) :] == encode(X)
        else:
            assert reply.json()["outputs"][0]["data"] == X.ravel().tolist()
        with tempfile.NamedTemporaryFile() as file:
            file.write(body)
            file.flush()
            return wrk(url, Path(file.name), headers, in_flight, seconds).requests

    return ask


def clients() -> dict[str, tuple[Asked, Asked]]:
    """What asks, by name: for the service, and for nothing."""
    found: dict[str, tuple[Asked, Asked]] = {
        "our client, gRPC": (own_client, own_client_live),
        "grpcio": (grpcio_client(INFER, grpc_request()), grpcio_client(LIVE, b"")),
    }
    if shutil.which("wrk"):
        path, nothing = "/v2/models/Same/infer", http_client("/healthz", None, {})
        raw, headers = raw_body()
        found["wrk, HTTP/1.1, raw tensors"] = http_client(path, raw, headers), nothing
        found["wrk, HTTP/1.1, JSON"] = http_client(path, json_body(), {"content-type": "application/json"}), nothing
    return found


def calls(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Server CPU of each client's calls."""
    cpu_us: dict[tuple[str, int, int], float] = {}
    rate: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "service.prototxt").write_text(SERVICE_FILE)
        (Path(place) / "workflow.prototxt").write_text(WORKFLOW_FILE)
        with served("--conf", place) as server, on_cores(CLIENT_CORE):
            asked = clients()
            for _ in range(rounds):
                for in_flight in IN_FLIGHT:
                    for name, kinds in asked.items():
                        for kind, ask in enumerate(kinds):
                            before = server.cpu_s()
                            done = ask(server.address, in_flight, seconds)
                            key = name, in_flight, kind
                            found = (server.cpu_s() - before) / done * 1e6
                            cpu_us[key] = min(cpu_us.get(key, found), found)
                            if kind == 0:
                                rate[name, in_flight] = max(rate.get((name, in_flight), 0.0), done / seconds)
    return [
        {
            "client": name,
            "in flight": in_flight,
            "calls/s": f"{rate[name, in_flight]:,.0f}",
            "server CPU µs": f"{cpu_us[name, in_flight, 0]:,.0f}",
            "of nothing": f"{cpu_us[name, in_flight, 1]:,.0f}",
            "target": TARGETS.get(name, ""),
        }
        for name in asked
        for in_flight in IN_FLIGHT
    ]


# ---- runs within this process ----


class Pass(Op):
    """x as it came, under another name."""

    def __init__(self, name: str) -> None:
        self.inputs, self.outputs, self._name = {"x": PORT}, {name: PORT}, name

    def run(self, batch: Batch) -> Outputs:
        return {self._name: batch["x"]}


class PassLater(Pass):
    """The same as a coroutine that waits for nothing."""

    async def run(self, batch: Batch) -> Outputs:
        return {self._name: batch["x"]}


def workflows() -> dict[str, tuple[list[Node], Kind, str]]:
    """Nodes, how they run, and what the time of a run shall be."""
    chain = [Node(f"n{i}", Pass("x"), (Dependency(f"n{i - 1}"),) if i else ()) for i in range(6)]
    return {
        "6 nodes, one after the other": (chain, Kind.SEQUENCE, "≤ 25"),
        "4 nodes at once": ([Node(f"n{i}", Pass(f"y{i}")) for i in range(4)], Kind.PARALLEL, "≤ 100"),
        "4 async nodes at once": ([Node(f"n{i}", PassLater(f"y{i}")) for i in range(4)], Kind.PARALLEL, "≤ 100"),
    }


async def runs(rounds: int) -> list[dict[str, Any]]:
    """Time of a run, the least mean of 20 × rounds times 300 runs."""
    best: dict[str, float] = {}
    with ThreadPoolExecutor(2) as threads:
        executors = {
            name: Executor(plan(name, nodes, {"x": PORT}, kind), threads)
            for name, (nodes, kind, _) in workflows().items()
        }
        for turn in range(20 * rounds + 1):
            for name, executor in executors.items():
                begin = time.perf_counter()
                for _ in range(300):
                    run = executor.start({"x": X}, 1, 1, None)
                    if isinstance(run, Awaitable):
                        run = await run
                took = (time.perf_counter() - begin) / 300
                if turn:  # the first decides where the steps run
                    best[name] = min(best.get(name, took), took)
                assert all(np.array_equal(run.values[at.place], X) for at in executor.plan.outputs.values())
    return [
        {"workflow": name, "µs a run": f"{best[name] * 1e6:.1f}", "target": target}
        for name, (_, _, target) in workflows().items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    quick = parser.parse_args().quick
    rounds, seconds = (1, 1.0) if quick else (3, 2.0)
    keep("overhead-runs", uvloop.run(runs(rounds)))
    keep("overhead", calls(rounds, seconds))


if __name__ == "__main__":
    main()
