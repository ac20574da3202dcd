"""The HTTP door, by httpx against the real predictor-server, and its JSON by its own."""

import asyncio
import json

import httpx
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_services import Later, chain, service_of
from torch.export import Dim

from cube.errors import BadRequest, FailedPrecondition
from cube.rpc.router import Request, Router
from predictor.client import Client
from predictor.doors.json_tensors import elements, of_instances, rows_of, value_of
from predictor.doors.rest import RestDoor
from predictor.doors.rest_messages import JSON_LENGTH, Requests
from predictor.ops.op import Port, Ragged
from predictor.requests import Form
from predictor.service import InferenceService
from predictor.tensors import DTYPES, Texts, encode, texts
from trainer_tools.demo import started
from trainer_tools.manifest import Lookup, Slot


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = torch.nn.Linear(4, 2)

    def forward(self, x):
        y = self.net(x)
        return {"y": y, "best": y.argmax(dim=1)}


WORKFLOWS = """
workflows { name: "echo" nodes { name: "echo" type: "CommonEchoOp" } }
workflows {
  name: "score"
  nodes { name: "reader" type: "read" }
  nodes { name: "net" type: "infer" dependencies { name: "reader" } }
}
workflows {
  name: "sums"
  inputs { name: "ids" datatype: "INT64" ragged: true }
  nodes { name: "echo" type: "echo" }
}
"""
SERVICES = """
services { name: "EchoService" workflows: "echo" }
services { name: "Score" workflows: "score" }
services { name: "TextClassificationService" workflows: "sums" }
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("conf")
    (root / "net").mkdir()
    program = torch.export.export(Mlp(), (torch.zeros(3, 4),), dynamic_shapes=({0: Dim("rows", min=1)},))
    torch.export.save(program, root / "net/model.pt2")
    (root / "workflow.prototxt").write_text(WORKFLOWS)
    (root / "service.prototxt").write_text(SERVICES)
    (root / "model_toolkit.prototxt").write_text('engines { name: "net" model_dir: "net" }')
    with started("predictor-server", "--conf", root) as address:
        yield address


@pytest.fixture
def http(address):
    with httpx.Client(base_url=f"http://{address}", timeout=100) as client:
        yield client


X = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)


def direct(x):
    with torch.inference_mode():
        return {name: value.numpy() for name, value in Mlp()(torch.from_numpy(x)).items()}


def tensor(name, array, datatype, nested=False):
    data = array.tolist() if nested else array.ravel().tolist()
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": data}


def test_the_server_and_its_models_say_what_they_are(http):
    assert http.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert http.get("/v2/health/live").status_code == 200
    assert http.get("/v2/health/ready").status_code == 200
    assert http.get("/v2/models").json() == {"models": ["EchoService", "Score", "TextClassificationService"]}
    assert http.get("/v2/models/Score/ready").json() == {"name": "Score", "ready": True}
    said = http.get("/v2/models/Score/versions/1").json()
    assert said["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert [output["name"] for output in said["outputs"]] == ["y", "best"]
    assert said["versions"] == ["1"]


@pytest.mark.parametrize(
    ("timeout", "headers", "status"),
    [
        (60_000_000, {}, 200), (None, {"timeout-ms": "60000"}, 200), (1, {}, 504), (0, {}, 400), ("1", {}, 400),
        (True, {}, 400), (10**400, {}, 400), (None, {"timeout-ms": "-5"}, 400), (None, {"timeout-ms": "soon"}, 400),
    ],
)  # fmt: skip
def test_a_request_may_say_how_long_it_waits(http, timeout, headers, status):
    asked = {"inputs": [tensor("x", X, "FP32")], "parameters": {} if timeout is None else {"timeout": timeout}}
    said = http.post("/v2/models/Score/infer", json=asked, headers=headers)
    assert said.status_code == status, said.text
    assert status == 200 or "timeout" in said.text or "deadline" in said.text


@pytest.mark.parametrize("nested", [False, True])
def test_json_in_and_out(http, nested):
    asked = {"id": "r7", "inputs": [tensor("x", X, "FP32", nested)], "parameters": {"priority": 1}}
    said = http.post("/v2/models/Score/infer", json=asked).json()
    assert (said["model_name"], said["model_version"], said["id"]) == ("Score", "1", "r7")
    want = direct(X)
    for output in said["outputs"]:
        got = np.array(output["data"]).reshape(output["shape"])
        assert np.allclose(got, want[output["name"]], atol=1e-6)
    asked["outputs"] = [{"name": "best"}]
    said = http.post("/v2/models/Score/versions/1/infer", json=asked).json()
    assert [(o["name"], o["datatype"], o["data"]) for o in said["outputs"]] == [
        ("best", "INT64", want["best"].tolist())
    ]


@pytest.mark.parametrize("asked_of", ["request", "output"])
def test_raw_tensors_in_and_out(http, asked_of):
    head = {"inputs": [{"name": "x", "shape": [5, 4], "datatype": "FP32", "parameters": {"binary_data_size": 80}}]}
    if asked_of == "request":
        head["parameters"] = {"binary_data_output": True}
    else:
        head["outputs"] = [{"name": "y", "parameters": {"binary_data": True}}, {"name": "best"}]
    said = json.dumps(head).encode()
    headers = {"inference-header-content-length": str(len(said))}
    reply = http.post("/v2/models/Score/infer", content=said + X.tobytes(), headers=headers)
    assert reply.headers["content-type"] == "application/octet-stream"
    length = int(reply.headers["inference-header-content-length"])
    answer, raw = json.loads(reply.content[:length]), reply.content[length:]
    want = direct(X)
    y = answer["outputs"][0]
    assert y["parameters"] == {"binary_data_size": 40}
    assert np.allclose(np.frombuffer(raw[:40], np.float32).reshape(5, 2), want["y"], atol=1e-6)
    if asked_of == "request":
        assert np.array_equal(np.frombuffer(raw[40:], np.int64), want["best"])
    else:
        assert answer["outputs"][1]["data"] == want["best"].tolist()


def test_the_same_words_with_other_tensors_are_another_request(http):
    said = {
        "inputs": [
            {"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 32}},
        ],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(said).encode()
    headers = {"inference-header-content-length": str(len(text))}

    def post(raw):
        return http.post("/v2/models/Score/infer", content=text + raw, headers=headers)

    for at in range(3):
        answer = post(X[at : at + 2].tobytes())
        size = int(answer.headers["inference-header-content-length"])
        outputs = json.loads(answer.content[:size])["outputs"]
        assert outputs[0] == {"name": "y", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}}
        found = np.frombuffer(answer.content[size : size + 16], np.float32).reshape(2, 2)
        assert np.allclose(found, direct(X[at : at + 2])["y"], atol=1e-6)
        for raw, message in ((X[0].tobytes(), "at most the 16 bytes that are left"), (X.tobytes(), "48 bytes after")):
            refused = post(raw)
            assert refused.status_code == 400
            assert message in refused.json()["error"]


def test_words_are_remembered_without_growing_without_bound():
    requests = Requests()
    for number in range(3_000):
        text = json.dumps({"inputs": [], "id": str(number)}).encode()
        asked, raw = requests.read(Request("POST", "/", headers={JSON_LENGTH: str(len(text))}, body=text + b"raw"))
        assert (asked.id, bytes(raw)) == (str(number), b"raw")
        assert len(requests._heads) <= 1_024
    long = json.dumps({"inputs": [], "id": "x" * 3_000}).encode()
    requests.read(Request("POST", "/", headers={JSON_LENGTH: str(len(long))}, body=long))
    assert long not in requests._heads


def test_texts_and_gzip(http):
    words = ["", "ä", "a b"] * 300
    said = http.post(
        "/v2/models/EchoService/infer",
        json={"inputs": [{"name": "text", "shape": [900], "datatype": "BYTES", "data": words}]},
    )
    assert said.headers["content-encoding"] == "gzip"
    assert said.json()["outputs"] == [{"name": "text", "datatype": "BYTES", "shape": [900], "data": words}]


def test_the_ancestors_interface_takes_an_object_for_each_sample(http):
    want = direct(X)
    instances = [{"x": row} for row in X.tolist()]
    said = http.post("/Score/inference", json={"instances": instances}).json()
    assert said["version"] == "1"
    assert np.allclose([row["y"] for row in said["predictions"]], want["y"], atol=1e-6)
    assert [row["best"] for row in said["predictions"]] == want["best"].tolist()
    samples = [{"ids": [190, 1, 70]}, {"ids": []}, {"ids": [382]}]
    said = http.post("/TextClassificationService/inference", json={"instances": samples}).json()
    assert said["predictions"] == samples


def test_ragged_outputs_have_lengths_beside_them(address, http):
    ids, lengths = np.array([190, 1, 70, 382]), np.array([3, 0, 1], np.int32)
    asked = {"inputs": [tensor("ids", ids, "INT64"), tensor("ids.lengths", lengths, "INT32")]}
    said = http.post("/v2/models/TextClassificationService/infer", json=asked).json()
    assert [(o["name"], o["data"]) for o in said["outputs"]] == [("ids", ids.tolist()), ("ids.lengths", [3, 0, 1])]
    described = http.get("/v2/models/TextClassificationService").json()
    assert described["inputs"] == described["outputs"]
    with Client(address) as client:
        by_grpc = client.infer("TextClassificationService", {"ids": ids, "ids.lengths": lengths})
    assert by_grpc.outputs["ids"].tolist() == ids.tolist()
    assert by_grpc.outputs["ids.lengths"].tolist() == [3, 0, 1]


def test_debug_shows_what_every_node_has_made_and_how_long_it_took(http):
    said = http.post("/Score/debug", json={"instances": [{"x": row} for row in X.tolist()]}).json()
    nodes = said["workflows"]["score"]
    assert list(nodes) == ["reader", "net"]
    assert nodes["reader"]["outputs"]["x"]["shape"] == [5, 4]
    assert np.allclose(nodes["net"]["outputs"]["y"]["data"], direct(X)["y"].ravel(), atol=1e-6)
    assert nodes["net"]["took_us"] > 0
    assert nodes["net"]["began_us"] >= nodes["reader"]["took_us"]


def test_so_many_requests_are_debugged_at_once_and_no_more():
    body = json.dumps({"instances": [{"x": [1, 2]}]}).encode()

    async def main():
        router = Router()
        RestDoor(InferenceService([service_of(*chain(Later(0.02)))])).add_to(router)

        async def statuses():
            asked = (router.answer(Request("POST", "/s/debug", body=body)) for _ in range(9))
            return sorted([response.status for response in await asyncio.gather(*asked)])

        return [await statuses(), await statuses()]  # those that have ended count no more

    assert asyncio.run(main()) == [[200] * 4 + [429] * 5] * 2


def test_who_is_late_and_who_has_left_and_who_asked_wrongly_are_counted_as_that():
    service = service_of(*chain(Later(60)))
    router = Router()
    RestDoor(InferenceService([service])).add_to(router)
    asked = {"inputs": [tensor("x", np.ones((1, 2), np.float32), "FP32")]}

    def post(headers, **parameters):
        body = json.dumps({**asked, "parameters": parameters}).encode()
        answer = router.answer(Request("POST", "/v2/models/s/infer", headers=headers, body=body))
        return asyncio.ensure_future(answer) if asyncio.iscoroutine(answer) else answer

    async def main():
        late = [post({"timeout-ms": "20"}), post({}, timeout=20_000), post({"timeout-ms": "20"})]
        leaves = post({"timeout-ms": "60000"})
        assert [(await one).status for one in late] == [504] * 3
        leaves.cancel()
        await asyncio.wait([leaves])
        assert post({"timeout-ms": "soon"}).status == 400
        await asyncio.sleep(0)

    asyncio.run(main())
    codes = service.counts.totals().by_code
    assert codes == {"OK": 0, "DEADLINE_EXCEEDED": 3, "CANCELLED": 1, "INVALID_ARGUMENT": 1}
    assert service.counts.in_flight == 0


GOOD = tensor("x", X, "FP32")


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v2/models/Nobody/infer", {"inputs": [GOOD]}, 404, "model 'Nobody': not served here"),
        ("/v2/models/Score/versions/7/infer", {"inputs": [GOOD]}, 404, "version '7'"),
        ("/Nobody/inference", {"instances": [{}]}, 404, "model 'Nobody'"),
        ("/v2/models/Score/infer", b"{", 400, "body: found"),
        ("/v2/models/Score/infer", b"[" * 100_000, 400, "body: found"),
        ("/v2/models/Score/infer", {"inputs": [GOOD, GOOD]}, 400, "input 'x': found the name twice"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "shape": [4, 4]}]}, 400, "found 20 elements"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "shape": [20]}]}, 400, "input 'x' shape: found [20]"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "shape": [-5, 4]}]}, 400, "input 'x' shape"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "datatype": "FP99"}]}, 400, "datatype: found 'FP99'"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "datatype": "INT32"}]}, 400, "input 'x'"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "data": ["a"] * 20}]}, 400, "expected numbers, as FP32 has"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "data": 3}]}, 400, "expected a list, flat or nested"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "data": [[1.0], [1.0, 2.0]]}]}, 400, "as many in every list"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "data": [1e300] * 20}]}, 400, "numbers that fit FP32"),
        ("/v2/models/Score/infer", {"inputs": [GOOD], "outputs": [{"name": "z"}]}, 400, "output 'z'"),
        ("/v2/models/Score/infer", {"inputs": [GOOD], "parameters": {"priority": "a"}}, 400, "parameter 'priority'"),
        ("/v2/models/Score/infer", {"inputs": [GOOD], "parameters": {"sequence_id": 1}}, 501, "sequence_id"),
        ("/v2/models/Score/infer", {"inputs": [{**GOOD, "parameters": {"binary_data_size": 4}}]}, 400, "data as well"),
        ("/Score/inference", {"instances": []}, 400, "instances: found none"),
        ("/Score/inference", {"instances": [{"x": [1, 2, 3, 4]}, {}]}, 400, "instances[1]: found nothing, expected x"),
        ("/Score/inference", {"instances": [{"x": [1, 2, "3", 4]}]}, 400, "input 'x'"),
        ("/Score/inference", {"instances": [{"x": [1, 2, 3]}]}, 400, "input 'x' shape: found [1, 3]"),
        ("/Score/inference", {"instances": [{"z": 1}]}, 400, "input 'z'"),
        ("/TextClassificationService/inference", {"instances": [{"ids": 3}]}, 400, "found a value that is no list"),
        ("/TextClassificationService/inference", {"instances": [{"ids": [1.5]}]}, 400, "input 'ids'"),
        ("/TextClassificationService/inference", {"instances": [{"ids": [1 << 70]}]}, 400, "input 'ids'"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(http, path, body, status, message):
    reply = http.post(path, content=body if isinstance(body, bytes) else json.dumps(body).encode())
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]


@pytest.mark.parametrize(
    ("length", "size", "message"),
    [
        ("999", 80, "at most the"),
        ("x", 80, "at most the"),
        ("0" * 5_000, 80, "at most the"),
        (None, 84, "binary_data_size 84"),
        (None, 76, "4 bytes after"),
    ],
)
def test_lengths_of_raw_tensors_that_do_not_fit_are_refused(http, length, size, message):
    head = {"inputs": [{"name": "x", "shape": [5, 4], "datatype": "FP32", "parameters": {"binary_data_size": size}}]}
    if size == 76:
        head["inputs"][0]["shape"] = [19]
    said = json.dumps(head).encode()
    headers = {"inference-header-content-length": length or str(len(said))}
    reply = http.post("/v2/models/Score/infer", content=said + X.tobytes(), headers=headers)
    assert reply.status_code == 400
    assert message in reply.json()["error"]


# ---- JSON ----


@given(st.data(), st.sampled_from([*DTYPES, "BYTES"]), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_a_tensor_comes_back_from_its_json(data, datatype, shape):
    count = int(np.prod(shape))
    if datatype == "BYTES":
        words = data.draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=count, max_size=count))
        value = texts([word.encode() for word in words], tuple(shape))
    else:
        dtype = DTYPES[datatype]
        raw = data.draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        value = (np.frombuffer(raw, "u1") & 1).astype(bool) if datatype == "BOOL" else np.frombuffer(raw, dtype)
        value = np.where(np.isfinite(value), value, dtype.type(0)).reshape(shape)
    flat = b"".join(elements(value, "x"))
    back = value_of(datatype, shape, flat, "x")
    assert encode(back) == encode(value)
    assert back.shape == tuple(shape)
    nested = rows_of(value, 1, "x")
    if count:
        assert encode(value_of(datatype, shape, json.dumps(nested).encode(), "x")) == encode(value)


@given(st.sampled_from(["FP16", "FP32", "FP64"]), st.floats(allow_nan=False, allow_infinity=False))
@example("FP16", 65519.99)  # the largest that is rounded down
@example("FP16", 65520.0)
@example("FP32", 3.4028235677973366e38)
@example("FP32", 3.4028235677973362e38)
@example("FP32", 1e-46)
def test_a_number_is_rounded_as_numpy_rounds_it_and_refused_where_it_is_too_large(datatype, number):
    with np.errstate(over="ignore"):
        expected = np.array([number]).astype(DTYPES[datatype])
    flat = json.dumps([number]).encode()
    if np.isfinite(expected).all():
        assert encode(value_of(datatype, [1], flat, "x")) == expected.tobytes()
    else:
        with pytest.raises(BadRequest, match=f"numbers that fit {datatype}"):
            value_of(datatype, [1], flat, "x")


@pytest.mark.parametrize(
    ("datatype", "number"), [("INT8", 128), ("UINT8", -1), ("UINT64", 1 << 64), ("INT64", 1 << 63)]
)
def test_an_integer_that_does_not_fit_is_refused(datatype, number):
    with pytest.raises(BadRequest, match="x"):
        value_of(datatype, [1], json.dumps([number]).encode(), "x")


def test_texts_that_are_no_utf8_are_to_be_asked_for_raw():
    with pytest.raises(FailedPrecondition, match=r"output 'y': found bytes that are no UTF-8 .*binary_data"):
        elements(texts([b"\xff"]), "y")


SLOTS = [Slot("a", 1), Slot("b", 2)]
SPARSE = Lookup(table="t", keys="keys", feed="emb", slots=SLOTS, pooling="sum", lengths="lengths", text="text")


def form():
    dense = {"d": Port("FP32", (-1, 2)), "ids": Port("INT64", ragged=True)}
    return Form(dense, [SPARSE], max_samples=100, max_keys=100, finite=True, lengths={"ids": "ids.lengths"})


bags = st.lists(st.integers(0, 2**64 - 1), max_size=3)
samples = st.lists(
    st.fixed_dictionaries({
        "d": st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2),
        "ids": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
        "keys": st.lists(bags, min_size=2, max_size=2),
    }),
    min_size=1, max_size=4,
)  # fmt: skip


@given(samples)
def test_an_object_for_each_sample_is_a_request(instances):
    request = form().read(of_instances(form(), instances))
    assert request.rows == len(instances)
    assert request.values["d"].tolist() == [sample["d"] for sample in instances]
    assert rows_of(request.values["ids"], 1, "ids") == [sample["ids"] for sample in instances]
    assert rows_of(request.values["keys"], 2, "keys") == [sample["keys"] for sample in instances]


def test_raw_features_may_stand_for_keys():
    inputs = of_instances(form(), [{"d": [1, 2], "ids": [], "text": [["x"], ["y", "z"]]}])
    assert isinstance(inputs["text"], Texts)
    assert inputs["lengths"].tolist() == [[1, 2]]
    with pytest.raises(BadRequest, match=r"instances\[0\] 'text': found \[\['x'\]\], expected a list of 2 lists"):
        of_instances(form(), [{"d": [1, 2], "ids": [], "text": [["x"]]}])


def test_ragged_values_as_rows():
    value = Ragged(np.arange(4), np.array([0, 1, 1, 4, 4], np.int64))
    assert rows_of(value, 1, "x") == [[0], [], [1, 2, 3], []]
    assert rows_of(value, 2, "x") == [[[0], []], [[1, 2, 3], []]]
