"""What is counted of runs and requests: against a slow twin, and of real services."""

import asyncio
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_services import THREADS, Add, Fails, Later, X, ask, chain, rows, service_of

from cube.errors import BadRequest, DeadlineExceeded, Internal, Overloaded, ServingError
from cube.rpc.calls import Call
from predictor.batching import Limits
from predictor.executor import TIMES, Executor, Run
from predictor.ops.op import Op
from predictor.profile.counts import BITS, RequestCounts, RunCounts, by_bits, percentile
from predictor.profile.snapshot import snapshot
from predictor.requests import Form
from predictor.service import Lane, Service
from predictor.workflow import Dependency, Node, plan

# b and c take from a; d, which runs for some rows only, from both.
DIAMOND = plan(
    "w",
    [
        Node("a", Add()),
        Node("b", Add(), (Dependency("a"),), {"x": "a.y"}),
        Node("c", Add(), (Dependency("a"),), {"x": "a.y"}),
        Node("d", Add(), (Dependency("b"), Dependency("c")), {"x": "b.y"}),
    ],
    {"x": X},
)
NEEDS, NEEDED_BY = [[], [0], [0], [1, 2]], [[1, 2], [3], [3], []]


@st.composite
def runs_of_the_diamond(draw):
    gaps = st.integers(0, 1 << 33)
    run = Run([], draw(st.integers(1, 5_000)), 1, None, 4)
    run.began = now = draw(st.integers(1, 1 << 60))
    for at in range(4):
        if at < 3 or draw(st.booleans()):
            for time_ in range(TIMES):
                now += draw(gaps)
                run.times[TIMES * at + time_] = now
    run.ended = now + draw(gaps)
    return run


@given(st.lists(runs_of_the_diamond(), max_size=8), st.integers(1, 3))
def test_runs_add_up_as_a_slow_twin_says(runs, settled_every):
    counts = RunCounts(DIAMOND)
    phases, by_ns = np.zeros((4, 5), np.int64), [Counter() for _ in range(4)]
    for number, run in enumerate(runs):
        counts.ran(run, None)
        if number % settled_every == 0:
            counts.totals()
        for at in range(4):
            times = run.times[TIMES * at : TIMES * (at + 1)]
            if times[0]:
                ready = max([run.began, *(run.times[TIMES * other + 3] for other in NEEDS[at])])
                begun = [run.times[TIMES * other] for other in NEEDED_BY[at]]
                taken = min([run.ended, *(time_ for time_ in begun if time_)])
                phases[at] += np.diff([ready, *times, taken])
                by_ns[at][(times[3] - times[0]).bit_length()] += 1
    found = counts.totals()
    assert (found.runs, found.rows) == (len(runs), sum(run.rows for run in runs))
    assert found.run_ns == sum(run.ended - run.began for run in runs)
    assert np.array_equal(found.phases_ns, phases)
    assert np.array_equal(found.node_ns, phases[:, 1:4].sum(axis=1))
    assert np.array_equal(found.nodes_by_ns, [[c[bits] for bits in range(BITS)] for c in by_ns])
    assert found.node_runs.tolist() == [c.total() for c in by_ns]
    assert found.runs_by_rows.sum() == found.runs_by_ns.sum() == len(runs)


@pytest.mark.parametrize(("rows", "end"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (4096, 4096)])
def test_the_rows_of_a_run_are_in_the_bucket_that_ends_at_the_next_power_of_two(rows, end):
    counts, run = RunCounts(DIAMOND), Run([], rows, 1, None, 4)
    counts.ran(run, None)
    assert 1 << int(counts.totals().runs_by_rows.argmax()) == end


@given(st.lists(st.integers(1_000, 1 << 40), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_those_of_the_sorted_list_within_4_percent(latencies, share):
    counts = RequestCounts()
    for ns in latencies:
        counts.answered(ns, 1)
    by_ns = counts.totals().by_ns
    exact = sorted(latencies)[int(np.ceil(share * len(latencies))) - 1]
    assert percentile(by_ns, share) == pytest.approx(exact, rel=0.04)
    assert by_bits(by_ns).sum() == len(latencies)
    assert by_bits(by_ns)[latencies[0].bit_length()] >= 1


def test_there_is_a_percentile_of_nothing():
    assert percentile(RequestCounts().totals().by_ns, 0.99) == 0


def test_more_runs_than_are_kept_at_once_are_all_counted():
    async def main():
        for _ in range(1_300):
            await ask(service, 2)

    service = service_of(*chain(Add(), Add()))
    asyncio.run(main())
    totals = service.lanes[0].counts.totals()
    assert totals.runs == 1_300
    assert totals.rows == 2_600
    assert totals.node_runs.tolist() == [1_300, 1_300]
    assert totals.waits_by_ns.sum() == 1_300


def test_a_run_tells_which_steps_ran_in_threads():
    seen = []

    async def main():
        await ask(service)

    service = service_of(*chain(Add(), Later(), Add()))  # what has not run yet is expected to be long
    service.lanes[0].counts.watchers.append(lambda run, error: seen.append(run))
    asyncio.run(main())
    assert seen[0].in_threads == {0, 2}
    times = [seen[0].began, *seen[0].times, seen[0].ended]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadRequest("row 3", "no image", "one"), "INVALID_ARGUMENT"),
        (Overloaded("full"), "RESOURCE_EXHAUSTED"),
        (Internal("broken"), "INTERNAL"),
        (ZeroDivisionError(), "INTERNAL"),
    ],
)
@pytest.mark.parametrize("first", [Add, Later])
def test_requests_that_a_node_failed_are_counted_by_code_and_the_node_is_named(error, code, first):
    service = service_of(*chain(first(), Fails(error), Add()))
    for _ in range(2):
        with pytest.raises(type(error) if isinstance(error, ServingError) else Internal):
            asyncio.run(ask(service))
    assert service.counts.totals().by_code == {"OK": 0, code: 2}
    assert service.lanes[0].counts.totals().failures == {("b", code): 2}
    assert service.counts.in_flight == 0


def test_what_is_refused_before_it_runs_is_counted_too():
    async def main():
        for bad in ({}, {"x": np.zeros((1, 3), np.float32)}, {"x": np.full((1, 2), np.nan, np.float32)}):
            with pytest.raises(BadRequest):
                service.infer(bad, (), Call("/p"), then=lambda answer: answer)
        with pytest.raises(BadRequest, match="output 'z'"):
            service.infer(rows(1), ["z"], Call("/p"), then=lambda answer: answer)
        with pytest.raises(DeadlineExceeded):
            await ask(service, deadline=time.monotonic() - 1)
        waiting = [asyncio.ensure_future(ask(service, 10)) for _ in range(8)]
        await asyncio.sleep(0)
        assert service.counts.in_flight == 2  # one runs, one waits; for six there was no room
        waiting[0].cancel()
        told = await asyncio.gather(*waiting, return_exceptions=True)
        assert Counter(type(each).__name__ for each in told) == {"CancelledError": 1, "Overloaded": 6, "Answer": 1}

    service = service_of(*chain(Later(0.05)), limits=Limits(max_rows=10, max_waiting_rows=10))
    asyncio.run(main())
    codes = service.counts.totals().by_code
    assert codes == {
        "OK": 1, "INVALID_ARGUMENT": 4, "DEADLINE_EXCEEDED": 1, "RESOURCE_EXHAUSTED": 6, "CANCELLED": 1
    }  # fmt: skip
    (lane,) = snapshot([service]).services[0].lanes
    assert (lane.refused, lane.waiting_rows, lane.runs_in_flight) == (6, 0, 0)
    assert lane.totals.failures == {("", "DEADLINE_EXCEEDED"): 1, ("a", "CANCELLED"): 1}  # before any node; in one
    assert service.counts.in_flight == 0


def test_the_warm_up_is_not_counted():
    service = service_of(*chain(Add(), Later()))
    asyncio.run(service.warm_up())
    assert service.counts.totals().by_code == {"OK": 0}
    assert service.lanes[0].counts.totals().runs == 0


@pytest.mark.parametrize("at_once", [False, True])
def test_a_service_of_several_workflows_counts_each(at_once):
    form = Form({"x": X}, [], max_samples=100, max_keys=1, finite=True)
    lanes = [
        Lane(Executor(plan(n, [Node("a", op)], form.ports, outputs=None), THREADS), Limits())
        for n, op in (("one", Add()), ("two", Other()))
    ]
    service = Service("s", "7", "test", form, lanes, at_once=at_once)
    asyncio.run(ask(service))
    assert [lane.counts.totals().runs for lane in lanes] == [1, 1]
    assert service.counts.totals().by_code == {"OK": 1}


class Other(Op):
    inputs, outputs = {"x": X}, {"z": X}

    def run(self, batch):
        return {"z": batch["x"]}
