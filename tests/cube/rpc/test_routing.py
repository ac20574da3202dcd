"""Decisions about replicas, on a clock that only the tests move."""

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cube.errors import BadConfig
from cube.rpc.naming import Place
from cube.rpc.routing import (
    BUSY_MOST_S,
    EJECT_LEAST_CALLS,
    EWMA_S,
    HASH_LOAD,
    HEDGE_SAMPLES,
    LEAST_LATENCY_S,
    UNREACHABLE_MOST_S,
    HedgeCap,
    HedgeDelay,
    OpinionBudget,
    Options,
    Outcome,
    Policy,
    Replicas,
    RetryBudget,
    attempt_timeout,
)

OK, FAILED, UNREACHABLE = Outcome.OK, Outcome.FAILED, Outcome.UNREACHABLE


def replicas_of(places, policy=Policy.ROUND_ROBIN, seed=1, **options):
    """places: a number, or {name: weight}."""
    if isinstance(places, int):
        places = {chr(ord("a") + n): 1.0 for n in range(places)}
    replicas = Replicas(Options(policy=policy, **options), Random(seed))
    replicas.update([Place(target, float(weight)) for target, weight in places.items()])
    return replicas


def named(replicas, target):
    return next(replica for replica in replicas if replica.target == target)


def ask(replicas, now, outcome=OK, latency_s=0.001, target=None, **picked):
    """A whole call, at one moment; who had it."""
    replica = named(replicas, target) if target else replicas.pick(now, **picked)
    replicas.begin(replica, now)
    replicas.end(replica, now, latency_s, outcome)
    return replica.target


def fail(replicas, now, target, times=3, outcome=FAILED):
    for _ in range(times):
        ask(replicas, now, outcome, target=target)


def is_in(replicas):
    return "".join(replica.target for replica in replicas if replica.out_until is None)


# ---- policies ----


@pytest.mark.parametrize(
    ("policy", "weights", "order"),
    [
        (Policy.ROUND_ROBIN, {"a": 1, "b": 1, "c": 1}, "bcabcabca"),
        (Policy.ROUND_ROBIN, {"a": 3, "b": 1, "c": 3}, "cacabca" * 3),
        (Policy.WEIGHTED, {"a": 1, "b": 1, "c": 1}, "abcabcabc"),
        (Policy.WEIGHTED, {"a": 5, "b": 1, "c": 1}, "aabacaa" * 2),  # nginx's example
    ],
)
def test_order(policy, weights, order):
    replicas = replicas_of(weights, policy)
    assert "".join(ask(replicas, 0) for _ in order) == order


@pytest.mark.parametrize("policy", Policy)
@settings(max_examples=15, deadline=None)
@given(weights=st.lists(st.floats(0.2, 5), min_size=2, max_size=8), data=st.data())
def test_weights_count_in_every_policy(policy, weights, data):
    """With as many calls in flight as a busy service has, each replica gets its share of them."""
    replicas = replicas_of({f"r{n}": weight for n, weight in enumerate(weights)}, policy, data.draw(st.integers(0, 99)))
    replicas_by_name = {replica.target: replica for replica in replicas}
    random, running, seen, now = Random(1), [], Counter(), 0.0
    for _ in range(3000):
        now += 0.001
        replica = replicas.pick(now, key=random.getrandbits(64))
        replicas.begin(replica, now)
        running.append(replica)
        seen[replica.target] += 1
        if len(running) > 100:  # the heavier serve more at once, so which call ends is a matter of weight
            ending = random.choices(list(replicas_by_name.values()), weights)[0]
            replica = ending if ending in running else running[0]
            running.remove(replica)
            replicas.end(replica, now, 0.01, OK)
    for replica, weight in zip(replicas, weights, strict=True):
        share = 3000 * weight / sum(weights)
        assert share * 0.7 - 15 < seen[replica.target] < share * 1.3 + 15


def test_least_loaded_prefers_the_faster_and_the_idler():
    replicas = replicas_of(2, Policy.LEAST_LOADED)
    ask(replicas, 0, latency_s=0.010, target="a")
    ask(replicas, 0, latency_s=0.001, target="b")
    b = named(replicas, "b")
    for _ in range(8):
        assert replicas.pick(0) is b
        replicas.begin(b, 0)
    for _ in range(3):
        replicas.begin(b, 0)
    assert replicas.pick(0).target == "a"  # 1 × 10 ms is less than 12 × 1 ms


def test_least_loaded_tries_a_slow_replica_again():
    replicas = replicas_of(2, Policy.LEAST_LOADED)
    ask(replicas, 0, latency_s=1.0, target="a")
    now, asked = 0.0, []
    while "a" not in asked:
        now += 0.01
        replica = replicas.pick(now)
        asked.append(ask(replicas, now, target=replica.target))
        assert now < 30
    assert now > 2


def test_least_loaded_does_not_flood_one_that_is_new():
    replicas = replicas_of(1, Policy.LEAST_LOADED)
    ask(replicas, 0, latency_s=0.001)
    replicas.update([Place("a"), Place("new")])
    begun = Counter()
    for _ in range(110):
        replica = replicas.pick(0)
        replicas.begin(replica, 0)
        begun[replica.target] += 1
    assert 90 <= begun["new"] <= 101  # it is thought to be fast, not infinitely fast


@pytest.mark.parametrize("outcome", [FAILED, Outcome.OVERLOADED, Outcome.REFUSED, Outcome.LACKING])
def test_least_loaded_is_not_drawn_to_one_that_fails_fast(outcome):
    replicas = replicas_of(2, Policy.LEAST_LOADED, eject_after=1000)
    for target in "ab":
        ask(replicas, 0, latency_s=0.001, target=target)
    for _ in range(10):
        ask(replicas, 0, outcome, latency_s=0.00001, target="a")
    picks = [replicas.pick(0.01).target for _ in range(200)]
    if outcome is FAILED:  # which is for ejection to deal with
        assert picks.count("a") < 150
    else:
        assert "a" not in picks


@pytest.mark.parametrize("outcome", [Outcome.OVERLOADED, Outcome.REFUSED, Outcome.LACKING])
@pytest.mark.parametrize("latency_s", [0.0005, 0.01, 0.2])
def test_least_loaded_leaves_one_that_only_refuses(outcome, latency_s):
    replicas = replicas_of(2, Policy.LEAST_LOADED)
    asked = Counter()
    for number in range(5000):  # ten seconds
        now = number / 500
        replica = replicas.pick(now)
        is_bad = replica.target == "a"
        asked[ask(replicas, now, outcome if is_bad else OK, 0.00001 if is_bad else latency_s, replica.target)] += 1
    assert asked["a"] < 50  # those it takes to find out; then one when what is expected has halved
    assert is_in(replicas) == "ab"


@given(st.lists(st.tuples(st.sampled_from(Outcome), st.floats(0, 2), st.floats(0, 1)), max_size=40))
def test_a_refusal_makes_no_replica_look_faster(calls):
    replicas = replicas_of(2, Policy.LEAST_LOADED)
    a, now = named(replicas, "a"), 0.0
    for outcome, latency_s, pause_s in calls:
        now += pause_s
        before = a.expected_s * math.exp((a.expected_at - now) / EWMA_S)
        ask(replicas, now, outcome, latency_s, target="a")
        if outcome in (Outcome.REFUSED, Outcome.LACKING, Outcome.OVERLOADED):
            after = a.expected_s * math.exp((a.expected_at - now) / EWMA_S)
            assert after >= max(before * 0.999, min(1.9 * max(before, LEAST_LATENCY_S), BUSY_MOST_S))


def test_least_loaded_learns_from_calls_that_were_given_up():
    replicas = replicas_of(2, Policy.LEAST_LOADED)
    for target in "ab":
        ask(replicas, 0, latency_s=0.001, target=target)
    ask(replicas, 0, Outcome.ABANDONED, latency_s=0.05, target="a")
    assert {replicas.pick(0).target for _ in range(50)} == {"b"}
    assert named(replicas, "a").latency_s == 0.001  # but that is what its answers took
    assert named(replicas, "a").failures == 0


@given(st.integers(2, 12), st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=50), st.data())
def test_a_replica_that_leaves_takes_only_its_own_keys_along(count, keys, data):
    weights = {f"r{n}": data.draw(st.floats(0.1, 10)) for n in range(count)}
    replicas = replicas_of(weights, Policy.CONSISTENT_HASH)
    before = {key: replicas.pick(0, key=key).target for key in keys}
    left = data.draw(st.sampled_from(sorted(weights)))
    replicas.update([Place(target, weight) for target, weight in weights.items() if target != left])
    after = {key: replicas.pick(0, key=key).target for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != left)
    assert left not in after.values()
    replicas.update([Place(target, weight) for target, weight in reversed(weights.items())])
    assert {key: replicas.pick(0, key=key).target for key in keys} == before


def test_keys_go_by_weight():
    replicas = replicas_of({"a": 1, "b": 3}, Policy.CONSISTENT_HASH)
    seen = Counter(replicas.pick(0, key=key).target for key in range(8000))
    assert 1800 < seen["a"] < 2200


@given(st.integers(2, 9), st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_a_popular_key_does_not_overrun_its_replica(count, calls, key):
    replicas = replicas_of(count, Policy.CONSISTENT_HASH)
    for running in range(calls):
        replica = replicas.pick(0, key=key)
        replicas.begin(replica, 0)
        assert replica.in_flight <= math.ceil(HASH_LOAD * (running + 1) / count)


def test_calls_without_a_key_are_spread():
    replicas = replicas_of(4, Policy.CONSISTENT_HASH)
    assert min(Counter(replicas.pick(0).target for _ in range(4000)).values()) > 800


# ---- lists that change ----


@pytest.mark.parametrize("policy", Policy)
def test_one_replica_and_none_to_go_to(policy):
    replicas = replicas_of(1, policy)
    (only,) = replicas
    assert replicas.pick(0) is only
    assert replicas.pick(0, {only}) is None
    fail(replicas, 0, "a", 10)
    fail(replicas, 0, "a", 1, UNREACHABLE)
    assert replicas.pick(0) is only
    assert not replicas.has_other(only)


def test_what_is_known_of_a_replica_outlives_a_new_list():
    replicas = replicas_of(3)
    fail(replicas, 0, "a")
    a = named(replicas, "a")
    left = replicas.update([Place("a", 2.0), Place("d")])
    assert [replica.target for replica in left] == ["b", "c"]
    assert all(replica.gone for replica in left)
    assert named(replicas, "a") is a
    assert (a.weight, is_in(replicas), len(replicas)) == (2.0, "d", 2)


def test_one_that_has_left_may_end_its_calls():
    replicas = replicas_of(2)
    a, _ = replicas
    for _ in Outcome:
        replicas.begin(a, 0)
    assert replicas.update([Place("b")]) == [a]
    for outcome in Outcome:
        replicas.end(a, 1, 1, outcome)
    assert a.in_flight == 0
    assert is_in(replicas) == "b"


# ---- out and in again ----


@pytest.mark.parametrize(
    ("outcomes", "is_out"),
    [
        ([FAILED, FAILED], False),
        ([FAILED, FAILED, OK, FAILED, FAILED], False),
        ([FAILED, FAILED, Outcome.REFUSED, FAILED, FAILED], False),  # it has answered
        ([FAILED, FAILED, Outcome.ABANDONED, FAILED], True),  # that says nothing
        ([Outcome.REFUSED] * 100, False),
        ([Outcome.OVERLOADED] * 100, False),
        ([Outcome.ABANDONED] * 100, False),
        ([FAILED] * 3, True),
        ([UNREACHABLE], True),
        ([FAILED, FAILED, OK] * (EJECT_LEAST_CALLS // 3), False),  # 18 calls
        ([FAILED, FAILED, OK] * EJECT_LEAST_CALLS, True),
        ([FAILED, OK] * EJECT_LEAST_CALLS, True),
        ([FAILED, OK, OK] * 100, False),
    ],
)
def test_what_ejects(outcomes, is_out):
    replicas = replicas_of(2)
    for outcome in outcomes:
        ask(replicas, 0, outcome, target="a")
    assert is_in(replicas) == ("b" if is_out else "ab")


@given(
    st.lists(
        st.tuples(st.sampled_from([*Outcome, "behind", "wrong call"]), st.sampled_from("abc"), st.floats(0, 3)),
        max_size=80,
    )
)
def test_a_judgement_counts_as_the_outcome_that_it_turns_out_to_be(calls):
    """Against a twin that is told so at once: of one that is behind a failure, of a wrong call a refusal."""
    replicas, twin = replicas_of(3), replicas_of(3)
    now = 0.0
    for outcome, target, pause_s in calls:
        now += pause_s
        if isinstance(outcome, Outcome):
            if outcome is Outcome.LACKING and replicas.has_other(named(replicas, target)):
                continue  # see below: without another's word it says nothing
            ask(replicas, now, outcome, target=target)
            ask(twin, now, outcome, target=target)
            continue
        could_be_judged = replicas.has_other(named(replicas, target))
        ask(replicas, now, Outcome.LACKING, target=target)
        if could_be_judged:
            replicas.judge(named(replicas, target), now, is_behind=outcome == "behind")
        is_failure = could_be_judged and outcome == "behind"
        ask(twin, now, FAILED if is_failure else Outcome.REFUSED, target=target)
        for one, other in zip(replicas, twin, strict=True):
            assert (one.out_until, one.failures, one.failures_in_row) == (
                other.out_until, other.failures, other.failures_in_row,
            )  # fmt: skip


def test_a_refusal_nobody_judges_says_nothing():
    replicas = replicas_of(2)
    fail(replicas, 0, "a", 2)
    for _ in range(10):
        ask(replicas, 0, Outcome.LACKING, target="a")
    assert is_in(replicas) == "ab"
    fail(replicas, 0, "a", 1)
    a = named(replicas, "a")
    assert is_in(replicas) == "b"
    ask(replicas, a.out_until, Outcome.LACKING, target="a")
    assert is_in(replicas) == "b"


def test_one_that_is_behind_goes_out_and_stays_out_until_it_is_not():
    replicas = replicas_of(2)
    a, _ = replicas
    for times in range(1, 4):
        assert is_in(replicas) == "ab"
        ask(replicas, 0, Outcome.LACKING, target="a")
        replicas.judge(a, 0, is_behind=True)
        assert a.failures == times
    for _ in range(5):
        assert is_in(replicas) == "b"
        now, times_out = a.out_until, a.times_out
        ask(replicas, now, Outcome.LACKING, target="a")
        replicas.judge(a, now, is_behind=True)
        assert a.times_out == times_out + 1
    now = a.out_until
    ask(replicas, now, Outcome.LACKING, target="a")
    replicas.judge(a, now, is_behind=False)  # it lacks what nobody has
    assert is_in(replicas) == "ab"


def test_the_only_one_that_is_back_is_in_whatever_it_says():
    replicas = replicas_of(2)
    for target in "ab":
        fail(replicas, 0, target, 1, UNREACHABLE)
    ask(replicas, 0.1, Outcome.LACKING, target="a")
    assert is_in(replicas) == "a"


def test_a_judgement_of_one_that_has_left():
    replicas = replicas_of(2)
    a, _ = replicas
    replicas.begin(a, 0)
    replicas.update([Place("b")])
    replicas.end(a, 1, 1, Outcome.LACKING)
    for is_behind in (True, False):
        replicas.judge(a, 1, is_behind)
    assert is_in(replicas) == "b"


def test_a_window_of_failures_ends():
    replicas = replicas_of(2)
    now = 0.0
    for _ in range(100):
        now += 1.2  # in ten seconds of these there are never 20 calls
        for outcome in (FAILED, OK):
            ask(replicas, now, outcome, target="a")
    assert is_in(replicas) == "ab"
    for _ in range(1000):  # nor do the good calls of before count
        ask(replicas, now, target="a")
    now += 11
    for _ in range(EJECT_LEAST_CALLS):
        ask(replicas, now, FAILED, target="a")
        ask(replicas, now, FAILED, target="a")
        ask(replicas, now, OK, target="a")
    assert is_in(replicas) == "b"


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("outcome", [FAILED, UNREACHABLE])
def test_one_that_is_out_is_asked_once_when_its_time_is_up(policy, outcome):
    replicas = replicas_of(3, policy, eject_s=1.0, eject_most_s=8.0)
    fail(replicas, 0, "b", outcome=outcome)
    b = named(replicas, "b")
    now, most = 0.0, UNREACHABLE_MOST_S if outcome is UNREACHABLE else 8.0
    for times in range(6):
        left = b.out_until - now
        assert 0.8 <= left / min(2.0**times, most) <= 1.2
        assert "b" not in {replicas.pick(now + left * 0.99, key=key).target for key in range(100)}
        now += left
        asked = []
        for key in range(100):
            replica = replicas.pick(now, key=key)
            replicas.begin(replica, now)
            asked.append(replica)
        assert asked.count(b) == 1
        for replica in asked:
            replicas.end(replica, now, 0.001, outcome if replica is b else OK)
    now = b.out_until
    replica = next(r for key in range(100) if (r := replicas.pick(now, key=key)) is b)
    replicas.begin(replica, now)
    replicas.end(replica, now, 0.001, OK)
    assert is_in(replicas) == "abc"


def test_a_retry_does_not_find_out():
    replicas = replicas_of(3)
    fail(replicas, 0, "b")
    a, b, c = replicas
    assert replicas.pick(99, {a}) is c
    assert replicas.pick(99, {a, c}) is None  # those are better than one that failed
    assert replicas.pick(99) is b


def test_one_that_hangs_when_it_is_asked_again_is_asked_again():
    replicas = replicas_of(2)
    fail(replicas, 0, "a")
    a = named(replicas, "a")
    asked_at = [now / 10 for now in range(100) if replicas.pick(now / 10) is a and not replicas.begin(a, now / 10)]
    assert len(asked_at) in range(7, 13)  # about every second
    assert asked_at[0] >= 0.8


def test_answers_and_failures_of_before():
    replicas = replicas_of(2)
    a, _ = replicas
    for _ in range(20):
        replicas.begin(a, 0)
    for _ in range(10):
        replicas.end(a, 0, 0, FAILED)
    assert a.times_out == 0  # what was in flight makes nothing longer
    replicas.end(a, 0.1, 0, OK)  # nor do its good answers make it shorter
    assert is_in(replicas) == "b"
    assert a.times_out == 0


def test_ejected_again_soon_is_ejected_for_longer_and_later_is_not():
    def out_s(replicas, now):
        fail(replicas, now, "a")
        a = named(replicas, "a")
        left = a.out_until - now
        ask(replicas, a.out_until, target="a")
        assert a.out_until is None
        return round(left)

    replicas = replicas_of(2)
    assert [out_s(replicas, now) for now in (0, 2, 5)] == [1, 2, 4]
    assert out_s(replicas, 60) == 1


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 8), st.sampled_from(Outcome)), max_size=200))
def test_whatever_happens_there_is_one_to_ask(count, events):
    replicas = replicas_of(count)
    everyone = list(replicas)
    for now, (number, outcome) in enumerate(events):
        ask(replicas, now / 10, outcome, target=everyone[number % count].target)
        ejected = [replica for replica in everyone if replica.out_until is not None and not replica.is_unreachable]
        unreachable = [replica for replica in everyone if replica.is_unreachable]
        assert len(ejected) <= max(count // 2, 0)
        replica = replicas.pick(now / 10)
        assert replica in everyone
        at_ease = replica.out_until is None or replica.out_until <= now / 10
        if not at_ease:  # none is in
            assert len(ejected) + len(unreachable) == count
            assert replica in (ejected or unreachable)
        assert all(not replica.in_flight for replica in everyone)


def test_most_fail():
    """What fails everywhere is not the replicas' fault: half stay in."""
    replicas = replicas_of(5)
    for target in "abcde":
        fail(replicas, 0, target, 10)
    assert is_in(replicas) == "cde"


def test_most_are_unreachable():
    replicas = replicas_of(5)
    for target in "abcd":
        fail(replicas, 0, target, 1, UNREACHABLE)
    assert is_in(replicas) == "e"
    fail(replicas, 0, "e", 10)
    assert {ask(replicas, 0) for _ in range(20)} == {"e"}  # it fails, but it is there
    fail(replicas, 0, "e", 1, UNREACHABLE)
    assert {replicas.pick(0).target for _ in range(20)} == set("abcde")
    ask(replicas, 0, target="c")
    assert is_in(replicas) == "c"  # long before its time


def test_the_ejected_come_before_the_unreachable():
    replicas = replicas_of(2)
    fail(replicas, 0, "a")
    fail(replicas, 0, "b", 1, UNREACHABLE)
    assert {replicas.pick(0.1).target for _ in range(20)} == {"a"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("retries", -1), ("retry_ratio", -0.1), ("retry_saved", math.nan), ("hedge", 0.0), ("hedge", 1.0),
        ("hedge_share", 0.0), ("hedge_floor_s", 2.0), ("eject_after", 0), ("eject_share", 1.5),
        ("eject_window_s", 0.0), ("eject_s", 60.0),
    ],
)  # fmt: skip
def test_bad_options(name, value):
    with pytest.raises(BadConfig, match=f"balancer option {name}: found {value}"):
        Options(**{name: value})


# ---- retries, hedges, deadlines ----


@given(st.floats(0, 1), st.integers(0, 30), st.integers(0, 500))
def test_retries_are_a_share_of_the_calls(ratio, most, calls):
    budget = RetryBudget(ratio, most)
    retries = 0
    for _ in range(calls):  # everything fails, and is retried as often as may be
        budget.add_call()
        while budget.may_retry():
            retries += 1
    assert retries <= most + ratio * calls + 1e-6
    if most > 1 and calls:  # else a part of a retry is not saved up
        assert retries >= most - 1 + ratio * (calls - 1) - 1


def test_a_budget_pays_for_one_retry_in_ten_calls():
    budget = RetryBudget(0.1, 1)
    assert [budget.may_retry(), budget.may_retry()] == [True, False]
    for _ in range(10):
        assert not budget.may_retry()
        budget.add_call()
    assert budget.may_retry()


def test_a_budget_does_not_save_for_ever():
    budget = RetryBudget(0.1, 20)
    for _ in range(100_000):
        budget.add_call()
    assert sum(budget.may_retry() for _ in range(100)) == 20


@given(st.floats(0, 1), st.integers(0, 30), st.lists(st.booleans(), max_size=300))
def test_only_opinions_that_were_of_no_use_are_a_share_of_the_calls(ratio, most, answered):
    budget = OpinionBudget(ratio, most)
    useless = refused = 0
    for is_answered in answered:
        budget.add_call()
        if not budget.may_ask():
            refused += 1
        elif is_answered:
            budget.was_answered()
        else:
            useless += 1
    assert useless <= most + ratio * len(answered) + 1e-6
    if most and all(answered):
        assert not refused


def test_opinions_that_come_late_are_not_saved_up_beyond_the_most():
    budget = OpinionBudget(1, 2)
    assert [budget.may_ask() for _ in range(3)] == [True, True, False]
    for _ in range(2):
        budget.add_call()
        budget.was_answered()
    assert [budget.may_ask() for _ in range(3)] == [True, True, False]


@given(st.floats(0.001, 1), st.lists(st.integers(0, 3), max_size=300))
def test_hedges_are_a_share_of_recent_calls(share, wanted):
    cap = HedgeCap(share)
    hedges = 0
    for calls, want in enumerate(wanted, 1):
        cap.add_call()
        hedges += sum(cap.may_hedge() for _ in range(want))
        assert hedges <= share * calls + 1e-6


def test_hedges_that_were_not_sent_are_forgotten():
    cap = HedgeCap(0.03)
    for _ in range(1_000_000):
        cap.add_call()
    assert sum(cap.may_hedge() for _ in range(1000)) == 30


def test_a_hedge_delay_is_none_until_enough_is_known():
    delay = HedgeDelay()
    for _ in range(HEDGE_SAMPLES - 1):
        delay.record(0.01)
        assert delay.hedge_after() is None
    delay.record(0.01)
    assert 0.01 <= delay.hedge_after() <= 0.0110


@given(
    st.sampled_from([0.5, 0.9, 0.95, 0.99]),
    st.lists(st.floats(-13, 4), min_size=64, max_size=400),
)
def test_a_hedge_delay_is_the_percentile(percentile, logarithms):
    """Against sorted latencies: at most a cell above."""
    latencies = [math.exp(logarithm) for logarithm in logarithms]
    delay = HedgeDelay(percentile, 0, 1000)
    for latency_s in latencies:
        delay.record(latency_s)
    known = sorted(latencies[: len(latencies) // 32 * 32])
    truth = known[math.ceil(percentile * len(known)) - 1]
    assert truth * 0.999 <= delay.hedge_after() <= max(truth, 1e-6) * 1.0906


@pytest.mark.parametrize("latency_s", [0.0, 1e-9, 1e-6, 0.001, 1.0, 1e6])
def test_a_hedge_delay_has_bounds(latency_s):
    delay = HedgeDelay(0.95, 0.0005, 0.5)
    for _ in range(100):
        delay.record(latency_s)
    assert 0.0005 <= delay.hedge_after() <= 0.5


def test_a_hedge_delay_follows():
    delay = HedgeDelay(0.95)
    for _ in range(100_000):
        delay.record(0.001)
    calls = 0
    while delay.hedge_after() < 0.01:
        delay.record(0.01)
        calls += 1
    assert calls < 500
    for _ in range(10_000):
        delay.record(0.001)
    assert delay.hedge_after() < 0.0011


@pytest.mark.parametrize(
    ("left_s", "attempts_left", "usual_s", "expected"),
    [
        (1.0, 1, 0.0, 1.0),
        (1.0, 2, 0.0, 0.5),
        (1.0, 3, 0.01, 0.5),
        (1.0, 3, 0.2, 0.8),  # half would often be too little
        (1.0, 3, 0.6, 1.0),
        (0.0, 3, 0.1, 0.0),
    ],
)
def test_parts_of_a_deadline(left_s, attempts_left, usual_s, expected):
    assert attempt_timeout(left_s, attempts_left, usual_s) == expected


@given(st.floats(0, 100), st.integers(1, 6))
def test_parts_of_a_deadline_leave_some_to_the_last(left_s, attempts):
    spent = 0.0
    for number in range(attempts, 0, -1):
        part = attempt_timeout(left_s - spent, number)
        assert part >= (left_s - spent) / 2
        spent += part
    assert spent == pytest.approx(left_s)
