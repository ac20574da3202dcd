"""The small MLP over HTTP JSON: predictor-server, mosec and tritonserver, each on one core, asked by wrk from another.

Answers are compared before each round; CPU is that of all processes of a server. Peers take part where MOSEC_PYTHON and
TRITON_VENV name environments that have them (benchmarks/README.md).

    make bench WHAT=http_peers              about a minute
    make bench WHAT='http_peers --quick'    one round of a second each
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch

from benchmarks.results import keep
from benchmarks.servers import Load, Server, free_port, served, wrk
from benchmarks.serving import Mlp, bare_net, exported, inputs_of

PEERS = Path(__file__).parent / "peers"
CONNECTIONS = 16
JSON = {"content-type": "application/json"}


class Peer(NamedTuple):
    """A running server, and how it is asked."""

    server: Server
    url: str
    is_v2: bool  # KServe's body; else {"x": rows} → {"y": rows}

    def body(self, x: np.ndarray) -> str:
        if self.is_v2:
            tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
            return json.dumps({"inputs": [tensor]})
        return json.dumps({"x": x.tolist()})

    def answer(self, body: str) -> np.ndarray:
        """float32[n, 1]; waits for a server that does not answer yet."""
        said = "nobody there"
        for _ in range(100):
            with contextlib.suppress(httpx.TransportError):
                reply = httpx.post(self.url, content=body, headers=JSON)
                if reply.status_code == 200:
                    found = reply.json()["outputs"][0]["data"] if self.is_v2 else reply.json()["y"]
                    return np.array(found, np.float32).reshape(-1, 1)
                said = reply.text
            time.sleep(0.1)
        raise RuntimeError(f"no answer from {self.url}: {said}")


@contextlib.contextmanager
def running(folder: Path, directory: Path) -> Iterator[dict[str, Peer]]:
    """Ours and the peers that are there, by name. directory: of the exported MLP."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(served("--model", directory))
        peers = {"cube serving": Peer(ours, f"http://{ours.address}/v2/models/MLP/infer", True)}
        if python := os.environ.get("MOSEC_PYTHON"):
            for batch in (1, 16):
                peers[f"mosec, batches of {batch}"] = mosec(python, directory, batch)
                stack.callback(peers[f"mosec, batches of {batch}"].server.end)
        if venv := os.environ.get("TRITON_VENV"):
            peers["tritonserver"] = triton(folder, Path(venv))
            stack.callback(peers["tritonserver"].server.end)
        yield peers


def mosec(python: str, directory: Path, batch: int) -> Peer:
    port = free_port()
    environment = os.environ | {"MLP": str(directory / "model.pt2"), "MOSEC_BATCH": str(batch)}
    command = [python, PEERS / "mosec_mlp.py", "--address", "127.0.0.1", "--port", port]
    server = Server(command, "http service is running", env=environment)
    return Peer(server, f"http://127.0.0.1:{port}/inference", False)


def triton(folder: Path, venv: Path) -> Peer:
    """tritonserver out of nvidia-pytriton's wheel, with a repository of one model."""
    site = next(venv.glob("lib/python*/site-packages"))
    home = site / "pytriton" / "tritonserver"
    model = folder / "repository" / "MLP"
    (model / "1").mkdir(parents=True)
    shutil.copy(PEERS / "triton_mlp.py", model / "1" / "model.py")
    # The wheel has a stub, which runs model.py, for each Python; the server looks for it among its backends.
    shutil.copytree(home / "backends", folder / "backends")
    stub = home / "python_backend_stubs" / site.parent.name.removeprefix("python") / "triton_python_backend_stub"
    shutil.copy(stub, folder / "backends" / "python")
    layers = [layer for layer in Mlp().net if isinstance(layer, torch.nn.Linear)]
    arrays = {f"w{i}": layer.weight.detach().numpy().T for i, layer in enumerate(layers)}
    np.savez(model / "mlp.npz", **arrays, **{f"b{i}": layer.bias.detach().numpy() for i, layer in enumerate(layers)})
    (model / "config.pbtxt").write_text(
        'backend: "python" max_batch_size: 1024 dynamic_batching { max_queue_delay_microseconds: 500 }\n'
        'input { name: "x" data_type: TYPE_FP32 dims: 16 } output { name: "y" data_type: TYPE_FP32 dims: 1 }\n'
    )
    port = free_port()
    environment = os.environ | {
        "TRITON_SITE_PACKAGES": str(site),
        "LD_LIBRARY_PATH": ":".join(map(str, site.glob("*.libs"))),
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
    }
    command = [home / "bin" / "tritonserver", "--model-repository", folder / "repository", "--http-port", port]
    command += ["--backend-directory", folder / "backends", "--allow-grpc=false", "--allow-metrics=false"]
    server = Server([*command, "--http-address=127.0.0.1"], "Started HTTPService", env=environment)
    return Peer(server, f"http://127.0.0.1:{port}/v2/models/MLP/infer", True)


def measure(folder: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    directory = exported(folder, "MLP")
    rows: dict[str, dict[str, Any]] = {}
    with running(folder, directory) as peers:
        for size in (1, 64):
            x = inputs_of("MLP", size, 3)["x"]
            expected = bare_net(directory)({"x": x})
            best: dict[str, Load] = {}
            cpu_s = dict.fromkeys(peers, float("inf"))
            for _ in range(rounds):
                for name, peer in peers.items():
                    body = peer.body(x)
                    assert np.abs(peer.answer(body) - expected).max() <= 1e-5, name
                    (folder / "body").write_text(body)
                    before = peer.server.cpu_s()
                    load = wrk(peer.url, folder / "body", JSON, CONNECTIONS, seconds)
                    cpu_s[name] = min(cpu_s[name], (peer.server.cpu_s() - before) / load.requests)
                    best[name] = max(load, best.get(name, load), key=lambda each: each.rate)
            for name, load in best.items():
                rows.setdefault(name, {"server": name}).update(
                    {
                        f"{size} rows: requests/s": f"{load.rate:,.0f}",
                        f"{size} rows: p99": load.tail,
                        f"{size} rows: server CPU µs": f"{cpu_s[name] * 1e6:,.0f}",
                    }
                )
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        keep("http_peers", measure(Path(place), 1 if quick else 3, 1.0 if quick else 3.0))


if __name__ == "__main__":
    main()
