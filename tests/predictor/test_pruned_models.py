"""What prune-program writes is served as it is, in every form of lookup, and answers as the program it came from."""

import asyncio
import importlib.util
import warnings
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import numpy as np
import pytest
import torch
from places import GOLDEN
from pruned_models import SETTINGS, assert_serves, served
from torch.export import Dim

from cube.errors import BadRequest
from cube.rpc.calls import Call
from predictor import models
from predictor.assembly import Assembly
from predictor.batching import Limits
from predictor.config import load
from trainer_tools.programs.program import Rules
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options

OPTIONS = Options(rules=Rules(min_rows=1), verify_samples=8)
ROWS, DIM, N, L = 50, 4, 6, 3
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, ROWS, (N, L))
LENGTHS = np.array([2, 0, 3, 1, 0, 4])
BAGGED = RNG.integers(0, ROWS, LENGTHS.sum())
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
X = RNG.random((N, 2), np.float32)
WEIGHTS = RNG.random(BAGGED.size, np.float32)


class Sequence(torch.nn.Module):
    """An id for each of L places."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(ROWS, DIM, dtype=dtype)
        self.top = torch.nn.Linear(L * DIM + 2, 1, dtype=torch.float32)

    def forward(self, x, ids):
        rows = self.table(ids).flatten(1).float()
        return {"y": self.top(torch.cat([rows, x], 1)).sigmoid()}


class Bag(torch.nn.Module):
    """Bags of ids, pooled."""

    def __init__(self, mode, padding_idx=None):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.EmbeddingBag(ROWS, DIM, mode=mode, padding_idx=padding_idx, include_last_offset=True)
        self.top = torch.nn.Linear(DIM + 2, 1)

    def forward(self, x, ids, offsets, weights=None):
        pooled = self.table(ids, offsets, weights)
        return {"y": self.top(torch.cat([pooled, x], 1)).sigmoid()}


class DeepFm(torch.nn.Module):
    """Two tables that are asked for the same ids."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.table = torch.nn.Embedding(ROWS, 1), torch.nn.Embedding(ROWS, DIM)

    def forward(self, x, ids):
        rows = self.table(ids)
        second = (rows.sum(1).square() - rows.square().sum(1)).sum(1, keepdim=True)
        return {"y": (self.first(ids).sum(1) + second + x.sum(1, keepdim=True)).sigmoid()}


class FieldsFm(torch.nn.Module):
    """One table for the ids of all fields; each adds where its rows begin."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(L * ROWS, DIM)
        self.bag = torch.nn.EmbeddingBag(L * ROWS, 1, mode="sum")
        self.register_buffer("begin", ROWS * torch.arange(L))

    def forward(self, x, ids):
        rows = self.table(ids + self.begin)
        second = (rows.sum(1).square() - rows.square().sum(1)).sum(1, keepdim=True)
        return {"y": (self.bag(ids + self.begin) + second + x.sum(1, keepdim=True)).sigmoid()}


class Tagger(torch.nn.Module):
    """Two tables, sequences whose length varies, a mask of the ids themselves, sizes taken from them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.marks = torch.nn.Embedding(ROWS, DIM), torch.nn.Embedding(ROWS, 2)
        self.net = torch.nn.Linear(DIM + 2, 3)

    def forward(self, words, marks):
        start = torch.ones(words.shape[0], marks.shape[1])
        states = torch.tanh(self.net(torch.cat([self.words(words), self.marks(marks)], -1))).cumsum(1)
        return {"y": ((states.sum(-1) + start) * (words != 0)).sum(1, keepdim=True)}


def exported(directory, model, *example):
    """The program in a directory of its own, samples and keys varying."""
    directory.mkdir()
    samples, keys = Dim("samples", min=1), Dim("keys", min=0)
    dims = []
    for array in example:
        if array.shape[0] == N:
            dims.append({0: samples})
        else:
            dims.append({0: samples + 1} if array.shape[0] == N + 1 else {0: keys})
    tensors = tuple(map(torch.from_numpy, example))
    program = torch.export.export(model.eval(), tensors, dynamic_shapes=tuple(dims))
    torch.export.save(program, directory / "program.pt2")
    with torch.no_grad():
        return model(*tensors)["y"].numpy()


def check(directory, expected, request, slots=1):
    """The whole request, and the same one as three, answer as the program did."""
    cuts = [(0, 1), (1, 4), (4, N)]
    parts = [part(request, start, stop) for start, stop in cuts]
    lane, (whole, *some) = served(directory, request, *parts)
    assert lane.batcher.limits.is_on
    np.testing.assert_allclose(whole.outputs["y"], expected, rtol=1e-5, atol=1e-7)
    for (start, stop), answer in zip(cuts, some, strict=True):
        np.testing.assert_allclose(answer.outputs["y"], expected[start:stop], rtol=1e-5, atol=1e-7)
    return whole.facts


def part(request, start, stop):
    (lengths,) = [value for value in request.values() if value.dtype == np.int32] or [None]
    made = {}
    for name, value in request.items():
        if lengths is not None and value.ndim == 1 and value.size == lengths.sum():  # keys and their weights
            ends = np.concatenate([[0], np.cumsum(lengths)])
            made[name] = value[ends[start] : ends[stop]]
        else:
            made[name] = value[start:stop]
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sequence_of_ids(tmp_path, dtype):
    expected = exported(tmp_path / "m", Sequence(dtype), X, IDS)
    prune(tmp_path / "m", tmp_path / "out", OPTIONS)
    facts = check(tmp_path / "out", expected, {"x": X, "ids": IDS.astype(np.uint64)})
    assert (facts["keys"], facts["keys_absent"]) == (N * L, 0)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_sequences_of_any_length(tmp_path, length):
    words, marks = RNG.integers(0, ROWS, (2, N, length))
    samples, varies = Dim("samples", min=1), Dim("length", min=1)
    example = (torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))
    dims = ({0: samples, 1: varies}, {0: samples, 1: varies})
    (tmp_path / "m").mkdir()
    model = Tagger().eval()
    torch.export.save(torch.export.export(model, example, dynamic_shapes=dims), tmp_path / "m" / "program.pt2")
    prune(tmp_path / "m", tmp_path / "out", OPTIONS)
    with torch.no_grad():
        expected = model(torch.from_numpy(words), torch.from_numpy(marks))["y"].numpy()
    request = {"words": words, "words.keys": words.astype(np.uint64), "marks": marks.astype(np.uint64)}
    _, (whole, two) = served(tmp_path / "out", request, {name: value[2:4] for name, value in request.items()})
    np.testing.assert_allclose(whole.outputs["y"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two.outputs["y"], expected[2:4], rtol=1e-5, atol=1e-6)


def test_two_tables_of_the_same_ids(tmp_path):
    expected = exported(tmp_path / "m", DeepFm(), X, IDS)
    prune(tmp_path / "m", tmp_path / "out", OPTIONS)
    facts = check(tmp_path / "out", expected, {"x": X, "ids": IDS.astype(np.uint64)})
    assert facts["keys"] == 2 * N * L


def test_one_table_for_all_fields_which_begin_at_their_rows(tmp_path):
    expected = exported(tmp_path / "m", FieldsFm(), X, IDS)
    prune(tmp_path / "m", tmp_path / "out", OPTIONS)
    ids = IDS.astype(np.uint64)
    bag = {"ids.keys": ids.ravel(), "ids.keys.lengths": np.full((N, 1), L, np.int32)}
    check(tmp_path / "out", expected, {"x": X, "ids": ids, **bag})
    bag["ids.keys.lengths"][:2, 0] = L + 1, L - 1
    with pytest.raises(BadRequest, match=f"found {L + 1} keys in sample 0, expected {L} in every sample"):
        served(tmp_path / "out", {"x": X, "ids": ids, **bag})


def test_a_configuration_says_the_same_of_them(tmp_path):
    exported(tmp_path / "m", DeepFm(), X, IDS)
    prune(tmp_path / "m", tmp_path / "out", OPTIONS)
    request = {"x": X, "ids": IDS.astype(np.uint64)}
    _, (plain,) = served(tmp_path / "out", request)
    (tmp_path / "service.prototxt").write_text('services { name: "s" workflows: "w" }')
    (tmp_path / "workflow.prototxt").write_text(
        'workflows { name: "w" nodes { name: "n" type: "GeneralDistKVInferOp" } }'
    )
    (tmp_path / "model_toolkit.prototxt").write_text('engines { name: "m" model_dir: "out" }')

    async def main():
        with ThreadPoolExecutor(1) as threads:
            async with AsyncExitStack() as stack:
                assembly = Assembly(load(tmp_path), SETTINGS, threads, Limits())
                await assembly.load(stack)
                (service,) = assembly.services(stack)
                answer = service.infer(request, (), Call("/test"), then=lambda answer: answer)
                return await answer if isinstance(answer, Awaitable) else answer

    made = asyncio.run(main())
    np.testing.assert_array_equal(made.outputs["y"], plain.outputs["y"])
    assert made.facts["keys"] == plain.facts["keys"] == 2 * N * L


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 7])
def test_bags_of_ids(tmp_path, mode, padding):
    ids = BAGGED.copy()
    ids[[1, 4]] = 7
    expected = exported(tmp_path / "m", Bag(mode, padding), X, ids, OFFSETS)
    prune(tmp_path / "m", tmp_path / "out", OPTIONS)
    lengths = LENGTHS.astype(np.int32)[:, None]
    check(tmp_path / "out", expected, request_of(tmp_path / "out", ids, lengths))


def request_of(directory, ids, lengths, **more):
    """Named as the manifest says."""
    form = asyncio.run(_form(directory))
    (keys,) = [t.name for t in form.tensors() if t.datatype == "UINT64"]
    (sizes,) = [t.name for t in form.tensors() if t.datatype == "INT32"]
    return {"x": X, keys: ids.astype(np.uint64), sizes: lengths, **more}


async def _form(directory):
    model = await models.load(directory, SETTINGS)
    form = model.form(SETTINGS)
    await model.close()
    return form


def test_weighted_bags(tmp_path):
    expected = exported(tmp_path / "m", Bag("sum"), X, BAGGED, OFFSETS, WEIGHTS)
    prune(tmp_path / "m", tmp_path / "out", OPTIONS)
    form = asyncio.run(_form(tmp_path / "out"))
    (weights,) = [t.name for t in form.tensors() if t.datatype == "FP32" and t.name != "x"]
    lengths = LENGTHS.astype(np.int32)[:, None]
    check(tmp_path / "out", expected, request_of(tmp_path / "out", BAGGED, lengths, **{weights: WEIGHTS}))


def test_an_onnx_program(tmp_path):
    (tmp_path / "m").mkdir()
    model = Sequence().eval()
    tensors = (torch.from_numpy(X), torch.from_numpy(IDS))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, tensors, tmp_path / "m" / "m.onnx", dynamo=True, dynamic_shapes=({0: Dim("n")}, {0: Dim("n")}),
            input_names=["x", "ids"], output_names=["y"], verbose=False,
        )  # fmt: skip
        expected = model(*tensors)["y"].numpy()
    prune(tmp_path / "m", tmp_path / "out", OPTIONS)
    check(tmp_path / "out", expected, {"x": X, "ids": IDS.astype(np.uint64)})


@pytest.mark.skipif(importlib.util.find_spec("paddle") is None, reason="this Python has no Paddle")
@pytest.mark.parametrize("name", ["185-lod", "185-tagger", "262-deepfm", "331-ctr", "331-jit"])
def test_paddle_programs_of_every_age(tmp_path, name):
    prune(GOLDEN / f"paddle-{name}", tmp_path / "out", Options(rules=Rules(min_rows=1)))
    assert_serves(tmp_path / "out")
