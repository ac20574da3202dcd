"""An op in processes of its own: values come through as they are, and whatever the op does, the parent goes on."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.extra.numpy as drawn
import numpy as np
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_ops import Odd
from places import ROOT

from cube.errors import (
    BadConfig,
    BadRequest,
    DeadlineExceeded,
    Internal,
    Overloaded,
    ServingError,
    Unavailable,
    to_wire,
)
from cube.rpc.calls import Call
from predictor import models
from predictor.assembly import Assembly
from predictor.batching import Limits
from predictor.config import load
from predictor.ops.op import Batch, Port, Ragged
from predictor.processes import OwnProcesses, restart_delay_s
from predictor.rows import slice_rows
from predictor.tensors import DTYPES, Texts, texts
from predictor.workers.child import KEPT_SLABS, op_of
from predictor.workers.slabs import Slab, lay_out, read

pytestmark = pytest.mark.slow

SHARED = "/dev/shm"  # noqa: S108, where memory with a name would be


def batch(values, rows=1, deadline=None):
    made = Batch(values)
    made.rows, made.deadline = rows, deadline
    return made


def told(do, number=1.0, rows=2, deadline=None):
    """A batch for Odd."""
    x = np.full((rows, 4), number, np.float32)
    return batch({"x": x, "do": texts([do.encode()] * rows)}, rows, deadline)


def opened(*args, **more):
    op = OwnProcesses(*args, **more)
    op.bind(op.wanted() or {})
    op.open()
    return op


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


@pytest.fixture(scope="module")
def odd(loop):
    op = opened("odd_ops:Odd", {}, 2, place="node 'odd'")
    yield op
    op.close()


@pytest.fixture(scope="module")
def echo(loop):
    op = opened("odd_ops:LateEcho", {}, 1)
    yield op
    op.close()


async def answer(op, *batches):
    """Answers of batches run at once: what came, or what was raised."""

    async def one(given):
        return await op.run(given)

    return await asyncio.gather(*(one(each) for each in batches), return_exceptions=True)


async def whole(op):
    """Wait until all workers are there."""
    async with asyncio.timeout(120):
        while len(op._workers) < op.concurrency or not all(worker.is_ready for worker in op._workers):
            await asyncio.sleep(0.01)


def children():
    text = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return set(map(int, text.split()))


# ---- values ----

NUMBERS = st.sampled_from(sorted(DTYPES.values(), key=str))
SHAPES = drawn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def arrays(draw):
    array = draw(drawn.arrays(draw(NUMBERS), draw(SHAPES)))
    if array.ndim and draw(st.booleans()):
        array = array[:: draw(st.sampled_from([1, 2, -1]))].swapaxes(0, -1)
    array.flags.writeable = draw(st.booleans())
    return array


@st.composite
def texts_of(draw):
    elements = draw(st.lists(st.binary(max_size=9), max_size=6))
    value = texts(elements)
    if elements and draw(st.booleans()):
        start = draw(st.integers(0, len(elements)))
        value = slice_rows(value, Port("BYTES"), start, draw(st.integers(start, len(elements))))
    return value if draw(st.booleans()) else value._replace(shape=(value.shape[0], 1))


@st.composite
def bags(draw):
    values = draw(arrays().filter(lambda a: a.ndim) | texts_of())
    cuts = sorted(draw(st.lists(st.integers(0, values.shape[0]), max_size=5)))
    return Ragged(values, np.array([0, *cuts, values.shape[0]], np.int64))


VALUES = st.dictionaries(st.text(max_size=5), arrays() | texts_of() | bags(), max_size=4)


def same(one, other):
    if isinstance(one, Ragged):
        return same(one.offsets, other.offsets) and same(one.values, other.values)
    if isinstance(one, Texts):
        return one.shape == other.shape and elements(one) == elements(other)
    return (
        type(other) is np.ndarray
        and (one.dtype, one.shape) == (other.dtype, other.shape)
        and one.tobytes() == other.tobytes()
        and one.flags.writeable == other.flags.writeable
    )


def elements(value):
    return [bytes(value.data[at : at + size]) for at, size in zip(value.starts, value.sizes, strict=True)]


@given(VALUES)
def test_values_are_read_from_a_slab_as_they_were_written(values):
    layout = lay_out(values, "input")
    memory = np.full(layout.size + 64, 0xAA, np.uint8)
    layout.write(memory)
    found = read(layout.pieces, memory)
    assert found.keys() == values.keys()
    assert all(same(values[name], found[name]) for name in values)
    assert (memory[layout.size :] == 0xAA).all()


@settings(max_examples=50)
@given(VALUES)
def test_values_come_back_from_a_process_as_they_went(loop, echo, values):
    (found,) = loop.run(answer(echo, batch(values)))
    assert list(found) == list(values)
    assert all(same(values[name], found[name]) for name in values)


def test_a_part_of_a_batch_takes_only_its_own_texts_along():
    all_of_it = texts([b"x" * 1000] * 100)
    part = slice_rows(all_of_it, Port("BYTES"), 50, 52)
    assert lay_out({"t": part}, "input").size < 3000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "input 'x': found a list, expected an array, Texts or Ragged"),
        (np.array([None]), "input 'x': found dtype object, expected numbers or booleans"),
        (np.array(["a"]), "input 'x': found dtype <U1, expected numbers or booleans"),
        (Ragged(np.zeros(1), [0, 1]), "input 'x' offsets: found a list, expected an array"),
    ],
)
def test_what_is_no_value_is_refused_by_name(value, message):
    with pytest.raises(Internal, match=message):
        lay_out({"x": value}, "input")


def test_larger_and_smaller_batches_share_what_memory_there_is(loop, echo):
    sizes = [10, 3_000_000, 5, 100_000, 20_000_000, 7, 3_000_000]
    given_values = [np.arange(size, dtype=np.float32) for size in sizes]
    for value in given_values:
        (found,) = loop.run(answer(echo, batch({"x": value})))
        assert same(value, found["x"])
    del found
    gc.collect()
    assert shared_bytes() < 200 << 20
    assert open_slabs() <= 1 + KEPT_SLABS


def test_results_are_not_overwritten_while_somebody_reads_them(loop, echo):
    async def run():
        kept = []
        for number in range(12):
            (found,) = await answer(echo, batch({"x": np.full(100_000, number, np.int64)}))
            kept.append(found["x"][10:20])
        return kept

    kept = loop.run(run())
    assert [set(each.tolist()) for each in kept] == [{number} for number in range(12)]
    before = shared_bytes()
    del kept
    gc.collect()
    assert shared_bytes() < before  # those beyond the ones that are used again are gone


def shared_bytes():
    """Of slabs that are mapped here."""
    total, is_slab = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            is_slab = "memfd:predictor" in line
        elif is_slab and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def open_slabs():
    links = Path("/proc/self/fd").iterdir()
    return sum("memfd:predictor" in os.readlink(link) for link in links if link.is_symlink())


# ---- what an op may do ----


def test_200_batches_at_once_over_two_processes(loop, odd):
    answers = loop.run(answer(odd, *(told("", number, rows=1 + number % 7) for number in range(200))))
    for number, found in enumerate(answers):
        assert found["y"].shape == (1 + number % 7, 4)
        assert (found["y"] == 2 * number).all()
    assert len({int(found["pid"][0]) for found in answers}) == 2
    assert odd.queue_sizes() == {"waiting": 0, "busy": 0}


@pytest.mark.parametrize(
    ("do", "error", "message"),
    [
        ("refuse", BadRequest, "^row 3: found a cat, expected a dog$"),
        ("fail", Internal, "^node 'odd': failed; the server's log has it$"),
        ("stop", Internal, "^node 'odd': failed"),
        ("hunger", Overloaded, "^node 'odd': out of memory$"),
        ("make_a_list", Internal, "^node 'odd' output 'y': found a list, expected an array, Texts or Ragged$"),
        ("make_objects", Internal, "output 'y': found dtype object"),
        ("make_nothing", Internal, "outputs: found a NoneType, expected a mapping"),
        ("make_many", Internal, "Done: found [0-9]+ bytes, expected at most 65536"),
    ],
)
def test_an_error_is_that_of_its_batch_and_of_no_other(loop, odd, caplog, do, error, message):
    good, bad, also_good = loop.run(answer(odd, told(""), told(do), told("")))
    assert isinstance(bad, error)
    with pytest.raises(error, match=message):
        raise bad
    assert (good["y"] == 2).all()
    assert (also_good["y"] == 2).all()
    assert odd.restarts == 0
    assert ("the secret" in caplog.text) == (do == "fail")
    assert ("in fail" in caplog.text) == (do == "fail")  # the trace


def test_what_the_op_logs_is_in_our_log(loop, odd, caplog):
    with caplog.at_level(logging.INFO):
        loop.run(answer(odd, told("say")))
    ((name, level, text),) = caplog.record_tuples
    assert (name, level) == ("odd_ops", logging.WARNING)
    assert text.startswith("node 'odd' process ")
    assert text.endswith(": a line from afar")


def test_a_value_that_may_be_changed_is_changed_there_and_not_here(loop, odd):
    free, fixed = told("change"), told("change")
    fixed["x"].flags.writeable = False
    good, bad = loop.run(answer(odd, free, fixed))
    assert (good["y"] == 7).all()
    assert (free["x"] == 1).all()
    assert isinstance(bad, Internal)  # as it would be in this process


# ---- deadlines and queues ----


def test_a_batch_whose_deadline_has_passed_is_not_begun(loop, odd):
    async def run():
        now = time.monotonic()
        late = told("be_killed", deadline=now - 1)
        waits = [told("sleep"), told("sleep"), told("be_killed", deadline=now + 0.1)]
        return await answer(odd, late, *waits)

    late, first, second, third = loop.run(run())
    assert str(late) == "node 'odd': the deadline has passed"
    assert str(third) == "node 'odd': the deadline passed while it was waiting"
    assert isinstance(late, DeadlineExceeded)
    assert isinstance(third, DeadlineExceeded)
    assert (first["y"] == 2).all()
    assert (second["y"] == 2).all()
    assert odd.restarts == 0


@pytest.mark.alone  # a second decides
def test_a_slow_batch_is_answered_at_its_deadline_and_the_process_goes_on(loop):
    odd = opened("odd_ops:Odd", {"seconds": 2}, 2, place="node 'odd'")

    async def run():
        began = time.monotonic()
        (late,) = await answer(odd, told("sleep", deadline=began + 0.05))
        took = time.monotonic() - began
        after = await answer(odd, *(told("") for _ in range(4)))
        await answer(odd, told("sleep"), told("sleep"))  # both processes, so the late one is done
        return late, took, after

    try:
        late, took, after = loop.run(run())
    finally:
        odd.close()
    assert str(late) == "node 'odd': the deadline passed before it was done"
    assert took < 1.5
    assert all((found["y"] == 2).all() for found in after)
    assert odd.restarts == 0


@pytest.fixture(scope="module")
def small(loop):
    op = opened("odd_ops:Odd", {"seconds": 3}, 1, 3, place="node 'small'", patience_s=0.1)
    yield op
    op.close()


def test_more_than_may_wait_is_refused(loop, small):
    op = small

    async def run():
        waiting = [op.run(told("sleep")), *(op.run(told("")) for _ in range(3))]
        sizes = op.queue_sizes()
        with pytest.raises(Overloaded, match="node 'small': 3 batches are waiting, at most 3 may"):
            op.run(told(""))
        waiting[2].cancel()  # nobody waits for it any more, so another one may
        await asyncio.sleep(0)
        another = op.run(told(""))
        await asyncio.wait([waiting[0], waiting[1], waiting[3]])
        return sizes, await another

    sizes, another = loop.run(run())
    assert sizes == {"waiting": 3, "busy": 1}
    assert (another["y"] == 2).all()


# ---- processes that end ----


@pytest.mark.parametrize(
    ("do", "error", "how"),
    [
        ("be_killed", Unavailable, "was ended by SIGKILL"),
        ("crash", Internal, "was ended by SIGSEGV"),
        ("leave", Internal, "exited with 3"),
    ],
)
def test_a_process_that_ends_costs_its_batch_and_is_replaced(loop, odd, caplog, do, error, how):
    before = odd.restarts
    bad, *good = loop.run(answer(odd, told(do), *(told("", number) for number in range(20))))
    assert type(bad) is error
    assert str(bad) == f"node 'odd': the process that ran the batch {how}"
    assert all((found["y"] == 2 * number).all() for number, found in enumerate(good))
    loop.run(whole(odd))
    assert odd.restarts == before + 1
    assert f"{how}; another one is started in 0 s" in caplog.text
    assert len({worker.pid for worker in odd._workers}) == 2


def test_a_process_that_says_what_nobody_understands_is_replaced(loop, odd, caplog):
    before = odd.restarts
    bad, *good = loop.run(answer(odd, told("babble"), *(told("", number) for number in range(20))))
    assert isinstance(bad, Internal)
    assert all((found["y"] == 2 * number).all() for number, found in enumerate(good))
    loop.run(whole(odd))
    assert odd.restarts == before + 1
    assert "is not understood" in caplog.text


def test_a_process_killed_under_load_costs_no_more_than_its_batch(loop, odd):
    before = odd.restarts

    async def run():
        work = asyncio.ensure_future(answer(odd, *(told("", number, rows=1000) for number in range(600))))
        await asyncio.sleep(0.01)
        os.kill(odd._workers[0].pid, signal.SIGKILL)
        answers = await work
        await whole(odd)
        return answers

    answers = loop.run(run())
    failed = [found for found in answers if isinstance(found, Exception)]
    assert all(isinstance(error, Unavailable) for error in failed)
    assert len(failed) <= 1
    assert all(
        (found["y"] == 2 * number).all() for number, found in enumerate(answers) if not isinstance(found, Exception)
    )
    assert odd.restarts == before + 1


def test_a_batch_that_does_not_end_costs_its_process_once_nobody_waits(loop, small):
    async def run():
        answers = await answer(small, told("sleep", deadline=time.monotonic() + 0.05), told(""))
        await whole(small)
        return answers

    late, good = loop.run(run())
    assert isinstance(late, DeadlineExceeded)
    assert (good["y"] == 2).all()
    assert small.restarts == 1


def test_where_nothing_can_be_started_any_more_batches_are_refused(loop, tmp_path, caplog):
    mark = tmp_path / "mark"
    mark.touch()
    op = opened("odd_ops:fragile", {"mark": str(mark)}, 1, place="node 'it'")
    mark.unlink()

    async def until_it_answers():
        async with asyncio.timeout(120):
            while True:
                (found,) = await answer(op, told(""))
                if not isinstance(found, Exception):
                    return found
                await asyncio.sleep(0.05)

    try:
        bad, waited = loop.run(answer(op, told("be_killed"), told("")))
        assert str(bad) == "node 'it': the process that ran the batch was ended by SIGKILL"
        assert str(waited) == "node 'it': its processes have ended 3 times; the server's log says how"
        assert isinstance(waited, Unavailable)
        assert "node 'it': cannot be started again: mark: found none" in caplog.text
        mark.touch()
        assert (loop.run(until_it_answers())["y"] == 2).all()
    finally:
        op.close()


def test_restarts_are_further_and_further_apart():
    assert [restart_delay_s(failures) for failures in (1, 2, 3, 4, 9, 1000)] == [0.0, 0.1, 0.2, 0.4, 10.0, 10.0]


# ---- what callers are told ----

TOLD = "workflow 'main' node 'odd'"
CRASHED = f"{TOLD}: the process that ran the batch was ended by SIGSEGV"
BATCH = "batch { max_rows: 4 max_waiting_rows: 4 }"


@pytest.mark.parametrize(
    ("node", "told_of", "logged"),
    [
        ("executor: PROCESS", {
            "fail": "INTERNAL " + TOLD + ": failed; the server's log has it",
            "crash": f"INTERNAL {CRASHED}",
            "make_a_list": f"INTERNAL {TOLD} output 'y': found a list, expected an array, Texts or Ragged",
            "hunger": f"RESOURCE_EXHAUSTED {TOLD}: out of memory",
            "refuse": "INVALID_ARGUMENT row 3: found a cat, expected a dog",
        }, ["ZeroDivisionError: the secret", "odd_ops.py", "SIGSEGV; another one is started"]),
        (f"executor: PROCESS {BATCH}", {
            "make_too_few":
                f"INTERNAL {TOLD} output 'y': found shape [1, 4], not 2 in dimension 0, expected FP32 [-1, 4]",
            "crash": f"INTERNAL {CRASHED}",
        }, ["SIGSEGV; another one is started"]),
        ("executor: THREAD", {
            "fail": f"INTERNAL {TOLD}: failed; the server's log has it",
            "hunger": f"RESOURCE_EXHAUSTED {TOLD}: out of memory",
        }, ["ZeroDivisionError: the secret", "odd_ops.py"]),
    ],
    ids=["processes", "processes that batch", "threads"],
)  # fmt: skip
def test_callers_are_told_the_node_and_what_happened_but_not_where_files_lie(tmp_path, caplog, node, told_of, logged):
    (tmp_path / "service.prototxt").write_text('services { name: "S" workflows: "main" }')
    said = 'type: "odd_ops:Odd" concurrency: 1'
    (tmp_path / "workflow.prototxt").write_text(
        f'workflows {{ name: "main" nodes {{ name: "odd" {said} {node} }} batch {{ off: true }} }}'
    )
    shared = models.Settings(cube=None, max_samples=100, max_keys=1, cube_timeout_s=1, cube_wait_s=1)

    async def main():
        found = {}
        with ThreadPoolExecutor(2) as threads:
            async with contextlib.AsyncExitStack() as stack:
                assembly = Assembly(load(tmp_path), shared, threads, Limits(max_in_flight=2))
                (service,) = assembly.services(stack)
                for do in told_of:
                    values = {"x": np.ones((2, 4), np.float32), "do": texts([do.encode()] * 2)}
                    try:
                        await service.infer(values, (), Call("/p"), then=lambda answer: answer)
                    except ServingError as error:
                        found[do] = f"{to_wire(error).code} {error}"
        return found

    found = asyncio.run(main())
    assert found == told_of
    assert not [text for text in found.values() if str(tmp_path) in text or ".py" in text]
    assert not [text for text in logged if text not in caplog.text]


# ---- start and end ----


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("odd_ops", {}, "op type 'odd_ops': found 'odd_ops', expected module:class"),
        ("odd_ops:Nobody", {}, "op type 'odd_ops:Nobody': found no Nobody in module odd_ops, expected a class"),
        ("odd_ops:NOT_AN_OP", {}, "found odd_ops:NOT_AN_OP, which is not to be called"),
        ("builtins:dict", {}, "found what makes a dict, expected an Op"),
        ("no_such_module:Op", {}, "found ModuleNotFoundError: No module named 'no_such_module'"),
        ("odd_ops:Odd", {"more": 1}, "config: found .*unexpected keyword argument 'more'"),
    ],
)
def test_an_op_that_cannot_be_made_is_a_matter_of_config(kind, config, message):
    with pytest.raises(BadConfig, match=message):
        op_of(kind, config)


def test_an_op_that_its_processes_cannot_make_leaves_none():
    before = children()
    with pytest.raises(BadConfig, match=r"^thing at make: found none, expected one$") as caught:
        OwnProcesses("odd_ops:Unfinished", {"at": "make"}, 1).wanted()
    assert caught.value.place == "thing at make"
    assert children() == before


def test_a_config_that_cannot_be_sent_is_refused():
    with pytest.raises(BadConfig, match=r"node config: found .*expected numbers, texts, lists"):
        OwnProcesses("odd_ops:Odd", {"seconds": print}, 1)


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ("bind", BadConfig, "thing at bind: found none, expected one"),
        ("exit at open", Internal, r"node: its process \d+ exited with 5 while it started"),
        ("hang at open", Unavailable, r"node: its process \d+ has not started in time"),
    ],
)
def test_an_op_that_cannot_be_bound_or_opened_leaves_no_process(at, error, message):
    before = children()
    op = OwnProcesses("odd_ops:Unfinished", {"at": at}, 1)
    op.wanted()
    op._start_s = 1.0 if at.startswith("hang") else 60.0
    with pytest.raises(error, match=message):  # noqa: PT012, either of the two
        op.bind({})
        op.open()
    assert children() == before


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(BadConfig, match="node concurrency and queue_size: found"):
        OwnProcesses("odd_ops:Odd", {}, *numbers)


@pytest.mark.alone  # other tests' memory has names in /dev/shm, too
def test_the_end_closes_ops_fails_what_runs_and_leaves_nothing(loop, tmp_path):
    left = tmp_path / "left"
    before = children(), set(os.listdir(SHARED)), set(os.listdir("/proc/self/fd"))
    op = opened("odd_ops:Odd", {"left": str(left), "seconds": 60}, 2)
    pids = children() - before[0]

    async def run():
        sleeping = asyncio.ensure_future(op.run(told("sleep")))
        (found,) = await answer(op, told("", rows=10_000))
        began = time.monotonic()
        op.close()
        took = time.monotonic() - began
        with pytest.raises(Unavailable, match="node: closing"):
            await sleeping
        with pytest.raises(Unavailable, match="node: closed"):
            op.run(told(""))
        return found, took

    found, took = loop.run(run())
    assert took < 20
    assert (found["y"] == 2).all()  # what was made is read when its maker is gone
    assert int(left.read_text()) in pids
    del found
    gc.collect()
    assert children() == before[0]
    assert set(os.listdir(SHARED)) <= before[1]
    assert set(os.listdir("/proc/self/fd")) <= before[2]  # what others have left may have been collected meanwhile


def test_memory_that_there_is_not_is_a_matter_of_load():
    with pytest.raises(Overloaded, match=r"no .* bytes of memory to share"):
        Slab.create(1 << 60)


PARENT = """
import asyncio, sys, time
import numpy as np
from odd_ops import Odd
from predictor.ops.op import Batch
from predictor.processes import OwnProcesses
from predictor.tensors import texts

async def main():
    op = OwnProcesses("odd_ops:Odd", {"seconds": 60}, 1)
    op.bind(op.wanted())
    op.open()
    batch = Batch(x=np.ones((1, 4), np.float32), do=texts([b"sleep"]))
    batch.rows, batch.deadline = 1, None
    answer = asyncio.ensure_future(op.run(batch))
    await asyncio.sleep(0)
    print(op._workers[0].pid, flush=True)
    try:
        await answer
    finally:
        op.close()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent_or_complains(number):
    """It is busy when the parent's group is interrupted, or the parent killed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    parent = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )
    try:
        worker = Path(f"/proc/{int(parent.stdout.readline())}")
        assert worker.exists()
        if number is signal.SIGINT:
            os.killpg(parent.pid, number)
        else:
            parent.kill()
        out, err = parent.communicate(timeout=60)
        assert (out, err) == ("interrupted\n" if number is signal.SIGINT else "", "")
        until = time.monotonic() + 60
        while worker.exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert not worker.exists()
    finally:
        parent.kill()
        parent.communicate()


def test_the_op_runs_in_other_processes(loop, odd):
    (found,) = loop.run(answer(odd, told("")))
    assert int(found["pid"][0]) in {worker.pid for worker in odd._workers}
    assert os.getpid() not in found["pid"]
    here = Odd()
    here.open()
    assert (here.run(told(""))["y"] == found["y"]).all()
