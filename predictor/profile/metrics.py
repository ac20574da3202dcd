"""What Prometheus reads of a predictor: made from what is counted, when somebody asks."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cube.rpc.listener import Listener
from predictor.profile.counts import Counts, by_bits
from predictor.profile.snapshot import LaneSnapshot, ServiceSnapshot, Snapshot

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_SECONDS = range(13, 36)  # bits of nanoseconds whose buckets have an end of their own: 8.2 µs to 34 s
_ROWS = range(18)  # bits: 1 to 131,072 rows
_OF_SERVICE = ["service", "version"]
_OF_WORKFLOW = [*_OF_SERVICE, "workflow"]
_OF_NODE = [*_OF_WORKFLOW, "node"]


class Metrics:
    """All metrics of a process: of its services, of its port, of itself. Owned by the event loop."""

    def __init__(self, now: Callable[[], Snapshot], listener: Callable[[], Listener | None] = lambda: None):
        """now: takes a snapshot. listener: the open port, None where there is none."""
        self._now, self._listener = now, listener

    async def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        # Written in a thread, which takes milliseconds for each service; the loop answers others meanwhile.
        return await asyncio.to_thread(_text, list(self._all()))

    def _all(self) -> Iterator[Metric]:
        now = self._now()
        services = now.services
        yield CounterMetricFamily(
            "predictor_not_served", "requests for a model or a version that is not here", value=now.not_served
        )
        yield from _of_requests(services)
        lanes = [([s.name, s.version, lane.workflow], lane) for s in services for lane in s.lanes]
        yield from _of_runs(lanes)
        yield from _of_queues(lanes)
        yield from _of_nodes(lanes)
        listener = self._listener()
        if listener is not None:
            yield from _of_port(listener)


class _Taken(Collector):
    """Metrics as they were at one moment."""

    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _text(metrics: Iterable[Metric]) -> bytes:
    registry = prometheus_client.CollectorRegistry(auto_describe=False)
    registry.register(_Taken(metrics))
    prometheus_client.ProcessCollector(registry=registry)
    return prometheus_client.generate_latest(registry)


def _of_requests(services: Sequence[ServiceSnapshot]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "predictor_requests", "requests that have ended, by gRPC status", labels=[*_OF_SERVICE, "code"]
    )
    seconds = HistogramMetricFamily(
        "predictor_request_seconds", "time of a request that was answered, waiting included", labels=_OF_SERVICE
    )
    rows = CounterMetricFamily("predictor_rows", "rows (samples) of requests that were answered", labels=_OF_SERVICE)
    keys = CounterMetricFamily("predictor_keys", "keys that rows were asked for", labels=[*_OF_SERVICE, "found"])
    in_flight = GaugeMetricFamily(
        "predictor_requests_in_flight", "requests that have not been answered yet", labels=_OF_SERVICE
    )
    for service in services:
        labels, totals = [service.name, service.version], service.requests
        for code, count in totals.by_code.items():
            requests.add_metric([*labels, code], count)
        seconds.add_metric(labels, _seconds(by_bits(totals.by_ns)), totals.ns / 1e9)
        rows.add_metric(labels, totals.rows)
        if totals.keys:
            keys.add_metric([*labels, "true"], totals.keys - totals.keys_absent)
            keys.add_metric([*labels, "false"], totals.keys_absent)
        in_flight.add_metric(labels, service.in_flight)
    yield from (requests, seconds, rows, keys, in_flight)


_Lanes = Sequence[tuple[list[str], LaneSnapshot]]  # with values of _OF_WORKFLOW


def _of_runs(lanes: _Lanes) -> Iterator[Metric]:
    seconds = HistogramMetricFamily(
        "predictor_run_seconds", "time of a run of a workflow, of one request or several", labels=_OF_WORKFLOW
    )
    rows = HistogramMetricFamily("predictor_batch_rows", "rows of a run of a workflow", labels=_OF_WORKFLOW)
    waits = HistogramMetricFamily(
        "predictor_queue_wait_seconds", "time from a request's arrival until its run began", labels=_OF_WORKFLOW
    )
    for labels, lane in lanes:
        totals = lane.totals
        seconds.add_metric(labels, _seconds(totals.runs_by_ns), totals.run_ns / 1e9)
        ends = [(repr(float(1 << bits)), bits) for bits in _ROWS]
        rows.add_metric(labels, _buckets(totals.runs_by_rows, ends), totals.rows)
        waits.add_metric(labels, _seconds(totals.waits_by_ns), totals.wait_ns / 1e9)
    yield from (seconds, rows, waits)


def _of_queues(lanes: _Lanes) -> Iterator[Metric]:
    refused = CounterMetricFamily(
        "predictor_refused", "requests refused because too many rows were waiting", labels=_OF_WORKFLOW
    )
    expired = CounterMetricFamily(
        "predictor_expired", "requests that nobody waited for any more when their turn came", labels=_OF_WORKFLOW
    )
    waiting = GaugeMetricFamily("predictor_waiting_rows", "rows that wait for a run to begin", labels=_OF_WORKFLOW)
    running = GaugeMetricFamily("predictor_runs_in_flight", "runs that have not ended", labels=_OF_WORKFLOW)
    for labels, lane in lanes:
        refused.add_metric(labels, lane.refused)
        expired.add_metric(labels, lane.expired)
        waiting.add_metric(labels, lane.waiting_rows)
        running.add_metric(labels, lane.runs_in_flight)
    yield from (refused, expired, waiting, running)


def _of_nodes(lanes: _Lanes) -> Iterator[Metric]:
    seconds = HistogramMetricFamily("predictor_node_seconds", "time of a run of a node", labels=_OF_NODE)
    failures = CounterMetricFamily(
        "predictor_node_failures", "runs that failed, by the node (empty: before any) and gRPC status",
        labels=[*_OF_NODE, "code"],
    )  # fmt: skip
    queues = GaugeMetricFamily(
        "predictor_node_queue",
        "batches at a node that has threads or processes of its own",
        labels=[*_OF_NODE, "state"],
    )  # fmt: skip
    for labels, lane in lanes:
        totals = lane.totals
        for at, node in enumerate(lane.nodes):
            seconds.add_metric([*labels, node], _seconds(totals.nodes_by_ns[at]), int(totals.node_ns[at]) / 1e9)
        for (node, code), count in totals.failures.items():
            failures.add_metric([*labels, node, code], count)
        for node, sizes in lane.queues.items():
            for state, size in sizes.items():
                queues.add_metric([*labels, node, state], size)
    yield from (seconds, failures, queues)


def _of_port(listener: Listener) -> Iterator[Metric]:
    yield GaugeMetricFamily("predictor_connections", "connections that are open", value=listener.open)
    for name, text, value in (
        ("accepted", "connections accepted", listener.accepted),
        ("refused", "connections over the limit", listener.refused),
    ):
        yield CounterMetricFamily(f"predictor_connections_{name}", text, value=value)
    yield CounterMetricFamily("predictor_bytes_in", "bytes received, as on the wire", value=listener.bytes_in)
    yield CounterMetricFamily("predictor_bytes_out", "bytes sent, as on the wire", value=listener.bytes_out)


def _seconds(by_ns: Counts) -> list[tuple[str, float]]:
    """Buckets of a histogram. A value of exactly 2**b nanoseconds is counted above the end that has this name."""
    return _buckets(by_ns, [(repr((1 << bits) / 1e9), bits) for bits in _SECONDS])


def _buckets(by_bits: Counts, ends: Sequence[tuple[str, int]]) -> list[tuple[str, float]]:
    """ends: the name of each bucket's end, and the bits that the last of its values have."""
    below = by_bits.cumsum()
    return [*((name, float(below[bits])) for name, bits in ends), ("+Inf", float(below[-1]))]
