"""Runs: where each op runs, what it may touch, what becomes of its faults."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cube.errors import BadRequest, DeadlineExceeded, Internal, Overloaded
from predictor import executor
from predictor.executor import Executor, Run, RunTimes
from predictor.ops.op import Op, Port, Ragged
from predictor.tensors import Texts
from predictor.thread_clock import own_clock
from predictor.workflow import Dependency, Kind, Mode, Node, plan

X = Port("FP32", (-1, 2))
THREADS = ThreadPoolExecutor(4, "test-compute")


class Apply(Op):
    """y = function(x, ...); remembers the thread it ran in."""

    def __init__(self, function, takes="x", makes="y", port=X, out=None):
        self.inputs, self.outputs = dict.fromkeys(takes.split(), port), dict.fromkeys(makes.split(), out or port)
        self.function, self.threads, self.rows = function, [], []

    def run(self, batch):
        self.threads.append(threading.current_thread())
        self.rows.append(batch.rows)
        made = self.function(*(batch[name] for name in self.inputs))
        return dict(zip(self.outputs, made if type(made) is tuple else (made,), strict=True))


class Later(Apply):
    """The same, after a while."""

    def __init__(self, function, seconds=0.001, **more):
        super().__init__(function, **more)
        self.seconds = seconds

    async def run(self, batch):
        await asyncio.sleep(self.seconds)
        return super().run(batch)


def executor_of(nodes, request=None, kind=Kind.SEQUENCE, observe=None):
    return Executor(plan("w", nodes, request or {"x": X}, kind), THREADS, observe)


def run(runner, deadline=None, **values):
    """The run of a batch; values: arrays of as many rows."""
    values = values or {"x": np.ones((3, 2), np.float32)}

    async def main():
        started = runner.start(values, len(next(iter(values.values()))), 1, deadline)
        return started if isinstance(started, Run) else await started

    return asyncio.run(main())


def output(runner, name="y", **values):
    done = run(runner, **values)
    return done.values[runner.plan.outputs[name].place]


def after(*names, mode=Mode.RO):
    return tuple(Dependency(name, mode) for name in names)


def twice(x):
    return 2 * x


def test_a_chain():
    for op in (Apply, Later):
        nodes = [Node("a", op(twice)), Node("b", op(lambda y: y + 1, takes="y", makes="z"), after("a"))]
        np.testing.assert_array_equal(output(executor_of(nodes), "z"), np.full((3, 2), 3))


def test_a_short_run_is_done_when_start_returns():
    runner = executor_of([Node("a", Apply(twice))])
    run(runner)  # until it is known to be short, a run is in a thread
    run(runner)

    async def main():
        return runner.start({"x": np.ones((1, 2), np.float32)}, 1, 1, None)

    assert isinstance(asyncio.run(main()), Run)
    assert runner.plan.steps[0].node.op.threads[-1] is threading.main_thread()


def test_a_long_run_leaves_the_loop_free():
    def slow(x):
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return x

    runner = executor_of([Node("a", Apply(slow))])
    for _ in range(3):
        run(runner)
    assert all(thread.name.startswith("test-compute") for thread in runner.plan.steps[0].node.op.threads)


def test_run_times_are_known_by_size():
    times = RunTimes()
    assert times.expected(100) == float("inf")
    for _ in range(50):
        times.learn(100, 0.001)
        times.learn(5_000, 0.05)
    assert times.expected(70) == pytest.approx(0.001)  # of the same size class
    assert times.expected(5_000) == pytest.approx(0.05)


def test_a_step_that_was_caught_waiting_gets_the_event_loop_back_when_it_has_stopped():
    times = RunTimes()
    times.learn(1, 0.001)
    for _ in range(2):
        assert times.expected(1) < 0.004
        times.learn(1, 0.001, has_waited=True)
    for _ in range(255):
        times.learn(1, 0.001)
        assert times.expected(1) == float("inf")
    times.learn(1, 0.001)
    assert times.expected(1) == pytest.approx(0.001)


def test_a_step_that_waits_leaves_the_event_loop_while_others_compute():
    def wait(x):
        time.sleep(0.02)
        return x

    until = time.monotonic() + 20
    stop = threading.Event()

    def burn():
        matrix = np.ones((300, 300))
        while not stop.is_set() and time.monotonic() < until:
            matrix @ matrix  # without the interpreter

    node = Node("a", Apply(wait))
    runner = executor_of([node])
    busy = threading.Thread(target=burn)
    busy.start()
    for _ in range(8):
        run(runner)
    stop.set()
    busy.join()
    assert node.op.threads[-1].name.startswith("test-compute")


@pytest.mark.alone  # takes a core for itself
def test_a_step_that_loses_its_core_does_not_wait():
    def short(x):
        time.sleep(1e-5)  # gives it up by itself as well
        return 2 * x

    node = Node("a", Apply(short))
    runner = executor_of([node])
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        for _ in range(100):
            run(runner)
    finally:
        os.sched_setaffinity(0, cores)
        for other in others:
            other.kill()
            other.wait()
    assert all(thread is threading.main_thread() for thread in node.op.threads[1:])


def test_a_step_in_a_thread_that_waits_for_the_interpreter_gets_the_event_loop():
    def several(x):
        for _ in range(10):
            time.sleep(0)  # lets go of it and wants it back, as every op of a net does
        return 2 * x

    node = Node("a", Apply(several))
    runner = executor_of([node])

    async def three_while_the_loop_computes():
        x = np.ones((3, 2), np.float32)
        waiting = [asyncio.ensure_future(runner.start({"x": x}, 3, 1, None)) for _ in range(3)]
        while not all(one.done() for one in waiting):
            end = time.thread_time() + 0.03
            while time.thread_time() < end:
                pass
            await asyncio.sleep(0)

    asyncio.run(three_while_the_loop_computes())  # in threads, as nothing is known
    run(runner)
    assert node.op.threads[0].name.startswith("test-compute")
    assert node.op.threads[-1] is threading.main_thread()


def test_a_thread_knows_what_it_does_with_its_time():
    clock, began = own_clock(), time.monotonic()
    assert own_clock() is clock
    cpu_s, busy_s = clock.cpu_s(), clock.busy_s()
    time.sleep(0.2)
    while time.monotonic() - began < 0.5:
        pass
    wall_s = time.monotonic() - began
    assert clock.cpu_s() - cpu_s <= clock.busy_s() - busy_s + 1e-3
    assert 0.05 <= clock.busy_s() - busy_s <= wall_s - 0.19


# ---- a stage at once ----


def test_the_nodes_of_a_stage_run_at_once():
    meeting = threading.Barrier(3, timeout=60)

    def meet(x):
        meeting.wait()
        return x

    nodes = [Node(name, Apply(meet, makes=name)) for name in "abc"]
    nodes.append(Node("sum", Apply(lambda a, b, c: a + b + c, takes="a b c"), after("a", "b", "c")))
    runner = executor_of(nodes, kind=Kind.PARALLEL)
    np.testing.assert_array_equal(output(runner), np.full((3, 2), 3))  # unknown is long, so all had threads


def test_short_nodes_of_a_stage_need_no_threads():
    nodes = [Node(name, Apply(twice, makes=name)) for name in "ab"]
    runner = executor_of(nodes, kind=Kind.PARALLEL)
    for _ in range(2):
        run(runner)
    assert all(node.op.threads[-1] is threading.main_thread() for node in nodes)


@pytest.mark.alone  # seconds decide
def test_those_that_wait_do_so_together():
    nodes = [Node(name, Later(twice, seconds=1, makes=name)) for name in "abcd"]
    begin = time.monotonic()
    run(executor_of(nodes, kind=Kind.PARALLEL))
    assert time.monotonic() - begin < 3


def test_one_failure_ends_a_stage():
    nodes = [Node("a", Later(twice, seconds=100, makes="a")), Node("b", Later(lambda x: 1 / 0, makes="b"))]
    begin = time.monotonic()
    with pytest.raises(Internal, match="workflow 'w' node 'b': failed"):
        run(executor_of(nodes, kind=Kind.PARALLEL))
    assert time.monotonic() - begin < 60


# ---- what an op may touch ----


def test_a_reader_cannot_change_what_it_reads():
    def spoil(x):
        x[:] = 0
        return x

    with pytest.raises(Internal):
        output(executor_of([Node("a", Apply(twice)), Node("b", Apply(spoil, takes="y", makes="z"), after("a"))]), "z")


def test_a_writer_changes_its_own():
    def fill(y):
        y[:] = 7
        return y

    writer = Node("b", Apply(fill, takes="y", makes="z"), after("a", mode=Mode.RW))
    reader = Node("c", Apply(lambda y: y.copy(), takes="y", makes="u"), after("a"))
    for nodes in ([writer], [writer, reader], [reader, writer]):
        runner = executor_of([Node("a", Apply(twice)), *nodes])
        done = run(runner)
        values = {name: done.values[make.place] for name, make in runner.plan.outputs.items()}
        np.testing.assert_array_equal(values["z"], np.full((3, 2), 7))
        if reader in nodes:
            np.testing.assert_array_equal(values["u"], np.full((3, 2), 2))


# ---- conditions ----

POSITIVE = Node("is", Apply(lambda x: x[:, 0] > 0, makes="is", out=Port("BOOL", (-1,))))


@pytest.mark.parametrize(
    ("first", "when", "expected", "rows"),
    [
        ([1, -1, 2], "is.is", [2, 0, 4], [2]),
        ([1, -1, 2], "!is.is", [0, -2, 0], [1]),
        ([1, 1, 1], "is.is", [2, 2, 2], [3]),
        ([-1, -1, -1], "is.is", [0, 0, 0], []),
    ],
)
def test_a_condition_chooses_rows(first, when, expected, rows):
    op = Apply(twice)
    x = np.repeat(np.array(first, np.float32)[:, None], 2, axis=1)
    made = output(executor_of([POSITIVE, Node("a", op, after("is"), when=when)]), x=x)
    np.testing.assert_array_equal(made[:, 0], expected)
    assert op.rows == rows


def test_a_condition_on_ragged_values():
    bags = Port("FP32", (-1,), ragged=True)
    op = Apply(lambda b: Ragged(b.values + 1, b.offsets), takes="b", makes="c", port=bags)
    runner = executor_of([POSITIVE, Node("a", op, after("is"), when="is.is")], {"x": X, "b": bags})
    x = np.array([[1, 1], [-1, 0], [1, 1]], np.float32)
    made = output(runner, "c", x=x, b=Ragged(np.arange(5, dtype=np.float32), np.array([0, 2, 3, 5])))
    assert (made.values.tolist(), made.offsets.tolist()) == ([1, 2, 4, 5], [0, 2, 2, 4])


# ---- faults ----


@pytest.mark.parametrize("op", [Apply, Later])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x: x.astype(np.float64), r"output 'y': found dtype float64, expected FP32 \[-1, 2\]"),
        (lambda x: x[:1], r"output 'y': found shape \[1, 2\], not 3 in dimension 0"),
        (lambda x: x[:, :1], r"output 'y': found shape \[3, 1\], not 2 in dimension 1"),
        (lambda x: x.tolist(), "output 'y': found a list, not an array"),
        (lambda x: None, "output 'y': found a NoneType, not an array"),
    ],
)
def test_an_op_that_makes_something_else(op, made, message):
    with pytest.raises(Internal, match=message):
        output(executor_of([Node("a", op(made))]))


@pytest.mark.parametrize(
    ("made", "message"),
    [({"z": 0}, "found z, expected y"), ({}, "found nothing, expected y"), (3, "found a int, expected y")],
)
def test_an_op_that_names_other_outputs(made, message):
    class Names(Op):
        inputs, outputs = {"x": X}, {"y": X}

        def run(self, batch):
            return made

    with pytest.raises(Internal, match=f"workflow 'w' node 'a' outputs: {message}"):
        output(executor_of([Node("a", Names())]))


@pytest.mark.parametrize("op", [Apply, Later])
@pytest.mark.parametrize(
    ("error", "kind"), [(KeyError("k"), Internal), (BadRequest("a", 1, 2), BadRequest), (MemoryError(), Overloaded)]
)
def test_an_op_that_raises(op, error, kind, caplog):
    def fail(x):
        raise error

    with pytest.raises(kind):
        output(executor_of([Node("a", op(fail))]))
    assert ("workflow 'w' node 'a' failed" in caplog.text) == (kind is Internal)


def test_nothing_is_computed_after_the_deadline():
    op = Apply(twice)
    with pytest.raises(DeadlineExceeded, match="workflow 'w' node 'a': the deadline has passed"):
        run(executor_of([Node("a", op)]), deadline=time.monotonic() - 1)
    assert not op.rows


@pytest.mark.parametrize(
    ("node_s", "request_s", "message"), [(0.01, None, "not done within"), (None, 1, "not done within")]
)
def test_a_node_that_waits_too_long(node_s, request_s, message):
    deadline = None if request_s is None else time.monotonic() + request_s
    with pytest.raises(DeadlineExceeded, match=message):
        run(executor_of([Node("a", Later(twice, seconds=100), deadline_s=node_s)]), deadline)


@pytest.mark.parametrize("limits", [{}, {"deadline_s": 20.0}])
def test_a_timeout_of_the_ops_own_is_a_fault_and_no_deadline(limits):
    class Asks(Apply):
        async def run(self, batch):
            raise TimeoutError("the other server")

    with pytest.raises(Internal, match="workflow 'w' node 'a': failed"):
        run(executor_of([Node("a", Asks(twice), **limits)]))


def test_a_deadline_of_a_node_does_not_count_where_runs_are_untimed():
    def slow(x):
        time.sleep(0.03)
        return x

    for op in (Apply(slow), Later(slow, seconds=0.02)):
        runner = executor_of([Node("a", op, deadline_s=0.01)])
        with runner.untimed():
            run(runner)
        with pytest.raises(DeadlineExceeded):
            run(runner)


# ---- times ----


def test_every_run_that_ended_is_told_with_its_times():
    seen = []

    def observe(run, error):
        seen.append(run)
        assert error is None

    nodes = [Node("a", Apply(twice)), Node("b", Later(twice, takes="y", makes="z"), after("a"))]
    runner = executor_of(nodes, observe=observe)
    run(runner)
    (done,) = seen
    times = [done.began, *done.times, done.ended]
    assert times == sorted(times)
    assert done.times[6] - done.times[5] >= 1e6


def test_segments():
    nodes = [
        Node("a", Apply(twice)),
        Node("b", Apply(twice, takes="y", makes="z"), after("a")),
        Node("c", Later(twice, takes="z", makes="u"), after("b")),
        Node("d", Apply(twice, takes="u", makes="v"), after("c")),
    ]
    made = executor.segments(plan("w", nodes, {"x": X}))
    assert [(len(segment.steps), segment.waits) for segment in made] == [(2, False), (1, True), (1, False)]


# ---- what passes unseen elsewhere ----

BAGS = Port("FP32", (-1,), ragged=True)


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 1, 2, 4], np.array([0.0, 1, 2, 4]), np.array([0, 1, 2, 4], np.int32), np.array([0, 1, 4]),
        np.array([1, 1, 2, 4]), np.array([0, 1, 2, 5]), np.array([0, 1, 2, 3]), np.array([0, 3, 2, 4]),
        np.array([0, 400_000_000, 400_000_000, 4]), np.array([[0, 1, 2, 4]]),
    ],
)  # fmt: skip
def test_offsets_that_would_reach_a_neighbours_values(offsets):
    op = Apply(lambda x: Ragged(np.zeros(4, np.float32), offsets), out=BAGS)
    with pytest.raises(Internal, match="workflow 'w' node 'a' output 'y': found"):
        output(executor_of([Node("a", op)]))


@pytest.mark.parametrize(("starts", "sizes"), [([0, 1, 2], [1, 1, 9]), ([-1, 0, 0], [1, 1, 1]), ([0, 0], [1, 1])])
def test_texts_beyond_their_bytes(starts, sizes):
    made = Texts((3,), np.zeros(3, np.uint8), np.array(starts), np.array(sizes))
    with pytest.raises(Internal, match="output 'y': found"):
        output(executor_of([Node("a", Apply(lambda x: made, out=Port("BYTES")))]))


class PassOn(Op):
    """Makes what it was given, as it was given."""

    def wanted(self):
        return None

    def bind(self, inputs):
        return inputs

    def run(self, batch):
        return dict(batch)


@pytest.mark.parametrize("between", [PassOn(), Apply(lambda x: x[:], makes="x")])
def test_a_writer_behind_a_node_that_passes_values_on(between):
    def fill(x):
        x[:] = 7
        return x

    x = np.ones((3, 2), np.float32)
    runner = executor_of([Node("read", between), Node("b", Apply(fill), after("read", mode=Mode.RW))])
    np.testing.assert_array_equal(output(runner, x=x), np.full((3, 2), 7))
    assert (x == 1).all()  # the caller's bytes


@pytest.mark.parametrize("op", [Apply, Later])
def test_an_op_does_not_end_the_server(op):
    def quit_(x):
        raise SystemExit(3)

    with pytest.raises(Internal, match="workflow 'w' node 'a': failed"):
        output(executor_of([Node("a", op(quit_))]))


def test_a_node_that_computes_too_long():
    def slow(x):
        time.sleep(0.05)
        return x

    with pytest.raises(DeadlineExceeded, match=r"node 'a': took \d\.\d+ s, at most 0\.010 s are allowed"):
        output(executor_of([Node("a", Apply(slow), deadline_s=0.01)]))


def test_steps_that_wait_without_computing_leave_the_event_loop():
    def wait(x):
        time.sleep(0.03)
        return x

    node = Node("a", Apply(wait))
    runner = executor_of([node])
    for _ in range(5):
        run(runner)
    assert node.op.threads[-1].name.startswith("test-compute")
