"""The Open Inference Protocol door, by the real tritonclient: the CTR model and a plain dense one."""

import json
import queue
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from places import BIN
from torch.export import Dim
from tritonclient.utils import InferenceServerException

from cube.client import LocalCube
from predictor.client import Client, texts
from trainer_tools import criteo, train_ctr
from trainer_tools.demo import started


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def forward(self, x, scale):
        y = self.net(x) * scale
        return {"y": y, "best": y.argmax(dim=1)}


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """A directory with one exported program and nothing else."""
    directory = tmp_path_factory.mktemp("models") / "mlp"
    directory.mkdir()
    rows = Dim("rows", min=1)
    program = torch.export.export(Mlp(), (torch.zeros(3, 4), torch.ones(1)), dynamic_shapes=({0: rows}, {}))
    torch.export.save(program, directory / "model.pt2")
    return directory


@pytest.fixture(scope="module")
def address(demo, mlp):
    with started("predictor-server", "--model", demo.pruned, "--model", mlp, "--max-samples", 5000) as address:
        yield address


@pytest.fixture
def client(address):
    with triton.InferenceServerClient(address) as client:
        yield client


@pytest.fixture(scope="module")
def rows(demo):
    return criteo.read(demo.lines)


def tensor(name, array, datatype):
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def ctr_inputs(rows):
    return [
        tensor("dense", rows.dense, "FP32"),
        tensor("keys", rows.keys, "UINT64"),
        tensor("lengths", rows.lengths, "INT32"),
    ]


def test_the_server_says_that_it_lives_is_ready_and_who_it_is(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata().name == "cube-serving"


def test_models_are_ready_by_name_and_version_and_others_are_not_found(client, demo):
    version = str(json.loads((demo.pruned / "manifest.json").read_text())["version"])
    assert client.is_model_ready("ctr")
    assert client.is_model_ready("ctr", version)
    with pytest.raises(
        InferenceServerException, match="model 'nobody': not served here, which serves ctr, mlp"
    ) as raised:
        client.get_model_metadata("nobody")
    assert raised.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="model 'ctr' version '7': not served here"):
        client.get_model_metadata("ctr", "7")


def test_metadata_lists_what_the_ctr_model_takes_and_makes(client):
    metadata = client.get_model_metadata("ctr")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("dense", "FP32", [-1, 13]),
        ("keys", "UINT64", [-1]),
        ("lengths", "INT32", [-1, 26]),
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("prob", "FP32", [-1, 2])]


def test_served_scores_are_the_trained_programs(client, rows, demo):
    reply = client.infer("ctr", ctr_inputs(rows), request_id="r7")
    offline = train_ctr.score(demo.model, rows)
    assert np.abs(reply.as_numpy("prob")[:, 1] - offline).max() <= 1e-5
    response = reply.get_response()
    assert response.id == "r7"
    assert response.parameters["keys"].int64_param == rows.keys.size
    found = LocalCube(demo.pruned / "cube").rows("embedding", None, rows.keys).found
    assert response.parameters["keys_absent"].int64_param == np.count_nonzero(~found)
    assert response.parameters["table.embedding"].string_param == f"{response.model_version}@0"


def test_raw_texts_score_as_the_keys_a_client_signs(address, demo, rows):
    cells = [line.split("\t")[14:] for line in demo.lines.read_text().splitlines()]
    raw = texts([text.encode() for row in cells for text in row if text])
    with Client(address) as client:
        by_keys = client.infer("ctr", {"dense": rows.dense, "keys": rows.keys, "lengths": rows.lengths})
        by_text = client.infer("ctr", {"dense": rows.dense, "text": raw, "lengths": rows.lengths})
    assert np.array_equal(by_keys.outputs["prob"], by_text.outputs["prob"])
    assert by_keys.facts == by_text.facts


def test_multi_valued_and_empty_slots_are_averaged_as_the_trained_program_does(client, demo):
    rng = np.random.default_rng(4)
    vocabulary = np.load(demo.model / "vocabulary.npy")
    lengths = rng.integers(0, 5, (7, 26)).astype(np.int32)
    keys = rng.choice(vocabulary, lengths.sum())
    keys[::5] = rng.integers(0, 2**64, keys[::5].size, dtype=np.uint64)  # absent ones among them
    rows = criteo.CriteoRows(np.zeros(7, np.int8), rng.random((7, 13), dtype=np.float32), keys, lengths)
    got = client.infer("ctr", ctr_inputs(rows)).as_numpy("prob")[:, 1]
    assert np.abs(got - train_ctr.score(demo.model, rows)).max() <= 1e-6


def test_a_sample_scores_the_same_alone_and_in_company(client, rows):
    together = client.infer("ctr", ctr_inputs(rows)).as_numpy("prob")
    for i, alone in zip(range(5), rows.batches(1), strict=False):
        assert np.abs(client.infer("ctr", ctr_inputs(alone)).as_numpy("prob")[0] - together[i]).max() <= 1e-6


def test_a_dense_program_with_no_cube_is_served_as_it_is(client, mlp):
    x, scale = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32), np.array([2.5], np.float32)
    reply = client.infer("mlp", [tensor("x", x, "FP32"), tensor("scale", scale, "FP32")])
    with torch.inference_mode():
        want = Mlp()(torch.from_numpy(x), torch.from_numpy(scale))
    assert np.allclose(reply.as_numpy("y"), want["y"].numpy(), atol=1e-6)
    assert np.array_equal(reply.as_numpy("best"), want["best"].numpy())
    assert reply.get_response().model_version == "1"


def test_outputs_come_in_the_order_asked_for(client):
    inputs = [tensor("x", np.zeros((1, 4), np.float32), "FP32"), tensor("scale", np.ones(1, np.float32), "FP32")]
    wanted = [triton.InferRequestedOutput(name) for name in ("best", "y")]
    assert [o.name for o in client.infer("mlp", inputs, outputs=wanted).get_response().outputs] == ["best", "y"]
    only = client.infer("mlp", inputs, outputs=wanted[:1]).get_response()
    assert [o.name for o in only.outputs] == ["best"]
    with pytest.raises(InferenceServerException, match="output 'z': found a name the model does not make"):
        client.infer("mlp", inputs, outputs=[triton.InferRequestedOutput("z")])


def test_parameters_that_would_change_the_answer_are_refused_and_not_ignored(client):
    inputs = [tensor("x", np.zeros((1, 4), np.float32), "FP32"), tensor("scale", np.ones(1, np.float32), "FP32")]
    with pytest.raises(InferenceServerException, match="parameter 'classification' is not implemented") as raised:
        client.infer("mlp", inputs, outputs=[triton.InferRequestedOutput("y", class_count=1)])
    assert raised.value.status() == "StatusCode.UNIMPLEMENTED"
    with pytest.raises(InferenceServerException, match="parameter 'sequence_"):
        client.infer("mlp", inputs, sequence_id=7)
    assert client.infer("mlp", inputs, priority=1, timeout=1_000_000).as_numpy("y").shape == (1, 2)


def test_typed_contents_are_understood_too(address):
    from cube.rpc.channel import Channel
    from predictor.pb import kserve_pb2 as pb

    request = pb.ModelInferRequest(model_name="mlp")
    x = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    x.contents.fp32_contents.extend([1, 2, 3, 4])
    scale = request.inputs.add(name="scale", datatype="FP32", shape=[1])
    scale.contents.fp32_contents.append(1)

    def send():
        import asyncio

        async def run():
            async with Channel(address) as channel:
                path = "/inference.GRPCInferenceService/ModelInfer"
                return pb.ModelInferResponse.FromString(await channel.call(path, request.SerializeToString(), 5))

        return asyncio.run(run())

    got = np.frombuffer(send().raw_output_contents[0], np.float32)
    with torch.inference_mode():
        want = Mlp()(torch.tensor([[1.0, 2, 3, 4]]), torch.ones(1))["y"].numpy()
    assert np.allclose(got, want.ravel(), atol=1e-6)
    x.contents.fp32_contents.append(5)
    with pytest.raises(Exception, match=r"input 'x': found 5 fp32_contents, expected as many as shape \[1, 4\] has"):
        send()


def spoiled(rows, **changes):
    arrays = {"dense": rows.dense, "keys": rows.keys, "lengths": rows.lengths} | changes
    names = {np.float32: "FP32", np.float64: "FP64", np.uint64: "UINT64", np.int64: "INT64", np.int32: "INT32"}
    return [tensor(name, array, names[array.dtype.type]) for name, array in arrays.items()]


def bad_requests(rows):
    nan = rows.dense.copy()
    nan[3, 7] = np.nan
    empty = {"dense": rows.dense[:0], "keys": rows.keys[:0], "lengths": rows.lengths[:0]}
    many = 100_000
    big = {
        "dense": np.zeros((many, 13), np.float32),
        "keys": np.zeros(many * 26, np.uint64),
        "lengths": np.ones((many, 26), np.int32),
    }
    return [
        (
            spoiled(rows, lengths=rows.lengths[:, :25].copy()),
            r"'lengths' shape: found \[800, 25\], expected \[-1, 26\]",
        ),
        (spoiled(rows, dense=rows.dense.astype(np.float64)), "input 'dense' datatype: found FP64, expected FP32"),
        (spoiled(rows, keys=rows.keys.astype(np.int64)), "input 'keys' datatype: found INT64, expected UINT64"),
        (spoiled(rows, dense=nan), r"input 'dense'\[3, 7\]: found nan, expected a finite number"),
        (spoiled(rows, **empty), "request: found 0 samples, expected 1 to 5000"),
        (spoiled(rows, **big), "request: found 100000 samples, expected 1 to 5000"),
        (spoiled(rows)[:2], "input 'lengths': found nothing"),
    ]


@pytest.mark.parametrize("number", range(7))
def test_a_bad_request_is_an_invalid_argument_that_says_why_and_the_next_one_is_served(client, rows, number):
    inputs, message = bad_requests(rows)[number]
    with pytest.raises(InferenceServerException, match=message) as raised:
        client.infer("ctr", inputs)
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert client.infer("ctr", ctr_inputs(rows)).as_numpy("prob").shape == (800, 2)


def test_100_000_samples_are_served_where_the_limit_allows(demo, server):
    address = server("predictor-server", "--model", demo.pruned, "--max-samples", 100_000)
    rows = criteo.CriteoRows(
        np.zeros(100_000, np.int8),
        np.zeros((100_000, 13), np.float32),
        np.arange(2_600_000, dtype=np.uint64),
        np.ones((100_000, 26), np.int32),
    )
    with Client(address) as client:
        answer = client.infer("ctr", {"dense": rows.dense, "keys": rows.keys, "lengths": rows.lengths}, timeout_s=60)
    assert answer.outputs["prob"].shape == (100_000, 2)


class Slow(torch.nn.Module):
    def forward(self, x):
        for _ in range(400):
            x = torch.tanh(x @ x.T @ x)
        return {"y": x}


def test_a_predictor_in_the_middle_of_a_long_run_still_stops_at_once(tmp_path):
    (tmp_path / "slow").mkdir()
    program = torch.export.export(Slow(), (torch.zeros(3, 64),), dynamic_shapes=({0: Dim("rows", min=1)},))
    torch.export.save(program, tmp_path / "slow" / "model.pt2")
    line = [BIN / "predictor-server", "--model", tmp_path / "slow", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        address = re.search(r"listening on (\S+),", process.stdout.readline())[1]
        with triton.InferenceServerClient(address) as client:
            assert client.is_server_ready()
            answers = queue.Queue()
            inputs = [tensor("x", np.ones((8000, 64), np.float32), "FP32")]
            client.async_infer("slow", inputs, callback=lambda result, error: answers.put(error))
            assert client.is_server_live()  # answered after the run was handed to a thread
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
            assert time.monotonic() - begin < 30  # about a second where nothing else runs; the run takes minutes
            assert answers.get(timeout=60) is not None


def test_names_of_any_length_are_refused_in_a_message_that_arrives(client):
    with pytest.raises(InferenceServerException, match="not served here, which serves ctr, mlp") as raised:
        client.get_model_metadata("x" * 100_000)
    assert raised.value.status() == "StatusCode.NOT_FOUND"
