"""A balancer and servers that die, stop, stall, refuse and move. Real sockets, and processes to kill and to stop."""

import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import time
from collections import Counter

import pytest
import uvloop
from certificates import Authority
from small_server import small_server

from cube.errors import (
    BadConfig,
    BadRequest,
    DeadlineExceeded,
    Internal,
    NotServed,
    Overloaded,
    ServingError,
    Unavailable,
)
from cube.rpc import balancer as balancer_module
from cube.rpc.balancer import Balancer
from cube.rpc.calls import StatusError
from cube.rpc.channel import tls_context
from cube.rpc.limits import Limits
from cube.rpc.listener import Listener, Tls
from cube.rpc.routing import HEDGE_SAMPLES, Options, Policy

ECHO, ASK, PID, SLEEP = "/t.T/Echo", "/t.T/Ask", "/t.T/Pid", "/t.T/Sleep"
LOOPS = {"uvloop": uvloop.run, "asyncio": asyncio.run}
IN_TURN = Policy.ROUND_ROBIN


def run_in(loop, work, seconds):
    """Run a coroutine function in a new loop; nothing may be left running, and the loop must hear no complaint."""
    complaints = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        async with asyncio.timeout(seconds):
            await work()
        assert not asyncio.all_tasks() - {asyncio.current_task()}

    LOOPS[loop](main())
    gc.collect(1)
    assert not complaints


def run(work, seconds=120):
    """Where it does not matter which loop it is."""
    run_in("uvloop", work, seconds)


@pytest.fixture(params=LOOPS)
def run_each(request):
    """Where timers, cancellation and the end of tasks meet."""
    return lambda work, seconds=120: run_in(request.param, work, seconds)


class Server:
    """Answers ECHO at once, and ASK as `answer`, a function or a coroutine function of the message, does."""

    def __init__(self, answer=None, limits=None, tls=None):
        self.answer, self.asked, self.running, self.cancelled = answer, 0, 0, 0
        self.left_s = None  # that the last ASK had, on arrival
        handlers = {ECHO: lambda message, call: message, ASK: self._ask}
        self.listener = Listener(handlers, None, limits or Limits(), tls)
        self.address = ""

    async def _ask(self, message, call):
        self.asked += 1
        self.running += 1
        self.left_s = call.deadline and call.deadline - time.monotonic()
        try:
            answer = self.answer(bytes(message)) if self.answer else message
            return await answer if asyncio.iscoroutine(answer) else answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


@contextlib.asynccontextmanager
async def serving(*answers, listen="127.0.0.1:0", **kwargs):
    """A server for each."""
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for answer in answers:
            server = Server(answer, **kwargs)
            server.address = await server.listener.start(listen)
            stack.push_async_callback(server.listener.drain, 0)
            servers.append(server)
        yield servers


def balancer_of(servers, **options):
    return Balancer([server.address for server in servers], Options(**{"policy": IN_TURN, **options}))


async def until(what, seconds=60):
    """Wait for something that has no event."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.001)


def fails(error):
    def fail(message):
        raise error

    return fail


async def hangs(message):
    await asyncio.Event().wait()


class Clock:
    """The balancer's: each look at it takes a while, as calls do, and more passes only when a test says so."""

    def __init__(self):
        self.now, self.look_s = time.monotonic(), 1e-4

    def __call__(self):
        self.now += self.look_s
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(balancer_module, "monotonic", clock)
    return clock


def in_flight(balancer):
    return sum(facts.in_flight for facts in balancer.status_of())


def facts(balancer, server):
    return next(facts for facts in balancer.status_of() if facts.target == server.address)


# ---- without trouble ----


@pytest.mark.parametrize("policy", Policy)
def test_every_replica_is_asked(policy):
    async def work():
        async with serving(None, None, None) as servers, balancer_of(servers, policy=policy) as balancer:
            for key in range(0, 300, 30):
                keys = range(key, key + 30)
                answers = await asyncio.gather(*(balancer.call(ASK, b"%d" % key, 60, key=key) for key in keys))
                assert answers == [b"%d" % key for key in keys]
            assert all(server.asked > 20 for server in servers)
            assert balancer.targets == tuple(server.address for server in servers)
            assert sum(facts.calls for facts in balancer.status_of()) == 300
            assert all((facts.in_flight, facts.failures) == (0, 0) for facts in balancer.status_of())
            assert all(0 < facts.latency_s < 1 for facts in balancer.status_of())
            counters = balancer.counters
            assert (counters.calls, counters.retries, counters.hedges) == (300, 0, 0)

    run(work)


def test_a_key_has_its_replica():
    async def work():
        async with serving(None, None) as servers, balancer_of(servers, policy=Policy.CONSISTENT_HASH) as balancer:
            for _ in range(20):
                await balancer.call(ASK, b"", 60, key=7)
            assert sorted(server.asked for server in servers) == [0, 20]

    run(work)


def test_what_a_channel_can():
    """Metadata, compression, a limit on the reply, no deadline, a message in pieces; and what is no call at all."""

    async def work():
        async with serving(None) as servers, balancer_of(servers) as balancer:
            reply = await balancer.call(ECHO, [b"a" * 999, b"b"], None, metadata=[("k", "v")], compression="gzip")
            assert reply == b"a" * 999 + b"b"
            with pytest.raises(Overloaded):
                await balancer.call(ECHO, b"12345", 60, max_reply_bytes=4)
            with pytest.raises(TypeError):
                await balancer.call(ECHO, "text", 60)
            with pytest.raises(ServingError):
                await balancer.call("/t.T/None", b"", 5)
            assert facts(balancer, servers[0]).failures == 0
            assert balancer.counters.retries == 0

    run(work)


def test_tls_and_a_name(tmp_path):
    """The certificate is for the name that was resolved, not for its addresses."""
    authority = Authority(tmp_path)
    tls = Tls(*authority.issue("localhost"))

    async def work():
        async with serving(None, tls=tls) as (server,):
            port = server.address.rpartition(":")[2]
            context = tls_context(authority.roots)
            async with Balancer(f"dns://localhost:{port}", tls=context) as balancer:
                assert balancer.targets == ()
                assert await balancer.call(ECHO, b"x", 60) == b"x"
                assert server.address in balancer.targets

    run(work)


@pytest.mark.parametrize("target", ["nonsense", [], ["a:1", "a:1"], "list://a:1,"])
def test_targets_that_are_none(target):
    with pytest.raises(BadConfig):
        Balancer(target)


# ---- servers that fail ----


def test_a_replica_that_is_not_there(reserve, clock):
    async def work():
        async with serving(None) as (server,):
            gone = reserve()
            async with Balancer([gone, server.address], Options(policy=IN_TURN)) as balancer:
                for idempotent in (False, True) * 10:
                    assert await balancer.call(ECHO, b"x", 60, idempotent=idempotent) == b"x"
                status = {facts.target: facts for facts in balancer.status_of()}
                assert status[gone].calls == status[gone].failures == 1  # then it is out
                assert status[gone].ejected_until > clock.now

    run(work)


def test_all_replicas_are_not_there(reserve):
    async def work():
        ports = [reserve() for _ in range(3)]
        async with Balancer(ports) as balancer:
            with pytest.raises(Unavailable, match="cannot connect") as caught:
                await balancer.call(ECHO, b"", 60)
            assert caught.value.never_processed
            with pytest.raises(DeadlineExceeded, match="cannot connect"):
                await balancer.call(ECHO, b"", 0.2, wait_for_ready=True)
            waiting = asyncio.create_task(balancer.call(ECHO, b"late", 60, wait_for_ready=True))
            await asyncio.sleep(0.1)
            async with serving(None, listen=ports[1]):
                assert await waiting == b"late"
                assert await balancer.call(ECHO, b"now", 60) == b"now"

    run(work)


def test_kill_one_of_two_under_load():
    with small_server() as doomed, small_server() as other:

        async def work():
            async with Balancer([doomed.address, other.address], Options(policy=IN_TURN)) as balancer:
                answers, stop = Counter(), asyncio.Event()

                async def caller():
                    while not stop.is_set():
                        await balancer.call(SLEEP, b"0.005", 60)
                        answers[bytes(await balancer.call(PID, b"", 60))] += 1

                async with asyncio.TaskGroup() as group:
                    for _ in range(64):
                        group.create_task(caller())
                    await until(lambda: answers[b"%d" % doomed.pid] > 200 < answers[b"%d" % other.pid])
                    os.kill(doomed.pid, signal.SIGKILL)
                    had = answers[b"%d" % other.pid]
                    await until(lambda: answers[b"%d" % other.pid] > had + 1000)
                    stop.set()
                assert balancer.counters.retries > 0
                assert balancer.counters.budget_refusals == 0

        run(work)


@pytest.mark.parametrize("policy", [Policy.ROUND_ROBIN, Policy.LEAST_LOADED])
@pytest.mark.alone  # half of each call's time has to be enough for the other
def test_stop_one_of_two_under_load(policy):
    """Its port accepts, and nothing comes: only time tells. It is asked again when it goes on."""

    async def work(stopped, other):
        options = Options(policy=policy, eject_s=0.3)
        async with Balancer([stopped.address, other.address], options) as balancer:
            answers, stop = Counter(), asyncio.Event()

            async def caller():
                while not stop.is_set():
                    answers[int(await balancer.call(PID, b"", 6))] += 1
                    await asyncio.sleep(0.002)

            async with asyncio.TaskGroup() as group:
                for _ in range(16):
                    group.create_task(caller())
                await until(lambda: answers[stopped.pid] > 50)
                os.kill(stopped.pid, signal.SIGSTOP)
                had = answers[other.pid]
                await until(lambda: answers[other.pid] > had + 1000)
                if policy is Policy.ROUND_ROBIN:  # the other keeps away from it before it has failed three times
                    await until(lambda: facts(balancer, stopped).ejected_until is not None)
                os.kill(stopped.pid, signal.SIGCONT)
                had = answers[stopped.pid]
                await until(lambda: answers[stopped.pid] > had + 50)
                stop.set()

    with small_server() as stopped, small_server() as other:
        try:
            uvloop.run(work(stopped, other))
        finally:
            os.kill(stopped.pid, signal.SIGCONT)


def test_ejected_and_recovered(clock):
    async def work():
        async with serving(fails(StatusError("UNAVAILABLE", "sick")), None) as servers:
            sick, well = servers
            async with balancer_of(servers, eject_s=0.2) as balancer:
                for _ in range(20):
                    assert await balancer.call(ASK, b"x", 60) == b"x"
                assert sick.asked == 3
                assert facts(balancer, sick).failures == 3
                assert facts(balancer, sick).ejected_until is not None
                assert facts(balancer, well).ejected_until is None
                clock.now += 0.3
                for _ in range(20):  # asked once more, then left alone for longer
                    assert await balancer.call(ASK, b"x", 60) == b"x"
                assert sick.asked == 4
                sick.answer = None
                clock.now += 0.6
                for _ in range(20):
                    assert await balancer.call(ASK, b"x", 60) == b"x"
                assert sick.asked > 10
                assert facts(balancer, sick).ejected_until is None

    run(work)


@pytest.mark.parametrize("error", [BadRequest("k", 1, 2), StatusError("UNAUTHENTICATED", "who?")])
def test_the_callers_faults_are_not_the_replicas(error):
    async def work():
        async with serving(fails(error), fails(error)) as servers, balancer_of(servers) as balancer:
            for _ in range(10):
                with pytest.raises(ServingError) as caught:
                    await balancer.call(ASK, b"", 60)
                assert caught.value.status.code == error.wire.grpc
            assert [server.asked for server in servers] == [5, 5]
            assert not any(facts.failures for facts in balancer.status_of())

    run(work)


LACKS = ["NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED"]


def lacks_version_1(code):
    def answer(message):
        if message == b"1@0":
            raise StatusError(code, f"{bytes(message)!r} is not here")
        return message

    return answer


@pytest.mark.parametrize("code", LACKS)
@pytest.mark.parametrize("policy", Policy)
def test_what_one_replica_lacks_another_answers(code, policy, clock):
    """No call fails, and the one that is behind is left out; once it is not, it is asked as before."""

    async def work():
        async with serving(lacks_version_1(code), None) as servers:
            behind, ahead = servers
            async with balancer_of(servers, policy=policy, eject_s=20, eject_most_s=20) as balancer:
                clock.look_s = 0.002  # slower than one that refuses at once
                for key in range(200):
                    assert await balancer.call(ASK, b"1@0", 60, key=key) == b"1@0"
                assert 0 < behind.asked <= 10  # three, and now and then one to find out
                assert facts(balancer, behind).ejected_until is not None
                assert facts(balancer, behind).failures == balancer.counters.retries == behind.asked
                assert facts(balancer, ahead).failures == 0
                assert balancer.counters.budget_refusals == 0
                behind.answer = None
                clock.now += 25
                for key in range(100):
                    assert await balancer.call(ASK, b"1@0", 60, key=key) == b"1@0"
                assert facts(balancer, behind).ejected_until is None

    run(work)


def test_a_replica_that_lacks_something_rarely_asked_for_stays_in():
    """More of these calls than the budget would allow, but none of them is wrong."""

    async def work():
        lacking = lacks_version_1("NOT_FOUND")
        async with serving(lacking, None) as servers, balancer_of(servers, retry_saved=2) as balancer:
            for _ in range(100):
                for message in (b"1@0", b"2@0", b"2@0"):  # of three calls each has every second
                    assert await balancer.call(ASK, message, 60) == message
            assert balancer.counters.retries == facts(balancer, servers[0]).failures == 50
            assert facts(balancer, servers[0]).ejected_until is None

    run(work)


@pytest.mark.parametrize("code", LACKS)
def test_what_all_lack_is_the_callers_fault(code):
    """The first one's error, few calls more, and nobody suffers for it: neither the replicas nor real retries."""

    async def work():
        numbers = iter(range(1000))

        def refuse(message):
            if message == b"right":
                raise StatusError("UNAVAILABLE", "not now")
            raise StatusError(code, f"refusal {next(numbers)}")

        async with serving(refuse, refuse, refuse) as servers, balancer_of(servers, retry_saved=5) as balancer:
            expected = 0
            for _ in range(100):
                had = balancer.counters.retries
                with pytest.raises(ServingError, match=f"^refusal {expected}( |$)") as caught:
                    await balancer.call(ASK, b"wrong", 60)
                assert caught.value.status.code == code
                expected += 1 + balancer.counters.retries - had
            assert sum(server.asked for server in servers) == 100 + balancer.counters.retries
            assert 14 <= balancer.counters.retries <= 15
            assert balancer.counters.budget_refusals == 100 - balancer.counters.retries
            assert not any(facts.failures or facts.ejected_until for facts in balancer.status_of())
            had = balancer.counters.retries
            with pytest.raises(Unavailable, match="not now"):
                await balancer.call(ASK, b"right", 60)
            assert balancer.counters.retries == had + 2

    run(work)


@pytest.mark.parametrize(("options", "idempotent"), [({}, False), ({"retries": 0}, True)])
def test_a_refusal_is_not_taken_elsewhere(options, idempotent):
    async def work():
        refusing = fails(NotServed("t", []))
        async with serving(refusing, refusing) as servers, balancer_of(servers, **options) as balancer:
            for _ in range(10):
                with pytest.raises(NotServed):
                    await balancer.call(ASK, b"", 60, idempotent=idempotent)
            assert [server.asked for server in servers] == [5, 5]
            assert not any(facts.failures for facts in balancer.status_of())

    run(work)


@pytest.mark.parametrize(
    "other", [StatusError("UNAVAILABLE", "not now"), Internal("oops"), Overloaded("busy"), BadRequest("k", 1, 2), None]
)
def test_a_refusal_stands_unless_another_replica_answers(other):
    """Whatever goes wrong there, and only one is asked."""

    async def work():
        unable = fails(other) if other else hangs
        async with serving(unable, unable, unable) as servers, balancer_of(servers) as balancer:
            servers[1].answer = fails(NotServed("t", []))  # whose turn is first
            with pytest.raises(NotServed, match="t: not served here"):
                await balancer.call(ASK, b"", 60 if other else 2)
            assert [server.asked for server in servers].count(1) == 2
            assert facts(balancer, servers[1]).failures == 0  # nobody has said that it should have it

    run(work)


def test_one_that_was_behind_is_back_when_it_lacks_no_more_than_others(clock):
    async def work():
        async with serving(fails(NotServed("t", [])), None) as servers, balancer_of(servers, eject_s=0.1) as balancer:
            for _ in range(10):
                await balancer.call(ASK, b"", 60)
            assert facts(balancer, servers[0]).ejected_until is not None
            servers[1].answer = servers[0].answer
            clock.now += 0.2
            with pytest.raises(NotServed):
                await balancer.call(ASK, b"", 60)
            assert facts(balancer, servers[0]).ejected_until is None

    run(work)


def test_after_a_refusal_the_other_has_all_the_time_that_is_left():
    async def work():
        async with serving(None, None, None) as servers, balancer_of(servers) as balancer:
            servers[1].answer = fails(NotServed("t", []))  # whose turn is first
            assert await balancer.call(ASK, b"x", 100) == b"x"
            assert [server.asked for server in servers].count(1) == 2
            assert servers[1].left_s <= 50
            assert max(server.left_s or 0 for server in servers) > 50

    run(work)


def test_when_everything_fails_the_servers_get_little_more():
    async def work():
        failing = fails(StatusError("UNAVAILABLE", "all of it"))
        async with serving(failing, failing) as servers, balancer_of(servers, retry_saved=5) as balancer:
            for _ in range(100):
                with pytest.raises(Unavailable, match="all of it"):
                    await balancer.call(ASK, b"", 60)
            counters = balancer.counters
            assert sum(server.asked for server in servers) == 100 + counters.retries
            assert 10 <= counters.retries <= 15
            assert counters.budget_refusals >= 80

    run(work)


def test_a_fault_of_the_server_is_not_retried():
    async def work():
        async with serving(fails(Internal("oops")), None) as servers, balancer_of(servers, eject_after=9) as balancer:
            outcomes = await asyncio.gather(*(balancer.call(ASK, b"", 60) for _ in range(8)), return_exceptions=True)
            assert sum(isinstance(outcome, Internal) for outcome in outcomes) == 4
            assert facts(balancer, servers[0]).failures == 4

    run(work)


@pytest.mark.parametrize("idempotent", [True, False])
def test_calls_that_are_not_idempotent_are_not_repeated(idempotent):
    async def work():
        failing = fails(StatusError("UNAVAILABLE", "perhaps it is done"))
        async with serving(failing, failing) as servers, balancer_of(servers, eject_after=99) as balancer:
            for _ in range(4):
                with pytest.raises(Unavailable, match="perhaps"):
                    await balancer.call(ASK, b"", 60, idempotent=idempotent)
            assert sum(server.asked for server in servers) == (12 if idempotent else 4)

            first, second = servers
            for server in servers:
                server.asked, server.answer = 0, hangs
            with pytest.raises(DeadlineExceeded):  # all of the deadline for one attempt
                await balancer.call(ASK, b"", 1, idempotent=False)
            assert first.asked + second.asked == 1

    run(work)


def test_overload_is_retried_once_elsewhere():
    async def work():
        busy = fails(Overloaded("busy"))
        async with serving(busy, busy, busy) as servers, balancer_of(servers) as balancer:
            with pytest.raises(Overloaded, match="busy"):
                await balancer.call(ASK, b"", 60)
            assert sum(server.asked for server in servers) == 2
            servers[0].answer = servers[1].answer = None
            for _ in range(9):
                assert await balancer.call(ASK, b"x", 60) == b"x"
            assert not any(facts.failures for facts in balancer.status_of())
        async with serving(busy) as servers, balancer_of(servers) as balancer:
            with pytest.raises(Overloaded):
                await balancer.call(ASK, b"", 60)
            assert servers[0].asked == 1

    run(work)


@pytest.mark.alone  # half of each call's time has to be enough for the other
def test_a_deadline_is_split_between_replicas(run_each):
    async def work():
        async with serving(hangs, None) as servers, balancer_of(servers, eject_after=99) as balancer:
            for _ in range(4):
                assert await balancer.call(ASK, b"x", 3) == b"x"
            assert servers[0].asked == 2
            await until(lambda: servers[0].cancelled == 2)
            assert facts(balancer, servers[0]).failures == 2

    run_each(work)


@pytest.mark.alone  # the parts of a deadline decide
def test_all_hang():
    async def work():
        async with serving(hangs, hangs) as servers, balancer_of(servers) as balancer:
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await balancer.call(ASK, b"", 2)
            assert time.monotonic() - began >= 1.99
            assert sum(server.asked for server in servers) == 3
        async with serving(hangs, hangs) as servers, balancer_of(servers, retry_saved=0) as balancer:
            with pytest.raises(Unavailable, match=r"/t.T/Ask: no answer within [\d.]+ s \[127") as caught:
                await balancer.call(ASK, b"", 3)
            assert isinstance(caught.value.__cause__ or caught.value.__context__, DeadlineExceeded)
        async with serving(hangs) as servers, balancer_of(servers) as balancer:
            with pytest.raises(DeadlineExceeded):
                await balancer.call(ASK, b"", 1)
            assert servers[0].asked == 1  # there is no other to keep time for

    run(work)


def test_a_call_that_needs_most_of_its_deadline_is_not_broken_off():
    async def work():
        async def slow(message):
            await asyncio.sleep(1)
            return message

        async with serving(slow, slow) as servers, balancer_of(servers) as balancer:
            for _ in servers:
                assert await balancer.call(ASK, b"x", 60) == b"x"
            for server in servers:
                server.answer = None
                assert await balancer.call(ASK, b"x", 1.9) == b"x"
            assert [server.asked for server in servers] == [2, 2]
            assert all(server.left_s > 0.95 for server in servers)  # not half

    run(work)


def test_one_replica_that_restarts(reserve):
    async def work():
        address = reserve()
        async with Balancer(address) as balancer:
            async with serving(None, listen=address):
                assert await balancer.call(ECHO, b"1", 60) == b"1"
            with pytest.raises(Unavailable):
                await balancer.call(ECHO, b"", 60)
            waiting = [asyncio.create_task(balancer.call(ECHO, b"%d" % n, 60, True)) for n in range(10)]
            await asyncio.sleep(0.05)
            async with serving(None, listen=address):
                assert await asyncio.gather(*waiting) == [b"%d" % n for n in range(10)]

    run(work)


def test_a_rolling_restart_under_load(reserve):
    """Servers that say goodbye fail nothing, be it idempotent or not."""

    async def work():
        addresses = [reserve(), reserve()]
        servers = []

        async def start(number):
            servers[number:] = [Server(lambda message: message), *servers[number + 1 :]]
            await servers[number].listener.start(addresses[number])

        for number in (0, 1):
            await start(number)
        stop, answers = asyncio.Event(), 0
        async with Balancer(addresses, Options(policy=IN_TURN, eject_s=0.05)) as balancer:

            async def caller(idempotent):
                nonlocal answers
                while not stop.is_set():
                    assert await balancer.call(ASK, b"x", 60, idempotent=idempotent) == b"x"
                    answers += 1

            async with asyncio.TaskGroup() as group:
                for number in range(16):
                    group.create_task(caller(number % 2 == 0))
                for number in (0, 1, 0):
                    await until(lambda: min(server.asked for server in servers) > 50)
                    await servers[number].listener.drain(60)
                    had = answers
                    await until(lambda had=had: answers > had + 100)
                    await start(number)
                await until(lambda: min(server.asked for server in servers) > 50)
                stop.set()
        for server in servers:
            await server.listener.drain(0)

    run(work)


# ---- lists that change ----


def test_replicas_come_and_go_with_a_file(tmp_path):
    path = tmp_path / "replicas"

    def write(*servers):
        (tmp_path / "new").write_text("".join(f"{server.address}\n" for server in servers))
        os.rename(tmp_path / "new", path)

    async def work():
        gate = asyncio.Event()

        async def wait(message):
            if message == b"wait":
                await gate.wait()
            return message

        async with serving(wait, wait, wait) as (first, second, third):
            write(first)
            async with Balancer(f"file://{path}?refresh=0.01", Options(policy=IN_TURN)) as balancer:
                slow = asyncio.create_task(balancer.call(ASK, b"wait", 60))
                assert await balancer.call(ASK, b"x", 60) == b"x"
                assert (first.asked, second.asked) == (2, 0)

                write(first, second)
                await until(lambda: len(balancer.targets) == 2)
                for _ in range(10):
                    await balancer.call(ASK, b"x", 60)
                assert (first.asked, second.asked) == (7, 5)

                write(third, second)
                await until(lambda: first.address not in balancer.targets)
                for _ in range(10):
                    await balancer.call(ASK, b"x", 60)
                assert (first.asked, second.asked, third.asked) == (7, 10, 5)
                assert len(first.listener._connections) == 1  # it has a call yet
                gate.set()
                assert await slow == b"wait"
                await until(lambda: not first.listener._connections)

                write(third)
                await until(lambda: not second.listener._connections)

                path.write_text("nonsense")
                await asyncio.sleep(0.1)
                assert await balancer.call(ASK, b"x", 60) == b"x"

    run(work)


def test_lists_that_cannot_be_had(tmp_path, reserve):
    async def work():
        async with Balancer(f"file://{tmp_path}/none") as balancer:
            for wait_for_ready in (False, True):
                with pytest.raises(BadConfig, match="No such file"):
                    await balancer.call(ECHO, b"", 60, wait_for_ready)
            (tmp_path / "none").write_text(reserve())
            with pytest.raises(Unavailable, match="cannot connect"):
                await balancer.call(ECHO, b"", 60)
        async with Balancer("dns://no.invalid:1") as balancer:
            calls = [asyncio.create_task(balancer.call(ECHO, b"", 60)) for _ in range(3)]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, Unavailable)
                assert "does not resolve" in str(outcome)
            with pytest.raises(DeadlineExceeded, match="does not resolve"):
                await balancer.call(ECHO, b"", 0.2, wait_for_ready=True)

    run(work)


# ---- hedging ----


def hedging(servers, **options):
    return balancer_of(servers, **{"hedge": 0.95, "hedge_share": 1.0, "hedge_floor_s": 0.005, **options})


async def warm(balancer, calls=HEDGE_SAMPLES * 2):
    for _ in range(calls):
        await balancer.call(ASK, b"warm", 60)


@pytest.mark.alone  # learns how long calls take
def test_hedges_answer_for_calls_that_stall(run_each):
    async def work():
        count = waited = 0  # calls to both, and those that stalled to the end

        async def stalls(message):
            nonlocal count, waited
            count += 1
            if count % 50 == 0:
                await asyncio.sleep(1)
                waited += 1
            return message

        async with serving(stalls, stalls) as servers, hedging(servers, hedge_share=0.2) as balancer:
            for n in range(500):
                assert await balancer.call(ASK, b"%d" % n, 60) == b"%d" % n
            counters = balancer.counters
            assert waited <= 4  # those before enough was known
            assert 6 <= counters.hedge_wins <= counters.hedges <= 0.2 * 500
            assert sum(server.asked for server in servers) <= 500 + counters.hedges
            await until(lambda: sum(server.cancelled for server in servers) >= 6)  # who has lost is told so
            assert not any(facts.in_flight for facts in balancer.status_of())

    run_each(work)


def test_hedges_are_capped(run_each):
    async def work():
        async with serving(None, None) as servers, hedging(servers, hedge_share=0.01) as balancer:
            await warm(balancer, 300)

            async def slow(message):
                await asyncio.sleep(0.02)
                await until(lambda: balancer.counters.hedges)
                return message

            for server in servers:
                server.answer = slow
            await asyncio.gather(*(balancer.call(ASK, b"", 60) for _ in range(100)))
            assert 1 <= balancer.counters.hedges <= 4

    run_each(work)


@pytest.mark.parametrize("fails_first", ["first", "hedge"])
def test_both_fail(run_each, fails_first):
    async def work():
        async def fail(message):
            nonlocal asked
            asked += 1
            mine = "first" if asked == 1 else "hedge"
            await until(lambda: asked == 2)
            if mine != fails_first:
                await until(lambda: in_flight(balancer) == 1)
            raise Internal(mine)

        asked = 0
        async with serving(None, None) as servers, hedging(servers) as balancer:
            await warm(balancer)
            had = dataclasses.replace(balancer.counters)
            for server in servers:
                server.answer = fail
            with pytest.raises(Internal, match="first"):
                await balancer.call(ASK, b"", 60)
            assert asked == 2
            assert balancer.counters.hedges == had.hedges + 1
            assert balancer.counters.hedge_wins == had.hedge_wins

    run_each(work)


@pytest.mark.parametrize("failing", [1, 2])
def test_one_fails_and_the_other_answers(run_each, failing):
    async def work():
        async def answer(message):
            nonlocal asked
            asked += 1
            is_failing = asked == failing
            await until(lambda: asked == 2)
            if is_failing:
                raise Internal("no")
            await until(lambda: in_flight(balancer) == 1)
            return b"yes"

        asked = 0
        async with serving(None, None) as servers, hedging(servers) as balancer:
            await warm(balancer)
            had = balancer.counters.hedge_wins
            for server in servers:
                server.answer = answer
            assert await balancer.call(ASK, b"", 60) == b"yes"
            assert asked == 2
            assert balancer.counters.hedge_wins == had + (failing == 1)

    run_each(work)


@pytest.mark.parametrize("lacking", ["first", "hedge", "both"])
def test_a_replica_that_lacks_something_and_a_hedge(run_each, lacking):
    async def work():
        async def answer(message):
            nonlocal asked
            asked += 1
            mine = "first" if asked == 1 else "hedge"
            await until(lambda: asked == 2)
            if mine != lacking and (mine, lacking) != ("first", "both"):
                await until(lambda: in_flight(balancer) == 1)
            if lacking in (mine, "both"):
                raise NotServed(mine, [])
            return b"yes"

        asked = 0
        async with serving(None, None, None) as servers, hedging(servers) as balancer:
            await warm(balancer)
            had = balancer.counters.retries
            for server in servers:
                server.answer = answer
            if lacking == "both":
                with pytest.raises(NotServed, match="first"):
                    await balancer.call(ASK, b"", 60)
            else:
                assert await balancer.call(ASK, b"", 60) == b"yes"
            assert asked == 2
            assert balancer.counters.retries == had
            assert sum(facts.failures for facts in balancer.status_of()) == (lacking != "both")

    run_each(work)


@pytest.mark.parametrize("when", ["no hedge", "before the hedge", "both are asked", "the first has failed"])
def test_a_cancelled_call_leaves_nothing_running(run_each, when):
    async def work():
        asked = 0

        async def answer(message):
            nonlocal asked
            asked += 1
            if asked == 1 and when == "the first has failed":
                await until(lambda: asked == 2)
                raise Internal("no")
            await hangs(message)

        async with serving(None, None) as servers:
            floor_s = 10 if when == "before the hedge" else 0.005
            hedge = None if when == "no hedge" else 0.95
            async with hedging(servers, hedge=hedge, hedge_floor_s=floor_s, hedge_ceiling_s=10) as balancer:
                await warm(balancer)
                for server in servers:
                    server.answer = answer
                call = asyncio.create_task(balancer.call(ASK, b"", None))
                await until(lambda: asked == (1 if when in ("no hedge", "before the hedge") else 2))
                if when == "the first has failed":
                    await until(lambda: in_flight(balancer) == 1)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert call.cancelling() == 1
                await until(lambda: not any(server.running for server in servers))
                await until(lambda: len(asyncio.all_tasks()) == 1)
                assert not any(facts.in_flight for facts in balancer.status_of())
                for channel in balancer._channels.values():
                    assert channel._link.calls.calls == 0

    run_each(work)


def test_a_hedge_that_wins_is_no_cancellation(run_each):
    """A caller within asyncio.timeout or a task group is not made to believe that it was cancelled."""

    async def work():
        async def answer(message):
            nonlocal asked
            asked += 1
            if asked % 2:
                await hangs(message)
            return b"hedge"

        asked = 0
        async with serving(None, None) as servers, hedging(servers) as balancer:
            await warm(balancer)
            for server in servers:
                server.answer = answer
            had = balancer.counters.hedge_wins
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                assert await group.create_task(balancer.call(ASK, b"", 60)) == b"hedge"
                assert await balancer.call(ASK, b"", 60) == b"hedge"
                assert asyncio.current_task().cancelling() == 0
            for server in servers:
                server.answer = hangs
            began = asyncio.get_running_loop().time()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(balancer.call(ASK, b"", 60), 0.05)
            assert asyncio.get_running_loop().time() - began < 30
            assert balancer.counters.hedge_wins == had + 2

    run_each(work)


# ---- the end ----


@pytest.mark.parametrize("hedge", [None, 0.95])
def test_close_with_calls_in_flight(run_each, hedge, reserve):
    async def work():
        gone = reserve()
        async with serving(None, None) as servers:
            balancer = hedging(servers, hedge=hedge)
            absent = Balancer(gone)
            await warm(balancer)
            for server in servers:
                server.answer = hangs
            calls = [asyncio.create_task(balancer.call(ASK, b"", None)) for _ in range(20)]
            calls += [asyncio.create_task(absent.call(ASK, b"", None, wait_for_ready=True)) for _ in range(3)]
            await until(lambda: sum(server.running for server in servers) >= 20)
            await asyncio.sleep(0.05)
            await asyncio.gather(balancer.close(), absent.close())
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, Unavailable)
            assert balancer.counters.retries == 0
            for one in (balancer, absent):
                await one.close()
                with pytest.raises(Unavailable, match="closed"):
                    await one.call(ECHO, b"", 60)
            await until(lambda: not any(server.listener._connections for server in servers))

    run_each(work)


def test_close_while_a_name_is_looked_up(run_each):
    async def work():
        balancer = Balancer("dns://localhost:1")
        call = asyncio.create_task(balancer.call(ECHO, b"", 60))
        await asyncio.sleep(0)
        await balancer.close()
        with pytest.raises(Unavailable):
            await call

    run_each(work)
