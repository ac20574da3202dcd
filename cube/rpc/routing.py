"""Which replica is asked next, and whether a call may be sent again: decisions only.

No clock, no sockets, no tasks: the time is an argument, chance is a `random.Random`. `balancer` carries them out.

A replica is in, or out for a while. It goes out when it fails (`Options.eject_after` times in a row, or half of its
calls: "ejected") and when it cannot be connected to ("unreachable"). When its time is up one call goes to it to find
out: an answer brings it in, a failure keeps it out for longer. As long as one is in, those that are out are asked
nothing else. At most half are ejected, for what fails everywhere is rarely the replicas' fault; when none is in, those
that were ejected are asked all the same, and when there are none of these either, those that are unreachable.

A refusal is an answer, and a quick one: it must not make a replica look fast. One that says it has not what is asked
for may be behind the others (a version not loaded yet) or not what it is taken for (another shard's server at a reused
address). So another is asked, and what that says decides how the first has done (`Replicas.judge`).
"""

import enum
import hashlib
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from cube.errors import BadConfig
from cube.rpc.naming import Place

EJECT_LEAST_CALLS = 20  # a share of fewer calls says little
UNREACHABLE_MOST_S = 5.0  # to look again costs one refused connection, so a server that is back is soon found
EWMA_S = 2.0  # time constant of a replica's latency: seconds of traffic, not single calls, decide
LEAST_LATENCY_S = 1e-4  # of what is expected: a replica nobody has asked is not infinitely fast
BUSY_MOST_S = 1.0  # of what refusals for overload alone make expected
HASH_LOAD = 1.25  # times its share of the calls in flight that a replica may have before keys go to their next choice
HEDGE_SAMPLES = 50  # before a percentile of latencies means something
USUAL_TIMES = 4.0  # an attempt gets that many times the replica's usual latency before another replica is asked
LONG_AGO = -1e9  # before any time there is; infinity would spoil averages


class Policy(enum.Enum):
    """How a replica is chosen. Weights count in each."""

    ROUND_ROBIN = "round robin"  # in the order of the list; a light replica's turn comes only every so many rounds
    WEIGHTED = "weighted"  # the same shares in the smoothest order: a, a, b, a rather than a, b, a, a
    LEAST_LOADED = "least loaded"  # of two drawn by weight, the one with less in flight × latency / weight
    CONSISTENT_HASH = "consistent hash"  # a key has its replica, as long as that one is in and not overrun


class Outcome(enum.Enum):
    """How a call to a replica ended, as far as the replica is concerned."""

    OK = "ok"
    REFUSED = "refused"  # an error that is the caller's fault: the replica is fine, its latency not typical
    LACKING = "lacking"  # it has not what is asked for, which another may have: `Replicas.judge` says whose fault it is
    OVERLOADED = "overloaded"  # fine, but busier than it looks: an early refusal must not attract calls
    FAILED = "failed"  # an error that is the replica's fault, or no answer in time
    UNREACHABLE = "unreachable"  # no connection
    ABANDONED = "abandoned"  # nobody waited for the end, which says nothing but that it took so long


OK = Outcome.OK  # an enum's attribute is dear where every call asks for it


@dataclass(frozen=True)
class Options:
    """How a balancer treats its replicas. Set once; a change needs a new balancer."""

    policy: Policy = Policy.LEAST_LOADED  # steers around a replica that is slow or hangs before it counts as failing
    retries: int = 2  # attempts after the first: with three replicas, one that dies and one that restarts
    retry_ratio: float = 0.1  # retries per call in the long run: a failing service gets 10 % more calls, not 200 %
    retry_saved: float = 20.0  # retries that may be saved up: what fails at once when a replica stops
    hedge: float | None = None  # 0.95: ask a second replica after the 95th percentile of latencies. None: never
    hedge_share: float = 0.03  # hedges per call at most; with it, the delay is not below the 97th percentile
    hedge_floor_s: float = 0.0005  # least delay: below it, scheduling noise would be hedged
    hedge_ceiling_s: float = 1.0  # longest delay, seconds
    eject_after: int = 3  # failures in a row: one or two happen to the healthy
    eject_share: float = 0.5  # of the calls in a window that failed (20 calls at least)
    eject_window_s: float = 10.0  # that window, seconds; it starts at a failure
    eject_s: float = 1.0  # out for so long at first, twice as long each time it is still failing
    eject_most_s: float = 30.0  # out for so long at most; an unreachable one for 5 s

    def __post_init__(self) -> None:
        share = "more than 0, at most 1"
        for name, is_right, expected in [
            ("retries", self.retries >= 0, "0 or more"),
            ("retry_ratio", self.retry_ratio >= 0, "0 or more"),
            ("retry_saved", self.retry_saved >= 0, "0 or more"),
            ("hedge", self.hedge is None or 0 < self.hedge < 1, "None, or more than 0 and less than 1"),
            ("hedge_share", 0 < self.hedge_share <= 1, share),
            ("hedge_floor_s", 0 <= self.hedge_floor_s <= self.hedge_ceiling_s, "0 to hedge_ceiling_s"),
            ("eject_after", self.eject_after >= 1, "1 or more"),
            ("eject_share", 0 < self.eject_share <= 1, share),
            ("eject_window_s", self.eject_window_s > 0, "more than 0"),
            ("eject_s", 0 < self.eject_s <= self.eject_most_s, "more than 0, at most eject_most_s"),
        ]:
            if not is_right:
                raise BadConfig(f"balancer option {name}", getattr(self, name), expected)


class Replica:
    """One endpoint, and what is known of it. Written by `Replicas` only."""

    def __init__(self, place: Place):
        self.target, self.weight = place
        self.in_flight = 0
        self.calls = 0  # ever begun
        self.failures = 0  # ever, of its own fault
        self.latency_s = 0.0  # of its answers, lately; 0 before the first
        self.gone = False  # no longer among the replicas; its calls in flight may end
        self.out_until: float | None = None  # when it is asked again; None while it is in
        self.is_unreachable = False  # why it is out
        self.seed = int.from_bytes(hashlib.blake2b(self.target.encode(), digest_size=8).digest(), "little")
        self.expected_s = 0.0  # latency to reckon with: also knows of calls that took long and did not succeed
        self.expected_at = LONG_AGO  # when that was; it fades, so that one that is never asked is asked again
        self.turns = 0.0  # of the two round robins
        self.is_probed = False  # a call is finding out whether it is back
        self.times_out = 0  # in a row
        self.back_at = -math.inf
        self.failures_in_row = 0
        self.window = (-math.inf, 0, 0)  # its start, and the calls that had ended and failed before

    def __repr__(self) -> str:
        return f"Replica({self.target}, {'in' if self.out_until is None else f'out until {self.out_until:.3f}'})"


class Replicas:
    """The replicas of one service. Not empty after the first `update`."""

    def __init__(self, options: Options, random: Random):
        self._options, self._random = options, random
        self._by_target: dict[str, Replica] = {}
        self._in: list[Replica] = []  # those asked: in their order
        self._out: list[Replica] = []
        self._heaviest, self._sums = 1.0, [0.0]  # of the weights of those in
        self._turn = 0
        self._choose = {
            Policy.ROUND_ROBIN: self._in_turn,
            Policy.WEIGHTED: self._smoothly,
            Policy.LEAST_LOADED: self._less_loaded,
            Policy.CONSISTENT_HASH: self._by_key,
        }[options.policy]

    def __len__(self) -> int:
        return len(self._by_target)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._by_target.values())

    def has_other(self, replica: Replica) -> bool:
        """Whether another one is in."""
        return len(self._in) > (replica.out_until is None)

    def update(self, places: Iterable[Place]) -> list[Replica]:
        """Take over a new list; what is known of replicas that stay is kept. Returns those that have left."""
        left = self._by_target
        self._by_target = {}
        for place in places:
            replica = left.pop(place.target, None) or Replica(place)
            replica.weight = place.weight
            self._by_target[place.target] = replica
        for replica in left.values():
            replica.gone = True
        self._sort()
        return list(left.values())

    def pick(self, now: float, avoid: Collection[Replica] = (), key: int | None = None) -> Replica | None:
        """The replica for the next call; None if all that can be asked are to be avoided. Tell `begin` if it is asked.

        avoid: those that this call has tried. key: for CONSISTENT_HASH; without one a random key is taken.
        """
        candidates: Sequence[Replica] = self._in or self._last_resort()
        if self._out and self._in and not avoid:  # a call that has failed once is not for finding out
            due = [replica for replica in self._out if replica.out_until is not None and now >= replica.out_until]
            if due and self._options.policy is Policy.CONSISTENT_HASH:  # it is found out with keys of its own
                candidates = [*self._in, *due]
            elif due:
                return due[0]
        if avoid:
            candidates = [replica for replica in candidates if replica not in avoid]
        if len(candidates) <= 1:
            return candidates[0] if candidates else None
        return self._choose(candidates, now, key)

    def begin(self, replica: Replica, now: float) -> None:
        """A call to it begins. Each is to be followed by one `end`."""
        replica.in_flight += 1
        replica.calls += 1
        if replica.out_until is not None and now >= replica.out_until:
            replica.is_probed = True
            replica.out_until = now + self._time_out(replica)  # nobody else meanwhile, even if this one hangs

    def end(self, replica: Replica, now: float, latency_s: float, outcome: Outcome) -> None:
        """A call to it has ended, `latency_s` after it began."""
        replica.in_flight -= 1
        if outcome is OK:
            since_s = now - replica.expected_at
            share = since_s / (since_s + EWMA_S)  # near enough to an exponential average, without an exponential
            replica.latency_s += (latency_s - replica.latency_s) * (share if replica.latency_s else 1.0)
            replica.expected_s += (latency_s - replica.expected_s) * share
            replica.expected_at = now
            replica.failures_in_row = 0
            if replica.out_until is not None:
                self._answered(replica, now)
            return
        if outcome in (Outcome.REFUSED, Outcome.OVERLOADED, Outcome.LACKING):
            if outcome is not Outcome.LACKING or not self.has_other(replica):
                self._was_right(replica, now)
            self._expect(replica, now, min(2 * max(_expected(replica, now), LEAST_LATENCY_S), BUSY_MOST_S))
            return
        self._expect(replica, now, latency_s)
        if outcome is not Outcome.ABANDONED:
            self._failed(replica, now, outcome is Outcome.UNREACHABLE)

    def judge(self, replica: Replica, now: float, is_behind: bool) -> None:
        """What another replica says of a call that ended as LACKING at this one; not told if that one said nothing.

        is_behind: the other one has answered, so this one has failed. Else it has refused too, and the caller is wrong.
        """
        if is_behind:
            self._failed(replica, now, is_unreachable=False)
        else:
            self._was_right(replica, now)

    # ---- in and out ----

    def _was_right(self, replica: Replica, now: float) -> None:
        """It has refused, as any replica would have."""
        replica.failures_in_row = 0
        if replica.out_until is not None:
            self._answered(replica, now)

    def _failed(self, replica: Replica, now: float, is_unreachable: bool) -> None:
        options = self._options
        replica.failures += 1
        replica.failures_in_row += 1
        ended = replica.calls - replica.in_flight
        start, before, failures = replica.window
        if now - start > options.eject_window_s:
            start, before, failures = replica.window = now, ended - 1, replica.failures - 1
        if replica.gone:
            return
        if replica.out_until is not None:
            replica.is_unreachable = is_unreachable or replica.is_unreachable
            if replica.is_probed:  # else the call had begun before it went out, or none is in
                replica.is_probed = False
                replica.times_out += 1
                replica.out_until = now + self._time_out(replica)
            return
        seen = ended - before
        fails = replica.failures_in_row >= options.eject_after or (
            seen >= EJECT_LEAST_CALLS and replica.failures - failures >= options.eject_share * seen
        )
        if is_unreachable or (fails and len(self._out) < len(self._by_target) // 2):
            if now - replica.back_at > options.eject_most_s:
                replica.times_out = 0
            replica.is_unreachable = is_unreachable
            replica.out_until = now + self._time_out(replica)
            self._sort()

    def _time_out(self, replica: Replica) -> float:
        """How long it stays out: longer each time, with jitter so that callers do not come back in step."""
        most = min(UNREACHABLE_MOST_S, self._options.eject_most_s)
        most = most if replica.is_unreachable else self._options.eject_most_s
        seconds: float = self._options.eject_s * 2.0 ** min(replica.times_out, 60)
        return min(seconds, most) * self._random.uniform(0.8, 1.2)

    def _answered(self, replica: Replica, now: float) -> None:
        """One that is out has answered."""
        if self._in and not replica.is_probed:
            return  # the call had begun before it went out: of one that fails half of its calls, half are good
        replica.out_until, replica.is_unreachable, replica.is_probed = None, False, False
        replica.times_out += 1  # if it goes out again soon, then for longer
        replica.back_at, replica.window = now, (-math.inf, 0, 0)
        replica.turns = 0.0
        if not replica.gone:
            self._sort()

    def _sort(self) -> None:
        """Who is in has changed."""
        everyone = self._by_target.values()
        self._in = [replica for replica in everyone if replica.out_until is None]
        self._out = [replica for replica in everyone if replica.out_until is not None]
        self._heaviest = max((replica.weight for replica in self._in), default=1.0)
        self._sums = _sums(self._in)

    def _last_resort(self) -> list[Replica]:
        """Whom to ask when none is in."""
        return [replica for replica in self._out if not replica.is_unreachable] or self._out

    # ---- policies: one of two or more candidates ----

    def _in_turn(self, candidates: Sequence[Replica], now: float, key: int | None) -> Replica:
        heaviest = self._heaviest if candidates is self._in else max(replica.weight for replica in candidates)
        while True:  # the heaviest has a turn in every round
            self._turn = (self._turn + 1) % len(candidates)
            replica = candidates[self._turn]
            replica.turns += replica.weight / heaviest
            if replica.turns >= 1:
                replica.turns -= 1
                return replica

    def _smoothly(self, candidates: Sequence[Replica], now: float, key: int | None) -> Replica:
        best, total = candidates[0], 0.0
        for replica in candidates:
            replica.turns += replica.weight
            total += replica.weight
            if replica.turns > best.turns:
                best = replica
        best.turns -= total
        return best

    def _less_loaded(self, candidates: Sequence[Replica], now: float, key: int | None) -> Replica:
        sums = self._sums if candidates is self._in else _sums(candidates)
        last = len(candidates) - 1
        first = bisect_right(sums, self._random.random() * sums[last], 0, last)
        one = candidates[first]
        place = self._random.random() * (sums[last] - one.weight)  # on the line of weights, without the first one's
        if place >= sums[first] - one.weight:
            place += one.weight
        other = candidates[bisect_right(sums, place, 0, last)]
        return one if _load(one, now) <= _load(other, now) else other

    def _by_key(self, candidates: Sequence[Replica], now: float, key: int | None) -> Replica:
        """Weighted rendezvous hashing: each replica draws for the key, so one that leaves takes no other's keys along.

        One that has more than its share in flight is passed over (bounded loads), and the next draw counts.
        """
        key = self._random.getrandbits(64) if key is None else key
        weights = calls = 0.0
        for replica in candidates:
            weights += replica.weight
            calls += replica.in_flight
        bound = HASH_LOAD * (calls + 1) / weights
        # At least one is below its bound: together these are more than the calls there are.
        below = (replica for replica in candidates if replica.in_flight < bound * replica.weight)
        return max(below, key=lambda replica: replica.weight / -math.log(_draw(key ^ replica.seed)))

    @staticmethod
    def _expect(replica: Replica, now: float, seconds: float) -> None:
        """A sign that answers take at least so long."""
        if seconds > _expected(replica, now):
            replica.expected_s, replica.expected_at = seconds, now


def _sums(replicas: Sequence[Replica]) -> list[float]:
    return list(itertools.accumulate(replica.weight for replica in replicas))


def _expected(replica: Replica, now: float) -> float:
    return replica.expected_s * math.exp((replica.expected_at - now) / EWMA_S)


def _load(replica: Replica, now: float) -> float:
    return (replica.in_flight + 1) * max(_expected(replica, now), LEAST_LATENCY_S) / replica.weight


def _draw(number: int) -> float:
    """A number between 0 and 1, neither included, that looks random: splitmix64's last step."""
    number &= 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return ((number ^ number >> 31) >> 12) * 2.0**-52 + 2.0**-53


class _Allowance:
    """Extra calls in proportion to calls: each call adds a share of one, up to `most`, and an extra call takes one."""

    def __init__(self, share: float, most: float, saved: float):
        self._share, self._most, self._saved = share, most, saved

    def add_call(self) -> None:
        """A call begins that is not itself an extra one."""
        if self._saved < self._most:
            self._saved = min(self._saved + self._share, self._most)

    def _take(self) -> bool:
        if self._saved < 1 - 1e-9:  # ten times 0.1 is less than 1
            return False
        self._saved -= 1
        return True


class RetryBudget(_Allowance):
    """How many retries there may be: a share of the calls, so that a service in trouble is not given even more of them.

    A ratio of 0.1 lets ten calls pay for one retry. At most `most` are saved up, which at first they are.
    """

    def __init__(self, ratio: float = 0.1, most: float = 20.0):
        super().__init__(ratio, most, most)

    def may_retry(self) -> bool:
        """Whether one more retry may be made; if so, it is paid for."""
        return self._take()


class OpinionBudget(_Allowance):
    """How many refusals may be taken to another replica: a share of the calls, not counting those it answers.

    Apart from the retry budget: wrong calls, which every replica refuses, neither double the load nor use up what
    right calls need when a server stops. A replica that lacks something costs nothing here, and is soon out.
    """

    def __init__(self, ratio: float = 0.1, most: float = 20.0):
        super().__init__(ratio, most, most)

    def may_ask(self) -> bool:
        """Whether another replica may be asked; if so, it is paid for."""
        return self._take()

    def was_answered(self) -> None:
        """The other replica had what the first one lacked: not a wrong call, so it is paid back."""
        self._saved = min(self._saved + 1, self._most)


class HedgeCap(_Allowance):
    """How many hedges there may be: at most `share` of any number of calls, and of 1,000 calls before them."""

    def __init__(self, share: float = 0.03):
        super().__init__(share, max(1.0, share * 1000), 0.0)

    def may_hedge(self) -> bool:
        """Whether one more hedge may be sent; if so, it is counted."""
        return self._take()


class HedgeDelay:
    """When a call is late: a percentile of the latencies seen lately.

    A histogram whose cells grow by 9 %, from a microsecond to over a minute. Its counts are halved every `_MEMORY`
    latencies, so that old ones fade. The percentile is worked out once in `_EVERY` latencies.
    """

    _CELLS_PER_OCTAVE, _CELLS, _MEMORY, _EVERY = 8, 216, 2000, 32

    def __init__(self, percentile: float = 0.95, floor_s: float = 0.0005, ceiling_s: float = 1.0):
        self._percentile, self._floor_s, self._ceiling_s = percentile, floor_s, ceiling_s
        self._counts = [0.0] * self._CELLS
        self._total = 0.0
        self._seen = 0
        self._delay_s: float | None = None

    def record(self, latency_s: float) -> None:
        """One more latency: of a first attempt, or how long it had taken when it was given up."""
        cell = math.ceil(math.log2(max(latency_s, 1e-6) * 1e6) * self._CELLS_PER_OCTAVE)
        self._counts[min(cell, self._CELLS - 1)] += 1
        self._total += 1
        self._seen += 1
        if self._seen >= HEDGE_SAMPLES and (self._delay_s is None or self._seen % self._EVERY == 0):
            self._work_out()

    def hedge_after(self) -> float | None:
        """Seconds after which to ask another replica; None until enough is known."""
        return self._delay_s

    def _work_out(self) -> None:
        cell = bisect_left(list(itertools.accumulate(self._counts)), self._percentile * self._total)
        late_s = 2.0 ** (min(cell, self._CELLS - 1) / self._CELLS_PER_OCTAVE) * 1e-6
        self._delay_s = min(max(late_s, self._floor_s), self._ceiling_s)
        if self._total >= self._MEMORY:
            self._counts = [count / 2 for count in self._counts]
            self._total /= 2


def attempt_timeout(left_s: float, attempts_left: int, usual_s: float = 0.0) -> float:
    """Seconds that an attempt may take of the `left_s` to a call's deadline, so that another replica can be asked.

    The last attempt gets all, others half; but several times what the replica usually takes (`usual_s`) if that is
    more, or a call that needs most of its deadline would be broken off again and again.
    """
    if attempts_left <= 1:
        return left_s
    return min(max(left_s / 2, USUAL_TIMES * usual_s), left_s)
