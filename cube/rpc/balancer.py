"""All replicas of a server behind one call: `naming` says where they are, `routing` which is asked, this asks.

A channel for each endpoint is made when it is first asked, and closed when the endpoint has left the list and its calls
are over. A call without trouble is a channel's call and a few microseconds: no task, and no timer unless it may be
hedged.

What is sent again, and when:

* to another replica, what failed in a way that may be retried (`errors.Wire.retry`), or took its part of the deadline
  without an answer; of calls that are not idempotent only what the server is known not to have processed;
* while the deadline, `Options.retries` and the retry budget allow. The budget is spared where a connection was refused
  or lost and another replica is in: the first is asked nothing more, so there is nothing to make worse;
* what a replica refused for overload, once, and only if there is another one;
* what a replica has not (NOT_FOUND, FAILED_PRECONDITION, UNIMPLEMENTED) is asked of one other, if the call is
  idempotent and `Options.retries` is not 0. Unless that one answers, the first refusal is the call's error. It has a
  budget of its own (`routing.OpinionBudget`, as large): wrong calls make a tenth more, and take no retries away.
"""

import asyncio
import contextlib
import math
import random
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any, NamedTuple

from cube.errors import BadConfig, DeadlineExceeded, Overloaded, ServingError, Unavailable
from cube.rpc.calls import Buffer, Field, Reply
from cube.rpc.channel import Channel, backoff_s
from cube.rpc.limits import Limits
from cube.rpc.naming import Naming
from cube.rpc.routing import (
    OK,
    HedgeCap,
    HedgeDelay,
    OpinionBudget,
    Options,
    Outcome,
    Policy,
    Replica,
    Replicas,
    RetryBudget,
    attempt_timeout,
)  # fmt: skip

__all__ = ["Balancer", "Counters", "Options", "Policy", "ReplicaFacts"]

MOST_PAUSE_S = 0.25  # between two looks of a call that waits for a server to be ready

# Of the status codes, those that are a replica's fault. The others are its right answers to wrong calls.
_FAULTS = {"UNAVAILABLE", "INTERNAL", "UNKNOWN", "DATA_LOSS", "DEADLINE_EXCEEDED"}
# And those by which a replica says that it has not what is asked for.
_LACKS = {"NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED"}


class ReplicaFacts(NamedTuple):
    """What is known of a replica, for metrics and people."""

    target: str
    weight: float
    in_flight: int
    calls: int  # ever begun, hedges and retries among them
    failures: int  # ever, of its own fault
    ejected_until: float | None  # time.monotonic() at which it is asked again; None while it is in
    latency_s: float  # of its answers, lately; 0 before the first


@dataclass
class Counters:
    """What a balancer has done so far."""

    calls: int = 0
    retries: int = 0  # calls sent again, refusals taken to another replica among them
    hedges: int = 0
    hedge_wins: int = 0  # hedges whose answer was the call's
    budget_refusals: int = 0  # retries that a budget forbade


class Balancer:
    """Calls to one of several replicas, from one event loop."""

    def __init__(
        self,
        target: str | Sequence[str],
        options: Options | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        authority: str | None = None,
        limits: Limits | None = None,
        keepalive_s: float | None = None,
    ):
        """target: what `naming` reads, or a list of endpoints; raises BadConfig. The rest is as a Channel takes it."""
        self.options = options or Options()
        self.counters = Counters()
        self._naming = Naming.parse(target) if isinstance(target, str) else Naming.of(target)
        self._tls, self._authority = tls, authority or self._naming.authority
        self._limits, self._keepalive_s = limits, keepalive_s
        self._replicas = Replicas(self.options, random.Random())  # noqa: S311
        self._replicas.update(self._naming.known)
        self._channels: dict[Replica, Channel] = {}
        self._budget = RetryBudget(self.options.retry_ratio, self.options.retry_saved)
        self._opinions = OpinionBudget(self.options.retry_ratio, self.options.retry_saved)
        self._cap = HedgeCap(self.options.hedge_share)
        self._delay: HedgeDelay | None = None
        if self.options.hedge is not None:
            # An earlier delay would spend what the cap allows on calls that are hardly late.
            late = max(self.options.hedge, 1 - self.options.hedge_share)
            self._delay = HedgeDelay(late, self.options.hedge_floor_s, self.options.hedge_ceiling_s)
        self._learning: asyncio.Task[ServingError | None] | None = None  # the first list; why there is none
        self._following: asyncio.Task[None] | None = None  # news of it
        self._tasks: set[asyncio.Task[Buffer] | asyncio.Task[None]] = set()  # hedges, channels that close
        self._closing = asyncio.Event()

    async def call(
        self,
        path: str,
        message: Reply,
        timeout_s: float | None,
        wait_for_ready: bool = False,
        *,
        metadata: Sequence[Field] = (),
        compression: str | None = None,
        max_reply_bytes: int | None = None,
        key: int | None = None,
        idempotent: bool = True,
    ) -> Buffer:
        """Send one message to one replica, or to several in turn; return the first reply. See Channel.call.

        key: chooses the replica if the policy is CONSISTENT_HASH. idempotent: it does no harm if the servers process
        the call more than once. wait_for_ready: wait until the target is known and one replica can be connected to.

        Raises the last attempt's error, or the refusal of a replica that had not what no other one answered either;
        DeadlineExceeded only when the deadline is over, or a server said so.
        """
        now = monotonic()
        deadline = math.inf if timeout_s is None else now + timeout_s
        replicas = self._replicas
        if not replicas:
            await self._learn(deadline, wait_for_ready)
            now = monotonic()
        self.counters.calls += 1
        self._budget.add_call()
        self._opinions.add_call()
        replica = replicas.pick(now, (), key)
        assert replica is not None  # there are replicas, and none is to be avoided
        retries, extras = self.options.retries, (metadata, compression, max_reply_bytes)
        part_s = None if deadline == math.inf else deadline - now
        if part_s is not None and idempotent and replicas.has_other(replica):
            part_s = attempt_timeout(part_s, retries + 1, replica.latency_s)
        if self._delay is not None and idempotent:
            call = _Call(path, message, extras, deadline, wait_for_ready, idempotent, key, retries)
            try:
                reply = await self._ask_hedged(call, replica, part_s, now, self._delay)
            except ServingError as error:
                return await self._persist(call, replica, error)
            self._judge(call, is_answered=True)
            return reply
        # The same as _ask, with nothing made that only a call in trouble needs.
        channel = self._channels.get(replica) or self._open(replica)
        replicas.begin(replica, now)
        try:
            reply = await channel.call(
                path,
                message,
                part_s,
                metadata=metadata,
                compression=compression,
                max_reply_bytes=max_reply_bytes,
            )
        except BaseException as error:
            call = _Call(path, message, extras, deadline, wait_for_ready, idempotent, key, retries)
            self._failed(call, replica, part_s, now, error, channel)
            if not isinstance(error, ServingError):
                raise
            return await self._persist(call, replica, error)
        ended = monotonic()
        replicas.end(replica, ended, ended - now, OK)
        if replica.gone:
            self._retire(replica)
        return reply

    @property
    def targets(self) -> tuple[str, ...]:
        """The endpoints known now; none before the first call if they are in a file or behind a name."""
        return tuple(replica.target for replica in self._replicas)

    def status_of(self) -> list[ReplicaFacts]:
        """What is known of each replica."""
        return [
            ReplicaFacts(r.target, r.weight, r.in_flight, r.calls, r.failures, r.out_until, r.latency_s)
            for r in self._replicas
        ]

    async def close(self) -> None:
        """Give up calls in flight, those that wait to be sent among them, and disconnect. All get UNAVAILABLE."""
        self._closing.set()
        for task in (self._learning, self._following):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels))
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def __aenter__(self) -> "Balancer":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ---- attempts ----

    async def _ask(self, call: "_Call", replica: Replica, part_s: float | None, now: float) -> Buffer:
        """One replica, once. part_s: how long it has; None for no end."""
        channel = self._channels.get(replica) or self._open(replica)
        metadata, compression, max_reply_bytes = call.extras
        self._replicas.begin(replica, now)
        try:
            reply = await channel.call(
                call.path,
                call.message,
                part_s,
                metadata=metadata,
                compression=compression,
                max_reply_bytes=max_reply_bytes,
            )
        except BaseException as error:
            self._failed(call, replica, part_s, now, error, channel)
            raise
        ended = monotonic()
        self._replicas.end(replica, ended, ended - now, OK)
        if replica.gone:
            self._retire(replica)
        return reply

    def _failed(
        self,
        call: "_Call",
        replica: Replica,
        part_s: float | None,
        began: float,
        error: BaseException,
        channel: Channel,
    ) -> None:
        """Note how an attempt has ended that gave no answer."""
        now = monotonic()
        outcome, ran_out = Outcome.ABANDONED, False
        if isinstance(error, ServingError):
            outcome = _outcome(error, channel.is_connected)
            if outcome is Outcome.LACKING and not (call.idempotent and call.retries_left):
                outcome = Outcome.REFUSED  # nobody else is to be asked
            if isinstance(error, DeadlineExceeded) and part_s is not None:
                # nine tenths: the server's clock, which may have said it, started later but runs to a rounded time-out
                ran_out = began + part_s < call.deadline - 1e-6 and now - began >= 0.9 * part_s
                if outcome is Outcome.FAILED and part_s < replica.latency_s:
                    outcome = Outcome.ABANDONED  # too little time for any replica
            call.failures = {**call.failures, replica: _Failure(outcome, part_s if ran_out else None)}
        self._replicas.end(replica, now, now - began, outcome)
        if replica.gone:
            self._retire(replica)

    async def _persist(self, call: "_Call", replica: Replica, error: ServingError) -> Buffer:
        """After a first failure: ask again, as often as is right."""
        while True:
            pause_s, other = self._again(call, replica, error)
            if pause_s:
                await self._pause(min(pause_s, call.deadline - monotonic()))
            now = monotonic()
            chosen = other or self._replicas.pick(now, (), call.key)
            assert chosen is not None  # none is to be avoided
            replica, part_s = chosen, None
            if call.deadline != math.inf:
                part_s = max(call.deadline - now, 0.0)  # none may be left after a pause
                if call.idempotent and call.refusal is None and self._replicas.has_other(replica):
                    part_s = attempt_timeout(part_s, call.retries_left + 1, replica.latency_s)
            try:
                reply = await self._ask(call, replica, part_s, now)
            except ServingError as failed:
                error = failed
            else:
                if call.refusal is not None:
                    self._opinions.was_answered()
                self._judge(call, is_answered=True)
                return reply

    async def _ask_hedged(
        self, call: "_Call", replica: Replica, part_s: float | None, now: float, delay: HedgeDelay
    ) -> Buffer:
        """The same; and another replica as well if there is no answer in time. Raises the first one's error."""
        self._cap.add_call()
        delay_s = delay.hedge_after()
        if delay_s is None or not self._replicas.has_other(replica):
            reply = await self._ask(call, replica, part_s, now)
            delay.record(monotonic() - now)
            return reply
        hedge = _Hedge(self._second, call, replica, now + delay_s)
        try:
            reply = await self._ask(call, replica, part_s, now)
            delay.record(monotonic() - now)
            return reply
        except asyncio.CancelledError:
            if not hedge.is_why_cancelled():
                raise
            delay.record(monotonic() - now)
            return hedge.answer()
        except ServingError:
            hedge.is_alone = True
            hedge.timer.cancel()
            if hedge.task is not None:
                await asyncio.wait((hedge.task,))
            if not hedge.has_won:
                raise
            return hedge.answer()
        finally:
            hedge.timer.cancel()
            if hedge.task is not None:
                hedge.is_alone = True
                hedge.task.cancel()
                self.counters.hedge_wins += hedge.has_won

    def _second(self, call: "_Call", replica: Replica) -> asyncio.Task[Buffer] | None:
        """A second attempt beside one that is late, if there is a replica for it and the cap allows it."""
        now = monotonic()
        other = self._replicas.pick(now, (replica,), call.key)
        if other is None or call.deadline <= now or not self._cap.may_hedge():
            return None
        self.counters.hedges += 1
        call.tried += (other,)
        part_s = None if call.deadline == math.inf else call.deadline - now
        task = asyncio.get_running_loop().create_task(self._ask(call, other, part_s, now))
        self._keep(task)
        return task

    def _again(self, call: "_Call", replica: Replica, error: ServingError) -> tuple[float, Replica | None]:
        """After a failure: seconds to wait, and the replica then (None: whichever). Raises what is the call's error."""
        now = monotonic()
        self._judge(call, is_answered=False)
        if call.refusal is not None:
            raise call.refusal
        if self._closing.is_set():
            raise error
        if now >= call.deadline:
            if call.wait_for_ready and error.never_processed and not isinstance(error, DeadlineExceeded):
                raise _too_late(f"{call.path}: no replica within the deadline ({error})") from error
            raise error
        outcome, part_s = call.failures[replica]
        if outcome is Outcome.LACKING:
            return 0.0, self._other_opinion(call, replica, error, now)
        final = error
        if part_s is not None:
            final = Unavailable(f"{call.path}: no answer within {part_s:.3g} s [{replica.target}]")
            final.never_processed = error.never_processed
        if not (error.never_processed or (call.idempotent and final.wire.retry)):
            raise final
        call.tried += (replica,)
        other = self._replicas.pick(now, call.tried, call.key)
        if outcome is Outcome.OVERLOADED:
            if other is None or call.was_overload:
                raise final
            call.was_overload = True
        if outcome is Outcome.UNREACHABLE and error.never_processed and call.wait_for_ready:
            if other is None:  # all have been asked: another round, later
                call.tried = ()
                call.rounds += 1
                return min(backoff_s(call.rounds), MOST_PAUSE_S), None
            return 0.0, other
        pause_s = 0.0
        if other is None:
            call.rounds += 1
            pause_s = backoff_s(call.rounds)
        if not call.retries_left or now + pause_s >= call.deadline:
            raise final
        if (other is None or outcome is not Outcome.UNREACHABLE) and not self._budget.may_retry():
            self.counters.budget_refusals += 1
            raise final
        call.retries_left -= 1
        self.counters.retries += 1
        return pause_s, other

    def _other_opinion(self, call: "_Call", replica: Replica, error: ServingError, now: float) -> Replica:
        """Whom to ask for what one replica has not. Raises its error if that stands already."""
        call.refusal = error
        call.tried += (replica,)
        other = self._replicas.pick(now, call.tried, call.key)
        if other is None or len(call.lacking()) > 1:
            raise error
        if not self._opinions.may_ask():
            self.counters.budget_refusals += 1
            raise error
        self.counters.retries += 1
        return other

    def _judge(self, call: "_Call", is_answered: bool) -> None:
        """The replicas that had not what this call asks for, now that another has answered, or refused as well."""
        if call.failures and (lacking := call.lacking()) and (is_answered or len(lacking) > 1):
            now = monotonic()
            for replica in lacking:
                self._replicas.judge(replica, now, is_behind=is_answered)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    # ---- replicas and their channels ----

    async def _learn(self, deadline: float, wait_for_ready: bool) -> None:
        """Wait for the first list. Raises BadConfig, Unavailable, DeadlineExceeded."""
        loop, rounds, why = asyncio.get_running_loop(), 0, "not looked up yet"
        while not self._replicas:
            if self._closing.is_set():
                raise self._is_closed()
            left_s = deadline - monotonic()
            if left_s <= 0:
                raise _too_late(f"{self._naming.text}: no endpoint within the deadline ({why})")
            if self._learning is None:
                self._learning = loop.create_task(self._first())
            learning = self._learning
            # Not awaited itself: it is everybody's, and who gives up waiting must not cancel it.
            await asyncio.wait((learning,), timeout=None if left_s == math.inf else left_s)
            error = learning.result() if learning.done() and not learning.cancelled() else None
            if error is None:
                continue
            if isinstance(error, BadConfig) or not wait_for_ready:
                raise error
            rounds, why = rounds + 1, str(error)
            await self._pause(min(backoff_s(rounds), deadline - monotonic()))

    async def _first(self) -> ServingError | None:
        try:
            self._replicas.update(await self._naming.first())
        except ServingError as error:
            return error
        finally:
            self._learning = None
        self._following = asyncio.get_running_loop().create_task(self._follow())
        return None

    async def _follow(self) -> None:
        async for places in self._naming.changes():
            for replica in self._replicas.update(places):
                self._retire(replica)

    def _open(self, replica: Replica) -> Channel:
        if self._closing.is_set():
            raise self._is_closed()
        channel = self._channels[replica] = Channel(
            replica.target,
            tls=self._tls,
            authority=self._authority,
            limits=self._limits,
            keepalive_s=self._keepalive_s,
        )
        return channel

    def _retire(self, replica: Replica) -> None:
        """It has left the list: once nothing is in flight there, its channel is closed."""
        channel = self._channels.pop(replica, None) if not replica.in_flight else None
        if channel is not None:
            self._keep(asyncio.get_running_loop().create_task(channel.close()))

    def _keep(self, task: asyncio.Task[Buffer] | asyncio.Task[None]) -> None:
        """Until it is done; `close` waits for it."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _is_closed(self) -> ServingError:
        closed = Unavailable(f"the balancer of {self._naming.text} is closed")
        closed.never_processed = True
        return closed


class _Failure(NamedTuple):
    """Of an attempt."""

    outcome: Outcome
    part_s: float | None  # the part of the call's time that it had, if that ran out


class _Call:
    """A call, and how far it has come."""

    tried: tuple[Replica, ...] = ()  # in this round
    failures: Mapping[Replica, _Failure] = {}  # replaced, not added to
    was_overload = False  # a replica has refused it for overload
    refusal: ServingError | None = None  # of a replica that has not what it asks for; stands unless another answers
    rounds = 0  # how often all replicas had been asked

    def __init__(
        self,
        path: str,
        message: Reply,
        extras: tuple[Sequence[Field], str | None, int | None],
        deadline: float,
        wait_for_ready: bool,
        idempotent: bool,
        key: int | None,
        retries_left: int,
    ):
        self.path, self.message, self.retries_left = path, message, retries_left
        self.extras = extras  # metadata, compression, max_reply_bytes
        self.deadline, self.wait_for_ready, self.idempotent, self.key = deadline, wait_for_ready, idempotent, key

    def lacking(self) -> list[Replica]:
        return [replica for replica, failure in self.failures.items() if failure.outcome is Outcome.LACKING]


class _Hedge:
    """A second attempt, begun by a timer, whose answer interrupts the caller that waits for the first.

    So a call that is answered in time costs a timer, and no task.
    """

    task: asyncio.Task[Buffer] | None = None
    has_won = False
    is_alone = False  # the first attempt is over

    _turns = 3  # of the loop, from the timer to the hedge: see _look

    def __init__(
        self,
        begin: Callable[[_Call, Replica], asyncio.Task[Buffer] | None],
        call: _Call,
        first: Replica,
        due: float,
    ):
        """due: time.monotonic() at which the first attempt is late."""
        self._begin, self._call, self._first, self._due = begin, call, first, due
        caller = asyncio.current_task()
        assert caller is not None  # a coroutine function of the balancer's runs
        self._caller: asyncio.Task[Any] = caller
        self._cancels = caller.cancelling()
        self._loop = asyncio.get_running_loop()
        self.timer: asyncio.Handle = self._loop.call_later(due - monotonic(), self._look)

    def _look(self) -> None:
        """Whether the first attempt is late by now.

        A busy loop's timers may be early by as much as the loop is behind, and come before what waits in the sockets:
        an answer that is there already has a few turns of the loop to be read in, and to cancel this.
        """
        left_s = self._due - monotonic()
        if left_s > 0:
            self.timer = self._loop.call_later(max(left_s, 0.001), self._look)
        elif self._turns:
            self._turns -= 1
            self.timer = self._loop.call_soon(self._look)
        else:
            self.task = self._begin(self._call, self._first)
            if self.task is not None:
                self.task.add_done_callback(self._done)

    def is_why_cancelled(self) -> bool:
        """In the caller's CancelledError: whether its only reason is that this has won. See asyncio.timeout."""
        return self.has_won and self._caller.uncancel() <= self._cancels

    def answer(self) -> Buffer:
        """Of one that has won."""
        assert self.task is not None
        return self.task.result()

    def _done(self, task: asyncio.Task[Buffer]) -> None:
        if not task.cancelled() and task.exception() is None:
            self.has_won = True
            if not self.is_alone:
                self._caller.cancel()


def _too_late(text: str) -> DeadlineExceeded:
    """For a call that was never sent."""
    late = DeadlineExceeded(text)
    late.never_processed = True
    return late


def _outcome(error: ServingError, is_connected: bool) -> Outcome:
    """What an error says of the replica that it came from."""
    code = error.wire.grpc if error.status is None else error.status.code
    if not is_connected and (error.never_processed or code == "UNAVAILABLE"):
        return Outcome.UNREACHABLE
    if isinstance(error, Overloaded) and error.wire.retry:
        return Outcome.OVERLOADED
    if code in _LACKS:
        return Outcome.LACKING
    return Outcome.FAILED if code in _FAULTS else Outcome.REFUSED
