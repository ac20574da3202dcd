"""A line in the log for every request that took too long, with where its time went."""

import logging
from typing import Any

from cube.logs import Sparing
from predictor.profile.counts import Ended
from predictor.profile.counts import told as of_run

log = logging.getLogger(__name__)

_LINES_PER_S = 5
_NOTHING = "no run of it began, or had ended"


class SlowRequests:
    """Watches a process's requests."""

    def __init__(self, limit_s: float):
        """limit_s: what takes longer is slow."""
        self._limit_ns = int(limit_s * 1e9)
        self._lines = Sparing(log, "slow", _LINES_PER_S)

    def request(self, request: Ended) -> None:
        """A request has ended."""
        if request.ended - request.began > self._limit_ns:
            self._lines.warning(lambda: (told(request), _facts(request)))


def told(request: Ended) -> str:
    """Where a request's time went: one line."""
    head = f"{request.service} {request.version}: {_ms(request.ended - request.began)} ms for {request.rows} rows"
    if request.code != "OK":
        nothing = "no run of it began, or several were under way" if request.code == "CANCELLED" else _NOTHING
        return "; ".join([f"{head}, {request.code}", *(request.notes or [nothing])])
    parts = [head]
    for plan, shares in zip(request.plans, request.shares, strict=True):
        last = max(shares, key=lambda share: share.run.ended)  # of a request that was split
        parts.append(f"workflow {plan.name}: wait {_ms(last.waited_s * 1e9)} ms, {of_run(plan, last.run)}")
    return "; ".join(parts)


def _facts(request: Ended) -> dict[str, Any]:
    return {
        "service": request.service,
        "version": request.version,
        "ms": round((request.ended - request.began) / 1e6, 3),
        "rows": request.rows,
        "code": request.code,
        "peer": request.call.peer,
    }


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.1f}"
