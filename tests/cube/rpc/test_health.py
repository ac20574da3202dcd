"""The health protocol behind both doors, to a channel of ours and to grpcurl."""

import asyncio
import json

import pytest
from rpc_doors import DOORS, grpcurl, with_door

from cube.errors import BadRequest, NotServed
from cube.pb import health_pb2 as pb
from cube.rpc.calls import Kind
from cube.rpc.health import Health
from cube.rpc.reflection import Reflection

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3

each_door = pytest.mark.parametrize("door", DOORS)


def asking(service=""):
    return pb.HealthCheckRequest(service=service).SerializeToString()


async def status_of(w, service=""):
    return pb.HealthCheckResponse.FromString((await w.ask(CHECK, asking(service))).message).status


async def next_status(watching):
    return pb.HealthCheckResponse.FromString(bytes(await asyncio.wait_for(watching.receive(), 60))).status


def served(door, work):
    """Run work(w, health)."""

    async def with_health(w):
        return await work(w, health)

    health = Health()
    reflection = Reflection({"grpc.health.v1.Health": pb.DESCRIPTOR})
    return with_door(door, "ours", {**health.handlers(), **reflection.handlers()}, with_health)


@each_door
def test_the_server_as_a_whole_is_healthy_from_the_start(door):
    assert served(door, lambda w, health: status_of(w)) == SERVING


@each_door
def test_a_service_is_as_it_was_last_said_to_be(door):
    async def work(w, health):
        health.set("a.B", True)
        assert await status_of(w, "a.B") == SERVING
        health.set("a.B", False)
        assert await status_of(w, "a.B") == NOT_SERVING
        assert await status_of(w) == SERVING

    served(door, work)


@each_door
def test_an_unknown_service_is_not_found_and_the_known_ones_are_named(door):
    async def work(w, health):
        health.set("a.B", True)
        with pytest.raises(NotServed, match=r"service 'nope': not served here, which serves a\.B") as raised:
            await status_of(w, "nope")
        assert raised.value.status.code == "NOT_FOUND"

    served(door, work)


@each_door
@pytest.mark.parametrize(("path", "kind"), [(CHECK, Kind.UNARY), (WATCH, Kind.SERVER_STREAM)])
def test_what_is_no_request_is_refused(door, path, kind):
    async def work(w, health):
        with pytest.raises(BadRequest):
            await w.ask(path, b"\xff\xff", kind=kind)

    served(door, work)


@each_door
def test_a_watcher_is_told_at_once_and_of_every_change(door):
    async def work(w, health):
        watching = await w.client.start(WATCH, Kind.SERVER_STREAM, asking("a.B"), timeout_s=None)
        assert await next_status(watching) == SERVICE_UNKNOWN
        for serving in (True, False, True):
            health.set("a.B", serving)
            health.set("other", serving)
            assert await next_status(watching) == (SERVING if serving else NOT_SERVING)
        health.set("a.B", True)  # no news
        health.set("a.B", False)
        assert await next_status(watching) == NOT_SERVING
        watching.cancel()

    served(door, work)


@each_door
def test_draining_tells_everyone_and_ends_the_watching(door):
    async def work(w, health):
        health.set("a.B", True)
        watching = [await w.client.start(WATCH, Kind.SERVER_STREAM, asking(s), timeout_s=None) for s in ("", "a.B")]
        for one in watching:
            assert await next_status(one) == SERVING
        health.drain()
        health.set("a.B", True)  # too late
        for one in watching:
            assert await next_status(one) == NOT_SERVING
            assert await asyncio.wait_for(one.receive(), 60) is None
        assert [await status_of(w), await status_of(w, "a.B")] == [NOT_SERVING, NOT_SERVING]
        late = await w.client.start(WATCH, Kind.SERVER_STREAM, asking(), timeout_s=None)
        assert await next_status(late) == NOT_SERVING
        assert await late.receive() is None
        await asyncio.wait_for(w.door.drain(100), 60)

    served(door, work)


@each_door
def test_grpcurl_checks_health_and_watches(door):
    async def work(w, health):
        check = await grpcurl("-d", '{"service": ""}', w.target, "grpc.health.v1.Health/Check")
        assert json.loads(check.out) == {"status": "SERVING"}
        unknown = await grpcurl("-d", '{"service": "nope"}', w.target, "grpc.health.v1.Health/Check")
        assert unknown.code != 0
        assert "NotFound" in unknown.err
        health.drain()
        watch = await grpcurl(w.target, "grpc.health.v1.Health/Watch")
        assert (watch.code, json.loads(watch.out)) == (0, {"status": "NOT_SERVING"})

    served(door, work)
