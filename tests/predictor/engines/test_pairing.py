"""One net saved by torch.export and by torch.onnx.export: two sets of names, of which callers see the first one's."""

import asyncio
import logging
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.export import Dim

from predictor import models
from predictor.engines.auto import Candidate, fastest
from predictor.engines.open import open_engine
from predictor.engines.pairing import Unlike, named_as
from trainer_tools.manifest import Tensor

SHARED = models.Settings(cube=None, max_samples=1_000, max_keys=1_000, cube_timeout_s=1, cube_wait_s=1)


class Net(torch.nn.Module):
    """Two outputs that no exporter can name but by itself. They are alike in datatype and shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.rows, self.ctr, self.cvr = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)

    def forward(self, x, ids):
        seen = x + self.rows(ids)
        return torch.sigmoid(self.ctr(seen)), self.cvr(seen)


class Towers(torch.nn.Module):
    """Two inputs alike."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

    def forward(self, user, item):
        return {"score": (self.a(user) * self.b(item)).sum(1, keepdim=True)}


NET = Net().eval()
EXAMPLES = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
INPUTS = [Tensor("x", "FP32", [-1, 4]), Tensor("ids", "INT64", [-1])]
OUTPUTS = [Tensor("output_0", "FP32", [-1, 1]), Tensor("output_1", "FP32", [-1, 1])]


def to_torch(path, net=NET, examples=EXAMPLES):
    rows = Dim("rows", min=1)
    torch.export.save(torch.export.export(net, examples, dynamic_shapes=tuple({0: rows} for _ in examples)), path)
    return path


def to_onnx(path, net=NET, examples=EXAMPLES, *, dynamo=False, names=None, **more):
    """names: of the inputs; None: as the exporter calls them, which without dynamo fixes their shapes, too."""
    rows = Dim("rows", min=1)
    if dynamo:
        more["dynamic_shapes"] = tuple({0: rows} for _ in examples)
    elif names:
        more["dynamic_axes"] = {name: {0: "rows"} for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of torch
        torch.onnx.export(net, examples, path, dynamo=dynamo, input_names=names, verbose=False, **more)
    return path


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory):
    return to_torch(tmp_path_factory.mktemp("torch") / "net.pt2")


def opened(path):
    return open_engine(path, "torch.export" if path.suffix == ".pt2" else "onnx")


def feeds(rows=5):
    rng = np.random.default_rng(rows)
    return [rng.standard_normal((rows, 4), np.float32), rng.integers(0, 9, rows)]


@pytest.mark.parametrize(
    "how",
    [
        {"dynamo": True},
        {"names": ["x", "ids"]},
        {"names": ["input", "input_ids"]},
        {"names": ["input", "input_ids"], "output_names": ["ctr", "cvr"]},
    ],
    ids=["dynamo", "own outputs", "own inputs too", "all names given"],
)
def test_the_net_in_both_formats_is_one_net_whatever_torch_onnx_calls_its_ends(by_torch, tmp_path, caplog, how):
    """Real exports. The directory is served under torch.export's names by either engine, and both are timed."""
    caplog.set_level("INFO")
    program = to_onnx(tmp_path / "net.onnx", **how)
    assert opened(program).outputs != OUTPUTS
    first = opened(by_torch)
    other = named_as(first, opened(program))
    assert (other.inputs, other.outputs, other.platform) == (INPUTS, OUTPUTS, "onnxruntime_onnx")
    for one, two in zip(first.run(feeds()), other.run(feeds()), strict=True):
        np.testing.assert_allclose(one, two, 1e-5, 1e-6)

    undecided = open_engine(by_torch, "torch.export", also=[(program, "onnx")], undecided=True)
    undecided.run(feeds())
    undecided.decide()
    assert (undecided.inputs, undecided.outputs) == (INPUTS, OUTPUTS)
    assert "chosen, by runs of 5 rows: torch " in caplog.text

    (tmp_path / "net.pt2").write_bytes(by_torch.read_bytes())
    model = asyncio.run(models.load(tmp_path, SHARED))
    assert (model.engine.inputs, model.engine.outputs) == (INPUTS, OUTPUTS)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("predictor")]
    (table,) = (r.getMessage() for r in caplog.records if " chosen, by runs of 1, 8, 64 rows: torch " in r.getMessage())
    assert "; onnxruntime " in table
    assert "engine onnxruntime: its inputs (" in caplog.text  # and what is called what
    asyncio.run(model.close())


@pytest.mark.parametrize(
    ("net", "examples", "how", "why"),
    [
        (NET, EXAMPLES, {}, "its inputs, onnx::Add_0 FP32 [3, 4], input INT64 [3], are not those of the first, x FP32 "
         "[-1, 4], ids INT64 [-1]"),
        (Towers().eval(), EXAMPLES[:1] * 2, {"names": ["left", "right"], "output_names": ["score"]},
         "its inputs, left FP32 [-1, 4], right FP32 [-1, 4], are called otherwise than those of the first, "
         "user FP32 [-1, 4], item FP32 [-1, 4], and nothing but their order tells which is which"),
        (Towers().eval(), EXAMPLES[:1] * 2, {"names": ["item", "other"], "output_names": ["score"]},
         "its inputs, item FP32 [-1, 4], other FP32 [-1, 4], have names in other places than those of the first, "
         "user FP32 [-1, 4], item FP32 [-1, 4]"),
    ],
    ids=["a fixed batch", "two inputs alike", "a name in another place"],
)  # fmt: skip
def test_what_cannot_be_paired_is_told_with_both_lists_of_names(tmp_path, caplog, net, examples, how, why):
    to_torch(tmp_path / "net.pt2", net, examples)
    to_onnx(tmp_path / "net.onnx", net, examples, **how)
    engine = open_engine(tmp_path / "net.pt2", "torch.export", also=[(tmp_path / "net.onnx", "onnx")])
    assert engine.platform == "torch_export"
    assert f"engine onnxruntime is not used beside torch: {why}\n" in caplog.text


def test_outputs_that_are_paired_in_the_wrong_order_are_seen_by_what_they_hold(by_torch, tmp_path, caplog):
    class Exchanged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = NET

        def forward(self, x, ids):
            ctr, cvr = self.net(x, ids)
            return cvr, ctr

    program = to_onnx(tmp_path / "net.onnx", Exchanged().eval(), names=["x", "ids"])
    engine = open_engine(by_torch, "torch.export", also=[(program, "onnx")])
    assert engine.platform == "torch_export"
    assert "engine onnxruntime is not used: output 'output_0' of request 0 differs by" in caplog.text


class Ends:
    """An engine whose inputs and outputs are what it is told, and whose outputs say which feed they are."""

    platform = "ends"

    def __init__(self, inputs, outputs, lods=()):
        self.inputs, self.outputs, self.lod_levels = inputs, outputs, dict.fromkeys(lods, 1)
        self.is_closed = False

    def run(self, feeds):
        assert not self.is_closed
        return [f"{tensor.name} of {feeds}" for tensor in self.outputs]

    def close(self):
        self.is_closed = True


def some(*names, datatype="FP32", shape=(-1, 2)):
    return [Tensor(name, datatype, list(shape)) for name in names]


@given(st.permutations("abcd"), st.permutations("wxyz"))
def test_the_same_names_in_another_order_are_put_in_order(inputs, outputs):
    first, other = Ends(some(*"abcd"), some(*"wxyz")), Ends(some(*inputs), some(*outputs))
    engine = named_as(first, other)
    assert (engine.inputs, engine.outputs) == (first.inputs, first.outputs)
    assert engine.run(["A", "B", "C", "D"]) == [f"{name} of {[name.upper() for name in inputs]}" for name in "wxyz"]
    engine.close()
    assert other.is_closed


def test_an_engine_with_the_same_names_stays_as_it_is_and_names_alone_cost_a_run_nothing():
    first, other = Ends(some("a"), some("w")), Ends(some("a"), some("w"))
    assert named_as(first, other) is other
    renamed = Ends(some("a"), some("7"))
    assert named_as(first, renamed).run.__self__ is renamed


@pytest.mark.parametrize(
    ("inputs", "outputs", "lods", "fits"),
    [
        (some("x"), some("7"), (), True),
        (some("x", shape=(-1, -1)), some("7", shape=(-1, -1)), (), True),  # what it leaves open the first one says
        (some("x", shape=(3, 2)), some("7"), (), False),
        (some("x"), some("7", shape=(3, 2)), (), False),
        (some("x"), some("7", shape=(-1,)), (), False),
        (some("x"), some("7", datatype="FP64"), (), False),
        (some("x"), some("7", "8"), (), False),
        (some("x", "y"), some("7"), (), False),
        ([], some("7"), (), False),
        (some("x"), some("7"), ("x",), False),
    ],
)
def test_what_may_stand_for_what(inputs, outputs, lods, fits):
    first, other = Ends(some("a"), some("w")), Ends(inputs, outputs, lods)
    if fits:
        assert named_as(first, other).inputs == first.inputs
    else:
        with pytest.raises(Unlike, match=r"^its (in|out)puts, .* the first, (a|w) FP32 \[-1, 2\]"):
            named_as(first, other)


def test_one_that_cannot_be_paired_is_closed():
    first, other = Ends(some("a"), some("w")), Ends(some("a", "b"), some("w"))
    candidates = [Candidate("first", lambda: first), Candidate("other", lambda: other)]
    assert fastest(candidates, lambda engine: []) is first
    assert other.is_closed
    assert not first.is_closed
