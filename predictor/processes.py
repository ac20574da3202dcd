"""Runs an op in processes of its own: for what holds the GIL, uses much memory, or may crash.

A node's batches wait in one queue; each worker (`predictor.workers`) takes one at a time. Values lie in shared memory:
the batch is copied into it, and what the op makes is read where the worker wrote it. A worker that dies costs the batch
it was running, and another one is started. Nothing is pickled.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from typing import Any, ClassVar

from cube.errors import BadConfig, DeadlineExceeded, Internal, Overloaded, ServingError, Unavailable
from predictor.ops.op import Batch, Op, Outputs, Port
from predictor.workers.handle import A, Worker, close_all
from predictor.workers.messages import (
    Bind,
    Bound,
    Done,
    Failed,
    FromWorker,
    Logged,
    Made,
    Make,
    Message,
    Open,
    Opened,
    encoded,
)

log = logging.getLogger(__name__)

_END_S = 0.7  # for an op to be closed
_DEAD_AFTER = 3  # starts in a row that came to nothing, until batches are refused rather than kept waiting


def restart_delay_s(failures: int) -> float:
    """How long to wait before a worker is started again; failures: ends in a row without a batch done in between."""
    return 0.0 if failures <= 1 else min(0.1 * 2.0 ** min(failures - 2, 20), 10.0)


class _Job:
    """A batch on its way."""

    __slots__ = ("answer", "batch", "timer")

    def __init__(self, batch: Batch, answer: "asyncio.Future[Outputs]"):
        self.batch, self.answer = batch, answer
        self.timer: asyncio.TimerHandle | None = None


class OwnProcesses(Op):
    """An op that is made in several processes, each of which runs a batch at a time. Owned by the event loop."""

    waits: ClassVar[bool] = True

    def __init__(
        self,
        type: str,
        config: Mapping[str, Any],
        concurrency: int,
        queue_size: int = 1_024,
        *,
        place: str = "node",
        start_s: float = 60.0,
        patience_s: float = 10.0,
    ):
        """Raises BadConfig. The processes are started when the op is first asked for something.

        type: module:Class of the op, or module:function for one that makes it, imported in the processes. config: its
        keyword arguments: numbers, texts, lists and mappings of them. queue_size: batches that may wait; more are
        refused. place: for messages, such as "node 'decode'". start_s: longest time for importing and opening the op.
        patience_s: how long a batch may run that nobody waits for any more; then its process is ended, and another one
        is started.
        """
        if concurrency < 1 or queue_size < 1:
            raise BadConfig(f"{place} concurrency and queue_size", f"{concurrency} and {queue_size}", "at least 1")
        self.concurrency, self.restarts = concurrency, 0
        self._place, self._queue_size, self._start_s, self._patience_s = place, queue_size, start_s, patience_s
        self._make = Make(type, dict(config), place)
        try:
            encoded(self._make)
        except (TypeError, Internal) as error:
            raise BadConfig(f"{place} config", error, "numbers, texts, lists and mappings of them") from error
        self._made: Made | None = None
        self._inputs: dict[str, Port] = {}
        self._workers: list[Worker] = []  # that have not ended
        self._waiting: dict[_Job, None] = {}  # in the order they came
        self._running: dict[Worker, _Job] = {}
        self._failures = 0  # ends of workers since a batch was done
        self._loop: asyncio.AbstractEventLoop | None = None  # that of the first batch
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def queue_sizes(self) -> dict[str, int]:
        """How many batches wait, and how many run."""
        return {"waiting": len(self._waiting), "busy": len(self._running)}

    # ---- at load: blocks ----

    def wanted(self) -> Mapping[str, Port] | None:
        """See Op. Raises what making the op raised."""
        if self._made is None:
            try:
                for _ in range(self.concurrency):
                    self._workers.append(Worker(self._place, self._make))
            except OSError as error:
                self.close()
                raise BadConfig(self._place, error, f"{self.concurrency} processes to start") from error
            self._made = self._answers(Made)
        return self._made.wanted

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        self.wanted()
        self._inputs = dict(inputs)
        return self._answers(Bound, Bind(self._inputs)).outputs

    def open(self) -> None:
        """See Op."""
        self._answers(Opened, Open())
        for worker in self._workers:
            worker.is_ready = True

    def _answers(self, kind: type[A], message: Message | None = None) -> A:
        """Ask all workers for the same; the answer, which all give."""
        until = time.monotonic() + self._start_s
        try:
            for worker in self._workers:
                if message is not None:
                    worker.tell(message)
            answers = [worker.wait_for(kind, until) for worker in self._workers]
        except ServingError:
            self.close()
            raise
        return answers[0]

    # ---- batches ----

    def run(self, batch: Batch) -> Awaitable[Outputs]:
        """See Op. Raises Overloaded, DeadlineExceeded, Unavailable; the answer, what the op raises, or what became of
        the process that ran it: Unavailable if it was killed, Internal if it crashed."""
        loop = self._attached()
        if self._is_closed:
            raise Unavailable(f"{self._place}: closed")
        if len(self._waiting) >= self._queue_size:
            waiting = len(self._waiting)
            raise Overloaded(f"{self._place}: {waiting} batches are waiting, at most {self._queue_size} may")
        if self._is_dead:
            raise self._dead()
        job = _Job(batch, loop.create_future())
        if batch.deadline is not None:
            left_s = batch.deadline - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded(f"{self._place}: the deadline has passed")
            job.timer = loop.call_later(left_s, self._expire, job)
        job.answer.add_done_callback(lambda _: self._settled(job))
        self._waiting[job] = None
        self._dispatch()
        return job.answer

    def _attached(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for worker in self._workers:
                self._listen(worker)
        return self._loop

    def _dispatch(self) -> None:
        """Give batches to workers that have none."""
        for worker in self._workers:
            while self._waiting and worker.is_ready and worker not in self._running:
                job = next(iter(self._waiting))
                del self._waiting[job]
                if job.answer.done():
                    continue
                try:
                    worker.begin(job.batch)
                    self._running[worker] = job
                except ServingError as error:
                    job.answer.set_exception(error)
                except OSError:  # it has gone, or soon will: its socket says when
                    worker.is_ready = False
                    worker.kill()
                    self._waiting = {job: None, **self._waiting}

    def _expire(self, job: _Job) -> None:
        if not job.answer.done():
            state = "while it was waiting" if job in self._waiting else "before it was done"
            job.answer.set_exception(DeadlineExceeded(f"{self._place}: the deadline passed {state}"))

    def _settled(self, job: _Job) -> None:
        """A batch has its answer, or its caller has gone."""
        if job.timer is not None:
            job.timer.cancel()
        if not job.answer.cancelled():
            job.answer.exception()  # nobody may be there to look at it
        self._waiting.pop(job, None)
        for worker, running in self._running.items():
            if running is job and self._loop is not None:
                self._loop.call_later(self._patience_s, self._lose_patience, worker, job)

    def _lose_patience(self, worker: Worker, job: _Job) -> None:
        if self._running.get(worker) is job:
            text = "%s: process %d still runs a batch that nobody has waited for in %g s: ended"
            log.error(text, self._place, worker.pid, self._patience_s)
            worker.kill()

    # ---- what workers say ----

    def _listen(self, worker: Worker) -> None:
        assert self._loop is not None
        worker.link.setblocking(False)
        self._loop.add_reader(worker.link.fileno(), self._on_readable, worker)

    def _on_readable(self, worker: Worker) -> None:
        descriptors: list[int] = []
        try:
            message, descriptors = worker.receive()
            if message is None:
                self._lost(worker)
            else:
                self._on_message(worker, message, descriptors)
        except BlockingIOError:
            pass
        except ConnectionError:
            self._lost(worker)
        except Exception:
            log.exception("%s: what process %d says is not understood", self._place, worker.pid)
            self._fail(worker, Internal(f"{self._place}: failed; the server's log has it"))
            worker.kill()
            self._lost(worker)
        finally:
            close_all(descriptors)

    def _on_message(self, worker: Worker, message: FromWorker, descriptors: list[int]) -> None:
        if isinstance(message, Done):
            self._finish(worker, worker.results(message, descriptors))
        elif isinstance(message, Failed):
            error = worker.error_of(message)
            if worker.is_ready:
                self._finish(worker, error)
            else:
                log.error("%s: cannot be started again: %s", self._place, error)
                worker.kill()
                self._lost(worker)
        elif isinstance(message, Opened):
            worker.is_ready = True
            self._dispatch()
        elif isinstance(message, Logged):
            worker.log(message)

    def _finish(self, worker: Worker, outcome: dict[str, Any] | ServingError) -> None:
        job = self._running.pop(worker)
        self._failures = 0
        self._dispatch()  # first, so that the worker has something to do
        if job.answer.done():
            return
        if isinstance(outcome, ServingError):
            job.answer.set_exception(outcome)
        else:
            job.answer.set_result(outcome)

    def _fail(self, worker: Worker, error: ServingError) -> None:
        """Whatever it runs comes to nothing."""
        job = self._running.pop(worker, None)
        if job is not None and not job.answer.done():
            job.answer.set_exception(error)

    # ---- workers that end ----

    def _lost(self, worker: Worker) -> None:
        assert self._loop is not None
        self._loop.remove_reader(worker.link.fileno())
        self._workers.remove(worker)
        self._failures += 1
        task = self._loop.create_task(self._replace(worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, worker: Worker) -> None:
        assert self._loop is not None
        how = await self._loop.run_in_executor(None, worker.ended)
        delay_s = restart_delay_s(self._failures)
        log.error("%s: process %d %s; another one is started in %g s", self._place, worker.pid, how, delay_s)
        kind = Unavailable if worker.was_stopped else Internal
        self._fail(worker, kind(f"{self._place}: the process that ran the batch {how}"))
        if self._is_dead:
            for job in self._waiting:
                if not job.answer.done():
                    job.answer.set_exception(self._dead())
        await asyncio.sleep(delay_s)
        self._start_another()

    def _start_another(self) -> None:
        assert self._loop is not None
        if self._is_closed:
            return
        self.restarts += 1
        try:
            worker = Worker(self._place, self._make)
        except OSError as error:
            self._failures += 1
            log.error("%s: no process can be started: %s", self._place, error)
            self._loop.call_later(restart_delay_s(self._failures), self._start_another)
            return
        worker.tell(Bind(self._inputs))
        worker.tell(Open())
        self._workers.append(worker)
        self._listen(worker)
        self._loop.call_later(self._start_s, self._end_unready, worker)

    def _end_unready(self, worker: Worker) -> None:
        if worker in self._workers and not worker.is_ready:
            log.error("%s: process %d has not started in %g s: ended", self._place, worker.pid, self._start_s)
            worker.kill()

    @property
    def _is_dead(self) -> bool:
        """Whether nothing runs, and starting it has not helped."""
        return self._failures >= _DEAD_AFTER and not any(worker.is_ready for worker in self._workers)

    def _dead(self) -> Unavailable:
        return Unavailable(f"{self._place}: its processes have ended {self._failures} times; the server's log says how")

    def close(self) -> None:
        """See Op. Ends the processes, by force those that take longer than most of a second."""
        self._is_closed = True
        if self._loop is not None and not self._loop.is_closed():
            for job in (*self._waiting, *self._running.values()):
                if not job.answer.done():
                    job.answer.set_exception(Unavailable(f"{self._place}: closing"))
            for task in self._tasks:
                task.cancel()
            for worker in self._workers:
                self._loop.remove_reader(worker.link.fileno())
        for worker in self._workers:
            worker.link.close()
        until = time.monotonic() + _END_S
        for worker in self._workers:
            worker.ended(max(until - time.monotonic(), 0.0))
        self._workers.clear()
        self._running.clear()
