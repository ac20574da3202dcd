"""Services of ops that add one, at once or after a while, for tests of what is around them."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cube.rpc.calls import Call
from predictor.batching import Limits
from predictor.executor import Executor
from predictor.ops.op import Op, Port
from predictor.requests import Form
from predictor.service import Lane, Service
from predictor.workflow import Dependency, Kind, Node, plan

X = Port("FP32", (-1, 2))
THREADS = ThreadPoolExecutor(4, "test-compute")


class Add(Op):
    """One more."""

    inputs, outputs = {"x": X}, {"y": X}

    def run(self, batch):
        return {"y": batch["x"] + 1}


class Later(Add):
    """The same, after a while."""

    def __init__(self, seconds=0.001):
        self.seconds = seconds

    async def run(self, batch):
        await asyncio.sleep(self.seconds)
        return super().run(batch)

    def queue_sizes(self):
        return {"waiting": 3, "busy": 1}


class Fails(Add):
    def run(self, batch):
        raise self.error

    def __init__(self, error):
        self.error = error


def service_of(*nodes, kind=Kind.SEQUENCE, name="s", limits=None, workflows=1):
    form = Form({"x": X}, [], max_samples=100, max_keys=1, finite=True)
    plans = [plan(f"w{n}" if n else "w", nodes, form.ports, kind) for n in range(workflows)]
    lanes = [Lane(Executor(each, THREADS), limits or Limits(max_in_flight=4)) for each in plans]
    return Service(name, "7", "test", form, lanes)


def chain(*ops):
    """Nodes a, b, c ..., each of which takes what the one before it makes."""
    names = "abcdefgh"
    return [
        Node(name, op, (Dependency(names[at - 1]),), {"x": f"{names[at - 1]}.y"}) if at else Node(name, op)
        for at, (name, op) in enumerate(zip(names, ops, strict=False))
    ]


def rows(count):
    return {"x": np.zeros((count, 2), np.float32)}


async def ask(service, count=3, **call):
    answer = service.infer(rows(count), (), Call("/p", **call), then=lambda answer: answer)
    return await answer if hasattr(answer, "__await__") else answer
