"""Slow requests' lines, and spans."""

import asyncio
import http.server
import re
import threading
import time
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small_services import Add, Fails, Later, X, ask, chain, service_of

from cube.errors import BadConfig, BadRequest, DeadlineExceeded, Overloaded
from predictor.batching import Limits
from predictor.profile.slow_requests import SlowRequests
from predictor.profile.watch import Watch, watched
from predictor.service import Service


def test_a_slow_request_gets_a_line_that_says_where_its_time_went(caplog):
    async def main():
        await asyncio.gather(*(ask(service, count, peer="ipv4:10.0.0.7:4") for count in (2, 3)))

    service = service_of(*chain(Later(0.03), Add()), limits=Limits())
    service.counts.watchers.append(SlowRequests(0.02).request)
    asyncio.run(main())
    assert len(caplog.records) == 2
    text = caplog.messages[1]
    assert text.startswith("slow: s 7: ")
    assert "ms for 3 rows; workflow w: wait " in text
    assert "(3 rows: a " in text
    assert ", b 0." in text
    assert ", rest 0." in text
    facts = caplog.records[1].facts
    assert (facts["service"], facts["rows"], facts["code"], facts["peer"]) == ("s", 3, "OK", "ipv4:10.0.0.7:4")
    assert facts["ms"] >= 59


def test_slow_requests_do_not_flood_the_log(caplog, monkeypatch):
    monkeypatch.setattr("cube.logs.time", SimpleNamespace(monotonic=lambda: 7.0))  # all within a second

    async def main():
        await asyncio.gather(*(ask(service, 1) for _ in range(12)))
        await asyncio.sleep(1.05)

    service = service_of(*chain(Later(0.002)), limits=Limits(is_on=False))
    service.counts.watchers.append(SlowRequests(1e-9).request)
    asyncio.run(main())
    assert [line.startswith("slow: s 7:") for line in caplog.messages] == [True] * 5 + [False]
    assert caplog.messages[5] == "slow: 7 more within a second"


@pytest.mark.parametrize("is_batched", [False, True])
def test_a_failed_slow_request_says_its_code_and_where_its_time_went(caplog, is_batched):
    service = service_of(*chain(Later(0.01), Fails(Overloaded("full"))), limits=Limits(is_on=is_batched))

    async def main():
        async with watched([service], lambda _: Watch(slow_request_s=0.005)):
            return await asyncio.gather(*(ask(service) for _ in range(3)), return_exceptions=True)

    assert [type(answer) for answer in asyncio.run(main())] == [Overloaded] * 3
    for line in caplog.messages:
        found = re.search(r"ms for 3 rows, RESOURCE_EXHAUSTED; workflow w: run ([\d.]+) ms (.*)$", line)
        assert found
        assert re.fullmatch(r"\(\d rows: a \d\d+\.\d, b \d+\.\d unfinished, rest \d+\.\d\)", found[2])
    assert len(caplog.messages) == 3


def test_a_slow_request_that_expired_before_it_ran_says_so(caplog):
    service = service_of(*chain(Later(0.05)), limits=Limits())

    async def main():
        async with watched([service], lambda _: Watch(slow_request_s=0.005)):
            late = ask(service, deadline=time.monotonic() + 0.02)
            return await asyncio.gather(ask(service), late, return_exceptions=True)

    assert isinstance(asyncio.run(main())[1], DeadlineExceeded)
    (line,) = (line for line in caplog.messages if "DEADLINE_EXCEEDED" in line)
    assert line.endswith("ms for 3 rows, DEADLINE_EXCEEDED; no run of it began, or had ended")


class Stuck(Add):
    """Adds one when it is let go."""

    async def run(self, batch):
        self.begun += 1
        await self.released.wait()
        return super().run(batch)


GONE = r"ms for 2 rows, CANCELLED; workflow w: run (?P<ms>[\d.]+) ms{} \({} rows: a 0.\d, b (?P<b>[\d.]+) unfinished, "


@pytest.mark.parametrize(
    ("limits", "before", "beside", "whole"),
    [
        (Limits(is_on=False), 0, 0, GONE.format("", 2)),  # its run ends with it
        (Limits(), 1, 0, GONE.format(" so far", 2)),
        (Limits(), 1, 3, GONE.format(" so far", 5)),  # the run goes on for the others
    ],
    ids=["alone", "after another", "in company"],
)
def test_a_slow_request_whose_caller_has_gone_says_what_its_nodes_did_until_then(caplog, limits, before, beside, whole):
    """before: requests that run when it comes. beside: rows of another one in its batch."""
    service = service_of(*chain(Add(), Stuck()), limits=replace(limits, max_in_flight=2))
    stuck = service.lanes[0].plan.steps[1].node.op

    async def main():
        stuck.released, stuck.begun = asyncio.Event(), 0
        async with watched([service], lambda _: Watch(slow_request_s=0.005)):
            going_on = [asyncio.ensure_future(ask(service, 1)) for _ in range(before)]
            gone = asyncio.ensure_future(ask(service, 2))
            going_on += [asyncio.ensure_future(ask(service, rows)) for rows in [beside] if rows]
            while stuck.begun < before + 1:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            gone.cancel()
            await asyncio.wait([gone])
            stuck.released.set()
            return await asyncio.gather(*going_on)

    assert len(asyncio.run(main())) == before + bool(beside)
    (line,) = (line for line in caplog.messages if "CANCELLED" in line)
    found = re.search(whole, line)
    assert found, line
    assert 20 <= float(found["b"]) <= float(found["ms"])
    assert not service.lanes[0].batcher.under_way


class Named(Stuck):
    """The same, under another name."""

    outputs = {"z": X}  # noqa: RUF012

    async def run(self, batch):
        return {"z": (await super().run(batch))["y"]}


def test_of_several_workflows_the_line_tells_of_the_one_that_was_under_way(caplog):
    """A caller leaves while the first of two runs, or the second; where requests are in company or alone."""
    first, second = service_of(*chain(Stuck())), service_of(*chain(Named()))
    second.lanes[0].counts.plan = second.lanes[0].plan._replace(name="w2")
    service = Service("s", "7", "test", first.form, [*first.lanes, *second.lanes])
    ops = [lane.plan.steps[0].node.op for lane in service.lanes]

    async def main():
        for op in ops:
            op.released, op.begun = asyncio.Event(), 0
        async with watched([service], lambda _: Watch(slow_request_s=0.005)):
            for stuck in ops:
                asked = [asyncio.ensure_future(ask(service, count)) for count in (1, 2)]
                while stuck.begun < 2:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.02)
                for gone in asked:
                    gone.cancel()
                await asyncio.wait(asked)
                stuck.released.set()

    asyncio.run(main())
    found = [re.search(r"ms for (\d) rows, CANCELLED; workflow (w2?): run ", line) for line in caplog.messages]
    assert sorted(match.groups() for match in found if match) == [("1", "w"), ("1", "w2"), ("2", "w"), ("2", "w2")]


TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans():
    """A Spans and a function that gives what it has exported."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from predictor.profile.spans import Spans

    exporter = InMemorySpanExporter()
    made = Spans(exporter)

    def exported():
        made.close()
        return exporter.get_finished_spans()

    return made, exported


def test_a_request_is_a_span_with_a_child_for_each_node(spans):
    made, exported = spans
    service = service_of(*chain(Add(), Later(0.002)))
    service.counts.watchers.append(made.request)
    before = time.time_ns()
    asyncio.run(ask(service, 3, fields=(("traceparent", f"00-{TRACE}-{PARENT}-01"),)))
    found = {span.name: span for span in exported()}
    assert set(found) == {"s", "a", "b"}
    assert all(f"{span.context.trace_id:032x}" == TRACE for span in found.values())
    assert f"{found['s'].parent.span_id:016x}" == PARENT
    assert found["a"].parent.span_id == found["b"].parent.span_id == found["s"].context.span_id
    assert before <= found["s"].start_time <= found["a"].start_time <= found["a"].end_time <= found["b"].start_time
    assert found["b"].end_time <= found["s"].end_time <= time.time_ns()
    assert found["b"].end_time - found["b"].start_time >= 2_000_000
    assert found["s"].attributes["rows"] == 3
    assert found["b"].attributes["batch.rows"] == 3


@pytest.mark.parametrize(("traceparent", "count"), [(f"00-{TRACE}-{PARENT}-00", 0), ("nonsense", 3), (None, 3)])
def test_whoever_asks_decides_whether_a_request_is_recorded(spans, traceparent, count):
    made, exported = spans
    service = service_of(*chain(Add(), Add()))
    service.counts.watchers.append(made.request)
    asyncio.run(ask(service, fields=() if traceparent is None else (("traceparent", traceparent),)))
    assert len(exported()) == count


def test_a_refused_request_is_a_span_with_an_error(spans):
    made, exported = spans
    service = service_of(*chain(Add()))
    service.counts.watchers.append(made.request)
    with pytest.raises(BadRequest):
        asyncio.run(ask(service, 1_000))
    (span,) = exported()
    assert not span.status.is_ok
    assert span.attributes["rpc.grpc.status"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("said", ["setting", "environment"])
def test_spans_arrive_at_a_collector(said, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    arrived = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            arrived.append((self.path, zlib.decompress(body, 47) if self.headers["content-encoding"] else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    service = service_of(*chain(Add(), Later()))

    async def main(endpoint):
        async with watched([service], lambda service: Watch(), endpoint):
            await ask(service)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        if said == "environment":
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        asyncio.run(main(endpoint if said == "setting" else ""))
        collector.shutdown()
    ((path, body),) = arrived
    (of_resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert path == "/v1/traces"
    assert {span.name for scope in of_resource.scope_spans for span in scope.spans} == {"s", "a", "b"}
    named = {each.key: each.value.string_value for each in of_resource.resource.attributes}
    assert named["service.name"] == "predictor-server"


def test_a_collector_that_is_not_there_does_not_keep_the_process(caplog):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    service = service_of(*chain(Add()))

    async def main():
        async with watched([service], lambda service: Watch(), "http://127.0.0.1:9"):
            await ask(service)
            begin = time.monotonic()
        return time.monotonic() - begin

    assert asyncio.run(main()) < 60
    assert not [thread for thread in threading.enumerate() if "Otel" in thread.name]


def test_spans_that_are_wanted_and_cannot_be_made_are_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "predictor.profile.spans", None)

    async def main():
        async with watched([], lambda service: Watch(), "http://127.0.0.1:9"):
            pass

    with pytest.raises(BadConfig, match=r"OpenTelemetry: .* expected its packages: pip install 'cube-serving\[otel\]'"):
        asyncio.run(main())
