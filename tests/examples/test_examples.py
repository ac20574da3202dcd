"""Every example: trained, served as its configuration says, and its answers those of the net itself."""

import asyncio
import contextlib
import importlib.util
import io
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from places import ROOT

from cube.errors import BadRequest
from cube.rpc.calls import Call
from predictor import models
from predictor.assembly import Assembly
from predictor.batching import Limits
from predictor.client.inference import Client
from predictor.config import load
from predictor.tensors import texts
from trainer_tools import criteo, train_ctr

SHARED = models.Settings(cube=None, max_samples=1_000, max_keys=100_000, cube_timeout_s=1, cube_wait_s=1)


class Example:
    """A copy of an example's directory, its models trained."""

    def __init__(self, name, directory):
        self.directory = directory
        shutil.copytree(ROOT / "examples" / name, directory, ignore=shutil.ignore_patterns("model*/", "__pycache__"))
        script = directory / "train.py"
        if script.exists():
            spec = importlib.util.spec_from_file_location(f"train_{name}", script)
            self.script = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.script)
            self.trained = self.script.train(directory)

    def answers(self, service, *requests):
        """What a service answers to requests, one after the other, within this process."""

        async def ask():
            async with contextlib.AsyncExitStack() as stack:
                threads = ThreadPoolExecutor(2)
                stack.callback(threads.shutdown)
                assembly = Assembly(load(self.directory), SHARED, threads, Limits())
                await assembly.load(stack)
                services = {made.name: made for made in assembly.services(stack)}
                for made in services.values():
                    await assembly.warm_up(made)
                return [
                    await _whole(services[service].infer(request, (), Call("test"), then=lambda answer: answer))
                    for request in requests
                ]

        return [answer.outputs for answer in asyncio.run(ask())]


async def _whole(answer):
    return answer if isinstance(answer, tuple) else await answer


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    made = {}
    path = list(sys.path)

    def get(name):
        if name not in made:
            made[name] = Example(name, tmp_path_factory.mktemp("examples") / name)
        return made[name]

    yield get
    sys.path[:] = path


def as_list(value):
    return [value.data[a : a + n].tobytes() for a, n in zip(value.starts, value.sizes, strict=True)]


def test_echo(example):
    said = [b"hello", b"", "naïve".encode()]
    (answer,) = example("echo").answers("EchoService", {"text": texts(said)})
    assert as_list(answer["text"]) == said


@pytest.mark.parametrize(("service", "net"), [("BowService", "bow"), ("CnnService", "cnn"), ("LstmService", "lstm")])
def test_text_classification(example, service, net):
    made = example("text_classification")
    said, labels = made.script.reviews(60, seed=3)
    said = [*said, b"", b"Words? Of no: vocabulary!", b"good " * 40]
    ids = [[made.script.WORDS.index(w) if w in made.script.WORDS else 1 for w in words_of(text)] for text in said]
    length = made.script.LENGTH
    words = torch.tensor([(each + [0] * length)[:length] for each in ids])
    mask = torch.tensor([[at < len(each) for at in range(length)] for each in ids])
    with torch.inference_mode():
        expected = made.trained[net](words, mask)["prob"][:, 1].numpy()
    whole, first, last = made.answers(service, *({"text": texts(part)} for part in (said, said[:1], said[-1:])))
    assert np.allclose(whole["good"], expected, atol=1e-6)
    assert np.allclose([first["good"][0], last["good"][0]], expected[[0, -1]], atol=1e-6)  # whatever else is asked
    assert ((whole["good"][:60] > 0.5) == labels).mean() > (0.55 if net == "bow" else 0.9)


def words_of(text):
    return re.findall(r"[a-z]+", text.decode().lower())


def test_image_classification(example):
    image = pytest.importorskip("PIL.Image")
    made = example("image_classification")
    files, labels = made.script.images(40, seed=3)
    pixels = [np.asarray(image.open(io.BytesIO(file)).resize((32, 32), image.BILINEAR)) for file in files]
    pixels = ((np.stack(pixels).astype(np.float32) / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        expected = made.trained(torch.from_numpy(pixels))["prob"]
    (answer,) = made.answers("ImageClassifyService", {"image": texts(files)})
    told = [json.loads(row) for row in as_list(answer["json"])]
    values, indices = expected.topk(2)
    assert [row["labels"] for row in told] == [[made.script.LABELS[i] for i in row] for row in indices.tolist()]
    assert np.allclose([row["scores"] for row in told], values, atol=1e-5)
    assert np.mean([row["labels"][0] == made.script.LABELS[at] for row, at in zip(told, labels, strict=True)]) > 0.9
    with pytest.raises(BadRequest, match=r"input 'image'\[1\]: found no image"):
        made.answers("ImageClassifyService", {"image": texts([files[0], b"text"])})


# The same workflow, as the ancestor's users write it.
ANCESTORS = """
workflows {
  name: "ctr"
  workflow_type: "Sequence"
  nodes { name: "general_reader_0" type: "GeneralReaderOp" }
  nodes {
    name: "general_dist_kv_infer_0"
    type: "GeneralDistKVInferOp"
    dependencies { name: "general_reader_0" mode: "RO" }
  }
  nodes {
    name: "general_response_0"
    type: "GeneralResponseOp"
    dependencies { name: "general_dist_kv_infer_0" mode: "RO" }
  }
}
"""


def test_ctr(example):
    made = example("ctr")
    rows = criteo.read(made.trained, 200)
    lengths = np.diff(rows.offsets).astype(np.int32).reshape(200, -1)
    request = {"dense": rows.dense, "keys": rows.keys, "lengths": lengths}
    (answer,) = made.answers("CTRPredictionService", request)
    expected = train_ctr.score(made.directory / "model", rows)
    assert np.allclose(answer["click"], expected, atol=1e-5)
    (made.directory / "workflow.prototxt").write_text(ANCESTORS)
    (answer,) = made.answers("CTRPredictionService", request)
    assert np.allclose(answer["prob"][:, 1], expected, atol=1e-5)


def test_ensemble(example):
    made = example("ensemble")
    features, _ = made.script.samples(50, seed=3)
    with torch.inference_mode():
        wide, deep = (made.trained[name](features)["prob"] for name in ("wide", "deep"))
    (answer,) = made.answers("EnsembleService", {"features": features.numpy()})
    assert np.allclose(answer["prob"], 0.25 * wide + 0.75 * deep, atol=1e-6)


def own_op_answer(made):
    measures, _ = made.script.flowers(50, seed=3)
    said = json.loads((made.directory / "model" / "statistics.json").read_text())
    features = (measures - np.array(said["mean"])) / np.array(said["std"])
    with torch.inference_mode():
        return measures, made.trained(torch.from_numpy(features.astype(np.float32)))["prob"].numpy()


def test_own_op(example):
    made = example("own_op")
    measures, expected = own_op_answer(made)
    (answer,) = made.answers("IrisService", {"measures": measures})
    assert np.allclose(answer["prob"], expected, atol=1e-5)


@pytest.mark.slow
def test_an_example_is_served_by_one_command(example, server):
    made = example("own_op")
    measures, expected = own_op_answer(made)
    with Client(server("predictor-server", "--conf", made.directory)) as client:
        answer = client.infer("IrisService", {"measures": measures})
    assert np.allclose(answer.outputs["prob"], expected, atol=1e-5)
