"""A serving process: open the port, say so on one line, wait for a signal, drain. Or several processes on one port.

With workers, the process that was started becomes their parent: it serves nothing itself. Parent and worker talk in
lines of JSON over a socket pair:

    worker → parent   {"listen": ADDRESS}       which address is that for all of us? (port 0 must be the same port)
    parent → worker   {"address": ADDRESS} or {"error": TEXT}
    worker → parent   {"listening": LINE}       what to announce, once all workers have said so
    worker → parent   {"failed": TEXT}          what the command's one line of error is to say
    parent → worker   {"stop": SIGNAL, "times": N}
    worker → parent   {"end": true}             stop us all, as by SIGTERM

Commands (`Process.tell`) are carried out by all workers or by none, one at a time:

    worker → parent   {"tell": COMMAND, "number": N}
    parent → worker   {"prepare": COMMAND}      to all of them
    worker → parent   {"done": null or [CODE, TEXT]}
    parent → worker   {"commit": true}          to all, if all are prepared; each says "done" once more
    parent → worker   {"abandon": true}         to all, if one is not
    parent → worker   {"told": N, "error": null or [CODE, TEXT]}    to the one that began it

A command takes as long as it takes: a disk may be slow, and a worker that waits for it serves lookups meanwhile. But
one that has a part to do and says nothing is killed, which ends the command and the server:

    parent → worker   {"ping": true}            every 10 s, to those whose part is not done
    worker → parent   {"here": true}            to `ping`, and to `prepare`

News (`Process.spread`) wait for nobody:

    worker → parent   {"spread": NEWS}
    parent → worker   {"news": NEWS}            to all of them

Signals reach workers in two ways: from the parent, and directly where a terminal or a service manager sends them to
every process of a group. So a worker counts the parent's, and of its own only the first. A worker whose parent is gone
stops as by SIGTERM.
"""

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

import uvloop
from google.protobuf.descriptor import FileDescriptor

from cube.errors import BadConfig, Overloaded, ServingError, to_wire
from cube.rpc.calls import Handlers, StatusError
from cube.rpc.health import SERVICE as HEALTH
from cube.rpc.health import Health
from cube.rpc.limits import Limits
from cube.rpc.listener import Listener, Tls
from cube.rpc.reflection import Reflection
from cube.rpc.router import Router
from cube.rpc.sockets import Bound, bound_sockets

log = logging.getLogger(__name__)

DRAIN_S = {
    signal.SIGINT: 0.8,
    signal.SIGTERM: 10.0,
}  # calls in flight may finish; Ctrl-C has someone waiting for the prompt
DOORS = ("lean", "grpcio")

_OTHER_FILES = 1_000  # descriptors for what is not a connection
_KEPT_BYTES = 128 << 20  # freed memory that is not given back to the kernel
_MAPPED_BYTES = 32 << 20  # larger blocks are mapped one by one, and given back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_STRAGGLE_S = 5.0  # what a worker may take beyond its drain
_SILENT_S = 10.0  # for which a worker may say nothing while others wait for its part of a command
_HEARING_S = 2.0  # of it, the last: to hear workers after all processes have stood still
_LINE_BYTES = 1 << 20
_BUSY = "another command is being carried out: try again when it is done"
_STOPPING = ["UNAVAILABLE", "the server is stopping"]


class _Door(Protocol):
    async def start(self, listen: str) -> str: ...
    async def drain(self, grace_s: float) -> None: ...


class _Stop:
    """How often we were asked to end, and by which signal first."""

    def __init__(self) -> None:
        self.first: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()
        self.second = asyncio.Event()
        self.before_serving: Callable[[], object] = lambda: None  # what to do where nobody waits for `first`
        self._times = 0

    def ask(self, number: signal.Signals, times: int | None = None) -> None:
        """Count a signal; `times`: it is the one with this number, as the parent counts."""
        times = self._times + 1 if times is None else max(times, self._times)
        if times >= 1 and not self.first.done():
            self.first.set_result(number)
        if times >= 2 and not self.second.is_set():
            self.second.set()
            for each in DRAIN_S:  # a third one ends the process as if we had never caught any
                asyncio.get_running_loop().remove_signal_handler(each)
        if times > self._times:
            self._times = times
            self.before_serving()


class Prepared(NamedTuple):
    """A command that can no longer fail, in one process; exactly one of these is called."""

    commit: Callable[[], None]
    abandon: Callable[[], None] = lambda: None


Command = dict[str, Any]  # of what JSON can say
Prepare = Callable[[Command], Awaitable[Prepared]]


class _Orders:
    """A process's part in the commands that all processes of a server carry out, or none."""

    def __init__(self) -> None:
        self.prepare_with: Prepare | None = None
        self._hear_with: Callable[[Command], None] | None = None
        self._unheard: list[Command] = []
        self._prepared: Prepared | None = None

    def obey(self, prepare: Prepare, hear: Callable[[Command], None]) -> None:
        """See Process.obey."""
        self.prepare_with, self._hear_with = prepare, hear
        unheard, self._unheard = self._unheard, []
        for news in unheard:
            hear(news)

    def hear(self, news: Command) -> None:
        """What came before anybody listened is kept."""
        if self._hear_with is None:
            self._unheard.append(news)
        else:
            self._hear_with(news)

    async def prepare(self, command: Command) -> Exception | None:
        """Returns what went wrong."""
        assert self.prepare_with is not None, "a command, and nobody obeys"
        try:
            self._prepared = await self.prepare_with(command)
        except Exception as error:
            if not isinstance(error, ServingError):
                log.exception("a command failed")
            return error
        return None

    def commit(self) -> Exception | None:
        """Returns what went wrong, which is a fault of ours."""
        prepared, self._prepared = self._prepared, None
        assert prepared is not None
        try:
            prepared.commit()
        except Exception as error:
            log.exception("a command failed half way")
            return error
        return None

    def abandon(self) -> None:
        """Not all could prepare it; this process may be one of those."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.abandon()


class Process:
    """What a program's main coroutine is given. Owned by the event loop."""

    def __init__(self, stop: _Stop, parent: "_Parent | None" = None, worker: int = 0):
        self.worker = worker  # its number, from 0; the one process of a server without workers is 0 too
        self.listener: Listener | None = None  # once the lean door is open
        self._stop, self._parent = stop, parent
        self._orders = _Orders() if parent is None else parent.orders
        self._command: asyncio.Task[None] | None = None  # that runs here, where there are no others

    def obey(self, prepare: Prepare, hear: Callable[[Command], None]) -> None:
        """Carry out commands, from whichever process they come; to be called before `serve`. hear: is told news.

        prepare: everything of a command that takes time or can fail, without effect on what is served. It is awaited in
        every process; when all have returned, their `commit`s are called, and if one has raised, the `abandon`s of the
        others. There is one command at a time.
        """
        self._orders.obey(prepare, hear)

    async def tell(self, command: Command) -> None:
        """Have all processes of this server carry out a command. Returns when they have.

        Raises what one of them raised (a StatusError of the same code, where it was another process), after which none
        has done it; Overloaded at once while another command runs. A StatusError UNAVAILABLE says that a worker has
        ended meanwhile, and with it the server, or that the server is about to. A caller that is cancelled does not
        stop the command.
        """
        if self._parent is not None:
            await self._parent.tell(command)
            return
        if self._command is not None:
            raise Overloaded(_BUSY)
        self._command = work = asyncio.ensure_future(self._carry_out(command))
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # also where nobody waits any more
        await asyncio.shield(work)

    async def _carry_out(self, command: Command) -> None:
        try:
            error = await self._orders.prepare(command) or self._orders.commit()
        finally:
            self._command = None
        if error is not None:
            raise error

    def spread(self, news: Command) -> None:
        """Have all processes of this server hear something, this one too; nobody waits until they have."""
        if self._parent is None:
            self._orders.hear(news)
        else:
            self._parent.say(spread=news)

    def end(self) -> None:
        """Stop the whole server as SIGTERM does; asking twice changes nothing."""
        if self._parent is None:
            self._stop.ask(signal.SIGTERM, 1)
        else:
            self._parent.say(end=True)

    async def serve(
        self,
        handlers: Handlers,
        listen: str,
        announce: Callable[[str], str],
        *,
        door: str = "lean",
        router: Router | None = None,
        tls: Tls | None = None,
        limits: Limits | None = None,
        described: Mapping[str, FileDescriptor] | None = None,
    ) -> None:
        """Serve until a signal; then answer what is in flight, until a second one.

        announce: makes the one line for standard output from the address bound. door: "lean", or "grpcio", which has
        neither plain HTTP nor TLS. described: by the full name it is served as, the file that declares a service, for
        reflection. Health (gRPC's, and /healthz and /readyz) is served beside the handlers. Raises BadConfig.
        """
        limits, described, router = limits or Limits(), described or {}, router or Router()
        health = Health()
        for service in described:
            health.set(service, True)
        health.add_to(router)
        handlers = {**health.handlers(), **Reflection({**described, HEALTH: health.FILE}).handlers(), **handlers}
        _raise_descriptor_limit(limits.connections + _OTHER_FILES)
        open_door, bound = await self._open(handlers, listen, door, router, tls, limits)
        # What was loaded stays: the collector need not walk it again, neither between requests nor at the end, where
        # torch's modules would take it more than a second.
        gc.collect()
        gc.freeze()
        cancel, self._stop.before_serving = self._stop.before_serving, lambda: None
        if self._parent is None:
            print(announce(bound), flush=True)
        else:
            self._parent.say(listening=announce(bound))
        reason = await self._stop.first
        log.info("%s: draining", reason.name)
        health.drain()
        end = asyncio.ensure_future(open_door.drain(DRAIN_S[reason]))
        again = asyncio.ensure_future(self._stop.second.wait())
        await asyncio.wait((end, again), return_when=asyncio.FIRST_COMPLETED)
        if not end.done():
            log.info("a second signal: closing at once")
            await open_door.drain(0)
        again.cancel()
        await end
        self._stop.before_serving = cancel

    async def _open(
        self, handlers: Handlers, listen: str, door: str, router: Router | None, tls: Tls | None, limits: Limits
    ) -> tuple[_Door, str]:
        if door == "lean":
            self.listener = listener = Listener(handlers, router, limits, tls)
            if self._parent is None:
                return listener, await listener.start(listen)
            return listener, await listener.start(await self._parent.address(listen), reuse_port=True)
        if door != "grpcio":
            raise BadConfig("door", repr(door), " or ".join(DOORS))
        if tls is not None or self._parent is not None:
            raise BadConfig("door", f"grpcio with {'TLS' if tls else 'workers'}", "the lean door, which has that")
        from cube.rpc.grpcio_door import GrpcioDoor  # here, so that nobody else loads grpcio

        twin = GrpcioDoor(handlers, limits)
        return twin, await twin.start(listen)


Main = Callable[[Process], Awaitable[None]]


def run(main: Main, workers: int = 1) -> None:
    """Run `main` on a uvloop loop, or in each of several processes forked before there is any loop.

    The first SIGINT or SIGTERM ends `Process.serve`, or what comes before it. When a worker dies, so that a part of the
    calls would be lost, the others are stopped and SystemExit(1) is raised: whoever supervises us starts us anew. An
    error that a worker's `main` raised is raised here, as a ServingError with its text.
    """
    _keep_freed_memory()
    if workers == 1:
        uvloop.run(_work(main, None, 0))
    else:
        _run_workers(main, workers)


async def _work(main: Main, control: socket.socket | None, number: int) -> None:
    """`main`, until it is done or a signal comes before it serves."""
    stop = _Stop()
    parent = None if control is None else await _Parent.connect(control, stop)
    work = asyncio.ensure_future(main(Process(stop, parent, number)))
    stop.before_serving = work.cancel
    loop = asyncio.get_running_loop()
    for each in DRAIN_S:
        loop.add_signal_handler(each, stop.ask, each, None if parent is None else 1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DRAIN_S)
    try:
        await work
    except asyncio.CancelledError:
        log.info("stopped before it was done")
    except (ServingError, OSError) as error:
        if parent is None:
            raise
        parent.say(failed=str(error))
        raise
    finally:
        if parent is not None:
            await parent.close()


class _Parent:
    """A worker's end of the conversation with its parent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: _Stop):
        self.orders = _Orders()
        self._reader, self._writer, self._stop = reader, writer, stop
        self._answers: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self._told: dict[int, asyncio.Future[list[str] | None]] = {}  # our own commands, until they are carried out
        self._commands = 0
        self._preparing: asyncio.Task[None] | None = None
        self._listening = asyncio.ensure_future(self._listen())

    @classmethod
    async def connect(cls, control: socket.socket, stop: _Stop) -> "_Parent":
        """Begin the conversation."""
        return cls(*await asyncio.open_connection(sock=control, limit=_LINE_BYTES), stop)

    def say(self, **message: Any) -> None:
        """Tell the parent."""
        self._writer.write(_line(message))

    async def address(self, listen: str) -> str:
        """The address that all workers use for `listen`. Raises BadConfig."""
        self.say(listen=listen)
        answer = await self._answers.get()
        if "error" in answer:
            raise ServingError(answer["error"])
        return answer["address"]

    async def tell(self, command: Command) -> None:
        """See Process.tell."""
        self._commands += 1
        number, told = self._commands, asyncio.get_running_loop().create_future()
        self._told[number] = told
        self.say(tell=command, number=number)
        try:
            if (error := await told) is not None:
                raise StatusError(*error)
        finally:
            self._told.pop(number, None)

    async def close(self) -> None:
        """Let what was said go out."""
        self._listening.cancel()
        if self._preparing is not None:
            self._preparing.cancel()
        self._writer.close()
        with contextlib.suppress(ConnectionError):  # the parent is gone
            await self._writer.wait_closed()

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                self._on_message(json.loads(line))
        except ConnectionError:
            pass
        except Exception:
            log.exception("what the parent said was not understood")
        finally:  # whatever it was, nobody will tell us to stop
            self._stop.ask(signal.SIGTERM, 1)
            for told in self._told.values():
                if not told.done():
                    told.set_result(_STOPPING)

    def _on_message(self, message: dict[str, Any]) -> None:
        if "stop" in message:
            self._stop.ask(signal.Signals[message["stop"]], message["times"])
        elif "prepare" in message:
            self.say(here=True)
            self._preparing = asyncio.ensure_future(self._prepare(message["prepare"]))
        elif "ping" in message:
            self.say(here=True)
        elif "commit" in message:
            self.say(done=_told(self.orders.commit()))
        elif "abandon" in message:
            self.orders.abandon()
        elif "news" in message:
            self.orders.hear(message["news"])
        elif "told" in message:
            if (told := self._told.get(message["told"])) is not None and not told.done():
                told.set_result(message["error"])
        else:
            self._answers.put_nowait(message)

    async def _prepare(self, command: Command) -> None:
        self.say(done=_told(await self.orders.prepare(command)))


def _run_workers(main: Main, count: int) -> None:
    gc.collect()
    gc.freeze()  # what is loaded is shared, as long as nobody writes to it
    signal.pthread_sigmask(signal.SIG_BLOCK, DRAIN_S)  # until there are handlers
    workers: list[_Worker] = []
    for number in range(count):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            for one in (ours, *(worker.control for worker in workers)):
                one.close()  # else no worker would notice that the parent is gone
            _be_worker(_work(main, theirs, number))
        theirs.close()
        workers.append(_Worker(number, pid, ours))
    asyncio.run(_Supervisor(workers).run())


def _be_worker(work: Coroutine[Any, Any, None]) -> NoReturn:
    """The rest of a forked process. It never returns into the code that called `run`: that is the parent's."""
    code = 1
    try:
        uvloop.run(work)
        code = 0
    except (ServingError, OSError):
        pass  # the parent has been told
    except BaseException:
        log.exception("worker failed")
    finally:
        with contextlib.suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class _Worker:
    """A worker as its parent sees it."""

    def __init__(self, number: int, pid: int, control: socket.socket):
        self.number, self.pid, self.control = number, pid, control
        self.is_listening = False
        self.has_ended = False
        self.reader: asyncio.StreamReader | None = None  # None: not yet
        self.writer: asyncio.StreamWriter | None = None  # None: not yet, or no more

    def say(self, **message: Any) -> None:
        """Tell the worker."""
        if self.writer is not None:
            self.writer.write(_line(message))


class _Underway:
    """A command that the workers carry out."""

    def __init__(self, teller: _Worker, number: int, waiting: set[_Worker]):
        self.teller, self.number = teller, number
        self.waiting = waiting  # for these to have done their part of the present step
        self.heard: set[_Worker] = set()  # those that have said something since they were last asked to
        self.committing = False  # the second step
        self.error: list[str] | None = None


class _Supervisor:
    """The parent's part, after the forks."""

    def __init__(self, workers: list[_Worker]):
        self._workers = workers
        self._addresses: dict[str, Bound] = {}
        self._binding = asyncio.Lock()
        self._times = 0
        self._reason = signal.SIGTERM
        self._died = False
        self._error = ""
        self._command: _Underway | None = None

    async def run(self) -> None:
        """Wait for all workers to end. Raises SystemExit or ServingError where that was not in order."""
        loop = asyncio.get_running_loop()
        for number in DRAIN_S:
            loop.add_signal_handler(number, self._on_signal, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, DRAIN_S)
        for worker in self._workers:
            worker.reader, worker.writer = await asyncio.open_connection(sock=worker.control, limit=_LINE_BYTES)
        await asyncio.gather(*map(self._attend, self._workers))
        for bound in self._addresses.values():
            for one in bound.sockets:
                one.close()
        if self._error:
            raise ServingError(self._error)
        if self._died:
            raise SystemExit(1)

    async def _attend(self, worker: _Worker) -> None:
        """Listen to a worker until it ends."""
        reader, writer = worker.reader, worker.writer
        assert reader is not None
        assert writer is not None
        if self._times:
            worker.say(stop=self._reason.name, times=self._times)
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                await self._on_message(worker, json.loads(line))
        writer.close()
        worker.writer = None
        if self._command is not None:
            self._on_done(worker, ["UNAVAILABLE", f"worker {worker.number} (process {worker.pid}) ended meanwhile"])
        code = await _exit_code(worker.pid)
        worker.has_ended = True
        if code or (worker.is_listening and not self._times):
            self._on_death(worker, code)

    async def _on_message(self, worker: _Worker, message: dict[str, Any]) -> None:
        if "listen" in message:
            try:
                worker.say(address=await self._address(message["listen"]))
            except BadConfig as error:
                worker.say(error=str(error))
        elif "failed" in message:
            self._error = self._error or message["failed"]
        elif "listening" in message:
            worker.is_listening = True
            if all(worker.is_listening for worker in self._workers):
                print(message["listening"], flush=True)
        elif "tell" in message:
            self._on_tell(worker, message["number"], message["tell"])
        elif "here" in message:
            if self._command is not None:
                self._command.heard.add(worker)
        elif "done" in message:
            self._on_done(worker, message["done"])
        elif "spread" in message:
            self._say_all(news=message["spread"])
        elif "end" in message and not self._times:
            self._stop_all(signal.SIGTERM)

    def _on_tell(self, worker: _Worker, number: int, command: Command) -> None:
        if self._command is not None:
            worker.say(told=number, error=["RESOURCE_EXHAUSTED", _BUSY])
        elif self._times:
            worker.say(told=number, error=_STOPPING)
        elif not all(each.is_listening and each.writer is not None for each in self._workers):
            worker.say(told=number, error=["UNAVAILABLE", "not all workers serve: try again"])
        else:
            self._command = _Underway(worker, number, set(self._workers))
            self._say_all(prepare=command)
            self._miss_later(self._command)

    def _miss_later(self, command: _Underway) -> None:
        """In two steps: on a machine that stood still, the first one is late, and nobody is missed for that."""
        loop = asyncio.get_running_loop()
        loop.call_later(_SILENT_S - _HEARING_S, loop.call_later, _HEARING_S, self._miss, command)

    def _miss(self, command: _Underway) -> None:
        """Kill those that keep others waiting and are not there; their end is that of the command. Ask the others."""
        if command is not self._command:
            return
        for worker in command.waiting - command.heard:
            log.error("worker %d (process %d) has said nothing for %g s: killed", worker.number, worker.pid, _SILENT_S)
            self._kill(worker)
        command.heard.clear()
        for worker in command.waiting:
            worker.say(ping=True)
        self._miss_later(command)

    def _on_done(self, worker: _Worker, error: list[str] | None) -> None:
        """A worker has done its part of the present step of the command, or failed to."""
        command = self._command
        assert command is not None
        command.error = command.error or error
        command.waiting.discard(worker)
        if command.waiting:
            return
        if command.committing or command.error is not None:
            if not command.committing:
                self._say_all(abandon=True)
            self._command = None
            command.teller.say(told=command.number, error=command.error)
        else:
            command.committing, command.waiting, command.heard = True, set(self._workers), set(self._workers)
            self._say_all(commit=True)

    def _say_all(self, **message: Any) -> None:
        for worker in self._workers:
            worker.say(**message)

    async def _address(self, listen: str) -> str:
        """Hold an address for the workers: bound here without listening, it stays ours whatever becomes of them."""
        async with self._binding:
            if listen not in self._addresses:
                bound = await bound_sockets(listen)
                for one in bound.sockets:
                    if one.family == socket.AF_UNIX:
                        bound.remove_file()
                        raise BadConfig("listen", f"{listen} for several workers", "host:port, which can be shared")
                    # Bound without it, so that a second server on this port is refused; from now on workers may join.
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                self._addresses[listen] = bound
            return self._addresses[listen].address

    def _on_signal(self, number: signal.Signals) -> None:
        self._stop_all(number)
        if self._times >= 2:
            for each in DRAIN_S:  # a third one ends us, and our end ends the workers
                asyncio.get_running_loop().remove_signal_handler(each)

    def _on_death(self, worker: _Worker, code: int) -> None:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if not self._error:
            log.error(
                "worker %d (process %d) %s%s", worker.number, worker.pid, how, "" if self._times else "; stopping"
            )
        self._died = True
        if not self._times:
            self._stop_all(signal.SIGTERM)

    def _stop_all(self, number: signal.Signals) -> None:
        """Once: drain. Again: at once. Who does not hear it, or cannot, is killed."""
        self._times += 1
        self._reason = number if self._times == 1 else self._reason
        self._say_all(stop=self._reason.name, times=self._times)
        drain_s = DRAIN_S[self._reason] if self._times == 1 else 0.0
        asyncio.get_running_loop().call_later(drain_s + _STRAGGLE_S, self._kill_all)

    def _kill_all(self) -> None:
        for worker in self._workers:
            self._kill(worker)

    def _kill(self, worker: _Worker) -> None:
        if not worker.has_ended:  # else the number may be another's by now
            os.kill(worker.pid, signal.SIGKILL)


async def _exit_code(pid: int) -> int:
    """Wait for a process of ours to end; negative: by that signal."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    watch = os.pidfd_open(pid)
    loop.add_reader(watch, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(watch)
        os.close(watch)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _told(error: Exception | None) -> list[str] | None:
    """An error as the conversation carries it."""
    return None if error is None else list(to_wire(error)[:2])


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _raise_descriptor_limit(wanted: int) -> None:
    """A connection is a descriptor, and the usual soft limit of 1024 is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _keep_freed_memory() -> None:
    """Have malloc keep what large messages leave: fetching it from the kernel again costs more than receiving them.

    Measured: a request of 250 KB takes 310 µs of CPU without and 100 with it.
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library that knows no such thing
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
