"""Ops with threads of their own, and ops that batch by themselves: the answers are those of the op within."""

import asyncio
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_ops import Echo, Odd, Patient, X

from cube.errors import BadConfig, BadRequest, DeadlineExceeded, Internal, Overloaded
from predictor.apart import Gathered, OwnThreads, Queued
from predictor.batching import Limits
from predictor.executor import Executor
from predictor.ops.op import Batch, Op, Port, Ragged
from predictor.processes import OwnProcesses
from predictor.tensors import texts
from predictor.workflow import Dependency, Kind, Mode, Node, plan


def batch(values, rows, deadline=None):
    made = Batch(values)
    made.rows, made.deadline = rows, deadline
    return made


def ones(rows, number=1.0, deadline=None):
    return batch({"x": np.full((rows, 4), number, np.float32)}, rows, deadline)


class Recording(Op):
    """Doubles x; remembers how it was called. Waits for `gate` where there is one."""

    inputs: ClassVar = {"x": X}
    outputs: ClassVar = {"y": X}

    def __init__(self, gate=None, error=None, short=0):
        self.gate, self.error, self.short = gate, error, short
        self.rows, self.threads = [], set()
        self.at_once = self.most_at_once = 0
        self.state = "made"
        self._lock = threading.Lock()

    def open(self):
        self.state = "open"

    def close(self):
        self.state = "closed"

    def run(self, given):
        with self._lock:
            self.rows.append(given.rows)
            self.threads.add(threading.get_ident())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        if self.gate is not None:
            assert self.gate.wait(20)
        with self._lock:
            self.at_once -= 1
        if self.error is not None:
            raise self.error
        return {"y": 2 * given["x"][self.short :]}


async def until(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.001)


async def answered(op, *batches):
    async def one(each):
        made = op.run(each)
        return await made if not isinstance(made, dict) else made

    return await asyncio.gather(*map(one, batches), return_exceptions=True)


@pytest.fixture
def threads():
    made = []

    def make(*args, **more):
        made.append(OwnThreads(*args, **more))
        made[-1].bind({"x": X})
        made[-1].open()
        return made[-1]

    yield make
    for op in made:
        op.close()


# ---- threads ----


def test_as_many_batches_run_at_once_as_there_are_threads_and_the_loop_goes_on(threads):
    gate = threading.Event()
    within = Recording(gate)
    op = threads(within, 3)

    async def run():
        answers = asyncio.ensure_future(answered(op, *(ones(2, number) for number in range(8))))
        await until(lambda: within.at_once == 3)  # so the loop goes on
        sizes = op.queue_sizes()
        gate.set()
        return sizes, await answers

    sizes, answers = asyncio.run(run())
    assert sizes == {"waiting": 5, "busy": 3}
    assert op.queue_sizes() == {"waiting": 0, "busy": 0}
    assert [found["y"][0, 0] for found in answers] == [2.0 * number for number in range(8)]
    assert within.most_at_once == 3
    assert threading.get_ident() not in within.threads


def test_more_than_may_wait_for_a_thread_is_refused_until_one_leaves(threads):
    gate = threading.Event()
    within = Recording(gate)
    op = threads(within, 1, 2, place="node 'n'")

    async def run():
        waiting = [op.run(ones(1)) for _ in range(3)]
        with pytest.raises(Overloaded, match="node 'n': 2 batches are waiting, at most 2 may"):
            op.run(ones(1))
        await until(lambda: within.at_once == 1)
        waiting[0].cancel()  # it runs, and goes on
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            op.run(ones(1))
        waiting[1].cancel()
        await asyncio.sleep(0)
        waiting.append(op.run(ones(1)))
        gate.set()
        await asyncio.wait(waiting[2:])

    asyncio.run(run())
    assert within.rows == [1, 1, 1]


def test_a_batch_whose_deadline_passed_is_not_begun(threads):
    gate = threading.Event()
    within = Recording(gate)
    op = threads(within, 1)

    async def run():
        first, late = op.run(ones(1)), op.run(ones(1, deadline=time.monotonic() + 0.02))
        await asyncio.sleep(0.03)
        gate.set()
        await first
        with pytest.raises(DeadlineExceeded, match="node: the deadline passed while it was waiting"):
            await late

    asyncio.run(run())
    assert within.rows == [1]


@pytest.mark.parametrize(("error", "seen"), [(BadRequest("a", "b", "c"), BadRequest), (StopIteration(), RuntimeError)])
def test_errors_of_the_op_are_those_of_the_answer(threads, error, seen):
    op = threads(Recording(error=error), 1)
    ((found),) = asyncio.run(answered(op, ones(1)))
    assert type(found) is seen


def test_an_op_is_opened_and_closed_with_its_threads(threads):
    within = Recording()
    op = OwnThreads(within, 1)
    assert op.wanted() == within.wanted()
    assert op.bind({"x": X}) == within.outputs
    op.open()
    assert within.state == "open"
    op.close()
    assert within.state == "closed"
    (found,) = asyncio.run(answered(op, ones(1)))
    assert str(found) == "node: closed"
    assert op.queue_sizes() == {"waiting": 0, "busy": 0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OwnThreads(Recording(), 0), "concurrency and queue_size: found 0 and 1024"),
        (lambda: OwnThreads(Recording(), 1, 0), "concurrency and queue_size: found 1 and 0"),
        (lambda: OwnThreads(Patient(), 1), "concurrency: found an op that waits"),
        (lambda: Gathered(Recording(), Limits(max_rows=0)), "node batch: found a limit below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(BadConfig, match=message):
        make()


# ---- batches of its own ----


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 16),
    st.integers(1, 3),
    st.booleans(),
)
def test_gathered_answers_are_those_of_the_op_alone(sizes, most, at_once, in_threads):
    within = Echo()
    op = Gathered(OwnThreads(within, at_once) if in_threads else within, Limits(max_rows=most, max_in_flight=at_once))
    ports = {"x": X, "t": Port("BYTES"), "r": Port("INT64", ragged=True, per_row=2)}
    op.bind(ports)
    op.open()
    draw = np.random.default_rng(sum(sizes))

    def drawn(rows):
        lengths = draw.integers(0, 4, 2 * rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return {
            "x": draw.random((rows, 4), np.float32),
            "t": texts([draw.bytes(number % 5) for number in range(rows)]),
            "r": Ragged(draw.integers(0, 99, offsets[-1]), offsets),
        }

    given_values = [drawn(rows) for rows in sizes]
    try:
        answers = asyncio.run(
            answered(op, *(batch(v, rows) for v, rows in zip(given_values, sizes, strict=True))), debug=False
        )
    finally:
        op.close()
    for values, found in zip(given_values, answers, strict=True):
        assert (found["x"] == values["x"]).all()
        assert (found["r"].offsets == values["r"].offsets).all()
        assert (found["r"].values == values["r"].values).all()
        there, here = found["t"], values["t"]
        assert [bytes(there.data[a : a + n]) for a, n in zip(there.starts, there.sizes, strict=True)] == [
            bytes(here.data[a : a + n]) for a, n in zip(here.starts, here.sizes, strict=True)
        ]


def test_runs_that_wait_are_merged_and_a_large_one_is_split_over_the_threads():
    gate = threading.Event()
    within = Recording(gate)
    op = Gathered(OwnThreads(within, 2), Limits(max_rows=4))
    op.bind({"x": X})
    op.open()

    async def run():
        answers = asyncio.ensure_future(answered(op, ones(8, 1), *(ones(1, number) for number in range(2, 9))))
        await until(lambda: within.at_once == 2)  # two parts of the first
        sizes = op.queue_sizes()
        gate.set()
        return sizes, await answers

    sizes, answers = asyncio.run(run())
    op.close()
    assert sizes == {"waiting_rows": 7, "waiting": 0, "busy": 2}
    assert [found["y"].shape for found in answers] == [(8, 4)] + [(1, 4)] * 7
    assert [found["y"][0, 0] for found in answers] == [2.0 * number for number in range(1, 9)]
    assert sorted(within.rows) == [3, 4, 4, 4]
    assert within.most_at_once == 2


def test_a_merged_batch_that_fails_is_run_again_one_by_one():
    class Picky(Recording):
        def run(self, given):
            if (given["x"] == 3).any():
                raise BadRequest("x", 3, "another number")
            return super().run(given)

    within = Picky()
    op = Gathered(within, Limits(max_rows=8))
    op.bind({"x": X})
    answers = asyncio.run(answered(op, *(ones(1, number) for number in range(6))))
    op.close()
    assert isinstance(answers.pop(3), BadRequest)
    assert [found["y"][0, 0] for found in answers] == [0, 2, 4, 8, 10]


@pytest.mark.slow
def test_a_row_that_crashes_its_process_costs_nobody_else_an_answer():
    op = Gathered(OwnProcesses("odd_ops:Odd", {}, 1), Limits(max_rows=8))
    op.bind(op.wanted())
    op.open()

    def row(number):
        do = texts([b"crash" if number == 2 else b""])
        return batch({"x": np.full((1, 4), number, np.float32), "do": do}, 1)

    async def run():
        first = asyncio.ensure_future(answered(op, row(0)))  # alone
        await asyncio.sleep(0)
        return [*await answered(op, row(2), row(3), row(4)), *await first]

    try:
        crashed, *others = asyncio.run(run())
    finally:
        op.close()
    assert isinstance(crashed, Internal)
    assert [found["y"][0, 0] for found in others] == [6, 8, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recording(short=1), r"node 'n' output 'y': found shape \[., 4\], not . in dimension 0, expected FP32"),
        (lambda: Odd(), "node 'n' outputs: found y, expected y, pid"),
    ],
)
def test_outputs_that_do_not_fit_the_batch_are_nobodys(monkeypatch, make, message):
    within = make()
    if isinstance(within, Odd):
        monkeypatch.setattr(within, "run", lambda given: {"y": given["x"]})
    op = Gathered(within, Limits(max_rows=8), place="node 'n'")
    op.bind({"x": X, "do": Port("BYTES")})
    answers = asyncio.run(answered(op, ones(2), ones(3)))
    op.close()
    for found in answers:
        with pytest.raises(Internal, match=message):
            raise found


@pytest.mark.parametrize("port", [Port("FP32", (3,)), Port("FP32", (-1, -1))])
def test_values_that_cannot_be_merged_are_a_matter_of_config(port):
    op = Gathered(Echo(), Limits())
    with pytest.raises(BadConfig, match="input 'x' of a node that batches: found FP32"):
        op.bind({"x": port})
    op.close()


@pytest.mark.slow
def test_an_op_of_a_workflow_of_its_own_processes_batches_and_copies_what_it_may_change():
    """Concurrent runs of a workflow: decode (processes, merged) → its x changed by one node, read by another."""

    class Change(Op):
        inputs: ClassVar = {"y": X}
        outputs: ClassVar = {"changed": X}

        def run(self, given):
            given["y"][:] += 1
            return {"changed": given["y"]}

    class Read(Op):
        inputs: ClassVar = {"y": X}
        outputs: ClassVar = {"read": X}

        def run(self, given):
            assert not given["y"].flags.writeable
            return {"read": given["y"]}

    within = OwnProcesses("odd_ops:Odd", {}, 1, place="node 'double'")
    double = Gathered(within, Limits(max_rows=4), place="node 'double'")
    try:
        nodes = [
            Node("double", double, is_apart=True),
            Node("change", Change(), (Dependency("double", Mode.RW),)),
            Node("read", Read(), (Dependency("double"),)),
        ]
        workflow = plan("w", nodes, {"x": X, "do": Port("BYTES")}, Kind.PARALLEL, ["changed", "read"])
        double.open()

        async def one(executor, number):
            values = {"x": np.full((2, 4), number, np.float32), "do": texts([b"", b""])}
            return await executor.start(values, 2, 2, None)

        async def run():
            executor = Executor(workflow, None)
            return await asyncio.gather(*(one(executor, number) for number in range(40)))

        runs = asyncio.run(run())
    finally:
        double.close()
    changed, read = (workflow.outputs[name].place for name in ("changed", "read"))
    for number, each in enumerate(runs):
        assert (each.values[changed] == 2 * number + 1).all()
        assert (each.values[read] == 2 * number).all()


@pytest.mark.parametrize(
    "op",
    [
        OwnThreads(Recording(), 1),
        Gathered(Recording(), Limits()),
        OwnProcesses("odd_ops:Odd", {}, 1),
        Gathered(OwnProcesses("odd_ops:Odd", {}, 1), Limits()),
    ],
)
def test_what_waits_can_be_counted(op):
    assert isinstance(op, Queued)
    assert set(op.queue_sizes().values()) == {0}
