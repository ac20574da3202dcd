"""The tracer: every few seconds a table of where the time goes, for people.

    ==================== TRACER ==================== ctr 20260101, 10.0 s
    Node (workflow ctr)         runs     in ms   prep ms    run ms   post ms    out ms    idle
      gather                     274     0.002     0.004     0.912     0.003     0.001   0.975
      infer                      274     0.003     0.002     3.310     0.004     0.001   0.909
    Requests
      Query count[274] QPS[27.4] Rows[13700] Succ[1.000] Error req[]
      Latency ms: ave[5.312] .50[5.111] .60[5.243] .70[5.505] .80[5.767] .90[6.554] .95[7.340] .99[9.437]
    Queues
      ctr: rows waiting[0/65536] runs in flight[1/4] wait[0.113 ms] batch[50.0 rows]

Milliseconds are averages over the interval. in: from when the values that a node takes were there until it began;
prep: preparing them for its op; run: the op; post: checking and storing what that made; out: until somebody took it.
idle: the share of the interval in which the node did nothing; 0 also for one that runs several batches at once.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from predictor.profile.counts import PHASES, percentile
from predictor.profile.snapshot import LaneSnapshot, ServiceSnapshot, Snapshot

log = logging.getLogger(__name__)

_LINE = "=" * 20
_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


async def trace(now: Callable[[], Snapshot], interval_s: float, file: Path | None = None) -> None:
    """For ever: every `interval_s` seconds a table of each service, to the log, or to the end of a file."""
    before, out = now(), _File(file) if file else None
    while True:
        await asyncio.sleep(interval_s)
        after = now()
        text = table(before, after)
        before = after
        if out is None:
            log.info("%s", text)
        else:
            out.append(text)


class _File:
    """What tables are appended to. A full disk, or a directory that is gone, ends none of those that come after."""

    def __init__(self, path: Path):
        self._path, self._lost = path, 0  # tables since the file could be written last

    def append(self, text: str) -> None:
        """Log the first failure, and the first success after it: not a line for every interval between them."""
        try:
            with self._path.open("a") as out:
                out.write(text + "\n")
        except OSError as error:
            if not self._lost:
                log.warning("tracer: %s: %s; tables are lost until it can be written", self._path, error.strerror)
            self._lost += 1
            return
        if self._lost:
            log.warning("tracer: %s: written again, after %d tables were lost", self._path, self._lost)
            self._lost = 0


def table(before: Snapshot, after: Snapshot) -> str:
    """What has happened between two snapshots, a block for each service that is in both."""
    seconds = after.at - before.at
    known = {(service.name, service.version): service for service in before.services}
    blocks = [
        _block(known[service.name, service.version], service, seconds)
        for service in after.services
        if (service.name, service.version) in known
    ]
    return "\n".join(blocks)


def _block(before: ServiceSnapshot, after: ServiceSnapshot, seconds: float) -> str:
    head = f"{_LINE} TRACER {_LINE} {after.name} {after.version}, {seconds:.1f} s"
    if before.requests.by_code == after.requests.by_code and not after.in_flight:
        return f"{head}: no requests"
    lines = [head]
    lanes = list(zip(before.lanes, after.lanes, strict=True))
    for earlier, later in lanes:
        lines += _nodes(earlier, later, seconds)
    lines += ["Requests", *_requests(before, after, seconds), "Queues"]
    for earlier, later in lanes:
        lines += _queues(earlier, later)
    return "\n".join(lines)


def _nodes(before: LaneSnapshot, after: LaneSnapshot, seconds: float) -> list[str]:
    title = f"Node (workflow {after.workflow})"
    width = max(24, len(title), *(len(node) + 2 for node in after.nodes))
    heads = [f"{phase} ms" for phase in PHASES]
    lines = [f"{title:<{width}}{'runs':>8}{''.join(f'{head:>10}' for head in heads)}{'idle':>8}"]
    runs = after.totals.node_runs - before.totals.node_runs
    phases_ms = (after.totals.phases_ns - before.totals.phases_ns) / np.maximum(runs, 1)[:, None] / 1e6
    busy_s = (after.totals.node_ns - before.totals.node_ns) / 1e9
    for at, node in enumerate(after.nodes):
        cells = "".join(f"{ms:>10.3f}" for ms in phases_ms[at])
        idle = max(0.0, 1 - busy_s[at] / seconds) if seconds > 0 else 0.0
        lines.append(f"{'  ' + node:<{width}}{runs[at]:>8}{cells}{idle:>8.3f}")
    return lines


def _requests(before: ServiceSnapshot, after: ServiceSnapshot, seconds: float) -> list[str]:
    earlier, later = before.requests, after.requests
    by_code = {code: count - earlier.by_code.get(code, 0) for code, count in later.by_code.items()}
    count, answered = sum(by_code.values()), by_code["OK"]
    success = answered / count if count else 1.0
    errors = ", ".join(f"{code} {n}" for code, n in sorted(by_code.items()) if n and code != "OK")
    by_ns = later.by_ns - earlier.by_ns
    average_ms = (later.ns - earlier.ns) / max(answered, 1) / 1e6
    shares = " ".join(f"{f'{share:.2f}'[1:]}[{percentile(by_ns, share) / 1e6:.3f}]" for share in _SHARES)
    return [
        f"  Query count[{count}] QPS[{count / seconds if seconds > 0 else 0:.1f}] Rows[{later.rows - earlier.rows}]"
        f" Succ[{success:.3f}] Error req[{errors}]",
        f"  Latency ms: ave[{average_ms:.3f}] {shares}",
    ]


def _queues(before: LaneSnapshot, after: LaneSnapshot) -> list[str]:
    earlier, later = before.totals, after.totals
    requests, runs = (later.waits_by_ns - earlier.waits_by_ns).sum(), later.runs - earlier.runs
    wait_ms = (later.wait_ns - earlier.wait_ns) / max(requests, 1) / 1e6
    rows = (later.rows - earlier.rows) / max(runs, 1)
    lines = [
        f"  {after.workflow}: rows waiting[{after.waiting_rows}/{after.max_waiting_rows}]"
        f" runs in flight[{after.runs_in_flight}/{after.max_in_flight}] wait[{wait_ms:.3f} ms] batch[{rows:.1f} rows]"
    ]
    for node, sizes in after.queues.items():
        lines.append(f"  {after.workflow}.{node}: {' '.join(f'{state}[{size}]' for state, size in sizes.items())}")
    return lines
