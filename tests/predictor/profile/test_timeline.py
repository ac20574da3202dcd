"""The picture of who waited for what."""

import asyncio
import itertools
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_services import Add, Fails, Later, X, ask, chain, service_of
from trace_format import check_format, slices_of

from cube.errors import BadRequest, Overloaded
from predictor.batching import Limits
from predictor.ops.op import Op
from predictor.profile.timeline import Slice, Timeline, record, rows_of
from predictor.workflow import Dependency, Kind, Node


def test_a_timeline_shows_requests_runs_and_nodes():
    nodes = [Node("a", Later(0.002)), Node("b", Later(0.004)), Node("c", Add(), (Dependency("a"),), {"x": "a.y"})]
    nodes.append(Node("d", Both(), (Dependency("b"), Dependency("c")), {"x": "b.y", "u": "c.y"}))
    service = service_of(*nodes, kind=Kind.PARALLEL, limits=Limits(max_in_flight=2))

    async def main():
        recording = asyncio.ensure_future(record([service], 0.1))
        await asyncio.sleep(0)
        await asyncio.gather(*(ask(service, count) for count in range(1, 7)))
        with pytest.raises(BadRequest):
            await ask(service, 1_000)
        return json.loads(await recording)

    trace = asyncio.run(main())
    check_format(trace)
    found = slices_of(trace)
    by_kind = Counter(event["cat"] for event in found)
    requests = [event for event in found if event["cat"] == "request"]
    assert sorted(event["args"]["rows"] for event in requests if event["args"]["code"] == "OK") == [1, 2, 3, 4, 5, 6]
    assert Counter(event["args"]["code"] for event in requests) == {"OK": 6, "INVALID_ARGUMENT": 1}
    runs = [event for event in found if event["name"] == "run w"]
    assert sum(event["args"]["rows"] for event in runs) == 21
    assert by_kind["node"] == 4 * len(runs)
    assert by_kind["wait"] >= 1
    assert {event["args"]["where"] for event in found if event["name"] == "a"} == {"event loop"}
    assert {event["args"]["where"] for event in found if event["name"] == "c"} <= {"thread", "event loop"}
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    assert {"service s 7", "requests 1", "runs of w 1", "beside, in w 1"} <= set(names)
    assert not service.counts.watchers
    assert not service.lanes[0].counts.watchers


class Both(Op):
    inputs, outputs = {"x": X, "u": X}, {"y": X}

    def run(self, batch):
        return {"y": batch["x"] + batch["u"]}


def test_a_timeline_shows_where_a_run_failed():
    service, timeline = service_of(*chain(Add(), Fails(Overloaded("full")))), Timeline()
    with timeline.watching([service]), pytest.raises(Overloaded):
        asyncio.run(ask(service))
    trace = timeline.chrome_trace()
    check_format(trace)
    by_name = {event["name"]: event["args"] for event in slices_of(trace)}
    assert by_name["run w"]["code"] == by_name["request s"]["code"] == "RESOURCE_EXHAUSTED"
    assert by_name["b"]["failed"]
    assert "failed" not in by_name["a"]


def test_a_timeline_has_an_end():
    async def main():
        for _ in range(10):
            await ask(service)

    service, timeline = service_of(*chain(Add())), Timeline(most=5)
    with timeline.watching([service]):
        asyncio.run(main())
    trace = timeline.chrome_trace()
    check_format(trace)
    assert trace["otherData"] == {"left_out": 15}
    assert len([event for event in slices_of(trace) if event["cat"] != "node"]) <= 5 * 2


def test_nothing_happened():
    trace = Timeline().chrome_trace()
    assert trace["traceEvents"] == []


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=40))
def test_slices_of_a_row_do_not_overlap_and_there_are_no_more_rows_than_needed(spans):
    slices = [Slice("s", "c", began, began + took, {}) for began, took in spans]
    found = rows_of(slices)
    assert sorted(each for row in found for each in row) == sorted(slices)
    for row in found:
        assert all(a.ended <= b.began for a, b in itertools.pairwise(row))
    crowded = [sum(s.began <= at < s.ended for s in slices) for at in range(71)]
    points = max(Counter(s.began for s in slices if s.began == s.ended).values(), default=0)
    assert max(crowded) <= len(found) <= max(crowded) + points
