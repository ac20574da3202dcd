"""Requests of a running service as a recording: which are kept, how much, and that the next start uses them."""

import asyncio
import io
import json
import threading
import zipfile

import dense_programs
import httpx
import numpy as np
import pytest
from small_services import Add, Fails, Later, ask, chain, rows, service_of

from cube.errors import BadRequest, FailedPrecondition
from cube.rpc.calls import Call
from cube.rpc.router import Request, Router
from predictor.client import Client
from predictor.doors.debug import DebugDoor
from predictor.engines.warm_up import recorded, save
from predictor.mapped_service import MappedService
from predictor.ops.op import Port
from predictor.profile.metrics import Metrics
from predictor.profile.recorder import Recorder, record
from predictor.profile.snapshot import snapshot
from predictor.requests import Form
from predictor.service import InferenceService, Service
from predictor.tensors import Texts, encode, texts
from predictor.warming import may_hold
from trainer_tools.demo import started
from trainer_tools.manifest import Lookup, Slot, Tensor

X = [Tensor("x", "FP32", [-1, 2])]


def read(npz, path, known=X):
    path.write_bytes(npz)
    return recorded(path, known)


async def refused(service, count=101):
    with pytest.raises(BadRequest):
        await ask(service, count)


def recording(service, work, seconds=5.0, most=64):
    """What is recorded while a coroutine runs."""

    async def main():
        made = asyncio.ensure_future(record(service, seconds, most))
        await asyncio.sleep(0)
        await work()
        return await made

    return asyncio.run(main())


@pytest.mark.parametrize("op", [Add, Later], ids=["within the call", "in company"])
def test_what_was_answered_is_kept_in_order_and_nothing_else(tmp_path, op):
    service = service_of(*chain(op()))

    async def work():
        await ask(service, 1)
        await refused(service)
        for count in (2, 3, 4):
            await ask(service, count)

    made = recording(service, work, most=3)
    assert (made.requests, made.left_out) == (3, 0)
    assert [len(request["x"]) for request in read(made.npz, tmp_path / "r.npz")] == [1, 2, 3]
    assert not service.recorders


def test_it_ends_after_its_seconds_with_what_there_is(tmp_path):
    service = service_of(*chain(Add()))
    made = recording(service, lambda: ask(service, 2), seconds=0.05)
    assert [len(request["x"]) for request in read(made.npz, tmp_path / "r.npz")] == [2]


def test_what_fails_is_not_kept():
    """The next start would refuse it, and with it the whole recording."""
    service = service_of(*chain(Fails(BadRequest("x", 1, 2))))
    with pytest.raises(FailedPrecondition, match=r"found no requests of 's' answered within 0\.05 s, expected some"):
        recording(service, lambda: refused(service, 3), seconds=0.05)
    assert not service.recorders


def recorder_of(form, most_bytes=1_000):
    return Recorder(Service("s", "1", "test", form, []), 100, most_bytes)


def test_bytes_are_bounded_and_a_request_that_is_too_large_leaves_room_for_others():
    recorder = recorder_of(Form({"x": Port("FP32", (-1, 2))}, [], max_samples=10_000, max_keys=1, finite=True))
    for count in (50, 76, 50, 25, 1):  # of 8 bytes each
        recorder.answered(rows(count))
    assert [len(request["x"]) for request in recorder.requests] == [50, 50, 25]
    assert recorder.left_out == {"request: found more bytes than are left, expected 1000 at most in all requests": 2}


def test_what_is_kept_is_a_copy_and_only_of_the_request_itself():
    form = Form({"x": Port("FP32", (-1, 2)), "t": Port("BYTES")}, [], max_samples=9, max_keys=1, finite=True)
    recorder = recorder_of(form)
    made = texts([b"a" * 10_000, b"b", b"c"])
    data = made.data.copy()
    part = Texts((2,), data, made.starts[1:], made.sizes[1:])  # as slices of a batch are
    x = np.ones((2, 2), np.float32)
    recorder.answered({"x": x, "t": part})
    x[:], data[:] = 7, 7
    ((kept),) = recorder.requests
    assert kept["x"].tolist() == [[1, 1], [1, 1]]
    assert bytes(encode(kept["t"])) == bytes(encode(texts([b"b", b"c"])))
    assert kept["t"].data.size == 2


def test_texts_that_no_file_can_hold_are_left_out_and_the_reason_is_told():
    form = Form({"t": Port("BYTES")}, [], max_samples=99, max_keys=1, finite=True)
    recorder = recorder_of(form)
    for each in ([b"a\0"], [b"", b"b"], [b"x" * 100] + [b""] * 10):  # the last would be padded to 1,100 bytes
        recorder.answered({"t": texts(each)})
    assert [bytes(encode(request["t"])) for request in recorder.requests] == [bytes(encode(texts([b"", b"b"])))]
    assert sorted(recorder.left_out) == [
        "input 't': found a text with a zero at its end, expected texts without",
        "request: found more bytes than are left, expected 1000 at most in all requests",
    ]

    async def work():
        service.recorders[0]({"t": texts([b"a\0"])})

    service = Service("s", "1", "test", form, [])
    with pytest.raises(
        FailedPrecondition, match=r"found 1 requests of 's' .*; 1 of them: input 't': found a text with"
    ):
        recording(service, work, seconds=0.01)


LOOKUP = Lookup(keys="k", text="raw", lengths="n", slots=[Slot("A", 1)], table="t", pooling="sum", feed="f")


@pytest.mark.parametrize(
    ("form", "request_"),
    [
        (([LOOKUP], {}), {"raw": texts([b"u1", b"u2", b"u1"]), "n": np.array([[1], [2]], np.int32)}),
        (([LOOKUP], {}), {"k": np.arange(3, dtype=np.uint64), "n": np.array([1, 2], np.int32)}),
        (([], {"lengths": {"w": "w.lengths"}}), {"w": np.arange(3), "w.lengths": np.array([[1], [2]], np.int32)}),
    ],
    ids=["raw texts", "lengths without a second dimension", "lengths with one"],
)
def test_whatever_a_request_may_hold_comes_back_as_a_request(tmp_path, form, request_):
    lookups, more = form
    dense = {"w": Port("INT64", (-1,), ragged=True)} if more else {}
    taken = Form(dense, lookups, max_samples=9, max_keys=9, finite=True, **more)
    wanted = taken.read(request_)
    recorder = recorder_of(taken)
    recorder.answered(request_)
    save(tmp_path / "r.npz", recorder.requests)
    (back,) = recorded(tmp_path / "r.npz", may_hold(taken))
    made = taken.read(back)
    assert (made.rows, made.keys) == (wanted.rows, wanted.keys)
    for name, value in wanted.values.items():
        assert np.array_equal(made.values[name].values, value.values)
        assert np.array_equal(made.values[name].offsets, value.offsets)


def test_of_a_service_with_a_key_the_key_is_kept_too(tmp_path):
    by_value = {name: service_of(*chain(Add()), name="s") for name in "ab"}
    form = Form({"x": Port("FP32", (-1, 2)), "v": Port("BYTES")}, [], max_samples=9, max_keys=1, finite=True)
    service = MappedService("v", by_value, form)

    async def work():
        for name in (b"b", b"a", b"c"):
            try:
                made = service.infer({**rows(1), "v": texts([name])}, (), Call("/p"), then=lambda answer: answer)
                if hasattr(made, "__await__"):
                    await made
            except BadRequest:
                assert name == b"c"

    made = recording(service, work, most=2)
    requests = read(made.npz, tmp_path / "r.npz", form.tensors())
    assert [bytes(request["v"].data) for request in requests] == [b"b", b"a"]
    asyncio.run(service.warm_up(requests))


# ---- over HTTP ----


@pytest.fixture
def door():
    """A router with it, and the two services behind it."""
    services, router = [service_of(*chain(Later()), name=name) for name in "ab"], Router()
    DebugDoor(InferenceService(services), Metrics(lambda: snapshot(services)), may_record=True).add_to(router)
    return router, services


async def get(router, query):
    return await router.answer(Request("GET", "/debug/record", query))


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("", 400, "service: found nothing, expected one of a, b"),
        ("service=c", 404, "service 'c': not served here, which serves a, b"),
        ("service=", 404, "service '': not served here"),
        ("service=a&requests=0", 400, "requests: found '0', expected a number from 1 to 1000"),
        ("service=a&requests=1001", 400, "requests: found '1001'"),
        ("service=a&requests=-1", 400, "requests: found '-1'"),
        ("service=a&requests=1e2", 400, "requests: found '1e2'"),
        ("service=a&seconds=0", 400, "seconds: found '0', expected a number above 0, at most 60"),
        ("service=a&seconds=61", 400, "seconds: found '61'"),
        ("service=a&request=1", 400, "query: found 'request', expected seconds or requests or service"),
        ("service=a&seconds=0.01", 412, "/debug/record: found no requests of 'a' answered within 0.01 s"),
    ],
)
def test_what_cannot_be_recorded_is_refused(door, query, status, message):
    response = asyncio.run(get(door[0], query))
    assert response.status == status
    assert message in json.loads(response.body)["error"]


def test_nobody_records_where_the_server_was_not_told_to_allow_it():
    router = Router()
    services = [service_of(*chain(Later()), name="a")]
    DebugDoor(InferenceService(services), Metrics(lambda: snapshot(services))).add_to(router)
    response = asyncio.run(get(router, ""))
    assert response.status == 412
    assert "expected --allow-recording" in json.loads(response.body)["error"]


def test_two_may_record_at_once_and_one_who_leaves_watches_no_more(door):
    router, (service, other) = door

    async def main():
        tasks = [asyncio.ensure_future(get(router, "service=a&requests=2")) for _ in range(3)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        assert len(service.recorders) == 1
        assert not other.recorders
        await ask(service)
        await ask(service)
        await asyncio.wait(tasks)
        return [task.result() for task in tasks[1:]]

    whole, busy = asyncio.run(main())
    assert busy.status == 429
    assert "/debug/record: recordings: 2 are being made, at most 2 may be at once" in busy.body.decode()
    assert whole.status == 200
    assert dict(whole.headers)["x-requests"] == "2"
    assert zipfile.ZipFile(io.BytesIO(whole.body)).namelist() == ["x/0.npy", "x/1.npy"]
    assert not service.recorders


@pytest.mark.slow
def test_a_server_is_recorded_and_the_next_start_times_its_engines_on_that(tmp_path, command):
    """From callers over gRPC and HTTP to a file, and with it to the choice of an engine."""
    directory = tmp_path / "net"
    directory.mkdir()
    dense_programs.write_torch(directory / "net.pt2", dense_programs.torch_net())
    dense_programs.write_onnx(directory / "net.onnx")
    done = threading.Event()

    def load(address):
        with Client(address) as client:
            number = 0
            while not done.is_set():
                x, ids = dense_programs.feeds(3, number)
                client.infer("net", {"x": x, "ids": ids})
                with pytest.raises(BadRequest):  # an id that no row has: it must not be kept
                    client.infer("net", {"x": x, "ids": np.full(3, 99)})
                httpx.post(
                    f"http://{address}/v2/models/net/infer",
                    json={
                        "inputs": [
                            {"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [0.5] * 8},
                            {"name": "ids", "datatype": "INT64", "shape": [2], "data": [1, 2]},
                        ]
                    },
                ).raise_for_status()
                number += 1

    with started("predictor-server", "--model", directory, "--allow-recording") as address:
        caller = threading.Thread(target=load, args=(address,))
        caller.start()
        try:
            answer = httpx.get(f"http://{address}/debug/record?requests=6&seconds=30", timeout=60).raise_for_status()
        finally:
            done.set()
            caller.join()
    assert (answer.headers["x-requests"], answer.headers["x-left-out"]) == ("6", "0")
    assert "warm_up.npz" in answer.headers["content-disposition"]
    requests = read(answer.content, directory / "warm_up.npz", dense_programs.INPUTS)
    sizes = [len(request["x"]) for request in requests]
    assert sorted(sizes) == [2, 2, 2, 3, 3, 3]
    done = command("predictor-server", "--model", directory, "--check")
    assert done.returncode == 0, done.stderr
    assert f" chosen, by runs of {', '.join(map(str, sizes))}, 3, 1, 1, 1 rows: torch " in done.stderr
