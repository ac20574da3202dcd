"""When requests leave as one batch, and that each gets its own part back."""

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cube.errors import (
    BadConfig,
    BadRequest,
    DeadlineExceeded,
    Internal,
    OutOfMemory,
    Overloaded,
    ShardUnavailable,
    Unavailable,
)
from predictor import batching
from predictor.batching import Batcher, Limits, decide
from predictor.ops.op import Port, Ragged

PORTS = {"x": Port("INT64", (-1,)), "bag": Port("INT64", (-1,), ragged=True, per_row=2)}


def request(*numbers):
    """A row for each number; row n has n % 3 and 1 values in its two bags."""
    lengths = np.array([size for n in numbers for size in (n % 3, 1)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return {
        "x": np.array(numbers, np.int64),
        "bag": Ragged(np.repeat(np.repeat(numbers, 2), lengths).astype(np.int64), offsets),
    }


class Runs:
    """What a batcher starts: y = 10 x, from both inputs. Remembers its runs."""

    def __init__(self, seconds=None, fail=None):
        self.seconds, self.fail, self.runs, self.running, self.most = seconds, fail, [], 0, 0

    def start(self, values, rows, work, deadline):
        assert all(PORTS[name].misfit(value, rows) == "" for name, value in values.items())
        bags = values["bag"]
        for row in range(rows):  # everybody's values are their own
            mine = bags.values[bags.offsets[2 * row] : bags.offsets[2 * row + 2]]
            assert (mine == values["x"][row]).all()
        self.runs.append(values["x"].tolist())
        if self.seconds is None:
            return self.made(values)
        return self.later(values)

    async def later(self, values):
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return self.made(values)

    def made(self, values):
        if self.fail is not None:
            self.fail(values["x"])
        return 10 * values["x"]


def answer_of(shares):
    return np.concatenate([share.run[share.start : share.stop] for share in shares]).tolist()


async def asked(batcher, *numbers, deadline=None, priority=0):
    made = batcher.submit(request(*numbers), len(numbers), len(numbers), deadline, priority, then=answer_of)
    return made if isinstance(made, list) else await made


def batcher_of(runs, **limits):
    return Batcher("workflow 'w'", runs.start, PORTS, Limits(**limits))


def run(work):
    return asyncio.run(asyncio.wait_for(work, 120))


# ---- the decision ----

SIZES = st.lists(st.integers(1, 10), min_size=1, max_size=20)


@given(SIZES, st.integers(10, 40), st.sets(st.integers(1, 10)), st.floats(0, 2), st.floats(0, 2))
def test_a_decision_keeps_to_its_limits(waiting, most, preferred, delay_s, waited_s):
    limits = Limits(max_rows=most, max_delay_s=delay_s, preferred_rows=tuple(sorted(preferred)))
    count, wait_s = decide(limits, waiting, waited_s)
    if count:
        assert count == 1 or sum(waiting[:count]) <= most
        assert wait_s == 0
    else:
        assert 0 < wait_s <= delay_s - waited_s + 1e-9
        assert sum(waiting) < most
        assert not any(size <= sum(waiting) for size in preferred)


@pytest.mark.parametrize(
    ("limits", "waiting", "waited_s", "decision"),
    [
        ({}, [1], 0, (1, 0)),  # nobody waits for company
        ({}, [1, 2, 3], 0, (3, 0)),
        ({"max_rows": 4}, [1, 2, 3], 0, (2, 0)),
        ({"max_rows": 4}, [4, 1], 0, (1, 0)),
        ({"max_delay_s": 1}, [1, 2], 0.25, (0, 0.75)),
        ({"max_delay_s": 1}, [1, 2], 1, (2, 0)),
        ({"max_delay_s": 1, "max_rows": 3}, [1, 2], 0, (2, 0)),  # full
        ({"max_delay_s": 1, "max_rows": 4}, [3, 2], 0, (1, 0)),  # no more fits
        ({"max_delay_s": 1, "preferred_rows": (2,)}, [1, 1, 1], 0, (2, 0)),
        ({"preferred_rows": (2, 4)}, [1, 1, 1], 0, (2, 0)),
        ({"preferred_rows": (2, 4)}, [3], 0, (1, 0)),  # a request is not cut for it
    ],
)
def test_decisions(limits, waiting, waited_s, decision):
    assert decide(Limits(**limits), waiting, waited_s) == decision


@pytest.mark.parametrize(
    "limits",
    [
        {"max_rows": 0}, {"max_in_flight": 0}, {"max_delay_s": -1}, {"max_delay_s": 100}, {"preferred_rows": (3, 2)},
        {"preferred_rows": (9,), "max_rows": 8}, {"allowed_rows": (2, 4), "max_rows": 8}, {"max_waiting_rows": 0},
        {"max_waiting_rows": 7, "max_rows": 8},
    ],
)  # fmt: skip
def test_limits_that_contradict_themselves(limits):
    with pytest.raises(BadConfig, match="workflow 'w'"):
        batcher_of(Runs(), **limits)


# ---- requests ----


def test_a_caller_that_is_alone_is_answered_at_once():
    async def main():
        batcher = batcher_of(Runs())
        for n in range(5):
            assert isinstance(batcher.submit(request(n), 1, 1, None, then=answer_of), list)
            await asyncio.sleep(0)
        return batcher.counters

    counters = run(main())
    assert (counters.requests, counters.batches, counters.sizes) == (5, 5, {1: 5})


def test_requests_of_one_turn_become_one_batch():
    runs = Runs()

    async def main():
        batcher = batcher_of(runs)
        return await asyncio.gather(*(asked(batcher, n, n + 100) for n in range(6)))

    assert run(main()) == [[10 * n, 10 * n + 1000] for n in range(6)]
    assert [len(values) for values in runs.runs] == [2, 10]  # the first did not know of the others


def test_what_comes_while_a_batch_runs_is_the_next_batch():
    runs = Runs(seconds=0.05)

    async def main():
        batcher = batcher_of(runs)
        first = asyncio.ensure_future(asked(batcher, 1))
        await asyncio.sleep(0)
        others = [asyncio.ensure_future(asked(batcher, n)) for n in range(2, 8)]
        return await asyncio.gather(first, *others)

    assert run(main()) == [[10 * n] for n in range(1, 8)]
    assert runs.runs == [[1], [2, 3, 4, 5, 6, 7]]
    assert runs.most == 1


def test_several_batches_may_be_in_flight():
    runs = Runs(seconds=0.05)

    async def main():
        batcher = batcher_of(runs, max_in_flight=3, max_rows=2)
        return await asyncio.gather(*(asked(batcher, n) for n in range(12)))

    assert run(main()) == [[10 * n] for n in range(12)]
    assert runs.most == 3
    assert max(map(len, runs.runs)) <= 2


def test_with_a_delay_requests_wait_for_company():
    runs = Runs()

    async def main():
        batcher = batcher_of(runs, max_delay_s=1)
        begin = time.monotonic()
        first = asyncio.ensure_future(asked(batcher, 1))
        await asyncio.sleep(0.02)
        assert await asked(batcher, 2) == [20]
        assert await first == [10]
        return time.monotonic() - begin

    assert run(main()) >= 0.99
    assert runs.runs == [[1, 2]]


def test_a_batch_that_is_full_does_not_wait():
    runs = Runs()

    async def main():
        batcher = batcher_of(runs, max_delay_s=15, max_rows=4)
        return await asyncio.gather(*(asked(batcher, n, n) for n in range(2)))

    assert run(main()) == [[0, 0], [10, 10]]


def test_batches_are_filled_up_to_allowed_sizes():
    runs = Runs()

    async def main():
        batcher = batcher_of(runs, allowed_rows=(4, 8), max_rows=8)
        return await asyncio.gather(asked(batcher, 5, 6, 7), asked(batcher, 1, 2), asked(batcher, 3))

    assert run(main()) == [[50, 60, 70], [10, 20], [30]]
    assert runs.runs == [[5, 6, 7, 1, 2, 3, 3, 3]]  # with a row that somebody has sent


def test_an_oversize_request_is_split_and_joined():
    runs = Runs(seconds=0.001)

    async def main():
        batcher = batcher_of(runs, max_rows=3)
        return await asked(batcher, *range(8))

    assert run(main()) == [10 * n for n in range(8)]
    assert sorted(map(len, runs.runs)) == [2, 3, 3]


def test_priorities_leave_first():
    runs = Runs(seconds=0.1)

    async def main():
        batcher = batcher_of(runs, max_rows=1)
        first = asyncio.ensure_future(asked(batcher, 0))
        await asyncio.sleep(0)
        others = [asked(batcher, n, priority=p) for n, p in ((1, 0), (2, 5), (3, 1), (4, 5))]
        return await asyncio.gather(first, *others)

    run(main())
    assert runs.runs == [[0], [3], [2], [4], [1]]


def test_low_priorities_yield_to_so_many_and_no_more(monkeypatch):
    monkeypatch.setattr(batching, "_YIELDS", 3)
    runs = Runs(seconds=0.1)

    async def main():
        batcher = batcher_of(runs, max_rows=1)
        first = asyncio.ensure_future(asked(batcher, 0))
        await asyncio.sleep(0)
        low = asyncio.ensure_future(asked(batcher, 99, priority=2))
        await asyncio.sleep(0)
        await asyncio.gather(first, low, *(asked(batcher, n, priority=1) for n in range(1, 8)))

    run(main())
    assert runs.runs == [[0], [1], [2], [99], [3], [4], [5], [6], [7]]


def test_expired_requests_leave_before_compute():
    runs = Runs(seconds=0.5)

    async def main():
        batcher = batcher_of(runs)
        first = asyncio.ensure_future(asked(batcher, 1))
        await asyncio.sleep(0)
        late = asyncio.ensure_future(asked(batcher, 2, deadline=time.monotonic() + 0.01))
        gone = asyncio.ensure_future(asked(batcher, 3))
        kept = asyncio.ensure_future(asked(batcher, 4, deadline=time.monotonic() + 100))
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(DeadlineExceeded, match="workflow 'w': the deadline passed while it was waiting"):
            await late
        assert (await first, await kept) == ([10], [40])
        return batcher.counters

    counters = run(main())
    assert runs.runs == [[1], [4]]
    assert (counters.expired, counters.waiting_rows, counters.in_flight) == (2, 0, 0)


def test_a_queue_of_short_runs_leaves_the_event_loop_a_turn_now_and_then():
    def compute(x):
        end = time.thread_time() + 0.003
        while time.thread_time() < end:
            pass

    async def main():
        batcher = batcher_of(Runs(fail=compute), is_on=False)
        waiting = [asyncio.ensure_future(asked(batcher, n)) for n in range(20)]
        turns = 0
        while not all(one.done() for one in waiting):
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert run(main()) >= 8


def test_a_full_queue_refuses():
    runs = Runs(seconds=0.05)

    async def main():
        batcher = batcher_of(runs, max_waiting_rows=3, max_rows=3)
        waiting = [asyncio.ensure_future(asked(batcher, n)) for n in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="workflow 'w': 3 rows are waiting, at most 3 may"):
            await asked(batcher, 9)
        with pytest.raises(Overloaded):
            await asked(batcher, *range(10_000))
        assert await asyncio.gather(*waiting) == [[0], [10], [20], [30]]
        assert await asked(batcher, 5) == [50]
        return batcher.counters.refused

    assert run(main()) == 2


def test_who_has_gone_makes_room_in_a_full_queue(monkeypatch):
    monkeypatch.setattr(batching, "_SWEEP_S", 0.0)
    runs = Runs(seconds=0.05)

    async def main():
        batcher = batcher_of(runs, max_waiting_rows=3, max_rows=3)
        waiting = [asyncio.ensure_future(asked(batcher, n)) for n in range(4)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        late = asyncio.ensure_future(asked(batcher, 7, deadline=time.monotonic() - 1))
        await asyncio.sleep(0)
        assert await asked(batcher, 5) == [50]
        with pytest.raises(DeadlineExceeded):
            await late
        assert [await one for one in (waiting[0], *waiting[2:])] == [[0], [20], [30]]
        return batcher.counters

    counters = run(main())
    assert (counters.refused, counters.expired, counters.waiting_rows) == (0, 2, 0)
    assert runs.runs == [[0], [2, 3, 5]]


def test_what_is_made_of_an_answer_fails_for_its_own_request_only():
    runs = Runs(seconds=0.01)

    def picky(shares):
        made = answer_of(shares)
        if made == [20]:
            raise Internal("twenty")
        return made

    async def main():
        batcher = batcher_of(runs)
        made = [batcher.submit(request(n), 1, 1, None, then=picky) for n in range(4)]
        return await asyncio.gather(*made, return_exceptions=True)

    answers = run(main())
    assert [str(answer) for answer in answers] == ["[0]", "[10]", "twenty", "[30]"]
    assert runs.runs == [[0], [1, 2, 3]]


def fail_on(number, error):
    def fail(x):
        if number in x:
            raise error

    return fail


@pytest.mark.parametrize("seconds", [None, 0.001])
def test_nobody_fails_for_a_neighbour(seconds):
    runs = Runs(seconds, fail_on(3, Internal("three")))

    async def main():
        batcher = batcher_of(runs)
        made = await asyncio.gather(*(asked(batcher, n) for n in range(6)), return_exceptions=True)
        return made, batcher.counters

    made, counters = run(main())
    assert [type(one) for one in made] == [list, list, list, Internal, list, list]
    assert counters.in_flight == counters.waiting_rows == 0


def test_a_cube_that_does_not_answer_is_not_asked_again_for_each():
    runs = Runs(0.001, fail_on(3, ShardUnavailable(0, "here", "gone")))

    async def main():
        batcher = batcher_of(runs)
        return await asyncio.gather(*(asked(batcher, n) for n in range(6)), return_exceptions=True)

    made = run(main())
    assert [type(one) for one in made] == [list, *[ShardUnavailable] * 5]
    assert len(runs.runs) == 2


def test_a_batch_has_the_latest_of_its_deadlines():
    seen = []

    def start(values, rows, work, deadline):
        seen.append(deadline)
        return values["x"]

    async def main():
        batcher = Batcher("w", start, PORTS, Limits(max_delay_s=0.01))
        now = time.monotonic()
        await asyncio.gather(asked(batcher, 1, deadline=now + 50), asked(batcher, 2, deadline=now + 90))
        await asyncio.gather(asked(batcher, 1, deadline=now + 50), asked(batcher, 2))
        return now

    now = run(main())
    assert seen == [now + 90, None]


def test_off_means_a_run_for_each_within_the_same_bounds():
    runs = Runs(0.01)

    async def main():
        batcher = batcher_of(runs, is_on=False, max_in_flight=2, max_waiting_rows=3, max_rows=3)
        waiting = [asyncio.ensure_future(asked(batcher, n, priority=p)) for n, p in ((0, 0), (1, 0), (2, 5), (3, 1))]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await asked(batcher, *range(9))
        assert await asyncio.gather(*waiting) == [[0], [10], [20], [30]]
        assert await asked(batcher, *range(9)) == [10 * n for n in range(9)]  # whole

    run(main())
    assert [len(values) for values in runs.runs] == [1, 1, 1, 1, 9]
    assert runs.most == 2
    assert runs.runs.index([3]) < runs.runs.index([2])


def test_a_batch_that_nobody_waits_for_is_cancelled():
    runs = Runs(seconds=100)

    async def main():
        batcher = batcher_of(runs)
        first = asyncio.ensure_future(asked(batcher, 0))
        await asyncio.sleep(0.01)
        first.cancel()
        waiting = [asyncio.ensure_future(asked(batcher, n)) for n in (1, 2)]
        await asyncio.sleep(0.05)
        assert batcher.counters.in_flight == 1
        for one in waiting:
            one.cancel()
        await asyncio.sleep(0.05)
        return batcher.counters.in_flight

    assert run(main()) == 0


@pytest.mark.parametrize(
    ("error", "runs_each"), [(Overloaded("full"), 1), (OutOfMemory("large"), 6), (Unavailable("it died"), 6)]
)
def test_what_is_run_again_alone(error, runs_each):
    runs = Runs(0.001, fail_on(3, error))

    async def main():
        batcher = batcher_of(runs, max_in_flight=4)
        # The first one does not know of the others, and runs alone.
        made = await asyncio.gather(*(asked(batcher, n) for n in (9, *range(6))), return_exceptions=True)
        return [type(one) for one in made[1:]]

    made = run(main())
    assert made == [type(error) if runs_each == 1 or n == 3 else list for n in range(6)]
    assert sum(3 in values for values in runs.runs) <= 2
    assert runs.most <= 4


def test_a_strange_priority_is_refused():
    with pytest.raises(BadRequest, match="workflow 'w' priority: found -1"):
        run(asked(batcher_of(Runs()), 1, priority=-1))


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=12),
    st.sampled_from([None, 0.0, 0.001]),
    st.integers(1, 6),
    st.integers(1, 3),
)
def test_everybody_gets_their_own(requests, seconds, max_rows, max_in_flight):
    runs = Runs(seconds)

    async def main():
        batcher = batcher_of(runs, max_rows=max_rows, max_in_flight=max_in_flight)
        made = await asyncio.gather(*(asked(batcher, *numbers) for numbers in requests))
        return made, batcher.counters

    made, counters = run(main())
    assert made == [[10 * n for n in numbers] for numbers in requests]
    assert max(map(len, runs.runs)) <= max_rows
    assert runs.most <= max_in_flight
    assert (counters.in_flight, counters.waiting_rows) == (0, 0)
