"""Ops that tests run apart: they do what the batch says, good or bad."""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from cube.errors import BadConfig, BadRequest
from predictor.ops.op import Batch, Op, Outputs, Port

log = logging.getLogger(__name__)

X = Port("FP32", (-1, 4))


class Echo(Op):
    """Makes what it is given."""

    def wanted(self) -> None:
        return None

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        return inputs

    def run(self, batch: Batch) -> Outputs:
        return dict(batch)


class LateEcho(Echo):
    """The same, after having waited."""

    async def run(self, batch: Batch) -> Outputs:
        await asyncio.sleep(0)
        return dict(batch)


class Odd(Op):
    """Doubles x, unless `do` of the first row says otherwise, by the name of a method."""

    inputs: ClassVar = {"x": X, "do": Port("BYTES", (-1,))}
    outputs: ClassVar = {"y": X, "pid": Port("INT64", (-1,))}

    def __init__(self, seconds: float = 0.2, left: str = ""):
        """seconds: how long it sleeps if told to. left: a file to write when it is closed."""
        self._seconds, self._left = seconds, left
        self._is_open = False

    def open(self) -> None:
        self._is_open = True

    def close(self) -> None:
        if self._left:
            with open(self._left, "a") as file:
                file.write(f"{os.getpid()}\n")

    def run(self, batch: Batch) -> Outputs:
        assert self._is_open
        do = batch["do"]
        action = bytes(do.data[do.starts[0] : do.starts[0] + do.sizes[0]]).decode()
        if action:
            return getattr(self, action)(batch)
        return {"y": 2 * batch["x"], "pid": np.full(batch.rows, os.getpid())}

    def sleep(self, batch: Batch) -> Outputs:
        time.sleep(self._seconds)
        return {"y": 2 * batch["x"], "pid": np.full(batch.rows, os.getpid())}

    def refuse(self, batch: Batch) -> Outputs:
        raise BadRequest("row 3", "a cat", "a dog")

    def fail(self, batch: Batch) -> Outputs:
        raise ZeroDivisionError("the secret")

    def stop(self, batch: Batch) -> Outputs:
        raise StopIteration

    def hunger(self, batch: Batch) -> Outputs:
        raise MemoryError

    def leave(self, batch: Batch) -> Outputs:
        raise SystemExit(3)

    def crash(self, batch: Batch) -> Outputs:
        os.kill(os.getpid(), signal.SIGSEGV)
        return {}

    def be_killed(self, batch: Batch) -> Outputs:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def make_a_list(self, batch: Batch) -> Outputs:
        return {"y": [1, 2, 3], "pid": np.zeros(1)}

    def make_objects(self, batch: Batch) -> Outputs:
        return {"y": np.array([None]), "pid": np.zeros(1)}

    def make_nothing(self, batch: Batch) -> Outputs:
        return None  # type: ignore[return-value]

    def make_too_few(self, batch: Batch) -> Outputs:
        return {"y": batch["x"][:-1], "pid": np.zeros(batch.rows, np.int64)}

    def make_many(self, batch: Batch) -> Outputs:
        return {f"y{number}": batch["x"] for number in range(10_000)}

    def say(self, batch: Batch) -> Outputs:
        log.warning("a line from afar")
        return {"y": batch["x"], "pid": np.zeros(batch.rows, np.int64)}

    def babble(self, batch: Batch) -> Outputs:
        with socket.socket(fileno=os.dup(int(sys.argv[1]))) as link:
            link.send(b"what?")
        return {"y": batch["x"], "pid": np.zeros(batch.rows, np.int64)}

    def change(self, batch: Batch) -> Outputs:
        batch["x"][:] = 7
        return {"y": batch["x"], "pid": np.zeros(batch.rows, np.int64)}


class Patient(Op):
    """Waits rather than computes."""

    inputs: ClassVar = {"x": X}
    outputs: ClassVar = {"y": X}

    async def run(self, batch: Batch) -> Outputs:
        return {"y": 3 * batch["x"]}


class Unfinished(Op):
    """Cannot be made, bound or opened."""

    inputs: ClassVar = {"x": X}

    def __init__(self, at: str):
        self._at = at
        self._fail_at("make")

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        self._fail_at("bind")
        return inputs

    def open(self) -> None:
        self._fail_at("open")

    def _fail_at(self, at: str) -> None:
        if self._at == at:
            raise BadConfig(f"thing at {at}", "none", "one")
        if self._at == f"exit at {at}":
            raise SystemExit(5)
        if self._at == f"fault at {at}":
            raise ValueError("no good")
        if self._at == f"hang at {at}":
            time.sleep(60)


def fragile(mark: str) -> Op:
    """An op that can be made while a file is there."""
    if not os.path.exists(mark):
        raise BadConfig("mark", "none", mark)
    return Odd()


NOT_AN_OP = 5
