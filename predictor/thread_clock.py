"""What a thread does with its time: computes, is ready but has no core, or waits for something.

Linux counts the time that a thread was ready to run and did not run (the second number in /proc/PID/task/TID/schedstat,
nanoseconds; Documentation/scheduler/sched-stats.rst). Where it cannot be read, a thread without a core seems to wait.
"""

import contextlib
import os
import threading
import time

_own = threading.local()


class ThreadClock:
    """The clock of the thread that makes it. Any thread may read it as long as that one lives."""

    __slots__ = ("_cpu", "_stat")

    def __init__(self) -> None:
        self._cpu = time.pthread_getcpuclockid(threading.get_ident())
        self._stat: int | None = None
        with contextlib.suppress(OSError):
            self._stat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._stat is not None:
            os.close(self._stat)

    def cpu_s(self) -> float:
        """Seconds on a core."""
        return time.clock_gettime(self._cpu)

    def busy_s(self) -> float:
        """Seconds on a core, or ready for one."""
        ready_ns = 0 if self._stat is None else int(os.pread(self._stat, 64, 0).split()[1])
        return time.clock_gettime(self._cpu) + ready_ns / 1e9


def own_clock() -> ThreadClock:
    """The clock of this thread."""
    clock: ThreadClock | None = getattr(_own, "clock", None)
    if clock is None:
        clock = _own.clock = ThreadClock()
    return clock
