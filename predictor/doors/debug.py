"""What operators ask a predictor over plain HTTP, on the port that answers requests.

GET /metrics                 Prometheus' text format: profile/metrics.py
GET /debug/trace?seconds=5   what happens in the next seconds, for ui.perfetto.dev: profile/timeline.py
GET /debug/record?seconds=5&requests=64&service=NAME
                             requests of the next seconds as warm_up.npz: profile/recorder.py
GET /v2/health/live          200: the process answers
GET /v2/health/ready         200: it wants requests, too; else 503
"""

import logging
import re
from urllib.parse import parse_qsl

from cube.errors import BadRequest, FailedPrecondition, NotServed
from cube.rpc.router import Request, Response, Router
from predictor.doors.at_once import AtOnce
from predictor.models import RECORDING
from predictor.profile import recorder, timeline
from predictor.profile.metrics import CONTENT_TYPE, Metrics
from predictor.service import InferenceService, Service

log = logging.getLogger(__name__)

MOST_SECONDS = 60


class DebugDoor:
    """Handlers of plain HTTP. Owned by the event loop."""

    def __init__(self, service: InferenceService, metrics: Metrics, may_record: bool = False):
        """may_record: whether whoever asks is given what callers sent."""
        self._service, self._metrics, self._may_record = service, metrics, may_record
        self._traces = AtOnce("/debug/trace: recordings", 4)
        self._recordings = AtOnce("/debug/record: recordings", 2)

    def add_to(self, router: Router) -> None:
        """Answer there from now on. The router has /healthz and /readyz by the time it serves."""
        live, ready = Request("GET", "/healthz"), Request("GET", "/readyz")
        router.add("GET", "/metrics", self._text)
        router.add("GET", "/debug/trace", self._trace)
        router.add("GET", "/debug/record", self._record)
        router.add("GET", "/v2/health/live", lambda request: router.answer(live))
        router.add("GET", "/v2/health/ready", lambda request: router.answer(ready))

    async def _text(self, request: Request) -> Response:
        return Response(body=await self._metrics.text(), content_type=CONTENT_TYPE, compress=True)

    async def _trace(self, request: Request) -> Response:
        seconds = _seconds(_asked(request, "seconds"))
        with self._traces.one():
            return Response(body=await timeline.record(self._service.services.values(), seconds), compress=True)

    async def _record(self, request: Request) -> Response:
        if not self._may_record:
            raise FailedPrecondition("/debug/record: found a server that records nothing, expected --allow-recording")
        asked = _asked(request, "seconds", "requests", "service")
        seconds, service = _seconds(asked), self._named(asked.get("service"))
        most = asked.get("requests", "64")
        if not re.fullmatch(r"[0-9]{1,6}", most) or not 1 <= int(most) <= recorder.MOST_REQUESTS:
            raise BadRequest("requests", repr(most[:100]), f"a number from 1 to {recorder.MOST_REQUESTS}")
        with self._recordings.one():
            made = await recorder.record(service, seconds, int(most))
        # They are what callers sent: that somebody has them is worth a line.
        text = "%d requests of service %s were recorded for %s, %d left out"
        log.info(text, made.requests, service.name, request.peer, made.left_out)
        headers = [
            ("content-disposition", f'attachment; filename="{RECORDING}"'),
            ("x-requests", str(made.requests)),
            ("x-left-out", str(made.left_out)),
        ]
        return Response(body=made.npz, content_type="application/zip", headers=headers)

    def _named(self, name: str | None) -> Service:
        """Raises NotServed, and BadRequest where a name is needed."""
        services = self._service.services
        if name is None and len(services) == 1:
            return next(iter(services.values()))
        if name is None:
            raise BadRequest("service", "nothing", f"one of {', '.join(services)}")
        if name not in services:
            raise NotServed(f"service {name!r}", sorted(services))
        return services[name]


def _asked(request: Request, *known: str) -> dict[str, str]:
    """The parameters of a query. Raises BadRequest for others."""
    given = dict(parse_qsl(request.query, keep_blank_values=True))
    if unknown := given.keys() - set(known):
        raise BadRequest("query", repr(min(unknown)[:100]), " or ".join(known))
    return given


def _seconds(asked: dict[str, str]) -> float:
    """Raises BadRequest."""
    text = asked.get("seconds", "5")
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,3})?", text) or not 0 < float(text) <= MOST_SECONDS:
        raise BadRequest("seconds", repr(text[:100]), f"a number above 0, at most {MOST_SECONDS}")
    return float(text)
