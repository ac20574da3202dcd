"""What operators ask over HTTP: metrics and traces, of small services and of a real process under load."""

import asyncio
import json
import threading
import time

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from small_services import Add, Later, ask, chain, service_of
from trace_format import check_format, slices_of

from cube.errors import BadRequest, NotServed
from cube.rpc.router import Request, Router
from predictor.client import Client
from predictor.doors.debug import DebugDoor
from predictor.profile.metrics import Metrics
from predictor.profile.snapshot import snapshot
from predictor.service import InferenceService
from trainer_tools.demo import started


def samples(metrics):
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(asyncio.run(metrics.text()).decode())
        for sample in family.samples
    }


def test_metrics_are_what_was_counted():
    async def main():
        for count in (1, 2, 3, 50):
            await ask(service, count)
        with pytest.raises(BadRequest):
            await ask(service, 101)

    service = service_of(*chain(Add(), Later()))
    asyncio.run(main())
    found = samples(Metrics(lambda: snapshot([service])))
    of_service, of_run = ("service=s", "version=7"), ("service=s", "version=7", "workflow=w")
    assert found["predictor_requests_total", "code=OK", *of_service] == 4
    assert found["predictor_requests_total", "code=INVALID_ARGUMENT", *of_service] == 1
    assert found["predictor_request_seconds_count", *of_service] == 4
    assert found["predictor_rows_total", *of_service] == found["predictor_batch_rows_sum", *of_run] == 56
    assert found["predictor_batch_rows_bucket", "le=2.0", *of_run] == 2
    assert found["predictor_batch_rows_bucket", "le=4.0", *of_run] == 3
    assert found["predictor_queue_wait_seconds_count", *of_run] == 4
    node = ("node=b", "service=s", "version=7", "workflow=w")
    assert found["predictor_node_seconds_count", *node] == 4
    assert 0.004 <= found["predictor_node_seconds_sum", *node] <= found["predictor_run_seconds_sum", *of_run]
    assert found["predictor_run_seconds_sum", *of_run] <= found["predictor_request_seconds_sum", *of_service]
    assert found["predictor_node_queue", "node=b", "service=s", "state=waiting", "version=7", "workflow=w"] == 3
    assert found["predictor_requests_in_flight", *of_service] == 0
    assert found["process_resident_memory_bytes",] > 1e6


@given(st.lists(st.integers(1, 1 << 45), min_size=1, max_size=30))
def test_buckets_of_seconds_hold_what_is_not_longer(latencies):
    service = service_of(*chain(Add()))
    for ns in latencies:
        service.counts.answered(ns, 1)
    found = samples(Metrics(lambda: snapshot([service])))
    for (name, *labels), value in found.items():
        if name == "predictor_request_seconds_bucket":
            end = float(labels[0].removeprefix("le=")) * 1e9
            assert value == sum(ns < end for ns in latencies)


@pytest.fixture
def door():
    """A router with it, and the service behind it."""
    service, router = service_of(*chain(Later())), Router()
    inference = InferenceService([service])
    DebugDoor(inference, Metrics(lambda: snapshot(inference.services.values()))).add_to(router)
    return router, service


async def get(router, path, query=""):
    answer = router.answer(Request("GET", path, query))
    return await answer if asyncio.iscoroutine(answer) else answer


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("seconds=0", "seconds: found '0', expected a number above 0, at most 60"),
        ("seconds=61", "found '61'"),
        ("seconds=-1", "found '-1'"),
        ("seconds=nan", "found 'nan'"),
        ("seconds=1e1", "found '1e1'"),
        ("seconds=", "found ''"),
        ("second=1", "query: found 'second', expected seconds"),
    ],
)
def test_a_trace_of_another_length_is_refused(door, query, message):
    response = asyncio.run(get(door[0], "/debug/trace", query))
    assert response.status == 400
    assert message in json.loads(response.body)["error"]


def test_traces_are_made_beside_each_other_but_not_many(door):
    router, service = door

    async def main():
        recordings = [asyncio.ensure_future(get(router, "/debug/trace", "seconds=1")) for _ in range(5)]
        await asyncio.sleep(0)
        await ask(service)
        recordings[0].cancel()
        await asyncio.wait(recordings)
        return [task.result() for task in recordings[1:]]

    *whole, refused = asyncio.run(main())
    assert refused.status == 429
    for response in whole:
        assert response.status == 200
        check_format(json.loads(response.body))
        assert any(event["name"] == "request s" for event in slices_of(json.loads(response.body)))
    assert not service.counts.watchers  # the cancelled one watches no more either


@pytest.mark.slow
def test_a_server_under_load_counts_every_request(tmp_path):
    torch = pytest.importorskip("torch")
    from torch.export import Dim

    directory = tmp_path / "twice"
    directory.mkdir()

    class Twice(torch.nn.Module):
        def forward(self, x):
            return {"y": x * 2}

    shapes = ({0: Dim("rows", min=1)},)
    program = torch.export.export(Twice(), (torch.zeros(3, 4),), dynamic_shapes=shapes)
    torch.export.save(program, directory / "model.pt2")
    tables = tmp_path / "tables"
    flags = ["--tracer-interval-s", 1, "--tracer-file", tables, "--slow-request-ms", 60_000]
    with started("predictor-server", "--model", directory, *flags) as address:
        url = f"http://{address}"
        assert httpx.get(f"{url}/v2/health/live", timeout=100).status_code == 200
        assert httpx.get(f"{url}/v2/health/ready", timeout=100).status_code == 200
        begun, enough = threading.Barrier(4, timeout=100), threading.Event()
        sent = []

        def load(count):
            number = 0
            with Client(address) as client:
                while not enough.is_set():
                    got = client.infer("twice", {"x": np.ones((count, 4), np.float32)}).outputs["y"]
                    assert got.shape == (count, 4)
                    number += 1
                    if number == 1:
                        begun.wait()
                with pytest.raises(BadRequest):
                    client.infer("twice", {"x": np.ones((count, 5), np.float32)})
                with pytest.raises(NotServed):
                    client.infer("thrice", {"x": np.ones((count, 4), np.float32)})
            sent.append((number, count))

        clients = [threading.Thread(target=load, args=(count,)) for count in (1, 2, 5)]
        for client in clients:
            client.start()
        begun.wait()
        trace = httpx.get(f"{url}/debug/trace?seconds=0.5", timeout=60).json()
        while not tables.exists() or "TRACER" not in tables.read_text():
            time.sleep(0.05)
        enough.set()
        for client in clients:
            client.join()
        assert httpx.post(f"{url}/v2/models/twice/infer", content=b"{", timeout=100).status_code == 400
        response = httpx.get(f"{url}/metrics", timeout=100)
    assert response.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, sample.labels.get("code")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.labels.get("service", "twice") == "twice"
    }
    answered = sum(number for number, _ in sent)
    assert len(sent) == 3
    assert found["predictor_requests_total", "OK"] == answered
    assert found["predictor_requests_total", "INVALID_ARGUMENT"] == 4  # one of them by the door
    assert found["predictor_not_served_total", None] == 3
    assert found["predictor_rows_total", None] == sum(number * count for number, count in sent)
    assert (
        found["predictor_request_seconds_count", None] == found["predictor_queue_wait_seconds_count", None] == answered
    )
    assert found["predictor_batch_rows_sum", None] == found["predictor_rows_total", None]
    assert found["predictor_node_seconds_count", None] == found["predictor_run_seconds_count", None] <= answered
    assert found["predictor_requests_in_flight", None] == found["predictor_waiting_rows", None] == 0
    assert found["predictor_connections_accepted_total", None] >= 3
    check_format(trace)
    requests = [event for event in slices_of(trace) if event["cat"] == "request"]
    assert 0 < len(requests) < answered
    assert {event["name"] for event in slices_of(trace)} >= {"request twice", "run twice", "infer"}
