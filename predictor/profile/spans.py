"""Requests as OpenTelemetry spans, each with a child for every run of a node it had a part in.

A request that says in `traceparent` (W3C Trace Context) what it belongs to is a child of that. Which requests are
recorded is decided as everywhere: OTEL_TRACES_SAMPLER; recording one costs tens of microseconds per span, so a busy
predictor wants parentbased_traceidratio. Spans go out in a thread of the SDK's, in batches; what does not fit its queue
is dropped. Needs the packages of the extra `otel`.
"""

import os
import threading
import time

from opentelemetry import context, trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from predictor.batching import Share
from predictor.executor import TIMES, Run
from predictor.profile.counts import Ended, where
from predictor.workflow import Plan

_LAST_WORDS_S = 2.0  # for what has not been sent when the process ends
_PATH = "/v1/traces"
_CARRIED = ("traceparent", "tracestate")


class Spans:
    """Watches a process's requests. Owned by the event loop."""

    def __init__(self, exporter: SpanExporter):
        """exporter: where spans go."""
        self._exporter = exporter
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "predictor-server"}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("predictor")
        self._propagator = TraceContextTextMapPropagator()

    def request(self, request: Ended) -> None:
        """A request has ended."""
        metadata = request.call.metadata
        carrier = {name: text for name in _CARRIED if isinstance(text := metadata.get(name), str)}
        parent = self._propagator.extract(carrier, context.Context())
        epoch = time.time_ns() - time.monotonic_ns()  # of the monotonic clock
        span = self._tracer.start_span(
            request.service, parent, trace.SpanKind.SERVER, start_time=epoch + request.began,
            attributes={"model.version": request.version, "rows": request.rows, "rpc.grpc.status": request.code},
        )  # fmt: skip
        if not span.is_recording():
            return
        within = trace.set_span_in_context(span, parent)
        for plan, shares in zip(request.plans, request.shares, strict=bool(request.shares)):
            for share in shares:
                self._nodes(plan, share, within, epoch)
        if request.code != "OK":
            span.set_status(trace.StatusCode.ERROR, request.code)
        span.end(epoch + request.ended)

    def close(self) -> None:
        """Send what is left, for a short while. Blocks."""
        late = threading.Timer(_LAST_WORDS_S, self._exporter.shutdown)
        late.start()
        self._provider.shutdown()
        late.cancel()

    def _nodes(self, plan: Plan, share: Share[Run], within: context.Context, epoch: int) -> None:
        run = share.run
        for step in plan.steps:
            began, _, _, ended = run.times[TIMES * step.number : TIMES * (step.number + 1)]
            if not ended:
                continue
            facts: dict[str, str | int] = {"workflow": plan.name, "batch.rows": run.rows, "where": where(step, run)}
            node = self._tracer.start_span(step.node.name, within, start_time=epoch + began, attributes=facts)
            node.end(epoch + ended)


def over_http(endpoint: str) -> Spans:
    """Spans that go out as OTLP over HTTP. endpoint: as OTEL_EXPORTER_OTLP_ENDPOINT; empty: as that and others say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    if not endpoint:
        return Spans(OTLPSpanExporter())
    whole = endpoint if endpoint.endswith(_PATH) else endpoint.rstrip("/") + _PATH
    return Spans(OTLPSpanExporter(endpoint=whole))
