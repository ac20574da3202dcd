"""What operators ask a predictor over plain HTTP, on the port that answers requests.

GET /metrics                 Prometheus' text format: profile/metrics.py
GET /debug/trace?seconds=5   what happens in the next seconds, for ui.perfetto.dev: profile/timeline.py
GET /v2/health/live          200: the process answers
GET /v2/health/ready         200: it wants requests, too; else 503
"""

import re
from urllib.parse import parse_qsl

from cube.errors import BadRequest
from cube.rpc.router import Request, Response, Router
from predictor.doors.at_once import AtOnce
from predictor.profile.metrics import CONTENT_TYPE, Metrics
from predictor.profile.timeline import record
from predictor.service import InferenceService

MOST_SECONDS = 60


class DebugDoor:
    """Handlers of plain HTTP. Owned by the event loop."""

    def __init__(self, service: InferenceService, metrics: Metrics):
        self._service, self._metrics = service, metrics
        self._recordings = AtOnce("/debug/trace: recordings", 4)

    def add_to(self, router: Router) -> None:
        """Answer there from now on. The router has /healthz and /readyz by the time it serves."""
        live, ready = Request("GET", "/healthz"), Request("GET", "/readyz")
        router.add("GET", "/metrics", self._text)
        router.add("GET", "/debug/trace", self._trace)
        router.add("GET", "/v2/health/live", lambda request: router.answer(live))
        router.add("GET", "/v2/health/ready", lambda request: router.answer(ready))

    async def _text(self, request: Request) -> Response:
        return Response(body=await self._metrics.text(), content_type=CONTENT_TYPE, compress=True)

    async def _trace(self, request: Request) -> Response:
        seconds = _seconds(request.query)
        with self._recordings.one():
            return Response(body=await record(self._service.services.values(), seconds), compress=True)


def _seconds(query: str) -> float:
    """Raises BadRequest."""
    given = dict(parse_qsl(query, keep_blank_values=True))
    text = given.pop("seconds", "5")
    if given:
        raise BadRequest("query", repr(min(given)[:100]), "seconds")
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,3})?", text) or not 0 < float(text) <= MOST_SECONDS:
        raise BadRequest("seconds", repr(text[:100]), f"a number above 0, at most {MOST_SECONDS}")
    return float(text)
