"""What all services have counted, at one moment: what metrics and tables are made from."""

import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from predictor.apart import Queued
from predictor.profile.counts import RequestTotals, RunTotals
from predictor.service import Lane, Service


class LaneSnapshot(NamedTuple):
    """One workflow of a service."""

    workflow: str
    nodes: tuple[str, ...]  # in the order of the plan, as in `totals`
    totals: RunTotals
    runs_in_flight: int
    max_in_flight: int
    waiting_rows: int
    max_waiting_rows: int
    refused: int  # requests, because too many rows were waiting
    expired: int  # requests that nobody waited for any more when their turn came
    queues: Mapping[str, Mapping[str, int]]  # of nodes with queues of their own: what is in each


class ServiceSnapshot(NamedTuple):
    """One service."""

    name: str
    version: str
    requests: RequestTotals
    in_flight: int
    lanes: tuple[LaneSnapshot, ...]


class Snapshot(NamedTuple):
    """A process."""

    at: float  # time.monotonic()
    not_served: int  # requests for what is not there
    services: tuple[ServiceSnapshot, ...]


def snapshot(services: Iterable[Service], not_served: int = 0) -> Snapshot:
    """Now. not_served: as InferenceService counts it."""
    return Snapshot(time.monotonic(), not_served, tuple(map(_service, services)))


def _service(service: Service) -> ServiceSnapshot:
    counts = service.counts
    lanes = tuple(map(_lane, service.lanes))
    return ServiceSnapshot(service.name, service.version, counts.totals(), counts.in_flight, lanes)


def _lane(lane: Lane) -> LaneSnapshot:
    counters, limits = lane.batcher.counters, lane.batcher.limits
    queues = {}
    for step in lane.plan.steps:
        if isinstance(step.node.op, Queued):
            queues[step.node.name] = step.node.op.queue_sizes()
    return LaneSnapshot(
        workflow=lane.plan.name,
        nodes=tuple(step.node.name for step in lane.plan.steps),
        totals=lane.counts.totals(),
        runs_in_flight=counters.in_flight,
        max_in_flight=limits.max_in_flight,
        waiting_rows=counters.waiting_rows,
        max_waiting_rows=limits.max_waiting_rows,
        refused=counters.refused,
        expired=counters.expired,
        queues=queues,
    )
