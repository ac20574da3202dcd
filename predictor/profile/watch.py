"""Who watches the services of a process besides the counts: the tracer, slow requests' lines, spans."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cube.errors import BadConfig
from predictor.profile.slow_requests import SlowRequests
from predictor.profile.snapshot import snapshot
from predictor.profile.tracer import trace
from predictor.service import Service

log = logging.getLogger(__name__)

# As OpenTelemetry names them: where spans go, if nothing else says it.
_OTLP = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@dataclass(frozen=True)
class Watch:
    """Of one service."""

    slow_request_s: float = 0.0  # requests that take longer get a line in the log; 0: none does
    tracer_interval_s: float = 0.0  # every so often a table of where the time goes; 0: never
    tracer_file: Path | None = None  # where tables are appended to; None: the log


@asynccontextmanager
async def watched(
    services: Iterable[Service], watch_of: Callable[[Service], Watch], otel_endpoint: str = ""
) -> AsyncIterator[None]:
    """Watch services until the block ends.

    otel_endpoint: where spans of their requests go, as in OTEL_EXPORTER_OTLP_ENDPOINT; empty: where that variable says,
    nowhere if it is not set. Raises BadConfig where spans are wanted and OpenTelemetry is not installed.
    """
    services = list(services)
    async with AsyncExitStack() as stack:
        for service in services:
            watch = watch_of(service)
            if watch.slow_request_s:
                service.counts.watchers.append(SlowRequests(watch.slow_request_s).request)
                for lane in service.lanes:
                    lane.explain()
            if watch.tracer_interval_s:
                now = partial(snapshot, [service])
                tracing = asyncio.ensure_future(trace(now, watch.tracer_interval_s, watch.tracer_file))
                tracing.add_done_callback(_tell_fault)
                stack.callback(tracing.cancel)
        if otel_endpoint or any(os.environ.get(name) for name in _OTLP):
            try:
                from predictor.profile.spans import over_http  # here: an extra, and nobody else should load it

                spans = over_http(otel_endpoint)
            except ImportError as error:
                raise BadConfig("OpenTelemetry", error, "its packages: pip install 'cube-serving[otel]'") from error
            for service in services:
                service.counts.watchers.append(spans.request)
            stack.push_async_callback(asyncio.to_thread, spans.close)
        yield


def _tell_fault(tracing: "asyncio.Task[None]") -> None:
    if not tracing.cancelled() and (error := tracing.exception()) is not None:
        log.error("the tracer has ended", exc_info=error)
