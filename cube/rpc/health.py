"""The gRPC health checking protocol, for load balancers, Kubernetes probes and gRPC clients' own checks; and its plain
HTTP relatives /healthz and /readyz.
"""

import asyncio
from collections.abc import AsyncIterator

from cube.errors import NotServed
from cube.pb import health_pb2 as pb
from cube.rpc.calls import Call, Kind, Method, parse
from cube.rpc.router import Response, Router

SERVICE = "grpc.health.v1.Health"
MAX_REQUEST_BYTES = 64 << 10  # a request is one name

_Status = pb.HealthCheckResponse.ServingStatus
_REPLY = {
    status: pb.HealthCheckResponse(status=status).SerializeToString()
    for status in (_Status.SERVING, _Status.NOT_SERVING, _Status.SERVICE_UNKNOWN)
}


class Health:
    """What is served, by full service name; the empty name is the server as a whole. Owned by the event loop."""

    FILE = pb.DESCRIPTOR  # for reflection

    def __init__(self) -> None:
        self._serving = {"": True}
        self._draining = False
        self._changed = asyncio.Event()  # set and replaced at every change

    def set(self, service: str, serving: bool) -> None:
        """Say whether a service is served from now on. Without effect once draining."""
        if not self._draining:
            self._serving[service] = serving
            self._wake()

    def drain(self) -> None:
        """Say of everything that it is not served; to be called before the port is closed.

        Watching calls end with that: they would keep a server that drains waiting.
        """
        self._serving = dict.fromkeys(self._serving, False)
        self._draining = True
        self._wake()

    def handlers(self) -> dict[str, Method]:
        """By gRPC path."""
        return {
            f"/{SERVICE}/Check": Method(self.check, max_request_bytes=MAX_REQUEST_BYTES),
            f"/{SERVICE}/Watch": Method(self.watch, Kind.SERVER_STREAM, MAX_REQUEST_BYTES),
        }

    def add_to(self, router: Router) -> None:
        """GET /healthz: the process answers. GET /readyz: it wants requests, too; 503 where it does not."""
        well, ready = Response(200, b"ok\n", "text/plain"), Response(200, b"ready\n", "text/plain")
        unready = Response(503, b"not ready\n", "text/plain")
        router.add("GET", "/healthz", lambda request: well)
        router.add("GET", "/readyz", lambda request: ready if self._serving[""] else unready)

    def check(self, message: bytes | memoryview, call: Call) -> bytes:
        """HealthCheckRequest → HealthCheckResponse; raises NotServed."""
        service = parse(pb.HealthCheckRequest, message).service
        if service not in self._serving:
            raise NotServed(f"service {service!r}", sorted(filter(None, self._serving)))
        return _REPLY[self._status(service)]

    async def watch(self, message: bytes | memoryview, call: Call) -> AsyncIterator[bytes]:
        """HealthCheckRequest → a HealthCheckResponse now and after every change."""
        service, told = parse(pb.HealthCheckRequest, message).service, None
        while True:
            status, changed, last = self._status(service), self._changed, self._draining
            if status != told:
                yield _REPLY[status]  # a change meanwhile has set `changed`
                told = status
            if last:
                return
            await changed.wait()

    def _status(self, service: str) -> pb.HealthCheckResponse.ServingStatus:
        serving = self._serving.get(service)
        if serving is None:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if serving else _Status.NOT_SERVING

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
